"""Handler signatures: what is accepted, what is refused and in which words."""

# No "from __future__ import annotations" here: handlers below need annotations that are evaluated.
import functools
import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any
from uuid import UUID

import pytest

from roomsock.errors import SetupError
from roomsock.routing import Pattern
from roomsock.signatures import Handler, Role, inspect_handler

ROOM = Pattern("/chat/<room>")
NUMBER = Pattern("/n/<int:id>")


def written(source: str, future: bool = False) -> Any:
    """The function ``handler`` of a source text, with annotations as text if ``future``."""
    namespace: dict[str, Any] = {"Any": Any, "UUID": UUID}
    prefix = "from __future__ import annotations\n" if future else ""
    exec(compile(prefix + source, "app.py", "exec"), namespace)
    return namespace["handler"]


def refusal(function: Any, role: Role, pattern: Pattern = ROOM) -> str:
    with pytest.raises(SetupError) as caught:
        inspect_handler(function, role, pattern)
    return str(caught.value)


@pytest.mark.parametrize(
    ("role", "parameters"),
    [
        (Role.SERVE, "ws"),
        (Role.ON_JSON, "ws, message"),
        (Role.ON_MESSAGE, "ws, text"),
        (Role.ON_CONNECT, "ws"),
        (Role.ON_CLOSE, "ws, reason"),
        (Role.ON_ERROR, "ws, error"),
        (Role.GET, "request"),
        (Role.POST, "request"),
    ],
)
@pytest.mark.parametrize("start", ["def", "async def"])
def test_each_role_takes_its_own_arguments_and_path_values(
    role: Role, parameters: str, start: str
) -> None:
    function = written(f"{start} handler({parameters}, room): ...")
    handler = inspect_handler(function, role, ROOM)
    assert handler == Handler(
        function=function,
        role=role,
        pattern=ROOM,
        path_values=("room",),
        wants_error=False,
        location="handler() in app.py:1",
        message_annotation=inspect.Parameter.empty,
    )


@pytest.mark.parametrize(
    "source",
    [
        "def handler(connection, what): ...",
        "def handler(connection, what, /): ...",
        "def handler(connection, what='x'): ...",
        "handler = lambda connection, what: ...",
    ],
)
def test_provided_arguments_may_have_any_name_and_path_values_may_be_left_out(source: str) -> None:
    handler = inspect_handler(written(source), Role.ON_JSON, ROOM)
    assert handler.path_values == ()
    assert not handler.wants_error


@pytest.mark.parametrize("role", [Role.ON_JSON, Role.ON_MESSAGE])
@pytest.mark.parametrize(
    "source", ["ws, m, error, room", "ws, m, room=1, error=None", "ws, m, *, error, room"]
)
def test_message_handlers_may_declare_error(role: Role, source: str) -> None:
    handler = inspect_handler(written(f"def handler({source}): ..."), role, ROOM)
    assert handler.wants_error
    assert handler.path_values == ("room",)


def test_arguments_are_the_declared_path_values() -> None:
    pattern = Pattern("/<a>/<b>/<int:c>")
    handler = inspect_handler(written("def handler(ws, c, a): ..."), Role.SERVE, pattern)
    assert handler.arguments({"a": "1", "b": "2", "c": 3}) == {"c": 3, "a": "1"}


def test_the_message_annotation_is_handed_on_as_it_is_written() -> None:
    def raw(source: str, role: Role, *, future: bool = False) -> Any:
        return inspect_handler(written(source, future), role, ROOM).message_annotation

    assert raw("def handler(ws, m: int): ...", Role.ON_JSON) is int
    assert raw("def handler(ws, m: Missing): ...", Role.ON_JSON, future=True) == "Missing"
    assert raw("def handler(ws, m: bytes): ...", Role.ON_MESSAGE) is bytes
    assert raw("def handler(ws, reason: str): ...", Role.ON_CLOSE) is inspect.Parameter.empty


def test_no_annotation_is_evaluated() -> None:
    source = "def handler(ws: 1/0, message: Missing, room: Also.Missing, error: [][0]): ..."
    handler = inspect_handler(written(source, future=True), Role.ON_JSON, ROOM)
    assert handler.message_annotation == "Missing"


@pytest.mark.parametrize(
    ("role", "source", "said"),
    [
        (Role.ON_JSON, "def handler(): ...", "its parameter 1 must be the ws"),
        (Role.ON_JSON, "def handler(ws): ...", "its parameter 2 must be the message"),
        (Role.ON_JSON, "def handler(ws, *, message): ...", "its parameter 2 must be the message"),
        (Role.ON_JSON, "def handler(ws, room): ...", "its parameter 2 must be the message"),
        (Role.ON_JSON, "def handler(ws, error): ...", "its parameter 2 must be the message"),
        (Role.ON_MESSAGE, "def handler(ws): ...", "its parameter 2 must be the text"),
        (
            Role.ON_MESSAGE,
            "def handler(ws, room): ...",
            "but has the name of another value, 'room'",
        ),
        (Role.ON_CLOSE, "def handler(ws, room): ...", "its parameter 2 must be the reason"),
        (Role.ON_ERROR, "def handler(ws): ...", "its parameter 2 must be the error"),
        (Role.GET, "def handler(): ...", "its parameter 1 must be the request"),
        (Role.SERVE, "def handler(room): ...", "its parameter 1 must be the ws"),
        (Role.SERVE, "def handler(ws, roon): ...", "there is no 'roon' to pass"),
        (Role.SERVE, "def handler(ws, roon=None): ...", "there is no 'roon' to pass"),
        (Role.SERVE, "def handler(ws, error): ...", "catch ConnectionClosedError"),
        (Role.ON_CLOSE, "def handler(ws, reason, error): ...", "there is no 'error' to pass"),
        (Role.ON_ERROR, "def handler(ws, exc, error): ...", "there is no 'error' to pass"),
        (Role.SERVE, "def handler(ws, *args): ...", "'*args' does not tell what it wants"),
        (Role.SERVE, "def handler(ws, **kw): ...", "'**kw' does not tell what it wants"),
        (Role.SERVE, "def handler(*args): ...", "'*args' does not tell what it wants"),
        (Role.SERVE, "def handler(ws, room, /): ...", "'room' must not be positional-only"),
        (Role.SERVE, "def handler(ws): yield", "must not use 'yield'"),
        (Role.SERVE, "async def handler(ws): yield", "must not use 'yield'"),
    ],
)
def test_what_does_not_fit_is_refused_with_function_file_and_line(
    role: Role, source: str, said: str
) -> None:
    text = refusal(written(f"\n{source}"), role)
    assert said in text
    assert text.startswith(f"handler() in app.py:2, {role.value}('/chat/<room>'): ")


@pytest.mark.parametrize(
    ("role", "pattern", "form"),
    [
        (Role.ON_JSON, ROOM, "(ws, message), then by name any of: room, error."),
        (Role.ON_CLOSE, ROOM, "(ws, reason), then by name any of: room."),
        (Role.SERVE, Pattern("/"), "(ws), and nothing else."),
    ],
)
def test_a_refusal_shows_how_the_handler_is_called(role: Role, pattern: Pattern, form: str) -> None:
    text = refusal(written("def handler(): ..."), role, pattern)
    assert text.endswith(f"It is called with {form}")


@pytest.mark.parametrize("future", [False, True])
@pytest.mark.parametrize(
    ("text", "annotation", "contradicts"),
    [
        ("/<x>", "str", False),
        ("/<x>", "int", True),
        ("/<x>", "UUID", True),
        ("/<int:x>", "int", False),
        ("/<int:x>", "'int'", False),
        ("/<int:x>", "str", True),
        ("/<int:x>", "'str'", True),
        ("/<int:x>", "float", True),
        ("/<float:x>", "float", False),
        ("/<float:x>", "int", True),
        ("/<uuid:x>", "UUID", False),
        ("/<uuid:x>", "'uuid.UUID'", False),
        ("/<uuid:x>", "str", True),
        ("/<path:x>", "str", False),
        ("/<path:x>", "'float'", True),
        # What is no plain type is not judged.
        ("/<int:x>", "Any", False),
        ("/<int:x>", "'Any'", False),
        ("/<int:x>", "bool", False),
        ("/<int:x>", "int | None", False),
        ("/<int:x>", "['unhashable']", False),
    ],
)
def test_an_annotation_must_not_contradict_its_converter(
    text: str, annotation: str, contradicts: bool, future: bool
) -> None:
    function = written(f"def handler(ws, x: {annotation}): ...", future)
    if contradicts:
        assert "'x' is annotated" in refusal(function, Role.SERVE, Pattern(text))
    else:
        assert inspect_handler(function, Role.SERVE, Pattern(text)).path_values == ("x",)


def test_a_contradiction_names_both_types() -> None:
    text = refusal(written("def handler(ws, id: str): ..."), Role.SERVE, NUMBER)
    assert "'id' is annotated str, but comes as int" in text


def test_the_annotation_of_error_is_not_judged() -> None:
    function = written("def handler(ws, message, error: str): ...")
    assert inspect_handler(function, Role.ON_JSON, ROOM).wants_error


class Greeter:
    async def __call__(self, ws: Any, room: str) -> None: ...

    def plain(self, ws: Any, room: str) -> None: ...

    @staticmethod
    async def static(ws: Any, room: str) -> None: ...

    @classmethod
    async def of_class(cls, ws: Any, room: str) -> None: ...


async def greet(ws: Any, room: str) -> None: ...


async def greet_with(database: object, ws: Any, room: str, *, retries: int) -> None: ...


def passing_on(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def awaiting(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Decorated:
    @passing_on
    async def method(self, ws: Any, room: str) -> None: ...


@pytest.mark.parametrize(
    ("function", "written_as"),
    [
        (greet, greet),
        (Greeter(), Greeter.__call__),
        (Greeter().plain, Greeter.plain),
        (Greeter().static, Greeter.static),
        (Greeter().of_class, Greeter.of_class),
        (Decorated().method, inspect.unwrap(Decorated.method)),
        (partial(greet), greet),
        (partial(greet_with, None, retries=3), greet_with),
        (partial(partial(greet_with, None), retries=3), greet_with),
        (partial(Greeter()), Greeter.__call__),
        (passing_on(greet), greet),
        (passing_on(Greeter().plain), Greeter.plain),
        (awaiting(Greeter().plain), Greeter.plain),
        (passing_on(partial(greet_with, None, retries=3)), greet_with),
    ],
)
def test_every_kind_of_callable_is_seen_through(
    function: Callable[..., Any], written_as: FunctionType
) -> None:
    handler = inspect_handler(function, Role.SERVE, ROOM)
    assert handler.path_values == ("room",)
    assert handler.function is function
    line = written_as.__code__.co_firstlineno
    assert handler.location == f"{written_as.__qualname__}() in {__file__}:{line}"


def test_what_a_partial_has_bound_is_not_passed_again() -> None:
    handler = inspect_handler(partial(greet, room="lobby"), Role.SERVE, ROOM)
    assert handler.path_values == ()
    assert "parameter 2 must be" in refusal(
        partial(written("def handler(a, b): ..."), b=1), Role.ON_JSON
    )


def test_an_async_wrapper_may_drive_a_generator() -> None:
    inspect_handler(awaiting(written("def handler(ws): yield")), Role.SERVE, ROOM)
    assert "'yield'" in refusal(passing_on(written("def handler(ws): yield")), Role.SERVE)


@pytest.mark.parametrize("thing", [None, 5, "chat", Greeter, classmethod(greet)])
def test_what_is_no_function_is_refused(thing: Any) -> None:
    assert refusal(thing, Role.SERVE) == f"serve('/chat/<room>'): {thing!r} is no function"


class Odd:
    __signature__ = 5

    def __call__(self, ws: Any) -> None: ...


def test_a_function_whose_signature_cannot_be_read_is_refused() -> None:
    text = refusal(Odd(), Role.SERVE)
    assert text.startswith(f"Odd.__call__() in {__file__}:")
    assert "__signature__" in text
    assert refusal(min, Role.SERVE).startswith("min(), serve('/chat/<room>'): ")
