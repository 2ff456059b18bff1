"""The way out of one connection: frames are joined per tick and written without waiting.

The first frame that a client gets in a tick is sent at once, so that a lone message pays nothing;
from the second on they wait for the end of the tick and leave in one system call. Only when the
kernel refuses bytes does a task wait for it, and the outbox grow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import anyio
from anyio.lowlevel import checkpoint

from .limits import Limits
from .protocol.deflate import Deflater
from .protocol.frames import KeptFrame, encode_frame
from .protocol.outbox import Outbox, SlowConsumers
from .transport import Transport

logger = logging.getLogger("roomsock")

#: Frames that wait for the tick are written on the spot when they reach this.
JOIN_BYTES = 64 * 1024
JOIN_FRAMES = 256

#: A client that got several frames in a tick goes straight to joining for so many ticks.
JOIN_TICKS = 3


class Flusher:
    """Counts the event loop's ticks while anything is sent, and flushes who has frames waiting.

    Args:
        call_soon: Calls back after the tasks that are ready now had their turn.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._scheduled = False
        self._extended = False
        self._waiting: list[Sender] = []
        self.tick = 0
        #: More messages have arrived than were handled: what they cause is joined from the start.
        #: (A room of 1,000 sent to at once takes longer than a turn; each message would be the
        #: first of its tick, and joining would never begin.)
        self.backlog = False

    def schedule(self) -> None:
        """Have this tick end; cheap when that is arranged already."""
        if not self._scheduled:
            self._scheduled = True
            self._call_soon(self._end_tick)

    def add(self, sender: Sender) -> None:
        """A sender has frames to flush when the tick ends."""
        self._waiting.append(sender)
        self.schedule()

    def _end_tick(self) -> None:
        if self._waiting and not self._extended:
            # One more pass: what this one has read is handled in the next, and may join them
            # (20 senders in a room of 100: 0.8 to 0.9 of the CPU time).
            self._extended = True
            self._call_soon(self._end_tick)
            return
        self._extended = self._scheduled = self.backlog = False
        waiting, self._waiting = self._waiting, []
        joins_until = self.tick + 1 + JOIN_TICKS
        for sender in waiting:
            sender.joins_until = joins_until
            try:
                sender.flush()
            except Exception:  # a mistake of ours must not cost the others their frames
                logger.exception("flushing a connection failed")
                sender.abandon()
        # Not before: what is queued meanwhile (by a log handler) must not overtake what waits.
        self.tick += 1


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
        blocked: The kernel took no more at the last attempt; a task drains, or all is lost.
        deflater: Compresses messages, if the client agreed to that.
        joins_until: Up to this tick frames are joined instead of sent at once.
    """

    __slots__ = (
        "_dropped", "_failed", "_finished", "_flusher", "_high_water", "_moved", "_outbox",
        "_owner", "_pending", "_pending_size", "_progress", "_transport", "blocked", "deflater",
        "joins_until",
    )  # fmt: skip

    def __init__(
        self,
        owner: SenderOwner,
        transport: Transport,
        flusher: Flusher,
        limits: Limits,
        policy: SlowConsumers,
    ) -> None:
        self._owner = owner
        self._transport = transport
        self._flusher = flusher
        self._high_water = limits.high_water
        self._outbox = Outbox(limits, policy)
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._progress = 0  # bytes that the kernel took after it had refused some
        self._dropped = 0
        self._failed = False
        self._finished = False
        self._moved: anyio.Event | None = None
        self.blocked = False
        self.deflater: Deflater | None = None
        self.joins_until = -1

    # Queueing: hot, once for every frame and member

    def queue(self, frame: bytes) -> None:
        """Queue a frame; never waits, never raises. A frame that passes the bound makes the
        policy act."""
        if self.blocked:
            self._push(frame)
            return
        flusher = self._flusher
        if self.joins_until < flusher.tick and not flusher.backlog:
            self.joins_until = flusher.tick
            flusher.schedule()
            self._write((frame,), frame)
            return
        pending = self._pending
        if not pending:
            flusher.add(self)
            self.joins_until = max(self.joins_until, flusher.tick)  # nothing may overtake it
        pending.append(frame)
        self._pending_size += len(frame)
        if self._pending_size >= JOIN_BYTES or len(pending) >= JOIN_FRAMES:
            self.flush()

    def queue_message(self, opcode: int, payload: bytes) -> None:
        """Queue a message for this client alone."""
        deflater = self.deflater
        if deflater is None or len(payload) < deflater.threshold:
            frame = encode_frame(opcode, payload)
        else:
            frame = deflater.encode(opcode, payload, {})
        # `queue_kept` without the call, which is a tenth of a direct send (30 of 300 ns).
        self.queue(KeptFrame(frame) if self._outbox.drops else frame)

    def queue_kept(self, frame: bytes) -> None:
        """Queue a frame that no policy may drop: a direct send, or a control frame."""
        self.queue(KeptFrame(frame) if self._outbox.drops else frame)

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
            self._write((frame,), frame)
        elif frame and not self._failed:
            self._outbox.finish(frame, discard=discard)
        self._finished = True
        self.notify()

    def flush(self) -> None:
        """Write what waits for the tick."""
        pending = self._pending
        if not pending:
            return
        self._pending = []
        self._pending_size = 0
        self._write(pending, pending[0] if len(pending) == 1 else b"".join(pending))

    def _write(self, frames: list[bytes] | tuple[bytes, ...], data: bytes) -> None:
        transport = self._transport
        try:
            sent = transport.send(data)
        except OSError as error:
            self._fail(error)
            return
        if sent != len(data) or transport.unsent:
            self._outbox.refused(frames, sent, self._flusher.tick)
            self.blocked = True
            self._owner.start_draining()

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

    def _fail(self, error: OSError) -> None:
        """Writing is over. What the peer sent before is still to be read, and the end of the
        connection is found there."""
        logger.debug("writing failed: %s", error)
        self.abandon()
        self.blocked = True

    def abandon(self) -> None:
        """Forget what was not written, and take nothing more."""
        self._failed = True
        self._pending = []
        self._outbox.clear()
        self.notify()

    # Waiting

    async def drain(self) -> None:
        """Write the outbox as the kernel takes it; ends when it is empty or given up."""
        outbox, transport = self._outbox, self._transport
        try:
            while not self._failed:
                unsent = transport.unsent
                await transport.wait_writable()
                # A wake proves nothing: some loops wake the writer together with the reader.
                self._progress += unsent - transport.unsent
                while not transport.unsent and (chunk := outbox.next_chunk()):
                    sent = transport.send(chunk)
                    outbox.wrote(sent)
                    self._progress += sent
                    if sent < len(chunk):
                        break
                self.notify()
                if not outbox and not transport.unsent:
                    self.blocked = self._failed
                    return
        except OSError as error:
            self._fail(error)

    def notify(self) -> None:
        """Wake who waits for the outbox to move, or for the end."""
        if self._moved is not None:
            self._moved.set()
            self._moved = None

    @property
    def progress(self) -> int:
        """Changes whenever the kernel took something."""
        return self._progress

    @property
    def is_high(self) -> bool:
        """Whether who awaits a send has to wait."""
        over = self._failed or self._finished
        return self._outbox.size > self._high_water and not over

    async def wait_low(self) -> None:
        """Let others have their turn, then wait until the outbox is below its high-water mark."""
        await checkpoint()
        while self.is_high:
            await self._wait_moved()

    async def flushed(self) -> None:
        """Wait until the kernel has taken everything queued, or the connection is over."""
        self.flush()
        while self.blocked and not self._failed:
            await self._wait_moved()

    async def _wait_moved(self) -> None:
        if self._moved is None:
            self._moved = anyio.Event()
        await self._moved.wait()
