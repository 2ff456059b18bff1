# What does compression cost in a room, and what does it save?
#
#   python benchmarks/bench_compression.py [--rounds 5] [--seconds 1] [--loop asyncio|uvloop]
#                                          [--connections 500] [--only NAME] [--quick]
#
# A room of 100 members that all offer permessage-deflate, one sender, JSON chat messages of four
# sizes. Prints one line of JSON per size and server, then tables: the server's processor time per
# broadcast, also as a ratio to websockets with its default compression in the same round, and bytes
# on the wire for each member (medians of the rounds). Then resident KiB per idle connection: as
# opened, and after one message of 1 KiB each way.
# Every receiver's stream is inflated and checked behind the measured time: a message that is lost,
# in the wrong order or not compressed although it should be ends the run with an error.
# --quick is the smoke test: tiny, no figure decides anything.

from __future__ import annotations

import argparse
import json
import random
import select
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from statistics import median

import harness

RSV1 = 0x40
MEMBERS = 100
SIZES = (200, 1024, 4096, 16384)
WARM_UP = 0.25  # of the measured time, before it
DRAIN = 20.0  # seconds in which the last message must have come
OFFER = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
HEADERS = harness.PLAIN_HEADERS.removesuffix("\r\n") + OFFER

#: Name, script, and what it is told. The default of websockets is context takeover, 4 KiB windows.
SERVERS = {
    "roomsock off": ("with_roomsock.py", "off"),
    "roomsock on": ("with_roomsock.py", "on"),
    "roomsock takeover": ("with_roomsock.py", "takeover"),
    "websockets off": ("with_websockets.py", "off"),
    "websockets deflate": ("with_websockets.py", "on"),
}
BASE = "websockets deflate"


# Messages: what people write, in what programs wrap around it

_BODIES = 64


@cache
def _bodies(size: int) -> list[str]:
    chance = random.Random(size)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(1, 9))) for _ in range(2000)]
    often = [1 / rank for rank in range(1, len(words) + 1)]

    def line(length: int) -> dict[str, object]:
        text = " ".join(chance.choices(words, often, k=length // 3))[:length]
        return {
            "user": f"user{chance.randrange(100)}",
            "sent_at": f"2026-01-02T03:{chance.randrange(60):02}:{chance.randrange(60):02}Z",
            "text": text.capitalize(),
        }

    bodies = []
    for _ in range(_BODIES):
        lines: list[dict[str, object]] = []
        while (room := size - 30 - len(json.dumps(lines))) > 100:
            lines.append(line(min(chance.randint(60, 400), room - 80)))
        bodies.append(json.dumps({"type": "chat", "lines": lines})[1:])
    return bodies


def message(size: int, number: int) -> bytes:
    """The JSON text of so many bytes, or a few less, with that number."""
    return f'{{"id": {number}, {_bodies(size)[number % _BODIES]}'.encode()


def frames(stream: bytes) -> Iterator[tuple[int, int, int]]:
    """First byte, and where payload begins and ends, of all whole frames."""
    at = 0
    while len(stream) - at >= 2:
        length, start = stream[at + 1], at + 2
        if length >= 126:
            start += 2 if length == 126 else 8
            length = int.from_bytes(stream[at + 2 : start], "big")
        if len(stream) < start + length:
            return
        yield stream[at], start, start + length
        at = start + length


def check(stream: bytes, size: int, sent: int, compressed: bool) -> int:
    """Inflate what a member received: every message, in order; returns how many were there."""
    inflater = zlib.decompressobj(-15)  # serves a server without context takeover as well
    number = 0
    for first, start, end in frames(stream):
        payload = stream[start:end]
        if bool(first & RSV1) != compressed:
            raise SystemExit(f"message {number} is {'not ' if compressed else ''}compressed")
        if compressed:
            payload = inflater.decompress(payload + b"\x00\x00\xff\xff")
        if payload != message(size, number):
            raise SystemExit(f"message {number} of {sent} is not what came")
        number += 1
    return number


# The room


def run(port: int, pid: int, size: int, seconds: float, compressed: bool) -> tuple[float, ...]:
    """Load a server; returns its microseconds per broadcast, broadcasts per second, and bytes for
    each member."""
    socks = [harness.connect(port, f"/room/{size}", HEADERS) for _ in range(MEMBERS)]
    epoll = select.epoll()
    by_fd = {sock.fileno(): sock for sock in socks}
    streams = {fd: bytearray() for fd in by_fd}
    for sock in socks:
        sock.setblocking(False)
        epoll.register(sock.fileno(), select.EPOLLIN)
    speaker = socks[0]
    seen = 0  # bytes of the speaker's own stream that were looked at
    sent = 0

    def send() -> None:
        nonlocal sent
        frame = harness.client_frame(message(size, sent))
        if speaker.send(frame) != len(frame):
            raise SystemExit("the server does not read")
        sent += 1

    def read_once(sending: bool) -> None:
        nonlocal seen
        for fd, _ in epoll.poll(1.0):
            data = by_fd[fd].recv(1 << 18)
            if not data:
                raise SystemExit("the server closed a connection")
            streams[fd] += data
        own = bytes(streams[speaker.fileno()][seen:])
        for _, _, end in frames(own):
            seen += end
            if sending:  # the next is sent when one's own comes back
                send()
            break

    send()
    now = time.monotonic()
    begin, end = now + seconds * WARM_UP, now + seconds * (1 + WARM_UP)
    while time.monotonic() < begin:
        read_once(True)
    began, before, used = time.monotonic(), sent, harness.cpu_seconds(pid)
    while time.monotonic() < end:
        read_once(True)
    elapsed = time.monotonic() - began
    broadcasts, used = sent - before, harness.cpu_seconds(pid) - used

    late = time.monotonic() + DRAIN
    missing = set(by_fd)
    while missing and time.monotonic() < late:
        missing = {fd for fd in missing if sum(1 for _ in frames(streams[fd])) < sent}
        if missing:
            read_once(False)
    # Equal bytes inflate to equal messages.
    for stream in set(map(bytes, streams.values())):
        if (found := check(stream, size, sent, compressed)) != sent:
            raise SystemExit(f"{found} messages came instead of {sent}")
    for sock in socks:
        sock.close()
    epoll.close()
    time.sleep(0.05)  # the server notices that they are gone
    wire = sum(map(len, streams.values())) / len(streams) / sent
    return used / max(broadcasts, 1) * 1e6, broadcasts / elapsed, wire


# Memory


def deflated(payload: bytes) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, -12)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def receive_frame(sock: socket.socket) -> tuple[int, bytes]:
    data = b""
    while True:
        for first, start, end in frames(data):
            return first, data[start:end]
        if not (chunk := sock.recv(1 << 16)):
            raise SystemExit("the server closed a connection")
        data += chunk


def memory(port: int, pid: int, connections: int, compressed: bool) -> tuple[float, float]:
    """KiB per connection: as opened, and after one message each way."""
    text = message(1024, 1)
    frame = harness.client_frame(text)
    if compressed:
        frame = harness.client_frame(deflated(text), harness.TEXT | RSV1)
    with ExitStack() as stack:
        for _ in range(20):  # what is made once for all is made
            harness.connect(port, "/echo", HEADERS).close()
        before = harness.memory_kib(pid)
        socks = [
            stack.enter_context(harness.connect(port, "/echo", HEADERS)) for _ in range(connections)
        ]
        opened = harness.memory_kib(pid)
        for sock in socks:
            sock.sendall(frame)
            first, payload = receive_frame(sock)
            if first & RSV1:
                payload = zlib.decompressobj(-15).decompress(payload + b"\x00\x00\xff\xff")
            if bool(first & RSV1) != compressed or payload != text:
                raise SystemExit("the echo is not what was sent")
        spoken = harness.memory_kib(pid)
    return (opened - before) / connections, (spoken - before) / connections


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--connections", type=int, default=500, help="idle ones, for the memory")
    parser.add_argument("--only", default="", help="only servers whose name has this")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sizes = SIZES
    if options.quick:
        options.rounds, options.seconds, options.connections = 1, 0.2, 20
        sizes = (200, 4096)
    harness.raise_descriptor_limit()
    names = [name for name in SERVERS if options.only in name or name == BASE]
    shown = list(names)
    machine = harness.machine()

    def server(stack: ExitStack, name: str) -> tuple[int, int]:
        script, compression = SERVERS[name]
        path = Path(__file__).parent / "servers" / script
        process, port = stack.enter_context(harness.server(str(path), options.loop, compression))
        return port, process.pid

    results: dict[tuple[int, str], list[tuple[float, ...]]] = {}
    order = random.Random(1)
    with ExitStack() as stack:
        running = {name: server(stack, name) for name in names}
        for _ in range(options.rounds):
            for size in sizes:
                order.shuffle(names)
                figures = {}
                for name in names:
                    compressed = SERVERS[name][1] != "off"
                    figures[name] = run(*running[name], size, options.seconds, compressed)
                for name, (cost, rate, wire) in figures.items():
                    figure = (cost, cost / figures[BASE][0], rate, wire)
                    results.setdefault((size, name), []).append(figure)
    for size in sizes:
        for name in shown:
            costs, ratios, rates, wires = zip(*results[size, name], strict=True)
            harness.report(
                workload=f"room of {MEMBERS}, 1 sender, {size} bytes",
                server=name,
                loop=options.loop,
                server_us_per_broadcast=round(median(costs), 1),
                least=round(min(costs), 1),
                most=round(max(costs), 1),
                cost_ratio_to_websockets_deflate=round(median(ratios), 2),
                broadcasts_per_second=round(median(rates)),
                wire_bytes_per_member=round(median(wires), 1),
                rounds=options.rounds,
                **machine,
            )
    kib = {}
    for name in shown:
        with ExitStack() as stack:  # a process of its own: its memory was never used before
            port, pid = server(stack, name)
            kib[name] = memory(port, pid, options.connections, SERVERS[name][1] != "off")
        harness.report(
            workload=f"{options.connections} idle connections",
            server=name,
            loop=options.loop,
            kib_per_connection=round(kib[name][0], 1),
            kib_after_a_message_each_way=round(kib[name][1], 1),
        )

    print("\n" + " " * 18 + "".join(f"{name:>28}" for name in shown))
    for size in sizes:
        cells = []
        for name in shown:
            cost, ratio, _, wire = map(median, zip(*results[size, name], strict=True))
            cells.append(f"{f'{cost:,.0f}us {ratio:.2f}x {wire:,.0f}B':>28}")
        print(f"{f'{size:,} bytes':18}" + "".join(cells))
    cells = [f"{f'{opened:.1f} / {spoken:.1f} KiB':>28}" for opened, spoken in kib.values()]
    print(f"{'idle connection':18}" + "".join(cells))
    print("(the server's processor time for a broadcast to 100, its ratio to websockets deflate,")
    print(" bytes on the wire for each member; memory as opened / after a message each way)")


if __name__ == "__main__":
    main()
