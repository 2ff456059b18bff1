"""JSON in and out, and what a message parameter's annotation means.

msgspec does the work; here it is made strict where it is lenient and quiet where it is talkative.
Imports msgspec, signatures and what is below. JSON is that of RFC 8259: UTF-8 without a byte order
mark, no NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
import msgspec.inspect

from .errors import InvalidMessage
from .protocol.frames import truncated
from .signatures import callable_layers

_MAX_DETAIL = 300  # characters of an error's text

_TAGGED_FORM = (
    "A message is plain JSON types, a dataclass, a TypedDict or a msgspec.Struct; a choice between "
    'several is a union of tagged Structs:\n    class Say(msgspec.Struct, tag="say"):\n'
    "        text: str"
)


def _as_int(value: Any) -> int:
    # msgspec asks this for what it does not know, subclasses of int among them: what a send
    # returns is one.
    if isinstance(value, int):
        return int(value)
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


_encode = msgspec.json.Encoder(enc_hook=_as_int).encode


def encode_json(value: Any) -> bytes:
    """Encode a value as JSON, in UTF-8.

    NaN and the infinities become ``null``, bytes base64. ``msgspec.Raw`` goes out as it is.

    Raises:
        TypeError: The value holds something that JSON has no form for.
        ValueError: It holds text that is no Unicode (a lone surrogate), or is nested too deeply.
    """
    try:
        return _encode(value)
    except RecursionError as error:
        raise ValueError("the value is nested too deeply, or in itself") from error


class JsonDecoder:
    """Decodes and validates messages of one type. Build it once: that is the slow part.

    Args:
        message_type: What to decode to, ``Any`` for whatever JSON holds.
        where: What a close frame's reason says of an invalid message, such as
            ``"/chat/<room> expects Say"``; it is cut to fit.

    Attributes:
        message_type: As given.
        reason: The reason of every InvalidMessage this decoder raises.

    Raises:
        TypeError: msgspec cannot decode to this type; the text shows what it can.
        NameError: An annotation inside the type names what does not exist yet; try again later.
    """

    __slots__ = ("_decode", "message_type", "reason")

    def __init__(self, message_type: Any, where: str = "") -> None:
        try:
            self._decode = msgspec.json.Decoder(message_type).decode
            _refuse_unknown_classes(message_type)
        except NameError:
            raise
        except Exception as error:
            raise TypeError(
                f"cannot decode JSON to {type_name(message_type)}: {error}. {_TAGGED_FORM}"
            ) from error
        self.message_type = message_type
        self.reason = truncated(f"invalid message: {where}" if where else "invalid message")

    def decode(self, data: str | bytes) -> Any:
        """Decode one message.

        Raises:
            InvalidMessage: It is no JSON in UTF-8, or not what the type says. What was wrong is in
                its text, the original exception in ``__cause__``.
        """
        try:
            # msgspec checks the UTF-8 of what it keeps only, and RFC 8259 knows no other encoding.
            return self._decode(data if isinstance(data, str) else data.decode())
        # Exception, because a type's __post_init__ may raise anything, at a client's will.
        except Exception as error:
            raise InvalidMessage(_describe(error), reason=self.reason) from error


def type_name(tp: Any) -> str:
    """Return a type's name as its author would write it: ``Say | Leave``, ``list[int]``."""
    origin, args = get_origin(tp), get_args(tp)
    if tp is NoneType or tp is ...:
        return "None" if tp is NoneType else "..."
    if origin is Annotated:
        return type_name(args[0])
    if origin in (Union, UnionType):
        return " | ".join(map(type_name, args))
    if args:
        return f"{type_name(origin)}[{', '.join(map(type_name, args))}]"
    return getattr(tp, "__name__", None) or repr(tp)


def message_type_of(
    annotation: Any, function: Callable[..., Any], local_names: Mapping[str, Any]
) -> Any:
    """Find the type that a message parameter's annotation stands for.

    Args:
        annotation: As ``inspect.signature`` gives it; ``Parameter.empty`` and ``Any`` are one.
        function: The handler, in whose globals a text is evaluated.
        local_names: Names that come before the globals: the locals of where it was registered.

    Returns:
        The type without ``None``: a handler that is called without a message when its connection
        failed may say so, and a JSON ``null`` is still invalid.

    Raises:
        NameError: A name does not exist yet; try again later.
        TypeError: It is no type, or None alone.
    """
    if annotation is Parameter.empty:
        return Any
    types = _alternatives(annotation, function, local_names)
    if not types:
        raise TypeError("a message that is always None cannot be decoded")
    return Union[types] if len(types) > 1 else types[0]


def takes(
    annotation: Any, function: Callable[..., Any], local_names: Mapping[str, Any]
) -> frozenset[type]:
    """Find which kinds of messages, str or bytes or both, an ``on_message`` handler takes.

    Arguments as for `message_type_of`; without an annotation it takes str.

    Raises:
        NameError: A name does not exist yet; try again later.
        TypeError: It is something else than str, bytes or both.
    """
    if annotation is Parameter.empty:
        return frozenset({str})
    kinds = _alternatives(annotation, function, local_names)
    if not kinds or any(kind is not str and kind is not bytes for kind in kinds):
        raise TypeError(
            "on_message takes str, bytes or str | bytes, not "
            f"{' | '.join(map(type_name, kinds)) or 'None'}; for other types use on_json"
        )
    return frozenset(kinds)


def _alternatives(
    annotation: Any, function: Any, local_names: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Evaluate an annotation and split it into the members of a union, None left out."""
    # A stand-in that has this one annotation: get_type_hints(function) would evaluate them all.
    holder = SimpleNamespace(__annotations__={"message": annotation})
    try:
        hints = get_type_hints(
            holder, _globals_of(function), dict(local_names), include_extras=True
        )
    except NameError:
        raise
    except Exception as error:
        raise TypeError(f"cannot read the annotation {annotation!r}: {error}") from error
    found = hints["message"]
    members = get_args(found) if get_origin(found) in (Union, UnionType) else (found,)
    return tuple(member for member in members if member is not NoneType)


def _globals_of(function: Any) -> dict[str, Any]:
    """The globals of the function that somebody wrote, below partials and decorators."""
    *_, written = callable_layers(function)
    return getattr(written, "__globals__", {})


def _refuse_unknown_classes(message_type: Any) -> None:
    # To a class it does not know msgspec decodes nothing at all, and finds no fault with it before
    # the first message.
    seen: set[int] = set()
    waiting: list[Any] = [msgspec.inspect.type_info(message_type)]
    while waiting:
        info = waiting.pop()
        if isinstance(info, msgspec.inspect.CustomType):
            raise TypeError(f"msgspec does not know the class {type_name(info.cls)}")
        if isinstance(info, tuple):
            waiting.extend(info)
        elif (
            isinstance(info, msgspec.inspect.Type | msgspec.inspect.Field) and id(info) not in seen
        ):
            seen.add(id(info))
            waiting.extend(getattr(info, name) for name in info.__struct_fields__)


def _describe(error: Exception) -> str:
    if isinstance(error, msgspec.MsgspecError):
        text = str(error)
    elif isinstance(error, RecursionError):
        text = "nested too deeply"
    else:
        text = f"{type(error).__name__}: {error}"
    # The text may repeat what the client sent, a mebibyte of it and line feeds to fake lines of a
    # log; the field's name is at its end.
    if len(text) > _MAX_DETAIL:
        text = f"{text[: _MAX_DETAIL - 100]} … {text[-97:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
