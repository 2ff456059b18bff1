"""A client that is reset, closes, half-closes or stalls, at every step of its connection's life.

One matrix: `STEPS` says how to get a connection to a step and how it must end there, `FAULTS` what
may happen to its client, and one test drives them all. Whatever happens, when it is over nothing
is left: no task, no descriptor, no room, no member; and the neighbour in the same room has noticed
nothing. Time moves only by hand: what is ended by a deadline must end at that one, and not before.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import ssl
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from anyio.lowlevel import checkpoint
from anyio.streams.tls import TLSStream
from wsproto import events

from roomsock import App, ConnectionClosed, Limits, Request, WebSocket
from roomsock.server import ROUND, Server

from .client import Client, upgrade_request
from .clock import FakeClock, settled
from .contract import BAD_FRAME, close, masked, only_linux, served, text, until

# No two of these deadlines, nor their sums below, are near each other.
OPEN, PING, PONG, SEND, CLOSE, GRACE, LINGER = 3.0, 3.5, 2.5, 4.5, 2.0, 1.5, 1.0
SILENT = PING + PONG

#: Housekeeping comes round four times a second.
LATE = 2 * ROUND

#: So many are more than the kernel keeps for a client that does not read, and fit an outbox.
BLOCKS = 16
BLOCK = 64 * 1024
BUFFER = 16 * 1024

LIMITS = Limits(
    open_timeout=OPEN,
    send_timeout=SEND,
    close_timeout=CLOSE,
    close_grace=GRACE,
    linger=LINGER,
    outbox=BLOCKS * BLOCK,
    read_ahead=BLOCK,
)

NEIGHBOUR = "/room?neighbour"


class Peer(anyio.abc.ByteStream):
    """The client's end of a connection, with everything in hand that can go wrong with it."""

    def __init__(self, address: Any) -> None:
        local = isinstance(address, str)
        self.sock = socket.socket(socket.AF_UNIX if local else socket.AF_INET)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self.sock.connect(address)
        if not local:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.swallows = False

    async def send(self, item: bytes) -> None:
        if self.swallows:
            item = item[:10]
        while item:
            try:
                item = item[self.sock.send(item) :]
            except BlockingIOError:
                await anyio.wait_writable(self.sock)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await checkpoint()  # also when there is something: the server's tick shall end
        while True:
            try:
                data = self.sock.recv(max_bytes)
            except BlockingIOError:
                await anyio.wait_readable(self.sock)
                continue
            except OSError:
                raise anyio.BrokenResourceError from None
            if not data:
                raise anyio.EndOfStream
            return data

    async def send_eof(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        if self.sock.fileno() >= 0:
            anyio.notify_closing(self.sock)
            self.sock.close()


class House:
    """An app with a path for each state that a connection can be in, and what it was told."""

    def __init__(self) -> None:
        self.app = App(limits=LIMITS, keepalive=(PING, PONG))
        self.told: list[str] = []
        self.ended: Callable[[], WebSocket | None] = lambda: None
        self.released = anyio.Event()
        app = self.app
        app.add_on_connect("/waits", self.waits)
        app.add_on_connect("/talks", self.accepts_and_waits)
        app.add_get("/page/waits", self.page_waits)
        app.add_get("/page", self.page)
        app.add_serve("/blocks", self.sends_blocks)
        for path in ("/waits", "/talks", "/room", "/lingers", "/grieves"):
            app.add_on_message(path, self.echo)
        app.add_on_message("/busy", self.works)
        app.add_on_message("/busy/cancelled", self.works, cancel_on_disconnect=True)
        app.add_on_message("/bye", self.bye)
        app.add_on_message("/blocks/bye", self.blocks_and_bye)
        app.add_on_close("/lingers", self.on_close_waits)
        app.add_on_error("/grieves", self.on_error_waits)
        paths = {"/waits", "/talks", "/room", "/busy", "/busy/cancelled", "/blocks"}
        paths |= {"/bye", "/blocks/bye", "/lingers", "/grieves"}
        for path in paths - {"/lingers"}:
            app.add_on_close(path, self.on_close)
        for path in paths - {"/grieves"}:
            app.add_on_error(path, self.on_error)

    async def echo(self, ws: WebSocket, message: str) -> None:
        await ws.send_text(message)

    async def waits(self, ws: WebSocket) -> None:
        await self.released.wait()

    async def accepts_and_waits(self, ws: WebSocket) -> None:
        ws.accept()
        await self.released.wait()

    async def works(self, ws: WebSocket, message: str) -> None:
        await self.released.wait()

    async def page_waits(self, request: Request) -> str:
        await self.released.wait()
        return "at last"

    def page(self, request: Request) -> bytes:
        return bytes(BLOCKS * BLOCK)

    async def sends_blocks(self, ws: WebSocket) -> None:
        for _ in range(BLOCKS):
            await ws.send_bytes(bytes(BLOCK))
        async for _ in ws:
            pass

    def bye(self, ws: WebSocket, message: str) -> None:
        ws.close(4000, "bye")

    def blocks_and_bye(self, ws: WebSocket, message: str) -> None:
        for _ in range(BLOCKS):
            ws.send_bytes(bytes(BLOCK))
        ws.close(4000, "bye")

    def on_error(self, ws: WebSocket, error: Exception) -> None:
        assert isinstance(error, ConnectionClosed)
        self.tell(ws, "error", error)

    async def on_error_waits(self, ws: WebSocket, error: Exception) -> None:
        self.on_error(ws, error)
        await self.released.wait()

    def on_close(self, ws: WebSocket, reason: ConnectionClosed) -> None:
        self.tell(ws, "close", reason)

    async def on_close_waits(self, ws: WebSocket, reason: ConnectionClosed) -> None:
        self.on_close(ws, reason)
        await self.released.wait()

    def tell(self, ws: WebSocket, what: str, end: ConnectionClosed) -> None:
        if ws.request.target != NEIGHBOUR:
            self.ended = weakref.ref(ws)
            self.told.append(f"{what} {end.code} {end.closed_by}")


class Neighbour:
    """A client in ``/room`` whose every message is answered, and who misses no block."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._said = 0
        self._blocks = 0

    async def moves_in(self) -> None:
        await self._client.handshake(NEIGHBOUR)
        await self.echoes()

    async def _event(self) -> Any:
        while isinstance(event := await self._client.event(), events.Ping):
            await self._client.send_event(event.response())
        return event

    async def echoes(self) -> None:
        self._said += 1
        await self._client.send(str(self._said))
        assert (await self._event()).data == str(self._said)

    async def gets_block(self) -> None:
        self._blocks += 1
        assert (await self._event()).data == block(self._blocks)

    async def is_sent_away(self, code: int) -> None:
        event = await self._event()
        assert isinstance(event, events.CloseConnection)
        assert event.code == code
        await self._client.send_event(event.response())
        await self._client.aclose()


def block(number: int) -> bytes:
    return number.to_bytes(4, "big") * (BLOCK // 4)


async def quiet() -> None:
    """Wait until nothing happens any more; without the naps of 0.1 s that anyio on asyncio takes
    while something still does."""
    for _ in range(16):
        await checkpoint()
    await settled()


async def encrypted(peer: Peer, tls: ssl.SSLContext | None) -> anyio.abc.ByteStream:
    if tls is None:
        return peer
    return await TLSStream.wrap(
        peer, hostname="localhost", ssl_context=tls, standard_compatible=False
    )


class Scene:
    """Who takes part: the server in its time, the client of the fault, and its neighbour."""

    def __init__(
        self,
        house: House,
        server: Server,
        clock: FakeClock,
        neighbour: Neighbour,
        peer: Peer,
        tls: ssl.SSLContext | None,
    ) -> None:
        self.house = house
        self.server = server
        self.clock = clock
        self.neighbour = neighbour
        self.peer = peer
        self.tls = tls
        self.client = Client(peer)

    async def encrypt(self) -> None:
        self.client = Client(await encrypted(self.peer, self.tls))

    async def sends(self, data: bytes) -> None:
        await self.client.send_raw(data)
        await quiet()

    async def requests(self, path: str, until: int | None = None) -> None:
        await self.encrypt()
        await self.sends(upgrade_request(path)[:until])

    async def opens(self, path: str) -> None:
        await self.encrypt()
        await self.client.handshake(path)
        await quiet()

    async def broadcasts(self) -> None:
        """A quarter of the blocks to the room; the neighbour gets each."""
        for _ in range(BLOCKS // 4):
            number = self.neighbour._blocks + 1
            self.house.app.room("/room").send_bytes(block(number))
            await self.neighbour.gets_block()

    def is_gone(self) -> bool:
        return self.server.connections == (0 if self.server.stopping else 1)


# What may happen to the client


@dataclass(frozen=True)
class Fault:
    """What happens to a client, and what it still does from then on."""

    strike: Callable[[Peer], Awaitable[None]]
    kills: bool = False
    reads: bool = False
    writes: bool = False


async def reset(peer: Peer) -> None:
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    await peer.aclose()


async def close_politely(peer: Peer) -> None:
    # The kernel sends RST instead of FIN when something is unread.
    with suppress(BlockingIOError, OSError):
        while peer.sock.recv(65536):
            pass
    await peer.aclose()


async def half_close(peer: Peer) -> None:
    with suppress(OSError):  # the server has ended the connection before
        await peer.send_eof()


async def nothing(peer: Peer) -> None:
    pass


FAULTS = {
    "reset": Fault(reset, kills=True),
    "close": Fault(close_politely, kills=True),
    "half-close": Fault(half_close, kills=True, reads=True),
    "stall": Fault(nothing),  # and whose host is gone without a word
    "mute": Fault(nothing, reads=True),
    "deaf": Fault(nothing, writes=True),
}


# How it must end


@dataclass(frozen=True)
class End:
    """When the socket is closed and the app is told, in seconds behind the fault, and of what."""

    gone: float = 0.0
    told: float = 0.0
    what: tuple[str, ...] = ()
    logged: tuple[str, ...] = ()


LOST = ("error 1006 lost", "close 1006 lost")
UNANSWERED = ("error 1011 server", "close 1011 server")
SLOW = ("error 1013 server", "close 1013 server")
VIOLATED = ("error 1002 server", "close 1002 server")
BYE = ("close 4000 server",)
CLIENTS_CLOSE = ("close 1000 client",)
GOING_AWAY = ("close 1001 server",)

FULL = ("is too slow (Limits.outbox, Limits.outbox_messages)",)

#: Behind a failure nobody waits for an answer to our close frame.
GIVEN_UP = End(gone=SILENT + LINGER, told=SILENT, what=UNANSWERED)
TOO_SLOW = End(gone=SEND, told=SEND, what=SLOW, logged=("is too slow (Limits.send_timeout)",))


@dataclass(frozen=True)
class Step:
    """A step in a connection's life.

    Args:
        reach: Brings the connection there.
        killed: How it ends when the client resets, closes or half-closes.
        stalled: How it ends when the client does nothing any more.
        mute: The same, when the client still reads; None where there is nothing to read.
        deaf: How it ends when the client still writes, but does not read.
        then: What happens right behind the fault.
        only_tls: Whether it is a step of TLS alone.
    """

    reach: Callable[[Scene], Awaitable[None]]
    killed: End
    stalled: End
    mute: End | None = None
    deaf: End | None = None
    then: Callable[[Scene], Awaitable[None]] | None = None
    only_tls: bool = False

    def end(self, name: str) -> End | None:
        ends = {"stall": self.stalled, "mute": self.mute, "deaf": self.deaf}
        return ends.get(name, self.killed)

    def transports(self, name: str) -> list[str]:
        """Where a fault of that name is tried."""
        transports = ["tcp", "unix", "tls"]
        if self.end(name) is None:
            transports = []
        elif self.mute is not None and not FAULTS[name].kills:
            # TCP's delayed acknowledgements and probes are progress, and know only real time.
            transports = ["unix", "tls over unix"]
        elif name == "reset":
            transports = ["tcp", "tls"]
        return [each for each in transports if "tls" in each or not self.only_tls]


async def release(scene: Scene) -> None:
    scene.house.released.set()


async def amid_the_client_hello(scene: Scene) -> None:
    await scene.peer.send(client_hello(scene.tls)[:9])


async def amid_the_tls_handshake(scene: Scene) -> None:
    await scene.peer.send(client_hello(scene.tls))


def client_hello(context: ssl.SSLContext | None) -> bytes:
    assert context is not None
    out = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost").do_handshake()
    return out.read()


async def before_the_request(scene: Scene) -> None:
    await scene.encrypt()


async def amid_the_request_line(scene: Scene) -> None:
    await scene.requests("/room", 7)


async def amid_the_headers(scene: Scene) -> None:
    await scene.requests("/room", -20)


async def before_the_101(scene: Scene) -> None:
    await scene.requests("/waits")


async def before_the_page(scene: Scene) -> None:
    await scene.encrypt()
    await scene.sends(b"GET /page/waits HTTP/1.1\r\nHost: testserver\r\n\r\n")


async def amid_the_page(scene: Scene) -> None:
    await scene.encrypt()
    await scene.sends(b"GET /page HTTP/1.1\r\nHost: testserver\r\n\r\n")


async def behind_the_101(scene: Scene) -> None:
    await scene.opens("/room")


async def amid_a_frame_header(scene: Scene) -> None:
    await scene.opens("/room")
    await scene.sends(masked(0x81, bytes(500))[:5])


async def amid_a_payload(scene: Scene) -> None:
    await scene.opens("/room")
    await scene.sends(masked(0x81, bytes(500))[:100])


async def amid_a_large_payload(scene: Scene) -> None:
    await scene.opens("/room")
    await scene.sends(masked(0x82, bytes(BLOCKS * BLOCK))[: 3 * BLOCK])


async def amid_a_fragmented_message(scene: Scene) -> None:
    await scene.opens("/room")
    await scene.sends(masked(0x01, b"begun") + masked(0x00, b"continued"))


async def while_busy(scene: Scene, path: str = "/busy") -> None:
    await scene.opens(path)
    await scene.sends(text("work"))
    await scene.clock.advance(4 * ROUND)  # until somebody reads ahead
    await scene.sends(masked(0x8A))  # a sign of life: silence counts from here


async def while_busy_and_cancelled_at_once(scene: Scene) -> None:
    await while_busy(scene, "/busy/cancelled")


async def while_on_connect_goes_on(scene: Scene) -> None:
    await scene.opens("/talks")
    await scene.clock.advance(4 * ROUND)
    await scene.sends(masked(0x8A))


async def with_a_full_read_ahead(scene: Scene) -> None:
    await scene.opens("/busy")
    await scene.sends(text("work"))
    await scene.sends(masked(0x81, bytes(BLOCK)))
    await scene.clock.advance(4 * ROUND)
    await scene.sends(masked(0x89))


async def amid_a_tls_record(scene: Scene) -> None:
    await scene.opens("/room")
    scene.peer.swallows = True
    await scene.sends(text("never whole"))


async def while_sending(scene: Scene) -> None:
    await scene.opens("/blocks")


async def amid_a_broadcast(scene: Scene) -> None:
    await scene.opens("/room")
    for _ in range(3):
        await scene.broadcasts()


async def the_broadcast_goes_on(scene: Scene) -> None:
    await scene.broadcasts()


async def behind_the_1013(scene: Scene) -> None:
    await scene.opens("/room")
    for _ in range(6):
        await scene.broadcasts()


async def behind_a_violation(scene: Scene) -> None:
    await scene.opens("/room")
    await scene.sends(BAD_FRAME)


async def behind_our_close(scene: Scene) -> None:
    await scene.opens("/bye")
    await scene.sends(text("go"))


async def before_our_close_leaves(scene: Scene) -> None:
    await scene.opens("/blocks/bye")
    await scene.sends(text("go"))


async def behind_its_close(scene: Scene) -> None:
    await scene.opens("/room")
    await scene.sends(close(1000))


async def behind_its_close_while_busy(scene: Scene) -> None:
    await while_busy(scene)
    await scene.sends(close(1000))


async def at_a_stop(scene: Scene) -> None:
    await scene.opens("/room")
    await stop(scene)


async def at_a_stop_while_busy(scene: Scene) -> None:
    await while_busy(scene)
    await stop(scene)


async def at_a_stop_before_the_101(scene: Scene) -> None:
    await before_the_101(scene)
    await stop(scene)


async def at_a_stop_amid_the_headers(scene: Scene) -> None:
    await amid_the_headers(scene)
    await stop(scene)


async def stop(scene: Scene) -> None:
    scene.server.shutdown()
    await scene.neighbour.is_sent_away(1001)
    await until(lambda: scene.server.connections == 1)
    await quiet()


async def while_on_close_runs(scene: Scene) -> None:
    await scene.opens("/lingers")
    await scene.sends(close(1000))
    await scene.clock.advance(ROUND)


async def while_the_error_handler_runs(scene: Scene) -> None:
    await scene.opens("/grieves")
    await scene.sends(BAD_FRAME)
    await scene.clock.advance(ROUND)


STEPS = [
    Step(amid_the_client_hello, End(), End(OPEN + LINGER), only_tls=True),
    Step(amid_the_tls_handshake, End(), End(OPEN + LINGER), only_tls=True),
    Step(before_the_request, End(), End(OPEN + LINGER)),
    Step(amid_the_request_line, End(), End(OPEN + LINGER)),
    Step(amid_the_headers, End(), End(OPEN + LINGER)),
    # Nobody reads while on_connect runs: its end is when a client is missed.
    Step(before_the_101, End(OPEN), End(OPEN + LINGER)),
    Step(before_the_101, End(what=LOST), GIVEN_UP, then=release),
    Step(before_the_page, End(OPEN), End(OPEN + LINGER)),
    Step(before_the_page, End(), End(LINGER), then=release),
    Step(amid_the_page, End(), End(SEND), mute=End(LINGER), deaf=End(SEND)),
    Step(behind_the_101, End(what=LOST), GIVEN_UP),
    Step(amid_a_frame_header, End(what=LOST), GIVEN_UP),
    Step(amid_a_payload, End(what=LOST), GIVEN_UP),
    Step(amid_a_large_payload, End(what=LOST), GIVEN_UP),
    Step(amid_a_fragmented_message, End(what=LOST), GIVEN_UP),
    Step(amid_a_tls_record, End(what=LOST), GIVEN_UP, only_tls=True),
    Step(with_a_full_read_ahead, End(what=LOST), GIVEN_UP, then=release),
    Step(while_busy, End(0, GRACE, LOST), End(SILENT + LINGER, SILENT + GRACE, UNANSWERED)),
    Step(
        while_busy_and_cancelled_at_once,
        End(what=LOST),
        End(SILENT + LINGER, SILENT + GRACE, UNANSWERED),
    ),
    Step(
        while_on_connect_goes_on,
        End(0, GRACE, LOST),
        End(SILENT + LINGER, SILENT + GRACE, UNANSWERED),
    ),
    Step(while_sending, End(what=LOST), TOO_SLOW, mute=GIVEN_UP, deaf=TOO_SLOW),
    Step(
        amid_a_broadcast,
        End(what=LOST),
        TOO_SLOW,
        mute=GIVEN_UP,
        deaf=TOO_SLOW,
        then=the_broadcast_goes_on,
    ),
    Step(
        behind_the_1013,
        End(what=SLOW, logged=FULL),
        End(CLOSE, what=SLOW, logged=FULL),
        mute=End(CLOSE, what=SLOW, logged=FULL),
        deaf=End(CLOSE, what=SLOW, logged=FULL),
    ),
    Step(behind_a_violation, End(what=VIOLATED), End(LINGER, what=VIOLATED)),
    Step(behind_our_close, End(what=BYE), End(CLOSE, what=BYE)),
    Step(
        before_our_close_leaves,
        End(what=BYE),
        End(CLOSE, what=BYE),
        mute=End(CLOSE, what=BYE),
        deaf=End(CLOSE, what=BYE),
    ),
    Step(behind_its_close, End(what=CLIENTS_CLOSE), End(LINGER, what=CLIENTS_CLOSE)),
    Step(
        behind_its_close_while_busy,
        End(0, GRACE, CLIENTS_CLOSE),
        End(LINGER, GRACE, CLIENTS_CLOSE),
    ),
    Step(at_a_stop, End(what=GOING_AWAY), End(CLOSE, what=GOING_AWAY)),
    Step(at_a_stop_while_busy, End(0, GRACE, GOING_AWAY), End(CLOSE, GRACE, GOING_AWAY)),
    Step(at_a_stop_before_the_101, End(), End(LINGER)),
    Step(at_a_stop_amid_the_headers, End(), End(LINGER)),
    Step(while_on_close_runs, End(what=CLIENTS_CLOSE), End(LINGER, what=CLIENTS_CLOSE)),
    Step(
        while_the_error_handler_runs,
        End(what=VIOLATED),
        End(LINGER, what=VIOLATED),
        then=release,
    ),
]

STOPS = (at_a_stop, at_a_stop_while_busy, at_a_stop_before_the_101, at_a_stop_amid_the_headers)


def cases() -> Iterator[Any]:
    for step in STEPS:
        for name in FAULTS:
            for transport in step.transports(name):
                then = f"-then_{step.then.__name__}" if step.then is not None else ""
                case = f"{step.reach.__name__}{then}-{name}-{transport}"
                yield pytest.param(step, name, transport, id=case)


# The test


@contextmanager
def nothing_stays() -> Iterator[None]:
    def held() -> tuple[list[str], list[str]]:
        tasks = [str(task.name) for task in anyio.get_running_tasks()]
        return sorted(tasks), sorted(os.listdir("/proc/self/fd"))

    before = held()
    yield
    assert held() == before


def options(transport: str, ours: ssl.SSLContext, directory: Path) -> dict[str, Any]:
    """Where to serve."""
    tls = ours if "tls" in transport else None
    if "unix" in transport:
        return {"unix": directory / "socket", "tls": tls}
    listener = socket.create_server(("127.0.0.1", 0))
    # What is accepted inherits it: the kernel shall keep little for who does not read.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    return {"sock": listener, "tls": tls}


@asynccontextmanager
async def fault_happens(scene: Scene, fault: Fault) -> AsyncIterator[None]:
    """The client goes on reading or writing during the body, where its fault leaves it that."""
    await fault.strike(scene.peer)
    async with anyio.create_task_group() as tg:
        if fault.reads:
            tg.start_soon(read_on, scene.peer)
        if fault.writes:
            tg.start_soon(write_on, scene)
        yield
        tg.cancel_scope.cancel()


async def read_on(peer: Peer) -> None:
    with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while True:
            await peer.receive()


async def write_on(scene: Scene) -> None:
    """A ping each round, while they are taken."""
    with suppress(anyio.BrokenResourceError, OSError):
        while True:
            await scene.client.stream.send(masked(0x89))
            await scene.clock.sleep_until(scene.clock.now() + ROUND)


async def watch(scene: Scene, end: End) -> tuple[float, float]:
    """Let time pass until it is over; how long it took until the socket was closed, and until the
    app was told of it."""
    began = scene.clock.now()
    gone = told = -1.0
    for _ in range(100):
        await quiet()
        passed = scene.clock.now() - began
        if gone < 0 and scene.is_gone():
            gone = passed
        if told < 0 and len(scene.house.told) >= len(end.what):
            told = passed
        if gone >= 0 and told >= 0:
            break
        if not scene.server.stopping:
            await scene.neighbour.echoes()  # and so shows that it lives
        await scene.clock.advance(ROUND)
    await release(scene)
    await quiet()
    return gone, told


@only_linux  # which lists the descriptors in /proc
@pytest.mark.parametrize(("step", "name", "transport"), list(cases()))
async def test_nothing_stays_and_its_neighbour_lives_on(
    step: Step,
    name: str,
    transport: str,
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "roomsock")
    clock, house, fault = FakeClock(), House(), FAULTS[name]
    end = step.end(name)
    assert end is not None
    ours, theirs = contexts
    tls = theirs if "tls" in transport else None
    with nothing_stays():
        async with (
            served(house.app, clock, **options(transport, ours, tmp_path)) as server,
            Peer(server.addresses[0]) as beside,
        ):
            neighbour = Neighbour(Client(await encrypted(beside, tls)))
            await neighbour.moves_in()
            with nothing_stays() if step.reach not in STOPS else nullcontext():
                async with Peer(server.addresses[0]) as peer:
                    scene = Scene(house, server, clock, neighbour, peer, tls)
                    await step.reach(scene)
                    async with fault_happens(scene, fault):
                        if step.then is not None:
                            await step.then(scene)
                        gone, told = await watch(scene, end)
                await quiet()
                assert len(house.app.all) == server.connections
                if step.reach in STOPS:
                    assert house.app.rooms == ()
                    await server.stopped()
                else:
                    assert house.app.rooms == (house.app.room("/room"),)
                    assert len(house.app.room("/room")) == 1
                    await neighbour.echoes()
            assert tuple(house.told) == end.what
    assert end.gone <= gone <= end.gone + LATE, f"gone after {gone}, told after {told}"
    assert end.told <= told <= end.told + LATE, f"gone after {gone}, told after {told}"
    complaints = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(complaints) == len(end.logged), complaints
    for record, line in zip(complaints, end.logged, strict=True):
        assert record.getMessage().endswith(line)


@pytest.mark.parametrize("reach", [while_busy, while_sending])
async def test_who_is_gone_is_kept_by_nobody(
    reach: Callable[[Scene], Awaitable[None]], tmp_path: Path
) -> None:
    clock, house = FakeClock(), House()
    async with (
        served(house.app, clock, unix=tmp_path / "socket") as server,
        Peer(server.addresses[0]) as peer,
    ):
        scene = Scene(house, server, clock, None, peer, None)
        await reach(scene)
        assert list(house.app.all)
        await peer.aclose()
        await clock.advance(GRACE + LATE)
        assert house.told == list(LOST)
        await quiet()
        gc.collect()
        kept = house.ended()
    assert kept is None
