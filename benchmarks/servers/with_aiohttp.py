"""The benchmarks' server, made with aiohttp: ``with_aiohttp.py asyncio|uvloop``."""

import asyncio
import sys
from collections import defaultdict

from aiohttp import WSMsgType, web
from common import decode, encode, free_socket

rooms = defaultdict(set)


async def echo(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    async for message in ws:
        if message.type == WSMsgType.TEXT:
            await ws.send_str(message.data)
        elif message.type == WSMsgType.BINARY:
            await ws.send_bytes(message.data)
    return ws


async def say(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    async for message in ws:
        if message.type == WSMsgType.TEXT:
            await ws.send_str(encode(decode(message.data)).decode())
    return ws


async def room(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    members = rooms[request.match_info["name"]]
    members.add(ws)
    try:
        async for message in ws:
            if message.type == WSMsgType.TEXT:
                for member in list(members):  # members come and go meanwhile
                    await member.send_str(message.data)
    finally:
        members.discard(ws)
    return ws


app = web.Application()
app.add_routes(
    [
        web.get("/echo", echo),
        web.get("/binary", echo),
        web.get("/json", say),
        web.get("/room/{name}", room),
    ]
)

if sys.argv[1] == "uvloop":
    import uvloop

    loop = uvloop.new_event_loop()
else:
    loop = asyncio.new_event_loop()
web.run_app(app, sock=free_socket(), print=None, access_log=None, loop=loop)
