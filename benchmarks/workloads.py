"""What the benchmark suite measures, and how."""

from __future__ import annotations

import itertools
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import harness
import load
from load import Load, Member, Result, Room, Sender, Stream, Wrong, measuring, settle

PERCENTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
TAIL = 2  # times as long: one in a thousand has to be many
PARALLEL = 20  # handshakes on their way at a time
#: A browser's header block, less its offer of compression: not everybody can refuse it, and what
#: deflate keeps for each connection is not what is compared here.
IDLE_HEADERS = "\r\n".join(
    line for line in harness.BROWSER_HEADERS.split("\r\n") if "-Extensions" not in line
)
CLOSE = harness.client_frame(b"\x03\xe8", harness.CLOSE)


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    group: str
    kind: str = "messages"  # or latency, handshakes, memory
    path: str = "/echo"  # /room stands for the rooms /room/0, /room/1, ...
    connections: int = 1
    rooms: int = 1
    senders: int = 1  # in each room; the connections of an echo all send
    in_flight: int = 1  # for each sender: the next is sent when its own comes back
    size: int = 64  # bytes of a message

    @property
    def unit(self) -> str:
        units = {"latency": "p99 in ms", "memory": "KiB each", "handshakes": "per second"}
        return units.get(self.kind, "messages per second")

    @property
    def short_unit(self) -> str:
        return {"latency": "ms", "memory": "KiB"}.get(self.kind, "/s")

    @property
    def less_is_better(self) -> bool:
        return self.kind in ("latency", "memory")

    def value(self, result: Result) -> float:
        """The figure that this is about."""
        return result.p99 * 1000 if self.kind == "latency" else result.rate

    def small(self) -> Workload:
        """The same for a smoke test."""
        return replace(
            self,
            connections=min(self.connections, 20 * self.rooms, 60),
            rooms=min(self.rooms, 3),
            senders=min(self.senders, 5),
        )


WORKLOADS = (
    Workload("echo-1", "echo, 1 connection", "echo"),
    Workload("echo-100", "echo, 100 connections", "echo", connections=100),
    Workload("pipelined", "echo, 10 x 64 in flight", "echo", connections=10, in_flight=64),
    Workload("echo-16k", "echo, 16 KiB", "echo", path="/binary", connections=10, size=16 << 10),
    Workload("echo-1m", "echo, 1 MiB", "echo", path="/binary", connections=4, size=1 << 20),
    Workload("text-1m", "echo of text, 1 MiB", "echo", connections=4, size=1 << 20),
    Workload("json", "typed JSON echo", "echo", path="/json", connections=100, size=160),
    Workload("room-100", "room of 100", "rooms", path="/room", connections=100),
    Workload("room-1000", "room of 1,000", "rooms", path="/room", connections=1000),
    Workload("room-5000", "room of 5,000", "rooms", path="/room", connections=5000),
    Workload(
        "room-100-20", "room of 100, 20 senders", "rooms", path="/room", connections=100, senders=20
    ),
    Workload(
        "room-1000-50",
        "room of 1,000, 50 senders",
        "rooms",
        path="/room",
        connections=1000,
        senders=50,
    ),
    Workload("rooms-200", "200 rooms of 5", "rooms", path="/room", connections=1000, rooms=200),
    Workload("handshakes", "handshakes", "other", kind="handshakes", connections=PARALLEL),
    Workload("memory", "10,000 idle", "other", kind="memory", connections=10_000),
    Workload("latency-echo", "echo, 100 connections", "other", kind="latency", connections=100),
    Workload(
        "latency-room",
        "room of 100, 20 senders",
        "other",
        kind="latency",
        path="/room",
        connections=100,
        senders=20,
    ),
)


@dataclass(frozen=True)
class Server:
    """A server process that runs."""

    port: int
    pid: int
    checked: bool = True  # what it sends is looked at, not only counted


def measure(workload: Workload, server: Server, seconds: float) -> Result:
    """Load a server for about that long."""
    try:
        result = MEASURES[workload.kind](workload, server, seconds)
        settle(server.pid)
    except OSError as error:
        raise Wrong(f"{type(error).__name__}: {error}") from error
    return result


def _open(workload: Workload, server: Server) -> Load:
    payload = load.json_text if workload.path == "/json" else load.text
    opcode = harness.BINARY if workload.path == "/binary" else harness.TEXT
    count = workload.connections // workload.rooms
    if workload.path == "/room":
        paths = [f"/room/{n}" for n in range(workload.rooms) for _ in range(count)]
        streams = [Stream(payload, n, workload.size, opcode) for n in range(workload.senders)]
        rooms = [Room(streams, server.checked) for _ in range(workload.rooms)]
    else:
        paths = [workload.path] * count
        streams = [Stream(payload, 0, workload.size, opcode)]
        rooms = [Room(streams, server.checked) for _ in range(count)]
        count = 1
    socks = list(load.open_all(server.port, paths, harness.PLAIN_HEADERS))
    members: list[Member] = []
    for number, sock in enumerate(socks):
        room, place = rooms[number // count], number % count
        if place < workload.senders:
            members.append(Sender(sock, room, streams[place]))
        else:
            members.append(Member(sock, room))
    settle(server.pid)  # all have entered
    return Load(rooms, members, streams[0].read_size)


def messages(workload: Workload, server: Server, seconds: float) -> Result:
    """Messages delivered in a second, when each sender sends the next as its own comes back."""
    clients = _open(workload, server)
    try:
        clients.run_for(seconds * load.WARM_UP, workload.in_flight)
        end = measuring(server.pid, clients)
        result = end(clients.run_for(seconds, workload.in_flight))
        return result._replace(note=clients.check())
    finally:
        clients.close()


def latency(workload: Workload, server: Server, seconds: float) -> Result:
    """Round trips at half of the rate that the same server managed just before.

    Messages are due at fixed times, whatever became of those before (no coordinated omission), and
    are timed from when they were due.
    """
    clients = _open(workload, server)
    try:
        clients.run_for(seconds * load.WARM_UP, 1)
        began, before = time.perf_counter(), clients.done()
        clients.run_for(seconds * 0.5, 1)
        rate = (clients.done() - before) / (time.perf_counter() - began) / 2
        _send_at(clients, rate, seconds * load.WARM_UP)
        clients.latencies = []
        end = measuring(server.pid, clients)
        lags = _send_at(clients, rate, seconds * TAIL)
        result = end(len(lags))
        clients.drain()
        return result._replace(
            **{name: _percentile(clients.latencies, share) for name, share in PERCENTILES.items()},
            lag=_percentile(lags, 0.99),
            note=clients.check(),
        )
    finally:
        clients.close()


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)] if values else 0.0


def _send_at(clients: Load, rate: float, seconds: float) -> list[float]:
    """Send that many messages a second, evenly; returns by how much each was late."""
    lags: list[float] = []
    start = time.perf_counter()
    for sent, sender in enumerate(itertools.cycle(clients.senders)):
        due = start + sent / rate
        while (late := time.perf_counter() - due) < 0:
            clients.read(0, answer=False)
        if due > start + seconds:
            return lags
        lags.append(late)
        sender.due.append(due)
        clients.send(sender, 1)
    return lags


def handshakes(workload: Workload, server: Server, seconds: float) -> Result:
    """Connections served in a second: TCP, handshake, close frames both ways."""
    epoll = select.epoll()
    unanswered = 0
    asked: dict[int, socket.socket] = {}
    closing: dict[int, socket.socket] = {}

    def ask() -> None:
        sock = harness.ask(server.port, workload.path, harness.PLAIN_HEADERS)
        asked[sock.fileno()] = sock
        epoll.register(sock.fileno(), select.EPOLLIN)

    def serve_for(seconds: float) -> int:
        nonlocal unanswered
        count, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            for fd, _ in epoll.poll(0.1):
                if sock := asked.pop(fd, None):
                    answer = sock.recv(4096)
                    if not (answer.startswith(b"HTTP/1.1 101") and answer.endswith(b"\r\n\r\n")):
                        raise Wrong(f"no handshake: {answer[:80]!r}")
                    sock.sendall(CLOSE)
                    closing[fd] = sock
                else:
                    sock = closing.pop(fd)
                    answer = sock.recv(4096)
                    if answer[:1] not in (b"\x88", b""):
                        raise Wrong(f"not the answer to a close: {answer[:80]!r}")
                    unanswered += not answer
                    sock.close()
                    count += 1
                    ask()
        return count

    try:
        for _ in range(workload.connections):
            ask()
        serve_for(seconds * load.WARM_UP)
        end = measuring(server.pid)
        result = end(serve_for(seconds))
        return result._replace(note="some closes were not answered" if unanswered else "")
    finally:
        epoll.close()
        for sock in (*asked.values(), *closing.values()):
            sock.close()


def memory(workload: Workload, server: Server, seconds: float) -> Result:
    """KiB of resident memory for each idle connection (as ``rate``)."""
    harness.connect(server.port, workload.path).close()  # everything is imported
    settle(server.pid)
    before = harness.memory_kib(server.pid)
    connections = min(workload.connections, harness.raise_descriptor_limit() - 500)
    end = measuring(server.pid)
    socks = list(load.open_all(server.port, [workload.path] * connections, IDLE_HEADERS))
    try:
        settle(server.pid)
        result = end(connections)
        kib = (harness.memory_kib(server.pid) - before) / connections
        epoll = select.epoll()
        for sock in socks:
            epoll.register(sock.fileno(), select.EPOLLRDHUP)
        if gone := len(epoll.poll(0)):
            raise Wrong(f"{gone} of {connections} idle connections were closed")
        return result._replace(rate=kib)
    finally:
        for sock in socks:
            sock.close()


MEASURES: dict[str, Callable[[Workload, Server, float], Result]] = {
    "messages": messages,
    "latency": latency,
    "handshakes": handshakes,
    "memory": memory,
}
