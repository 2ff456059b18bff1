"""The server: listens, looks after its connections, and stops in order.

`serve` and `serving` run inside a program's own event loop and touch nothing else of it. The
blocking `run` is in ``running.py``.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from inspect import iscoroutinefunction
from math import inf
from threading import get_ident
from time import monotonic
from typing import Any, Protocol

import anyio
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from .app import App
from .driver import Driver, contain
from .errors import CloseCode
from .http import Address as Client
from .http import Request
from .listening import TLS, Address, Sockets, address_of, close_all, listen, shown, tls_context
from .protocol.frames import check_close
from .protocol.handshake import Refused
from .protocol.proxies import TrustedProxies, counted_as, neighbour
from .rooms import queued_type
from .sender import Flusher
from .transport import SocketTransport, TLSTransport, Transport, running_event_loop

logger = logging.getLogger("roomsock")

#: Seconds between two rounds of housekeeping: what a deadline may be late by.
ROUND = 0.25

#: A round that comes this late means that the event loop was held up, and nobody was read from.
HELD_UP = 1.0

#: A block above 32 MiB teaches malloc nothing (mallopt(3)).
MOST_KEPT = 31 * 1024 * 1024

#: Connections accepted in one go, before others have their turn.
ACCEPT_BATCH = 64

#: Accepting pauses so long when the process is out of descriptors (accept(2)).
OUT_OF_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
ACCEPT_PAUSE = 0.1

#: Saying 503 takes a descriptor, too: above this share of a limit nobody is told any more.
STILL_TOLD = 1.1

#: Seconds that a connection above a limit has for the request that is answered 503.
REFUSAL_TIME = 1.0


class Clock(Protocol):
    """Where time comes from; tests pass one of their own."""

    def now(self) -> float:
        """Seconds, never going backwards."""

    async def sleep_until(self, deadline: float) -> None:
        """Wait until `now` has reached the deadline."""


class SystemClock:
    """The machine's time."""

    def now(self) -> float:
        """See `Clock`."""
        return monotonic()

    async def sleep_until(self, deadline: float) -> None:
        """See `Clock`."""
        await anyio.sleep(max(0.0, deadline - monotonic()))


@dataclass(slots=True)
class Counters:
    """What happened since the server started."""

    #: Connections accepted from the kernel.
    connections: int = 0
    #: Connections that were told 503, or dropped, because of a limit.
    over_limit: int = 0
    #: Connections closed because they read too slowly.
    slow_consumers: int = 0
    #: Room messages dropped by the app's choice of ``slow_consumers``.
    dropped_messages: int = 0


class Server:
    """A running server, as `serve` and `serving` hand it out.

    Attributes:
        app: What it serves.
        addresses: Where it listens: ``(host, port)``, or a unix socket's path.
        counters: What happened since it started.
    """

    def __init__(
        self,
        app: App,
        listeners: Sequence[socket.socket],
        tls: ssl.SSLContext | None,
        clock: Clock,
        drain_spread: float,
        proxies: TrustedProxies,
    ) -> None:
        self.app = app
        self.addresses: list[Address] = [address_of(listener) for listener in listeners]
        self.counters = Counters()
        self.clock = clock
        #: The time of the last round of housekeeping: good enough for deadlines, and free.
        self.now = clock.now()
        self.was_held_up = False
        self.loop = running_event_loop()
        #: Each `anyio.CancelScope` asks anew which event loop it is for, as dear as the rest of it.
        self.new_scope = type(anyio.CancelScope())
        self.flusher = Flusher(self.loop.call_soon)
        self.dispatcher = app._begin_serving(
            get_ident(), queued_type(checkpoint), self.call_soon_threadsafe
        )
        self.dispatcher.registry.queue_all = self.flusher.queue_all
        self._listeners = list(listeners)
        self._tls = tls
        self.drain_spread = drain_spread
        self._proxies = proxies
        #: With what `Limits.connections_per_address` counts each; None while it does not.
        self._drivers: dict[Driver, str | None] = {}
        self._open = 0
        self._per_address: Counter[str] = Counter()
        self._complained: set[str] = set()
        self._wanted: deque[Callable[[], Awaitable[Any]]] = deque()
        self._work = anyio.Event()
        self._stop = anyio.Event()
        self._stopped = anyio.Event()
        self._stop_code: int = CloseCode.GOING_AWAY
        self._idle: anyio.Event | None = None
        self._max_connections = app.limits.connections or _default_connections()
        self._max_per_address: float = app.limits.connections_per_address or inf
        keep_freed_memory(4 * app.limits.message)

    def __repr__(self) -> str:
        return f"<roomsock server on {', '.join(map(shown, self.addresses))}>"

    @property
    def connections(self) -> int:
        """How many sockets are open."""
        return self._open

    @property
    def stopping(self) -> bool:
        """Whether the stop has begun."""
        return self._stop.is_set()

    def shutdown(self, code: int = CloseCode.GOING_AWAY) -> None:
        """Begin to stop: no new connections, every client is closed with the code, handlers get
        `Limits.shutdown` seconds. Returns at once; `serve` returns when it is done.

        Raises:
            ValueError: A code that must not be sent (RFC 6455, section 7.4).
            RuntimeError: Called from another thread than the event loop's.
        """
        self.dispatcher.registry.check_thread()
        check_close(code)
        if not self._stop.is_set():
            self._stop_code = code
            self._stop.set()

    async def stopped(self) -> None:
        """Wait until the server has stopped."""
        await self._stopped.wait()

    def call_soon_threadsafe(self, function: Callable[..., object], *args: Any) -> None:
        """See `App.call_soon_threadsafe`."""
        if iscoroutinefunction(function):
            raise TypeError("call_soon_threadsafe takes a plain function, not a coroutine function")

        def call() -> None:
            try:
                function(*args)
            except Exception:
                logger.exception("%r, called from another thread, raised", function)

        self.loop.call_soon_threadsafe(call)

    def stuck(self) -> list[str]:
        """What still runs, for the log of a server that cannot stop."""
        drivers = list(self._drivers)  # at once: the loop of a stuck server runs in another thread
        return sorted({driver.describe() for driver in drivers if driver.busy})

    # For the drivers

    def spawn(self, function: Callable[[], Awaitable[Any]]) -> None:
        """Have the server's own scope run a function: it outlives a connection's cancellation."""
        self._wanted.append(function)
        self._work.set()

    def count_closed(self, driver: Driver) -> None:
        """A connection's socket is closed."""
        self._open -= 1
        address = self._drivers[driver]
        if address is not None:
            self._per_address[address] -= 1
            if not self._per_address[address]:
                del self._per_address[address]

    def identify(self, driver: Driver, request: Request) -> None:
        """A request is complete: if a trusted proxy passed it on, learn who sent it, and count
        that client. Above `Limits.connections_per_address` the driver is to refuse it."""
        peer = driver.client
        if not self._proxies.trusts(peer):
            self._hint_at_proxy(peer, request)
            return
        client, scheme = self._proxies.identify(peer, request.headers)
        driver.client = request.client = client
        request.scheme = scheme or request.scheme
        address = self._counted_address(client)
        if address is None or driver.refusal is not None or driver.is_gone():
            return
        there = self._per_address[address]
        self._count(driver, address)  # also while it is refused: it takes a descriptor
        if there >= self._max_per_address:
            driver.refusal = self._one_too_many("connections_per_address")
        if there >= self._max_per_address * STILL_TOLD + 1:
            driver.abort()

    def forget(self, driver: Driver) -> None:
        """A connection is over: its socket closed, its handlers returned."""
        self._drivers.pop(driver, None)
        if self._idle is not None and not self._drivers:
            self._idle.set()

    # The server's task

    async def run(self, started: Callable[[], None]) -> None:
        """Serve until `shutdown`; runs shielded from its owner's cancellation."""
        try:
            # Connections need the ticks, and their sockets watched, until the last has ended.
            async with anyio.create_task_group() as ticks:
                ticks.start_soon(self.loop.run)
                async with anyio.create_task_group() as self._tasks:
                    for listener in self._listeners:
                        self._tasks.start_soon(self._accept, listener)
                    self._tasks.start_soon(self._keep_house)
                    self._tasks.start_soon(self._run_wanted)
                    try:
                        started()
                        await self._stop.wait()
                        await self._stop_in_order()
                    finally:
                        self._tasks.cancel_scope.cancel()
                        await self._end_connections()
                ticks.cancel_scope.cancel()
        finally:
            close_all(self._listeners)  # when it ends with an error, nobody else did
            self.app._end_serving()
            self._stopped.set()

    async def _run_wanted(self) -> None:
        while True:
            await self._work.wait()
            self._work = anyio.Event()
            while self._wanted:  # no variable may keep who is over until the next comes
                self._tasks.start_soon(_isolated, self._wanted.popleft())

    async def _accept(self, listener: socket.socket) -> None:
        with suppress(anyio.ClosedResourceError):
            while not self.stopping:
                await anyio.wait_readable(listener)
                for _ in range(ACCEPT_BATCH):
                    try:
                        sock, peer = listener.accept()
                    except (BlockingIOError, InterruptedError):
                        break
                    except OSError as error:
                        if error.errno not in OUT_OF_DESCRIPTORS:
                            continue  # the connection died in the queue (accept(2))
                        self._complain("accepting pauses: %s", os.strerror(error.errno or 0))
                        await self.clock.sleep_until(self.clock.now() + ACCEPT_PAUSE)
                        break
                    try:
                        self._admit(sock, peer)
                    except Exception:  # a mistake of ours must cost that connection alone
                        logger.exception("admitting a connection failed")
                        sock.close()

    def _admit(self, sock: socket.socket, peer: Any) -> None:
        self.counters.connections += 1
        client = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else None
        address = self._counted_address(client)
        from_there = 0 if address is None else self._per_address[address]
        refusal = None
        if self._open >= self._max_connections:
            refusal = self._one_too_many("connections")
        elif from_there >= self._max_per_address:
            refusal = self._one_too_many("connections_per_address")
        if refusal is not None and (
            self._open >= self._max_connections * STILL_TOLD + 1
            or from_there >= self._max_per_address * STILL_TOLD + 1
        ):
            sock.close()
            return
        sock.setblocking(False)
        if client is not None:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:  # the peer is gone
                pass
        transport: Transport = self.loop.transport(sock)
        if self._tls is not None:
            assert isinstance(transport, SocketTransport)
            transport = TLSTransport(transport, self._tls)
        scheme = "http" if self._tls is None else "https"
        driver = Driver(self, transport, client, scheme)
        if refusal is not None:
            driver.refusal = refusal
            driver.deadline = min(driver.deadline, self.now + REFUSAL_TIME)
        self._open += 1
        self._drivers[driver] = None
        if address is not None:
            self._count(driver, address)
        driver.task = self.loop.start(driver.run, "roomsock connection")

    def _counted_address(self, client: Client | None) -> str | None:
        """What `Limits.connections_per_address` counts a client with; None if it is not counted:
        the limit is off, or it is a proxy, behind which others come."""
        if client is None or self._max_per_address == inf or self._proxies.trusts(client):
            return None
        return counted_as(client[0])

    def _count(self, driver: Driver, address: str) -> None:
        self._drivers[driver] = address
        self._per_address[address] += 1

    def _one_too_many(self, limit: str) -> Refused:
        self.counters.over_limit += 1
        self._complain(f"connections above Limits.{limit}")
        return Refused(503, f"too many connections (Limits.{limit})", (("retry-after", "5"),))

    def _hint_at_proxy(self, peer: Client | None, request: Request) -> None:
        """Behind a proxy that is not trusted all clients look like one. On the same machine who
        sends X-Forwarded-For is a proxy."""
        if b"x-forwarded-for:" in request._header_block and (name := neighbour(peer)):
            text = "X-Forwarded-For from %s is not believed; if a proxy is there: %s"
            self._complain(text, name, f'trusted_proxies=["{name}"]')

    def _complain(self, text: str, *args: Any) -> None:
        """Warn once, not once for every connection of a flood."""
        if text not in self._complained:
            self._complained.add(text)
            logger.warning(text, *args)

    # Time

    async def _keep_house(self) -> None:
        """The one task that watches every deadline of every connection."""
        while True:
            due = self.clock.now() + ROUND
            await self.clock.sleep_until(due)
            self.now = now = self.clock.now()
            self.was_held_up = now - due > HELD_UP
            self._look_after_all(now - due)

    def _look_after_all(self, late: float) -> None:
        # No part of `_keep_house`, whose variable would keep who was last until the next comes.
        now = self.now
        for driver in list(self._drivers):
            try:
                if self.was_held_up:
                    driver.excuse(late)
                if now >= driver.deadline:
                    driver.on_deadline(now)
                if not driver.reading or driver.recipient.blocked:
                    driver.check_up(now)
            except Exception:  # a mistake of ours must not cost the others their deadlines
                logger.exception("looking after a connection failed")
                driver.abort()

    # Stopping

    async def _stop_in_order(self) -> None:
        close_all(self._listeners)
        await checkpoint()  # the tasks of who was accepted just now begin, and can be cancelled
        began = self.now = self.clock.now()
        drivers = list(self._drivers)
        for index, driver in enumerate(drivers):
            if driver not in self._drivers:
                continue
            if self.drain_spread and index:
                await self.clock.sleep_until(began + self.drain_spread * index / len(drivers))
            try:
                driver.go_away(self._stop_code)
            except Exception:  # one broken connection must not keep the others from their close
                logger.exception("closing a connection failed")
        deadline = self.clock.now() + self.app.limits.shutdown
        if self._drivers:
            self._idle = anyio.Event()
            async with anyio.create_task_group() as tg:
                tg.start_soon(self._give_up_at, deadline, self._idle)
                await self._idle.wait()
                tg.cancel_scope.cancel()
        for name in self.stuck():
            logger.error("stopped without waiting any longer for %s", name)

    async def _end_connections(self) -> None:
        """Cancel what is left, and wait for it: no task group holds the connections' tasks."""
        cancelled: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while self._drivers:
                for driver in list(self._drivers):
                    driver.cancel()
                self._idle = anyio.Event()
                try:
                    await self._idle.wait()
                except anyio.get_cancelled_exc_class() as error:  # asyncio's own knows no shield
                    cancelled = error
        if cancelled is not None:
            raise cancelled

    async def _give_up_at(self, deadline: float, idle: anyio.Event) -> None:
        await self.clock.sleep_until(deadline)
        idle.set()


async def serve(
    app: App,
    host: str | Sequence[str] | None = "127.0.0.1",
    port: int = 8000,
    *,
    unix: str | os.PathLike[str] | None = None,
    sock: Sockets | None = None,
    tls: TLS | None = None,
    trusted_proxies: Iterable[str] = (),
    forwarded_header: str = "x-forwarded-for",
    drain_spread: float = 0.0,
    clock: Clock | None = None,
    task_status: TaskStatus[Server] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an app until cancelled, or until `Server.shutdown` is called.

    Runs under asyncio and trio. ``server = await tg.start(partial(serve, app, port=0))`` hands out
    the `Server` once it listens. When it is cancelled it closes every client with 1001 and stops
    in order, for at most `Limits.shutdown` seconds. Signals, logging configuration and the event
    loop are left alone.

    Args:
        app: What to serve; by one ``serve`` at a time.
        host: An address or name to listen on, several of them, or None for all interfaces.
        port: The port; 0 lets the system choose one.
        unix: The path of a unix socket to listen on instead.
        sock: Listening sockets, or their descriptors, to use instead (systemd's is 3).
        tls: An `ssl.SSLContext`, or the files ``(certificate chain, private key)``.
        trusted_proxies: Addresses and networks of proxies, and ``"unix"`` for who connects to a
            unix socket, that are believed when they say whom they act for: `Request.client`,
            `Limits.connections_per_address` and the log then mean that client. Name the proxies
            alone; whoever else connects from these addresses can choose its own.
        forwarded_header: The header that these proxies write, ``"x-forwarded-for"`` or
            ``"forwarded"`` (RFC 7239), to which each must append its client's address, or replace
            it. The other one is not looked at: a proxy that does not write it passes on what the
            client put there. For the same reason a proxy that writes X-Forwarded-For has to set
            X-Forwarded-Proto; that, or ``proto=`` in Forwarded, is `Request.scheme`.
        drain_spread: Seconds over which a stopping server spreads the closing of its clients, so
            that they do not all come back at once. `Limits.shutdown` counts from the last.
        clock: Where time comes from; for tests.
        task_status: For ``tg.start`` and ``nursery.start``.

    Raises:
        SetupError: The app is being served already, its set-up is incomplete, or an argument is
            wrong.
        OSError: An address cannot be listened on, or a file cannot be read.
    """
    proxies = TrustedProxies(trusted_proxies, forwarded_header)
    context = tls_context(tls)
    listeners = await listen(host, port, unix, sock)
    try:
        time = clock or SystemClock()
        server = Server(app, listeners, context, time, drain_spread, proxies)
    except BaseException:
        close_all(listeners)
        raise
    ready, done = anyio.Event(), anyio.Event()

    async def shielded() -> None:
        # What the owner's cancellation must not cut short: the stop in order.
        try:
            with anyio.CancelScope(shield=True):
                await server.run(ready.set)
        finally:
            done.set()

    async with anyio.create_task_group() as tg:
        tg.start_soon(shielded)
        try:
            await ready.wait()
            task_status.started(server)
            await done.wait()
        finally:
            server.shutdown(CloseCode.GOING_AWAY)


@asynccontextmanager
async def serving(
    app: App,
    host: str | Sequence[str] | None = "127.0.0.1",
    port: int = 8000,
    *,
    unix: str | os.PathLike[str] | None = None,
    sock: Sockets | None = None,
    tls: TLS | None = None,
    trusted_proxies: Iterable[str] = (),
    forwarded_header: str = "x-forwarded-for",
    drain_spread: float = 0.0,
    clock: Clock | None = None,
) -> AsyncIterator[Server]:
    """Serve an app while the body of ``async with`` runs; stops in order behind it.

    Works under trio, anyio and plain asyncio. Arguments and errors are those of `serve`; what the
    body raises comes out as it was raised.
    """
    start = partial(
        serve,
        app,
        host,
        port,
        unix=unix,
        sock=sock,
        tls=tls,
        trusted_proxies=trusted_proxies,
        forwarded_header=forwarded_header,
        drain_spread=drain_spread,
        clock=clock,
    )
    raised: BaseException | None = None
    async with anyio.create_task_group() as tg:
        try:
            yield await tg.start(start)
        except (anyio.get_cancelled_exc_class(), GeneratorExit):
            raise
        except BaseException as error:  # the task group would wrap it, a KeyboardInterrupt, too
            raised = error
        tg.cancel_scope.cancel()
    if raised is not None:
        raise raised


def keep_freed_memory(size: int) -> None:
    """Have malloc keep twice that many bytes that were freed, for the next large message.

    glibc gives them back to the system and takes them anew, page by page, which is half of what an
    echo of 1 MiB costs. How much it keeps follows the largest block that it has ever given back
    (mallopt(3), M_MMAP_THRESHOLD): so here is one, of which no page is touched.
    """
    bytes(min(size, MOST_KEPT))


async def _isolated(function: Callable[[], Awaitable[Any]]) -> None:
    try:
        await function()
    except BaseException as error:
        left = contain(error)
        if left is not None:
            raise left from None


def _default_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 20_000 if soft == resource.RLIM_INFINITY else min(20_000, soft * 9 // 10)
