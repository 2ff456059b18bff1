"""The contract of behaviour, on real sockets and all event loops; what it says about receiving is
in test_receiver.py.

Time stands still unless a test moves it, so nothing in here depends on how fast the machine is.
Which side ends a connection first is said in each test, or does not matter to it.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import random
import socket
import ssl
import weakref
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import msgspec
import pytest
from anyio.lowlevel import checkpoint
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri
from wsproto import events
from wsproto.extensions import PerMessageDeflate

from roomsock import (
    App,
    Compression,
    ConnectionClosed,
    ConnectionClosedError,
    ConnectionClosedOK,
    InvalidMessage,
    Limits,
    Reject,
    Request,
    Response,
    Room,
    SlowConsumer,
    WebSocket,
)
from roomsock.limits import KIB, MIB
from roomsock.sender import TURN_MESSAGES
from roomsock.server import Server
from roomsock.transport import SocketTransport

from . import contract
from .client import PATIENCE, Client, Refusal, connected, http, open_stream, upgrade_request
from .clock import FakeClock, settled
from .contract import (
    BAD_FRAME,
    CLOSE_WITHOUT_CODE,
    Ends,
    close,
    deflated,
    masked,
    messages,
    only_linux,
    served,
    text,
    until,
)

# Fixtures are active in the module that has them by name.
logged = contract.logged
nothing_else_is_logged = contract.nothing_else_is_logged


# The life of a connection


async def test_a_connection_lives_its_life_in_order() -> None:
    app = App()
    story: list[str] = []

    @app.on_connect("/r/<name>")
    async def enter(ws: WebSocket, name: str) -> None:
        story.append(f"connect {name}, {len(app.rooms)} rooms")
        await checkpoint()

    @app.on_message("/r/<name>")
    async def take(ws: WebSocket, message: str, name: str) -> None:
        story.append(f"message {message}, in {[room.name for room in ws.rooms]}")
        ws.join("more")
        await ws.send_text("taken")

    @app.on_error("/r/<name>")
    async def fail(ws: WebSocket, error: Exception, name: str) -> None:
        await checkpoint()
        story.append(f"error {error}, in {[room.name for room in ws.rooms]}")

    @app.on_close("/r/<name>")
    async def leave(ws: WebSocket, reason: ConnectionClosed, name: str) -> None:
        await checkpoint()
        story.append(f"close {reason}, in {list(ws.rooms)}")

    async with served(app) as server, connected(server, "/r/x") as client:
        await client.send("1")
        await client.receive()
        await client.send("2")
        await client.receive()
        await client.aclose()
    assert story == [
        "connect x, 0 rooms",
        "message 1, in ['/r/x']",
        "message 2, in ['/r/x', 'more']",
        "error connection lost: 1006, in ['/r/x', 'more']",
        "close connection lost: 1006, in []",
    ]


async def test_handlers_may_be_plain_functions() -> None:
    app = App()
    story: list[str] = []

    @app.on_connect("/r")
    def enter(ws: WebSocket) -> None:
        story.append("connect")

    @app.on_message("/r")
    def take(ws: WebSocket, message: str) -> None:
        ws.send_text(message.upper())

    @app.on_close("/r")
    def leave(ws: WebSocket, reason: ConnectionClosed) -> None:
        story.append("close")

    async with served(app) as server, connected(server, "/r") as client:
        await client.send("hello")
        assert await client.receive() == "HELLO"
    assert story == ["connect", "close"]


async def test_who_got_the_101_is_a_member() -> None:
    app = App()
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server, connected(server, "/r"):
        assert len(app.room("/r")) == len(app.all) == 1
        async with connected(server, "/r"):
            assert len(app.room("/r")) == 2


async def test_acceptance_queues_the_101_and_joins_in_one_step() -> None:
    app = App()

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        assert (ws.rooms, len(app.all)) == ((), 0)
        with pytest.raises(RuntimeError, match="accepted"):
            ws.join("early")
        ws.send_text("before")
        ws.accept("two", headers=[("X-Seen", "yes")])
        assert ws.subprotocol == "two"
        assert ws in ws.room
        assert ws.send_text_to_this_room("as a member") == 1
        with pytest.raises(RuntimeError, match="accepted before"):
            ws.accept()
        ws.send_text("behind")

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None: ...

    offer = [("Sec-WebSocket-Protocol", "one, two")]
    async with served(app) as server, connected(server, "/r", offer) as client:
        assert client.headers["sec-websocket-protocol"] == "two"
        assert client.headers["x-seen"] == "yes"
        assert [await client.receive() for _ in range(3)] == ["before", "as a member", "behind"]


async def test_what_is_sent_before_the_acceptance_arrives_right_behind_the_101() -> None:
    app = App()

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        await ws.send_text("one")
        ws.send_json({"two": 2})
        ws.send_bytes(b"three")

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        ws.send_text("four")

    async with served(app) as server, connected(server, "/r") as client:
        assert await client.receive() == "one"
        assert await client.receive_json() == {"two": 2}
        assert await client.receive() == b"three"
        assert await client.receive() == "four"


@pytest.mark.parametrize("is_async", [True, False])
async def test_reject_answers_with_its_status_body_and_headers(is_async: bool) -> None:
    app = App()
    ends = Ends(app)

    def refuse(ws: WebSocket) -> None:
        ws.send_text("never seen")
        raise Reject(401, "who are you?", {"WWW-Authenticate": "Basic"})

    async def refuse_later(ws: WebSocket) -> None:
        await checkpoint()
        refuse(ws)

    app.add_on_connect("/r", refuse_later if is_async else refuse)
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server:
        with pytest.raises(Refusal) as refusal:
            async with connected(server, "/r"):
                pass
        assert (refusal.value.status, refusal.value.body) == (401, b"who are you?")
        assert refusal.value.headers["www-authenticate"] == "Basic"
    assert ends.told == []


async def test_an_on_connect_that_raises_is_answered_500_and_costs_nobody_else(
    logged: Callable[[], list[str]],
) -> None:
    app = App()
    ends = Ends(app)

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        if "bad" in ws.request.query:
            raise KeyError("no such thing")

    @app.on_message("/r")
    async def echo(ws: WebSocket, message: str) -> None:
        ws.send_text(message)

    async with served(app) as server, connected(server, "/r") as good:
        with pytest.raises(Refusal) as refusal:
            async with connected(server, "/r?bad"):
                pass
        assert refusal.value.status == 500
        assert b"no such thing" not in refusal.value.body
        await good.send("still here")
        assert await good.receive() == "still here"
        assert ends.told == []
        await good.close()
        await good.closed()
    assert ends.told == ["close closed by the client: 1000"]
    [line] = logged()
    assert "enter() in" in line
    assert "raised; '/r' answered 500" in line


async def test_a_subprotocol_that_was_not_offered_is_a_mistake_answered_500(
    logged: Callable[[], list[str]],
) -> None:
    app = App()
    app.add_on_connect("/r", lambda ws: ws.accept("unheard-of"))
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server:
        with pytest.raises(Refusal) as refusal:
            async with connected(server, "/r"):
                pass
        assert refusal.value.status == 500
    assert len(logged()) == 1


async def test_an_on_connect_that_raises_behind_its_acceptance_ends_with_1011_and_on_close(
    logged: Callable[[], list[str]],
) -> None:
    app = App()
    ends = Ends(app)

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        ws.accept()
        raise Reject(403) if "reject" in ws.request.query else ZeroDivisionError

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        raise AssertionError("its on_connect did not return")

    async with served(app) as server:
        for path in ("/r", "/r?reject"):
            async with connected(server, path, early=text("x")) as client:
                assert await client.closed() == (1011, "")
    assert ends.told == ["close closed by the server: 1011"] * 2
    assert ["enter() in" in line for line in logged()] == [True, True]


async def test_nothing_can_be_received_or_closed_before_the_acceptance() -> None:
    app = App()

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        with pytest.raises(RuntimeError, match="before the connection is accepted"):
            await ws.receive()
        with pytest.raises(RuntimeError, match=r"raise roomsock\.Reject"):
            ws.close()

    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server, connected(server, "/r"):
        pass


async def test_an_on_connect_that_accepted_may_talk_with_its_client() -> None:
    app = App()

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        ws.accept()
        ws.send_text("name?")
        ws.state.name = await ws.receive_text()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        ws.send_text(f"{ws.state.name}: {message}")

    async with served(app) as server, connected(server, "/r") as client:
        assert await client.receive() == "name?"
        await client.send("Ann")
        await client.send("hello")
        assert await client.receive() == "Ann: hello"


async def test_messages_right_behind_the_request_are_handled() -> None:
    app = App()

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        await checkpoint()

    @app.on_message("/r")
    async def echo(ws: WebSocket, message: str) -> None:
        ws.send_text(message)

    early = text("one") + text("two") + text("three")[:5]
    async with served(app) as server, connected(server, "/r", early=early) as client:
        assert [await client.receive(), await client.receive()] == ["one", "two"]
        await client.send_raw(text("three")[5:])
        assert await client.receive() == "three"


async def test_a_close_right_behind_the_request_is_answered_behind_the_101() -> None:
    app = App()
    ends = Ends(app)

    @app.on_message("/r")
    async def echo(ws: WebSocket, message: str) -> None:
        ws.send_text(message)

    early = text("one") + close(1001, "bye")
    async with served(app) as server, connected(server, "/r", early=early) as client:
        assert await client.receive() == "one"
        assert await client.closed() == (1001, "")
    assert ends.told == ["close closed by the client: 1001 (bye)"]


async def test_messages_of_a_client_that_left_during_a_slow_on_connect_are_handled() -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app)
    handled: list[str] = []

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        ws.accept()
        await clock.sleep_until(clock.now() + 2)

    app.add_on_message("/r", lambda ws, message: handled.append(message))
    early = text("one") + text("two") + close(1000)
    async with served(app, clock) as server, connected(server, "/r", early=early) as client:
        await clock.advance(0.5)
        assert await client.closed() == (1000, "")
        assert (handled, ends.told) == ([], [])
        await clock.advance(2)
        await ends.come()
    assert handled == ["one", "two"]
    assert ends.told == ["close closed by the client: 1000"]


async def test_an_on_connect_that_met_the_end_takes_no_messages() -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app)

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        ws.accept()
        await clock.sleep_until(clock.now() + 2)
        ws.send_text("hello")

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        raise AssertionError("its on_connect did not return")

    early = text("one") + close(1000)
    async with served(app, clock) as server, connected(server, "/r", early=early):
        await clock.advance(3)
        await ends.come()
    assert ends.told == ["close closed by the client: 1000"]


async def test_an_on_connect_that_closes_has_its_handler_not_called() -> None:
    app = App()
    ends = Ends(app)

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        ws.accept()
        ws.send_text("full")
        ws.close(4000, "full")

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        raise AssertionError("it was closed before")

    async with served(app) as server, connected(server, "/r") as client:
        assert await client.receive() == "full"
        assert await client.closed() == (4000, "full")
    assert ends.told == ["close closed by the server: 4000 (full)"]


# The time an opening may take


async def test_a_request_that_drips_is_answered_408_when_the_open_timeout_is_over() -> None:
    app, clock = App(limits=Limits(open_timeout=4)), FakeClock()
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app, clock) as server, await open_stream(server) as stream:
        request = upgrade_request("/r")
        for start in range(3):
            await stream.send(request[start : start + 1])
            await clock.advance(1.25)
        assert server.connections == 1
        await clock.advance(0.5)
        answer = await stream.receive()
        assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_stays_silent_is_dropped_when_the_open_timeout_is_over() -> None:
    app, clock = App(), FakeClock()
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app, clock) as server, await open_stream(server):
        await until(lambda: server.connections)
        await clock.advance(10.25)
        await clock.advance(2.25)  # it does not close its side either
        assert server.connections == 0


async def test_a_slow_on_connect_is_cancelled_and_answered_503() -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app)
    asked = anyio.Event()

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        asked.set()
        await anyio.sleep_forever()

    app.add_on_message("/r", lambda ws, message: None)
    async with served(app, clock) as server, await open_stream(server) as stream:
        await stream.send(upgrade_request("/r"))
        await asked.wait()
        await clock.advance(9.75)
        await clock.advance(0.5)
        answer = await stream.receive()
        assert answer.startswith(b"HTTP/1.1 503 ")
    assert ends.told == []


async def test_a_slow_http_handler_is_cancelled_and_answered_503() -> None:
    app, clock = App(), FakeClock()
    asked = anyio.Event()

    @app.get("/r")
    async def page(request: Request) -> str:
        asked.set()
        await anyio.sleep_forever()
        raise AssertionError

    async with served(app, clock) as server, await open_stream(server) as stream:
        await stream.send(b"GET /r HTTP/1.1\r\nHost: x\r\n\r\n")
        await asked.wait()
        await clock.advance(10.25)
        answer = await stream.receive()
        assert answer.startswith(b"HTTP/1.1 503 ")


async def test_the_open_timeout_ends_with_the_acceptance() -> None:
    app, clock = App(), FakeClock()

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        ws.accept()
        await clock.sleep_until(clock.now() + 15)
        ws.send_text("at last")

    app.add_on_message("/r", lambda ws, message: None)
    async with served(app, clock) as server, connected(server, "/r") as client:
        await clock.advance(15)
        assert await client.receive() == "at last"


async def test_an_on_connect_that_does_not_stop_is_left_behind(
    logged: Callable[[], list[str]],
) -> None:
    app, clock = App(), FakeClock()
    asked, release = anyio.Event(), anyio.Event()

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        asked.set()
        with anyio.CancelScope(shield=True):
            await release.wait()
        with pytest.raises(Reject, match="503"):
            ws.accept()

    app.add_on_message("/r", lambda ws, message: None)
    async with served(app, clock) as server, await open_stream(server) as stream:
        await stream.send(upgrade_request("/r"))
        await asked.wait()
        await clock.advance(20.5)
        assert server.connections == 0
        release.set()
    [line] = logged()
    assert "does not stop after its cancellation" in line


async def test_a_stop_during_an_on_connect_is_answered_503() -> None:
    app = App()
    ends = Ends(app)
    asked = anyio.Event()

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        asked.set()
        await anyio.sleep_forever()

    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server, await open_stream(server) as stream:
        await stream.send(upgrade_request("/r"))
        await asked.wait()
        server.shutdown()
        answer = await stream.receive()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"the server is stopping" in answer
    assert ends.told == []


# Who may connect


async def test_an_upgrade_on_an_unknown_path_gets_404() -> None:
    app = App()
    app.add_get("/page", lambda request: "page")
    async with served(app) as server:
        for path in ("/unknown", "/page"):
            with pytest.raises(Refusal) as refusal:
                async with connected(server, path):
                    pass
            assert refusal.value.status == 404


async def test_a_foreign_origin_gets_403_before_on_connect(
    logged: Callable[[], list[str]],
) -> None:
    app = App()
    app.add_on_connect("/r", lambda ws: pytest.fail("asked"))
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server:
        with pytest.raises(Refusal) as refusal:
            async with connected(server, "/r", [("Origin", "https://evil.example")]):
                pass
        assert refusal.value.status == 403
    [line] = logged()
    assert "https://evil.example" in line
    assert "testserver" in line
    assert "origins=['https://evil.example']" in line


@pytest.mark.parametrize(
    ("origins", "origin"),
    [
        (None, "http://testserver"),
        (None, "https://testserver:443"),
        (["https://page.example"], "https://page.example"),
        ("*", "https://evil.example"),
    ],
)
async def test_an_origin_that_is_allowed_connects(origins: Any, origin: str) -> None:
    app = App(origins=origins)
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server, connected(server, "/r", [("Origin", origin)]):
        pass


# Sending


async def test_every_send_reaches_those_it_names() -> None:
    app = App()

    @app.on_message("/<room>")
    async def take(ws: WebSocket, message: str, room: str) -> None:
        others = ws.room.others(ws)
        ws.send_json({"json": "own"})
        ws.send_text("text own")
        ws.send_bytes(b"bytes own")
        assert ws.send_json_to_this_room({"json": "this room"}) == 2
        assert ws.send_text_to_this_room("text this room") == 2
        assert ws.send_bytes_to_this_room(b"bytes this room") == 2
        assert ws.send_json_to_room("/b", {"json": "room b"}) == 1
        assert ws.send_text_to_room("/b", "text room b") == 1
        assert ws.send_bytes_to_room("/b", b"bytes room b") == 1
        assert ws.send_json_to_all({"json": "all"}) == 3
        assert ws.send_text_to_all("text all") == 3
        assert ws.send_bytes_to_all(b"bytes all") == 3
        assert ws.send_json_to_this_room({"json": "but me"}, exclude=ws) == 1
        assert ws.send_text_to_this_room("but me", exclude=[ws]) == 1
        assert ws.send_bytes_to_this_room(b"but others", exclude=others) == 1
        assert ws.send_json_to_room("/a", {"json": "but me"}, exclude=ws) == 1
        assert ws.send_text_to_room("/a", "but others", exclude=others) == 1
        assert ws.send_bytes_to_room("/b", b"but nobody", exclude=ws) == 1
        assert ws.send_json_to_all({"json": "but me"}, exclude=ws) == 2
        assert ws.send_text_to_all("but others", exclude=set(others)) == 2
        assert ws.send_bytes_to_all(b"but all of /a", exclude=ws.room) == 1
        assert ws.send_text_to_room("/nobody", "unheard") == 0
        assert app.room("/a").send_text("by the app") == 2
        assert await app.all.send_text("end") == 3

    async def received(client: Client) -> list[str | bytes]:
        heard = []
        while (message := await client.receive()) != "end":
            heard.append(message)
        return heard

    async with (
        served(app) as server,
        connected(server, "/a") as one,
        connected(server, "/a") as two,
        connected(server, "/b") as three,
    ):
        await one.send("go")
        assert await received(one) == [
            '{"json":"own"}',
            "text own",
            b"bytes own",
            '{"json":"this room"}',
            "text this room",
            b"bytes this room",
            '{"json":"all"}',
            "text all",
            b"bytes all",
            b"but others",
            "but others",
            "but others",
            "by the app",
        ]
        assert await received(two) == [
            '{"json":"this room"}',
            "text this room",
            b"bytes this room",
            '{"json":"all"}',
            "text all",
            b"bytes all",
            '{"json":"but me"}',
            "but me",
            '{"json":"but me"}',
            '{"json":"but me"}',
            "by the app",
        ]
        assert await received(three) == [
            '{"json":"room b"}',
            "text room b",
            b"bytes room b",
            '{"json":"all"}',
            "text all",
            b"bytes all",
            b"but nobody",
            '{"json":"but me"}',
            "but others",
            b"but all of /a",
        ]


async def test_what_cannot_be_encoded_raises_at_the_caller_and_is_not_queued() -> None:
    app = App()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        with pytest.raises(TypeError):
            ws.send_json(object())
        with pytest.raises(TypeError):
            ws.send_text(b"bytes")  # type: ignore[arg-type]  # the point of the test
        with pytest.raises(TypeError):
            ws.send_bytes("text")  # type: ignore[arg-type]  # the point of the test
        with pytest.raises(ValueError, match="surrogates"):
            ws.send_text_to_this_room("\ud800")
        ws.send_text("fine")

    async with served(app) as server, connected(server, "/r") as client:
        await client.send("go")
        assert await client.receive() == "fine"


async def test_frames_leave_in_the_order_they_were_queued_direct_and_room_alike() -> None:
    app = App()
    count = 500

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        for number in range(count):
            if number % 3:
                ws.send_text(f"{message} {number}")
            else:
                ws.send_text_to_this_room(f"{message} {number}", exclude=ws.room.others(ws))
            if number % 7 == 0:
                await checkpoint()

    async with (
        served(app) as server,
        connected(server, "/r") as one,
        connected(server, "/r") as two,
    ):
        await one.send("a")
        await two.send("b")
        assert [await one.receive() for _ in range(count)] == [f"a {n}" for n in range(count)]
        assert [await two.receive() for _ in range(count)] == [f"b {n}" for n in range(count)]


async def test_all_members_see_a_rooms_messages_in_one_order() -> None:
    app = App()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        for number in range(100):
            ws.send_text_to_this_room(f"{message} {number}")
            if number % 5 == 0:
                await checkpoint()

    async with (
        served(app) as server,
        connected(server, "/r") as one,
        connected(server, "/r") as two,
        connected(server, "/r") as three,
    ):
        await one.send("a")
        await two.send("b")
        await three.send("c")
        seen: list[list[str | bytes]] = [[], [], []]
        for client, told in zip((one, two, three), seen, strict=True):
            for _ in range(300):
                told.append(await client.receive())
        assert seen[0] == seen[1] == seen[2]
        assert [line for line in seen[0] if str(line)[0] == "b"] == [f"b {n}" for n in range(100)]


async def test_order_holds_while_the_kernel_is_full() -> None:
    app = App(limits=Limits(outbox=64 * MIB))
    body = "x" * (256 * KIB)
    sent = anyio.Event()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        for number in range(64):
            if number % 2:
                ws.send_text(f"{number} {body}")
            else:
                ws.send_text_to_this_room(f"{number} {body}")
            if number % 10 == 0:
                await checkpoint()
        sent.set()

    async with served(app) as server, connected(server, "/r") as client:
        await client.send("go")
        await sent.wait()
        numbers = [int(str(await client.receive()).split()[0]) for _ in range(64)]
        assert numbers == list(range(64))


async def test_who_awaits_a_send_waits_while_its_client_does_not_read() -> None:
    app = App()
    body = bytes(256 * KIB)
    sent = 0

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        nonlocal sent
        while sent < 100:
            await ws.send_bytes(body)
            sent += 1

    async with served(app) as server, connected(server, "/r") as client:
        await until(lambda: sent)
        await settled()
        assert sent < 100
        for _ in range(100):
            await client.receive()
        assert await client.closed() == (1000, "")
        assert sent == 100


async def test_what_was_queued_before_a_close_leaves_before_it() -> None:
    app = App(limits=Limits(outbox=64 * MIB))
    body = bytes(MIB)

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        for _ in range(16):
            ws.send_bytes(body)
        ws.close(4001, "that was all")

    async with served(app) as server, connected(server, "/r") as client:
        await client.send("go")
        for _ in range(16):
            assert len(await client.receive()) == MIB
        assert await client.closed() == (4001, "that was all")


# Members that do not read


async def stuff(room: Room, taken: Callable[[], int] | None = None) -> None:
    """Send to a room until the kernel takes no more for who does not read, and beyond the outbox;
    at the pace of who does."""
    for sent in range(1, 41):
        room.send_bytes(bytes(MIB))
        await (until(lambda: taken() == sent) if taken else settled())  # noqa: B023


async def test_a_slow_member_is_closed_with_1013_and_the_room_is_spared(
    logged: Callable[[], list[str]],
) -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app)
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app, clock) as server, connected(server, "/r") as slow:
        async with connected(server, "/r") as quick, anyio.create_task_group() as tg:
            seen = 0

            async def read() -> None:
                nonlocal seen
                while isinstance(await quick.event(), events.BytesMessage):
                    seen += 1

            tg.start_soon(read)
            await stuff(app.room("/r"), lambda: seen)
            assert server.counters.slow_consumers == 1
            assert len(app.room("/r")) == 1
            tg.cancel_scope.cancel()
        # Its queue was discarded, but for the frame that was partly written.
        assert await slow.closed() == (1013, "too slow (Limits.outbox, Limits.outbox_messages)")
    assert (
        "error closed by the server: 1013 (too slow (Limits.outbox, Limits.outbox_messages))"
        in ends.told
    )
    [line] = logged()
    assert "is too slow (Limits.outbox" in line


async def test_who_floods_its_own_client_is_told_so(logged: Callable[[], list[str]]) -> None:
    app = App()
    ends = Ends(app)
    told = anyio.Event()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        try:
            for _ in range(40):
                ws.send_bytes(bytes(MIB))
                await settled()
        except SlowConsumer:
            told.set()
            raise

    async with served(app) as server, connected(server, "/r") as client:
        await client.send("go")
        await told.wait()
        assert await client.closed() == (1013, "too slow (Limits.outbox, Limits.outbox_messages)")
    assert ends.told == [
        "error closed by the server: 1013 (too slow (Limits.outbox, Limits.outbox_messages))",
        "close closed by the server: 1013 (too slow (Limits.outbox, Limits.outbox_messages))",
    ]
    assert len(logged()) == 1


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
async def test_dropping_is_counted_and_logged_once(
    policy: Any, logged: Callable[[], list[str]]
) -> None:
    app = App(slow_consumers=policy)
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server, connected(server, "/r") as slow:
        await stuff(app.room("/r"))
        app.room("/r").send_text(last := "x" * MIB)
        dropped = server.counters.dropped_messages
        assert dropped > 1
        received = [await slow.receive() for _ in range(41 - dropped)]
        assert (last in received) is (policy == "drop_oldest")
    [line] = logged()
    assert f"room messages are dropped ({policy})" in line


async def test_a_client_whose_kernel_takes_nothing_for_the_send_timeout_is_dropped(
    logged: Callable[[], list[str]],
) -> None:
    app, clock = App(limits=Limits(outbox=64 * MIB), keepalive=None), FakeClock()
    ends = Ends(app)
    busy, release = anyio.Event(), anyio.Event()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        for _ in range(32):
            ws.send_bytes(bytes(MIB))
        busy.set()
        await release.wait()

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send("go")
        await busy.wait()
        await clock.advance(10)
        await client.receive()
        await clock.advance(19)
        assert server.connections == 1  # it took something
        await clock.advance(2)
        assert server.connections == 0
        release.set()
        await ends.come()
    assert ends.told == [
        "error closed by the server: 1013 (too slow (Limits.send_timeout))",
        "close closed by the server: 1013 (too slow (Limits.send_timeout))",
    ]
    assert "Limits.send_timeout" in logged()[0]


async def test_who_reads_slowly_is_no_slow_consumer_although_the_kernel_takes_nothing_more(
    monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]]
) -> None:
    """The kernel takes more only when a third of its buffer is free: at 20 KB/s in a minute."""
    app, clock = App(limits=Limits(outbox=64 * MIB), keepalive=None), FakeClock()
    held = 1000
    monkeypatch.setattr(SocketTransport, "unacknowledged", lambda self: held)
    app.add_on_message("/r", lambda ws, message: ws.send_bytes(bytes(32 * MIB)))

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send("go")
        await settled()
        for _ in range(6):
            held -= 1  # the client's machine has taken some
            await clock.advance(19)
        assert server.connections == 1
        assert logged() == []
        await clock.advance(2)
        assert server.connections == 0
    assert len(logged()) == 1


@pytest.mark.parametrize(
    ("keepalive", "patience"), [((20, 30), 50), ((4, 6), 20), (None, 1000)], ids=str
)
async def test_who_takes_not_even_our_pings_while_nobody_reads_from_it_is_lost(
    keepalive: tuple[float, float] | None, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that vanished while its handler was busy and its read-ahead full: nothing says so
    but that its machine acknowledges nothing. Never sooner than after ``send_timeout`` (20 s)."""
    app, clock = App(limits=Limits(read_ahead=KIB), keepalive=keepalive), FakeClock()
    ends = Ends(app, error=False)
    release = anyio.Event()
    held = 0
    monkeypatch.setattr(SocketTransport, "unacknowledged", lambda self: held)

    @app.on_message("/r")
    async def busy(ws: WebSocket, message: str) -> None:
        await release.wait()

    async with served(app, clock) as server, connected(server, "/r") as client:
        for _ in range(3):
            await client.send("x" * 2 * KIB)
            await clock.advance(1)
        await clock.advance(60)
        assert ends.told == []  # what is sent to it is taken
        for waiting in (12, 6, 18):  # one more ping, some taken, more pings
            held = waiting
            await clock.advance(1)
        await clock.advance(patience - 2.5)
        assert ends.told == []
        await clock.advance(7.5)  # and close_grace
        assert ends.told == ([] if keepalive is None else ["close connection lost: 1006"])
        release.set()


async def test_a_slow_reader_of_a_page_may_take_its_time() -> None:
    app, clock = App(), FakeClock()
    app.add_get("/page", lambda request: bytes(32 * MIB))
    async with served(app, clock) as server, await open_stream(server) as stream:
        await stream.send(b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n")
        size = 0
        for step in range(1, 4):
            while size < step * 8 * MIB:
                size += len(await stream.receive(MIB))
            await clock.advance(15)
        with anyio.fail_after(PATIENCE):
            try:
                while True:
                    size += len(await stream.receive(MIB))
            except anyio.EndOfStream:
                pass
        assert size > 32 * MIB


async def test_a_reader_of_a_page_that_stops_reading_is_dropped() -> None:
    app, clock = App(), FakeClock()
    app.add_get("/page", lambda request: bytes(32 * MIB))
    async with served(app, clock) as server, await open_stream(server) as stream:
        await stream.send(b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n")
        await stream.receive()
        await clock.advance(20.5)
        assert server.connections == 0


# Modes and messages


async def test_the_first_of_the_three_modes_is_used(logged: Callable[[], list[str]]) -> None:
    app = App()

    def on_message(ws: WebSocket, message: str) -> None:
        ws.send_text(f"on_message {message}")

    def on_json(ws: WebSocket, message: Any) -> None:
        ws.send_text(f"on_json {message}")

    async def serve(ws: WebSocket) -> None:
        async for message in ws:
            await ws.send_text(f"serve {message!r}")

    app.add_on_message("/1", on_message)
    app.add_on_json("/1", on_json)
    app.add_serve("/1", serve)
    app.add_on_json("/2", on_json)
    app.add_on_message("/2", on_message)
    app.add_on_message("/3", on_message)
    answers = []
    async with served(app) as server:
        for path in ("/1", "/2", "/3"):
            async with connected(server, path) as client:
                await client.send("[1]")
                answers.append(await client.receive())
    assert answers == ["serve '[1]'", "on_json [1]", "on_message [1]"]
    assert [line.partition(":")[0] for line in logged()] == ["/1", "/1", "/2"]


async def test_a_binary_message_where_text_is_taken_closes_with_1003() -> None:
    app = App()
    ends = Ends(app)
    handled: list[str] = []
    app.add_on_message("/r", lambda ws, message: handled.append(message))
    async with served(app) as server, connected(server, "/r") as client:
        await client.send("text")
        await client.send(b"binary")
        assert await client.closed() == (1003, "text expected")
    assert handled == ["text"]
    assert ends.told == [
        "error closed by the server: 1003 (text expected)",
        "close closed by the server: 1003 (text expected)",
    ]


async def test_the_annotation_says_which_kinds_of_messages_are_taken() -> None:
    app = App()

    @app.on_message("/bytes")
    async def take_bytes(ws: WebSocket, message: bytes) -> None:
        ws.send_bytes(message)

    @app.on_message("/both")
    async def take_both(ws: WebSocket, message: str | bytes) -> None:
        ws.send_text(repr(message))

    async with served(app) as server:
        async with connected(server, "/bytes") as client:
            await client.send(b"\x00\xff")
            assert await client.receive() == b"\x00\xff"
            await client.send("text")
            assert await client.closed() == (1003, "binary expected")
        async with connected(server, "/both") as client:
            await client.send("a")
            await client.send(b"b")
            assert [await client.receive(), await client.receive()] == ["'a'", "b'b'"]


async def test_json_is_decoded_to_what_the_handler_declares() -> None:
    class Say(msgspec.Struct, tag="say"):
        text: str

    class Move(msgspec.Struct, tag="move"):
        x: int
        y: int = 0

    app = App()

    @app.on_json("/<int:room>")
    async def take(ws: WebSocket, message: Say | Move, room: int) -> None:
        ws.send_json([room + 1, repr(message)])

    async with served(app) as server, connected(server, "/41") as client:
        await client.send_json({"type": "say", "text": "hello"})
        assert await client.receive_json() == [42, "Say(text='hello')"]
        await client.send(b'{"type": "move", "x": 3}')
        assert await client.receive_json() == [42, "Move(x=3, y=0)"]


async def test_serve_mode_receives_each_kind_as_asked() -> None:
    class Say(msgspec.Struct):
        text: str

    app = App()

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        await ws.send_text(repr(await ws.receive()))
        await ws.send_text(repr(await ws.receive_text()))
        await ws.send_text(repr(await ws.receive_json()))
        await ws.send_text(repr((await ws.receive_json(Say)).text))
        with pytest.raises(InvalidMessage):
            await ws.receive_json(Say)
        await ws.send_text("and the connection is open")
        with pytest.raises(ConnectionClosedError, match="1003"):
            await ws.receive_text()

    async with served(app) as server, connected(server, "/r") as client:
        for message in (b"1", "2", "[3]", '{"text": "4"}', "nonsense", b"6"):
            await client.send(message)
        answers = [await client.receive() for _ in range(5)]
        assert answers == ["b'1'", "'2'", "[3]", "'4'", "and the connection is open"]
        assert await client.closed() == (1003, "text expected")


async def test_invalid_json_that_a_serve_handler_lets_pass_is_the_clients_failure() -> None:
    app = App()
    ends = Ends(app)

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        await ws.receive_json(int)

    async with served(app) as server, connected(server, "/r") as client:
        await client.send("[]")
        assert (await client.closed())[0] == 1007
    assert ends.told[0] == "error InvalidMessage"
    assert ends.told[1].startswith("close closed by the server: 1007")


async def test_a_return_value_is_reported_once(logged: Callable[[], list[str]]) -> None:
    app = App()

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> Any:
        return ws.send_text("a send's own value is no mistake")

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> str:
        await ws.send_text(message)
        return message

    async with served(app) as server, connected(server, "/r") as client:
        await client.receive()
        for _ in range(3):
            await client.send("x")
            await client.receive()
    [line] = logged()
    assert "take() in" in line
    assert "returned str: it is not sent" in line


# Failures and who is told of them


async def test_invalid_json_closes_with_1007_and_tells_the_handler_once() -> None:
    class Say(msgspec.Struct):
        text: str

    app = App()
    ends = Ends(app, "/r/<room>", error=False)
    told: list[Any] = []

    @app.on_json("/r/<room>")
    async def take(ws: WebSocket, message: Say | None, room: str, error: Exception | None) -> None:
        told.append((message, room, type(error), app.rooms))
        if error is not None:
            with pytest.raises(ConnectionClosedError, match="1007"):
                ws.send_text("too late")

    async with served(app) as server, connected(server, "/r/1") as client:
        await client.send('{"text": 1}')
        await client.send('{"text": "behind it"}')
        code, reason = await client.closed()
        assert code == 1007
        assert "/r/<room>" in reason
        assert "Say" in reason
        await until(lambda: not app.rooms)
    assert told == [(None, "1", InvalidMessage, (app.room("/r/1"),))]
    assert ends.told == [f"close closed by the server: 1007 ({reason})"]


async def test_null_is_no_message_for_a_handler_that_may_get_none() -> None:
    class Say(msgspec.Struct):
        text: str

    app = App()
    told: list[Any] = []

    @app.on_json("/r")
    def take(ws: WebSocket, message: Say | None, error: Exception | None) -> None:
        told.append(type(error))

    async with served(app) as server, connected(server, "/r") as client:
        await client.send("null")
        assert (await client.closed())[0] == 1007
    assert told == [InvalidMessage]


@pytest.mark.parametrize("how", ["argument", "on_error"])
async def test_invalid_json_may_be_reported_and_the_connection_kept(how: str) -> None:
    app = App()
    ends = Ends(app, error=False)

    async def with_error(ws: WebSocket, message: int | None, error: Exception | None) -> None:
        await ws.send_text(repr(message) if error is None else f"reported: {message}")

    async def without(ws: WebSocket, message: int) -> None:
        await ws.send_text(repr(message))

    async def on_error(ws: WebSocket, error: Exception) -> None:
        await ws.send_text("reported: None")

    app.add_on_json("/r", with_error if how == "argument" else without, invalid="report")
    if how == "on_error":
        app.add_on_error("/r", on_error)
    async with served(app) as server, connected(server, "/r") as client:
        for message in ("1", "wrong", "2"):
            await client.send(message)
        assert [await client.receive() for _ in range(3)] == ["1", "reported: None", "2"]
        await client.close()
        assert await client.closed() == (1000, "")
    assert ends.told == ["close closed by the client: 1000"]


async def test_an_error_handler_that_raises_while_a_message_is_reported_costs_the_connection(
    logged: Callable[[], list[str]],
) -> None:
    app = App()

    @app.on_error("/r")
    async def on_error(ws: WebSocket, error: Exception) -> None:
        raise ZeroDivisionError

    app.add_on_json("/r", lambda ws, message: None, invalid="report")
    async with served(app) as server, connected(server, "/r") as client:
        await client.send("wrong")
        assert await client.closed() == (1011, "")
    assert len(logged()) == 1


@pytest.mark.parametrize("how", ["argument", "on_error", "serve"])
@pytest.mark.parametrize(
    ("frame", "code"), [(close(1000), 1000), (close(1001), 1001), (CLOSE_WITHOUT_CODE, 1005)]
)
async def test_a_clean_close_is_told_to_on_close_alone(how: str, frame: bytes, code: int) -> None:
    app = App()
    ends = Ends(app, error=how != "argument")

    async def take(ws: WebSocket, message: str | None, error: Exception | None) -> None:
        raise AssertionError(error)

    async def serve(ws: WebSocket) -> None:
        async for _ in ws:
            pass
        with pytest.raises(ConnectionClosedOK) as closed:
            await ws.receive()
        assert (closed.value.code, closed.value.closed_by) == (code, "client")

    if how == "serve":
        app.add_serve("/r", serve)
    elif how == "argument":
        app.add_on_message("/r", take)
    else:
        app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(frame)
        # The answer carries the same code, or none: 1005 is what an empty close frame is read as.
        assert await client.closed() == (code, "")
        await client.ended()
    assert ends.told == [f"close closed by the client: {code}"]


async def test_any_other_close_code_is_a_failure() -> None:
    app = App()
    ends = Ends(app)
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server, connected(server, "/r") as client:
        await client.close(4242, "sulking")
        assert await client.closed() == (4242, "")
    assert ends.told == [
        "error closed by the client: 4242 (sulking)",
        "close closed by the client: 4242 (sulking)",
    ]


@pytest.mark.parametrize("how", ["end of stream", "reset"])
@pytest.mark.parametrize("mode", ["argument", "on_error", "serve"])
async def test_a_loss_without_a_close_frame_is_told_once(how: str, mode: str) -> None:
    app = App()
    ends = Ends(app, error=mode != "argument")

    async def take(ws: WebSocket, message: str | None, error: Exception | None) -> None:
        ends.told.append(f"{message} {error}")

    async def serve(ws: WebSocket) -> None:
        with pytest.raises(ConnectionClosedError) as lost:
            async for _ in ws:
                pass
        ends.told.append(f"None {lost.value}")

    if mode == "serve":
        app.add_serve("/r", serve)
    elif mode == "argument":
        app.add_on_message("/r", take)
    else:
        app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server, connected(server, "/r") as client:
        await (client.reset() if how == "reset" else client.aclose())
        await ends.come()
    told = {
        "argument": ["None connection lost: 1006"],
        "on_error": ["error connection lost: 1006"],
        "serve": ["None connection lost: 1006", "error connection lost: 1006"],
    }
    assert ends.told == [*told[mode], "close connection lost: 1006"]


async def test_a_violation_of_the_protocol_is_told() -> None:
    app = App()
    ends = Ends(app)
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(BAD_FRAME)
        code, reason = await client.closed()
        assert code == 1002
        await client.ended()
    assert ends.told == [
        f"error closed by the server: 1002 ({reason})",
        f"close closed by the server: 1002 ({reason})",
    ]


async def test_a_message_above_the_limit_is_told_and_its_close_frame_arrives() -> None:
    app = App(limits=Limits(message=1000))
    ends = Ends(app)
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(text("x" * 500_000))  # much is unread when the server closes
        assert await client.closed() == (1009, "message above 1000 bytes (Limits.message)")
    assert [line.split()[0] for line in ends.told] == ["error", "close"]


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_handler_that_raises_costs_its_own_connection(
    is_async: bool, logged: Callable[[], list[str]]
) -> None:
    app = App()
    ends = Ends(app)

    def take(ws: WebSocket, message: str) -> None:
        if message == "bad":
            raise ZeroDivisionError("secret")
        ws.send_text_to_this_room(message)

    async def take_later(ws: WebSocket, message: str) -> None:
        take(ws, message)

    app.add_on_message("/r", take_later if is_async else take)
    async with (
        served(app) as server,
        connected(server, "/r") as good,
        connected(server, "/r") as bad,
    ):
        await bad.send("bad")
        assert await bad.closed() == (1011, "")
        await good.send("hello")
        assert await good.receive() == "hello"
        assert ends.told == ["close closed by the server: 1011"]
        await good.close()
        await good.closed()
    assert len(ends.told) == 2
    [line] = logged()
    assert "take" in line
    assert "/r" in line or "test_driver.py" in line


async def test_a_serve_handler_that_raises_costs_its_own_connection(
    logged: Callable[[], list[str]],
) -> None:
    app = App()
    ends = Ends(app)

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        raise ZeroDivisionError

    async with served(app) as server, connected(server, "/r") as client:
        assert await client.closed() == (1011, "")
    assert ends.told == ["close closed by the server: 1011"]
    assert "serve() in" in logged()[0]


async def _send_late(ws: WebSocket, clock: FakeClock) -> None:
    while True:
        await clock.sleep_until(clock.now() + 0.3)
        ws.send_text("are you there?")


async def _send_late_in_group(ws: WebSocket, clock: FakeClock) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(_send_late, ws, clock)


async def _receive_in_groups(ws: WebSocket, clock: FakeClock) -> None:
    async with anyio.create_task_group() as outer, anyio.create_task_group() as inner:
        outer.start_soon(checkpoint)
        inner.start_soon(ws.receive)


@pytest.mark.parametrize("serve", [_send_late, _send_late_in_group, _receive_in_groups])
@pytest.mark.parametrize("code", [1000, 4000])
async def test_a_handler_that_ends_with_its_own_connections_end_is_no_error(
    serve: Callable[[WebSocket, FakeClock], Awaitable[None]], code: int
) -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app, error=False)

    @app.serve("/r")
    async def meet(ws: WebSocket) -> None:
        await serve(ws, clock)

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.close(code)
        await clock.advance(2)
        assert await client.closed() == (code, "")
    assert ends.told == [f"close closed by the client: {code}"]


async def test_meeting_the_end_of_another_connection_is_an_error(
    logged: Callable[[], list[str]],
) -> None:
    app = App()
    known: list[WebSocket] = []

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        if message == "I":
            known.append(ws)
        else:
            known[0].send_text("hello")

    async with served(app) as server, connected(server, "/r") as other:
        async with connected(server, "/r") as one:
            await one.send("I")
            await until(lambda: known)
        await until(lambda: len(app.room("/r")) == 1)
        await other.send("call")
        assert await other.closed() == (1011, "")
    assert "ConnectionClosed" not in logged()[0]
    assert "raised; its connection is closed with 1011" in logged()[0]


async def test_a_handler_that_cannot_answer_any_more_still_gets_the_messages_that_came_before() -> (
    None
):
    """A handler that stores a message and then confirms it must see every message."""
    app, clock = App(), FakeClock()
    ends = Ends(app)
    stored: list[str] = []

    @app.on_message("/r")
    async def store(ws: WebSocket, message: str) -> None:
        await clock.sleep_until(clock.now() + 1)
        stored.append(message)
        ws.send_text("stored")

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send_raw(text("1") + text("2") + text("3") + close(1000))
        await clock.advance(4)
        await ends.come()
    assert stored == ["1", "2", "3"]
    assert ends.told == ["close closed by the client: 1000"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    "where", ["on_connect", "behind accept", "handler", "on_error", "on_close", "page"]
)
async def test_a_task_cancelled_under_a_handler_costs_that_connection_only(
    where: str, logged: Callable[[], list[str]]
) -> None:
    """On asyncio who awaits a task that somebody cancelled gets a CancelledError, which means
    nothing to the connection, and must not take the whole server along. Trio has no such thing."""
    app = App()
    ends = Ends(app, error=False)

    async def stumble(now: str) -> None:
        if now == where:
            task = asyncio.ensure_future(asyncio.sleep(100))
            task.cancel()
            await task

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        await stumble("on_connect")
        ws.accept()
        await stumble("behind accept")

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str | None, error: Exception | None) -> None:
        await stumble("handler" if error is None else "on_error")

    @app.on_close("/s")
    async def leave(ws: WebSocket, reason: ConnectionClosed) -> None:
        ends.told.append(f"close {reason}")
        await stumble("on_close")

    app.add_on_message("/s", lambda ws, message: None)

    @app.get("/r")
    async def page(request: Request) -> str:
        await stumble("page")
        return "page"

    async with served(app) as server, connected(server, "/s") as other:
        if where == "page":
            assert (await http(server, b"GET /r HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 500
        elif where == "on_connect":
            with pytest.raises(Refusal) as refusal:
                async with connected(server, "/r"):
                    pass
            assert refusal.value.status == 500
        else:
            async with connected(server, "/s" if where == "on_close" else "/r") as client:
                if where in ("behind accept", "handler"):
                    await client.send("go")
                    assert await client.closed() == (1011, "")
            await ends.come()
            assert len(ends.told) == 1
        await until(logged)
        assert len(logged()) == 1
        await other.close()
        assert await other.closed() == (1000, "")


# Membership


async def test_a_connection_may_join_and_leave_other_rooms() -> None:
    app = App(limits=Limits(rooms_per_connection=2))

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        assert ws.join("lobby") == ws.join("lobby") == app.room("lobby")
        assert ws.rooms == (ws.room, app.room("lobby"))
        with pytest.raises(RuntimeError, match="rooms_per_connection"):
            ws.join("a third")
        assert ws.send_text_to_room("lobby", "in the lobby") == 1
        ws.leave("lobby")
        ws.leave("lobby")
        assert ws.send_text_to_room("lobby", "nobody there") == 0
        with pytest.raises(ValueError, match="until it closes"):
            ws.leave("/r")
        assert app.rooms == (ws.room,)
        ws.send_text("done")

    async with served(app) as server, connected(server, "/r") as client:
        await client.send("go")
        assert [await client.receive(), await client.receive()] == ["in the lobby", "done"]


@pytest.mark.parametrize(
    "where", ["on_connect", "handler", "error", "on_close", "error and on_close", "cancelled"]
)
@pytest.mark.parametrize("mode", ["serve", "on_message"])
async def test_no_room_keeps_a_connection_whatever_raises(
    where: str, mode: str, logged: Callable[[], list[str]]
) -> None:
    app, clock = App(), FakeClock()
    story: list[str] = []

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        ws.accept()
        ws.join("other")
        ws.room.state.kept = True
        if where == "on_connect":
            raise ZeroDivisionError

    async def converse(ws: WebSocket) -> None:
        if where == "handler":
            raise ZeroDivisionError
        if where == "cancelled":
            await anyio.sleep_forever()

    async def take(ws: WebSocket, message: str) -> None:
        await converse(ws)

    async def serve(ws: WebSocket) -> None:
        await ws.receive()
        await converse(ws)
        async for _ in ws:
            pass

    @app.on_error("/r")
    async def fail(ws: WebSocket, error: Exception) -> None:
        story.append("error")
        if "error" in where:
            raise ZeroDivisionError

    @app.on_close("/r")
    async def leave(ws: WebSocket, reason: ConnectionClosed) -> None:
        story.append("close")
        if "on_close" in where:
            raise ZeroDivisionError

    if mode == "serve":
        app.add_serve("/r", serve)
    else:
        app.add_on_message("/r", take)
    async with served(app, clock) as server, connected(server, "/r", early=text("go")) as client:
        await settled()
        await client.aclose()
        await clock.advance(6)
    told_error = where not in ("on_connect", "handler")
    assert story == ["error"] * told_error + ["close"]
    assert len(logged()) == {"cancelled": 0, "error and on_close": 2}.get(where, 1)


async def test_a_closing_connection_is_no_recipient_and_not_counted() -> None:
    app = App()
    ends = Ends(app, error=False)

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        ws.close()
        assert ws not in ws.room
        assert ws.send_text_to_this_room("who is left") == 1
        assert ws.send_text_to_all("who is left") == 1
        with pytest.raises(ConnectionClosedOK):
            ws.join("another")

    async with (
        served(app) as server,
        connected(server, "/r") as one,
        connected(server, "/r") as two,
    ):
        await one.send("go")
        assert await messages(one) == []
        assert [await two.receive(), await two.receive()] == ["who is left"] * 2
    assert len(ends.told) == 2


async def test_a_rooms_state_lives_until_the_last_on_close_has_returned() -> None:
    app = App()
    release = anyio.Event()
    story: list[str] = []

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        ws.accept()
        ws.room.state.count = getattr(ws.room.state, "count", 0) + 1
        story.append(f"enter {ws.room.state.count}")

    app.add_on_message("/r", lambda ws, message: None)

    @app.on_close("/r")
    async def leave(ws: WebSocket, reason: ConnectionClosed) -> None:
        assert ws.rooms == ()
        assert len(ws.room) == 0
        await release.wait()
        ws.room.state.count -= 1
        story.append(f"leave {ws.room.state.count}")

    async with served(app) as server:
        for _ in range(2):
            async with connected(server, "/r") as client:
                await client.close()
                await client.closed()
        assert app.rooms == (app.room("/r"),)
        release.set()
        await until(lambda: not app.rooms)
        async with connected(server, "/r"):
            pass
    assert story == ["enter 1", "enter 2", "leave 1", "leave 0", "enter 1", "leave 0"]


# Closing


async def test_a_client_that_only_ended_its_sending_still_gets_the_replies() -> None:
    app = App()
    ends = Ends(app)

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        await checkpoint()
        await ws.send_text(f"{message}!")

    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(text("1") + text("2"))
        await client.stream.send_eof()
        assert await messages(client) == ["1!", "2!"]
    assert ends.told == ["error connection lost: 1006", "close connection lost: 1006"]


async def test_a_close_is_answered_within_half_a_second_while_a_handler_is_busy() -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app)
    busy, release = anyio.Event(), anyio.Event()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        busy.set()
        await release.wait()
        with pytest.raises(ConnectionClosedOK):
            ws.send_text("too late")

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send("go")
        await busy.wait()
        await client.close(1000)
        await clock.advance(0.5)
        assert await client.closed() == (1000, "")
        assert ends.told == []
        assert len(app.room("/r")) == 0
        # The socket does not wait for the handler either.
        await clock.advance(0.5)
        await client.ended()
        await client.aclose()
        await until(lambda: not server.connections)
        release.set()
        await ends.come()
    assert ends.told == ["close closed by the client: 1000"]


async def test_a_close_in_the_read_of_its_message_waits_a_moment_for_the_reply() -> None:
    app, clock = App(), FakeClock()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        await clock.sleep_until(clock.now() + 0.2)
        await ws.send_text("reply")

    async with served(app, clock) as server, connected(server, "/r") as client:
        await clock.advance(0.125)  # a round of housekeeping falls into the moment
        await client.send_raw(text("go") + close(1000))
        await settled()
        await clock.advance(0.2)
        await clock.advance(0.25)
        assert await client.receive() == "reply"
        assert await client.closed() == (1000, "")


@pytest.mark.parametrize("how", ["close frame", "end of stream", "reset", "violation"])
async def test_messages_received_before_the_end_are_handled_for_close_grace(how: str) -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app, error=False)
    handled: list[str] = []

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        try:
            await clock.sleep_until(clock.now() + 2)
        except anyio.get_cancelled_exc_class():
            handled.append(f"{message} cancelled")
            raise
        handled.append(message)

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send_raw(b"".join(text(str(number)) for number in range(1, 6)))
        await settled()
        match how:
            case "close frame":
                await client.close(1000)
            case "end of stream":
                await client.aclose()
            case "reset":
                await client.reset()
            case "violation":
                await client.send_raw(BAD_FRAME)
        await clock.advance(4.75)
        assert handled == ["1", "2"]
        await clock.advance(1)
        assert handled == ["1", "2", "3 cancelled"]
        await ends.come()
    assert len(ends.told) == 1


async def test_a_handler_that_swallows_its_cancellation_is_left_behind(
    logged: Callable[[], list[str]],
) -> None:
    app, clock = App(), FakeClock()
    told: list[str] = []
    busy, release, done = anyio.Event(), anyio.Event(), anyio.Event()

    @app.serve("/r/<name>")
    async def stubborn(ws: WebSocket, name: str) -> None:
        busy.set()
        with anyio.CancelScope(shield=True):
            await release.wait()
        done.set()

    @app.on_error("/r/<name>")
    async def fail(ws: WebSocket, error: Exception) -> None:
        told.append(f"error {error}")

    @app.on_close("/r/<name>")
    async def leave(ws: WebSocket, reason: ConnectionClosed) -> None:
        told.append(f"close {reason}")

    async with served(app, clock) as server, connected(server, "/r/x") as client:
        await busy.wait()
        await client.aclose()
        await clock.advance(1)
        assert server.connections == 0  # nobody waits for the handler with the socket
        await clock.advance(4.5)
        assert told == []
        await clock.advance(5)
        assert told == ["error connection lost: 1006", "close connection lost: 1006"]
        assert app.rooms == ()
        release.set()
        await done.wait()
    assert len(told) == 2
    [line] = logged()
    assert "stubborn() in" in line
    assert "'/r/<name>'" in line
    assert "does not stop after its cancellation" in line


async def test_what_a_handler_left_behind_returns_in_is_not_cut_short(
    logged: Callable[[], list[str]],
) -> None:
    """Its on_close runs in another task, and the room's state lives until that one returned."""
    app, clock = App(), FakeClock()
    busy, release = anyio.Event(), anyio.Event()
    story: list[str] = []

    @app.serve("/r")
    async def stubborn(ws: WebSocket) -> None:
        busy.set()
        with anyio.CancelScope(shield=True):
            await release.wait()

    @app.on_close("/r")
    async def leave(ws: WebSocket, reason: ConnectionClosed) -> None:
        ws.room.state.mark = "kept"
        release.set()
        await clock.sleep_until(clock.now() + 2)
        story.append(ws.room.state.mark)

    async with served(app, clock) as server, connected(server, "/r") as client:
        await busy.wait()
        await client.aclose()
        await clock.advance(11)
        assert app.rooms == (app.room("/r"),)
        await clock.advance(2)
    assert story == ["kept"]
    assert len(logged()) == 1


@pytest.mark.parametrize("how", ["close frame", "end of stream", "reset", "violation"])
@pytest.mark.parametrize("mode", ["serve", "on_message"])
async def test_cancel_on_disconnect_cancels_a_busy_handler_at_once(how: str, mode: str) -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app, error=False)
    busy = anyio.Event()

    async def serve(ws: WebSocket) -> None:
        busy.set()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            ends.told.append("cancelled")
            raise

    async def take(ws: WebSocket, message: str) -> None:
        await serve(ws)

    if mode == "serve":
        app.add_serve("/r", serve, cancel_on_disconnect=True)
    else:
        app.add_on_message("/r", take, cancel_on_disconnect=True)
    async with served(app, clock) as server, connected(server, "/r", early=text("go")) as client:
        await busy.wait()
        match how:
            case "close frame":
                await client.close(1000)
            case "end of stream":
                await client.aclose()
            case "reset":
                await client.reset()
            case "violation":
                await client.send_raw(BAD_FRAME)
        await clock.advance(0.75)
        await ends.come()
    assert ends.told[0] == "cancelled"
    assert len(ends.told) == 2


async def test_cancel_on_disconnect_spares_a_handler_that_is_waiting_for_a_message() -> None:
    app = App()
    story: list[str] = []

    @app.serve("/r", cancel_on_disconnect=True)
    async def serve(ws: WebSocket) -> None:
        async for message in ws:
            await checkpoint()
            story.append(str(message))
        await checkpoint()
        story.append("cleaned up")

    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(text("1") + text("2") + close(1000))
        await client.ended()
    assert story == ["1", "2", "cleaned up"]


async def test_a_send_after_the_close_raises_and_closing_twice_is_fine() -> None:
    app = App()
    ends = Ends(app)

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        await ws.close(4000, "first")
        await ws.close(4001, "second")
        for send in (ws.send_text, ws.send_json):
            with pytest.raises(ConnectionClosedOK) as closed:
                send("late")
            assert (closed.value.code, closed.value.reason) == (4000, "first")
            assert (closed.value.closed_by, closed.value.connection) == ("server", ws.id)
        with pytest.raises(ConnectionClosedOK):
            ws.send_bytes(b"late")
        with pytest.raises(ValueError, match="close code 1005"):
            ws.close(1005)

    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(text("go") + text("not handled any more"))
        assert await client.closed() == (4000, "first")
    assert ends.told == ["close closed by the server: 4000 (first)"]


async def test_a_reason_too_long_for_a_close_frame_is_cut() -> None:
    app = App()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        ws.close(4000, "é" * 100)

    async with served(app) as server, connected(server, "/r") as client:
        await client.send("go")
        assert await client.closed() == (4000, "é" * 61)


async def test_who_closes_waits_for_the_answer_then_ends_the_stream_first() -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app)
    app.add_serve("/r", _wait_for_one)
    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send("go")
        assert await client.closed() == (1000, "")
        await ends.come()
        await clock.advance(5)
        assert server.connections == 1
        await client.close(1000)  # RFC 6455, section 7.1.1: the server closes TCP first
        await client.ended()
        await settled()
        assert server.connections == 1
        await client.aclose()
        await until(lambda: not server.connections)
    assert ends.told == ["close closed by the server: 1000"]


async def _wait_for_one(ws: WebSocket) -> None:
    await ws.receive()


async def test_what_a_client_still_sends_does_not_cost_it_our_close_frame() -> None:
    app = App()
    app.add_serve("/r", _wait_for_one)
    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(text("go") + masked(0x82, bytes(100)) * 3)
        await settled()
        await client.send_raw(masked(0x89, b"ping") + masked(0x82, bytes(500 * KIB)))
        assert await client.closed() == (1000, "")  # and no pong in front of it
        await client.close()
        await client.ended()


async def test_nonsense_behind_our_close_frame_ends_the_wait_for_an_answer() -> None:
    app = App()
    ends = Ends(app)
    app.add_serve("/r", _wait_for_one)
    async with served(app) as server, connected(server, "/r") as client:
        await client.send("go")
        assert await client.closed() == (1000, "")
        await client.send_raw(BAD_FRAME)
        await client.ended()
    assert ends.told == ["close closed by the server: 1000"]


@pytest.mark.parametrize("frame", [CLOSE_WITHOUT_CODE, BAD_FRAME], ids=["close", "violation"])
async def test_who_ends_it_and_reads_nothing_is_dropped_after_close_timeout(frame: bytes) -> None:
    app, clock = App(keepalive=None, limits=Limits(outbox=64 * MIB)), FakeClock()
    ends = Ends(app, error=False)

    @app.on_message("/r")
    def take(ws: WebSocket, message: str) -> None:
        for _ in range(32):
            ws.send_bytes(bytes(MIB))  # more than the kernel takes

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send("go")
        await settled()
        await client.send_raw(frame)
        await ends.come()
        await clock.advance(9.5)
        assert server.connections == 1
        await clock.advance(0.75)
        assert server.connections == 0


@pytest.mark.parametrize("frame", [close(1000, "bye"), b""])
async def test_who_ends_its_sending_behind_its_last_message_still_gets_the_replies(
    frame: bytes,
) -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app, error=False)

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        await clock.sleep_until(clock.now() + 0.0625)
        await ws.send_text(f"{message}!")

    async with served(app, clock) as server, connected(server, "/r") as client:
        await clock.advance(0.125)
        await client.send_raw(text("1") + text("2") + text("3") + frame)
        await client.stream.send_eof()
        await settled()
        for _ in range(8):
            await clock.advance(0.0625)
        assert [await client.receive() for _ in range(3)] == ["1!", "2!", "3!"]
        assert await client.closed() == ((1000, "") if frame else (1006, ""))
        await ends.come()
    lost, clean = "close connection lost: 1006", "close closed by the client: 1000 (bye)"
    assert ends.told == [clean if frame else lost]


async def test_a_handler_goes_on_for_close_grace_after_another_closed_its_connection() -> None:
    app, clock = App(), FakeClock()
    story: list[str] = []
    known: list[WebSocket] = []

    @app.serve("/r")
    async def serve(ws: WebSocket) -> None:
        known.append(ws)
        try:
            await anyio.sleep_forever()
        finally:
            story.append("cancelled")

    @app.on_close("/r")
    async def leave(ws: WebSocket, reason: ConnectionClosed) -> None:
        story.append(f"close {reason}")

    async with served(app, clock) as server, connected(server, "/r") as client:
        await until(lambda: known)
        known[0].close(4000)
        await client.close()
        await clock.advance(4.75)
        assert story == []
        await clock.advance(0.5)
        assert story == ["cancelled", "close closed by the server: 4000"]


@pytest.mark.parametrize("when", ["in one read", "while it is busy"])
async def test_a_violation_is_answered_within_half_a_second_while_a_handler_is_busy(
    when: str,
) -> None:
    app, clock = App(), FakeClock()
    ends = Ends(app)
    busy = anyio.Event()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        ws.send_text(f"{message}!")
        busy.set()
        await clock.sleep_until(clock.now() + 100)

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.send_raw(text("go") + (BAD_FRAME if when == "in one read" else b""))
        await busy.wait()
        if when == "while it is busy":
            await clock.advance(1)
            await client.send_raw(BAD_FRAME)
        await clock.advance(0.5)
        assert await client.receive() == "go!"
        assert (await client.closed())[0] == 1002
        await client.ended()  # nor does the socket wait for the handler
        assert ends.told == []
        await clock.advance(4.25)
        assert ends.told == []
        await clock.advance(0.25)  # close_grace, since the violation
        await ends.come()
    assert [line.split()[0] for line in ends.told] == ["error", "close"]


async def test_replies_leave_in_front_of_the_close_frame_of_a_violation() -> None:
    app, clock = App(), FakeClock()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        await clock.sleep_until(clock.now() + 0.0625)
        await ws.send_text(f"{message}!")

    async with served(app, clock) as server, connected(server, "/r") as client:
        await clock.advance(0.125)  # a round of housekeeping falls in between
        await client.send_raw(text("1") + text("2") + text("3") + BAD_FRAME)
        await settled()
        for _ in range(8):
            await clock.advance(0.0625)
        assert await messages(client) == ["1!", "2!", "3!"]


# The end of a connection, in the app's functions


async def test_an_on_close_that_takes_too_long_is_cancelled(
    logged: Callable[[], list[str]],
) -> None:
    # In real time, too, it may take so long, and no longer: more than a slow machine needs here.
    app, clock = App(limits=Limits(on_close=10)), FakeClock()
    begun = anyio.Event()
    story: list[str] = []
    app.add_on_message("/r", lambda ws, message: None)

    @app.on_error("/r")
    async def fail(ws: WebSocket, error: Exception) -> None:
        story.append("error")
        await anyio.sleep_forever()

    @app.on_close("/r")
    async def leave(ws: WebSocket, reason: ConnectionClosed) -> None:
        story.append("close")
        begun.set()
        await anyio.sleep_forever()

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.aclose()
        await until(lambda: story)
        await clock.advance(9.75)
        assert story == ["error"]
        await clock.advance(0.5)
        await begun.wait()
        await clock.advance(10.25)
    assert logged() == [
        "the error handler of /r took too long (Limits.on_close): cancelled",
        "on_close of /r took too long (Limits.on_close): cancelled",
    ]


async def test_an_on_close_that_does_not_stop_keeps_no_room(
    logged: Callable[[], list[str]],
) -> None:
    app, clock = App(), FakeClock()
    begun, release = anyio.Event(), anyio.Event()
    app.add_on_message("/r", lambda ws, message: None)

    @app.on_close("/r")
    async def leave(ws: WebSocket, reason: ConnectionClosed) -> None:
        begun.set()
        with anyio.CancelScope(shield=True):
            await release.wait()

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.close()
        await begun.wait()
        await clock.advance(9.75)
        before = len(app.rooms)
        await clock.advance(0.75)
        assert (before, len(app.rooms)) == (1, 0)
        release.set()
    assert "does not stop after its cancellation" in logged()[0]


async def test_a_server_that_stops_waiting_for_an_error_handler_leaves_no_room(
    logged: Callable[[], list[str]],
) -> None:
    app, clock = App(limits=Limits(shutdown=1)), FakeClock()
    told = anyio.Event()
    app.add_on_message("/r", lambda ws, message: None)

    @app.on_error("/r")
    async def fail(ws: WebSocket, error: Exception) -> None:
        told.set()
        await anyio.sleep_forever()

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.aclose()
        await told.wait()
        server.shutdown()
        await clock.advance(1.5)
        await server.stopped()
        assert app.rooms == ()
    assert ["without waiting any longer" in line for line in logged()] == [True]


async def test_a_stop_closes_with_1001_and_tells_on_close_of_a_handler_that_goes_on(
    logged: Callable[[], list[str]],
) -> None:
    app, clock = App(limits=Limits(shutdown=1)), FakeClock()
    ends = Ends(app)
    busy = anyio.Event()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        busy.set()
        await anyio.sleep_forever()

    async with served(app, clock) as server, connected(server, "/r", early=text("go")) as client:
        await busy.wait()
        server.shutdown()
        assert await client.closed() == (1001, "")
        await clock.advance(1.5)
        await server.stopped()
    assert ends.told == ["close closed by the server: 1001"]
    assert ["without waiting any longer" in line for line in logged()] == [True]


async def test_sending_to_others_works_until_on_close_has_returned() -> None:
    app = App()

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str | None, error: Exception | None) -> None:
        assert error is not None
        assert ws.send_text_to_this_room("one failed") == 1

    @app.on_close("/r")
    async def leave(ws: WebSocket, reason: ConnectionClosed) -> None:
        if isinstance(reason, ConnectionClosedError) and len(ws.room):
            assert ws.room.send_text("one left") == 1

    async with served(app) as server, connected(server, "/r") as other:
        async with connected(server, "/r"):
            pass
        assert [await other.receive(), await other.receive()] == ["one failed", "one left"]
        await other.close()


async def test_who_sends_to_the_client_that_is_gone_when_told_of_it_is_no_error() -> None:
    app = App()
    told: list[str] = []
    app.add_on_message("/r", lambda ws, message: None)

    @app.on_error("/r")
    async def fail(ws: WebSocket, error: Exception) -> None:
        told.append("error")
        ws.send_text("what happened?")

    @app.on_close("/r")
    async def leave(ws: WebSocket, reason: ConnectionClosed) -> None:
        told.append("close")
        ws.send_text("goodbye")

    async with served(app) as server, connected(server, "/r"):
        pass
    assert told == ["error", "close"]


@pytest.mark.parametrize("end", ["the client's", "the server's", "a handler's mistake"])
async def test_who_has_left_is_freed_without_the_collector(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App()
    # A record of the log keeps an exception, and that its frames.
    monkeypatch.setattr("roomsock.dispatch.logger.disabled", True)
    monkeypatch.setattr("roomsock.driver.logger.disabled", True)
    seen: list[weakref.ref[WebSocket]] = []

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        seen.append(weakref.ref(ws))
        ws.join("other").send_text(message)
        if end == "the server's":
            ws.close()
        if end == "a handler's mistake":
            raise ValueError

    app.add_on_close("/r", lambda ws, reason: None)
    gc.disable()
    try:
        async with served(app) as server:
            for _ in range(2):
                async with connected(server, "/r") as client:
                    await client.send("hello")
                    assert await client.receive() == "hello"
                    if end == "the client's":
                        await client.close()
                    code = 1011 if end == "a handler's mistake" else 1000
                    assert await client.closed() == (code, "")
            await until(lambda: not server.connections)
            await settled()
            assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


async def test_who_awaits_what_it_sends_before_the_acceptance_lets_others_have_their_turn() -> None:
    app, turns = App(), 0

    async def others() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    @app.on_connect("/r")
    async def greet(ws: WebSocket) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(others)
            for number in range(6 * TURN_MESSAGES):
                await ws.send_text(str(number))
            tg.cancel_scope.cancel()

    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server, connected(server, "/r") as client:
        for number in range(6 * TURN_MESSAGES):
            assert await client.receive() == str(number)
        await client.close()
    assert turns >= 3


async def test_who_is_kept_after_its_end_still_says_how_it_ended() -> None:
    app, clock = App(keepalive=(20, 5)), FakeClock()
    kept: list[WebSocket] = []

    @app.serve("/r")
    async def hold(ws: WebSocket) -> None:
        kept.append(ws)
        async for _ in ws:
            pass

    async with served(app, clock) as server:
        async with connected(server, "/r") as client:
            await clock.advance(20.25)
            ping = await client.event()
            assert isinstance(ping, events.Ping)
            await clock.advance(2)
            await client.send_event(ping.response())
            await client.close(1001)
            await client.closed()
        await until(lambda: not server.connections)
        await settled()
        [ws] = kept
        assert ws.latency == 2.25
        ws.leave("other")
        ws.close()
        for method in (ws.receive_text, ws.receive):
            with pytest.raises(ConnectionClosedOK) as ended:
                await method()
            assert (ended.value.code, ended.value.closed_by) == (1001, "client")
        with pytest.raises(ConnectionClosedOK):
            ws.send_text("too late")
        with pytest.raises(ConnectionClosedOK):
            ws.join("other")


# Keepalive


async def test_a_message_that_drips_is_given_up_although_its_bytes_are_life() -> None:
    app, clock = App(limits=Limits(message_time=30), keepalive=(20, 20)), FakeClock()
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app, clock) as server, connected(server, "/r") as client:
        for byte in text("x" * 100)[:8]:
            await client.send_raw(bytes((byte,)))
            await clock.advance(5)
        code, reason = await client.closed()
        assert code == 1008
        assert "message took longer than 30 s (Limits.message_time)" in reason


# HTTP on the same port


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: x", *headers, "", ""]).encode() + body


async def test_http_handlers_return_what_they_like(tmp_path: Path) -> None:
    app = App()
    page = tmp_path / "page.css"
    page.write_bytes(b"body {}")
    app.add_get("/str", lambda request: "<p>é")
    app.add_get("/bytes", lambda request: b"\x00")
    app.add_get("/dict", lambda request: {"a": 1})
    app.add_get("/path", lambda request: page)
    app.add_get("/response", lambda request: Response("made", 201, {"X-A": "b"}))

    @app.get("/value/<int:number>")
    async def value(request: Request, number: int) -> str:
        await checkpoint()
        return f"{number + 1} {request.query['q']}"

    async with served(app) as server:
        status, headers, body = await http(server, request("GET /str"))
        assert (status, body) == (200, "<p>é".encode())
        assert headers["content-type"] == "text/html; charset=utf-8"
        assert headers["connection"] == "close"
        status, headers, body = await http(server, request("GET /bytes"))
        assert (status, body, headers["content-type"]) == (200, b"\x00", "application/octet-stream")
        status, headers, body = await http(server, request("GET /dict"))
        assert (status, body, headers["content-type"]) == (200, b'{"a":1}', "application/json")
        status, headers, body = await http(server, request("GET /path"))
        assert (status, body) == (200, b"body {}")
        assert headers["content-type"] == "text/css; charset=utf-8"
        status, headers, body = await http(server, request("GET /response"))
        assert (status, body, headers["x-a"]) == (201, b"made", "b")
        assert (await http(server, request("GET /value/41?q=yes")))[2] == b"42 yes"


async def test_head_is_answered_like_get_without_the_body() -> None:
    app = App()
    app.add_get("/page", lambda request: "12345")
    async with served(app) as server:
        status, headers, body = await http(server, request("HEAD /page"))
        assert (status, headers["content-length"], body) == (200, "5", b"")


async def test_a_post_handler_gets_the_body() -> None:
    app = App()

    @app.post("/form")
    async def form(request: Request) -> bytes:
        return request.body[::-1]

    async with served(app) as server:
        sent = request("POST /form", "Content-Length: 3", body=b"abc")
        status, _, body = await http(server, sent)
        assert (status, body) == (200, b"cba")


async def test_an_http_handler_may_say_how_many_it_sent_to() -> None:
    app = App()
    app.add_on_message("/r", lambda ws, text: None)
    app.add_post("/notify", lambda request: {"delivered": app.room("/r").send_text("news")})
    async with served(app) as server, connected(server, "/r") as client:
        status, _, body = await http(server, request("POST /notify", "Content-Length: 0"))
        assert (status, body) == (200, b'{"delivered":1}')
        assert await client.receive() == "news"


async def test_a_method_that_is_not_declared_gets_405_with_those_that_are() -> None:
    app = App()
    app.add_get("/get", lambda request: "")
    app.add_post("/post", lambda request: "")
    app.add_get("/both", lambda request: "")
    app.add_post("/both", lambda request: "")
    async with served(app) as server:
        answers = [
            await http(server, request("POST /get", "Content-Length: 0")),
            await http(server, request("GET /post")),
            await http(server, request("DELETE /both")),
        ]
        assert [answer[0] for answer in answers] == [405, 405, 405]
        allowed = [answer[1]["allow"] for answer in answers]
        assert allowed == ["GET, HEAD", "POST", "GET, HEAD, POST"]


async def test_a_plain_request_for_a_websocket_gets_426() -> None:
    app = App()
    app.add_on_message("/r", lambda ws, message: None)
    async with served(app) as server:
        status, headers, _ = await http(server, request("GET /r"))
        assert (status, headers["sec-websocket-version"]) == (426, "13")
        assert headers["upgrade"] == "websocket"
        assert "upgrade" in headers["connection"].lower()


async def test_an_unknown_path_gets_404_and_nonsense_400() -> None:
    app = App()
    app.add_get("/page", lambda request: "page")
    async with served(app) as server:
        assert (await http(server, request("GET /unknown")))[0] == 404
        assert (await http(server, request("PUT /unknown", "Content-Length: 1") + b"x"))[0] == 404
        assert (await http(server, request("BREW /page")))[0] == 501
        assert (await http(server, request("GET /%00")))[0] == 400
        assert (await http(server, b"nonsense\r\n\r\n"))[0] == 400


async def test_an_http_handler_may_reject() -> None:
    app = App()

    @app.get("/page")
    def page(request: Request) -> str:
        raise Reject(302, headers=[("Location", "/elsewhere")])

    async with served(app) as server:
        status, headers, _ = await http(server, request("GET /page"))
        assert (status, headers["location"]) == (302, "/elsewhere")


def _raise(request: Request) -> str:
    raise ZeroDivisionError("secret")


@pytest.mark.parametrize(
    "page",
    [
        _raise,
        lambda request: 42,
        lambda request: Response("x", headers=(("Bad\nname", "x"),)),
    ],
    ids=["raises", "wrong type", "bad header"],
)
async def test_an_http_handler_that_fails_gets_500_without_its_reason(
    page: Callable[[Request], Any], logged: Callable[[], list[str]]
) -> None:
    app = App()
    app.add_get("/page", page)
    async with served(app) as server:
        status, _, body = await http(server, request("GET /page"))
        assert (status, body) == (500, b"internal server error\n")
    assert len(logged()) == 1


async def test_a_client_that_leaves_before_its_request_is_nobodys_error() -> None:
    app = App()
    app.add_get("/page", lambda request: "page")
    async with served(app) as server:
        async with await open_stream(server) as stream:
            await stream.send(b"GET /pa")
        async with await open_stream(server) as stream:
            sock = stream.extra(anyio.abc.SocketAttribute.raw_socket)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await until(lambda: server.counters.connections == 2)


# Found by attacking it


@pytest.mark.parametrize("sends", [False, True])
async def test_a_client_that_filled_the_read_ahead_and_reset_does_not_stay(sends: bool) -> None:
    app = App(limits=Limits(read_ahead=4 * KIB))
    ends = Ends(app)
    clock = FakeClock()

    @app.serve("/r")
    async def produce(ws: WebSocket) -> None:
        while True:
            if sends:
                ws.send_text("tick")
            await clock.sleep_until(clock.now() + 1)

    async with served(app, clock) as server, connected(server, "/r") as client:
        await clock.advance(1)  # reading is with the task that reads ahead now
        for _ in range(20):
            await client.send("x" * KIB)
        await clock.advance(1)
        await client.reset()
        await clock.advance(15)
        await ends.come()
    assert ends.told == ["error connection lost: 1006", "close connection lost: 1006"]


async def test_on_close_is_told_also_when_a_stop_cuts_the_error_handler_short(
    logged: Callable[[], list[str]],
) -> None:
    app = App(limits=Limits(shutdown=1, on_close=5))
    clock = FakeClock()
    told: list[str] = []
    app.add_on_message("/r", lambda ws, text: None)

    @app.on_error("/r")
    async def failed(ws: WebSocket, error: Exception) -> None:
        told.append("error")
        await anyio.sleep_forever()

    @app.on_close("/r")
    async def left(ws: WebSocket, reason: ConnectionClosed) -> None:
        await checkpoint()
        told.append("close")

    async with served(app, clock) as server, connected(server, "/r") as client:
        await client.reset()
        await until(lambda: told)
        server.shutdown()
        await clock.advance(2)
        await server.stopped()
    assert told == ["error", "close"]
    assert any("stopped without waiting" in line for line in logged())


async def test_what_a_cancelled_task_group_raises_costs_its_own_connection(
    logged: Callable[[], list[str]],
) -> None:
    app = App(limits=Limits(close_grace=1, on_close=1))
    clock = FakeClock()
    closed: list[str] = []

    async def spoil() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("in its clean-up")

    @app.serve("/r")
    async def handle(ws: WebSocket) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(spoil)

    @app.on_close("/r")
    async def left(ws: WebSocket, reason: ConnectionClosed) -> None:
        closed.append(ws.id)
        async with anyio.create_task_group() as tg:
            tg.start_soon(spoil)

    app.add_on_message("/echo", lambda ws, text: ws.send_text(text))
    async with served(app, clock) as server, connected(server, "/echo") as other:
        async with connected(server, "/r") as client:
            await client.close()
            await clock.advance(6)
            await until(lambda: closed)
            await clock.advance(6)
        await other.send("still here")
        assert await other.receive() == "still here"
    assert len(closed) == 1
    assert any("on_close of /r" in line for line in logged())


@only_linux  # where every address of 127.0.0.0/8 is one's own
async def test_a_crowd_from_one_address_leaves_room_for_the_others(
    logged: Callable[[], list[str]],
) -> None:
    app = App(limits=Limits(connections=20, connections_per_address=3))
    app.add_on_message("/r", lambda ws, text: ws.send_text(text))
    async with served(app) as server:
        host, port = server.addresses[0]
        async with AsyncExitStack() as crowd:
            for _ in range(40):
                stream = await anyio.connect_tcp(host, int(port), local_host="127.0.0.2")
                crowd.push_async_callback(anyio.aclose_forcefully, stream)
            async with connected(server, "/r") as client:
                await client.send("let me in")
                assert await client.receive() == "let me in"
                assert server.connections <= 6
    assert len(logged()) == 1  # for all of them


# Compression


class OtherClient:
    """A client of other make: the protocol of the websockets package, and its compression."""

    def __init__(self, stream: anyio.abc.ByteStream, path: str, settings: dict[str, Any]) -> None:
        self.stream = stream
        factory = ClientPerMessageDeflateFactory(**settings)
        uri = parse_uri(f"ws://testserver{path}")
        self.protocol = ClientProtocol(uri, extensions=[factory])
        self.raw = 0  # bytes received behind the 101
        self.compressed = 0  # messages that came compressed
        self.events: deque[Any] = deque()

    async def handshake(self) -> None:
        self.protocol.send_request(self.protocol.connect())
        await self._flush()
        response = await self._event()
        assert self.protocol.handshake_exc is None, self.protocol.handshake_exc
        assert response.headers["Sec-WebSocket-Extensions"].startswith("permessage-deflate")
        self.raw = 0

    async def _flush(self) -> None:
        with anyio.fail_after(PATIENCE):
            for data in self.protocol.data_to_send():
                await self.stream.send(data)

    async def _event(self) -> Any:
        with anyio.fail_after(PATIENCE):
            while not self.events:
                data = await self.stream.receive()
                self.raw += len(data)
                self.protocol.receive_data(data)
                assert self.protocol.parser_exc is None, self.protocol.parser_exc
                self.events.extend(self.protocol.events_received())
        return self.events.popleft()

    async def send(self, message: str | bytes) -> None:
        if isinstance(message, str):
            self.protocol.send_text(message.encode())
        else:
            self.protocol.send_binary(message)
        await self._flush()

    async def receive(self) -> str | bytes:
        frame = await self._event()
        assert isinstance(frame, Frame)
        assert frame.fin
        return frame.data.decode() if frame.opcode is Opcode.TEXT else bytes(frame.data)


@asynccontextmanager
async def other_client(
    server: Any, path: str = "/r", *, tls: ssl.SSLContext | None = None, **settings: Any
) -> AsyncIterator[OtherClient]:
    stream = await open_stream(server, tls=tls)
    client = OtherClient(stream, path, settings)
    try:
        await client.handshake()
        yield client
    finally:
        await anyio.aclose_forcefully(stream)


def compressible(number: int, size: int = 20 * KIB) -> str:
    """Text that begins with a number and shrinks by about a quarter, like no other."""
    noise = random.Random(number).randbytes(size * 3 // 4)
    return f"{number} " + base64.b64encode(noise).decode()


DEFAULT = True
TAKEOVER = Compression(context_takeover=True)
WINDOW_9 = Compression(threshold=1, level=9, window_bits=9)
TAKEOVER_10 = Compression(threshold=1, level=1, window_bits=10, context_takeover=True)
NAMES = {
    DEFAULT: "default",
    TAKEOVER: "takeover",
    WINDOW_9: "window 9",
    TAKEOVER_10: "takeover, window 10",
}
by_settings = pytest.mark.parametrize("compression", NAMES, ids=NAMES.get)


def clients(*rows: tuple[dict[str, Any], list[bool | Compression]]) -> pytest.MarkDecorator:
    """Each client's settings, with those of the app that they tell from other clients'."""
    return pytest.mark.parametrize(
        ("settings", "compression"),
        [
            pytest.param(settings, compression, id=f"{settings}-{NAMES[compression]}")
            for settings, apps in rows
            for compression in apps
        ],
    )


TALK: list[str | bytes] = [
    "",
    b"",
    "h\u00e9llo",
    json.dumps([{"user": "ann", "text": "h\u00e9llo, wörld"}] * 200),
    random.Random(1).randbytes(20_000),
    b"",
    compressible(1, 300_000),
    bytes(200_000),
    "x" * 127,
    "x" * 128,
]


def echo_app(compression: bool | Compression, **options: Any) -> App:
    app = App(compression=compression, **options)

    @app.on_message("/r")
    async def echo(ws: WebSocket, message: str | bytes) -> None:
        if isinstance(message, str):
            await ws.send_text(message)
        else:
            await ws.send_bytes(message)

    return app


@clients(
    ({}, [*NAMES]),
    ({"client_max_window_bits": None}, [DEFAULT, TAKEOVER_10]),
    ({"client_max_window_bits": 9, "server_max_window_bits": 9}, [DEFAULT, TAKEOVER]),
    ({"server_max_window_bits": 12}, [DEFAULT, TAKEOVER]),
    ({"server_no_context_takeover": True}, [TAKEOVER]),
    ({"server_no_context_takeover": True, "client_no_context_takeover": True}, [TAKEOVER]),
    ({"compress_settings": {"level": 0}}, [DEFAULT, TAKEOVER]),
    ({"compress_settings": {"strategy": zlib.Z_HUFFMAN_ONLY, "memLevel": 1}}, [TAKEOVER]),
)
async def test_what_the_websockets_package_compresses_is_echoed_compressed(
    settings: dict[str, Any], compression: bool | Compression
) -> None:
    app = echo_app(compression)
    async with served(app) as server, other_client(server, **settings) as client:
        for message in TALK * 2:
            await client.send(message)
            assert await client.receive() == message
        assert client.raw < sum(map(len, TALK)) * 2 * 0.75


@clients(
    ({}, [*NAMES]),
    ({"client_no_context_takeover": True, "server_no_context_takeover": True}, [TAKEOVER]),
    ({"client_max_window_bits": 9, "server_max_window_bits": 9}, [DEFAULT, TAKEOVER]),
    ({"client_max_window_bits": 12, "server_no_context_takeover": True}, [TAKEOVER_10]),
)
async def test_what_wsproto_compresses_is_echoed(
    settings: dict[str, Any], compression: bool | Compression
) -> None:
    app = echo_app(compression)
    deflate = PerMessageDeflate(**settings)
    async with served(app) as server, connected(server, "/r", deflate=deflate) as client:
        assert deflate.enabled()
        for message in TALK * 2:
            await client.send(message)
            assert await client.receive() == message


async def test_who_offers_no_compression_gets_none_and_an_app_without_declines() -> None:
    long = "x" * 1000
    async with served(echo_app(True)) as server, connected(server, "/r") as client:
        assert "sec-websocket-extensions" not in client.headers
        await client.send(long)
        assert await client.receive() == long
    deflate = PerMessageDeflate()
    app = echo_app(False)
    async with served(app) as server, connected(server, "/r", deflate=deflate) as client:
        assert "sec-websocket-extensions" not in client.headers
        await client.send(long)
        assert await client.receive() == long


@pytest.mark.parametrize("takeover", [False, True], ids=["shared", "takeover"])
async def test_members_with_and_without_compression_see_one_order(takeover: bool) -> None:
    app = App(compression=Compression(context_takeover=takeover))
    count = 60

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        for number in range(count):
            body = compressible(number, 1000) if number % 3 else "short"
            ws.send_text_to_this_room(f"{number} {body}")
            if number % 7 == 0:
                ws.send_text(f"direct, {body}")
            if number % 10 == 0:
                await checkpoint()

    async with (
        served(app) as server,
        connected(server, "/r") as plain,
        connected(server, "/r", deflate=PerMessageDeflate()) as one,
        connected(server, "/r", deflate=PerMessageDeflate(server_max_window_bits=9)) as two,
        other_client(server) as three,
        other_client(server, server_max_window_bits=9) as four,
        other_client(server, server_no_context_takeover=True) as speaker,
    ):
        await speaker.send("go")
        told: list[list[str | bytes]] = []
        for client in (plain, one, two, three, four):
            # 3.10 awaits in no comprehension within another
            told.append([await client.receive() for _ in range(count)])  # noqa: PERF401
        assert [str(line).split()[0] for line in told[0]] == [str(n) for n in range(count)]
        assert all(lines == told[0] for lines in told)
        heard = [str(await speaker.receive()) for _ in range(count + (count + 6) // 7)]
        assert [line for line in heard if not line.startswith("direct")] == told[0]
        for at, line in enumerate(heard):
            if line.startswith("direct"):
                assert int(heard[at - 1].split()[0]) % 7 == 0
                assert heard[at - 1].endswith(line.removeprefix("direct, "))


@by_settings
async def test_every_send_reaches_those_it_names_compressed(
    compression: bool | Compression,
) -> None:
    app = App(compression=compression)
    value = {"text": "what one says to the others; " * 50}
    long = value["text"]

    @app.on_message("/r")
    async def take(ws: WebSocket, message: str) -> None:
        ws.join("more")
        ws.send_json(value)
        ws.send_bytes(long.encode())
        app.room("/r").send_text(f"others {long}", exclude=ws)
        ws.send_json_to_room("more", [value])
        app.all.send_bytes(long.encode() * 2)
        app.all.send_json([value] * 2)

    app.add_on_message("/other", lambda ws, message: None)
    async with (
        served(app) as server,
        other_client(server) as speaker,
        connected(server, "/r", deflate=PerMessageDeflate()) as member,
        other_client(server, "/other") as stranger,
    ):
        await speaker.send("go")
        assert json.loads(await speaker.receive()) == value
        assert await speaker.receive() == long.encode()
        assert json.loads(await speaker.receive()) == [value]
        assert await member.receive() == f"others {long}"
        for client in (speaker, member, stranger):
            assert await client.receive() == long.encode() * 2
            assert json.loads(await client.receive()) == [value] * 2
        assert speaker.raw < len(long) * 1.2


async def test_a_broadcast_on_the_wire_is_compressed_once_for_each_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = App(compression=True)
    app.add_on_message("/r", lambda ws, message: None)
    made: list[Any] = []
    make = zlib.compressobj

    def compressobj(*args: Any) -> Any:
        made.append(args)
        return make(*args)

    async with served(app) as server, AsyncExitStack() as crowd:
        members = [
            await crowd.enter_async_context(
                other_client(server, server_max_window_bits=9 if number % 2 else None)
            )
            for number in range(10)
        ]
        with monkeypatch.context() as patch:
            patch.setattr(zlib, "compressobj", compressobj)
            assert await app.room("/r").send_text(compressible(0)) == 10
        for member in members:
            assert await member.receive() == compressible(0)
        assert len(made) == 2


@by_settings
async def test_what_is_sent_before_and_behind_the_acceptance_is_understood(
    compression: bool | Compression,
) -> None:
    app = App(compression=compression)
    long = "x" * 1000

    @app.on_connect("/r")
    def enter(ws: WebSocket) -> None:
        ws.send_text(f"before {long}")
        ws.accept()
        ws.send_text(f"behind {long}")
        ws.send_text_to_this_room(f"room {long}")

    app.add_on_message("/r", lambda ws, message: None)
    async with (
        served(app) as server,
        connected(server, "/r", deflate=PerMessageDeflate()) as one,
        other_client(server) as two,
    ):
        assert [await two.receive() for _ in "123"] == [
            f"{what} {long}" for what in ("before", "behind", "room")
        ]
        assert [await one.receive() for _ in "1234"] == [
            f"{what} {long}" for what in ("before", "behind", "room", "room")
        ]


async def test_compressed_messages_right_behind_the_request_are_handled() -> None:
    app = App(compression=True)
    release = anyio.Event()

    @app.on_connect("/r")
    async def enter(ws: WebSocket) -> None:
        await release.wait()

    app.add_on_message("/r", lambda ws, text: ws.send_text(text))
    whole = masked(0xC1, deflated(b"1" * 500))
    halves = deflated(b"2" * 500)
    early = whole + masked(0x41, halves[:5]) + masked(0x80, halves[5:]) + text("3")
    async with served(app) as server, anyio.create_task_group() as tg:

        async def let_in() -> None:
            await settled()
            release.set()

        tg.start_soon(let_in)
        deflate = PerMessageDeflate()
        async with connected(server, "/r", early=early, deflate=deflate) as client:
            received = [await client.receive() for _ in "123"]
            assert received == ["1" * 500, "2" * 500, "3"]


async def test_a_frame_that_claims_to_be_compressed_without_an_agreement_is_an_error() -> None:
    app = echo_app(True)
    ends = Ends(app)
    async with served(app) as server, connected(server, "/r") as client:
        await client.send_raw(masked(0xC1, deflated(b"hello")))
        assert (await client.closed())[0] == 1002
    assert ends.told[-1].startswith("close closed by the server: 1002")


async def test_what_inflates_beyond_the_limit_is_refused_by_its_name() -> None:
    app = echo_app(True, limits=Limits(message=100_000))
    ends = Ends(app)
    deflate = PerMessageDeflate()
    async with served(app) as server, connected(server, "/r", deflate=deflate) as client:
        await client.send(bytes(100_000))
        assert await client.receive() == bytes(100_000)
        await client.send(bytes(100_001))
        told = (1009, "message above 100000 bytes (Limits.message)")
        assert await client.closed() == told
    assert ends.told == [
        f"{what} closed by the server: 1009 ({told[1]})" for what in ("error", "close")
    ]


def narrow(server: Server) -> Server:
    """What is accepted from now on has a kernel that keeps little for who does not read."""
    server._listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * KIB)
    return server


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
async def test_compressed_messages_are_dropped_and_counted_as_whole_messages(
    policy: Any, logged: Callable[[], list[str]]
) -> None:
    app = App(slow_consumers=policy, compression=True, limits=Limits(outbox=512 * KIB))
    app.add_on_message("/r", lambda ws, message: None)
    size, count = 32 * KIB, 100
    async with served(app) as server, other_client(narrow(server)) as slow:
        for number in range(count):
            app.room("/r").send_text(compressible(number, size))
            await settled()
        dropped = server.counters.dropped_messages
        assert 1 < dropped < count
        received = [str(await slow.receive()) for _ in range(count - dropped)]
        numbers = [int(line.split()[0]) for line in received]
        assert numbers == sorted(set(numbers))
        assert (count - 1 in numbers) is (policy == "drop_oldest")
        assert received[-1] == compressible(numbers[-1], size)
        # Who reads again gets what comes now.
        app.room("/r").send_text(compressible(count, size))
        assert await slow.receive() == compressible(count, size)
    assert len(logged()) == 1


@pytest.mark.parametrize("takeover", [False, True], ids=["shared", "takeover"])
async def test_a_slow_member_is_closed_with_compression_too(
    takeover: bool, logged: Callable[[], list[str]]
) -> None:
    compression = Compression(context_takeover=takeover, level=1)
    app = App(compression=compression, limits=Limits(outbox=512 * KIB))
    app.add_on_message("/r", lambda ws, message: None)
    deflate = PerMessageDeflate()
    async with served(app) as server, connected(narrow(server), "/r", deflate=deflate) as slow:
        sent = 0
        while len(app.room("/r")):
            app.room("/r").send_text(compressible(sent, 32 * KIB))
            sent += 1
            await settled()
        assert server.counters.slow_consumers == 1
        received = await messages(slow)
        assert received == [compressible(number, 32 * KIB) for number in range(len(received))]
        assert 0 < len(received) < sent
    assert "is too slow (Limits.outbox" in logged()[0]


@by_settings
async def test_compression_works_behind_tls(
    compression: bool | Compression, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    ours, theirs = contexts
    app = echo_app(compression)
    async with (
        served(app, tls=ours) as server,
        other_client(server, tls=theirs) as client,
        connected(server, "/r", tls=theirs, deflate=PerMessageDeflate()) as other,
    ):
        for message in TALK:
            for each in (client, other):
                await each.send(message)
                assert await each.receive() == message
        app.room("/r").send_text(compressible(5))
        assert await client.receive() == await other.receive() == compressible(5)
