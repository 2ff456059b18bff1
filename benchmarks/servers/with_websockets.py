"""The benchmarks' server, made with websockets: ``with_websockets.py asyncio|uvloop [off|on]``."""

import asyncio
import sys
from collections import defaultdict

from common import decode, encode, run_loop
from websockets.asyncio.server import broadcast, serve
from websockets.exceptions import ConnectionClosed

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
                    broadcast(room, message)
            finally:
                room.discard(ws)
    except ConnectionClosed:
        pass


async def main():
    compression = None if sys.argv[2:] == ["off"] else "deflate"  # if a client offers it
    async with serve(handle, "127.0.0.1", 0, compression=compression) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.get_running_loop().create_future()


run_loop(sys.argv[1], main)
