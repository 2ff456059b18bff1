"""The benchmarks' server, made with websockets: ``with_websockets.py asyncio|uvloop``."""

import asyncio
import sys
from collections import defaultdict
from pathlib import Path

from websockets.asyncio.server import broadcast, serve
from websockets.exceptions import ConnectionClosed

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness

rooms = defaultdict(set)


async def handle(ws):
    try:
        if ws.request.path == "/echo":
            async for message in ws:
                await ws.send(message)
        else:
            room = rooms[ws.request.path]
            room.add(ws)
            try:
                async for message in ws:
                    broadcast(room, message)
            finally:
                room.discard(ws)
    except ConnectionClosed:
        pass


async def main():
    async with serve(handle, "127.0.0.1", 0) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.get_running_loop().create_future()


harness.run_loop(sys.argv[1], main)
