"""The benchmarks' server, made with Tornado: ``with_tornado.py asyncio``."""

import asyncio
from collections import defaultdict

from common import decode, encode, free_socket
from tornado.httpserver import HTTPServer
from tornado.web import Application
from tornado.websocket import WebSocketHandler

rooms = defaultdict(set)


class Handler(WebSocketHandler):
    def open(self, *args):
        self.set_nodelay(True)  # its documentation: or else small messages may be delayed


class Echo(Handler):
    def on_message(self, message):
        self.write_message(message, binary=isinstance(message, bytes))


class Json(Handler):
    def on_message(self, message):
        self.write_message(encode(decode(message)))


class Room(Handler):
    def open(self, name):
        super().open(name)
        self.members = rooms[name]
        self.members.add(self)

    def on_message(self, message):
        for member in self.members:
            member.write_message(message)

    def on_close(self):
        self.members.discard(self)


async def main():
    app = Application(
        [("/echo", Echo), ("/binary", Echo), ("/json", Json), (r"/room/(.*)", Room)],
        log_function=lambda handler: None,  # no line for each connection
    )
    sock = free_socket()
    sock.setblocking(False)
    HTTPServer(app).add_sockets([sock])
    await asyncio.Event().wait()


asyncio.run(main())
