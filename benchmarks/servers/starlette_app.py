"""The application that uvicorn and Hypercorn serve, made with Starlette."""

from collections import defaultdict

from common import decode, encode
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocketDisconnect

rooms = defaultdict(set)


async def echo(ws):
    await ws.accept()
    async for text in ws.iter_text():
        await ws.send_text(text)


async def binary(ws):
    await ws.accept()
    async for data in ws.iter_bytes():
        await ws.send_bytes(data)


async def say(ws):
    await ws.accept()
    async for text in ws.iter_text():
        await ws.send_text(encode(decode(text)).decode())


async def room(ws):
    members = rooms[ws.path_params["name"]]
    await ws.accept()
    members.add(ws)
    try:
        async for text in ws.iter_text():
            for member in list(members):  # members come and go meanwhile
                await member.send_text(text)
    except WebSocketDisconnect:
        pass
    finally:
        members.discard(ws)


app = Starlette(
    routes=[
        WebSocketRoute("/echo", echo),
        WebSocketRoute("/binary", binary),
        WebSocketRoute("/json", say),
        WebSocketRoute("/room/{name}", room),
    ]
)
