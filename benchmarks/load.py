"""The load of the benchmark suite: clients that cost next to nothing, and check what they get.

One process, one epoll, raw sockets. What a sender sends is numbered and encoded beforehand, and so
is what must come back, so that checking a whole read is one comparison of memory. Nothing is lost,
doubled, changed or out of order in any connection without raising ``Wrong``.

Members of a room who only listen are read when some messages have gathered for them, and all before
a measurement ends: the server writes as often as ever, and the load costs a tenth.
"""

from __future__ import annotations

import random
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import harness

PING = bytes((0x80 | harness.PING,))  # how one begins; no byte of a text in ASCII
MARK = 7  # bytes: "<00042>", whose message it is
WARM_UP = 0.25  # of the measured time, before it
DRAIN = 60.0  # seconds in which the last message must have come
BATCH = 50  # connections opened at a time: less than anybody's backlog
SETTLE = 15.0  # seconds a server may take to get quiet
GATHER = 2048  # bytes, of one who only listens
# Seconds to wait for something to read. (On a lone core the server would get half of it.)
WAIT = 0.0 if len(harness.CORES) > 1 else 0.1
ENDLESS = 1 << 62  # the period of what does not repeat


class Wrong(Exception):
    """The server lost or changed something, closed a connection, or does not answer."""


# What is sent, and what must come back


def text(sender: int, number: int, size: int) -> bytes:
    """The payload of a message: a mark, its number, letters."""
    return b"<%05d>%08d" % (sender, number) + _letters(size - MARK - 8)


def json_text(sender: int, number: int, size: int) -> bytes:
    """A message as JSON, in the form that msgspec gives it when it encodes it again."""
    form = b'{"user":"<%05d>","number":%d,"text":"%s","tags":["one","two"]}'
    empty = form % (sender, 10_000_000 + number, b"")
    return form % (sender, 10_000_000 + number, _letters(size - len(empty)))


def _letters(count: int) -> bytes:
    return (_ALPHABET * (count // len(_ALPHABET) + 1))[:count]


_ALPHABET = bytes(random.Random(1).choices(b"abcdefghijklmnopqrstuvwxyz ", k=1024))


class Stream:
    """The bytes that a sender sends and gets back: the same numbered messages over and over."""

    def __init__(
        self, payload: Callable[[int, int, int], bytes], sender: int, size: int, opcode: int
    ) -> None:
        count = max(4, min(256, (1 << 18) // size))
        payloads = [payload(sender, number, size) for number in range(count)]
        header = harness.server_header(len(payloads[0]), opcode)
        out = [harness.client_frame(payload, opcode) for payload in payloads]
        back = [header + payload for payload in payloads]
        self.mark = b"<%05d>" % sender
        self.frames = back
        self.out_size, self.back_size = len(out[0]), len(back[0])
        self.out_period, self.period = self.out_size * count, self.back_size * count
        self.read_size = 1 << 18 if size > 4096 else 1 << 15
        # Once more behind the end, so that no slice of what is sent or read at once has a seam.
        self.out = memoryview(b"".join(out) * 2)
        self.known = b"".join(back)
        self.known *= 2 + self.read_size // self.period

    def agrees(self, position: int, chunk: bytes) -> bool:
        """Whether a reader at a position had to get that."""
        return self.known.startswith(chunk, position % self.period)


class Mixture:
    """The stream of a room with several senders: as the member who is ahead saw it."""

    period = ENDLESS

    def __init__(self, streams: list[Stream]) -> None:
        self.streams = {stream.mark: stream for stream in streams}
        self.back_size = streams[0].back_size
        self.mark_at = streams[0].frames[0].index(streams[0].mark)
        self.known = bytearray()

    def agrees(self, position: int, chunk: bytes) -> bool:
        """Whether a member at a position sees what the others saw."""
        known = len(self.known) - position
        if known >= len(chunk):
            return self.known.startswith(chunk, position)
        if not chunk.startswith(self.known[position:]) or PING in chunk:
            return False
        self.known += chunk[known:]
        return True

    def check(self, seen: bytearray) -> None:
        """Every sender's messages, in its order; how many they are was counted before."""
        counts = dict.fromkeys(self.streams, 0)
        for at in range(0, len(seen), self.back_size):
            frame = bytes(seen[at : at + self.back_size])
            mark = frame[self.mark_at : self.mark_at + MARK]
            frames = self.streams[mark].frames if mark in counts else [b""]
            if frame != frames[counts.get(mark, 0) % len(frames)]:
                raise Wrong(f"a message is out of order or damaged: {frame[:40]!r}")
            counts[mark] += 1


class Anything:
    """What is not looked at: the floor's own, which only has the right length."""

    known, period = b"", ENDLESS

    def agrees(self, position: int, chunk: bytes) -> bool:
        return True


# Connections


class Member:
    """One connection."""

    __slots__ = (
        *("at", "expected", "known", "own", "period", "recv"),
        *("room", "sends", "skip", "sock", "special"),
    )

    def __init__(self, sock: socket.socket, room: Room) -> None:
        self.sock, self.recv = sock, sock.recv
        self.room = room
        self.expected = room.expected
        self.known, self.period = room.expected.known, room.expected.period
        self.at = 0  # bytes received
        self.sends = isinstance(self, Sender)
        self.special = False  # one of the next two
        self.own: bytearray | None = None  # kept when it differs from what the others saw
        self.skip = 0  # bytes of a ping that are still to come

    def sorted_out(self, chunk: bytes) -> bytes:
        """What a read has of messages, when it is not simply what was expected."""
        chunk = self._without_pings(chunk)
        if self.own is not None or not self.expected.agrees(self.at, chunk):
            self._keep(chunk)
        self.special = self.own is not None or self.skip > 0
        return chunk

    def _without_pings(self, chunk: bytes) -> bytes:
        """Pings for keepalive need no answer as soon as this ends."""
        skipped = min(self.skip, len(chunk))
        self.skip -= skipped
        chunk = chunk[skipped:]
        at = -self.at % self.room.back_size
        while at < len(chunk):
            if chunk[at] == PING[0]:
                end = at + 2 + int.from_bytes(chunk[at + 1 : at + 2], "big")
                self.skip = max(0, end - len(chunk))
                chunk = chunk[:at] + chunk[end:]
            else:
                at += self.room.back_size
        return chunk

    def _keep(self, chunk: bytes) -> None:
        """Where nobody promises one order for all, a member's stream is kept and checked later."""
        if self.own is None:
            if not isinstance(self.expected, Mixture):
                good = 0
                while self.expected.agrees(self.at, chunk[: good + 1]):
                    good += 1
                number = (self.at + good) // self.room.back_size
                raise Wrong(f"not what was sent, in message {number}: {chunk[good:][:40]!r}")
            self.own = self.expected.known[: self.at]
        self.own += chunk


class Sender(Member):
    """A connection that sends, and knows its own messages when they come back."""

    __slots__ = ("done", "due", "mixed", "push", "queued", "stream", "tail", "written")

    def __init__(self, sock: socket.socket, room: Room, stream: Stream) -> None:
        super().__init__(sock, room)
        self.stream = stream
        self.push = sock.send
        self.mixed = isinstance(room.expected, Mixture)
        self.queued = self.written = 0  # bytes
        self.done = 0  # own messages that came back
        self.tail = b""
        self.due: deque[float] = deque()  # when those on their way had to be sent

    def send(self, count: int) -> bool:
        """Queue some more messages; returns whether all is written."""
        self.queued += count * self.stream.out_size
        self.room.sent += count
        return self.write()

    def write(self) -> bool:
        period, written = self.stream.out_period, self.written
        try:
            while left := self.queued - written:
                start = written % period
                end = start + left if left < period else start + period
                written += self.push(self.stream.out[start:end])
        except BlockingIOError:
            return False
        finally:
            self.written = written
        return True

    def came_back(self, chunk: bytes) -> int:
        """How many of its own messages a read completed."""
        if self.mixed:
            data = self.tail + chunk
            self.tail = data[1 - MARK :]
            count = data.count(self.stream.mark)
        else:  # there is nothing but its own; ``at`` is behind the chunk already
            count = self.at // self.room.back_size - self.done
        self.done += count
        return count


class Room:
    """Members who must all see the same; for an echo there is one."""

    def __init__(self, streams: list[Stream], checked: bool) -> None:
        self.back_size = streams[0].back_size
        self.sent = 0
        self.expected: Stream | Mixture | Anything
        self.expected = Mixture(streams) if len(streams) > 1 else streams[0]
        if not checked and len(streams) == 1:
            self.expected = Anything()
        self.checked = checked


class Result(NamedTuple):
    """What a server did in the measured time."""

    rate: float  # messages delivered, or connections served, in a second; or KiB for each
    cpu: float  # the server's seconds of processor time for each
    server: float  # the share of a core the server had
    load: float  # the share of a core the load had
    p50: float = 0.0  # latencies, in seconds
    p99: float = 0.0
    p999: float = 0.0
    lag: float = 0.0  # seconds by which the load sent late, 99th percentile
    note: str = ""


class Load:
    """Clients of one server."""

    def __init__(self, rooms: list[Room], members: list[Member], read_size: int) -> None:
        self.rooms = rooms
        self.members = {member.sock.fileno(): member for member in members}
        self.senders = [member for member in members if isinstance(member, Sender)]
        self.read_size = read_size
        self.received = 0  # bytes, by all together
        self.latencies: list[float] | None = None
        self.idle = 0.0  # processor time, in seconds, that was spent looking in vain
        self.idle_since = 0.0
        self.epoll = select.epoll()
        for fd, member in self.members.items():
            member.sock.setblocking(False)
            self.epoll.register(fd, select.EPOLLIN)
        self.gather(GATHER)

    def gather(self, size: int) -> None:
        """Read those who only listen when that many bytes are there."""
        for member in self.members.values():
            if not member.sends:
                member.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def send(self, sender: Sender, count: int) -> None:
        if self.idle_since:
            self.idle_no_more()
        if not sender.send(count):
            self.epoll.modify(sender.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def idle_no_more(self) -> None:
        self.idle += time.process_time() - self.idle_since
        self.idle_since = 0.0

    def read(self, wait: float, answer: bool) -> None:
        """Take what there is, if anything; with ``answer`` a message of its own has a sender send
        the next.

        To be called again and again rather than to wait: a server would pay for waking its clients,
        up to a sixth of what a message costs, as it does not for those on other machines.
        """
        ready = self.epoll.poll(wait)
        if not ready:
            self.idle_since = self.idle_since or time.process_time()
            return
        if self.idle_since:
            self.idle_no_more()
        members, size, received = self.members, self.read_size, 0
        for fd, event in ready:
            member = members[fd]
            if event & select.EPOLLOUT and isinstance(member, Sender) and member.write():
                self.epoll.modify(fd, select.EPOLLIN)
            if event == select.EPOLLOUT:
                continue
            try:
                chunk = member.recv(size)
            except OSError as error:
                raise Wrong(f"the server lost a connection: {error}") from error
            if not chunk:
                raise Wrong("the server closed a connection")
            at = member.at
            if member.special or not (
                member.known.startswith(chunk, at % member.period)
                or member.expected.agrees(at, chunk)
            ):
                chunk = member.sorted_out(chunk)
            length = len(chunk)
            member.at = at + length
            received += length
            if member.sends and (back := member.came_back(chunk)):
                if answer:
                    self.send(member, back)
                elif member.due:
                    self.note(member, back)
        self.received += received

    def note(self, sender: Sender, back: int) -> None:
        """Write down how long the newest messages of a sender took."""
        now = time.perf_counter()
        for _ in range(back):
            due = sender.due.popleft()
            if self.latencies is not None:
                self.latencies.append(now - due)

    def check(self) -> str:
        """All came, everywhere; returns what is worth a note."""
        note = ""
        for member in self.members.values():
            room = member.room
            if missing := room.sent * room.back_size - member.at:
                what = "did not come" if missing > 0 else "were too many"
                raise Wrong(f"{abs(missing) / room.back_size:g} of {room.sent} messages {what}")
            if member.own is not None and isinstance(room.expected, Mixture) and room.checked:
                room.expected.check(member.own)
                note = "members see different orders"
        for room in self.rooms:
            if isinstance(room.expected, Mixture) and room.checked:
                room.expected.check(room.expected.known)
        return note

    def expected(self) -> int:
        """Bytes that all must have received together when everything has come."""
        return sum(member.room.sent * member.room.back_size for member in self.members.values())

    def done(self) -> int:
        """How many messages came back to who sent them."""
        return sum(sender.done for sender in self.senders)

    def run_for(self, seconds: float, in_flight: int) -> float:
        """Send, and the next for each that comes back, until the time is over; then all must come.

        Returns how many messages were delivered. However slow a server is, it answers everybody
        once, and nobody is counted halfway: what it does first and what it does last differ.
        """
        before = self.received
        end = time.perf_counter() + seconds
        for sender in self.senders:
            self.send(sender, in_flight)
        while time.perf_counter() < end:
            self.read(WAIT, answer=True)
        self.drain()
        return (self.received - before) / self.rooms[0].back_size

    def drain(self) -> None:
        """Read until all has come."""
        self.gather(1)
        expected = self.expected()
        late = time.perf_counter() + DRAIN
        while self.received < expected:
            self.read(WAIT, answer=False)
            if time.perf_counter() > late:
                self.check()
        self.gather(GATHER)

    def close(self) -> None:
        self.epoll.close()
        for member in self.members.values():
            member.sock.close()


def settle(pid: int) -> None:
    """Wait until a server has nothing to do any more."""
    late = time.perf_counter() + SETTLE
    while time.perf_counter() < late:
        before = harness.cpu_seconds(pid)
        time.sleep(0.03)
        if harness.cpu_seconds(pid) - before < 0.005:
            return


def open_all(port: int, paths: list[str], headers: str) -> Iterator[socket.socket]:
    """Open WebSockets, some at a time."""
    for start in range(0, len(paths), BATCH):
        socks = [harness.ask(port, path, headers) for path in paths[start : start + BATCH]]
        for sock in socks:
            harness.take_101(sock)
        yield from socks


def measuring(pid: int, clients: Load | None = None) -> Callable[[float], Result]:
    """Begin to measure; returns what ends it, and wants to know how much was done meanwhile."""

    def busy() -> float:
        return time.process_time() - (clients.idle if clients else 0.0)

    began, used, own = time.perf_counter(), harness.cpu_seconds(pid), busy()

    def end(count: float) -> Result:
        elapsed = time.perf_counter() - began
        server, load = harness.cpu_seconds(pid) - used, busy() - own
        return Result(count / elapsed, server / max(count, 1), server / elapsed, load / elapsed)

    return end
