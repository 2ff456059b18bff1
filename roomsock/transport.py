"""Bytes between a socket and the driver, and the two places where event loops differ.

Reading: anyio's ``wait_readable`` everywhere, but on asyncio a registration that is kept between
reads (1.4 times as fast). Ticks: ``call_soon`` on asyncio, a parked task on trio. Writing is the
same on all loops: a synchronous attempt, and ``wait_writable`` only when the kernel refused.
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
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context
from types import coroutine
from typing import TYPE_CHECKING, Any, Protocol

import anyio
from anyio.lowlevel import current_token

if TYPE_CHECKING:
    import trio

logger = logging.getLogger("roomsock")

#: A read of 256 KiB would make malloc map and unmap memory each time; 64 KiB does not.
READ_SIZE = 64 * 1024

#: TLS encrypts no more than this ahead of what the kernel takes.
ENCRYPT_SIZE = 64 * 1024


class Transport(Protocol):
    """A connected stream: waits for input, tries output at once."""

    async def handshake(self) -> None:
        """Do what comes before the first byte (TLS); raises OSError or ssl.SSLError."""

    def receive(self) -> Awaitable[bytes | None]:
        """Wait for bytes: ``b""`` at the end of the stream, None when `wake` or `close` came."""

    def send(self, data: bytes) -> int:
        """Hand bytes to the kernel without waiting; how many were taken. Raises OSError."""

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
        """Start a task, which nobody waits for or cancels, and which must not raise. To be called
        in a task of the server; what it returns must be kept while the new one runs.

        (A task of anyio's has an event, a scope and a handle of its own: 2.3 to 2.6 KiB.)
        """

    @property
    def call_soon(self) -> Callable[[Callable[[], None]], object]:
        """Call back once, after the tasks that are ready now had their turn."""

    @property
    def call_soon_threadsafe(self) -> Callable[[Callable[[], None]], object]:
        """Call back once, soon, from any thread or signal handler."""

    async def run(self) -> None:
        """What the loop needs to run beside the server; returns when it needs nothing."""


def running_event_loop() -> EventLoop:
    """The event loop that runs this task."""
    token: Any = current_token()
    native = getattr(token, "native_token", token)
    if isinstance(native, asyncio.AbstractEventLoop):
        return AsyncioEventLoop(native)
    return TrioEventLoop(native)


class SocketTransport:
    """A plain TCP or unix socket; how its input is waited for is the event loops' difference."""

    __slots__ = ("_closed", "_sock", "_writing")

    unsent = 0

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._closed = False
        self._writing = False  # somebody waits, or has waited, to write

    async def handshake(self) -> None:
        """Nothing comes before the first byte."""

    def receive(self) -> Awaitable[bytes | None]:
        """See `Transport`."""
        raise NotImplementedError

    def send(self, data: bytes) -> int:
        """See `Transport`."""
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    async def wait_writable(self) -> None:
        """See `Transport`."""
        self._writing = True
        while not self._closed:
            with suppress(anyio.ClosedResourceError):  # `close` ends the wait
                await anyio.wait_writable(self._sock)
                break

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

    def close(self) -> None:
        """See `Transport`. Readers and writers go first: a loop that still watched the number
        would keep the peer from seeing the end, or be deaf on the next socket with it."""
        if self._closed:
            return
        self._closed = True
        self._unregister()
        self.wake()
        if self._writing:
            anyio.notify_closing(self._sock)
        self._sock.close()

    def _unregister(self) -> None:
        raise NotImplementedError


class AsyncioTransport(SocketTransport):
    """A plain socket on asyncio, whose registration for reading is kept between reads.

    It is also what its reader awaits: a future-like object (see ``asyncio.isfuture``) that goes on
    with the task right in the loop's call back for the socket. A future would cost an object, a
    handle and another pass of the loop for every read.
    """

    __slots__ = (
        "_asyncio_future_blocking", "_cancelled", "_context", "_data", "_failed", "_goes_deaf",
        "_loop", "_registered", "_resume",
    )  # fmt: skip

    def __init__(
        self, sock: socket.socket, loop: asyncio.AbstractEventLoop, *, goes_deaf: bool = False
    ) -> None:
        super().__init__(sock)
        self._loop = loop
        #: uvloop stops watching a socket once it has reported an error on it (libuv's uv_poll),
        #: which does not show in the call back: there may have been bytes to read, too.
        self._goes_deaf = goes_deaf
        self._failed = False  # reset by the peer: the rest is read without the loop
        self._registered = False
        self._asyncio_future_blocking = False
        self._resume: Callable[[AsyncioTransport], object] | None = None  # of who waits
        self._context: Context | None = None
        self._data: bytes | None = None
        self._cancelled: asyncio.CancelledError | None = None

    @coroutine
    def receive(self) -> Generator[Any, None, bytes | None]:
        """See `Transport`."""
        if self._closed:
            return None
        if self._failed:
            try:
                return self._recv()
            except (BlockingIOError, InterruptedError):  # it was writing that failed
                self._failed = False
                self._unregister()
        if not self._registered:
            # The number: with the socket itself selectors would format its repr.
            self._loop.add_reader(self._sock.fileno(), self._readable)
            self._registered = True
        self._asyncio_future_blocking = True
        try:
            yield self
        finally:
            self._resume = self._context = None
        data, self._data = self._data, None
        return data

    def _readable(self) -> None:
        resume, context = self._resume, self._context
        if resume is None or context is None:
            # Nobody reads: leave the bytes to the kernel, which holds the peer back.
            self._unregister()
            return
        try:
            self._data = self._recv()
        except (BlockingIOError, InterruptedError):
            return
        self._resume = None
        context.run(resume, self)

    def _recv(self) -> bytes:
        try:
            data = self._sock.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            raise
        except OSError:  # reset by the peer: an end like any other
            self._failed = True
            return b""
        if self._goes_deaf and self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._failed = True
        return data

    # What a task asks of the future that it waits for

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """See ``asyncio.Future``."""
        return self._loop

    def add_done_callback(
        self, resume: Callable[[AsyncioTransport], object], *, context: Context
    ) -> None:
        """See ``asyncio.Future``."""
        self._resume, self._context = resume, context

    def done(self) -> bool:
        """See ``asyncio.Future``."""
        return self._resume is None

    def result(self) -> None:
        """See ``asyncio.Future``."""
        cancelled, self._cancelled = self._cancelled, None
        if cancelled is not None:
            raise cancelled

    def cancel(self, msg: object = None) -> bool:
        """See ``asyncio.Future``."""
        if self._resume is None:
            return False
        # Whose cancellation it is stands in the message (anyio looks for its own).
        self._cancelled = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
        self.wake()
        return True

    def send(self, data: bytes) -> int:
        """See `Transport`."""
        try:  # not by `super`, which is a quarter of what this costs
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._failed = True  # and the kernel has forgotten the error now
            raise

    async def wait_writable(self) -> None:
        """See `Transport`."""
        try:
            await super().wait_writable()
        except RuntimeError as error:  # uvloop's, on a socket that it has reported an error on
            self._failed = True
            raise ConnectionResetError(str(error)) from None

    def _unregister(self) -> None:
        if self._registered:
            self._registered = False
            self._loop.remove_reader(self._sock.fileno())

    def wake(self) -> None:
        """See `Transport`."""
        if self._resume is not None:  # not at once: another task may be running
            self._loop.call_soon(self._resume, self, context=self._context)
            self._resume = None


class TrioTransport(SocketTransport):
    """A plain socket on trio, registered once: trio itself would be told of it for every read."""

    __slots__ = ("_data", "_loop", "_registered", "_task")

    def __init__(self, sock: socket.socket, loop: TrioEventLoop) -> None:
        super().__init__(sock)
        self._loop = loop
        self._registered = False
        self._task: trio.lowlevel.Task | None = None  # which waits
        self._data: bytes | None = None  # what it is woken with

    async def receive(self) -> bytes | None:
        """See `Transport`."""
        if self._closed:
            return None
        if not self._registered:
            self._loop.selector.register(self._sock.fileno(), selectors.EVENT_READ, self._readable)
            self._registered = True
        lowlevel = self._loop.lowlevel
        self._task = lowlevel.current_task()
        await lowlevel.wait_task_rescheduled(self._abort)
        data, self._data = self._data, None
        return data

    def _abort(self, _raise_cancel: Any) -> trio.lowlevel.Abort:
        self._task = None
        return self._loop.abort_succeeded

    def _readable(self) -> None:
        if self._task is None:
            # Nobody reads: leave the bytes to the kernel, which holds the peer back.
            self._unregister()
            return
        try:
            self._data = self._sock.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # reset by the peer: an end like any other
            self._data = b""
        self.wake()

    def _unregister(self) -> None:
        if self._registered:
            self._registered = False
            self._loop.selector.unregister(self._sock.fileno())

    def wake(self) -> None:
        """See `Transport`."""
        if self._task is not None:
            self._loop.lowlevel.reschedule(self._task)
            self._task = None


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
                if not data:
                    raise ConnectionResetError("closed during the TLS handshake") from None
                self._cipher_in.write(data)
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
            if data:
                self._cipher_in.write(data)
            else:
                self._cipher_in.write_eof()
        return plain

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

    def send(self, data: bytes) -> int:
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
        data = self._unsent + self._cipher_out.read()
        self._unsent = data[self._raw.send(data) :] if data else b""

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
        self.name = "uvloop" if type(loop).__module__.startswith("uvloop") else "asyncio"
        self.call_soon: Callable[[Callable[[], None]], object] = loop.call_soon
        self.call_soon_threadsafe: Callable[[Callable[[], None]], object]
        self.call_soon_threadsafe = loop.call_soon_threadsafe

    def transport(self, sock: socket.socket) -> SocketTransport:
        """See `EventLoop`."""
        return AsyncioTransport(sock, self._loop, goes_deaf=self.name == "uvloop")

    def start(self, function: Callable[[], Coroutine[Any, Any, None]], name: str) -> object:
        """See `EventLoop`."""
        return self._loop.create_task(function(), name=name)

    async def run(self) -> None:
        """Nothing is needed."""


class TrioEventLoop:
    """trio: the cheapest way to be called after the others is a task that reschedules itself, and
    to wait for input one that waits for a selector of ours."""

    name = "trio"

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        from trio import lowlevel

        self.lowlevel = lowlevel
        self.abort_succeeded = lowlevel.Abort.SUCCEEDED
        self._token = token
        self._callbacks: list[Callable[[], None]] = []
        self._task: trio.lowlevel.Task | None = None
        self._parked = False

    def transport(self, sock: socket.socket) -> SocketTransport:
        """See `EventLoop`."""
        return TrioTransport(sock, self)

    def start(self, function: Callable[[], Coroutine[Any, Any, None]], name: str) -> object:
        """See `EventLoop`."""
        nursery = self.lowlevel.current_task().parent_nursery
        assert nursery is not None
        nursery.start_soon(function, name=name)
        return nursery

    def call_soon(self, callback: Callable[[], None]) -> None:
        """See `EventLoop`."""
        self._callbacks.append(callback)
        if self._parked and self._task is not None:
            self._parked = False
            self.lowlevel.reschedule(self._task)

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """See `EventLoop`."""
        self._token.run_sync_soon(callback)

    async def run(self) -> None:
        """Run the callbacks and watch the sockets; until cancelled."""
        with selectors.DefaultSelector() as self.selector:
            async with anyio.create_task_group() as tg:
                tg.start_soon(self._watch)
                await self._call_back()

    async def _watch(self) -> None:
        while True:
            await self.lowlevel.wait_readable(self.selector.fileno())
            for key, _ in self.selector.select(0):
                key.data()

    async def _call_back(self) -> None:
        lowlevel = self.lowlevel

        def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
            self._parked = False
            return self.abort_succeeded

        self._task = lowlevel.current_task()
        while True:
            while self._callbacks:
                callbacks, self._callbacks = self._callbacks, []
                for callback in callbacks:
                    try:
                        callback()
                    except Exception:  # as asyncio does: it must not cost the server its ticks
                        logger.exception("%r raised", callback)
                await lowlevel.cancel_shielded_checkpoint()
            self._parked = True
            await lowlevel.wait_task_rescheduled(abort)
