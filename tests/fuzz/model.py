"""What a client's bytes mean, read front to back by the letter of the RFCs, and slowly.

Shares no code with roomsock, nor with wsproto: one frame after the other, compressed payloads byte
by byte. What the package makes of a stream is held against it. Sections are those of RFC 6455
unless another is named.
"""

from __future__ import annotations

import zlib
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
KEY = b"\x37\xfa\x21\x3d"  # of the examples in 5.7

#: Final blocks that one compressed message may have: a choice of ours, not of an RFC.
FINAL_BLOCKS = 1024

#: Ends every wait for the rest of a control frame, and is itself no frame from a client.
PADDING = bytes(300)


# Building frames, and cutting them


def xor(payload: bytes, key: bytes) -> bytes:
    size = len(payload)
    stream = (key * (size // 4 + 1))[:size]
    number = int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")
    return number.to_bytes(size, "big")


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    key: bytes | None = KEY,
    form: int | None = None,
    length: int | None = None,
) -> bytes:
    """A frame as a client sends it, or as none should.

    Args:
        rsv: The three reserved bits, as a number.
        key: The masking key; None for an unmasked frame.
        form: Bits of the length field (7, 16 or 64) if not the fewest.
        length: What the header declares, if not the payload's length.
    """
    if length is None:
        length = len(payload)
    if form is None:
        form = 7 if length < 126 else 16 if length < 65536 else 64
    short = {7: length, 16: 126, 64: 127}[form]
    extended = b"" if form == 7 else length.to_bytes(form // 8, "big")
    header = bytes([fin << 7 | rsv << 4 | opcode, (key is not None) << 7 | short]) + extended
    return header + (payload if key is None else key + xor(payload, key))


def by_size(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    position = 0
    for size in sizes:
        yield data[position : position + size]
        position += size
        if position >= len(data):
            return


def byte_by_byte(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


def deflated(data: bytes, *, final: bool = False, level: int = 6, bits: int = 15) -> bytes:
    """A message as RFC 7692, section 7.2.1 compresses it, or with final blocks (7.2.3.4)."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -bits)
    if final:
        return compressor.compress(data) + compressor.flush(zlib.Z_FINISH) + b"\x00"
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


# Reading them


class Closed(NamedTuple):
    """The client closed."""

    code: int
    reason: str


class Violation(NamedTuple):
    """The connection fails, with one of these codes: where the RFC leaves a choice, it is left."""

    codes: frozenset[int]


class Rules(NamedTuple):
    """What was agreed on, and how much is too much."""

    message: int
    fragments: int
    compressed: bool = False
    takeover: bool = False
    bits: int = 15


class Meaning(NamedTuple):
    """Of a whole stream; an event is a str, bytes, `Closed` or `Violation`."""

    events: list[Any]
    pings: list[bytes]


class _Fail(Exception):
    def __init__(self, *codes: int) -> None:
        self.codes = frozenset(codes)


class Inflation:
    """RFC 7692, section 7.2.2 for one direction, byte by byte."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._window = 1 << max(9, rules.bits)
        self._history = b""

    def begin(self) -> None:
        if not self._rules.takeover:
            self._history = b""
        self._inflater: Any = None
        self._room = self._rules.message
        self._final_blocks = 0

    def feed(self, payload: bytes) -> Iterator[bytes]:
        """Yields what fits, then raises."""
        for position in range(len(payload)):
            if self._inflater is None:
                self._inflater = zlib.decompressobj(-15, zdict=self._history)
            try:
                data = self._inflater.decompress(payload[position : position + 1], self._room + 1)
            except zlib.error:
                raise _Fail(1007) from None
            yield data[: self._room]
            if len(data) > self._room:
                # Whether garbage right behind the first byte too many is seen before it, depends
                # on how the bytes were cut: zlib looks ahead as far as it is given input.
                try:
                    self._inflater.decompress(payload[position + 1 :], 1)
                except zlib.error:
                    raise _Fail(1009, 1007) from None
                raise _Fail(1009)
            self._room -= len(data)
            self._history = (self._history + data)[-self._window :]
            if self._inflater.eof:
                assert self._inflater.unused_data == b""
                self._inflater = None
                self._final_blocks += 1
                if self._final_blocks > FINAL_BLOCKS:
                    raise _Fail(1007)

    def finish(self) -> Iterator[bytes]:
        """The end is whole if a final block finds its place behind it."""
        yield from self.feed(b"\x00\x00\xff\xff\x03\x00")
        if self._inflater is not None:
            raise _Fail(1007)


class _Reader:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.events: list[Any] = []
        self.pings: list[bytes] = []
        self._inflation = Inflation(rules)
        self._opcode: int | None = None  # of the message in progress

    def read(self, data: bytes) -> None:
        while len(data) >= 2:
            first, second = data[:2]
            opcode, length = first & 15, second & 127
            size = 2 + {126: 2, 127: 8}.get(length, 0)
            if len(data) < size:
                return
            if length > 125:
                length = int.from_bytes(data[2:size], "big")
            self._check_header(first, second, length)
            key, payload = data[size : size + 4], data[size + 4 : size + 4 + length]
            whole = len(data) >= size + 4 + length
            payload = xor(payload, key) if len(key) == 4 else b""
            if opcode >= 8:
                if not whole:
                    return
                self._control(opcode, payload)
                if opcode == CLOSE:
                    return
            elif len(key) == 4:
                self._data(first, opcode, payload, whole)
            data = data[size + 4 + length :]

    def _check_header(self, first: int, second: int, length: int) -> None:
        opcode, fin = first & 15, first & 128
        if opcode not in (CONT, TEXT, BINARY, CLOSE, PING, PONG) or not second & 128:
            raise _Fail(1002)
        may_compress = self.rules.compressed and opcode in (TEXT, BINARY)
        if first & 0x30 or (first & 0x40 and not may_compress):
            raise _Fail(1002)
        if opcode >= 8 and (not fin or length > 125 or second & 127 > 125):
            raise _Fail(1002)
        least = {126: 126, 127: 65536}.get(second & 127, 0)
        if not least <= length < 2**63:
            raise _Fail(1002)
        if opcode >= 8:
            return
        in_order = (opcode == CONT) == (self._opcode is not None)
        if self._opcode is None:
            self._compressed = bool(first & 0x40)
            self._size = self._fragments = 0
        self._size += length
        self._fragments += 1
        most = self.rules.message * 2 + 64 if self._compressed else self.rules.message
        if self._size > most or self._fragments > self.rules.fragments:
            raise _Fail(1009) if in_order else _Fail(1009, 1002)

    def _data(self, first: int, opcode: int, payload: bytes, whole: bool) -> None:
        if (opcode == CONT) != (self._opcode is not None):
            if payload or whole:
                raise _Fail(1002)
            return
        if opcode != CONT:
            self._opcode = opcode
            self._parts: list[bytes] = []
            self._utf_8 = getincrementaldecoder("utf-8")()
            if self._compressed:
                self._inflation.begin()
        final = whole and bool(first & 128)
        if self._compressed:
            self._add(self._inflation.feed(payload))
            if final:
                self._add(self._inflation.finish())
        else:
            self._add([payload])
        if final:
            self._add([b""], final=True)
            message = b"".join(self._parts)
            self.events.append(message.decode() if self._opcode == TEXT else message)
            self._opcode = None

    def _add(self, pieces: Iterable[bytes], *, final: bool = False) -> None:
        for piece in pieces:
            self._parts.append(piece)
            if self._opcode == TEXT:
                try:
                    self._utf_8.decode(piece, final)
                except UnicodeDecodeError:
                    raise _Fail(1007) from None

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self.pings.append(payload)
        elif opcode == CLOSE:
            if not payload:
                self.events.append(Closed(1005, ""))
                return
            code = int.from_bytes(payload[:2], "big")
            known = 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999
            if len(payload) == 1 or not known:
                raise _Fail(1002)
            try:
                self.events.append(Closed(code, payload[2:].decode()))
            except UnicodeDecodeError:
                raise _Fail(1007) from None


def meaning(data: bytes, rules: Rules) -> Meaning:
    """Read a whole stream, behind which nothing is to come."""
    reader = _Reader(rules)
    try:
        reader.read(data)
    except _Fail as fail:
        reader.events.append(Violation(fail.codes))
    return Meaning(reader.events, reader.pings)
