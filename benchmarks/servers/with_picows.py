"""The benchmarks' server, made with picows: ``with_picows.py asyncio|uvloop``."""

import sys
from collections import defaultdict

from common import decode, encode, run_loop
from picows import WSListener, WSMsgType, ws_create_server

rooms = defaultdict(set)


class Echo(WSListener):
    def on_ws_frame(self, transport, frame):
        if frame.msg_type in (WSMsgType.TEXT, WSMsgType.BINARY):
            transport.send(frame.msg_type, frame.get_payload_as_bytes())
        elif frame.msg_type == WSMsgType.CLOSE:
            close(transport, frame)


class Json(WSListener):
    def on_ws_frame(self, transport, frame):
        if frame.msg_type == WSMsgType.TEXT:
            transport.send(WSMsgType.TEXT, encode(decode(frame.get_payload_as_memoryview())))
        elif frame.msg_type == WSMsgType.CLOSE:
            close(transport, frame)


class Room(WSListener):
    def __init__(self, path):
        self.members = rooms[path]

    def on_ws_connected(self, transport):
        self.members.add(transport)

    def on_ws_frame(self, transport, frame):
        if frame.msg_type == WSMsgType.TEXT:
            payload = frame.get_payload_as_bytes()
            for member in self.members:
                member.send(WSMsgType.TEXT, payload)
        elif frame.msg_type == WSMsgType.CLOSE:
            close(transport, frame)

    def on_ws_disconnected(self, transport):
        self.members.discard(transport)


def close(transport, frame):
    transport.send_close(frame.get_close_code(), frame.get_close_message())
    transport.disconnect()


def listener(request):
    if request.path in (b"/echo", b"/binary"):
        return Echo()
    return Json() if request.path == b"/json" else Room(request.path)


async def main():
    server = await ws_create_server(listener, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


run_loop(sys.argv[1], main)
