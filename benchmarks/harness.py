"""What the benchmarks and checks share: server processes, raw WebSocket clients, measurements.

The clients are plain sockets and bytes made beforehand, so that the load costs little and is the
same for every server. Everything runs on the loopback interface, on ports the kernel chooses.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

LOOPS = ("asyncio", "uvloop", "trio")
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

#: No server outlives a benchmark that was killed by more than this, in seconds.
SERVER_LIFE = 3600

#: What a browser sends, 600 bytes of it.
BROWSER_HEADERS = (
    "Host: 127.0.0.1\r\nConnection: Upgrade\r\nPragma: no-cache\r\nCache-Control: no-cache\r\n"
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/140.0.0.0 Safari/537.36\r\nUpgrade: websocket\r\nOrigin: http://127.0.0.1\r\n"
    "Sec-WebSocket-Version: 13\r\nAccept-Encoding: gzip, deflate, br, zstd\r\n"
    "Accept-Language: en-GB,en;q=0.9,de;q=0.8\r\n"
    "Cookie: session=6f1c1c6d0d5f4a54a3b1; theme=dark; consent=1; visited=2026-01-02\r\n"
    "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
    "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
)
PLAIN_HEADERS = (
    "Host: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)


# Processes


def pin(pid: int, core: int) -> None:
    """Keep a process on one core, where there are several: server and load do not share one."""
    cores = sorted(os.sched_getaffinity(0) | CORES)
    if len(cores) > 1:
        os.sched_setaffinity(pid, {cores[core % len(cores)]})


CORES = os.sched_getaffinity(0)


def raise_descriptor_limit() -> int:
    """Allow as many descriptors as the system lets us; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@contextmanager
def server(
    *command: str, errors: IO[str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start ``python command...``, which prints its port first; the server's core is the first,
    the caller's the second. What it writes to standard error goes to ``errors``."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without ending the server
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        preexec_fn=_end_with_parent,
    )
    try:
        pin(process.pid, 0)
        pin(os.getpid(), 1)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.strip():
            raise SystemExit(f"{' '.join(command)} did not start")
        yield process, int(line)
    finally:
        process.kill()
        process.wait()


def _end_with_parent() -> None:
    """Have the kernel kill this process, stopped or not, when its parent was killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


PR_SET_PDEATHSIG = 1


@contextmanager
def kept_awake() -> Iterator[None]:
    """Never let the two cores sleep: on each a process spins while nothing else wants to run.

    To wake one takes a virtual machine 20 to 200 us, much more than an echo, and differs from one
    minute to the next: it is what would be measured of who waits for single messages.
    """
    with ExitStack() as stack:
        for core in range(min(len(CORES), 2)) if hasattr(os, "SCHED_IDLE") else ():
            command = [sys.executable, "-c", "while True: pass"]
            spinning = subprocess.Popen(command, preexec_fn=_end_with_parent)
            stack.enter_context(spinning)
            stack.callback(spinning.kill)
            pin(spinning.pid, core)
            os.sched_setscheduler(spinning.pid, os.SCHED_IDLE, os.sched_param(0))
        yield


def run_loop(loop: str, main: Any) -> None:
    """Run an async function on ``asyncio``, ``uvloop`` or ``trio``; for server processes."""
    import anyio

    signal.alarm(SERVER_LIFE)
    options = {"use_uvloop": True} if loop == "uvloop" else {}
    anyio.run(main, backend="trio" if loop == "trio" else "asyncio", backend_options=options)


def serve(app: Any, loop: str) -> None:
    """Serve a roomsock app, print its port, and tell its counters at ``/stats``."""
    import roomsock

    raise_descriptor_limit()
    servers: list[Any] = []

    def stats(request: Any) -> dict[str, int]:
        server = servers[0]
        names = ("connections", "over_limit", "slow_consumers", "dropped_messages")
        return {
            "open": server.connections,
            **{name: getattr(server.counters, name) for name in names},
        }

    app.add_get("/stats", stats)

    async def main() -> None:
        async with roomsock.serving(app, port=0) as server:
            servers.append(server)
            print(server.addresses[0][1], flush=True)
            await server.stopped()

    run_loop(loop, main)


def run_checks(
    parser: argparse.ArgumentParser,
    serve: Callable[[str], None],
    check: Callable[[str, argparse.Namespace], bool],
    loops: tuple[str, ...] = LOOPS,
) -> None:
    """The main function of a check: once for each event loop; its exit code says how it went."""
    parser.add_argument("--loop", choices=LOOPS, help="only this event loop")
    parser.add_argument("--serve", choices=LOOPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    else:
        results = [check(loop, options) for loop in loops if options.loop in (None, loop)]
        sys.exit(not all(results))


# Measurements


def memory_kib(pid: int, field: str = "VmRSS") -> int:
    """Resident memory of a process in KiB; ``VmHWM`` is the most it ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(field)


def cpu_seconds(pid: int) -> float:
    """Processor time a process has used, user and system together."""
    threads = list(Path(f"/proc/{pid}/task").glob("*/schedstat"))
    if threads:  # in nanoseconds
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


PACKAGES = ("roomsock", "anyio", "trio", "uvloop", "websockets", "picows", "wsproto", "msgspec")


def machine(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """What the figures were measured on, and with."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {name: _version(name) for name in packages},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except Exception:  # not installed
        return None


def report(**values: Any) -> None:
    """One result: one line of JSON."""
    print(json.dumps(values), flush=True)


# Clients


def connect(
    port: int, path: str, headers: str = PLAIN_HEADERS, receive_buffer: int | None = None
) -> socket.socket:
    """Open a WebSocket; returns the blocking socket, the 101 read away."""
    sock = ask(port, path, headers, receive_buffer)
    take_101(sock)
    return sock


def ask(port: int, path: str, headers: str, receive_buffer: int | None = None) -> socket.socket:
    """Connect and ask for a WebSocket, without waiting for the answer."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(f"GET {path} HTTP/1.1\r\n{headers}".encode())
    return sock


def take_101(sock: socket.socket) -> None:
    """Wait for the answer, and take not a byte of the frames behind it."""
    while True:
        answer = sock.recv(4096, socket.MSG_PEEK)
        head, end, _ = answer.partition(b"\r\n\r\n")
        if not answer or (end and not head.startswith(b"HTTP/1.1 101 ")):
            raise ConnectionError(f"refused: {head!r}")
        if end:
            sock.recv(len(head + end))
            return


def get(port: int, path: str) -> Any:
    """GET a JSON document."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return json.loads(answer.partition(b"\r\n\r\n")[2])


_random = random.Random(20260101)


def client_frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """A whole masked frame."""
    key = _random.randbytes(4)
    mask = int.from_bytes((key * (len(payload) // 4 + 1))[: len(payload)], "big")
    masked = (int.from_bytes(payload, "big") ^ mask).to_bytes(len(payload), "big")
    return server_header(len(payload), opcode, 0x80) + key + masked


def server_header(length: int, opcode: int = TEXT, masked: int = 0) -> bytes:
    """What stands in front of a payload of that length (and its key)."""
    if length < 126:
        return bytes((0x80 | opcode, masked | length))
    if length < 65536:
        return struct.pack("!BBH", 0x80 | opcode, masked | 126, length)
    return struct.pack("!BBQ", 0x80 | opcode, masked | 127, length)


def split_frames(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """A server's bytes as ``(opcode, payload)``, and the incomplete rest."""
    frames, at = [], 0
    while len(data) - at >= 2:
        length, start = data[at + 1] & 0x7F, at + 2
        if length == 126:
            length, start = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
        elif length == 127:
            length, start = int.from_bytes(data[at + 2 : at + 10], "big"), at + 10
        if start > len(data) or len(data) < start + length:
            break
        frames.append((data[at] & 0x0F, data[start : start + length]))
        at = start + length
    return frames, data[at:]


def read_to_end(sock: socket.socket, seconds: float) -> tuple[list[tuple[int, bytes]], bytes, str]:
    """Read until the end of the stream: frames, rest, and how it ended (eof, reset, timeout)."""
    until = time.monotonic() + seconds
    data = bytearray()
    ended = "timeout"
    while (left := until - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            chunk = sock.recv(1 << 20)
        except TimeoutError:
            break
        except OSError:
            ended = "reset"
            break
        if not chunk:
            ended = "eof"
            break
        data += chunk
    frames, rest = split_frames(bytes(data))
    return frames, rest, ended


def close_code(frames: list[tuple[int, bytes]]) -> int | None:
    """The code of the close frame among frames, if there is one."""
    codes = [int.from_bytes(payload[:2], "big") for opcode, payload in frames if opcode == CLOSE]
    return codes[0] if codes else None


class SameStream:
    """What the members of one room saw: every one must see the same bytes.

    Who is ahead writes down what the others are compared with.
    """

    def __init__(self) -> None:
        self.stream = bytearray()

    def check(self, position: int, chunk: bytes) -> int:
        """Compare what a member received at its position; returns its new position."""
        known = bytes(self.stream[position : position + len(chunk)])
        if not chunk.startswith(known):
            raise SystemExit(f"two members saw different messages behind byte {position}")
        self.stream += chunk[len(known) :]
        return position + len(chunk)
