"""Stopping in order: who is told what, who is waited for and how long, and what comes after.

Time stands still unless a test moves it. The clients of these tests answer a close frame only
when the test says so; unless it does, the server closes first.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from wsproto import events

from roomsock import App, ConnectionClosed, Limits, SetupError, WebSocket, serve, serving
from roomsock.server import Server

from .client import PATIENCE, Client, Refusal, connected, open_stream, upgrade_request
from .clock import FakeClock, settled


class Told:
    """An app that notes in which order its handlers end."""

    def __init__(self, **limits: float) -> None:
        self.app = App(limits=Limits(**limits))  # type: ignore[arg-type]
        self.ended: list[str] = []
        self.closed: list[tuple[str, int, str]] = []
        self.errors: list[Exception] = []
        self.free = anyio.Event()
        self.app.add_on_message("/quiet", self.quiet)
        self.app.add_serve("/sleeps", self.sleeps)
        self.app.add_serve("/tidies", self.tidies)
        self.app.add_serve("/stuck", self.stuck)
        for path in ("/quiet", "/sleeps", "/tidies", "/stuck"):
            self.app.add_on_close(path, self.on_close)
            self.app.add_on_error(path, self.on_error)

    def quiet(self, ws: WebSocket, text: str) -> None:
        ws.send_text(text)

    async def sleeps(self, ws: WebSocket) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.ended.append("sleeps")

    async def tidies(self, ws: WebSocket) -> None:
        """Ends by itself as soon as its client is gone."""
        async for _ in ws:
            pass
        self.ended.append("tidies")

    async def stuck(self, ws: WebSocket) -> None:
        with anyio.CancelScope(shield=True):
            await self.free.wait()
        self.ended.append("stuck")

    def on_close(self, ws: WebSocket, reason: ConnectionClosed) -> None:
        self.closed.append((ws.path, reason.code, reason.closed_by))

    def on_error(self, ws: WebSocket, error: Exception) -> None:
        self.errors.append(error)


async def answer(client: Client) -> tuple[int, str]:
    """Read to the server's close frame and answer it; its code and reason."""
    while not isinstance(event := await client.event(), events.CloseConnection):
        assert event is not None, "the stream ended without a close frame"
    await client.send_event(event.response())
    return int(event.code), event.reason or ""


@asynccontextmanager
async def clients(server: Server, *paths: str) -> AsyncIterator[list[Client]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connected(server, path)) for path in paths]


class Stopping:
    """A server whose owner is about to end it in one of several ways."""

    def __init__(self, app: App, clock: FakeClock, **options: Any) -> None:
        self.clock = clock
        self.over = anyio.Event()
        self._serve = partial(serve, app, port=0, clock=clock, **options)
        self._scope = anyio.CancelScope()

    async def run(self, *, task_status: Any) -> None:
        with self._scope:
            await self._serve(task_status=task_status)
        self.over.set()

    def cancel(self) -> None:
        self._scope.cancel()


@asynccontextmanager
async def stopping(
    app: App, clock: FakeClock | None = None, **options: Any
) -> AsyncIterator[tuple[Server, Stopping]]:
    """Serve in a task; ``over`` says when it has returned, whatever keeps it. What still runs
    behind the body fails the test after a while instead of holding it."""
    task = Stopping(app, clock or FakeClock(), **options)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tg:
            server = await tg.start(task.run)
            try:
                yield server, task
            finally:
                server.shutdown()
                while not task.over.is_set():
                    await task.clock.advance(1)


# Who ends it, and with which code


@pytest.mark.parametrize(("code", "expected"), [(None, 1001), (1012, 1012), (4321, 4321)])
async def test_every_client_is_closed_with_the_code_of_who_stops(
    code: int | None, expected: int
) -> None:
    told = Told()
    async with (
        stopping(told.app) as (server, task),
        clients(server, "/quiet", "/quiet", "/tidies") as three,
    ):
        if code is None:
            task.cancel()
        else:
            server.shutdown(code)
        assert [await answer(client) for client in three] == [(expected, "")] * 3
        for client in three:
            await client.ended()
            await client.aclose()
        with anyio.fail_after(PATIENCE):
            await task.over.wait()
        await server.stopped()
    assert sorted(told.closed) == [
        ("/quiet", expected, "server"),
        ("/quiet", expected, "server"),
        ("/tidies", expected, "server"),
    ]
    assert not told.errors


async def test_leaving_serving_closes_with_1001() -> None:
    told = Told()
    codes = []

    async def read(client: Client) -> None:
        codes.append(await answer(client))
        await client.ended()
        await client.aclose()

    async with (
        anyio.create_task_group() as tg,
        serving(told.app, port=0, clock=FakeClock()) as server,
    ):
        client = Client(await open_stream(server))
        await client.handshake("/quiet")
        tg.start_soon(read, client)
    assert codes == [(1001, "")]


def test_a_cancelled_asyncio_task_closes_with_1001() -> None:
    """Cancelled by asyncio itself, not by a scope of anyio's."""
    told = Told()

    async def main() -> None:
        started: asyncio.Future[Server] = asyncio.get_running_loop().create_future()

        class Status:
            def started(self, server: Server) -> None:
                started.set_result(server)

        status: Any = Status()
        serving_app = serve(told.app, port=0, clock=FakeClock(), task_status=status)
        task = asyncio.create_task(serving_app)
        server = await started
        async with clients(server, "/quiet", "/tidies") as two:
            task.cancel()
            for client in two:
                assert await answer(client) == (1001, "")
                await client.ended()
                await client.aclose()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert sorted(told.closed) == [("/quiet", 1001, "server"), ("/tidies", 1001, "server")]


@pytest.mark.parametrize("code", [0, 999, 1005, 1006, 1015, 5000])
async def test_a_code_that_must_not_be_sent_stops_nothing(code: int) -> None:
    told = Told()
    async with stopping(told.app) as (server, _), clients(server, "/quiet") as (client,):
        with pytest.raises(ValueError, match=str(code)):
            server.shutdown(code)
        assert not server.stopping
        await client.send("still here")
        assert await client.receive() == "still here"


async def test_the_first_to_stop_chooses_the_code() -> None:
    told = Told()
    async with stopping(told.app) as (server, task), clients(server, "/quiet") as (client,):
        server.shutdown(1012)
        server.shutdown(4000)
        task.cancel()
        assert (await answer(client))[0] == 1012


# Who is waited for


async def test_handlers_get_close_grace_then_they_are_cancelled() -> None:
    told = Told(close_grace=5)
    clock = FakeClock()
    async with (
        stopping(told.app, clock) as (server, task),
        clients(server, "/sleeps", "/tidies") as two,
    ):
        server.shutdown()
        for client in two:
            await answer(client)
        await clock.advance(4.5)
        assert told.ended == ["tidies"]
        assert not task.over.is_set()
        await clock.advance(1)
        assert told.ended == ["tidies", "sleeps"]
        for client in two:
            await client.ended()
            await client.aclose()
        await clock.advance(0.5)
        assert task.over.is_set()
    assert sorted(told.closed) == [("/sleeps", 1001, "server"), ("/tidies", 1001, "server")]


async def test_serve_waits_for_handlers_and_clients_no_longer_than_the_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = Told(shutdown=2, close_grace=5)
    clock = FakeClock()
    async with (
        stopping(told.app, clock) as (server, task),
        clients(server, "/sleeps", "/quiet", "/tidies"),
    ):
        server.shutdown()
        await clock.advance(1.5)
        assert not task.over.is_set()
        await clock.advance(1)
        assert task.over.is_set()
    # What is cancelled at the limit is told of the end like everybody, once.
    assert sorted(told.closed) == [
        ("/quiet", 1001, "server"),
        ("/sleeps", 1001, "server"),
        ("/tidies", 1001, "server"),
    ]
    assert sorted(told.ended) == ["sleeps", "tidies"]
    # The others only waited for their clients' close frames.
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "Told.sleeps" in record.getMessage()
    assert "'/sleeps'" in record.getMessage()


async def test_a_handler_that_does_not_stop_is_named_and_its_on_close_runs_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = Told(shutdown=3, close_grace=1)
    clock = FakeClock()
    async with (
        stopping(told.app, clock) as (server, task),
        clients(server, "/stuck", "/quiet") as (_, quiet),
    ):
        server.shutdown()
        await answer(quiet)
        await clock.advance(4)
        named = [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]
        assert any("does not stop" in line and "Told.stuck" in line for line in named)
        assert any("without waiting" in line and "Told.stuck" in line for line in named)
        assert told.closed.count(("/stuck", 1001, "server")) == 1
        # A task cannot be left behind: serve returns when the handler does.
        assert not task.over.is_set()
        told.free.set()
        with anyio.fail_after(PATIENCE):
            await task.over.wait()
    assert sorted(told.closed) == [("/quiet", 1001, "server"), ("/stuck", 1001, "server")]


async def test_an_on_close_that_takes_its_time_is_waited_for() -> None:
    app = App(limits=Limits(shutdown=4))
    clock = FakeClock()
    finished = []

    @app.on_message("/")
    def quiet(ws: WebSocket, text: str) -> None: ...

    @app.on_close("/")
    async def on_close(ws: WebSocket, reason: ConnectionClosed) -> None:
        await clock.sleep_until(clock.now() + 3)
        finished.append(reason.code)

    async with stopping(app, clock) as (server, task), clients(server, "/") as (client,):
        server.shutdown()
        await answer(client)
        await client.aclose()
        await clock.advance(2)
        assert not task.over.is_set()
        await clock.advance(2)
        assert task.over.is_set()
    assert finished == [1001]


async def test_who_is_still_opening_is_told_503() -> None:
    told = Told()
    clock = FakeClock()
    asked = anyio.Event()

    async def slow(ws: WebSocket) -> None:
        asked.set()
        await anyio.sleep_forever()

    told.app.add_on_connect("/quiet", slow)
    async with stopping(told.app, clock) as (server, task):
        stream = await open_stream(server)
        async with stream:
            await stream.send(upgrade_request("/quiet"))
            await asked.wait()
            server.shutdown()
            with anyio.fail_after(PATIENCE):
                assert (await stream.receive()).startswith(b"HTTP/1.1 503 ")
        with anyio.fail_after(PATIENCE):
            await task.over.wait()
    assert not told.closed


# One end is not another's


async def test_a_broken_connection_does_not_keep_the_others_from_their_close_frames() -> None:
    told = Told()
    async with (
        stopping(told.app) as (server, _),
        clients(server, "/quiet", "/quiet", "/quiet") as three,
    ):
        await three[0].reset()
        server.shutdown()
        for client in three[1:]:
            assert await answer(client) == (1001, "")
    assert [path for path, _, _ in told.closed] == ["/quiet"] * 3


async def test_a_log_filter_that_raises_does_not_keep_the_others_from_their_close_frames() -> None:
    """What of the app's own runs while a connection is closed may fail."""
    told = Told()
    access = logging.getLogger("roomsock.access")

    def broken(record: logging.LogRecord) -> bool:
        if record.getMessage().endswith("server 1001"):
            raise ZeroDivisionError
        return True

    access.setLevel(logging.INFO)
    access.addFilter(broken)
    try:
        async with stopping(told.app) as (server, _), clients(server, *["/quiet"] * 3) as three:
            server.shutdown()
            for client in three:
                assert await answer(client) == (1001, "")
    finally:
        access.removeFilter(broken)
        access.setLevel(logging.NOTSET)
    assert told.closed == [("/quiet", 1001, "server")] * 3


async def test_clients_are_closed_one_after_the_other_over_the_spread() -> None:
    told = Told(shutdown=3)
    clock = FakeClock()
    async with (
        stopping(told.app, clock, drain_spread=8) as (server, task),
        clients(server, *["/quiet"] * 4) as four,
    ):
        server.shutdown()
        for number, client in enumerate(four):
            await settled()
            assert len(told.closed) == number + 1
            await answer(client)
            await client.ended()
            await client.aclose()
            await clock.advance(1.5)
            assert len(told.closed) == number + 1
            await clock.advance(0.5)
        assert task.over.is_set()


async def test_what_serve_waits_at_most_counts_from_the_end_of_the_spread() -> None:
    told = Told(shutdown=3)
    clock = FakeClock()
    async with (
        stopping(told.app, clock, drain_spread=8) as (server, task),
        clients(server, *["/quiet"] * 4),
    ):
        server.shutdown()
        await clock.advance(8.5)  # the last is closed at 6
        assert not task.over.is_set()
        await clock.advance(0.75)
        assert task.over.is_set()


async def test_a_spread_does_not_wait_for_those_who_left() -> None:
    told = Told()
    clock = FakeClock()
    async with (
        stopping(told.app, clock, drain_spread=8) as (server, task),
        clients(server, *["/quiet"] * 4) as four,
    ):
        server.shutdown()
        for client in four:
            await client.close()
            await client.ended()
            await client.aclose()
        await clock.advance(2.25)
        assert task.over.is_set()


# Before and after


async def test_new_connections_are_refused() -> None:
    told = Told()
    clock = FakeClock()
    async with (
        stopping(told.app, clock) as (server, _),
        clients(server, "/quiet") as (client,),
    ):
        early = await open_stream(server)
        async with early:
            await clock.advance(0.25)
            server.shutdown()
            await answer(client)
            with pytest.raises(OSError):
                await open_stream(server)
            # Who connected before and asks only now is told, or finds the stream ended.
            late = Client(early)
            with pytest.raises((Refusal, anyio.EndOfStream, anyio.BrokenResourceError)):
                await late.handshake("/quiet")
    assert len(told.closed) == 1


async def test_an_app_can_be_served_again_and_not_twice_at_once() -> None:
    told = Told()
    for _ in range(2):
        async with stopping(told.app) as (server, task):
            with pytest.raises(SetupError, match="already"):
                async with serving(told.app, port=0):
                    pass
            with pytest.raises(SetupError, match="already"):
                await serve(told.app, port=0)
            async with clients(server, "/quiet") as (client,):
                await client.send("hello")
                assert await client.receive() == "hello"
                task.cancel()
                assert await answer(client) == (1001, "")
    assert told.closed == [("/quiet", 1001, "server")] * 2
    assert told.app.rooms == ()


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt, SystemExit])
async def test_what_the_body_of_serving_raises_comes_out_alone_after_the_stop(
    kind: type[BaseException],
) -> None:
    told = Told()
    with pytest.raises(kind) as raised:
        async with serving(told.app, port=0) as server, connected(server, "/tidies"):
            raise kind("mine")
    assert raised.value.args == ("mine",)
    assert len(told.closed) == 1


async def test_every_on_close_runs_once_although_some_raise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = App()
    closed: list[str] = []

    @app.on_message("/")
    def quiet(ws: WebSocket, text: str) -> None: ...

    @app.on_close("/")
    def on_close(ws: WebSocket, reason: ConnectionClosed) -> None:
        closed.append(ws.id)
        if len(closed) % 2:
            raise ZeroDivisionError

    async with stopping(app) as (server, _), clients(server, *["/"] * 5) as five:
        server.shutdown()
        for client in five:
            assert await answer(client) == (1001, "")
    assert len(set(closed)) == len(closed) == 5
    assert len([each for each in caplog.records if each.levelno == logging.ERROR]) == 3


async def test_a_clock_that_fails_ends_serve_with_its_error_and_tells_every_on_close() -> None:
    """A server that cannot go on leaves nobody without the end it is owed."""

    class BrokenClock(FakeClock):
        broken = False

        async def sleep_until(self, deadline: float) -> None:
            await super().sleep_until(deadline)
            if self.broken:
                raise ZeroDivisionError("the clock is broken")

    told = Told()
    clock = BrokenClock()
    raised: list[BaseException] = []

    async def run(*, task_status: Any) -> None:
        try:
            await serve(told.app, port=0, clock=clock, task_status=task_status)
        except BaseException as error:
            raised.append(error)

    async with anyio.create_task_group() as tg:
        server = await tg.start(run)
        async with clients(server, "/quiet", "/sleeps"):
            clock.broken = True
            await clock.advance(0.25)
    assert len(raised) == 1
    assert sorted(path for path, _, _ in told.closed) == ["/quiet", "/sleeps"]
    assert told.app.rooms == ()
    async with serving(told.app, port=0, clock=FakeClock()):
        pass


# Out of descriptors


class FullListener(socket.socket):
    """A listener of a process that has no descriptor left, for so many tries."""

    failures: list[int]

    def accept(self) -> Any:
        if self.failures:
            raise OSError(self.failures.pop(), "no descriptor")
        return super().accept()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
async def test_out_of_descriptors_accepting_pauses_and_recovers(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told()
    clock = FakeClock()
    listener = FullListener()
    listener.failures = []
    listener.bind(("127.0.0.1", 0))
    async with (
        serving(told.app, sock=listener, clock=clock) as server,
        connected(server, "/tidies") as before,
    ):
        listener.failures = [number] * 3
        stream = await open_stream(server)
        async with stream:
            await stream.send(upgrade_request("/quiet"))
            await settled()
            assert len(listener.failures) == 2  # one try, then a pause
            assert server.counters.connections == 1
            await clock.advance(1)
            assert not listener.failures
            with anyio.fail_after(PATIENCE):
                assert (await stream.receive()).startswith(b"HTTP/1.1 101 ")
            assert server.counters.connections == 2
        # Who was connected did not notice.
        await before.send_event(events.Ping(b"?"))
        assert isinstance(await before.event(), events.Pong)
    assert len([each for each in caplog.records if "accepting pauses" in each.message]) == 1


async def test_the_kernels_own_refusal_pauses_accepting_too() -> None:
    told = Told()
    clock = FakeClock()
    async with serving(told.app, port=0, clock=clock) as server:
        # All sockets that the test needs exist before the limit is lowered.
        sock = socket.socket()
        filler: list[socket.socket] = []
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            highest = max(sock.fileno(), server._listeners[0].fileno())
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, before[1]))
            with pytest.raises(OSError, match="Too many open files"):
                filler += iter(socket.socket, None)
            sock.connect(server.addresses[0])
            sock.sendall(upgrade_request("/quiet"))
            await settled()
            assert server.counters.connections == 0
            for each in filler:
                each.close()
            await clock.advance(0.25)
            await until(lambda: server.counters.connections)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for each in filler:
                each.close()
            sock.close()


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(PATIENCE):
        while not condition():
            await checkpoint()


async def test_a_stop_during_the_pause_of_accepting_is_not_held_up() -> None:
    told = Told()
    listener = FullListener()
    listener.failures = [errno.EMFILE]
    listener.bind(("127.0.0.1", 0))
    async with serving(told.app, sock=listener, clock=FakeClock()) as server:
        stream = await open_stream(server)
        async with stream:
            await until(lambda: not listener.failures)
    assert server.counters.connections == 0


# What ends the server although it should not have


class Odd(BaseException):
    """What no handler should raise: nothing but the server's owner can know what to do with it."""


async def test_a_hard_stop_cuts_no_on_close_short() -> None:
    app = App(limits=Limits(shutdown=1e-9))
    ended = 0

    async def wait(ws: WebSocket) -> None:
        await anyio.sleep_forever()

    async def close(ws: WebSocket, reason: ConnectionClosed) -> None:
        nonlocal ended
        for _ in range(20):
            await checkpoint()
        ended += 1

    app.add_serve("/", wait)
    app.add_on_close("/", close)
    for times in range(1, 6):  # on trio the order is random
        async with serving(app, port=0) as server, clients(server, *["/"] * 10):
            server.shutdown()
            with anyio.fail_after(PATIENCE):
                await server.stopped()
        assert ended == 10 * times


async def test_what_is_no_exception_ends_the_server_in_order() -> None:
    told = Told()

    def fail(ws: WebSocket, text: str) -> None:
        raise Odd

    told.app.add_on_message("/odd", fail)

    async def serve_and_send() -> None:
        async with serving(told.app, port=0) as server, clients(server, "/odd", "/quiet") as two:
            await two[0].send("x")
            with anyio.fail_after(PATIENCE):
                await anyio.sleep_forever()

    with pytest.raises(BaseException) as raised:
        await serve_and_send()
    error = raised.value
    while not isinstance(error, Odd):
        [error] = error.exceptions  # type: ignore[attr-defined]
    assert [path for path, *_ in told.closed] == ["/quiet"]


def test_a_cancellation_that_knows_no_shield_is_not_in_time_for_on_close() -> None:
    async def main() -> None:
        app = App(limits=Limits(shutdown=1e-9))
        free = asyncio.Event()
        ended = 0

        async def wait(ws: WebSocket) -> None:
            await anyio.sleep_forever()

        async def close(ws: WebSocket, reason: ConnectionClosed) -> None:
            nonlocal ended
            await free.wait()
            ended += 1

        app.add_serve("/", wait)
        app.add_on_close("/", close)
        started: asyncio.Future[Server] = asyncio.get_running_loop().create_future()

        class Status:
            def started(self, value: Server) -> None:
                started.set_result(value)

        status: Any = Status()
        serving = asyncio.create_task(serve(app, port=0, task_status=status))
        server = await started
        async with clients(server, "/", "/", "/"):
            for _ in range(3):
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    if task.get_name() != "roomsock connection":
                        task.cancel()
                for _ in range(20):
                    await checkpoint()
            assert not serving.done()
            free.set()
            with pytest.raises(asyncio.CancelledError):
                await serving
            assert ended == 3
            assert server.connections == 0

    asyncio.run(main())
