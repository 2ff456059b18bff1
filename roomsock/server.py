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
import stat
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from inspect import iscoroutinefunction
from threading import get_ident
from time import monotonic
from typing import Any, Protocol, Union

import anyio
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from .app import App
from .driver import Driver
from .errors import CloseCode, SetupError
from .protocol.frames import check_close
from .rooms import queued_type
from .sender import Flusher
from .transport import SocketTransport, TLSTransport, Transport, running_event_loop

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger = logging.getLogger("roomsock")

#: Seconds between two rounds of housekeeping: what a deadline may be late by.
ROUND = 0.25

#: A round that comes this late means that the event loop was held up, and nobody was read from.
HELD_UP = 1.0

#: Connections accepted in one go, before others have their turn.
ACCEPT_BATCH = 64

#: Accepting pauses so long when the process is out of descriptors (accept(2)).
OUT_OF_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
ACCEPT_PAUSE = 0.1

#: An address that this machine does not have, or of a family that it does not know.
ABSENT = frozenset((errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT))

BACKLOG = 2048

#: Seconds that a connection above a limit has for the request that is answered 503.
REFUSAL_TIME = 1.0

Address = Union[tuple[str, int], str]
Sockets = Union[socket.socket, int, Sequence[Union[socket.socket, int]]]
TLS = Union[ssl.SSLContext, tuple[Union[str, os.PathLike[str]], Union[str, os.PathLike[str]]]]


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
    ) -> None:
        self.app = app
        self.addresses: list[Address] = [_address(listener) for listener in listeners]
        self.counters = Counters()
        self.clock = clock
        #: The time of the last round of housekeeping: good enough for deadlines, and free.
        self.now = clock.now()
        self.was_held_up = False
        self.loop = running_event_loop()
        self.flusher = Flusher(self.loop.call_soon)
        self.dispatcher = app._begin_serving(
            get_ident(), queued_type(checkpoint), self.call_soon_threadsafe
        )
        self._listeners = list(listeners)
        self._tls = tls
        self.drain_spread = drain_spread
        self._drivers: dict[Driver, None] = {}
        self._open = 0
        self._per_address: Counter[str] = Counter()
        self._complained: set[str] = set()
        self._wanted: list[Callable[[], Awaitable[Any]]] = []
        self._work = anyio.Event()
        self._stop = anyio.Event()
        self._stopped = anyio.Event()
        self._stop_code: int = CloseCode.GOING_AWAY
        self._idle: anyio.Event | None = None
        self._max_connections = app.limits.connections or _default_connections()

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
        if driver.client is not None:
            host = driver.client[0]
            self._per_address[host] -= 1
            if not self._per_address[host]:
                del self._per_address[host]

    def forget(self, driver: Driver) -> None:
        """A connection is over: its socket closed, its handlers returned."""
        self._drivers.pop(driver, None)
        if self._idle is not None and not self._drivers:
            self._idle.set()

    # The server's task

    async def run(self, started: Callable[[], None]) -> None:
        """Serve until `shutdown`; runs shielded from its owner's cancellation."""
        try:
            async with anyio.create_task_group() as tg:
                for listener in self._listeners:
                    tg.start_soon(self._accept, listener)
                tg.start_soon(self._keep_house)
                tg.start_soon(self._run_wanted)
                tg.start_soon(self.loop.run)
                self._tasks = tg
                started()
                await self._stop.wait()
                await self._stop_in_order()
                tg.cancel_scope.cancel()
        finally:
            self._close_listeners()  # when it ends with an error, nobody else did
            self.app._end_serving()
            self._stopped.set()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            _close_listener(listener)

    async def _run_wanted(self) -> None:
        while True:
            await self._work.wait()
            self._work = anyio.Event()
            wanted, self._wanted = self._wanted, []
            for function in wanted:
                self._tasks.start_soon(_isolated, function)

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
                    self._admit(sock, peer)

    def _admit(self, sock: socket.socket, peer: Any) -> None:
        limits = self.app.limits
        self.counters.connections += 1
        client = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else None
        # How many there are, of how many there may be: in all, and from this address.
        crowds = [(self._open, self._max_connections)]
        if client is not None and limits.connections_per_address is not None:
            crowds.append((self._per_address[client[0]], limits.connections_per_address))
        over_limit = any(count >= most for count, most in crowds)
        if over_limit:
            self.counters.over_limit += 1
            self._complain("connections above Limits.connections, or connections_per_address")
            # Saying 503 takes a descriptor, too: beyond a tenth nobody is told any more.
            if any(count >= most * 1.1 + 1 for count, most in crowds):
                sock.close()
                return
        sock.setblocking(False)
        if client is not None:
            with suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport: Transport = self.loop.transport(sock)
        if self._tls is not None:
            assert isinstance(transport, SocketTransport)
            transport = TLSTransport(transport, self._tls)
        scheme = "http" if self._tls is None else "https"
        driver = Driver(self, transport, client, scheme)
        driver.over_limit = over_limit
        if over_limit:
            driver.deadline = min(driver.deadline, self.now + REFUSAL_TIME)
        self._open += 1
        if client is not None:
            self._per_address[client[0]] += 1
        self._drivers[driver] = None
        self._tasks.start_soon(_isolated, driver.run)

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
            for driver in list(self._drivers):
                try:
                    if self.was_held_up:
                        driver.excuse(now - due)
                    if now >= driver.deadline:
                        driver.on_deadline(now)
                    if not driver.reading or driver.recipient.blocked:
                        driver.check_up(now)
                except Exception:  # a mistake of ours must not cost the others their deadlines
                    logger.exception("looking after a connection failed")
                    driver.abort()

    # Stopping

    async def _stop_in_order(self) -> None:
        self._close_listeners()
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
        drain_spread: Seconds over which a stopping server spreads the closing of its clients, so
            that they do not all come back at once. `Limits.shutdown` counts from the last.
        clock: Where time comes from; for tests.
        task_status: For ``tg.start`` and ``nursery.start``.

    Raises:
        SetupError: The app is being served already, or its set-up is incomplete.
        OSError: An address cannot be listened on, or a file cannot be read.
    """
    context = _tls_context(tls)
    listeners = await _listen(host, port, unix, sock)
    try:
        server = Server(app, listeners, context, clock or SystemClock(), drain_spread)
    except BaseException:
        for listener in listeners:
            _close_listener(listener)
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
    drain_spread: float = 0.0,
    clock: Clock | None = None,
) -> AsyncIterator[Server]:
    """Serve an app while the body of ``async with`` runs; stops in order behind it.

    Works under trio, anyio and plain asyncio. Arguments and errors are those of `serve`; what the
    body raises comes out as it was raised.
    """

    there = partial(serve, app, host, port, unix=unix, sock=sock, tls=tls)
    start = partial(there, drain_spread=drain_spread, clock=clock)
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


async def _isolated(function: Callable[[], Awaitable[Any]]) -> None:
    try:
        await function()
    except OSError as error:
        logger.debug("a connection's task ended with %s", error)
    except Exception:
        logger.exception("roomsock failed on a connection")
    except BaseExceptionGroup as group:
        # On trio a cancelled task group raises what its tasks raised together with its
        # cancellation: only that may leave, anything else would end the server.
        errors, others = group.split(Exception)
        if errors is not None:
            logger.error("roomsock failed on a connection", exc_info=errors)
        if others is not None:
            raise others from None


# Sockets


def _default_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 20_000 if soft == resource.RLIM_INFINITY else min(20_000, soft * 9 // 10)


def _tls_context(tls: TLS | None) -> ssl.SSLContext | None:
    if isinstance(tls, ssl.SSLContext):
        try:  # here, and not at the first client
            tls.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
        except ssl.SSLError as error:
            raise SetupError(f"tls is no context for a server: {error}") from None
    if tls is None or isinstance(tls, ssl.SSLContext):
        return tls
    if isinstance(tls, str):
        raise SetupError(f"tls is an ssl.SSLContext, or (certificate file, key file), not {tls!r}")
    certificate, key = tls
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(certificate, key)
    return context


async def _listen(
    host: str | Sequence[str] | None,
    port: int,
    unix: str | os.PathLike[str] | None,
    sock: Sockets | None,
) -> list[socket.socket]:
    if unix is not None and sock is not None:
        raise SetupError("unix and sock exclude each other")
    listeners: list[socket.socket] = []
    try:
        if sock is not None:
            given = sock if isinstance(sock, Sequence) else [sock]
            listeners.extend(socket.socket(fileno=s) if isinstance(s, int) else s for s in given)
        elif unix is not None:
            listeners.append(_UnixListener(os.fspath(unix)))
        else:
            await _listen_tcp(host, port, listeners)
        if not listeners:
            raise SetupError("nothing to listen on: host or sock is empty")
        for listener in listeners:
            listener.setblocking(False)
            listener.listen(BACKLOG)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


async def _listen_tcp(
    host: str | Sequence[str] | None, port: int, listeners: list[socket.socket]
) -> None:
    bound: set[Any] = set()
    for name in [host] if host is None or isinstance(host, str) else host:
        absent: OSError | None = None
        found = await anyio.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, _, _, _, address in found:
            if address in bound:  # two names may mean the same
                continue
            # With port 0 all addresses get the port that the system chose for the first.
            chosen = listeners[0].getsockname()[1] if listeners else port
            try:
                listeners.append(_bound(family, (address[0], chosen, *address[2:])))
                bound.add(address)
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                absent = error
        # "localhost" may have an IPv6 address where the machine (a container) has none.
        if absent is not None and not any(address in bound for *_, address in found):
            raise absent


def _bound(family: int, address: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


class _UnixListener(socket.socket):
    """A unix socket at a path; its file goes with it, but nobody else's that took its place."""

    def __init__(self, path: str) -> None:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                _remove_dead_socket(path)
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path = path
        self._file: os.stat_result | None = None
        try:
            self.bind(path)
            self._file = os.stat(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the file first: a server that starts meanwhile finds us living, or nothing, and
        has not yet put a file of its own there."""
        if self._file is not None:
            with suppress(OSError):
                if os.path.samestat(os.stat(self._path), self._file):
                    os.unlink(self._path)
            self._file = None
        super().close()


def _remove_dead_socket(path: str) -> None:
    """Remove what a server that was killed left behind; a living server's socket is not ours."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except BlockingIOError:  # its queue is full (connect(2)), so it lives
            pass


def _close_listener(listener: socket.socket) -> None:
    if listener.fileno() >= 0:
        anyio.notify_closing(listener)
        listener.close()


def _address(listener: socket.socket) -> Address:
    name = listener.getsockname()
    if isinstance(name, bytes):  # an abstract unix socket (unix(7))
        return os.fsdecode(name)
    return (name[0], name[1]) if isinstance(name, tuple) else name


def shown(address: Address, scheme: str = "") -> str:
    """An address as people read it; ``scheme`` such as ``"https://"``."""
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address
    return f"{scheme}[{host}]:{port}" if ":" in host else f"{scheme}{host}:{port}"
