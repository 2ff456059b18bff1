"""The benchmarks' server, made with roomsock.

``with_roomsock.py asyncio|uvloop|trio [off|on|takeover|pure]``; ``pure`` is without compression and
without the C routine of the extra ``speed``.
"""

import sys
from pathlib import Path

if sys.argv[2:] == ["pure"]:
    sys.modules["websockets.speedups"] = None  # as if it were not installed

from common import Say

import roomsock

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness

COMPRESSION = {
    "off": False,
    "pure": False,
    "on": True,
    "takeover": roomsock.Compression(context_takeover=True),
}
app = roomsock.App(compression=COMPRESSION[sys.argv[2] if sys.argv[2:] else "off"])


@app.on_message("/echo")
async def echo(ws, text):
    await ws.send_text(text)


@app.on_message("/binary")
async def binary(ws, data: bytes):
    await ws.send_bytes(data)


@app.on_json("/json")
async def say(ws, message: Say):
    await ws.send_json(message)


@app.on_message("/room/<name>")
async def room(ws, text, name):
    ws.send_text_to_this_room(text)


harness.serve(app, sys.argv[1])
