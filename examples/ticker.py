# A price that moves by itself: the server as a part of your own program, next to your own loop.
#
#   Run:   python examples/ticker.py
#   Open:  http://127.0.0.1:8000
#   See:   a new price each second, and how many are watching; a new tab starts with the past.
#   Next:  `anyio.run(main, backend="trio")`; or asyncio.run(main()), for serving() works there too.

import contextlib
import random
from collections import deque
from pathlib import Path

import anyio

import roomsock

app = roomsock.App()
past: deque[float] = deque([100.0], maxlen=120)


@app.get("/")
def page(request):
    return Path(__file__).with_name("ticker.html")


@app.on_connect("/ticker")
def enter(ws):
    ws.accept()
    ws.send_json({"past": list(past)})


@app.serve("/ticker")
async def watch(ws):
    async for _ in ws:  # nothing to say to us; this ends when the watcher leaves
        pass


async def walk():
    """Publish a price each second; runs beside the server, and knows nothing of connections."""
    room = app.room("/ticker")  # a name, not a list: it may be empty now and full in a second
    while True:
        await anyio.sleep(1)
        past.append(round(past[-1] * random.gauss(1, 0.004), 2))
        room.send_json({"price": past[-1], "watchers": len(room)})


async def main(port: int = 8000):
    async with roomsock.serving(app, port=port) as server:
        print("listening at", *server.addresses)
        await walk()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        anyio.run(main)
