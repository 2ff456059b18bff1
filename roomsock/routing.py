"""Path patterns, and the router that finds the best one for a path.

Pure text, no I/O; imports nothing of roomsock. Patterns are written the way Flask and Werkzeug
write them, ``/chat/<room>`` and ``/users/<int:id>``, and are compared with the *decoded* path,
without its query. Literal text beats ``<x>``, which beats ``<path:x>``, segment by segment from the
left.
"""

from __future__ import annotations

import keyword
import re
from bisect import insort
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

T = TypeVar("T")

#: What is passed on of a path without values: one mapping for all connections.
NO_VALUES: Mapping[str, Any] = MappingProxyType({})


class _Converter(NamedTuple):
    """The text a converter takes, and the value it makes of it."""

    regex: str
    value_type: type[Any]


# Digits are ASCII and bounded: \d would take every script's digits, and int() costs the square of
# its length. 18 digits fit into 64 bits, and a float of 18 and 18 is never infinite.
_CONVERTERS = {
    "": _Converter("[^/]+", str),
    "int": _Converter("[0-9]{1,18}", int),
    "float": _Converter(r"[0-9]{1,18}\.[0-9]{1,18}", float),
    "uuid": _Converter("[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", UUID),
    "path": _Converter("(?s:.+)", str),
}

# Names of handler arguments, which a path value would hide.
_RESERVED = frozenset({"error", "message"})

# Ranks of a segment. The end of a pattern sorts last: one that goes on behind its <path:…> says
# more about the path than one that ends there.
_LITERAL, _MIXED, _VALUE, _MIXED_PATH, _PATH, _END = range(6)


class _Segment(NamedTuple):
    """What stands between two slashes: text, and at most one value with text around it."""

    prefix: str
    kind: str | None = None
    name: str = ""
    suffix: str = ""

    @property
    def rank(self) -> int:
        if self.kind is None:
            return _LITERAL
        mixed = bool(self.prefix or self.suffix)
        if self.kind == "path":
            return _MIXED_PATH if mixed else _PATH
        return _MIXED if mixed else _VALUE

    @property
    def shape(self) -> str:
        return self.prefix if self.kind is None else f"{self.prefix}<{self.kind}>{self.suffix}"

    @property
    def regex(self) -> str:
        value = "" if self.kind is None else f"({_CONVERTERS[self.kind].regex})"
        return re.escape(self.prefix) + value + re.escape(self.suffix)


class Pattern:
    """A path with named values: ``/chat/<room>``, ``/users/<int:id>``, ``/files/<path:rest>``.

    ``<name>`` takes one segment, ``<int:…>``, ``<float:…>`` and ``<uuid:…>`` one segment of that
    form, ``<path:…>`` whatever comes, slashes included; none takes the empty text. Literal text
    may stand around a value (``/v<int:version>``). A segment holds at most one value and a pattern
    at most one ``<path:…>``: then a path can be read in one way only, in time proportional to its
    length whatever a client sends.

    Args:
        text: The pattern, written decoded (``/café``, not ``/caf%C3%A9``).

    Attributes:
        text: As given.
        parameters: The names in their order, each with the type of its value.
        shape: The text without the names; patterns of equal shape match the same paths.
        rank: Sort key: of the patterns that match a path the first is the best.

    Raises:
        ValueError: The text cannot be a pattern; the exception says why and what to write.
    """

    __slots__ = ("_fullmatch", "parameters", "rank", "shape", "text")

    def __init__(self, text: str) -> None:
        _check_text(text)
        segments = [_parse_segment(text, segment) for segment in text.split("/")[1:]]
        names = [segment.name for segment in segments if segment.kind is not None]
        if twice := [name for name in names if names.count(name) > 1]:
            raise _refusal(text, f"the name {twice[0]!r} is used twice")
        if sum(segment.kind == "path" for segment in segments) > 1:
            raise _refusal(text, "a pattern has at most one <path:…>")
        self.text = text
        self.parameters: Mapping[str, type[Any]] = MappingProxyType(
            {
                segment.name: _CONVERTERS[segment.kind].value_type
                for segment in segments
                if segment.kind is not None
            }
        )
        self.shape = "".join(f"/{segment.shape}" for segment in segments)
        self.rank = (*(segment.rank for segment in segments), _END)
        self._fullmatch = re.compile("".join(f"/{segment.regex}" for segment in segments)).fullmatch

    def match(self, path: str) -> dict[str, Any] | None:
        """Return the converted values of a decoded path, or None if the pattern does not fit it."""
        found = self._fullmatch(path)
        if found is None:
            return None
        values = zip(self.parameters.items(), found.groups(), strict=True)
        return {name: convert(value) for (name, convert), value in values}

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"


class Router(Generic[T]):
    """Values by pattern, the most telling pattern first.

    Nothing is remembered per path: paths come from clients, and a cache of them would let a client
    fill the memory.
    """

    __slots__ = ("_exact", "_ranked")

    def __init__(self) -> None:
        self._exact: dict[str, T] = {}
        self._ranked: list[tuple[Pattern, T]] = []

    def add(self, pattern: Pattern, value: T) -> None:
        """Add a value; of patterns with equal rank the one added first wins."""
        if pattern.parameters:
            insort(self._ranked, (pattern, value), key=lambda route: route[0].rank)
        else:
            # A pattern without values has the best rank there is, so it needs no place in the list.
            self._exact.setdefault(pattern.text, value)

    def match(self, path: str) -> tuple[T, dict[str, Any]] | None:
        """Return the value of the best pattern for a decoded path, with the values in the path."""
        if path in self._exact:
            return self._exact[path], {}
        for pattern, value in self._ranked:
            params = pattern.match(path)
            if params is not None:
                return value, params
        return None


def _refusal(text: object, why: str) -> ValueError:
    return ValueError(f"invalid path pattern {text!r}: {why}")


def _check_text(text: str) -> None:
    """Refuse what no pattern may hold anywhere, first of all other frameworks' notations."""
    if not isinstance(text, str):
        # A decorator written without its parentheses is given the handler.
        raise _refusal(text, "it must be a text such as '/chat/<room>'")
    if braces := re.search(r"\{(\w*):?(\w*)[^{}]*\}", text):
        name, kind = braces.groups()
        form = f"{kind}:{name}" if kind in _CONVERTERS and kind else name
        raise _refusal(text, f"write <{form or 'name'}> instead of {braces[0]}")
    if not text.startswith("/"):
        raise _refusal(text, "it must start with '/'")
    if found := re.search("[?#]|%[0-9A-Fa-f]{2}", text):
        raise _refusal(
            text,
            f"it holds {found[0]!r}, but it is compared with the decoded path, without the query",
        )
    if not {".", ".."}.isdisjoint(text.split("/")):
        raise _refusal(text, "requests with the segments '.' and '..' are never routed")


def _parse_segment(text: str, segment: str) -> _Segment:
    # split() with a group: literal text and what stood in <> take turns.
    prefix, *rest = re.split("<([^<>]*)>", segment)
    if re.search("[<>]", prefix + "".join(rest[1::2])):
        raise _refusal(text, "every '<' needs its '>' in the same segment")
    if not rest:
        return _Segment(prefix)
    if len(rest) > 2:
        raise _refusal(text, "two values in one segment; put a '/' between them")
    value, suffix = rest
    kind, colon, name = value.rpartition(":")
    if kind not in _CONVERTERS or (colon and not kind):
        swapped = f" (did you mean <{name}:{kind}>?)" if name in _CONVERTERS and name else ""
        known = ", ".join(f"<{known}:…>" for known in _CONVERTERS if known)
        raise _refusal(text, f"unknown converter {kind!r}{swapped}; there are <…>, {known}")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise _refusal(text, f"{name!r} cannot be the name of a handler's argument")
    if name in _RESERVED:
        raise _refusal(text, f"a path value cannot be called {name!r}, as a handler's argument is")
    return _Segment(prefix, kind, name, suffix)
