"""`run` as a program of its own: where it listens, how it stops, and what it leaves alone."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets.sync.client

import roomsock
from roomsock import App, SetupError

from .client import PATIENCE, upgrade_request

#: What a program is: an app, and `run`. Small limits, so that nobody waits for what never ends.
PROGRAM = """
import time, threading
import anyio, roomsock
from roomsock import App, Limits

limits = Limits(shutdown=0.2, close_grace=0.2, close_timeout=0.2, linger=0.2, on_close=0.2)
roomsock.running.HARD_STOP = 0.3
app = App(limits=limits)

@app.on_message("/echo")
async def echo(ws, text):
    await ws.send_text(text)

{more}
if __name__ == "__main__":
    roomsock.run(app, port=0, {options})
    {after}
"""

LOOPS = [
    pytest.param("uvloop=False", "asyncio", id="asyncio"),
    pytest.param("uvloop=True", "uvloop", id="uvloop"),
    pytest.param('backend="trio"', "trio", id="trio"),
]
SIGNALS = [signal.SIGTERM, signal.SIGINT]

#: Seconds in which a program has ended, on a busy machine; without our doing it would never.
QUICK = 5

#: A close frame of the server with the code 1012.
CLOSE_1012 = b"\x88\x02\x03\xf4"


class Program:
    """A running program; what it writes is read line by line."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stderr is not None
        self._pipe = self.process.stderr
        os.set_blocking(self._pipe.fileno(), False)
        self.log = ""

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read on until the log has what the pattern says."""
        deadline = time.monotonic() + PATIENCE
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            while not (match := re.search(pattern, self.log)):
                selector.select(max(0, deadline - time.monotonic()))
                data = os.read(self._pipe.fileno(), 65536)
                assert data, f"{pattern!r} is not in:\n{self.log}"
                self.log += data.decode()
        return match

    @property
    def port(self) -> int:
        return int(self.wait_for(r"listens on \S*:(\d+) ").group(1))

    def connect(self, path: str = "/echo") -> socket.socket:
        """A client with an open WebSocket."""
        sock = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        sock.sendall(upgrade_request(path))
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += sock.recv(4096)
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        return sock

    def signal(self, number: int) -> float:
        """Send a signal; when that was."""
        self.process.send_signal(number)
        return time.monotonic()

    def end(self) -> int:
        """Wait for the end; the exit code."""
        with contextlib.suppress(AssertionError):
            self.wait_for(r"(?!)")  # to the end of the log
        return self.process.wait(PATIENCE)


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    started: list[Program] = []

    def start(options: str = "", more: str = "", after: str = "", code: str = PROGRAM) -> Program:
        started.append(Program(code.format(options=options, more=more, after=after)))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        each._pipe.close()


def read_to_the_end(sock: socket.socket) -> bytes:
    data = b""
    with sock:
        while part := sock.recv(65536):
            data += part
    return data


# Starting


@pytest.mark.parametrize(("options", "loop"), LOOPS)
def test_the_start_line_says_where_and_on_which_loop(
    program: Callable[..., Program], options: str, loop: str
) -> None:
    running = program(options)
    line = running.wait_for(r"INFO roomsock: (roomsock \S+ listens on .*)\n").group(1)
    assert re.fullmatch(rf"roomsock \S+ listens on http://127\.0\.0\.1:\d+ \({loop}\)", line)
    url = f"ws://127.0.0.1:{running.port}/echo"
    with websockets.sync.client.connect(url, proxy=None) as client:
        client.send("hello")
        assert client.recv(PATIENCE) == "hello"
    running.signal(signal.SIGTERM)
    assert running.end() == 0


def test_uvloop_is_the_default_where_it_is_installed(program: Callable[..., Program]) -> None:
    running = program()
    running.wait_for(r"\(uvloop\)")


def test_every_address_is_in_the_start_line(
    program: Callable[..., Program], tmp_path: Path
) -> None:
    running = program('host=["127.0.0.1", "::1"]')
    running.wait_for(r"http://127\.0\.0\.1:(\d+), http://\[::1\]:\1 ")
    path = tmp_path / "socket"
    running = program(f"unix={str(path)!r}")
    running.wait_for(rf"unix:{path} ")
    running.signal(signal.SIGTERM)
    assert running.end() == 0
    assert not path.exists()


def test_a_port_in_use_is_a_clear_error(program: Callable[..., Program]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        running = program(code=PROGRAM.replace("port=0", f"port={taken.getsockname()[1]}"))
        assert running.end() == 1
    last = running.log.strip().splitlines()[-1]
    assert last.startswith("OSError: ")
    assert "in use" in last
    assert "Group" not in running.log


def test_configured_logging_is_left_alone(program: Callable[..., Program]) -> None:
    more = """
import logging, sys
handler = logging.StreamHandler(sys.stderr)
handler.setFormatter(logging.Formatter("<%(name)s> %(message)s"))
logging.getLogger("{name}").addHandler(handler)
logging.getLogger("roomsock").setLevel(logging.INFO)
"""
    for name in "roomsock", "":
        running = program(more=more.replace("{name}", name))
        running.wait_for(r"<roomsock> .* listens on ")
        running.signal(signal.SIGTERM)
        assert running.end() == 0
        assert running.log.count("listens on") == 1


# Stopping


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("options", "loop"), LOOPS)
def test_a_signal_closes_clients_with_1012_and_ends_with_0(
    program: Callable[..., Program], options: str, loop: str, number: int
) -> None:
    running = program(options, after='print("after run", file=__import__("sys").stderr)')
    idle, silent = running.connect(), socket.create_connection(("127.0.0.1", running.port))
    url = f"ws://127.0.0.1:{running.port}/echo"
    with websockets.sync.client.connect(url, proxy=None) as client:
        sent = running.signal(number)
        with pytest.raises(websockets.exceptions.ConnectionClosedError):
            client.recv(PATIENCE)
        assert client.protocol.close_code == 1012
    assert read_to_the_end(idle) == CLOSE_1012
    read_to_the_end(silent)
    assert running.end() == 0
    assert time.monotonic() - sent < QUICK
    assert "after run" in running.log
    assert "Traceback" not in running.log
    assert "ERROR" not in running.log


@pytest.mark.parametrize(("options", "loop"), LOOPS)
def test_a_hundred_clients_are_told(
    program: Callable[..., Program], options: str, loop: str
) -> None:
    running = program(options)
    clients = [running.connect() for _ in range(100)]
    sent = running.signal(signal.SIGTERM)
    for client in clients:
        assert read_to_the_end(client) == CLOSE_1012
    assert running.end() == 0
    assert time.monotonic() - sent < QUICK


def test_nobody_connected_stops_at_once(program: Callable[..., Program]) -> None:
    running = program()
    assert running.port
    sent = running.signal(signal.SIGTERM)
    assert running.end() == 0
    assert time.monotonic() - sent < QUICK


WAITS = """
@app.serve("/waits")
async def waits(ws):
    import sys
    print("waiting", file=sys.stderr)
    {how}
"""
SWALLOWS = """
    while True:
        try:
            await anyio.sleep(1000)
        except BaseException:
            print("swallowed", file=sys.stderr)
"""
#: Nothing here would end before the test's patience does.
PATIENT = "Limits(shutdown=100, close_grace=100)"


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("options", "loop"), LOOPS)
def test_a_second_signal_ends_at_once(
    program: Callable[..., Program], options: str, loop: str, number: int
) -> None:
    more = WAITS.format(how="await anyio.sleep(1000)")
    code = PROGRAM.replace("app = App(limits=limits)", f"app = App(limits={PATIENT})")
    running = program(options, more, code=code)
    with running.connect("/waits") as client:
        running.wait_for("waiting")
        running.signal(number)
        assert client.recv(100) == CLOSE_1012
        running.signal(number)
        assert running.end() == 128 + number


@pytest.mark.parametrize(("options", "loop"), LOOPS)
def test_a_handler_that_waits_is_cancelled_and_the_exit_code_is_0(
    program: Callable[..., Program], options: str, loop: str
) -> None:
    running = program(options, WAITS.format(how="await anyio.sleep(1000)"))
    with running.connect("/waits"):
        running.wait_for("waiting")
        running.signal(signal.SIGTERM)
        assert running.end() == 0


@pytest.mark.parametrize("swallows", [True, False])
@pytest.mark.parametrize(("options", "loop"), LOOPS)
def test_a_handler_that_does_not_stop_is_named_and_does_not_hold_the_process(
    program: Callable[..., Program], options: str, loop: str, swallows: bool
) -> None:
    """Swallowing its cancellation, or without an await."""
    how = SWALLOWS if swallows else "time.sleep(1000)"
    running = program(options, WAITS.format(how=how))
    with running.connect("/waits"):
        running.wait_for("waiting")
        sent = running.signal(signal.SIGTERM)
        assert running.end() == 1
        assert time.monotonic() - sent < QUICK
    running.wait_for(r"CRITICAL roomsock: ended although this does not stop: .*\bwaits\b.*'/waits'")


def test_a_thread_that_does_not_stop_does_not_hold_the_process(
    program: Callable[..., Program],
) -> None:
    """asyncio's own threads outlive their tasks, and the loop's end waits for them."""
    how = "import asyncio; await asyncio.to_thread(time.sleep, 1000)"
    running = program("uvloop=False", WAITS.format(how=how))
    with running.connect("/waits"):
        running.wait_for("waiting")
        running.signal(signal.SIGTERM)
        assert running.end() == 1
    running.wait_for(r"CRITICAL roomsock: ended although this does not stop: a thread")


def test_a_log_that_is_stuck_does_not_hold_the_process(program: Callable[..., Program]) -> None:
    how = """
    import logging
    roomsock.running.LAST_WORDS = 0.1
    logging.getLogger().handlers[0].acquire()
    time.sleep(1000)
"""
    running = program("uvloop=False", WAITS.format(how=how))
    with running.connect("/waits"):
        running.wait_for("waiting")
        running.signal(signal.SIGTERM)
        assert running.end() == 1
    assert "CRITICAL" not in running.log


@pytest.mark.parametrize(("options", "loop"), LOOPS)
def test_run_in_another_thread_handles_no_signals(
    program: Callable[..., Program], options: str, loop: str
) -> None:
    code = PROGRAM.replace(
        "    roomsock.run(app, port=0, {options})",
        """
    import signal
    threading.Thread(
        target=lambda: roomsock.run(app, port=0, {options}), daemon=True
    ).start()
    signal.pause()
""",
    )
    running = program(options, code=code)
    with running.connect() as client:
        client.sendall(b"\x81\x82\x00\x00\x00\x00hi")
        assert client.recv(100) == b"\x81\x02hi"
        running.signal(signal.SIGTERM)
        assert running.end() == -signal.SIGTERM


# In this process


@pytest.fixture
def listens() -> Iterator[threading.Event]:
    """Set by the start line. Logging is configured then, so `run` leaves it alone."""
    event = threading.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "listens on" in record.getMessage():
                event.set()

    logger, watch = logging.getLogger("roomsock"), Watch()
    level = logger.level
    logger.addHandler(watch)
    logger.setLevel(logging.INFO)
    yield event
    logger.removeHandler(watch)
    logger.setLevel(level)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "options",
    [{"uvloop": False}, {"uvloop": True}, {"backend": "trio"}],
    ids=["asyncio", "uvloop", "trio"],
)
def test_run_returns_and_leaves_signals_and_logging_as_they_were(
    listens: threading.Event, options: dict[str, Any], number: int
) -> None:
    seen: list[int] = []
    before = {each: signal.signal(each, lambda n, _: seen.append(n)) for each in SIGNALS}
    handlers = [signal.getsignal(each) for each in SIGNALS]
    loggers = list(logging.getLogger().handlers)
    main_thread = threading.get_ident()

    def stop() -> None:
        if listens.wait(PATIENCE):
            signal.pthread_kill(main_thread, number)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        roomsock.run(App(), port=0, **options)
        assert [signal.getsignal(each) for each in SIGNALS] == handlers
        assert logging.getLogger().handlers == loggers
        signal.raise_signal(number)
        assert seen == [number]
    finally:
        thread.join()
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backend": "curio"}, "curio"),
        ({"backend": "trio", "uvloop": True}, "uvloop runs asyncio"),
        ({"unix": "somewhere", "sock": 3}, "exclude"),
        ({"host": []}, "nothing to listen on"),
    ],
)
def test_bad_arguments_are_a_setup_error(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(SetupError, match=text):
        roomsock.run(App(), port=0, **arguments)


@pytest.mark.parametrize(
    ("missing", "options", "text"),
    [
        ("trio", 'backend="trio"', r"SetupError: .*roomsock\[trio\]"),
        ("uvloop", "uvloop=True", r"SetupError: .*roomsock\[uvloop\]"),
        ("uvloop", "", r"listens on .* \(asyncio\)"),
    ],
)
def test_what_is_not_installed_is_named(
    program: Callable[..., Program], missing: str, options: str, text: str
) -> None:
    code = f"""
import sys, importlib.util
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError(name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == {missing!r} else find_spec(name, *a)
sys.meta_path.insert(0, Missing())
"""
    running = program(options, code=code + PROGRAM)
    running.wait_for(text)


def test_a_port_in_use_is_a_plain_oserror_here_too() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="in use"),
    ):
        roomsock.run(App(), port=taken.getsockname()[1])


def test_an_app_that_is_wrong_is_a_setup_error() -> None:
    app = App()

    @app.on_close("/nobody")
    def closed(ws: roomsock.WebSocket, reason: roomsock.ConnectionClosed) -> None: ...

    with pytest.raises(SetupError, match="/nobody"):
        roomsock.run(app, port=0)


def test_run_believes_the_proxies_it_is_told_of(program: Callable[..., Program]) -> None:
    running = program(
        'trusted_proxies=["127.0.0.1"], forwarded_header="forwarded"',
        more='app.add_get("/", lambda request: f"it is {request.client}")',
    )
    with socket.create_connection(("127.0.0.1", running.port), PATIENCE) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nForwarded: for=1.2.3.4\r\n\r\n")
        assert b"it is ('1.2.3.4', 0)" in read_to_the_end(sock)


async def test_run_inside_an_event_loop_says_what_to_use_instead() -> None:
    with pytest.raises(SetupError, match=r"serving\(app\)"):
        roomsock.run(App(), port=0)


@pytest.mark.parametrize("arguments", [{"trusted_proxies": ["*"]}, {"forwarded_header": "via"}])
def test_wrong_proxies_are_a_setup_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match="|".join(arguments)):
        roomsock.run(App(), port=0, **arguments)
