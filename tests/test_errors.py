"""The error tree: what users catch, and what each exception carries."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import roomsock
from roomsock.errors import (
    CloseCode,
    ClosedBy,
    ConnectionClosed,
    ConnectionClosedError,
    ConnectionClosedOK,
    InvalidMessage,
    MessageTooBig,
    Reject,
    RoomsockError,
    SetupError,
    SlowConsumer,
    header_pairs,
)


@pytest.mark.parametrize(
    ("kind", "parent"),
    [
        (RoomsockError, Exception),
        (SetupError, RoomsockError),
        (Reject, RoomsockError),
        (InvalidMessage, RoomsockError),
        (ConnectionClosed, RoomsockError),
        (ConnectionClosedOK, ConnectionClosed),
        (ConnectionClosedError, ConnectionClosed),
        (MessageTooBig, ConnectionClosedError),
        (SlowConsumer, ConnectionClosedError),
    ],
)
def test_each_exception_has_its_place_in_one_tree(kind: type, parent: type) -> None:
    assert kind.__bases__ == (parent,)
    assert getattr(roomsock, kind.__name__) is kind


def test_close_codes_are_ints_with_the_names_of_the_registry() -> None:
    assert {code.name: int(code) for code in CloseCode} == {
        "NORMAL": 1000,
        "GOING_AWAY": 1001,
        "PROTOCOL_ERROR": 1002,
        "UNSUPPORTED_DATA": 1003,
        "NO_STATUS": 1005,
        "ABNORMAL": 1006,
        "INVALID_DATA": 1007,
        "POLICY_VIOLATION": 1008,
        "MESSAGE_TOO_BIG": 1009,
        "INTERNAL_ERROR": 1011,
        "SERVICE_RESTART": 1012,
        "TRY_AGAIN_LATER": 1013,
    }


def test_a_reject_is_a_403_without_a_body_unless_told_otherwise() -> None:
    rejection = Reject()
    assert (rejection.status, rejection.body, rejection.headers) == (403, "", ())


def test_headers_are_pairs_or_a_mapping() -> None:
    assert header_pairs({"a": "1", "b": ""}) == (("a", "1"), ("b", ""))
    assert header_pairs([("a", "1"), ("a", "2")]) == (("a", "1"), ("a", "2"))
    assert Reject(302, headers={"location": "/"}).headers == (("location", "/"),)


@pytest.mark.parametrize(
    "headers", ["a: 1", ["a: 1"], {"retry-after": 5}, [(b"a", b"1")], [("a", "1", "2")], [None]]
)
def test_other_headers_are_refused_where_they_are_written(headers: Any) -> None:
    with pytest.raises(TypeError, match="headers are a mapping or "):
        header_pairs(headers)
    with pytest.raises(TypeError, match="headers are a mapping or "):
        Reject(403, headers=headers)


def test_a_reject_keeps_its_headers_although_they_may_be_read_only_once() -> None:
    rejection = Reject(401, b"who?", iter([("www-authenticate", "Basic")]))
    assert rejection.body == b"who?"
    assert rejection.headers == (("www-authenticate", "Basic"),)
    assert rejection.headers == (("www-authenticate", "Basic"),)


@pytest.mark.parametrize("status", [300, 599])
def test_a_reject_redirects_or_refuses(status: int) -> None:
    assert Reject(status).status == status


@pytest.mark.parametrize("status", [200, 299, 600, 0])
def test_a_reject_with_another_status_is_refused_where_it_is_written(status: int) -> None:
    with pytest.raises(ValueError, match=f"from 300 to 599, not {status}"):
        Reject(status)


def test_a_reject_with_a_body_that_cannot_be_sent_is_refused_where_it_is_written() -> None:
    with pytest.raises(TypeError, match="str or bytes, not dict"):
        Reject(403, {"error": "members only"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("closed_by", "code", "reason", "text"),
    [
        ("client", 1000, "", "closed by the client: 1000"),
        ("server", 1012, "restart", "closed by the server: 1012 (restart)"),
        ("server", CloseCode.GOING_AWAY, "", "closed by the server: 1001"),
        ("lost", 1006, "", "connection lost: 1006"),
    ],
)
def test_a_closed_connection_says_who_closed_it(
    closed_by: ClosedBy, code: int, reason: str, text: str
) -> None:
    closed = ConnectionClosed(code, reason, closed_by)
    assert str(closed) == text
    assert (closed.code, closed.reason, closed.closed_by) == (code, reason, closed_by)
    assert closed.connection is None


def test_a_clients_reason_cannot_forge_a_line_of_the_log() -> None:
    assert "\n" not in str(ConnectionClosed(4000, "bye\nERROR you are hacked"))


def test_a_closed_connection_survives_pickling() -> None:
    closed = pickle.loads(pickle.dumps(SlowConsumer(1013, "too slow", "server", "id")))
    assert isinstance(closed, SlowConsumer)
    assert (closed.code, closed.closed_by, closed.connection) == (1013, "server", "id")


def test_an_invalid_message_knows_the_close_frame_it_leads_to() -> None:
    invalid = InvalidMessage("Expected `int`, got `str` - at `$.n`")
    assert str(invalid) == "Expected `int`, got `str` - at `$.n`"
    assert (invalid.code, invalid.reason) == (CloseCode.INVALID_DATA, "invalid message")
    assert InvalidMessage("no JSON", reason="/chat expects Say").reason == "/chat expects Say"
