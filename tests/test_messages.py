"""JSON in and out, and what the annotation of a message means."""

# ruff: noqa: UP006, UP045 - the older forms of a union are part of what is tested.

# No "from __future__ import annotations" here: handlers below need annotations that are evaluated.
import enum
import functools
import inspect
import json
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Annotated, Any, Generic, Literal, NamedTuple, Optional, TypedDict, TypeVar, Union
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roomsock.errors import CloseCode, InvalidMessage
from roomsock.messages import JsonDecoder, encode_json, message_type_of, takes, type_name

T = TypeVar("T")


class Say(msgspec.Struct, tag="say"):
    text: str
    to: "list[Say]" = []


class Leave(msgspec.Struct, tag="leave", forbid_unknown_fields=True):
    pass


class Untagged(msgspec.Struct):
    x: int


class Box(msgspec.Struct, Generic[T]):
    value: T


@dataclass
class Point:
    x: float
    y: float = 0.0


@dataclass
class Line:
    a: Point
    b: Point


class Profile(TypedDict):
    name: str


class Pair(NamedTuple):
    a: int
    b: str


class Colour(enum.Enum):
    RED = "red"


class Picky(msgspec.Struct):
    """Raises what a client asks for."""

    kind: str

    def __post_init__(self) -> None:
        raise {"key": KeyError, "value": ValueError, "assert": AssertionError}[self.kind]("picky")


class Foreign:
    """A class that msgspec knows nothing about."""


class Holder(msgspec.Struct):
    inside: dict[str, list[Foreign]]


class WithDefaults(msgspec.Struct):
    """Its default cannot be encoded, which is no reason not to decode it."""

    x: int = typing.cast(int, Foreign())
    parent: Optional["WithDefaults"] = None


def invalid(decoder: JsonDecoder, data: str | bytes) -> InvalidMessage:
    with pytest.raises(InvalidMessage) as caught:
        decoder.decode(data)
    error = caught.value
    assert error.code == CloseCode.INVALID_DATA
    assert error.reason == decoder.reason
    assert isinstance(error.__cause__, Exception)
    return error


class TestEncoding:
    @pytest.mark.parametrize(
        ("value", "encoded"),
        [
            ({"a": [1, 2.5, None, True, "é😀"]}, '{"a":[1,2.5,null,true,"é😀"]}'),
            ([math.nan, math.inf, -math.inf], "[null,null,null]"),
            (Say("hi"), '{"type":"say","text":"hi","to":[]}'),
            (Point(1, 2), '{"x":1,"y":2}'),
            (UUID(int=0), '"00000000-0000-0000-0000-000000000000"'),
            (datetime(2020, 1, 1, tzinfo=timezone.utc), '"2020-01-01T00:00:00Z"'),
            (b"ab", '"YWI="'),
            ({1: "one"}, '{"1":"one"}'),
            (msgspec.Raw(b"[1 ]"), "[1 ]"),
        ],
    )
    def test_values_become_compact_utf8(self, value: Any, encoded: str) -> None:
        assert encode_json(value) == encoded.encode()

    @pytest.mark.parametrize("value", [object(), 1j, {(1,): 2}, {None: 1}, [print], {"a": object}])
    def test_what_json_has_no_form_for_is_a_type_error(self, value: Any) -> None:
        with pytest.raises(TypeError):
            encode_json(value)

    @pytest.mark.parametrize(
        "text", ["\ud800", "a\udfffb", "\ud83d\ude00", "é" * 100 + "\udc80"], ids=ascii
    )
    def test_lone_surrogates_are_a_value_error_wherever_they_stand(self, text: str) -> None:
        for value in (text, [text], {text: 1}, {"a": text}, Say(text), Point(1, text)):  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="surrogates not allowed"):
                encode_json(value)

    def test_depth_without_end_is_a_value_error(self) -> None:
        itself: list[Any] = []
        itself.append(itself)
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        for value in (itself, deep):
            with pytest.raises(ValueError, match="nested too deeply"):
                encode_json(value)
        while deep:  # Let go of it level by level: a recursive release is slow on some versions.
            deep = deep.pop()


class TestDecoding:
    @pytest.mark.parametrize(
        ("message_type", "text", "value"),
        [
            (Any, ' {"a": [1, -0.5e3, null, true]} ', {"a": [1, -500.0, None, True]}),
            (Any, "null", None),
            (Any, '{"a":1,"a":2}', {"a": 2}),
            (Any, '"\\ud83d\\ude00\\u0000"', "😀\0"),
            (Say, '{"type":"say","text":"é"}', Say("é")),
            (Say, '{"type":"say","text":"é","more":1}', Say("é")),
            (Say | Leave, '{"type":"leave"}', Leave()),
            (Point, '{"x":1}', Point(1.0)),
            (Profile, '{"name":"n"}', {"name": "n"}),
            (Pair, '[1,"b"]', Pair(1, "b")),
            (Box[int], '{"value":1}', Box(1)),
            (Colour, '"red"', Colour.RED),
            (dict[str, list[int]], '{"a":[1]}', {"a": [1]}),
            (int | str | None, "null", None),
            (Annotated[int, msgspec.Meta(ge=1)], "1", 1),
            (WithDefaults, '{"x":1}', WithDefaults(1)),
        ],
    )
    @pytest.mark.parametrize("kind", [str, bytes])
    def test_messages_become_values_of_the_type(
        self, message_type: Any, text: str, value: Any, kind: type
    ) -> None:
        decoder = JsonDecoder(message_type)
        assert decoder.decode(text if kind is str else text.encode()) == value
        assert decoder.message_type is message_type

    @pytest.mark.parametrize(
        "data",
        [
            "",
            " ",
            "nope",
            "[1] x",
            "[1]\0",
            "[1,]",
            "{'a':1}",
            "01",
            "1.",
            ".5",
            "NaN",
            "[Infinity]",
            "-Infinity",
            "1e400",
            "[-1e400]",
            "9" * 5_000,
            "\ufeff1",
            b"\xef\xbb\xbf1",
            "1".encode("utf-16"),
            '"\n"',
            '"\ud800"',
            '"\\ud800"',
            '{"\\ud800":1}',
            '"\\ud800 and enough text behind it"',
            '"\\udc00 and enough text behind it"',
            '"\\ud800\\u0041 and enough text behind it"',
            '"\\ud800\\ud800 and enough text behind it"',
            b'"\xff"',
            b'"\xed\xa0\x80"',
            b'"\xc0\xaf"',
            "[" * 100_000 + "]" * 100_000,
            '{"a":' * 100_000,
        ],
        ids=lambda data: ascii(data[:20]),
    )
    def test_what_is_no_json_is_invalid_for_every_type(self, data: str | bytes) -> None:
        for message_type in (Any, str, float, list[Any], dict[str, Any], Say):
            invalid(JsonDecoder(message_type), data)

    @pytest.mark.parametrize(
        "skipped",
        [b'"\xff"', b'"\xed\xa0\x80"', b'"\\ud800"', b"[" * 100_000, b'{"a":' * 100_000, b"NaN"],
        ids=lambda data: ascii(data[:10]),
    )
    def test_fields_that_nobody_reads_must_be_json_too(self, skipped: bytes) -> None:
        data = b'{"type":"say","unread":' + skipped + b',"text":"hi"}'
        invalid(JsonDecoder(Say), data)

    @pytest.mark.parametrize(
        ("message_type", "text", "said"),
        [
            (Say, '{"type":"say","text":1}', "Expected `str`, got `int` - at `$.text`"),
            (Say, '{"type":"say","text":"","to":[{"type":"say"}]}', "field `text` - at `$.to[0]`"),
            (Say, "null", "Expected `object`, got `null`"),
            (Say | Leave, '{"type":"dance"}', "Invalid value 'dance' - at `$.type`"),
            (Point, '{"x":"1"}', "Expected `float`, got `str` - at `$.x`"),
            (list[int], "[1,2,3.5]", "Expected `int`, got `float` - at `$[2]`"),
            (Picky, '{"kind":"value"}', "picky"),
            (Picky, '{"kind":"key"}', "KeyError: 'picky'"),
            (list[Picky], '[{"kind":"assert"}]', "AssertionError: picky"),
            (Any, "[" * 100_000, "nested too deeply"),
            (Any, b'"\xff"', "'utf-8' codec can't decode byte 0xff in position 1"),
        ],
    )
    def test_the_text_says_what_was_wrong_and_where(
        self, message_type: Any, text: str, said: str
    ) -> None:
        assert said in str(invalid(JsonDecoder(message_type), text))

    def test_a_client_cannot_write_its_own_lines_into_a_log(self) -> None:
        text = str(invalid(JsonDecoder(Say | Leave), '{"type":"a\\nERROR b\\u0000\\u202e é"}'))
        assert text == "Invalid value 'a\\nERROR b\\x00\\u202e é' - at `$.type`"

    def test_a_long_text_is_cut_before_the_name_of_the_field(self) -> None:
        text = str(invalid(JsonDecoder(Say | Leave), json.dumps({"type": "x" * 500_000})))
        assert len(text) == 300
        assert text.startswith("Invalid value 'xxx")
        assert text.endswith("xxx' - at `$.type`")

    def test_the_reason_is_given_and_fits_a_close_frame(self) -> None:
        assert JsonDecoder(Any).reason == "invalid message"
        where = "/chat/<room> expects Say"
        assert JsonDecoder(Say, where).reason == f"invalid message: {where}"
        for long in ("x" * 500, "é" * 500, "a" + "é" * 500, "😀" * 500, "\ud800" * 500):
            assert 119 < len(JsonDecoder(Any, long).reason.encode()) <= 123

    def test_exceptions_that_are_no_errors_pass(self) -> None:
        class Stop(msgspec.Struct):
            def __post_init__(self) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            JsonDecoder(Stop).decode("{}")

    @pytest.mark.parametrize(
        ("message_type", "said"),
        [
            (Point | Line, "Point | Line"),
            (Say | Untagged, "Say | Untagged"),
            (str | bytes, "str | bytes"),
            (5, "5"),
            (Foreign, "Foreign"),
            (object, "object"),
            (complex, "complex"),
            (Holder, "does not know the class Foreign"),
            (list[tuple[Foreign, ...]], "list[tuple[Foreign, ...]]"),
            (Box[Foreign], "Box[Foreign]"),
        ],
    )
    def test_what_cannot_be_decoded_is_refused_with_the_form_that_can(
        self, message_type: Any, said: str
    ) -> None:
        with pytest.raises(TypeError) as caught:
            JsonDecoder(message_type)
        assert said in str(caught.value)
        assert 'class Say(msgspec.Struct, tag="say"):' in str(caught.value)

    def test_a_name_missing_inside_a_type_may_be_found_later(self) -> None:
        namespace: dict[str, Any] = {"dataclass": dataclass}
        source = "@dataclass\nclass Early:\n    late: 'Late'\n"
        exec(source, namespace)
        Early = namespace["Early"]
        Early.__module__ = __name__
        with pytest.raises(NameError, match="Late"):
            JsonDecoder(Early)
        globals()["Late"] = int
        try:
            assert JsonDecoder(Early).decode('{"late":1}') == Early(1)
        finally:
            del globals()["Late"]


@pytest.mark.parametrize(
    ("tp", "name"),
    [
        (Any, "Any"),
        (None, "None"),
        (type(None), "None"),
        (Say, "Say"),
        (Say | Leave, "Say | Leave"),
        (Union[Say, Leave, None], "Say | Leave | None"),
        (list[int], "list[int]"),
        (typing.List[int], "list[int]"),
        (dict[str, list[Say | None]], "dict[str, list[Say | None]]"),
        (tuple[int, ...], "tuple[int, ...]"),
        (Literal["a", 1], "Literal['a', 1]"),
        (Annotated[str, msgspec.Meta(max_length=5)], "str"),
        (Box[int], "Box[int]"),
        (T, "T"),
        (5, "5"),
    ],
)
def test_type_names_read_as_they_are_written(tp: Any, name: str) -> None:
    assert type_name(tp) == name


async def handler(ws: Any, message: Any) -> None: ...


class Called:
    async def __call__(self, ws: Any, message: Any) -> None: ...

    def method(self, ws: Any, message: Any) -> None: ...


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    # A wrapper from elsewhere, whose globals know none of the names here.
    namespace: dict[str, Any] = {"functools": functools, "function": function}
    source = "@functools.wraps(function)\ndef wrapper(*args):\n    return function(*args)"
    exec(source, namespace)
    wrapper: Callable[..., Any] = namespace["wrapper"]
    return wrapper


EVERY_CALLABLE = [
    handler,
    Called(),
    Called().method,
    partial(handler),
    partial(Called()),
    partial(partial(handler, 1)),
    decorated(handler),
    decorated(Called().method),
    decorated(partial(handler)),
    partial(decorated(handler)),
]


class TestMessageType:
    @pytest.mark.parametrize(
        ("annotation", "message_type"),
        [
            (inspect.Parameter.empty, Any),
            (Any, Any),
            ("Any", Any),
            (Say, Say),
            ("Say", Say),
            ("'Say'", Say),
            ("Say | Leave", Say | Leave),
            (Say | None, Say),
            ("Say | None", Say),
            (Optional[Say], Say),
            (Optional["Say"], Say),
            ("Optional['Say']", Say),
            (Union[Say, None, Leave], Say | Leave),
            ("None | Say | Leave", Say | Leave),
            (Union["Say", "Leave", None], Union[Say, Leave]),
            (Optional[Any], Any),
            ("list[Say]", list[Say]),
            (list[Say | None], list[Say | None]),
            ("typing.List[Say] | None", typing.List[Say]),
            (Annotated[int, msgspec.Meta(ge=1)], Annotated[int, msgspec.Meta(ge=1)]),
        ],
        ids=repr,
    )
    def test_an_annotation_means_its_type_without_none(
        self, annotation: Any, message_type: Any
    ) -> None:
        assert message_type_of(annotation, handler, {}) == message_type

    def test_null_is_invalid_where_the_annotation_allowed_none(self) -> None:
        invalid(JsonDecoder(message_type_of("Say | None", handler, {})), "null")

    @pytest.mark.parametrize("function", EVERY_CALLABLE)
    def test_text_is_evaluated_where_the_function_was_written(
        self, function: Callable[..., Any]
    ) -> None:
        assert message_type_of("Say | Leave | None", function, {}) == Say | Leave

    def test_local_names_come_before_the_globals(self) -> None:
        class Local:
            pass

        assert message_type_of("Local", handler, locals()) is Local
        assert message_type_of("Say", handler, {"Say": Local}) is Local

    def test_a_name_that_does_not_exist_yet_is_a_name_error(self) -> None:
        for annotation in ("Later", "Later | None", Optional["Later"]):  # noqa: F821
            with pytest.raises(NameError, match="Later"):
                message_type_of(annotation, handler, {})
            assert message_type_of(annotation, handler, {"Later": Say}) is Say

    def test_a_function_without_globals_has_the_local_names(self) -> None:
        assert message_type_of("Say", print, {"Say": Say}) is Say
        with pytest.raises(NameError):
            message_type_of("Say", print, {})

    @pytest.mark.parametrize("annotation", ["not a type", "Say.nothing", "1 +", "Say[int]", "''"])
    def test_what_cannot_be_evaluated_is_a_type_error(self, annotation: str) -> None:
        with pytest.raises(TypeError, match="cannot read the annotation"):
            message_type_of(annotation, handler, {})

    @pytest.mark.parametrize("annotation", [None, type(None), "None", "Optional[None]"])
    def test_none_alone_is_no_message(self, annotation: Any) -> None:
        with pytest.raises(TypeError, match="always None"):
            message_type_of(annotation, handler, {})


class TestTakes:
    @pytest.mark.parametrize(
        ("annotation", "kinds"),
        [
            (inspect.Parameter.empty, {str}),
            (str, {str}),
            ("str", {str}),
            (bytes, {bytes}),
            ("bytes", {bytes}),
            (str | bytes, {str, bytes}),
            ("str | bytes", {str, bytes}),
            ("bytes | str | None", {str, bytes}),
            (Optional[bytes], {bytes}),
            (Union[str, bytes], {str, bytes}),
            (Union["str", "bytes", None], {str, bytes}),
        ],
    )
    def test_the_annotation_says_which_kinds(self, annotation: Any, kinds: set[type]) -> None:
        assert takes(annotation, handler, {}) == kinds

    @pytest.mark.parametrize(
        ("annotation", "name"),
        [
            (int, "int"),
            (Any, "Any"),
            ("Say | None", "Say"),
            (str | int, "str | int"),
            (None, "None"),
            (Annotated[str, []], "str"),
        ],
    )
    def test_any_other_type_points_to_on_json(self, annotation: Any, name: str) -> None:
        with pytest.raises(TypeError) as caught:
            takes(annotation, handler, {})
        assert str(caught.value) == (
            f"on_message takes str, bytes or str | bytes, not {name}; for other types use on_json"
        )

    def test_a_name_that_does_not_exist_yet_is_a_name_error(self) -> None:
        with pytest.raises(NameError):
            takes("Later", handler, {})
        assert takes("Later", handler, {"Later": bytes}) == {bytes}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=20,
)


@given(json_values)
def test_values_come_back_as_they_went(value: Any) -> None:
    encoded = encode_json(value)
    assert json.loads(encoded) == value
    assert JsonDecoder(Any).decode(encoded) == value
    assert JsonDecoder(Any).decode(encoded.decode()) == value


@given(
    st.one_of(
        st.binary(),
        st.text(),
        st.text(alphabet='{}[]",:\\u0dD8cCeE+-.1tn ').map(str.encode),
        json_values.map(encode_json).flatmap(
            lambda data: st.integers(0, len(data)).map(lambda cut: data[:cut])
        ),
    ),
    st.sampled_from([Any, str, float, Say | Leave, Point, dict[str, list[int]]]),
)
def test_whatever_arrives_is_a_value_or_invalid(data: str | bytes, message_type: Any) -> None:
    try:
        value = JsonDecoder(message_type).decode(data)
    except InvalidMessage as error:
        assert len(str(error)) < 400
        return
    # A value is one that can go out again, and the standard library reads it alike.
    encode_json(value)
    json.loads(data)


def test_what_is_no_json_is_the_callers_mistake() -> None:
    with pytest.raises(TypeError, match="object"):
        encode_json(object())


def test_a_number_of_another_class_goes_out_as_that_number() -> None:
    class Count(int):
        """What a send returns is one."""

    assert encode_json({"delivered": Count(3)}) == b'{"delivered":3}'
