"""The opening handshake: tables of requests, fed whole and byte by byte, and any bytes at all."""

from __future__ import annotations

import gc
import re
import tracemalloc
import unicodedata
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from hashlib import sha1
from itertools import pairwise

import h11
import pytest
import wsproto
import wsproto.events
from hypothesis import example, given, settings
from hypothesis import strategies as st

from roomsock.http import Request
from roomsock.limits import Limits
from roomsock.protocol.deflate import Compression
from roomsock.protocol.handshake import (
    Handshake,
    HandshakeEvent,
    PeerGone,
    Refused,
    RequestReceived,
    UpgradeRequested,
    allowed_origin,
    decode_target,
)

LIMITS = Limits()
KEY = "Sec-WebSocket-Key"
VERSION = "Sec-WebSocket-Version"
PROTOCOL = "Sec-WebSocket-Protocol"
EXTENSIONS = "Sec-WebSocket-Extensions"
FRAME = b"\x81\x82\x00\x01\x02\x03hh"  # "hi", masked; any bytes would do


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([line, *headers, "", ""]).encode("latin-1") + body


def upgrade(
    *extra: str, line: str = "GET /chat HTTP/1.1", without: str = "", body: bytes = b""
) -> bytes:
    """A correct handshake, without one of its headers and with others."""
    headers = [
        "Host: example.org",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",  # of RFC 6455, section 1.3
        "Sec-WebSocket-Version: 13",
    ]
    kept = [header for header in headers if header.partition(":")[0] != without]
    assert len(kept) == len(headers) - bool(without)
    return request(line, *kept, *extra, body=body)


def post(*headers: str, body: bytes = b"") -> bytes:
    return request("POST /form HTTP/1.1", "Host: example.org", *headers, body=body)


def chunked(body: bytes) -> bytes:
    return post("Transfer-Encoding: chunked", body=body)


def pieces(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


def feed(handshake: Handshake, chunks: Iterable[bytes]) -> HandshakeEvent | None:
    """Feed pieces, and see that at most one event comes of them."""
    results = [handshake.receive_data(chunk) for chunk in chunks]
    events = [event for event in results if event is not None]
    assert len(events) <= 1
    return events[0] if events else None


def describe(event: HandshakeEvent | None) -> object:
    """Make events comparable: requests are equal by what is in them."""
    if isinstance(event, UpgradeRequested | RequestReceived):
        asked = event.request
        return (
            type(event),
            (asked.method, asked.target, asked.path, asked.client, asked.scheme, asked.body),
            repr(asked.headers),
            event.subprotocols if isinstance(event, UpgradeRequested) else None,
        )
    return event


def fed(data: bytes, limits: Limits = LIMITS) -> HandshakeEvent | None:
    """What comes of these bytes: the same whole, in two, byte by byte, and with others behind."""
    event = feed(Handshake(limits), [data])
    assert describe(feed(Handshake(limits), pieces(data))) == describe(event)
    assert describe(feed(Handshake(limits), filter(None, [data[:-5], data[-5:]]))) == describe(
        event
    )
    assert describe(feed(Handshake(limits), [data + FRAME])) == describe(event)
    assert describe(feed(Handshake(limits), pieces(data + FRAME))) == describe(event)
    return event


def upgraded(data: bytes) -> tuple[Handshake, UpgradeRequested]:
    handshake = Handshake(LIMITS)
    event = handshake.receive_data(data)
    assert isinstance(event, UpgradeRequested)
    return handshake, event


def read_response(data: bytes, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Read a response with an independent parser: the client's side of h11."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "example.org")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    response = client.next_event()
    assert isinstance(response, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert client.trailing_data == (b"", False)
    headers = {name.decode(): value.decode() for name, value in response.headers}
    return response.status_code, headers, body


# Handshakes

ACCEPTED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "4.2.1-minimal": (upgrade(), ()),
    "4.2.1-3-any-case": (upgrade("upgrade: WebSocket", without="Upgrade"), ()),
    "4.2.1-3-one-of-a-list": (upgrade("Upgrade: h2c, websocket, x", without="Upgrade"), ()),
    "4.2.1-3-one-of-a-list-with-versions": (upgrade("Upgrade: HTTP/2.0,,WEBSOCKET"), ()),
    "4.2.1-3-several-lines": (upgrade("Upgrade: x"), ()),
    "4.2.1-4-firefox": (upgrade("Connection: keep-alive, Upgrade", without="Connection"), ()),
    "4.2.1-4-any-case": (upgrade("connection: UPGRADE", without="Connection"), ()),
    "4.2.1-4-several-lines": (upgrade("Connection: keep-alive,,"), ()),
    "4.2.1-4-also-close": (upgrade("Connection: close, upgrade", without="Connection"), ()),
    # 16 bytes for every decoder that takes it at all (RFC 4648, section 3.5).
    "4.2.1-5-key-with-spare-bits": (upgrade(f"{KEY}: {'A' * 21}B==", without=KEY), ()),
    "4.2.1-5-blanks-around-the-key": (upgrade(f"{KEY}: \t{'A' * 22}== \t", without=KEY), ()),
    "4.2.1-6-blanks-around-the-version": (upgrade(f"{VERSION}:  13 \t", without=VERSION), ()),
    "4.2.1-8-one": (upgrade("Sec-WebSocket-Protocol: chat"), ("chat",)),
    "4.2.1-8-in-order-over-lines": (
        upgrade("Sec-WebSocket-Protocol: v2.x, v1", "Sec-WebSocket-Protocol: ,v0"),
        ("v2.x", "v1", "v0"),
    ),
    "4.2.1-8-no-token-is-none": (upgrade("Sec-WebSocket-Protocol:"), ()),
    "4.2.1-9-extensions-are-not-ours": (
        upgrade('Sec-WebSocket-Extensions: x-one; a=1; b="c" ,', "Sec-WebSocket-Extensions: x-two"),
        (),
    ),
    "9110-5.5-above-ascii-in-other-headers": (upgrade("Cookie: a=\x80\xff"), ()),
    "9110-5.6.1-empty-items": (
        upgrade("Connection: ,,\t,Upgrade,", f"{PROTOCOL}: ,, a ,", without="Connection"),
        ("a",),
    ),
    "9110-10.1.1-expect-without-a-body": (upgrade("Expect: 100-continue"), ()),
    "9112-2.2-bare-newlines": (upgrade().replace(b"\r\n", b"\n"), ()),
    "9112-2.2-one-empty-line-in-front": (b"\r\n" + upgrade(), ()),
    "9112-2.3-http-1.2": (upgrade(line="GET /chat HTTP/1.2"), ()),
    "9112-5.2-folded-line": (upgrade("Cookie: a=1;", " b=2"), ()),
    "9112-3.2.2-absolute-form": (upgrade(line="GET http://example.org/chat HTTP/1.1"), ()),
    "9112-6.3-empty-body": (upgrade("Content-Length: 0"), ()),
    "9112-6.3-empty-body-repeated": (upgrade("Content-Length: 0, 0", "Content-Length: 0"), ()),
}


@pytest.mark.parametrize("row", ACCEPTED)
def test_a_correct_handshake_asks_for_an_upgrade(row: str) -> None:
    data, subprotocols = ACCEPTED[row]
    event = fed(data)
    assert isinstance(event, UpgradeRequested)
    assert event.subprotocols == subprotocols
    assert event.request.path == "/chat"


@pytest.mark.parametrize("row", ACCEPTED)
def test_a_correct_handshake_can_be_accepted(row: str) -> None:
    data, subprotocols = ACCEPTED[row]
    handshake, _ = upgraded(data)
    check_421(data, handshake.accept(subprotocols[0] if subprotocols else None))


@pytest.mark.parametrize("row", ACCEPTED)
def test_bytes_behind_a_handshake_are_kept_for_the_websocket(row: str) -> None:
    data = ACCEPTED[row][0] + FRAME
    for chunks in [data], pieces(data), [data[:-3], data[-3:]]:
        handshake = Handshake(LIMITS)
        assert isinstance(feed(handshake, chunks), UpgradeRequested)
        assert handshake.trailing_data == FRAME


def test_the_request_has_everything_the_client_sent() -> None:
    handshake = Handshake(LIMITS, client=("192.0.2.1", 4000), scheme="https")
    event = handshake.receive_data(
        upgrade("Cookie: a=1", "X-Name:  b:c ", "x-name:\xe9", line="GET /r%c3%a9?q=%2F HTTP/1.1")
    )
    assert isinstance(event, UpgradeRequested)
    asked = event.request
    assert (asked.method, asked.target, asked.path) == ("GET", "/r%c3%a9?q=%2F", "/r\xe9")
    assert (asked.client, asked.scheme, asked.body) == (("192.0.2.1", 4000), "https", b"")
    assert asked.headers["host"] == "example.org"
    assert asked.headers.getall("X-Name") == ["b:c", "\xe9"]
    assert asked.cookies == {"a": "1"}
    assert asked.query["q"] == "/"


#: Row: request, status, a word of the reason.
BAD_HANDSHAKES: dict[str, tuple[bytes, int, str]] = {
    "4.2.1-1-post": (upgrade(line="POST /chat HTTP/1.1"), 400, "GET"),
    "4.2.1-1-head": (upgrade(line="HEAD /chat HTTP/1.1"), 400, "GET"),
    "4.2.1-1-http-1.0": (upgrade(line="GET /chat HTTP/1.0"), 400, "HTTP/1.1"),
    "4.2.1-1-put": (upgrade(line="PUT /chat HTTP/1.1"), 400, "GET"),
    "4.2.1-2-no-host": (upgrade(without="Host"), 400, "Host"),
    "4.2.1-2-no-host-in-1.2": (upgrade(line="GET / HTTP/1.2", without="Host"), 400, "Host"),
    "4.2.1-2-empty-host": (upgrade("Host:", without="Host"), 400, "Host"),
    "4.2.1-2-two-hosts": (upgrade("Host: example.org"), 400, "Host"),
    "4.2.1-4-no-connection": (upgrade(without="Connection"), 400, "Connection"),
    "4.2.1-4-other-connection": (
        upgrade("Connection: keep-alive, upgraded", without="Connection"),
        400,
        "Connection",
    ),
    "4.2.1-4-empty-connection": (
        upgrade("Connection:", without="Connection"),
        400,
        "Connection",
    ),
    "4.2.1-4-not-a-token": (upgrade("Connection: a b"), 400, "Connection"),
    "4.2.1-4-not-ascii": (upgrade("Connection: \xff"), 400, "Connection"),
    "4.2.1-5-no-key": (upgrade(without=KEY), 400, KEY),
    "4.2.1-5-empty-key": (upgrade(f"{KEY}:", without=KEY), 400, KEY),
    "4.2.1-5-short-key": (upgrade(f"{KEY}: {'A' * 18}==", without=KEY), 400, KEY),
    "4.2.1-5-a-digit-lacks": (upgrade(f"{KEY}: {'A' * 21}==", without=KEY), 400, KEY),
    "4.2.1-5-17-bytes": (upgrade(f"{KEY}: {'A' * 23}=", without=KEY), 400, KEY),
    "4.2.1-5-18-bytes": (upgrade(f"{KEY}: {'A' * 24}", without=KEY), 400, KEY),
    "4.2.1-5-no-base64": (upgrade(f"{KEY}: {'A' * 21}-==", without=KEY), 400, KEY),
    "4.2.1-5-not-ascii": (upgrade(f"{KEY}: {'A' * 21}\xff==", without=KEY), 400, KEY),
    "4.2.1-5-long-key": (upgrade(f"{KEY}: {'A' * 24}{'A' * 22}==", without=KEY), 400, KEY),
    "4.2.1-5-no-pads": (upgrade(f"{KEY}: {'A' * 22}", without=KEY), 400, KEY),
    "4.2.1-5-pads-in-front": (upgrade(f"{KEY}: =={'A' * 22}", without=KEY), 400, KEY),
    "4.2.1-5-blank-in-key": (upgrade(f"{KEY}: {'A' * 11} {'A' * 11}==", without=KEY), 400, KEY),
    "4.2.1-5-folded-key": (upgrade(f"{KEY}: {'A' * 11}", f" {'A' * 11}==", without=KEY), 400, KEY),
    "4.2.1-5-quoted-key": (upgrade(f'{KEY}: "{"A" * 22}=="', without=KEY), 400, KEY),
    "4.2.1-5-the-same-key-twice": (upgrade(f"{KEY}: dGhlIHNhbXBsZSBub25jZQ=="), 400, KEY),
    "4.2.1-5-two-keys": (upgrade(f"{KEY}: {'A' * 22}=="), 400, KEY),
    "4.2.1-6-no-version": (upgrade(without=VERSION), 426, VERSION),
    "4.2.1-6-version-8": (upgrade(f"{VERSION}: 8", without=VERSION), 426, VERSION),
    "4.2.1-6-empty-version": (upgrade(f"{VERSION}:", without=VERSION), 426, VERSION),
    "4.2.1-6-version-013": (upgrade(f"{VERSION}: 013", without=VERSION), 426, VERSION),
    "4.2.1-6-version-not-ascii": (upgrade(f"{VERSION}: \xb913", without=VERSION), 426, VERSION),
    "4.2.1-6-two-versions": (upgrade(f"{VERSION}: 13"), 426, VERSION),
    "4.2.1-6-list-of-versions": (upgrade(f"{VERSION}: 13, 8", without=VERSION), 426, VERSION),
    "4.2.1-8-not-a-token": (upgrade(f"{PROTOCOL}: a b"), 400, PROTOCOL),
    "4.2.1-8-parameter": (upgrade(f"{PROTOCOL}: a;b"), 400, PROTOCOL),
    "4.2.1-8-quoted": (upgrade(f'{PROTOCOL}: "a"'), 400, PROTOCOL),
    "4.2.1-8-not-ascii": (upgrade(f"{PROTOCOL}: \xff"), 400, PROTOCOL),
    "4.2.1-8-twice-the-same": (upgrade(f"{PROTOCOL}: a, b", f"{PROTOCOL}: a"), 400, PROTOCOL),
    "4.2.1-9-no-parameter": (upgrade(f"{EXTENSIONS}: a;"), 400, EXTENSIONS),
    "4.2.1-9-no-name": (upgrade(f"{EXTENSIONS}: =a"), 400, EXTENSIONS),
    "4.2.1-9-not-ascii": (upgrade(f"{EXTENSIONS}: a\xff"), 400, EXTENSIONS),
    "4.2.1-9-quoted-no-token": (upgrade(f'{EXTENSIONS}: a; b="c d"'), 400, EXTENSIONS),
    "9112-6-body": (upgrade("Content-Length: 1", body=b"x"), 400, "body"),
    "9112-6-big-body": (upgrade("Content-Length: 99999999999"), 400, "body"),
    "9112-6-chunked": (upgrade("Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400, "body"),
    "9112-6-chunked-with-length": (
        upgrade("Transfer-Encoding: chunked", "Content-Length: 0", body=b"0\r\n\r\n"),
        400,
        "body",
    ),
    "9112-3.2-target": (upgrade(line="GET /a/../b HTTP/1.1"), 400, "target"),
}

BAD_REQUESTS: dict[str, tuple[bytes, int, str]] = {
    "tls-on-a-plain-port": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "not HTTP"),
    "9112-2.2-two-empty-lines": (b"\r\n\r\n" + upgrade(), 400, "not HTTP"),
    "9112-2.2-empty-line-of-a-newline": (b"\n" + upgrade(), 400, "not HTTP"),
    "9112-2.2-blank-in-front": (b" " + upgrade(), 400, "not HTTP"),
    "9112-2.2-carriage-return-in-front": (b"\r" + upgrade(), 400, "not HTTP"),
    "9112-2.2-bare-carriage-return": (
        request("GET / HTTP/1.1", "Host: a", "b: c\rd: e"),
        400,
        "control",
    ),
    "9112-2.2-bare-carriage-return-at-the-end": (
        request("GET / HTTP/1.1", "Host: a\r"),
        400,
        "control",
    ),
    "9112-2.2-blank-behind-the-headers-name": (
        request("GET / HTTP/1.1", " Host: a"),
        400,
        "continuation",
    ),
    "9112-3-garbage": (b"garbage\r\n\r\n", 400, "request line"),
    "9112-3-http-0.9": (b"GET /\r\n\r\n", 400, "request line"),
    "9112-3-http-1.10": (request("GET / HTTP/1.10", "Host: a"), 400, "request line"),
    "9112-3-http-in-lower-case": (request("GET / http/1.1", "Host: a"), 400, "request line"),
    "9112-3-no-version": (request("GET / HTTP/", "Host: a"), 400, "request line"),
    "9112-3-two-blanks": (request("GET  / HTTP/1.1", "Host: a"), 400, "request line"),
    "9112-3-tabs": (request("GET\t/\tHTTP/1.1", "Host: a"), 400, "request line"),
    "9112-3-blank-behind": (request("GET / HTTP/1.1 ", "Host: a"), 400, "request line"),
    "9112-3-not-a-token": (request("G@T / HTTP/1.1", "Host: a"), 400, "request line"),
    "9112-3-not-ascii-method": (request("G\xcbT / HTTP/1.1", "Host: a"), 400, "request line"),
    "9112-3-nul-in-method": (request("G\0T / HTTP/1.1", "Host: a"), 400, "control"),
    "9112-3-nul-in-target": (request("GET /\0 HTTP/1.1", "Host: a"), 400, "control"),
    "9112-3-not-ascii-target": (request("GET /\xe9 HTTP/1.1", "Host: a"), 400, "request line"),
    "9112-3-blank-in-target": (request("GET /a b HTTP/1.1", "Host: a"), 400, "request line"),
    "9112-3.2-no-host": (request("GET / HTTP/1.1"), 400, "Host"),
    "9112-3.2-two-hosts": (request("GET / HTTP/1.0", "Host: a", "host: a"), 400, "Host"),
    "9112-3.2.2-absolute-without-host": (request("GET http://a/ HTTP/1.1"), 400, "Host"),
    "9112-3.2.2-absolute-with-a-bad-host": (
        request("GET http://a/ HTTP/1.1", "Host: a@b"),
        400,
        "Host",
    ),
    "9112-3.2.3-authority": (request("GET a:80 HTTP/1.1", "Host: a"), 400, "target"),
    "9112-3.2-asterisk": (request("GET * HTTP/1.1", "Host: a"), 400, "target"),
    "9112-5-no-colon": (request("GET / HTTP/1.1", "Host: a", "garbage"), 400, "header line"),
    "9112-5.1-blank-before-colon": (request("GET / HTTP/1.1", "Host : a"), 400, "header line"),
    "9112-5-no-name": (request("GET / HTTP/1.1", "Host: a", ": b"), 400, "header line"),
    "9112-5-nul-in-name": (request("GET / HTTP/1.1", "Host: a", "b\0: c"), 400, "control"),
    "9112-5-not-ascii-name": (request("GET / HTTP/1.1", "Host: a", "\xe9: b"), 400, "header line"),
    "9110-5.5-nul-in-value": (request("GET / HTTP/1.1", "Host: a", "b: \0"), 400, "control"),
    "9110-5.5-control-in-value": (upgrade("X-Odd: \x01"), 400, "control"),
    "9110-5.5-delete-in-value": (upgrade("X-Odd: a\x7f"), 400, "control"),
    "9112-6.1-smuggling": (
        post("Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        400,
        "Transfer-Encoding",
    ),
    "9112-6.1-http-1.0": (
        request("POST / HTTP/1.0", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        400,
        "Transfer-Encoding",
    ),
    "9112-6.1-unknown-coding": (post("Transfer-Encoding: gzip"), 501, "Transfer-Encoding"),
    "9112-6.3-conflict": (post("Content-Length: 1", "Content-Length: 2"), 400, "Content-Length"),
    "9112-6.1-two-codings": (post("Transfer-Encoding: gzip, chunked"), 501, "Transfer-Encoding"),
    "9112-6.1-chunked-twice": (
        post("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        501,
        "Transfer-Encoding",
    ),
    "9112-6.3-conflicting-list": (post("Content-Length: 1, 2"), 400, "Content-Length"),
    "9112-6.3-empty": (post("Content-Length:"), 400, "Content-Length"),
    "9112-6.3-plus": (post("Content-Length: +5"), 400, "Content-Length"),
    "9112-6.3-hexadecimal": (post("Content-Length: 0x5"), 400, "Content-Length"),
    "9112-6.3-other-digits": (post("Content-Length: \xb2"), 400, "Content-Length"),
    "9112-6.3-upgrade-with-a-bad-length": (upgrade("Content-Length: +0"), 400, "Content-Length"),
    "9112-6.3-negative": (post("Content-Length: -1"), 400, "Content-Length"),
    "9112-7.1-chunk-header": (chunked(b"zz\r\nabc"), 400, "chunked body"),
    "9112-7.1-chunk-header-empty": (chunked(b"\r\n"), 400, "chunked body"),
    "9112-7.1-chunk-header-signed": (chunked(b"+1\r\n"), 400, "chunked body"),
    "9112-7.1-chunk-header-0x": (chunked(b"0x1\r\n"), 400, "chunked body"),
    "9112-7.1-chunk-header-grouped": (chunked(b"1_0\r\n"), 400, "chunked body"),
    "9112-7.1-chunk-header-21-digits": (chunked(b"0" * 20 + b"1\r\n"), 400, "chunked body"),
    "9112-7.1-chunk-header-bare-newline": (chunked(b"1\na\r\n"), 400, "chunked body"),
    "9112-7.1-chunk-header-bare-return": (chunked(b"1;\rx\r\n"), 400, "chunked body"),
    "9112-7.1-chunk-footer": (chunked(b"1\r\nabc"), 400, "chunked body"),
    "9112-7.1-chunk-footer-newline": (chunked(b"1\r\na\n"), 400, "chunked body"),
    "9112-7.1-chunk-footer-lacks": (chunked(b"1\r\na0\r\n\r\n"), 400, "chunked body"),
    "9112-7.1.1-extension-control": (chunked(b"1;\0\r\n"), 400, "chunked body"),
    "9112-7.1.2-trailer-no-colon": (chunked(b"0\r\ngarbage\r\n"), 400, "chunked body"),
    "9112-7.1.2-trailer-control": (chunked(b"0\r\na: \x01\r\n"), 400, "chunked body"),
    "9112-7.1.2-trailer-bare-return": (chunked(b"0\r\na:\rb\r\n"), 400, "chunked body"),
    "9112-7.1.2-trailer-folded": (chunked(b"0\r\na: b\r\n c\r\n"), 400, "chunked body"),
    "9110-9.1-unknown-method": (request("FOO / HTTP/1.1", "Host: a"), 501, "method"),
    "9110-9.1-methods-have-case": (request("get / HTTP/1.1", "Host: a"), 501, "method"),
    "9110-9.3.6-connect": (request("CONNECT a:1 HTTP/1.1", "Host: a"), 501, "method"),
    "9110-9.3.8-trace": (request("TRACE / HTTP/1.1", "Host: a"), 501, "method"),
    "9110-10.1.1-expect": (post("Expect: 100-continue", "Content-Length: 1"), 417, "Expect"),
    "9110-15.6.6-http-0.9": (request("GET / HTTP/0.9", "Host: a"), 505, "HTTP/1.1"),
    "9110-15.6.6-http-2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/1.1"),
}

REFUSED = BAD_HANDSHAKES | BAD_REQUESTS


@pytest.mark.parametrize("row", REFUSED)
def test_a_bad_request_is_refused_with_its_status(row: str) -> None:
    data, status, word = REFUSED[row]
    event = fed(data)
    assert isinstance(event, Refused)
    assert event.status == status
    assert word in event.reason
    assert event.reason.isascii() and event.reason.isprintable()


@pytest.mark.parametrize("row", REFUSED)
def test_every_refusal_can_be_answered(row: str) -> None:
    handshake, data = Handshake(LIMITS), REFUSED[row][0]
    event = handshake.receive_data(data)
    assert isinstance(event, Refused)
    answer = handshake.respond(event.status, event.reason.encode(), event.headers)
    method = "HEAD" if data.startswith(b"HEAD ") else "GET"
    status, headers, body = read_response(answer, method)
    assert (status, headers["content-length"]) == (event.status, str(len(event.reason)))
    assert body == (b"" if method == "HEAD" else event.reason.encode())


def test_a_reason_never_quotes_the_peer() -> None:
    for data in (
        b"secret\r\n\r\n",
        request("GET / HTTP/1.1", "Host: a", "secret"),
        chunked(b"secret\r\n"),
        chunked(b"1\r\nxsecret"),
    ):
        event = fed(data)
        assert isinstance(event, Refused)
        assert "secret" not in event.reason and "bytearray" not in event.reason


def test_426_names_the_version_and_the_upgrade() -> None:
    """RFC 6455, section 4.4; RFC 9110, sections 7.8 and 15.5.22."""
    handshake = Handshake(LIMITS)
    event = handshake.receive_data(upgrade(without=VERSION))
    assert isinstance(event, Refused)
    _, headers, _ = read_response(handshake.respond(event.status, b"", event.headers))
    assert headers["sec-websocket-version"] == "13"
    assert headers["upgrade"] == "websocket"
    assert headers["connection"] == "close, upgrade"


#: Values of Host, and whether they are one (RFC 9110, section 7.2; RFC 3986, section 3.2.2).
HOSTS = {
    "example.org": True,
    "EXAMPLE.org.": True,
    "localhost:8000": True,
    "example.org:": True,
    "a_b~c": True,
    "%c3%a9.example": True,
    "192.0.2.1:80": True,
    "[::1]": True,
    "[2001:DB8::192.0.2.1]:8000": True,
    "user@example.org": False,
    "user:secret@example.org": False,
    "example.org, example.com": False,
    "example.org example.com": False,
    "example.org/chat": False,
    "example.org?q": False,
    "http://example.org": False,
    "example.org:http": False,
    "example.org:80:80": False,
    "example.org:+80": False,
    "example.org: 80": False,
    ":80": False,
    "::1": False,
    "[::1": False,
    "[::1]x": False,
    "[]": False,
    "[example.org]": False,
    "a%zz": False,
    "a<b>": False,
    'a"b': False,
    "a\\b": False,
    "b\xfccher.example": False,
    "\xff": False,
}


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_is_a_name_or_an_address_and_perhaps_a_port(host: str) -> None:
    plain = fed(request("GET / HTTP/1.1", f"Host: {host}"))
    handshake = fed(upgrade(f"Host: {host}", without="Host"))
    if HOSTS[host]:
        assert isinstance(plain, RequestReceived)
        assert isinstance(handshake, UpgradeRequested)
        assert handshake.request.headers["host"] == host
    else:
        assert plain == handshake == Refused(400, "malformed request: Host")


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("http://example.com", "example.com"),
        ("http://example.com:8000/chat", "example.com:8000"),
        ("HTTPS://[::1]?q=//", "[::1]"),
    ],
)
def test_the_host_of_an_absolute_target_is_the_one_that_counts(target: str, host: str) -> None:
    """RFC 9112, section 3.2.2. The check of Origin depends on it."""
    event = fed(upgrade(line=f"GET {target} HTTP/1.1"))
    assert isinstance(event, UpgradeRequested)
    assert event.request.headers.getall("host") == [host]


# Plain requests

#: Row: request, method, body.
PLAIN: dict[str, tuple[bytes, str, bytes]] = {
    "get": (request("GET /form HTTP/1.1", "Host: a"), "GET", b""),
    "head": (request("HEAD /form HTTP/1.1", "Host: a"), "HEAD", b""),
    "http-1.0": (request("GET /form HTTP/1.0"), "GET", b""),
    "http-1.0-ignores-expect": (request("GET /form HTTP/1.0", "Expect: 100-continue"), "GET", b""),
    "post-without-body": (post(), "POST", b""),
    "post": (post("Content-Length: 3", body=b"a=b"), "POST", b"a=b"),
    "post-the-same-length-twice": (
        post("Content-Length: 3", "Content-Length: 3", body=b"a=b"),
        "POST",
        b"a=b",
    ),
    "post-chunked": (chunked(b"1\r\na\r\n2;x=y\r\n=b\r\n0\r\nTrailer: x\r\n\r\n"), "POST", b"a=b"),
    "post-chunked-with-blanks": (chunked(b"003 \t;x \r\na=b\r\n0 \r\n\r\n"), "POST", b"a=b"),
    "post-chunked-trailers-with-newlines": (
        chunked(b"3\r\na=b\r\n0\r\nb:\nc:\n\n"),
        "POST",
        b"a=b",
    ),
    "post-chunked-with-line-ends": (
        chunked(b"9\r\n\r\n0\r\n\r\n\n\n\r\n0\r\n\r\n"),
        "POST",
        b"\r\n0\r\n\r\n\n\n",
    ),
    "get-with-body": (
        request("GET /form HTTP/1.1", "Host: a", "Content-Length: 1", body=b"x"),
        "GET",
        b"x",
    ),
    "key-without-upgrade": (upgrade(line="GET /form HTTP/1.1", without="Upgrade"), "GET", b""),
    "put": (
        request("PUT /form HTTP/1.1", "Host: a", "Content-Length: 1", body=b"x"),
        "PUT",
        b"x",
    ),
    "patch": (request("PATCH /form HTTP/1.1", "Host: a"), "PATCH", b""),
    "delete": (request("DELETE /form HTTP/1.1", "Host: a"), "DELETE", b""),
    "options": (request("OPTIONS /form HTTP/1.1", "Host: a"), "OPTIONS", b""),
    "empty-line-in-front": (b"\r\n" + request("HEAD /form HTTP/1.1", "Host: a"), "HEAD", b""),
    "empty-host": (request("GET /form HTTP/1.1", "Host:"), "GET", b""),
    "absolute-form": (request("GET http://a/form HTTP/1.0"), "GET", b""),
    "expect-something-else": (request("GET /form HTTP/1.1", "Host: a", "Expect: x"), "GET", b""),
    "post-a-list-of-one-length": (post("Content-Length: 3, 3", body=b"a=b"), "POST", b"a=b"),
    "upgrade-to-a-version": (
        upgrade("Upgrade: websocket/13", line="GET /form HTTP/1.1", without="Upgrade"),
        "GET",
        b"",
    ),
    "upgrade-to-something-alike": (
        upgrade("Upgrade: websocket\xff, xwebsocket", line="GET /form HTTP/1.1", without="Upgrade"),
        "GET",
        b"",
    ),
    "other-upgrade": (
        request("GET /form HTTP/1.1", "Host: a", "Connection: upgrade", "Upgrade: h2c"),
        "GET",
        b"",
    ),
}


@pytest.mark.parametrize("row", PLAIN)
def test_a_plain_request_comes_whole_and_can_be_answered(row: str) -> None:
    data, method, body = PLAIN[row]
    for chunks in [data + b"GET"], pieces(data + b"GET"):
        handshake = Handshake(LIMITS)
        event = feed(handshake, chunks)
        assert isinstance(event, RequestReceived)
        asked = event.request
        assert (asked.method, asked.path, asked.body) == (method, "/form", body)
        assert handshake.trailing_data == b"GET"
        status, headers, content = read_response(handshake.respond(200, b"hello"), method)
        assert status == 200
        assert content == (b"" if method == "HEAD" else b"hello")
        assert headers == {
            "connection": "close",
            "content-length": "5",
            "content-type": "text/plain; charset=utf-8",
        }


@pytest.mark.parametrize(
    "start",
    [b"", b"GET / HT", upgrade()[:-1], post("Content-Length: 3", body=b"ab"), chunked(b"2\r\na")],
)
def test_a_peer_that_closes_before_its_request_is_complete_is_gone(start: bytes) -> None:
    handshake = Handshake(LIMITS)
    assert feed(handshake, pieces(start)) is None
    assert handshake.receive_data(b"") == PeerGone()
    assert handshake.receive_data(b"") is None


def test_a_peer_that_closes_behind_its_request_gets_an_answer() -> None:
    handshake = Handshake(LIMITS)
    event = feed(handshake, [request("GET / HTTP/1.1", "Host: a"), b""])
    assert isinstance(event, RequestReceived)
    assert read_response(handshake.respond(404))[0] == 404


# Limits

SMALL = Limits(header_block=200, header_fields=4, request_target=40, body=10)


def padded(size: int) -> bytes:
    """A GET whose request line and headers take so many bytes."""
    return request("GET / HTTP/1.1", "Host: a", "X: " + "x" * (size - 32))


WITHIN_LIMITS = {
    "header-block": padded(200),
    "header-fields": request("GET / HTTP/1.1", "Host: a", "b:", "c:", "d:"),
    "target": request(f"GET /{'a' * 39} HTTP/1.1", "Host: a"),
    "body": post("Content-Length: 10", body=b"0123456789"),
    "chunked-body": chunked(b"5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n"),
    "chunk-header": chunked(b"1;" + b"x" * 1020 + b"\r\na\r\n0\r\n\r\n"),
    "trailers-block": chunked(b"0\r\na:" + b"x" * 193 + b"\r\n\r\n"),
    "trailers-fields": chunked(b"0\r\na:\r\nb:\r\nc:\r\nd:\r\n\r\n"),
}

ABOVE_LIMITS: dict[str, tuple[bytes, int, str]] = {
    "header-block": (padded(201), 431, "Limits.header_block (200 bytes)"),
    "header-block-unfinished": (padded(300)[:201], 431, "Limits.header_block"),
    "header-fields": (
        request("GET / HTTP/1.1", "Host: a", "b:", "c:", "d:", "e:"),
        431,
        "Limits.header_fields (4)",
    ),
    "target": (
        request(f"GET /{'a' * 40} HTTP/1.1", "Host: a"),
        414,
        "Limits.request_target (40 bytes)",
    ),
    "target-unfinished": (b"GET /" + b"a" * 69, 414, "Limits.request_target"),
    "method": (request(f"{'A' * 64} / HTTP/1.1", "Host: a"), 414, "Limits.request_target"),
    "body": (post("Content-Length: 11"), 413, "Limits.body (10 bytes)"),
    "body-20-digits": (post(f"Content-Length: {'9' * 20}"), 413, "Limits.body"),
    "chunked-body": (chunked(b"5\r\n01234\r\n6\r\n567890"), 413, "Limits.body"),
    "chunk-of-20-digits": (chunked(b"F" * 20 + b"\r\n"), 413, "Limits.body"),
    "chunk-header": (chunked(b"1;" + b"x" * 1021 + b"\r\na\r\n"), 400, "chunked body"),
    "chunk-header-unfinished": (chunked(b"1;" + b"x" * 1022), 400, "chunked body"),
    "trailers-block": (chunked(b"0\r\na:" + b"x" * 194 + b"\r\n\r\n"), 431, "Limits.header_block"),
    "trailers-block-unfinished": (chunked(b"0\r\na:" + b"x" * 198), 431, "Limits.header_block"),
    "trailers-block-of-lines": (
        chunked(b"0\r\n" + b"a:" * 50 + b"\r\na:" + b"x" * 94 + b"\r\n"),
        431,
        "Limits.header_block",
    ),
    "trailers-fields": (chunked(b"0\r\n" + b"a:\r\n" * 5 + b"\r\n"), 431, "Limits.header_fields"),
}


@pytest.mark.parametrize("row", WITHIN_LIMITS)
def test_a_request_that_just_fits_the_limits_is_taken(row: str) -> None:
    assert isinstance(fed(WITHIN_LIMITS[row], SMALL), RequestReceived)


@pytest.mark.parametrize("row", ABOVE_LIMITS)
def test_a_request_above_a_limit_is_refused_by_its_name(row: str) -> None:
    data, status, setting = ABOVE_LIMITS[row]
    event = fed(data, SMALL)
    assert isinstance(event, Refused)
    assert event.status == status
    assert setting in event.reason


def test_a_header_block_smaller_than_a_request_line_rules_alone() -> None:
    event = fed(b"A" * 201, Limits(header_block=200))
    assert isinstance(event, Refused)
    assert event.status == 431


def test_the_line_limit_holds_where_the_line_ends_in_one_read() -> None:
    """The same line byte by byte is refused before its end is seen."""
    for size, status in (72, 501), (73, 414):
        line = "A" * (size - len(" / HTTP/1.1")) + " / HTTP/1.1"
        event = fed(request(line, "Host: a"), SMALL)
        assert isinstance(event, Refused)
        assert event.status == status


def test_a_body_in_thousands_of_chunks_is_refused() -> None:
    """A megabyte of one-byte chunks would cost seconds."""
    most = b"1\r\na\r\n" * 4096
    event = fed(chunked(most + b"0\r\n\r\n"))
    assert isinstance(event, RequestReceived)
    assert event.request.body == b"a" * 4096
    refused = fed(chunked(most + b"1\r\na\r\n"))
    assert refused == Refused(413, "body in more than 4096 chunks")


class Spy(h11.Connection):
    """Counts what h11 is given to read."""

    given = b""

    def receive_data(self, data: bytes) -> None:
        type(self).given += data
        super().receive_data(data)


#: Blanks in front of what refuses them, for which h11 takes the square of their number.
BLANKS = b" " * 15_000


@pytest.mark.parametrize(
    "head",
    [
        request("GET / HTTP/1.1", "Host: a", f"{name}:{before}{' ' * 15_000}\r{behind}")
        for name, before, behind in [
            ("a", "", "x"),
            ("a", "x", "x"),
            ("a", "", ""),
            ("a", "\t", "\r"),
        ]
    ]
    + [request("GET / HTTP/1.1", "Host: a", "a:" + " x" * 7_000 + "\rx")],
)
def test_what_h11_is_slow_to_refuse_is_refused_before_it_comes_to_h11(
    head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spy, "given", b"")
    monkeypatch.setattr(h11, "Connection", Spy)
    assert fed(head) == Refused(400, "malformed request: control character")
    assert Spy.given == b""


@pytest.mark.parametrize(
    "body",
    [
        b"1;" + BLANKS + b"\n\r\n",
        b"1" + BLANKS + b"x\r\n",
        b"1\r\na\r\n1;" + BLANKS + b"\rx\r\n",
        b"0\r\na:" + BLANKS + b"\rx\r\n\r\n",
        b"0\r\n" + b"a:\r\n" * 5_000 + b"\r\n",
        b"1;x\r\na\r\n0\r\nb:c\r\n\r\n",
    ],
)
def test_no_byte_of_a_body_comes_to_h11(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in chunked(body), post("Content-Length: 9", body=body[:9]):
        monkeypatch.setattr(Spy, "given", b"")
        monkeypatch.setattr(h11, "Connection", Spy)
        whole = Handshake(LIMITS)
        assert whole.receive_data(data) is not None
        assert Spy.given == data[: data.index(b"\r\n\r\n") + 4]


@pytest.mark.parametrize("size", [1, 7, 999, 4096])
def test_no_more_is_kept_of_a_chunked_body_than_the_body_and_a_line(size: int) -> None:
    handshake = Handshake(LIMITS)
    stream = chunked(b"1;" + b"x" * 1000 + b"\r\na\r\n" + b"5\r\nabcde\r\n" * 500 + b"0\r\n")
    stream += (b"a:" + b"b" * 200 + b"\r\n") * 50
    for start in range(0, len(stream), size):
        assert handshake.receive_data(stream[start : start + size]) is None
        assert len(handshake._line) <= 1024
    assert isinstance(handshake.receive_data(b"\r\n"), RequestReceived)


def test_all_bytes_behind_a_body_are_kept_even_beyond_the_room_for_a_body() -> None:
    for chunks in (
        [post("Content-Length: 1", body=b"a" * 999)],
        [post("Content-Length: 1"), b"a" * 999],
    ):
        handshake = Handshake(SMALL)
        assert isinstance(feed(handshake, chunks), RequestReceived)
        assert handshake.trailing_data == b"a" * 998


def test_head_refused_before_it_was_parsed_gets_no_body() -> None:
    handshake = Handshake(SMALL)
    event = handshake.receive_data(b"HEAD /" + b"a" * 100)
    assert isinstance(event, Refused)
    status, headers, body = read_response(handshake.respond(event.status, b"long"), "HEAD")
    assert (status, headers["content-length"], body) == (414, "4", b"")


@pytest.mark.parametrize("byte", sorted({*range(0x20), 0x7F} - {0x09, 0x0A}))
def test_no_control_character_passes(byte: int) -> None:
    data = upgrade("X-Odd: a!b").replace(b"!", bytes([byte]))
    event = Handshake(LIMITS).receive_data(data)
    assert event == Refused(400, "malformed request: control character")


# Answers


def test_the_101_has_the_accept_value_of_the_rfc() -> None:
    """RFC 6455, section 1.3."""
    handshake, _ = upgraded(upgrade())
    assert handshake.accept(headers=[("Set-Cookie", "a=1")]) == (
        b"HTTP/1.1 101 Switching Protocols\r\n"
        b"Upgrade: websocket\r\n"
        b"Connection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
        b"Set-Cookie: a=1\r\n"
        b"\r\n"
    )


@pytest.mark.parametrize("subprotocol", [None, "chat.v1", "chat.v2"])
def test_an_independent_client_takes_the_101(subprotocol: str | None) -> None:
    client = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    asked = client.send(
        wsproto.events.Request("example.org", "/chat", subprotocols=["chat.v2", "chat.v1"])
    )
    handshake, event = upgraded(asked)
    assert event.subprotocols == ("chat.v2", "chat.v1")
    client.receive_data(handshake.accept(subprotocol, [("X-Room", "1")]))
    (answer,) = client.events()
    assert isinstance(answer, wsproto.events.AcceptConnection)
    assert answer.subprotocol == subprotocol
    assert (b"x-room", b"1") in answer.extra_headers


@pytest.mark.parametrize("subprotocol", [None, "a"])
@pytest.mark.parametrize("compression", [None, Compression()])
def test_a_plain_101_is_what_h11_writes(
    subprotocol: str | None, compression: Compression | None
) -> None:
    data = upgrade("Sec-WebSocket-Protocol: a", "Sec-WebSocket-Extensions: permessage-deflate")
    answers = []
    for headers in [(), [("X-Room", "1")]]:
        handshake = Handshake(LIMITS, compression=compression)
        handshake.receive_data(data)
        answers.append(handshake.accept(subprotocol, headers))
    ours, by_h11 = answers
    assert by_h11 == ours.removesuffix(b"\r\n") + b"X-Room: 1\r\n\r\n"


def test_a_subprotocol_that_was_not_offered_is_the_callers_mistake() -> None:
    handshake, _ = upgraded(upgrade("Sec-WebSocket-Protocol: a"))
    with pytest.raises(ValueError, match=r"'b' is not among those the client offered: \['a'\]"):
        handshake.accept("b")
    assert b"Sec-WebSocket-Protocol: a\r\n" in handshake.accept("a")


BAD_HEADERS = [
    ("", "x"),
    ("a b", "x"),
    ("a\r\nb", "x"),
    ("\xe9", "x"),
    ("a", "x\r\nSet-Cookie: evil=1"),
    ("a", "x\ny"),
    ("a", "x\0"),
    ("a", "\u20ac"),
    ("a", " x"),
    ("Connection", "keep-alive"),
    ("content-length", "0"),
    ("Transfer-Encoding", "chunked"),
]


@pytest.mark.parametrize(
    "header", [*BAD_HEADERS, ("upgrade", "h2c"), ("Sec-WebSocket-Anything", "x")]
)
def test_a_101_with_a_bad_header_is_the_callers_mistake(header: tuple[str, str]) -> None:
    handshake, _ = upgraded(upgrade())
    with pytest.raises(ValueError):
        handshake.accept(headers=[header])
    assert read_response(handshake.respond(500))[0] == 500  # still to be answered


@pytest.mark.parametrize("header", BAD_HEADERS)
def test_a_response_with_a_bad_header_is_the_callers_mistake(header: tuple[str, str]) -> None:
    handshake, _ = upgraded(upgrade())
    with pytest.raises(ValueError):
        handshake.respond(403, headers=iter([header]))
    assert read_response(handshake.respond(500))[0] == 500


@pytest.mark.parametrize("status", [99, 101, 1000])
def test_a_status_that_is_no_final_one_is_the_callers_mistake(status: int) -> None:
    with pytest.raises(ValueError):
        Handshake(LIMITS).respond(status)


def test_a_content_type_replaces_the_default() -> None:
    handshake, _ = upgraded(upgrade())
    answer = handshake.respond(403, b"{}", [("content-TYPE", "application/json")])
    assert read_response(answer) == (
        403,
        {"connection": "close", "content-length": "2", "content-type": "application/json"},
        b"{}",
    )


def test_an_empty_response_has_a_length_and_no_type() -> None:
    answer = Handshake(LIMITS).respond(299)
    assert read_response(answer) == (299, {"connection": "close", "content-length": "0"}, b"")


@pytest.mark.parametrize("status", [204, 304])
def test_a_status_without_content_has_none(status: int) -> None:
    answer = Handshake(LIMITS).respond(status, b"body")
    assert read_response(answer) == (status, {"connection": "close"}, b"")


# Targets

TARGETS: dict[bytes, str | None] = {
    b"/": "/",
    b"/chat": "/chat",
    b"/chat/": "/chat/",
    b"//chat//": "//chat//",
    b"/chat?q=%2f%zz/../": "/chat",
    b"/?": "/",
    b"/%63hat": "/chat",
    b"/a%20b": "/a b",
    b"/%C3%A9": "/\xe9",
    b"/%252F": "/%2F",
    b"/a+b&c;d=e:@!$'()*,~": "/a+b&c;d=e:@!$'()*,~",
    b"/.well-known/...": "/.well-known/...",
    b"http://example.org": "/",
    b"http://example.org?q": "/",
    b"HTTPS://[::1]:8000/a%41?q": "/aA",
    # Other forms than these two.
    b"": None,
    b"*": None,
    b"chat": None,
    b"?q": None,
    b"example.org:443": None,
    b"ftp://example.org/": None,
    b"http:///chat": None,
    b"http://user@example.org/": None,
    b"http://a,b/": "/",
    b"http://a:b/": None,
    b"http://[::1/": None,
    b"ws://example.org/": None,
    b"http://a\xe9/": None,
    b"/chat#top": None,
    b"/chat?q#top": None,
    b"/a b": None,
    b"/\xe9": None,
    b"/a?\xe9": None,
    b"/a\n": None,
    # Several paths, one room.
    b"/a%2Fb": None,
    b"/a%2fb": None,
    b"/a%5Cb": None,
    b"/a\\b": None,
    b"/.": None,
    b"/..": None,
    b"/a/../b": None,
    b"/a/./b": None,
    b"/a/%2e%2E/b": None,
    b"/a/.%2e": None,
    b"http://example.org/..": None,
    # One path that looks like another, or like a second line of the log.
    b"/a%00": None,
    b"/a%0A": None,
    b"/a%1f": None,
    b"/a%7F": None,
    b"/a%C2%85": None,
    # Bad escapes.
    b"/%": None,
    b"/%4": None,
    b"/%zz": None,
    b"/%+1": None,
    b"/%FF": None,
    b"/%C3": None,
    b"/%C0%AF": None,
    b"/%ED%A0%80": None,
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_has_one_path_or_none(target: bytes) -> None:
    assert decode_target(target) == TARGETS[target]


@given(st.binary() | st.text("/.%25cefEF\\ab?#:", max_size=12).map(str.encode))
def test_a_decoded_path_is_safe_to_name_a_room(target: bytes) -> None:
    path = decode_target(target)
    if path is not None:
        assert path.startswith("/") and "\\" not in path
        assert not any(unicodedata.category(character) == "Cc" for character in path)
        assert not {".", ".."} & set(path.split("/"))
        assert path.count("/") <= target.count(b"/") or path == "/"


# Origins


def from_page(*headers: str) -> Request:
    pairs = (header.partition(": ")[::2] for header in headers)
    block = "\n".join(f"{name.lower()}:{value}" for name, value in pairs).encode("latin-1")
    return Request("GET", "/", "/", block)


#: Origin, Host.
SAME_ORIGIN = [
    ("http://example.org", "example.org"),
    ("http://EXAMPLE.org", "Example.ORG"),
    ("http://example.org", "example.org:80"),
    ("http://example.org:80", "example.org"),
    ("https://example.org", "example.org"),  # TLS may end in front of us
    ("https://example.org", "example.org:443"),
    ("https://example.org:443", "example.org"),
    ("http://localhost:8000", "localhost:8000"),
    ("http://[::1]:8000", "[::1]:8000"),
    ("https://[::1]", "[::1]:443"),
    ("http://example.org", "example.org:"),
]

FOREIGN_ORIGIN = [
    ("http://evil.example", "example.org"),
    ("http://example.org.evil.example", "example.org"),
    ("http://evil-example.org", "example.org"),
    ("http://example.org:8000", "example.org"),
    ("http://example.org", "example.org:8000"),
    ("https://example.org", "example.org:80"),
    ("http://example.org", "example.org:443"),
    ("http://[::1]", "[::2]"),
    ("app://example.org", "example.org"),
    ("null", "null"),
    ("null", ""),
    ("", "example.org"),
    ("example.org", "example.org"),
    ("http://", ""),
    ("http://a/b", "a/b"),
    ("http://example.org/", "example.org"),
    ("http://user@example.org", "example.org"),
    ("http://example.org:port", "example.org:port"),
    ("http://example.org:999999", "example.org:999999"),
    ("http://[::1", "[::1"),
    ("http://ex\xe4mple.org", "ex\xe4mple.org"),
    ("http://\u0130".encode().decode("latin-1"), "i\u0307".encode().decode("latin-1")),
]


@pytest.mark.parametrize(("origin", "host"), SAME_ORIGIN)
def test_a_page_of_the_same_origin_is_allowed(origin: str, host: str) -> None:
    assert allowed_origin(from_page(f"Origin: {origin}", f"Host: {host}"), None) is None


@pytest.mark.parametrize(("origin", "host"), FOREIGN_ORIGIN)
def test_a_page_of_another_origin_is_refused(origin: str, host: str) -> None:
    why = allowed_origin(from_page(f"Origin: {origin}", f"Host: {host}"), None)
    assert why is not None
    assert why.isascii() and why.isprintable()


def test_a_request_without_origin_is_allowed() -> None:
    for origins in None, ["https://example.org"], "*":
        assert allowed_origin(from_page("Host: example.org"), origins) is None


def test_a_star_allows_every_origin() -> None:
    for origin in "http://evil.example", "null", "\xff":
        assert allowed_origin(from_page(f"Origin: {origin}", "Host: a"), "*") is None
    assert allowed_origin(from_page("Origin: a", "Origin: b"), "*") is None


def test_a_request_without_host_has_no_same_origin() -> None:
    assert allowed_origin(from_page("Origin: http://a"), None) is not None


LIST = ("https://Example.org:443", "http://dev.example:8000", "app://shell")


@pytest.mark.parametrize(
    "origin",
    ["https://example.org", "https://example.org:443", "http://DEV.example:8000", "app://shell"],
)
def test_a_listed_origin_is_allowed_at_any_host(origin: str) -> None:
    assert allowed_origin(from_page(f"Origin: {origin}", "Host: other.example"), LIST) is None


@pytest.mark.parametrize(
    "origin",
    ["http://example.org", "https://dev.example:8000", "http://dev.example", "null", "", "x"],
)
def test_an_origin_that_is_not_listed_is_refused_even_at_its_own_host(origin: str) -> None:
    host = origin.rpartition("/")[2]
    assert allowed_origin(from_page(f"Origin: {origin}", f"Host: {host}"), LIST) is not None


def test_an_opaque_origin_is_allowed_if_null_is_listed() -> None:
    assert allowed_origin(from_page("Origin: null"), ["null"]) is None


def test_what_is_no_origin_is_refused_whatever_is_listed() -> None:
    assert allowed_origin(from_page("Origin: garbage"), ["garbage"]) is not None


def test_two_origins_are_refused() -> None:
    same = "Origin: http://example.org"
    why = allowed_origin(from_page(same, same, "Host: example.org"), None)
    assert why == "2 Origin headers, where a browser sends one"


def test_a_refused_origin_is_told_with_the_line_to_write() -> None:
    asked = from_page("Origin: http://a.example", "Host: b.example")
    assert allowed_origin(asked, None) == (
        "Origin 'http://a.example' is not allowed at Host 'b.example'; "
        "to accept it: origins=['http://a.example']"
    )
    assert allowed_origin(asked, ["http://c.example"]) == (
        "Origin 'http://a.example' is not allowed at Host 'b.example'; "
        "to accept it: origins=['http://c.example', 'http://a.example']"
    )


def test_a_refused_origin_does_not_fill_the_log() -> None:
    why = allowed_origin(from_page("Origin: " + "\xff" * 9000, "Host: " + "h" * 9000), None)
    assert why is not None
    assert why.isascii() and len(why) < 2000


# Any bytes

PARTS = st.sampled_from(
    [
        *[data for data, *_ in (ACCEPTED | REFUSED | PLAIN | ABOVE_LIMITS).values()],
        *WITHIN_LIMITS.values(),
        *[line + b"\r\n" for line in upgrade(f"{PROTOCOL}: a, b").split(b"\r\n")],
        b"POST / HTTP/1.1\r\nHost: a\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\n",
        b"3\r\nabc\r\n",
        b"0\r\n",
        *[bytes([byte]) for byte in b"\r\n :\x00\xff,;%"],
    ]
)
STREAMS = st.lists(PARTS | st.binary(max_size=20), max_size=12).map(b"".join)
LIMIT_SETS = st.builds(
    Limits,
    header_block=st.integers(1, 400),
    header_fields=st.integers(1, 10),
    request_target=st.integers(1, 100),
    body=st.integers(1, 40),
)


def cut_into(stream: bytes, draw: st.DrawFn) -> list[bytes]:
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(stream))), max_size=20)))
    edges = [0, *cuts, len(stream)]
    chunks = [stream[start:end] for start, end in pairwise(edges)]
    return [chunk for chunk in chunks if chunk]


@st.composite
def cut_streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    stream = draw(STREAMS)
    return stream, cut_into(stream, draw)


ODD_BYTES = st.sampled_from(b'\0\t\n\r\x0b\x1f "%*+,-/0139:;<=>?@GHPS[]ft\x7f\x80\xff')
VALID = [
    upgrade("Origin: http://example.org", f"{PROTOCOL}: chat, v2.x"),
    b"\r\n" + upgrade("Cookie: a=1", "Content-Length: 0"),
    upgrade(line="GET http://example.org:80/chat?q HTTP/1.1"),
    post("Content-Length: 3", body=b"a=b"),
    chunked(b"1\r\na\r\n0\r\n\r\n"),
]


LINE_MUTATIONS: dict[str, Callable[[bytes], list[bytes]]] = {
    "line removed": lambda line: [],
    "line doubled": lambda line: [line, line],
    "line emptied": lambda line: [line.partition(b":")[0] + b":\r\n"],
}


@st.composite
def mutated(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A correct request with a few bytes or lines replaced, inserted, removed or doubled."""
    data = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(0, 3))):
        how = draw(st.sampled_from(["replace", "insert", "remove", *LINE_MUTATIONS]))
        if how in LINE_MUTATIONS:
            lines = data.splitlines(keepends=True) or [b""]
            at = draw(st.integers(0, len(lines) - 1))
            lines[at : at + 1] = LINE_MUTATIONS[how](lines[at])
            data = b"".join(lines)
        else:
            at = draw(st.integers(0, len(data)))
            new = b"" if how == "remove" else bytes([draw(ODD_BYTES | st.integers(0, 255))])
            data = data[:at] + new + data[at + (how != "insert") :]
    data += draw(st.sampled_from([b"", FRAME]))
    return data, cut_into(data, draw)


def check_421(stream: bytes, answer: bytes) -> None:
    """What RFC 6455 asks of a handshake that gets a 101, by the plainest means."""
    lines: list[bytes] = []
    for line in stream.removeprefix(b"\r\n").split(b"\n"):
        line = line.removesuffix(b"\r")
        if not line:
            break
        if line[:1] in (b" ", b"\t"):
            lines[-1] += b" " + line.strip(b" \t")
        else:
            lines.append(line)
    method, target, version = lines[0].split(b" ")
    assert method == b"GET" and re.fullmatch(rb"HTTP/1\.[1-9]", version)
    assert target.isascii() and re.match(rb"/|https?://", target, re.IGNORECASE)
    found: dict[bytes, list[bytes]] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        assert colon and name and name.isascii() and not re.search(rb"\s", name)
        found.setdefault(name.lower(), []).append(value.strip(b" \t"))
        assert not re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", value)

    def items(name: bytes) -> list[bytes]:
        return [item.strip().lower() for item in b",".join(found.get(name, [])).split(b",")]

    (host,) = found[b"host"]
    assert host.isascii() and host and not re.search(rb"[\s@/?#]", host)
    assert b"websocket" in items(b"upgrade") and b"upgrade" in items(b"connection")
    (key,) = found[b"sec-websocket-key"]
    assert len(b64decode(key, validate=True)) == 16
    assert found[b"sec-websocket-version"] == [b"13"]
    assert set(items(b"content-length")) <= {b"", b"0"} and b"transfer-encoding" not in found
    client = h11.Connection(h11.CLIENT)
    wish = [("Host", "a"), ("Connection", "upgrade"), ("Upgrade", "websocket")]
    client.send(h11.Request(method="GET", target="/", headers=wish))
    client.send(h11.EndOfMessage())
    client.receive_data(answer)
    switched = client.next_event()
    assert isinstance(switched, h11.InformationalResponse) and switched.status_code == 101
    digest = sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    assert (b"sec-websocket-accept", b64encode(digest)) in list(switched.headers)
    assert client.trailing_data == (b"", False)


def check_any(stream: bytes, chunks: list[bytes], limits: Limits) -> None:
    whole, chunked = Handshake(limits), Handshake(limits)
    event = feed(whole, [stream] if stream else [])
    assert describe(feed(chunked, chunks)) == describe(event)
    assert describe(feed(Handshake(limits), pieces(stream))) == describe(event)
    if event is None:
        # Nothing is collected without end: what is incomplete is within the limits. And nobody
        # whose request is over waits for an answer: it is the headers' end that lacks, or a body.
        # (A byte of a body takes up to seven in chunks; then comes one header of a chunk.)
        assert len(stream) < 2 * limits.header_block + 7 * limits.body + 1024
        head, blank, _ = stream.removeprefix(b"\r\n").replace(b"\r", b"").partition(b"\n\n")
        assert not blank or re.search(rb"\n(content-length|transfer-encoding):", head.lower())
        assert chunked.receive_data(b"") == PeerGone()
    elif isinstance(event, UpgradeRequested):
        answer = whole.accept()
        assert answer == chunked.accept()
        assert whole.trailing_data == chunked.trailing_data
        assert stream.endswith(whole.trailing_data)
        check_421(stream, answer)
    elif isinstance(event, RequestReceived):
        answer = whole.respond(200, b"x")
        assert answer == chunked.respond(200, b"x")
        assert read_response(answer, event.request.method)[0] == 200
        assert whole.trailing_data == chunked.trailing_data
    else:
        assert isinstance(event, Refused)
        assert 400 <= event.status <= 599
        method = "HEAD" if stream.removeprefix(b"\r\n").startswith(b"HEAD ") else "GET"
        answer = chunked.respond(event.status, event.reason.encode(), event.headers)
        assert read_response(answer, method)[0] == event.status


@given(cut_streams(), st.just(LIMITS) | LIMIT_SETS)
@example((b"\r\n", [b"\r", b"\n"]), LIMITS)
@example((b"\r\nHEAD *", [b"\r", b"\nHEAD *"]), Limits(header_block=5))
def test_any_bytes_in_any_chunking_give_one_event_that_can_be_answered(
    cut: tuple[bytes, list[bytes]], limits: Limits
) -> None:
    check_any(*cut, limits)


@given(mutated())
@settings(max_examples=500)
def test_a_request_with_a_slip_is_taken_if_it_is_still_correct_and_answered_in_any_case(
    cut: tuple[bytes, list[bytes]],
) -> None:
    check_any(*cut, LIMITS)


# What is remembered


def test_only_what_is_short_is_remembered() -> None:
    """What clients send stays for as long as the process: it must be little."""

    def shake(count: int) -> None:
        for number in range(count):
            long = ", ".join(f"{number}-{each}" for each in range(1000))
            offers = ", ".join(f"e{number}; p{each}" for each in range(500))
            event = fed(
                upgrade(
                    f"Sec-WebSocket-Protocol: {long}",
                    f"Sec-WebSocket-Extensions: {offers}",
                    f"Connection: {long}",
                ),
                Limits(header_block=2**16),
            )
            assert isinstance(event, UpgradeRequested)

    shake(1)
    tracemalloc.start()
    try:
        shake(10)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 50_000


@pytest.mark.parametrize(
    "line", ["GET / HTTP/1.1\r\nHost: a\r\nbad\r\n\r\n", "G\x00 / HTTP/9\r\n\r\n"]
)
def test_a_malformed_request_leaves_nothing_to_the_collector(line: str) -> None:
    def shake(count: int) -> None:
        for _ in range(count):
            assert isinstance(fed(line.encode()), Refused)

    shake(1)
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        shake(10)
        assert len(gc.get_objects()) <= before + 1
    finally:
        gc.enable()
