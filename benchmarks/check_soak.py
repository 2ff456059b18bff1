# Does a server stay as it was, whatever comes and goes?
#
#   python benchmarks/check_soak.py [--minutes 20] [--loop asyncio|uvloop|trio] [--quick]
#
# Clients of every kind come and go, 80 a second: polite ones, some that reset, half-close or vanish
# amid anything, slow readers, broken requests and frames, pages, rooms, compression, and TLS for a
# fifth. Again and again all of them leave, and the server is looked at when it had a moment to
# settle: its descriptors, connections, rooms, tasks and WebSocket objects must be what they were at
# first, and its memory must have stopped growing: the last third of the looks is compared with the
# second. Meanwhile some steady clients must see every message of theirs, in order, and nothing may
# be logged as an error. Prints a table; the exit code is 1 if anything did not hold. The load is
# less than a core's.

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import random
import signal
import socket
import ssl
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from statistics import mean
from typing import Any

import harness

RATE = 80  # clients a second
CROWD = 400  # at once
TLS_SHARE = 0.2
#: What may differ between the second third and the last. A leak shows in the blocks that Python has
#: allocated; the memory of the process also follows the highest load there was, for good.
BOUNDS = {"rss_kib": 4096, "blocks": 2000}
PATIENCE = 20.0  # seconds that a server has to settle, and a client to be served
BLOCK = bytes(64 * 1024)

GONE = (OSError, EOFError, asyncio.IncompleteReadError)


# The server


def serve(loop: str) -> None:
    import anyio.lowlevel
    import trustme

    import roomsock

    harness.raise_descriptor_limit()
    limits = roomsock.Limits(
        open_timeout=3, close_timeout=2, send_timeout=3, close_grace=1, linger=1, outbox=1 << 20
    )
    certificate = trustme.CA().issue_cert("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    servers: list[Any] = []
    errors: list[str] = []
    log = logging.getLogger("roomsock")
    log.addFilter(lambda record: record.levelno < logging.ERROR or not errors.append(record.msg))
    log.setLevel(logging.ERROR)

    def make_app() -> roomsock.App:
        app = roomsock.App(limits=limits, keepalive=(2, 2), compression=True)

        @app.on_connect("/refused")
        def refuse(ws):
            raise roomsock.Reject(403, "no")

        @app.on_message("/refused")
        def never(ws, text):
            pass

        @app.on_message("/echo")
        async def echo(ws, message: str | bytes):
            if isinstance(message, str):
                await ws.send_text(message)
            else:
                await ws.send_bytes(message)

        @app.on_message("/room/<name>")
        async def talk(ws, text, name):
            if len(ws.rooms) < 4:
                ws.join(f"{name} {len(ws.rooms)}")
            ws.send_text_to_this_room(text)

        @app.serve("/flood")
        async def flood(ws):
            while True:
                await ws.send_bytes(BLOCK)

        @app.on_message("/burst")
        async def burst(ws, text):
            for _ in range(100):
                ws.send_bytes(BLOCK)
                await anyio.lowlevel.checkpoint()

        @app.on_message("/busy")
        async def busy(ws, text):
            await anyio.sleep(1)
            ws.send_text(text)

        @app.on_message("/bye")
        async def bye(ws, text):
            await ws.close(4000, "bye")

        for path in ("/echo", "/flood", "/burst", "/busy", "/bye"):
            app.add_on_error(path, lambda ws, error: ends.update(error=1))
            app.add_on_close(path, lambda ws, reason: ends.update(close=1))
        app.add_get("/", lambda request: "<p>a page" * 1000)
        app.add_post("/", lambda request: {"bytes": len(request.body)})
        app.add_get("/stats", stats)
        return app

    ends: Counter[str] = Counter()

    def stats(request: Any) -> dict[str, Any]:
        signal.alarm(harness.SERVER_LIFE)  # who asks is not dead
        gc.collect()
        return {
            "connections": sum(server.connections for server in servers) - 1,
            "rooms": sum(len(server.app.rooms) for server in servers),
            "tasks": len(anyio.get_running_tasks()) - 1,
            "blocks": sys.getallocatedblocks(),
            "websockets": sum(type(each) is roomsock.WebSocket for each in gc.get_objects()),
            "served": sum(server.counters.connections for server in servers),
            "slow": sum(server.counters.slow_consumers for server in servers),
            "ends": dict(ends),
            "errors": errors,
            "tls_port": servers[1].addresses[0][1],
        }

    async def main() -> None:
        async with (
            roomsock.serving(make_app(), port=0) as plain,
            roomsock.serving(make_app(), port=0, tls=context) as tls,
        ):
            servers.extend((plain, tls))
            print(plain.addresses[0][1], flush=True)
            await plain.stopped()

    harness.run_loop(loop, main)


# The clients


class Client:
    """One client's connection; reads only when asked."""

    def __init__(self, port: int, tls: ssl.SSLContext | None) -> None:
        self.address = ("127.0.0.1", port)
        self.tls = tls
        self.compresses = False

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_connection(*self.address, ssl=self.tls)

    async def open(self, path: str, headers: str = harness.PLAIN_HEADERS) -> Client:
        await self.connect()
        self.writer.write(f"GET {path} HTTP/1.1\r\n{headers}".encode())
        head = await self.reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            raise Surprise(f"refused: {head[:60]!r}")
        self.compresses = b"permessage-deflate" in head
        return self

    async def send(self, payload: bytes, opcode: int = harness.TEXT) -> None:
        self.writer.write(self.frame(payload, opcode))
        await self.writer.drain()

    def frame(self, payload: bytes, opcode: int = harness.TEXT) -> bytes:
        if self.compresses and opcode == harness.TEXT:
            deflate = zlib.compressobj(wbits=-15)
            payload = (deflate.compress(payload) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4]
            opcode |= 0x40
        return harness.client_frame(payload, opcode)

    async def receive(self) -> tuple[int, bytes]:
        """The next message, close or pong; pings are answered."""
        while True:
            first, length = await self.reader.readexactly(2)
            if length > 125:
                length = int.from_bytes(
                    await self.reader.readexactly(2 if length == 126 else 8), "big"
                )
            payload = await self.reader.readexactly(length)
            if first & 0x40:
                payload = zlib.decompressobj(-15).decompress(payload + b"\0\0\xff\xff")
            if first & 15 != harness.PING:
                return first & 15, payload
            await self.send(payload, harness.PONG)

    async def expect(self, payload: bytes, opcode: int = harness.TEXT) -> None:
        received = await self.receive()
        if received != (opcode, payload):
            raise Surprise(f"expected {payload[:20]!r}, got {received[0]} {received[1][:20]!r}")

    async def close(self) -> None:
        """The closing handshake, to the end of the stream."""
        await self.send(b"\x03\xe8", harness.CLOSE)
        while (await self.receive())[0] != harness.CLOSE:
            pass
        await self.to_the_end()

    async def to_the_end(self) -> None:
        with suppress(*GONE):
            while await self.reader.read(1 << 16):
                pass

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Surprise(Exception):
    """The server did something else than it should."""


def some_text(chance: random.Random) -> bytes:
    size = chance.choice((1, 50, 50, 200, 1000, 5000, 70_000))
    return bytes(chance.choices(b"the quick brown fox ", k=min(size, 500))) * (1 + size // 500)


async def is_polite(client: Client, chance: random.Random) -> None:
    await client.open("/echo")
    for _ in range(chance.randrange(10)):
        await client.send(payload := some_text(chance))
        await client.expect(payload)
    await client.close()


async def is_big(client: Client, chance: random.Random) -> None:
    await client.open("/echo")
    payload = chance.randbytes(chance.randrange(100_000, 1 << 20))
    await client.send(payload, 2)
    await client.expect(payload, 2)
    await client.close()


async def compresses(client: Client, chance: random.Random) -> None:
    await client.open("/echo", harness.BROWSER_HEADERS)
    if not client.compresses:
        raise Surprise("compression was declined")
    for _ in range(chance.randrange(1, 10)):
        await client.send(payload := some_text(chance))
        await client.expect(payload)
    await leaves_somehow(client, chance)


async def fragments(client: Client, chance: random.Random) -> None:
    """Fragments with pings between them, cut anywhere."""
    await client.open("/echo")
    parts = [some_text(chance)[:200] for _ in range(chance.randrange(2, 6))]
    data = b""
    for index, part in enumerate(parts):
        frame = bytearray(harness.client_frame(part, 0 if index else harness.TEXT))
        if index < len(parts) - 1:
            frame[0] &= 0x7F
        data += bytes(frame) + harness.client_frame(b"", harness.PING)
    while data:
        cut = chance.randrange(1, 100)
        client.writer.write(data[:cut])
        data = data[cut:]
        await asyncio.sleep(0)
    payload = b""
    while not payload:
        opcode, received = await client.receive()
        payload = received if opcode == harness.TEXT else b""
    if payload != b"".join(parts):
        raise Surprise("the fragments came back as something else")
    await leaves_somehow(client, chance)


async def talks(client: Client, chance: random.Random) -> None:
    headers = chance.choice((harness.PLAIN_HEADERS, harness.BROWSER_HEADERS))
    await client.open(f"/room/{chance.randrange(8)}", headers)
    for number in range(chance.randrange(1, 6)):
        mine = f"{id(client)} {number} ".encode() + some_text(chance)[:2000]
        await client.send(mine)
        while (await client.receive())[1] != mine:
            pass
    await leaves_somehow(client, chance)


async def pings(client: Client, chance: random.Random) -> None:
    await client.open("/echo")
    for _ in range(chance.randrange(1, 20)):
        await client.send(payload := chance.randbytes(chance.randrange(126)), harness.PING)
        await client.expect(payload, harness.PONG)
    await leaves_somehow(client, chance)


async def breaks_off(client: Client, chance: random.Random) -> None:
    """Leaves at any byte of a handshake and some frames."""
    path = chance.choice(("/echo", "/busy", "/room/1", "/bye", "/burst", "/flood"))
    data = f"GET {path} HTTP/1.1\r\n{harness.PLAIN_HEADERS}".encode()
    for _ in range(chance.randrange(4)):
        data += harness.client_frame(some_text(chance))
    await client.connect()
    client.writer.write(data[: chance.randrange(len(data) + 1)])
    await asyncio.sleep(chance.choice((0, 0, 0.01, 0.3, 1.2)))
    await leaves_somehow(client, chance)


async def leaves_somehow(client: Client, chance: random.Random) -> None:
    way = chance.randrange(4)
    if way == 0:
        client.reset()
    elif way == 1 and client.tls is None:
        client.writer.write_eof()
        await client.to_the_end()
    elif way == 2:
        client.writer.write(client.frame(some_text(chance)) + client.frame(b"", harness.CLOSE))
        await client.to_the_end()
    # else it just closes its socket


async def stops_reading(client: Client, chance: random.Random) -> None:
    """A slow reader, until it is dropped or goes."""
    await client.open(chance.choice(("/flood", "/burst")))
    await client.send(b"go")
    for _ in range(chance.randrange(5)):
        await client.receive()
    if chance.randrange(2):
        await asyncio.sleep(chance.uniform(0, 5))
        await leaves_somehow(client, chance)
    else:
        await asyncio.sleep(7)


async def never_answers(client: Client, chance: random.Random) -> None:
    """Neither a ping, nor a close, nor what it is asked for."""
    await client.open(chance.choice(("/echo", "/bye", "/busy")))
    if chance.randrange(2):
        await client.send(b"go")
    await client.to_the_end()


async def asks_for_pages(client: Client, chance: random.Random) -> None:
    request, status = chance.choice(
        (
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
            (b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
            (b"GET /none HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
            (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", b"200"),
            (f"GET /refused HTTP/1.1\r\n{harness.PLAIN_HEADERS}".encode(), b"403"),
            (b"GET / HTTP/1.1\r\n\r\n", b"400"),
            (b"GET /%00 HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20_000 + b"\r\n\r\n", b"431"),
        )
    )
    await client.connect()
    client.writer.write(request)
    head = await client.reader.read(1 << 16)
    if not head.startswith(b"HTTP/1.1 " + status):
        raise Surprise(f"{request[:30]!r} was answered {head[:30]!r}")
    await client.to_the_end()


async def asks_nonsense(client: Client, chance: random.Random) -> None:
    request = bytearray(f"GET /echo HTTP/1.1\r\n{harness.PLAIN_HEADERS}".encode())
    for _ in range(chance.randrange(1, 5)):
        request[chance.randrange(len(request))] = chance.randrange(256)
    await client.connect()
    client.writer.write(bytes(request))
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(client.reader.read(1 << 16), 0.5)


async def talks_nonsense(client: Client, chance: random.Random) -> None:
    await client.open("/echo", chance.choice((harness.PLAIN_HEADERS, harness.BROWSER_HEADERS)))
    data = bytearray(client.frame(some_text(chance)) * 3)
    for _ in range(chance.randrange(1, 10)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    client.writer.write(bytes(data))
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(client.to_the_end(), 0.5)


async def speaks_no_tls(client: Client, chance: random.Random) -> None:
    """On the TLS port, that is."""
    client.tls = None
    await client.connect()
    client.writer.write(chance.randbytes(chance.randrange(1, 300)))
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(client.to_the_end(), 0.5)


KINDS: dict[Callable[[Client, random.Random], Awaitable[None]], int] = {
    is_polite: 12,
    is_big: 1,
    compresses: 8,
    fragments: 5,
    talks: 12,
    pings: 6,
    breaks_off: 20,
    stops_reading: 2,
    never_answers: 2,
    asks_for_pages: 10,
    asks_nonsense: 6,
    talks_nonsense: 6,
    speaks_no_tls: 2,
}
#: What ends in whatever way the server sees fit: nothing of it is a surprise.
ROUGH = (breaks_off, stops_reading, never_answers, talks_nonsense, speaks_no_tls, asks_nonsense)


class Steady:
    """A client that stays all the time, and must see each of its messages, in order."""

    def __init__(self, client: Client, path: str, headers: str = harness.PLAIN_HEADERS) -> None:
        self._client = client
        self._path = path
        self._headers = headers
        self._sent = 0
        self.seen = 0

    async def run(self) -> None:
        await self._client.open(self._path, self._headers)
        try:
            await asyncio.gather(self._speak(), self._listen())
        finally:
            self._client.writer.transport.abort()

    async def _speak(self) -> None:
        while True:
            self._sent += 1
            await self._client.send(b"steady %d " % self._sent + b"." * (self._sent * 37 % 3000))
            await asyncio.sleep(0.02)

    async def _listen(self) -> None:
        while True:
            opcode, payload = await self._client.receive()
            if opcode == harness.CLOSE:
                raise Surprise(f"a steady client was closed: {payload!r}")
            if payload.startswith(b"steady "):
                self.seen += 1
                if payload.split()[1] != b"%d" % self.seen:
                    raise Surprise(f"expected message {self.seen}, got {payload[:20]!r}")


class Soak:
    """The load of one run, and the looks at its server."""

    def __init__(self, pid: int, port: int) -> None:
        self._pid = pid
        self._port = port
        self._chance = random.Random(20260101)
        self._clients: set[asyncio.Task[None]] = set()
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._tls.check_hostname = False
        self._tls.verify_mode = ssl.CERT_NONE
        self._tls_port = 0
        self.surprises: Counter[str] = Counter()
        self.looks: list[dict[str, Any]] = []

    async def run(self, seconds: float, every: float) -> None:
        self._tls_port = (await self._stats())["tls_port"]
        steady = [
            Steady(self._client(False), "/echo"),
            Steady(self._client(True), "/echo"),
            Steady(self._client(False), "/echo", harness.BROWSER_HEADERS),
            Steady(self._client(False), "/room/0"),
        ]
        tasks = [asyncio.create_task(self._note("steady", each.run())) for each in steady]
        for kind in KINDS:  # what is opened or imported once is there before the first look
            self._start(kind)
        await self._look(steady)
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            await self._load(every)
            await self._look(steady)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _client(self, tls: bool) -> Client:
        return Client(self._tls_port, self._tls) if tls else Client(self._port, None)

    async def _stats(self) -> Any:
        return await asyncio.to_thread(harness.get, self._port, "/stats")

    async def _load(self, seconds: float) -> None:
        began = time.monotonic()
        kinds, weights = list(KINDS), list(KINDS.values())
        started = 0
        while (passed := time.monotonic() - began) < seconds:
            while started < passed * RATE and len(self._clients) < CROWD:
                self._start(self._chance.choices(kinds, weights)[0])
                started += 1
            started = max(started, int(passed * RATE))  # who found no place does not come later
            await asyncio.sleep(0.02)

    def _start(self, kind: Callable[[Client, random.Random], Awaitable[None]]) -> None:
        tls = kind is speaks_no_tls or self._chance.random() < TLS_SHARE
        task = asyncio.create_task(self._visit(kind, self._client(tls)))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _visit(
        self, kind: Callable[[Client, random.Random], Awaitable[None]], client: Client
    ) -> None:
        chance = random.Random(self._chance.random())
        try:
            visit = self._note(kind.__name__, kind(client, chance), kind in ROUGH)
            await asyncio.wait_for(visit, PATIENCE)
        except asyncio.TimeoutError:
            self.surprises[f"{kind.__name__}: was not served in time"] += 1
        finally:
            if hasattr(client, "writer"):
                client.writer.transport.abort()

    async def _note(self, name: str, visit: Awaitable[None], rough: bool = False) -> None:
        try:
            await visit
        except GONE as error:
            if not rough:
                self.surprises[f"{name}: {error!r}"] += 1
        except Surprise as surprise:
            self.surprises[f"{name}: {surprise}"] += 1

    async def _look(self, steady: list[Steady]) -> None:
        """All clients leave, the server settles, and tells how it is."""
        while self._clients:
            await asyncio.wait(self._clients)
        look: dict[str, Any] = {}
        until = time.monotonic() + PATIENCE
        while not look or (look["connections"] > len(steady) and time.monotonic() < until):
            await asyncio.sleep(1.5)
            rss = harness.memory_kib(self._pid)
            descriptors = len(os.listdir(f"/proc/{self._pid}/fd"))
            look = {"rss_kib": rss, "descriptors": descriptors, **await self._stats()}
        look["steady"] = sum(each.seen for each in steady)
        self.looks.append(look)
        harness.report(check="soak", **look)


COLUMNS = ("rss_kib", "blocks", "descriptors", "connections", "rooms", "tasks", "websockets")


def judge(looks: list[dict[str, Any]]) -> list[str]:
    """What did not hold."""
    wrong = []
    for name in COLUMNS[2:]:
        seen = [look[name] for look in looks]
        if any(value != seen[0] for value in seen):
            wrong.append(f"{name}: {seen}")
    if any(look["websockets"] != look["connections"] for look in looks):
        wrong.append("some WebSocket objects outlived their connections")
    third = len(looks) // 3
    for name, bound in BOUNDS.items() if third else ():
        grown = mean(each[name] for each in looks[-third:])
        grown -= mean(each[name] for each in looks[-2 * third : -third])
        if grown > bound:
            wrong.append(f"{name} grew by {grown:.0f} from the second third to the last")
    if looks[-1]["errors"]:
        wrong.append(f"logged: {looks[-1]['errors']}")
    if looks[-1]["steady"] <= looks[0]["steady"]:
        wrong.append("the steady clients stood still")
    return wrong


def check(loop: str, options: argparse.Namespace) -> bool:
    seconds = 15.0 if options.quick else options.minutes * 60
    every = min(60.0, seconds / 3 if options.quick else seconds / 9)
    with harness.server(__file__, "--serve", loop) as (process, port):
        soak = Soak(process.pid, port)
        began, began_cpu = time.monotonic(), harness.cpu_seconds(process.pid)
        asyncio.run(soak.run(seconds, every))
        passed = time.monotonic() - began
        cpu = harness.cpu_seconds(process.pid) - began_cpu
    wrong = judge(soak.looks)
    print(f"{loop:>8}", *(f"{name:>12}" for name in (*COLUMNS, "served", "slow", "steady")))
    for number, look in enumerate(soak.looks):
        row = (*(look[name] for name in COLUMNS), look["served"], look["slow"], look["steady"])
        print(f"{number:8}", *(f"{value:12}" for value in row))
    wrong += [f"{count} x {surprise}" for surprise, count in soak.surprises.items()]
    harness.report(
        check="soak",
        loop=loop,
        minutes=round(passed / 60, 1),
        clients_a_second=round(soak.looks[-1]["served"] / passed),
        server_cpu_share=round(cpu / passed, 2),
        load_cpu_share=round(time.process_time() / passed, 2),
        wrong=wrong,
        ok=not wrong,
    )
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--quick", action="store_true", help="some seconds, to try it")
    harness.run_checks(parser, serve, check)


if __name__ == "__main__":
    main()
