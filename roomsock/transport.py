"""Bytes between a socket and the driver, and the two places where event loops differ.

Reading: a selector of our own, whose registrations are kept between reads; who waits goes on right
in the loop's call back on asyncio, in the same pass of its loop on trio. Ticks: ``call_soon`` on
asyncio, the beginning of a pass on trio. Writing is the same on all loops: a synchronous attempt,
and ``wait_writable`` only when the kernel refused.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import select
import selectors
import socket
import ssl
import sys
import termios
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import closing, suppress
from contextvars import Context
from itertools import repeat
from types import coroutine
from typing import TYPE_CHECKING, Any, Protocol

import anyio
from anyio.lowlevel import current_token

if TYPE_CHECKING:
    import trio

logger = logging.getLogger("roomsock")

#: Read at once from who may have sent anything.
READ_SIZE = 64 * 1024

#: TLS encrypts no more than this ahead of what the kernel takes.
ENCRYPT_SIZE = 64 * 1024


class Transport(Protocol):
    """A connected stream: waits for input, tries output at once."""

    #: Bytes that are read from the socket at once.
    read_size: int

    async def handshake(self) -> None:
        """Do what comes before the first byte (TLS); raises OSError or ssl.SSLError."""

    def receive(self) -> Awaitable[bytes | None]:
        """Wait for bytes: ``b""`` at the end of the stream, None when `wake` or `close` came, or
        there is nothing after all."""

    def sleep(self) -> object:
        """What a task yields to its event loop to sleep until it has something to `read`: both
        together are a `receive` without a coroutine of its own."""

    def read(self, outcome: Any) -> bytes | None:
        """What there is, for who has slept and went on with this outcome; see `receive`."""

    def send(self, data: bytes | memoryview, /) -> int:
        """Hand bytes to the kernel without waiting; how many were taken, which may be none.

        Raises:
            BlockingIOError: None are taken now: `wait_writable`.
            OSError: No more are taken, ever.
        """

    @property
    def unsent(self) -> int:
        """Bytes taken by `send` that the kernel has yet to take (TLS)."""

    async def wait_writable(self) -> None:
        """Wait until the kernel takes bytes again, then send what is `unsent`."""

    async def finish_writing(self) -> None:
        """Tell the peer that nothing more will come."""

    def is_broken(self) -> bool:
        """Whether the peer has reset the connection; known also while nobody reads."""

    def unacknowledged(self) -> int:
        """Bytes that our kernel holds for the peer's machine; 0 where the system does not tell."""

    def wake(self) -> None:
        """Make a waiting `receive` return None."""

    def close(self) -> None:
        """Close the socket; whoever waits on it is woken. Twice is fine."""


class EventLoop(Protocol):
    """What of an event loop is used beyond anyio."""

    @property
    def name(self) -> str:
        """How the loop is called in the log."""

    def transport(self, sock: socket.socket) -> SocketTransport:
        """A transport for a connected, non-blocking socket."""

    def start(self, function: Callable[[], Coroutine[Any, Any, None]], name: str) -> object:
        """Start a task, which nobody waits for or cancels, and which ends by `end`. To be called
        in a task of the server; what it returns must be kept while the new one runs.

        (A task of anyio's has an event, a scope and a handle of its own: 2.3 to 2.6 KiB.)
        """

    def end(self, error: BaseException | None) -> None:
        """The last that a started task calls: with an error, `run` raises it, which ends the
        server; its own cancellation only ends the task."""

    @property
    def call_soon(self) -> Callable[[Callable[[], None]], object]:
        """Call back once, after the tasks that are ready now had their turn."""

    @property
    def call_soon_threadsafe(self) -> Callable[[Callable[[], None]], object]:
        """Call back once, soon, from any thread or signal handler."""

    async def run(self) -> None:
        """What has to run beside the server, from before its first transport: until cancelled."""


def running_event_loop() -> EventLoop:
    """The event loop that runs this task."""
    token: Any = current_token()
    native = getattr(token, "native_token", token)
    if isinstance(native, asyncio.AbstractEventLoop):
        return AsyncioEventLoop(native)
    return TrioEventLoop(native)


class Poller(selectors.DefaultSelector):
    """Stands in for ``select.epoll`` where there is none; costs a twentieth of an echo."""

    def poll(self, timeout: float, _most: int) -> list[tuple[int, int]]:
        """See ``select.epoll``."""
        return [(key.fd, events) for key, events in self.select(timeout)]


make_poller: Callable[[], Any] = getattr(select, "epoll", Poller)


class Watch:
    """Tells which sockets have something to read.

    It has a descriptor of its own, the only one that the event loop has to watch: a loop's own way
    costs more for each read, and on trio two system calls.
    """

    def __init__(self, make: Callable[[], Any] = make_poller) -> None:
        self._poller = make()
        self.transports: dict[int, Any] = {}
        self.poll: Callable[[float, int], list[tuple[int, int]]] = self._poller.poll
        self.fileno: Callable[[], int] = self._poller.fileno

    def add(self, fd: int, transport: SocketTransport) -> None:
        """Have a socket among the `transports` that `poll` tells of, until it is removed."""
        self._poller.register(fd, selectors.EVENT_READ)  # as a number the same as EPOLLIN
        self.transports[fd] = transport  # not its method, which would be an object for each

    def remove(self, fd: int) -> None:
        """Let go of a socket, before it is closed."""
        with suppress(KeyError, OSError):  # closed already: something has ended the server
            del self.transports[fd]
            self._poller.unregister(fd)

    def close(self) -> None:
        """Let go of all sockets."""
        self.transports.clear()
        self._poller.close()


class SocketTransport:
    """A plain TCP or unix socket; how a task waits for it, and goes on, is the event loops'
    difference."""

    __slots__ = (
        "_registered", "_sock", "_waiter", "_watch", "_writing", "closed", "read_size", "send",
        "unsent",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, watch: Watch) -> None:
        self._sock = sock
        #: See `Transport`. A method that calls it would be a tenth of what a delivery costs.
        self.send = sock.send
        self._watch = watch
        self.read_size = READ_SIZE
        self.unsent = 0  # ever; to find it in the class would take 1 % of an echo
        self._registered = False
        self._waiter: Any = None  # what goes on when there is something
        self.closed = False
        self._writing = False  # somebody waits, or has waited, to write

    async def handshake(self) -> None:
        """Nothing comes before the first byte."""

    @coroutine
    def receive(self) -> Generator[Any, Any, bytes | None]:
        """See `Transport`."""
        if self.closed:
            return None
        return self.read((yield self.sleep()))

    def sleep(self) -> object:
        """See `Transport`."""
        raise NotImplementedError

    def read(self, _outcome: Any) -> bytes | None:
        """See `Transport`."""
        try:
            return self._sock.recv(self.read_size)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:  # reset by the peer: an end like any other
            return None if self.closed else b""

    def _register(self) -> None:
        if self.closed:  # nothing will come
            self.wake_soon()
            return
        self._registered = True
        self._watch.add(self._sock.fileno(), self)

    def _unregister(self) -> None:
        if self._registered:
            self._registered = False
            self._watch.remove(self._sock.fileno())

    async def wait_writable(self) -> None:
        """See `Transport`."""
        self._writing = True
        try:
            while not self.closed:
                with suppress(anyio.ClosedResourceError):  # `close` ends the wait
                    await anyio.wait_writable(self._sock)
                    break
        except RuntimeError as error:  # uvloop's, on a socket that it has reported an error on
            raise ConnectionResetError(str(error)) from None

    async def finish_writing(self) -> None:
        """See `Transport`."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def is_broken(self) -> bool:
        """See `Transport`."""
        poll = select.poll()
        poll.register(self._sock, 0)  # errors are told unasked
        return bool(poll.poll(0))

    def unacknowledged(self) -> int:
        """See `Transport`. (tcp(7), SIOCOUTQ, which is the same number.)"""
        try:
            held = fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4))
        except OSError:
            return 0
        return int.from_bytes(held, sys.byteorder)

    def wake(self) -> None:
        """See `Transport`."""
        raise NotImplementedError

    def wake_soon(self) -> None:
        """`wake` who is about to sleep."""
        raise NotImplementedError

    def close(self) -> None:
        """See `Transport`. Readers and writers go first: a loop that still watched the number
        would keep the peer from seeing the end, or be deaf on the next socket with it."""
        if self.closed:
            return
        self.closed = True
        self._unregister()
        self.wake()
        self._waiter = None  # who keeps the connection must not keep its task
        if self._writing:
            anyio.notify_closing(self._sock)
        self._sock.close()


#: The result of a wait that was not cancelled.
_no_result: Callable[[], None] = repeat(None).__next__


class _Cancelled:
    """What a task is told instead of the transport when its wait was cancelled: by then another
    task may wait for that one."""

    __slots__ = ("_error",)

    def __init__(self, error: asyncio.CancelledError) -> None:
        self._error = error

    def result(self) -> None:
        raise self._error


class AsyncioTransport(SocketTransport):
    """A plain socket on asyncio or uvloop.

    It is also what its reader awaits: a future-like object (see ``asyncio.isfuture``) that goes on
    with the task right in the loop's call back. A future would cost an object, a handle and another
    pass of the loop for every read. What the task asks of it each time are functions of C's.

    Args:
        get_loop: See ``asyncio.Future``.
    """

    __slots__ = ("_asyncio_future_blocking", "_context", "get_loop")

    result = staticmethod(_no_result)

    def __init__(
        self, sock: socket.socket, watch: Watch, get_loop: Callable[[], asyncio.AbstractEventLoop]
    ) -> None:
        super().__init__(sock, watch)
        self.get_loop = get_loop
        self._asyncio_future_blocking = False
        self._context: Any = None  # of who waits

    def sleep(self) -> object:
        """See `Transport`."""
        if not self._registered:
            self._register()
        self._asyncio_future_blocking = True
        return self

    def wake(self) -> None:
        """See `Transport`."""
        if self._waiter is not None:  # not at once: another task may be running
            self.get_loop().call_soon(self._waiter, self, context=self._context)
            self._waiter = None

    def wake_soon(self) -> None:
        """See `SocketTransport`."""
        self.get_loop().call_soon(self.wake)

    def close(self) -> None:
        """See `Transport`."""
        super().close()
        self._context = None  # it keeps what a waiter has left there

    # What a task asks of the future that it waits for

    def add_done_callback(
        self, resume: Callable[[AsyncioTransport], object], *, context: Context
    ) -> None:
        """See ``asyncio.Future``."""
        self._waiter, self._context = resume, context

    def done(self) -> bool:
        """See ``asyncio.Future``."""
        return self._waiter is None

    def cancel(self, msg: object = None) -> bool:
        """See ``asyncio.Future``."""
        if self._waiter is None:
            return False
        # Whose cancellation it is stands in the message (anyio looks for its own).
        error = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
        self.get_loop().call_soon(self._waiter, _Cancelled(error), context=self._context)
        self._waiter = None
        return True


class TrioTransport(SocketTransport):
    """A plain socket on trio.

    Its task reads by itself when it goes on: what all had read before any of them went on would be
    out of the processor's caches by then.
    """

    __slots__ = ("_loop",)

    def __init__(self, sock: socket.socket, loop: TrioEventLoop) -> None:
        super().__init__(sock, loop.watch)
        self._loop = loop

    def sleep(self) -> object:
        """See `Transport`."""
        if not self._registered:
            self._register()
        loop, task = self._loop, self._waiter
        # Who read before mostly reads again. To ask trio who runs is 3 % of an echo.
        if task is None or not task.coro.cr_running:
            self._waiter = task = loop.lowlevel.current_task()
        task.custom_sleep_data = self  # trio clears it when it has the task go on
        return loop.sleep

    def read(self, outcome: Any) -> bytes | None:
        """See `Transport`."""
        if outcome is not self._loop.has_input:
            outcome.unwrap()  # raises what it is cancelled by
            return None
        try:  # not by `super`, which takes as long as all the rest of this
            return self._sock.recv(self.read_size)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return None if self.closed else b""

    def wake(self) -> None:
        """See `Transport`."""
        task = self._waiter
        if task is not None and task.custom_sleep_data is self:
            self._loop.lowlevel.reschedule(task)

    def wake_soon(self) -> None:
        """See `SocketTransport`."""
        self._loop.call_soon(self.wake)


class TLSTransport:
    """TLS over a socket transport, through memory: writes stay synchronous."""

    __slots__ = ("_cipher_in", "_cipher_out", "_eof", "_raw", "_tls", "_unsent")

    def __init__(self, raw: SocketTransport, context: ssl.SSLContext) -> None:
        self._raw = raw
        self._cipher_in = ssl.MemoryBIO()
        self._cipher_out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._cipher_in, self._cipher_out, server_side=True)
        self._unsent = b""
        self._eof = False

    @property
    def read_size(self) -> int:
        """See `Transport`."""
        return self._raw.read_size

    @read_size.setter
    def read_size(self, size: int) -> None:
        """See `Transport`."""
        self._raw.read_size = size

    @property
    def unsent(self) -> int:
        """See `Transport`."""
        return len(self._unsent)

    async def handshake(self) -> None:
        """See `Transport`."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush_all()
                data = await self._raw.receive()
                if data == b"" or self._raw.closed:
                    raise ConnectionResetError("closed during the TLS handshake") from None
                self._cipher_in.write(data or b"")
            except ssl.SSLError:
                self._flush()  # the alert that tells the peer why
                raise
            else:
                return await self._flush_all()

    async def receive(self) -> bytes | None:
        """See `Transport`."""
        # The first bytes may have come together with the end of the TLS handshake.
        while not (plain := self._decrypt()) and not self._eof:
            data = await self._raw.receive()
            if data is None:
                return None
            self._take_in(data)
        return plain

    def sleep(self) -> object:
        """See `Transport`."""
        if self._eof:  # it came together with the last bytes
            self._raw.wake_soon()
        return self._raw.sleep()

    def read(self, outcome: Any) -> bytes | None:
        """See `Transport`."""
        data = self._raw.read(outcome)
        if data is not None:
            self._take_in(data)
        plain = self._decrypt()
        return plain if plain or self._eof else None

    def _take_in(self, data: bytes) -> None:
        if data:
            self._cipher_in.write(data)
        else:
            self._cipher_in.write_eof()

    def _decrypt(self) -> bytes:
        """All that can be read now: no readiness event will come for what stays in memory."""
        parts = []
        try:
            while part := self._tls.read(READ_SIZE):
                parts.append(part)
            self._eof = True
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLError, OSError):  # a ragged end, or nonsense: the stream ends here
            self._eof = True
        with suppress(OSError):
            self._flush()  # tickets and alerts
        # What we send is a block at a time. The rest answers what the peer asked of TLS (a new key:
        # RFC 8446, section 4.6.3), and who asks and never reads would fill the memory.
        self._eof = self._eof or len(self._unsent) > 2 * ENCRYPT_SIZE
        return b"".join(parts)

    def send(self, data: bytes | memoryview) -> int:
        """See `Transport`."""
        self._flush()
        taken = 0
        view = memoryview(data)
        while taken < len(view) and not self._unsent:
            block = view[taken : taken + ENCRYPT_SIZE]
            while block:
                written = self._tls.write(block)
                taken += written
                block = block[written:]
            self._flush()
        return taken

    def _flush(self) -> None:
        self._unsent += self._cipher_out.read()
        if self._unsent:
            with suppress(BlockingIOError):
                self._unsent = self._unsent[self._raw.send(self._unsent) :]

    async def _flush_all(self) -> None:
        self._flush()
        while self._unsent:
            await self.wait_writable()

    async def wait_writable(self) -> None:
        """See `Transport`."""
        await self._raw.wait_writable()
        self._flush()

    async def finish_writing(self) -> None:
        """See `Transport`."""
        with suppress(OSError):
            with suppress(ssl.SSLError):
                # RFC 8446, section 6.1: close_notify, whose answer is not waited for.
                self._tls.unwrap()
            await self._flush_all()
        await self._raw.finish_writing()

    def is_broken(self) -> bool:
        """See `Transport`."""
        return self._raw.is_broken()

    def unacknowledged(self) -> int:
        """See `Transport`."""
        return self._raw.unacknowledged()

    def wake(self) -> None:
        """See `Transport`."""
        self._raw.wake()

    def close(self) -> None:
        """See `Transport`."""
        self._raw.close()


class AsyncioEventLoop:
    """asyncio, or uvloop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._get_loop = repeat(loop).__next__
        self.watch: Watch
        self._failure: asyncio.Future[None] = loop.create_future()
        self.name = "uvloop" if type(loop).__module__.startswith("uvloop") else "asyncio"
        self.call_soon: Callable[[Callable[[], None]], object] = loop.call_soon
        self.call_soon_threadsafe: Callable[[Callable[[], None]], object]
        self.call_soon_threadsafe = loop.call_soon_threadsafe

    def transport(self, sock: socket.socket) -> SocketTransport:
        """See `EventLoop`."""
        return AsyncioTransport(sock, self.watch, self._get_loop)

    def start(self, function: Callable[[], Coroutine[Any, Any, None]], name: str) -> object:
        """See `EventLoop`."""
        return self._loop.create_task(function(), name=name)

    def end(self, error: BaseException | None) -> None:
        """See `EventLoop`."""
        if isinstance(error, asyncio.CancelledError):
            raise error
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def run(self) -> None:
        """Watch the sockets; until cancelled."""
        with closing(Watch()) as self.watch:
            self._loop.add_reader(self.watch.fileno(), self.go_on)
            try:
                await self._failure
            finally:
                self._loop.remove_reader(self.watch.fileno())

    def go_on(self) -> None:
        """Have all go on who wait for what has come; called by the loop, which runs no task then.
        What nobody waits for is left to the kernel, which holds the peer back."""
        transports = self.watch.transports
        for fd, _ in self.watch.poll(0, len(transports) or 1):
            transport = transports.get(fd)
            if transport is None:  # removed by one before it
                continue
            try:
                resume = transport._waiter
                if resume is None:
                    transport._unregister()
                else:
                    transport._waiter = None
                    transport._context.run(resume, transport)
            except Exception:  # a mistake of ours must cost that connection alone
                logger.exception("reading a connection failed")


class TrioEventLoop:
    """trio, which has no call backs, and lets the tasks of a pass have their turns in any order.

    What calls back before them all, once in every pass of its loop, is a ``trio.abc.Instrument``:
    first the tick ends, then those go on who have something to read. As a task among the others it
    would cost each message a pass more, and as many ticks would begin before as behind the reads:
    who is answered at once would seem to send twice in a tick.
    """

    name = "trio"

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        from outcome import Value
        from trio import lowlevel

        self.lowlevel = lowlevel
        # What a task tells trio to sleep, and what it is told when there is input: made only once.
        # To await `wait_task_rescheduled` makes them anew, and two coroutines, which is a sixth of
        # an echo, and a tenth of what an idle connection keeps.
        wait = lowlevel.wait_task_rescheduled(lambda _: lowlevel.Abort.SUCCEEDED)  # noqa: ASYNC105
        self.sleep = wait.send(None)
        wait.close()
        self.has_input = Value(None)
        self.watch: Watch
        self._token = token
        self._callbacks: list[Callable[[], None]] = []
        self._found: Sequence[object] = ()  # who goes on in this pass
        self._asleep = False  # trio waits for input, unless a task is ready
        self._parked: trio.lowlevel.Task | None = None
        self._failure: BaseException | None = None  # ends `run`

    def transport(self, sock: socket.socket) -> SocketTransport:
        """See `EventLoop`."""
        return TrioTransport(sock, self)

    def start(self, function: Callable[[], Coroutine[Any, Any, None]], name: str) -> object:
        """See `EventLoop`."""
        nursery = self.lowlevel.current_task().parent_nursery
        assert nursery is not None
        nursery.start_soon(function, name=name)
        return nursery

    def end(self, error: BaseException | None) -> None:
        """See `EventLoop`. The nursery takes it."""
        if error is not None:
            raise error

    def call_soon(self, callback: Callable[[], None]) -> None:
        """See `EventLoop`."""
        self._callbacks.append(callback)
        if self._asleep:
            self._unpark()

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """See `EventLoop`."""
        self._token.run_sync_soon(callback)

    async def run(self) -> None:
        """Run the callbacks and watch the sockets; until cancelled."""
        with closing(Watch()) as self.watch:
            instrument: Any = self
            self.lowlevel.add_instrument(instrument)
            try:
                async with anyio.create_task_group() as tg:
                    tg.start_soon(self._stay_awake)
                    await self._watch()
            finally:
                self.lowlevel.remove_instrument(instrument)

    def after_io_wait(self, _timeout: float) -> None:
        """See ``trio.abc.Instrument``."""
        callbacks, self._callbacks = self._callbacks, []
        try:
            for callback in callbacks:
                try:
                    callback()
                except Exception:  # as asyncio does: it must not cost the server its ticks
                    logger.exception("%r raised", callback)
            transports, reschedule = self.watch.transports, self.lowlevel.reschedule
            has_input = self.has_input
            self._found = ready = self.watch.poll(0, len(transports) or 1)
            for fd, _ in ready:
                transport = transports.get(fd)
                if transport is None:
                    continue
                task = transport._waiter
                if task is not None and task.custom_sleep_data is transport:
                    reschedule(task, has_input)
                else:  # nobody reads
                    transport._unregister()
        except BaseException as error:  # trio would log it, and call this never again
            self._failure, self._found = error, ()
            self._unpark()

    def _unpark(self) -> None:
        if self._parked is not None:
            self.lowlevel.reschedule(self._parked)
            self._parked = None

    async def _watch(self) -> None:
        while True:
            self._asleep = True
            await self.lowlevel.wait_readable(self.watch.fileno())
            self._asleep = False
            while self._found or self._callbacks:  # cheaper than to have trio watch each time
                await self.lowlevel.cancel_shielded_checkpoint()

    async def _stay_awake(self) -> None:
        """Have trio make another pass when `call_soon` is called while it is `_asleep`; raise what
        was raised by `after_io_wait`."""
        lowlevel = self.lowlevel

        def abort(_raise_cancel: Any) -> Any:
            self._parked = None
            return lowlevel.Abort.SUCCEEDED

        while True:
            while self._callbacks:
                await lowlevel.cancel_shielded_checkpoint()
            if self._failure is not None:
                raise self._failure
            self._parked = lowlevel.current_task()
            await lowlevel.wait_task_rescheduled(abort)
