# Do clients and handlers that misbehave end within the documented times?
#
#   python benchmarks/check_misbehaviour.py [--loop asyncio|uvloop|trio]
#
# Real time and the default Limits; everything happens at once, so that it takes 45 s for each
# event loop. Prints for each case the documented seconds until the connection's end is told to
# on_close and until its socket is closed, and the seconds it took. Deadlines come from
# housekeeping, four times a second: half a second late is right.

from __future__ import annotations

import argparse
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import harness

LATE = 0.75  # housekeeping's quarter of a second, twice, and a noisy machine
PATIENCE = 60.0


def serve(loop: str) -> None:
    import anyio

    import roomsock

    app = roomsock.App()
    told: dict[str, Any] = {}

    @app.on_message("/paced/<case>")
    async def paced(ws, text, case):
        await ws.send_text(text)

    @app.on_message("/unpaced/<case>")
    def unpaced(ws, text, case):
        ws.send_text(text)

    @app.on_message("/close/<case>")
    async def close(ws, text, case):
        await ws.close(4000, "enough")

    @app.on_message("/swallow/<case>")
    async def swallow(ws, text, case):
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                await anyio.sleep(0.01)
            except anyio.get_cancelled_exc_class():
                time.sleep(0.01)  # noqa: ASYNC251  (or it would spin)

    @app.on_message("/shield/<case>")
    async def shield(ws, text, case):
        with anyio.CancelScope(shield=True):
            await anyio.sleep(30)

    for mode in ("paced", "unpaced", "close", "swallow", "shield"):
        app.add_on_close(f"/{mode}/<case>", lambda ws, reason, case: tell(case, reason))

    def tell(case: str, reason: roomsock.ConnectionClosed) -> None:
        told[case] = {"at": time.monotonic(), "code": reason.code}

    app.add_get("/told", lambda request: told)
    harness.serve(app, loop)


# What each client does until its time begins to run; then it only waits for the socket's end.


def flood(sock: socket.socket) -> None:
    """Send without reading until the server takes no more."""
    sock.settimeout(0.5)
    frames = harness.client_frame(b"x" * 1024) * 64
    try:
        while True:
            sock.sendall(frames)
    except OSError:
        pass


def speak(sock: socket.socket) -> None:
    sock.sendall(harness.client_frame(b"hello"))


def speak_and_leave(sock: socket.socket) -> None:
    """The handler is at work when its client closes, and the socket stays open."""
    speak(sock)
    time.sleep(0.1)
    sock.sendall(harness.client_frame(b"\x03\xe8", harness.CLOSE))


def be_silent(sock: socket.socket) -> None:
    """Answer no ping, send nothing."""


# case: (mode, what the client does, when on_close is told, when the socket is closed, code)
# A flood is over when the kernel's buffers are full, which is when the time begins to run.
CASES: dict[str, tuple[str, Callable[[socket.socket], None], str, str, int]] = {
    "sends and never reads, paced handler": ("paced", flood, "send", "send", 1013),
    "sends and never reads, unpaced handler": ("unpaced", flood, "at once", "close", 1013),
    "never answers a close": ("close", speak, "at once", "close", 4000),
    "answers no ping": ("paced", be_silent, "ping", "ping", 1011),
    "handler swallows cancellation": ("swallow", speak_and_leave, "grace", "close", 1000),
    "handler shields itself": ("shield", speak_and_leave, "grace", "close", 1000),
}


def documented() -> dict[str, float]:
    import roomsock

    limits = roomsock.Limits()
    return {
        "at once": 0.0,
        "send": limits.send_timeout,
        "close": limits.close_timeout,
        "ping": 20.0 + 20.0,
        "grace": 2 * limits.close_grace,  # until it is cancelled, and again until it is given up
    }


def measure(port: int, case: str, results: dict[str, dict[str, Any]]) -> None:
    mode, act, _, _, _ = CASES[case]
    key = str(list(CASES).index(case))
    sock = harness.connect(port, f"/{mode}/{key}", receive_buffer=16 * 1024)
    act(sock)
    began = time.monotonic()
    if act is flood:
        began -= 0.5
        while not (entry := harness.get(port, "/told").get(key)):
            if time.monotonic() > began + PATIENCE:
                break
            time.sleep(0.1)
        gone = wait_until_sending_fails(sock)
    else:
        harness.read_to_end(sock, PATIENCE)
        gone = time.monotonic()
        time.sleep(1.0)
        while not (entry := harness.get(port, "/told").get(key)):
            if time.monotonic() > began + PATIENCE:
                break
            time.sleep(0.1)
    results[case] = {
        "told": entry and entry["at"] - began,
        "code": entry and entry["code"],
        "gone": gone - began,
    }
    sock.close()


def wait_until_sending_fails(sock: socket.socket) -> float:
    """The socket's end, found without reading: sending is refused once it was reset."""
    until = time.monotonic() + PATIENCE
    sock.settimeout(0.1)
    while time.monotonic() < until:
        try:
            sock.send(b"\x81")
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic()


def check(loop: str, _options: argparse.Namespace) -> bool:
    times = documented()
    results: dict[str, dict[str, Any]] = {}
    with harness.server(__file__, "--serve", loop) as (_process, port):
        threads = [threading.Thread(target=measure, args=(port, c, results)) for c in CASES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = harness.get(port, "/stats")
    good = []
    for case, (_, _, told, gone, code) in CASES.items():
        result = results.get(case, {"told": None, "code": None, "gone": PATIENCE})
        ok = result["told"] is not None and result["code"] == code
        ok = ok and result["told"] <= times[told] + LATE and result["gone"] <= times[gone] + LATE
        good.append(ok)
        harness.report(
            check="misbehaviour",
            loop=loop,
            case=case,
            documented_told=times[told],
            told=result["told"] and round(result["told"], 2),
            documented_gone=times[gone],
            gone=round(result["gone"], 2),
            code=result["code"],
            ok=ok,
        )
    harness.report(check="misbehaviour", loop=loop, still_open=stats["open"] - 1)
    return all(good) and stats["open"] == 1


def main() -> None:
    harness.run_checks(argparse.ArgumentParser(), serve, check, ("asyncio", "trio"))


if __name__ == "__main__":
    main()
