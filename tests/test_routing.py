"""Path patterns and their order of precedence."""

from __future__ import annotations

import string
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roomsock.routing import Pattern, Router

SOME_UUID = UUID("12345678-90ab-cdef-1234-567890abcdef")


def winner(texts: list[str], path: str) -> str | None:
    router: Router[str] = Router()
    for text in texts:
        router.add(Pattern(text), text)
    found = router.match(path)
    return found and found[0]


@pytest.mark.parametrize(
    ("text", "path", "values"),
    [
        ("/", "/", {}),
        ("/chat", "/chat", {}),
        ("/a//b/", "/a//b/", {}),
        ("/café & 100%", "/café & 100%", {}),
        ("/a.b*(c)", "/a.b*(c)", {}),
        ("/chat/<room>", "/chat/lobby", {"room": "lobby"}),
        ("/chat/<room>", "/chat/zwei Wörter\n", {"room": "zwei Wörter\n"}),
        ("/<a>/<b>", "/1/2", {"a": "1", "b": "2"}),
        ("/<int:id>", "/0", {"id": 0}),
        ("/<int:id>", "/007", {"id": 7}),
        ("/<int:id>", "/" + "9" * 18, {"id": 10**18 - 1}),
        ("/<float:x>", "/3.25", {"x": 3.25}),
        ("/<uuid:id>", f"/{SOME_UUID}", {"id": SOME_UUID}),
        ("/<uuid:id>", f"/{str(SOME_UUID).upper()}", {"id": SOME_UUID}),
        ("/<path:rest>", "/a/b//c.txt", {"rest": "a/b//c.txt"}),
        ("/<path:rest>", "//", {"rest": "/"}),
        ("/<path:rest>/edit", "/a/edit/b/edit", {"rest": "a/edit/b"}),
        ("/<path:rest>/edit", "/a\nb/edit", {"rest": "a\nb"}),
        ("/v<int:n>", "/v2", {"n": 2}),
        ("/<name>.txt", "/a.txt.txt", {"name": "a.txt"}),
        ("/a-<path:rest>.zip", "/a-b/c.zip", {"rest": "b/c"}),
    ],
)
def test_pattern_yields_converted_values(text: str, path: str, values: dict[str, Any]) -> None:
    assert Pattern(text).match(path) == values


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/chat", "/chat/"),
        ("/chat/", "/chat"),
        ("/chat", "/chat\n"),
        ("/chat", "/Chat"),
        ("/chat", "chat"),
        ("/a.b", "/axb"),
        ("/<x>", "/"),
        ("/<x>", "/a/b"),
        ("/<x>", ""),
        ("/<int:id>", "/-1"),
        ("/<int:id>", "/+1"),
        ("/<int:id>", "/1_000"),
        ("/<int:id>", "/ 1"),
        ("/<int:id>", "/1\n"),
        ("/<int:id>", "/\N{ARABIC-INDIC DIGIT ONE}"),
        ("/<int:id>", "/" + "9" * 19),
        ("/<float:x>", "/1"),
        ("/<float:x>", "/1."),
        ("/<float:x>", "/.5"),
        ("/<float:x>", "/-1.5"),
        ("/<float:x>", "/1.5e3"),
        ("/<float:x>", "/nan"),
        ("/<float:x>", f"/{'9' * 400}.0"),
        ("/<uuid:id>", f"/{SOME_UUID.hex}"),
        ("/<uuid:id>", f"/{{{SOME_UUID}}}"),
        ("/<path:rest>", "/"),
        ("/files/<path:rest>", "/files"),
        ("/files/<path:rest>", "/files/"),
        ("/v<int:n>", "/v"),
        ("/v<int:n>", "/w2"),
        ("/<name>.txt", "/.txt"),
    ],
)
def test_pattern_leaves_other_paths_alone(text: str, path: str) -> None:
    assert Pattern(text).match(path) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chat", "must start with '/'"),
        ("", "must start with '/'"),
        ("<room>", "must start with '/'"),
        ("/chat/{room}", "write <room> instead of {room}"),
        ("/users/{id:int}", "write <int:id> instead of {id:int}"),
        ("/users/{id:str}", "write <id> instead of {id:str}"),
        ("/users/{id:[0-9]+}", "write <id> instead of {id:[0-9]+}"),
        ("/users/{}", "write <name> instead of {}"),
        ("/<id:int>", "did you mean <int:id>?"),
        ("/<string:x>", "there are <…>, <int:…>, <float:…>, <uuid:…>, <path:…>"),
        ("/<str:x>", "unknown converter 'str'"),
        ("/<:x>", "unknown converter ''"),
        ("/<a:b:c>", "unknown converter 'a:b'"),
        ("/<>", "'' cannot be the name"),
        ("/<int:>", "'' cannot be the name"),
        ("/<2nd>", "'2nd' cannot be the name"),
        ("/<room name>", "'room name' cannot be the name"),
        ("/<class>", "'class' cannot be the name"),
        ("/<error>", "cannot be called 'error'"),
        ("/<int:message>", "cannot be called 'message'"),
        ("/<a>/<a>", "'a' is used twice"),
        ("/<a>/<int:a>", "'a' is used twice"),
        ("/<a>-<b>", "two values in one segment"),
        ("/<path:a>/x/<path:b>", "at most one <path:…>"),
        ("/<room", "every '<' needs its '>'"),
        ("/room>", "every '<' needs its '>'"),
        ("/<<room>>", "every '<' needs its '>'"),
        ("/<ro/om>", "every '<' needs its '>'"),
        ("/chat?x=1", "holds '?'"),
        ("/chat#top", "holds '#'"),
        ("/caf%C3%A9", "holds '%C3'"),
        ("/a/../b", "'.' and '..'"),
        ("/.", "'.' and '..'"),
        (print, "such as '/chat/<room>'"),
    ],
)
def test_what_cannot_be_a_pattern_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="invalid path pattern") as caught:
        Pattern(text)
    assert said in str(caught.value)
    assert repr(text) in str(caught.value)


def test_parameters_tell_names_and_types_in_order() -> None:
    pattern = Pattern("/<b>/<int:a>/<float:x>/<uuid:u>/<path:p>")
    assert list(pattern.parameters.items()) == [
        ("b", str),
        ("a", int),
        ("x", float),
        ("u", UUID),
        ("p", str),
    ]


def test_pattern_shows_itself() -> None:
    assert repr(Pattern("/<room>")) == "Pattern('/<room>')"
    assert Pattern("/<room>").text == "/<room>"


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("/chat/<a>", "/chat/<b>", True),
        ("/v<int:a>.0", "/v<int:b>.0", True),
        ("/<a>", "/<int:a>", False),
        ("/<a>", "/<path:a>", False),
        ("/<a>", "/<a>/", False),
        ("/<a>x", "/x<a>", False),
        ("/a", "/a", True),
    ],
)
def test_shape_forgets_names_only(one: str, other: str, equal: bool) -> None:
    assert (Pattern(one).shape == Pattern(other).shape) is equal


@pytest.mark.parametrize(
    ("better", "worse", "path"),
    [
        ("/chat", "/<x>", "/chat"),
        ("/chat", "/<path:x>", "/chat"),
        ("/<x>", "/<path:x>", "/chat"),
        ("/v<x>", "/<x>", "/v1"),
        ("/<x>.txt", "/<x>", "/a.txt"),
        ("/<x>", "/v<path:x>", "/v1"),
        ("/v<path:x>", "/<path:x>", "/v1"),
        ("/a/<x>", "/<x>/b", "/a/b"),
        ("/a/<path:x>", "/<x>/b", "/a/b"),
        ("/<x>/b", "/<path:x>", "/a/b"),
        ("/<path:x>/edit", "/<path:x>", "/a/edit"),
        ("/a/<x>/<y>", "/a/<path:x>", "/a/b/c"),
    ],
)
def test_precedence_does_not_depend_on_registration(better: str, worse: str, path: str) -> None:
    assert winner([better, worse], path) == better
    assert winner([worse, better], path) == better


def test_equal_ranks_keep_the_order_of_registration() -> None:
    assert winner(["/<x>", "/<int:x>"], "/1") == "/<x>"
    assert winner(["/<int:x>", "/<x>"], "/1") == "/<int:x>"
    router: Router[int] = Router()
    for number in (1, 2):
        router.add(Pattern("/same"), number)
    assert router.match("/same") == (1, {})


def test_router_goes_on_to_the_next_pattern_that_fits() -> None:
    texts = ["/<int:x>", "/chat", "/<uuid:x>", "/chat/<room>"]
    assert winner(texts, "/chat/a") == "/chat/<room>"
    assert winner(texts, "/nothing") is None
    assert winner([], "/") is None


def test_router_returns_the_values_of_the_path() -> None:
    router: Router[str] = Router()
    router.add(Pattern("/chat/<room>"), "chat")
    assert router.match("/chat/lobby") == ("chat", {"room": "lobby"})


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/<path:a>/<b>/<c>/x", "/a" * 200_000),
        ("/<path:a>/<b>/<c>/x", "/" * 400_000),
        ("/<a>.t/<b>.t/x", "/" + ".t" * 200_000 + "/" + ".t" * 200_000),
        ("/a<path:a>a", "/" + "a" * 400_000 + "b"),
        ("/<a>aaaaaaaa", "/" + "a" * 400_000 + "b"),
        ("/<int:a>1/<int:b>1", "/" + "1" * 400_000),
    ],
)
def test_matching_takes_linear_time(text: str, path: str) -> None:
    """With the square of these lengths this test would run for many minutes."""
    assert Pattern(text).match(path) is None


segments = st.text(st.characters(exclude_characters="/"), min_size=1)
paths = st.one_of(st.text(), st.lists(st.text(alphabet="ab/1.-<>\n")).map(lambda p: "/".join(p)))
ALL_KINDS = ["/", "/<a>", "/<int:a>", "/<float:a>", "/<uuid:a>", "/a<a>/b", "/<a>/<path:b>/1"]


@given(paths)
def test_no_path_raises(path: str) -> None:
    router: Router[str] = Router()
    for text in ALL_KINDS:
        router.add(Pattern(text), text)
    found = router.match(path)
    fitting = [text for text in ALL_KINDS if Pattern(text).match(path) is not None]
    assert (found and found[0] in fitting) or (found is None and not fitting)


@given(
    st.fixed_dictionaries(
        {
            "a": segments,
            "n": st.integers(0, 10**18 - 1),
            "x": st.integers(0, 10**9).map(lambda n: n / 1024),
            "u": st.uuids(),
            "p": st.text(min_size=1),
        }
    )
)
def test_values_survive_the_way_through_a_path(values: dict[str, Any]) -> None:
    values["x"] = float(f"{values['x']:.10f}")
    path = "/{a}/v{n}/{x:.10f}/{u}/{p}".format(**values)
    assert Pattern("/<a>/v<int:n>/<float:x>/<uuid:u>/<path:p>").match(path) == values


@given(st.text(alphabet=string.printable))
def test_text_is_a_pattern_or_a_value_error(text: str) -> None:
    try:
        pattern = Pattern("/" + text)
    except ValueError:
        return
    assert pattern.parameters or pattern.match("/" + text) == {}
