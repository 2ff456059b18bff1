"""The bounded queue: what fits, what is dropped, what is written. Frames are any bytes here."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from roomsock.limits import Limits
from roomsock.protocol.frames import KeptFrame
from roomsock.protocol.outbox import CHUNK, Outbox, SlowConsumers

LIMITS = Limits(outbox=100, outbox_messages=5)


def kept(data: bytes) -> KeptFrame:
    return KeptFrame(data)


def outbox(
    policy: SlowConsumers = "close", *frames: bytes, sent: int = 0, limits: Limits = LIMITS
) -> Outbox:
    """An outbox that holds what the kernel refused in tick 0."""
    box = Outbox(limits, policy)
    box.refused(frames, sent, 0)
    return box


def drained(box: Outbox, step: int = 10**9) -> bytes:
    """Write everything, so many bytes at a time."""
    data = b""
    while chunk := box.next_chunk():
        taken = chunk[:step]
        box.wrote(len(taken))
        data += taken
    assert box.size == 0
    assert len(box) == 0
    return data


# Writing


def test_an_empty_outbox_has_nothing_to_write() -> None:
    box = Outbox(LIMITS, "close")
    assert box.next_chunk() == b""
    assert (box.size, len(box), bool(box)) == (0, 0, False)
    assert box.dropped == 0


@pytest.mark.parametrize(
    ("sent", "count"), [(0, 3), (1, 3), (2, 3), (3, 2), (4, 2), (5, 2), (6, 1), (8, 1), (9, 0)]
)
@pytest.mark.parametrize("step", [1, 2, 4, 100])
def test_what_the_kernel_did_not_take_is_written_in_order(sent: int, count: int, step: int) -> None:
    box = outbox("close", b"abc", b"def", b"ghi", sent=sent)
    assert (box.size, len(box)) == (9 - sent, count)
    assert drained(box, step) == b"abcdefghi"[sent:]


def test_frames_are_joined_up_to_a_chunk() -> None:
    half = bytes(CHUNK // 2)
    box = outbox("close", half, half, b"x", limits=Limits())
    assert box.next_chunk() == half + half
    box.wrote(CHUNK)
    assert box.next_chunk() == b"x"


def test_a_frame_above_the_chunk_is_handed_over_as_it_is() -> None:
    """Not copied: one object is in the outboxes of all members of a room."""
    large = bytes(CHUNK + 1)
    box = outbox("close", large, b"x", limits=Limits())
    assert box.next_chunk() is large
    box.wrote(len(large))
    assert box.next_chunk() == b"x"


def test_a_partly_written_frame_is_not_copied_and_goes_on_where_it_stopped() -> None:
    large = bytes(i % 251 for i in range(3 * CHUNK))
    box = outbox("close", large, b"next", sent=10, limits=Limits())
    assert box._head is large
    for written in (10, 1010):
        chunk = box.next_chunk()
        assert chunk == large[written:]
        assert isinstance(chunk, memoryview)
        assert chunk.obj is large
        box.wrote(1000)
    box = outbox("close", large, b"next", sent=1010, limits=Limits())
    assert box.size == len(large) - 1010 + 4
    assert drained(box) == large[1010:] + b"next"


def test_the_kernel_may_take_nothing() -> None:
    box = outbox("close", b"abc", b"def", sent=1)
    box.wrote(0)
    assert box.next_chunk() == b"bc"
    box.wrote(2)
    box.wrote(0)
    assert drained(box) == b"def"


def test_a_write_may_end_within_any_frame() -> None:
    box = outbox("close", b"abc", b"def", b"ghi")
    assert box.next_chunk() == b"abcdefghi"
    box.wrote(4)
    assert (box.size, len(box), box.next_chunk()) == (5, 2, b"ef")
    box.wrote(2)
    assert (box.size, len(box), box.next_chunk()) == (3, 1, b"ghi")
    box.wrote(3)
    assert not box


def test_clear_forgets_everything() -> None:
    box = outbox("close", b"abc", b"def", sent=1)
    box.clear()
    assert (box.size, len(box), box.next_chunk()) == (0, 0, b"")
    box.refused([b"xyz"], 1, 5)  # and an outbox is as good as new
    assert drained(box) == b"yz"


# The bound


def grows_by_the_bound_and_no_more(box: Outbox, tick: int) -> bool:
    """What a burst left may grow by LIMITS once more, in however many ticks."""
    return (
        box.push(b"a" * 60, tick)
        and not box.push(b"b" * 41, tick)
        and box.push(b"c" * 40, tick + 1)
        and not box.push(b"d", tick + 1)
        and not box.push(b"e", tick + 2)
    )


@pytest.mark.parametrize(
    ("held", "frame", "fits"),
    [
        pytest.param([b"x" * 60], b"y" * 40, True, id="bytes-at-the-bound"),
        pytest.param([b"x" * 60], b"y" * 41, False, id="bytes-one-beyond"),
        pytest.param([b"x"] * 4, b"y", True, id="frames-at-the-bound"),
        pytest.param([b"x"] * 5, b"y", False, id="frames-one-beyond"),
        pytest.param([b"x"], b"y" * 101, False, id="larger-than-the-bound"),
    ],
)
def test_the_bound_of_later_ticks(held: list[bytes], frame: bytes, fits: bool) -> None:
    box = outbox("close", *held)
    assert box.push(frame, 1) == fits
    assert drained(box) == b"".join(held) + (frame if fits else b"")


def test_a_partly_written_frame_counts_with_what_is_left_of_it() -> None:
    box = outbox("close", b"x" * 80, sent=20)
    assert (box.size, len(box)) == (60, 1)
    assert box.push(b"y" * 40, 1)
    assert not box.push(b"z", 2)
    box = outbox("close", *[b"xx"] * 5, sent=1)
    assert not box.push(b"y", 1)


def test_a_burst_within_one_tick_is_not_judged() -> None:
    box = outbox("close", b"x")
    for _ in range(1000):
        assert box.push(b"y" * 50, 0)
    assert (box.size, len(box)) == (50_001, 1001)
    assert grows_by_the_bound_and_no_more(box, 1)


def test_a_burst_of_a_later_tick_is_judged_by_how_it_began() -> None:
    box = outbox("close", b"x" * 50)
    for _ in range(1000):
        assert box.push(b"y" * 50, 1)
    assert grows_by_the_bound_and_no_more(box, 2)


@pytest.mark.parametrize("tick", [0, 1])
def test_an_empty_outbox_takes_any_one_message_and_the_rest_of_its_burst(tick: int) -> None:
    """TLS may hold back the kernel's refusal: blocked, with an empty outbox."""
    box = outbox("close", b"abc", sent=3)
    for _ in range(10):
        assert box.push(b"y" * 500, tick)
    assert grows_by_the_bound_and_no_more(box, 2)


def test_two_messages_above_the_bound_may_come_in_one_tick() -> None:
    box = outbox("close", b"x" * 500, sent=10)
    assert box.push(b"y" * 500, 0)
    assert grows_by_the_bound_and_no_more(box, 1)


def test_a_client_that_reads_what_a_burst_left_may_be_sent_more() -> None:
    box = outbox("close", *[b"x" * 50] * 10)
    assert grows_by_the_bound_and_no_more(box, 1)
    for tick in range(4, 9):
        box.wrote(50)
        assert box.push(b"y" * 50, tick)  # as much as it took
        assert not box.push(b"y", tick)
    assert (box.size, len(box)) == (600, 12)


def test_what_a_burst_left_grows_by_no_more_frames_than_the_bound() -> None:
    box = outbox("close", *[b"x"] * 50)
    for tick in range(1, 6):
        assert box.push(b"y", tick)
    assert not box.push(b"y", 5)
    assert not box.push(b"y", 6)
    assert len(box) == 55


def test_the_allowance_ends_when_the_client_has_caught_up() -> None:
    box = outbox("close", *[b"x" * 50] * 10)
    assert box.push(b"y", 1)
    box.wrote(450)
    assert box.push(b"y" * 10, 2)
    assert (box.size, len(box)) == (61, 3)
    assert box.push(b"y" * 39, 3)
    assert not box.push(b"y", 4)


def test_an_allowance_does_not_outlive_the_outbox_it_was_for() -> None:
    """All of it was drained between two ticks that pushed something."""
    box = outbox("close", *[b"x" * 500] * 10)
    assert box.push(b"y", 1)
    drained(box)
    box.refused([b"x" * 50] * 3, 0, 7)
    assert grows_by_the_bound_and_no_more(box, 8)


# Policies


def test_drop_newest_drops_the_frame_that_comes() -> None:
    box = outbox("drop_newest", *[b"x"] * 5)
    assert box.push(b"y", 1)
    assert box.push(b"y", 1)
    assert (box.dropped, box.size, len(box)) == (2, 5, 5)
    assert drained(box) == b"xxxxx"


def test_drop_newest_does_not_drop_what_must_be_kept_and_gives_it_as_much_room_again() -> None:
    box = outbox("drop_newest", *[b"x"] * 5)
    for _ in range(5):
        assert box.push(kept(b"k"), 1)
    assert not box.push(kept(b"k"), 1)
    assert (box.dropped, box.size, len(box)) == (0, 10, 10)


def test_drop_oldest_drops_what_is_oldest() -> None:
    box = outbox("drop_oldest", b"1", b"2", b"3", b"4", b"5")
    assert box.push(b"6", 1)
    assert box.push(b"7", 1)
    assert (box.dropped, box.size, len(box)) == (2, 5, 5)
    assert drained(box) == b"34567"


def test_drop_oldest_holds_the_bound_through_a_burst_and_over_ticks() -> None:
    box = outbox("drop_oldest", *[b"x"] * 5)
    for tick in range(1, 5):
        for _ in range(100):
            assert box.push(b"y", tick)
            assert len(box) == 5
    assert box.dropped == 400


def test_drop_oldest_drops_as_many_as_the_frame_needs() -> None:
    box = outbox("drop_oldest", b"a" * 30, b"b" * 30, b"c" * 40)
    assert box.push(b"d" * 31, 1)
    assert (box.dropped, box.size, len(box)) == (2, 71, 2)
    assert drained(box) == b"c" * 40 + b"d" * 31


def test_drop_oldest_spares_kept_frames_and_the_partly_written_one() -> None:
    box = outbox("drop_oldest", b"1x", kept(b"2"), b"3", kept(b"4"), b"5", sent=1)
    assert box.push(b"6", 1)
    assert box.push(b"7", 2)
    assert (box.dropped, box.size, len(box)) == (2, 5, 5)
    assert drained(box) == b"x2467"


def test_drop_oldest_drops_room_messages_for_a_frame_that_must_be_kept() -> None:
    box = outbox("drop_oldest", kept(b"1"), b"2", b"3", b"4", b"5")
    assert box.push(kept(b"6"), 1)
    assert box.dropped == 1
    assert drained(box) == b"13456"


def test_drop_oldest_drops_the_newest_when_all_others_must_be_kept() -> None:
    box = outbox("drop_oldest", *map(kept, [b"1", b"2", b"3", b"4", b"5"]))
    assert box.push(b"6", 1)
    assert (box.dropped, box.size, len(box)) == (1, 5, 5)
    assert not box.push(kept(b"7"), 1)  # all must be kept: the client is too slow
    assert drained(box) == b"12345"


def test_drop_oldest_drops_nothing_in_vain() -> None:
    """No room can be made for a frame above the bound, so what waits is not sacrificed."""
    box = outbox("drop_oldest", b"1", b"22", kept(b"3"))
    assert box.push(b"y" * 101, 1)
    assert (box.dropped, box.size, len(box)) == (1, 4, 3)
    assert not box.push(kept(b"y" * 101), 1)
    assert (box.dropped, box.size, len(box)) == (1, 4, 3)
    assert drained(box) == b"1223"


def test_drop_oldest_bounds_what_a_burst_left() -> None:
    box = outbox("drop_oldest", *[b"x"] * 50)
    for tick in range(1, 8):
        assert box.push(b"y", tick)
    assert (box.dropped, box.size, len(box)) == (2, 55, 55)
    box.wrote(53)
    for tick in range(8, 20):
        assert box.push(b"z", tick)
    assert (box.size, len(box)) == (5, 5)


# Control frames


def test_an_urgent_frame_stands_behind_the_partly_written_one() -> None:
    box = outbox("close", b"abc", b"def", sent=1)
    box.put_urgent(b"\x8a\x00")
    assert (box.size, len(box)) == (7, 3)
    assert drained(box) == b"bc\x8a\x00def"


def test_only_the_newest_pong_is_owed() -> None:
    """5.5.3: so a client that pings and never reads costs one pong."""
    box = outbox("close", b"abc", b"\x81\x01x", sent=1)
    for i in range(100):
        box.put_urgent(b"\x8a\x01" + bytes([i]))
    assert (box.size, len(box)) == (8, 3)
    assert drained(box) == b"bc\x8a\x01\x63\x81\x01x"


def test_a_pong_that_is_partly_written_is_not_replaced() -> None:
    box = outbox("close", b"abc")
    box.put_urgent(b"\x8a\x01a")
    box.wrote(1)
    box.put_urgent(b"\x8a\x01b")
    assert drained(box) == b"\x01a\x8a\x01babc"


def test_a_ping_does_not_replace_a_pong() -> None:
    box = outbox("close", b"abc", sent=1)
    box.put_urgent(b"\x8a\x00")
    box.put_urgent(b"\x89\x00")
    assert drained(box) == b"bc\x89\x00\x8a\x00"


def test_an_urgent_frame_may_be_alone() -> None:
    box = outbox("close", b"abc", sent=3)
    box.put_urgent(b"\x8a\x00")
    assert drained(box) == b"\x8a\x00"


def test_urgent_frames_are_beyond_the_bound_and_never_dropped() -> None:
    box = outbox("drop_oldest", *[b"x"] * 5)
    box.put_urgent(b"\x8a\x00")
    assert len(box) == 6
    for tick in range(1, 20):
        assert box.push(b"y", tick)
        assert len(box) <= 11
    assert drained(box) == b"\x8a\x00" + b"y" * 10


# The last frame


@pytest.mark.parametrize(("discard", "data"), [(True, b"bc\x88\x00"), (False, b"bcdefghi\x88\x00")])
def test_the_close_frame_may_wait_for_the_others_or_take_their_place(
    discard: bool, data: bytes
) -> None:
    box = outbox("close", b"abc", b"def", kept(b"ghi"), sent=1)
    box.finish(b"\x88\x00", discard=discard)
    assert (box.size, len(box)) == (len(data), 2 if discard else 4)
    assert drained(box) == data


def test_discarding_counts_what_is_left_of_the_partly_written_frame() -> None:
    box = outbox("close", b"abcdef", b"x", sent=1)
    box.wrote(2)
    box.finish(b"\x88\x00", discard=True)
    assert box.size == 5
    assert drained(box) == b"def\x88\x00"


def test_the_close_frame_is_beyond_any_bound() -> None:
    box = outbox("close", *[b"x"] * 5)
    assert not box.push(b"y", 1)
    box.finish(b"\x88\x00", discard=False)
    assert drained(box) == b"xxxxx\x88\x00"


def test_the_close_frame_is_all_there_is() -> None:
    box = outbox("close", b"abc", sent=3)
    box.finish(b"\x88\x00", discard=True)
    assert drained(box) == b"\x88\x00"


# Any order of everything


class OutboxModel(RuleBasedStateMachine):
    """An outbox beside a list of frames that are written byte by byte."""

    policy: ClassVar[SlowConsumers] = "close"

    @initialize(frames=st.lists(st.integers(1, 40), max_size=4), data=st.data())
    def begin(self, frames: list[int], data: Any) -> None:
        self.box = Outbox(LIMITS, self.policy)
        self.serial = 0
        self.waiting: list[bytes] = []  # whole frames, the first perhaps partly written
        self.started = 0  # bytes of the first that are written
        self.tick = 0
        self.dropped = 0
        self.ceiling = (LIMITS.outbox, LIMITS.outbox_messages)
        self.began_with = (0, 0)
        self.finished = False
        self.take_over([self.new(size) for size in frames], data)

    def new(self, size: int, first: bytes = b"") -> bytes:
        """A frame unlike any before."""
        self.serial += 1
        return first + bytes((self.serial * 7 + i) % 256 for i in range(size))

    def take_over(self, frames: list[bytes], data: Any) -> None:
        sent = data.draw(st.integers(0, sum(map(len, frames))))
        self.box.refused(frames, sent, self.tick)
        self.waiting = list(frames)
        self.started = 0
        self.write_down(sent)
        self.began_with = (0, 0)
        self.ceiling = (LIMITS.outbox, LIMITS.outbox_messages)

    def write_down(self, sent: int) -> None:
        self.started += sent
        while self.waiting and self.started >= len(self.waiting[0]):
            self.started -= len(self.waiting.pop(0))

    @property
    def size(self) -> int:
        return sum(map(len, self.waiting)) - self.started

    @rule()
    def next_tick(self) -> None:
        self.tick += 1

    @rule(size=st.one_of(st.integers(1, 60), st.just(101)), keep=st.booleans())
    def push(self, size: int, keep: bool) -> None:
        if self.finished:
            return
        frame = kept(self.new(size)) if keep else self.new(size)
        held = (self.size, len(self.waiting))
        if self.tick != self.box._tick:
            before, self.began_with = self.began_with, held
            within = held[0] <= LIMITS.outbox and held[1] <= LIMITS.outbox_messages
            if within:
                self.ceiling = (LIMITS.outbox, LIMITS.outbox_messages)
            elif self.ceiling == (LIMITS.outbox, LIMITS.outbox_messages):
                self.ceiling = self.ceiling_after(before, held)
        burst = self.began_with[1] == 0 or (
            self.began_with[0] + size <= LIMITS.outbox
            and self.began_with[1] + 1 <= LIMITS.outbox_messages
        )
        accepted = self.box.push(frame, self.tick)
        if burst or self.fits(self.waiting, frame):
            assert accepted
            self.waiting.append(frame)
        elif self.policy == "drop_oldest" and (left := self.without_oldest(frame)) is not None:
            assert accepted
            self.dropped += len(self.waiting) - len(left)
            self.waiting = [*left, frame]
        elif (
            self.policy == "drop_newest"
            and keep
            and held[0] + size <= 2 * LIMITS.outbox
            and held[1] < 2 * LIMITS.outbox_messages
        ):
            assert accepted
            self.waiting.append(frame)
        elif self.policy == "close" or keep:
            assert not accepted
        else:
            assert accepted
            self.dropped += 1
        if not burst:
            # whatever the policy: beyond the bound nothing grows
            times = 2 if self.policy == "drop_newest" and keep else 1
            assert self.size <= max(held[0], times * LIMITS.outbox, self.ceiling[0])
            assert len(self.waiting) <= max(
                held[1], times * LIMITS.outbox_messages, self.ceiling[1]
            )

    def ceiling_after(self, before: tuple[int, int], held: tuple[int, int]) -> tuple[int, int]:
        """What may stay when the bound was passed: more only behind a burst above all of it."""
        bound = (LIMITS.outbox, LIMITS.outbox_messages)
        if any(now - then > most for now, then, most in zip(held, before, bound, strict=True)):
            return held[0] + bound[0], held[1] + bound[1]
        return max(held[0], bound[0]), max(held[1], bound[1])

    def fits(self, frames: list[bytes], frame: bytes) -> bool:
        total = sum(map(len, frames)) - self.started + len(frame)
        return total <= self.ceiling[0] and len(frames) + 1 <= self.ceiling[1]

    def without_oldest(self, frame: bytes) -> list[bytes] | None:
        """What is left when as few as possible were dropped; None when that is not enough."""
        left = list(self.waiting)
        position = 1 if self.started else 0
        while not self.fits(left, frame):
            if position == len(left):
                return None
            if isinstance(left[position], KeptFrame):
                position += 1
            else:
                del left[position]
        return left

    @rule(share=st.floats(0, 1))
    def write(self, share: float) -> None:
        chunk = self.box.next_chunk()
        joined = b"".join(self.waiting)[self.started :]
        assert joined.startswith(chunk)
        assert bool(chunk) == bool(joined)
        sent = round(len(chunk) * share)
        self.box.wrote(sent)
        self.write_down(sent)

    @rule(data=st.data(), frames=st.lists(st.integers(1, 120), max_size=8))
    def refill(self, data: Any, frames: list[int]) -> None:
        """What an empty outbox is for: the kernel refuses once more."""
        if not self.waiting and not self.finished:
            self.take_over([self.new(size) for size in frames], data)

    @rule(first=st.sampled_from([b"\x89", b"\x8a"]), size=st.integers(0, 10))
    def put_urgent(self, first: bytes, size: int) -> None:
        if self.finished:
            return
        frame = self.new(size, first)
        self.box.put_urgent(frame)
        position = 1 if self.started else 0
        if self.waiting[position:] and self.waiting[position][:1] == first:
            del self.waiting[position]
        self.waiting.insert(position, kept(frame))

    @rule(discard=st.booleans())
    def finish(self, discard: bool) -> None:
        if self.finished:
            return
        self.finished = True
        self.box.finish(b"\x88\x00", discard=discard)
        if discard:
            del self.waiting[1 if self.started else 0 :]
        self.waiting.append(b"\x88\x00")

    @rule()
    def clear(self) -> None:
        if self.finished:
            self.box.clear()
            self.waiting = []
            self.started = 0

    @invariant()
    def the_books_are_right(self) -> None:
        assert self.box.size == self.size
        assert len(self.box) == len(self.waiting)
        assert bool(self.box) == bool(self.waiting)
        assert self.box.dropped == self.dropped

    def teardown(self) -> None:
        if hasattr(self, "box"):
            rest = b"".join(self.waiting)[self.started :]
            assert drained(self.box, 7) == rest


class DropNewestModel(OutboxModel):
    policy = "drop_newest"


class DropOldestModel(OutboxModel):
    policy = "drop_oldest"


for model in (OutboxModel, DropNewestModel, DropOldestModel):
    model.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

TestClose = OutboxModel.TestCase
TestDropNewest = DropNewestModel.TestCase
TestDropOldest = DropOldestModel.TestCase
