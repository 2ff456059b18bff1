"""The connection as a handler holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import msgspec
import pytest

from roomsock import websocket as module
from roomsock.errors import (
    CloseCode,
    ConnectionClosed,
    ConnectionClosedError,
    ConnectionClosedOK,
    InvalidMessage,
)
from roomsock.protocol.frames import BINARY, TEXT, encode_frame
from roomsock.rooms import NO_WAIT, Everyone, Pace, Registry, Room
from roomsock.websocket import WebSocket

from .fakes import FakeLink, run, websocket


def text(content: str) -> bytes:
    return encode_frame(TEXT, content.encode())


class Say(msgspec.Struct, tag="say"):
    text: str


class Leave(msgspec.Struct, tag="leave"):
    pass


@dataclass
class Point:
    x: int


class Options(TypedDict):
    loud: bool


# What it is


def test_a_connection_shows_who_it_is() -> None:
    ws = websocket(FakeLink(), "/chat/blue", params={"room": "blue"})
    assert ws.path == ws.request.path == ws.room.name == "/chat/blue"
    assert ws.params == {"room": "blue"}
    assert ws.subprotocol is None
    assert repr(ws) == f"<WebSocket {ws.id} '/chat/blue'>"


def test_ids_are_unique() -> None:
    assert len({websocket(FakeLink()).id for _ in range(1000)}) == 1000


def test_each_connection_has_a_state_of_its_own() -> None:
    a, b = websocket(FakeLink()), websocket(FakeLink())
    a.state.name = "Ada"
    assert a.state.name == "Ada"
    assert not hasattr(b.state, "name")


def test_the_latency_is_what_the_link_measured() -> None:
    link = FakeLink()
    ws = websocket(link)
    assert ws.latency is None
    link.latency = 0.25
    assert ws.latency == 0.25


# Sending to the own client


@pytest.mark.parametrize(
    ("send", "frame"),
    [
        (lambda ws: ws.send_text("h\xf6"), text("h\xf6")),
        (lambda ws: ws.send_json({"n": 1}), text('{"n":1}')),
        (lambda ws: ws.send_bytes(b"\x00"), encode_frame(BINARY, b"\x00")),
    ],
)
def test_a_send_is_queued_when_it_returns(send: Callable[[WebSocket], Pace], frame: bytes) -> None:
    link = FakeLink()
    send(websocket(link))
    assert link.frames == [frame]
    assert link.fake_recipient.frames == []  # no policy may drop it, unlike a room's


@pytest.mark.parametrize(
    ("send", "error"),
    [
        (lambda ws: ws.send_json(object()), TypeError),
        (lambda ws: ws.send_text(b"bytes"), TypeError),
        (lambda ws: ws.send_text("\ud800"), ValueError),
        (lambda ws: ws.send_bytes("text"), TypeError),
    ],
)
def test_what_cannot_be_encoded_is_not_queued(
    send: Callable[[WebSocket], Pace], error: type[Exception]
) -> None:
    link = FakeLink()
    with pytest.raises(error):
        send(websocket(link))
    assert link.frames == []


@pytest.mark.parametrize(
    "send",
    [lambda ws: ws.send_text("x"), lambda ws: ws.send_json(1), lambda ws: ws.send_bytes(b"")],
)
def test_a_send_to_a_closed_connection_raises(send: Callable[[WebSocket], Pace]) -> None:
    link = FakeLink()
    ws = websocket(link)
    ws.close()
    with pytest.raises(ConnectionClosedOK):
        send(ws)


def test_who_awaits_a_send_waits_only_when_the_link_says_so() -> None:
    link = FakeLink()
    ws = websocket(link)

    async def send() -> None:
        await ws.send_text("x")

    run(send())
    assert link.waits == 0
    link.is_high = True
    run(send())
    assert link.waits == 1
    ws.send_text("not awaited")
    assert link.waits == 1


# Sending to rooms


@pytest.mark.parametrize(
    ("kind", "value", "frame"),
    [
        ("json", {"n": 1}, text('{"n":1}')),
        ("text", "x", text("x")),
        ("bytes", b"x", encode_frame(BINARY, b"x")),
    ],
)
def test_sends_reach_this_room_a_named_room_and_all(kind: str, value: Any, frame: bytes) -> None:
    registry = Registry()
    mine, neighbour, other = FakeLink(), FakeLink(), FakeLink()
    ws = websocket(mine, "/chat/blue", registry=registry)
    websocket(neighbour, "/chat/blue", registry=registry)
    websocket(other, "/chat/red", registry=registry)
    this_room = getattr(ws, f"send_{kind}_to_this_room")
    to_room = getattr(ws, f"send_{kind}_to_room")
    to_all = getattr(ws, f"send_{kind}_to_all")

    def received() -> list[int]:
        links = (mine, neighbour, other)
        assert all(set(link.fake_recipient.frames) <= {frame} for link in links)
        return [len(link.fake_recipient.frames) for link in links]

    assert (this_room(value), received()) == (2, [1, 1, 0])
    assert (this_room(value, exclude=ws), received()) == (1, [1, 2, 0])
    assert (to_room("/chat/red", value), received()) == (1, [1, 2, 1])
    assert (to_room("/chat/red", value, exclude=ws), received()) == (1, [1, 2, 2])
    assert (to_room("nobody", value), received()) == (0, [1, 2, 2])
    assert (to_all(value), received()) == (3, [2, 3, 3])
    assert (to_all(value, exclude=[ws]), received()) == (2, [2, 4, 4])
    assert mine.frames == []


def test_a_closing_connection_may_still_send_to_those_who_stay() -> None:
    registry = Registry()
    link, other = FakeLink(), FakeLink()
    ws = websocket(link, registry=registry)
    websocket(other, registry=registry)
    ws.close()
    ws._leave_all()
    assert ws.send_json_to_this_room({"left": 1}) == 1
    assert link.fake_recipient.frames == []


# Rooms


def test_a_connection_is_in_the_room_of_its_path_first() -> None:
    registry = Registry()
    ws = websocket(FakeLink(), registry=registry)
    assert ws.rooms == (ws.room,)
    assert ws in Everyone(registry)


def test_joining_and_leaving_change_who_is_sent_to() -> None:
    registry = Registry()
    link = FakeLink()
    ws = websocket(link, registry=registry)
    lobby = ws.join("lobby")
    assert lobby == Room(registry, "lobby") == ws.join("lobby")
    assert [room.name for room in ws.rooms] == ["/chat/blue", "lobby"]
    assert lobby.send_text("x") == 1
    lobby.state.topic = "tea"
    ws.leave("lobby")
    ws.leave("lobby")
    assert ws.rooms == (ws.room,)
    assert lobby.send_text("x") == 0
    assert link.fake_recipient.frames == [text("x")]
    assert "lobby" not in registry.rooms


def test_a_connection_cannot_leave_its_own_room() -> None:
    ws = websocket(FakeLink())
    assert ws.join("/chat/blue") == ws.room
    with pytest.raises(ValueError, match="until it closes"):
        ws.leave("/chat/blue")
    assert ws in ws.room


def test_the_rooms_of_a_connection_are_limited_by_a_limit_that_is_named() -> None:
    registry = Registry()
    ws = websocket(FakeLink(), registry=registry, rooms_limit=2)
    ws.join("a")
    with pytest.raises(RuntimeError, match=r"in 2 rooms already \(Limits.rooms_per_connection\)"):
        ws.join("b")
    assert "b" not in registry.rooms
    ws.join("a")
    ws.leave("a")
    ws.join("b")


def test_a_room_is_joined_by_name() -> None:
    """A handle would have become the name of a room that nobody else finds."""
    registry = Registry()
    ws = websocket(FakeLink(), registry=registry)
    with pytest.raises(TypeError, match="a room's name is a str, not Room"):
        ws.join(Room(registry, "lobby"))  # type: ignore[arg-type]


def test_rooms_are_joined_after_the_acceptance_and_before_the_end() -> None:
    ws = websocket(FakeLink(accepted=False))
    with pytest.raises(RuntimeError, match=r"ws\.accept\(\)"):
        ws.join("lobby")
    assert ws.rooms == ()
    ws.accept()
    ws.join("lobby")
    ws.close()
    with pytest.raises(ConnectionClosed):
        ws.join("late")


def test_who_leaves_every_room_is_forgotten_when_the_driver_lets_go() -> None:
    registry = Registry()
    ws = websocket(FakeLink(), registry=registry)
    ws.join("lobby")
    names = ws._leave_all()
    assert names == ("/chat/blue", "lobby")
    assert ws._leave_all() == ws.rooms == ()
    assert len(Everyone(registry)) == len(ws.room) == 0
    assert list(registry.rooms) == ["/chat/blue", "lobby"]
    registry.release(ws, names)
    assert registry.rooms == {}


# Opening and closing


def test_accepting_joins_the_room_in_one_step() -> None:
    registry = Registry()
    link = FakeLink(accepted=False)
    ws = websocket(link, registry=registry)
    assert ws not in ws.room
    ws.accept("chat", {"x-a": "1"})
    assert link.answer == ("chat", [("x-a", "1")])
    assert ws.subprotocol == "chat"
    assert ws in ws.room
    with pytest.raises(RuntimeError):
        ws.accept("other")
    assert ws.subprotocol == "chat"


def test_closing_ends_the_membership_at_once() -> None:
    link = FakeLink()
    ws = websocket(link)

    async def close() -> None:
        await ws.close(4000, "bye")

    run(close())
    assert link.end is not None
    assert (link.end.code, link.end.reason, link.end.closed_by) == (4000, "bye", "server")
    assert len(ws.room) == 0
    ws.close(1001)
    assert link.end.code == 4000


def test_a_close_is_normal_unless_told_otherwise() -> None:
    link = FakeLink()
    websocket(link).close()
    assert link.end is not None
    assert (link.end.code, link.end.reason) == (1000, "")


@pytest.mark.parametrize("code", [1000, 1003, 1007, 1014, 3000, 4999, CloseCode.POLICY_VIOLATION])
def test_a_code_that_may_be_sent_is_sent(code: int) -> None:
    link = FakeLink()
    websocket(link).close(code)
    assert link.end is not None
    assert link.end.code == code


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000])
def test_a_code_that_must_not_be_sent_is_refused(code: int) -> None:
    link = FakeLink()
    ws = websocket(link)
    with pytest.raises(ValueError, match=f"close code {code} must not be sent"):
        ws.close(code)
    assert link.end is None
    assert ws in ws.room


def test_a_long_reason_is_cut_between_two_characters() -> None:
    link = FakeLink()
    websocket(link).close(1000, "\xf6" * 100)
    assert link.end is not None
    assert link.end.reason == "\xf6" * 61


# Receiving


def test_receive_gives_text_and_binary_and_then_raises() -> None:
    ws = websocket(FakeLink(["a", b"b"]))
    assert run(ws.receive()) == "a"
    assert run(ws.receive()) == b"b"
    for _ in range(2):
        with pytest.raises(ConnectionClosedOK) as caught:
            run(ws.receive())
        assert caught.value.connection == ws.id


def test_receive_text_closes_on_binary_and_raises_what_that_ended_with() -> None:
    link = FakeLink(["a", b"b", "c"])
    ws = websocket(link)
    assert run(ws.receive_text()) == "a"
    with pytest.raises(ConnectionClosedError) as caught:
        run(ws.receive_text())
    assert caught.value.code == CloseCode.UNSUPPORTED_DATA
    assert link.failures == [(CloseCode.UNSUPPORTED_DATA, "text expected", None)]


def test_receive_text_skips_any_number_of_binary_messages_behind_the_clients_close() -> None:
    """It called itself for each, up to a RecursionError."""
    link = FakeLink([b""] * 5000)
    ws = websocket(link)
    link.finish(ConnectionClosedOK(1000))
    with pytest.raises(ConnectionClosedOK):
        run(ws.receive_text())


@pytest.mark.parametrize(
    ("message_type", "sent", "value"),
    [
        (Say, '{"type":"say","text":"x"}', Say("x")),
        (Say, b'{"type":"say","text":"x"}', Say("x")),
        (Say | Leave, '{"type":"leave"}', Leave()),
        (Point, '{"x":1}', Point(1)),
        (Options, '{"loud":true}', {"loud": True}),
        (list[int], "[1]", [1]),
        (Any, '{"a":null}', {"a": None}),
    ],
)
def test_receive_json_decodes_to_the_type(message_type: Any, sent: str | bytes, value: Any) -> None:
    assert run(websocket(FakeLink([sent])).receive_json(message_type)) == value


def test_receive_json_without_a_type_takes_whatever_json_holds() -> None:
    assert run(websocket(FakeLink(["[1,{}]"])).receive_json()) == [1, {}]


@pytest.mark.parametrize("sent", ["{", '{"type":"say"}', '"\ud800"', b"\xff", ""])
def test_an_invalid_message_leaves_the_connection_open(sent: str | bytes) -> None:
    link = FakeLink([sent, '{"type":"say","text":"x"}'])
    ws = websocket(link)
    with pytest.raises(InvalidMessage) as caught:
        run(ws.receive_json(Say))
    assert caught.value.reason == "invalid message: expects Say"
    assert link.end is None
    assert run(ws.receive_json(Say)) == Say("x")


def test_a_type_that_cannot_be_decoded_is_the_callers_mistake_and_takes_no_message() -> None:
    link = FakeLink(["1"])
    ws = websocket(link)
    with pytest.raises(TypeError, match="cannot decode JSON to"):
        run(ws.receive_json(WebSocket))
    assert run(ws.receive_json(int)) == 1


def test_iterating_ends_on_a_clean_close_and_stays_ended() -> None:
    ws = websocket(FakeLink(["a", b"b"]))

    async def messages() -> list[str | bytes]:
        return [message async for message in ws]

    assert run(messages()) == ["a", b"b"]
    assert run(messages()) == []


@pytest.mark.parametrize("end", [ConnectionClosedError(1006, "", "lost"), ConnectionClosed(4000)])
def test_iterating_raises_on_any_other_end(end: ConnectionClosed) -> None:
    ws = websocket(FakeLink(["a"], end=end))
    seen: list[str | bytes] = []

    async def messages() -> None:
        async for message in ws:
            seen.append(message)  # noqa: PERF401 - what came before the end must not be lost

    with pytest.raises(type(end)):
        run(messages())
    assert seen == ["a"]


# Decoders


def test_a_decoder_is_built_once_for_a_type() -> None:
    say, numbers = module._decoder(Say), module._decoder(list[int])
    assert module._decoder(Say) is say
    assert module._decoder(list[int]) is numbers


def test_decoders_of_types_made_at_run_time_do_not_fill_the_memory() -> None:
    for n in range(2000):
        run(websocket(FakeLink(["{}"])).receive_json(msgspec.defstruct(f"Made{n}", [])))
    assert module._kept_decoder.cache_info().currsize <= 512


def test_a_type_that_cannot_be_remembered_is_decoded_nevertheless() -> None:
    annotated: Any = Annotated[int, {"a dict": "has no hash"}]
    with pytest.raises(TypeError, match="unhashable"):
        hash(annotated)
    assert run(websocket(FakeLink(["5"])).receive_json(annotated)) == 5


# Threads


@pytest.mark.parametrize(
    "use",
    [
        lambda ws: ws.send_text("x"),
        lambda ws: ws.send_json_to_this_room(1),
        lambda ws: ws.send_bytes_to_room("a", b""),
        lambda ws: ws.send_text_to_all("x"),
        lambda ws: ws.close(),
        lambda ws: ws.accept(),
        lambda ws: ws.join("a"),
        lambda ws: ws.leave("a"),
    ],
)
def test_a_foreign_thread_is_told_how_to_come_in(use: Callable[[WebSocket], Any]) -> None:
    registry = Registry()
    link = FakeLink()
    ws = websocket(link, registry=registry)
    registry.thread = threading.get_ident() + 1
    with pytest.raises(RuntimeError, match="another thread"):
        use(ws)
    assert (link.frames, link.fake_recipient.frames, link.end) == ([], [], None)


@pytest.mark.parametrize("code", [4000.0, 4000.5, 1006, 5000])
def test_a_code_that_must_not_be_sent_is_the_callers_mistake(code: Any) -> None:
    link = FakeLink()
    with pytest.raises(ValueError, match="close code"):
        websocket(link).close(code)


def test_a_reason_is_text() -> None:
    reason: Any = 4
    with pytest.raises(TypeError, match="reason"):
        websocket(FakeLink()).close(1000, reason)


# Compression is the link's business: it gets what is to be sent, and not a frame of it


@pytest.mark.parametrize(
    ("send", "message"),
    [
        (lambda ws: ws.send_text("h\u00e9"), (TEXT, b"h\xc3\xa9")),
        (lambda ws: ws.send_bytes(bytearray(b"\x00")), (BINARY, b"\x00")),
        (lambda ws: ws.send_json({"a": 1}), (TEXT, b'{"a":1}')),
    ],
    ids=["text", "bytes", "json"],
)
def test_the_link_is_given_the_kind_of_a_message_and_its_bytes(
    send: Callable[[WebSocket], Any], message: tuple[int, bytes]
) -> None:
    class Recorder(FakeLink):
        def send(self, opcode: int, payload: bytes) -> Pace:
            given.append((opcode, payload))
            return NO_WAIT

    given: list[tuple[int, bytes]] = []
    send(websocket(Recorder()))
    assert given == [message]
    assert type(given[0][1]) is bytes
