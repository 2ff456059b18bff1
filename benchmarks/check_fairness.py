# How long does one busy client, or one busy handler, hold up everybody else?
#
#   python benchmarks/check_fairness.py [--loop asyncio|uvloop|trio] [--only NAME] [--seconds 2]
#
# (a) burst: one member of a room of 1,000 sends a whole 64 KiB read of tiny frames (9,362).
# (b) loop: a handler sends 100,000 messages to its room (of 10, of 50) without an await; it
#     holds the event loop by nature, and must close nobody who reads.
# (c) flood: one client sends, as fast as it is read, what costs more to parse than to send, in
#     bursts of 64 KiB: pings, fragments, messages that inflate to 1 MiB each, and the like.
# Meanwhile a bystander, a process of its own, measures round trips on /echo. Prints for each
# loop: members that got everything in order (all is right), the seconds it took, and the
# bystander's median, 99th percentile and worst round trip in milliseconds, also while nothing
# else happens; at the end a table of the floods. The exit code is 1 if anything was lost, or a
# flood was cut off: it does nothing that is forbidden.

from __future__ import annotations

import argparse
import json
import random
import select
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import harness

BURST = 9_362
LOOP = 100_000
PATIENCE = 90.0
READ = 64 * 1024
MIB = 1024 * 1024
BLOCKS = 1000  # final ones in a message: more are refused
CONTINUATION, BINARY, RSV1 = 0x0, 0x2, 0x40
OFFER = "Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
HEADERS = harness.PLAIN_HEADERS.removesuffix("\r\n") + OFFER


def serve(loop: str) -> None:
    import roomsock

    # pings would stand between the messages
    app = roomsock.App(keepalive=None, compression=True)

    @app.on_message("/echo")
    async def echo(ws, text):
        await ws.send_text(text)

    @app.on_message("/burst")
    async def burst(ws, text):
        ws.send_text_to_this_room(text)

    @app.on_message("/loop/<size>")
    async def loop_handler(ws, text, size):
        for number in range(LOOP):
            ws.send_text_to_this_room(f"{number:08}")

    @app.on_message("/nothing")
    async def nothing(ws, message: str | bytes):
        pass

    harness.serve(app, loop)


def bystander(port: int) -> None:
    """Echo until standard input has something; print when each round trip began, and its ms."""
    sock = harness.connect(port, "/echo")
    sock.settimeout(PATIENCE)
    frame = harness.client_frame(b"hello")
    trips = []
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.002)[0]:
        sent = time.monotonic()
        sock.sendall(frame)
        sock.recv(100)
        trips.append((sent, (time.monotonic() - sent) * 1000))
    print(json.dumps(trips))


def watch(port: int, action: Callable[[], None]) -> dict[str, float]:
    """Do something while a bystander measures: its round trips in milliseconds."""
    command = [sys.executable, __file__, "--bystander", str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        began = time.monotonic()
        action()
        ended = time.monotonic()
        out, _ = process.communicate("done\n")
    trips = sorted(ms for sent, ms in json.loads(out) if began - 0.01 < sent < ended)
    return {
        "trips": len(trips),
        "median": round(median(trips), 2),
        "99th": round(trips[len(trips) * 99 // 100], 2),  # without what the machine itself does
        "worst": round(trips[-1], 1),
    }


def check(loop: str, name: str, path: str, members: int, send: bytes, expected: bytes) -> bool:
    with harness.server(__file__, "--serve", loop) as (process, port):
        quiet = watch(port, lambda: time.sleep(1))
        socks = [harness.connect(port, path) for _ in range(members)]
        epoll = select.epoll()
        by_fd = {sock.fileno(): sock for sock in socks}
        at = dict.fromkeys(by_fd, 0)
        for sock in socks:
            sock.setblocking(False)
            epoll.register(sock.fileno(), select.EPOLLIN)
        before = harness.memory_kib(process.pid)
        state = {"seconds": 0.0, "closed": 0, "in_order": True}

        def action() -> None:
            began = time.monotonic()
            socks[0].setblocking(True)
            socks[0].sendall(send)
            socks[0].setblocking(False)
            missing = members
            while missing and time.monotonic() < began + PATIENCE:
                for fd, _ in epoll.poll(1.0):
                    data = by_fd[fd].recv(1 << 18)
                    position = at[fd]
                    at[fd] += len(data)
                    if data and data == expected[position : at[fd]]:
                        missing -= at[fd] == len(expected)
                        continue
                    state["in_order"] = False
                    state["closed"] += not data
                    missing -= 1
                    epoll.unregister(fd)
            state["seconds"] = time.monotonic() - began

        busy = watch(port, action)
        complete = sum(position == len(expected) for position in at.values())
        stats = harness.get(port, "/stats")
        ok = complete == members and state["in_order"] and not stats["slow_consumers"]
        harness.report(
            check=f"fairness, {name}",
            loop=loop,
            members=members,
            members_with_all_in_order=complete if state["in_order"] else 0,
            closed=state["closed"],
            seconds=round(state["seconds"], 2),
            quiet_echo_ms=quiet,
            busy_echo_ms=busy,
            slow_consumers=stats["slow_consumers"],
            memory_before_mib=round(before / 1024, 1),
            memory_peak_mib=round(harness.memory_kib(process.pid, "VmHWM") / 1024, 1),
            ok=ok,
        )
        for sock in socks:
            sock.close()
        return ok


# Floods


def many(frame: bytes) -> bytes:
    return frame * (READ // len(frame))


def fragments(payload: bytes) -> bytes:
    """One message in as many fragments as fit a read."""
    first, middle = (
        bytes((opcode,)) + harness.client_frame(payload, opcode)[1:]  # without FIN
        for opcode in (harness.TEXT, CONTINUATION)
    )
    last = harness.client_frame(payload, CONTINUATION)
    return first + middle * (READ // len(middle) - 2) + last


def deflated(payload: bytes, flush: int = zlib.Z_SYNC_FLUSH) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = compressor.compress(payload) + compressor.flush(flush)
    return data[:-4] if flush == zlib.Z_SYNC_FLUSH else data


def compressed(payload: bytes) -> bytes:
    return harness.client_frame(payload, BINARY | RSV1)


def floods() -> dict[str, bytes]:
    final = deflated(b"x", zlib.Z_FINISH)
    nothing = deflated(b"", zlib.Z_FINISH)
    sync = b"\x00\x00\x00\xff\xff"
    end = b"\x00"  # RFC 7692, section 7.2.3.4
    window = deflated(bytes(32 * 1024), zlib.Z_FINISH)  # to be kept for what follows
    noise = deflated(random.Random(1).randbytes(READ - 4096))
    room = READ - 14 - len(end)
    return {
        "pings": many(harness.client_frame(b"", harness.PING)),
        "empty fragments": fragments(b""),
        "fragments of a byte": fragments(b"x"),
        "bombs of 1 MiB": many(compressed(deflated(bytes(MIB)))),
        "final blocks of a byte": many(compressed(final * BLOCKS + end)),
        "final blocks of nothing": many(compressed(nothing * BLOCKS + end)),
        "final blocks amid much": compressed(window + nothing * BLOCKS + noise),
        "blocks of nothing": compressed(sync * (room // len(sync)) + end),
        "tiny compressed messages": many(compressed(final + end)),
        "tiny messages": many(harness.client_frame(b"x")),
        "empty messages": many(harness.client_frame(b"")),
    }


def send_on_and_on(port: int, burst: bytes, seconds: float) -> tuple[float, bool]:
    """Bursts per second that the server took, and whether it let that go on."""
    sock = harness.connect(port, "/nothing", HEADERS)
    sock.setblocking(False)
    left = memoryview(burst)
    sent = 0
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        readable, writable, _ = select.select([sock], [sock], [], 0.1)
        try:
            if readable and harness.close_code(harness.split_frames(sock.recv(1 << 20))[0]):
                return 0.0, False
            if writable:
                sent += (count := sock.send(left))
                left = left[count:] or memoryview(burst)
        except ConnectionError:
            return 0.0, False
    sock.close()
    return sent / len(burst) / seconds, True


def waited(pid: int) -> float:
    """Milliseconds for which a process could have run and something else did: no fault of it."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e6


def check_flood(loop: str, name: str, burst: bytes, seconds: float) -> dict[str, object]:
    with harness.server(__file__, "--serve", loop) as (process, port):
        quiet = watch(port, lambda: time.sleep(1))
        outcome: list[tuple[float, bool]] = []
        before = waited(process.pid)
        busy = watch(port, lambda: outcome.append(send_on_and_on(port, burst, seconds)))
        [(rate, ok)] = outcome
        result = {
            "check": f"fairness, flood of {name}",
            "loop": loop,
            "bursts_per_second": round(rate, 1),
            "quiet_echo_ms": quiet,
            "busy_echo_ms": busy,
            "server_waited_for_its_core_ms": round(waited(process.pid) - before),
            "memory_peak_mib": round(harness.memory_kib(process.pid, "VmHWM") / 1024, 1),
            "ok": ok,
        }
    harness.report(**result)
    return result


def check_floods(loop: str, options: argparse.Namespace) -> bool:
    results = {
        name: check_flood(loop, name, burst, options.seconds)
        for name, burst in floods().items()
        if options.only in f"flood of {name}"
    }
    if results:
        heads = "".join(f"{head:>10}" for head in ("median", "99th", "worst", "quiet"))
        print(f"\n{'echo of a bystander, ' + loop:32}{heads}")
    for name, result in results.items():
        busy: Any = result["busy_echo_ms"]
        quiet: Any = result["quiet_echo_ms"]
        figures = (busy["median"], busy["99th"], busy["worst"], quiet["worst"])
        print(f"{name:32}" + "".join(f"{ms:>7.1f} ms" for ms in figures))
    return all(result["ok"] for result in results.values())


def check_all(loop: str, options: argparse.Namespace) -> bool:
    texts = [bytes((32 + number % 90,)) for number in range(BURST)]
    burst = b"".join(map(harness.client_frame, texts))
    copies = b"".join(harness.server_header(1) + text for text in texts)
    numbers = b"".join(harness.server_header(8) + b"%08d" % number for number in range(LOOP))
    go = harness.client_frame(b"go")
    checks = [
        ("burst", "/burst", 1000, burst, copies),
        ("loop", "/loop/10", 10, go, numbers),
        ("loop", "/loop/50", 50, go, numbers),
    ]
    results = [check(loop, *each) for each in checks if options.only in each[0]]
    return all(results) and check_floods(loop, options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="only checks whose name has this")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a flood goes on")
    parser.add_argument("--bystander", type=int, help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args()
    if options.bystander:
        bystander(options.bystander)
    else:
        harness.raise_descriptor_limit()
        harness.run_checks(parser, serve, check_all)


if __name__ == "__main__":
    main()
