"""What ``mypy --strict`` must make of an app. Checked by test_house.py, never run.

Decorators return the function unchanged, so its type must survive; a mistake is one that mypy must
find: it complains of a ``type: ignore`` that ignores nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

import roomsock

if sys.version_info >= (3, 11):
    from typing import assert_type
else:
    from typing_extensions import assert_type


class Say(msgspec.Struct, tag="say"):
    text: str


class Leave(msgspec.Struct, tag="leave"): ...


app = roomsock.App(origins=["https://example.com"], limits=roomsock.Limits(message=65536))
app.include(roomsock.App(keepalive=None, slow_consumers="drop_oldest"), prefix="/v1")


@app.on_connect("/chat/<room>")
async def enter(ws: roomsock.WebSocket, room: str) -> None:
    if ws.request.query.get("name") is None:
        raise roomsock.Reject(400, "who are you?")
    ws.accept(subprotocol="chat", headers=[("x-room", room)])


@app.on_json("/chat/<room>", invalid="report", cancel_on_disconnect=True)
def chat(ws: roomsock.WebSocket, message: Say | Leave | None, error: Any = None) -> int:
    return ws.send_json_to_this_room({"said": message}, exclude=ws)


@app.on_message("/echo")
async def echo(ws: roomsock.WebSocket, text: str) -> None:
    await ws.send_text(text)


@app.serve("/ticker", cancel_on_disconnect=True)
async def ticker(ws: roomsock.WebSocket) -> None:
    async for message in ws:
        assert_type(message, str | bytes)
    assert_type(await ws.receive(), str | bytes)
    assert_type(await ws.receive_text(), str)
    assert_type(await ws.receive_json(Say), Say)
    assert_type(await ws.receive_json(), Any)
    assert_type(await ws.send_text("x"), None)
    assert_type(await ws.close(), None)
    assert_type(await ws.send_text_to_all("x"), int)
    assert_type(await ws.join("lobby").send_json([1], exclude=[ws]), int)


@app.on_close("/chat/<room>")
def left(ws: roomsock.WebSocket, reason: roomsock.ConnectionClosed) -> None:
    assert_type(reason.code, int)
    assert_type(ws.room, roomsock.Room)
    assert_type(ws.room.members, list[roomsock.WebSocket])


@app.on_error("/echo")
def failed(ws: roomsock.WebSocket, error: Exception) -> None: ...


@app.get("/")
def page(request: roomsock.Request) -> Path:
    return Path("chat.html")


@app.post("/say")
def say(request: roomsock.Request) -> roomsock.Response:
    return roomsock.Response(request.body)


async def decorated_functions_are_what_they_were(
    ws: roomsock.WebSocket, request: roomsock.Request
) -> None:
    assert_type(await enter(ws, room="blue"), None)
    assert_type(chat(ws, Leave()), int)
    assert_type(await echo(ws, "x"), None)
    assert_type(await ticker(ws), None)
    assert_type(page(request), Path)
    assert_type(say(request), roomsock.Response)
    assert_type(app.add_get("/added", page), None)


async def mistakes_are_found(ws: roomsock.WebSocket, request: roomsock.Request) -> None:
    chat(ws, 5)  # type: ignore[arg-type]
    await echo(ws)  # type: ignore[call-arg]
    ws.send_text(b"bytes")  # type: ignore[arg-type]
    ws.send_json_to_all(1, to="everyone")  # type: ignore[call-arg]
    ws.join(ws.room)  # type: ignore[arg-type]
    roomsock.Limits(mesage=5)  # type: ignore[call-arg]
    roomsock.App(slow_consumers="drop")  # type: ignore[arg-type]
    app.on_json("/x", invalid="ignore")  # type: ignore[arg-type]
    app.on_json(chat)  # type: ignore[arg-type]
    app.get("/x")(5)  # type: ignore[type-var]
