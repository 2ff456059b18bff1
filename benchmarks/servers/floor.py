"""The floors: what a server in Python costs at least. ``floor.py epoll|handler|handler-pure``

All know the one key that the load uses; what arrives in one pass of the loop leaves in one write
for each member. ``epoll`` is the kernel and an epoll loop: it takes the first frame of a sender as
a pattern for all, and from then on counts bytes and writes that frame, encoded once. ``handler``
understands what it reads, and no more: it takes whole frames apart, unmasks them (``pure``: without
the C routine), and awaits an ``async def`` with each message, which encodes the answer. No event
loop, no task, no limit, no timeout, no check, no error: nobody could serve with it, and what has
handlers in Python cannot be much cheaper. (Frames of a MiB take more care than it has: there it is
no floor.)
"""

import select
import socket
import sys
from collections import defaultdict, deque

from common import decode, encode, free_socket

if sys.argv[1:] == ["handler-pure"]:
    sys.modules["websockets.speedups"] = None  # as if it were not installed

from roomsock.protocol.frames import encode_frame, unmask

ANSWER = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: BACScCJPNqyz+UBoqMH89VmURoA=\r\n\r\n"
)
CLOSE, CLOSED = 0x88, b"\x88\x02\x03\xe8"


class Client:
    def __init__(self, sock):
        self.sock = sock
        self.room = None  # until the request has come
        self.members = ()
        self.read = 0  # bytes of the frame that is arriving
        self.size = 0  # of a frame
        self.frame = b""  # to write for each
        self.start = b""
        self.unsent = deque()

    def takes(self, data):
        """What a read has everybody in the room get."""
        if not self.size:
            self.start += data
            if not self.learn(self.start):
                return b""
            data = self.start
        count, self.read = divmod(self.read + len(data), self.size)
        return self.frame * count

    def learn(self, data):
        """Make the pattern of all frames of the first."""
        short = data[1] & 127 if len(data) > 1 else 0
        header = {126: 4, 127: 10}.get(short, 2)
        length = int.from_bytes(data[2:header], "big") if header > 2 else short
        if len(data) < header + 4 + length or not data[1:]:
            return False
        self.size = header + 4 + length
        key = data[header : header + 4] * (length // 4 + 1)
        payload = int.from_bytes(data[header + 4 : self.size], "big")
        payload ^= int.from_bytes(key[:length], "big")
        self.frame = bytes((data[0], short)) + data[2:header] + payload.to_bytes(length, "big")
        return True

    def write(self, data):
        if self.unsent:
            self.unsent.append(data)
        elif (rest := self.send(data)) is not None:
            self.unsent.append(rest)
            epoll.modify(self.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def flush(self):
        while self.unsent:
            if (rest := self.send(self.unsent[0])) is not None:
                self.unsent[0] = rest
                return
            self.unsent.popleft()
        epoll.modify(self.sock.fileno(), select.EPOLLIN)

    def send(self, data):
        """What the kernel does not take of some bytes, or None."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            return data
        return None if sent == len(data) else memoryview(data)[sent:]


class Handling(Client):
    """A client whose messages go to a handler."""

    def __init__(self, sock):
        super().__init__(sock)
        self.parts = []  # of the frame that is arriving
        self.frames = []

    def takes(self, data):
        if self.parts:
            self.read += len(data)
            self.parts.append(data)
            if self.read < self.size:
                return b""
            data = b"".join(self.parts)
            self.parts.clear()
        messages = []
        view = memoryview(data)
        position, end = 0, len(data)
        while position < end:
            length = data[position + 1] & 127
            start = position + 6
            if length > 125:
                start += 2 if length == 126 else 8
                length = int.from_bytes(data[position + 2 : start - 4], "big")
            stop = start + length
            if stop > end:
                self.size = stop - position
                self.parts.append(data[position:])
                break
            messages.append(unmask(view[start:stop], data[start - 4 : start]))
            position = stop
        self.read = end - position
        try:
            self.handle(messages).send(None)
        except StopIteration:
            pass
        frames, self.frames = self.frames, []
        return b"".join(frames)

    async def handle(self, messages):
        if self.room == b"/json":
            for message in messages:
                await say(self, decode(message))
        elif self.room == b"/binary":
            for message in messages:
                await binary(self, message)
        else:
            for message in messages:
                await echo(self, message.decode())


async def say(client, message):
    client.frames.append(encode_frame(1, encode(message)))


async def binary(client, data):
    client.frames.append(encode_frame(2, data))


async def echo(client, text):
    client.frames.append(encode_frame(1, text.encode()))


def accept():
    sock, _ = listener.accept()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    clients[sock.fileno()] = (Client if sys.argv[1:] == ["epoll"] else Handling)(sock)
    epoll.register(sock.fileno(), select.EPOLLIN)


def leave(client):
    del clients[client.sock.fileno()]
    client.sock.close()
    if client.room is not None:
        client.members.discard(client)


def read(client, due):
    try:
        data = client.sock.recv(1 << 18 if client.size > 4096 else 1 << 15)
    except OSError:
        data = b""
    if not data or (data[0] == CLOSE and not client.read):
        if data:
            client.sock.send(CLOSED)
        leave(client)
    elif client.room is None:
        client.room = data.split(b" ", 2)[1]
        client.members = rooms[client.room] if client.room.startswith(b"/room/") else {client}
        client.members.add(client)
        client.sock.send(ANSWER)
    elif frames := client.takes(data):
        key = client.room if len(client.members) > 1 else client
        due.setdefault(key, (client.members, []))[1].append(frames)


listener = free_socket()
epoll = select.epoll()
epoll.register(listener.fileno(), select.EPOLLIN)
clients, rooms = {}, defaultdict(set)
while True:
    due = {}
    for fd, event in epoll.poll():
        if fd == listener.fileno():
            accept()
        elif event & select.EPOLLOUT:
            clients[fd].flush()
        else:
            read(clients[fd], due)
    for members, parts in due.values():
        frames = b"".join(parts)
        for member in members:
            member.write(frames)
