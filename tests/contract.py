"""What the tests of the contract of behaviour share: an app on a real socket, raw frames, the log.

A test file takes the fixtures by name (``logged = contract.logged``), so `nothing_else_is_logged`
watches the log of those files alone that ask for it.
"""

from __future__ import annotations

import logging
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from wsproto import events

from roomsock import App, ConnectionClosed, WebSocket, serving
from roomsock.server import Server

from .client import PATIENCE, Client
from .clock import FakeClock, settled

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="relies on Linux's kernel")


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged as a warning or worse so far; who asks for it expects something."""

    def lines() -> list[str]:
        records = caplog.get_records("call")
        return [record.getMessage() for record in records if record.levelno >= logging.WARNING]

    return lines


@pytest.fixture(autouse=True)
def nothing_else_is_logged(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """An error in the log that was not expected fails the test: also a handler's failed assert."""
    caplog.set_level(logging.DEBUG, "roomsock")
    yield
    if "logged" not in request.fixturenames:
        records = caplog.get_records("call")
        unexpected = [each for each in records if each.levelno >= logging.WARNING]
        assert unexpected == [], unexpected


@asynccontextmanager
async def served(app: App, clock: FakeClock | None = None, **options: Any) -> AsyncIterator[Server]:
    """The app on a port of its own, in a time that stands still. Behind the body the clients are
    gone: then no connection may be left, and no room. Options are those of `serving`."""
    time = clock or FakeClock()
    raised: Exception | None = None
    hurried: list[bool] = []
    async with anyio.create_task_group() as tg:
        try:
            async with serving(app, port=0, clock=time, **options) as server:
                try:
                    with anyio.fail_after(PATIENCE):
                        yield server
                    await until(lambda: not server.connections)
                finally:
                    tg.start_soon(_hurry, time, hurried)
        except Exception as error:
            raised = error
        tg.cancel_scope.cancel()
    if raised is not None:
        raise raised
    assert hurried == [], "the server waited for something that no longer was"
    left = (server.connections, app.rooms, len(app.all))
    assert left == (0, (), 0), left


async def _hurry(clock: FakeClock, hurried: list[bool]) -> None:
    """What is stuck must not hold the whole suite; the server logs what it stopped without."""
    await anyio.sleep(PATIENCE / 2)
    hurried.append(True)
    while True:
        await clock.advance(10)


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(PATIENCE):
        while not condition():
            await checkpoint()


class Ends:
    """What `on_error` and `on_close` of a path are told, in order."""

    def __init__(self, app: App, path: str = "/r", *, error: bool = True) -> None:
        self.told: list[str] = []
        if error:
            app.add_on_error(path, self._error)
        app.add_on_close(path, self._close)

    def _error(self, ws: WebSocket, error: Exception) -> None:
        known = isinstance(error, ConnectionClosed)
        self.told.append(f"error {error}" if known else f"error {type(error).__name__}")

    def _close(self, ws: WebSocket, reason: ConnectionClosed) -> None:
        self.told.append(f"close {reason}")

    async def come(self) -> None:
        """Wait until one connection is over."""
        await until(lambda: any(line.startswith("close") for line in self.told))


def masked(first: int, payload: bytes = b"") -> bytes:
    """A client's frame, masked with zeros."""
    length = len(payload)
    if length < 126:
        header = bytes((first, 0x80 | length))
    elif length < 65536:
        header = bytes((first, 0x80 | 126)) + length.to_bytes(2, "big")
    else:
        header = bytes((first, 0x80 | 127)) + length.to_bytes(8, "big")
    return header + bytes(4) + payload


def text(message: str) -> bytes:
    return masked(0x81, message.encode())


def close(code: int, reason: str = "") -> bytes:
    return masked(0x88, code.to_bytes(2, "big") + reason.encode())


def deflated(message: bytes) -> bytes:
    """The payload of a compressed message (RFC 7692, section 7.2.1)."""
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(message) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


CLOSE_WITHOUT_CODE = masked(0x88)  # what a browser's close() sends
BAD_FRAME = masked(0xF1)  # reserved bits

CHUNKINGS = ["whole", "byte by byte", "at each frame", "within each frame"]


def cut(frames: list[bytes], chunking: str) -> list[bytes]:
    whole = b"".join(frames)
    if chunking == "whole":
        return [whole]
    if chunking == "byte by byte":
        return [bytes((byte,)) for byte in whole]
    if chunking == "at each frame":
        return frames
    chunks = [frames[0][:3]]
    chunks += [one[3:] + two[:3] for one, two in pairwise(frames)]
    return [*chunks, frames[-1][3:]]


async def send_chunks(client: Client, chunks: list[bytes]) -> None:
    """Send chunks that the server reads one by one."""
    for chunk in chunks:
        await client.send_raw(chunk)
        await settled()


async def messages(client: Client) -> list[str | bytes]:
    """Read to the close frame, or to the end without one; the messages in front of it."""
    received = []
    while isinstance(event := await client.event(), events.Message):
        received.append(event.data)
    return received
