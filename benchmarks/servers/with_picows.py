"""The benchmarks' server, made with picows: ``with_picows.py asyncio|uvloop``."""

import sys
from collections import defaultdict
from pathlib import Path

from picows import WSListener, WSMsgType, ws_create_server

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness

rooms = defaultdict(set)


class Echo(WSListener):
    def on_ws_frame(self, transport, frame):
        if frame.msg_type == WSMsgType.TEXT:
            transport.send(WSMsgType.TEXT, frame.get_payload_as_bytes())


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

    def on_ws_disconnected(self, transport):
        self.members.discard(transport)


def listener(request):
    return Echo() if request.path == b"/echo" else Room(request.path)


async def main():
    server = await ws_create_server(listener, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


harness.run_loop(sys.argv[1], main)
