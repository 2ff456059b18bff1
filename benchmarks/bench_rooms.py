# How fast are echoes and rooms, compared with other servers? A first look.
#
#   python benchmarks/bench_rooms.py [--rounds 5] [--seconds 1] [--only NAME] [--quick]
#
# Prints one line of JSON per workload and server (messages delivered per second, the server's
# processor time per message, both also as a ratio to websockets in the same round; medians of the
# rounds), then a table. Servers and rounds are interleaved, the server has one core and the load
# another; on a noisy machine only the ratios mean something. Ends with an error when a message is
# lost.
# --quick is the smoke test: tiny, two servers, no figure decides anything.

from __future__ import annotations

import argparse
import random
import select
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import harness

SIZE = 64
WARM_UP = 0.25  # of the measured time, before it
DRAIN = 10.0  # seconds in which the last message must have come


@dataclass(frozen=True)
class Workload:
    name: str
    path: str
    connections: int
    senders: int
    in_flight: int  # per sender: the next is sent when one's own comes back

    @property
    def copies(self) -> int:
        return 1 if self.path == "/echo" else self.connections


WORKLOADS = (
    Workload("echo, 100 connections", "/echo", 100, 100, 1),
    Workload("echo, 10 x 64 in flight", "/echo", 10, 10, 64),
    Workload("room of 100, 1 sender", "/room/a", 100, 1, 1),
    Workload("room of 100, 20 senders", "/room/a", 100, 20, 1),
)
QUICK = (
    Workload("echo, 10 connections", "/echo", 10, 10, 1),
    Workload("room of 10, 3 senders", "/room/a", 10, 3, 1),
)
SERVERS = {
    "roomsock asyncio": ("with_roomsock.py", "asyncio"),
    "roomsock uvloop": ("with_roomsock.py", "uvloop"),
    "roomsock trio": ("with_roomsock.py", "trio"),
    "websockets asyncio": ("with_websockets.py", "asyncio"),
    "picows uvloop": ("with_picows.py", "uvloop"),
}
BASE = "websockets asyncio"


class Sender:
    """A connection that sends, and knows its own messages when they come back."""

    def __init__(self, sock: socket.socket, number: int, text: bytes) -> None:
        self.sock = sock
        self.mark = b"<%05d>" % number
        self.frame = harness.client_frame((self.mark + text)[:SIZE])
        self.tail = b""
        self.sent = 0

    def send(self, count: int) -> None:
        data = self.frame * count
        if self.sock.send(data) != len(data):
            raise SystemExit("the server does not read")
        self.sent += count

    def own_copies(self, data: bytes) -> int:
        data = self.tail + data
        self.tail = data[1 - len(self.mark) :]
        return data.count(self.mark)


def run(port: int, pid: int, workload: Workload, seconds: float) -> tuple[float, float]:
    """Load a server; returns messages delivered per second and its microseconds for each."""
    text = bytes(random.Random(1).choices(b"abcdefghijklmnopqrstuvwxyz", k=SIZE))
    socks = [harness.connect(port, workload.path) for _ in range(workload.connections)]
    epoll = select.epoll()
    by_fd = {sock.fileno(): sock for sock in socks}
    senders = {s.fileno(): Sender(s, i, text) for i, s in enumerate(socks[: workload.senders])}
    for sock in socks:
        sock.setblocking(False)
        epoll.register(sock.fileno(), select.EPOLLIN)
    message = len(harness.server_header(SIZE)) + SIZE
    buffer = bytearray(1 << 18)
    received = 0

    def read_once(sending: bool) -> None:
        nonlocal received
        for fd, _ in epoll.poll(1.0):
            sender = senders.get(fd)
            if sender is None:
                size = by_fd[fd].recv_into(buffer)
            else:
                data = sender.sock.recv(1 << 18)
                size = len(data)
                if sending and (back := sender.own_copies(data)):
                    sender.send(back)
            if not size:
                raise SystemExit(f"{workload.name}: the server closed a connection")
            received += size

    for sender in senders.values():
        sender.send(workload.in_flight)
    now = time.monotonic()
    begin, end = now + seconds * WARM_UP, now + seconds * (1 + WARM_UP)
    while time.monotonic() < begin:
        read_once(True)
    began, before, used = time.monotonic(), received, harness.cpu_seconds(pid)
    while time.monotonic() < end:
        read_once(True)
    elapsed = time.monotonic() - began
    delivered = (received - before) / message
    used = harness.cpu_seconds(pid) - used

    expected = sum(sender.sent for sender in senders.values()) * workload.copies * message
    while received < expected and time.monotonic() < end + DRAIN:
        read_once(False)
    for sock in socks:
        sock.close()
    epoll.close()
    if received != expected:
        raise SystemExit(f"{workload.name}: received {received} bytes instead of {expected}")
    time.sleep(0.05)  # the server notices that they are gone
    return delivered / elapsed, used / max(delivered, 1) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--only", default="", help="only servers whose name has this")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    workloads, names = WORKLOADS, list(SERVERS)
    if options.quick:
        workloads, names = QUICK, ["roomsock asyncio", BASE]
        options.rounds, options.seconds = 1, 0.3
    names = [name for name in names if options.only in name or name == BASE]

    results: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    order = random.Random(1)
    with ExitStack() as stack:
        running = {}
        for name in names:
            script, loop = SERVERS[name]
            path = Path(__file__).parent / "servers" / script
            running[name] = stack.enter_context(harness.server(str(path), loop))
        for _ in range(options.rounds):
            for workload in workloads:
                order.shuffle(names)
                figures = {}
                for name in names:
                    process, port = running[name]
                    figures[name] = run(port, process.pid, workload, options.seconds)
                for name, (rate, cost) in figures.items():
                    base_rate, base_cost = figures[BASE]
                    figure = (rate, rate / base_rate, cost, cost / base_cost)
                    results.setdefault((workload.name, name), []).append(figure)

    machine = harness.machine()
    shown = [name for name in SERVERS if name in names]
    for workload in workloads:
        for name in shown:
            rates, ratios, costs, cost_ratios = zip(*results[workload.name, name], strict=True)
            harness.report(
                workload=workload.name,
                server=name,
                messages_per_second=round(median(rates)),
                slowest=round(min(rates)),
                fastest=round(max(rates)),
                ratio_to_websockets=round(median(ratios), 2),
                server_us_per_message=round(median(costs), 2),
                cost_ratio_to_websockets=round(median(cost_ratios), 2),
                rounds=options.rounds,
                **machine,
            )
    print("\n" + " " * 26 + "".join(f"{name:>28}" for name in shown))
    for workload in workloads:
        cells = []
        for name in shown:
            rate, ratio, cost, cost_ratio = map(
                median, zip(*results[workload.name, name], strict=True)
            )
            cell = f"{rate / 1000:,.0f}k {ratio:.2f}x  {cost:.1f}us {cost_ratio:.2f}x"
            cells.append(f"{cell:>28}")
        print(f"{workload.name:26}" + "".join(cells))
    print("(messages delivered per second and the server's processor time for each, both with the")
    print(" ratio to websockets: more of the first is better, less of the second)")


if __name__ == "__main__":
    main()
