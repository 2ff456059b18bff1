"""The app: what may be registered, what is refused and in which words, what serving begins with."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Union

import msgspec
import pytest

from roomsock import app as module
from roomsock.app import App
from roomsock.dispatch import Dispatcher, Endpoint
from roomsock.errors import SetupError
from roomsock.http import Request
from roomsock.limits import Limits
from roomsock.protocol.deflate import Agreement, Compression, Deflater
from roomsock.rooms import Queued
from roomsock.signatures import Role
from roomsock.websocket import WebSocket

from .fakes import FakeLink, run, websocket


class Say(msgspec.Struct, tag="say"):
    text: str


class Leave(msgspec.Struct, tag="leave"):
    pass


def begin(app: App) -> Dispatcher:
    return app._begin_serving(
        threading.get_ident(), Queued, lambda function, *args: function(*args)
    )


def endpoint(app: App, path: str) -> Endpoint:
    found = begin(app).find(path)
    assert found is not None
    return found[0]


def mode(app: App, path: str = "/a") -> Callable[..., Any]:
    handler = endpoint(app, path).mode
    assert handler is not None
    return handler.function


def where(function: Any) -> str:
    return f"{function.__qualname__}() in {__file__}:{function.__code__.co_firstlineno}"


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """A SetupError whose text has all these parts."""
    with pytest.raises(SetupError) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)


def written(source: str, app: App) -> dict[str, Any]:
    """Run a source text as a module of its own, which has the app and all annotations as text."""
    names: dict[str, Any] = {"app": app, "msgspec": msgspec}
    exec(compile("from __future__ import annotations\n" + source, "chat.py", "exec"), names)
    return names


def on_message(ws: Any, text: str) -> None: ...


def on_json(ws: Any, message: Any) -> None: ...


async def serve(ws: Any) -> None: ...


def on_close(ws: Any, reason: Any) -> None: ...


def on_error(ws: Any, error: Any) -> None: ...


FUNCTIONS = {
    Role.SERVE: serve,
    Role.ON_JSON: on_json,
    Role.ON_MESSAGE: on_message,
    Role.ON_CONNECT: lambda ws: None,
    Role.ON_CLOSE: on_close,
    Role.ON_ERROR: on_error,
    Role.GET: lambda request: "got",
    Role.POST: lambda request: "posted",
}


# Settings


def test_an_app_has_the_defaults_of_the_contract() -> None:
    app = App()
    assert app.limits == Limits()
    assert (app.origins, app.keepalive, app.slow_consumers) == (None, (20.0, 20.0), "close")


def test_settings_are_kept_as_they_were_given() -> None:
    limits = Limits(message=5)
    app = App(limits=limits, origins="*", keepalive=None, slow_consumers="drop_oldest")
    assert app.limits is limits
    assert (app.origins, app.keepalive, app.slow_consumers) == ("*", None, "drop_oldest")
    assert App(origins=[]).origins == []
    assert App(origins=["https://example.com:8443", "null"]).origins is not None


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"origins": "https://a.example"},
            """a list, "*" or None: origins=['https://a.example']""",
        ),
        ({"origins": ["a.example"]}, "\"https://example.com\", not 'a.example'"),
        ({"origins": ["https://a.example/"]}, "not 'https://a.example/'"),
        ({"origins": ["*"]}, "not '*'"),
        ({"slow_consumers": "drop"}, "one of ('close', 'drop_newest', 'drop_oldest')"),
        ({"keepalive": 20}, "(interval, timeout) in seconds, or None"),
        ({"keepalive": (20,)}, "(interval, timeout) in seconds, or None"),
        ({"keepalive": (20, 0)}, "(interval, timeout) in seconds, or None"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(settings: Any, text: str) -> None:
    with refused(text):
        App(**settings)


# Decorators and methods


@pytest.mark.parametrize("role", Role)
def test_a_decorator_returns_the_function_and_does_what_its_method_does(role: Role) -> None:
    decorated, added = App(), App()
    function = FUNCTIONS[role]
    assert getattr(decorated, role.value)("/a")(function) is function
    method = getattr(added, f"add_{role.value}")
    assert method("/a", function) is None
    for app in (decorated, added):
        if role.value.startswith("on_") and role not in (Role.ON_JSON, Role.ON_MESSAGE):
            app.add_serve("/a", serve)
        assert endpoint(app, "/a").handlers[role].function is function


def test_options_of_a_mode_reach_its_endpoint() -> None:
    decorated, added = App(), App()
    decorated.on_json("/json", invalid="report", cancel_on_disconnect=True)(on_json)
    decorated.on_message("/text", cancel_on_disconnect=True)(on_message)
    decorated.serve("/serve", cancel_on_disconnect=True)(serve)
    added.add_on_json("/json", on_json, invalid="report", cancel_on_disconnect=True)
    added.add_on_message("/text", on_message, cancel_on_disconnect=True)
    added.add_serve("/serve", serve, cancel_on_disconnect=True)
    for app in (decorated, added):
        app.add_on_error("/json", on_error)
        dispatcher = begin(app)
        for path in ("/json", "/text", "/serve"):
            found = dispatcher.find(path)
            assert found is not None
            assert found[0].cancel_on_disconnect
            assert found[0].invalid == ("report" if path == "/json" else "close")


def test_one_function_may_serve_several_paths() -> None:
    app = App()
    app.on_message("/a")(app.on_message("/b")(on_message))
    dispatcher = begin(app)
    assert dispatcher.find("/a") is not None
    assert dispatcher.find("/b") is not None


def test_a_decorator_without_its_path_is_refused_and_not_the_handler_lost() -> None:
    app = App()
    with refused(where(on_message), 'write @app.on_message("/path")'):
        app.on_message(on_message)  # type: ignore[arg-type]
    with refused(where(FUNCTIONS[Role.GET]), 'write @app.get("/path")'):
        app.get(FUNCTIONS[Role.GET])  # type: ignore[arg-type]


# What is refused at registration


@pytest.mark.parametrize(
    ("path", "function", "why"),
    [
        ("/<room>", lambda ws, text, rom: None, "there is no 'rom' to pass"),
        ("/<error>", on_message, "a path value cannot be called 'error'"),
        ("/<message>", on_message, "a path value cannot be called 'message'"),
        ("/{room}", on_message, "write <room> instead of {room}"),
        ("chat", on_message, "it must start with '/'"),
        (None, on_message, "it must be a text such as '/chat/<room>'"),
        ("/", lambda: None, "its parameter 1 must be the ws"),
    ],
)
def test_a_refused_registration_names_function_file_and_line(
    path: Any, function: Any, why: str
) -> None:
    app = App()
    with refused(where(function), f"on_message({path!r})", why):
        app.add_on_message(path, function)
    assert app._registrations == []


def test_a_path_value_that_contradicts_its_annotation_is_refused() -> None:
    def user(ws: Any, text: str, id: str) -> None: ...

    with refused(where(user), "'id' is annotated str, but comes as int"):
        App().add_on_message("/<int:id>", user)


def test_serve_with_error_is_refused() -> None:
    async def game(ws: Any, error: Any) -> None: ...

    with refused(where(game), "catch ConnectionClosedError there"):
        App().add_serve("/a", game)


def test_what_is_no_function_is_refused_whatever_the_path() -> None:
    with refused("on_message('/a'): 5 is no function"):
        App().add_on_message("/a", 5)  # type: ignore[arg-type]
    with refused("on_message('a'): "):
        App().add_on_message("a", 5)  # type: ignore[arg-type]


def test_the_function_that_somebody_wrote_is_named_below_a_partial() -> None:
    with refused(where(on_message), "it must start with '/'"):
        App().add_on_message("a", partial(on_message))


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with refused(where(on_json), 'invalid is "close" or "report"'):
        App().add_on_json("/a", on_json, invalid="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("role", Role)
def test_a_second_handler_of_the_same_role_on_the_same_path_is_refused(role: Role) -> None:
    app = App()
    add = getattr(app, f"add_{role.value}")
    add("/a/<x>", FUNCTIONS[role])
    place = where(FUNCTIONS[role])
    with refused(f"{place}: {role.value}('/a/<x>') is taken by {place}"):
        add("/a/<x>", FUNCTIONS[role])


def test_the_same_shape_under_other_names_is_refused() -> None:
    app = App()
    app.add_on_message("/chat/<room>", on_message)
    with refused(
        f"{where(on_close)}: '/chat/<name>' matches the same paths as '/chat/<room>' of "
        f"{where(on_message)}: write both alike"
    ):
        app.add_on_close("/chat/<name>", on_close)
    app.add_on_message("/chat/<int:name>", on_message)


@pytest.mark.parametrize("first", ["mode", "on_error"])
def test_two_who_want_to_be_told_of_errors_are_refused(first: str) -> None:
    def chat(ws: Any, message: Any, error: Any) -> None: ...

    app = App()
    add = [partial(app.add_on_json, "/a", chat), partial(app.add_on_error, "/a", on_error)]
    if first == "on_error":
        add.reverse()
    add[0]()
    with refused(
        f"'/a' has on_error ({where(on_error)})", f"that declares `error` ({where(chat)})"
    ):
        add[1]()


def test_a_type_that_cannot_be_decoded_is_refused_with_the_form_that_can() -> None:
    def chat(ws: Any, message: WebSocket) -> None: ...

    with refused(where(chat), "cannot decode JSON to WebSocket", "msgspec.Struct, tag="):
        App().add_on_json("/a", chat)


def test_an_untagged_union_is_refused_with_the_form_that_can() -> None:
    class A(msgspec.Struct): ...

    class B(msgspec.Struct): ...

    def chat(ws: Any, message: A | B) -> None: ...

    with refused(where(chat), "A | B", "a union of tagged Structs"):
        App().add_on_json("/a", chat)


def test_on_message_takes_text_or_binary_and_nothing_else() -> None:
    def chat(ws: Any, text: int) -> None: ...

    with refused(where(chat), "on_message takes str, bytes or str | bytes, not int"):
        App().add_on_message("/a", chat)


# Annotations


def test_an_annotation_is_found_among_the_locals_of_who_decorates() -> None:
    class Local(msgspec.Struct):
        n: int

    decorated, added = App(), App()

    @decorated.on_json("/a")
    def chat(ws: Any, message: Local) -> None: ...

    added.add_on_json("/a", chat)
    for app in (decorated, added):
        decoder = endpoint(app, "/a").decoder
        assert decoder is not None
        assert decoder.decode('{"n":1}') == Local(1)


def test_a_kind_of_message_is_found_among_the_locals_too() -> None:
    Kind = str | bytes
    decorated, added = App(), App()

    @decorated.on_message("/a")
    def chat(ws: Any, message: Kind) -> None: ...

    added.add_on_message("/a", chat)
    for app in (decorated, added):
        assert endpoint(app, "/a").takes == {str, bytes}


def test_an_annotation_may_name_what_is_defined_further_down() -> None:
    app = App()
    names = written(
        "@app.on_json('/a')\n"
        "def chat(ws, message: Later): ...\n"
        "class Later(msgspec.Struct):\n"
        "    n: int\n",
        app,
    )
    decoder = endpoint(app, "/a").decoder
    assert decoder is not None
    assert decoder.decode('{"n":1}') == names["Later"](1)


def test_a_name_that_is_still_missing_when_serving_begins_is_told() -> None:
    app = App()
    names = written("@app.on_json('/a')\ndef chat(ws, message: Sya): ...\n", app)
    with refused(
        "chat() in chat.py:2: the annotation of its message, 'Sya': name 'Sya' is not defined"
    ):
        begin(app)
    names["Sya"] = Say
    begin(app)


def test_only_the_annotation_of_the_message_is_evaluated() -> None:
    app = App()
    written("@app.on_json('/a')\ndef chat(ws: Nowhere, message: int): ...\n", app)
    begin(app)


def test_messages_are_what_their_annotation_says() -> None:
    def chat(ws: Any, message: Say | Leave | None) -> None: ...

    def both(ws: Any, data: str | bytes) -> None: ...

    app = App()
    app.add_on_json("/json", chat)
    app.add_on_json("/any", lambda ws, message: None)
    app.add_on_message("/both", both)
    app.add_on_message("/text", lambda ws, text: None)
    dispatcher = begin(app)

    def found(path: str) -> Endpoint:
        match = dispatcher.find(path)
        assert match is not None
        return match[0]

    decoder = found("/json").decoder
    assert decoder is not None
    assert decoder.message_type == Union[Say, Leave]
    assert decoder.reason == "invalid message: /json expects Say | Leave"
    decoder = found("/any").decoder
    assert decoder is not None
    assert decoder.message_type is Any
    assert found("/both").takes == {str, bytes}
    assert found("/text").takes == {str}
    assert found("/text").decoder is None


def test_what_the_caller_held_is_not_kept_alive() -> None:
    class Big:
        pass

    app = App()

    def register() -> weakref.ref[Big]:
        big = Big()

        @app.on_connect("/a")
        @app.serve("/a")
        async def enter(ws: Any) -> None: ...

        @app.on_json("/a")
        def chat(ws: Any, message: Say) -> None: ...

        return weakref.ref(big)

    reference = register()
    gc.collect()
    assert reference() is None


# The end of the set-up


@pytest.mark.parametrize("role", Role)
def test_a_registration_after_serving_began_is_refused(role: Role) -> None:
    app = App()
    begin(app)
    with refused(f"{role.value}('/a') comes too late for this app: serving has started"):
        getattr(app, role.value)("/a")(FUNCTIONS[role])
    app._end_serving()
    with refused("comes too late"):
        getattr(app, f"add_{role.value}")("/a", FUNCTIONS[role])


def test_an_app_is_served_once_at_a_time_and_may_be_served_again() -> None:
    app = App()
    app.add_serve("/a", serve)
    first = begin(app).find("/a")
    with refused("this app is being served already"):
        begin(app)
    app._end_serving()
    again = begin(app).find("/a")
    assert first is not None
    assert again is not None
    assert again[0] is not first[0]


def test_a_set_up_that_is_incomplete_may_be_completed() -> None:
    app = App()
    app.add_on_close("/a", on_close)
    with refused(f"{where(on_close)}: '/a' has on_close but no serve, on_json or on_message"):
        begin(app)
    app.add_serve("/a", serve)
    begin(app)


@pytest.mark.parametrize("role", [Role.ON_CONNECT, Role.ON_CLOSE, Role.ON_ERROR])
def test_what_belongs_to_a_connection_needs_a_mode(role: Role) -> None:
    app = App()
    getattr(app, f"add_{role.value}")("/a", FUNCTIONS[role])
    app.add_get("/a", lambda request: "")
    with refused(where(FUNCTIONS[role]), f"'/a' has {role.value} but no serve"):
        begin(app)


@pytest.mark.parametrize("told", ["nobody", "the mode", "on_error"])
def test_a_report_needs_somebody_to_report_to(told: str) -> None:
    def chat(ws: Any, message: Any) -> None: ...

    def told_chat(ws: Any, message: Any, error: Any) -> None: ...

    app = App()
    app.add_on_json("/a", told_chat if told == "the mode" else chat, invalid="report")
    if told == "on_error":
        app.add_on_error("/a", on_error)
    if told == "nobody":
        with refused(where(chat), 'invalid="report" needs somebody to report to', "on_error('/a')"):
            begin(app)
    else:
        assert endpoint(app, "/a").invalid == "report"


def test_of_several_modes_the_first_is_used_and_the_others_are_named_in_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = App()
    app.add_on_message("/a", on_message)
    app.add_on_json("/a", on_json)
    app.add_serve("/a", serve)
    assert mode(app) is serve
    assert [record.getMessage() for record in caplog.records] == [
        f"/a: {where(function)} is not used, {where(serve)} comes first "
        "(serve > on_json > on_message)"
        for function in (on_message, on_json)
    ]


def test_an_app_that_is_not_told_anything_is_all_404() -> None:
    response = run(begin(App()).respond(Request("GET", "/", "/", b"")))
    assert response.status == 404


# Inclusion


def test_an_inclusion_takes_everything_over_below_its_prefix() -> None:
    def chat(ws: Any, message: Say, error: Any) -> None: ...

    part = App()
    part.add_on_json("/chat/<room>", chat, invalid="report", cancel_on_disconnect=True)
    part.add_get("/", lambda request: "part")
    app = App()
    app.add_get("/", lambda request: "app")
    app.include(part, prefix="/v1")
    dispatcher = begin(app)
    found = dispatcher.find("/v1/chat/blue")
    assert found is not None
    end, params = found
    assert (end.path, end.invalid, end.cancel_on_disconnect) == (
        "/v1/chat/<room>",
        "report",
        True,
    )
    assert params == {"room": "blue"}
    assert end.decoder is not None
    assert end.decoder.message_type is Say
    for path, content in (("/", b"app"), ("/v1/", b"part")):
        assert run(dispatcher.respond(Request("GET", path, path, b""))).content == content
    assert dispatcher.find("/chat/blue") is None


def test_path_values_of_a_prefix_are_among_the_params_of_the_connection() -> None:
    part = App()
    part.add_on_message("/chat/<room>", on_message)
    app = App()
    app.include(part, prefix="/team/<int:team>")
    found = begin(app).find("/team/7/chat/blue")
    assert found is not None
    assert found[1] == {"team": 7, "room": "blue"}


def test_an_inclusion_without_a_prefix_adds_to_what_is_there() -> None:
    part, app = App(), App()
    part.add_on_close("/a", on_close)
    app.add_serve("/a", serve)
    app.include(part)
    assert set(endpoint(app, "/a").handlers) == {Role.SERVE, Role.ON_CLOSE}


def test_an_annotation_of_an_included_app_may_still_wait_for_its_name() -> None:
    part, app = App(), App()
    names = written(
        "@part.on_json('/a')\ndef chat(ws, message: Later): ...\n".replace("part", "app"), part
    )
    app.include(part)
    names["Later"] = Say
    decoder = endpoint(app, "/a").decoder
    assert decoder is not None
    assert decoder.message_type is Say


@pytest.mark.parametrize("prefix", ["v1", "/v1/", "/"])
def test_a_prefix_that_is_none_is_refused(prefix: str) -> None:
    with refused(f"starts with / and does not end with it, unlike {prefix!r}"):
        App().include(App(), prefix=prefix)


def test_an_inclusion_that_clashes_names_both_functions() -> None:
    part, app = App(), App()
    part.add_on_message("/a", on_message)
    app.add_on_message("/v1/a", on_message)
    with refused(f"{where(on_message)}: on_message('/v1/a') is taken by {where(on_message)}"):
        app.include(part, prefix="/v1")


def test_a_prefix_with_a_name_of_the_path_is_refused() -> None:
    part = App()
    part.add_on_message("/<room>", on_message)
    with refused(where(on_message), "the name 'room' is used twice"):
        App().include(part, prefix="/<room>")


def test_an_app_is_included_once_and_not_in_itself() -> None:
    part, app = App(), App()
    with refused("an app cannot include itself"):
        app.include(app)
    app.include(part)
    with refused("being included comes too late for this app: it was included in another app"):
        App().include(part)
    with refused("it was included in another app"):
        part.add_serve("/a", serve)
    begin(app)
    with refused("include() comes too late for this app: serving has started"):
        app.include(App())


def test_handles_made_before_an_inclusion_stay_valid_however_deep_it_goes() -> None:
    app, part, detail = App(), App(), App()
    room, everyone = detail.room("/v1/chat/blue"), detail.all
    part.include(detail)
    app.include(part, prefix="/v1")
    dispatcher = begin(app)
    link = FakeLink()
    ws = websocket(link, "/v1/chat/blue", registry=dispatcher.registry)
    assert room.members == everyone.members == [ws]
    assert room == part.room("/v1/chat/blue") == app.room("/v1/chat/blue")
    assert detail.rooms == app.rooms == (room,)
    detail.call_soon_threadsafe(room.send_text, "x")
    assert len(link.fake_recipient.frames) == 1


# Rooms, and the way in from other threads


def test_rooms_are_those_that_exist_now() -> None:
    app = App()
    registry = begin(app).registry
    assert list(app.rooms) == []
    links = [FakeLink(), FakeLink()]
    a = websocket(links[0], "/a", registry=registry)
    b = websocket(links[1], "/b", registry=registry)
    assert app.rooms == (app.room("/a"), app.room("/b"))
    assert app.all.members == [a, b]
    assert app.all.send_text("x") == 2
    run(app.flushed())
    assert [link.fake_recipient.flushes for link in links] == [1, 1]


def test_calls_from_other_threads_go_through_the_server_while_there_is_one() -> None:
    app = App()
    calls: list[Any] = []
    with pytest.raises(RuntimeError, match="the app is not being served"):
        app.call_soon_threadsafe(calls.append, 1)
    begin(app)
    app.call_soon_threadsafe(calls.append, 2)
    app._end_serving()
    with pytest.raises(RuntimeError, match="the app is not being served"):
        app.call_soon_threadsafe(calls.append, 3)
    assert calls == [2]


def test_the_app_never_looks_at_the_driver() -> None:
    assert not {"server", "driver", "anyio", "asyncio"} & set(vars(module))


def test_limits_are_limits() -> None:
    limits: Any = {"message": 3}
    with pytest.raises(SetupError, match=r"limits is roomsock\.Limits"):
        App(limits=limits)


def test_an_included_app_is_not_served_by_itself() -> None:
    app, other = App(), App()
    app.include(other, prefix="/other")
    with pytest.raises(SetupError, match="included in another app"):
        other._begin_serving(threading.get_ident(), Queued, lambda function, *args: None)


# Compression


def test_nothing_is_compressed_unless_the_app_asks_for_it() -> None:
    assert App().compression is None
    assert App(compression=False).compression is None
    assert App(compression=True).compression == Compression()
    settings = Compression(level=9, context_takeover=True)
    assert App(compression=settings).compression is settings


@pytest.mark.parametrize("value", ["deflate", 1, 0, None, {"level": 3}, Compression], ids=repr)
def test_compression_is_a_bool_or_its_settings(value: Any) -> None:
    with refused("compression is a bool or roomsock.Compression(...)", repr(value)):
        App(compression=value)


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
def test_messages_that_refer_to_each_other_cannot_be_dropped(policy: Any) -> None:
    takeover = Compression(context_takeover=True)
    with refused("context takeover", "dropping messages"):
        App(slow_consumers=policy, compression=takeover)
    App(slow_consumers=policy, compression=True)
    App(slow_consumers="close", compression=takeover)


@pytest.mark.parametrize(
    ("outer", "inner", "queued"), [(True, False, 0xC1), (False, True, 0x81)], ids=["outer", "inner"]
)
def test_an_included_app_is_compressed_as_the_app_that_is_served(
    outer: bool, inner: bool, queued: int
) -> None:
    app, part = App(compression=outer), App(compression=inner)
    room = part.room("/a")
    app.include(part)
    link = FakeLink()
    link.fake_recipient.deflater = Deflater(
        Compression(), Agreement("permessage-deflate", 15, 15, False, False)
    )
    websocket(link, "/a", registry=begin(app).registry)
    for length in (127, 128):  # the threshold is that of the app's settings
        room.send_text("x" * length)
    assert [frame[0] for frame in link.fake_recipient.frames] == [0x81, queued]
