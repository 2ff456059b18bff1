"""One WebSocket connection after its opening handshake, without I/O and without a clock.

The contract with the driver, three steps for every input: feed (`receive_data`, `receive_more`
while `has_more`, or `handle_timeout` at `next_deadline`), write what `data_to_send` returns, then
handle the events. Peer input never raises. wsproto is the authority on the protocol: it inflates
fragments, and says what is wrong. In front of it whole messages are taken in place, others gathered
as `_PartialMessage`, as long as their frames are flawless.

Rules: RFC 6455, sections 5 (framing), 7 (closing) and 8.1 (UTF-8); RFC 7692 (compression).
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from math import inf
from struct import Struct
from typing import Any

from wsproto import events as ws
from wsproto.connection import Connection as WSProtoConnection
from wsproto.connection import ConnectionState, ConnectionType
from wsproto.extensions import Extension
from wsproto.frame_protocol import CloseReason

from ..errors import CloseCode
from ..limits import Limits
from .deflate import Agreement, Inflater
from .events import Event, Failed, PeerClosed, PeerLost, PongReceived
from .frames import (
    BINARY,
    CLOSE,
    FIN,
    MASKED,
    PING,
    PONG,
    RSV1,
    TEXT,
    encode_close,
    encode_frame,
    frame_size,
    may_be_sent,
    truncated,
    unmask,
)
from .keepalive import Keepalive

_FINAL_TEXT = FIN | TEXT
_FINAL_BINARY = FIN | BINARY
_COMPRESSED_TEXT = FIN | RSV1 | TEXT
_COMPRESSED_BINARY = FIN | RSV1 | BINARY
_COMPRESSED = (_COMPRESSED_TEXT, _COMPRESSED_BINARY)
_CONTROL = 0x08
_CONTINUATION = 0x00
_FIRST_FRAMES = (TEXT, BINARY, _FINAL_TEXT, _FINAL_BINARY)
_NEXT_FRAMES = (_CONTINUATION, FIN | _CONTINUATION)
_REMOTE_CLOSING = ConnectionState.REMOTE_CLOSING

#: One text for both, which a client can tell apart only by how its bytes were cut.
_INVALID_COMPRESSED = "invalid UTF-8 or compressed data"

#: What one step of parsing takes at most, so that no read, however it was made, keeps the others
#: waiting: messages of the fast path (0.7 us each), other frames (3 to 30 us), inflated bytes.
STEP_MESSAGES = 1024
STEP_FRAMES = 128
STEP_INFLATED = 256 * 1024

_STEP = range(STEP_MESSAGES)

#: By a frame's second byte: what gives the first, the key and the payload of a short one that is
#: masked, in one call; None for others.
_SHORT = tuple(
    Struct(f"Bx4s{second - MASKED}s").unpack_from if MASKED <= second <= MASKED | 125 else None
    for second in range(256)
)


@lru_cache(maxsize=8)
def _short_up_to(most: int) -> tuple[Callable[..., Any] | None, ...]:
    return _SHORT[: MASKED + most + 1] + (None,) * (255 - MASKED - most)


#: The lengths that the field of a header of this size may give (5.2): the least that holds them.
_LENGTHS = {2: range(126), 4: range(126, 2**16), 10: range(2**16, 2**63)}

#: For longer ones: size of the header, least length, what gives first byte, length and key.
_MEDIUM = 8, 126, Struct("!BxH4s").unpack_from
_LONG = 14, 65536, Struct("!BxQ4s").unpack_from


class Connection:
    """The server's side of one WebSocket connection.

    Args:
        limits: `message`, `fragments`, `message_time` and `message_rate` apply.
        keepalive: ``(interval, timeout)`` in seconds, or None for no pings.
        now: The time, in seconds of the driver's clock.
        agreement: What was agreed on about compression.
    """

    __slots__ = (
        "_agreement", "_chunks", "_compressed", "_in_message", "_inflater", "_keepalive",
        "_limits", "_message_fragments", "_message_since", "_message_size", "_partial", "_ping",
        "_plain", "_rate_budget", "_rate_since", "_remaining", "_tail", "_wsproto",
        "close_received", "close_sent", "due", "has_more", "inflated", "only_messages",
    )  # fmt: skip

    def __init__(
        self,
        limits: Limits,
        keepalive: tuple[float, float] | None = None,
        *,
        now: float = 0.0,
        agreement: Agreement | None = None,
    ) -> None:
        self._limits = limits
        self._agreement = agreement
        self._inflater: Inflater | None = None  # made for the first compressed message
        interval, timeout = keepalive or (None, 0.0)
        self._keepalive = Keepalive(interval, timeout, now)
        self._wsproto: WSProtoConnection | None = None  # made for faults and compressed fragments
        #: Frames for `data_to_send`, if there are any.
        self.due: list[bytes] | None = None
        self._ping: bytes | None = None  # payload of our newest ping until it is answered
        #: Whether nothing more is to come: after a close frame, a failure, or the end.
        self.close_received = False
        self.close_sent = False

        #: There is input that was not looked at yet: call `receive_more` before `receive_data`.
        self.has_more = False
        #: What the last step returned are messages, at least one, and it made nothing due.
        self.only_messages = False
        #: Bytes that the last step has inflated, and what takes as long.
        self.inflated = 0

        # No compression, no rate to be held, in the middle of nothing and not about to end: so that
        # a read asks one thing instead of six.
        self._plain = agreement is None and limits.message_rate is None
        # What the last step left: an incomplete header or control frame; all that is to come, if
        # it had enough.
        self._tail = b""
        self._remaining = 0  # payload bytes that wsproto still expects for its current frame
        self._partial: _PartialMessage | None = None  # what has come of a message without it
        self._in_message = False  # between the first and the last frame of a fragmented message
        self._compressed = False  # the message is
        self._message_size = 0
        self._message_fragments = 0
        self._message_since = inf
        self._chunks: BytesIO | None = None  # what wsproto has reported of a message
        self._rate_budget = inf if limits.message_rate is None else _burst(limits.message_rate)
        self._rate_since = now

    # Input

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """Take bytes from the peer; ``b""`` says that the stream ended.

        Returns:
            Events in the order the peer caused them; nothing follows a `PeerClosed`, `Failed` or
            `PeerLost`. Next: write `data_to_send`, then handle the events, then `receive_more`
            while `has_more`.
        """
        self._keepalive.heard_at = now
        self.only_messages = True
        events: list[Event] = []
        if self._plain and data:
            end = len(data)
            position = self._take_whole_frames(data, 0, end, events)
            if position < end:
                self._parse(data, position, events, now)
                self.only_messages &= bool(events) and self.due is None
            return events
        if not data:
            if not self.close_received:
                events.append(PeerLost())
            self._stop_receiving()
            return events
        if self.close_received:
            self.only_messages = False
            return events
        if self._inflater is not None:
            self._inflater.inflated = self.inflated = 0
        if self.close_sent:
            self._discard(data, events)
            self.only_messages = False
            return events
        begun = self._tail or self._remaining or self._in_message or self._partial is not None
        end = len(data)
        anew = not (begun or self.has_more)
        position = self._take_whole_frames(data, 0, end, events) if anew else 0
        if position < end:
            self._parse(data, position, events, now)
        if self._inflater is not None:
            self.inflated = self._inflater.inflated
        if self._rate_budget != inf:
            self._limit_rate(events, now)
        self.only_messages &= bool(events) and self.due is None
        return events

    def receive_more(self, now: float) -> list[Event]:
        """Go on with what `receive_data` took; a step is bounded, whatever the peer has sent."""
        if not self.has_more:
            return []
        rest, self._tail = self._tail, b""
        return self.receive_data(rest, now)

    @property
    def missing(self) -> int:
        """Bytes that are still to come of a frame; 0 where small reads are as good."""
        return 0 if self._partial is None else self._partial.missing

    def _parse(self, data: bytes, position: int, events: list[Event], now: float) -> None:
        size = len(data) - 6
        is_lone = self._plain and position == 0 <= size <= 125 and data[1] == MASKED | size
        if is_lone and data[0] & _CONTROL:  # as a close frame mostly comes
            self._feed_control(data, 0, 6, len(data), events)
            return
        if self._tail:
            data = self._tail + data
            self._tail = b""
        self.has_more = False
        frames = 0
        end = len(data)
        while position < end and not self.close_received:
            if self.missing:
                position = self._gather(data, position, events)
            elif self._remaining:
                stop = min(end, position + self._remaining)
                self._remaining -= stop - position
                self._feed_wsproto(data[position:stop], events)
                position = stop
            else:
                if not self._in_message and len(events) < STEP_MESSAGES:
                    position = self._take_whole_frames(data, position, end, events)
                    if position:  # what began in an earlier read was completed by this one
                        self._message_since = inf
                    if position == end or self.close_received:
                        break
                enough = len(events) >= STEP_MESSAGES or self._inflated_enough()
                if enough or frames == STEP_FRAMES:
                    self._tail = data[position:]
                    self.has_more = True
                    break
                position = self._begin_frame(data, position, end, events)
                frames += 1
        incomplete = self._in_message or self._remaining > 0 or self._partial is not None
        simple = self._agreement is None and self._rate_budget == inf
        busy = incomplete or self._tail or self.close_sent or self.close_received
        self._plain = simple and not busy
        if not incomplete and (self.has_more or not self._tail):
            self._message_since = inf
        elif self._message_since == inf:
            self._message_since = now

    def _inflated_enough(self) -> bool:
        return self._inflater is not None and self._inflater.inflated >= STEP_INFLATED

    def _take_whole_frames(self, data: bytes, position: int, end: int, events: list[Event]) -> int:
        """The fast path: decode whole unfragmented messages in place (1.5 us instead of 9.4).

        Returns:
            Where the first byte stands that it leaves.
        """
        last = end - 6  # where a frame can begin that is whole
        if position > last:
            return position
        limit = self._limits.message
        short = _SHORT if limit >= 125 else _short_up_to(limit)
        for _ in _STEP:
            second = data[position + 1]
            unpack = short[second]
            if unpack is not None:
                stop = position + second - 122  # no mask bit, but six bytes of header
                if stop > end:
                    break
                first, key, payload = unpack(data, position)
            else:
                size, least, unpack = _MEDIUM if second == MASKED | 126 else _LONG
                start = position + size
                if second < MASKED or start > end:
                    break
                first, length, key = unpack(data, position)
                stop = start + length
                # A length that fits a shorter field is an error (5.2), which wsproto reports.
                # (So is every length that `short` lacks.)
                if stop > end or length < least or length > limit:
                    break
                payload = data[start:stop]
            if first == _FINAL_TEXT:
                try:
                    events.append(unmask(payload, key).decode())
                except UnicodeDecodeError:
                    break
            elif first == _FINAL_BINARY:
                events.append(unmask(payload, key))
            elif self._agreement is None or first not in _COMPRESSED or self._inflated_enough():
                break
            else:
                self._inflate_whole(first, unmask(payload, key), events)
                if self.close_received:
                    return stop
            position = stop
            if position > last:
                break
        return position

    def _inflate_whole(self, first: int, payload: bytes, events: list[Event]) -> None:
        data = self._own_inflater().inflate(payload, is_text=first == _COMPRESSED_TEXT)
        if isinstance(data, CloseReason):
            self._fail_message(events, data, compressed=True)
            return
        if first == _COMPRESSED_BINARY:
            events.append(data)
            return
        try:
            events.append(str(data, "utf-8"))
        except UnicodeDecodeError:
            self._fail_message(events, CloseCode.INVALID_DATA, compressed=True)

    def _own_inflater(self) -> Inflater:
        if self._inflater is None:
            assert self._agreement is not None
            self._inflater = Inflater(self._agreement, self._limits.message)
        return self._inflater

    def _begin_frame(self, data: bytes, position: int, end: int, events: list[Event]) -> int:
        """Look at the header of a frame that the fast path left, then hand the frame on.

        Returns:
            Where to go on.
        """
        header, length = frame_size(data, position)
        if not header:
            self._tail = data[position:]
            return end
        first = data[position]
        start = header + (4 if data[position + 1] & MASKED else 0)
        if first & _CONTROL:
            # A control frame is at most 131 bytes: wait for the whole of it, so that what wsproto
            # says of it can be judged against its payload. A longer length field is an error.
            if header == position + 2:
                if end < start + length:
                    self._tail = data[position:]
                    return end
                self._feed_control(data, position, start, start + length, events)
                return start + length
        else:
            excess = self._count_fragment(first, length)
            if excess:
                self._feed_wsproto(data[position:header], events)  # what is malformed is no 1009
                if not self.close_received:
                    self._fail(events, CloseCode.MESSAGE_TOO_BIG, excess)
                return end
            is_flawless = start > header and length in _LENGTHS[header - position]
            if is_flawless and self._is_expected(first):
                if end < start:  # the key is to come, then it is counted
                    self._message_size -= length
                    self._message_fragments -= 1
                    self._tail = data[position:]
                    return end
                self._in_message = not first & FIN
                if self._partial is None:
                    self._partial = _PartialMessage(first & 0x0F)
                self._partial.begin_frame(data[header:start], length, final=bool(first & FIN))
                return self._gather(data, start, events)
            empty = first == _CONTINUATION and data[position + 1] == MASKED
            if empty and self._in_message and start <= end:
                return start  # it was counted, that is all; wsproto would take 20 us for it
            self._in_message = not first & FIN
        stop = min(end, start + length)
        self._remaining = start + length - stop
        self._feed_wsproto(data[position:stop], events)
        return stop

    def _count_fragment(self, first: int, length: int) -> str:
        """Hold a data frame against the limits before a byte of its payload is taken.

        Returns:
            Which limit it passes, if any.
        """
        if not self._in_message:
            self._message_size = self._message_fragments = 0
            self._compressed = self._agreement is not None and bool(first & RSV1)
        self._message_size += length
        self._message_fragments += 1
        limits = self._limits
        # What is compressed is held against the limit as it is inflated. What cannot be compressed
        # grows a little, and empty blocks must not come without end.
        most = limits.message * 2 + 64 if self._compressed else limits.message
        if self._message_size > most:
            return self._too_big()
        if self._message_fragments > limits.fragments:
            return f"message in more than {limits.fragments} fragments (Limits.fragments)"
        return ""

    def _too_big(self) -> str:
        return f"message above {self._limits.message} bytes (Limits.message)"

    def _is_expected(self, first: int) -> bool:
        """Whether a frame that begins so may come now, and is none of a compressed message."""
        if self._in_message:
            return first in _NEXT_FRAMES and self._partial is not None
        return first in _FIRST_FRAMES

    def _gather(self, data: bytes, position: int, events: list[Event]) -> int:
        """Take what has come of a frame's payload."""
        message = self._partial
        assert message is not None
        stop = min(len(data), position + message.missing)
        try:
            message.add(memoryview(data)[position:stop])
        except UnicodeDecodeError:
            self._fail_message(events, CloseCode.INVALID_DATA, compressed=False)
            return stop
        if message.is_complete:
            events.append(message.joined())
            self._partial = None
        return stop

    def _feed_control(
        self, data: bytes, position: int, start: int, stop: int, events: list[Event]
    ) -> None:
        first = data[position]
        if data[position + 1] & MASKED:
            payload = unmask(data[start:stop], data[start - 4 : start])
            # What is flawless changes nothing in wsproto; a connection that sees nothing else never
            # has one.
            if first == FIN | PING:
                self._owe(encode_frame(PONG, payload))
                return
            if first == FIN | PONG:
                self._handle_pong(payload, events)
                return
            code = int.from_bytes(payload[:2], "big") if payload else int(CloseCode.NO_STATUS)
            if first == FIN | CLOSE and (not payload or may_be_sent(code)):
                try:
                    events.append(PeerClosed(code, payload[2:].decode()))
                except UnicodeDecodeError:
                    self._fail(events, CloseCode.INVALID_DATA, "invalid UTF-8")
                else:
                    self._stop_receiving()
                return
        self._feed_wsproto(data[position:stop], events)

    def _feed_wsproto(self, data: bytes, events: list[Event]) -> None:
        if self._wsproto is None:
            extensions: list[Extension] = []
            if self._agreement is not None:
                extensions.append(self._own_inflater())
            self._wsproto = WSProtoConnection(ConnectionType.SERVER, extensions)
        if self._partial is not None:
            # It ends here, which wsproto can only tell of a message whose beginning it knows.
            data = bytes((self._partial.opcode, MASKED, 0, 0, 0, 0)) + data
            self._partial = None
        self._wsproto.receive_data(data)
        for event in self._wsproto.events():
            if isinstance(event, ws.Message):
                self._add_chunk(event, events)
            else:
                assert isinstance(event, ws.CloseConnection)
                if self._wsproto.state is _REMOTE_CLOSING:
                    events.append(PeerClosed(int(event.code), event.reason or ""))
                    self._stop_receiving()
                elif event.code in (CloseCode.INVALID_DATA, CloseCode.MESSAGE_TOO_BIG):
                    self._fail_message(events, int(event.code), compressed=self._compressed)
                else:
                    self._fail(events, int(event.code), event.reason or "")
                return

    def _fail_message(self, events: list[Event], code: int, *, compressed: bool) -> None:
        # wsproto's own text names an offset that depends on how the bytes were split
        reason = _INVALID_COMPRESSED if compressed else "invalid UTF-8"
        self._fail(events, code, self._too_big() if code == CloseCode.MESSAGE_TOO_BIG else reason)

    def _add_chunk(self, event: ws.Message[Any], events: list[Event]) -> None:
        """wsproto reports chunks: join them into messages, once."""
        if event.message_finished:
            self._compressed = False
        if self._chunks is None:
            if event.message_finished:
                events.append(event.data)
                return
            # Not a list: a message that comes in tiny pieces would cost an object for each. Nor a
            # StringIO, which takes four bytes for each character.
            self._chunks = BytesIO()
        is_text = isinstance(event, ws.TextMessage)
        self._chunks.write(event.data.encode() if is_text else event.data)
        if event.message_finished:
            data = self._chunks.getvalue()
            events.append(data.decode() if is_text else data)
            self._chunks = None

    def _handle_pong(self, payload: bytes, events: list[Event]) -> None:
        # As any byte, the pong was taken for life already; only the first answer to our newest ping
        # tells how long the way is. Unsolicited pongs are legal (5.5.3).
        if payload == self._ping:
            events.append(PongReceived(float.fromhex(payload.decode())))
            self.only_messages = False
            self._ping = None

    def _limit_rate(self, events: list[Event], now: float) -> None:
        rate = self._limits.message_rate
        assert rate is not None
        earned = (now - self._rate_since) * rate
        self._rate_since = now
        self._rate_budget = min(_burst(rate), self._rate_budget + earned)
        for index, event in enumerate(events):
            if isinstance(event, (str, bytes)):
                self._rate_budget -= 1
                if self._rate_budget < 0:
                    del events[index:]
                    reason = f"more than {rate:g} messages a second (Limits.message_rate)"
                    self._fail(events, CloseCode.POLICY_VIOLATION, reason)
                    return

    def _discard(self, data: bytes, events: list[Event]) -> None:
        """After our close frame only the peer's own is of interest."""
        discarded: list[Event] = []
        self._parse(data, 0, discarded, 0.0)
        self._message_since = inf
        self.due = None  # a ping that comes while we are closing is not answered
        for event in discarded:
            if isinstance(event, PeerClosed):
                events.append(event)
            elif isinstance(event, Failed):
                events.append(PeerLost("protocol violation while closing"))

    def _fail(self, events: list[Event], code: int, reason: str) -> None:
        events.append(Failed(code, truncated(reason)))
        # 7.1.7: who fails a connection does not wait for the peer's close frame. It could not be
        # found any more in a stream that is no longer WebSocket.
        self._stop_receiving()

    def _stop_receiving(self) -> None:
        self.close_received = True
        self.only_messages = self._plain = self.has_more = False
        self._tail = b""
        self._chunks = self._partial = None
        self._message_since = inf

    # Output

    def _owe(self, frame: bytes) -> None:
        if self.due is None:
            self.due = []
        self.due.append(frame)

    def data_to_send(self) -> list[bytes]:
        """Control frames that are due now, oldest first; each is owed once."""
        due = self.due
        if due is None:
            return []
        self.due = None
        return due

    def close(self, code: int, reason: str = "") -> bytes:
        """Begin or answer the closing handshake. How long to wait for the peer's close frame
        (until `close_received`) is the driver's to decide.

        Returns:
            The close frame to write behind everything queued; empty when it was sent before.
        """
        if self.close_sent:
            return b""
        self.close_sent = True
        self._plain = False
        self.due = None
        return encode_close(code, reason)

    # Time

    def next_deadline(self) -> float:
        """When to call `handle_timeout` next; infinity when nothing waits for time."""
        if self.close_sent or self.close_received:
            return inf
        return min(self._keepalive.next_deadline(), self._message_since + self._limits.message_time)

    def handle_timeout(self, now: float, *, reading: bool = True) -> list[Event]:
        """Do what time demands: ping, fail a silent peer or a dripping message.

        Args:
            now: The time.
            reading: Whether input was being read; while it is not, silence proves nothing.
        """
        events: list[Event] = []
        if self.close_sent or self.close_received:
            return events
        if not reading:
            if self._message_since != inf:
                self._message_since = now
            if self._keepalive.excuse(now):
                self._send_ping(now)
        elif now >= self._message_since + self._limits.message_time:
            seconds = self._limits.message_time
            reason = f"message took longer than {seconds:g} s (Limits.message_time)"
            self._fail(events, CloseCode.POLICY_VIOLATION, reason)
        elif self._keepalive.is_dead(now):
            self._fail(events, CloseCode.INTERNAL_ERROR, "keepalive: no answer to a ping")
        elif self._keepalive.ping_due(now):
            self._send_ping(now)
        return events

    def _send_ping(self, now: float) -> None:
        self._ping = float(now).hex().encode()
        self._owe(encode_frame(PING, self._ping))
        self._keepalive.ping_sent(now)


def _burst(rate: float) -> float:
    """How many messages may come at once: ten seconds' worth, and never less than one."""
    return max(1.0, rate * 10)


#: A message is gathered in pieces of at least so many bytes.
_PIECE = 4096

_Decoder = getincrementaldecoder("utf-8")


class _PartialMessage:
    """A message on its way. Text is looked at as it comes, so that what is invalid fails at once
    (8.1)."""

    __slots__ = ("_chunks", "_decoder", "_is_cut", "_is_final", "_key", "missing", "opcode")

    def __init__(self, opcode: int) -> None:
        self.opcode = opcode
        self._chunks: list[bytes] = [b""]
        self._decoder = _Decoder() if opcode == TEXT else None
        self._is_cut = False  # the last character so far
        self._key = b""
        self._is_final = False
        #: Bytes of the current frame that are to come.
        self.missing = 0

    def begin_frame(self, key: bytes, length: int, *, final: bool) -> None:
        self._key = key
        self._is_final = final
        self.missing = length

    @property
    def is_complete(self) -> bool:
        return self._is_final and not self.missing

    def add(self, masked: memoryview) -> None:
        """Take bytes of the current frame; raises UnicodeDecodeError."""
        turned = len(masked) % 4
        chunk = unmask(masked, self._key)
        self._key = self._key[turned:] + self._key[:turned]
        self.missing -= len(chunk)
        if self._decoder is not None and (self._is_cut or not chunk.isascii()):
            # Not kept: one character may make all others take four bytes.
            self._decoder.decode(chunk, self.is_complete)
            self._is_cut = bool(self._decoder.getstate()[0])
        # A buffer that grows would copy all of it again and again; a message that comes in tiny
        # pieces must not cost an object for each.
        if len(self._chunks[-1]) < _PIECE:
            self._chunks[-1] += chunk
        else:
            self._chunks.append(chunk)

    def joined(self) -> str | bytes:
        """All of it."""
        data = b"".join(self._chunks)
        return data if self._decoder is None else data.decode()
