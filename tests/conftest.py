"""Every async test runs on asyncio, uvloop and trio; TLS is everywhere that of one authority."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
import trustme

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
