"""What is agreed on, what frames are made of messages and back: tables, and other opinions.

These are plain zlib, the websockets package as a strict client, and `tests.fuzz.model`, which
inflates byte by byte. Section numbers are those of RFC 7692.
"""

from __future__ import annotations

import random
import sys
import tracemalloc
import zlib
from base64 import b64encode
from codecs import utf_8_decode
from collections.abc import Iterator
from math import nan
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.exceptions import NegotiationError
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from wsproto.connection import Connection as WSProtoConnection
from wsproto.connection import ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping
from wsproto.extensions import Extension, PerMessageDeflate
from wsproto.frame_protocol import CloseReason

from roomsock.protocol import deflate
from roomsock.protocol.deflate import (
    Agreement,
    Compression,
    Deflater,
    Inflater,
    negotiate,
    parse_offers,
)
from tests.fuzz.model import (
    BINARY,
    CONT,
    FINAL_BLOCKS,
    PING,
    TEXT,
    Rules,
    Violation,
    byte_by_byte,
    deflated,
    frame,
    meaning,
)

END = b"\x00\x00\xff\xff"
PMD = "permessage-deflate"
NO_SERVER, NO_CLIENT = "server_no_context_takeover", "client_no_context_takeover"
NO_TAKEOVER = f"{PMD}; {NO_SERVER}; {NO_CLIENT}"
ALONE = Compression()
TAKEOVER = Compression(context_takeover=True)
SMALL = Compression(context_takeover=True, window_bits=10)


# The settings


@pytest.mark.parametrize(
    "wrong",
    [{"threshold": 0}, {"level": 0}, {"level": 10}, {"window_bits": 8}, {"window_bits": 16}],
    ids=str,
)
def test_a_setting_outside_its_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"Compression\.{name} .*, not {value}$"):
        Compression(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"threshold": 1e3}, {"threshold": nan}, {"level": 3.0}, {"level": True}, {"window_bits": "9"}],
    ids=str,
)
def test_a_setting_that_is_no_int_is_refused_before_it_is_used(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(TypeError, match=rf"Compression\.{name} must be an int, not "):
        Compression(**wrong)


def test_connections_of_a_kind_share_their_agreement() -> None:
    offers = parse_offers([b"permessage-deflate; client_max_window_bits"])
    assert offers is not None
    assert negotiate(offers, ALONE) is negotiate(list(offers), Compression())


def test_every_setting_may_be_at_either_end_of_its_range() -> None:
    assert Compression(threshold=1, level=1, window_bits=9).level == 1
    assert Compression(level=9, window_bits=15).window_bits == 15


# The header


@pytest.mark.parametrize(
    ("values", "offers"),
    [
        ([], []),
        ([b""], []),
        ([b" , ,\t, "], []),
        ([b"a"], [("a", [])]),
        ([b"a,b ,\tc"], [("a", []), ("b", []), ("c", [])]),
        ([b",a,,b,"], [("a", []), ("b", [])]),
        ([b"a", b"b, c", b""], [("a", []), ("b", []), ("c", [])]),
        ([b"a;b;c=d"], [("a", [("b", None), ("c", "d")])]),
        ([b" a\t; b ; c = d , e"], [("a", [("b", None), ("c", "d")]), ("e", [])]),
        ([b"a;b;b=1;b=2"], [("a", [("b", None), ("b", "1"), ("b", "2")])]),
        ([b'a; b="c"'], [("a", [("b", "c")])]),
        ([b'a; b="\\c\\d"; e'], [("a", [("b", "cd"), ("e", None)])]),
        ([b"!#$%&'*+-.^_`|~09azAZ"], [("!#$%&'*+-.^_`|~09azAZ", [])]),
    ],
)
def test_offers_are_taken_apart(values: list[bytes], offers: deflate.Offers) -> None:
    assert parse_offers(values) == offers


@pytest.mark.parametrize(
    "value",
    [
        *(b"a;", b"a;;b", b"a=b", b"a b", b"a;b=", b"a;b==c", b"a;=c", b";a", b"=", b"a;b c"),
        *(
            b'"a"',
            b'a;"b"',
            b'a;b=""',
            b'a;b="',
            b'a;b="c',
            b'a;b="c d"',
            b'a;b="c,d"',
            b'a;b="c"d',
        ),
        *(b'a;b="\\"', b'a;b="\\\\"', b"a;b=\xff", b"\xe9", b"a\x00", b"a\n", b"a;b\n", b"a/b"),
    ],
)
@pytest.mark.parametrize("place", [b"%s", b"x, %s", b"%s, x"])
def test_a_malformed_header_is_no_offer_at_all(value: bytes, place: bytes) -> None:
    """RFC 6455, section 9.1: then the handshake fails."""
    assert parse_offers([place.replace(b"%s", value)]) is None


def test_a_line_that_is_cut_in_an_offer_is_malformed() -> None:
    assert parse_offers([b"a; b=", b"c"]) is None


@pytest.mark.parametrize(
    "unit", [b" ", b"\t", b",", b" ,", b"a ", b";a ", b'"', b"\\a", b'a;b="c ']
)
def test_long_headers_take_linear_time(unit: bytes) -> None:
    """No timing: what backtracks would not come to an end within the test's time."""
    for front in (b"", b"a", b"a;b", b"a;b=", b'a;b="c'):
        for back in (b"", b"\xff", b'"'):
            parse_offers([front + unit * 20_000 + back])


# 7.1: what is agreed on


BITS_REFUSED = [
    "7",
    "16",
    "08",
    "015",
    "+9",
    "-9",
    "9.0",
    "1e1",
    "abc",
    "0",
    "150",
    '" "',
    "\u0669",
]


def answer(offer: str, settings: Compression = ALONE) -> str | None:
    offers = parse_offers([offer.encode()])
    agreement = None if offers is None else negotiate(offers, settings)
    return None if agreement is None else agreement.header.removeprefix(PMD).removeprefix("; ")


def server_bits(offered: int | str) -> str:
    return f"{PMD}; server_max_window_bits={offered}"


def client_bits(offered: int | str) -> str:
    return f"{PMD}; client_max_window_bits={offered}"


@pytest.mark.parametrize(
    ("offer", "alone", "takeover", "small"),
    [
        (PMD, f"{NO_SERVER}; {NO_CLIENT}", "", ""),
        # 7.1.1
        (f"{PMD}; {NO_SERVER}", f"{NO_SERVER}; {NO_CLIENT}", NO_SERVER, NO_SERVER),
        (f"{PMD}; {NO_CLIENT}", f"{NO_SERVER}; {NO_CLIENT}", NO_CLIENT, NO_CLIENT),
        (NO_TAKEOVER, *[f"{NO_SERVER}; {NO_CLIENT}"] * 3),
        # 7.1.2.1: the answer must name it, and be no larger; without, there is nothing to say
        *(
            (server_bits(bits), f"{NO_SERVER}; {NO_CLIENT}; server_max_window_bits={fewer}",
             f"server_max_window_bits={fewer}", f"server_max_window_bits={min(bits, 10)}")
            for bits, fewer in zip(range(9, 16), (9, 9, 9, 12, 12, 12, 15), strict=True)
        ),
        # 7.1.2.2: only who offers it can be bounded
        *(
            (client_bits(bits), f"{NO_SERVER}; {NO_CLIENT}; client_max_window_bits={bits}",
             f"client_max_window_bits={bits}", f"client_max_window_bits={min(bits, 10)}")
            for bits in range(8, 16)
        ),
        (f"{PMD}; client_max_window_bits", f"{NO_SERVER}; {NO_CLIENT}; client_max_window_bits=15",
         "client_max_window_bits=15", "client_max_window_bits=10"),
        (f'{PMD}; client_max_window_bits="1\\2"; server_max_window_bits="9"; {NO_CLIENT}',
         f"{NO_SERVER}; {NO_CLIENT}; server_max_window_bits=9; client_max_window_bits=12",
         f"{NO_CLIENT}; server_max_window_bits=9; client_max_window_bits=12",
         f"{NO_CLIENT}; server_max_window_bits=9; client_max_window_bits=10"),
        # a window of 8 is none that zlib can compress into
        (server_bits(8), None, None, None),
        # 7.1: declined
        *((server_bits(bits), None, None, None) for bits in BITS_REFUSED),
        *((client_bits(bits), None, None, None) for bits in BITS_REFUSED),
        (f"{PMD}; server_max_window_bits", None, None, None),
        (f"{PMD}; {NO_SERVER}=1", None, None, None),
        (f"{PMD}; {NO_CLIENT}=true", None, None, None),
        (f"{PMD}; unknown", None, None, None),
        (f"{PMD}; {NO_SERVER}; unknown=1", None, None, None),
        (f"{PMD}; {NO_SERVER}; {NO_SERVER}", None, None, None),
        (f"{PMD}; client_max_window_bits; client_max_window_bits=10", None, None, None),
        (f"{PMD}; server_max_window_bits=10; server_max_window_bits=10", None, None, None),
        (f"{PMD}; {NO_SERVER.upper()}", None, None, None),
        # names of extensions are not ours to fold
        (PMD.upper(), None, None, None),
        ("x-webkit-deflate-frame", None, None, None),
        ("", None, None, None),
        # 5.1, 7.1: the first that can be met, and nothing of those before it
        (f"{server_bits(8)}, {PMD}", f"{NO_SERVER}; {NO_CLIENT}", "", ""),
        (f"{server_bits(9)}; {NO_CLIENT}; x, {PMD}", f"{NO_SERVER}; {NO_CLIENT}", "", ""),
        (f"{client_bits(99)}; {NO_SERVER}, other; {NO_CLIENT}, {client_bits(9)}",
         f"{NO_SERVER}; {NO_CLIENT}; client_max_window_bits=9", "client_max_window_bits=9",
         "client_max_window_bits=9"),
        (f"{client_bits(12)}, {client_bits(9)}",
         f"{NO_SERVER}; {NO_CLIENT}; client_max_window_bits=12", "client_max_window_bits=12",
         "client_max_window_bits=10"),
        (f"other; {PMD}; a=b, {PMD}; x, y", None, None, None),
    ],
)  # fmt: skip
def test_an_offer_is_met_or_declined(
    offer: str, alone: str | None, takeover: str | None, small: str | None
) -> None:
    assert answer(offer, ALONE) == alone
    assert answer(offer, TAKEOVER) == takeover
    assert answer(offer, SMALL) == small


@pytest.mark.parametrize(
    ("offer", "settings", "expected"),
    [
        (PMD, ALONE, (15, 15, False, False)),
        (PMD, TAKEOVER, (15, 15, True, True)),
        # we may send with less than we were asked for; the client cannot be told to
        (PMD, SMALL, (10, 15, True, True)),
        (client_bits(8), TAKEOVER, (15, 8, True, True)),
        (f"{server_bits(9)}; {NO_CLIENT}", TAKEOVER, (9, 15, True, False)),
        (f"{client_bits(14)}; {NO_SERVER}", SMALL, (10, 10, False, True)),
    ],
)
def test_what_was_agreed_on_is_what_the_header_says(
    offer: str, settings: Compression, expected: tuple[int, int, bool, bool]
) -> None:
    agreement = negotiate(parse_offers([offer.encode()]) or [], settings)
    assert agreement is not None
    assert expected == (
        agreement.server_bits,
        agreement.client_bits,
        agreement.server_takeover,
        agreement.client_takeover,
    )


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (15, [9, 9, 9, 12, 12, 12, 15]),
        (14, [9, 9, 9, 12, 12, 14, 14]),
        (13, [9, 9, 9, 12, 13, 13, 13]),
        (12, [9, 9, 9, 12, 12, 12, 12]),
        (11, [9, 9, 11, 11, 11, 11, 11]),
        (10, [9, 10, 10, 10, 10, 10, 10]),
        (9, [9] * 7),
    ],
)
def test_clients_of_an_app_have_three_sizes_of_window_whatever_they_ask_for(
    most: int, sizes: list[int]
) -> None:
    """7.1.2.1 allows less. Each size is a compression more for every message to a room."""
    settings_ = Compression(window_bits=most)
    assert [agreed(server_bits(bits), settings_).server_bits for bits in range(9, 16)] == sizes
    assert agreed(PMD, settings_).server_bits == most


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.booleans(),
            st.none() | st.integers(8, 15),
            st.none() | st.just(True) | st.integers(9, 15),
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
    st.integers(9, 15),
)
@settings(deadline=None)
def test_a_strict_client_accepts_the_answer(
    offered: list[tuple[bool, bool, int | None, int | bool | None]], takeover: bool, bits: int
) -> None:
    factories = [ClientPerMessageDeflateFactory(*parameters) for parameters in offered]
    header = ", ".join(
        "; ".join([PMD, *(name if value is None else f"{name}={value}" for name, value in each)])
        for each in (factory.get_request_params() for factory in factories)
    )
    ours = answer(header, Compression(context_takeover=takeover, window_bits=bits))
    if ours is None:
        assert all(server == 8 for _, _, server, _ in offered)
        return
    ((_, parameters),) = parse_offers([f"{PMD}; {ours}".encode() if ours else PMD.encode()]) or []
    accepted = []
    for factory in factories:
        try:
            accepted.append(factory.process_response_params(parameters, []))
        except NegotiationError:
            pass
    assert accepted


# Deflating


def agreed(offer: str = PMD, settings: Compression = ALONE) -> Agreement:
    agreement = negotiate(parse_offers([offer.encode()]) or [], settings)
    assert agreement is not None
    return agreement


def payload_of(sent: bytes) -> bytes:
    return sent[{126: 4, 127: 10}.get(sent[1], 2) :]


def inflated(sent: bytes, bits: int = 15) -> bytes:
    return zlib.decompressobj(-bits).decompress(payload_of(sent) + END)


def sentences(count: int) -> bytes:
    words = random.Random(count)
    return b" ".join(b"word%d" % words.randrange(999) for _ in range(count))


MESSAGES = [b"x", b"hello" * 30, sentences(60), sentences(20_000), bytes(300_000)]


@pytest.mark.parametrize("bits", range(9, 16))
@pytest.mark.parametrize("level", [1, 3, 9])
def test_a_frame_inflates_within_the_window_agreed_on(bits: int, level: int) -> None:
    """zlib with a small window refuses what refers further back."""
    for settings_ in (Compression(level=level), Compression(level=level, context_takeover=True)):
        deflater = Deflater(settings_, agreed(server_bits(bits), settings_))
        stream = zlib.decompressobj(-bits)
        for opcode, message in zip((1, 2, 1, 2, 1), MESSAGES, strict=True):
            sent = deflater.encode(opcode, message, {})
            if sent[0] == 0x80 | opcode:  # too small to become smaller
                assert payload_of(sent) == message == b"x"
                continue
            assert sent[0] == 0xC0 | opcode
            if not settings_.context_takeover:
                stream = zlib.decompressobj(-bits)
            assert stream.decompress(payload_of(sent) + END) == message


def test_a_window_is_no_larger_than_the_message_needs() -> None:
    """It is found again in each byte it refers back to."""
    far = sentences(40) * 2  # repeats itself after some 300 bytes
    shared: dict[int, bytes] = {}
    Deflater(ALONE, agreed()).encode(TEXT, far, shared)
    ((bits, sent),) = shared.items()
    assert bits == len(far).bit_length() < 15
    assert inflated(sent, bits) == far
    assert len(sent) < len(far) / 2


def test_the_smallest_window_does_not_end_a_block_every_few_hundred_bytes() -> None:
    """It would take three times as long; what can be seen of it is the size."""
    letters = b64encode(random.Random(1).randbytes(75_000))  # 6 bits in 8
    sent = Deflater(ALONE, agreed(server_bits(9))).encode(TEXT, letters, {})
    assert inflated(sent, 9) == letters
    assert len(sent) < 0.8 * len(letters)


@pytest.mark.parametrize("takeover", [False, True])
def test_the_websockets_package_reads_what_we_send(takeover: bool) -> None:
    settings_ = Compression(context_takeover=takeover)
    factory = ClientPerMessageDeflateFactory(client_max_window_bits=True)
    agreement = agreed(f"{PMD}; client_max_window_bits", settings_)
    ((_, parameters),) = parse_offers([agreement.header.encode()]) or []
    client = factory.process_response_params(parameters, [])
    deflater = Deflater(settings_, agreement)
    for message in MESSAGES * 2:
        sent = deflater.encode(BINARY, message, {})
        got = Frame(Opcode.BINARY, payload_of(sent), rsv1=bool(sent[0] & 0x40))
        assert client.decode(got).data == message


def test_the_threshold_is_for_who_sends() -> None:
    assert Deflater(Compression(threshold=77), agreed()).threshold == 77


def test_what_does_not_shrink_is_sent_as_it_is() -> None:
    noise = random.Random(1).randbytes(1000)
    shared: dict[int, bytes] = {}
    sent = Deflater(ALONE, agreed()).encode(BINARY, noise, shared)
    assert sent == b"\x82\x7e\x03\xe8" + noise
    assert list(shared.values()) == [sent]


def test_with_takeover_even_what_does_not_shrink_is_compressed() -> None:
    """7.2.3.3: the next message may refer to it."""
    noise = random.Random(1).randbytes(1000)
    deflater = Deflater(TAKEOVER, agreed(settings=TAKEOVER))
    first, second = (deflater.encode(BINARY, noise, {}) for _ in range(2))
    assert len(second) < 50 < 1000 < len(first)
    stream = zlib.decompressobj(-15)
    for sent in (first, second):
        assert stream.decompress(payload_of(sent) + END) == noise


def test_a_room_compresses_once_for_each_size_of_window(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(level: int, bits: int) -> Any:
        made.append(bits)
        return compressor(level, bits)

    compressor = deflate._compressor
    monkeypatch.setattr(deflate, "_compressor", counted)
    message = sentences(5000)
    shared: dict[int, bytes] = {}
    rooms = [agreed(server_bits(bits)) for bits in (9, 15, 12)] * 5
    frames = [Deflater(ALONE, each).encode(TEXT, message, shared) for each in rooms]
    assert sorted(made) == [9, 12, 15]
    assert len(set(map(id, frames))) == 3
    assert [inflated(sent, each.server_bits) for sent, each in zip(frames, rooms, strict=True)] == [
        message
    ] * 15
    keep = Compression(context_takeover=True)
    kept = [agreed(server_bits(each.server_bits), keep) for each in rooms]
    assert all(each.server_takeover for each in kept)
    made.clear()  # above their window all are served by what there is
    again = [Deflater(keep, each).encode(TEXT, message, shared) for each in kept]
    assert (made, list(map(id, again))) == ([], list(map(id, frames)))
    small: dict[int, bytes] = {}
    made.clear()
    for each in rooms:  # small enough for the smallest: one is enough for all
        Deflater(ALONE, each).encode(TEXT, sentences(30)[:200], small)
    assert made == [9]


def test_with_takeover_each_member_has_a_compression_of_its_own_and_nothing_is_shared() -> None:
    message, shared = sentences(100), {}  # type: ignore[var-annotated]
    late, early = (Deflater(TAKEOVER, agreed(settings=TAKEOVER)) for _ in range(2))
    early.encode(TEXT, message, shared)
    assert len(early.encode(TEXT, message, shared)) < 50 < len(late.encode(TEXT, message, shared))
    assert shared == {}


@pytest.mark.parametrize("bits", [9, 12, 15])
@pytest.mark.parametrize("above", [0, 1, 100_000])
@pytest.mark.parametrize("noisy", [False, True])
def test_with_takeover_a_message_above_the_window_is_shared_and_what_follows_begins_anew(
    bits: int, above: int, noisy: bool
) -> None:
    """7.2.3.2: to refer back is allowed, not demanded. The client's inflater goes on as it is."""
    agreement = agreed(server_bits(bits), TAKEOVER)
    early, late = Deflater(TAKEOVER, agreement), Deflater(TAKEOVER, agreement)
    words, size = sentences(60), (1 << bits) + above
    noise = random.Random(bits).randbytes(size)
    large = noise if noisy else (words * (size // len(words) + 1))[:size]
    client = ClientPerMessageDeflateFactory(server_max_window_bits=bits).process_response_params(
        [("server_max_window_bits", str(bits))], []
    )
    stream = zlib.decompressobj(-bits)
    sizes = []
    for message in (words[:100], large, words[:100], words[:100], large, words[:100]):
        shared: dict[int, bytes] = {}
        sent = early.encode(BINARY, message, shared)
        is_shared = message is large and above > 0
        assert list(shared) == [bits] * is_shared
        assert (late.encode(BINARY, message, shared) is sent) == is_shared
        sizes.append(len(sent))
        compressed = bool(sent[0] & 0x40)
        assert compressed or (is_shared and noisy)
        if compressed:
            assert stream.decompress(payload_of(sent) + END) == message
        assert (
            client.decode(Frame(Opcode.BINARY, payload_of(sent), rsv1=compressed)).data == message
        )
    if above:  # nothing of what came before is referred to
        assert sizes[0] == sizes[2] == sizes[5] > 2 * sizes[3]


# Inflating


PLAIN = Agreement("", 15, 15, False, False)
KEEPS = Agreement("", 15, 15, True, True)
KEEPS_LITTLE = Agreement("", 9, 9, True, True)
EITHER = pytest.mark.parametrize("agreement", [PLAIN, KEEPS], ids=["alone", "takeover"])


class Server:
    """wsproto with an extension, as `Connection` drives it."""

    def __init__(self, extension: Extension) -> None:
        self._peer = WSProtoConnection(ConnectionType.SERVER, [extension])

    def feed(self, data: bytes) -> Iterator[Any]:
        self._peer.receive_data(data)
        return self._peer.events()


def in_pieces(agreement: Agreement, limit: int, payload: bytes, opcode: int) -> bytes | int:
    """What comes of a message that wsproto gets byte by byte: it, or the close code."""
    server = Server(Inflater(agreement, limit))
    message = b""
    for byte in byte_by_byte(frame(opcode, payload, rsv=4)):
        for event in server.feed(byte):
            if isinstance(event, CloseConnection):
                return int(event.code)
            data = event.data
            message += data.encode() if isinstance(data, str) else data
            if event.message_finished:
                return message
    raise AssertionError("neither a message nor a failure")


def is_utf_8(data: bytes, *, whole: bool = True) -> bool:
    try:
        utf_8_decode(data, "strict", whole)
    except UnicodeDecodeError:
        return False
    return True


def both(agreement: Agreement, limit: int, payload: bytes, opcode: int = BINARY) -> bytes | int:
    """The same at once and in pieces, and what the model says."""
    whole: bytes | int = Inflater(agreement, limit).inflate(payload, is_text=opcode == TEXT)
    if opcode == TEXT and isinstance(whole, bytes) and not is_utf_8(whole):
        whole = 1007  # what is whole is decoded by `Connection`
    assert in_pieces(agreement, limit, payload, opcode) == whole
    rules = Rules(limit, 1, True, agreement.client_takeover, agreement.client_bits)
    if len(payload) <= 2 * limit + 64:
        (expected,) = meaning(frame(opcode, payload, rsv=4), rules).events
        if isinstance(expected, Violation):
            assert whole in expected.codes
        else:
            assert whole == (expected.encode() if isinstance(expected, str) else expected)
    return whole


@EITHER
@pytest.mark.parametrize("size", [0, 1, 100, 32768, 70_000])
@pytest.mark.parametrize("final", [False, True], ids=["7.2.1", "7.2.3.4-final"])
def test_a_message_may_be_as_large_as_the_limit_and_no_larger(
    agreement: Agreement, size: int, final: bool
) -> None:
    message = sentences(10_000)[:size]
    assert both(agreement, max(size, 1), deflated(message, final=final)) == message
    assert (
        both(agreement, max(size, 1), deflated(message + b"!!"[: 1 + (size == 0)], final=final))
        == 1009
    )


@EITHER
@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        pytest.param(b"", 1007, id="7.2.3.6-less-than-an-empty-message"),
        pytest.param(b"\x00", b"", id="7.2.3.6-an-empty-message"),
        pytest.param(b"\x02\x00", b"", id="an-empty-fixed-block"),
        pytest.param(bytes.fromhex("f248cdc9c90700"), b"Hello", id="7.2.3.1"),
        pytest.param(bytes.fromhex("000500faff48656c6c6f00"), b"Hello", id="7.2.3.3-stored"),
        pytest.param(bytes.fromhex("f348cdc9c9070000"), b"Hello", id="7.2.3.4-final"),
        pytest.param(bytes.fromhex("f24805000000ffffcac9c90700"), b"Hello", id="7.2.3.5-blocks"),
        pytest.param(bytes.fromhex("f348cdc9c90700"), 1007, id="7.2.3.4-without-its-empty-block"),
        pytest.param(bytes.fromhex("f348cdc9c90700 0300 00"), b"Hello", id="two-final"),
        pytest.param(bytes.fromhex("f248cdc9c9"), 1007, id="incomplete"),
        pytest.param(bytes.fromhex("000500faff4865"), 1007, id="incomplete-stored"),
        pytest.param(bytes.fromhex("000500faff"), 1007, id="stored-takes-the-end-for-itself"),
        pytest.param(b"\x07", 1007, id="reserved-block-type"),
        pytest.param(b"\x00\x05\x00\x00\x00Hello", 1007, id="stored-of-two-lengths"),
        pytest.param(bytes(random.Random(2).randbytes(60)), 1007, id="noise"),
        pytest.param(b"Hello", 1007, id="plain-text"),
        pytest.param(zlib.compress(b"Hello"), 1007, id="with-a-zlib-header"),
        pytest.param(b"\x4b\x04\x02\x00", 1007, id="further-back-than-anything"),
    ],
)  # fmt: skip
def test_a_payload_is_a_message_or_a_failure(
    agreement: Agreement, payload: bytes, expected: bytes | int
) -> None:
    assert both(agreement, 1000, payload) == expected


def final_blocks(*pieces: bytes) -> bytes:
    """7.2.3.4: each piece is a final block of its own, and refers to those before it."""
    data, before = b"", b""
    for piece in pieces:
        compressor = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=before)
        data += compressor.compress(piece) + compressor.flush(zlib.Z_FINISH)
        before = (before + piece)[-32768:]
    return data + b"\x00"


@EITHER
def test_behind_a_final_block_goes_on_what_was_before_it(agreement: Agreement) -> None:
    words = sentences(300)
    pieces = [words, words, b"", words[:100], words]
    payload = final_blocks(*pieces)
    assert len(payload) < len(words)  # it does refer back
    message = b"".join(pieces)
    assert both(agreement, len(message), payload) == message
    assert both(agreement, len(message) - 1, payload) == 1009


def test_with_takeover_a_final_block_does_not_forget() -> None:
    words = sentences(300)
    inflater = Inflater(KEEPS, 10_000)
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = compressor.compress(words) + compressor.flush(zlib.Z_SYNC_FLUSH)
    assert inflater.inflate(first[:-4], is_text=False) == words
    again = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=words)
    final = again.compress(words) + again.flush(zlib.Z_FINISH) + b"\x00"
    for _ in range(3):
        assert inflater.inflate(final, is_text=True) == words
    assert len(final) < 50


def test_without_takeover_nothing_may_be_referred_to() -> None:
    words = sentences(300)
    inflater = Inflater(PLAIN, 10_000)
    assert inflater.inflate(deflated(words), is_text=False) == words
    again = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=words)
    payload = again.compress(words) + again.flush(zlib.Z_SYNC_FLUSH)
    assert inflater.inflate(payload[:-4], is_text=False) == 1007


@pytest.mark.parametrize(
    ("agreement", "kept"), [(PLAIN, 0), (KEEPS, 32768), (KEEPS_LITTLE, 512)], ids=str
)
def test_between_messages_the_window_is_kept_and_nothing_else(
    agreement: Agreement, kept: int
) -> None:
    inflater = Inflater(agreement, 10**6)
    for final in (False, True):
        for message in (sentences(10_000), b"tiny", bytes(50_000), b""):
            assert (
                inflater.inflate(deflated(message, final=final, bits=9), is_text=False) == message
            )
            assert inflater._zlib is None
            assert len(inflater._history) == kept


@EITHER
def test_a_bomb_costs_the_limit_and_no_more(agreement: Agreement) -> None:
    bomb = deflated(bytes(100 * 10**6), level=9)
    assert len(bomb) < 100_000
    inflater = Inflater(agreement, 10**6)
    tracemalloc.start()
    try:
        assert inflater.inflate(bomb, is_text=False) == 1009
        assert tracemalloc.get_traced_memory()[1] < 4 * 10**6
    finally:
        tracemalloc.stop()
    assert inflater.inflated <= 10**6 + 1000


@EITHER
def test_a_limit_may_be_as_large_as_numbers_get(agreement: Agreement) -> None:
    for limit in (sys.maxsize - 1, sys.maxsize, 2**70):
        assert Inflater(agreement, limit).inflate(deflated(b"x"), is_text=False) == b"x"


class Counting:
    """zlib, counting what it is asked for."""

    error = zlib.error

    def __init__(self) -> None:
        self.objects = 0
        self.taken = 0

    def decompressobj(self, bits: int, zdict: bytes) -> Any:
        self.objects += 1
        inner, counting = zlib.decompressobj(bits, zdict=zdict), self

        class Inner:
            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            def decompress(self, data: bytes, most: int) -> bytes:
                counting.taken += len(data)
                return inner.decompress(data, most)

        return Inner()


def test_a_message_has_so_many_final_blocks_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes an object of its own, and a copy of what follows: tiny ones must end."""
    assert deflate._FINAL_BLOCKS == FINAL_BLOCKS
    most = b"\x03\x00" * (FINAL_BLOCKS - 1) + b"\x00"  # the end is the last
    for agreement in (PLAIN, KEEPS):
        assert both(agreement, 10_000, most) == b""
        assert both(agreement, 10_000, b"\x03\x00" + most) == 1007
    counting = Counting()
    monkeypatch.setattr(deflate, "zlib", counting)
    inflater = Inflater(PLAIN, 10**6)
    assert inflater.inflate(b"\x03\x00" * 30_000, is_text=False) == 1007
    assert counting.objects == FINAL_BLOCKS + 1
    assert counting.taken < 61_000 * counting.objects
    assert inflater.inflate(most, is_text=False) == b""  # each message anew


def test_what_it_costs_to_begin_is_counted() -> None:
    """Else many tiny messages, or blocks, would be nothing, and take a long time."""
    inflater = Inflater(PLAIN, 1000)
    for message in (b"", b"x", b"", b"x"):
        inflater.inflate(deflated(message), is_text=False)
    assert 4 * 100 < inflater.inflated < 4 * 2000
    inflater.inflated = 0
    inflater.inflate(b"\x03\x00" * 9 + b"\x00", is_text=False)
    assert 10 * 100 < inflater.inflated < 10 * 2000


def test_to_begin_with_much_to_refer_to_costs_more() -> None:
    counted = []
    for before in (b"", bytes(32768)):
        inflater = Inflater(KEEPS, 40_000)
        inflater.inflate(deflated(before), is_text=False)
        inflater.inflated = 0
        inflater.inflate(b"\x03\x00" * 9 + b"\x00", is_text=False)
        counted.append(inflater.inflated)
    assert counted[1] >= 2 * counted[0]


# 6455, 8.1: text; which failure it is


@pytest.mark.parametrize("limit", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "message",
    ["aaaé€😀".encode(), b"aa\xf0\x9f\x98\x80a", b"aaaa\xff", b"aa\xe2\x82a", b"\xed\xa0\x80aaaa",
     b"abcdefghij", "😀😀😀".encode(), b"ab\x80cdefg", b"aaaa\xf0\x9f\x98\x80\x80aaa"],
)  # fmt: skip
def test_what_is_invalid_within_the_limit_comes_before_what_is_too_big(
    message: bytes, limit: int
) -> None:
    for agreement in (PLAIN, KEEPS):
        inflater = Inflater(agreement, limit)
        inflater.inflate(deflated("€".encode()[:1]), is_text=False)  # no part of the next message
        result = inflater.inflate(deflated(message), is_text=True)
        pieces = both(agreement, limit, deflated(message, final=True), TEXT)
        if len(message) > limit:
            begins_well = is_utf_8(message[:limit], whole=False)
            assert result == pieces == (1009 if begins_well else 1007)
        else:
            assert result == message
            assert pieces == (message if is_utf_8(message) else 1007)


# As an extension of wsproto


def test_control_frames_stand_between_compressed_fragments_unlike_with_wsprotos_extension() -> None:
    """Why wsproto's own is not used: behind the ping it takes the rest for uncompressed."""
    payload = deflated(b"Hello Hello Hello")
    stream = (
        frame(BINARY, payload[:4], rsv=4, fin=False) + frame(PING, b"?") + frame(CONT, payload[4:])
    )
    theirs = PerMessageDeflate()
    theirs.finalize(PMD)
    messages = []
    for extension in (Inflater(KEEPS, 1000), theirs):
        message = b""
        for event in Server(extension).feed(stream):
            if isinstance(event, BytesMessage):
                message += event.data
            else:
                assert isinstance(event, Ping)
        messages.append(message)
    assert messages[0] == b"Hello Hello Hello"
    assert messages[1] != messages[0]


def test_final_blocks_are_read_unlike_with_wsprotos_extension() -> None:
    """The other reason: what follows a final block it drops."""
    theirs = PerMessageDeflate()
    theirs.finalize(PMD)
    stream = frame(BINARY, final_blocks(b"one", b"two"), rsv=4)
    read = [
        b"".join(event.data for event in Server(each).feed(stream))
        for each in (Inflater(KEEPS, 1000), theirs)
    ]
    assert read == [b"onetwo", b"one"]


def test_uncompressed_messages_change_nothing_about_takeover() -> None:
    words = sentences(100)
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    first, second = (
        (compressor.compress(words) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4] for _ in range(2)
    )
    server = Server(Inflater(KEEPS, 10_000))
    stream = (
        frame(BINARY, first, rsv=4)
        + frame(BINARY, b"plain")
        + frame(BINARY, b"pl", fin=False)
        + frame(PING)
        + frame(CONT, b"ain")
        + frame(BINARY, second, rsv=4)
    )
    data = [event.data for event in server.feed(stream) if not isinstance(event, Ping)]
    assert data == [words, b"plain", b"pl", b"ain", words]


@pytest.mark.parametrize("payload", [b"\xff\xff\xff", b"", deflated(bytes(10_000))])
def test_nothing_is_inflated_of_a_frame_that_is_out_of_order(payload: bytes) -> None:
    """It is 1002, whatever is in it."""
    hello = deflated(b"Hello")
    for stream in (
        frame(TEXT, hello, rsv=4) + frame(CONT, payload),
        frame(TEXT, hello, rsv=4, fin=False) + frame(TEXT, payload, rsv=4),
        frame(TEXT, b"Hello", fin=False) + frame(BINARY, payload, rsv=4),
    ):
        inflater = Inflater(KEEPS, 100)
        *_, last = Server(inflater).feed(stream)
        assert (last.code, last.reason[:10]) in ((1002, "unexpected"), (1002, "expected C"))
        assert inflater.inflated < 2000


def test_to_wsproto_it_is_a_server_with_an_agreement() -> None:
    inflater = Inflater(PLAIN, 1)
    assert (inflater.name, inflater.enabled(), inflater.offer()) == (PMD, True, False)


# There and back


@given(
    st.lists(st.binary(max_size=300) | st.text(max_size=99).map(str.encode), max_size=6),
    st.sampled_from([PLAIN, KEEPS, KEEPS_LITTLE]),
    st.integers(1, 9),
    st.integers(0, 8),
)
@example([b"", b"\x00" * 70_000, b"a" * 600], KEEPS_LITTLE, 9, 3)
@settings(deadline=None)
def test_whatever_a_client_compresses_is_read(
    messages: list[bytes], agreement: Agreement, level: int, strategy: int
) -> None:
    """Each strategy of zlib makes other blocks; flushes in between make more of them."""
    inflater = Inflater(agreement, 70_000)
    compressor: Any = None
    for message in messages:
        if compressor is None or not agreement.client_takeover:
            compressor = zlib.compressobj(
                level, zlib.DEFLATED, -agreement.client_bits, 8, strategy % 5
            )
        half = len(message) // 2
        payload = compressor.compress(message[:half])
        if strategy > 4:
            payload += compressor.flush(zlib.Z_FULL_FLUSH if strategy > 6 else zlib.Z_SYNC_FLUSH)
        payload += compressor.compress(message[half:]) + compressor.flush(zlib.Z_SYNC_FLUSH)
        assert inflater.inflate(payload[:-4], is_text=False) == message


@given(st.binary(max_size=60), st.sampled_from([PLAIN, KEEPS]), st.sampled_from([5, 100]))
@settings(max_examples=300, deadline=None)
def test_garbage_is_the_same_at_once_and_in_pieces(
    payload: bytes, agreement: Agreement, limit: int
) -> None:
    inflater = Inflater(agreement, limit)
    whole = inflater.inflate(payload, is_text=False)
    assert isinstance(whole, CloseReason) or len(whole) <= limit
    pieces = in_pieces(agreement, limit, payload, BINARY)
    rules = Rules(10**6, 1, True)
    garbage_follows = isinstance(meaning(frame(BINARY, payload, rsv=4), rules).events[0], Violation)
    assert pieces == whole or (whole == 1007 and pieces == 1009 and garbage_follows)
