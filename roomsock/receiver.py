"""The way in of one connection: reads, feeds the sans-IO `Connection`, keeps what arrived.

The connection's own task reads inline, whenever its handler asks for a message and there is none.
Only while a handler is busy for long does a second task read ahead, up to a bound: so pings are
answered and the end is noticed, and nothing is paid for it on every message. Reading has one
owner at any time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator
from time import monotonic
from types import coroutine
from typing import TYPE_CHECKING, Any, Protocol

import anyio
from anyio.lowlevel import checkpoint

from .protocol.connection import Connection
from .protocol.events import Event, Failed, PeerClosed, PeerLost, PongReceived
from .sender import TURN_MESSAGES, Sender
from .transport import READ_SIZE, Transport

if TYPE_CHECKING:
    from .server import Server

logger = logging.getLogger("roomsock")

#: The turn of a connection's task is over after so many seconds, or `TURN_MESSAGES`.
TURN_SECONDS = 0.005

#: What the connection's own task does: it receives, or it waits for input.
RECEIVING, READING = 1, 2

#: Read at once of a frame that is known to be so large.
LARGE_READ_SIZE = 1024 * 1024

_TURN = range(TURN_MESSAGES)


#: The inbox of who never sent anything: an empty deque of its own would cost 0.7 KiB.
_EMPTY: deque[str | bytes] = deque(maxlen=0)


class ReceiverOwner(Protocol):
    """What a receiver asks of its connection."""

    #: Seconds from our newest ping to its pong.
    latency: float | None

    def check_open(self) -> None:
        """Raise `ConnectionClosed` once it is decided how the connection ends."""

    def apply_ending(self) -> None:
        """What the peer did to end the connection takes effect: its messages are handled."""

    def ending_found(self) -> None:
        """The peer ended the connection while the handler is busy."""


class Receiver:
    """Hands out messages one at a time, and reads when there is none.

    Attributes:
        inbox: Messages that nobody has asked for yet.
        ending: What the peer did to end the connection, while what came before is handled.
        ending_at: When that was noticed.
        state: What the connection's own task does: nothing here, `RECEIVING`, or `READING`.
    """

    __slots__ = (
        "_conn", "_fed", "_flusher", "_handed_back", "_has_read", "_helping", "_owner", "_pending",
        "_sender", "_server", "_stopped", "_transport", "_turn", "_turn_ends", "ending",
        "ending_at", "inbox", "state",
    )  # fmt: skip

    def __init__(
        self,
        owner: ReceiverOwner,
        server: Server,
        transport: Transport,
        conn: Connection,
        sender: Sender,
    ) -> None:
        self._owner = owner
        self._server = server
        self._transport = transport
        self._conn = conn
        self._sender = sender
        self._flusher = server.flusher
        self.inbox = _EMPTY
        self._fed = 0  # raw bytes since the connection's own task last read
        self.state = 0
        self._pending = False  # there is something to do before the next read
        self._stopped = False
        self._turn = 0
        self._turn_ends = 0.0
        self._has_read = False  # since the last round of housekeeping
        self._helping = False  # a read-ahead task owns reading
        self._handed_back: anyio.Event | None = None  # set when that task gives it back
        self.ending: PeerClosed | Failed | PeerLost | None = None
        self.ending_at = 0.0

    @property
    def is_read(self) -> bool:
        """Whether somebody takes what the peer sends; if not, its silence proves nothing."""
        return self.state != 0 or self._helping

    # `Incoming`: hot, once for every message

    def take(self) -> str | bytes | None:
        """The next message that has arrived; None also when it is the others' turn."""
        inbox = self.inbox
        turn = self._turn
        # The first of a turn is due, whatever the time.
        if not inbox or (turn and (turn >= TURN_MESSAGES or monotonic() > self._turn_ends)):
            return None
        self._turn = turn + 1
        message = inbox.popleft()
        self._flusher.backlog = True if inbox else self._conn.has_more
        return message

    @coroutine
    def receive(self) -> Generator[Any, Any, str | bytes]:
        """The next message; raises `ConnectionClosed` behind the last."""
        if self.state:
            raise RuntimeError("another task is receiving on this connection")
        message: str | bytes | None
        conn, transport = self._conn, self._transport
        try:
            while True:
                if self._pending:
                    self.state = RECEIVING
                    if (message := self.take()) is not None:
                        return message
                    yield from self._prepare().__await__()
                    continue
                # `read` and `take` again, without these calls for every message
                self._fed = 0
                self._has_read = True
                self.state = READING
                data = transport.read((yield transport.sleep()))
                if data is None:
                    continue
                events: Any = conn.receive_data(data, self._server.now)
                self._fed = len(data) + conn.inflated
                if self._pending or not conn.only_messages:
                    self._begin_turn()
                    self._take_in(events)
                    continue
                message = events.pop(0)
                if events or conn.has_more:
                    self._begin_turn()
                    self._turn = 1
                    self.inbox = deque(events)
                    self._pending = True
                self._flusher.backlog = self._pending
                return message
        finally:
            self.state = 0

    async def _prepare(self) -> None:
        """Do one thing that is due before the next read, if anything is."""
        if self.inbox:
            await checkpoint()
            self._begin_turn()
        elif self._stopped:
            self._owner.check_open()
        elif self.ending is not None:
            self._owner.apply_ending()
        elif self._helping or self._conn.has_more:
            await self.read()
        elif self._conn.missing > READ_SIZE:
            await self._read_large()
        else:
            self._pending = False

    def turn(self, first: str | bytes) -> Iterator[str | bytes]:
        """This message, and those behind it that are due in the same turn. None of them is kept
        while it is handled."""
        # `take` for each of them, without the call
        inbox, conn, flusher, ends = self.inbox, self._conn, self._flusher, self._turn_ends
        inbox.appendleft(first)
        del first
        for _ in _TURN:
            if not inbox:
                return
            if monotonic() > ends:
                break
            flusher.backlog = len(inbox) > 1 or conn.has_more
            yield inbox.popleft()
        self._turn = TURN_MESSAGES

    def _begin_turn(self) -> None:
        self._turn = 0
        self._turn_ends = monotonic() + TURN_SECONDS

    # Reading

    async def read(self) -> None:
        """Wait for input and feed it; returns without any when something else happened."""
        if self._helping:
            await self.take_over()
            return
        self._fed = 0
        self._has_read = True
        if self._conn.has_more:
            await checkpoint()
            self._begin_turn()
            self.feed(None)
            return
        data = await self._transport.receive()
        if data is not None:
            self._begin_turn()
            self.feed(data)

    async def _read_large(self) -> None:
        """Read what is missing of a frame, and nothing behind it, in as few pieces as may be."""
        self.state = READING
        self._transport.read_size = min(self._conn.missing, LARGE_READ_SIZE)
        try:
            await self.read()
        finally:
            self._transport.read_size = READ_SIZE
            self._fed = 0  # it is what was asked for

    async def take_over(self) -> None:
        """Have the task that reads ahead, if there is one, give reading back."""
        if self._helping:
            if self._handed_back is None:
                self._handed_back = anyio.Event()
            self._transport.wake()
            await self._handed_back.wait()

    def stop(self, *, discard: bool) -> None:
        """It is decided how the connection ends: whoever waits for input is woken, what still
        comes is no message any more, and what is in the inbox may be discarded."""
        self._stopped = self._pending = True
        if discard:
            self.inbox.clear()
        if self.is_read:
            self._transport.wake()

    def help_if_busy(self) -> None:
        """Have a task read ahead if the handler was busy for a whole round of housekeeping."""
        if self._has_read:
            self._has_read = False
        elif self._helping:
            pass
        elif self._fed < self._server.app.limits.read_ahead:
            self._helping = self._pending = True
            self._server.spawn(self._read_ahead)
        elif self._transport.is_broken():  # or a client that is gone would stay for ever
            self.lose()

    def lose(self) -> None:
        """The peer is gone, although nothing was read that says so."""
        if self.ending is None:
            self._pending = True
            self.ending = PeerLost()
            self.ending_at = self._server.clock.now()

    async def _read_ahead(self) -> None:
        limit = self._server.app.limits.read_ahead
        try:
            while (
                self._handed_back is None
                and self.ending is None
                and self._fed < limit
                and not self._stopped
            ):
                if self._conn.has_more:
                    await checkpoint()
                    self.feed(None)
                elif (data := await self._transport.receive()) is not None:
                    self.feed(data)
        except OSError as error:
            logger.debug("reading ahead failed: %s", error)
        finally:
            self._helping = False
            if self._handed_back is not None:
                self._handed_back.set()
                self._handed_back = None

    def feed(self, data: bytes | None) -> None:
        """Parse input, or more of what was fed before, because one step did not take it all: what
        is due is sent, messages go to the inbox, the end is noted."""
        conn = self._conn
        if data is None:
            events = conn.receive_more(self._server.now)
            self._fed += conn.inflated
        else:
            events = conn.receive_data(data, self._server.now)
            self._fed += len(data) + conn.inflated
        self._take_in(events)

    def _take_in(self, events: list[Event]) -> None:
        conn = self._conn
        if conn.due is not None:
            for frame in conn.data_to_send():
                self._sender.queue_urgent(frame)
        if self._stopped:
            self._transport.wake()  # perhaps another task waits for what this one has read
            return
        self._pending = True
        for event in events:
            if isinstance(event, (str, bytes)):
                if self.inbox is _EMPTY:
                    self.inbox = deque()
                self.inbox.append(event)
            elif isinstance(event, PongReceived):
                self._owner.latency = self._server.clock.now() - event.sent_at
            else:
                self.ending = event
                # Not `server.now`, which may be old: replies would not get the time that is theirs.
                self.ending_at = self._server.clock.now()
                if self._helping and self._handed_back is None:
                    self._owner.ending_found()
