"""The way in of a connection: one message at a time, one reader at a time, read ahead when busy.

First with a scripted transport, in a time that the test moves; then what the contract of behaviour
says about receiving, on real sockets and all event loops.
"""

from __future__ import annotations

import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from itertools import pairwise
from types import coroutine
from typing import Any

import anyio
import anyio.abc
import pytest
from anyio.lowlevel import checkpoint
from wsproto import events

from roomsock import (
    App,
    ConnectionClosedError,
    ConnectionClosedOK,
    Limits,
    WebSocket,
)
from roomsock.limits import KIB, MIB
from roomsock.protocol.connection import STEP_FRAMES, STEP_INFLATED, Connection
from roomsock.protocol.deflate import Agreement
from roomsock.protocol.events import Failed, PeerClosed, PeerLost
from roomsock.protocol.frames import PONG, encode_frame
from roomsock.receiver import LARGE_READ_SIZE, READING, TURN_SECONDS, Receiver
from roomsock.sender import TURN_MESSAGES, Flusher
from roomsock.transport import READ_SIZE, EventLoop, SocketTransport

from . import contract
from .client import PATIENCE, connected
from .clock import FakeClock, settled
from .contract import (
    BAD_FRAME,
    CHUNKINGS,
    Ends,
    close,
    cut,
    deflated,
    masked,
    messages,
    send_chunks,
    served,
    text,
    until,
)

# Fixtures are active in the module that has them by name.
logged = contract.logged
nothing_else_is_logged = contract.nothing_else_is_logged

# The unit: a scripted transport, a real protocol, and a fake connection, server and sender


class Wire:
    """A transport of which the test says what arrives; how it waits is the event loop's."""

    def __init__(self, raw: SocketTransport) -> None:
        self._raw = raw
        self.script: deque[bytes | OSError] = deque()
        self.read_size = READ_SIZE
        self.asked: list[int] = []  # the `read_size` of each read
        self.wakes = 0
        self.broken = False

    @property
    def reads(self) -> int:
        return len(self.asked)

    def arrive(self, *items: bytes | OSError) -> None:
        self.script.extend(items)
        self._raw.wake()

    def is_broken(self) -> bool:
        return self.broken

    def wake(self) -> None:
        self.wakes += 1
        self._raw.wake()

    @coroutine
    def receive(self) -> Generator[Any, Any, bytes | None]:
        return self.read((yield self.sleep()))

    def sleep(self) -> object:
        self.asked.append(self.read_size)
        if self.script:
            self._raw.wake_soon()
        return self._raw.sleep()

    def read(self, outcome: Any) -> bytes | None:
        assert self._raw.read(outcome) is None
        if not self.script:
            return None
        item = self.script.popleft()
        if isinstance(item, OSError):
            raise item
        if len(item) > self.asked[-1]:
            self.script.appendleft(item[self.asked[-1] :])
        return item[: self.asked[-1]]


class Owner:
    """A connection that ends as its peer wants it, or when the test says so."""

    def __init__(self) -> None:
        self.receiver: Receiver
        self.end: Exception | None = None
        self.applied: list[object] = []
        self.found = 0
        self.latency: float | None = None

    def check_open(self) -> None:
        assert self.end is not None
        raise self.end

    def apply_ending(self) -> None:
        self.applied.append(self.receiver.ending)
        self.finish(discard=False)

    def ending_found(self) -> None:
        self.found += 1

    def finish(self, *, discard: bool) -> None:
        self.end = ConnectionClosedOK(1000)
        self.receiver.stop(discard=discard)


class House:
    """A server whose tasks the test starts."""

    def __init__(self, clock: FakeClock, limits: Limits) -> None:
        self.app = App(limits=limits)
        self.clock = clock
        self.now = clock.now()
        self.spawned: list[Callable[[], Coroutine[Any, Any, Any]]] = []
        self.flusher = Flusher(lambda callback: None)

    def spawn(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self.spawned.append(function)


class WayOut:
    """A sender that keeps what is due to the peer."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def queue_urgent(self, frame: bytes) -> None:
        self.frames.append(frame)


class Unit:
    """A receiver among fakes; `seconds` is what it takes for the time of its turns."""

    def __init__(
        self, raw: SocketTransport, agreement: Agreement | None = None, **limits: int
    ) -> None:
        self.seconds = 1000.0
        self.clock = FakeClock()
        self.wire = Wire(raw)
        self.owner = Owner()
        self.sender = WayOut()
        self.house = House(self.clock, Limits(**limits))
        now = self.clock.now()
        limit = self.house.app.limits
        self.conn = Connection(limit, (20.0, 20.0), now=now, agreement=agreement)
        fakes: list[Any] = [self.owner, self.house, self.wire, self.conn, self.sender]
        self.receiver = self.owner.receiver = Receiver(*fakes)

    async def receive(self) -> str | bytes:
        with anyio.fail_after(PATIENCE):
            return await self.receiver.receive()

    async def closed(self) -> None:
        """Meet the end."""
        with pytest.raises(ConnectionClosedOK):
            await self.receive()

    async def be_busy(self, tg: anyio.abc.TaskGroup) -> None:
        """Have a handler be busy for long: the task that reads ahead waits for input."""
        self.receiver.help_if_busy()
        if not self.house.spawned:  # it has read since the last round
            self.receiver.help_if_busy()
        [read_ahead] = self.house.spawned
        self.house.spawned.clear()
        tg.start_soon(read_ahead)
        await settled()


@pytest.fixture
def make(
    monkeypatch: pytest.MonkeyPatch, loop: EventLoop, sockets: list[socket.socket]
) -> Callable[..., Unit]:
    """Makes a unit with these limits."""

    def make(**options: Any) -> Unit:
        pair = socket.socketpair()
        sockets.extend(pair)
        pair[0].setblocking(False)
        unit = Unit(loop.transport(pair[0]), **options)
        monkeypatch.setattr("roomsock.receiver.monotonic", lambda: unit.seconds)
        return unit

    return make


async def test_messages_come_one_by_one_and_input_is_read_when_there_is_none(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    unit.wire.arrive(text("1") + masked(0x82, b"2"), text("3"))
    assert [await unit.receive(), await unit.receive()] == ["1", b"2"]
    assert unit.wire.reads == 1
    assert await unit.receive() == "3"
    assert unit.wire.reads == 2


async def test_take_hands_out_what_has_arrived_and_never_reads(make: Callable[..., Unit]) -> None:
    unit = make()
    assert unit.receiver.take() is None
    unit.wire.arrive(text("1") + text("2"))
    assert await unit.receive() == "1"
    assert [unit.receiver.take(), unit.receiver.take()] == ["2", None]
    assert unit.wire.reads == 1


async def test_a_turn_ends_after_so_many_messages(make: Callable[..., Unit]) -> None:
    unit = make()
    unit.wire.arrive(text("x") * TURN_MESSAGES * 2)
    assert await unit.receive() == "x"
    taken = 1
    while unit.receiver.take():
        taken += 1
    assert taken == TURN_MESSAGES
    assert unit.receiver.take() is None  # and stays over
    assert await unit.receive() == "x"  # from here on it is a new one
    assert unit.receiver.take() == "x"
    assert len(unit.receiver.inbox) == TURN_MESSAGES - 2


async def test_a_turn_ends_after_so_long(make: Callable[..., Unit]) -> None:
    unit = make()
    unit.wire.arrive(text("x") * 10)
    assert await unit.receive() == "x"
    unit.seconds += TURN_SECONDS
    assert unit.receiver.take() == "x"
    unit.seconds += TURN_SECONDS
    assert unit.receiver.take() is None
    assert await unit.receive() == "x"
    assert unit.receiver.take() == "x"


@pytest.mark.parametrize(("step", "turns"), [(0.0, 10), (TURN_SECONDS * 2, 10 * TURN_MESSAGES)])
async def test_who_receives_in_a_row_lets_the_others_have_their_turn(
    make: Callable[..., Unit], step: float, turns: int
) -> None:
    unit = make()
    others = 0

    async def count() -> None:
        nonlocal others
        while True:
            await checkpoint()
            others += 1

    unit.receiver.feed(text("x") * 10 * TURN_MESSAGES)
    async with anyio.create_task_group() as tg:
        tg.start_soon(count)
        await checkpoint()
        before = others
        for _ in range(10 * TURN_MESSAGES):
            assert await unit.receive() == "x"
            unit.seconds += step
        assert others - before >= turns - 2
        tg.cancel_scope.cancel()
    assert unit.wire.reads == 0


async def test_while_more_messages_wait_what_each_causes_is_to_be_joined(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    unit.wire.arrive(text("x") * 4, text("x"))
    backlogs = []
    for _ in "12":
        await unit.receive()
        backlogs.append(unit.house.flusher.backlog)
    while unit.receiver.take():
        backlogs.append(unit.house.flusher.backlog)
    assert backlogs == [True, True, True, False]
    await unit.receive()
    assert not unit.house.flusher.backlog


async def test_one_task_at_a_time_may_receive_and_who_gave_up_is_none(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    async with anyio.create_task_group() as tg:
        tg.start_soon(unit.receive)
        await settled()
        with pytest.raises(RuntimeError, match="another task is receiving"):
            await unit.receive()
        assert unit.receiver.is_read
        tg.cancel_scope.cancel()
    assert not unit.receiver.is_read
    unit.wire.arrive(text("1"))
    assert await unit.receive() == "1"


async def test_who_is_woken_without_input_waits_on(make: Callable[..., Unit]) -> None:
    unit = make()
    got: list[object] = []

    async def receive() -> None:
        got.append(await unit.receive())

    async with anyio.create_task_group() as tg:
        tg.start_soon(receive)
        await settled()
        unit.wire.wake()
        await settled()
        assert (got, unit.wire.reads) == ([], 2)
        unit.wire.arrive(text("1"))
    assert got == ["1"]


# Large frames


@pytest.mark.parametrize("first", [0x81, 0x82])
async def test_of_a_large_frame_all_is_read_at_once_and_nothing_behind_it(
    make: Callable[..., Unit], first: int
) -> None:
    """What is behind it is input like any other, and may be tiny messages."""
    unit = make()
    frame = masked(first, b"x" * 500_000)
    unit.wire.arrive(frame + text("1") + frame + text("2"))
    assert [len(await unit.receive()) for _ in range(4)] == [500_000, 1, 500_000, 1]
    missing = len(frame) - READ_SIZE
    more = missing - READ_SIZE + len(text("1"))  # it began behind a message
    small = READ_SIZE
    assert unit.wire.asked == [small, missing, small, small, more, small]
    assert unit.wire.read_size == READ_SIZE


@pytest.mark.parametrize("first", [0x01, 0x02])
async def test_of_a_large_fragment_all_is_read_at_once(
    make: Callable[..., Unit], first: int
) -> None:
    unit = make()
    frame = masked(first, b"x" * 500_000)
    unit.wire.arrive(frame + masked(0x80, b"x"))
    assert len(await unit.receive()) == 500_001
    assert unit.wire.asked == [READ_SIZE, len(frame) - READ_SIZE, READ_SIZE]


async def test_pieces_of_a_large_frame_are_read_as_they_come(make: Callable[..., Unit]) -> None:
    unit = make()
    frame = masked(0x82, b"x" * MIB)
    cuts = [0, 14, 100, 300_000, 800_000, len(frame) - READ_SIZE, len(frame) - 1, len(frame)]
    unit.wire.arrive(*(frame[start:stop] for start, stop in pairwise(cuts)))
    assert await unit.receive() == b"x" * MIB
    assert unit.wire.asked[0] == READ_SIZE
    assert unit.wire.asked[1:-2] == [len(frame) - cut for cut in cuts[1:-3]]
    assert unit.wire.asked[-2:] == [READ_SIZE] * 2  # as good for what is left


async def test_a_frame_above_what_is_read_at_once_is_read_in_pieces(
    make: Callable[..., Unit],
) -> None:
    unit = make(message=4 * MIB)
    unit.wire.arrive(masked(0x82, b"x" * (3 * MIB)))
    assert await unit.receive() == b"x" * (3 * MIB)
    assert max(unit.wire.asked) == LARGE_READ_SIZE
    assert unit.wire.reads == 4


@pytest.mark.parametrize("how", ["cancelled", "ended", "lost"])
async def test_what_is_read_at_once_is_as_little_as_ever_behind_half_a_large_frame(
    make: Callable[..., Unit], how: str
) -> None:
    unit = make()
    frame = masked(0x82, b"x" * 500_000)
    unit.wire.arrive(frame[:100_000])
    async with anyio.create_task_group() as tg:
        tg.start_soon(unit.receive if how == "cancelled" else unit.closed)
        await settled()
        assert unit.wire.read_size == len(frame) - 100_000
        if how == "cancelled":
            tg.cancel_scope.cancel()
        elif how == "ended":
            unit.owner.finish(discard=True)
        else:
            unit.wire.arrive(b"")
    assert unit.wire.read_size == READ_SIZE
    if how == "cancelled":
        unit.wire.arrive(frame[100_000:])
        assert await unit.receive() == b"x" * 500_000


async def test_what_the_handler_has_asked_for_is_not_what_was_read_ahead(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    unit.wire.arrive(masked(0x82, b"x" * 900_000))
    assert len(await unit.receive()) == 900_000
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        unit.wire.arrive(text("1"))
        await settled()
        assert list(unit.receiver.inbox) == ["1"]
        tg.cancel_scope.cancel()


async def test_who_gave_up_a_receive_is_read_ahead_for(make: Callable[..., Unit]) -> None:
    unit = make(read_ahead=100)
    unit.wire.arrive(text("x" * 200))
    assert await unit.receive() == "x" * 200
    with anyio.move_on_after(0):
        await unit.receiver.receive()
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        assert unit.receiver.is_read
        tg.cancel_scope.cancel()


async def test_who_reads_behind_the_end_wakes_who_waits_for_it(make: Callable[..., Unit]) -> None:
    unit = make()
    unit.receiver.stop(discard=True)
    wakes = unit.wire.wakes
    unit.receiver.feed(close(1000))
    assert unit.wire.wakes == wakes + 1


async def test_a_turn_keeps_none_of_its_messages(make: Callable[..., Unit]) -> None:
    unit = make()
    unit.wire.arrive(text("a" * 1000) + text("b" * 1000) + text("c" * 1000))
    turn = unit.receiver.turn(await unit.receive())
    for letter in "abc":
        message = next(turn)
        assert message == letter * 1000
        assert sys.getrefcount(message) == 2  # this name, and the call


async def test_an_end_of_our_own_is_met_amid_a_large_frame_that_still_comes(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    frame = masked(0x82, b"x" * 500_000)
    async with anyio.create_task_group() as tg:
        tg.start_soon(unit.closed)
        await settled()
        unit.wire.arrive(frame[:100_000])
        unit.owner.finish(discard=True)
    assert unit.wire.reads == 1


async def test_an_error_of_the_transport_is_raised_and_costs_no_state(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    unit.wire.arrive(OSError("unplugged"), text("1"))
    with pytest.raises(OSError, match="unplugged"):
        await unit.receive()
    assert unit.receiver.state != READING
    assert await unit.receive() == "1"


async def test_pings_are_answered_and_the_latency_is_known_from_a_pong(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    assert unit.owner.latency is None
    await unit.clock.advance(20)
    assert unit.conn.handle_timeout(unit.clock.now()) == []
    [ping] = unit.conn.data_to_send()
    await unit.clock.advance(1.5)
    unit.wire.arrive(masked(0x89, b"you?") + masked(0x8A, ping[2:]) + text("1"))
    assert await unit.receive() == "1"
    assert unit.owner.latency == 1.5
    assert unit.sender.frames == [encode_frame(PONG, b"you?")]


# The unit: the end


each_end = pytest.mark.parametrize(
    ("frame", "ending"),
    [
        (close(1000, "bye"), PeerClosed(1000, "bye")),
        (BAD_FRAME, Failed(1002, "Reserved bit set unexpectedly")),
        (b"", PeerLost()),
    ],
    ids=["close", "bad frame", "loss"],
)


@each_end
async def test_an_end_takes_effect_behind_the_messages_in_front_of_it(
    make: Callable[..., Unit], frame: bytes, ending: object
) -> None:
    unit = make()
    unit.wire.arrive(text("1") + text("2"), frame)
    assert await unit.receive() == "1"
    await unit.clock.advance(3)  # while the server's own time stands still
    await unit.receiver.read()
    assert (unit.receiver.ending, unit.receiver.ending_at) == (ending, unit.clock.now())
    assert await unit.receive() == "2"
    assert unit.owner.applied == []
    await unit.closed()
    await unit.closed()
    assert unit.owner.applied == [ending]
    assert unit.owner.found == 0  # for nobody is busy
    assert unit.wire.reads == 2


@pytest.mark.parametrize("discard", [True, False])
async def test_what_is_in_the_inbox_outlives_the_end_unless_it_is_discarded(
    make: Callable[..., Unit], discard: bool
) -> None:
    unit = make()
    unit.wire.arrive(text("1") + text("2"))
    assert await unit.receive() == "1"
    unit.owner.finish(discard=discard)
    if not discard:
        assert await unit.receive() == "2"
    await unit.closed()
    assert unit.wire.wakes == 0  # for nobody waited


async def test_an_end_wakes_who_waits_for_input(make: Callable[..., Unit]) -> None:
    unit = make()
    async with anyio.create_task_group() as tg:
        tg.start_soon(unit.closed)
        await settled()
        unit.owner.finish(discard=True)
    assert unit.wire.wakes == 1


async def test_what_comes_behind_the_end_is_no_message_but_a_ping_is_answered(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    unit.owner.finish(discard=False)
    unit.wire.arrive(masked(0x89, b"still?") + text("1") + close(1000))
    await unit.receiver.read()
    assert unit.sender.frames == [encode_frame(PONG, b"still?")]
    assert unit.conn.close_received
    assert (list(unit.receiver.inbox), unit.receiver.ending) == ([], None)


# The unit: reading ahead


async def test_a_task_reads_ahead_from_the_second_round_without_a_read_on(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    for number in range(2):
        unit.wire.arrive(text("x"))
        assert await unit.receive() == "x"
        unit.receiver.help_if_busy()
        assert unit.house.spawned == [], f"round {number}"
    assert not unit.receiver.is_read
    unit.receiver.help_if_busy()
    assert len(unit.house.spawned) == 1
    assert unit.receiver.is_read
    unit.receiver.help_if_busy()
    assert len(unit.house.spawned) == 1


async def test_what_was_read_ahead_is_received_first_and_reading_comes_back(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        unit.wire.arrive(masked(0x89, b"you?") + text("1"), text("2"))
        await settled()
        assert unit.sender.frames == [encode_frame(PONG, b"you?")]
        assert list(unit.receiver.inbox) == ["1", "2"]
        assert [await unit.receive(), await unit.receive()] == ["1", "2"]
        assert unit.receiver.is_read
        assert unit.receiver.state != READING
        assert unit.wire.wakes == 0
        tg.start_soon(unit.receive)
        await settled()
        assert unit.wire.wakes == 1
        assert unit.receiver.state == READING
        await settled()
        unit.wire.arrive(text("3"))


async def test_reading_is_handed_over_without_a_loss_to_all_who_wait_for_it(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    got: list[object] = []

    async def receive() -> None:
        got.append(await unit.receive())

    async with anyio.create_task_group() as tg:
        await unit.receiver.take_over()  # nobody has it
        await unit.be_busy(tg)
        tg.start_soon(receive)
        tg.start_soon(unit.receiver.take_over)
        unit.wire.arrive(text("1"))  # for the reader of before, which is about to be woken
    assert got == ["1"]
    assert not unit.receiver.is_read


async def test_a_broken_connection_is_noticed_although_nothing_more_is_read_ahead(
    make: Callable[..., Unit],
) -> None:
    unit = make(read_ahead=1)
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        unit.wire.arrive(text("1"))
        await settled()
    unit.wire.broken = True
    unit.receiver.help_if_busy()
    assert isinstance(unit.receiver.ending, PeerLost)


async def test_no_more_than_the_limit_is_read_ahead_until_there_was_a_read(
    make: Callable[..., Unit],
) -> None:
    unit = make(read_ahead=len(text("1")) + 1)
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        unit.wire.arrive(text("1"))
        await settled()
        assert unit.receiver.is_read
        unit.wire.arrive(text("2"))
    assert not unit.receiver.is_read
    unit.wire.arrive(text("3"))
    unit.receiver.help_if_busy()
    assert unit.house.spawned == []
    assert unit.receiver.ending is None
    assert [await unit.receive() for _ in "123"] == ["1", "2", "3"]
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        assert unit.receiver.is_read
        tg.cancel_scope.cancel()
    assert not unit.receiver.is_read


async def test_an_end_that_is_read_ahead_is_told_at_once_and_reading_stops(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        unit.wire.arrive(text("1") + close(1000))
    assert unit.owner.found == 1
    assert not unit.receiver.is_read
    assert await unit.receive() == "1"
    await unit.closed()
    assert unit.owner.applied == [PeerClosed(1000, "")]


async def test_an_end_that_is_read_while_reading_is_handed_back_finds_nobody_busy(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        tg.start_soon(unit.closed)
        while not unit.wire.wakes:
            await checkpoint()
        unit.wire.arrive(close(1000))
    assert unit.owner.found == 0
    assert unit.owner.applied == [PeerClosed(1000, "")]


async def test_an_end_of_our_own_stops_the_reading_ahead(make: Callable[..., Unit]) -> None:
    unit = make()
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        unit.owner.finish(discard=True)
    assert not unit.receiver.is_read
    await unit.closed()


@pytest.mark.parametrize("waited_for", [True, False])
async def test_an_error_while_reading_ahead_gives_reading_back(
    make: Callable[..., Unit], caplog: pytest.LogCaptureFixture, waited_for: bool
) -> None:
    unit = make()
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        unit.wire.script.extend((OSError("unplugged"), b""))
        if waited_for:
            tg.start_soon(unit.closed)  # which wakes the one that reads ahead
        else:
            unit.wire.arrive()
    assert "reading ahead failed: unplugged" in caplog.text
    assert not unit.receiver.is_read
    await unit.closed()
    assert unit.owner.applied == [PeerLost()]


# On real sockets: messages


async def test_a_burst_of_messages_lets_others_have_their_turn() -> None:
    app = App()
    turns = 0
    seen: list[int] = []

    @app.on_message("/r")
    def take(ws: WebSocket, message: str) -> None:
        seen.append(turns)

    async def wait_for_turns() -> None:
        nonlocal turns
        while len(seen) < 1000:
            await checkpoint()
            turns += 1

    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(text("x") * 1000)
        with anyio.fail_after(PATIENCE):
            await wait_for_turns()
    assert seen[-1] - seen[0] >= 1000 // 64 - 2


async def test_a_second_task_in_receive_is_refused() -> None:
    app = App()

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        async def second() -> None:
            with pytest.raises(RuntimeError, match="another task is receiving"):
                await ws.receive()
            ws.send_text("refused")

        async with anyio.create_task_group() as tg:
            tg.start_soon(second)
            assert await ws.receive() == "for the first"
        await ws.send_text("fine")

    async with served(app) as server, connected(server, "/r") as client:
        assert await client.receive() == "refused"
        await client.send("for the first")
        assert await client.receive() == "fine"


async def test_a_receive_that_was_cancelled_loses_nothing() -> None:
    app = App()

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        async def give_up(scope: anyio.CancelScope) -> None:
            await settled()
            scope.cancel()

        async with anyio.create_task_group() as tg:
            with anyio.CancelScope() as scope:
                tg.start_soon(give_up, scope)
                await ws.receive()
        await ws.send_text("given up")
        await ws.send_text(await ws.receive_text())

    async with served(app) as server, connected(server, "/r") as client:
        assert await client.receive() == "given up"
        await client.send("hello")
        assert await client.receive() == "hello"


# The end behind the messages


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("mode", ["on_message", "on_json", "serve", "slow", "cancel_on_disconnect"])
@pytest.mark.parametrize(
    ("end", "answer", "told"),
    [
        (close(1000, "bye"), (1000, ""), ["close closed by the client: 1000 (bye)"]),
        (
            BAD_FRAME,
            (1002, "Reserved bit set unexpectedly"),
            [
                "error closed by the server: 1002 (Reserved bit set unexpectedly)",
                "close closed by the server: 1002 (Reserved bit set unexpectedly)",
            ],
        ),
    ],
    ids=["close", "bad frame"],
)
async def test_the_end_is_answered_behind_the_replies_however_the_bytes_were_split(
    mode: str, chunking: str, end: bytes, answer: tuple[int, str], told: list[str]
) -> None:
    app = App()
    ends = Ends(app)

    async def serve(ws: WebSocket) -> None:
        async for message in ws:
            await ws.send_text(f"{message!s}!")

    async def take(ws: WebSocket, message: Any) -> None:
        for _ in range(5 if mode == "slow" else 0):
            await checkpoint()
        await ws.send_text(f"{message}!")

    match mode:
        case "serve":
            app.add_serve("/r", serve)
        case "on_json":
            app.add_on_json("/r", take)
        case _:
            cancel = mode == "cancel_on_disconnect"
            app.add_on_message("/r", _text_handler(take), cancel_on_disconnect=cancel)
    async with served(app) as server, connected(server, "/r") as client:
        await send_chunks(client, cut([text("1"), text("22"), end], chunking))
        assert await client.receive() == "1!"
        assert await client.receive() == "22!"
        assert await client.closed() == answer
        await client.ended()
    assert ends.told == told


def _text_handler(function: Callable[[WebSocket, Any], Awaitable[None]]) -> Callable[..., Any]:
    async def take(ws: WebSocket, message: str) -> None:
        await function(ws, message)

    return take


@pytest.mark.parametrize("chunking", CHUNKINGS)
async def test_messages_in_front_of_a_loss_are_handled_however_the_bytes_were_split(
    chunking: str,
) -> None:
    app = App()
    ends = Ends(app)
    handled: list[str] = []

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        await checkpoint()
        handled.append(message)

    async with served(app) as server, connected(server, "/r") as client:
        await send_chunks(client, cut([text("1"), text("22"), text("333")[:-1]], chunking))
        await client.aclose()
    assert handled == ["1", "22"]
    assert ends.told == ["error connection lost: 1006", "close connection lost: 1006"]


@pytest.mark.parametrize("mode", ["on_message", "serve"])
async def test_a_close_behind_more_messages_than_one_turn_takes_loses_none(mode: str) -> None:
    app = App()

    async def take(ws: WebSocket, message: str) -> None:
        ws.send_text(message)

    async def serve(ws: WebSocket) -> None:
        async for message in ws:
            ws.send_text(str(message))

    if mode == "serve":
        app.add_serve("/r", serve)
    else:
        app.add_on_message("/r", take)
    numbers = [str(number) for number in range(300)]
    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(b"".join(map(text, numbers)) + close(1000))
        assert await messages(client) == numbers


async def test_serve_mode_yields_what_came_before_the_end_then_raises() -> None:
    app = App()
    received: list[Any] = []

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        await until(lambda: len(received))
        received.extend([await ws.receive(), await ws.receive()])
        with pytest.raises(ConnectionClosedOK) as closed:
            await ws.receive()
        assert (closed.value.code, closed.value.reason) == (1000, "bye")
        with pytest.raises(ConnectionClosedOK):
            ws.send_text("too late")
        with pytest.raises(ConnectionClosedOK):
            await ws.receive()

    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(text("1") + text("2") + close(1000, "bye"))
        received.append("start")
        assert await client.closed() == (1000, "")
    assert received == ["start", "1", "2"]


# Closing while somebody waits for messages


async def test_closing_from_another_task_wakes_who_waits_for_messages() -> None:
    app = App()
    ends = Ends(app)
    serving_ended = anyio.Event()

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        async def close_soon() -> None:
            await settled()
            ws.close(4000, "enough")

        async with anyio.create_task_group() as tg:
            tg.start_soon(close_soon)
            async for _ in ws:
                pass
        serving_ended.set()

    async with served(app) as server, connected(server, "/r") as client:
        await serving_ended.wait()  # although the client has not answered
        assert await client.closed() == (4000, "enough")
    assert ends.told == ["close closed by the server: 4000 (enough)"]


async def test_closing_from_another_connection_wakes_who_waits_for_messages() -> None:
    app = App()
    ended = anyio.Event()

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        async for _ in ws:
            pass
        ended.set()

    @app.on_message("/admin")
    async def admin(ws: WebSocket, message: str) -> None:
        for each in app.room("/r"):
            each.close(4003, "kicked")

    async with (
        served(app) as server,
        connected(server, "/r") as client,
        connected(server, "/admin") as other,
    ):
        await other.send("kick")
        await ended.wait()
        assert await client.closed() == (4003, "kicked")


@pytest.mark.parametrize("busy_for", [0, 3])
async def test_closing_from_another_task_reaches_a_handler_whose_input_is_read_ahead(
    busy_for: int,
) -> None:
    app, clock = App(), FakeClock()
    known: list[WebSocket] = []
    ended = anyio.Event()

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        known.append(ws)
        await clock.sleep_until(clock.now() + busy_for)
        async for _ in ws:
            pass
        ended.set()

    async with served(app, clock) as server, connected(server, "/r") as client:
        await clock.advance(1)
        known[0].close(4000)
        assert await client.closed() == (4000, "")
        await clock.advance(2)
        await ended.wait()


# While a handler is busy


async def test_pings_are_answered_while_a_handler_is_busy() -> None:
    app, clock = App(), FakeClock()
    busy, release = anyio.Event(), anyio.Event()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        busy.set()
        await release.wait()
        ws.send_text(message)

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send("go")
        await busy.wait()
        await client.send_event(events.Ping(b"one"))
        await clock.advance(0.5)
        event = await client.event()
        assert isinstance(event, events.Pong)
        assert event.payload == b"one"
        await client.send_event(events.Ping(b"two"))  # in no time, from now on
        assert isinstance(await client.event(), events.Pong)
        await client.send("second")
        await client.send_event(events.Ping(b"three"))
        assert isinstance(await client.event(), events.Pong)
        release.set()
        assert [await client.receive(), await client.receive()] == ["go", "second"]
        await client.send("third")
        assert await client.receive() == "third"


async def test_a_loss_is_noticed_while_a_handler_is_busy() -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app)
    known: list[WebSocket] = []
    release = anyio.Event()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        known.append(ws)
        await release.wait()
        with pytest.raises(ConnectionClosedError):
            ws.send_text("too late")

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send("go")
        await until(lambda: known)
        await client.aclose()
        await clock.advance(0.5)
        with pytest.raises(ConnectionClosedError) as lost:
            known[0].send_text("lost?")
        assert lost.value.closed_by == "lost"
        assert ends.told == []
        release.set()
    assert ends.told == ["error connection lost: 1006", "close connection lost: 1006"]


async def test_a_client_is_held_back_while_a_handler_is_busy_and_loses_nothing() -> None:
    app, clock = App(limits=Limits(read_ahead=200 * KIB)), FakeClock()
    release = anyio.Event()
    count, size = 400, 32 * KIB
    handled: list[int] = []
    sent = 0

    @app.on_message("/r")
    async def take(ws: WebSocket, message: bytes) -> None:
        await release.wait()
        handled.append(int.from_bytes(message[:2], "big"))

    async with served(app, clock) as server, connected(server, "/r") as client:

        async def flood() -> None:
            nonlocal sent
            for sent in range(count):
                await client.stream.send(masked(0x82, sent.to_bytes(2, "big") + bytes(size)))

        async with anyio.create_task_group() as tg:
            tg.start_soon(flood)
            await clock.advance(3)
            held_at = sent
            assert held_at < count - 1
            await clock.advance(3)
            assert sent == held_at
            release.set()
        await until(lambda: len(handled) == count)
    assert handled == list(range(count))


async def test_the_keepalive_does_not_run_while_a_client_is_held_back() -> None:
    app, clock = App(limits=Limits(read_ahead=1), keepalive=(1, 1)), FakeClock()
    release = anyio.Event()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        await release.wait()
        ws.send_text(message)

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send("go")
        await settled()
        await clock.advance(0.5)
        await client.send("second")
        await clock.advance(10)
        release.set()
        while not isinstance(event := await client.event(), events.TextMessage):
            assert isinstance(event, events.Ping)
        assert event.data == "go"
        assert await client.receive() == "second"


# Keepalive


async def test_a_silent_client_is_pinged_and_the_latency_known_from_its_pong() -> None:
    app, clock = App(), FakeClock()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        ws.send_text(str(ws.latency))

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send("?")
        assert await client.receive() == "None"
        await clock.advance(20)
        event = await client.event()
        assert isinstance(event, events.Ping)
        await clock.advance(1)
        await client.send_event(event.response())
        await client.send("?")
        assert await client.receive() == "1.0"


# More input than one step of parsing takes: the others have their turn in between

PING = masked(0x89, b"?")
STEPS = 6
#: Takes so many steps, and has nothing for a handler.
BACKLOG = PING * STEP_FRAMES * STEPS


async def test_others_have_their_turn_between_two_steps(make: Callable[..., Unit]) -> None:
    unit = make()
    seen = [0]

    async def watch() -> None:
        while True:
            if (answered := len(unit.sender.frames)) != seen[-1]:
                seen.append(answered)
            await checkpoint()

    unit.wire.arrive(BACKLOG + text("1"))
    async with anyio.create_task_group() as tg:
        tg.start_soon(watch)
        assert await unit.receive() == "1"
        tg.cancel_scope.cancel()
    seen.append(len(unit.sender.frames))
    assert seen[-1] == STEPS * STEP_FRAMES
    # Twice as much where the event loop has the two tasks change places between two passes.
    assert all(after - before <= 2 * STEP_FRAMES for before, after in pairwise(seen))


async def test_a_receive_that_is_cancelled_amid_steps_loses_nothing(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    unit.wire.arrive(BACKLOG + text("1") + BACKLOG + text("2") + text("3"))
    got: list[object] = []
    given_up = 0

    async def cancel(scope: anyio.CancelScope, passes: int) -> None:
        for _ in range(passes):
            await checkpoint()
        scope.cancel()

    for attempt in range(100):
        async with anyio.create_task_group() as tg:
            with anyio.CancelScope() as scope:
                tg.start_soon(cancel, scope, attempt % 5)
                while len(got) < 3:
                    got.append(await unit.receive())
            given_up += scope.cancelled_caught
            tg.cancel_scope.cancel()
    assert got == ["1", "2", "3"]
    assert given_up > 2
    assert unit.sender.frames == [encode_frame(PONG, b"?")] * STEP_FRAMES * STEPS * 2
    assert unit.wire.reads <= given_up + 1


async def test_what_a_message_causes_is_joined_while_there_is_input_to_look_at(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    unit.wire.arrive(text("1") + BACKLOG + text("2"))
    assert await unit.receive() == "1"
    assert unit.house.flusher.backlog
    assert await unit.receive() == "2"
    assert not unit.house.flusher.backlog


async def test_nothing_is_read_before_all_that_was_read_is_looked_at(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    unit.wire.arrive(BACKLOG + text("1"), text("2"))
    assert await unit.receive() == "1"
    assert unit.wire.reads == 1
    assert not unit.conn.has_more
    assert await unit.receive() == "2"


@pytest.mark.parametrize("busy", [False, True], ids=["waited for", "read ahead"])
@each_end
async def test_an_end_behind_many_steps_is_found(
    make: Callable[..., Unit], frame: bytes, ending: object, busy: bool
) -> None:
    unit = make()
    if frame:
        unit.wire.arrive(BACKLOG + text("1") + BACKLOG + frame)
    else:
        unit.wire.arrive(BACKLOG + text("1") + BACKLOG, b"")
    if busy:
        async with anyio.create_task_group() as tg:
            await unit.be_busy(tg)
        assert (unit.receiver.ending, unit.owner.found) == (ending, 1)
    assert await unit.receive() == "1"
    await unit.closed()
    assert unit.owner.applied == [ending]
    assert len(unit.sender.frames) == 2 * STEPS * STEP_FRAMES


async def test_after_an_end_of_our_own_the_peers_is_found_behind_many_steps(
    make: Callable[..., Unit],
) -> None:
    unit = make()
    unit.wire.arrive(BACKLOG + text("late") + BACKLOG + close(1000))
    await unit.receiver.read()
    assert unit.conn.has_more
    unit.conn.close(4000)
    unit.owner.finish(discard=True)
    answered = len(unit.sender.frames)
    while not unit.conn.close_received:
        await unit.receiver.read()
    assert unit.wire.reads == 1
    assert len(unit.sender.frames) == answered  # who is closing answers no ping
    assert (list(unit.receiver.inbox), unit.receiver.ending) == ([], None)


async def test_reading_ahead_goes_on_with_what_was_read(make: Callable[..., Unit]) -> None:
    unit = make()
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        unit.wire.arrive(BACKLOG + text("1"), text("2"))
        await settled()
        assert list(unit.receiver.inbox) == ["1", "2"]
        assert len(unit.sender.frames) == STEPS * STEP_FRAMES
        assert unit.receiver.is_read
        tg.cancel_scope.cancel()


async def test_reading_is_given_back_amid_steps(make: Callable[..., Unit]) -> None:
    unit = make()
    got: list[object] = []

    async def receive() -> None:
        got.append(await unit.receive())

    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        unit.wire.arrive(BACKLOG + text("1"))
        while not unit.conn.has_more:
            await checkpoint()
        tg.start_soon(receive)
    assert got == ["1"]
    assert not unit.receiver.is_read
    assert len(unit.sender.frames) == STEPS * STEP_FRAMES


def bomb(number: int, size: int) -> bytes:
    """A compressed message that inflates to so many bytes."""
    return masked(0xC2, deflated(b"%05d" % number + bytes(size - 5)))


async def test_what_is_read_ahead_is_counted_as_inflated(make: Callable[..., Unit]) -> None:
    agreement = Agreement("permessage-deflate", 15, 15, False, False)
    unit = make(agreement=agreement, read_ahead=2 * STEP_INFLATED)
    size = STEP_INFLATED // 2
    bombs = [bomb(number, size) for number in range(20)]
    assert sum(map(len, bombs)) < STEP_INFLATED / 10
    async with anyio.create_task_group() as tg:
        await unit.be_busy(tg)
        unit.wire.arrive(b"".join(bombs) + close(1000))
    assert not unit.receiver.is_read
    assert sum(map(len, unit.receiver.inbox)) == 2 * STEP_INFLATED
    unit.receiver.help_if_busy()
    assert unit.house.spawned == []
    received = [await unit.receive() for _ in bombs]
    assert [int(message[:5]) for message in received] == list(range(20))
    await unit.closed()
    assert unit.wire.reads == 1


# The same on real sockets


async def test_a_handler_that_gives_up_amid_steps_loses_nothing() -> None:
    app = App()
    count = 50

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        given_up = received = 0
        while received < count:
            with anyio.move_on_after(0) as impatient:
                assert await ws.receive() == str(received)
                received += 1
            if impatient.cancelled_caught:
                given_up += 1
                assert await ws.receive() == str(received)
                received += 1
        await ws.send_text(f"{given_up > 0}")

    async with served(app) as server, connected(server, "/r") as client:
        pings = PING * (STEP_FRAMES // 2)
        await client.send_raw(b"".join(pings + text(str(number)) for number in range(count)))
        while not isinstance(event := await client.event(), events.TextMessage):
            assert isinstance(event, events.Pong)
        assert event.data == "True"


async def test_many_steps_of_one_client_let_the_others_have_their_turn() -> None:
    app = App()
    handled: list[str] = []

    @app.on_message("/r")
    def take(ws: WebSocket, message: str) -> None:
        handled.append(message)
        ws.send_text(message)

    async with (
        served(app) as server,
        connected(server, "/r") as busy,
        connected(server, "/r") as other,
    ):
        # What the first sent is one read, and begins when the other's is on its way.
        await settled()
        await busy.send_raw(PING * STEP_FRAMES * 40 + text("behind the steps"))
        await other.send("between them")
        assert await other.receive() == "between them"
        while not isinstance(await busy.event(), events.TextMessage):
            pass
    assert handled == ["between them", "behind the steps"]


async def test_a_close_of_ours_ends_well_behind_many_steps_of_input() -> None:
    app = App()
    ends = Ends(app)
    handled: list[str] = []

    @app.on_message("/r")
    def take(ws: WebSocket, message: str) -> None:
        handled.append(message)
        ws.close(4000, "enough")

    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(text("1") + BACKLOG + text("2") + BACKLOG + close(1000))
        while isinstance(event := await client.event(), events.Pong):
            pass
        assert isinstance(event, events.CloseConnection)
        assert event.code == 4000
        await client.ended()
    assert handled == ["1"]
    assert ends.told == ["close closed by the server: 4000 (enough)"]


@pytest.mark.parametrize("how", ["close", "loss"])
async def test_an_end_behind_many_steps_is_noticed_while_a_handler_is_busy(how: str) -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app, error=False)
    handled: list[str] = []
    release = anyio.Event()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        handled.append(message)
        await release.wait()

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send_raw(text("1") + BACKLOG + text("2") + BACKLOG)
        await until(lambda: handled)
        await (client.close() if how == "close" else client.aclose())
        await clock.advance(1)
        assert len(app.room("/r")) == 0
        assert handled == ["1"]
        release.set()
        await ends.come()
    assert handled == ["1", "2"]
