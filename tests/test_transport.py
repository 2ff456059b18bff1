"""Sockets on each event loop: reading, writing, closing, TLS in memory, and ticks."""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import logging
import os
import selectors
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import closing, suppress
from contextvars import ContextVar, copy_context
from functools import partial
from types import SimpleNamespace, coroutine
from typing import Any
from weakref import WeakSet

import anyio
import anyio.to_thread
import pytest
import trio
import trio.testing
from anyio.lowlevel import checkpoint

from roomsock.transport import (
    ENCRYPT_SIZE,
    READ_SIZE,
    AsyncioEventLoop,
    AsyncioTransport,
    EventLoop,
    Poller,
    SocketTransport,
    TLSTransport,
    TrioEventLoop,
    Watch,
    make_poller,
    running_event_loop,
)

from .client import PATIENCE

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

Pair = tuple[SocketTransport, socket.socket]


@pytest.fixture
def connect(sockets: list[socket.socket], loop: EventLoop) -> Callable[[], Pair]:
    """Makes a transport and the peer's (non-blocking) end of its TCP connection."""

    def connect() -> Pair:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            peer = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        ours.setblocking(False)
        peer.setblocking(False)
        sockets.extend((ours, peer))
        return loop.transport(ours), peer

    return connect


def reset(peer: socket.socket) -> None:
    """Close with RST."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


async def arrived(peer: socket.socket) -> bytes:
    """What the peer reads next."""
    with anyio.fail_after(PATIENCE):
        await anyio.wait_readable(peer)
        return peer.recv(READ_SIZE)


def look(loop: Any) -> None:
    """Have the event loop call for those who have something now."""
    if isinstance(loop, TrioEventLoop):
        loop.after_io_wait(0)
    else:
        loop.go_on()


def on_asyncio(main: Callable[[EventLoop], Awaitable[None]], *, use_uvloop: bool) -> None:
    """Run a test beside what an event loop needs to run."""

    async def run() -> None:
        loop = running_event_loop()
        async with anyio.create_task_group() as tg:
            tg.start_soon(loop.run)
            await anyio.wait_all_tasks_blocked()
            await main(loop)
            tg.cancel_scope.cancel()

    anyio.run(run, backend_options={"use_uvloop": use_uvloop})


async def received(transport: SocketTransport | TLSTransport) -> bytes | None:
    with anyio.fail_after(PATIENCE):
        return await transport.receive()


def fill(transport: SocketTransport) -> int:
    """Send until the kernel refuses; how much it took."""
    taken = 0
    with suppress(BlockingIOError):
        while True:
            taken += transport.send(bytes(READ_SIZE))
    return taken


async def drain(peer: socket.socket, size: int) -> None:
    with anyio.fail_after(PATIENCE):
        while size > 0:
            await anyio.wait_readable(peer)
            size -= len(peer.recv(READ_SIZE))


# Watching


@pytest.fixture
def watching() -> Iterator[Callable[[Callable[[], Any]], AsyncioEventLoop]]:
    """Makes asyncio's part, with a watch of its own."""
    with closing(asyncio.new_event_loop()) as loop:

        def make(make_its_poller: Callable[[], Any]) -> AsyncioEventLoop:
            event_loop = AsyncioEventLoop(loop)
            event_loop.watch = Watch(make_its_poller)
            return event_loop

        yield make


def waiting(function: Callable[[], None]) -> Any:
    """A transport on asyncio whose reader calls this, and waits again."""
    context = copy_context()

    def resume(transport: Any) -> None:
        transport._waiter = resume
        function()

    return SimpleNamespace(_waiter=resume, _context=context)


@pytest.mark.parametrize("make", [make_poller, Poller])
def test_who_has_something_goes_on(
    make: Callable[[], Any],
    watching: Callable[[Callable[[], Any]], AsyncioEventLoop],
    sockets: list[socket.socket],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pairs = [socket.socketpair() for _ in range(4)]
    sockets += (sock for pair in pairs for sock in pair)
    went_on: list[int] = []
    loop = watching(make)
    watch = loop.watch
    loop.go_on()
    assert not watch.poll(0, 1)
    assert watch.fileno() > 0

    def reader(number: int) -> Callable[[], None]:
        def read() -> None:
            went_on.append(number)
            if number == 0:
                raise ValueError("a mistake")

        return read

    for number, (ours, peer) in enumerate(pairs):
        watch.add(ours.fileno(), waiting(reader(number)))
        if number < 3:
            peer.send(b"x")
    watch.remove(pairs[1][0].fileno())
    for _ in range(2):
        loop.go_on()
        assert sorted(went_on) == [0, 2]
        went_on.clear()
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2
    for number in 0, 2:
        watch.remove(pairs[number][0].fileno())
    loop.go_on()
    assert not went_on
    assert not watch.poll(0, 1)
    pairs[3][1].close()
    loop.go_on()
    assert went_on == [3]
    watch.close()
    watch.remove(pairs[3][0].fileno())


@pytest.mark.parametrize("make", [make_poller, Poller])
def test_who_is_removed_by_the_one_before_does_not_go_on(
    make: Callable[[], Any],
    watching: Callable[[Callable[[], Any]], AsyncioEventLoop],
    sockets: list[socket.socket],
) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    sockets += (sock for pair in pairs for sock in pair)
    went_on: list[socket.socket] = []
    loop = watching(make)
    for ours, peer in pairs:

        def remove_all(ours: socket.socket = ours) -> None:
            went_on.append(ours)
            for each, _ in pairs:
                loop.watch.remove(each.fileno())

        loop.watch.add(ours.fileno(), waiting(remove_all))
        peer.send(b"x")
    loop.go_on()
    assert not loop.watch.poll(0, 1)
    loop.go_on()
    assert len(went_on) == 1
    loop.watch.close()


async def test_a_closed_transport_keeps_nobody_who_has_waited_for_it(
    connect: Callable[[], Pair],
) -> None:
    class Value:
        pass

    async def wait() -> None:
        context_variable.set(Value())
        values.add(context_variable.get())
        await transport.receive()

    context_variable: ContextVar[Value] = ContextVar("value")
    values: WeakSet[Value] = WeakSet()
    transport, peer = connect()
    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert len(values) == 1
        peer.send(b"x")
    transport.close()
    await checkpoint()
    gc.collect()
    assert len(values) == 0


# Reading


async def test_bytes_arrive_and_so_does_the_end(connect: Callable[[], Pair]) -> None:
    transport, peer = connect()
    for message in b"one", b"two":
        peer.send(message)
        assert await received(transport) == message
    peer.shutdown(socket.SHUT_WR)
    assert await received(transport) == b""
    assert await received(transport) == b""
    transport.close()


class Unprinted(socket.socket):
    """Looking at its repr takes three system calls."""

    def __repr__(self) -> str:
        raise AssertionError("a socket was formatted")


async def test_no_socket_is_formatted_to_watch_it(
    loop: EventLoop, sockets: list[socket.socket]
) -> None:
    pair = socket.socketpair()
    ours, peer = Unprinted(fileno=pair[0].detach()), pair[1]
    sockets.append(peer)
    ours.setblocking(False)
    transport = loop.transport(ours)
    peer.send(b"x")
    assert await received(transport) == b"x"
    transport.close()


async def test_a_read_is_bounded(connect: Callable[[], Pair]) -> None:
    transport, peer = connect()
    peer.send(b"x" * (READ_SIZE + 1))
    read = [await received(transport), await received(transport)]
    assert [len(data or b"") for data in read] == [READ_SIZE, 1]
    transport.close()


async def test_a_read_is_as_large_as_was_asked_for(connect: Callable[[], Pair]) -> None:
    transport, peer = connect()
    peer.send(b"0123456789")
    transport.read_size = 3
    assert await received(transport) == b"012"
    transport.read_size = 4
    assert await received(transport) == b"3456"
    transport.close()


@pytest.mark.parametrize("waiting", [True, False])
async def test_a_reset_is_an_end_and_stays_one(connect: Callable[[], Pair], waiting: bool) -> None:
    transport, peer = connect()
    peer.send(b"x")
    assert await received(transport) == b"x"
    async with anyio.create_task_group() as tg:
        got: list[bytes | None] = []

        async def receive() -> None:
            got.append(await received(transport))

        if waiting:
            tg.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
        reset(peer)
        if not waiting:
            await receive()
    assert got == [b""]
    assert await received(transport) == b""
    transport.close()


@pytest.mark.parametrize("size", [1, READ_SIZE + 1])
async def test_what_came_before_a_reset_is_read_and_then_its_end(
    connect: Callable[[], Pair], size: int
) -> None:
    """A client that leaves with something unread resets the connection: uvloop tells once."""
    transport, peer = connect()
    read = 0
    async with anyio.create_task_group() as tg:

        async def receive() -> None:
            nonlocal read
            while data := await received(transport):
                read += len(data)

        tg.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        peer.send(b"x" * size)
        reset(peer)
    assert read == size
    transport.close()


async def test_a_write_that_fails_first_hides_no_reset(connect: Callable[[], Pair]) -> None:
    """The kernel reports the error once, here to the writer."""
    transport, peer = connect()
    async with anyio.create_task_group() as tg:
        got: list[bytes | None] = []

        async def receive() -> None:
            while (data := await received(transport)) != b"":
                got.append(data)
            got.append(data)

        tg.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        peer.send(b"x")
        reset(peer)
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            transport.send(b"y")
    assert got[-1] == b""
    transport.close()


async def test_what_the_peer_has_not_taken_is_known(connect: Callable[[], Pair]) -> None:
    transport, peer = connect()
    assert transport.unacknowledged() == 0
    fill(transport)
    before = transport.unacknowledged()
    assert before > 0
    with anyio.fail_after(PATIENCE):
        while transport.unacknowledged() >= before:
            with suppress(BlockingIOError):
                peer.recv(READ_SIZE)
            await checkpoint()
    transport.close()


async def test_who_knows_not_what_the_peer_has_taken_says_nothing(
    connect: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> bytes:
        raise OSError(errno.ENOTTY, "not here")

    transport, _ = connect()
    monkeypatch.setattr("fcntl.ioctl", refuse)
    fill(transport)
    assert transport.unacknowledged() == 0
    transport.close()


async def test_reading_goes_on_after_our_side_is_shut(connect: Callable[[], Pair]) -> None:
    transport, peer = connect()
    await transport.finish_writing()
    assert await arrived(peer) == b""
    with pytest.raises(BrokenPipeError):
        transport.send(b"too late")
    peer.send(b"hello")
    assert await received(transport) == b"hello"
    async with anyio.create_task_group() as tg:
        tg.start_soon(received, transport)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(BrokenPipeError):
            transport.send(b"too late")
        peer.send(b"hello")
    with pytest.raises(BrokenPipeError):
        transport.send(b"too late")
    async with anyio.create_task_group() as tg:  # fails to write, has nothing to read
        tg.start_soon(received, transport)
        await anyio.wait_all_tasks_blocked()
        peer.send(b"hello")
    await transport.finish_writing()
    transport.close()


async def test_wake_ends_a_waiting_receive_and_nothing_else(connect: Callable[[], Pair]) -> None:
    transport, peer = connect()
    for _ in range(2):
        async with anyio.create_task_group() as tg:
            got: list[bytes | None] = []

            async def receive() -> None:
                got.append(await received(transport))  # noqa: B023

            tg.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            transport.wake()
            transport.wake()
        assert got == [None]
    transport.wake()  # nobody waits: nothing is owed to the next
    peer.send(b"hello")
    assert await received(transport) == b"hello"
    transport.close()


async def test_bytes_that_come_with_a_wake_stay(connect: Callable[[], Pair]) -> None:
    transport, peer = connect()
    async with anyio.create_task_group() as tg:
        got: list[bytes | None] = []

        async def receive() -> None:
            got.append(await received(transport))

        tg.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        transport.wake()
        peer.send(b"hello")
    if got == [None]:
        got.append(await received(transport))
    assert got[-1] == b"hello"
    transport.close()


async def test_a_cancelled_receive_loses_nothing(connect: Callable[[], Pair]) -> None:
    transport, peer = connect()
    for number in range(20):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tg:
                got: list[bytes | None] = []

                async def receive() -> None:
                    got.append(await received(transport))  # noqa: B023

                tg.start_soon(receive)
                await anyio.wait_all_tasks_blocked()
                peer.send(b"%d" % number)
                for _ in range(number % 4):
                    await checkpoint()
                scope.cancel()
        if not got:
            got.append(await received(transport))
        assert got == [b"%d" % number]
    transport.close()


def test_asyncio_keeps_what_a_cancelled_task_had_read() -> None:
    """asyncio cancels a task although what it waited for has come, anyio's scopes do not."""

    async def main(loop: EventLoop) -> None:
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        transport = loop.transport(ours)
        task = asyncio.create_task(received(transport))
        await asyncio.sleep(0)
        peer.send(b"hello")
        peer.shutdown(socket.SHUT_WR)
        asyncio.get_running_loop().call_soon(
            # Behind the loop's own call back for the socket, before the task's turn.
            lambda: asyncio.get_running_loop().call_soon(task.cancel)
        )
        try:
            assert await task == b"hello"
        except asyncio.CancelledError:
            assert await transport.receive() == b"hello"
        assert await transport.receive() == b""
        transport.close()
        peer.close()

    on_asyncio(main, use_uvloop=False)


@pytest.mark.parametrize("end", [b"hello", b""])
@pytest.mark.parametrize("how", ["cancelled", "woken", "closed"])
@pytest.mark.parametrize("use_uvloop", [False, True])
def test_what_comes_behind_the_end_of_a_wait_is_for_the_next(
    use_uvloop: bool, how: str, end: bytes
) -> None:
    async def main(loop: EventLoop) -> None:
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        transport = loop.transport(ours)
        task = asyncio.create_task(received(transport))
        await anyio.wait_all_tasks_blocked()
        if end:
            peer.send(end)
        else:
            peer.shutdown(socket.SHUT_WR)
        {"cancelled": task.cancel, "woken": transport.wake, "closed": transport.close}[how]()
        look(loop)  # what the loop would call now: the task has not had its turn
        if how == "cancelled":
            with pytest.raises(asyncio.CancelledError):
                await task
        if how != "woken":
            assert how == "cancelled" or await task is None
            task = asyncio.create_task(received(transport))
        assert await task == (None if how == "closed" else end)
        transport.close()
        peer.close()

    on_asyncio(main, use_uvloop=use_uvloop)


@pytest.mark.parametrize("use_uvloop", [False, True])
def test_a_cancellation_is_its_own_tasks_although_another_waits_by_then(use_uvloop: bool) -> None:
    async def main(loop: EventLoop) -> None:
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        transport = loop.transport(ours)
        first = asyncio.create_task(received(transport))
        await anyio.wait_all_tasks_blocked()
        second = asyncio.create_task(received(transport))
        asyncio.get_running_loop().call_soon(look, loop)
        peer.send(b"x")
        first.cancel()  # has its turn behind the second's, and behind what is read by then
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second == b"x"
        transport.close()
        peer.close()

    on_asyncio(main, use_uvloop=use_uvloop)


def test_whose_cancellation_ends_a_wait_can_be_told() -> None:
    async def main(loop: EventLoop) -> None:
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        transport = loop.transport(ours)

        async def receive() -> None:
            with pytest.raises(asyncio.CancelledError, match=r"^by the test$"):
                await transport.receive()

        task = asyncio.create_task(receive())
        await anyio.wait_all_tasks_blocked()
        task.cancel("by the test")
        assert isinstance(transport, AsyncioTransport)
        assert not transport.cancel("too late")
        await task
        transport.close()
        peer.close()

    on_asyncio(main, use_uvloop=False)


@pytest.mark.parametrize("use_uvloop", [False, True])
def test_who_waits_goes_on_in_its_own_task_and_context(use_uvloop: bool) -> None:
    number: ContextVar[int] = ContextVar("number", default=0)

    async def main(loop: EventLoop) -> None:
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        transport = loop.transport(ours)

        async def count() -> None:
            nonlocal counted
            for expected in range(3):
                assert await transport.receive() == b"x"
                assert asyncio.current_task() is task
                assert number.get() == expected
                number.set(expected + 1)
                counted += 1

        counted = 0

        task = asyncio.create_task(count())
        for sent in range(3):
            peer.send(b"x")
            while counted == sent and not task.done():
                await checkpoint()
            assert asyncio.current_task() is not task
        await task
        assert number.get() == 0
        transport.close()
        peer.close()

    on_asyncio(main, use_uvloop=use_uvloop)


def test_on_trio_input_that_nobody_reads_or_that_meets_a_cancellation_is_not_lost() -> None:
    async def main() -> None:
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        loop = TrioEventLoop(trio.lowlevel.current_trio_token())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            await trio.testing.wait_all_tasks_blocked()
            transport = loop.transport(ours)
            registered = loop.watch.transports
            with trio.CancelScope() as scope:
                nursery.start_soon(trio.testing.wait_all_tasks_blocked)
                scope.cancel()
                await transport.receive()
            peer.send(b"one")  # who was cancelled does not read any more: it stays where it is
            await trio.testing.wait_all_tasks_blocked()
            assert len(registered) == 0
            assert await transport.receive() == b"one"
            assert len(registered) == 1

            with trio.CancelScope() as scope:
                nursery.start_soon(transport_is_read_and_cancelled, loop, peer, scope)
                assert await transport.receive() == b"two"
            transport.close()
            assert await transport.receive() is None
            nursery.cancel_scope.cancel()
        peer.close()

    async def transport_is_read_and_cancelled(
        loop: TrioEventLoop, peer: socket.socket, scope: trio.CancelScope
    ) -> None:
        await trio.testing.wait_all_tasks_blocked()
        peer.send(b"two")
        look(loop)  # the task has not had its turn
        scope.cancel()

    trio.run(main)


@pytest.mark.parametrize(
    ("first", "then"), list(itertools.permutations(["readable", "cancelled", "woken", "closed"], 2))
)
def test_on_trio_what_comes_first_ends_a_wait(first: str, then: str) -> None:
    async def main() -> None:
        ours, peer = socket.socketpair()
        ours.setblocking(False)
        loop = TrioEventLoop(trio.lowlevel.current_trio_token())
        got: list[bytes | None] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            await trio.testing.wait_all_tasks_blocked()
            transport = loop.transport(ours)
            scope = trio.CancelScope()

            async def receive() -> None:
                with scope:
                    got.append(await transport.receive())

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            peer.send(b"x")
            ways: dict[str, Callable[[], object]] = {
                "readable": partial(look, loop),
                "cancelled": scope.cancel,
                "woken": transport.wake,
                "closed": transport.close,
            }
            for way in first, then:  # the task has no turn in between
                ways[way]()
            await trio.testing.wait_all_tasks_blocked()
            closed = "closed" in (first, then)
            reads = [b"x"] if first == "readable" and not closed else [None]
            assert got == ([] if first == "cancelled" else reads)
            if reads == [None] and not closed:
                assert await transport.receive() == b"x"
            transport.close()
            nursery.cancel_scope.cancel()
        peer.close()

    trio.run(main)


async def test_any_task_may_read_next(connect: Callable[[], Pair]) -> None:
    """Who read before goes on with what it waits for now, and may read again."""
    transport, peer = connect()
    got: list[bytes | None] = []
    has_read, again = anyio.Event(), anyio.Event()

    async def receive() -> None:
        got.append(await received(transport))
        has_read.set()
        await again.wait()
        got.append(await received(transport))

    async with anyio.create_task_group() as tg:
        tg.start_soon(receive)
        peer.send(b"one")
        await has_read.wait()
        with anyio.move_on_after(0):
            await transport.receive()
        peer.send(b"two")
        got.append(await received(transport))
        again.set()
        await anyio.wait_all_tasks_blocked()
        peer.send(b"three")
    assert got == [b"one", b"two", b"three"]
    transport.close()


async def test_a_call_for_nothing_is_no_end(
    connect: Callable[[], Pair], loop: EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, peer = connect()
    got: list[bytes | None] = []

    def call_for_nothing() -> None:
        everyone = [(fd, selectors.EVENT_READ) for fd in transport._watch.transports]
        with monkeypatch.context() as patch:
            patch.setattr(transport._watch, "poll", lambda *_: everyone)
            look(loop)

    async def receive() -> None:
        while not (got and got[-1]):
            got.append(await received(transport))

    async with anyio.create_task_group() as tg:
        tg.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        for _ in range(2):
            loop.call_soon(call_for_nothing)
            await anyio.wait_all_tasks_blocked()
        assert got == [None, None]
        peer.send(b"x")
    assert got == [None, None, b"x"]
    transport.close()


async def test_the_registration_is_kept_while_somebody_reads_and_dropped_otherwise(
    loop: EventLoop, sockets: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def count(*args: Any) -> list[tuple[int, int]]:
        nonlocal calls
        ready: list[tuple[int, int]] = poll(*args)
        calls += len(ready)
        return ready

    ours, peer = socket.socketpair()
    sockets.extend((ours, peer))
    ours.setblocking(False)
    transport = loop.transport(ours)
    poll = transport._watch.poll
    monkeypatch.setattr(transport._watch, "poll", count)
    for number in range(1, 4):
        peer.send(b"x")
        assert await received(transport) == b"x"
        assert calls == number
        assert transport._registered
    peer.send(b"x")
    for _ in range(20):  # nobody reads: the loop calls once more, and then no more
        await checkpoint()
    assert calls == 4
    assert not transport._registered
    assert await received(transport) == b"x"
    assert calls == 5
    assert transport._registered
    transport.close()
    assert not transport._registered


# Writing


async def test_wait_writable_ends_when_the_peer_reads(connect: Callable[[], Pair]) -> None:
    transport, peer = connect()
    taken = fill(transport)
    assert taken > 0
    done = False

    async def wait() -> None:
        nonlocal done
        await transport.wait_writable()
        done = True

    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        transport.wake()  # is for who reads
        for _ in range(5):
            await checkpoint()
        assert not done
        await drain(peer, taken)
    assert done
    assert transport.send(b"more") == 4
    transport.close()


async def test_reading_goes_on_while_somebody_waits_to_write(connect: Callable[[], Pair]) -> None:
    transport, peer = connect()
    taken = fill(transport)
    async with anyio.create_task_group() as tg:
        tg.start_soon(transport.wait_writable)
        for _ in range(3):
            await anyio.wait_all_tasks_blocked()
            peer.send(b"hello")
            assert await received(transport) == b"hello"
        tg.start_soon(received, transport)  # uvloop calls it, too, when writing is possible
        await anyio.wait_all_tasks_blocked()
        await drain(peer, taken)
        peer.send(b"hello")
    peer.send(b"hello")
    assert await received(transport) == b"hello"
    transport.close()


async def test_close_ends_every_wait(connect: Callable[[], Pair]) -> None:
    transport, _ = connect()
    fill(transport)
    got: list[bytes | None] = []

    async def receive() -> None:
        got.append(await transport.receive())

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tg:
            tg.start_soon(receive)
            tg.start_soon(transport.wait_writable)
            await anyio.wait_all_tasks_blocked()
            transport.close()
    assert got == [None]
    assert await received(transport) is None
    await transport.wait_writable()
    await transport.finish_writing()
    with pytest.raises(OSError, match="descriptor"):
        transport.send(b"x")
    transport.close()


# Closing


@pytest.mark.parametrize("busy", ["idle", "has read", "reads", "was cancelled"])
async def test_the_peer_sees_the_end_after_close(connect: Callable[[], Pair], busy: str) -> None:
    transport, peer = connect()
    if busy != "idle":
        peer.send(b"x")
        assert await received(transport) == b"x"
    async with anyio.create_task_group() as tg:
        if busy == "reads":
            tg.start_soon(received, transport)
            await anyio.wait_all_tasks_blocked()
        if busy == "was cancelled":
            with anyio.CancelScope() as scope:
                scope.cancel()
                await transport.receive()
        transport.close()
        assert await arrived(peer) == b""


async def test_a_new_socket_with_the_same_number_works(
    sockets: list[socket.socket], loop: EventLoop
) -> None:
    transports: list[SocketTransport] = []
    number = None
    for _ in range(5):
        ours, peer = socket.socketpair()
        sockets.extend((ours, peer))
        if number is None:
            number = ours.fileno()
        elif peer.fileno() == number:
            ours, peer = peer, ours
        assert ours.fileno() == number
        ours.setblocking(False)
        peer.setblocking(False)
        transport = loop.transport(ours)
        transports.append(transport)
        for message in b"one", b"two":
            peer.send(message)
            assert await received(transport) == message
        async with anyio.create_task_group() as tg:
            tg.start_soon(received, transport)  # waits while it is closed
            taken = fill(transport)
            tg.start_soon(transport.wait_writable)
            await anyio.wait_all_tasks_blocked()
            transport.close()
        await drain(peer, taken)
        assert await arrived(peer) == b""
        peer.close()
    for transport in transports:
        transport.close()  # a second time: not the new socket


# TLS


class Peer:
    """The other end of a TLS connection, which decides what leaves in one piece."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self.cipher_in, self.cipher_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.cipher_in, self.cipher_out, server_hostname="localhost")

    async def flush(self) -> None:
        data = self.cipher_out.read()
        with anyio.fail_after(PATIENCE):
            while data:
                await anyio.wait_writable(self.sock)
                data = data[self.sock.send(data) :]

    async def pump(self, step: Callable[[], Any], finish: bytes = b"") -> Any:
        """Do a step of TLS, and whatever it waits for."""
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self.flush()
                data = await arrived(self.sock)
                if data:
                    self.cipher_in.write(data)
                else:
                    self.cipher_in.write_eof()
            else:
                if finish:  # in one piece with the end of the handshake
                    self.tls.write(finish)
                await self.flush()
                return result

    async def read_all(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            data += await self.pump(lambda: self.tls.read(READ_SIZE))
        return bytes(data)


@pytest.fixture
def secure(
    connect: Callable[[], Pair], contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> Callable[[], tuple[TLSTransport, Peer]]:
    def secure() -> tuple[TLSTransport, Peer]:
        raw, sock = connect()
        return TLSTransport(raw, contexts[0]), Peer(sock, contexts[1])

    return secure


async def shake(transport: TLSTransport, peer: Peer, finish: bytes = b"") -> None:
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tg:
            tg.start_soon(transport.handshake)
            await peer.pump(peer.tls.do_handshake, finish)


async def test_one_read_gives_all_that_was_decrypted(
    secure: Callable[[], tuple[TLSTransport, Peer]],
) -> None:
    """TLS reads give one record of 16 KiB at most, and no event would come for the next."""
    transport, peer = secure()
    await shake(transport, peer)
    for number in range(100):
        peer.tls.write(b"%04d" % number)
    await peer.flush()
    assert await received(transport) == b"".join(b"%04d" % number for number in range(100))
    transport.close()


@coroutine
def in_halves(transport: TLSTransport) -> Generator[Any, Any, bytes | None]:
    return transport.read((yield transport.sleep()))


@pytest.mark.parametrize("receive", [received, in_halves])
async def test_what_is_read_at_once_is_asked_of_the_socket(
    secure: Callable[[], tuple[TLSTransport, Peer]],
    receive: Callable[[TLSTransport], Awaitable[bytes | None]],
) -> None:
    transport, peer = secure()
    await shake(transport, peer)
    peer.tls.write(b"first")
    transport.read_size = peer.cipher_out.pending  # one record of TLS
    peer.tls.write(b"again")
    peer.tls.write(b"second")
    peer.tls.write(b"third")
    await peer.flush()
    assert [await received(transport), await receive(transport)] == [b"first", b"again"]
    transport.read_size = READ_SIZE
    assert await receive(transport) == b"secondthird"
    transport.close()


async def test_an_end_that_came_with_the_last_bytes_is_read_at_once(
    secure: Callable[[], tuple[TLSTransport, Peer]],
) -> None:
    transport, peer = secure()
    await shake(transport, peer)
    peer.tls.write(b"last")
    with pytest.raises(ssl.SSLWantReadError):
        peer.tls.unwrap()  # says that nothing follows; the socket stays open
    await peer.flush()
    assert await in_halves(transport) == b"last"
    with anyio.fail_after(PATIENCE):
        assert await in_halves(transport) == b""
    transport.close()


async def test_bytes_that_come_with_the_end_of_the_handshake_are_not_lost(
    secure: Callable[[], tuple[TLSTransport, Peer]],
) -> None:
    transport, peer = secure()
    await shake(transport, peer, b"hello")
    assert await received(transport) == b"hello"
    transport.close()


async def test_a_record_in_pieces_is_waited_for(
    secure: Callable[[], tuple[TLSTransport, Peer]],
) -> None:
    transport, peer = secure()
    await shake(transport, peer)
    peer.tls.write(b"hello")
    data = peer.cipher_out.read()
    got: list[bytes | None] = []

    async def receive() -> None:
        got.append(await received(transport))

    async with anyio.create_task_group() as tg:
        tg.start_soon(receive)
        for index in range(len(data)):
            for _ in range(5):
                await checkpoint()
            assert got == []
            peer.sock.send(data[index : index + 1])
    assert got == [b"hello"]
    transport.close()


async def test_who_asks_much_of_tls_and_never_reads_is_given_up(
    secure: Callable[[], tuple[TLSTransport, Peer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new key that a client asks for is answered (RFC 8446, 4.6.3), out of every bound's
    sight: nothing was read, nothing was sent."""
    transport, peer = secure()
    await shake(transport, peer)
    monkeypatch.setattr(type(transport._raw), "send", lambda self, data: 0)
    transport._cipher_out.write(bytes(2 * ENCRYPT_SIZE))
    peer.tls.write(b"hello")
    await peer.flush()
    assert await received(transport) == b"hello"
    transport._cipher_out.write(b"x")
    assert await received(transport) == b""
    transport.close()


async def test_tls_wake_and_close(secure: Callable[[], tuple[TLSTransport, Peer]]) -> None:
    transport, peer = secure()
    await shake(transport, peer)
    for act in transport.wake, transport.close:
        async with anyio.create_task_group() as tg:
            got: list[bytes | None] = []

            async def receive() -> None:
                got.append(await received(transport))  # noqa: B023

            tg.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            act()
        assert got == [None]
    transport.close()
    with suppress(OSError):
        await peer.pump(lambda: peer.tls.read(1))


async def test_ciphertext_that_the_kernel_refused_is_unsent_and_leaves_later(
    secure: Callable[[], tuple[TLSTransport, Peer]],
) -> None:
    transport, peer = secure()
    await shake(transport, peer)
    message = bytes(range(256)) * (32 * 1024)
    taken = transport.send(message)
    assert 0 < taken < len(message)
    assert transport.unsent
    assert transport.send(message[taken:]) == 0  # nothing is encrypted on top of that

    async def write() -> None:
        sent = taken
        while sent < len(message) or transport.unsent:
            await transport.wait_writable()
            if not transport.unsent:
                sent += transport.send(message[sent:])

    async with anyio.create_task_group() as tg:
        tg.start_soon(write)
        assert await peer.read_all(len(message)) == message
    assert transport.unsent == 0
    transport.close()


async def test_finish_writing_says_so_in_tls_and_does_not_wait_for_the_answer(
    secure: Callable[[], tuple[TLSTransport, Peer]],
) -> None:
    transport, peer = secure()
    await shake(transport, peer)
    assert transport.send(b"bye") == 3
    with anyio.fail_after(PATIENCE):
        await transport.finish_writing()
    assert await peer.read_all(3) == b"bye"
    assert await peer.pump(lambda: peer.tls.read(1)) == b""  # close_notify, no ragged end
    peer.tls.write(b"still talking")
    await peer.flush()
    assert await received(transport) in (b"still talking", b"")
    transport.close()


async def test_finish_writing_waits_for_what_is_unsent(
    secure: Callable[[], tuple[TLSTransport, Peer]],
) -> None:
    transport, peer = secure()
    await shake(transport, peer)
    size = 0
    while not transport.unsent:
        size += transport.send(bytes(65536))
    async with anyio.create_task_group() as tg:
        tg.start_soon(transport.finish_writing)
        await anyio.wait_all_tasks_blocked()
        assert await peer.read_all(size) == bytes(size)
        assert await peer.pump(lambda: peer.tls.read(1)) == b""
    transport.close()


async def test_finish_writing_over_input_reads_it_away(
    secure: Callable[[], tuple[TLSTransport, Peer]],
) -> None:
    """What was read behind a `close_notify` is no reason to leave the rest in the kernel, which
    would reset the connection."""
    transport, peer = secure()
    await shake(transport, peer)
    async with anyio.create_task_group() as tg:

        async def talk() -> None:
            for _ in range(64):
                peer.tls.write(b"x" * 65536)
                await peer.flush()
            peer.sock.shutdown(socket.SHUT_WR)

        tg.start_soon(talk)
        assert await received(transport)
        assert transport.send(b"bye") == 3
        await transport.finish_writing()
        while await received(transport) != b"":
            pass
        transport.close()
    assert await peer.read_all(3) == b"bye"
    assert await peer.pump(lambda: peer.tls.read(1)) == b""


@pytest.mark.parametrize("end", ["ragged", "close_notify", "reset", "nonsense"])
async def test_every_end_of_tls_is_an_end(
    secure: Callable[[], tuple[TLSTransport, Peer]], end: str
) -> None:
    transport, peer = secure()
    await shake(transport, peer)
    peer.tls.write(b"last words")
    if end == "close_notify":
        with suppress(ssl.SSLWantReadError):
            peer.tls.unwrap()
    if end == "nonsense":
        peer.cipher_out.write(b"\xff" * 100)
    await peer.flush()
    if end == "reset":
        assert await received(transport) == b"last words"
        reset(peer.sock)
    elif end == "ragged":
        peer.sock.shutdown(socket.SHUT_WR)
    data = b""
    while part := await received(transport):
        data += part
    assert data == (b"" if end == "reset" else b"last words")
    assert await received(transport) == b""
    await transport.finish_writing()
    transport.close()


async def test_a_handshake_of_nonsense_is_answered_with_an_alert(
    secure: Callable[[], tuple[TLSTransport, Peer]],
) -> None:
    transport, peer = secure()
    peer.sock.send(b"GET / HTTP/1.1\r\n\r\n")
    with anyio.fail_after(PATIENCE), pytest.raises(ssl.SSLError):
        await transport.handshake()
    await transport.finish_writing()
    transport.close()
    assert await arrived(peer.sock) in (b"", b"\x15\x03\x01\x00\x02\x02\x46")


@pytest.mark.parametrize("end", ["fin", "wake"])
async def test_a_handshake_that_ends_early_is_an_oserror(
    secure: Callable[[], tuple[TLSTransport, Peer]], end: str
) -> None:
    transport, peer = secure()
    caught: list[OSError] = []

    async def handshake() -> None:
        try:
            await transport.handshake()
        except OSError as error:
            caught.append(error)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tg:
            tg.start_soon(handshake)
            await anyio.wait_all_tasks_blocked()
            if end == "fin":
                peer.sock.close()
            else:
                transport.close()
    assert len(caught) == 1
    await transport.finish_writing()
    transport.close()


# Ticks and threads


async def test_call_soon_calls_in_order_behind_the_tasks_that_are_ready() -> None:
    loop = running_event_loop()
    calls: list[Any] = []
    async with anyio.create_task_group() as tg:
        tg.start_soon(loop.run)
        for first in "first", "again":  # the second time the loop's task is parked
            await anyio.wait_all_tasks_blocked()

            async def ready() -> None:
                calls.append("task")

            for _ in range(3):
                tg.start_soon(ready)
            await checkpoint()  # by now they are ready on every loop, or have run
            for number in range(3):
                loop.call_soon(lambda number=number: calls.append(number))  # type: ignore[misc]
            assert 0 not in calls
            await checkpoint()
            await checkpoint()
            assert calls == ["task"] * 3 + [0, 1, 2], first
            calls.clear()
        tg.cancel_scope.cancel()


async def test_who_goes_on_with_input_does_so_behind_what_was_to_be_called_soon(
    connect: Callable[[], Pair], loop: EventLoop
) -> None:
    """Or an answer would share its tick with the one before, and wait for its end."""
    ticks = 0
    ends = True  # when nobody goes on any more

    def end_tick() -> None:
        nonlocal ticks, ends
        ticks += 1
        ends = True

    async def answer(late: bool) -> None:
        nonlocal ends
        transport, peer = connect()
        if late:
            await checkpoint()
        last = -1
        for _ in range(50):
            peer.send(b"x")  # there is something as soon as it waits
            assert await received(transport) == b"x"
            assert ticks != last
            last = ticks
            if ends:
                ends = False
                loop.call_soon(end_tick)
        transport.close()

    async with anyio.create_task_group() as tg:
        for number in range(6):
            tg.start_soon(answer, bool(number % 2))


async def test_call_soon_from_a_call_back_comes_a_tick_later() -> None:
    loop = running_event_loop()
    calls: list[str] = []
    done = anyio.Event()

    def last() -> None:
        calls.append("last")
        done.set()

    def first() -> None:
        calls.append("first")
        loop.call_soon(last)

    async with anyio.create_task_group() as tg:
        tg.start_soon(loop.run)
        await anyio.wait_all_tasks_blocked()
        loop.call_soon(first)
        loop.call_soon(lambda: calls.append("second"))
        with anyio.fail_after(PATIENCE):
            await done.wait()
        tg.cancel_scope.cancel()
    assert calls == ["first", "second", "last"]


async def test_call_soon_before_the_loops_task_runs_is_not_lost() -> None:
    loop = running_event_loop()
    done = anyio.Event()
    loop.call_soon(done.set)
    async with anyio.create_task_group() as tg:
        tg.start_soon(loop.run)
        with anyio.fail_after(PATIENCE):
            await done.wait()
        tg.cancel_scope.cancel()


def test_a_call_back_that_raises_costs_trio_no_ticks(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ValueError("no luck")

    async def main() -> None:
        loop = TrioEventLoop(trio.lowlevel.current_trio_token())
        done = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            loop.call_soon(broken)
            loop.call_soon(done.set)
            with trio.fail_after(PATIENCE):
                await done.wait()
            nursery.cancel_scope.cancel()
        loop.call_soon(broken)  # nobody runs it any more

    trio.run(main)
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "broken" in record.getMessage()


@pytest.mark.parametrize("asleep", [True, False])
@pytest.mark.parametrize("what", ["a signal handler", "the log", "the poller"])
def test_what_nobody_handles_on_trio_ends_the_server(
    what: str, asleep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trio itself would log it, and never call us again."""

    def broken() -> None:
        raise SystemExit(what) if what == "a signal handler" else ValueError

    def fails(*args: object) -> None:
        raise SystemExit(what)

    async def main() -> None:
        loop = TrioEventLoop(trio.lowlevel.current_trio_token())
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(loop.run)
                if asleep:
                    await trio.testing.wait_all_tasks_blocked()
                if what == "the log":
                    monkeypatch.setattr("roomsock.transport.logger.exception", fails)
                elif what == "the poller":
                    await trio.testing.wait_all_tasks_blocked()
                    monkeypatch.setattr(loop.watch, "poll", fails)
                loop.call_soon(broken)
                await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main)
    assert isinstance(_only(caught.value), SystemExit)


def _only(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    return error


def test_trio_calls_back_only_while_the_server_runs() -> None:
    async def main() -> None:
        loop: Any = TrioEventLoop(trio.lowlevel.current_trio_token())
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(loop.run)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            with pytest.raises(KeyError):
                trio.lowlevel.remove_instrument(loop)

    trio.run(main)


async def test_call_soon_threadsafe_keeps_the_order_of_each_thread() -> None:
    loop = running_event_loop()
    here = threading.get_ident()
    calls: list[tuple[int, int]] = []
    done = anyio.Event()

    def call(thread: int) -> None:
        for number in range(1000):

            def note(number: int = number) -> None:
                assert threading.get_ident() == here
                calls.append((thread, number))
                if len(calls) == 4000:
                    done.set()

            loop.call_soon_threadsafe(note)

    async with anyio.create_task_group() as tg:
        tg.start_soon(loop.run)
        for thread in range(4):
            tg.start_soon(anyio.to_thread.run_sync, call, thread)
        with anyio.fail_after(PATIENCE):
            await done.wait()
        tg.cancel_scope.cancel()
    for thread in range(4):
        assert [number for of, number in calls if of == thread] == list(range(1000))


async def test_a_started_task_outlives_the_scope_that_it_was_started_in() -> None:
    loop = running_event_loop()
    names: list[str | None] = []
    done = anyio.Event()

    async def task() -> None:
        names.append(anyio.get_current_task().name)
        await anyio.lowlevel.checkpoint()
        done.set()

    with anyio.CancelScope() as scope:
        kept = loop.start(task, "a task of ours")
        scope.cancel()
        await anyio.lowlevel.checkpoint()
    with anyio.fail_after(PATIENCE):
        await done.wait()
    assert names == ["a task of ours"]
    assert kept is not None


async def test_the_loop_has_a_name(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    backend, options = anyio_backend
    expected = "uvloop" if options.get("use_uvloop") else backend
    assert running_event_loop().name == expected


async def test_no_descriptor_is_left(connect: Callable[[], Pair]) -> None:
    transport, peer = connect()
    before = len(os.listdir("/proc/self/fd"))
    peer.send(b"x")
    await received(transport)
    transport.close()
    peer.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2


async def test_a_socket_that_outlives_what_runs_beside_the_server_can_be_closed(
    sockets: list[socket.socket],
) -> None:
    loop = running_event_loop()
    ours, peer = socket.socketpair()
    sockets.extend((ours, peer))
    ours.setblocking(False)
    peer.setblocking(False)
    async with anyio.create_task_group() as tg:
        tg.start_soon(loop.run)
        await anyio.wait_all_tasks_blocked()
        transport = loop.transport(ours)
        peer.send(b"x")
        assert await received(transport) == b"x"
        tg.cancel_scope.cancel()
    transport.close()
    assert await arrived(peer) == b""
