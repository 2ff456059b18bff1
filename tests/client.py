"""A WebSocket client for tests: wsproto over a real socket, on any event loop.

Independent of roomsock's own protocol code. What it does not do by itself it leaves to the test:
it answers no ping and no close frame, and reads only when asked.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc
from wsproto import events
from wsproto.connection import Connection, ConnectionType
from wsproto.extensions import PerMessageDeflate

#: Real seconds after which a test that waits for the server has failed.
PATIENCE = 10


class Refusal(Exception):
    """The server answered something else than 101."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        super().__init__(status, body)
        self.status = status
        self.headers = headers
        self.body = body


def upgrade_request(path: str = "/", headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """The bytes of a flawless opening handshake."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: testserver",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


class Client:
    """One connected client; offers compression if it is given the extension."""

    def __init__(
        self, stream: anyio.abc.ByteStream, deflate: PerMessageDeflate | None = None
    ) -> None:
        self.stream = stream
        self.deflate = deflate
        self.conn = Connection(ConnectionType.CLIENT)
        self.headers: dict[str, str] = {}
        self._events: deque[Any] = deque()
        self._text: list[Any] = []

    async def handshake(
        self, path: str, headers: Iterable[tuple[str, str]] = (), early: bytes = b""
    ) -> None:
        if self.deflate is not None:
            offer = f"{self.deflate.name}; {self.deflate.offer()}"
            headers = [*headers, ("Sec-WebSocket-Extensions", offer)]
        await self.stream.send(upgrade_request(path, headers) + early)
        head = b""
        with anyio.fail_after(PATIENCE):
            while b"\r\n\r\n" not in head:
                head += await self.stream.receive()
        head, _, rest = head.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        status = int(lines[0].split()[1])
        self.headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines[1:])
        }
        if status != 101:
            with anyio.fail_after(PATIENCE):
                while len(rest) < int(self.headers.get("content-length", 0)):
                    rest += await self.stream.receive()
            raise Refusal(status, self.headers, rest)
        if self.deflate is not None and "sec-websocket-extensions" in self.headers:
            self.deflate.finalize(self.headers["sec-websocket-extensions"])
            self.conn = Connection(ConnectionType.CLIENT, [self.deflate])
        if rest:
            self.conn.receive_data(rest)
            self._events.extend(self.conn.events())

    # Sending

    async def send_raw(self, data: bytes) -> None:
        with anyio.fail_after(PATIENCE):
            await self.stream.send(data)

    async def send_event(self, event: events.Event) -> None:
        await self.send_raw(self.conn.send(event))

    async def send(self, message: str | bytes) -> None:
        await self.send_raw(self.frame(message))

    async def send_json(self, value: Any) -> None:
        await self.send(json.dumps(value))

    def frame(self, message: str | bytes) -> bytes:
        """The masked frame of a message, not sent."""
        if isinstance(message, str):
            return self.conn.send(events.TextMessage(message))
        return self.conn.send(events.BytesMessage(message))

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a close frame; wait for nothing."""
        await self.send_event(events.CloseConnection(code, reason))

    # Receiving

    async def event(self) -> Any:
        """The next event: a wsproto event (messages whole), or None when the stream ended."""
        with anyio.fail_after(PATIENCE):
            while True:
                while self._events:
                    event = self._events.popleft()
                    if isinstance(event, events.Message):
                        self._text.append(event.data)
                        if not event.message_finished:
                            continue
                        data = self._text[0][:0].join(self._text)
                        self._text = []
                        return type(event)(data)
                    return event
                try:
                    data = await self.stream.receive()
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    return None
                if self.conn.state.name != "CLOSED":
                    self.conn.receive_data(data)
                    self._events.extend(self.conn.events())

    async def receive(self) -> str | bytes:
        """The next message; fails when anything else comes."""
        event = await self.event()
        assert isinstance(event, events.Message), event
        data: str | bytes = event.data
        return data if isinstance(data, str) else bytes(data)

    async def receive_json(self) -> Any:
        return json.loads(await self.receive())

    async def closed(self) -> tuple[int, str]:
        """Read on to the server's close frame: ``(code, reason)``; (1006, "") without one."""
        while True:
            event = await self.event()
            if event is None:
                return 1006, ""
            if isinstance(event, events.CloseConnection):
                return int(event.code), event.reason or ""

    async def ended(self) -> None:
        """Read on to the end of the stream."""
        while await self.event() is not None:
            pass

    async def aclose(self) -> None:
        """Close the socket, whatever the protocol says."""
        await anyio.aclose_forcefully(self.stream)

    async def reset(self) -> None:
        """Make the kernel send RST."""
        sock = self.stream.extra(anyio.abc.SocketAttribute.raw_socket)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        await anyio.aclose_forcefully(self.stream)


async def open_stream(server: Any, *, tls: ssl.SSLContext | None = None) -> Any:
    """A connected byte stream to a running server's first address."""
    address = server.addresses[0]
    if isinstance(address, str):
        return await anyio.connect_unix(address)
    host, port = address
    if tls is None:
        return await anyio.connect_tcp(host, port)
    return await anyio.connect_tcp(
        host,
        port,
        tls=True,
        ssl_context=tls,
        tls_hostname="localhost",
        tls_standard_compatible=False,
    )


@asynccontextmanager
async def connected(
    server: Any,
    path: str = "/",
    headers: Iterable[tuple[str, str]] = (),
    *,
    early: bytes = b"",
    tls: ssl.SSLContext | None = None,
    deflate: PerMessageDeflate | None = None,
) -> AsyncIterator[Client]:
    """A client with an open WebSocket; its socket is closed behind the body, however it ends."""
    stream = await open_stream(server, tls=tls)
    client = Client(stream, deflate)
    try:
        await client.handshake(path, headers, early)
        yield client
    finally:
        await anyio.aclose_forcefully(client.stream)


async def http(server: Any, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes, read to the end of the stream: ``(status, headers, body)`` of the answer."""
    stream = await open_stream(server)
    async with stream:
        await stream.send(request)
        data = b""
        with anyio.fail_after(PATIENCE):
            try:
                while True:
                    data += await stream.receive()
            except anyio.EndOfStream:
                pass
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    pairs = (line.partition(":") for line in lines[1:])
    return int(lines[0].split()[1]), {n.lower(): v.strip() for n, _, v in pairs}, body
