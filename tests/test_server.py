"""The doors `serve` and `serving`, TLS, threads, proxies, limits and descriptors."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import platform
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio
import trustme
import websockets.sync.client
from anyio.lowlevel import checkpoint

import roomsock
from roomsock import App, Limits, SetupError, WebSocket, serve, serving
from roomsock.server import Server

from .client import PATIENCE, Client, connected, http, open_stream, upgrade_request
from .clock import FakeClock

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

REQUEST = b"GET / HTTP/1.1\r\nHost: testserver\r\n\r\n"


def echo_app(limits: Limits | None = None) -> App:
    app = App(limits=limits, keepalive=None)

    @app.on_message("/echo")
    async def echo(ws: WebSocket, message: str | bytes) -> None:
        if isinstance(message, str):
            await ws.send_text(message)
        else:
            await ws.send_bytes(message)

    @app.get("/")
    def page(request: roomsock.Request) -> str:
        return f"{request.scheme} {request.client and request.client[0]}"

    return app


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something has become true."""
    with anyio.fail_after(PATIENCE):
        while not condition():
            await checkpoint()


async def echoes(server: Server, text: str = "hello", *, tls: ssl.SSLContext | None = None) -> None:
    async with connected(server, "/echo", tls=tls) as client:
        await client.send(text)
        assert await client.receive() == text


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


# The doors


def test_trio_nursery_start_hands_out_the_server() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(partial(serve, echo_app(), port=0))
            await echoes(server)
            nursery.cancel_scope.cancel()

    trio.run(main)


async def test_task_group_start_hands_out_the_server_and_cancelling_closes_with_1001() -> None:
    async with anyio.create_task_group() as tg:
        server = await tg.start(partial(serve, echo_app(), port=0))
        async with connected(server, "/echo") as client:
            tg.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                assert await client.closed() == (1001, "")
                await client.close(1001)
    assert server.stopping
    await server.stopped()
    assert server.connections == 0


async def test_serve_returns_after_shutdown_with_the_code_it_was_given() -> None:
    async with anyio.create_task_group() as tg:
        server = await tg.start(partial(serve, echo_app(), port=0))
        async with connected(server, "/echo") as client:
            server.shutdown(1012)
            server.shutdown(1001)  # the first one counts
            assert await client.closed() == (1012, "")
            await client.aclose()
            await server.stopped()


async def test_a_client_that_is_accepted_while_the_server_stops_does_not_hold_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = echo_app()
    for _ in range(20):  # trio runs the tasks of a tick in any order
        async with serving(app, port=0, clock=FakeClock()) as server:
            with socket.create_connection(server.addresses[0]) as client:
                await until(lambda: server.connections)
                server.shutdown()
                client.setblocking(False)
                with anyio.fail_after(PATIENCE):
                    await anyio.wait_readable(client)
            await server.stopped()
    assert complaints(caplog) == []


@pytest.mark.parametrize("code", [999, 1005, 1006, 2000, 5000])
async def test_shutdown_refuses_a_code_that_must_not_be_sent(code: int) -> None:
    async with serving(echo_app(), port=0) as server:
        with pytest.raises(ValueError, match=str(code)):
            server.shutdown(code)
        await echoes(server)


async def test_shutdown_takes_a_private_code() -> None:
    async with serving(echo_app(), port=0) as server, connected(server, "/echo") as client:
        server.shutdown(4000)
        assert await client.closed() == (4000, "")
        await client.close(4000)


def test_serving_under_plain_asyncio() -> None:
    async def main() -> None:
        async with serving(echo_app(), port=0) as server:
            reader, writer = await asyncio.open_connection(*server.addresses[0])
            writer.write(upgrade_request("/echo") + Client(None).frame("hello"))  # type: ignore[arg-type]
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(7) == b"\x81\x05hello"
            writer.close()
            await writer.wait_closed()

    asyncio.run(main())


def test_cancelling_an_asyncio_task_that_serves_stops_in_order() -> None:
    async def main() -> None:
        listening: asyncio.Future[Server] = asyncio.get_running_loop().create_future()

        async def program() -> None:
            async with serving(echo_app(), port=0) as server:
                listening.set_result(server)
                await asyncio.sleep(PATIENCE)

        task = asyncio.create_task(program())
        server = await listening
        async with connected(server, "/echo") as client:
            task.cancel()
            assert await client.closed() == (1001, "")
            await client.aclose()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert server.connections == 0

    asyncio.run(main())


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
async def test_what_the_body_raises_comes_out_as_it_was_raised(kind: type[BaseException]) -> None:
    raised = kind("as it was")
    with pytest.raises(kind) as caught:
        async with serving(echo_app(), port=0) as server:
            raise raised
    assert caught.value is raised
    assert raised.__context__ is None
    await server.stopped()


async def test_a_cancelled_body_ends_in_its_own_scope() -> None:
    with anyio.move_on_after(PATIENCE) as scope:
        async with serving(echo_app(), port=0) as server:
            scope.cancel()
            await checkpoint()
            pytest.fail("the checkpoint lets the cancellation out")
    assert scope.cancelled_caught
    await server.stopped()


async def test_cancelled_before_it_listens_leaves_nothing() -> None:
    app = echo_app()
    before = descriptors()
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with serving(app, port=0):
            pytest.fail("never entered")
    assert descriptors() == before
    async with serving(app, port=0) as server:
        await echoes(server)


async def test_the_body_goes_on_after_a_shutdown() -> None:
    async with serving(echo_app(), port=0) as server:
        server.shutdown()
        await server.stopped()
        with pytest.raises(OSError, match="connection attempts failed"):
            await open_stream(server)


async def test_an_app_is_served_again() -> None:
    app = echo_app()
    for _ in range(3):
        async with serving(app, port=0) as server:
            await echoes(server)


async def test_a_port_is_served_again_at_once() -> None:
    app = echo_app()
    async with serving(app, port=0) as server:
        await echoes(server)
    async with serving(app, port=server.addresses[0][1]) as again:
        assert again.addresses == server.addresses
        await echoes(again)


async def test_a_server_starts_while_another_stops() -> None:
    """Its listener has the number of the one that was closed."""
    async with serving(echo_app(), port=0) as first, connected(first, "/echo") as client:
        first.shutdown()
        assert (await client.closed())[0] == 1001
        async with serving(echo_app(), port=0) as second:
            await echoes(second)
            await echoes(second)


async def test_two_serves_of_one_app_at_once_are_refused() -> None:
    app = echo_app()
    async with serving(app, port=0) as server:
        before = descriptors()
        with pytest.raises(SetupError, match="served already"):
            async with serving(app, port=0):
                pytest.fail("never entered")
        assert descriptors() == before
        await echoes(server)


async def test_an_app_without_handlers_is_served() -> None:
    async with serving(App(), port=0) as server:
        status, _, _ = await http(server, REQUEST)
        assert status == 404


# Where it listens


async def test_several_hosts_get_the_same_port() -> None:
    async with serving(echo_app(), host=["127.0.0.1", "::1"], port=0) as server:
        (host4, port4), (host6, port6) = server.addresses
        assert (host4, host6) == ("127.0.0.1", "::1")
        assert port4 == port6 != 0
        assert repr(server) == f"<roomsock server on 127.0.0.1:{port4}, [::1]:{port6}>"
        await echoes(server)
        server.addresses.reverse()
        await echoes(server)


async def test_ipv6_clients_have_an_address() -> None:
    async with serving(echo_app(), host="::1", port=0) as server:
        assert server.addresses[0][0] == "::1"
        status, _, body = await http(server, REQUEST)
        assert (status, body) == (200, b"http ::1")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


async def test_a_port_in_use_is_a_plain_oserror(taken: int) -> None:
    before = descriptors()
    with pytest.raises(OSError, match=f"in use: '127.0.0.1:{taken}'"):
        async with serving(echo_app(), port=taken):
            pytest.fail("never entered")
    with pytest.raises(OSError, match="in use"):
        await serve(echo_app(), port=taken)
    with pytest.raises(BaseExceptionGroup) as caught:  # what a task group makes of any error
        async with anyio.create_task_group() as tg:
            tg.start_soon(partial(serve, echo_app(), port=taken))
    assert isinstance(caught.value.exceptions[0], OSError)
    assert descriptors() == before


async def test_task_group_start_raises_a_port_in_use_plainly(taken: int) -> None:
    async with anyio.create_task_group() as tg:
        with pytest.raises(OSError, match="in use"):
            await tg.start(partial(serve, echo_app(), port=taken))


async def test_a_unix_socket_is_made_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with serving(echo_app(), unix=path) as server:
        assert server.addresses == [str(path)]
        assert repr(server) == f"<roomsock server on unix:{path}>"
        await echoes(server)
        status, _, body = await http(server, REQUEST)
        assert (status, body) == (200, b"http None")
    assert not path.exists()


async def test_an_inherited_socket_and_a_descriptor() -> None:
    one, two = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    expected = [one.getsockname(), two.getsockname()]
    async with serving(echo_app(), sock=[one, two.detach()]) as server:
        assert server.addresses == expected
        await echoes(server)
        server.addresses.reverse()
        await echoes(server)
    assert one.fileno() == -1


# TLS


async def test_tls_with_a_context(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    async with serving(echo_app(), port=0, tls=server_tls) as server:
        await echoes(server, tls=client_tls)


async def test_tls_with_files(
    authority: trustme.CA, client_tls: ssl.SSLContext, tmp_path: Path
) -> None:
    certificate = authority.issue_cert("localhost")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(chain)
    certificate.private_key_pem.write_to_path(key)
    async with serving(echo_app(), port=0, tls=(chain, str(key))) as server:
        await echoes(server, tls=client_tls)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_an_independent_client_over_wss(
    server_tls: ssl.SSLContext, authority: trustme.CA, version: ssl.TLSVersion
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    context.maximum_version = version

    app = echo_app()

    @app.on_message("/bye")
    def bye(ws: WebSocket, text: str) -> None:
        ws.close(1000, text)

    def talk(port: int) -> list[str | bytes]:
        connect = partial(
            websockets.sync.client.connect, ssl=context, compression=None, max_size=None, proxy=None
        )
        answers = []
        with connect(f"wss://localhost:{port}/echo") as client:
            for message in "hello", b"\x00" * 700_000, "ü" * 100_000:
                client.send(message)
                answers.append(client.recv(PATIENCE))
        # The server closes: this client's own close loses the answer now and then on Python 3.10.
        with connect(f"wss://localhost:{port}/bye") as client:
            client.send("bye")
            with pytest.raises(websockets.exceptions.ConnectionClosedOK, match=r"1000 .* bye"):
                client.recv(PATIENCE)
        return answers

    async with serving(app, port=0, tls=server_tls) as server:
        answers = await anyio.to_thread.run_sync(talk, server.addresses[0][1])
    assert answers == ["hello", b"\x00" * 700_000, "ü" * 100_000]


async def test_https_answers_http(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    async with serving(echo_app(), port=0, tls=server_tls) as server:
        stream = await open_stream(server, tls=client_tls)
        await stream.send(REQUEST)
        answer = b""
        with suppress(anyio.EndOfStream):
            while True:
                answer += await stream.receive()
        await stream.aclose()
    assert answer.endswith(b"\r\n\r\nhttps 127.0.0.1")


async def test_large_messages_both_ways_over_tls(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    message = os.urandom(3 * 1024 * 1024)
    app = echo_app(Limits(message=len(message)))
    async with (
        serving(app, port=0, tls=server_tls) as server,
        connected(server, "/echo", tls=client_tls) as client,
    ):
        await client.send(message)
        assert await client.receive() == message
        # Both directions at once: neither may wait for the other.
        async with anyio.create_task_group() as tg:
            for _ in range(2):
                tg.start_soon(client.send, message)
                assert await client.receive() == message


async def test_a_room_gets_bursts_over_tls(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    app = App(keepalive=None)

    @app.on_message("/burst")
    async def burst(ws: WebSocket, text: str) -> None:
        for number in range(1000):
            ws.send_text_to_this_room(f"{number} " + "x" * 100)

    async with (
        serving(app, port=0, tls=server_tls) as server,
        connected(server, "/burst", tls=client_tls) as one,
        connected(server, "/burst", tls=client_tls) as two,
    ):
        await one.send("go")
        for client in one, two:
            for number in range(1000):
                assert await client.receive() == f"{number} " + "x" * 100


async def test_a_slow_consumer_over_tls_is_closed_with_1013(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    app = App(limits=Limits(outbox=256 * 1024), keepalive=None)
    frame = os.urandom(32 * 1024)

    @app.on_message("/room")
    async def talk(ws: WebSocket, text: str) -> None:
        while not server.counters.slow_consumers:
            await ws.room.send_bytes(frame)

    async with (
        serving(app, port=0, tls=server_tls) as server,
        connected(server, "/room", tls=client_tls) as client,
    ):
        await client.send("go")
        await until(lambda: server.counters.slow_consumers)
        # What the kernel and the cipher had taken arrives whole, and the close frame behind it.
        assert await client.closed() == (1013, "too slow (Limits.outbox, Limits.outbox_messages)")


@pytest.mark.parametrize("over_tls", [False, True])
async def test_a_client_that_sends_on_sees_the_close_frame(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, over_tls: bool
) -> None:
    """Closing with input unread would make the kernel reset the connection."""
    app = echo_app(Limits(message=1000))
    async with (
        serving(app, port=0, tls=server_tls if over_tls else None) as server,
        connected(server, "/echo", tls=client_tls if over_tls else None) as client,
    ):
        await client.send(bytes(8 * 1024 * 1024))
        assert await client.closed() == (1009, "message above 1000 bytes (Limits.message)")


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(REQUEST, id="plain-http"),
        pytest.param(upgrade_request("/echo"), id="plain-websocket"),
        pytest.param(b"\x16\x03\x01\x00\x05hello", id="broken-hello"),
        pytest.param(bytes(range(256)) * 300, id="noise"),
    ],
)
async def test_what_is_no_tls_is_turned_away_without_noise(
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    garbage: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(echo_app(), port=0, tls=server_tls) as server:
        async with await open_stream(server) as stream:
            with anyio.fail_after(PATIENCE), suppress(anyio.BrokenResourceError):
                await stream.send(garbage)
                with suppress(anyio.EndOfStream):
                    while True:
                        await stream.receive()
        await until(lambda: not server.connections)
        await echoes(server, tls=client_tls)
    assert complaints(caplog) == []


async def test_a_tls_client_on_a_plain_port_gets_400(client_tls: ssl.SSLContext) -> None:
    async with serving(echo_app(), port=0) as server:
        with pytest.raises(ssl.SSLError):
            await open_stream(server, tls=client_tls)
        await until(lambda: not server.connections)
        await echoes(server)


@pytest.mark.parametrize("hello", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"])
async def test_a_client_that_stalls_the_tls_handshake_is_dropped(
    server_tls: ssl.SSLContext, hello: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    async with (
        serving(echo_app(), port=0, tls=server_tls, clock=clock) as server,
        await open_stream(server) as stream,
    ):
        await stream.send(hello)
        await until(lambda: server.connections)
        await clock.advance(9)
        assert server.connections == 1
        await clock.advance(2)
        with anyio.fail_after(PATIENCE), suppress(anyio.EndOfStream):
            while True:
                await stream.receive()
        await clock.advance(3)  # and does not go away by itself: Limits.linger
        assert server.connections == 0
    assert complaints(caplog) == []


async def test_a_client_that_gives_up_its_tls_handshake_is_no_noise(
    server_tls: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(echo_app(), port=0, tls=server_tls) as server:
        stream = await open_stream(server)
        await stream.send(b"\x16\x03\x01")
        await until(lambda: server.connections)
        await stream.aclose()
        await until(lambda: not server.connections)
    assert complaints(caplog) == []


@pytest.mark.parametrize("end", ["fin", "rst"])
async def test_a_ragged_tls_end_is_1006_without_a_traceback(
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    end: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    app, told = reporting_app()
    async with serving(app, port=0, tls=server_tls) as server:
        async with connected(server, "/", tls=client_tls) as client:
            await client.send("hello")
            assert await client.receive() == "hello"
            await (client.reset() if end == "rst" else client.aclose())
            await until(lambda: told)
        await until(lambda: not server.connections)
    assert told == [(1006, "lost")]
    assert complaints(caplog) == []


@pytest.mark.parametrize("over_tls", [False, True])
async def test_a_reset_behind_a_message_is_noticed_at_once(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, over_tls: bool
) -> None:
    """What a client does that leaves with something unread; no deadline may be needed for it."""
    app = App()
    told: list[int | str] = []

    @app.on_message("/")
    def note(ws: WebSocket, text: str) -> None:
        told.append(text)

    @app.on_close("/")
    def closed(ws: WebSocket, reason: roomsock.ConnectionClosed) -> None:
        told.append(reason.code)

    tls = server_tls if over_tls else None
    async with (
        serving(app, port=0, tls=tls, clock=FakeClock()) as server,
        connected(server, "/", tls=client_tls if over_tls else None) as client,
    ):
        await client.send("one")
        await until(lambda: told)
        await client.send("two")
        await client.reset()
        await until(lambda: not server.connections)
    assert told in (["one", "two", 1006], ["one", 1006])


async def test_a_tls_close_notify_without_a_close_frame_is_1006(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    app, told = reporting_app()
    async with serving(app, port=0, tls=server_tls) as server:
        stream = await anyio.connect_tcp(
            "localhost",
            server.addresses[0][1],
            ssl_context=client_tls,
            tls_standard_compatible=True,
        )
        client = Client(stream)
        await client.handshake("/")
        await stream.aclose()
        await until(lambda: told)
    assert told == [(1006, "lost")]


def reporting_app() -> tuple[App, list[tuple[int, str]]]:
    app = App(keepalive=None)
    told: list[tuple[int, str]] = []

    @app.on_message("/")
    async def echo(ws: WebSocket, text: str) -> None:
        await ws.send_text(text)

    @app.on_close("/")
    def closed(ws: WebSocket, reason: roomsock.ConnectionClosed) -> None:
        told.append((reason.code, reason.closed_by))

    return app, told


# Threads


async def test_calls_from_threads_run_in_order_on_the_loop() -> None:
    app = echo_app()
    done: list[tuple[int, int]] = []
    async with serving(app, port=0):
        here = threading.get_ident()

        def note(thread: int, number: int) -> None:
            assert threading.get_ident() == here
            done.append((thread, number))

        def call(thread: int) -> None:
            for number in range(500):
                app.call_soon_threadsafe(note, thread, number)

        async with anyio.create_task_group() as tg:
            for thread in range(4):
                tg.start_soon(anyio.to_thread.run_sync, call, thread)
        call(9)  # the loop's own
        await until(lambda: len(done) == 2500)
    for thread in 0, 1, 2, 3, 9:
        assert [number for of, number in done if of == thread] == list(range(500))


async def test_a_thread_sends_to_a_room_and_wakes_a_sleeping_loop() -> None:
    app = echo_app()
    async with serving(app, port=0) as server, connected(server, "/echo") as client:

        def call() -> None:
            app.call_soon_threadsafe(app.room("/echo").send_text, "from a thread")

        thread = threading.Thread(target=call)
        thread.start()
        assert await client.receive() == "from a thread"
        thread.join()


async def test_what_a_call_raises_is_logged_and_the_next_one_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = echo_app()
    done = anyio.Event()

    def broken(what: str) -> None:
        raise ValueError(what)

    async with serving(app, port=0) as server:
        app.call_soon_threadsafe(broken, "no luck")
        app.call_soon_threadsafe(done.set)
        with anyio.fail_after(PATIENCE):
            await done.wait()
        await echoes(server)
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "broken" in record.getMessage()
    assert record.exc_info is not None
    assert "no luck" in str(record.exc_info[1])


async def test_calls_when_not_served_and_of_coroutine_functions_are_refused() -> None:
    app = echo_app()

    async def coroutine_function() -> None: ...

    with pytest.raises(RuntimeError, match="not being served"):
        app.call_soon_threadsafe(print)
    async with serving(app, port=0):
        with pytest.raises(TypeError, match="coroutine function"):
            app.call_soon_threadsafe(coroutine_function)
        with pytest.raises(TypeError, match="coroutine function"):
            app.call_soon_threadsafe(partial(coroutine_function))
    with pytest.raises(RuntimeError, match="not being served"):
        app.call_soon_threadsafe(print)


async def test_any_other_use_from_a_foreign_thread_is_refused() -> None:
    app = App(keepalive=None)
    sockets: list[WebSocket] = []

    @app.on_message("/room")
    async def message(ws: WebSocket, text: str) -> None:
        sockets.append(ws)
        await ws.send_text(text)

    async with serving(app, port=0) as server, connected(server, "/room") as client:
        await client.send("hello")
        assert await client.receive() == "hello"
        (ws,) = sockets
        for use in (
            lambda: ws.send_text("x"),
            lambda: ws.send_json("x"),
            lambda: ws.send_bytes(b"x"),
            lambda: ws.send_text_to_this_room("x"),
            lambda: ws.send_json_to_room("/room", "x"),
            lambda: ws.send_bytes_to_all(b"x"),
            lambda: ws.close(),
            lambda: ws.join("other"),
            lambda: ws.leave("other"),
            lambda: app.room("/room").send_text("x"),
            lambda: app.all.send_text("x"),
            lambda: server.shutdown(),
        ):
            with pytest.raises(RuntimeError, match="call_soon_threadsafe"):
                await anyio.to_thread.run_sync(use)
        await client.send("and nothing of it was sent")
        assert await client.receive() == "and nothing of it was sent"
        app.call_soon_threadsafe(server.shutdown)
        assert await client.closed() == (1001, "")


who = contextvars.ContextVar("who", default="nobody")


async def test_context_variables_of_the_caller_are_seen_by_handlers() -> None:
    app = App(keepalive=None)
    seen: list[str] = []

    @app.on_connect("/")
    def connect(ws: WebSocket) -> None:
        seen.append(who.get())

    @app.on_message("/")
    async def message(ws: WebSocket, text: str) -> None:
        seen.append(who.get())
        who.set(text)
        ws.close()

    @app.on_close("/")
    def close(ws: WebSocket, reason: roomsock.ConnectionClosed) -> None:
        seen.append(who.get())

    token = who.set("the caller")
    try:
        async with serving(app, port=0) as server:
            who.set("somebody later")
            for _ in range(2):  # what one connection sets stays with it
                async with connected(server, "/") as client:
                    await client.send("a handler")
                    await client.closed()
                    await client.close()
                    await client.ended()
        assert seen == ["the caller", "the caller", "a handler"] * 2
    finally:
        who.reset(token)


async def test_a_task_that_fails_costs_nobody_else_anything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def lost() -> None:
        raise ConnectionResetError

    async def broken() -> None:
        raise ValueError("a mistake of ours")

    async with serving(echo_app(), port=0) as server, connected(server, "/echo") as client:
        for function in lost, broken:
            server.spawn(function)
        await until(lambda: complaints(caplog))
        await client.send("still here")
        assert await client.receive() == "still here"
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert record.exc_info is not None


# Limits and descriptors


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def closes_cleanly(server: Server) -> None:
    async with connected(server, "/echo") as client:
        await client.close()
        assert (await client.closed())[0] == 1000
        await client.ended()


async def is_closed_by_the_server(server: Server) -> None:
    async with connected(server, "/bye") as client:
        assert (await client.closed())[0] == 1000
        await client.close()
        await client.ended()


async def resets(server: Server) -> None:
    async with connected(server, "/echo") as client:
        await client.reset()


async def vanishes(server: Server) -> None:
    async with connected(server, "/echo") as client:
        await client.aclose()


async def half_closes(server: Server) -> None:
    async with connected(server, "/echo") as client:
        await client.stream.send_eof()
        await client.ended()


async def half_closes_in_a_frame(server: Server) -> None:
    async with connected(server, "/echo") as client:
        await client.send_raw(client.frame("hello")[:4])
        await client.stream.send_eof()
        await client.ended()


async def breaks_the_protocol(server: Server) -> None:
    async with connected(server, "/echo") as client:
        await client.send_raw(b"\xff" * 100)
        assert (await client.closed())[0] == 1002
        await client.ended()


async def is_refused(server: Server) -> None:
    for path in "/nowhere", "/refused":
        with pytest.raises(Exception, match="40"):
            async with connected(server, path):
                pytest.fail("refused")


async def asks_http(server: Server) -> None:
    assert (await http(server, REQUEST))[0] == 200


async def talks_nonsense(server: Server) -> None:
    assert (await http(server, b"\x00\x01\x02\r\n\r\n"))[0] == 400


async def says_nothing(server: Server) -> None:
    await (await open_stream(server)).aclose()


async def stops_in_the_request(server: Server) -> None:
    stream = await open_stream(server)
    await stream.send(upgrade_request("/echo")[:20])
    await stream.aclose()


async def leaves_before_the_answer(server: Server) -> None:
    stream = await open_stream(server)
    await stream.send(upgrade_request("/echo"))
    await stream.aclose()


WAYS = [
    closes_cleanly,
    is_closed_by_the_server,
    resets,
    vanishes,
    half_closes,
    half_closes_in_a_frame,
    breaks_the_protocol,
    is_refused,
    asks_http,
    talks_nonsense,
    says_nothing,
    stops_in_the_request,
    leaves_before_the_answer,
]


@asynccontextmanager
async def no_descriptor_stays(server: Server) -> AsyncIterator[None]:
    await echoes(server)  # whatever is opened once is open now
    await until(lambda: not server.connections)
    before = descriptors()
    yield
    await until(lambda: not server.connections)
    assert descriptors() == before
    assert server.stuck() == []
    await echoes(server)


@pytest.mark.parametrize("way", WAYS)
async def test_no_descriptor_stays_behind(way: Callable[[Server], Any]) -> None:
    app = echo_app()

    @app.on_message("/refused")
    async def never(ws: WebSocket, text: str) -> None: ...

    @app.on_connect("/refused")
    def refuse(ws: WebSocket) -> None:
        raise roomsock.Reject(403)

    @app.serve("/bye")
    async def bye(ws: WebSocket) -> None:
        ws.close()

    async with serving(app, port=0) as server, no_descriptor_stays(server):
        async with anyio.create_task_group() as tg:
            for _ in range(5):
                tg.start_soon(way, server)
        for _ in range(15):
            await way(server)


async def test_no_descriptor_stays_behind_a_server() -> None:
    app = echo_app()
    async with serving(app, port=0) as server:
        await echoes(server)
    before = descriptors()
    for _ in range(3):
        async with (
            serving(app, port=0) as server,
            connected(server, "/echo") as client,
            await open_stream(server) as silent,
        ):
            server.shutdown()
            assert (await client.closed())[0] == 1001
            await client.aclose()
            with anyio.fail_after(PATIENCE), suppress(anyio.EndOfStream):
                while True:
                    await silent.receive()
            await silent.aclose()
            await server.stopped()
    assert descriptors() == before


async def test_connections_above_the_limit_get_503_and_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = echo_app(Limits(connections=2))
    async with serving(app, port=0) as server:
        async with connected(server, "/echo"), connected(server, "/echo") as client:
            status, headers, _ = await http(server, REQUEST)
            assert (status, headers["retry-after"]) == (503, "5")
            assert (await http(server, upgrade_request("/echo")))[0] == 503
            await client.send("still here")
            assert await client.receive() == "still here"
        await until(lambda: not server.connections)
        await echoes(server)
        assert server.counters.over_limit == 2
    assert len(complaints(caplog)) == 1


async def test_beyond_the_limit_nobody_is_told_any_more() -> None:
    app = echo_app(Limits(connections=1))
    async with (
        serving(app, port=0) as server,
        connected(server, "/echo") as client,
        await open_stream(server),
        await open_stream(server),
        await open_stream(server) as dropped,
    ):
        with (
            anyio.fail_after(PATIENCE),
            pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)),
        ):
            await dropped.receive()
        await client.send("still here")
        assert await client.receive() == "still here"


async def test_connections_from_one_address_are_limited() -> None:
    app = echo_app(Limits(connections_per_address=2))
    async with serving(app, host=["127.0.0.1", "::1"], port=0) as server:
        async with connected(server, "/echo"), connected(server, "/echo"):
            assert (await http(server, REQUEST))[0] == 503
            server.addresses.reverse()
            assert (await http(server, REQUEST))[0] == 200
            server.addresses.reverse()
        await until(lambda: not server.connections)
        await echoes(server)


async def test_a_connection_that_died_in_the_queue_is_no_trouble() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        for _ in range(5):
            with socket.create_connection(listener.getsockname()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        async with serving(echo_app(), sock=listener.dup()) as server:
            await echoes(server)
            await until(lambda: not server.connections)


# Behind proxies. The tests connect as the proxy would; so the peer is on loopback.

FORWARDED = [("x-forwarded-for", "9.9.9.9, 1.2.3.4"), ("forwarded", 'for=9.9.9.9, for="[::2]:7"')]


def forwarded_for(address: str) -> list[tuple[str, str]]:
    return [("X-Forwarded-For", address)]


async def asks_for(server: Server, address: str) -> int:
    """The status of a request that a proxy passes on."""
    return (await http(server, upgrade_request("/echo", forwarded_for(address))))[0]


async def page_says(server: Server, *headers: tuple[str, str]) -> str:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    request = f"GET / HTTP/1.1\r\nHost: testserver\r\n{lines}\r\n".encode("latin-1")
    status, _, body = await http(server, request)
    assert status == 200
    return body.decode()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"trusted_proxies": ["127.0.0.0/8"]}, "https 1.2.3.4"),
        ({"trusted_proxies": ["127.0.0.1"], "forwarded_header": "forwarded"}, "http ::2"),
    ],
)
async def test_behind_a_trusted_proxy_the_client_is_whom_the_one_header_names(
    options: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(echo_app(), port=0, **options) as server:
        assert await page_says(server, *FORWARDED, ("X-Forwarded-Proto", "https")) == expected
    assert complaints(caplog) == []


@pytest.mark.parametrize("proxies", [(), ["127.0.0.2"], ["unix", "10.0.0.0/8"]])
async def test_whom_a_stranger_names_is_ignored_and_a_neighbour_is_told_of_once(
    proxies: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(echo_app(), port=0, trusted_proxies=proxies) as server:
        assert await page_says(server) == "http 127.0.0.1"
        assert complaints(caplog) == []
        for _ in range(2):
            said = await page_says(server, *FORWARDED, ("X-Forwarded-Proto", "https"))
            assert said == "http 127.0.0.1"
    (complaint,) = complaints(caplog)
    assert 'trusted_proxies=["127.0.0.1"]' in complaint


async def test_behind_a_unix_socket_the_client_is_known_if_it_is_trusted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "socket"
    async with serving(echo_app(), unix=path, trusted_proxies=["unix"]) as server:
        assert await page_says(server, *FORWARDED) == "http 1.2.3.4"
        assert await page_says(server) == "http None"
    assert complaints(caplog) == []
    async with serving(echo_app(), unix=path) as server:
        assert await page_says(server, *FORWARDED) == "http None"
    (complaint,) = complaints(caplog)
    assert 'trusted_proxies=["unix"]' in complaint


async def test_a_proxy_in_front_of_tls_says_what_the_client_uses(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    app = App()
    schemes: list[str] = []
    app.add_on_connect("/r", lambda ws: schemes.append(ws.request.scheme))
    app.add_on_message("/r", lambda ws, text: None)
    async with serving(app, port=0, tls=server_tls, trusted_proxies=["127.0.0.1"]) as server:
        for headers in [], [("X-Forwarded-Proto", "http")], [("X-Forwarded-Proto", "gopher")]:
            async with connected(server, "/r", headers, tls=client_tls):
                pass
    assert schemes == ["https", "http", "https"]


@pytest.mark.parametrize("peer", ["tcp", "unix"])
async def test_connections_of_one_client_behind_a_proxy_are_limited(
    peer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = echo_app(Limits(connections_per_address=2))
    asked: list[Any] = []
    app.add_on_connect("/echo", lambda ws: asked.append(ws.request.client))
    where: dict[str, Any] = {"port": 0} if peer == "tcp" else {"unix": tmp_path / "socket"}
    async with serving(app, **where, trusted_proxies=["127.0.0.1", "unix"]) as server:
        one, mapped = forwarded_for("1.2.3.4"), forwarded_for("::ffff:1.2.3.4")
        async with connected(server, "/echo", one):
            async with connected(server, "/echo", mapped) as client:
                assert await asks_for(server, "1.2.3.4") == 503
                assert await asks_for(server, "9.9.9.9, ::ffff:1.2.3.4") == 503
                async with connected(server, "/echo", forwarded_for("1.2.3.5")):
                    assert await page_says(server, *forwarded_for("1.2.3.5")) == "http 1.2.3.5"
                await client.send("still here")
                assert await client.receive() == "still here"
            await until(lambda: server.connections == 1)
            async with connected(server, "/echo", one):
                assert await asks_for(server, "1.2.3.4") == 503
        await until(lambda: not server.connections)
        assert server._per_address == {}
        assert server.counters.over_limit == 3
    assert asked == [("1.2.3.4", 0)] * 2 + [("1.2.3.5", 0), ("1.2.3.4", 0)]
    assert len(complaints(caplog)) == 1


async def test_an_ipv6_client_counts_with_its_network() -> None:
    app = echo_app(Limits(connections_per_address=1))
    async with (
        serving(app, port=0, trusted_proxies=["127.0.0.1"]) as server,
        connected(server, "/echo", forwarded_for("2001:db8::1")),
    ):
        assert await asks_for(server, "2001:db8::ffff:0:0:1") == 503
        async with connected(server, "/echo", forwarded_for("2001:db8:0:1::1")):
            pass


async def test_a_trusted_proxy_itself_is_not_limited() -> None:
    app = echo_app(Limits(connections_per_address=1))
    async with (
        serving(app, port=0, trusted_proxies=["127.0.0.1"]) as server,
        connected(server, "/echo"),
        connected(server, "/echo"),
    ):
        for address in "", "unknown", "127.0.0.1":
            async with connected(server, "/echo", forwarded_for(address)):
                assert await page_says(server, *forwarded_for(address)) == "http 127.0.0.1"
    assert server.counters.over_limit == 0


async def test_who_is_no_proxy_is_limited_by_its_own_address_whatever_it_says() -> None:
    app = echo_app(Limits(connections_per_address=1))
    async with serving(app, port=0, trusted_proxies=["127.0.0.2"]) as server:
        async with connected(server, "/echo", forwarded_for("1.2.3.4")):
            assert await asks_for(server, "1.2.3.5") == 503
        await until(lambda: not server.connections)
        assert await page_says(server, *forwarded_for("1.2.3.4")) == "http 127.0.0.1"


async def test_who_is_refused_behind_a_proxy_counts_while_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or one address could take all descriptors: beyond a tenth above the limit nobody is told."""
    app = echo_app(Limits(connections_per_address=1))
    async with (
        serving(app, port=0, trusted_proxies=["127.0.0.1"]) as server,
        connected(server, "/echo", forwarded_for("1.2.3.4")),
        await open_stream(server) as told,
        await open_stream(server) as also_told,
        await open_stream(server) as dropped,
    ):
        request = upgrade_request("/echo", forwarded_for("1.2.3.4"))
        for number, stream in enumerate((told, also_told), 2):
            await stream.send(request)
            assert (await stream.receive()).startswith(b"HTTP/1.1 503 ")
            assert server._per_address == {"1.2.3.4": number}
        await dropped.send(request)
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await dropped.receive()
        assert await page_says(server, *forwarded_for("1.2.3.5")) == "http 1.2.3.5"
    assert server._per_address == {}


async def test_a_mistake_in_admitting_a_connection_costs_it_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(echo_app(), port=0) as server:
        with monkeypatch.context() as patched:
            patched.setattr(server.loop, "transport", lambda sock: 1 / 0)
            async with await open_stream(server) as stream:
                with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                    await stream.receive()
        async with connected(server, "/echo") as client:
            await client.send("still here")
            assert await client.receive() == "still here"
        [record] = caplog.records
        assert record.getMessage() == "admitting a connection failed"


async def test_a_connection_above_two_limits_is_counted_once() -> None:
    app = echo_app(Limits(connections=2, connections_per_address=1))
    async with serving(app, port=0, trusted_proxies=["127.0.0.1"]) as server:
        headers = forwarded_for("1.2.3.4")
        async with connected(server, "/echo", headers), await open_stream(server):
            await until(lambda: server.connections == 2)
            assert await asks_for(server, "1.2.3.4") == 503
    assert server.counters.over_limit == 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_behind_a_proxy_is_counted_until_its_connection_ends(
    way: Callable[[Server], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = upgrade_request

    def request(path: str = "/", headers: Any = ()) -> bytes:
        return direct(path, [*headers, *forwarded_for("1.2.3.4")])

    # What the ways send comes through a proxy.
    for module in Client.__module__, __name__:
        monkeypatch.setattr(f"{module}.upgrade_request", request)
    app = echo_app(Limits(connections_per_address=1))
    app.add_on_message("/refused", lambda ws, text: None)
    app.add_serve("/bye", lambda ws: ws.close())

    @app.on_connect("/refused")
    def refuse(ws: WebSocket) -> None:
        raise roomsock.Reject(403)

    async with serving(app, port=0, trusted_proxies=["127.0.0.1"]) as server:
        for _ in range(2):
            await way(server)
            await until(lambda: not server.connections)
            assert server._per_address == {}
            async with connected(server, "/echo"):
                assert server._per_address == {"1.2.3.4": 1}
            await until(lambda: not server.connections)
    assert server._per_address == {}


async def test_who_is_gone_before_it_is_known_is_not_counted() -> None:
    app = echo_app(Limits(connections_per_address=1))
    async with serving(app, port=0, trusted_proxies=["127.0.0.1"]) as server:
        async with await open_stream(server):
            await until(lambda: server._drivers)
            (driver,) = server._drivers
            driver.abort()
            server.identify(driver, roomsock.Request("GET", "/", "/", b"x-forwarded-for:1.2.3.4"))
            assert server._per_address == {}
        await until(lambda: not server._drivers)
        assert server.connections == 0


async def test_the_log_names_the_client_and_nothing_that_it_wrote(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "roomsock")
    async with serving(echo_app(), port=0, trusted_proxies=["127.0.0.1"]) as server:
        for address in "evil, 2001:DB8::1", "[fe80::1%evil]:7", "evil.2.3.4", "1.2.3.4:5evil":
            async with connected(server, "/echo", forwarded_for(address)) as client:
                await client.close()
                await client.ended()
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "2001:db8::1:0 '/echo' accepted" in text
    assert "fe80::1:7 '/echo' accepted" in text
    assert "evil" not in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"trusted_proxies": ["*"]}, r"trusted_proxies: '\*' would let any client choose"),
        ({"trusted_proxies": ["nginx"]}, "trusted_proxies: 'nginx' does not appear"),
        ({"forwarded_header": "x-real-ip"}, "forwarded_header is"),
    ],
)
async def test_wrong_proxies_are_a_setup_error_before_anything_listens(
    options: dict[str, Any], text: str, taken: int
) -> None:
    with pytest.raises(SetupError, match=text):
        async with serving(App(), port=taken, **options):
            pass


# Memory


CHURN = """
import resource, sys
from roomsock.server import keep_freed_memory
size = 1 << 20
if sys.argv[1] == "keeps":
    keep_freed_memory(4 * size)
def messages(count):
    for _ in range(count):
        a = b"a" * size; b = b"b" * size; c = b"c" * size
        del a, b, c
messages(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
messages(50)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="of glibc's malloc")
def test_memory_of_large_messages_is_not_taken_anew_for_each() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", CHURN, how]
        return int(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)

    assert faults("keeps") < 500
    assert faults("gives it back") > 5000  # else this test shows nothing
