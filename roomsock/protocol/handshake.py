"""The HTTP/1.1 request that opens a connection, and the answer to it.

Sans-IO: bytes in, at most one event out, then the bytes of one response; no async, no clock. h11
reads and writes HTTP; what a WebSocket handshake takes is checked here. May import h11, the
standard library, and roomsock's errors, limits and http.

HTTP: RFC 9110 and 9112. The opening handshake: RFC 6455, section 4.2. Origins: RFC 6454.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha1
from http import HTTPStatus
from typing import Literal, TypeVar
from urllib.parse import unquote_to_bytes

import h11

from roomsock.http import Address, Request
from roomsock.limits import Limits

from .deflate import Agreement, Compression, negotiate, parse_offers

# The methods that act on a resource (RFC 9110, section 9.3; RFC 5789), allowed there or not.
_METHODS = {
    name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
}

# What a request line holds besides its target, with room to spare: method, blanks, version.
_LINE_BESIDE_TARGET = 32

# Each chunk of a body takes some 2 us, however small (measured): a megabyte of one-byte chunks
# would cost two seconds. Clients send chunks of 4 to 64 KiB.
_MAX_CHUNKS = 4096
_CHUNK_HEADER = 1024  # bytes: a size, and extensions, which nobody sends

_PHRASES = {status.value: status.phrase for status in HTTPStatus}

# RFC 6455, section 1.3.
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

# What a client of another version is told (RFC 6455, section 4.4); RFC 9110, section 15.5.22,
# wants Upgrade in every 426.
_VERSION_HEADERS = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))

# Bytes of a header, or a path, that may be remembered.
_SHORT = 256

# How every 101 begins.
_UPGRADED = (("Upgrade", "websocket"), ("Connection", "Upgrade"))
_PLAIN_101 = "HTTP/1.1 101 Switching Protocols\r\n" + "".join(
    f"{name}: {value}\r\n" for name, value in _UPGRADED
)

# 16 bytes in base64 are 22 digits and two pads, always (RFC 6455, section 4.1, item 7).
_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2

# In a header h11 lets pass all of them but NUL and the blanks (RFC 9110, section 5.5), and takes
# quadratic time to refuse blanks before a bare CR: with these gone all that is left is linear. CR
# and LF may be there in line ends.
_CONTROL = bytes({*range(0x20), 0x7F} - set(b"\t"))

# The lines of a chunked body (RFC 9112, section 7.1), each to be matched in one way only.
_TEXT = rb"[^\x00-\x08\n-\x1f\x7f]*"
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,20})[ \t]*(?:;%b)?\r\n" % _TEXT)
_CHUNK_END = re.compile(rb"\r\n")
_TRAILER = re.compile(rb"(%b:%b)?\r?\n" % (_TOKEN.pattern, _TEXT))

# The same end of the headers that h11 finds: both must agree where the body begins.
_BLANK_LINE = re.compile(rb"\n\r?\n")

# Headers that say where a message ends or what becomes of the connection: ours alone, or an
# application's slip would let one answer be read as two.
_FRAMING = re.compile(r"connection|content-length|transfer-encoding", re.IGNORECASE)
_FRAMING_101 = re.compile(rf"{_FRAMING.pattern}|upgrade|sec-websocket-.*", re.IGNORECASE)

_UNESCAPED = rb"[a-z0-9._~!$&'()*+,;=-]*"
# The value of Host: uri-host and port (RFC 9110, section 7.2; RFC 3986, section 3.2.2).
_HOST = re.compile(
    rb"(?:\[[0-9a-f:.]+\]|(?=[^:/?])%b(?:%%[0-9a-f]{2}%b)*)(?::[0-9]*)?" % ((_UNESCAPED,) * 2),
    re.IGNORECASE,
)
# Absolute form or origin form (RFC 9112, section 3.2), of visible ASCII; "#" never belongs there.
_TARGET = re.compile(
    rb'(?:https?://(%b)(/[!-"$->@-~]*)?|(/[!-"$->@-~]*))' % _HOST.pattern, re.IGNORECASE
)
_QUERY = re.compile(rb'[!-"$-~]*')
_BAD_ESCAPE = re.compile(rb"%(?:2f|(?![0-9a-f]{2}))", re.IGNORECASE)
_BAD_PATH = re.compile(r"[\x00-\x1f\x7f-\x9f\\]|/\.\.?(?:/|\Z)")

_ORIGIN = re.compile(
    r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._~!$&'()*+,;=%-]+)(?::([0-9]{0,5}))?"
)
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(slots=True)  # to freeze it would take as long as to make four
class UpgradeRequested:
    """A correct WebSocket handshake: answer with ``accept()``, or ``respond()`` to refuse."""

    request: Request
    #: What the client offered, in its order of preference.
    subprotocols: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A complete plain request, its method a known one: answer it with ``respond()``."""

    request: Request


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that is not to be served: answer it with ``respond()``, then close.

    Close even if more is to come: where a refused request ends is nothing to rely on.
    """

    status: int
    #: One line of ASCII without bytes of the peer, fit for the log and for the body.
    reason: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The peer closed before its request was complete: there is nobody to answer."""


_Fields = dict[bytes, bytes]
HandshakeEvent = UpgradeRequested | RequestReceived | Refused | PeerGone
T = TypeVar("T")


class Handshake:
    """One request and one response, before the connection becomes a WebSocket or closes.

    Whatever the peer sends becomes one event, the same for every way of cutting it into pieces.
    What is kept of a request is bounded by ``limits``; what comes behind it is not: read no
    further than you mean to keep.

    Args:
        limits: The limits of header block, header fields, request target and body.
        client: ``(host, port)`` of the peer; None on a unix socket.
        scheme: ``"http"`` or ``"https"``.
        compression: What to agree on if the client offers it; None declines.

    Attributes:
        agreement: What was agreed on about compression, from ``UpgradeRequested`` on.
    """

    __slots__ = (
        "_accept_key", "_body", "_client", "_compression", "_done", "_h11", "_head", "_left",
        "_limits", "_line", "_lines", "_request", "_room", "_scheme", "_subprotocols", "_syntax",
        "_trailing", "agreement",
    )  # fmt: skip

    def __init__(
        self,
        limits: Limits,
        *,
        client: Address | None = None,
        scheme: str = "http",
        compression: Compression | None = None,
    ) -> None:
        self._limits = limits
        self._client = client
        self._scheme = scheme
        self._h11 = h11.Connection(h11.SERVER)
        self._head = bytearray()
        self._request: Request | None = None
        self._body = bytearray()
        self._left = 0  # bytes of the body, or of the chunk, that are to come
        # In a chunked body: the line that comes next, its bytes so far, and how many it may have.
        self._syntax: re.Pattern[bytes] | None = None
        self._line = bytearray()
        self._room = _CHUNK_HEADER
        self._lines = 0  # chunks, then trailers
        self._accept_key = ""
        self._subprotocols: tuple[str, ...] = ()
        self._trailing = bytearray()
        self._done = False
        self._compression = compression
        self.agreement: Agreement | None = None

    @property
    def trailing_data(self) -> bytes:
        """What came behind the request: behind an upgrade, the first WebSocket bytes."""
        return bytes(self._trailing)

    def receive_data(self, data: bytes) -> HandshakeEvent | None:
        """Take bytes from the peer.

        Args:
            data: What was read; ``b""`` when the peer closed.

        Returns:
            The one event, once; None while the request is incomplete, and always after the
            event, when everything goes to ``trailing_data``.
        """
        if self._done:
            self._trailing += data
            return None
        event: HandshakeEvent | None
        try:
            if not data:
                event = PeerGone()
            elif self._request is None:
                event = self._read_head(data)
            else:
                event = self._read_body(data)
        except h11.RemoteProtocolError as error:
            # Where h11 quotes the peer it does so behind this: never in our log.
            reason = str(error).partition(": bytearray(")[0]
            error.__traceback__ = None  # refers to it: a flood would wait for the collector
            event = Refused(error.error_status_hint, f"malformed request: {reason}")
        self._done = event is not None
        return event

    def accept(
        self, subprotocol: str | None = None, headers: Iterable[tuple[str, str]] = ()
    ) -> bytes:
        """Write the 101 that answers ``UpgradeRequested``; WebSocket frames may follow it.

        Args:
            subprotocol: One of those the client offered, or None for none.
            headers: ``(name, value)`` pairs added to the answer.

        Raises:
            ValueError: The subprotocol was not offered, or a header is invalid or not the
                caller's to set. The request can still be answered.
        """
        ours: list[tuple[str, str]] = []
        if subprotocol is not None:
            # RFC 6455, section 4.1: a client must fail on one it did not ask for.
            if subprotocol not in self._subprotocols:
                raise ValueError(
                    f"subprotocol {subprotocol!r} is not among those the client offered: "
                    f"{list(self._subprotocols)}"
                )
            ours.append(("Sec-WebSocket-Protocol", subprotocol))
        if self.agreement is not None:
            ours.append(("Sec-WebSocket-Extensions", self.agreement.header))
        theirs = _foreign_headers(headers, _FRAMING_101)
        if theirs:
            first = [*_UPGRADED, ("Sec-WebSocket-Accept", self._accept_key)]
            return self._write(h11.InformationalResponse, 101, first + ours + theirs)
        # Nothing is left for h11 to check, and these are the bytes that it would write.
        lines = "".join([f"{name}: {value}\r\n" for name, value in ours])
        return f"{_PLAIN_101}Sec-WebSocket-Accept: {self._accept_key}\r\n{lines}\r\n".encode()

    def respond(
        self, status: int, body: bytes = b"", headers: Iterable[tuple[str, str]] = ()
    ) -> bytes:
        """Write a whole HTTP response; close when it is sent.

        It answers any event, whatever state a malformed request left behind.

        Args:
            status: From 200 to 599.
            body: What to send; its length alone is sent in answer to HEAD.
            headers: ``(name, value)`` pairs; without a ``content-type`` a body is text/plain.

        Raises:
            ValueError: A header is invalid or not the caller's to set, or the status is no final
                one. The request can still be answered.
        """
        theirs = _foreign_headers(headers, _FRAMING)
        names = {name.lower() for name, _ in theirs}
        # RFC 9110, section 7.8: Upgrade (a 426 has it) is to be named in Connection.
        ours = [("Connection", "close, upgrade" if "upgrade" in names else "close")]
        if status in (204, 304):  # no content, by definition (RFC 9110, section 8.6)
            body = b""
        else:
            ours.append(("Content-Length", str(len(body))))
        if body and "content-type" not in names:
            ours.append(("Content-Type", "text/plain; charset=utf-8"))
        head = self._write(h11.Response, status, ours + theirs)
        # Not through h11: it does not know the method of a request refused before it was parsed.
        return head if self._head.startswith(b"HEAD ") else head + body

    def _write(
        self,
        kind: type[h11.InformationalResponse | h11.Response],
        status: int,
        headers: list[tuple[str, str]],
    ) -> bytes:
        try:
            # Invalid headers are found as the event is made, before the state changes.
            event = kind(status_code=status, headers=headers, reason=_PHRASES.get(status, ""))
            return self._h11.send(event)
        except h11.LocalProtocolError as error:
            raise ValueError(str(error)) from None

    def _read_head(self, data: bytes) -> HandshakeEvent | None:
        """Collect request line and headers within the limits, and give them to h11 whole.

        So each limit is found at the same byte however the bytes came, and before any parsing.
        """
        limits, head = self._limits, self._head
        searched = len(head)
        head += data
        if head[0] <= 0x20:
            if head == b"\r" or head == b"\r\n":
                return None
            if head.startswith(b"\r\n"):  # one empty line is ignored (RFC 9112, section 2.2)
                del head[:2]
            # TLS on a plain port begins so: refuse it now, not at the deadline.
            if head[0] <= 0x20:
                return Refused(400, "malformed request: this is not HTTP")
        line = limits.request_target + _LINE_BESIDE_TARGET + len(b"\r\n")
        if line <= min(len(head), limits.header_block) and head.find(b"\n", 0, line) < 0:
            return self._target_too_long()
        blank = _BLANK_LINE.search(head, max(0, searched - 2))
        size = blank.end() if blank else len(head)
        if size > limits.header_block:
            return Refused(431, f"headers above Limits.header_block ({limits.header_block} bytes)")
        if blank is None:
            return None
        behind = b""
        if size < len(head):
            behind = bytes(head[size:])
            del head[size:]
        lines = head.count(b"\n")
        if lines - 2 > limits.header_fields:
            return Refused(431, f"headers above Limits.header_fields ({limits.header_fields})")
        # Not by one pattern, whose alternatives would be tried at each byte.
        if len(head.translate(None, _CONTROL)) + lines + head.count(b"\r\n") < size:
            return Refused(400, "malformed request: control character")
        self._h11.receive_data(bytes(head))
        request = self._h11.next_event()
        assert isinstance(request, h11.Request)  # a whole head is a request, or it raises
        return self._take(request, behind)

    def _take(self, request: h11.Request, behind: bytes) -> HandshakeEvent | None:
        """Decide what a request with complete headers is."""
        limits = self._limits
        if request.http_version[:2] != b"1.":
            return Refused(505, "HTTP/1.0 and HTTP/1.1 only")
        if len(request.target) > limits.request_target:
            return self._target_too_long()
        method = _METHODS.get(request.method)  # RFC 9110, section 9.1
        if method is None:
            return Refused(501, "unknown method")
        path = decode_target(request.target)
        if path is None:
            return Refused(400, "malformed request: request target")
        raw = request.headers.raw_items()
        fields = {name.lower(): value for name, value in raw}
        pairs: Iterable[tuple[bytes, bytes]] = fields.items()
        if len(fields) < len(raw):  # what repeats a name is one list with it (RFC 9110, 5.3)
            pairs = [(name.lower(), value) for name, value in raw]
            fields = {}
            for name, value in pairs:
                fields[name] = fields[name] + b"," + value if name in fields else value
        # RFC 9112, section 3.2: it may be empty. h11 lets no second pass, and no HTTP/1.1 without.
        host = fields.get(b"host")
        if host and not _is_host(host):
            return Refused(400, "malformed request: Host")
        if not request.target.startswith(b"/"):  # section 3.2.2: what Host says is ignored
            authority = request.target.split(b"/", 3)[2].partition(b"?")[0]
            pairs = [(name, authority if name == b"host" else value) for name, value in pairs]
        target = request.target.decode()
        ours = Request(
            method,
            path if path == target else target,  # kept for as long as the connection: not twice
            path,
            b"\n".join(map(b":".join, pairs)),
            client=self._client,
            scheme=self._scheme,
        )
        if b"websocket" in _items(fields.get(b"upgrade", b"").lower()):
            self._trailing += behind
            return self._take_upgrade(request, fields, ours)

        # RFC 9112, section 6.1: signs of request smuggling.
        is_chunked = b"transfer-encoding" in fields  # h11 lets no other pass
        if is_chunked and (b"content-length" in fields or request.http_version < b"1.1"):
            return Refused(400, "malformed request: Transfer-Encoding is out of place")
        length = int(fields.get(b"content-length", 0))
        if length > limits.body:
            return self._body_too_big()
        # RFC 9110, section 10.1.1: a client that is refused may send the body without asking.
        if self._h11.they_are_waiting_for_100_continue:
            return Refused(417, "Expect: 100-continue is not supported")
        self._request = ours
        self._left = length
        if is_chunked:
            self._syntax = _CHUNK
        return self._read_body(behind)

    def _take_upgrade(
        self, request: h11.Request, fields: _Fields, ours: Request
    ) -> UpgradeRequested | Refused:
        """Check RFC 6455, section 4.2.1: mature servers answer 101 to half of what fails here."""
        # Item 1.
        if request.method != b"GET" or request.http_version < b"1.1":
            return Refused(400, "malformed handshake: not a GET of HTTP/1.1")
        # A body would be read as frames by one server and as a body by another.
        if b"transfer-encoding" in fields or int(fields.get(b"content-length", 0)):
            return Refused(400, "malformed handshake: it has a body")
        # Item 2: the rest of it is checked for every request.
        if not fields.get(b"host"):
            return Refused(400, "malformed handshake: Host")
        # Item 4; item 3, Upgrade, is how we know that it is a handshake.
        options = _tokens(fields.get(b"connection", b"").lower())
        if options is None or "upgrade" not in options:
            return Refused(400, "malformed handshake: Connection must list upgrade")
        # Item 6, before the key, so that a client of another version learns that first.
        if fields.get(b"sec-websocket-version") != b"13":
            return Refused(426, "Sec-WebSocket-Version must be 13", _VERSION_HEADERS)
        # Item 5.
        key = fields.get(b"sec-websocket-key", b"")
        if not _KEY.fullmatch(key):
            return Refused(400, "malformed handshake: Sec-WebSocket-Key")
        # Item 8: tokens, all different (section 4.1, item 10).
        protocols = fields.get(b"sec-websocket-protocol")
        offered = () if protocols is None else _tokens(protocols)
        if offered is None or len(set(offered)) < len(offered):
            return Refused(400, "malformed handshake: Sec-WebSocket-Protocol")
        # Item 9.
        extensions = fields.get(b"sec-websocket-extensions")
        offers = [] if extensions is None else _offers(extensions)
        if offers is None:
            return Refused(400, "malformed handshake: Sec-WebSocket-Extensions")
        if self._compression is not None:
            self.agreement = negotiate(offers, self._compression)
        digest = sha1(key + _GUID, usedforsecurity=False).digest()
        self._accept_key = b2a_base64(digest, newline=False).decode()
        self._subprotocols = offered
        return UpgradeRequested(ours, offered)

    def _read_body(self, data: bytes) -> HandshakeEvent | None:
        """Count the bytes of a body, or read it in chunks (RFC 9112, section 7.1), each byte once.

        Without h11: its time for blanks in the lines of a chunked body is quadratic.
        """
        assert self._request is not None
        at = 0
        while True:
            part = data[at : at + self._left]
            self._body += part
            self._left -= len(part)
            at += len(part)
            if self._left:
                return None
            if self._syntax is None:
                self._request.body = bytes(self._body)
                self._trailing += data[at:]
                return RequestReceived(self._request)
            room = len(b"\r\n") if self._syntax is _CHUNK_END else self._room
            full = at + room - len(self._line)
            end = data.find(b"\n", at, full) + 1
            self._line += data[at : end or full]
            if not end and len(self._line) < room:
                return None
            if refused := self._take_line(self._line, self._syntax):
                return refused
            self._line.clear()
            at = end

    def _take_line(self, line: bytearray, syntax: re.Pattern[bytes]) -> Refused | None:
        """Judge a line of a chunked body; without a line end it is too long."""
        limits = self._limits
        if syntax is _TRAILER:
            self._room -= len(line)
            self._lines += 1
            if self._room == 0 or self._lines - 1 > limits.header_fields:  # one line is empty
                return Refused(431, "trailers above Limits.header_block or Limits.header_fields")
        match = syntax.fullmatch(line)
        if match is None:
            return Refused(400, "malformed request: chunked body")
        if syntax is _CHUNK_END:
            self._syntax = _CHUNK
        elif syntax is _TRAILER:
            self._syntax = _TRAILER if match[1] else None
        elif (size := int(match[1], 16)) > limits.body - len(self._body):
            return self._body_too_big()
        elif size == 0:
            self._syntax, self._room, self._lines = _TRAILER, limits.header_block, 0
        elif self._lines == _MAX_CHUNKS:
            return Refused(413, f"body in more than {_MAX_CHUNKS} chunks")
        else:
            self._syntax, self._left = _CHUNK_END, size
            self._lines += 1
        return None

    def _body_too_big(self) -> Refused:
        return Refused(413, f"body above Limits.body ({self._limits.body} bytes)")

    def _target_too_long(self) -> Refused:
        limit = self._limits.request_target
        return Refused(414, f"request target above Limits.request_target ({limit} bytes)")


def _remembered(parse: Callable[[bytes], T]) -> Callable[[bytes], T]:
    """Look at what is short only once: clients of a kind all send the same. What is long could be
    anything, and would stay."""
    remember = lru_cache(64)(parse)

    def look_up(value: bytes) -> T:
        return remember(value) if len(value) <= _SHORT else parse(value)

    return look_up


@_remembered
def _items(value: bytes) -> tuple[bytes, ...]:
    """Split a list; empty items do not count (RFC 9110, section 5.6.1)."""
    return tuple([item for part in value.split(b",") if (item := part.strip(b" \t"))])


@_remembered
def _tokens(value: bytes) -> tuple[str, ...] | None:
    """Split a list of tokens; None if there is anything else in it."""
    items = _items(value)
    return tuple(map(bytes.decode, items)) if all(map(_TOKEN.fullmatch, items)) else None


_offers = _remembered(lambda extensions: parse_offers([extensions]))
_is_host = _remembered(_HOST.fullmatch)


def _foreign_headers(
    headers: Iterable[tuple[str, str]], reserved: re.Pattern[str]
) -> list[tuple[str, str]]:
    """List the headers of an application.

    Raises:
        ValueError: One of them is reserved.
    """
    pairs = list(headers)
    for name, _ in pairs:
        if reserved.fullmatch(name):
            raise ValueError(f"the header {name!r} is written by roomsock itself")
    return pairs


def decode_target(target: bytes) -> str | None:
    """Decode the path of a request target; a path is a room's name, so it must have one form.

    Args:
        target: ``/path?query`` or ``http://host/path?query``.

    Returns:
        The decoded path without the query; None when it must get a 400: another form of target,
        or bytes with which several paths would be one room, or one path look like another
        (encoded slashes, backslashes, control characters, dot segments, bad escapes, no UTF-8).
    """
    before, _, query = target.partition(b"?")
    return _decode_path(before) if not query or _QUERY.fullmatch(query) else None


@_remembered
def _decode_path(target: bytes) -> str | None:
    match = _TARGET.fullmatch(target)
    if match is None:
        return None
    raw = match[2] or match[3] or b"/"
    if b"%" in raw:
        if _BAD_ESCAPE.search(raw):
            return None
        raw = unquote_to_bytes(raw)
    try:
        path = raw.decode()
    except UnicodeDecodeError:
        return None
    # Dot segments are looked for after decoding: %2e is one as well.
    return None if _BAD_PATH.search(path) else path


def allowed_origin(request: Request, origins: Sequence[str] | Literal["*"] | None) -> str | None:
    """Say why the page that sent a request may not; against cross-site hijacking (CWE-1385).

    Browsers let any page open a WebSocket to any server, cookies included, and leave it to the
    server to look at Origin (RFC 6455, section 10.2). What is no browser sends none.

    Args:
        request: The request.
        origins: None for the request's own host and port; a list such as
            ``["https://example.org"]`` for these; ``"*"`` for all.

    Returns:
        None if it is allowed, otherwise one line of ASCII for the log.
    """
    sent = request._getall(b"origin:")
    if origins == "*" or not sent:
        return None
    if len(sent) > 1:
        return f"{len(sent)} Origin headers, where a browser sends one"
    origin, host = sent[0], "".join(request._getall(b"host:"))  # there is at most one
    # The Host has no scheme, and behind a proxy that ends TLS ours says nothing: its default port
    # is that of the Origin's own scheme.
    listed = [f"{scheme}://{host}" for scheme in _DEFAULT_PORTS] if origins is None else origins
    parsed = _parse_origin(origin)
    if parsed is not None and parsed in map(_parse_origin, listed):
        return None
    origin, host = origin[:200], host[:200]  # no peer fills the log
    return (
        f"Origin {origin!a} is not allowed at Host {host!a}; "
        f"to accept it: origins={[*(origins or ()), origin]!a}"
    )


def _parse_origin(text: str) -> tuple[str, str, int | None] | None:
    """Split an origin into scheme, host and port, in lower case, the default port filled in."""
    text = text.lower()
    if text == "null":  # an opaque origin (RFC 6454, section 6.2): equal to "null" alone
        return text, "", None
    match = _ORIGIN.fullmatch(text)
    if match is None:
        return None
    scheme, host, port = match.groups()
    return scheme, host, int(port) if port else _DEFAULT_PORTS.get(scheme)
