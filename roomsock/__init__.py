"""roomsock: rooms over WebSockets, as decorated functions, on asyncio and trio."""

from .app import App
from .errors import (
    CloseCode,
    ConnectionClosed,
    ConnectionClosedError,
    ConnectionClosedOK,
    InvalidMessage,
    MessageTooBig,
    Reject,
    RoomsockError,
    SetupError,
    SlowConsumer,
)
from .http import Request, Response
from .limits import Limits
from .protocol.deflate import Compression
from .rooms import Room
from .running import run
from .server import serve, serving
from .websocket import WebSocket

__all__ = [
    "App",
    "CloseCode",
    "Compression",
    "ConnectionClosed",
    "ConnectionClosedError",
    "ConnectionClosedOK",
    "InvalidMessage",
    "Limits",
    "MessageTooBig",
    "Reject",
    "Request",
    "Response",
    "Room",
    "RoomsockError",
    "SetupError",
    "SlowConsumer",
    "WebSocket",
    "run",
    "serve",
    "serving",
]
