"""What a connection tells its driver.

A message is a plain ``str`` or ``bytes`` (a wrapper would cost more than the parsing); everything
else is one of the classes below. Peer input becomes one of these, never an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union


@dataclass(frozen=True, slots=True)
class PongReceived:
    """The client answered our newest ping, which was sent at ``sent_at`` (seconds)."""

    sent_at: float


@dataclass(frozen=True, slots=True)
class PeerClosed:
    """The client sent a close frame; code 1005 when it held none."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The connection must end by our doing: close with this code, then stop reading messages."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The stream ended without a close frame."""

    reason: str = ""


Event = Union[str, bytes, PongReceived, PeerClosed, Failed, PeerLost]
