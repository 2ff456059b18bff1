"""Every async test runs on asyncio, uvloop and trio; TLS is everywhere that of one authority."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
import trustme

from roomsock.transport import EventLoop, running_event_loop

LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", {"restrict_keyboard_interrupt_to_checkpoints": True}), id="trio"),
]


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="session")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS for the server, and for a client that trusts it."""
    authority = trustme.CA()
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(ours)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(theirs)
    return ours, theirs


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """Sockets to close behind the test."""
    opened: list[socket.socket] = []
    yield opened
    for sock in opened:
        sock.close()


@pytest.fixture
async def loop() -> AsyncIterator[EventLoop]:
    """The event loop of a server that runs."""
    loop = running_event_loop()
    async with anyio.create_task_group() as tg:
        tg.start_soon(loop.run)
        await anyio.wait_all_tasks_blocked()
        yield loop
        tg.cancel_scope.cancel()
