"""From messages to handlers: who is called with what, and what becomes of what they raise."""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable, Generator, Iterable
from functools import partial, wraps
from typing import Any

import anyio
import pytest

from roomsock.dispatch import Dispatcher, Endpoint
from roomsock.errors import (
    CloseCode,
    ConnectionClosed,
    ConnectionClosedError,
    ConnectionClosedOK,
    InvalidMessage,
    Reject,
)
from roomsock.http import Request, Response
from roomsock.messages import JsonDecoder
from roomsock.protocol.frames import TEXT, encode_frame
from roomsock.rooms import Registry
from roomsock.routing import Pattern, Router
from roomsock.signatures import Role, inspect_handler
from roomsock.websocket import WebSocket

from .fakes import FakeLink, run, websocket

PATH = "/chat/<room>"


def endpoint(
    path: str = PATH,
    *,
    json: Any = None,
    takes: frozenset[type] = frozenset({str}),
    invalid: Any = "close",
    **functions: Callable[..., Any],
) -> Endpoint:
    """What an app resolves for one path; functions by the name of their role."""
    pattern = Pattern(path)
    roles = {Role(name): function for name, function in functions.items()}
    return Endpoint(
        path,
        {role: inspect_handler(function, role, pattern) for role, function in roles.items()},
        invalid=invalid,
        decoder=JsonDecoder(json, path) if json is not None else None,
        takes=takes,
    )


def dispatcher(*endpoints: Endpoint) -> Dispatcher:
    router: Router[Endpoint] = Router()
    for each in endpoints:
        router.add(Pattern(each.path), each)
    return Dispatcher(router, Registry())


def conversation(end: Endpoint, link: FakeLink) -> WebSocket:
    """Let an endpoint handle what a link yields, to the end."""
    ws = websocket(link, params={"room": "blue"})
    run(converse(ws, link, end))
    return ws


async def converse(ws: WebSocket, link: FakeLink, end: Endpoint) -> None:
    """What the driver does with what a handler raises."""
    assert end.mode is not None
    dispatch = dispatcher(end)
    try:
        await dispatch.converse(ws, link, end)
    except Exception as error:
        dispatch.failed(ws, link, end.mode.location, error)


def opening(end: Endpoint) -> tuple[Response | None, FakeLink]:
    link = FakeLink(accepted=False)
    ws = websocket(link, params={"room": "blue"})
    return run(dispatcher(end).connect(ws, link, end)), link


def answer(end: Endpoint, method: str = "GET", path: str = "/chat/blue") -> Response:
    return run(dispatcher(end).respond(Request(method, path, path, b"")))


async def nothing(ws: Any) -> None: ...


def text(content: str) -> bytes:
    return encode_frame(TEXT, content.encode())


class OwnAwaitable:
    """Something to wait for that is no coroutine."""

    def __init__(self, value: Any = None) -> None:
        self.awaited = 0
        self._value = value

    def __await__(self) -> Generator[Any, Any, Any]:
        self.awaited += 1
        yield from ()
        return self._value


class Group(Exception):
    """What stands for an exception group on Python 3.10, too."""

    def __init__(self, *exceptions: BaseException) -> None:
        self.exceptions = exceptions


# Finding an endpoint


def test_a_path_leads_to_its_endpoint_with_the_values_in_it() -> None:
    room, number = endpoint(serve=nothing), endpoint("/n/<int:id>", serve=nothing)
    found = dispatcher(room, number)
    assert found.find("/chat/blue") == (room, {"room": "blue"})
    assert found.find("/n/5") == (number, {"id": 5})
    assert found.find("/n/x") is None
    assert isinstance(found.registry, Registry)


def test_serve_comes_before_on_json_before_on_message() -> None:
    functions: dict[str, Any] = {
        "on_message": lambda ws, text: None,
        "on_json": lambda ws, message: None,
        "serve": nothing,
    }
    while functions:
        mode = endpoint(**functions).mode
        assert mode is not None
        assert mode.function is functions.pop(mode.role.value)
    assert endpoint(get=lambda request: "").mode is None


# HTTP


def test_a_path_that_is_not_there_is_a_404() -> None:
    response = answer(endpoint(serve=nothing), path="/nowhere")
    assert (response.status, response.content) == (404, b"no such path\n")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_get_answers_get_and_head_with_path_values_by_name(method: str) -> None:
    def page(request: Request, room: str) -> str:
        return f"{request.method} {room}"

    assert answer(endpoint(get=page), method).content == f"{method} blue".encode()


def test_post_has_a_handler_of_its_own() -> None:
    end = endpoint(get=lambda request: "got", post=lambda request: {"posted": 1})
    assert answer(end, "POST").content == b'{"posted":1}'
    assert answer(end, "GET").content == b"got"


@pytest.mark.parametrize(
    ("functions", "method", "allow"),
    [
        ({"get": lambda request: ""}, "POST", "GET, HEAD"),
        ({"post": lambda request: ""}, "GET", "POST"),
        ({"post": lambda request: "", "serve": nothing}, "HEAD", "POST"),
        ({"get": lambda request: "", "serve": nothing}, "POST", "GET, HEAD"),
        ({"get": lambda request: "", "post": lambda request: ""}, "PUT", "GET, HEAD, POST"),
        ({"get": lambda request: "", "serve": nothing}, "DELETE", "GET, HEAD"),
        ({"post": lambda request: ""}, "OPTIONS", "POST"),
    ],
)
def test_another_method_is_a_405_that_says_which_would_do(
    functions: dict[str, Any], method: str, allow: str
) -> None:
    response = answer(endpoint(**functions), method)
    assert (response.status, dict(response.headers)) == (405, {"allow": allow})


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_a_path_that_is_a_websocket_alone_is_a_426(method: str) -> None:
    response = answer(endpoint(serve=nothing), method)
    assert response.status == 426
    assert dict(response.headers) == {"upgrade": "websocket", "sec-websocket-version": "13"}


def test_an_async_handler_answers_as_a_plain_one() -> None:
    async def page(request: Request) -> Response:
        return Response("teapot", 418)

    assert answer(endpoint(get=page)).status == 418


def test_whatever_awaitable_a_handler_returns_is_waited_for() -> None:
    async def page(request: Request) -> str:
        return "page"

    assert answer(endpoint(get=lambda request: page(request))).content == b"page"
    assert answer(endpoint(get=partial(page))).content == b"page"
    assert answer(endpoint(get=lambda request: OwnAwaitable("own"))).content == b"own"


@pytest.mark.parametrize("wrap", [lambda e: e, Group, lambda e: Group(Group(e))])
def test_a_reject_of_a_handler_is_the_answer_also_out_of_a_task_group(
    wrap: Callable[[Exception], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    def page(request: Request) -> None:
        raise wrap(Reject(302, "", [("location", "/login")]))

    response = answer(endpoint(get=page))
    assert (response.status, response.headers) == (302, (("location", "/login"),))
    assert caplog.records == []


@pytest.mark.parametrize(
    "page",
    [
        lambda request: 1 / 0,
        lambda request: None,
        lambda request: {"a": object()},
        lambda request: OwnAwaitable(5),
    ],
)
def test_a_handler_that_fails_is_a_500_without_details(
    page: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    response = answer(endpoint(get=page))
    assert (response.status, response.content) == (500, b"internal server error\n")
    (record,) = caplog.records
    assert record.exc_info
    assert "<lambda>() in " in record.getMessage()
    assert record.getMessage().endswith("raised; '/chat/blue' answered 500")


def test_two_rejects_at_once_are_a_failure() -> None:
    def page(request: Request) -> None:
        raise Group(Reject(403), Reject(404))

    assert answer(endpoint(get=page)).status == 500


# on_connect


def test_without_on_connect_a_connection_is_accepted() -> None:
    response, link = opening(endpoint(serve=nothing))
    assert response is None
    assert link.answer == (None, [])


@pytest.mark.parametrize("explicitly", [True, False])
def test_a_connection_is_accepted_once_whether_on_connect_does_it_or_not(explicitly: bool) -> None:
    async def enter(ws: WebSocket, room: str) -> None:
        ws.state.room = room
        if explicitly:
            ws.accept(headers=[("x-a", "1")])

    response, link = opening(endpoint(serve=nothing, on_connect=enter))
    assert response is None
    assert link.answer == (None, [("x-a", "1")] if explicitly else [])
    assert link.ws.state.room == "blue"


@pytest.mark.parametrize("wrap", [lambda e: e, Group])
def test_a_reject_before_the_acceptance_is_the_answer(
    wrap: Callable[[Exception], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    def enter(ws: WebSocket) -> None:
        raise wrap(Reject(403, "members only", [("x-why", "closed")]))

    response, link = opening(endpoint(serve=nothing, on_connect=enter))
    assert response == Response("members only", 403, (("x-why", "closed"),))
    assert not link.accepted
    assert caplog.records == []


def test_on_connect_that_fails_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    def enter(ws: WebSocket) -> None:
        raise KeyError("secret")

    response, link = opening(endpoint(serve=nothing, on_connect=enter))
    assert response is not None
    assert (response.status, response.content) == (500, b"internal server error\n")
    assert not link.accepted
    assert "enter() in " in caplog.text
    assert "KeyError: 'secret'" in caplog.text


@pytest.mark.parametrize("error", [Reject(403), KeyError("x")])
def test_on_connect_that_fails_after_the_acceptance_costs_the_connection(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def enter(ws: WebSocket) -> None:
        ws.accept()
        raise error

    response, link = opening(endpoint(serve=nothing, on_connect=enter))
    assert response is None
    assert link.crashes == [error]
    assert "enter() in " in caplog.text


def test_an_acceptance_that_fails_without_a_handler_is_a_500(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The opening may be over by then."""

    class TooLate(FakeLink):
        def accept(self, *args: Any) -> None:
            raise RuntimeError("too late")

    end = endpoint(serve=nothing)
    link = TooLate(accepted=False)
    ws = websocket(link)
    response = run(dispatcher(end).connect(ws, link, end))
    assert response is not None
    assert response.status == 500
    assert "accepting raised; '/chat/blue' answered 500" in caplog.text


def test_on_connect_that_returns_false_is_told_how_to_refuse(
    caplog: pytest.LogCaptureFixture,
) -> None:
    response, link = opening(endpoint(serve=nothing, on_connect=lambda ws: False))
    assert response is None
    assert link.accepted
    assert "returned bool: it decides nothing, raise roomsock.Reject" in caplog.text


# Messages


@pytest.mark.parametrize("arrived", [0, 1, 3])
def test_messages_are_handled_in_order_whether_they_wait_or_not(arrived: int) -> None:
    seen: list[Any] = []

    def echo(ws: WebSocket, message: str, room: str) -> None:
        seen.append((message, room))

    messages = ["a", "b", "c"]
    link = FakeLink(messages[arrived:], arrived=messages[:arrived])
    conversation(endpoint(on_message=echo), link)
    assert seen == [("a", "blue"), ("b", "blue"), ("c", "blue")]
    assert (link.failures, link.crashes) == ([], [])


@pytest.mark.parametrize("arrived", [0, 3])
def test_the_text_is_not_kept_beside_what_it_says(arrived: int) -> None:
    raw = f'["{"x" * 1000}"]'
    kept: list[int] = []

    def take(ws: WebSocket, message: list[str]) -> None:
        kept.append(sys.getrefcount(raw))

    link = FakeLink([raw], arrived=[raw] * arrived)
    end = endpoint(on_json=take)
    end.decoder = JsonDecoder(list[str])
    conversation(end, link)
    assert kept == [kept[0] - number for number in range(arrived + 1)]
    assert kept[-1] == sys.getrefcount(raw)


def test_each_message_is_handled_before_the_next_is_taken() -> None:
    steps: list[str] = []

    async def echo(ws: WebSocket, message: str) -> None:
        steps.append(f"begin {message}")
        await OwnAwaitable()
        steps.append(f"end {message}")

    conversation(endpoint(on_message=echo), FakeLink(["b"], arrived=["a"]))
    assert steps == ["begin a", "end a", "begin b", "end b"]


def test_json_is_decoded_to_its_type() -> None:
    seen: list[Any] = []
    end = endpoint(json=dict[str, int], on_json=lambda ws, message: seen.append(message))
    conversation(end, FakeLink(['{"a":1}', b'{"b":2}']))
    assert seen == [{"a": 1}, {"b": 2}]


def test_a_handler_that_declares_error_gets_none_with_each_message() -> None:
    seen: list[Any] = []

    def chat(ws: WebSocket, message: Any, room: str, error: Exception | None) -> None:
        seen.append((message, room, error))

    conversation(endpoint(json=Any, on_json=chat), FakeLink(["1"]))
    assert seen == [(1, "blue", None)]


def test_invalid_json_ends_the_connection_and_nothing_behind_it_is_handled() -> None:
    seen: list[Any] = []
    end = endpoint(json=int, on_json=lambda ws, message: seen.append(message))
    link = FakeLink(["1", "x", "2"])
    conversation(end, link)
    assert seen == [1]
    ((code, reason, error),) = link.failures
    assert (code, reason) == (CloseCode.INVALID_DATA, "invalid message: /chat/<room>")
    assert isinstance(error, InvalidMessage)
    assert link.crashes == []


def test_invalid_json_is_reported_where_the_app_asked_for_it() -> None:
    seen: list[Any] = []

    async def chat(ws: WebSocket, message: int | None, error: Exception | None = None) -> None:
        seen.append((message, type(error)))

    link = FakeLink(["1", "x", "2"])
    conversation(endpoint(json=int, invalid="report", on_json=chat), link)
    assert seen == [(1, type(None)), (None, InvalidMessage), (2, type(None))]
    assert (link.failures, link.crashes) == ([], [])


def test_a_handler_that_fails_while_it_is_told_of_an_error_costs_the_connection() -> None:
    def chat(ws: WebSocket, message: int | None, error: Exception | None = None) -> None:
        raise KeyError("x")

    link = FakeLink(["x"])
    conversation(endpoint(json=int, invalid="report", on_json=chat), link)
    assert [type(error) for error in link.crashes] == [KeyError]


@pytest.mark.parametrize(
    ("takes", "taken", "reason"),
    [
        ({str}, ["a"], "text expected"),
        ({bytes}, [], "binary expected"),
        ({str, bytes}, ["a", b"b"], None),
    ],
)
def test_a_kind_of_message_that_is_not_taken_ends_the_connection(
    takes: Iterable[type], taken: list[str | bytes], reason: str | None
) -> None:
    seen: list[Any] = []
    end = endpoint(takes=frozenset(takes), on_message=lambda ws, message: seen.append(message))
    link = FakeLink(["a", b"b"])
    conversation(end, link)
    assert seen == taken
    expected = [] if reason is None else [(CloseCode.UNSUPPORTED_DATA, reason, None)]
    assert link.failures == expected


# What a handler returns


def not_quite_async(function: Callable[..., Awaitable[None]]) -> Callable[..., Any]:
    """A decorator that people write: plain, around an ``async def``, and not always calling it."""

    @wraps(function)
    def wrapper(ws: WebSocket, message: str) -> Awaitable[None] | None:
        if message == "declined":
            return None
        return function(ws, message)

    return wrapper


def test_whatever_awaitable_comes_back_for_a_message_is_waited_for() -> None:
    seen: list[str] = []

    async def echo(ws: WebSocket, message: str) -> None:
        seen.append(message)

    class Callee:
        async def __call__(self, ws: WebSocket, message: str) -> None:
            seen.append(message)

    for function in (echo, lambda ws, t: echo(ws, t), partial(echo), Callee()):
        conversation(endpoint(on_message=function), FakeLink(["x"]))
    assert seen == ["x"] * 4

    own = OwnAwaitable()
    conversation(endpoint(on_message=lambda ws, t: own), FakeLink(["x", "y"]))
    assert own.awaited == 2


def test_a_decorated_async_handler_may_decline_without_a_coroutine() -> None:
    seen: list[str] = []

    @not_quite_async
    async def echo(ws: WebSocket, message: str) -> None:
        seen.append(message)

    link = FakeLink(["declined", "taken"])
    conversation(endpoint(on_message=echo), link)
    assert seen == ["taken"]
    assert link.crashes == []


def test_a_send_may_be_returned_and_paces_the_handler() -> None:
    """``lambda ws, text: ws.send_text(text)`` is the shortest echo there is."""
    link = FakeLink(["a"], arrived=["b"])
    link.is_high = True
    conversation(endpoint(on_message=lambda ws, t: ws.send_text(t)), link)
    assert link.frames == [text("b"), text("a")]
    assert link.waits == 2


def test_the_count_of_a_send_is_not_waited_for_and_not_complained_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To wait would end the tick after every message, and nothing would be joined."""
    link = FakeLink(["a"])
    ws = websocket(link)
    end = endpoint(on_message=lambda ws, t: ws.send_text_to_this_room(t))

    class MustNotBeAwaited(ws._registry.queued):  # type: ignore[misc, name-defined]
        def __await__(self) -> Any:
            raise AssertionError

    ws._registry.queued = MustNotBeAwaited
    run(converse(ws, link, end))
    assert link.fake_recipient.frames == [text("a")]
    assert (link.crashes, caplog.records) == ([], [])


def test_an_async_handler_may_return_what_a_send_gave(caplog: pytest.LogCaptureFixture) -> None:
    async def echo(ws: WebSocket, message: str) -> Any:
        return ws.send_text(message) if message == "a" else ws.send_text_to_all(message)

    conversation(endpoint(on_message=echo), FakeLink(["a", "b"]))
    assert caplog.records == []


def test_a_return_value_is_reported_once_for_each_handler(caplog: pytest.LogCaptureFixture) -> None:
    async def echo(ws: WebSocket, message: str) -> str:
        return message

    end = endpoint(on_message=echo, on_close=lambda ws, reason: 5)
    for _ in range(2):
        conversation(end, FakeLink(["a", "b"]))
    ws = websocket(FakeLink(), params={"room": "blue"})
    run(dispatcher(end).tell_close(ws, end, ConnectionClosedOK(1000)))
    first, second = (record.getMessage() for record in caplog.records)
    assert "echo() in " in first
    assert first.endswith("returned str: it is not sent, use ws.send_json(...)")
    assert "returned int" in second


# serve


def test_a_serve_handler_owns_the_loop_and_its_return_closes_normally() -> None:
    seen: list[Any] = []

    async def ticker(ws: WebSocket, room: str) -> None:
        seen.extend([room, await ws.receive()])

    link = FakeLink(["a", "b"])
    conversation(endpoint(serve=ticker), link)
    assert seen == ["blue", "a"]
    assert link.end is not None
    assert (link.end.code, link.end.closed_by) == (1000, "server")


def test_what_a_serve_handler_returns_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    conversation(endpoint(serve=lambda ws: 5), FakeLink())
    assert "returned int" in caplog.text


@pytest.mark.parametrize("wrap", [lambda e: e, Group])
def test_an_invalid_message_that_serve_does_not_catch_is_the_clients_failure(
    wrap: Callable[[Exception], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """Not 1011 and a traceback: any client could fill the log with them."""

    async def game(ws: WebSocket) -> None:
        try:
            await ws.receive_json(int)
        except InvalidMessage as error:
            raise wrap(error) from None

    link = FakeLink(["x"])
    conversation(endpoint(serve=game), link)
    ((code, reason, error),) = link.failures
    assert (code, reason) == (CloseCode.INVALID_DATA, "invalid message: expects int")
    assert isinstance(error, InvalidMessage)
    assert (link.crashes, caplog.records) == ([], [])


# What a handler raises


def test_a_handler_that_raises_costs_its_connection_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def echo(ws: WebSocket, message: str) -> None:
        raise KeyError("x")

    link = FakeLink(["a", "b"])
    conversation(endpoint(on_message=echo), link)
    assert [type(error) for error in link.crashes] == [KeyError]
    assert "echo() in " in caplog.text
    assert "raised; its connection is closed with 1011" in caplog.text
    assert "KeyError: 'x'" in caplog.text


def own_end(ws: WebSocket) -> Exception:
    return ConnectionClosedError(1006, "", "lost", ws.id)


def foreign_end(ws: WebSocket) -> Exception:
    return ConnectionClosedError(1006, "", "lost", "somebody else")


OWN_ENDS = [
    own_end,
    lambda ws: ConnectionClosedOK(1000, "", "client", ws.id),
    lambda ws: Group(own_end(ws)),
    lambda ws: Group(Group(own_end(ws))),
    lambda ws: Group(own_end(ws), Group(own_end(ws))),
]


@pytest.mark.parametrize("error", OWN_ENDS)
def test_a_handler_that_ends_with_its_own_connections_end_is_no_error(
    error: Callable[[WebSocket], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    link = FakeLink(["what nobody will handle"])

    async def game(ws: WebSocket) -> None:
        link.finish(ConnectionClosedError(1006, "", "lost"))
        raise error(ws)

    conversation(endpoint(serve=game), link)
    assert link.crashes == []
    assert not link.messages
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


@pytest.mark.parametrize("error", OWN_ENDS)
def test_who_cannot_reply_any_more_still_sees_what_came_before_the_end(
    error: Callable[[WebSocket], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []
    link = FakeLink(["b"], arrived=["a"])

    def chat(ws: WebSocket, message: str) -> None:
        link.finish(ConnectionClosedError(1006, "", "lost"))
        seen.append(message)
        raise error(ws)

    conversation(endpoint(on_message=chat), link)
    assert seen == ["a", "b"]
    assert link.crashes == []
    # Two times the handler, and the end of the loop.
    assert [record.levelno for record in caplog.records] == [logging.DEBUG] * 3


@pytest.mark.parametrize(
    "error",
    [
        foreign_end,
        lambda ws: ConnectionClosed(1000),
        lambda ws: Group(foreign_end(ws)),
        lambda ws: Group(own_end(ws), KeyError("x")),
        lambda ws: Group(own_end(ws), foreign_end(ws)),
        lambda ws: Group(),
    ],
)
def test_another_connections_end_is_an_error_and_so_is_anything_beside_the_own(
    error: Callable[[WebSocket], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    async def game(ws: WebSocket) -> None:
        raise error(ws)

    link = FakeLink()
    conversation(endpoint(serve=game), link)
    assert len(link.crashes) == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_the_group_of_a_real_task_group_is_looked_into() -> None:
    async def game(ws: WebSocket) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(ws.receive)
            await ws.receive()

    end = endpoint(serve=game)
    link = FakeLink()
    ws = websocket(link)
    await converse(ws, link, end)
    assert link.crashes == []

    async def enter(ws: WebSocket) -> None:
        async with anyio.create_task_group():
            raise Reject(403)

    end = endpoint(serve=nothing, on_connect=enter)
    link = FakeLink(accepted=False)
    response = await dispatcher(end).connect(websocket(link), link, end)
    assert response is not None
    assert response.status == 403


# Telling of the end


def test_the_modes_own_error_argument_is_told_with_its_path_values() -> None:
    told: list[Any] = []

    def chat(ws: WebSocket, message: Any, error: Exception | None, room: str) -> None:
        told.append((message, error, room))

    end = endpoint(on_message=chat)
    ws = websocket(FakeLink(), params={"room": "blue"})
    error = ConnectionClosedError(1006)
    run(dispatcher(end).tell_end(ws, end, error))
    assert told == [(None, error, "blue")]


@pytest.mark.parametrize("functions", [{"serve": nothing}, {"on_message": lambda ws, t: None}])
def test_on_error_is_told_where_the_mode_declares_no_error(
    functions: dict[str, Any],
) -> None:
    told: list[Any] = []

    async def failed(ws: WebSocket, error: Exception, room: str) -> None:
        told.append((ws, error, room))

    end = endpoint(on_error=failed, **functions)
    ws = websocket(FakeLink(), params={"room": "blue"})
    error = ConnectionClosedError(1006)
    run(dispatcher(end).tell_end(ws, end, error))
    assert told == [(ws, error, "blue")]


def test_without_an_error_handler_nobody_is_told() -> None:
    end = endpoint(serve=nothing)
    run(dispatcher(end).tell_end(websocket(FakeLink()), end, ConnectionClosedError(1006)))


def test_on_close_is_told_the_reason() -> None:
    told: list[Any] = []

    def left(ws: WebSocket, reason: ConnectionClosed, room: str) -> None:
        told.append((ws, reason, room))

    end = endpoint(serve=nothing, on_close=left)
    ws = websocket(FakeLink(), params={"room": "blue"})
    reason = ConnectionClosedOK(1000)
    run(dispatcher(end).tell_close(ws, end, reason))
    assert told == [(ws, reason, "blue")]
    run(dispatcher(end).tell_close(ws, endpoint(serve=nothing), reason))
    assert len(told) == 1


@pytest.mark.parametrize("raised", [KeyError("x"), None])
def test_what_the_last_handlers_raise_is_only_logged(
    raised: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a trace, when it is but the connection's own end: it is closed by then."""
    caplog.set_level(logging.DEBUG)
    ws = websocket(FakeLink(), params={"room": "blue"})

    def fail(ws: WebSocket, reason: Exception) -> None:
        raise raised or own_end(ws)

    end = endpoint(serve=nothing, on_error=fail, on_close=fail)
    run(dispatcher(end).tell_end(ws, end, ConnectionClosedError(1006)))
    run(dispatcher(end).tell_close(ws, end, ConnectionClosedError(1006)))
    expected = logging.ERROR if raised else logging.DEBUG
    assert [record.levelno for record in caplog.records] == [expected] * 2
    assert "the error handler" in caplog.records[0].getMessage()
    assert "on_close" in caplog.records[1].getMessage()
