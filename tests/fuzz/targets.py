"""What must hold for any input: a function for each target, which takes bytes and asserts.

The first bytes of an input choose settings and how it is cut; the rest is what a client sends.
Where there is a second opinion (`model`, zlib, the standard library) the answers must be equal.
"""

from __future__ import annotations

import json as stdlib_json
import zlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from itertools import cycle
from math import inf, isfinite
from typing import Any
from unittest.mock import patch

import h11
import msgspec
from wsproto import events as ws
from wsproto.connection import Connection as WSProtoConnection
from wsproto.connection import ConnectionType
from wsproto.frame_protocol import CloseReason

from roomsock.errors import InvalidMessage
from roomsock.limits import Limits
from roomsock.messages import JsonDecoder, encode_json
from roomsock.protocol import connection as under_test
from roomsock.protocol.connection import Connection
from roomsock.protocol.deflate import (
    NAME,
    Agreement,
    Compression,
    Deflater,
    Inflater,
    negotiate,
    parse_offers,
)
from roomsock.protocol.events import Event, Failed, PeerClosed, PeerLost
from roomsock.protocol.frames import encode_close
from roomsock.protocol.handshake import Handshake, Refused, RequestReceived, UpgradeRequested

from .model import (
    BINARY,
    CLOSE,
    CONT,
    PADDING,
    PING,
    PONG,
    TEXT,
    Closed,
    Meaning,
    Rules,
    Violation,
    by_size,
    byte_by_byte,
    deflated,
    frame,
    meaning,
)

NOW = 1000.0

#: Ways to cut: what one byte of an input chooses from.
SIZES: list[list[int]] = [[1], [2], [3], [5, 1], [7], [1, 30], [13, 4], [100], [6, 2, 40], [64, 1]]

#: What one step of parsing takes at most, so that small inputs take several.
SMALL_STEPS: dict[str, Any] = {
    "STEP_MESSAGES": 3, "STEP_FRAMES": 2, "STEP_INFLATED": 700, "_STEP": range(3)
}  # fmt: skip

AGREEMENTS: list[Agreement | None] = [
    None,
    Agreement(NAME, 15, 15, False, False),
    Agreement(NAME, 15, 15, True, True),
    Agreement(NAME, 9, 9, True, True),
]


class Reader:
    """Takes an input apart; behind its end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def byte(self) -> int:
        self.position += 1
        return self._data[self.position - 1] if self.position <= len(self._data) else 0

    def take(self, count: int) -> bytes:
        self.position += count
        return self._data[self.position - count : self.position]

    def rest(self) -> bytes:
        return self.take(max(0, len(self._data) - self.position))

    @property
    def left(self) -> bool:
        return self.position < len(self._data)


# A connection


def stream_of(reader: Reader) -> bytes:
    """Frames, most of them whole, from three bytes and a payload each: how, first byte, length."""
    data = []
    while reader.left:
        how, first, length = reader.byte(), reader.byte(), reader.byte()
        payload = reader.take(length & 127 if length < 192 else length)
        kind = how & 3
        if kind == 1:  # as it stands: no frame at all
            data.append(payload)
            continue
        if kind == 2:
            payload = deflated(payload * (1 + (how >> 5) ** 3), final=bool(how & 4))
        key = None if how & 0x1C == 0x1C else bytes((how, first, 0, length))
        form = (None, None, None, 7, 16, 64)[how >> 2 & 3 if kind == 3 else 0]
        if form == 7 and len(payload) > 125:
            form = 16
        declared = 1 << (how >> 2) if kind == 3 and how & 0x80 else None
        if declared is not None and (declared > 65535 or form == 7):
            form = None
        data.append(
            frame(first & 15, payload, fin=first >= 128, rsv=first >> 4 & 7, key=key, form=form,
                  length=declared)
        )  # fmt: skip
    return b"".join(data)


def fed(
    conn: Connection, chunks: Iterable[bytes], limits: Limits
) -> tuple[list[Event], list[bytes]]:
    """Feed pieces as a driver does, with an eye on what is kept and on how long a step takes."""
    events: list[Event] = []
    sent: list[bytes] = []
    for chunk in filter(None, chunks):
        step = conn.receive_data(chunk, NOW)
        while True:
            # One run of the fast path may come on top, and the last message may be as any.
            assert len(step) < 2 * under_test.STEP_MESSAGES
            assert conn.inflated < under_test.STEP_INFLATED + limits.message + 600_000
            events += step
            due = conn.data_to_send()
            assert len(due) <= under_test.STEP_FRAMES
            sent += due
            check_kept(conn, limits)
            if not conn.has_more:
                break
            step = conn.receive_more(NOW)
    return events, sent


def check_kept(conn: Connection, limits: Limits) -> None:
    held = 0 if conn._chunks is None else conn._chunks.tell()
    if conn._partial is not None:
        held += sum(map(len, conn._partial._chunks))
    if conn._wsproto is not None and not conn.close_received:
        assert len(conn._wsproto._proto._frame_decoder.buffer) < 14
    assert held <= limits.message
    assert conn.has_more or len(conn._tail) < 131
    if conn._inflater is not None:
        assert len(conn._inflater._history) <= 32768
    assert not conn.close_received or (not conn._tail and not held and not conn.has_more)


def means(events: list[Event], expected: list[Any]) -> bool:
    """Whether the events are what the model says."""
    return len(events) == len(expected) and all(map(_is, events, expected))


def _is(event: Event, expected: Any) -> bool:
    if isinstance(expected, Violation):
        return isinstance(event, Failed) and event.code in expected.codes
    if isinstance(expected, Closed):
        return isinstance(event, PeerClosed) and (event.code, event.reason) == expected
    return type(event) is type(expected) and event == expected


def while_closing(events: list[Any]) -> list[Any]:
    """What of it is told behind our close frame."""
    if events and isinstance(events[-1], Violation):
        return [PeerLost("protocol violation while closing")]
    return [event for event in events if isinstance(event, Closed)]


def is_ambiguous(expected: Meaning) -> bool:
    last = expected.events[-1] if expected.events else None
    return isinstance(last, Violation) and len(last.codes) > 1


def connection(data: bytes) -> None:
    """Any bytes from a client, in any pieces: what the model says, and nothing else."""
    reader = Reader(data)
    settings, cut, closes = reader.byte(), reader.byte(), reader.byte()
    agreement = AGREEMENTS[settings & 3]
    limits = Limits(
        message=(40, 400, 3000, 70_000)[settings >> 2 & 3], fragments=(4, 50)[settings >> 4 & 1]
    )
    stream = reader.rest() if settings & 0x80 else stream_of(reader)
    steps = SMALL_STEPS if settings & 0x20 else {}
    with patch.multiple(under_test, **steps) if steps else nullcontext():
        check_stream(stream, limits, agreement, SIZES[cut % len(SIZES)], closes)


def check_stream(
    stream: bytes, limits: Limits, agreement: Agreement | None, sizes: list[int], closes: int
) -> None:
    """What `connection` asserts, of a stream that was made by other means.

    Args:
        sizes: Of the pieces, again and again.
        closes: How many pieces are fed before our close frame.
    """
    rules = Rules(limits.message, limits.fragments)
    if agreement is not None:
        rules = rules._replace(
            compressed=True, takeover=agreement.client_takeover, bits=agreement.client_bits
        )
    expected = meaning(stream + PADDING, rules)
    pongs = [b"\x8a" + bytes([len(ping)]) + ping for ping in expected.pings]

    def new() -> Connection:
        return Connection(limits, now=NOW, agreement=agreement)

    whole = fed(new(), [stream], limits)
    pieces = list(by_size(stream, cycle(sizes)))
    ways = [pieces, list(byte_by_byte(stream))] if len(stream) < 2000 else [pieces]
    for chunks in ways:
        conn = new()
        events, sent = fed(conn, chunks, limits)
        if not is_ambiguous(expected):
            assert (events, sent) == whole  # to the letter of its reasons
        more = fed(conn, [PADDING], limits)
        events, sent = events + more[0], sent + more[1]
        assert means(events, expected.events), (events, expected.events)
        assert sent == pongs
        check_sent(sent, expected.pings)
        end = [] if conn.close_received else [PeerLost()]
        assert conn.receive_data(b"", NOW) == end
        assert conn.next_deadline() == inf

    conn = new()
    events, sent = fed(conn, pieces[:closes], limits)
    done = len(events)
    assert means(events, expected.events[:done])
    assert conn.close(1000) == encode_close(1000)
    events, sent = fed(conn, [*pieces[closes:], PADDING], limits)
    assert sent == []
    rest = while_closing(expected.events[done:])
    assert means(events, rest), (events, rest)


def check_sent(sent: list[bytes], pings: list[bytes]) -> None:
    """A client that shares no code with us finds nothing but the answers to its pings."""
    client = WSProtoConnection(ConnectionType.CLIENT)
    client.receive_data(b"".join(sent))
    answers = [event.payload for event in client.events() if isinstance(event, ws.Pong)]
    assert answers == pings


# The handshake


def handshake(data: bytes) -> None:
    """Any request: one event, the same for every cut, which can be answered with valid HTTP."""
    reader = Reader(data)
    settings, cut = reader.byte(), reader.byte()
    limits = Limits(
        header_block=(300, 16384)[settings & 1], header_fields=8, request_target=100, body=200
    )
    compression = Compression() if settings & 2 else None
    stream = reader.rest()

    def outcome(chunks: Iterable[bytes]) -> tuple[Any, bytes, Handshake]:
        handshake = Handshake(limits, compression=compression)
        events = []
        for chunk in filter(None, chunks):
            event = handshake.receive_data(chunk)
            if event is not None:
                events.append(event)
            elif not events:
                assert len(handshake._head) <= limits.header_block
            assert len(handshake._body) <= limits.body
        assert len(events) <= 1
        return (events[0] if events else None), handshake.trailing_data, handshake

    whole, trailing, answering = outcome([stream])
    for chunks in (byte_by_byte(stream), by_size(stream, cycle(SIZES[cut % len(SIZES)]))):
        event, behind, _ = outcome(chunks)
        assert type(event) is type(whole)
        if isinstance(event, Refused):
            assert event == whole
        elif event is not None:
            assert (event.request.path, event.request.method, event.request.body) == (
                whole.request.path, whole.request.method, whole.request.body
            )  # fmt: skip
            assert dict(event.request.headers) == dict(whole.request.headers)
            assert behind == trailing
    if whole is not None:
        check_answer(answering, whole)


def check_answer(answering: Handshake, event: Any) -> None:
    upgrade = isinstance(event, UpgradeRequested)
    if upgrade:
        answer = answering.accept()
    elif isinstance(event, Refused):
        assert event.reason.isascii()
        assert event.reason.isprintable()
        answer = answering.respond(event.status, event.reason.encode(), event.headers)
    else:
        assert isinstance(event, RequestReceived)
        answer = answering.respond(200, b"fine")
    client = h11.Connection(h11.CLIENT)
    headers = [("Host", "x"), ("Upgrade", "websocket"), ("Connection", "upgrade")]
    client.send(h11.Request(method="GET", target="/", headers=headers))
    client.send(h11.EndOfMessage())
    if answer[-4:] == b"\r\n\r\n" and not upgrade:  # the answer to HEAD
        return
    client.receive_data(answer)
    response = client.next_event()
    assert isinstance(response, h11.InformationalResponse if upgrade else h11.Response)
    if upgrade:
        offered = dict(response.headers).get(b"sec-websocket-extensions")
        assert (offered is not None) == (answering.agreement is not None)
        return
    while not isinstance(part := client.next_event(), h11.EndOfMessage):
        assert isinstance(part, h11.Data)


# Compression


def deflate(data: bytes) -> None:
    """Offers of any kind, payloads of any kind, and messages there and back."""
    reader = Reader(data)
    kind = reader.byte()
    [_offers, _inflate, _deflate][kind % 3](reader, kind // 3)


def _offers(reader: Reader, kind: int) -> None:
    settings = Compression(context_takeover=bool(kind & 1), window_bits=9 + (kind >> 1) % 7)
    value = reader.rest()
    offers = parse_offers([value])
    if offers is None:
        return
    assert parse_offers(value.split(b",")) == offers
    agreement = negotiate(offers, settings)
    if agreement is None:
        return
    ((name, answered),) = parse_offers([agreement.header.encode()]) or []
    terms = dict(answered)
    assert name == NAME
    assert len(terms) == len(answered)
    assert ("server_no_context_takeover" in terms) == (not agreement.server_takeover)
    assert ("client_no_context_takeover" in terms) == (not agreement.client_takeover)
    assert int(terms.get("client_max_window_bits") or 15) == agreement.client_bits
    assert int(terms.get("server_max_window_bits") or 15) >= agreement.server_bits
    assert any(_answers(terms, dict(offered)) for name, offered in offers if name == NAME)


def _answers(terms: dict[str, str | None], offered: dict[str, str | None]) -> bool:
    """RFC 7692, section 7.1: what an answer may say to this offer."""
    if "server_no_context_takeover" in offered and "server_no_context_takeover" not in terms:
        return False
    most = _BITS.get(offered.get("server_max_window_bits", "15"), 0)
    if int(terms.get("server_max_window_bits") or 15) > most:
        return False
    most = _BITS.get(offered.get("client_max_window_bits") or "15", 0)
    return int(terms.get("client_max_window_bits") or 15) <= most and (
        "client_max_window_bits" in offered or "client_max_window_bits" not in terms
    )


_BITS: dict[str | None, int] = {str(bits): bits for bits in range(8, 16)}


def _inflate(reader: Reader, kind: int) -> None:
    """Whole messages, one after the other, against the model; pieces are what `connection` cuts."""
    agreement = AGREEMENTS[1 + kind % 3]
    assert agreement is not None
    limit = (30, 500, 100_000)[kind // 3 % 3]
    rules = Rules(limit, 1, True, agreement.client_takeover, agreement.client_bits)
    inflater = Inflater(agreement, limit)
    stream = b""
    while reader.left:
        how, length = reader.byte(), reader.byte()
        payload = reader.take(length)
        if how & 2:
            payload = deflated(payload * (1 + how // 8), final=bool(how & 4))
        if len(payload) > 2 * limit + 64:  # a bound of the connection's
            return
        stream += frame(BINARY, payload, rsv=4)
        result = inflater.inflate(payload, is_text=False)
        expected = meaning(stream, rules).events[-1]
        if isinstance(expected, Violation):
            assert result in expected.codes
            return
        assert result == expected
        assert not isinstance(result, CloseReason)
        kept = len(inflater._history)
        assert kept <= (1 << max(9, agreement.client_bits) if agreement.client_takeover else 0)


def _deflate(reader: Reader, kind: int) -> None:
    takeover = bool(kind & 1)
    bits = 9 + (kind >> 1) % 7
    settings = Compression(threshold=1, level=1 + (kind >> 4) % 9)
    deflater = Deflater(settings, Agreement(NAME, bits, bits, takeover, takeover))
    inflater = zlib.decompressobj(-bits)
    while reader.left:
        repeat, length = reader.byte(), reader.byte()
        message = reader.take(1 + length) * (1 + repeat)
        if not message:
            return
        sent = deflater.encode(TEXT, message, {})
        assert len(sent) <= len(message) * 1.01 + 20
        size = {126: 4, 127: 10}.get(sent[1], 2)
        if sent[0] == 0x80 | TEXT:
            assert not takeover
            assert sent[size:] == message
            continue
        assert sent[0] == 0xC0 | TEXT
        if not takeover:
            inflater = zlib.decompressobj(-bits)
        assert inflater.decompress(sent[size:] + b"\x00\x00\xff\xff") == message


# JSON


class Say(msgspec.Struct, tag="say"):
    """One of two messages, with a field of each kind."""

    text: str
    to: list[int] | None = None


class Move(msgspec.Struct, tag="move"):
    """The other."""

    x: float
    y: float


_ANYTHING = JsonDecoder(Any, "/any")
_MESSAGES = JsonDecoder(Say | Move, "/messages expects Say | Move")


def json(data: bytes) -> None:
    """Any bytes: a value, or InvalidMessage with words that fit a log and a close frame."""
    value = _decoded(_ANYTHING, data)
    message = _decoded(_MESSAGES, data)
    with suppress(ValueError, RecursionError):
        _SlowDecoder().decode(data.decode())
    try:
        theirs = stdlib_json.loads(data.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        assert value is InvalidMessage
    else:
        assert value is InvalidMessage or value == theirs
        assert value is not InvalidMessage or not _is_modest(theirs)
    if message is not InvalidMessage:
        assert value is not InvalidMessage
    if value is not InvalidMessage:
        assert _ANYTHING.decode(encode_json(value)) == value


class _SlowDecoder(stdlib_json.JSONDecoder):
    """The one in Python, whose branches the fuzzer sees; it is too kind to be a judge."""

    def __init__(self) -> None:
        super().__init__()
        private: Any = stdlib_json
        self.parse_string = private.decoder.py_scanstring
        self.scan_once = private.scanner.py_make_scanner(self)


def _decoded(decoder: JsonDecoder, data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except InvalidMessage as error:
        assert len(str(error)) < 2000
        assert str(error).isprintable()
        assert len(error.reason.encode()) <= 123
        return InvalidMessage


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _is_modest(value: Any, depth: int = 0) -> bool:
    """Nothing in it that RFC 8259 lets a parser refuse: depth, range, lone surrogates."""
    if depth > 100:
        return False
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, list):
        return all(_is_modest(each, depth + 1) for each in value)
    if isinstance(value, dict):
        return all(_is_modest(each, depth + 1) for pair in value.items() for each in pair)
    if isinstance(value, float):
        return isfinite(value)
    return not isinstance(value, int) or abs(value) < 2**63


TARGETS: dict[str, Callable[[bytes], None]] = {
    "connection": connection,
    "handshake": handshake,
    "deflate": deflate,
    "json": json,
}


# Where to begin


def _record(how: int, first: int, payload: bytes) -> bytes:
    length = len(payload)
    return bytes((how, first, length if length < 128 or length >= 192 else 127)) + payload


def seeds(target: str) -> list[bytes]:
    """A few inputs of each kind, from which others are made."""
    return _SEEDS[target]


_TEXT, _MORE, _COMPRESSED = 0x80 | TEXT, TEXT, 0xC0 | TEXT
_STREAMS = [
    _record(0, _TEXT, b"hello") + _record(0, 0x80 | BINARY, bytes(50)),
    _record(0, _TEXT, b"\xce\xba\xff"),
    _record(0, _MORE, b"\xce") + _record(0, 0x80 | PING, b"1") + _record(0, 0x80 | CONT, b"\xba"),
    _record(0, _MORE, b"") + _record(0, CONT, b"") * 4 + _record(0, 0x80 | CONT, b"x"),
    _record(0, 0x80 | PONG, b"") + _record(0, 0x80 | CLOSE, b"\x03\xe8bye"),
    _record(0, 0x80 | CLOSE, b"\x03\xf6bad gateway"),
    _record(0, 0x80 | CONT, b"x") + _record(0, 0x83, b""),
    _record(0x1C, _TEXT, b"unmasked"),
    _record(1, 0, frame(TEXT, b"raw")[:7]),
    _record(3, _TEXT, b"x" * 20) + _record(0x83, _TEXT, b"declared"),
    _record(2, _COMPRESSED, b"hello") + _record(2, _COMPRESSED, b"hello"),
    _record(6, _COMPRESSED, b"final") + _record(2, 0xC0 | BINARY, b"final"),
    _record(0xE2, _COMPRESSED, b"bomb" * 20),
    _record(2, 0x40 | TEXT, b"first") + _record(0, 0x80 | CONT, b"\x03\x00\x00"),
    _record(0, 0x40 | TEXT, deflated(b"fragments")[:4])
    + _record(0, 0x80 | PING, b"p")
    + _record(0, 0x80 | CONT, deflated(b"fragments")[4:]),
    _record(0, 0xC0 | BINARY, b"\x03\x00" * 20 + b"\x00") + _record(0, 0xC0 | BINARY, b""),
    _record(0, _COMPRESSED, deflated(b"\xce\xba\xff")) + _record(0, 0xC0 | PING, b""),
    _record(0, _COMPRESSED, b"\x00\x02\x00\xfd\xffab\x00"),
    _record(2, 0x40 | TEXT, b"first") + _record(2, _COMPRESSED, b"within"),
]
_UPGRADE = (
    b"GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
_SEEDS: dict[str, list[bytes]] = {
    "connection": [
        bytes((settings, cut % 10, cut % 4)) + stream
        for cut, stream in enumerate(_STREAMS)
        for settings in (0x04, 0x09, 0x36, 0x03)
    ],
    "handshake": [
        bytes((settings, 1)) + request
        for settings in (0, 3)
        for request in (
            _UPGRADE + b"\r\n\x81\x80",
            _UPGRADE + b"Sec-WebSocket-Extensions: permessage-deflate; a=b\r\n\r\n",
            _UPGRADE + b"Sec-WebSocket-Protocol: a, b\r\nOrigin: http://a\r\n\r\n",
            b"GET /a%20b?c=d HTTP/1.0\r\n\r\n",
            b"HEAD http://a/b HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET",
            b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n0\r\n\r\n",
            b"OPTIONS * HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 300 + b"\r\n\r\n",
            b"\x16\x03\x01",
        )
    ],
    "deflate": [
        *(
            bytes((3 * kind,)) + value
            for kind, value in enumerate((
                b"permessage-deflate; client_max_window_bits",
                b"permessage-deflate; server_max_window_bits=8, permessage-deflate",
                b'permessage-deflate; client_max_window_bits="1\\0"; server_no_context_takeover',
                b"x-webkit-deflate-frame, permessage-deflate;client_no_context_takeover , ,",
            ))
        ),
        *(bytes((3 * kind + 1, 2, 5)) + b"hello\x06\x05hello" for kind in range(9)),
        *(bytes((3 * kind + 2, 40, 5)) + b"hello!\x00\x05hello!" for kind in range(0, 30, 5)),
    ],
    "json": [
        b'{"type": "say", "text": "h\\u00e9", "to": [1, -2]}',
        b'{"type": "move", "x": 1e3, "y": -0.5}',
        b'[null, true, false, "\\ud83d\\ude00", {}, [], 12345678901234567890]',
        b'{"a": NaN}',
        b'"\xff"',
        b"[" * 50 + b"]" * 50,
    ],
}  # fmt: skip
