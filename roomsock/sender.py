"""The way out of connections: frames are joined per tick and written without waiting.

The first frame that a client gets in a tick is sent at once, so that a lone message pays nothing;
from the second on they wait for the end of the tick and leave in one system call. What a room is
sent then is collected and joined once for its members. Only when the kernel refuses bytes does a
task wait for it, and the outbox grow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import anyio
from anyio.lowlevel import checkpoint

from .limits import Limits
from .protocol.deflate import Deflater
from .protocol.frames import HEADERS, SMALL, KeptFrame, encode_frame
from .protocol.outbox import Outbox, SlowConsumers
from .rooms import NO_WAIT, Pace
from .transport import Transport

if TYPE_CHECKING:
    from .rooms import Members
    from .websocket import WebSocket

logger = logging.getLogger("roomsock")

#: Frames that wait for the tick are written on the spot when they reach this.
JOIN_BYTES = 64 * 1024
JOIN_FRAMES = 256

#: A connection's task lets the others have their turn after so many messages handled, or with the
#: first send that is awaited behind so many: a turn whose messages are all answered ends once.
TURN_MESSAGES = 64

#: The pace of who can send no more.
LET_OTHERS = Pace(checkpoint)

#: A client that got several frames in a tick goes straight to joining for so many ticks.
JOIN_TICKS = 3


class Batch:
    """The frames that wait for the tick: of one sender, or of all members who get the same.

    What is sent to a room is collected and joined once, and a member that gets anything else goes
    on with a copy of its own.

    Attributes:
        sharers: Who shared it in the beginning; empty for a sender's own.
        apart: The members who do not share it: each is queued for by itself.
    """

    __slots__ = ("_data", "apart", "frames", "sharers", "size")

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.sharers: Sequence[Sender] = ()
        self.apart: dict[Sender, None] = {}
        self._data = b""
        self.size = 0

    def append(self, frame: bytes) -> bool:
        """Add a frame; returns whether this is as much as may wait."""
        self.frames.append(frame)
        self._data = b""
        self.size += len(frame)
        return self.size >= JOIN_BYTES or len(self.frames) >= JOIN_FRAMES

    def joined(self) -> bytes:
        """All frames as one."""
        if not self._data:
            self._data = self.frames[0] if len(self.frames) == 1 else b"".join(self.frames)
        return self._data

    def part(self, sender: Sender) -> Batch:
        """Have one who shares it go on with a copy, which is returned."""
        own = sender.batch = Batch()
        own.frames, own.size = self.frames.copy(), self.size
        self.apart[sender] = None
        return own

    def leave(self, sender: Sender) -> None:
        """Nothing more is to be added for this one, which is no member now."""
        if sender.batch is self:
            self.part(sender)
        self.apart.pop(sender, None)


class Flusher:
    """Counts the event loop's ticks while anything is sent, and flushes who has frames waiting.

    Args:
        call_soon: Calls back after the tasks that are ready now had their turn.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self.scheduled = False
        self._extended = False
        self._waiting: list[Sender] = []
        self._shared: list[Members] = []  # whose members share a batch
        self.tick = 0
        #: More messages have arrived than were handled: what they cause is joined from the start.
        #: (A room of 1,000 sent to at once takes longer than a turn; each message would be the
        #: first of its tick, and joining would never begin.)
        self.backlog = False

    def schedule(self) -> None:
        """Have this tick end; cheap when that is arranged already."""
        if not self.scheduled:
            self.scheduled = True
            self._call_soon(self._end_tick)

    def add(self, *senders: Sender) -> None:
        """Senders have frames to flush when the tick ends."""
        self._waiting += senders
        self.schedule()

    def queue_all(self, members: Any, frame: bytes, left_out: Collection[WebSocket]) -> None:
        """Queue a frame for all of `rooms.Members` but some: hot, once for every broadcast."""
        tick = self.tick
        batch = members.batch
        if batch is None and (members.joins_until >= tick or self.backlog):
            batch = self._begin(members)
        # Snapshots: queueing may close a slow member, which takes it out of the room.
        if batch is None:
            members.joins_until = tick
            self.schedule()
            size = len(frame)
            senders = list(members.values())
            if left_out:
                senders = [sender for ws, sender in members.items() if ws not in left_out]
            for sender in senders:
                # The common case of `queue` without its two calls, two fifths of what it costs.
                if sender.batch is None and sender.joins_until < tick and not sender.blocked:
                    sender.joins_until = tick
                    transport = sender.transport
                    try:
                        if (sent := transport.send(frame)) != size or transport.unsent:
                            sender.refused((frame,), sent)
                    except OSError as error:
                        sender.not_sent((frame,), error)
                else:
                    sender.queue(frame)
            return
        spared = {members[ws] for ws in left_out}
        for sender in spared:
            if sender.batch is batch:
                batch.part(sender)
        is_full = batch.append(frame)
        for sender in list(batch.apart):
            if sender not in spared:
                sender.queue(frame)
        if is_full:
            members.batch = None
            self._flush([each for each in batch.sharers if each.batch is batch])

    def _begin(self, members: Any) -> Batch:
        """A batch shared by those members who are to join and have nothing waiting.

        Also when these are none: the room is joined for from now on, so that the next tick begins
        with a batch that all share.
        """
        batch = Batch()
        sharers: list[Sender] = []
        joining = -1 if self.backlog else self.tick
        joins_until = self.tick + 1 + JOIN_TICKS
        for sender in members.values():
            if sender.joins_until >= joining and sender.batch is None and not sender.blocked:
                sender.batch = batch
                sender.joins_until = joins_until
                sharers.append(sender)
            else:
                batch.apart[sender] = None
        batch.sharers = sharers
        self.add(*sharers)
        self._shared.append(members)
        members.batch = batch
        return batch

    def _end_tick(self) -> None:
        if self._waiting and not self._extended:
            # One more pass: what this one has read is handled in the next, and may join them
            # (20 senders in a room of 100: 0.8 to 0.9 of the CPU time).
            self._extended = True
            self._call_soon(self._end_tick)
            return
        self._extended = self.scheduled = self.backlog = False
        waiting, self._waiting = self._waiting, []
        shared, self._shared = self._shared, []
        for members in shared:
            members.batch = None
            members.joins_until = self.tick + 1 + JOIN_TICKS
        self._flush(waiting)
        # Not before: what is queued meanwhile (by a log handler) must not overtake what waits.
        self.tick += 1

    def _flush(self, senders: list[Sender]) -> None:
        joins_until = self.tick + 1 + JOIN_TICKS
        for sender in senders:
            sender.joins_until = joins_until
            try:
                sender.flush()
            except Exception:  # a mistake of ours must not cost the others their frames
                logger.exception("flushing a connection failed")
                sender.abandon()


class SenderOwner(Protocol):
    """What a sender asks of its connection and the server."""

    def too_slow(self, limit: str) -> None:
        """The client does not read what is sent to it, up to this limit: end the connection."""

    def count_drop(self, first: bool) -> None:
        """The slow-consumer policy dropped a message."""

    def start_draining(self) -> None:
        """Have a task run `Sender.drain`."""


class Sender:
    """Queues frames for one client and writes them.

    Attributes:
        batch: What waits for the tick, if anything does.
        blocked: The kernel took no more at the last attempt; a task drains, or all is lost.
        deflater: Compresses messages, if the client agreed to that.
        joins_until: Up to this tick frames are joined instead of sent at once.
        progress: Bytes that the kernel took after it had refused some.
        transport: Where it writes to.
    """

    __slots__ = (
        "_dropped", "_failed", "_finished", "_flusher", "_high_water", "_moved",
        "_outbox", "_owner", "_pace", "_paced", "_plain", "batch", "blocked", "deflater",
        "joins_until", "progress", "transport",
    )  # fmt: skip

    def __init__(
        self,
        owner: SenderOwner,
        transport: Transport,
        flusher: Flusher,
        limits: Limits,
        policy: SlowConsumers,
    ) -> None:
        self._owner: Any = owner  # until it is abandoned
        self.transport = transport
        self._flusher = flusher
        self._high_water = limits.high_water
        self._outbox = Outbox(limits, policy)
        #: Shorter messages are sent with a header only: none where others may be dropped.
        self._plain = SMALL if policy == "close" else 0
        self.progress = 0
        self._dropped = 0
        self._failed = False
        self._finished = False
        self._moved: anyio.Event | None = None
        self._pace = NO_WAIT  # until it is blocked, or the turn of others is due
        self._paced = 0  # sends that were awaited since it is
        self.batch: Batch | None = None
        self.blocked = False
        self.deflater: Deflater | None = None
        self.joins_until = -1

    # Queueing: hot, once for every frame and member

    def queue(self, frame: bytes) -> None:
        """Queue a frame; never waits, never raises. A frame that passes the bound makes the
        policy act."""
        flusher = self._flusher
        batch = self.batch
        if self.blocked:
            self._push(frame)
        elif batch is None and self.joins_until < flusher.tick and not flusher.backlog:
            self.joins_until = flusher.tick
            flusher.schedule()
            self._write(frame)
        else:
            if batch is None:
                flusher.add(self)
                self.joins_until = max(self.joins_until, flusher.tick)  # nothing may overtake it
                batch = self.batch = Batch()
            elif batch.sharers:
                batch = batch.part(self)
            if batch.append(frame) or len(batch.frames) > TURN_MESSAGES:
                self._end_turn(batch)

    def _end_turn(self, batch: Batch) -> None:
        self._pace = Pace(self.pace)
        if batch.size >= JOIN_BYTES or len(batch.frames) >= JOIN_FRAMES:
            self.flush()

    def send(self, opcode: int, payload: bytes) -> Pace:
        """Queue a message for this client alone, which no policy may drop. To await what is
        returned is to wait while the outbox is high, or it is others' turn."""
        length = len(payload)
        deflater = self.deflater
        if length >= self._plain or deflater is not None:
            if deflater is None or length < deflater.threshold:
                self.queue_kept(encode_frame(opcode, payload))
            else:
                self.queue_kept(deflater.encode(opcode, payload, {}))
            return self._pace
        frame = HEADERS[opcode][length] + payload
        # The common cases of `queue`, without the calls, which are a sixth of what a send costs.
        batch = self.batch
        if batch is None:
            flusher = self._flusher
            tick = flusher.tick
            if self.joins_until < tick and not flusher.backlog and not self.blocked:
                self.joins_until = tick
                if not flusher.scheduled:
                    flusher.schedule()
                transport = self.transport
                try:
                    if (sent := transport.send(frame)) != len(frame) or transport.unsent:
                        self.refused((frame,), sent)
                except OSError as error:
                    self.not_sent((frame,), error)
                return self._pace
        elif not batch.sharers:
            frames = batch.frames
            frames.append(frame)  # JOIN_FRAMES of them are not JOIN_BYTES
            if len(frames) > TURN_MESSAGES:
                self._end_turn(batch)
            return self._pace
        self.queue(frame)
        return self._pace

    def queue_kept(self, frame: bytes) -> None:
        """Queue a frame that no policy may drop: a direct send, or a control frame."""
        self.queue(frame if self._plain else KeptFrame(frame))

    def queue_urgent(self, frame: bytes) -> None:
        """Queue a control frame in front of what the kernel refused before."""
        if self.blocked and not self._failed:
            self._outbox.put_urgent(frame)
        else:
            self.queue_kept(frame)

    def finish(self, frame: bytes = b"", *, discard: bool = False) -> None:
        """Queue the close frame as the last one: nothing is taken behind it, and nobody waits for
        the high-water mark any more.

        Args:
            frame: The close frame, if one is due.
            discard: Put it right behind the partly written frame, instead of what waits there.
        """
        self.flush()
        if frame and not self.blocked:
            self._write(frame)
        elif frame and not self._failed:
            self._outbox.finish(frame, discard=discard)
        self._finished = True
        self.notify()

    def flush(self) -> None:
        """Write what waits for the tick."""
        batch, self.batch = self.batch, None
        if batch is not None and batch.frames:  # none: left out of the first
            if batch.sharers:
                batch.apart[self] = None  # of what comes next, too
            self._write(batch.joined(), batch.frames)

    def _write(self, data: bytes, frames: Sequence[bytes] = ()) -> None:
        """Write a frame, or several that were joined."""
        try:
            if (sent := self.transport.send(data)) != len(data) or self.transport.unsent:
                self.refused(frames or (data,), sent)
        except OSError as error:
            self.not_sent(frames or (data,), error)

    def refused(self, frames: Sequence[bytes], sent: int) -> None:
        """The kernel took no more than the first bytes of these."""
        self._outbox.refused(frames, sent, self._flusher.tick)
        self.blocked = True
        self._pace = Pace(self.pace)
        self._owner.start_draining()

    def not_sent(self, frames: Sequence[bytes], error: OSError) -> None:
        """The kernel took nothing of these."""
        if isinstance(error, BlockingIOError):
            self.refused(frames, 0)
        else:
            self.fail(error)

    def _push(self, frame: bytes) -> None:
        if self._failed or self._finished:
            return
        self._flusher.schedule()
        outbox = self._outbox
        if not outbox.push(frame, self._flusher.tick):
            self._owner.too_slow("Limits.outbox, Limits.outbox_messages")
        elif outbox.dropped != self._dropped:
            for _ in range(outbox.dropped - self._dropped):
                self._owner.count_drop(not self._dropped)
                self._dropped += 1

    def fail(self, error: OSError) -> None:
        """Writing is over. What the peer sent before is still to be read, and the end of the
        connection is found there."""
        logger.debug("writing failed: %s", error)
        self.abandon()

    def abandon(self) -> None:
        """Forget what was not written, and take nothing more."""
        self._failed = self.blocked = True
        self._pace = LET_OTHERS  # not one of its own: it refers to nobody any more, and so
        self._owner = None  # is freed without the collector
        self.batch = None
        self._outbox.clear()
        self.notify()

    # Waiting

    async def drain(self) -> None:
        """Write the outbox as the kernel takes it; ends when it is empty or given up."""
        outbox, transport = self._outbox, self.transport
        try:
            while not self._failed:
                unsent = transport.unsent
                await transport.wait_writable()
                # A wake proves nothing: some loops wake the writer together with the reader.
                self.progress += unsent - transport.unsent
                with suppress(BlockingIOError):
                    while not transport.unsent and (chunk := outbox.next_chunk()):
                        sent = transport.send(chunk)
                        outbox.wrote(sent)
                        self.progress += sent
                        if sent < len(chunk):
                            break
                self.notify()
                if not outbox and not transport.unsent:
                    self.blocked = self._failed
                    return
        except OSError as error:
            self.fail(error)

    def notify(self) -> None:
        """Wake who waits for the outbox to move, or for the end."""
        if self._moved is not None:
            self._moved.set()
            self._moved = None

    @property
    def is_high(self) -> bool:
        """Whether who awaits a send has to wait."""
        return self._outbox.size > self._high_water and not (self._failed or self._finished)

    async def wait_low(self) -> None:
        """Let others have their turn, then wait until the outbox is below its high-water mark."""
        self._paced = 0
        await checkpoint()
        if not self.blocked:
            self._pace = NO_WAIT
        while self.is_high:
            await self._wait_moved()

    async def pace(self) -> None:
        """Wait for what a send is to wait for: others' turn, or a high outbox. What the kernel
        refused is no reason yet: a burst below the high-water mark stays one burst."""
        self._paced += 1
        if not self.blocked or self.is_high or self._paced >= TURN_MESSAGES:
            await self.wait_low()

    async def flushed(self) -> None:
        """Wait until the kernel has taken everything queued, or the connection is over."""
        self.flush()
        while self.blocked and not self._failed:
            await self._wait_moved()

    async def _wait_moved(self) -> None:
        if self._moved is None:
            self._moved = anyio.Event()
        await self._moved.wait()
