"""Requests as handlers read them, and what handlers may answer with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roomsock.http import MultiMapping, Request, Response


def request(target: str = "/", *headers: str, body: bytes = b"") -> Request:
    block = "\n".join(headers).encode("latin-1")
    return Request("GET", target, target.partition("?")[0], block, body=body)


# MultiMapping


def test_a_name_with_several_values_shows_the_first_and_keeps_all() -> None:
    values = MultiMapping([("a", "1"), ("b", "2"), ("a", "3")])
    assert values["a"] == "1"
    assert values.getall("a") == ["1", "3"]
    assert values.getall("c") == []
    assert values.get("c") is None
    assert (list(values), len(values)) == (["a", "b"], 2)
    assert values == {"a": "1", "b": "2"}
    assert repr(values) == "MultiMapping({'a': ['1', '3'], 'b': ['2']})"


def test_a_missing_name_is_a_key_error() -> None:
    values = MultiMapping([])
    assert "a" not in values
    with pytest.raises(KeyError, match="a"):
        values["a"]


def test_who_changes_what_getall_gave_changes_nothing() -> None:
    values = MultiMapping([("a", "1")])
    values.getall("a").append("2")
    assert values.getall("a") == ["1"]


def test_names_may_be_folded() -> None:
    values = MultiMapping([("X-Name", "1"), ("x-name", "2")], fold=str.lower)
    assert "X-NAME" in values
    assert values.getall("x-Name") == ["1", "2"]
    assert list(values) == ["x-name"]


# Request


def test_headers_are_found_in_any_case_and_values_may_hold_colons() -> None:
    headers = request("/", "host:example.org:80", "accept:a", "accept:b").headers
    assert headers["Host"] == "example.org:80"
    assert headers.getall("ACCEPT") == ["a", "b"]
    assert list(headers) == ["host", "accept"]


def test_a_request_without_headers_has_none() -> None:
    assert len(request().headers) == 0
    assert request().subprotocols == ()
    assert len(request().cookies) == 0


def test_what_is_not_given_has_the_defaults_of_a_plain_request() -> None:
    asked = request("/a?b=c")
    assert (asked.client, asked.scheme, asked.body) == (None, "http", b"")
    assert repr(asked) == "<Request GET '/a?b=c' from None>"


def test_a_request_keeps_what_it_was_made_of() -> None:
    client = ("192.0.2.1", 4000)
    asked = Request("POST", "/%C3%B6?b", "/\xf6", b"", client=client, scheme="https", body=b"x")
    assert (asked.method, asked.target, asked.path) == ("POST", "/%C3%B6?b", "/\xf6")
    assert (asked.client, asked.scheme, asked.body) == (client, "https", b"x")


def test_a_body_is_kept_whatever_the_method() -> None:
    assert request(body=b"x").body == b"x"


def test_subprotocols_may_be_spread_over_headers_and_empty_items_do_not_count() -> None:
    asked = request("/", "sec-websocket-protocol:chat, ,soap", "sec-websocket-protocol:wamp")
    assert asked.subprotocols == ("chat", "soap", "wamp")


def test_the_query_is_decoded_and_blank_values_are_kept() -> None:
    query = request("/p?name=Ada+L%C3%B6we&tag=a&tag=b&flag=&bare#?=").query
    assert query["name"] == "Ada L\xf6we"
    assert query.getall("tag") == ["a", "b"]
    assert query["flag"] == ""
    assert len(request("/p").query) == 0


def test_a_query_of_many_fields_is_read_in_time_proportional_to_its_length() -> None:
    """It raised ValueError above 1,000 fields, in the handler and at a client's will."""
    asked = request("/?" + "&".join(f"{n:x}=" for n in range(20_000)))
    began = time.process_time()
    assert len(dict(asked.query)) == 20_000
    assert time.process_time() - began < 1  # 12 s, when each look-up searched the pairs


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E)))
def test_no_query_raises(text: str) -> None:
    for name, value in request(f"/?{text}").query.items():
        assert isinstance(name, str)
        assert isinstance(value, str)


@pytest.mark.parametrize(
    ("headers", "cookies"),
    [
        (["a=1; b=2"], {"a": "1", "b": "2"}),
        (["a=1", "b=2"], {"a": "1", "b": "2"}),
        (["a=1;b=2;"], {"a": "1", "b": "2"}),
        (["a=x=y"], {"a": "x=y"}),
        (['a="1"'], {"a": "1"}),
        (["path=/x; expires=never"], {"path": "/x", "expires": "never"}),
        (['bad={"x":1}; session=s'], {"bad": '{"x":1}', "session": "s"}),
        (["nonsense; b[0]=1; session=s"], {"b[0]": "1", "session": "s"}),
        ([], {}),
    ],
)
def test_each_cookie_is_read_whatever_the_others_look_like(
    headers: list[str], cookies: dict[str, str]
) -> None:
    """The standard library's parser gives up at the first that is not of its grammar."""
    assert request("/", *(f"cookie:{header}" for header in headers)).cookies == cookies


def test_of_equal_cookies_the_first_is_the_most_specific() -> None:
    cookies = request("/admin", "cookie:session=admin; session=site").cookies
    assert cookies["session"] == "admin"
    assert cookies.getall("session") == ["admin", "site"]


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF)))
def test_no_cookie_header_raises(text: str) -> None:
    dict(request("/", f"cookie:{text}").cookies)


# Response


def test_a_response_is_an_empty_200_unless_told_otherwise() -> None:
    response = Response()
    assert (response.content, response.status, response.headers) == (b"", 200, ())


def test_the_headers_of_a_response_may_be_a_mapping() -> None:
    assert Response(headers={"a": "b"}) == Response(headers=[("a", "b")])
    assert Response(headers={"a": "b"}).headers == (("a", "b"),)
    with pytest.raises(TypeError, match="headers are a mapping or "):
        Response(headers={"a": 1})  # type: ignore[dict-item]


def test_text_is_sent_as_utf_8() -> None:
    assert Response("sch\xf6n").content == "sch\xf6n".encode()
    assert Response(b"\xff").content == b"\xff"


@pytest.mark.parametrize("status", [199, 600, 101])
def test_a_status_that_is_no_final_one_is_refused_where_it_is_written(status: int) -> None:
    with pytest.raises(ValueError, match=f"from 200 to 599, not {status}"):
        Response(status=status)


@pytest.mark.parametrize("body", [None, {"a": 1}, 5])
def test_a_body_that_cannot_be_sent_is_refused_where_it_is_written(body: Any) -> None:
    with pytest.raises(TypeError, match=f"str or bytes, not {type(body).__name__}"):
        Response(body)


def test_a_handler_may_return_a_response() -> None:
    response = Response("gone", 410)
    assert Response.of(response) is response


@pytest.mark.parametrize(
    ("value", "content", "kind"),
    [
        ("<p>hi", b"<p>hi", "text/html; charset=utf-8"),
        (b"\x00", b"\x00", "application/octet-stream"),
        ({"a": [1]}, b'{"a":[1]}', "application/json"),
    ],
)
def test_a_handler_may_return_a_plain_value(value: Any, content: bytes, kind: str) -> None:
    response = Response.of(value)
    assert (response.content, response.status) == (content, 200)
    assert response.headers == (("content-type", kind),)


def test_a_path_where_no_file_is_gives_404(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path, tmp_path / "file" / "below"):
        assert Response.of(path).status == 404


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("page.html", "text/html; charset=utf-8"),
        ("photo.png", "image/png"),
        ("archive.tar.gz", "application/octet-stream"),
        ("README", "application/octet-stream"),
    ],
)
def test_a_handler_may_return_a_path_which_is_read(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"content")
    response = Response.of(path)
    assert (response.content, response.headers) == (b"content", (("content-type", kind),))


@pytest.mark.parametrize("value", [None, 5, ["a"], object()])
def test_other_values_are_refused_with_what_would_do(value: Any) -> None:
    with pytest.raises(TypeError, match="returns str, bytes, dict, Path or Response, not"):
        Response.of(value)


def test_a_dict_that_is_no_json_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        Response.of({"a": object()})
