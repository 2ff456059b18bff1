# Messages with types: a lamp that everybody on the page shares, and that takes no nonsense.
#
#   Run:   python examples/typed_messages.py
#   Open:  http://127.0.0.1:8000 in two tabs
#   See:   good messages move the lamp in both tabs; bad ones are answered with the field that is
#          wrong, and the connection stays.
#   Next:  remove invalid="report": the first bad message closes its connection with 1007.

from pathlib import Path
from typing import Annotated

import msgspec

import roomsock

app = roomsock.App()


class Switch(msgspec.Struct, tag="switch", forbid_unknown_fields=True):
    on: bool


class Dim(msgspec.Struct, tag="dim", forbid_unknown_fields=True):
    percent: Annotated[int, msgspec.Meta(ge=5, le=100)]


class Colour(msgspec.Struct, tag="colour", forbid_unknown_fields=True):
    rgb: Annotated[str, msgspec.Meta(pattern="^#[0-9a-f]{6}$")]


lamp = {"on": True, "percent": 80, "rgb": "#ffb020"}


@app.get("/")
def page(request):
    return Path(__file__).with_name("typed_messages.html")


@app.on_connect("/lamp")
def enter(ws):
    ws.accept()
    ws.send_json({"lamp": lamp})


# The annotation is the whole validation: one of three shapes, told apart by their "type" field.
# None is what the handler gets instead of a message when it is called with an error.
@app.on_json("/lamp", invalid="report")
def turn(ws, message: Switch | Dim | Colour | None, error: roomsock.RoomsockError | None = None):
    if isinstance(error, roomsock.InvalidMessage):
        ws.send_json({"error": str(error)})
    elif message is not None:  # the other errors are ends of connections: nobody left to answer
        lamp.update(msgspec.structs.asdict(message))
        ws.send_json_to_this_room({"lamp": lamp})


if __name__ == "__main__":
    roomsock.run(app, host="127.0.0.1", port=8000)
