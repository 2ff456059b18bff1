"""Frames as bytes, read back by an independent parser (wsproto as a client), and unmasking."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import wsproto.events as ws
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.speedups import apply_mask
from wsproto.connection import Connection as WSProtoConnection
from wsproto.connection import ConnectionType

from roomsock.errors import CloseCode
from roomsock.protocol import frames
from roomsock.protocol.frames import (
    BINARY,
    CLOSE,
    CLOSE_REASON_SIZE,
    PING,
    PONG,
    TEXT,
    XOR_BLOCK,
    KeptFrame,
    check_close,
    encode_close,
    encode_frame,
    frame_size,
    truncated,
    unmask,
    unmask_in_python,
)

SIZES = [0, 1, 2, 125, 126, 127, 128, 65535, 65536, 65537, 200_000]


def client_events(*data: bytes) -> list[Any]:
    """What a client makes of our bytes; each piece is fed on its own."""
    client = WSProtoConnection(ConnectionType.CLIENT)
    events: list[Any] = []
    for piece in data:
        client.receive_data(piece)
        events += client.events()
    return events


# Encoding


@pytest.mark.parametrize("size", SIZES)
def test_text_of_every_length_class_is_read_as_one_message(size: int) -> None:
    text = "é" * (size // 2) + "x" * (size % 2)
    assert client_events(encode_frame(TEXT, text.encode())) == [ws.TextMessage(data=text)]


@pytest.mark.parametrize("size", SIZES)
def test_binary_of_every_length_class_is_read_as_one_message(size: int) -> None:
    payload = bytes(i % 251 for i in range(size))
    assert client_events(encode_frame(BINARY, payload)) == [ws.BytesMessage(data=payload)]


@pytest.mark.parametrize("size", [0, 1, 124, 125])
def test_control_frames_are_read_as_what_they_are(size: int) -> None:
    payload = bytes(size)
    assert client_events(encode_frame(PING, payload)) == [ws.Ping(payload=payload)]
    assert client_events(encode_frame(PONG, payload)) == [ws.Pong(payload=payload)]


@pytest.mark.parametrize(
    ("opcode", "payload", "header"),
    [
        pytest.param(TEXT, b"Hello", "8105", id="5.7-unmasked-text"),
        pytest.param(PING, b"Hello", "8905", id="5.7-unmasked-ping"),
        pytest.param(PONG, b"", "8a00", id="5.5.3-empty-pong"),
        pytest.param(BINARY, bytes(125), "827d", id="5.2-7-bits-last"),
        pytest.param(BINARY, bytes(126), "827e007e", id="5.2-16-bits-first"),
        pytest.param(BINARY, bytes(256), "827e0100", id="5.7-256-bytes"),
        pytest.param(BINARY, bytes(65535), "827effff", id="5.2-16-bits-last"),
        pytest.param(BINARY, bytes(65536), "827f0000000000010000", id="5.7-64-KiB"),
    ],
)
def test_headers_are_as_short_as_they_can_be(opcode: int, payload: bytes, header: str) -> None:
    assert encode_frame(opcode, payload) == bytes.fromhex(header) + payload


def test_frames_may_stand_in_any_order_between_each_other() -> None:
    text, ping, binary = (
        encode_frame(TEXT, b"a"),
        encode_frame(PING, b"p"),
        encode_frame(BINARY, b"b"),
    )
    assert client_events(text + ping + binary, binary + text) == [
        ws.TextMessage(data="a"),
        ws.Ping(payload=b"p"),
        ws.BytesMessage(data=b"b"),
        ws.BytesMessage(data=b"b"),
        ws.TextMessage(data="a"),
    ]


@given(st.sampled_from([TEXT, BINARY, PING, PONG]), st.binary(max_size=125))
def test_frame_size_reads_what_encode_frame_wrote(opcode: int, payload: bytes) -> None:
    frame = encode_frame(opcode, payload)
    assert frame_size(frame, 0) == (len(frame) - len(payload), len(payload))


def test_a_kept_frame_is_its_bytes() -> None:
    frame = KeptFrame(encode_frame(TEXT, b"a"))
    assert frame == b"\x81\x01a"
    assert b"".join([frame, b"!"]) == b"\x81\x01a!"
    assert not hasattr(frame, "__dict__")


# Close frames


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1011, 1013, 3000, 4999, CloseCode.NORMAL])
def test_close_frames_carry_code_and_reason(code: int) -> None:
    assert client_events(encode_close(code, "été")) == [ws.CloseConnection(code, "été")]
    assert client_events(encode_close(code)) == [ws.CloseConnection(code, "")]


def test_1005_is_a_close_frame_without_a_body() -> None:
    """7.1.5: the code stands for the absence of one and never travels."""
    assert encode_close(1005) == b"\x88\x00"
    assert encode_close(CloseCode.NO_STATUS, "a reason cannot travel without a code") == b"\x88\x00"
    assert client_events(b"\x88\x00") == [ws.CloseConnection(1005, "")]


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        pytest.param("", "", id="empty"),
        pytest.param("x" * 123, "x" * 123, id="fits"),
        pytest.param("x" * 124, "x" * 123, id="one-too-many"),
        pytest.param("é" * 62, "é" * 61, id="not-half-a-character"),
        pytest.param("x" * 120 + "😀", "x" * 120, id="not-three-quarters-of-a-character"),
        pytest.param("x" * 119 + "😀", "x" * 119 + "😀", id="character-fits-exactly"),
        pytest.param("a\ud800b", "a?b", id="lone-surrogate"),
        pytest.param("x" * 1_000_000, "x" * 123, id="a-million"),
    ],
)
def test_reasons_are_cut_between_two_characters(reason: str, kept: str) -> None:
    assert truncated(reason) == kept
    frame = encode_close(1000, reason)
    assert len(frame) <= 127
    assert client_events(frame) == [ws.CloseConnection(1000, kept)]


@given(st.text(st.characters(), max_size=200))
def test_any_reason_fits_and_is_a_beginning(reason: str) -> None:
    kept = truncated(reason)
    whole = reason.encode("utf-8", "replace").decode()
    assert whole.startswith(kept)
    assert len(kept.encode()) <= CLOSE_REASON_SIZE
    assert kept == whole or len(whole[: len(kept) + 1].encode()) > CLOSE_REASON_SIZE


@pytest.mark.parametrize("codes", [range(1000, 1004), range(1007, 1015), range(3000, 5000)])
def test_codes_that_may_be_sent(codes: range) -> None:
    for code in codes:
        check_close(code)


@pytest.mark.parametrize(
    "codes", [[-1, 0, 1, 999], [1004, 1005, 1006], range(1015, 3000), [5000, 65535, 65536]]
)
def test_codes_that_must_not_be_sent(codes: Iterable[int]) -> None:
    """7.4: neither reserved codes nor those that only stand for something."""
    for code in codes:
        with pytest.raises(ValueError, match=f"close code {code} must not be sent"):
            check_close(code)


# Headers


@pytest.mark.parametrize(
    ("data", "start", "size"),
    [
        pytest.param("", 0, (0, 0), id="nothing"),
        pytest.param("81", 0, (0, 0), id="one-byte"),
        pytest.param("8105", 0, (2, 5), id="7-bits"),
        pytest.param("8185", 0, (2, 5), id="7-bits-masked"),
        pytest.param("817d", 0, (2, 125), id="7-bits-last"),
        pytest.param("817e00", 0, (0, 0), id="16-bits-incomplete"),
        pytest.param("817effff", 0, (4, 65535), id="16-bits"),
        pytest.param("81fe0001", 0, (4, 1), id="16-bits-not-minimal"),
        pytest.param("817f00000000000000", 0, (0, 0), id="64-bits-incomplete"),
        pytest.param("817f0000000000010000", 0, (10, 65536), id="64-bits"),
        pytest.param("81ffffffffffffffffff", 0, (10, 2**64 - 1), id="64-bits-all"),
        pytest.param("aabb8105ff", 2, (4, 5), id="7-bits-further-on"),
        pytest.param("aabb81fe0100", 2, (6, 256), id="16-bits-further-on"),
        pytest.param("aa81ff0000000000010000", 1, (11, 65536), id="64-bits-further-on"),
        pytest.param("aabb81", 2, (0, 0), id="one-byte-further-on"),
        pytest.param("aabb", 2, (0, 0), id="nothing-further-on"),
    ],
)
def test_frame_size(data: str, start: int, size: tuple[int, int]) -> None:
    assert frame_size(bytes.fromhex(data), start) == size


# Masks


@pytest.mark.parametrize("routine", [unmask_in_python, apply_mask, unmask])
@pytest.mark.parametrize(
    ("masked", "key", "payload"),
    [
        pytest.param(b"", b"\x01\x02\x03\x04", b"", id="empty"),
        pytest.param(bytes.fromhex("7f9f4d5158"), bytes.fromhex("37fa213d"), b"Hello", id="5.7"),
        pytest.param(b"abcde", bytes(4), b"abcde", id="5.3-zero-key"),
        pytest.param(bytes(7), b"\x00\x00\x00\x80", b"\0\0\0\x80\0\0\0", id="5.3-last-byte"),
    ],
)
def test_unmask(routine: Any, masked: bytes, key: bytes, payload: bytes) -> None:
    result = routine(masked, key)
    assert result == payload
    assert type(result) is bytes


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 16, 256])
def test_both_ways_to_unmask_agree_around_the_bounds_of_blocks(blocks: int) -> None:
    """Each block begins with the first byte of the key."""
    bound = blocks * XOR_BLOCK
    payload = bytes(i * 7 % 251 for i in range(bound + 9))
    key = b"\xff\x00\x80\x01"
    naive = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
    for size in range(max(bound - 9, 0), bound + 10):
        masked = unmask_in_python(payload[:size], key)
        assert masked == apply_mask(payload[:size], key) == naive[:size]
        part = memoryview(b"-" + payload)[1 : size + 1]
        assert unmask_in_python(part, key) == apply_mask(part, key) == masked
        assert type(masked) is type(unmask_in_python(part, key)) is bytes


@given(st.binary(max_size=64), st.integers(1, 240), st.binary(min_size=4, max_size=4))
@example(b"", 1, bytes(4))
def test_unmasking_in_python_and_in_c_agree(unit: bytes, times: int, key: bytes) -> None:
    payload = unit * times
    masked = unmask_in_python(payload, key)
    assert masked == apply_mask(payload, key)
    assert unmask_in_python(masked, key) == payload
    assert masked == bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))


def test_the_c_routine_is_used_when_it_is_installed() -> None:
    assert unmask is apply_mask


def test_without_the_c_routine_python_unmasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "websockets.speedups", None)  # as if not installed
    spec = importlib.util.spec_from_file_location(frames.__name__, frames.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh.unmask is fresh.unmask_in_python
    assert fresh.unmask(bytes.fromhex("7f9f4d5158"), bytes.fromhex("37fa213d")) == b"Hello"


def test_opcodes_are_those_of_the_rfc() -> None:
    assert (TEXT, BINARY, CLOSE, PING, PONG) == (1, 2, 8, 9, 10)  # 5.2
