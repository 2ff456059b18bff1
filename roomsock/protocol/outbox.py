"""The bounded queue of what the kernel refused to take for one client.

Frames that only wait for the end of the tick are not in here; a client that reads has an empty
outbox. Pure bookkeeping: who writes, and when, is the driver's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from ..limits import Limits
from .frames import KeptFrame

SlowConsumers = Literal["close", "drop_newest", "drop_oldest"]

#: What is joined into one write: more does not pay, less costs system calls.
CHUNK = 64 * 1024

#: The frames of who always read: an empty deque for each connection would cost 0.7 KiB.
_NOTHING: deque[bytes] = deque(maxlen=0)


class Outbox:
    """Frames in order, the first of them perhaps partly written.

    The bound is judged against what was already refused when the tick began: a burst of sends
    without an ``await`` between them gives a client no chance to read, so it must not be held
    against it. What it leaves behind may stay until the client has drained it; behind a burst above
    the whole bound it may grow by the bound once more, else the next message would close a client
    that reads.

    Attributes:
        size: Bytes not yet taken by the kernel.
        dropped: Frames that the policy dropped.
    """

    __slots__ = (
        "_allowed", "_burst_from", "_frames", "_head", "_head_sent", "_limits", "_policy",
        "_tick", "dropped", "size",
    )  # fmt: skip

    def __init__(self, limits: Limits, policy: SlowConsumers) -> None:
        self._limits = limits
        self._policy = policy
        # A partly written frame is never dropped, nor copied: it may be everybody's.
        self._head = b""
        self._head_sent = 0
        self._frames = _NOTHING
        self._tick = -1
        # (bytes, frames): what was refused when the tick began, and what may stay at most
        self._burst_from = self._allowed = (0, 0)
        self.size = 0
        self.dropped = 0

    def _own_frames(self) -> deque[bytes]:
        if self._frames is _NOTHING:
            self._frames = deque()
        return self._frames

    def __len__(self) -> int:
        return len(self._frames) + bool(self._head)

    def refused(self, frames: Sequence[bytes], sent: int, tick: int) -> None:
        """Take over frames of which the kernel took the first ``sent`` bytes (outbox empty)."""
        for frame in frames:
            length = len(frame)
            if sent >= length:
                sent -= length
                continue
            self.size += length - sent
            if sent:
                self._head, self._head_sent = frame, sent
                sent = 0
            else:
                self._own_frames().append(frame)
        self._tick = tick
        self._burst_from = (0, 0)
        self._allowed = (self._limits.outbox, self._limits.outbox_messages)

    def push(self, frame: bytes, tick: int) -> bool:
        """Queue a frame behind the others, or drop what the policy says.

        Returns:
            False when the bound is passed and nothing may be dropped: the client is too slow and
            its connection must be closed. The frame is not queued then.
        """
        if tick != self._tick:
            self._begin_tick(tick)
        if not self._fits(frame):
            kept = isinstance(frame, KeptFrame)
            if self._policy == "drop_oldest":
                fits = self._drop_oldest(frame)
            else:
                # Room messages that stay must not use up the room of direct sends under a policy
                # that was to spare the connection: those have as much again.
                size, count = 2 * self._limits.outbox, 2 * self._limits.outbox_messages
                fits = kept and self.size + len(frame) <= size and len(self) < count
            if self._policy == "close" or (kept and not fits):
                return False
            if not fits:
                self.dropped += 1
                return True
        self._own_frames().append(frame)
        self.size += len(frame)
        return True

    def _begin_tick(self, tick: int) -> None:
        self._tick = tick
        size, count = bound = (self._limits.outbox, self._limits.outbox_messages)
        size_before, count_before = self._burst_from
        held_size, held_count = self._burst_from = (self.size, len(self))
        if held_size <= size and held_count <= count:
            self._allowed = bound
        elif self._allowed == bound:
            # Only a tick that queued more than the whole bound by itself was a burst.
            if held_size - size_before > size or held_count - count_before > count:
                self._allowed = (held_size + size, held_count + count)
            else:
                self._allowed = (max(held_size, size), max(held_count, count))

    def _fits(self, frame: bytes) -> bool:
        limits = self._limits
        length = len(frame)
        size, count = self._burst_from
        # An empty outbox takes any one message, so the second of a burst is not judged by its size.
        if not count or (size + length <= limits.outbox and count < limits.outbox_messages):
            return True
        size, count = self._allowed
        return self.size + length <= size and len(self) < count

    def _drop_oldest(self, frame: bytes) -> bool:
        """Make room by dropping whole room messages, oldest first; none if that is not enough."""
        size, count = self._allowed
        excess, surplus = self.size + len(frame) - size, len(self) + 1 - count
        frames = self._frames
        taken: list[bytes] = []
        while frames and (excess > 0 or surplus > 0):
            oldest = frames.popleft()
            taken.append(oldest)
            if not isinstance(oldest, KeptFrame):
                excess -= len(oldest)
                surplus -= 1
        if excess > 0 or surplus > 0:
            frames.extendleft(reversed(taken))
            return False
        kept = [each for each in taken if isinstance(each, KeptFrame)]
        frames.extendleft(reversed(kept))
        self.size -= sum(map(len, taken)) - sum(map(len, kept))
        self.dropped += len(taken) - len(kept)
        return True

    def put_urgent(self, frame: bytes) -> None:
        """Put a control frame behind the partly written frame. Only the newest of a kind is owed
        (RFC 6455, section 5.5.3): a client that pings and never reads costs one pong."""
        if self._frames and self._frames[0][:1] == frame[:1]:
            self.size -= len(self._frames.popleft())
        self._own_frames().appendleft(KeptFrame(frame))
        self.size += len(frame)

    def finish(self, frame: bytes, *, discard: bool) -> None:
        """Queue the close frame beyond any bound; ``discard`` what waits behind the partly
        written frame, or leave it in front."""
        if discard:
            self._frames.clear()
            self.size = len(self._head) - self._head_sent
        self._own_frames().append(frame)
        self.size += len(frame)

    def clear(self) -> None:
        """Forget everything: nothing will be written any more."""
        self._frames.clear()
        self._head = b""
        self._head_sent = 0
        self.size = 0

    def next_chunk(self) -> bytes | memoryview:
        """Bytes to hand to the kernel now; tell `wrote` how many it took. Empty when done."""
        if self._head:
            return memoryview(self._head)[self._head_sent :]
        parts: list[bytes] = []
        size = 0
        for frame in self._frames:
            size += len(frame)
            if parts and size > CHUNK:
                break
            parts.append(frame)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def wrote(self, sent: int) -> None:
        """The kernel took so many bytes of the chunk."""
        self.size -= sent
        if self._head:
            self._head_sent += sent
            if self._head_sent == len(self._head):
                self._head = b""
                self._head_sent = 0
            return
        while sent:
            frame = self._frames.popleft()
            if sent < len(frame):
                self._head, self._head_sent = frame, sent
                return
            sent -= len(frame)
