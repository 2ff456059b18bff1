"""The benchmarks' server, made with roomsock: ``with_roomsock.py asyncio|uvloop|trio``."""

import sys
from pathlib import Path

import roomsock

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness

app = roomsock.App()


@app.on_message("/echo")
async def echo(ws, text):
    await ws.send_text(text)


@app.on_message("/room/<name>")
async def room(ws, text, name):
    ws.send_text_to_this_room(text)


harness.serve(app, sys.argv[1])
