"""The error tree, and the close codes that go with it.

Holds every exception a user can meet; imports nothing of roomsock. Close codes: RFC 6455,
section 7.4.1, and the IANA registry it opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Literal, Union

ClosedBy = Literal["client", "server", "lost"]

#: Headers of an answer, as an application may write them.
Headers = Union[Mapping[str, str], Iterable[tuple[str, str]]]


class CloseCode(IntEnum):
    """Close codes of RFC 6455, section 7.4.1, and of the IANA registry."""

    #: The purpose of the connection is fulfilled.
    NORMAL = 1000
    #: The server goes down, or the browser leaves the page.
    GOING_AWAY = 1001
    #: The peer broke the WebSocket protocol.
    PROTOCOL_ERROR = 1002
    #: A kind of data this path does not take (binary where text is expected).
    UNSUPPORTED_DATA = 1003
    #: Never sent: the peer's close frame had no code.
    NO_STATUS = 1005
    #: Never sent: the connection was lost without a close frame.
    ABNORMAL = 1006
    #: A message that is not what its type promises (text that is no UTF-8, JSON that does not fit).
    INVALID_DATA = 1007
    #: The peer broke a rule of the server's own.
    POLICY_VIOLATION = 1008
    #: A message above the limit.
    MESSAGE_TOO_BIG = 1009
    #: The server failed to handle a message.
    INTERNAL_ERROR = 1011
    #: The server restarts; come back.
    SERVICE_RESTART = 1012
    #: The server is overloaded, or the client too slow; come back later.
    TRY_AGAIN_LATER = 1013


class RoomsockError(Exception):
    """Root of every exception that roomsock raises on its own account."""


class SetupError(RoomsockError):
    """Something is wrong with how the app is put together; the text names where."""


class Reject(RoomsockError):
    """Raise it in ``on_connect`` or an HTTP handler to answer with an HTTP status.

    Elsewhere it is a handler's failure like any other: there is no request left to answer.

    Args:
        status: An HTTP status from 300 to 599.
        body: Text or bytes of the answer.
        headers: Added to the answer: ``(name, value)`` pairs, or a mapping.

    Raises:
        ValueError: The status is outside 300-599.
        TypeError: The body is neither text nor bytes, or the headers are no such pairs.
    """

    def __init__(
        self,
        status: int = 403,
        body: str | bytes = "",
        headers: Headers = (),
    ) -> None:
        if not 300 <= status <= 599:
            raise ValueError(f"a rejection has a status from 300 to 599, not {status}")
        if not isinstance(body, str | bytes):
            raise TypeError(f"a rejection's body is str or bytes, not {type(body).__name__}")
        super().__init__(status, body)
        self.status = status
        self.body = body
        self.headers = header_pairs(headers)


def header_pairs(headers: Headers) -> tuple[tuple[str, str], ...]:
    """List headers that an application wrote; here, since a mistake is hard to find later.

    Raises:
        TypeError: They are neither a mapping nor pairs of strings.
    """
    given = () if headers == () else headers.items() if isinstance(headers, Mapping) else headers
    pairs = tuple(given)
    for pair in pairs:
        match pair:
            case (str(), str()):
                pass
            case _:
                raise TypeError(f"headers are a mapping or (name, value) pairs of str: {pair!r}")
    return pairs


class ConnectionClosed(RoomsockError):
    """The connection is closed: nothing more can be sent or received.

    Attributes:
        code: The close code; 1005 when the close frame had none, 1006 when the connection was
            lost without one.
        reason: The close frame's text, or why the server closed.
        closed_by: Who closed first: ``"client"``, ``"server"``, or ``"lost"``.
        connection: The ``id`` of the `WebSocket` that is closed.
    """

    def __init__(
        self,
        code: int,
        reason: str = "",
        closed_by: ClosedBy = "client",
        connection: str | None = None,
    ) -> None:
        self.args = (code, reason, closed_by, connection)
        self.connection = connection
        self.code = code
        self.reason = reason
        self.closed_by: ClosedBy = closed_by

    def __str__(self) -> str:
        who = "connection lost" if self.closed_by == "lost" else f"closed by the {self.closed_by}"
        # Escaped, because the client writes it: no line feed of its may forge a line of a log.
        return f"{who}: {self.code:d}" + (f" ({repr(self.reason)[1:-1]})" if self.reason else "")


class ConnectionClosedOK(ConnectionClosed):
    """A clean end: the client closed with 1000 or 1001, or the server by choice."""


class ConnectionClosedError(ConnectionClosed):
    """An end by failure: lost, protocol violation, too big, too slow, silent."""


class MessageTooBig(ConnectionClosedError):
    """The client's message passed a limit (close code 1009)."""


class SlowConsumer(ConnectionClosedError):
    """The client read too slowly for what was sent to it (close code 1013)."""


class InvalidMessage(RoomsockError):
    """A message that is not JSON, or does not fit the type its handler expects.

    The text says what was wrong and at which field. ``code`` and ``reason`` are what the close
    frame carries if nobody decides otherwise.
    """

    def __init__(self, detail: str, *, reason: str = "invalid message") -> None:
        super().__init__(detail)
        self.code = CloseCode.INVALID_DATA
        self.reason = reason
