"""Rooms: who is in which, and one frame for all of them.

Every connection is in the room named by its URL path, and in those it joined. Holds no I/O: a
member is reached through its `Recipient`, which the driver provides.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Iterator
from itertools import repeat
from math import inf
from threading import get_ident
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from .messages import encode_json
from .protocol.deflate import Deflater
from .protocol.frames import BINARY, HEADERS, SMALL, TEXT, encode_frame

if TYPE_CHECKING:
    from .websocket import WebSocket

    #: Who is left out of a send: one connection, several, or nobody.
    Excluded: TypeAlias = WebSocket | Iterable[WebSocket] | None


class Recipient(Protocol):
    """The sending half of a connection, as rooms see it."""

    #: Compresses messages, if the client agreed to that.
    deflater: Deflater | None

    def queue(self, frame: bytes) -> None:
        """Queue a room's frame; never waits, never raises because of the client."""

    def send(self, opcode: int, payload: bytes) -> Pace:
        """Queue a message for this client alone."""

    async def flushed(self) -> None:
        """Wait until the kernel has taken what is queued, or the connection is closed."""


class Members(dict["WebSocket", Recipient]):
    """The open connections of a room, or all of them.

    Attributes:
        batch: What they share until the tick ends; it and `joins_until` are the driver's.
    """

    __slots__ = ("batch", "joins_until")

    def __init__(self) -> None:
        self.batch: Any = None
        self.joins_until = -1

    def enter(self, ws: WebSocket, recipient: Recipient) -> None:
        """Take in a connection."""
        self[ws] = recipient
        if self.batch is not None:
            self.batch.apart[recipient] = None

    def leave(self, ws: WebSocket) -> bool:
        """Let go of a connection; returns whether it was a member."""
        recipient = self.pop(ws, None)
        if self.batch is not None and recipient is not None:
            self.batch.leave(recipient)
        return recipient is not None


class Pace:
    """What a send to one's own client returns: await it to wait while the outbox is high."""

    __slots__ = ("_wait",)

    def __init__(self, wait: Callable[[], Awaitable[None]]) -> None:
        self._wait = wait

    def __await__(self) -> Generator[Any, Any, None]:
        return self._wait().__await__()


class _NoWait(Pace):
    __slots__ = ()

    # A function of Python's would be a tenth of what an awaited send costs.
    __await__: Any = staticmethod(repeat(iter(())).__next__)


#: The pace of who need not wait.
NO_WAIT: Pace = _NoWait(cast(Any, None))


class Queued(int):
    """How many local members a message was queued for.

    May be awaited: a checkpoint that lets what was queued leave. Awaiting it gives the number.
    """

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, int]:
        yield from ()
        return int(self)


def queued_type(checkpoint: Callable[[], Awaitable[None]]) -> type[Queued]:
    """A `Queued` whose await is the event loop's checkpoint."""

    class QueuedOnLoop(Queued):
        __slots__ = ()

        def __await__(self) -> Generator[Any, Any, int]:
            yield from checkpoint().__await__()
            return int(self)

    return QueuedOnLoop


def _not_served(function: Callable[..., object], *args: Any) -> None:
    raise RuntimeError("the app is not being served")


class RoomRecord:
    """What is kept of a room while anybody holds it."""

    __slots__ = ("leaving", "members", "state")

    def __init__(self) -> None:
        self.members = Members()
        # Connections that are no recipients any more, but whose `on_close` has not returned: the
        # room's state lives for them, too.
        self.leaving: set[WebSocket] = set()
        self.state: SimpleNamespace | None = None


class Registry:
    """All rooms and all connections of one app."""

    def __init__(self) -> None:
        self.rooms: dict[str, RoomRecord] = {}
        self.everyone = Members()
        self.aliases: list[Registry] = [self]  # all that share this one's contents
        self.compress_from = inf  # bytes of a message that is worth compressing
        self.reset()

    def reset(self) -> None:
        """Nobody serves the app (any more)."""
        self.thread: int | None = None  # the event loop's, while the app is served
        self.everyone.batch = None
        self.queued: type[Queued] = Queued
        #: Queues a frame for all but some, in fewer steps than one by one.
        self.queue_all: Callable[[Members, bytes, Collection[WebSocket]], None] | None = None
        self.call_soon_threadsafe: Callable[..., None] = _not_served

    def become(self, other: Registry) -> None:
        """Be another registry from now on, so that handles made before stay valid."""
        for alias in self.aliases:  # itself, and what became it before
            other.aliases.append(alias)
            alias.__dict__ = other.__dict__

    def check_thread(self) -> None:
        """Refuse a call from a foreign thread: nothing in here is locked.

        Raises:
            RuntimeError: Not the event loop's thread.
        """
        if self.thread is not None and get_ident() != self.thread:
            raise RuntimeError(
                "roomsock objects belong to the event loop's thread; from another thread use "
                "app.call_soon_threadsafe(function, *args)"
            )

    def join(self, ws: WebSocket, name: str, recipient: Recipient) -> None:
        """Make a connection a member; the room comes into being with its first."""
        record = self.rooms.get(name)
        if record is None:
            record = self.rooms[name] = RoomRecord()
        record.members.enter(ws, recipient)

    def silence(self, ws: WebSocket, names: Iterable[str]) -> None:
        """A closing connection receives nothing more and is not counted."""
        self.everyone.leave(ws)
        for name in names:
            record = self.rooms.get(name)
            if record is not None and record.members.leave(ws):
                record.leaving.add(ws)

    def release(self, ws: WebSocket, names: Iterable[str]) -> None:
        """Let go of the rooms; one that nobody holds is forgotten, its state with it."""
        for name in names:
            record = self.rooms.get(name)
            if record is None:
                continue
            record.members.leave(ws)
            record.leaving.discard(ws)
            if not record.members and not record.leaving:
                del self.rooms[name]

    def members(self, name: str) -> Members:
        """Whom a send to the room reaches."""
        record = self.rooms.get(name)
        return Members() if record is None else record.members

    def send(self, members: Members, opcode: int, payload: bytes, exclude: Excluded) -> Queued:
        """Queue a message for all of them but some; see `Audience`."""
        if get_ident() != self.thread:
            self.check_thread()  # or nobody serves
        left_out: Collection[WebSocket] = ()
        if exclude is not None and members:
            left_out = set(exclude) if isinstance(exclude, Iterable) else {exclude}
            if any(isinstance(each, str) for each in left_out):  # a name or an id excludes nobody
                raise TypeError(f"exclude takes connections, not {exclude!r}")
            left_out = members.keys() & left_out
        if len(left_out) == len(members):
            return self.queued(0)
        size = len(payload)  # a small one without a call
        frame = HEADERS[opcode][size] + payload if size < SMALL else encode_frame(opcode, payload)
        compress = size >= self.compress_from
        if self.queue_all is not None and not compress:
            self.queue_all(members, frame, left_out)
        else:
            shared: dict[int, bytes] = {}
            # A snapshot: queueing may close a slow member, which takes it out of the room.
            for ws, recipient in list(members.items()):
                if ws not in left_out:
                    deflater = recipient.deflater if compress else None
                    recipient.queue(
                        frame if deflater is None else deflater.encode(opcode, payload, shared)
                    )
        return self.queued(len(members) - len(left_out))


class Audience:
    """Several connections that can be sent to at once.

    A send returns at once with the number of members it was queued for, as an ``int`` that may
    be awaited (a checkpoint). It never waits for a member and never raises because of one.
    ``exclude`` leaves out one connection, or several.
    """

    __slots__ = ("_registry",)

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def _recipients(self) -> Members:
        raise NotImplementedError

    @property
    def members(self) -> list[WebSocket]:
        """The open connections, in the order they came: a snapshot."""
        return list(self._recipients())

    def others(self, ws: WebSocket) -> list[WebSocket]:
        """The members but for one: a snapshot."""
        return [member for member in self._recipients() if member is not ws]

    def __len__(self) -> int:
        return len(self._recipients())

    def __bool__(self) -> bool:
        return True  # a handle is a handle, also of an empty room

    def __iter__(self) -> Iterator[WebSocket]:
        return iter(self.members)

    def __contains__(self, ws: object) -> bool:
        return ws in self._recipients()

    def send_json(self, value: Any, *, exclude: Excluded = None) -> Queued:
        """Send a value as JSON text to every member.

        Raises:
            TypeError, ValueError: The value cannot be encoded; nothing was queued.
            RuntimeError: Called from another thread than the event loop's.
        """
        return self._registry.send(self._recipients(), TEXT, encode_json(value), exclude)

    def send_text(self, text: str, *, exclude: Excluded = None) -> Queued:
        """Send text to every member.

        Raises:
            TypeError, ValueError: The text is no ``str``, or not encodable as UTF-8.
            RuntimeError: Called from another thread than the event loop's.
        """
        return self._registry.send(self._recipients(), TEXT, encode_text(text), exclude)

    def send_bytes(self, data: bytes, *, exclude: Excluded = None) -> Queued:
        """Send a binary message to every member.

        Raises:
            TypeError: The data is no bytes-like object.
            RuntimeError: Called from another thread than the event loop's.
        """
        return self._registry.send(self._recipients(), BINARY, encode_bytes(data), exclude)

    async def flushed(self) -> None:
        """Let others have their turn, then wait until the kernel has taken what was queued for the
        members of that moment.

        A producer awaits it to pace itself. A member that does not read is waited for until the
        slow-consumer policy or the send timeout ends it.

        Raises:
            RuntimeError: Called from another thread than the event loop's.
        """
        self._registry.check_thread()
        # A producer that nobody keeps waiting must not keep the event loop to itself.
        await self._registry.queued()
        for recipient in list(self._recipients().values()):
            await recipient.flushed()


class Room(Audience):
    """A room's name, and what can be done with it.

    The handle looks the members up at each use, so it is never stale and may be kept; equal names
    are equal rooms. Sending to an unknown or empty room does nothing and returns 0.
    """

    __slots__ = ("name",)

    def __init__(self, registry: Registry, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"a room's name is a str, not {type(name).__name__}")
        self._registry = registry
        self.name = name

    def _recipients(self) -> Members:
        return self._registry.members(self.name)

    @property
    def state(self) -> SimpleNamespace:
        """Attributes of the room, for the app's use.

        They live from the first join until the last member's ``on_close`` has returned; before
        and after, what is set on them is forgotten.
        """
        record = self._registry.rooms.get(self.name)
        if record is None:
            return SimpleNamespace()
        if record.state is None:
            record.state = SimpleNamespace()
        return record.state

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Room):
            return NotImplemented
        # Not the registries themselves: two of them share their rooms after `App.include`.
        return self.name == other.name and self._registry.rooms is other._registry.rooms

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<Room {self.name!r}, {len(self)} members>"


class Everyone(Audience):
    """Every open connection of the server."""

    __slots__ = ()

    def _recipients(self) -> Members:
        return self._registry.everyone

    def __repr__(self) -> str:
        return f"<everyone, {len(self)} connections>"


def encode_text(text: str) -> bytes:
    """Text as UTF-8; a wrong type is the caller's mistake and told at once."""
    if not isinstance(text, str):
        raise TypeError(f"send_text takes str, not {type(text).__name__}")
    return str.encode(text)


def encode_bytes(data: bytes) -> bytes:
    """A bytes-like object as bytes."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"send_bytes takes bytes, not {type(data).__name__}")
    return bytes(data)
