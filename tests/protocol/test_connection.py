"""One connection after its handshake: tables of bytes, each fed whole, byte by byte and split.

The frames a client sends are built by `frame`, which shares no code with roomsock. Section numbers
are those of RFC 6455 unless they begin with 7692.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from math import inf
from typing import Any, NamedTuple

import pytest
import wsproto.events as ws
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri
from wsproto.connection import Connection as WSProtoConnection
from wsproto.connection import ConnectionState, ConnectionType

from roomsock.limits import Limits
from roomsock.protocol import connection as under_test
from roomsock.protocol.connection import (
    STEP_FRAMES,
    STEP_INFLATED,
    STEP_MESSAGES,
    Connection,
)
from roomsock.protocol.deflate import Agreement
from roomsock.protocol.events import Event, Failed, PeerClosed, PeerLost, PongReceived
from tests.fuzz.model import (
    BINARY,
    CLOSE,
    CONT,
    KEY,
    PADDING,
    PING,
    PONG,
    TEXT,
    Rules,
    by_size,
    byte_by_byte,
    deflated,
    frame,
    meaning,
)
from tests.fuzz.targets import SMALL_STEPS, means, while_closing

LIMITS = Limits(message=70_000, fragments=6)
NOW = 1000.0

#: The longest incomplete frame that is kept as it came: a control frame, masked.
TAIL_SIZE = 2 + 4 + 125


# Building frames


def text(payload: str, **how: Any) -> bytes:
    return frame(TEXT, payload.encode(), **how)


def close(code: int, reason: bytes = b"", **how: Any) -> bytes:
    return frame(CLOSE, code.to_bytes(2, "big") + reason, **how)


def pong(payload: bytes) -> bytes:
    """What we answer to a ping: short and unmasked."""
    return b"\x8a" + bytes([len(payload)]) + payload


# Feeding them


def chunkings(data: bytes) -> Iterator[list[bytes]]:
    """Ways to split bytes, beginning with not at all."""
    yield [data]
    if len(data) < 1000:
        yield list(byte_by_byte(data))
    else:  # only the ends: the middle of a payload is like any other
        yield [*byte_by_byte(data[:40]), data[40:-40], *byte_by_byte(data[-40:])]
    yield list(by_size(data, cycle([3, 1, 4, 1, 5, 9, 2, 6, 5 + len(data) // 50])))
    yield list(by_size(data, cycle([4096])))
    for cut in {*range(1, 20), *range(len(data) - 20, len(data))}:
        if 0 < cut < len(data):
            yield [data[:cut], data[cut:]]


def held_by_wsproto(conn: Connection) -> int:
    """Bytes in wsproto's buffer; a connection that never needed it has none."""
    return 0 if conn._wsproto is None else len(conn._wsproto._proto._frame_decoder.buffer)


def check_held(conn: Connection, limits: Limits) -> None:
    """What is kept for the peer is within its limits."""
    wsproto_holds = held_by_wsproto(conn)
    if conn.close_received:
        assert conn._tail == b""
        assert conn._chunks is None
        assert conn._partial is None
        return
    assert len(conn._tail) < TAIL_SIZE
    assert wsproto_holds < 14  # a header without its key: payload goes through it at once
    held = 0 if conn._chunks is None else conn._chunks.tell()
    if conn._partial is not None:
        assert held == 0
        held = sum(map(len, conn._partial._chunks))
    assert held <= limits.message


def feed(
    conn: Connection, chunks: Iterable[bytes], limits: Limits = LIMITS, now: float = NOW
) -> tuple[list[Event], list[bytes]]:
    """Feed pieces as a driver does: the events, and the control frames that became due."""
    events: list[Event] = []
    sent: list[bytes] = []
    for chunk in filter(None, chunks):  # an empty one would be the end of the stream
        events += checked(conn, conn.receive_data(chunk, now))
        sent += conn.data_to_send()
        while conn.has_more:
            events += checked(conn, conn.receive_more(now))
            sent += conn.data_to_send()
        check_held(conn, limits)
    return events, sent


def checked(conn: Connection, events: list[Event]) -> list[Event]:
    """The events of a step; the connection must have said whether it found messages only."""
    only_messages = all(isinstance(event, (str, bytes)) for event in events)
    assert conn.only_messages == (only_messages and events != [] and conn.due is None)
    return events


def run(
    chunks: Iterable[bytes], limits: Limits = LIMITS, agreement: Agreement | None = None
) -> tuple[list[Event], list[bytes]]:
    return feed(Connection(limits, now=NOW, agreement=agreement), chunks, limits)


class Fails(NamedTuple):
    """Stands in tables for a `Failed` whose words do not matter."""

    code: int


def plain(events: Iterable[Event]) -> list[Event | Fails]:
    return [Fails(event.code) if isinstance(event, Failed) else event for event in events]


# The table: bytes in, events, bytes out


class Row(NamedTuple):
    name: str
    data: bytes
    events: list[Any]
    sent: list[bytes] = []  # noqa: RUF012 (never changed)


BAD_TEXT = b"ab\xffcd"
SPLIT = "κόσμε".encode()
CLOSE_CODES_TAKEN = [*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999]
CLOSE_CODES_REFUSED = [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]

ROWS = [
    # 5.2 lengths
    Row("5.7-masked-hello", bytes.fromhex("818537fa213d7f9f4d5158"), ["Hello"]),
    *(
        Row(f"5.2-text-of-{size}", frame(TEXT, b"x" * size), ["x" * size])
        for size in (0, 1, 125, 126, 127, 65535, 65536)
    ),
    *(
        Row(f"5.2-binary-of-{size}", frame(BINARY, b"\xfe" * size), [b"\xfe" * size])
        for size in (0, 1, 125, 126, 127, 65535, 65536)
    ),
    Row("5.2-many-in-one-read", text("a") + frame(BINARY, b"b") + text("") + text("c" * 200),
        ["a", b"b", "", "c" * 200]),
    *(
        Row(f"5.2-{name}-length-{length}-in-{form}-bits",
            frame(opcode, b"x" * length, form=form), [Fails(1002)])
        for name, opcode in (("text", TEXT), ("binary", BINARY))
        for form, length in ((16, 0), (16, 1), (16, 125), (64, 0), (64, 126), (64, 65535))
    ),
    Row("5.2-length-with-its-top-bit", frame(BINARY, b"", length=2**63), [Fails(1002)]),
    Row("5.2-length-all-ones", frame(TEXT, b"", length=2**64 - 1), [Fails(1002)]),
    # 5.2 reserved bits and opcodes
    *(
        Row(f"5.2-reserved-bits-{rsv:03b}-on-{name}", frame(opcode, b"x", rsv=rsv), [Fails(1002)])
        for rsv in (1, 2, 4, 7)
        for name, opcode in (("text", TEXT), ("binary", BINARY), ("ping", PING))
    ),
    Row("5.2-reserved-bits-on-close", close(1000, rsv=4), [Fails(1002)]),
    Row("5.2-reserved-bits-on-close-1014", close(1014, rsv=4), [Fails(1002)]),
    Row("5.2-reserved-bits-on-continuation",
        frame(TEXT, b"x", fin=False) + frame(CONT, b"x", rsv=1), [Fails(1002)]),
    *(
        Row(f"5.2-opcode-{opcode:#x}-of-{size}", frame(opcode, b"x" * size), [Fails(1002)])
        for opcode in (3, 4, 5, 6, 7, 0xB, 0xC, 0xD, 0xE, 0xF)
        for size in (0, 1, 200)
    ),
    # 5.1, 5.3 masks
    *(
        Row(f"5.3-key-{key.hex()}", text("Hello", key=key) + frame(BINARY, b"12345678", key=key),
            ["Hello", b"12345678"])
        for key in (bytes(4), b"\xff\xff\xff\xff", b"\x01\x02\x03\x04", b"\x00\x00\x00\x80")
    ),
    *(
        Row(f"5.1-unmasked-{name}", frame(opcode, b"\x03\xe8", key=None), [Fails(1002)])
        for name, opcode in
        (("text", TEXT), ("binary", BINARY), ("close", CLOSE), ("ping", PING), ("pong", PONG))
    ),
    Row("5.1-unmasked-empty", frame(TEXT, b"", key=None), [Fails(1002)]),
    Row("5.1-unmasked-200", frame(BINARY, b"x" * 200, key=None), [Fails(1002)]),
    Row("5.1-unmasked-close-1014", close(1014, key=None), [Fails(1002)]),
    Row("5.1-unmasked-continuation",
        frame(TEXT, b"x", fin=False) + frame(CONT, b"x", key=None), [Fails(1002)]),
    # 5.4 fragmentation
    Row("5.4-two-fragments", frame(TEXT, b"Hel", fin=False) + frame(CONT, b"lo"), ["Hello"]),
    Row("5.4-binary-fragments",
        frame(BINARY, b"a", fin=False) + frame(CONT, b"b", fin=False) + frame(CONT, b"c"),
        [b"abc"]),
    Row("5.4-empty-first-fragment", frame(TEXT, b"", fin=False) + frame(CONT, b"x"), ["x"]),
    Row("5.4-empty-last-fragment", frame(BINARY, b"x", fin=False) + frame(CONT, b""), [b"x"]),
    Row("5.4-only-empty-fragments",
        frame(TEXT, b"", fin=False) + frame(CONT, b"", fin=False) + frame(CONT, b""), [""]),
    Row("5.4-only-empty-binary-fragments", frame(BINARY, b"", fin=False) + frame(CONT), [b""]),
    Row("5.4-large-fragments",
        frame(BINARY, b"a" * 300, fin=False) + frame(CONT, b"b" * 300), [b"a" * 300 + b"b" * 300]),
    Row("5.4-messages-around",
        text("a") + frame(TEXT, b"b", fin=False) + frame(CONT, b"c") + text("d"),
        ["a", "bc", "d"]),
    Row("5.4-control-between-fragments",
        frame(TEXT, b"a", fin=False) + frame(PING, b"1") + frame(CONT, b"b", fin=False)
        + frame(PING, b"2") + frame(PONG, b"?") + frame(CONT, b"c"),
        ["abc"], [pong(b"1"), pong(b"2")]),
    Row("5.4-close-between-fragments",
        frame(TEXT, b"a", fin=False) + close(1001, b"bye"), [PeerClosed(1001, "bye")]),
    Row("5.4-close-1014-between-fragments",
        frame(TEXT, b"a", fin=False) + close(1014), [PeerClosed(1014, "")]),
    Row("5.4-continuation-of-nothing", frame(CONT, b"x"), [Fails(1002)]),
    Row("5.4-empty-continuation-of-nothing", frame(CONT), [Fails(1002)]),
    Row("5.4-unfinished-continuation-of-nothing", frame(CONT, b"x", fin=False), [Fails(1002)]),
    Row("5.4-continuation-behind-a-message", text("a") + frame(CONT, b"x"), ["a", Fails(1002)]),
    Row("5.4-text-within-text", frame(TEXT, b"a", fin=False) + text("b"), [Fails(1002)]),
    Row("5.4-binary-within-text",
        frame(TEXT, b"a", fin=False) + frame(BINARY, b"b"), [Fails(1002)]),
    Row("5.4-large-binary-within-binary",
        frame(BINARY, b"a", fin=False) + frame(BINARY, bytes(66_000)), [Fails(1002)]),
    # 5.5 control frames
    Row("5.5-control-of-126", frame(PING, b"x" * 126), [Fails(1002)]),
    Row("5.5-control-of-70000", frame(PONG, b"x" * 70_000), [Fails(1002)]),
    Row("5.5-close-of-126", close(1000, b"x" * 124), [Fails(1002)]),
    Row("5.5-control-with-16-bit-length", frame(PING, b"x", form=16), [Fails(1002)]),
    Row("5.5-close-1014-with-16-bit-length", close(1014, form=16), [Fails(1002)]),
    Row("5.5-close-1014-with-64-bit-length", close(1014, form=64), [Fails(1002)]),
    *(
        Row(f"5.5-fragmented-{name}", frame(opcode, b"\x03\xf6", fin=False), [Fails(1002)])
        for name, opcode in (("close", CLOSE), ("ping", PING), ("pong", PONG))
    ),
    # 5.5.2, 5.5.3 ping and pong
    Row("5.5.2-ping", frame(PING), [], [pong(b"")]),
    Row("5.5.2-ping-of-125", frame(PING, b"p" * 125), [], [pong(b"p" * 125)]),
    Row("5.5.2-ping-is-bytes", frame(PING, b"\xff\x00"), [], [pong(b"\xff\x00")]),
    Row("5.5.2-pings-in-order", b"".join(frame(PING, bytes([n])) for n in range(9)), [],
        [pong(bytes([n])) for n in range(9)]),
    Row("5.5.2-pings-between-messages",
        frame(PING, b"1") + text("a") + frame(PING, b"2") + text("b"),
        ["a", "b"], [pong(b"1"), pong(b"2")]),
    Row("5.5.2-ping-in-front-of-close", frame(PING, b"1") + close(1000), [PeerClosed(1000, "")],
        [pong(b"1")]),
    Row("5.5.2-ping-behind-close", close(1000) + frame(PING, b"1"), [PeerClosed(1000, "")]),
    Row("5.5.2-ping-in-front-of-a-bad-frame", frame(PING, b"1") + frame(3) + frame(PING, b"2"),
        [Fails(1002)], [pong(b"1")]),
    Row("5.5.3-unsolicited-pongs",
        frame(PONG) + frame(PONG, b"0x1p+0") + frame(PONG, b"\xff" * 125), []),
    # 5.5.1, 7.1.5, 7.1.6, 7.4 close
    Row("7.1.5-close-without-code", frame(CLOSE), [PeerClosed(1005, "")]),
    Row("5.5.1-close-of-one-byte", frame(CLOSE, b"\x03"), [Fails(1002)]),
    Row("7.1.6-reason", close(1000, "été".encode()), [PeerClosed(1000, "été")]),
    Row("7.1.6-longest-reason", close(4000, b"x" * 123), [PeerClosed(4000, "x" * 123)]),
    Row("7.1.6-longest-reason-1014", close(1014, b"x" * 123), [PeerClosed(1014, "x" * 123)]),
    Row("8.1-reason-not-utf-8", close(1000, b"\xff"), [Fails(1007)]),
    Row("8.1-reason-cut-within-a-character", close(1000, "é".encode()[:1]), [Fails(1007)]),
    Row("8.1-reason-not-utf-8-1014", close(1014, b"a\xff"), [Fails(1007)]),
    Row("5.5.1-data-behind-close", close(1000) + text("late") + frame(3) + close(1001),
        [PeerClosed(1000, "")]),
    Row("5.5.1-data-behind-close-1014", close(1014) + text("late"), [PeerClosed(1014, "")]),
    *(
        Row(f"7.4-code-{code}", close(code, b"r"), [PeerClosed(code, "r")])
        for code in CLOSE_CODES_TAKEN
    ),
    *(
        Row(f"7.4-bad-code-{code}", close(code, b"r"), [Fails(1002)])
        for code in CLOSE_CODES_REFUSED
    ),
    # 8.1 text is UTF-8
    Row("8.1-every-width", text("a\x7fé€\U0001f600\x00"), ["a\x7fé€\U0001f600\x00"]),
    Row("8.1-no-byte-order-mark-is-taken-away", text("\ufeffa"), ["\ufeffa"]),
    Row("8.1-line-ends-are-kept", text("a\r\nb\rc\n"), ["a\r\nb\rc\n"]),
    Row("8.1-line-ends-are-kept-in-fragments",
        frame(TEXT, b"a\r", fin=False) + frame(CONT, b"\nb\r"), ["a\r\nb\r"]),
    Row("8.1-invalid-byte", frame(TEXT, BAD_TEXT), [Fails(1007)]),
    Row("8.1-surrogate", frame(TEXT, b"\xed\xa0\x80"), [Fails(1007)]),
    Row("8.1-overlong", frame(TEXT, b"\xc0\xaf"), [Fails(1007)]),
    Row("8.1-above-10ffff", frame(TEXT, b"\xf4\x90\x80\x80"), [Fails(1007)]),
    Row("8.1-cut-at-the-end", frame(TEXT, b"a\xe2\x82"), [Fails(1007)]),
    Row("8.1-invalid-large", frame(TEXT, b"x" * 66_000 + b"\xff"), [Fails(1007)]),
    Row("8.1-binary-need-not-be", frame(BINARY, BAD_TEXT), [BAD_TEXT]),
    Row("8.1-character-across-fragments",
        b"".join(frame(TEXT if i == 0 else CONT, SPLIT[i : i + 2], fin=i >= len(SPLIT) - 2)
                 for i in range(0, len(SPLIT), 2)), ["κόσμε"]),
    Row("8.1-character-around-empty-fragment-and-ping",
        frame(TEXT, b"\xce", fin=False) + frame(PING) + frame(CONT, b"", fin=False)
        + frame(CONT, b"\xba"), ["κ"], [pong(b"")]),
    Row("8.1-invalid-across-fragments",
        frame(TEXT, b"\xce", fin=False) + frame(CONT, b"x"), [Fails(1007)]),
    Row("8.1-cut-at-the-end-of-fragments",
        frame(TEXT, b"x", fin=False) + frame(CONT, b"\xce"), [Fails(1007)]),
    # what came before a bad frame
    Row("good-in-front-of-bad", text("a") + frame(BINARY, b"b") + frame(TEXT, BAD_TEXT) + text("c"),
        ["a", b"b", Fails(1007)]),
    Row("good-in-front-of-reserved", text("a") + frame(TEXT, b"x", rsv=1), ["a", Fails(1002)]),
    Row("good-in-front-of-close", text("a") + close(1000), ["a", PeerClosed(1000, "")]),
    Row("fragments-in-front-of-bad",
        frame(TEXT, b"a", fin=False) + frame(CONT, b"b") + frame(CONT, b"c"), ["ab", Fails(1002)]),
    # limits
    Row("limit-text", text("x" * 70_000), ["x" * 70_000]),
    Row("limit-text-and-one", text("x" * 70_001), [Fails(1009)]),
    Row("limit-binary", frame(BINARY, bytes(70_000)), [bytes(70_000)]),
    Row("limit-binary-and-one", frame(BINARY, bytes(70_001)), [Fails(1009)]),
    Row("limit-in-fragments", frame(BINARY, bytes(69_999), fin=False) + frame(CONT, b"x"),
        [bytes(69_999) + b"x"]),
    Row("limit-in-fragments-and-one", frame(TEXT, b"x" * 69_999, fin=False) + frame(CONT, b"xx"),
        [Fails(1009)]),
    Row("limit-of-bytes-not-characters", text("é" * 35_000 + "x"), [Fails(1009)]),
    Row("limit-is-for-each-message", text("x" * 65_000) + frame(TEXT, b"x" * 65_000, fin=False)
        + frame(CONT, b"x") + text("x" * 65_000), ["x" * 65_000, "x" * 65_001, "x" * 65_000]),
    Row("limit-declared-2**62", frame(BINARY, b"", length=2**62), [Fails(1009)]),
    Row("limit-declared-2**63-1", frame(TEXT, b"", length=2**63 - 1), [Fails(1009)]),
    Row("limit-declared-by-continuation",
        frame(TEXT, b"a", fin=False) + frame(CONT, b"", length=2**62), [Fails(1009)]),
    Row("limit-good-in-front", text("a") + frame(TEXT, length=70_001), ["a", Fails(1009)]),
    Row("limit-yields-to-reserved-bits", frame(TEXT, length=70_001, rsv=1), [Fails(1002)]),
    Row("limit-yields-to-reserved-opcode", frame(3, length=70_001), [Fails(1002)]),
    Row("limit-yields-to-no-mask", frame(TEXT, length=70_001, key=None), [Fails(1002)]),
    Row("limit-fragments", frame(TEXT, b"a", fin=False) + frame(CONT, b"b", fin=False) * 4
        + frame(CONT, b"c"), ["abbbbc"]),
    Row("limit-fragments-and-one", frame(TEXT, b"a", fin=False) + frame(CONT, b"b", fin=False) * 5
        + frame(CONT, b"c"), [Fails(1009)]),
    Row("limit-fragments-empty", frame(TEXT, b"", fin=False) + frame(CONT, b"", fin=False) * 6,
        [Fails(1009)]),
    Row("limit-fragments-does-not-count-control-frames",
        frame(TEXT, b"a", fin=False) + frame(PING) * 10 + frame(CONT, b"b"),
        ["ab"], [pong(b"")] * 10),
    Row("limit-fragments-is-for-each-message",
        (frame(TEXT, b"a", fin=False) + frame(CONT, b"b", fin=False) * 4 + frame(CONT, b"c")) * 3,
        ["abbbbc"] * 3),
]  # fmt: skip


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_bytes_become_events_however_they_are_split(row: Row) -> None:
    whole, sent = run([row.data])
    assert (plain(whole), sent) == (row.events, row.sent)
    for chunks in chunkings(row.data):
        assert run(chunks) == (whole, sent)


def test_every_other_close_code_is_taken_or_refused_by_its_range() -> None:
    """7.4.1, 7.4.2 and the IANA registry; the rows above feed the edges in pieces."""
    for code in range(65536):
        events = Connection(LIMITS, now=NOW).receive_data(close(code), NOW)
        if (1000 <= code < 1015 and code not in (1004, 1005, 1006)) or 3000 <= code < 5000:
            assert events == [PeerClosed(code, "")]
        else:
            assert plain(events) == [Fails(1002)]


ALONE = Agreement("", 15, 15, False, False)
TAKEOVER = Agreement("", 15, 15, True, True)
EITHER = pytest.mark.parametrize("agreement", [ALONE, TAKEOVER], ids=["alone", "takeover"])


def packed(message: str | bytes, *, how: dict[str, Any] | None = None, **flags: Any) -> bytes:
    """A compressed message in one frame.

    Args:
        how: Arguments of `deflated`.
    """
    is_text = isinstance(message, str)
    data = message.encode() if isinstance(message, str) else message
    return frame(TEXT if is_text else BINARY, deflated(data, **(how or {})), rsv=4, **flags)


def packed_in_parts(opcode: int, payload: bytes, *cuts: int, between: bytes = b"") -> bytes:
    """A compressed payload in fragments; only the first says that it is compressed (7692, 6)."""
    bounds = [0, *cuts, len(payload)]
    return between.join(
        frame(CONT if i else opcode, payload[begin:end], fin=i == len(cuts), rsv=0 if i else 4)
        for i, (begin, end) in enumerate(zip(bounds, bounds[1:]))  # noqa: B905, RUF007 (3.10)
    )


HELLO = deflated(b"Hello")
EMPTY = b"\x00"
COMPRESSED_ROWS = [
    Row("7692-6-text", packed("Hello"), ["Hello"]),
    Row("7692-6-binary", packed(b"\xff" * 300), [b"\xff" * 300]),
    Row("7692-7.2.3.1", bytes.fromhex("c18737fa213dc5b2ecf4fefd21"), ["Hello"]),
    Row("7692-7.2.3.6-empty", frame(TEXT, EMPTY, rsv=4) + frame(BINARY, EMPTY, rsv=4), ["", b""]),
    Row("7692-7.2.3.4-final", packed("Hello", how={"final": True}) * 2, ["Hello"] * 2),
    Row("7692-6-uncompressed-in-between",
        packed("a") + text("b") + frame(TEXT, b"c", fin=False) + frame(CONT, b"d") + packed(b"e")
        + frame(BINARY, b"f"), ["a", "b", "cd", b"e", b"f"]),
    Row("7692-6-larger-than-a-16-bit-length",
        packed(bytes(range(256)) * 260, how={"level": 0}) + packed("next"),
        [bytes(range(256)) * 260, "next"]),
    *(
        Row(f"7692-6-fragments-cut-at-{cut}",
            packed_in_parts(TEXT, HELLO, cut, between=frame(PING, b"p")) + packed("next"),
            ["Hello", "next"], [pong(b"p")])
        for cut in range(len(HELLO) + 1)
    ),
    Row("7692-6-empty-fragments",
        packed_in_parts(BINARY, HELLO, 0, 0, 3, len(HELLO), between=frame(PONG)), [b"Hello"]),
    Row("7692-6-character-across-fragments",
        packed_in_parts(TEXT, deflated(SPLIT, level=0), 6, 8, 9, 11), ["κόσμε"]),
    Row("7692-6-close-between-fragments",
        frame(TEXT, HELLO[:3], rsv=4, fin=False) + close(1001, b"bye"), [PeerClosed(1001, "bye")]),
    # 7692, 6: who may set the bit
    *(
        Row(f"7692-6-bit-on-{name}", text("a") + frame(opcode, b"", rsv=4), ["a", Fails(1002)])
        for name, opcode in (("ping", PING), ("pong", PONG), ("close", CLOSE))
    ),
    Row("7692-6-bit-on-continuation",
        frame(TEXT, HELLO[:3], rsv=4, fin=False) + frame(CONT, HELLO[3:], rsv=4), [Fails(1002)]),
    Row("7692-6-bit-on-empty-continuation",
        frame(TEXT, HELLO[:3], rsv=4, fin=False) + frame(CONT, rsv=4, fin=False), [Fails(1002)]),
    Row("7692-6-bit-on-continuation-of-an-uncompressed-message",
        frame(TEXT, b"a", fin=False) + frame(CONT, HELLO, rsv=4), [Fails(1002)]),
    *(
        Row(f"5.2-reserved-bits-{rsv:03b}-though-compressed", frame(TEXT, HELLO, rsv=rsv),
            [Fails(1002)])
        for rsv in (1, 2, 3, 5, 6, 7)
    ),
    Row("5.1-unmasked-though-compressed", frame(TEXT, HELLO, rsv=4, key=None), [Fails(1002)]),
    Row("5.2-length-in-too-many-bits", frame(TEXT, HELLO, rsv=4, form=16), [Fails(1002)]),
    # 5.4: what is out of order is not inflated
    Row("5.4-text-within-compressed",
        frame(TEXT, HELLO[:3], rsv=4, fin=False) + text("b"), [Fails(1002)]),
    Row("5.4-compressed-within-compressed",
        frame(TEXT, HELLO[:3], rsv=4, fin=False) + frame(TEXT, b"\xff" * 9, rsv=4), [Fails(1002)]),
    Row("5.4-compressed-within-text",
        frame(TEXT, b"a", fin=False) + frame(TEXT, b"\xff" * 9, rsv=4), [Fails(1002)]),
    *(
        Row(f"5.4-continuation-of-nothing-behind-{name}", front + frame(CONT, b"\xff" * 9),
            ["Hello", Fails(1002)])
        for name, front in (
            ("a-message", packed("Hello")), ("fragments", packed_in_parts(TEXT, HELLO, 3))
        )
    ),
    # 7692, 7.2.2; 8.1
    Row("7692-7.2.2-garbage", packed("a") + frame(BINARY, b"\xff" * 9, rsv=4),
        ["a", Fails(1007)]),
    Row("7692-7.2.2-incomplete", frame(BINARY, HELLO[:-3], rsv=4), [Fails(1007)]),
    Row("7692-7.2.2-nothing", frame(TEXT, b"", rsv=4), [Fails(1007)]),
    Row("7692-7.2.2-garbage-in-a-fragment",
        frame(BINARY, HELLO[:3], rsv=4, fin=False) + frame(CONT, b"\xff" * 9), [Fails(1007)]),
    Row("8.1-invalid-byte-compressed", frame(TEXT, deflated(BAD_TEXT), rsv=4), [Fails(1007)]),
    Row("8.1-cut-at-the-end-compressed", frame(TEXT, deflated(SPLIT[:3]), rsv=4), [Fails(1007)]),
    Row("8.1-invalid-across-compressed-fragments",
        packed_in_parts(TEXT, deflated(b"\xcex", level=0), 6), [Fails(1007)]),
    Row("8.1-binary-need-not-be-compressed", packed(BAD_TEXT), [BAD_TEXT]),
    Row("8.1-reason-not-utf-8-within-a-compressed-message",
        frame(TEXT, HELLO[:3], rsv=4, fin=False) + close(1000, b"\xff"), [Fails(1007)]),
    # limits: the message as inflated
    Row("limit-compressed", packed("x" * 70_000), ["x" * 70_000]),
    Row("limit-compressed-and-one", packed("x" * 70_001), [Fails(1009)]),
    Row("limit-compressed-fragments",
        packed_in_parts(BINARY, deflated(bytes(70_000)), 9, 30), [bytes(70_000)]),
    Row("limit-compressed-fragments-and-one",
        packed_in_parts(BINARY, deflated(bytes(70_001)), 9, 30), [Fails(1009)]),
    Row("limit-bomb", packed("good") + packed(bytes(10**7)), ["good", Fails(1009)]),
    Row("limit-yields-to-invalid-text-in-front",
        frame(TEXT, deflated(b"x" * 69_999 + b"\xff" * 9), rsv=4), [Fails(1007)]),
    Row("limit-comes-before-invalid-text-behind",
        frame(TEXT, deflated(b"x" * 70_001 + b"\xff" * 9), rsv=4), [Fails(1009)]),
    Row("limit-within-a-character", packed("x" * 69_999 + "€" * 9), [Fails(1009)]),
    Row("limit-compressed-is-for-each-message",
        packed("x" * 60_000) + packed_in_parts(BINARY, deflated(bytes(60_000)), 5) + packed("y"),
        ["x" * 60_000, bytes(60_000), "y"]),
    Row("limit-of-what-comes", frame(BINARY, length=140_065, rsv=4), [Fails(1009)]),
    Row("limit-of-what-comes-in-fragments",
        frame(BINARY, HELLO[:5], rsv=4, fin=False) + frame(CONT, length=140_060), [Fails(1009)]),
    Row("limit-of-what-comes-yields-to-no-mask",
        frame(BINARY, length=140_065, rsv=4, key=None), [Fails(1002)]),
    Row("limit-fragments-compressed", packed_in_parts(TEXT, HELLO, *[1] * 6), [Fails(1009)]),
]  # fmt: skip


@EITHER
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name)
        for row in (*COMPRESSED_ROWS, *ROWS[::3])
        if not row.name.startswith("5.2-reserved-bits-100-on-")  # which was agreed on
    ],
)
def test_compressed_bytes_become_events_however_they_are_split(
    row: Row, agreement: Agreement
) -> None:
    """Also in their words; what is not compressed means what it means without compression."""
    whole, sent = run([row.data], agreement=agreement)
    assert (plain(whole), sent) == (row.events, row.sent)
    for chunks in chunkings(row.data):
        assert run(chunks, agreement=agreement) == (whole, sent)


def test_what_cannot_be_compressed_may_come_in_more_bytes_than_it_is() -> None:
    """The limit is one of messages; sync flushes and stored blocks take room as well."""
    conn = Connection(LIMITS, now=NOW, agreement=ALONE)
    assert feed(conn, [frame(BINARY, length=140_064, rsv=4)]) == ([], [])
    noise = bytes(i * i % 251 for i in range(70_000))
    stored = packed(noise, how={"level": 0})
    assert len(stored) > 70_014
    for chunks in chunkings(stored):
        assert run(chunks, agreement=ALONE)[0] == [noise]


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("size", [65535, 65536])
def test_a_large_frame_may_come_byte_by_byte(opcode: int, size: int) -> None:
    conn = Connection(LIMITS, now=NOW)
    events: list[Event] = []
    for chunk in byte_by_byte(frame(opcode, b"x" * size) + text("next")):
        events += conn.receive_data(chunk, NOW)
    assert events == [b"x" * size if opcode == BINARY else "x" * size, "next"]


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name) for row in ROWS if len(row.data) < 1000]
)
def test_what_follows_changes_nothing_about_it(row: Row) -> None:
    """Behind a close frame or a failure it is not looked at; else it is heard as well."""
    whole, sent = run([row.data])
    over = bool(whole) and isinstance(whole[-1], (PeerClosed, Failed))
    trailing = text("behind") + frame(PING, b"behind")
    for chunks in chunkings(row.data + trailing):
        assert run(chunks) == (
            (whole, sent) if over else ([*whole, "behind"], [*sent, pong(b"behind")])
        )


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name) for row in ROWS if len(row.data) < 1000]
)
def test_the_end_of_the_stream_is_told_unless_the_end_was_told_before(row: Row) -> None:
    conn = Connection(LIMITS, now=NOW)
    events, _ = feed(conn, byte_by_byte(row.data))
    over = bool(events) and isinstance(events[-1], (PeerClosed, Failed))
    assert conn.receive_data(b"", NOW) == ([] if over else [PeerLost()])
    assert conn.receive_data(b"", NOW) == []
    assert conn.receive_data(text("a"), NOW) == []
    assert conn.close_received
    assert conn.next_deadline() == inf
    check_held(conn, LIMITS)


# 8.1: text that is not UTF-8 is noticed at once


@pytest.mark.parametrize(
    "front",
    [
        pytest.param(frame(TEXT, BAD_TEXT, length=20), id="8.1-within-a-frame"),
        pytest.param(
            frame(TEXT, b"x" * 300 + b"\xff", length=70_000), id="8.1-within-a-large-frame"
        ),
        pytest.param(frame(TEXT, BAD_TEXT, fin=False), id="8.1-within-a-message"),
        pytest.param(
            frame(TEXT, b"ab", fin=False) + frame(CONT, b"\xff", length=20), id="8.1-in-a-fragment"
        ),
        pytest.param(
            frame(TEXT, b"\xce", fin=False) + frame(PING) + frame(CONT, b"x", length=9),
            id="8.1-character-broken-off-by-a-fragment",
        ),
    ],
)
def test_invalid_text_fails_before_its_frame_or_message_is_complete(front: bytes) -> None:
    for chunks in chunkings(front):
        assert plain(run(chunks)[0]) == [Fails(1007)]


@pytest.mark.parametrize(
    ("data", "needed"),
    [
        pytest.param(frame(BINARY, length=2**62), 10, id="5.2-binary"),
        pytest.param(frame(TEXT, length=70_001), 10, id="5.2-text"),
        pytest.param(frame(TEXT, b"a" * 10, fin=False) + frame(CONT, length=69_991), 26, id="5.4"),
    ],
)
def test_a_message_above_the_limit_is_refused_when_its_length_is_known(
    data: bytes, needed: int
) -> None:
    assert plain(run([data[: needed - 1]])[0]) == []
    assert plain(run([data[:needed]])[0]) == [Fails(1009)]


@pytest.mark.parametrize("limit", [1, 5, 124, 125, 126])
def test_a_small_limit_holds_for_small_messages(limit: int) -> None:
    data = text("a" * limit) + frame(BINARY, bytes(limit)) + text("a" * (limit + 1)) + PADDING
    for chunks in chunkings(data):
        events, _ = run(chunks, Limits(message=limit))
        assert plain(events) == ["a" * limit, bytes(limit), Fails(1009)]


@pytest.mark.parametrize("limit", [1, 124, 125, 126, 65_535, 65_536])
def test_no_limit_has_messages_below_it_go_through_wsproto(limit: int) -> None:
    conn = Connection(Limits(message=limit))
    assert conn.receive_data(text("a" * limit) + text(""), NOW) == ["a" * limit, ""]
    assert conn._wsproto is None


# Words


@pytest.mark.parametrize(
    ("data", "event"),
    [
        (text("x" * 70_001), Failed(1009, "message above 70000 bytes (Limits.message)")),
        (
            frame(TEXT, fin=False) + frame(CONT, fin=False) * 6,
            Failed(1009, "message in more than 6 fragments (Limits.fragments)"),
        ),
        (frame(TEXT, b"\xff"), Failed(1007, "invalid UTF-8")),
        (close(1000, b"\xff"), Failed(1007, "invalid UTF-8")),
        (close(1014, b"\xff"), Failed(1007, "invalid UTF-8")),
        (text("a", key=None), Failed(1002, "server received unexpected unmasked frame")),
        (frame(CONT, b"a"), Failed(1002, "unexpected CONTINUATION")),
    ],
)
@pytest.mark.parametrize("agreement", [None, ALONE], ids=["plain", "compression"])
def test_a_failure_says_what_was_wrong(
    data: bytes, event: Failed, agreement: Agreement | None
) -> None:
    assert run([data], agreement=agreement)[0] == [event]


@pytest.mark.parametrize(
    ("data", "event"),
    [
        (packed("x" * 70_001), Failed(1009, "message above 70000 bytes (Limits.message)")),
        (
            frame(BINARY, length=140_065, rsv=4),
            Failed(1009, "message above 70000 bytes (Limits.message)"),
        ),
        (frame(BINARY, b"\xff\xff", rsv=4), Failed(1007, "invalid UTF-8 or compressed data")),
        (
            frame(TEXT, deflated(b"\xff"), rsv=4),
            Failed(1007, "invalid UTF-8 or compressed data"),
        ),
        (frame(CONT, HELLO, rsv=4), Failed(1002, "Reserved bit set unexpectedly")),
    ],
)
def test_a_failure_of_what_is_compressed_says_what_was_wrong(data: bytes, event: Failed) -> None:
    for chunks in ([data], byte_by_byte(data)):
        assert run(chunks, agreement=TAKEOVER)[0] == [event]


def test_every_reason_fits_into_a_close_frame() -> None:
    for row in ROWS:
        for event in run([row.data])[0]:
            if isinstance(event, Failed):
                assert 0 < len(event.reason.encode()) <= 123


# Memory


def held(conn: Connection) -> int:
    """Bytes that have come of a message, with what holds them."""
    if conn._partial is None:
        return conn._chunks.__sizeof__()
    chunks = conn._partial._chunks
    return chunks.__sizeof__() + sum(map(sys.getsizeof, chunks))


@pytest.mark.parametrize("agreement", [None, ALONE], ids=["plain", "compressed"])
def test_empty_fragments_cost_no_memory(agreement: Agreement | None) -> None:
    limits = Limits(fragments=10**6)
    conn = Connection(limits, now=NOW, agreement=agreement)
    data = b"xy" if agreement is None else deflated(b"xy")
    feed(conn, [frame(BINARY, data[:-1], rsv=0 if agreement is None else 4, fin=False)], limits)
    before = held(conn)
    assert before > 0
    feed(conn, [frame(CONT, fin=False) * 10_000], limits)
    assert held(conn) == before
    assert feed(conn, [frame(CONT, data[-1:])], limits)[0] == [b"xy"]


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("fin", [True, False], ids=["one-frame", "fragment"])
def test_a_message_in_tiny_reads_costs_little_more_than_its_bytes(opcode: int, fin: bool) -> None:
    limits = Limits(message=100_000)
    conn = Connection(limits, now=NOW)
    data = frame(opcode, b"xy" * 50_000, fin=fin)
    feed(conn, by_size(data[:-1], cycle([20, *[2] * 1000])), limits)
    assert conn._partial is not None
    assert 99_000 <= sum(map(len, conn._partial._chunks)) <= 100_000
    assert held(conn) < 200_000  # a byte each, and room to grow


def test_a_character_of_four_bytes_does_not_make_the_others_as_large() -> None:
    """A few compressed bytes would hold four times Limits.message."""
    limits = Limits(message=100_000)
    message = "😀\r\n" + "a" * 90_000
    payload = deflated(message.encode())
    conn = Connection(limits, now=NOW, agreement=ALONE)
    feed(conn, [frame(TEXT, payload, rsv=4, fin=False)], limits)
    assert conn._chunks is not None
    assert conn._chunks.tell() >= 90_000
    assert conn._chunks.__sizeof__() < 200_000
    assert feed(conn, [frame(CONT)], limits)[0] == [message]


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(frame(3, b"x"), id="wsproto-fails"),
        pytest.param(frame(BINARY, length=2**62), id="limit"),
        pytest.param(frame(TEXT, b"\xff", length=1000), id="in-the-middle-of-a-frame"),
        pytest.param(close(1000), id="close"),
        pytest.param(close(1014), id="close-1014"),
    ],
)
def test_nothing_is_parsed_or_kept_after_the_end(bad: bytes) -> None:
    conn = Connection(LIMITS, now=NOW)
    events, _ = feed(conn, [frame(TEXT, b"a", fin=False), bad])
    assert len(events) == 1
    wsproto_holds = held_by_wsproto(conn)
    for _ in range(50):
        assert feed(conn, [text("more"), frame(PING, b"more"), bytes(1000), bad]) == ([], [])
    assert held_by_wsproto(conn) == wsproto_holds
    assert conn.handle_timeout(1e9) == []
    assert conn.data_to_send() == []
    assert conn.next_deadline() == inf


@pytest.mark.parametrize("data", [close(1000), close(4999, b"reason"), frame(CLOSE, b"")])
def test_a_flawless_close_makes_no_wsproto_connection(data: bytes) -> None:
    conn = Connection(LIMITS, now=NOW)
    (event,), _ = feed(conn, [data])
    assert isinstance(event, PeerClosed)
    assert conn._wsproto is None


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize(("size", "header"), [(5, 6), (125, 6), (126, 8), (65535, 8), (65536, 14)])
def test_a_frame_that_comes_in_two_reads_makes_no_wsproto_connection(
    opcode: int, size: int, header: int
) -> None:
    payload = b"x" * (size - 5) + "\u00e4\u20ac".encode()
    expected = payload.decode() if opcode == TEXT else payload
    data = frame(opcode, payload)
    for cut in {*range(1, 20), *range(len(data) - 5, len(data))} & set(range(len(data))):
        conn = Connection(LIMITS, now=NOW)
        feed(conn, [data[:cut]])
        assert (conn._partial is not None) == (cut >= header)
        assert feed(conn, [data[cut:] + text("next")])[0] == [expected, "next"]
        assert conn._wsproto is None


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_flawless_fragments_make_no_wsproto_connection(opcode: int) -> None:
    payload = ("x" * 300 + "\u00e4\u20ac\U0001f600").encode()
    for cut in range(len(payload) - 10, len(payload) + 1):
        pieces = payload[:1], b"", payload[1:cut], payload[cut:]
        data = frame(opcode, pieces[0], fin=False)
        data += frame(CONT, pieces[1], fin=False) + frame(PING, b"between")
        data += frame(CONT, pieces[2], fin=False) + frame(CONT, pieces[3]) + text("next")
        expected = payload.decode() if opcode == TEXT else payload
        for chunks in chunkings(data):
            conn = Connection(LIMITS, now=NOW)
            assert feed(conn, chunks) == ([expected, "next"], [pong(b"between")])
            assert conn._wsproto is None


@pytest.mark.parametrize("begun", [frame(TEXT, b"a", fin=False), frame(BINARY, fin=False)])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (frame(TEXT, b"b"), "expected CONTINUATION, got <Opcode.TEXT: 1>"),
        (frame(BINARY, fin=False), "expected CONTINUATION, got <Opcode.BINARY: 2>"),
        (frame(CONT, b"b", rsv=4), "Reserved bit set unexpectedly"),
        (frame(PING, b"b", fin=False), "Invalid attempt to fragment control frame"),
        (b"\x80\x01b", "unexpected unmasked frame"),
        (frame(3, b"b"), "Invalid opcode 0x3"),
    ],
)
def test_what_is_wrong_within_a_message_is_said_by_wsproto(
    begun: bytes, bad: bytes, reason: str
) -> None:
    for chunks in chunkings(begun + bad):
        (event,), _ = run(chunks)
        assert isinstance(event, Failed)
        assert event.code == 1002
        assert reason in event.reason


def test_an_unmasked_or_oddly_long_frame_that_comes_in_two_reads_fails() -> None:
    for front in (
        b"\x81\x09" + b"x" * 8,
        b"\x82\x7e\x01\x2c" + b"x" * 299,
        b"\x82\xfe\x00\x7d" + b"key!" + b"x",  # 125 in two bytes (5.2)
        b"\x81\xff" + (65535).to_bytes(8, "big") + b"key!" + b"x",
    ):
        for chunks in chunkings(front):
            assert plain(run(chunks)[0]) == [Fails(1002)]


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_what_is_missing_of_a_frame_is_known(opcode: int) -> None:
    conn = Connection(LIMITS, now=NOW)
    data = frame(opcode, bytes(70_000))
    assert conn.missing == 0
    feed(conn, [data[:13]])  # without all of its key
    assert conn.missing == 0
    feed(conn, [data[13:20]])
    assert conn.missing == 70_000 - 6
    feed(conn, [data[20:], data[:20]])
    assert conn.missing == 70_000 - 6
    feed(conn, [data[20:-1]])
    assert conn.missing == 1
    first = frame(opcode, bytes(60_000), fin=False)
    feed(conn, [data[-1:] + first[:-2]])
    assert conn.missing == 2
    feed(conn, [first[-2:]])
    assert conn.missing == 0
    feed(conn, [frame(CONT, bytes(5))[:-1]])
    assert conn.missing == 1


def test_nothing_is_missing_after_the_end() -> None:
    conn = Connection(LIMITS, now=NOW)
    feed(conn, [frame(BINARY, bytes(70_000))[:-1]])
    assert conn.missing == 1
    assert conn.receive_data(b"", NOW) == [PeerLost()]
    assert conn.missing == 0


# Steps: no read keeps the others waiting


READ = 64 * 1024


def full(unit: bytes) -> bytes:
    """A read of as many as fit."""
    return unit * (READ // len(unit))


FLOODS = [
    pytest.param(full(frame(PING)), 80, id="5.5.2-pings"),
    pytest.param(full(frame(PONG, b"?")), 70, id="5.5.3-pongs"),
    pytest.param(full(frame(TEXT, fin=False) + frame(CONT)), 80, id="5.4-empty-fragments"),
    pytest.param(
        frame(BINARY, fin=False) + full(frame(CONT, fin=False)), 80, id="5.4-one-message-in-many"
    ),
    pytest.param(full(text("")), 10, id="empty-messages"),
    pytest.param(full(text("a") + frame(PING)), 35, id="messages-and-pings"),
    pytest.param(full(frame(TEXT, EMPTY, rsv=4)), 15, id="7692-empty-messages"),
    pytest.param(full(packed(b"bomb" * 25_000)), 50, id="7692-bombs"),
    pytest.param(full(packed_in_parts(BINARY, deflated(bytes(10**5)), 9)), 50, id="7692-in-parts"),
    pytest.param(
        full(frame(BINARY, b"\x03\x00" * 99 + EMPTY, rsv=4)), 50, id="7692-7.2.3.4-final-blocks"
    ),
]
STEP_LIMITS = Limits(message=10**5)


def in_steps(conn: Connection, data: bytes) -> Iterator[tuple[list[Event], list[bytes]]]:
    events = conn.receive_data(data, NOW)
    while True:
        yield events, conn.data_to_send()
        if not conn.has_more:
            return
        events = conn.receive_more(NOW)


@pytest.mark.parametrize(("flood", "least"), FLOODS)
def test_a_read_of_many_is_taken_in_steps_of_some(flood: bytes, least: int) -> None:
    conn = Connection(STEP_LIMITS, now=NOW, agreement=TAKEOVER)
    events: list[Event] = []
    sent: list[bytes] = []
    steps = 0
    for happened, due in in_steps(conn, flood):
        assert len(happened) < 2 * STEP_MESSAGES
        assert len(due) <= STEP_FRAMES
        assert conn.inflated < STEP_INFLATED + 2 * STEP_LIMITS.message
        events += happened
        sent += due
        steps += 1
    assert steps >= least
    # the same as in reads so small that a step takes them whole
    pieces = Connection(STEP_LIMITS, now=NOW, agreement=TAKEOVER)
    expected: tuple[list[Event], list[bytes]] = ([], [])
    for chunk in by_size(flood, cycle([150])):
        expected[0].extend(pieces.receive_data(chunk, NOW))
        expected[1].extend(pieces.data_to_send())
        assert not pieces.has_more
    assert (events, sent) == expected
    assert not any(isinstance(event, Failed) for event in events)


def test_a_read_of_large_messages_is_taken_at_once() -> None:
    conn = Connection(LIMITS, now=NOW)
    assert conn.receive_data(frame(BINARY, bytes(60_000)) + text("a"), NOW) == [bytes(60_000), "a"]
    assert not conn.has_more
    assert conn.inflated == 0
    assert conn.receive_more(NOW) == []


def test_what_is_inflated_is_told_for_each_step() -> None:
    conn = Connection(LIMITS, now=NOW, agreement=ALONE)
    conn.receive_data(packed(bytes(5000)), NOW)
    assert 5000 < conn.inflated < 10_000
    conn.receive_data(packed_in_parts(BINARY, deflated(bytes(300)), 3), NOW)
    assert 300 < conn.inflated < 5000
    conn.receive_data(text("a"), NOW)
    assert conn.inflated == 0


@pytest.mark.parametrize("flood", [full(frame(PING)), full(text(""))], ids=["frames", "messages"])
@pytest.mark.parametrize(
    ("last", "event"),
    [
        (close(1000, b"bye"), PeerClosed(1000, "bye")),
        (frame(3), Failed(1002, "Invalid opcode 0x3")),
        (frame(PING) + close(1014), PeerClosed(1014, "")),
    ],
)
def test_the_end_in_the_last_step_is_found(flood: bytes, last: bytes, event: Event) -> None:
    conn = Connection(LIMITS, now=NOW)
    *before, (events, _) = in_steps(conn, flood + last + text("late"))
    assert len(before) > 5
    assert events[-1] == event
    assert not any(isinstance(each, (PeerClosed, Failed)) for step, _ in before for each in step)
    assert conn.close_received
    assert not conn.has_more
    assert conn.receive_more(NOW) == []


def test_more_may_be_read_before_the_rest_was_taken() -> None:
    conn = Connection(LIMITS, now=NOW)
    flood = full(text(""))
    events = conn.receive_data(flood + text("behind")[:5], NOW)
    assert conn.has_more
    events += conn.receive_data(text("behind")[5:], NOW)
    while conn.has_more:
        events += conn.receive_more(NOW)
    assert events == [""] * (len(flood) // 6) + ["behind"]


def test_the_end_of_the_stream_may_come_before_the_rest_was_taken() -> None:
    """Whoever wants the rest takes it first."""
    conn = Connection(LIMITS, now=NOW)
    conn.receive_data(full(frame(PING)) + close(1000), NOW)
    assert conn.has_more
    assert conn.receive_data(b"", NOW) == [PeerLost()]
    assert not conn.has_more
    assert conn.receive_more(NOW) == []
    check_held(conn, LIMITS)


def test_our_close_may_come_before_the_rest_was_taken() -> None:
    conn = Connection(LIMITS, now=NOW)
    conn.receive_data(full(frame(PING) + text("a")) + close(1001), NOW)
    assert conn.has_more
    conn.close(1000)
    events, steps = [], 0
    while conn.has_more:
        events += conn.receive_more(NOW)
        assert conn.data_to_send() == []
        steps += 1
    assert events == [PeerClosed(1001, "")]
    assert steps > 5


def test_the_rest_of_a_read_is_no_message_that_takes_long() -> None:
    conn = slow()
    conn.receive_data(full(frame(PING)), NOW)
    while conn.has_more:
        assert conn.next_deadline() == inf
        conn.receive_more(NOW + 100)
    assert conn.next_deadline() == inf


def test_a_message_begun_by_the_rest_of_a_read_takes_from_then_on() -> None:
    conn = slow()
    conn.receive_data(full(frame(PING)) + text("hello")[:5], NOW)
    while conn.has_more:
        assert conn.next_deadline() == inf
        conn.receive_more(NOW + 100)
    assert conn.next_deadline() == NOW + 160


def test_a_message_that_takes_many_steps_is_timed_from_its_first() -> None:
    conn = slow()
    conn.receive_data(frame(BINARY, fin=False) + full(frame(CONT, fin=False)), NOW)
    while conn.has_more:
        assert conn.next_deadline() == NOW + 60
        conn.receive_more(NOW + 30)
    assert conn.next_deadline() == NOW + 60


def test_the_rate_is_held_against_all_steps() -> None:
    conn = Connection(Limits(message_rate=200.0), now=NOW)
    steps = [events for events, _ in in_steps(conn, full(text("")))]
    assert [len(events) for events in steps] == [STEP_MESSAGES, 2000 - STEP_MESSAGES + 1]
    assert plain(steps[-1][-1:]) == [Fails(1008)]
    assert not conn.has_more


# Time: messages


def slow(limits: Limits | None = None) -> Connection:
    return Connection(limits or Limits(message_time=60.0), now=NOW)


@pytest.mark.parametrize(
    ("data", "cut"),
    [
        pytest.param(text("hello"), 2, id="5.2-header"),
        pytest.param(text("hello"), 4, id="5.3-key"),
        pytest.param(text("hello"), 8, id="payload"),
        pytest.param(frame(BINARY, bytes(66_000)), 9, id="long-header"),
        pytest.param(frame(BINARY, bytes(66_000)), 20, id="collected"),
        pytest.param(
            frame(TEXT, b"a", fin=False) + frame(CONT, b"b"), 7, id="5.4-between-fragments"
        ),
        pytest.param(frame(TEXT, b"a", fin=False) + frame(CONT, b"b"), 9, id="5.4-second-header"),
        pytest.param(frame(PING, b"hello"), 8, id="5.5-control-frame"),
    ],
)
def test_a_message_that_drips_fails_in_time_and_not_before(data: bytes, cut: int) -> None:
    conn = slow()
    assert conn.next_deadline() == inf
    assert conn.receive_data(data[:1], NOW) == []
    assert conn.receive_data(data[1:cut], NOW + 59) == []
    assert conn.next_deadline() == NOW + 60
    assert conn.handle_timeout(NOW + 59.9) == []
    assert conn.handle_timeout(NOW + 60) == [
        Failed(1008, "message took longer than 60 s (Limits.message_time)")
    ]
    assert conn.receive_data(data[cut:], NOW + 60) == []
    assert conn.data_to_send() == []


def test_a_message_that_comes_in_time_stops_the_watch() -> None:
    for data in (
        text("a"),
        frame(BINARY, bytes(66_000)),
        frame(PING),
        frame(TEXT, fin=False) + frame(CONT),
    ):
        conn = slow()
        conn.receive_data(data[:15] if len(data) > 100 else data[:3], NOW)
        assert conn.next_deadline() == NOW + 60
        conn.receive_data(data[15:] if len(data) > 100 else data[3:], NOW + 59)
        assert conn.next_deadline() == inf
        assert conn.handle_timeout(NOW + 1000) == []


@pytest.mark.parametrize(
    "unit",
    [
        pytest.param(text("hello"), id="text"),
        pytest.param(frame(BINARY, bytes(300)), id="binary"),
        pytest.param(frame(BINARY, bytes(66_000)), id="collected"),
        pytest.param(frame(TEXT, b"a", fin=False) + frame(CONT, b"b"), id="5.4-fragments"),
        pytest.param(frame(PING, b"p"), id="5.5.2-pings"),
        pytest.param(frame(PONG, b"p") + frame(PING), id="5.5.3-pongs"),
        pytest.param(text("a") + frame(PING), id="mixed"),
    ],
)
def test_a_steady_stream_whose_every_read_ends_within_a_message_does_not_fail(unit: bytes) -> None:
    """Not one message takes long, though at no read's end is there none in progress."""
    cut = len(unit) - 1
    conn = slow()
    conn.receive_data(unit[:cut], NOW)
    for second in range(1, 200):
        now = NOW + second
        events = conn.receive_data(unit[cut:] + unit[:cut], now)
        assert not any(isinstance(event, Failed) for event in events)
        assert conn.handle_timeout(now + 0.5) == []
        assert conn.next_deadline() == now + 60


def test_control_frames_do_not_excuse_a_message_that_drips() -> None:
    conn = slow()
    conn.receive_data(frame(TEXT, b"a", fin=False), NOW)
    for second in range(1, 60):
        conn.receive_data(frame(PING) + frame(CONT, b"x", fin=False), NOW + second)
    assert plain(conn.handle_timeout(NOW + 60)) == [Fails(1008)]


def test_time_in_which_we_did_not_read_does_not_count() -> None:
    conn = slow()
    conn.receive_data(text("hello")[:5], NOW)
    assert conn.handle_timeout(NOW + 60, reading=False) == []
    assert conn.next_deadline() == NOW + 120
    assert conn.handle_timeout(NOW + 119) == []
    assert plain(conn.handle_timeout(NOW + 120)) == [Fails(1008)]


# Time: rate


def test_a_message_beyond_the_rate_fails_and_those_before_it_are_delivered() -> None:
    limits = Limits(message_rate=2.0)
    for chunks in chunkings(text("a") * 21 + text("b") + close(1000)):
        events, _ = run(chunks, limits)
        assert events == ["a"] * 20 + [
            Failed(1008, "more than 2 messages a second (Limits.message_rate)")
        ]
    for chunks in chunkings(text("a") * 20 + close(1000)):
        assert run(chunks, limits) == (["a"] * 20 + [PeerClosed(1000, "")], [])


def test_the_rate_is_averaged_over_ten_seconds() -> None:
    conn = Connection(Limits(message_rate=2.0), now=NOW)
    assert conn.receive_data(text("a") * 20, NOW) == ["a"] * 20
    assert conn.receive_data(text("b") * 2, NOW + 1) == ["b"] * 2
    assert conn.receive_data(text("c") * 20, NOW + 1000) == ["c"] * 20  # no more is saved up
    assert plain(conn.receive_data(text("d") * 2, NOW + 1000.5)) == ["d", Fails(1008)]
    assert conn.close_received


def test_the_rate_counts_messages_not_frames() -> None:
    conn = Connection(Limits(message_rate=0.1), now=NOW)
    control = frame(PING) * 50 + frame(PONG) * 50
    assert conn.receive_data(control, NOW) == []
    assert conn.receive_data(frame(TEXT, b"a", fin=False) + frame(CONT, b"b"), NOW) == ["ab"]
    assert plain(conn.receive_data(frame(BINARY), NOW + 9.9)) == [Fails(1008)]


def test_a_rate_below_one_in_ten_seconds_still_allows_a_message() -> None:
    conn = Connection(Limits(message_rate=0.01), now=NOW)
    assert conn.receive_data(text("a"), NOW) == ["a"]
    assert conn.receive_data(text("b"), NOW + 100) == ["b"]
    assert plain(conn.receive_data(text("c"), NOW + 150)) == [Fails(1008)]


# Time: keepalive


@pytest.mark.parametrize("agreement", [None, ALONE], ids=["plain", "compression"])
def test_a_step_says_whether_it_found_messages_only(agreement: Agreement | None) -> None:
    conn = Connection(LIMITS, (20.0, 10.0), now=NOW, agreement=agreement)
    parts = frame(TEXT, b"a", fin=False) + frame(CONT, b"b")

    def only_messages(data: bytes) -> bool:
        conn.receive_data(data, NOW)
        conn.data_to_send()
        return conn.only_messages

    assert only_messages(text("a") + frame(PONG, b"?"))
    assert not only_messages(text("a") + frame(PONG, pinged(conn, NOW + 20)) + text("b"))
    assert only_messages(text("a"))
    assert not only_messages(frame(PONG, pinged(conn, NOW + 20)))
    assert only_messages(parts + text("b")[:3])
    assert only_messages(text("b")[3:] + parts)
    assert not only_messages(text("b")[:3])
    assert not only_messages(text("b")[3:] + frame(PING))
    assert not only_messages(text("a") + close(1000))


def pinged(conn: Connection, now: float) -> bytes:
    """Let a ping fall due; its payload."""
    assert conn.handle_timeout(now) == []
    (ping,) = conn.data_to_send()
    assert ping[0] == 0x80 | PING
    assert ping[1] == len(ping) - 2 <= 125
    return ping[2:]


def test_a_silent_peer_is_pinged_then_given_up() -> None:
    conn = Connection(LIMITS, (20.0, 10.0), now=NOW)
    assert conn.next_deadline() == NOW + 20
    assert conn.handle_timeout(NOW + 19.9) == []
    assert conn.data_to_send() == []
    pinged(conn, NOW + 20)
    assert conn.next_deadline() == NOW + 30
    assert conn.handle_timeout(NOW + 29.9) == []
    assert conn.data_to_send() == []
    assert conn.handle_timeout(NOW + 30) == [Failed(1011, "keepalive: no answer to a ping")]
    assert conn.close_received
    assert conn.next_deadline() == inf
    assert conn.handle_timeout(NOW + 60) == []


def test_any_byte_is_life() -> None:
    conn = Connection(LIMITS, (20.0, 10.0), now=NOW)
    pinged(conn, NOW + 20)
    assert conn.receive_data(text("a"), NOW + 29) == ["a"]
    assert conn.next_deadline() == NOW + 49
    assert conn.receive_data(b"\x81", NOW + 30) == []
    assert conn.next_deadline() == NOW + 50


def test_without_keepalive_silence_is_fine() -> None:
    conn = Connection(LIMITS, now=NOW)
    assert conn.next_deadline() == inf
    assert conn.handle_timeout(1e12) == []
    assert conn.data_to_send() == []


def test_silence_while_we_do_not_read_proves_nothing() -> None:
    conn = Connection(LIMITS, (20.0, 10.0), now=NOW)
    # A ping goes out nevertheless: what the machine of a client that is gone answers to it is seen.
    assert conn.handle_timeout(NOW + 19, reading=False) == []
    assert conn.data_to_send() == []
    assert conn.handle_timeout(NOW + 20, reading=False) == []
    assert len(conn.data_to_send()) == 1
    assert conn.handle_timeout(NOW + 39, reading=False) == []
    assert conn.data_to_send() == []
    assert conn.handle_timeout(NOW + 40, reading=False) == []
    assert len(conn.data_to_send()) == 1
    assert conn.handle_timeout(NOW + 50, reading=False) == []
    assert conn.handle_timeout(NOW + 59.9) == []
    assert plain(conn.handle_timeout(NOW + 60)) == [Fails(1011)]


def test_the_first_answer_to_our_newest_ping_tells_how_long_the_way_is() -> None:
    conn = Connection(LIMITS, (20.0, 10.0), now=NOW)
    payload = pinged(conn, NOW + 20)
    answer = frame(PONG, payload)
    for chunk in byte_by_byte(answer[:-1]):
        assert conn.receive_data(chunk, NOW + 20.25) == []
    assert conn.receive_data(answer[-1:], NOW + 20.25) == [PongReceived(NOW + 20)]
    assert conn.receive_data(answer, NOW + 21) == []  # the same once more: how long says nothing
    newer = pinged(conn, NOW + 41)
    assert newer != payload
    assert conn.receive_data(answer, NOW + 42) == []
    assert conn.receive_data(text("a") + frame(PONG, newer) + text("b"), NOW + 43) == [
        "a",
        PongReceived(NOW + 41),
        "b",
    ]


@pytest.mark.parametrize(
    "payload", [b"", b"1", b"nan", b"inf", b"1 nan", b"0x0p+0", b"\xff\xfe", b"0x1.0p+2000"]
)
def test_no_pong_of_the_peers_own_making_is_believed(payload: bytes) -> None:
    conn = Connection(LIMITS, (20.0, 10.0), now=NOW)
    assert conn.receive_data(frame(PONG, payload), NOW) == []
    pinged(conn, NOW + 20)
    assert conn.receive_data(frame(PONG, payload), NOW + 21) == []


def test_a_clock_of_whole_seconds_will_do() -> None:
    conn = Connection(LIMITS, (20, 10), now=1000)
    payload = pinged(conn, 1020)
    assert conn.receive_data(frame(PONG, payload), 1021) == [PongReceived(1020)]


def test_the_earlier_deadline_counts() -> None:
    conn = Connection(Limits(message_time=5.0), (20.0, 10.0), now=NOW)
    conn.receive_data(b"\x81", NOW + 1)
    assert conn.next_deadline() == NOW + 6
    conn = Connection(Limits(message_time=50.0), (20.0, 10.0), now=NOW)
    conn.receive_data(b"\x81", NOW + 1)
    assert conn.next_deadline() == NOW + 21


# Closing


def test_close_returns_its_frame_once() -> None:
    conn = Connection(LIMITS, (20.0, 10.0), now=NOW)
    assert (conn.close_sent, conn.close_received) == (False, False)
    assert conn.close(1001, "bye") == b"\x88\x05\x03\xe9bye"
    assert conn.close(1000) == b""
    assert (conn.close_sent, conn.close_received) == (True, False)
    assert conn.next_deadline() == inf
    assert conn.handle_timeout(1e9) == []
    assert conn.data_to_send() == []


@pytest.mark.parametrize(
    ("code", "reason", "data"),
    [
        pytest.param(1000, "", b"\x88\x02\x03\xe8", id="5.5.1"),
        pytest.param(1005, "", b"\x88\x00", id="7.1.5-no-code"),
        pytest.param(1014, "x", b"\x88\x03\x03\xf6x", id="7.4-1014"),
        pytest.param(4999, "x" * 200, b"\x88\x7d\x13\x87" + b"x" * 123, id="5.5-cut"),
    ],
)
def test_close_frames(code: int, reason: str, data: bytes) -> None:
    assert Connection(LIMITS, now=NOW).close(code, reason) == data


@pytest.mark.parametrize("data", [close(1001, b"bye"), close(1014, b"bye"), frame(CLOSE)])
def test_a_close_frame_is_answered(data: bytes) -> None:
    conn = Connection(LIMITS, now=NOW)
    ((event,), _) = feed(conn, [data])
    assert isinstance(event, PeerClosed)
    assert conn.close_received
    assert not conn.close_sent
    assert conn.close(event.code) == b"\x88" + (
        b"\x00" if event.code == 1005 else b"\x02" + event.code.to_bytes(2, "big")
    )
    assert feed(conn, [text("late"), close(1000)]) == ([], [])
    assert conn.receive_data(b"", NOW) == []


IN_FLIGHT = [
    pytest.param(b"", id="nothing"),
    pytest.param(text("a") * 3 + frame(BINARY, bytes(300)), id="messages"),
    pytest.param(frame(BINARY, bytes(66_000)), id="large"),
    pytest.param(frame(TEXT, b"a", fin=False), id="5.4-an-unfinished-message"),
    pytest.param(frame(PING, b"1") + frame(PONG), id="5.5.2-pings"),
]


@pytest.mark.parametrize("in_flight", IN_FLIGHT)
@pytest.mark.parametrize("code", [1000, 1014])
def test_after_our_close_only_the_peers_is_looked_for(in_flight: bytes, code: int) -> None:
    data = in_flight + close(code, b"bye") + text("late")
    for chunks in chunkings(data):
        conn = Connection(LIMITS, now=NOW)
        conn.close(1000)
        assert feed(conn, chunks) == ([PeerClosed(code, "bye")], [])
        assert conn.close_received
        assert conn.receive_data(b"", NOW) == []


@pytest.mark.parametrize("in_flight", IN_FLIGHT)
def test_our_close_may_come_in_the_middle_of_anything(in_flight: bytes) -> None:
    data = in_flight + close(1000)
    for cut in {*range(min(len(data), 30)), *range(max(0, len(data) - 30), len(data))}:
        conn = Connection(LIMITS, now=NOW)
        before, _ = feed(conn, [data[:cut]])
        assert not any(isinstance(event, (PeerClosed, Failed)) for event in before)
        conn.close(1001)
        assert feed(conn, byte_by_byte(data[cut:][:40])) == (
            ([PeerClosed(1000, "")], []) if len(data) - cut <= 40 else ([], [])
        )


def test_pings_that_came_with_our_close_are_not_answered() -> None:
    """5.5.1: after a close frame nothing more is sent."""
    conn = Connection(LIMITS, now=NOW)
    conn.receive_data(frame(PING, b"1"), NOW)
    conn.close(1000)
    assert conn.data_to_send() == []
    conn.receive_data(frame(PING, b"2"), NOW)
    assert conn.data_to_send() == []


@pytest.mark.parametrize("bad", [frame(3), frame(TEXT, BAD_TEXT), frame(TEXT, length=70_001)])
def test_a_violation_while_closing_ends_the_wait(bad: bytes) -> None:
    for chunks in chunkings(bad + close(1000)):
        conn = Connection(LIMITS, now=NOW)
        conn.close(1000)
        assert feed(conn, chunks) == ([PeerLost("protocol violation while closing")], [])
        assert conn.close_received


def test_the_end_of_the_stream_while_closing_ends_the_wait() -> None:
    conn = Connection(LIMITS, now=NOW)
    conn.close(1000)
    assert conn.receive_data(text("a")[:3], NOW) == []
    assert conn.receive_data(b"", NOW) == [PeerLost()]
    assert conn.close_received
    assert conn.receive_data(b"", NOW) == []


def test_while_closing_no_message_is_counted_or_timed() -> None:
    conn = Connection(Limits(message_rate=0.1), (20.0, 10.0), now=NOW)
    conn.close(1000)
    assert conn.receive_data(text("a") * 50 + text("b")[:3], NOW) == []
    assert conn.next_deadline() == inf
    assert conn.handle_timeout(NOW + 1000) == []


# Any bytes, and the comparison with wsproto


def framelike() -> st.SearchStrategy[bytes]:
    """Bytes that get past the first checks more often than random ones would."""
    some = st.binary(max_size=140)
    return st.builds(
        lambda opcode, payload, fin, rsv, key, form, length: frame(
            opcode,
            payload,
            fin=fin,
            rsv=rsv,
            key=key,
            form=form if length is None or length < 126 else 64,
            length=length,
        ),
        st.sampled_from([CONT, CONT, TEXT, TEXT, BINARY, BINARY, CLOSE, PING, PONG, 3, 0xB]),
        st.one_of(some.map(lambda b: b[:100]), st.text(max_size=20).map(str.encode)),
        st.sampled_from([True, True, True, False]),
        st.sampled_from([0, 0, 0, 0, 0, 0, 0, 4]),
        st.sampled_from([KEY, KEY, KEY, KEY, KEY, KEY, None]),
        st.sampled_from([None, None, None, None, 16, 64]),
        st.sampled_from([None, None, None, None, 100, 500, 3000, 2**63]),
    )


@given(
    st.lists(st.one_of(framelike(), framelike(), st.binary(max_size=20)), max_size=12).map(
        b"".join
    ),
    st.lists(st.integers(1, 50), min_size=1, max_size=10),
    st.integers(0, 40),
    st.sampled_from([400, 100]),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_events_and_never_an_exception(
    data: bytes, sizes: list[int], closed_after: int, message: int
) -> None:
    limits = Limits(message=message, fragments=4)
    whole = run([data], limits)
    assert run(byte_by_byte(data), limits) == whole
    assert run(by_size(data, cycle(sizes)), limits) == whole

    def closing(chunks: Iterable[bytes]) -> tuple[list[Event], list[bytes]]:
        conn = Connection(limits, now=NOW)
        feed(conn, byte_by_byte(data[:closed_after]), limits)
        conn.close(1000)
        return feed(conn, chunks, limits)

    rest = data[closed_after:]
    assert closing(byte_by_byte(rest)) == closing([rest])


@dataclass
class Stream:
    data: bytes
    messages: list[str | bytes]
    pings: list[bytes]

    def __repr__(self) -> str:
        """Short: hypothesis refuses to print megabytes."""
        sizes = [len(message) for message in self.messages]
        return f"<Stream of {sizes} and {len(self.pings)} pings: {self.data[:80].hex()}...>"


BOUNDARIES = [0, 1, 2, 3, 4, 5, 7, 124, 125, 126, 127, 128, 130, 1000, 1024, 1025]
LARGE = [65534, 65535, 65536, 65537, 66_000]
keys = st.binary(min_size=4, max_size=4)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """What a lawful client may send: messages cut at random, control frames in between."""
    data: list[bytes] = []
    messages: list[str | bytes] = []
    pings: list[bytes] = []

    def add(opcode: int, payload: bytes, fin: bool = True) -> None:
        data.append(frame(opcode, payload, fin=fin, key=draw(keys)))

    def add_control() -> None:
        payload = draw(st.one_of(st.binary(max_size=8), st.just(b"p" * 125)))
        if draw(st.booleans()):
            pings.append(payload)
            add(PING, payload)
        else:
            add(PONG, payload)

    sizes = draw(st.lists(st.sampled_from(BOUNDARIES), max_size=6))
    if draw(st.integers(0, 3)) == 0:
        sizes.insert(draw(st.integers(0, len(sizes))), draw(st.sampled_from(LARGE)))
    for size in sizes:
        is_text = draw(st.booleans())
        unit = draw(st.sampled_from(["x", "é", "a€", "😀", "\0\r\n"]))
        message = (unit * size).encode()[:size].decode("utf-8", "ignore")
        payload = message.encode() if is_text else bytes((i * 37) & 0xFF for i in range(size))
        messages.append(message if is_text else payload)
        cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=4)))
        bounds = [0, *cuts, len(payload)]
        opcode = TEXT if is_text else BINARY
        for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):  # noqa: B905, RUF007 (3.10)
            add(CONT if i else opcode, payload[begin:end], fin=i == len(cuts))
            if draw(st.integers(0, 4)) == 0:
                add_control()
    return Stream(b"".join(data), messages, pings)


chunk_sizes = st.lists(
    st.sampled_from([1, 2, 3, 5, 6, 7, 13, 100, 131, 1000, 4096, 65536, 10**6]),
    min_size=1,
    max_size=8,
).map(lambda sizes: [*sizes, 997])


#: The one thing in which we differ from wsproto by intent: it refuses close code 1014.
MAYBE_1014 = Fails(-1)


def reference(data: bytes) -> tuple[list[Any], list[bytes]]:
    """What bare wsproto makes of a stream: events with messages joined, and the pongs owed."""
    peer = WSProtoConnection(ConnectionType.SERVER)
    peer.receive_data(data)
    events: list[Any] = []
    pongs: list[bytes] = []
    parts: list[Any] = []
    for event in peer.events():
        if isinstance(event, ws.Message):
            parts.append(event.data)
            if event.message_finished:
                events.append(parts[0][:0].join(parts))
                parts = []
        elif isinstance(event, ws.Ping):
            pongs.append(pong(bytes(event.payload)))
        elif isinstance(event, ws.CloseConnection):
            if peer.state is ConnectionState.REMOTE_CLOSING:
                events.append(PeerClosed(event.code, event.reason or ""))
            elif event.reason == "CLOSE with unknown reserved code":
                events.append(MAYBE_1014)
            else:
                events.append(Fails(event.code))
    return events, pongs


NO_LIMITS = Limits(message=2**63, fragments=10**9)


@given(streams(), chunk_sizes)
@settings(max_examples=200, deadline=None)
def test_lawful_streams_give_their_messages_and_pongs(stream: Stream, sizes: list[int]) -> None:
    expected = (stream.messages, [pong(payload) for payload in stream.pings])
    assert run([stream.data], NO_LIMITS) == expected
    assert run(by_size(stream.data, cycle(sizes)), NO_LIMITS) == expected
    assert reference(stream.data) == expected


@given(streams(), st.sampled_from(CLOSE_CODES_TAKEN), chunk_sizes)
@settings(max_examples=50, deadline=None)
def test_a_close_frame_ends_any_stream(stream: Stream, code: int, sizes: list[int]) -> None:
    data = stream.data + close(code) + PADDING
    events, pongs = run(by_size(data, cycle(sizes)), NO_LIMITS)
    assert events == [*stream.messages, PeerClosed(code, "")]
    if code != 1014:
        assert (events, pongs) == reference(data)


@given(streams(), st.data(), chunk_sizes)
@settings(max_examples=500, deadline=None)
@example(Stream(frame(TEXT, b"a") + frame(BINARY, b"b"), [], []), None, [1])
def test_damaged_streams_are_the_same_to_us_and_to_wsproto(
    stream: Stream, data: Any, sizes: list[int]
) -> None:
    """The fast path, the gathering of messages and wsproto cannot be told apart."""
    damaged = bytearray(stream.data)
    if damaged and data is not None:
        # headers stand at the front more often than in the middle of a large payload
        last = len(damaged) - 1
        where = data.draw(st.one_of(st.integers(0, min(last, 40)), st.integers(0, last)))
        damaged[where] ^= data.draw(
            st.one_of(st.sampled_from([1 << i for i in range(8)]), st.integers(1, 255))
        )
    bytes_in = bytes(damaged) + PADDING
    expected = reference(bytes_in)
    assume(MAYBE_1014 not in expected[0])
    for chunks in ([bytes_in], by_size(bytes_in, cycle(sizes))):
        events, pongs = run(chunks, NO_LIMITS)
        assert (plain(events), pongs) == expected


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("payload", [b"", b"abc", b"x" * 125, b"x" * 126, b"x" * 200], ids=len)
def test_every_first_and_second_byte_is_the_same_to_us_and_to_wsproto(
    opcode: int, payload: bytes
) -> None:
    good = bytearray(frame(opcode, payload) + text("next") + PADDING)
    for where in (0, 1):
        for value in range(256):
            data = good.copy()
            data[where] = value
            events, pongs = run([bytes(data)], NO_LIMITS)
            assert (plain(events), pongs) == reference(bytes(data)), data[:2].hex()


# Everything at once, held against a model


agreements = st.sampled_from([None, None, ALONE, TAKEOVER, Agreement("", 9, 9, True, True)])


class Lawful(NamedTuple):
    """A message, and how a client sends it."""

    payload: bytes
    is_text: bool
    compressed: bool
    final: bool
    parts: list[int]
    between: bytes


@st.composite
def lawful_messages(draw: st.DrawFn) -> Lawful:
    is_text = draw(st.booleans())
    # said again and again, so that with takeover there is something to refer to
    unit = draw(st.sampled_from([b"hello, world ", "κόσμε, ".encode(), "😀".encode() * 9]))
    if not draw(st.integers(0, 3)):
        unit = draw(st.text(max_size=30).map(str.encode) if is_text else st.binary(max_size=60))
    return Lawful(
        unit * draw(st.sampled_from([1, 1, 5, 30])),
        is_text,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.lists(st.integers(0, 40), max_size=3)),
        draw(st.sampled_from([b"", b"", frame(PING, b"between"), frame(CONT, fin=False)])),
    )


cuts = st.tuples(
    st.lists(st.sampled_from([1, 2, 3, 7, 50, 1000, 1000]), min_size=1, max_size=5),
    st.sampled_from([0, 0, 1, 3, 10]),
)


class AnyLife(RuleBasedStateMachine):
    """A connection to which anything happens, in steps so small that every read takes several.

    At the end all that was fed is read by the model: the events must be the same, whatever was
    sent in between, up to what time put an end to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for name, value in SMALL_STEPS.items():
            self.patch.setattr(under_test, name, value)

    @initialize(agreement=agreements, message=st.sampled_from([50, 400, 5000]))
    def begin(self, agreement: Agreement | None, message: int) -> None:
        self.limits = Limits(message=message, fragments=8)
        self.terms = Rules(message, 8)
        if agreement is not None:
            self.terms = Rules(message, 8, True, agreement.client_takeover, agreement.client_bits)
        self.conn = Connection(self.limits, (20.0, 10.0), now=NOW, agreement=agreement)
        self.now = NOW
        self.stream = self.held = self.said = b""
        self.events: list[Event] = []
        self.sent: list[bytes] = []
        self.pings: dict[bytes, float] = {}
        self.before_close: int | None = None
        self.out_of_time = False

    def take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, PongReceived):
                assert event.sent_at in self.pings.values()
            else:
                self.events.append(event)
        self.sent += self.conn.data_to_send()

    def take_rest(self) -> None:
        while self.conn.has_more:
            self.take(self.conn.receive_more(self.now))
        check_held(self.conn, self.limits)

    def receive(self, data: bytes, cut: tuple[list[int], int]) -> None:
        """Feed it in pieces; so many bytes of it come later, and so may the rest of a step."""
        sizes, held = cut
        data = self.held + data
        self.held = data[len(data) - held :] if held else b""
        data = data[: len(data) - held]
        self.stream += data
        for chunk in filter(None, by_size(data, cycle(sizes))):
            self.take_rest()
            self.take(self.conn.receive_data(chunk, self.now))

    @rule(messages=st.lists(lawful_messages(), min_size=1, max_size=5), cut=cuts)
    def receives_messages(self, messages: list[Lawful], cut: tuple[list[int], int]) -> None:
        self.receive(b"".join(map(self.frames_of, messages)), cut)

    def frames_of(self, message: Lawful) -> bytes:
        payload = message.payload
        if len(payload) > self.limits.message and len(message.parts) < 3:  # seldom too big
            payload = payload[: self.limits.message]
            payload = payload.decode("utf-8", "ignore").encode() if message.is_text else payload
        opcode = TEXT if message.is_text else BINARY
        compressed = message.compressed and self.terms.compressed
        if compressed:
            payload = self.compressed(payload, message.final)
        bounds = sorted(min(part, len(payload)) for part in message.parts)
        if compressed:
            return packed_in_parts(opcode, payload, *bounds, between=message.between)
        return message.between.join(
            frame(CONT if i else opcode, payload[begin:end], fin=i == len(bounds))
            for i, (begin, end) in enumerate(zip([0, *bounds], [*bounds, None], strict=True))
        )

    def compressed(self, payload: bytes, final: bool) -> bytes:
        """With takeover it refers to what was said before."""
        history = self.said if self.terms.takeover else b""
        self.said = (history + payload)[-(1 << self.terms.bits) :]
        compressor = zlib.compressobj(6, zlib.DEFLATED, -self.terms.bits, zdict=history)
        data = compressor.compress(payload)
        if final:
            return data + compressor.flush(zlib.Z_FINISH) + EMPTY
        return (data + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]

    @rule(
        pings=st.lists(st.binary(max_size=9).map(lambda data: frame(PING, data)), max_size=5),
        cut=cuts,
    )
    def receives_pings(self, pings: list[bytes], cut: tuple[list[int], int]) -> None:
        self.receive(b"".join(pings), cut)

    @rule(cut=cuts)
    def receives_the_answer_to_a_ping(self, cut: tuple[list[int], int]) -> None:
        if self.pings:
            self.receive(frame(PONG, list(self.pings)[-1]), cut)

    @precondition(lambda self: len(self.stream) > 60)
    @rule(
        pieces=st.lists(st.one_of(framelike(), st.binary(max_size=20)), min_size=1, max_size=4),
        cut=cuts,
    )
    def receives_anything(self, pieces: list[bytes], cut: tuple[list[int], int]) -> None:
        self.receive(b"".join(pieces), cut)

    @rule()
    def takes_the_rest(self) -> None:
        self.take_rest()

    @rule(seconds=st.sampled_from([0.0, 0.5, 9.0, 10.0, 20.0]), reading=st.booleans())
    def time_goes_by(self, seconds: float, reading: bool) -> None:
        self.now += seconds
        for event in self.conn.handle_timeout(self.now, reading=reading and not self.conn.has_more):
            assert isinstance(event, Failed)
            assert event.code in (1008, 1011)
            self.out_of_time = True
        for due in self.conn.data_to_send():
            self.sent.append(due)
            self.pings[due[2:]] = self.now
        assert self.conn.next_deadline() > self.now or not reading or self.conn.has_more

    @precondition(lambda self: self.before_close is None and len(self.stream) > 60)
    @rule(code=st.sampled_from([1000, 1001, 1005, 4999]), reason=st.text(max_size=50))
    def closes(self, code: int, reason: str) -> None:
        self.before_close = len(self.events)
        self.sent += self.conn.data_to_send()
        self.sent.append(self.conn.close(code, reason))
        assert self.conn.close(1000) == b""

    def teardown(self) -> None:
        try:
            if hasattr(self, "conn"):
                self.check_life()
        finally:
            self.patch.undo()

    def check_life(self) -> None:
        self.receive(PADDING, ([1000], 0))
        self.take_rest()
        expected, pings = meaning(self.stream, self.terms)
        if self.before_close is not None:
            rest = while_closing(expected[self.before_close :])
            expected = expected[: self.before_close] + rest
        if self.out_of_time:
            expected = expected[: len(self.events)]
        assert means(self.events, expected), (self.events, expected)
        self.check_sent(pings)
        self.take(self.conn.receive_data(b"", self.now))
        assert not self.conn.has_more
        assert self.conn.next_deadline() == inf

    def check_sent(self, pings: list[bytes]) -> None:
        """An independent client takes it all, and finds its pings answered in their order."""
        client = ClientProtocol(parse_uri("ws://test/"), state=State.OPEN)
        client.receive_data(b"".join(self.sent))
        assert client.parser_exc is None
        if self.before_close is not None:
            assert client.close_rcvd is not None
            assert self.sent[-1][0] == 0x80 | CLOSE  # 5.5.1: nothing behind it
        frames = [each for each in client.events_received() if isinstance(each, Frame)]
        pongs = [each.data for each in frames if each.opcode is Opcode.PONG]
        ours = [each.data for each in frames if each.opcode is Opcode.PING]
        assert pongs == pings[: len(pongs)]
        assert ours == list(self.pings)
        if self.before_close is None and not self.out_of_time:
            assert len(pongs) == len(pings)


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(max_examples=300, stateful_step_count=15, deadline=None)
