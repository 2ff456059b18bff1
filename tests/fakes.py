"""What stands in for the driver: a link that keeps what it is given, and a recipient.

For tests of the application's side, which waits through these and knows no event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from roomsock.errors import (
    ConnectionClosed,
    ConnectionClosedError,
    ConnectionClosedOK,
)
from roomsock.http import Request
from roomsock.protocol.deflate import Deflater
from roomsock.protocol.frames import encode_frame
from roomsock.rooms import NO_WAIT, Pace, Recipient, Registry
from roomsock.websocket import WebSocket

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits; one that waits fails the test."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    coroutine.close()
    raise AssertionError("it waits")


class FakeRecipient:
    """Keeps the frames that rooms send to one connection."""

    def __init__(self, link: FakeLink) -> None:
        self.send = link.send
        self.frames: list[bytes] = []
        #: Called with each frame, as a driver may act on it.
        self.on_queue: Callable[[bytes], None] = self.frames.append
        self.flushes = 0
        self.deflater: Deflater | None = None

    def queue(self, frame: bytes) -> None:
        self.on_queue(frame)

    async def flushed(self) -> None:
        self.flushes += 1


class FakeLink:
    """A connection whose client sends what the test lists, and then closes with 1000.

    Args:
        messages: What `receive` yields.
        arrived: What has arrived already, before all of `messages`.
        accepted: Whether the connection is open already.
        end: How the client ends the connection.
    """

    def __init__(
        self,
        messages: Iterable[str | bytes] = (),
        *,
        arrived: Iterable[str | bytes] = (),
        accepted: bool = True,
        end: ConnectionClosed | None = None,
    ) -> None:
        self.messages = deque(messages)
        self.arrived = deque(arrived)
        self.accepted = accepted
        self.latency: float | None = None
        self.client_end = end or ConnectionClosedOK(1000)
        self.end: ConnectionClosed | None = None
        self.ws: WebSocket
        self.frames: list[bytes] = []
        self.is_high = False
        self.waits = 0
        self.answer: tuple[str | None, list[tuple[str, str]]] | None = None
        self.failures: list[tuple[int, str, Exception | None]] = []
        #: What ended the connection because a handler raised it.
        self.crashes: list[BaseException] = []
        self.fake_recipient = FakeRecipient(self)

    @property
    def recipient(self) -> Recipient:
        return self.fake_recipient

    def finish(self, end: ConnectionClosed) -> None:
        """The first to end the connection is right."""
        if self.end is None:
            end.connection = self.ws.id
            self.end = end
            self.ws._silence()
            if end.closed_by == "server":
                self.arrived.clear()
                self.messages.clear()

    def check_open(self) -> None:
        if self.end is not None:
            raise self.end

    def send(self, opcode: int, payload: bytes) -> Pace:
        self.check_open()
        self.frames.append(encode_frame(opcode, payload))
        return Pace(self._drained) if self.is_high else NO_WAIT

    async def _drained(self) -> None:
        self.waits += 1

    @property
    def incoming(self) -> FakeLink:
        return self

    @property
    def inbox(self) -> deque[str | bytes]:
        return self.arrived

    def turn(self, first: str | bytes) -> Iterator[str | bytes]:
        self.arrived.appendleft(first)
        del first
        while self.arrived:
            yield self.arrived.popleft()

    async def receive(self) -> str | bytes:
        if self.arrived:
            return self.arrived.popleft()
        if self.messages:
            return self.messages.popleft()
        self.finish(self.client_end)
        assert self.end is not None
        raise self.end

    def accept(self, subprotocol: str | None, headers: Iterable[tuple[str, str]]) -> None:
        if self.accepted:
            raise RuntimeError("the connection was accepted before")
        self.answer = (subprotocol, list(headers))
        self.accepted = True
        self.ws._enter()

    def close(self, code: int, reason: str) -> None:
        self.finish(ConnectionClosedOK(code, reason, "server"))

    def fail(self, code: int, reason: str, error: Exception | None) -> None:
        self.failures.append((code, reason, error))
        self.finish(ConnectionClosedError(code, reason, "server"))

    def crash(self, error: BaseException) -> None:
        if self.end is None:
            self.crashes.append(error)
        self.finish(ConnectionClosedError(1011, "", "server"))
        self.arrived.clear()
        self.messages.clear()


def websocket(
    link: FakeLink,
    path: str = "/chat/blue",
    *,
    registry: Registry | None = None,
    params: Mapping[str, Any] | None = None,
    rooms_limit: int = 32,
    headers: bytes = b"",
) -> WebSocket:
    """The connection of a link; a member of its room if the link is accepted."""
    request = Request("GET", path, path, headers)
    ws = WebSocket(link, registry or Registry(), request, params or {}, rooms_limit)
    link.ws = ws
    if link.accepted:
        ws._enter()
    return ws
