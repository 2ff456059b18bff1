"""The benchmarks' server, made with trio-websocket: ``with_trio_websocket.py trio``."""

from collections import defaultdict

import trio
from common import decode, encode
from trio_websocket import ConnectionClosed, serve_websocket

rooms = defaultdict(set)


async def handle(request):
    ws = await request.accept()
    try:
        if request.path in ("/echo", "/binary"):
            while True:
                await ws.send_message(await ws.get_message())
        elif request.path == "/json":
            while True:
                await ws.send_message(encode(decode(await ws.get_message())).decode())
        else:
            await talk(ws, rooms[request.path])
    except ConnectionClosed:
        pass


async def talk(ws, room):
    room.add(ws)
    try:
        while True:
            message = await ws.get_message()
            # One after the other: a task for each member would cost more.
            for member in list(room):
                try:
                    await member.send_message(message)
                except ConnectionClosed:
                    pass
    finally:
        room.discard(ws)


async def main():
    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve_websocket, handle, "127.0.0.1", 0, None)
        print(server.port, flush=True)


trio.run(main)
