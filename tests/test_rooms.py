"""Rooms: who is in which, who is sent to, and in which order."""

from __future__ import annotations

import json
import random
import threading
import zlib
from collections.abc import Callable, Coroutine
from inspect import isawaitable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from roomsock.messages import encode_json
from roomsock.protocol.deflate import Agreement, Compression, Deflater
from roomsock.protocol.frames import BINARY, TEXT, encode_frame, frame_size
from roomsock.rooms import NO_WAIT, Audience, Everyone, Queued, Registry, Room, queued_type
from roomsock.websocket import WebSocket

from .fakes import FakeLink, run, websocket


def member(registry: Registry, path: str = "/chat/blue") -> tuple[WebSocket, FakeLink]:
    link = FakeLink()
    return websocket(link, path, registry=registry), link


def frames(link: FakeLink) -> list[bytes]:
    return link.fake_recipient.frames


def text(content: str) -> bytes:
    return encode_frame(TEXT, content.encode())


# Handles


def test_equal_names_are_equal_rooms() -> None:
    registry = Registry()
    assert Room(registry, "a") == Room(registry, "a")
    assert len({Room(registry, "a"), Room(registry, "a")}) == 1
    assert Room(registry, "a") != Room(registry, "b")
    assert Room(registry, "a") != Room(Registry(), "a")
    assert Room(registry, "a") != "a"


def test_a_handle_made_before_the_room_exists_is_never_stale() -> None:
    registry = Registry()
    room = Room(registry, "/chat/blue")
    assert room.send_text("nobody") == 0
    first, link = member(registry)
    assert room.send_text("one") == 1
    registry.silence(first, ["/chat/blue"])
    registry.release(first, ["/chat/blue"])
    assert room.send_text("nobody") == 0
    second, _ = member(registry)
    assert room.members == [second]
    assert frames(link) == [text("one")]


def test_a_handle_is_true_although_its_room_is_empty() -> None:
    assert Room(Registry(), "a")
    assert Everyone(Registry())


def test_members_are_listed_in_the_order_they_came_as_a_snapshot() -> None:
    registry = Registry()
    a, b, c = (member(registry)[0] for _ in range(3))
    room = Room(registry, "/chat/blue")
    before = room.members
    assert before == list(room) == [a, b, c]
    assert room.others(b) == [a, c]
    assert len(room) == 3
    assert b in room
    d, _ = member(registry)
    assert d not in before
    assert d in room
    elsewhere, _ = member(registry, "/chat/red")
    assert elsewhere not in room
    assert elsewhere in Everyone(registry)


def test_members_may_leave_while_somebody_iterates() -> None:
    registry = Registry()
    for _ in range(3):
        member(registry)
    for ws in Room(registry, "/chat/blue"):
        registry.silence(ws, ["/chat/blue"])
    assert len(Room(registry, "/chat/blue")) == 0


def test_handles_show_what_they_are() -> None:
    registry = Registry()
    member(registry)
    assert repr(Room(registry, "/chat/blue")) == "<Room '/chat/blue', 1 members>"
    assert repr(Everyone(registry)) == "<everyone, 1 connections>"


def test_an_audience_without_recipients_is_no_audience() -> None:
    with pytest.raises(NotImplementedError):
        Audience(Registry()).send_text("x")


# Sending


@pytest.mark.parametrize(
    ("send", "frame"),
    [
        (lambda room: room.send_text("h\xf6"), text("h\xf6")),
        (lambda room: room.send_json({"n": 1}), text('{"n":1}')),
        (lambda room: room.send_bytes(b"\x00"), encode_frame(BINARY, b"\x00")),
        (lambda room: room.send_bytes(bytearray(b"\x00")), encode_frame(BINARY, b"\x00")),
        (lambda room: room.send_bytes(memoryview(b"\x00")), encode_frame(BINARY, b"\x00")),
    ],
)
@pytest.mark.parametrize("audience", [lambda r: Room(r, "/chat/blue"), Everyone])
def test_every_member_gets_the_one_frame_that_was_encoded(
    send: Callable[[Audience], int], frame: bytes, audience: Callable[[Registry], Audience]
) -> None:
    """The same object: a room of 1,000 costs one encoding and no copy."""
    registry = Registry()
    links = [member(registry)[1] for _ in range(3)]
    assert send(audience(registry)) == 3
    (first,), *others = (frames(link) for link in links)
    assert first == frame
    assert all(sent[0] is first and len(sent) == 1 for sent in others)


def test_every_member_sees_the_messages_in_the_order_they_were_sent() -> None:
    registry = Registry()
    links = [member(registry)[1] for _ in range(2)]
    room = Room(registry, "/chat/blue")
    for content in "abc":
        room.send_text(content)
    assert [frames(link) for link in links] == [[text(c) for c in "abc"]] * 2


def test_only_the_members_of_a_room_get_its_messages() -> None:
    registry = Registry()
    _, blue = member(registry)
    _, red = member(registry, "/chat/red")
    assert Room(registry, "/chat/blue").send_text("x") == 1
    assert frames(red) == []
    assert Everyone(registry).send_text("y") == 2
    assert frames(blue) == [text("x"), text("y")]


def test_one_or_several_may_be_excluded_and_are_not_counted() -> None:
    registry = Registry()
    (a, link_a), (b, link_b), (_, link_c) = (member(registry) for _ in range(3))
    stranger, _ = member(registry, "/chat/red")
    room = Room(registry, "/chat/blue")
    assert room.send_text("1", exclude=a) == 2
    assert room.send_text("2", exclude=[a, b]) == 1
    assert room.send_text("3", exclude=(ws for ws in room if ws is not b)) == 1
    assert room.send_text("4", exclude=room) == 0
    assert room.send_text("5", exclude=stranger) == 3
    assert room.send_text("6", exclude=[]) == 3
    seen = [[frame[2:].decode() for frame in frames(link)] for link in (link_a, link_b, link_c)]
    assert seen == [["5", "6"], ["1", "3", "5", "6"], ["1", "2", "5", "6"]]


def test_a_room_has_a_name_of_text() -> None:
    name: Any = 5
    with pytest.raises(TypeError, match="a room's name is a str"):
        Room(Registry(), name)


@pytest.mark.parametrize("name", ["an id", ["an id"]])
def test_a_name_excludes_nobody_and_is_refused(name: Any) -> None:
    registry = Registry()
    _, link = member(registry)
    with pytest.raises(TypeError, match="exclude takes connections"):
        Room(registry, "/chat/blue").send_text("x", exclude=name)
    assert frames(link) == []


def test_what_goes_wrong_in_exclude_is_not_taken_for_one_connection() -> None:
    """A TypeError within the generator was, and nobody was left out."""
    registry = Registry()
    _, link = member(registry)

    def broken(ws: WebSocket) -> bool:
        raise TypeError("in the app's own generator")

    room = Room(registry, "/chat/blue")
    with pytest.raises(TypeError, match="own generator"):
        room.send_text("x", exclude=(ws for ws in room if broken(ws)))
    assert frames(link) == []


@pytest.mark.parametrize(
    ("send", "error"),
    [
        (lambda room: room.send_json({"a": object()}), TypeError),
        (lambda room: room.send_json("\ud800"), ValueError),
        (lambda room: room.send_text("\ud800"), ValueError),
        (lambda room: room.send_text(b"bytes"), TypeError),
        (lambda room: room.send_bytes("text"), TypeError),
        (lambda room: room.send_bytes(5), TypeError),
    ],
)
@pytest.mark.parametrize("members", [0, 2])
def test_what_cannot_be_encoded_raises_before_anything_is_queued(
    send: Callable[[Room], int], error: type[Exception], members: int
) -> None:
    registry = Registry()
    links = [member(registry)[1] for _ in range(members)]
    with pytest.raises(error):
        send(Room(registry, "/chat/blue"))
    assert all(frames(link) == [] for link in links)


def test_a_member_that_proves_too_slow_is_not_counted_and_spares_the_others() -> None:
    registry = Registry()
    (_, link_a), (slow, link_b), (_, link_c) = (member(registry) for _ in range(3))
    link_b.fake_recipient.on_queue = lambda frame: registry.silence(slow, ["/chat/blue"])
    room = Room(registry, "/chat/blue")
    assert room.send_text("x") == 2
    assert frames(link_a) == frames(link_c) == [text("x")]
    assert slow not in room
    assert slow not in Everyone(registry)


# Membership


def test_a_closing_member_is_no_recipient_and_not_counted() -> None:
    registry = Registry()
    ws, link = member(registry)
    registry.silence(ws, ["/chat/blue", "never heard of"])
    room = Room(registry, "/chat/blue")
    assert (len(room), room.send_text("x"), frames(link)) == (0, 0, [])
    assert ws not in Everyone(registry)


def test_a_rooms_state_lives_until_its_last_holder_let_go() -> None:
    registry = Registry()
    (a, _), (b, _) = member(registry), member(registry)
    room = Room(registry, "/chat/blue")
    room.state.topic = "tea"
    assert Room(registry, "/chat/blue").state is room.state
    registry.release(a, ["/chat/blue"])
    registry.silence(b, ["/chat/blue"])
    assert room.state.topic == "tea"  # b's on_close runs, and may still read it
    registry.release(b, ["/chat/blue"])
    assert registry.rooms == {}
    assert not hasattr(room.state, "topic")
    member(registry)
    assert not hasattr(room.state, "topic")


def test_the_state_of_a_room_that_does_not_exist_is_forgotten() -> None:
    room = Room(Registry(), "/chat/blue")
    room.state.topic = "tea"
    assert not hasattr(room.state, "topic")


def test_who_leaves_is_no_member_although_others_stay() -> None:
    registry = Registry()
    (a, _), (b, _) = member(registry), member(registry)
    registry.release(a, ["/chat/blue"])
    assert Room(registry, "/chat/blue").members == [b]
    assert a in Everyone(registry)


def test_letting_go_of_a_room_twice_is_fine() -> None:
    registry = Registry()
    ws, _ = member(registry)
    registry.release(ws, ["/chat/blue"])
    registry.release(ws, ["/chat/blue"])
    assert registry.rooms == {}


# Two registries that became one


def test_handles_made_before_an_inclusion_see_the_same_rooms() -> None:
    main, part = Registry(), Registry()
    early = Room(part, "/chat/blue")
    part.become(main)
    ws, _ = member(main)
    assert early.members == [ws]
    assert early == Room(main, "/chat/blue")
    assert hash(early) == hash(Room(main, "/chat/blue"))
    main.thread = threading.get_ident() + 1
    with pytest.raises(RuntimeError):
        early.send_text("x")


def test_an_inclusion_in_an_inclusion_leaves_no_handle_behind() -> None:
    main, part, detail = Registry(), Registry(), Registry()
    early = Room(detail, "/chat/blue")
    detail.become(part)
    part.become(main)
    ws, _ = member(main)
    assert early.members == [ws]
    assert early == Room(part, "/chat/blue") == Room(main, "/chat/blue")


# Threads


@pytest.mark.parametrize(
    "send",
    [
        lambda room: room.send_json(1),
        lambda room: room.send_text("x"),
        lambda room: room.send_bytes(b"x"),
        lambda room: run(room.flushed()),
    ],
)
@pytest.mark.parametrize("members", [0, 1])
def test_a_foreign_thread_is_told_how_to_come_in(send: Callable[[Room], Any], members: int) -> None:
    registry = Registry()
    links = [member(registry)[1] for _ in range(members)]
    registry.thread = threading.get_ident() + 1
    with pytest.raises(RuntimeError, match=r"use app\.call_soon_threadsafe\(function, \*args\)"):
        send(Room(registry, "/chat/blue"))
    assert all(frames(link) == [] for link in links)


def test_the_event_loops_own_thread_may_send() -> None:
    registry = Registry()
    member(registry)
    registry.thread = threading.get_ident()
    assert Room(registry, "/chat/blue").send_text("x") == 1


def test_an_app_that_is_not_served_cannot_be_called_into() -> None:
    registry = Registry()
    registry.call_soon_threadsafe = print
    registry.reset()
    with pytest.raises(RuntimeError, match="the app is not being served"):
        registry.call_soon_threadsafe(print)


# Awaiting


def test_a_pace_without_a_wait_costs_no_turn_and_may_be_awaited_again() -> None:
    async def awaits() -> list[None]:
        return [await NO_WAIT, await NO_WAIT]

    assert run(awaits()) == [None, None]
    assert isawaitable(NO_WAIT)


def test_what_a_send_returns_is_an_int_in_every_respect() -> None:
    queued = Room(Registry(), "a").send_text("x")
    assert isinstance(queued, int)
    assert (queued, queued + 1, f"{queued}") == (0, 1, "0")
    assert not queued
    assert json.loads(encode_json({"told": Queued(3)})) == {"told": 3}


def test_it_may_be_awaited_although_nobody_serves() -> None:
    async def wait() -> int:
        return await Queued(3)

    assert run(wait()) == 3


async def test_awaiting_a_send_is_a_checkpoint_and_gives_the_number() -> None:
    registry = Registry()
    registry.queued = queued_type(checkpoint)
    member(registry)
    assert await others_run_while(await_send, Room(registry, "/chat/blue")) == 1


async def test_who_paces_a_producer_lets_others_run_although_nobody_keeps_it_waiting() -> None:
    """`while True: room.send_text(…); await room.flushed()` would hold the event loop up."""
    registry = Registry()
    registry.queued = queued_type(checkpoint)
    _, link = member(registry)
    await others_run_while(Room.flushed, Room(registry, "/chat/blue"))
    assert link.fake_recipient.flushes > 0
    await others_run_while(Room.flushed, Room(registry, "empty"))


def test_flushing_waits_for_the_members_of_this_moment() -> None:
    registry = Registry()
    _, blue = member(registry)
    _, red = member(registry, "/chat/red")
    run(Room(registry, "/chat/blue").flushed())
    assert (blue.fake_recipient.flushes, red.fake_recipient.flushes) == (1, 0)
    run(Everyone(registry).flushed())
    assert (blue.fake_recipient.flushes, red.fake_recipient.flushes) == (2, 1)


async def await_send(room: Room) -> int:
    return await room.send_text("x")


async def others_run_while(function: Callable[[Room], Coroutine[Any, Any, Any]], room: Room) -> Any:
    """Call it over and over until another task had its turn: that it ends is the test."""
    others = anyio.Event()

    async def other() -> None:
        others.set()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tg:
            tg.start_soon(other)
            for _ in range(5):
                result = await function(room)
                if others.is_set():
                    return result
    raise AssertionError("nobody else had a turn")


# Compression

LINES = [f"line {number}: " + "what one says to the others; " * 20 for number in range(3)]


def compressing(registry: Registry, bits: int = 15, *, takeover: bool = False) -> FakeLink:
    """A member that agreed to compression, with a window of so many bits."""
    settings = Compression(context_takeover=takeover)
    registry.compress_from = settings.threshold
    _, link = member(registry)
    agreement = Agreement("permessage-deflate", bits, 15, takeover, takeover)
    link.fake_recipient.deflater = Deflater(settings, agreement)
    return link


class Reader:
    """A client that inflates what it gets, and remembers it if context takeover was agreed on."""

    def __init__(self, bits: int = 15, *, takeover: bool = False) -> None:
        self.bits = bits
        self.takeover = takeover
        self.zlib = zlib.decompressobj(-bits)

    def read(self, frame: bytes) -> str:
        start, length = frame_size(frame, 0)
        payload = frame[start:]
        assert len(payload) == length
        if frame[0] == 0x81:
            return payload.decode()
        assert frame[0] == 0xC1
        if not self.takeover:
            self.zlib = zlib.decompressobj(-self.bits)
        return self.zlib.decompress(payload + b"\x00\x00\xff\xff").decode()


@pytest.fixture
def compressors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The windows of the compressors that were made, each at the time."""
    made: list[int] = []
    make = zlib.compressobj

    def compressobj(level: int, method: int, wbits: int, *rest: int) -> Any:
        made.append(-wbits)
        return make(level, method, wbits, *rest)

    monkeypatch.setattr(zlib, "compressobj", compressobj)
    return made


def test_a_message_is_compressed_once_for_all_members(compressors: list[int]) -> None:
    registry = Registry()
    links = [compressing(registry) for _ in range(100)]
    assert Room(registry, "/chat/blue").send_text(LINES[0]) == 100
    assert len(compressors) == 1
    [frame] = frames(links[0])
    assert all(frames(link)[0] is frame for link in links)
    assert len(frame) < len(LINES[0]) / 4
    assert Reader().read(frame) == LINES[0]


def test_a_message_is_compressed_once_for_each_size_of_window(compressors: list[int]) -> None:
    registry = Registry()
    links = [compressing(registry, bits) for bits in (9, 15) * 50]
    Room(registry, "/chat/blue").send_text(LINES[0])
    assert sorted(compressors) == [9, len(LINES[0]).bit_length()]
    for link, bits in zip(links, (9, 15) * 50, strict=True):
        assert Reader(bits).read(frames(link)[0]) == LINES[0]
    # A message that fits the smaller window is the same for both.
    compressors.clear()
    Room(registry, "/chat/blue").send_text(LINES[1][:500])
    assert compressors == [9]
    assert frames(links[0])[1] is frames(links[1])[1]


def test_who_agreed_to_nothing_gets_the_message_as_it_is(compressors: list[int]) -> None:
    registry = Registry()
    compressed, (_, plain), other = compressing(registry), member(registry), compressing(registry)
    assert Room(registry, "/chat/blue").send_text(LINES[0]) == 3
    assert frames(plain) == [text(LINES[0])]
    assert frames(compressed) == frames(other) != [text(LINES[0])]
    assert len(compressors) == 1


def test_a_short_message_is_one_frame_for_all(compressors: list[int]) -> None:
    registry = Registry()
    links = [compressing(registry), compressing(registry, takeover=True)]
    websocket(plain := FakeLink(), registry=registry)
    room = Room(registry, "/chat/blue")
    room.send_text("x" * 127)
    assert compressors == []
    assert frames(links[0])[0] is frames(links[1])[0] is frames(plain)[0]
    room.send_text("x" * 128)
    assert [frames(link)[1][0] for link in (*links, plain)] == [0xC1, 0xC1, 0x81]


def test_what_cannot_be_compressed_is_tried_once_and_sent_as_it_is(compressors: list[int]) -> None:
    registry = Registry()
    links = [compressing(registry) for _ in range(10)]
    noise = random.Random(1).randbytes(2000)
    Room(registry, "/chat/blue").send_bytes(noise)
    assert len(compressors) == 1
    assert all(frames(link) == [encode_frame(BINARY, noise)] for link in links)


def test_every_kind_of_message_is_compressed_as_what_it_is(compressors: list[int]) -> None:
    registry = Registry()
    link = compressing(registry)
    everyone = Everyone(registry)
    everyone.send_json(LINES)
    everyone.send_bytes(LINES[0].encode())
    assert [frame[0] for frame in frames(link)] == [0xC1, 0xC2]
    assert Reader().read(frames(link)[0]) == encode_json(LINES).decode()


def test_with_context_takeover_each_member_has_a_compressor_for_good(
    compressors: list[int],
) -> None:
    registry = Registry()
    links = [compressing(registry, bits, takeover=True) for bits in (10, 12, 15)]
    shared = compressing(registry)
    room = Room(registry, "/chat/blue")
    for line in LINES:
        room.send_text(line)
    assert compressors[:3] == [10, 12, 15]
    assert len(compressors) == 3 + len(LINES)  # the fourth member's are made for a message each
    for link, bits in zip(links, (10, 12, 15), strict=True):
        reader = Reader(bits, takeover=True)
        assert [reader.read(frame) for frame in frames(link)] == LINES
    assert len(frames(links[2])[1]) < len(frames(shared)[1]) / 2


def test_a_message_that_left_somebody_out_is_nothing_to_refer_to() -> None:
    registry = Registry()
    link = compressing(registry, takeover=True)
    compressing(registry, takeover=True)
    room = Room(registry, "/chat/blue")
    room.send_text(LINES[0])
    assert room.send_text(LINES[1], exclude=link.ws) == 1
    room.send_text(LINES[2])
    reader = Reader(takeover=True)
    assert [reader.read(frame) for frame in frames(link)] == [LINES[0], LINES[2]]
