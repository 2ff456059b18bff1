"""permessage-deflate: what is agreed on, bounded inflation, and one compressed frame for a room.

Without context takeover, which is the default, a message is compressed by itself: all members of a
room share the bytes, and between two messages nothing is kept. In front of wsproto, whose own
extension inflates without bound and fails on final blocks.

Rules: RFC 7692, section 7; the Sec-WebSocket-Extensions header: RFC 6455, section 9.1; DEFLATE:
RFC 1951.
"""

from __future__ import annotations

import re
import sys
import zlib
from codecs import utf_8_decode
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from wsproto.extensions import Extension
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, RsvBits

from .frames import RSV1, encode_frame

NAME = "permessage-deflate"

#: Extensions as a client offers them: a name each, and its parameters in order.
Offers: TypeAlias = list[tuple[str, list[tuple[str, str | None]]]]

_TCHAR = r"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_EXTENSION = re.compile(rf"[ \t,]*({_TCHAR}+)")
# A quoted value must be a token once it is unquoted (RFC 6455, section 9.1).
_PARAMETER = re.compile(
    rf'[ \t]*;[ \t]*({_TCHAR}+)(?:[ \t]*=[ \t]*(?:({_TCHAR}+)|"((?:\\?{_TCHAR})+)"))?'
)
_NEXT = re.compile(r"[ \t]*(?:,[ \t,]*|$)")

#: RFC 7692, section 7.1.2: an integer without leading zeros.
_WINDOW_BITS = {str(bits): bits for bits in range(8, 16)}

#: zlib cannot compress into the smallest window there is: whoever needs it is declined.
_LEAST_BITS = 9
_MOST_BITS = 15

#: The windows of what we send, with the one of the settings: by joining once with each size a
#: client would have every message to its room compressed seven times.
_SERVER_BITS = (_LEAST_BITS, 12)

#: What the sender has cut off each message (7.2.1), and a final block of nothing: it is reached
#: only if the message was whole.
_END = b"\x00\x00\xff\xff" + b"\x03\x00"

#: Most final blocks of a message (7.2.3.4). Each takes a zlib object of its own, which copies what
#: follows: without end they would take quadratic time. One for each flush is more than anybody has.
_FINAL_BLOCKS = 1024

#: To begin with such an object takes as long as to inflate so many bytes, and a 32nd of those that
#: it may refer to.
_BEGIN_COST = 512


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How to compress messages for clients that offer it (permessage-deflate, RFC 7692).

    Attributes:
        threshold: Messages of fewer bytes are sent as they are. Below 128 bytes there is little to
            gain.
        level: zlib's, from 1 (fast) to 9 (small). The event loop waits meanwhile: 1 MiB of JSON
            takes some 5 ms at 1, 10 ms at 3, 27 ms at 6.
        context_takeover: Let each message refer to those before it. Small messages that are alike
            shrink further, but each member of a room needs a compression of its own, and each
            connection keeps up to 256 KiB for what it sends and 32 KiB for what it receives.
        window_bits: The largest window, as a power of two from 9 to 15; clients that ask for less
            get 12 or 9. Down to 12 each bit less halves what context takeover keeps; for that 12 is
            a good choice, as many large windows also crowd each other out of the processor's cache
            (4 KiB to 100 members: 2.3 ms instead of 6.1).

    Raises:
        TypeError: A value is no int.
        ValueError: A value is outside its range.
    """

    threshold: int = 128
    level: int = 3
    context_takeover: bool = False
    window_bits: int = 15

    def __post_init__(self) -> None:
        ranges = {
            "threshold": (1, sys.maxsize),
            "level": (1, 9),
            "window_bits": (_LEAST_BITS, _MOST_BITS),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            # 3.0 and True would be taken here, and fail or surprise where they are used.
            if type(value) is not int:
                raise TypeError(f"Compression.{name} must be an int, not {value!r}")
            if not least <= value <= most:
                raise ValueError(f"Compression.{name} is from {least} to {most}, not {value}")


@dataclass(frozen=True, slots=True)
class Agreement:
    """What client and server have agreed on for one connection."""

    #: The value of the Sec-WebSocket-Extensions header that says so.
    header: str
    #: Window of what we send.
    server_bits: int
    #: Window of what the client sends.
    client_bits: int
    server_takeover: bool
    client_takeover: bool


#: There are so many (7.1): of more, one is repeated or unknown.
_PARAMETERS = 4


def parse_offers(values: Iterable[bytes]) -> Offers | None:
    """Take Sec-WebSocket-Extensions apart, all lines of it.

    Returns:
        What is offered, in the client's order of preference; None when the header is malformed,
        for which a handshake must fail (RFC 6455, section 9.1).
    """
    text = b",".join(values).decode("latin-1")
    offers: Offers = []
    position = len(text) - len(text.lstrip(" \t,"))
    while position < len(text):
        extension = _EXTENSION.match(text, position)
        if extension is None:
            return None
        position = extension.end()
        parameters: list[tuple[str, str | None]] = []
        while (parameter := _PARAMETER.match(text, position)) is not None:
            name, token, quoted = parameter.groups()
            parameters.append((name, quoted.replace("\\", "") if quoted else token))
            position = parameter.end()
        separator = _NEXT.match(text, position)
        if separator is None:
            return None
        position = separator.end()
        offers.append((extension[1], parameters))
    return offers


def negotiate(offers: Offers, settings: Compression) -> Agreement | None:
    """Choose the first offer that can be met; the others are declined by not being answered."""
    for name, parameters in offers:
        if name != NAME or len(parameters) > _PARAMETERS:
            continue
        agreement = _agree(tuple(parameters), settings)
        if agreement is not None:
            return agreement
    return None


@lru_cache(64)  # browsers all offer the same: one agreement serves the connections of a kind
def _agree(
    parameters: tuple[tuple[str, str | None], ...], settings: Compression
) -> Agreement | None:
    asked, bits = dict(parameters), dict.fromkeys(("server", "client"), _MOST_BITS)
    takeover = dict.fromkeys(bits, settings.context_takeover)
    for name, value in parameters:  # 7.1: what is unknown, repeated or invalid declines the offer
        side, _, parameter = name.partition("_")
        if side in bits and parameter == "no_context_takeover" and value is None:
            takeover[side] = False
        elif side in bits and parameter == "max_window_bits" and value in _WINDOW_BITS:
            bits[side] = _WINDOW_BITS[value]
        elif name != "client_max_window_bits" or value is not None:
            return None
    if len(asked) < len(parameters) or bits["server"] < _LEAST_BITS:
        return None
    most = min(bits["server"], settings.window_bits)  # 7.1.2.1: less than was asked for will do
    bits["server"] = max(size for size in (*_SERVER_BITS, settings.window_bits) if size <= most)
    if "client_max_window_bits" in asked:  # else it cannot be bounded (7.1.2.2)
        bits["client"] = min(bits["client"], settings.window_bits)
    answer = [NAME, *(f"{side}_no_context_takeover" for side in bits if not takeover[side])]
    windows = {f"{side}_max_window_bits": bits[side] for side in bits}
    answer += [f"{name}={size}" for name, size in windows.items() if name in asked]
    return Agreement(
        "; ".join(answer), bits["server"], bits["client"], takeover["server"], takeover["client"]
    )


class Deflater:
    """The sending half of one connection.

    Args:
        settings: The app's.
        agreement: The connection's.
    """

    __slots__ = ("_agreement", "_level", "_zlib", "threshold")

    def __init__(self, settings: Compression, agreement: Agreement) -> None:
        #: Messages of fewer bytes are not to be compressed.
        self.threshold = settings.threshold
        self._level = settings.level
        self._agreement = agreement
        self._zlib: zlib._Compress | None = None  # lives on with context takeover alone

    def encode(self, opcode: int, payload: bytes, shared: dict[int, bytes]) -> bytes:
        """A frame of the compressed payload.

        With context takeover the frame must be sent, and in this order.

        Args:
            opcode: Text or binary.
            payload: At least one byte.
            shared: The same dictionary for all receivers of one message: without context takeover,
                or above the window, it is compressed once for each size of window, not once for
                each of them.
        """
        bits = self._agreement.server_bits
        if self._agreement.server_takeover:
            if len(payload) <= 1 << bits:
                if self._zlib is None:
                    self._zlib = _compressor(self._level, bits)
                return _compressed(self._zlib, opcode, payload)
            # Most of it could not refer to what was before, and what follows can refer to nothing
            # else: to begin anew loses little, and one frame serves a room.
            self._zlib = None
        # A window larger than the message would only cost time: 22 us instead of 7 for 512 bytes.
        bits = min(bits, max(_LEAST_BITS, len(payload).bit_length()))
        frame = shared.get(bits)
        if frame is None:
            frame = _compressed(_compressor(self._level, bits), opcode, payload)
            if len(frame) > len(payload):
                frame = encode_frame(opcode, payload)  # legal at any time (6.1)
            shared[bits] = frame
        return frame


def _compressor(level: int, bits: int) -> zlib._Compress:
    # The second table as large as the window: what zlib does by default for the largest. A table
    # below 5 would end a block every few hundred bytes: 1 MiB would take 76 ms instead of 27.
    return zlib.compressobj(level, zlib.DEFLATED, -bits, max(5, bits - 7))


def _compressed(compressor: zlib._Compress, opcode: int, payload: bytes) -> bytes:
    data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
    return encode_frame(RSV1 | opcode, data[:-4])  # 7.2.1


class Inflater(Extension):
    """The receiving half of one connection: inflates within the message limit.

    What it takes piece by piece from wsproto it takes at once by `inflate`; both agree, and both
    agree for every way of cutting a message: within the limit invalid UTF-8 comes before what is
    too big, whatever piece shows it. (But garbage right behind the first byte too many may win:
    zlib looks ahead.)

    Args:
        agreement: The connection's.
        limit: Most bytes of an inflated message.
    """

    name = NAME

    def __init__(self, agreement: Agreement, limit: int) -> None:
        self._limit = min(limit, sys.maxsize - 1)  # one more must be something that zlib can count
        self._window = 1 << max(_LEAST_BITS, agreement.client_bits)
        self._takeover = agreement.client_takeover
        # The last bytes that were inflated. No zlib object outlives a message: the next begins with
        # these, which is a fifth of the memory, and serves final blocks as well (7.2.3.4).
        self._history = b""
        self._zlib: zlib._Decompress | None = None
        self._room = 0
        self._final_blocks = 0
        #: Bytes inflated so far, and what takes as long; whoever counts it may reset it.
        self.inflated = 0
        self._in_message = False
        self._is_text = False
        self._compressed = False  # the message that is coming in is
        self._is_control = False

    def inflate(self, payload: bytes, *, is_text: bool) -> bytes | CloseReason:
        """Inflate a whole message; or the close code it is to be refused with."""
        self._begin(is_text)
        data = self._feed(payload + _END)
        return data if isinstance(data, CloseReason) else self._finish(data)

    def _begin(self, is_text: bool) -> None:
        self._is_text = is_text
        self._room = self._limit
        self._final_blocks = 0
        self._zlib = None
        if not self._takeover:
            self._history = b""

    def _feed(self, data: bytes) -> bytes | CloseReason:
        parts = []
        try:
            while data:
                if self._zlib is None:
                    self._zlib = zlib.decompressobj(-15, zdict=self._history)
                    self.inflated += _BEGIN_COST + len(self._history) // 32
                inflated = self._zlib.decompress(data, self._room + 1)
                if len(inflated) > self._room:
                    return self._too_big(inflated[: self._room])
                if inflated:
                    parts.append(inflated)
                    self._room -= len(inflated)
                    self.inflated += len(inflated)
                    if len(inflated) < self._window:
                        inflated = self._history + inflated
                    self._history = inflated[-self._window :]
                data = b""
                if self._zlib.eof:
                    data = self._zlib.unused_data
                    self._zlib = None
                    self._final_blocks += 1
                    if self._final_blocks > _FINAL_BLOCKS:
                        return CloseReason.INVALID_FRAME_PAYLOAD_DATA
        except zlib.error:
            return CloseReason.INVALID_FRAME_PAYLOAD_DATA
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _finish(self, data: bytes) -> bytes | CloseReason:
        """The message was fed to its end, and must have one."""
        if self._zlib is not None:
            return CloseReason.INVALID_FRAME_PAYLOAD_DATA
        if not self._takeover:
            self._history = b""
        return data

    def _too_big(self, inflated: bytes) -> CloseReason:
        """What does not fit; unless it is invalid before it comes to that."""
        if self._is_text:
            before = self._limit - self._room
            # Up to three bytes of a character may have come before; its first begins it.
            begun = self._history[-min(3, before) :] if before else b""
            begun = begun.lstrip(bytes(range(0x80, 0xC0)))
            try:
                utf_8_decode(begun + inflated, "strict", False)
            except UnicodeDecodeError:
                return CloseReason.INVALID_FRAME_PAYLOAD_DATA
        return CloseReason.MESSAGE_TOO_BIG

    # For wsproto

    def enabled(self) -> bool:
        """Always: it is made where there is an agreement."""
        return True

    def offer(self) -> bool:
        """A server offers nothing."""
        return False

    def frame_inbound_header(
        self,
        proto: FrameDecoder | FrameProtocol,
        opcode: Opcode,
        rsv: RsvBits,
        payload_length: int,
    ) -> CloseReason | RsvBits:
        """Only the first frame of a message says whether it is compressed (section 6)."""
        self._is_control = opcode.iscontrol()
        starts = not self._is_control and opcode is not Opcode.CONTINUATION
        if starts:
            # Within another message it is an error. wsproto tells it only behind the payload, of
            # which nothing must be inflated; the same is true of a continuation of nothing.
            self._compressed = rsv.rsv1 and not self._in_message
            self._begin(opcode is Opcode.TEXT)
        return RsvBits(starts, False, False)

    def frame_inbound_payload_data(
        self, proto: FrameDecoder | FrameProtocol, data: bytes
    ) -> bytes | CloseReason:
        """Inflate a piece of a message; control frames are not compressed."""
        if self._is_control:
            return data
        self._in_message = True  # not before: wsproto may see a header several times
        return self._feed(data) if self._compressed else data

    def frame_inbound_complete(
        self, proto: FrameDecoder | FrameProtocol, fin: bool
    ) -> bytes | CloseReason | None:
        """Inflate the end of a message."""
        if self._is_control or not fin:
            return None
        self._in_message = False
        if not self._compressed:
            return None
        self._compressed = False
        data = self._feed(_END)
        return data if isinstance(data, CloseReason) else self._finish(data)
