"""The connection as a handler holds it: receive, send, rooms, close.

No I/O and no event loop in here: the driver gives each `WebSocket` a `Link` and does the waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from functools import lru_cache
from os import urandom
from threading import get_ident
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from .errors import CloseCode, ConnectionClosedOK, Headers, header_pairs
from .http import Request
from .messages import JsonDecoder, encode_json, type_name
from .protocol.frames import BINARY, TEXT, check_close, truncated
from .rooms import (
    NO_WAIT,
    Everyone,
    Pace,
    Queued,
    Recipient,
    Registry,
    Room,
    encode_bytes,
    encode_text,
)

if TYPE_CHECKING:
    from .rooms import Excluded

T = TypeVar("T")

_utf8 = str.encode  # of a str only


class Incoming(Protocol):
    """What a client has sent."""

    @property
    def inbox(self) -> Sized:
        """What has already arrived."""

    def turn(self, first: str | bytes) -> Iterable[str | bytes]:
        """What was received, and what of the inbox is due before it is the turn of others."""

    async def receive(self) -> str | bytes:
        """The next message; raises `ConnectionClosed` behind the last."""


class Link(Protocol):
    """What a connection's driver does for its `WebSocket`."""

    accepted: bool

    @property
    def latency(self) -> float | None:
        """See `WebSocket.latency`."""

    @property
    def recipient(self) -> Recipient:
        """Where rooms send to."""

    def check_open(self) -> None:
        """Raise `ConnectionClosed` when nothing can be sent any more."""

    def send(self, opcode: int, payload: bytes) -> Pace:
        """Queue a message for this client while it is not `recipient` that does: before the
        acceptance. Raises `ConnectionClosed` when it is closed."""

    @property
    def incoming(self) -> Incoming:
        """The messages to be received; raises RuntimeError before the acceptance."""

    def accept(self, subprotocol: str | None, headers: Iterable[tuple[str, str]]) -> None:
        """Queue the 101 and open the connection."""

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake by the server's choice."""

    def fail(self, code: int, reason: str, error: Exception | None) -> None:
        """End the connection by a failure of which the error handler is told."""

    def crash(self, error: BaseException) -> None:
        """End the connection because its handler raised, unless it has ended before."""


class WebSocket:
    """One client's connection.

    Sends are plain functions: the frame is queued, in call order, when they return. Sends to the
    own client raise `ConnectionClosed` once it is closed and may be awaited to pace the sender;
    sends to rooms return how many members they were queued for and never raise because of one.

    Attributes:
        id: A random text, unique among all connections; it may be shown to others.
        path: The decoded URL path, which is the name of the connection's own room.
        params: The path values, by name.
        request: The HTTP request that opened the connection.
        subprotocol: The accepted sub-protocol, if any.
    """

    __slots__ = (
        "__weakref__", "_joined", "_link", "_registry", "_rooms_limit", "_send", "_state", "id",
        "params", "path", "request", "subprotocol",
    )  # fmt: skip

    def __init__(
        self,
        link: Link,
        registry: Registry,
        request: Request,
        params: Mapping[str, Any],
        rooms_limit: int,
    ) -> None:
        self.id = urandom(9).hex()  # not by secrets: five calls for the same
        self.path = request.path
        self.params = params
        self.request = request
        self.subprotocol: str | None = None
        self._link = link
        self._registry = registry
        self._send = link.send  # the recipient's while the connection is open
        self._rooms_limit = rooms_limit
        self._joined: tuple[str, ...] = ()
        self._state: SimpleNamespace | None = None

    @property
    def state(self) -> SimpleNamespace:
        """Attributes of this connection, for the app's use."""
        if self._state is None:
            self._state = SimpleNamespace()
        return self._state

    @property
    def latency(self) -> float | None:
        """Seconds the newest answered keepalive ping took there and back; None before one."""
        return self._link.latency

    # Opening and closing

    def _enter(self) -> None:
        """Join the own room; for the driver, in the step that queues the 101."""
        self._joined = (self.path,)
        recipient = self._link.recipient
        self._send = recipient.send
        self._registry.everyone.enter(self, recipient)
        self._registry.join(self, self.path, recipient)

    def _silence(self) -> None:
        """Be no recipient any more; for the driver, when the connection begins to close."""
        if self in self._registry.everyone:  # it is done at each step of an end
            self._send = self._link.send
            self._registry.silence(self, self._joined)

    def _leave_all(self) -> tuple[str, ...]:
        """Be in no room any more; for the driver, which lets their records go later."""
        self._silence()
        names, self._joined = self._joined, ()
        return names

    def accept(self, subprotocol: str | None = None, headers: Headers = ()) -> None:
        """Accept the connection now, from within ``on_connect``: the 101 is queued and the
        connection joins its room in one step. Without this call it happens when ``on_connect``
        returns.

        Args:
            subprotocol: One of those the client offered (``request.subprotocols``), or None.
            headers: ``(name, value)`` pairs for the 101, or a mapping.

        Raises:
            RuntimeError: Accepted before, or too late, or from another thread.
            TypeError: The headers are no such pairs.
            ValueError: A sub-protocol that was not offered, or an invalid header.
        """
        self._registry.check_thread()
        self._link.accept(subprotocol, header_pairs(headers))
        self.subprotocol = subprotocol

    def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> Pace:
        """Close the connection; what was queued before leaves first. Twice is fine.

        It does not wait for the client's answer: the connection is no member of any room when this
        returns, and receiving raises from now on.

        Args:
            code: 1000-1003, 1007-1014 or 3000-4999.
            reason: At most 123 bytes of UTF-8; the rest is cut.

        Raises:
            ValueError: A code that must not be sent (RFC 6455, section 7.4).
            RuntimeError: Not accepted yet (raise `Reject` instead), or from another thread.
        """
        self._registry.check_thread()
        check_close(code)
        if not isinstance(reason, str):
            raise TypeError(f"the reason is text, not {type(reason).__name__}")
        self._link.close(code, truncated(reason))
        return NO_WAIT

    # Receiving

    async def receive(self) -> str | bytes:
        """The next message: ``str`` for text, ``bytes`` for binary.

        Raises:
            ConnectionClosedOK, ConnectionClosedError: The connection ended; what had arrived
                before was delivered first.
            RuntimeError: Another task is receiving on this connection, or it is not accepted yet.
        """
        return await self._link.incoming.receive()

    async def receive_text(self) -> str:
        """The next message, which must be text; a binary one closes with 1003.

        Raises:
            ConnectionClosedOK, ConnectionClosedError: As `receive`.
        """
        while True:
            message = await self._link.incoming.receive()
            if isinstance(message, str):
                return message
            # Then `receive` raises; behind the client's own close it may have more messages.
            self._link.fail(CloseCode.UNSUPPORTED_DATA, "text expected", None)

    @overload
    async def receive_json(self) -> Any: ...
    @overload
    async def receive_json(self, message_type: type[T]) -> T: ...
    @overload
    async def receive_json(self, message_type: Any) -> Any: ...

    async def receive_json(self, message_type: Any = Any) -> Any:
        """The next message, decoded from JSON (text or UTF-8 binary) and validated.

        Args:
            message_type: A dataclass, TypedDict, msgspec.Struct, union of tagged Structs, …

        Raises:
            InvalidMessage: It is not JSON or does not fit. The connection stays open if it is
                caught; if not, it is closed with 1007.
            ConnectionClosedOK, ConnectionClosedError: As `receive`.
            TypeError: A type that cannot be decoded.
        """
        decoder = _decoder(message_type)
        return decoder.decode(await self._link.incoming.receive())

    def __aiter__(self) -> WebSocket:
        """Messages until a clean close; raises `ConnectionClosedError` after any other end."""
        return self

    async def __anext__(self) -> str | bytes:
        try:
            return await self._link.incoming.receive()
        except ConnectionClosedOK:
            raise StopAsyncIteration from None

    # Sending to the own client

    def send_json(self, value: Any) -> Pace:
        """Send a value as JSON text to this client.

        Raises:
            ConnectionClosed: The connection is closed.
            TypeError, ValueError: The value cannot be encoded; nothing was queued.
        """
        if get_ident() != self._registry.thread:
            self._registry.check_thread()  # or nobody serves
        return self._send(TEXT, encode_json(value))

    def send_text(self, text: str) -> Pace:
        """Send text to this client; raises `ConnectionClosed` when it is closed."""
        if get_ident() != self._registry.thread:
            self._registry.check_thread()
        send = self._send  # to look it up as a method would take longer
        try:
            payload = _utf8(text)
        except TypeError:
            payload = encode_text(text)  # which says what it takes
        return send(TEXT, payload)

    def send_bytes(self, data: bytes) -> Pace:
        """Send a binary message to this client; raises `ConnectionClosed` when it is closed."""
        if get_ident() != self._registry.thread:
            self._registry.check_thread()
        return self._send(BINARY, encode_bytes(data))

    # Sending to rooms

    def send_json_to_this_room(self, value: Any, *, exclude: Excluded = None) -> Queued:
        """Send a value as JSON to every member of this connection's room, itself included."""
        registry = self._registry
        return registry.send(registry.members(self.path), TEXT, encode_json(value), exclude)

    def send_text_to_this_room(self, text: str, *, exclude: Excluded = None) -> Queued:
        """Send text to every member of this connection's room, itself included."""
        registry = self._registry
        return registry.send(registry.members(self.path), TEXT, encode_text(text), exclude)

    def send_bytes_to_this_room(self, data: bytes, *, exclude: Excluded = None) -> Queued:
        """Send bytes to every member of this connection's room, itself included."""
        return Room(self._registry, self.path).send_bytes(data, exclude=exclude)

    def send_json_to_room(self, name: str, value: Any, *, exclude: Excluded = None) -> Queued:
        """Send a value as JSON to every member of the named room."""
        return Room(self._registry, name).send_json(value, exclude=exclude)

    def send_text_to_room(self, name: str, text: str, *, exclude: Excluded = None) -> Queued:
        """Send text to every member of the named room."""
        return Room(self._registry, name).send_text(text, exclude=exclude)

    def send_bytes_to_room(self, name: str, data: bytes, *, exclude: Excluded = None) -> Queued:
        """Send bytes to every member of the named room."""
        return Room(self._registry, name).send_bytes(data, exclude=exclude)

    def send_json_to_all(self, value: Any, *, exclude: Excluded = None) -> Queued:
        """Send a value as JSON to every client of the server."""
        return Everyone(self._registry).send_json(value, exclude=exclude)

    def send_text_to_all(self, text: str, *, exclude: Excluded = None) -> Queued:
        """Send text to every client of the server."""
        return Everyone(self._registry).send_text(text, exclude=exclude)

    def send_bytes_to_all(self, data: bytes, *, exclude: Excluded = None) -> Queued:
        """Send bytes to every client of the server."""
        return Everyone(self._registry).send_bytes(data, exclude=exclude)

    # Rooms

    @property
    def room(self) -> Room:
        """The room named by the URL path."""
        return Room(self._registry, self.path)

    @property
    def rooms(self) -> tuple[Room, ...]:
        """The rooms this connection is in, its own first."""
        return tuple(Room(self._registry, name) for name in self._joined)

    def join(self, name: str) -> Room:
        """Enter another room; entering twice is fine.

        A name that starts with ``/`` can be entered by anybody through its URL: a room that the
        app guards must not start with one.

        Raises:
            ConnectionClosed: The connection is closed.
            RuntimeError: It is not accepted yet, or in as many rooms as the limit allows, or from
                another thread.
            TypeError: The name is no str.
        """
        self._registry.check_thread()
        room = Room(self._registry, name)
        if not self._link.accepted:
            raise RuntimeError("a connection joins rooms after it was accepted: ws.accept()")
        self._link.check_open()
        if name not in self._joined:
            if len(self._joined) >= self._rooms_limit:
                raise RuntimeError(
                    f"this connection is in {self._rooms_limit} rooms already "
                    "(Limits.rooms_per_connection)"
                )
            self._joined += (name,)
            self._registry.join(self, name, self._link.recipient)
        return room

    def leave(self, name: str) -> None:
        """Leave a room joined by `join`; leaving one it is not in does nothing.

        Raises:
            ValueError: The connection's own room, which it leaves by closing.
            RuntimeError: From another thread.
        """
        self._registry.check_thread()
        if name == self.path:
            raise ValueError("a connection is in the room of its path until it closes")
        if name in self._joined:
            self._joined = tuple(joined for joined in self._joined if joined != name)
            self._registry.release(self, (name,))

    def __repr__(self) -> str:
        return f"<WebSocket {self.id} {self.path!r}>"


def _decoder(message_type: Any) -> JsonDecoder:
    try:
        return _kept_decoder(message_type)
    except TypeError:  # unhashable; or it cannot be decoded, which is said again
        return _new_decoder(message_type)


def _new_decoder(message_type: Any) -> JsonDecoder:
    return JsonDecoder(message_type, f"expects {type_name(message_type)}")


# Built once per type, not once per message; types made at run time must not be kept for ever.
_kept_decoder = lru_cache(maxsize=512)(_new_decoder)
