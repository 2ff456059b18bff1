# A chat with rooms, names and "who is here": the room is the URL, so nobody has to manage rooms.
#
#   Run:   python examples/chat.py            (also: --backend trio, --port 9000, --host 0.0.0.0)
#   Open:  http://127.0.0.1:8000 in two tabs, with two names
#   See:   messages reach everybody in the same room and nobody else; lists follow at once.
#   Next:  stop and restart the server while the tabs are open: the page finds its way back.

import argparse
from pathlib import Path
from typing import Annotated

import msgspec

import roomsock

app = roomsock.App()


class Say(msgspec.Struct, tag="say"):  # {"type": "say", "text": "hello"}
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]


class Typing(msgspec.Struct, tag="typing"): ...


@app.get("/")
def page(request):
    return Path(__file__).with_name("chat.html")


@app.on_connect("/chat/<room>")
def enter(ws, room: str):
    # Still HTTP here, and nobody has seen us yet: a Reject is the answer to the request.
    ws.state.name = ws.request.query.get("name", "").strip()[:24]
    if not ws.state.name:
        raise roomsock.Reject(400, "who are you? add ?name=... to the address")
    ws.accept()  # from here on we are a member: the others see us, and we see what they see
    ws.send_json({"type": "welcome", "id": ws.id, "room": room})
    announce("joined", ws)


@app.on_json("/chat/<room>")
def chat(ws, message: Say | Typing):
    match message:
        case Say(text):
            ws.send_json_to_this_room({"type": "said", **who(ws), "text": text})
        case Typing():
            ws.send_json_to_this_room({"type": "typing", **who(ws)}, exclude=ws)


@app.on_close("/chat/<room>")
def left(ws, reason):
    announce("left", ws)  # we are out of the room already: this is for those who are still there


def announce(what: str, ws):
    ws.room.send_json({"type": what, **who(ws), "members": [who(m) for m in ws.room.members]})


def who(ws):
    return {"id": ws.id, "name": ws.state.name}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="A chat with rooms.")
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    roomsock.run(app, **vars(options.parse_args()))
