"""The way out of a connection: joined per tick, written without waiting, bounded.

First with a fake kernel, counted call by call; then on real sockets with small kernel buffers.
"""

from __future__ import annotations

import errno
import logging
import random
import socket
import ssl
import sys
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.streams.tls
import pytest
import trustme
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto import events

import roomsock
from roomsock import App, Limits, serving
from roomsock.limits import KIB
from roomsock.protocol.deflate import Agreement, Compression, Deflater
from roomsock.protocol.frames import BINARY, PONG, SMALL, TEXT, encode_frame, frame_size
from roomsock.protocol.outbox import CHUNK, SlowConsumers
from roomsock.rooms import NO_WAIT, Everyone, Registry, Room
from roomsock.sender import JOIN_BYTES, JOIN_FRAMES, JOIN_TICKS, TURN_MESSAGES, Flusher, Sender
from roomsock.server import ROUND, Server

from .client import PATIENCE, Client, connected, open_stream, upgrade_request
from .clock import FakeClock, settled
from .fakes import run

# The unit: a fake kernel, a fake owner, and ticks that the test ends


class Kernel:
    """A transport of which the test says how many bytes it takes."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.room = room
        self.unsent = 0
        self.calls: list[bytes] = []
        self.error: OSError | None = None
        self._writable = anyio.Event()

    def send(self, data: bytes | memoryview) -> int:
        if self.error is not None:
            raise self.error
        if not self.room:
            raise BlockingIOError
        taken = bytes(data[: self.room])
        self.room -= len(taken)
        self.calls.append(taken)
        return len(taken)

    def take(self, room: int) -> None:
        """Have room again: who waits for it may go on."""
        self.room += room
        self.wake()

    def wake(self) -> None:
        """Wake who waits for room, also where there is none (as `notify_closing` does)."""
        self._writable.set()
        self._writable = anyio.Event()

    async def wait_writable(self) -> None:
        if self.room:
            await checkpoint()
        else:
            await self._writable.wait()

    @property
    def taken(self) -> bytes:
        return b"".join(self.calls)


class Owner:
    """What a sender asked of its connection."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.drops: list[bool] = []
        self.drains = 0
        self.when_too_slow: Callable[[], None] = lambda: None

    def too_slow(self, what: str) -> None:
        self.told.append(what)
        self.when_too_slow()

    def count_drop(self, first: bool) -> None:
        self.drops.append(first)

    def start_draining(self) -> None:
        self.drains += 1


class Ticks:
    """`call_soon` of an event loop that passes when the test says that a tick ends."""

    def __init__(self) -> None:
        self.callbacks: deque[Callable[[], None]] = deque()

    def __call__(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def end(self, times: int = 1) -> None:
        for _ in range(times):
            while self.callbacks:
                self.callbacks.popleft()()


class Unit:
    """A sender among fakes."""

    def __init__(self, room: int = 1 << 40, policy: SlowConsumers = "close", **limits: int) -> None:
        self.kernel = Kernel(room)
        self.owner = Owner()
        self.ticks = Ticks()
        self.flusher = Flusher(self.ticks)
        transport: Any = self.kernel
        self.sender = Sender(self.owner, transport, self.flusher, Limits(**limits), policy)

    def blocked(self, frame: bytes = b"head") -> Unit:
        """Have the kernel take all of one frame but its last byte, and nothing more."""
        self.kernel.room = len(frame) - 1
        self.sender.queue(frame)
        self.sender.flush()
        assert self.sender.blocked
        self.ticks.end()
        return self

    async def drain(self) -> bytes:
        """Let the kernel take everything; what it took since the last look."""
        self.kernel.calls.clear()
        self.kernel.room = 1 << 40
        with anyio.fail_after(PATIENCE):
            await self.sender.drain()
        return self.kernel.taken


def test_a_lone_frame_is_sent_at_once() -> None:
    unit = Unit()
    unit.sender.queue(b"a")
    assert unit.kernel.calls == [b"a"]
    unit.ticks.end()
    unit.sender.queue(b"b")
    assert unit.kernel.calls == [b"a", b"b"]


@pytest.mark.parametrize("count", [2, 3, 100, JOIN_FRAMES])
def test_the_frames_of_a_tick_are_one_immediate_and_one_joined_call(count: int) -> None:
    unit = Unit()
    frames = [b"%d " % number for number in range(count)]
    for frame in frames:
        unit.sender.queue(frame)
    unit.ticks.end()
    assert unit.kernel.calls == [frames[0], b"".join(frames[1:])]


def test_who_was_joined_goes_straight_to_joining_for_the_next_ticks() -> None:
    unit = Unit()
    for frame in (b"a", b"b"):
        unit.sender.queue(frame)
    unit.ticks.end()
    del unit.kernel.calls[:]
    for number in range(5):
        unit.sender.queue(b"c")
        unit.sender.queue(b"d")
        assert unit.kernel.calls == [b"cd"] * number
        unit.ticks.end()


def test_who_gets_lone_frames_again_is_sent_to_at_once_again() -> None:
    unit = Unit()
    for frame in (b"a", b"b"):
        unit.sender.queue(frame)
    unit.ticks.end()
    for _ in range(JOIN_TICKS):
        unit.flusher.schedule()  # somebody else's traffic makes the ticks go by
        unit.ticks.end()
    unit.flusher.schedule()
    unit.ticks.end()
    unit.sender.queue(b"lone")
    assert unit.kernel.calls[-1] == b"lone"


def test_a_tick_ends_once_however_much_is_sent_and_not_at_all_without() -> None:
    unit = Unit()
    for _ in range(10):
        unit.sender.queue(b"x")
    assert len(unit.ticks.callbacks) == 1
    unit.ticks.end()
    assert not unit.ticks.callbacks
    assert unit.flusher.tick == 1


def test_what_waits_for_the_tick_is_flushed_on_the_spot_at_256_frames() -> None:
    unit = Unit()
    for _ in range(1 + JOIN_FRAMES):
        unit.sender.queue(b"x")
    assert unit.kernel.calls == [b"x", b"x" * JOIN_FRAMES]
    unit.sender.queue(b"y")
    assert len(unit.kernel.calls) == 2
    unit.ticks.end()
    assert unit.kernel.calls[2:] == [b"y"]


def test_what_waits_for_the_tick_is_flushed_on_the_spot_at_64_kib() -> None:
    unit = Unit()
    frame = b"x" * (JOIN_BYTES // 4)
    for _ in range(1 + 4):
        unit.sender.queue(frame)
    assert unit.kernel.calls == [frame, frame * 4]


def test_a_close_frame_leaves_behind_what_waited_for_the_tick() -> None:
    unit = Unit()
    for frame in (b"a", b"b", b"c"):
        unit.sender.queue(frame)
    unit.sender.finish(b"close")
    assert unit.kernel.calls == [b"a", b"bc", b"close"]
    unit.ticks.end()
    assert len(unit.kernel.calls) == 3


def test_what_the_kernel_refuses_is_drained_by_one_task() -> None:
    unit = Unit(room=3)
    unit.sender.queue(b"abcd")
    unit.sender.queue(b"efgh")
    assert unit.owner.drains == 1
    assert unit.kernel.taken == b"abc"


async def test_a_drain_writes_the_rest_in_order_in_few_calls() -> None:
    unit = Unit(room=3)
    for frame in (b"abcd", b"efgh", b"ijkl"):
        unit.sender.queue(frame)
    assert await unit.drain() == b"defghijkl"
    assert unit.kernel.calls == [b"d", b"efghijkl"]
    assert not unit.sender.blocked
    unit.ticks.end()
    unit.sender.queue(b"next")
    assert unit.kernel.calls[-1] == b"next"
    assert unit.owner.drains == 1


async def test_a_second_refusal_is_drained_again() -> None:
    unit = Unit().blocked()
    await unit.drain()
    unit.blocked(b"more")
    assert unit.owner.drains == 2
    assert await unit.drain() == b"e"


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
async def test_a_kernel_that_takes_little_at_a_time_gets_every_byte_once(step: int) -> None:
    unit = Unit(room=1)
    frames = [b"<%d>" % number for number in range(20)]
    for frame in frames:
        unit.sender.queue(frame)
    async with anyio.create_task_group() as tg:
        tg.start_soon(unit.sender.drain)
        with anyio.fail_after(PATIENCE):
            while unit.sender.blocked:
                await anyio.wait_all_tasks_blocked()
                unit.kernel.take(step)
                await checkpoint()
    assert unit.kernel.taken == b"".join(frames)


async def test_the_joined_calls_of_a_drain_stay_small() -> None:
    """Beyond 64 KiB joining costs more memory than it saves calls."""
    unit = Unit().blocked()
    frame = b"x" * (CHUNK // 4)
    for _ in range(10):
        unit.sender.queue(frame)
    await unit.drain()
    assert [len(call) for call in unit.kernel.calls] == [1, CHUNK, CHUNK, CHUNK // 2]


def test_a_write_that_fails_takes_nothing_more() -> None:
    unit = Unit()
    unit.sender.queue(b"a")
    unit.kernel.error = ConnectionResetError(errno.ECONNRESET, "reset")
    unit.sender.queue(b"b")
    unit.ticks.end()
    unit.kernel.error = None
    unit.sender.queue(b"c")
    unit.sender.queue_kept(b"d")
    unit.sender.queue_urgent(b"e")
    unit.sender.finish(b"close")
    unit.ticks.end()
    assert unit.kernel.calls == [b"a"]
    assert not unit.owner.told


async def test_what_is_abandoned_is_not_drained() -> None:
    unit = Unit().blocked()
    unit.sender.abandon()
    assert await unit.drain() == b""
    unit.sender.queue(b"late")
    assert not unit.sender.is_high


async def test_a_drain_that_fails_wakes_who_waits() -> None:
    unit = Unit(high_water=1).blocked()
    unit.sender.queue(b"more")
    async with anyio.create_task_group() as tg:
        tg.start_soon(unit.sender.drain)
        tg.start_soon(unit.sender.wait_low)
        tg.start_soon(unit.sender.flushed)
        await anyio.wait_all_tasks_blocked()
        unit.kernel.error = BrokenPipeError(errno.EPIPE, "gone")
        unit.kernel.take(1)
    assert not unit.sender.is_high


# The bound


def send_first(unit: Unit, how: str, payload: bytes) -> bytes:
    """Send what is the first in its tick; returns the frame."""
    if how == "send":
        unit.sender.send(BINARY, payload)
    elif how == "room":
        room_of([unit.sender], unit.flusher).send_bytes(payload)
    else:
        unit.sender.queue(encode_frame(BINARY, payload))
    return encode_frame(BINARY, payload)


@pytest.mark.parametrize("how", ["queue", "send", "room"])
async def test_the_first_frame_of_a_tick_may_be_refused_however_it_is_sent(how: str) -> None:
    unit = Unit(room=3)
    frame = send_first(unit, how, b"payload")
    assert unit.kernel.calls == [frame[:3]]
    assert unit.sender.blocked
    assert unit.owner.drains == 1
    unit.ticks.end()
    more = send_first(unit, how, b"more")
    assert unit.kernel.calls == [frame[:3]]
    assert await unit.drain() == frame[3:] + more


@pytest.mark.parametrize("how", ["queue", "send", "room"])
def test_the_first_frame_of_a_tick_may_stay_behind_as_ciphertext_however_it_is_sent(
    how: str,
) -> None:
    unit = Unit()
    unit.kernel.unsent = 10
    send_first(unit, how, b"payload")
    assert unit.sender.blocked
    assert unit.owner.drains == 1


@pytest.mark.parametrize("how", ["queue", "send", "room"])
def test_the_first_frame_of_a_tick_may_meet_an_error_however_it_is_sent(how: str) -> None:
    unit = Unit()
    unit.kernel.error = ConnectionResetError()
    send_first(unit, how, b"payload")
    unit.kernel.error = None
    unit.ticks.end()
    send_first(unit, how, b"more")
    unit.ticks.end()
    assert unit.kernel.calls == []
    assert unit.owner.told == []


@pytest.mark.parametrize("policy", ["close", "drop_newest"])
@pytest.mark.parametrize("how", ["send", "room"])
@pytest.mark.parametrize("ticks", [0, 2])
def test_a_message_of_any_length_becomes_its_frame(
    how: str, policy: SlowConsumers, ticks: int
) -> None:
    unit = Unit(policy=policy)
    expected = b""
    for length in (0, 1, 125, 126, 127, SMALL - 1, SMALL, 255, 256, 65_535, 65_536):
        expected += send_first(unit, how, b"x" * length)
        unit.ticks.end(ticks)
    unit.ticks.end()
    assert unit.kernel.taken == expected


def test_the_bound_passed_tells_the_owner_and_queues_nothing() -> None:
    unit = Unit(outbox_messages=3).blocked()
    for _ in range(3):
        unit.sender.queue(b"x")
        unit.ticks.end()
    assert len(unit.owner.told) == 1
    assert "Limits.outbox" in unit.owner.told[0]


def test_the_bound_counts_bytes_too() -> None:
    unit = Unit(outbox=100).blocked()
    unit.sender.queue(b"x" * 99)
    unit.ticks.end()
    assert not unit.owner.told
    unit.sender.queue(b"x")
    assert unit.owner.told


async def test_a_slow_client_closed_gets_the_close_frame_behind_the_partly_written_one() -> None:
    unit = Unit(outbox_messages=3).blocked(b"partly")
    unit.owner.when_too_slow = lambda: unit.sender.finish(b"1013", discard=True)
    for frame in (b"lost", b"lost", b"lost", b"late"):
        unit.sender.queue(frame)
        unit.ticks.end()
    assert len(unit.owner.told) == 1
    assert await unit.drain() == b"y1013"


async def test_a_close_frame_waits_for_what_was_queued_before() -> None:
    unit = Unit().blocked(b"partly")
    unit.sender.queue(b"queued")
    unit.sender.finish(b"1000")
    unit.sender.queue(b"late")
    assert await unit.drain() == b"yqueued1000"


async def test_an_end_without_a_close_frame_adds_nothing_and_takes_nothing_more() -> None:
    unit = Unit().blocked(b"partly")
    unit.sender.finish()
    unit.sender.queue(b"late")
    assert await unit.drain() == b"y"
    assert not unit.sender.blocked


async def test_an_empty_outbox_takes_any_one_message() -> None:
    unit = Unit(outbox=100, outbox_messages=2, room=1)
    frame = b"x" * 10_000
    unit.sender.queue(frame)
    unit.ticks.end()
    assert not unit.owner.told
    assert await unit.drain() == frame[1:]


def test_an_empty_outbox_takes_any_one_message_also_behind_ciphertext() -> None:
    """TLS: everything was taken and encrypted, and the kernel refused some of that."""
    unit = Unit(outbox=100)
    unit.kernel.unsent = 1
    unit.sender.queue(b"encrypted")
    assert unit.sender.blocked
    unit.ticks.end()
    unit.sender.queue(b"x" * 101)
    assert not unit.owner.told


@pytest.mark.parametrize("size", [10, 101])
def test_a_burst_within_a_tick_is_not_held_against_a_client(size: int) -> None:
    unit = Unit(outbox=100, outbox_messages=5, room=1)
    for _ in range(1000):
        unit.sender.queue(b"x" * size)
    unit.ticks.end()
    assert not unit.owner.told


async def test_what_a_burst_leaves_behind_does_not_close_who_reads_at_the_next_message() -> None:
    unit = Unit(outbox=100, outbox_messages=5, room=1)
    for _ in range(1000):
        unit.sender.queue(b"burst")
    unit.ticks.end()
    unit.sender.queue(b"next")
    assert not unit.owner.told
    assert (await unit.drain())[-9:] == b"burstnext"


def test_what_a_burst_leaves_behind_may_grow_by_no_more_than_the_bound() -> None:
    unit = Unit(outbox_messages=5, room=1)
    for _ in range(1000):
        unit.sender.queue(b"burst")
    unit.ticks.end()
    for count in range(6):
        assert len(unit.owner.told) == 0, count
        unit.sender.queue(b"next")
        unit.ticks.end()
    assert len(unit.owner.told) == 1


async def test_a_burst_drained_leaves_no_larger_bound() -> None:
    unit = Unit(outbox_messages=5, room=1)
    for _ in range(1000):
        unit.sender.queue(b"burst")
    unit.ticks.end()
    unit.sender.queue(b"next")
    await unit.drain()
    unit.ticks.end()
    unit.blocked()
    for _ in range(5):
        unit.sender.queue(b"x")
        unit.ticks.end()
    assert len(unit.owner.told) == 1


# Dropping


async def test_drop_newest_keeps_what_waits() -> None:
    unit = Unit(policy="drop_newest", outbox_messages=3).blocked(b"partly")
    for frame in (b"1", b"2", b"3", b"4"):
        unit.sender.queue(frame)
        unit.ticks.end()
    assert unit.owner.drops == [True, False]
    assert not unit.owner.told
    assert await unit.drain() == b"y12"


async def test_drop_oldest_keeps_what_is_new_and_the_partly_written_frame() -> None:
    unit = Unit(policy="drop_oldest", outbox_messages=3).blocked(b"partly")
    for frame in (b"1", b"2", b"3", b"4"):
        unit.sender.queue(frame)
        unit.ticks.end()
    assert unit.owner.drops == [True, False]
    assert await unit.drain() == b"y34"


async def test_drop_oldest_drops_as_many_as_the_bytes_need() -> None:
    unit = Unit(policy="drop_oldest", outbox=11).blocked(b"partly")
    for frame in (b"aaaa", b"bbbb", b"ccccccc"):
        unit.sender.queue(frame)
        unit.ticks.end()
    assert len(unit.owner.drops) == 2
    assert await unit.drain() == b"yccccccc"


async def test_drop_oldest_drops_nothing_for_a_message_that_cannot_fit() -> None:
    unit = Unit(policy="drop_oldest", outbox=10).blocked(b"partly")
    for frame in (b"aaa", b"bbb", b"x" * 50):
        unit.sender.queue(frame)
        unit.ticks.end()
    assert len(unit.owner.drops) == 1
    assert await unit.drain() == b"yaaabbb"


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
async def test_a_direct_send_is_never_dropped(policy: SlowConsumers) -> None:
    unit = Unit(policy=policy, outbox_messages=4).blocked(b"partly")
    unit.sender.queue_kept(b"D")
    unit.ticks.end()
    for _ in range(10):
        unit.sender.queue(b"r")
        unit.ticks.end()
    assert len(unit.owner.drops) == 8
    assert not unit.owner.told
    assert await unit.drain() == b"yDrr"


async def test_drop_oldest_makes_room_for_a_direct_send() -> None:
    unit = Unit(policy="drop_oldest", outbox_messages=3).blocked(b"partly")
    for frame in (b"1", b"2"):
        unit.sender.queue(frame)
        unit.ticks.end()
    unit.sender.queue_kept(b"D")
    assert unit.owner.drops == [True]
    assert await unit.drain() == b"y2D"


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
def test_direct_sends_beyond_the_bound_close_also_who_would_have_messages_dropped(
    policy: SlowConsumers,
) -> None:
    unit = Unit(policy=policy, outbox_messages=3).blocked()
    for _ in range(2 if policy == "drop_oldest" else 5):
        unit.sender.queue_kept(b"D")
        unit.ticks.end()
    unit.sender.queue(b"r")
    assert len(unit.owner.drops) == 1
    unit.sender.queue_kept(b"D")
    assert len(unit.owner.told) == 1


# Control frames


async def test_a_client_that_pings_and_never_reads_is_owed_one_pong() -> None:
    unit = Unit().blocked(b"partly")
    unit.sender.queue(encode_frame(TEXT, b"text"))
    for number in range(100):
        unit.sender.queue_urgent(encode_frame(PONG, b"%d" % number))
    assert await unit.drain() == b"y" + encode_frame(PONG, b"99") + encode_frame(TEXT, b"text")


def test_a_control_frame_waits_its_turn_while_the_kernel_takes_everything() -> None:
    unit = Unit()
    for frame in (b"a", b"b"):
        unit.sender.queue(frame)
    unit.sender.queue_urgent(b"pong")
    unit.ticks.end()
    assert unit.kernel.taken == b"abpong"


# Waiting


async def test_who_awaits_a_send_waits_at_the_high_water_mark_and_goes_on_below_it() -> None:
    unit = Unit(high_water=10).blocked()
    unit.sender.queue(b"x" * 10)
    passed = anyio.Event()

    async def pace() -> None:
        await unit.sender.wait_low()
        passed.set()

    async with anyio.create_task_group() as tg:
        tg.start_soon(pace)
        tg.start_soon(unit.sender.drain)
        await anyio.wait_all_tasks_blocked()
        assert not passed.is_set()
        unit.kernel.take(1)
        await anyio.wait_all_tasks_blocked()
        assert passed.is_set()
        assert unit.sender.blocked
        unit.kernel.take(100)


@pytest.mark.parametrize("unawaited", [0, 1, 2, JOIN_FRAMES - 1, 2 * JOIN_FRAMES])
@pytest.mark.parametrize("size", [1, 2 * KIB, JOIN_BYTES])
@pytest.mark.parametrize("kernel", ["takes all", "has lost the client"])
async def test_who_awaits_its_sends_lets_others_have_their_turn(
    kernel: str, size: int, unawaited: int
) -> None:
    """However many others it does not await: else a loop of sends would stop the event loop."""
    unit = Unit()
    if kernel == "has lost the client":
        unit.sender.abandon()
    for _ in range(2):
        awaited = 0
        while (pace := unit.sender.send(BINARY, b"x" * size)) is NO_WAIT:
            awaited += 1
            for _ in range(unawaited):
                unit.sender.send(BINARY, b"x" * size)
        assert awaited <= TURN_MESSAGES + 1
        await pace
        unit.ticks.end()
    if kernel == "takes all":
        assert unit.sender.send(BINARY, b"the turn is ours again") is NO_WAIT


async def test_who_awaits_its_sends_goes_on_at_once_below_the_high_water_mark() -> None:
    """Else each were a tick of its own, whose bytes are held against a smaller `Limits.outbox`."""
    unit = Unit(high_water=1000, outbox=100).blocked()

    async def sends(count: int) -> None:
        for _ in range(count):
            await unit.sender.send(BINARY, b"x" * 58)

    run(sends(16))
    assert not unit.sender.is_high
    with pytest.raises(AssertionError, match="it waits"):
        run(sends(2))
    assert unit.owner.told == []


async def test_who_awaits_its_sends_below_the_mark_lets_others_have_their_turn() -> None:
    unit = Unit(high_water=KIB * KIB).blocked()
    for _ in range(TURN_MESSAGES - 1):
        pace: Any = unit.sender.send(BINARY, b"x")
        assert list(pace.__await__()) == []
    pace = unit.sender.send(BINARY, b"x")
    with pytest.raises(AssertionError, match="it waits"):
        run(pace._wait())


@pytest.mark.parametrize("end", ["finish", "finish without a frame", "abandon"])
async def test_who_awaits_a_send_goes_on_when_the_connection_ends(end: str) -> None:
    unit = Unit(high_water=1).blocked()
    unit.sender.queue(b"more")
    with anyio.fail_after(PATIENCE):
        await waits_until_the_end(unit, end)


async def waits_until_the_end(unit: Unit, end: str) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(unit.sender.wait_low)
        await anyio.wait_all_tasks_blocked()
        if end == "abandon":
            unit.sender.abandon()
        else:
            unit.sender.finish(b"close" if end == "finish" else b"")


async def test_flushed_writes_what_waits_for_the_tick_and_waits_for_what_was_refused() -> None:
    unit = Unit()
    for frame in (b"a", b"b"):
        unit.sender.queue(frame)
    await unit.sender.flushed()
    assert unit.kernel.calls == [b"a", b"b"]
    unit.ticks.end()
    unit.blocked(b"cd")
    flushed = anyio.Event()

    async def wait() -> None:
        await unit.sender.flushed()
        flushed.set()

    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        tg.start_soon(unit.sender.drain)
        await anyio.wait_all_tasks_blocked()
        assert not flushed.is_set()
        unit.kernel.take(1)
    assert unit.kernel.taken == b"abcd"


async def test_a_wake_without_room_is_no_progress() -> None:
    """Some loops wake a writer when they wake the reader of the same socket: if that counted, a
    peer that sends and never reads would be immortal."""
    unit = Unit().blocked()
    async with anyio.create_task_group() as tg:
        tg.start_soon(unit.sender.drain)
        await anyio.wait_all_tasks_blocked()
        before = unit.sender.progress
        unit.kernel.wake()
        await anyio.wait_all_tasks_blocked()
        assert unit.sender.progress == before
        unit.kernel.take(1)
    assert unit.sender.progress != before


async def test_a_kernel_that_takes_ciphertext_makes_progress() -> None:
    unit = Unit()
    unit.kernel.unsent = 10
    unit.sender.queue(b"encrypted")

    class TLSKernel(Kernel):
        async def wait_writable(self) -> None:
            await checkpoint()
            self.unsent -= 5

    unit.kernel.__class__ = TLSKernel
    before = unit.sender.progress
    with anyio.fail_after(PATIENCE):
        await unit.sender.drain()
    assert unit.sender.progress > before
    assert not unit.sender.blocked


async def test_a_transport_that_takes_nothing_has_refused_all() -> None:
    """As TLS does, while the kernel has not taken what it has encrypted before."""
    unit = Unit()
    kernel: Any = unit.kernel
    kernel.send = lambda data: 0
    unit.sender.queue(b"one")
    assert unit.sender.blocked
    del kernel.send
    assert await unit.drain() == b"one"


# Rooms of many: what a broadcast costs, counted


class Listener:
    """A recipient that keeps what it is given."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def queue(self, frame: bytes) -> None:
        self.frames.append(frame)

    async def flushed(self) -> None:
        pass


def room_of(recipients: list[Any], flusher: Flusher | None = None) -> roomsock.Room:
    app = App()
    app._registry.queue_all = flusher and flusher.queue_all
    for recipient in recipients:
        member: Any = object()
        app._registry.join(member, "/room", recipient)
    return app.room("/room")


def test_a_broadcast_is_encoded_once_and_shared_by_all() -> None:
    members = [Listener() for _ in range(100)]
    room = room_of(members)
    for number in range(2):
        assert (room.send_bytes(b"x" * 70_000) if number else room.send_json({"a": 1})) == 100
        frames = [member.frames.pop() for member in members]
        assert all(frame is frames[0] for frame in frames)


def test_a_tick_costs_two_calls_a_member_however_many_messages_it_has() -> None:
    ticks = Ticks()
    flusher = Flusher(ticks)
    kernels: list[Any] = [Kernel() for _ in range(50)]
    room = room_of([Sender(Owner(), each, flusher, Limits(), "close") for each in kernels], flusher)
    for number in range(20):
        room.send_text(str(number))
    ticks.end()
    assert [len(kernel.calls) for kernel in kernels] == [2] * 50
    assert len({kernel.taken for kernel in kernels}) == 1
    for number in range(20):
        room.send_text(str(number))
    ticks.end()
    assert [len(kernel.calls) for kernel in kernels] == [3] * 50


def test_a_connection_whose_flush_fails_costs_the_others_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ticks = Ticks()
    flusher = Flusher(ticks)
    kernels: list[Any] = [Kernel() for _ in range(3)]
    room = room_of([Sender(Owner(), each, flusher, Limits(), "close") for each in kernels], flusher)
    room.send_text("a")
    room.send_text("b")
    kernels[1].error = ValueError("a mistake of ours")
    ticks.end()
    assert (
        kernels[0].taken == kernels[2].taken == encode_frame(TEXT, b"a") + encode_frame(TEXT, b"b")
    )
    assert [record.levelname for record in caplog.records] == ["ERROR"]


class Hall:
    """Three connections in rooms, among fakes: what is done to them by chance, and what each is to
    get for it."""

    def __init__(self, shares: bool, policy: SlowConsumers, limits: Limits) -> None:
        self.registry = Registry()
        self.ticks = Ticks()
        self.flusher = Flusher(self.ticks)
        self.registry.queue_all = self.flusher.queue_all if shares else None
        self.sockets: list[Any] = [object() for _ in range(3)]
        self.kernels = [EagerKernel() for _ in self.sockets]
        self.owners = [Owner() for _ in self.sockets]
        self.expected = [b"" for _ in self.sockets]
        self.senders = []
        self.counts: list[int] = []
        self.sent = 0
        for number, (kernel, owner) in enumerate(zip(self.kernels, self.owners, strict=True)):
            transport: Any = kernel
            sender = Sender(owner, transport, self.flusher, limits, policy)
            owner.when_too_slow = partial(self.close, number, discard=True)
            self.senders.append(sender)
            self.registry.everyone.enter(self.sockets[number], sender)
            self.registry.join(self.sockets[number], "a", sender)
        for _ in range(2):  # from now on they join
            self.broadcast("a", 1, set())
        self.tick()

    def frame(self, size: int) -> bytes:
        self.sent += 1
        return b"%d|" % self.sent * size

    def broadcast(self, name: str, size: int, left_out: set[int]) -> None:
        room = Room(self.registry, name) if name else Everyone(self.registry)
        payload = self.frame(size)
        for number, ws in enumerate(self.sockets):
            if ws in room and number not in left_out:
                self.expected[number] += encode_frame(BINARY, payload)
        exclude = [self.sockets[number] for number in left_out]
        self.counts.append(int(room.send_bytes(payload, exclude=exclude or None)))

    def direct(self, number: int) -> None:
        if self.sockets[number] in self.registry.everyone:
            frame = self.frame(1)
            self.expected[number] += frame
            self.senders[number].queue_kept(frame)

    def join(self, number: int, name: str) -> None:
        ws = self.sockets[number]
        if ws in self.registry.everyone and ws not in Room(self.registry, name):
            self.registry.join(ws, name, self.senders[number])

    def leave(self, number: int, name: str) -> None:
        self.registry.release(self.sockets[number], (name,))

    def close(self, number: int, discard: bool = False) -> None:
        if self.sockets[number] in self.registry.everyone:
            self.registry.silence(self.sockets[number], "ab")
            self.expected[number] += b"close"
            self.senders[number].finish(b"close", discard=discard)

    def flush(self, number: int) -> None:
        self.senders[number].flush()

    def refuse(self, number: int, room: int) -> None:
        if not self.senders[number].blocked:
            self.kernels[number].room = room

    def take(self, number: int) -> None:
        self.kernels[number].room = 1 << 40
        if self.senders[number].blocked:
            run(self.senders[number].drain())

    def hurry(self) -> None:
        self.flusher.backlog = True

    def step(self) -> None:
        if self.ticks.callbacks:
            self.ticks.callbacks.popleft()()

    def tick(self) -> None:
        self.ticks.end()


class EagerKernel(Kernel):
    async def wait_writable(self) -> None:
        pass


someone = st.integers(0, 2)
broadcasts = st.tuples(
    st.just("broadcast"),
    st.sampled_from(["a", "a", "a", "b", ""]),
    st.sampled_from([1, 1, 1, JOIN_BYTES // 5]),
    st.one_of(st.just(set()), st.sets(someone, max_size=2)),
)
happenings = st.one_of(
    broadcasts,
    st.tuples(st.sampled_from(["direct", "flush", "close"]), someone),
    st.tuples(st.sampled_from(["join", "leave"]), someone, st.sampled_from("ab")),
    st.tuples(st.just("refuse"), someone, st.integers(0, 30)),
    st.tuples(st.just("take"), someone),
    st.tuples(st.sampled_from(["hurry", "step", "tick"])),
)
#: Mostly broadcasts, each of them after one other thing.
stories = st.lists(st.tuples(happenings, broadcasts), min_size=5, max_size=20)


@settings(max_examples=300)
@given(
    stories.map(lambda story: [happening for pair in story for happening in pair]),
    st.sampled_from(["close", "drop_newest", "drop_oldest"]),
    st.sampled_from([Limits(), Limits(), Limits(outbox_messages=2)]),
)
def test_what_is_collected_for_all_reaches_each_as_if_it_had_been_queued_for_it_alone(
    happenings: list[tuple[Any, ...]], policy: SlowConsumers, limits: Limits
) -> None:
    halls = [Hall(shares, policy, limits) for shares in (True, False)]
    for hall in halls:
        for name, *arguments in [*happenings, ("tick",), *(("take", each) for each in range(3))]:
            getattr(hall, name)(*arguments)
    shared, alone = halls
    assert shared.counts == alone.counts
    for number in range(3):
        assert shared.kernels[number].calls == alone.kernels[number].calls
        assert shared.owners[number].drops == alone.owners[number].drops
        assert shared.owners[number].told == alone.owners[number].told
        if not shared.owners[number].drops and not shared.owners[number].told:
            assert shared.kernels[number].taken == shared.expected[number]
    assert shared.registry.everyone.batch is None
    assert all(record.members.batch is None for record in shared.registry.rooms.values())


def served_hall(size: int) -> tuple[Ticks, list[Any], roomsock.Room]:
    """A room whose members were sent to several times in the tick before."""
    ticks = Ticks()
    flusher = Flusher(ticks)
    kernels: list[Any] = [Kernel() for _ in range(size)]
    room = room_of([Sender(Owner(), each, flusher, Limits(), "close") for each in kernels], flusher)
    for _ in range(3):
        room.send_text("x")
    ticks.end()
    for kernel in kernels:
        kernel.calls.clear()
    return ticks, kernels, room


def test_what_a_tick_brings_to_a_room_is_joined_once_for_all_its_members() -> None:
    ticks, kernels, room = served_hall(100)
    for number in range(20):
        room.send_text(str(number))
    ticks.end()
    assert all(len(kernel.calls) == 1 for kernel in kernels)
    assert len({id(kernel.calls[0]) for kernel in kernels}) == 1


def test_who_joins_within_a_tick_gets_what_is_sent_from_then_on() -> None:
    ticks, kernels, room = served_hall(2)
    late = Kernel()
    room.send_text("before")
    member: Any = object()
    transport: Any = late
    sender = Sender(Owner(), transport, Flusher(ticks), Limits(), "close")
    room._registry.join(member, room.name, sender)
    for content in ("1", "2"):
        room.send_text(content)
    ticks.end()
    expected = [encode_frame(TEXT, content) for content in (b"before", b"1", b"2")]
    assert late.taken == b"".join(expected[1:])
    assert all(kernel.calls == [b"".join(expected)] for kernel in kernels)


def test_nothing_overtakes_what_a_room_was_to_join_while_there_was_a_backlog() -> None:
    ticks = Ticks()
    flusher = Flusher(ticks)
    kernel: Any = Kernel()
    sender = Sender(Owner(), kernel, flusher, Limits(), "close")
    room = room_of([sender], flusher)
    flusher.backlog = True
    room.send_text("1")
    flusher.backlog = False
    sender.queue_kept(b"2")
    assert kernel.calls == []
    ticks.end()
    assert kernel.calls == [encode_frame(TEXT, b"1") + b"2"]


def test_a_message_that_is_joined_costs_the_same_whatever_the_size_of_the_room() -> None:
    def calls(size: int, **left_out: Any) -> int:
        ticks, _, room = served_hall(size)
        for _ in range(2):
            room.send_text("x", **left_out)
        seen: list[str] = []
        sys.setprofile(lambda frame, event, argument: seen.append(event))
        try:
            room.send_text("x", **left_out)
        finally:
            sys.setprofile(None)
        ticks.end()
        return len(seen)

    assert calls(10) == calls(1000)
    assert calls(10, exclude=[]) == calls(1000, exclude=[])


def test_a_room_that_nobody_can_share_at_first_is_shared_in_the_next_tick() -> None:
    ticks = Ticks()
    flusher = Flusher(ticks)
    kernels: list[Any] = [Kernel() for _ in range(5)]
    senders = [Sender(Owner(), each, flusher, Limits(), "close") for each in kernels]
    room = room_of(senders, flusher)
    for sender in senders:  # each has something of its own that waits
        sender.queue(b"at once")
        sender.queue(b"own")
    room.send_text("1")
    room.send_text("2")
    ticks.end()
    first = encode_frame(TEXT, b"1") + encode_frame(TEXT, b"2")
    assert all(kernel.calls == [b"at once", b"own" + first] for kernel in kernels)
    room.send_text("3")
    ticks.end()
    assert len({id(kernel.calls[2]) for kernel in kernels}) == 1


def test_what_is_queued_while_a_tick_is_flushed_is_not_overtaken() -> None:
    unit = Unit()

    class Noticing(Kernel):
        def send(self, data: bytes | memoryview) -> int:
            if self.calls:  # at the end of the tick: as a log handler may do
                unit.sender.queue(b"1")
                unit.sender.queue(b"2")
            return super().send(data)

    other: Any = Noticing()
    sender = Sender(Owner(), other, unit.flusher, Limits(), "close")
    for frame in (b"a", b"b"):
        sender.queue(frame)
    unit.ticks.callbacks.popleft()()
    unit.ticks.callbacks.popleft()()
    unit.sender.queue(b"3")
    unit.ticks.end()
    assert unit.kernel.taken == b"123"


def test_a_connection_that_lost_a_frame_by_a_mistake_of_ours_is_sent_nothing_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    unit = Unit()
    mistake: Any = ValueError("a mistake of ours")
    for frame in (b"1", b"2"):
        unit.sender.queue(frame)
    unit.kernel.error = mistake
    unit.ticks.end()
    unit.kernel.error = None
    unit.sender.queue(b"3")
    unit.ticks.end()
    assert unit.kernel.taken == b"1"
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_rooms_share_what_is_sent_while_the_app_is_served_and_not_after() -> None:
    app = App()
    async with served(app) as server:
        assert app._registry.queue_all == server.flusher.queue_all
    assert app._registry.queue_all is None


# Real sockets whose kernel buffers are small

BLOCK = 32 * KIB


def narrow_listener() -> socket.socket:
    """Its connections inherit the small buffer: the kernel refuses after some 100 KiB."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * KIB)
    listener.bind(("127.0.0.1", 0))
    return listener


@asynccontextmanager
async def slow_client(
    server: Server, path: str, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Client]:
    """A client with a small buffer: as long as the test does not read, nobody does."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * KIB)
    sock.connect(server.addresses[0])
    sock.setblocking(False)
    stream: Any = await anyio.abc.SocketStream.from_socket(sock)
    if tls is not None:
        stream = await anyio.streams.tls.TLSStream.wrap(
            stream, hostname="localhost", ssl_context=tls, standard_compatible=False
        )
    client = Client(stream)
    try:
        await client.handshake(path)
        yield client
    finally:
        await anyio.aclose_forcefully(client.stream)


def numbered(number: int) -> bytes:
    return b"%08d" % number + b"." * (BLOCK - 8)


def number_of(message: str | bytes) -> int:
    return int(message[:8])


@asynccontextmanager
async def served(app: App, clock: FakeClock | None = None, **options: Any) -> AsyncIterator[Server]:
    """The app on a listener with small buffers, in a time that stands still."""
    time = clock or FakeClock()
    options.setdefault("sock", narrow_listener())
    async with anyio.create_task_group() as tg:
        async with serving(app, clock=time, **options) as server:
            try:
                with anyio.fail_after(2 * PATIENCE):
                    yield server
            finally:
                tg.start_soon(hurry, time)
        tg.cancel_scope.cancel()


async def hurry(clock: FakeClock) -> None:
    """What is stuck must not hold the whole suite."""
    while True:
        await clock.advance(1)


class Ends:
    """An app whose path ``/room`` does nothing but note how its connections end."""

    def __init__(self, **settings: Any) -> None:
        self.app = App(**settings)
        self.errors: list[Exception] = []
        self.reasons: list[roomsock.ConnectionClosed] = []
        self.app.add_on_message("/room", self.ignore)
        self.app.add_on_error("/room", self.on_error)
        self.app.add_on_close("/room", self.on_close)
        self.room = self.app.room("/room")

    def ignore(self, ws: roomsock.WebSocket, text: str) -> None:
        pass

    def on_error(self, ws: roomsock.WebSocket, error: Exception) -> None:
        self.errors.append(error)

    def on_close(self, ws: roomsock.WebSocket, reason: roomsock.ConnectionClosed) -> None:
        self.reasons.append(reason)

    @property
    def connections(self) -> list[roomsock.WebSocket]:
        return self.room.members


async def read_blocks(client: Client, numbers: list[int], count: int) -> None:
    with anyio.fail_after(PATIENCE):
        while len(numbers) < count:
            numbers.append(number_of(await client.receive()))


async def test_every_member_sees_one_order_and_direct_frames_in_their_place() -> None:
    app = App()

    @app.on_message("/room")
    async def chat(ws: roomsock.WebSocket, text: str) -> None:
        for number in range(30):
            ws.send_text(f"direct {text} {number}")
            ws.send_text_to_this_room(f"room {text} {number}")
            if number % 7 == 0:
                await checkpoint()

    async with (
        serving(app, port=0) as server,
        connected(server, "/room") as one,
        connected(server, "/room") as two,
    ):
        await one.send("a")
        await two.send("b")
        seen: list[list[str]] = [[], []]
        for client, told in zip((one, two), seen, strict=True):
            for _ in range(90):
                told.append(str(await client.receive()))
        rooms = [[each for each in told if each.startswith("room")] for told in seen]
        assert rooms[0] == rooms[1]
        for told, name in zip(seen, "ab", strict=True):
            mine = [each for each in told if f" {name} " in each]
            expected = [f"{kind} {name} {n}" for n in range(30) for kind in ("direct", "room")]
            assert mine == expected


async def test_a_member_that_does_not_read_is_closed_with_1013_and_the_room_spared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "roomsock")
    ends = Ends(limits=Limits(outbox=8 * BLOCK))
    async with (
        served(ends.app) as server,
        connected(server, "/room") as reader,
        slow_client(server, "/room") as slow,
    ):
        numbers: list[int] = []
        async with anyio.create_task_group() as tg:
            tg.start_soon(read_blocks, reader, numbers, 60)
            counts = []
            for number in range(60):
                counts.append(int(await ends.room.send_bytes(numbered(number))))
                with anyio.fail_after(PATIENCE):
                    while len(numbers) <= number:
                        await checkpoint()
        assert numbers == list(range(60))
        closed_at = counts.index(1)
        # The message that it was too slow for is not counted for it, nor any after.
        assert counts == [2] * closed_at + [1] * (60 - closed_at)
        assert server.counters.slow_consumers == 1
        # What it had begun to receive is completed, and the close frame stands behind it.
        got = []
        while isinstance(event := await slow.event(), events.Message):
            got.append(number_of(bytes(event.data)))
        assert isinstance(event, events.CloseConnection)
        assert event.code == 1013
        assert got == list(range(len(got)))
        assert len(got) < closed_at
        await slow.send_event(event.response())
        await slow.ended()
    slow_ones = [error for error in ends.errors if isinstance(error, roomsock.SlowConsumer)]
    assert len(slow_ones) == 1
    assert [reason.code for reason in ends.reasons].count(1013) == 1
    assert len(ends.reasons) == 2
    assert len([record for record in caplog.records if "too slow" in record.message]) == 1


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
async def test_messages_dropped_for_a_slow_member_are_whole_counted_and_logged_once(
    policy: SlowConsumers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "roomsock")
    ends = Ends(limits=Limits(outbox=8 * BLOCK), slow_consumers=policy)
    async with (
        served(ends.app) as server,
        slow_client(server, "/room") as slow,
    ):
        (ws,) = ends.connections
        ws.send_text("direct, first")
        for number in range(30):
            await ends.room.send_bytes(numbered(number))
        ws.send_text("direct, last")
        dropped = server.counters.dropped_messages
        assert 0 < dropped < 30
        assert await slow.receive() == "direct, first"
        numbers: list[int] = []
        while isinstance(message := await slow.receive(), bytes):
            numbers.append(number_of(message))
        assert message == "direct, last"
        assert len(numbers) == 30 - dropped
        assert numbers == sorted(numbers)
        assert (29 in numbers) == (policy == "drop_oldest")
        # Who reads again gets everything again.
        await ends.room.send_bytes(numbered(99))
        assert number_of(await slow.receive()) == 99
        assert len(ends.connections) == 1
    assert len([record for record in caplog.records if "dropped" in record.message]) == 1


async def test_a_peer_that_sends_and_never_reads_is_ended_and_its_handler_told() -> None:
    clock = FakeClock()
    ends = Ends(limits=Limits(send_timeout=20), keepalive=None)
    async with (
        served(ends.app, clock) as server,
        slow_client(server, "/room") as slow,
    ):
        (ws,) = ends.connections
        ws.send_bytes(b"x" * (1 << 20))
        for _ in range(19):
            await slow.send("I live")
            await clock.advance(1)
        assert len(ends.connections) == 1
        for _ in range(20):  # the kernels of both sides may have taken a little more at first
            if not ends.connections:
                break
            await slow.send("I live")
            await clock.advance(1)
        assert server.counters.slow_consumers == 1
    (error,) = ends.errors
    assert isinstance(error, roomsock.SlowConsumer)
    assert [reason.code for reason in ends.reasons] == [1013]


async def test_a_peer_that_never_reads_is_ended_also_while_its_handler_is_busy_time_and_again() -> (
    None
):
    """Each message that finds the handler busy hands reading over and back, which on trio wakes
    the writer, too. That is no progress."""
    clock = FakeClock()
    app = App(limits=Limits(send_timeout=20), keepalive=None)
    errors: list[Exception] = []

    @app.on_message("/room")
    async def busy(ws: roomsock.WebSocket, text: str | None, error: Exception | None) -> None:
        if error is not None:
            errors.append(error)
        elif text == "flood":
            ws.send_bytes(b"x" * (1 << 20))
        else:
            await clock.sleep_until(clock.now() + 1)

    async with (
        served(app, clock) as server,
        slow_client(server, "/room") as slow,
    ):
        await slow.send("flood")
        for _ in range(30):  # the kernels of both sides may take a little more at first
            if not server.connections:
                break
            await slow.send("I live")
            await clock.advance(1.75)
        assert server.counters.slow_consumers == 1
        assert server.connections == 0
    assert len(errors) == 1


async def test_a_peer_that_never_reads_an_http_response_is_dropped() -> None:
    clock = FakeClock()
    app = App(limits=Limits(send_timeout=20))

    @app.get("/large")
    def large(request: roomsock.Request) -> bytes:
        return b"x" * (1 << 20)

    async with served(app, clock) as server:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * KIB)
            sock.connect(server.addresses[0])
            sock.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            await clock.advance(19)
            assert server.connections == 1
            for _ in range(20):  # the kernels of both sides may have taken a little more at first
                await clock.advance(1)
            assert server.connections == 0


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_who_awaits_its_sends_waits_for_the_client_to_read(tls: bool) -> None:
    server_tls, client_tls = tls_contexts() if tls else (None, None)
    app = App(limits=Limits(high_water=2 * BLOCK))
    sent: list[int] = []

    @app.serve("/stream")
    async def stream(ws: roomsock.WebSocket) -> None:
        for number in range(100):
            await ws.send_bytes(numbered(number))
            sent.append(number)

    clock = FakeClock()
    async with (
        served(app, clock, tls=server_tls) as server,
        slow_client(server, "/stream", client_tls) as slow,
    ):
        await clock.advance(0.25)
        assert 0 < len(sent) < 50
        waiting_at = len(sent)
        await clock.advance(1)
        assert len(sent) == waiting_at
        for number in range(100):
            assert number_of(await slow.receive()) == number
        assert await slow.closed() == (1000, "")
        assert len(sent) == 100


@pytest.mark.parametrize("how", ["by us", "by the client", "lost"])
async def test_who_awaits_a_send_goes_on_at_once_when_the_connection_ends(how: str) -> None:
    app = App(limits=Limits(high_water=2 * BLOCK))
    raised: list[roomsock.ConnectionClosed] = []

    @app.serve("/stream")
    async def stream(ws: roomsock.WebSocket) -> None:
        try:
            while True:
                await ws.send_bytes(b"x" * BLOCK)
        except roomsock.ConnectionClosed as error:
            raised.append(error)
            raise

    clock = FakeClock()
    async with (
        served(app, clock) as server,
        slow_client(server, "/stream") as slow,
    ):
        await clock.advance(1)
        if how == "by us":
            app.room("/stream").members[0].close(4000, "enough")
        elif how == "by the client":
            await slow.close(4000, "enough")
        else:
            await slow.stream.send_eof()
        assert not raised
        await clock.advance(0.75)  # and not only when the handler is cancelled
        (error,) = raised
        assert error.code == (1006 if how == "lost" else 4000)


@pytest.mark.parametrize("whose", ["app", "room"])
async def test_flushed_paces_a_producer_by_what_the_kernel_takes(whose: str) -> None:
    ends = Ends(limits=Limits(outbox=4 * BLOCK))
    produced: list[int] = []
    clock = FakeClock()

    async def produce() -> None:
        for number in range(60):
            ends.room.send_bytes(numbered(number))
            produced.append(number)
            await (ends.app.flushed() if whose == "app" else ends.room.flushed())

    async with (
        served(ends.app, clock) as server,
        slow_client(server, "/room") as slow,
        anyio.create_task_group() as tg,
    ):
        tg.start_soon(produce)
        await clock.advance(1)
        assert 0 < len(produced) < 40
        for number in range(60):
            assert number_of(await slow.receive()) == number
        assert server.counters.slow_consumers == 0


async def test_a_64_kib_burst_of_tiny_messages_lets_others_have_their_turn() -> None:
    app = App()
    handled = 0

    @app.on_message("/room")
    async def chat(ws: roomsock.WebSocket, text: str) -> None:
        nonlocal handled
        handled += 1
        ws.send_text_to_this_room(text)

    async with (
        serving(app, port=0) as server,
        connected(server, "/room") as client,
        connected(server, "/room") as other,
    ):
        frame = client.frame("x")
        burst = frame * (64 * KIB // len(frame))
        count = len(burst) // len(frame)
        await client.send_raw(burst)
        most, seen = 0, 0
        with anyio.fail_after(PATIENCE):
            while handled < count:
                await checkpoint()
                most, seen = max(most, handled - seen), handled
        # Two turns where the loop takes the tasks in a random order.
        assert most <= 2 * 64
        assert server.counters.slow_consumers == 0
        for each in (client, other):
            await expect_bytes(each, encode_frame(TEXT, b"x") * count)


async def expect_bytes(client: Client, expected: bytes) -> None:
    """Read exactly these bytes, past wsproto, which would take seconds for as many frames."""
    got = bytearray()
    with anyio.fail_after(PATIENCE):
        while len(got) < len(expected):
            got += await client.stream.receive()
    assert got == expected


@pytest.mark.parametrize("listener", [None, narrow_listener], ids=["default", "narrow"])
async def test_a_loop_of_100000_room_sends_closes_no_member_that_reads(listener: Any) -> None:
    ends = Ends()
    options: dict[str, Any] = {"sock": listener()} if listener else {"port": 0}
    async with (
        serving(ends.app, **options) as server,
        connected(server, "/room") as one,
        connected(server, "/room") as two,
    ):
        for number in range(100_000):
            ends.room.send_text(f"{number:06}")
        await checkpoint()
        await checkpoint()
        assert ends.room.send_text("and one more, later") == 2
        frames = [encode_frame(TEXT, b"%06d" % number) for number in range(100_000)]
        expected = b"".join(frames) + encode_frame(TEXT, b"and one more, later")
        async with anyio.create_task_group() as tg:
            tg.start_soon(expect_bytes, one, expected)
            tg.start_soon(expect_bytes, two, expected)
        assert server.counters.slow_consumers == 0


async def test_large_messages_sent_without_an_await_close_no_member_that_reads() -> None:
    ends = Ends(limits=Limits(outbox=BLOCK))
    async with serving(ends.app, port=0) as server, connected(server, "/room") as client:
        payload = b"x" * (3 << 20)
        for _ in range(3):
            assert ends.room.send_bytes(payload) == 1
        await expect_bytes(client, encode_frame(BINARY, payload) * 3)
        assert server.counters.slow_consumers == 0


async def test_a_blocked_client_that_pings_gets_the_newest_pong_alone() -> None:
    ends = Ends()
    clock = FakeClock()
    async with (
        served(ends.app, clock) as server,
        slow_client(server, "/room") as slow,
    ):
        for number in range(30):
            await ends.room.send_bytes(numbered(number))
        for number in range(500):
            await slow.send_event(events.Ping(b"%d" % number))
        await clock.advance(1)
        [driver] = server._drivers
        with anyio.fail_after(PATIENCE):  # all are read before the client begins to
            while encode_frame(PONG, b"499") not in driver.recipient._outbox._frames:
                await checkpoint()
        pongs, blocks = [], 0
        while blocks < 30:
            event = await slow.event()
            if isinstance(event, events.Pong):
                pongs.append(bytes(event.payload))
            else:
                blocks += 1
        # The kernel may have taken one or two of the first ones.
        assert pongs[-1] == b"499"
        assert len(pongs) <= 3
        assert server.counters.slow_consumers == 0


# Time


async def held_up(clock: FakeClock, seconds: float) -> None:
    """Something without an await kept the event loop for so long: time passes, nobody ran."""
    await settled()
    clock._now += seconds - ROUND
    await clock.advance(ROUND)


async def test_an_event_loop_held_up_for_a_minute_closes_nobody() -> None:
    clock = FakeClock()
    ends = Ends(keepalive=(20, 20), limits=Limits(send_timeout=30))
    async with (
        served(ends.app, clock) as server,
        connected(server, "/room") as silent,
        connected(server, "/room") as pinged,
        slow_client(server, "/room") as blocked,
    ):
        await clock.advance(15)
        await pinged.send("I live")
        ends.connections[2].send_bytes(b"x" * (1 << 20))
        await clock.advance(10)
        assert isinstance(await silent.event(), events.Ping)
        async with await open_stream(server) as stream:
            await stream.send(upgrade_request("/room")[:-2])
            await held_up(clock, 60)
            await stream.send(b"\r\n")  # nor is anybody refused who was just coming
            with anyio.fail_after(PATIENCE):
                assert (await stream.receive()).startswith(b"HTTP/1.1 101 ")
            assert len(ends.connections) == 4
        await clock.advance(10)
        assert len(ends.connections) == 3
        await silent.send("here")
        await blocked.send("here")
        await clock.advance(5)
        assert len(ends.connections) == 3


async def test_deadlines_run_on_after_an_event_loop_was_held_up() -> None:
    clock = FakeClock()
    ends = Ends(keepalive=(20, 20))
    async with served(ends.app, clock) as server, connected(server, "/room") as silent:
        await clock.advance(21)
        await held_up(clock, 60)
        await clock.advance(19)
        assert len(ends.connections) == 1
        await clock.advance(2)
        assert not ends.connections
        assert isinstance(await silent.event(), events.Ping)
        assert await silent.closed() == (1011, "keepalive: no answer to a ping")


async def test_a_closing_handshake_is_not_cut_short_by_an_event_loop_held_up() -> None:
    clock = FakeClock()
    ends = Ends()
    async with served(ends.app, clock) as server, connected(server, "/room") as client:
        ends.connections[0].close(1000)
        await held_up(clock, 60)
        assert server.connections == 1
        assert await client.closed() == (1000, "")
        await client.close()
        await client.ended()


async def test_any_byte_is_life_and_a_pong_tells_the_latency() -> None:
    clock = FakeClock()
    ends = Ends(keepalive=(20, 5))
    async with served(ends.app, clock) as server, connected(server, "/room") as client:
        (ws,) = ends.connections
        await clock.advance(20.25)
        ping = await client.event()
        assert isinstance(ping, events.Ping)
        await client.send("not the answer, but life")
        await clock.advance(10)
        assert ends.connections == [ws]
        assert [ws.latency] == [None]
        await client.send_event(ping.response())
        await settled()
        assert ws.latency == 10.25
        await client.send_raw(b"\x81")  # the first byte of a frame
        await clock.advance(19)
        await client.send_raw(b"\x80\0\0\0\0")
        await clock.advance(19)
        assert ends.connections == [ws]


# What else one client may cost


async def test_no_connection_is_in_more_rooms_than_the_limit() -> None:
    ends = Ends(limits=Limits(rooms_per_connection=3))
    async with served(ends.app) as server, connected(server, "/room"):
        (ws,) = ends.connections
        for name in ("one", "two", "two"):
            ws.join(name)
        with pytest.raises(RuntimeError, match=r"3 rooms.*Limits\.rooms_per_connection"):
            ws.join("three")
        assert [room.name for room in ws.rooms] == ["/room", "one", "two"]
        ws.leave("one")
        ws.join("three")
        assert [room.name for room in ws.rooms] == ["/room", "two", "three"]


@pytest.mark.parametrize(
    ("limits", "code", "setting"),
    [
        ({"message": 100}, 1009, "message above 100 bytes (Limits.message)"),
        ({"message_rate": 1.0}, 1008, "more than 1 messages a second (Limits.message_rate)"),
    ],
    ids=["message", "message rate"],
)
async def test_who_passes_a_limit_is_told_which(limits: Any, code: int, setting: str) -> None:
    ends = Ends(limits=Limits(**limits))
    async with served(ends.app) as server, connected(server, "/room") as client:
        if "message" in limits:
            await client.send("x" * 101)
        else:
            for _ in range(11):
                await client.send("x")
        got, reason = await client.closed()
        assert (got, setting in reason) == (code, True), reason
        await client.close()
        await client.ended()
    assert [type(error).__name__ for error in ends.errors] in (
        ["MessageTooBig"],
        ["ConnectionClosedError"],
    )
    assert [reason.code for reason in ends.reasons] == [code]


# Compression


def compressing(unit: Unit, **settings: Any) -> Unit:
    """Have the client agree to compression."""
    takeover = settings.get("context_takeover", False)
    agreement = Agreement("permessage-deflate", 15, 15, takeover, takeover)
    unit.sender.deflater = Deflater(Compression(**settings), agreement)
    return unit


def inflated(data: bytes) -> list[bytes]:
    """The messages of a client without context takeover."""
    found = []
    while data:
        start, length = frame_size(data, 0)
        payload = data[start : start + length]
        if data[0] & 0x40:
            payload = zlib.decompressobj(-15).decompress(payload + b"\x00\x00\xff\xff")
        found.append(payload)
        data = data[start + length :]
    return found


def test_a_message_is_compressed_for_who_agreed_to_it_if_it_is_long_enough() -> None:
    long, short = b"x" * 128, b"x" * 127
    plain, unit = Unit(), compressing(Unit())
    for each in (plain, unit):
        each.sender.send(TEXT, long)
        each.sender.send(TEXT, short)
        each.sender.send(BINARY, long)
        each.ticks.end()
    frames = [encode_frame(TEXT, long), encode_frame(TEXT, short), encode_frame(BINARY, long)]
    assert plain.kernel.taken == b"".join(frames)
    assert len(unit.kernel.taken) < len(encode_frame(TEXT, short)) + 40
    assert inflated(unit.kernel.taken) == [long, short, long]


def test_an_empty_message_is_never_compressed() -> None:
    unit = compressing(Unit(), threshold=1)
    unit.sender.send(TEXT, b"")
    assert unit.kernel.taken == encode_frame(TEXT, b"")


async def test_the_bound_counts_what_leaves_not_what_was_compressed() -> None:
    unit = compressing(Unit(outbox=4 * KIB)).blocked()
    for number in range(5):
        unit.sender.send(TEXT, b"%d" % number * 100 * KIB)
        unit.ticks.end()
    assert unit.owner.told == []
    assert inflated((await unit.drain())[1:]) == [b"%d" % n * 100 * KIB for n in range(5)]
    noise = random.Random(1).randbytes(3 * KIB)
    unit = compressing(Unit(outbox=4 * KIB)).blocked()
    for _ in "12":
        assert unit.owner.told == []
        unit.sender.send(BINARY, noise)
        unit.ticks.end()
    assert unit.owner.told == ["Limits.outbox, Limits.outbox_messages"]


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
async def test_a_compressed_direct_send_is_never_dropped(policy: SlowConsumers) -> None:
    unit = compressing(Unit(policy=policy, outbox_messages=4)).blocked()
    unit.sender.send(TEXT, b"d" * 200)
    unit.ticks.end()
    for number in range(10):
        unit.sender.queue(encode_frame(TEXT, b"%d" % number))
        unit.ticks.end()
    assert len(unit.owner.drops) == 8
    messages = inflated((await unit.drain())[1:])
    assert messages[0] == b"d" * 200
    assert messages[1:] == ([b"0", b"1"] if policy == "drop_newest" else [b"8", b"9"])


def test_with_context_takeover_frames_leave_in_the_order_they_were_compressed() -> None:
    unit = compressing(Unit(), context_takeover=True)
    words = [b"%d: what one says to the others; " % number * 10 for number in range(20)]
    for word in words:
        unit.sender.send(TEXT, word)
    unit.ticks.end()
    data, client, seen = unit.kernel.taken, zlib.decompressobj(-15), []
    while data:
        start, length = frame_size(data, 0)
        assert data[0] == 0xC1
        payload = data[start : start + length]
        seen.append(client.decompress(payload + b"\x00\x00\xff\xff"))
        data = data[start + length :]
    assert seen == words
