"""What a handler's signature asks for, read once when it is registered.

Only parameters and their raw annotations are read, none is evaluated: the annotation of ``ws``
may name what exists for the type checker alone. Imports routing and errors. Rules: README,
"Messages": what the role provides comes first, the rest by declared name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import MethodType
from typing import Any
from uuid import UUID

from .errors import SetupError
from .routing import NO_VALUES, Pattern

_Parameter = inspect.Parameter

if sys.version_info >= (3, 14):  # pragma: no cover - from 3.14 on annotations are lazy
    import annotationlib

    _AS_WRITTEN: dict[str, Any] = {"annotation_format": annotationlib.Format.FORWARDREF}
else:
    _AS_WRITTEN: dict[str, Any] = {}


class Role(Enum):
    """What a handler is registered for; the value is the name of its decorator."""

    SERVE = "serve"
    ON_JSON = "on_json"
    ON_MESSAGE = "on_message"
    ON_CONNECT = "on_connect"
    ON_CLOSE = "on_close"
    ON_ERROR = "on_error"
    GET = "get"
    POST = "post"

    __hash__ = object.__hash__  # Enum's own is a Python function


# What each role passes by position; the handler calls it what it likes.
_PROVIDED: Mapping[Role, tuple[str, ...]] = {
    Role.SERVE: ("ws",),
    Role.ON_JSON: ("ws", "message"),
    Role.ON_MESSAGE: ("ws", "text"),
    Role.ON_CONNECT: ("ws",),
    Role.ON_CLOSE: ("ws", "reason"),
    Role.ON_ERROR: ("ws", "error"),
    Role.GET: ("request",),
    Role.POST: ("request",),
}

# The roles that are called once more, with ``error``, when a connection ends by a failure.
_TOLD_ERRORS = (Role.ON_JSON, Role.ON_MESSAGE)

# Annotations that are compared with a converter's type, by name where annotations are text. Any
# other is not judged: that would mean to evaluate it.
_JUDGED = {"str": str, "int": int, "float": float, "UUID": UUID, "uuid.UUID": UUID}


@dataclass(frozen=True, slots=True)
class Handler:
    """A registered function and how to call it.

    Attributes:
        function: As it was registered.
        role: What it was registered for.
        pattern: The path it was registered for.
        path_values: The path values it declared, to be passed by name.
        wants_error: It declared ``error``, to be passed by name.
        location: ``"chat() in file.py:12"``, for messages.
        message_annotation: The raw annotation of the message, ``inspect.Parameter.empty`` if
            there is none.
    """

    function: Callable[..., Any]
    role: Role
    pattern: Pattern
    path_values: tuple[str, ...]
    wants_error: bool
    location: str
    message_annotation: Any

    def arguments(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Pick the declared path values out of all those of a matched path."""
        return {name: params[name] for name in self.path_values} if self.path_values else NO_VALUES


def inspect_handler(function: Callable[..., Any], role: Role, pattern: Pattern) -> Handler:
    """Read how a function wants to be called.

    Args:
        function: A function, bound method, partial or callable object, async or not.
        role: What it is registered for.
        pattern: The path it is registered for, whose values it may declare by name.

    Raises:
        SetupError: It cannot be called the way its role and pattern would; the text names
            function, file and line, and shows what fits.
    """
    route = f"{role.value}({pattern.text!r})"
    if not callable(function) or isinstance(function, type):
        raise SetupError(f"{route}: {function!r} is no function")
    layers = list(callable_layers(function))
    location = location_of(function)
    provided = _PROVIDED[role]
    by_name = (*pattern.parameters, *(("error",) if role in _TOLD_ERRORS else ()))
    try:
        _refuse_generators(layers)
        parameters = _parameters(function, layers)
        _check_provided(parameters, provided, by_name)
        declared = parameters[len(provided) :]
        for parameter in declared:
            _check_declared(parameter, role, pattern, by_name)
    except (TypeError, ValueError) as error:
        rest = f"then by name any of: {', '.join(by_name)}" if by_name else "and nothing else"
        raise SetupError(
            f"{location}, {route}: {error}. It is called with ({', '.join(provided)}), {rest}."
        ) from None
    message = parameters[1].annotation if role in _TOLD_ERRORS else _Parameter.empty
    return Handler(
        function=function,
        role=role,
        pattern=pattern,
        path_values=tuple(each.name for each in declared if each.name in pattern.parameters),
        wants_error=any(each.name == "error" for each in declared),
        location=location,
        message_annotation=message,
    )


def location_of(function: Callable[..., Any]) -> str:
    """Where the function that somebody wrote is found: ``"chat() in file.py:12"``."""
    *_, written = callable_layers(function)
    code = getattr(written, "__code__", None)
    name = getattr(written, "__qualname__", repr(written))
    return f"{name}()" + (f" in {code.co_filename}:{code.co_firstlineno}" if code else "")


# The helpers below raise ValueError with the reason alone; inspect_handler adds where it is.


def callable_layers(function: Any) -> Iterator[Any]:
    """The function and what it wraps, the function that somebody wrote last."""
    while True:
        yield function
        if isinstance(function, partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif isinstance(function.__call__, MethodType):
            function = function.__call__
        else:
            return


def _refuse_generators(layers: Iterable[Any]) -> None:
    for layer in layers:
        if inspect.iscoroutinefunction(layer):
            return  # it may wrap a generator, and run it
        if inspect.isgeneratorfunction(layer) or inspect.isasyncgenfunction(layer):
            raise ValueError("a generator is never run; it must not use 'yield'")


def _parameters(function: Any, layers: Iterable[Any]) -> list[inspect.Parameter]:
    signature = inspect.signature(function, **_AS_WRITTEN)
    # What a partial has bound by keyword is neither ours to pass nor ours to judge.
    bound = {name for layer in layers if isinstance(layer, partial) for name in layer.keywords}
    return [each for each in signature.parameters.values() if each.name not in bound]


def _check_provided(
    parameters: Sequence[inspect.Parameter], provided: Sequence[str], by_name: Collection[str]
) -> None:
    for parameter in parameters:
        if parameter.kind in (_Parameter.VAR_POSITIONAL, _Parameter.VAR_KEYWORD):
            raise ValueError(f"'{parameter}' does not tell what it wants")
    for index, what in enumerate(provided):
        position = f"its parameter {index + 1} must be the {what}"
        if index >= len(parameters) or parameters[index].kind is _Parameter.KEYWORD_ONLY:
            raise ValueError(position)
        # A name that belongs to another value mostly shows that this one was forgotten.
        if (name := parameters[index].name) in by_name:
            raise ValueError(f"{position}, but has the name of another value, {name!r}")


def _check_declared(
    parameter: inspect.Parameter, role: Role, pattern: Pattern, by_name: Collection[str]
) -> None:
    name, annotation = parameter.name, parameter.annotation
    if parameter.kind is _Parameter.POSITIONAL_ONLY:
        raise ValueError(f"{name!r} must not be positional-only")
    if name == "error" and role is Role.SERVE:
        raise ValueError(
            "a serve handler meets an error where it receives: catch ConnectionClosedError there, "
            "or register on_error, instead of declaring 'error'"
        )
    if name not in by_name:
        raise ValueError(f"there is no {name!r} to pass")
    if isinstance(annotation, str):
        annotation = _JUDGED.get(annotation.strip("'\""))
    expected = pattern.parameters.get(name)
    if annotation in _JUDGED.values() and expected is not None and annotation is not expected:
        raise ValueError(
            f"{name!r} is annotated {annotation.__name__}, but comes as {expected.__name__}"
        )
