"""Every limit of the contract, held by a served app, on real sockets and all event loops.

The table (at the end) says how a client reaches a limit, and what becomes of it exactly there and
beyond: one byte, one message or one connection more, or a round of housekeeping later. Each row is
played twice, by its function. Whatever happens, a neighbour on the same server talks on.

Time stands still unless a test moves it. Where the kernel's buffers count they are small.
"""

from __future__ import annotations

import fcntl
import resource
import select
import socket
import ssl
import struct
import termios
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import fields
from functools import cache
from itertools import pairwise
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

import anyio
import anyio.abc
import pytest
from anyio.lowlevel import checkpoint
from wsproto import events

from roomsock import App, Limits, Request, WebSocket
from roomsock.driver import Driver
from roomsock.limits import KIB, MIB
from roomsock.protocol.outbox import Outbox
from roomsock.server import ROUND, Server
from roomsock.transport import READ_SIZE

from . import contract
from .client import PATIENCE, Client, Refusal, connected, http, open_stream, upgrade_request
from .clock import FakeClock, settled
from .contract import deflated, masked, only_linux, served, text, until

logged = contract.logged

STILL_HERE = "still here"
KEPT = "took 10"  # what who says so is answered


class Case:
    """A row on its way: the app serves a page, a neighbour, and ``/r``, where the limit is reached.
    What happens there the functions of the rows choose."""

    def __init__(self, app: App, value: Any = 0, beyond: bool = False) -> None:
        self.value = value
        self.beyond = int(beyond)
        self.clock = FakeClock()
        self.server: Server
        self.neighbour: Client
        self.tls: ssl.SSLContext | None = None
        self.sockets: list[WebSocket] = []
        self.release = anyio.Event()
        self.story: list[str] = []
        self.serve: Callable[[WebSocket], Awaitable[None]] = measure
        self.enter: Callable[[WebSocket], Awaitable[None]] = _nothing
        self.fail: Callable[[WebSocket], Awaitable[None]] = _nothing
        self.leave: Callable[[WebSocket], Awaitable[None]] = _nothing
        self.page: Callable[[Request], Awaitable[Any]] = _page
        self.app = app
        self.app.add_serve("/r", self._serve)
        self.app.add_serve("/neighbour", measure)
        self.app.add_on_connect("/r", lambda ws: self.enter(ws))
        self.app.add_on_error("/r", lambda ws, error: self.fail(ws))
        self.app.add_on_close("/r", lambda ws, reason: self.leave(ws))
        self.app.add_get("/page", lambda request: self.page(request))
        self.app.add_post("/page", lambda request: self.page(request))

    async def _serve(self, ws: WebSocket) -> None:
        self.sockets.append(ws)
        await self.serve(ws)

    @asynccontextmanager
    async def served(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
        async with served(self.app, self.clock, tls=tls) as self.server:
            yield

    @property
    def seconds(self) -> float:
        """How long something takes here: a round of housekeeping less than it may, or more."""
        return float(self.value) + (ROUND if self.beyond else -ROUND)

    def is_there(self) -> bool:
        """Whether another than the neighbour is connected."""
        return self.server.connections > 1

    async def ws(self) -> WebSocket:
        await until(lambda: self.sockets)
        return self.sockets[0]

    def driver(self) -> Driver:
        """The connection on ``/r``, from the inside: what it holds cannot be seen from outside."""
        return next(each for each in self.server._drivers if each._ws is self.sockets[0])

    # Clients

    def connected(self, headers: Iterable[tuple[str, str]] = (), path: str = "/r") -> Any:
        return connected(self.server, path, headers)

    async def visit(self, headers: Iterable[tuple[str, str]] = (), path: str = "/r") -> str:
        """What a client is told that comes and talks."""
        try:
            async with self.connected(headers, path) as client:
                await client.send(STILL_HERE)
                return await fate(client)
        except Refusal as refusal:
            told = f"{refusal.status} {refusal.body.decode().strip()}"
            again = refusal.headers.get("retry-after")
            return told + (f", Retry-After: {again}" if again else "")

    async def ask(self, request: bytes) -> str:
        """What an HTTP client is told."""
        status, _, body = await http(self.server, request)
        return f"{status} {body.decode().strip()}"

    async def drip(self, send: Callable[[bytes], Awaitable[None]], data: bytes) -> None:
        """Send byte by byte, so that the last one leaves `seconds` after the first."""
        steps = int(self.seconds / ROUND)
        with suppress(anyio.BrokenResourceError):  # the server may be gone by then
            for step in range(steps):
                await send(data[step : step + 1])
                await self.clock.advance(ROUND)
            await send(data[steps:])

    @asynccontextmanager
    async def deaf(self) -> AsyncIterator[tuple[Client, WebSocket, Outbox]]:
        """A client that does not read, for whom the kernel takes no more."""
        async with narrow_socket(self.server) as sock, stream_over(sock) as stream:
            client = Client(stream)
            await client.handshake("/r")
            ws = await self.ws()
            ws.send_bytes(bytes(256 * KIB))
            await self.stuck()
            yield client, ws, self.driver().recipient._outbox

    async def stuck(self) -> None:
        """Wait until the kernel does not take a byte any more, however long one waits."""
        sock = self.driver()._transport._sock
        await until(lambda: self.driver().recipient.blocked and is_full(sock))
        await settled()


async def measure(ws: WebSocket) -> None:
    async for message in ws:
        await ws.send_text(f"took {len(message)}")


async def _nothing(ws: WebSocket) -> None:
    pass


async def _page(request: Request) -> str:
    return f"took {len(request.body)}" if request.method == "POST" else "page"


async def fate(client: Client) -> str:
    """What a client is told next: a text, or how its connection ends."""
    while True:
        event = await client.event()
        if event is None:
            return "dropped"
        if isinstance(event, events.TextMessage):
            return str(event.data)
        if isinstance(event, events.CloseConnection):
            return f"{int(event.code)} {event.reason or ''}".strip()


async def answer(stream: anyio.abc.ByteStream) -> str:
    """The status of an HTTP answer, and its body."""
    data = b""
    with anyio.fail_after(PATIENCE):
        try:
            while not data.startswith(b"HTTP/1.1 101 ") or b"\r\n\r\n" not in data:
                data += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            if not data:
                return "dropped"
    head, _, body = data.partition(b"\r\n\r\n")
    return f"{int(head.split()[1])} {body.decode().strip()}".strip()


@asynccontextmanager
async def narrow_socket(server: Server) -> AsyncIterator[socket.socket]:
    """A connection whose kernels hold little: no more than some 100 KiB on the way to the client,
    as long as it does not read."""
    server._listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * KIB)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * KIB)
        sock.connect(server.addresses[0])
        sock.setblocking(False)
        yield sock


@asynccontextmanager
async def stream_over(sock: socket.socket) -> AsyncIterator[anyio.abc.SocketStream]:
    """What reads from a socket; on asyncio it does so from the beginning, asked or not."""
    stream = await anyio.abc.SocketStream.from_socket(sock)
    try:
        yield stream
    finally:
        await anyio.aclose_forcefully(stream)


def count_of(sock: socket.socket, request: int) -> int:
    (count,) = struct.unpack("i", fcntl.ioctl(sock, request, bytes(4)))
    return int(count)


def is_full(sock: socket.socket) -> bool:
    """Whether the kernel takes nothing more, and can send nothing more either: its peer's window
    is closed, and has confirmed all that was sent (tcp(7): SIOCOUTQ, SIOCOUTQNSD)."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    unsent = count_of(sock, 0x894B)
    return not poll.poll(0) and count_of(sock, termios.TIOCOUTQ) == unsent > 0


# Messages


async def a_text_frame(case: Case) -> str:
    async with case.connected() as client:
        await client.send("x" * (case.value + case.beyond))
        return await fate(client)


async def a_text_frame_of_two_bytes_a_character(case: Case) -> str:
    async with case.connected() as client:
        await client.send("ü" * (case.value // 2) + "x" * case.beyond)
        return await fate(client)


async def a_binary_frame(case: Case) -> str:
    async with case.connected() as client:
        await client.send(bytes(case.value + case.beyond))
        return await fate(client)


async def a_text_in_fragments(case: Case) -> str:
    async with case.connected() as client:
        await client.send_raw(masked(0x01, b"x" * 400) + masked(0x00))
        await settled()
        await client.send_raw(masked(0x00, b"x" * 400) + masked(0x89, b"between"))
        await settled()
        await client.send_raw(masked(0x80, b"x" * (case.value - 800 + case.beyond)))
        return await fate(client)


async def a_binary_message_in_large_fragments(case: Case) -> str:
    async with case.connected() as client:
        await client.send_raw(masked(0x02, bytes(100_000)))
        await client.send_raw(masked(0x80, bytes(case.value - 100_000 + case.beyond)))
        return await fate(client)


# Compressed messages: RSV1 stands in their first frame (RFC 7692, section 6).

OFFER = [("Sec-WebSocket-Extensions", "permessage-deflate")]


async def send_compressed(case: Case, first: int, data: bytes, *, pieces: int = 1) -> str:
    """What a client is told whose message came compressed, in so many frames."""
    async with case.connected(OFFER) as client:
        assert "permessage-deflate" in client.headers["sec-websocket-extensions"]
        cuts = [len(data) * piece // pieces for piece in range(pieces + 1)]
        for piece, (start, stop) in enumerate(pairwise(cuts)):
            opcode = 0x40 | first if piece == 0 else 0
            final = 0x80 if piece == pieces - 1 else 0
            await client.send_raw(masked(final | opcode, data[start:stop]) + masked(0x89))
        return await fate(client)


async def a_compressed_text(case: Case) -> str:
    return await send_compressed(case, 1, deflated(b"x" * (case.value + case.beyond)))


async def a_compressed_text_of_many_reads(case: Case) -> str:
    message = Random(1).randbytes((case.value + case.beyond) // 2 + 1).hex().encode()
    message = message[: case.value + case.beyond]
    assert len(deflated(message)) > READ_SIZE
    return await send_compressed(case, 1, deflated(message))


async def a_compressed_text_in_fragments(case: Case) -> str:
    return await send_compressed(case, 1, deflated(b"x" * (case.value + case.beyond)), pieces=4)


async def a_compressed_binary(case: Case) -> str:
    return await send_compressed(case, 2, deflated(bytes(case.value + case.beyond)))


async def a_compressed_binary_that_did_not_shrink(case: Case) -> str:
    message = Random(1).randbytes(case.value + case.beyond)
    assert len(deflated(message)) > len(message)
    return await send_compressed(case, 2, deflated(message))


@cache
def bomb() -> bytes:
    return deflated(bytes(60_000_000))


async def a_frame_of_64_kib_that_inflates_to_60_mb(case: Case) -> str:
    assert len(bomb()) < 64 * KIB
    return await send_compressed(case, 2, bomb() if case.beyond else deflated(bytes(case.value)))


async def fragments_that_inflate_to_60_mb(case: Case) -> str:
    data = bomb() if case.beyond else deflated(bytes(case.value))
    return await send_compressed(case, 2, data, pieces=10)


async def compressed_fragments_most_of_them_empty(case: Case) -> str:
    async with case.connected(OFFER) as client:
        between = masked(0x00) * (case.value - 2 + case.beyond)
        await client.send_raw(masked(0x41, deflated(b"x")) + between + masked(0x80))
        return await fate(client)


async def a_compressed_message_that_drips(case: Case) -> str:
    async with case.connected(OFFER) as client:
        message = b"".join(b"%02d" % number for number in range(30))
        await case.drip(client.send_raw, masked(0xC1, deflated(message)))
        return await fate(client)


# Fragments, time and rate


async def fragments_most_of_them_empty(case: Case) -> str:
    async with case.connected() as client:
        between = masked(0x00) * (case.value - 2 + case.beyond)
        await client.send_raw(masked(0x01, b"x") + between + masked(0x80))
        return await fate(client)


async def a_message_that_drips(case: Case) -> str:
    async with case.connected() as client:
        await case.drip(client.send_raw, text("x" * 20))
        return await fate(client)


async def a_ping_that_drips(case: Case) -> str:
    async with case.connected() as client:
        await case.drip(client.send_raw, masked(0x89, b"x" * 20))
        await client.send_raw(text(STILL_HERE))
        return await fate(client)


async def a_large_frame_that_drips(case: Case) -> str:
    async with case.connected() as client:
        frame = masked(0x82, bytes(70_000))
        await client.send_raw(frame[:60_000])
        await case.drip(client.send_raw, frame[60_000:])
        return await fate(client)


async def fragments_that_drip_between_pings(case: Case) -> str:
    async with case.connected() as client:
        await client.send_raw(masked(0x01, b"x"))
        for _ in range(int(case.seconds / ROUND)):
            await case.clock.advance(ROUND)
            await client.send_raw(masked(0x00, b"") + masked(0x89, b"I live"))
        await client.send_raw(masked(0x80, b"0123456789"))
        return await fate(client)


async def a_message_that_drips_in_a_flood_of_pings(case: Case) -> str:
    """Housekeeping always comes while the server is busy with what it has read."""
    async with case.connected() as client:
        await client.send_raw(masked(0x01, b"x"))
        await settled()
        conn = case.driver()._conn
        for _ in range(int(case.seconds / ROUND)):
            await client.send_raw(masked(0x89) * 1000)
            await until(lambda: conn.has_more or conn.close_received)
            case.clock.tick()
            for _ in range(3):  # until housekeeping has been round
                await checkpoint()
            assert conn.has_more or conn.close_received
            await settled()
        await client.send_raw(masked(0x80, b"0123456789"))
        return await fate(client)


async def a_message_that_drips_at_a_busy_handler(case: Case) -> str:
    async def busy(ws: WebSocket) -> None:
        await ws.receive()
        await case.release.wait()
        await measure(ws)

    case.serve = busy
    async with case.connected() as client:
        await client.send("go")
        await case.clock.advance(1)
        await case.drip(client.send_raw, text("x" * 20))
        case.release.set()
        return await fate(client)


async def a_burst_of_ten_seconds(case: Case) -> str:
    async with case.connected() as client:
        burst = int(case.value * 10)
        pings = masked(0x89) * 10  # which are no messages
        await client.send_raw(text("x") * burst + pings + text("x") * case.beyond)
        for _ in range(burst):
            assert await fate(client) == "took 1"
        if not case.beyond:
            await case.clock.advance(1)
            await client.send(STILL_HERE)
        return await fate(client)


async def a_stream_behind_a_burst(case: Case) -> str:
    async with case.connected() as client:
        burst = int(case.value * 10)
        for messages in [burst, *[int(case.value) + case.beyond] * 3]:
            await client.send_raw(text("x") * messages)
            for _ in range(messages):
                if (told := await fate(client)) != "took 1":
                    return told
            await case.clock.advance(1)
        await client.send(STILL_HERE)
        return await fate(client)


async def messages_for_a_busy_handler(case: Case) -> str:
    """The frames count, the one that the handler is busy with among them. If they are a byte less
    than the limit, the next is taken, too."""
    frame = text("x" * (KIB - 8))
    first = text("x" * (case.value - 1 + case.beyond - 3 * len(frame) - 8))
    return await keep_busy(case, first, [frame] * 4)


async def compressed_messages_for_a_busy_handler(case: Case) -> str:
    """What the frames become counts."""
    frame = masked(0xC2, deflated(bytes(16 * KIB)))
    assert len(frame) < 100
    return await keep_busy(case, frame, [frame] * (4 if case.beyond else 1))


async def keep_busy(case: Case, first: bytes, frames: list[bytes]) -> str:
    case.serve = lambda ws: wait_then_measure(case, ws)
    async with case.connected(OFFER) as client:
        await client.send_raw(first)
        await case.ws()
        await case.clock.advance(1)
        for frame in frames:
            await client.send_raw(frame)
            await settled()
        held = count_of(case.driver()._transport._sock, termios.FIONREAD)
        assert held in (0, len(frames[-1]))
        case.release.set()
        for _ in (first, *frames):  # nothing is lost
            assert (await fate(client)).startswith("took ")
        return f"the kernel holds {'one' if held else 'none'}"


async def wait_then_measure(case: Case, ws: WebSocket) -> None:
    first = await ws.receive()
    await case.release.wait()
    ws.send_text(f"took {len(first)}")
    await measure(ws)


# What is left unread


async def bytes_for_who_does_not_read(case: Case) -> str:
    async with case.deaf() as (client, ws, outbox):
        header = 10
        ws.send_bytes(bytes(case.value - outbox.size - header + case.beyond))
        assert case.beyond or outbox.size == case.value
        assert len(case.app.room("/r")) == 1 - case.beyond  # at once
        if not case.beyond:
            for _ in range(2):
                assert isinstance(await client.event(), events.BytesMessage)
            await client.send(STILL_HERE)
        return await fate(client)


async def room_messages_for_who_does_not_read(case: Case) -> str:
    async with case.deaf() as (client, _, outbox):
        room = case.app.room("/r")
        room.send_text("first")
        room.send_bytes(bytes(case.value - outbox.size - 10 - len(b"..last")))
        room.send_text("last")
        assert outbox.size == case.value
        await settled()
        for _ in range(case.beyond):
            room.send_text("newer")
        told = []
        while (event := await client.event()).data != KEPT:
            if isinstance(event, events.TextMessage):
                told.append(event.data)
            elif len(event.data) != 256 * KIB:
                await client.send(STILL_HERE)
        return f"{' '.join(told)}, {case.server.counters.dropped_messages} dropped"


async def messages_for_who_does_not_read(case: Case) -> str:
    async with case.deaf() as (client, ws, outbox):
        while len(outbox) < case.value:
            ws.send_bytes(b"")
        await settled()
        for _ in range(case.beyond):
            ws.send_bytes(b"")
        if not case.beyond:
            for _ in range(case.value):
                assert isinstance(await client.event(), events.BytesMessage)
            await client.send(STILL_HERE)
        return await fate(client)


async def pings_above_as_many_bytes_as_may_wait(case: Case) -> str:
    async with case.deaf() as (client, ws, outbox):
        room = 0 if case.beyond else len(PONG)
        ws.send_bytes(bytes(case.value - outbox.size - 10 - room))
        await ping(case, client)
        held = outbox.size - case.value
        assert held in (0, len(PONG))
        await read_on(client, 2)
        return "one pong more" if held else "as much"


async def pings_above_as_many_messages_as_may_wait(case: Case) -> str:
    async with case.deaf() as (client, ws, outbox):
        waiting = case.value if case.beyond else case.value - 1
        while len(outbox) < waiting:
            ws.send_bytes(b"")
        await ping(case, client)
        held = len(outbox) - case.value
        assert held in (0, 1)
        await read_on(client, waiting)
        return "one pong more" if held else "as many"


PONG = b"\x8a\x044999"


async def ping(case: Case, client: Client) -> None:
    """One ping, for whose answer there is room; or a flood of them, for which there is none."""
    numbers = range(5000) if case.beyond else [4999]
    await client.send_raw(b"".join(masked(0x89, b"%04d" % number) for number in numbers))
    sock = case.driver()._transport._sock
    await until(lambda: not count_of(sock, termios.FIONREAD))
    await settled()


async def read_on(client: Client, messages: int) -> None:
    """Who reads again gets all that waited, and the newest pong; and stays."""
    payloads = []
    while messages or not payloads:
        event = await client.event()
        if isinstance(event, events.Pong):
            payloads.append(bytes(event.payload))
        else:
            assert isinstance(event, events.BytesMessage)
            messages -= 1
    assert payloads == [PONG[2:]]
    await client.send(STILL_HERE)
    assert await fate(client) == KEPT


async def an_awaited_send_to_who_does_not_read(case: Case) -> str:
    async with case.deaf() as (client, ws, outbox), anyio.create_task_group() as tg:

        async def produce() -> None:
            header = 10
            await ws.send_bytes(bytes(case.value - outbox.size - header + case.beyond))
            case.story.append("goes on")

        tg.start_soon(produce)
        await settled()
        story = [*case.story, "waits"]
        for _ in range(2):
            assert isinstance(await client.event(), events.BytesMessage)
        await until(lambda: case.story)
        return story[0]


async def a_client_that_reads_nothing(case: Case) -> str:
    async with case.deaf() as (client, _, _):
        await case.clock.advance(ROUND)  # what the kernel took so far is known from now on
        await case.clock.advance(case.seconds)
        assert case.is_there() is not bool(case.beyond)
        if not case.beyond:
            await client.send(STILL_HERE)
        return await fate(client)


async def a_client_that_sends_and_reads_nothing(case: Case) -> str:
    async with case.deaf() as (client, _, _):
        await case.clock.advance(ROUND)
        await case.drip(client.send_raw, text("I live") * 10)
        assert case.is_there() is not bool(case.beyond)
        return "dropped" if case.beyond else await fate(client)


async def a_page_that_is_not_read(case: Case) -> str:
    async def page(request: Request) -> bytes:
        return bytes(MIB)

    case.page = page
    async with narrow_socket(case.server) as sock:
        sock.send(REQUEST)
        await until(lambda: case.is_there())
        [driver] = [each for each in case.server._drivers if each._ws is None]
        await until(lambda: driver.recipient.blocked and is_full(driver._transport._sock))
        await case.clock.advance(ROUND)
        await case.clock.advance(case.seconds)
        assert case.is_there() is not bool(case.beyond)
        async with stream_over(sock) as stream:
            told = await answer(stream)
        return "200 read" if len(told) == len("200 ") + MIB else "dropped"


# Requests

REQUEST = b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n"


async def the_headers_of_a_page(case: Case) -> str:
    padding = case.value + case.beyond - len(REQUEST) - len("X: \r\n")
    return await case.ask(REQUEST[:-2] + b"X: " + b"x" * padding + b"\r\n\r\n")


async def the_headers_of_an_upgrade(case: Case) -> str:
    bare = len(upgrade_request("/r", [("X", "")]))
    return await case.visit([("X", "x" * (case.value + case.beyond - bare))])


async def many_headers_for_a_page(case: Case) -> str:
    more = case.value + case.beyond - 1
    return await case.ask(REQUEST[:-2] + b"X: x\r\n" * more + b"\r\n")


async def many_headers_for_an_upgrade(case: Case) -> str:
    bare = upgrade_request("/r").count(b": ")
    return await case.visit([("X", "x")] * (case.value + case.beyond - bare))


async def the_target_of_a_page(case: Case) -> str:
    padding = case.value + case.beyond - len("/page?")
    return await case.ask(REQUEST.replace(b"/page", b"/page?" + b"x" * padding))


async def the_target_of_an_upgrade(case: Case) -> str:
    return await case.visit(path="/r?" + "x" * (case.value + case.beyond - len("/r?")))


async def a_body_with_its_length(case: Case) -> str:
    size = case.value + case.beyond
    head = REQUEST.replace(b"GET", b"POST")[:-2] + b"Content-Length: %d\r\n\r\n" % size
    return await case.ask(head + b"x" * size)


async def a_body_in_chunks(case: Case) -> str:
    head = REQUEST.replace(b"GET", b"POST")[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    last = case.value - 500 + case.beyond
    chunks = b"1f4\r\n" + b"x" * 500 + b"\r\n%x\r\n" % last + b"x" * last + b"\r\n0\r\n\r\n"
    return await case.ask(head + chunks)


# How many


async def one_more_connection(case: Case) -> str:
    return await visit_in_a_crowd(case)


async def one_more_connection_from_an_address(case: Case) -> str:
    told = await visit_in_a_crowd(case)
    # None of which concerns another address.
    host, port = case.server.addresses[0]
    stream = await anyio.connect_tcp(str(host), int(port), local_host="127.0.0.2")
    async with stream:
        await stream.send(upgrade_request("/r"))
        assert (await stream.receive()).startswith(b"HTTP/1.1 101 ")
    return told


async def visit_in_a_crowd(case: Case) -> str:
    """The neighbour is one of the crowd, and the visitor another."""
    async with AsyncExitStack() as crowd:
        clients = [
            await crowd.enter_async_context(case.connected())
            for _ in range(case.value - 2 + case.beyond)
        ]
        told = await case.visit()
        if case.beyond:
            status, headers, _ = await http(case.server, REQUEST)
            assert (status, headers["retry-after"]) == (503, "5")
            assert case.server.counters.over_limit == 2
            await clients[0].aclose()  # one has left: the next is let in
            await until(lambda: case.server.connections < case.value)
            assert await case.visit() == KEPT
        return told


async def one_more_room(case: Case) -> str:
    async def enter_rooms(ws: WebSocket) -> None:
        try:
            for number in range(case.value - 1 + case.beyond):
                ws.join(str(number))
        except RuntimeError as error:
            ws.send_text(str(error))
        await measure(ws)

    case.serve = enter_rooms
    return await case.visit()


# How long


async def a_tls_handshake_that_drips(case: Case) -> str:
    assert case.tls is not None
    sent = ssl.MemoryBIO()
    client = case.tls.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    async with await open_stream(case.server) as stream:
        await case.drip(stream.send, sent.read())
        with anyio.fail_after(PATIENCE):
            try:
                hello = await stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return "dropped"
        assert hello[0] == 22  # RFC 8446, section 5.1: handshake
        return "answered"


async def a_request_that_drips(case: Case) -> str:
    async with await open_stream(case.server) as stream:
        await case.drip(stream.send, upgrade_request("/r"))
        return await answer(stream)


async def a_body_that_drips(case: Case) -> str:
    head = REQUEST.replace(b"GET", b"POST")[:-2] + b"Content-Length: 20\r\n\r\n"
    async with await open_stream(case.server) as stream:
        await stream.send(head)
        await case.drip(stream.send, b"x" * 20)
        return await answer(stream)


async def an_on_connect_that_takes_long(case: Case) -> str:
    case.enter = lambda ws: case.release.wait()
    async with await open_stream(case.server) as stream:
        await stream.send(upgrade_request("/r"))
        await case.clock.advance(case.seconds)
        case.release.set()
        return await answer(stream)


async def a_page_that_takes_long(case: Case) -> str:
    async def page(request: Request) -> str:
        await case.release.wait()
        return "at last"

    case.page = page
    async with await open_stream(case.server) as stream:
        await stream.send(REQUEST)
        await case.clock.advance(case.seconds)
        case.release.set()
        return await answer(stream)


async def a_request_and_an_on_connect_that_share_it(case: Case) -> str:
    case.enter = lambda ws: case.release.wait()
    async with await open_stream(case.server) as stream:
        request = upgrade_request("/r")
        await stream.send(request[:20])
        await case.clock.advance(1)
        await stream.send(request[20:])
        await case.clock.advance(case.seconds - 1)
        case.release.set()
        return await answer(stream)


async def a_close_that_is_not_answered(case: Case) -> str:
    case.serve = _nothing
    async with case.connected() as client:
        assert await fate(client) == "1000"
        await case.clock.advance(case.seconds)
        return "waits" if case.is_there() else "dropped"


async def a_client_that_leaves_its_side_open(case: Case) -> str:
    async with case.connected() as client:
        await client.close()
        assert await fate(client) == "1000"
        await client.ended()
        await case.clock.advance(case.seconds)
        return "waits" if case.is_there() else "dropped"


async def a_close_that_is_answered_by_something_else(case: Case) -> str:
    case.serve = _nothing
    async with case.connected() as client:
        assert await fate(client) == "1000"
        await case.drip(client.send_raw, text("is anybody there?"))
        return "waits" if case.is_there() else "dropped"


async def a_client_that_sends_on(case: Case) -> str:
    async with case.connected() as client:
        await client.close()
        assert await fate(client) == "1000"
        await client.ended()
        await case.drip(client.send_raw, b"is anybody there?")
        return "waits" if case.is_there() else "dropped"


async def wait_and_tell(case: Case) -> None:
    try:
        await case.release.wait()
    except anyio.get_cancelled_exc_class():
        case.story.append("cancelled")
        raise
    case.story.append("finished")


async def an_on_connect_without_its_client(case: Case) -> str:
    async def enter(ws: WebSocket) -> None:
        ws.accept()
        await wait_and_tell(case)

    case.enter = enter
    async with case.connected() as client:
        await case.clock.advance(1)
        await client.aclose()
        await case.clock.advance(case.seconds)
        case.release.set()
        await until(lambda: case.story)
        return case.story[0]


async def a_handler_without_its_client(case: Case) -> str:
    case.serve = lambda ws: wait_and_tell(case)
    async with case.connected() as client:
        await case.clock.advance(1)  # from now on the end is noticed at once
        await client.aclose()
        await case.clock.advance(case.seconds)
        case.release.set()
        await until(lambda: case.story)
        return case.story[0]


async def a_handler_that_will_not_stop(case: Case) -> str:
    async def stubborn(ws: WebSocket) -> None:
        with anyio.CancelScope(shield=True):
            await case.release.wait()

    async def leave(ws: WebSocket) -> None:
        case.story.append("told by its own task" if case.release.is_set() else "told by another")

    case.serve, case.leave = stubborn, leave
    async with case.connected() as client:
        await case.clock.advance(1)
        await client.aclose()
        await case.clock.advance(case.value)
        await case.clock.advance(case.seconds)
        told = "told by another task" if case.story else "waits"
        case.release.set()
        await until(lambda: case.story)
        await settled()
        assert len(case.story) == 1
        return told


async def an_on_close_that_takes_long(case: Case) -> str:
    case.leave = lambda ws: wait_and_tell(case)
    return await end_slowly(case)


async def an_error_handler_that_takes_long(case: Case) -> str:
    case.fail = lambda ws: wait_and_tell(case)
    return await end_slowly(case)


async def end_slowly(case: Case) -> str:
    async with case.connected() as client:
        await client.aclose()
        await case.clock.advance(case.seconds)
        case.release.set()
        await until(lambda: case.story)
        return case.story[0]


async def a_handler_that_goes_on_in_a_stop(case: Case) -> str:
    case.serve = lambda ws: wait_and_tell(case)
    async with case.connected() as client:
        await case.ws()
        case.server.shutdown()
        assert await fate(client) == "1001"
        await client.close()
        await case.clock.advance(case.seconds)
        case.release.set()
        await until(lambda: case.story)
        return case.story[0]


async def a_client_that_does_not_answer_in_a_stop(case: Case) -> str:
    async with case.connected() as client:
        case.server.shutdown()
        assert await fate(client) == "1001"
        await case.clock.advance(case.seconds)
        told = "stopped" if case.server._stopped.is_set() else "waits"
        await case.clock.advance(case.value)
        await case.server.stopped()
        return told


async def a_ping_that_is_not_answered(case: Case) -> str:
    async with case.connected() as client:
        await case.clock.advance(2)
        ping = await client.event()
        assert isinstance(ping, events.Ping)
        await case.neighbour.send(STILL_HERE)  # which is life
        assert await fate(case.neighbour) == KEPT
        await case.clock.advance(case.seconds)
        if not case.beyond:
            await client.send_event(ping.response())
            await case.clock.advance(2 * ROUND)
            await client.send(STILL_HERE)
        return await fate(client)


# The table


class Row(NamedTuple):
    """One way to reach a limit.

    Attributes:
        limit: The field of `Limits`; or the keepalive of the `App`.
        value: What it is set to here.
        how: The function that plays it.
        at: What becomes of who reaches it.
        beyond: What becomes of who passes it.
        logs: What the log says then; otherwise nothing.
        neighbour: What the neighbour is told afterwards.
        app: What else the `App` is given.
        tls: The server speaks TLS.
    """

    limit: str
    value: Any
    how: Callable[[Case], Awaitable[str]]
    at: str
    beyond: str
    logs: str = ""
    neighbour: str = KEPT
    app: Mapping[str, Any] = MappingProxyType({})
    tls: bool = False

    def make_app(self) -> App:
        limits = Limits() if self.limit == "keepalive" else Limits(**{self.limit: self.value})
        return App(limits=limits, **{"keepalive": None, **self.app})

    def name(self, beyond: bool) -> str:
        return f"{self.limit}={self.value}-{self.how.__name__}-{'beyond' if beyond else 'at'}"


COMPRESSED = {"compression": True}
TOO_SLOW = "1013 too slow (Limits.outbox, Limits.outbox_messages)"

# fmt: off
TABLE = [
    # What a client may send
    Row("message", 1000, a_text_frame,
        "took 1000", "1009 message above 1000 bytes (Limits.message)"),
    Row("message", 1000, a_text_frame_of_two_bytes_a_character,
        "took 500", "1009 message above 1000 bytes (Limits.message)"),
    Row("message", 200_000, a_text_frame,
        "took 200000", "1009 message above 200000 bytes (Limits.message)"),
    Row("message", 1000, a_text_in_fragments,
        "took 1000", "1009 message above 1000 bytes (Limits.message)"),
    Row("message", 1000, a_binary_frame,
        "took 1000", "1009 message above 1000 bytes (Limits.message)"),
    Row("message", 200_000, a_binary_frame,
        "took 200000", "1009 message above 200000 bytes (Limits.message)"),
    Row("message", 200_000, a_binary_message_in_large_fragments,
        "took 200000", "1009 message above 200000 bytes (Limits.message)"),
    Row("message", 200_000, a_compressed_text,
        "took 200000", "1009 message above 200000 bytes (Limits.message)", app=COMPRESSED),
    Row("message", 200_000, a_compressed_text_of_many_reads,
        "took 200000", "1009 message above 200000 bytes (Limits.message)", app=COMPRESSED),
    Row("message", 200_000, a_compressed_text_in_fragments,
        "took 200000", "1009 message above 200000 bytes (Limits.message)", app=COMPRESSED),
    Row("message", 200_000, a_compressed_binary,
        "took 200000", "1009 message above 200000 bytes (Limits.message)", app=COMPRESSED),
    Row("message", 200_000, a_compressed_binary_that_did_not_shrink,
        "took 200000", "1009 message above 200000 bytes (Limits.message)", app=COMPRESSED),
    Row("message", MIB, a_frame_of_64_kib_that_inflates_to_60_mb,
        "took 1048576", "1009 message above 1048576 bytes (Limits.message)", app=COMPRESSED),
    Row("message", MIB, fragments_that_inflate_to_60_mb,
        "took 1048576", "1009 message above 1048576 bytes (Limits.message)", app=COMPRESSED),
    Row("fragments", 5, compressed_fragments_most_of_them_empty,
        "took 1", "1009 message in more than 5 fragments (Limits.fragments)", app=COMPRESSED),
    Row("message_time", 2.0, a_compressed_message_that_drips,
        "took 60", "1008 message took longer than 2 s (Limits.message_time)", app=COMPRESSED),
    Row("fragments", 5, fragments_most_of_them_empty,
        "took 1", "1009 message in more than 5 fragments (Limits.fragments)"),
    Row("message_time", 2.0, a_message_that_drips,
        "took 20", "1008 message took longer than 2 s (Limits.message_time)"),
    Row("message_time", 2.0, a_large_frame_that_drips,
        "took 70000", "1008 message took longer than 2 s (Limits.message_time)"),
    Row("message_time", 2.0, fragments_that_drip_between_pings,
        "took 11", "1008 message took longer than 2 s (Limits.message_time)"),
    Row("message_time", 2.0, a_ping_that_drips,
        KEPT, "1008 message took longer than 2 s (Limits.message_time)"),
    Row("message_time", 2.0, a_message_that_drips_at_a_busy_handler,
        "took 20", "1008 message took longer than 2 s (Limits.message_time)"),
    Row("message_rate", 2.0, a_burst_of_ten_seconds,
        KEPT, "1008 more than 2 messages a second (Limits.message_rate)"),
    Row("message_rate", 2.0, a_stream_behind_a_burst,
        KEPT, "1008 more than 2 messages a second (Limits.message_rate)"),
    Row("message_time", 2.0, a_message_that_drips_in_a_flood_of_pings,
        "took 11", "1008 message took longer than 2 s (Limits.message_time)"),
    Row("read_ahead", 8 * KIB, messages_for_a_busy_handler,
        "the kernel holds none", "the kernel holds one"),
    Row("read_ahead", 64 * KIB, compressed_messages_for_a_busy_handler,
        "the kernel holds none", "the kernel holds one", app=COMPRESSED),

    # What a client may leave unread
    Row("outbox", 512 * KIB, bytes_for_who_does_not_read,
        KEPT, TOO_SLOW, logs="is too slow (Limits.outbox"),
    Row("outbox", 512 * KIB, room_messages_for_who_does_not_read,
        "first last, 0 dropped", "first last, 1 dropped",
        logs="room messages are dropped (drop_newest)", app={"slow_consumers": "drop_newest"}),
    Row("outbox", 512 * KIB, room_messages_for_who_does_not_read,
        "first last, 0 dropped", "last newer, 1 dropped",
        logs="room messages are dropped (drop_oldest)", app={"slow_consumers": "drop_oldest"}),
    Row("outbox", 512 * KIB, pings_above_as_many_bytes_as_may_wait,
        "as much", "one pong more"),
    Row("outbox_messages", 64, messages_for_who_does_not_read,
        KEPT, TOO_SLOW, logs="is too slow (Limits.outbox"),
    Row("outbox_messages", 64, pings_above_as_many_messages_as_may_wait,
        "as many", "one pong more"),
    Row("high_water", 512 * KIB, an_awaited_send_to_who_does_not_read,
        "goes on", "waits"),
    Row("send_timeout", 2.0, a_client_that_reads_nothing,
        KEPT, "dropped", logs="is too slow (Limits.send_timeout)"),
    Row("send_timeout", 2.0, a_client_that_sends_and_reads_nothing,
        "took 6", "dropped", logs="is too slow (Limits.send_timeout)"),
    Row("send_timeout", 2.0, a_page_that_is_not_read,
        "200 read", "dropped"),

    # What a request may be
    Row("header_block", 1024, the_headers_of_a_page,
        "200 page", "431 headers above Limits.header_block (1024 bytes)"),
    Row("header_block", 1024, the_headers_of_an_upgrade,
        KEPT, "431 headers above Limits.header_block (1024 bytes)"),
    Row("header_fields", 20, many_headers_for_a_page,
        "200 page", "431 headers above Limits.header_fields (20)"),
    Row("header_fields", 20, many_headers_for_an_upgrade,
        KEPT, "431 headers above Limits.header_fields (20)"),
    Row("request_target", 100, the_target_of_a_page,
        "200 page", "414 request target above Limits.request_target (100 bytes)"),
    Row("request_target", 100, the_target_of_an_upgrade,
        KEPT, "414 request target above Limits.request_target (100 bytes)"),
    Row("body", 1000, a_body_with_its_length,
        "200 took 1000", "413 body above Limits.body (1000 bytes)"),
    Row("body", 1000, a_body_in_chunks,
        "200 took 1000", "413 body above Limits.body (1000 bytes)"),

    # How many there may be
    Row("connections", 4, one_more_connection,
        KEPT, "503 too many connections (Limits.connections), Retry-After: 5",
        logs="connections above Limits.connections"),
    Row("connections_per_address", 4, one_more_connection_from_an_address,
        KEPT, "503 too many connections (Limits.connections_per_address), Retry-After: 5",
        logs="connections above Limits.connections_per_address"),
    Row("rooms_per_connection", 3, one_more_room,
        KEPT, "this connection is in 3 rooms already (Limits.rooms_per_connection)"),

    # How long things may take
    Row("open_timeout", 2.0, a_tls_handshake_that_drips,
        "answered", "dropped", tls=True),
    Row("open_timeout", 2.0, a_request_that_drips,
        "101", "408 request timeout (Limits.open_timeout)"),
    Row("open_timeout", 2.0, a_body_that_drips,
        "200 took 20", "408 request timeout (Limits.open_timeout)"),
    Row("open_timeout", 2.0, an_on_connect_that_takes_long,
        "101", "503 not answered in time (Limits.open_timeout)"),
    Row("open_timeout", 2.0, a_page_that_takes_long,
        "200 at last", "503 not answered in time (Limits.open_timeout)"),
    Row("open_timeout", 2.0, a_request_and_an_on_connect_that_share_it,
        "101", "503 not answered in time (Limits.open_timeout)"),
    Row("close_timeout", 2.0, a_close_that_is_not_answered,
        "waits", "dropped"),
    Row("close_timeout", 2.0, a_close_that_is_answered_by_something_else,
        "waits", "dropped"),
    Row("close_grace", 2.0, an_on_connect_without_its_client,
        "finished", "cancelled"),
    Row("close_grace", 2.0, a_handler_without_its_client,
        "finished", "cancelled"),
    Row("close_grace", 2.0, a_handler_that_will_not_stop,
        "waits", "told by another task", logs="does not stop after its cancellation: left behind"),
    Row("linger", 2.0, a_client_that_leaves_its_side_open,
        "waits", "dropped"),
    Row("linger", 2.0, a_client_that_sends_on,
        "waits", "dropped"),
    # Cut short in real time, too: so long that no machine is that slow.
    Row("on_close", 10.0, an_on_close_that_takes_long,
        "finished", "cancelled",
        logs="on_close of /r took too long (Limits.on_close): cancelled"),
    Row("on_close", 10.0, an_error_handler_that_takes_long,
        "finished", "cancelled",
        logs="the error handler of /r took too long (Limits.on_close): cancelled"),
    Row("shutdown", 2.0, a_handler_that_goes_on_in_a_stop,
        "finished", "cancelled", logs="stopped without waiting any longer for", neighbour="1001"),
    Row("shutdown", 2.0, a_client_that_does_not_answer_in_a_stop,
        "waits", "stopped", neighbour="1001"),
    Row("keepalive", 2.0, a_ping_that_is_not_answered,
        KEPT, "1011 keepalive: no answer to a ping", app={"keepalive": (2.0, 2.0)}),
]
# fmt: on

#: They have to know what the kernel keeps, or to come from another address.
LINUX = {
    bytes_for_who_does_not_read,
    room_messages_for_who_does_not_read,
    messages_for_who_does_not_read,
    pings_above_as_many_bytes_as_may_wait,
    pings_above_as_many_messages_as_may_wait,
    an_awaited_send_to_who_does_not_read,
    a_client_that_reads_nothing,
    a_client_that_sends_and_reads_nothing,
    a_page_that_is_not_read,
    one_more_connection_from_an_address,
}


@pytest.mark.parametrize(
    ("row", "beyond"),
    [
        pytest.param(row, beyond, id=row.name(beyond), marks=only_linux if row.how in LINUX else ())
        for row in TABLE
        for beyond in (False, True)
    ],
)
async def test_a_limit_is_held_and_costs_nobody_else_anything(
    row: Row,
    beyond: bool,
    logged: Callable[[], list[str]],
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    case = Case(row.make_app(), row.value, beyond)
    ours, case.tls = contexts if row.tls else (None, None)
    async with (
        case.served(ours),
        connected(case.server, "/neighbour", tls=case.tls) as neighbour,
    ):
        case.neighbour = neighbour
        result = await row.how(case)
        assert result == (row.beyond if beyond else row.at)
        await neighbour.send(STILL_HERE)
        assert await fate(neighbour) == row.neighbour
    lines = logged()
    expected = 1 if beyond and row.logs else 0
    assert [row.logs in line for line in lines] == [True] * expected, lines


def test_every_limit_stands_in_the_table() -> None:
    names = {field.name for field in fields(Limits)}
    assert {row.limit for row in TABLE} - {"keepalive"} == names


# What no row says


@asynccontextmanager
async def served_alone(app: App | None = None) -> AsyncIterator[Case]:
    """A served app without a neighbour."""
    case = Case(app or App())
    async with case.served():
        yield case


async def test_messages_without_a_pause_between_them_are_no_message_that_takes_long() -> None:
    """Each read ends in a message, but none of them takes long."""
    limits = Limits(message_time=2.0)
    async with (
        served_alone(App(limits=limits, keepalive=None)) as case,
        case.connected() as client,
    ):
        kinds = [
            (masked(0x81, b"x" * 70_000), "took 70000"),  # larger than what is read at once
            (masked(0x82, bytes(70_000)), "took 70000"),
            (masked(0x01, b"x") + masked(0x80, b"x"), "took 2"),
            (text("x" * 200), "took 200"),
        ]
        for frame, told in kinds:
            await client.send_raw(frame[:-1])
            for _ in range(int(limits.message_time / ROUND) + 2):
                await case.clock.advance(ROUND)
                await client.send_raw(frame[-1:] + frame[:-1])
                assert await fate(client) == told
            await client.send_raw(frame[-1:])
            assert await fate(client) == told
        await client.send(STILL_HERE)
        assert await fate(client) == KEPT


#: More than the kernels of both sides hold.
FLOOD = 500
BLOCK = text("x" * (32 * KIB - 8))


async def is_answered(client: Client, blocks: int) -> None:
    for _ in range(blocks):
        assert await fate(client) == f"took {32 * KIB - 8}"


async def test_no_more_than_the_limit_and_one_read_is_taken_ahead() -> None:
    async with served_alone(App(limits=Limits(read_ahead=200 * KIB))) as case:
        case.serve = lambda ws: wait_then_measure(case, ws)
        async with case.connected() as client, anyio.create_task_group() as tg:
            await client.send_raw(BLOCK)
            await case.ws()
            await case.clock.advance(1)
            tg.start_soon(client.send_raw, BLOCK * FLOOD)
            await case.clock.advance(3)
            taken = sum(map(len, case.driver()._receiver.inbox))
            assert 100 * KIB < taken < 200 * KIB + READ_SIZE
            case.release.set()
            await is_answered(client, 1 + FLOOD)


async def test_no_more_than_the_limit_and_one_message_is_inflated_ahead() -> None:
    """A read of 64 KiB may hold as many bombs as it likes: they are inflated one by one."""
    limits = Limits(message=MIB, read_ahead=256 * KIB)
    async with served_alone(App(compression=True, limits=limits)) as case:
        case.serve = lambda ws: wait_then_measure(case, ws)
        async with case.connected(OFFER) as client:
            frame = masked(0xC2, deflated(bytes(MIB)))
            assert len(frame) * 20 < READ_SIZE
            await client.send_raw(frame * 20)
            await case.ws()
            await case.clock.advance(3)
            assert sum(map(len, case.driver()._receiver.inbox)) <= 256 * KIB + MIB
            case.release.set()
            for _ in range(20):
                assert await fate(client) == f"took {MIB}"


async def test_while_on_connect_decides_nothing_is_taken_but_what_came_with_the_request() -> None:
    async with served_alone() as case:
        case.enter = lambda ws: case.release.wait()
        async with await open_stream(case.server) as stream, anyio.create_task_group() as tg:
            tg.start_soon(stream.send, upgrade_request("/r") + BLOCK * FLOOD)
            await case.clock.advance(3)
            [driver] = case.server._drivers
            assert len(driver._handshake.trailing_data) < READ_SIZE
            case.release.set()
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += await stream.receive(1)
            client = Client(stream)
            await is_answered(client, FLOOD)
            await client.close()
            assert await fate(client) == "1000"


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (REQUEST[:-2] + b"X: " + b"x" * MIB, "431 headers above"),
        (b"GET /" + b"x" * MIB, "414 request target above"),
        (
            REQUEST.replace(b"GET", b"POST")[:-2]
            + b"Content-Length: 3000000\r\n\r\n"
            + bytes(3_000_000),
            "413 body above",
        ),
        (
            REQUEST.replace(b"GET", b"POST")[:-2]
            + b"Transfer-Encoding: chunked\r\n\r\n"
            + (b"10000\r\n" + bytes(65536) + b"\r\n") * 50,
            "413 body above",
        ),
    ],
    ids=["headers", "target", "body", "chunks"],
)
async def test_who_sends_on_is_told_nevertheless(request_: bytes, told: str) -> None:
    async with served_alone() as case, await open_stream(case.server) as stream:
        await stream.send(request_)  # all of it is read away: nothing resets the connection
        assert (await answer(stream)).startswith(told)


@pytest.mark.parametrize("first", [0x81, 0x82, 0x01])
async def test_who_goes_on_sending_a_message_that_is_too_big_is_told_nevertheless(
    first: int,
) -> None:
    async with served_alone() as case, case.connected() as client:
        await client.send_raw(masked(first, b"x" * 3 * MIB))
        assert await fate(client) == "1009 message above 1048576 bytes (Limits.message)"
        await client.ended()


async def test_a_bomb_takes_no_more_memory_than_a_message_may() -> None:
    async with served_alone(App(compression=True)) as case:
        frame = masked(0xC2, bomb())
        async with case.connected(OFFER) as client:
            tracemalloc.start()
            try:
                await client.send_raw(frame)
                assert (await fate(client)).startswith("1009 ")
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert peak < 4 * MIB


@pytest.mark.parametrize(
    ("descriptors", "most"),
    [
        (100, 90),
        (22_222, 19_999),
        (1_000_000, 20_000),
        (resource.RLIM_INFINITY, 20_000),
    ],
)
async def test_by_default_connections_leave_a_tenth_of_the_descriptors(
    descriptors: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (descriptors, descriptors))
    async with served_alone() as case:
        assert case.server._max_connections == most


async def test_who_is_one_too_many_and_says_nothing_is_let_go_within_seconds(
    logged: Callable[[], list[str]],
) -> None:
    async with (
        served_alone(App(limits=Limits(connections=1))) as case,
        case.connected() as client,
        await open_stream(case.server),
    ):
        await until(case.is_there)
        await case.clock.advance(1 + 2 + ROUND)  # REFUSAL_TIME, and linger
        assert not case.is_there()
        await client.send(STILL_HERE)
        assert await fate(client) == KEPT
    assert len(logged()) == 1


async def test_who_is_one_too_many_and_says_nothing_is_told_503(
    logged: Callable[[], list[str]],
) -> None:
    async with (
        served_alone(App(limits=Limits(connections=1))) as case,
        case.connected(),
        await open_stream(case.server) as stream,
    ):
        await until(case.is_there)
        await case.clock.advance(1 + 2 + ROUND)
        assert (await answer(stream)).startswith("503 ")
