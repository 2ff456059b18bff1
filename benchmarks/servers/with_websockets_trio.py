"""The benchmarks' server, made with websockets on trio: ``with_websockets_trio.py trio``."""

from collections import defaultdict

import trio
from common import decode, encode
from websockets.exceptions import ConnectionClosed
from websockets.trio.server import broadcast, serve

rooms = defaultdict(set)


async def handle(ws):
    path = ws.request.path
    try:
        if path in ("/echo", "/binary"):
            async for message in ws:
                await ws.send(message)
        elif path == "/json":
            async for message in ws:
                await ws.send(encode(decode(message)), text=True)
        else:
            room = rooms[path]
            room.add(ws)
            try:
                async for message in ws:
                    await broadcast(list(room), message)  # members come and go meanwhile
            finally:
                room.discard(ws)
    except ConnectionClosed:
        pass


async def main():
    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve, handle, 0)
        print(server.listeners[0].socket.getsockname()[1], flush=True)


trio.run(main)
