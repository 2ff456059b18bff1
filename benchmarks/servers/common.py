"""What the servers of the benchmarks share: a typed message, a free port, an event loop.

Every server answers the same: ``/echo`` and ``/binary`` send back what they get, ``/json`` decodes
and validates a ``Say`` and encodes it again, ``/room/NAME`` sends to all members, the sender
included. All print the port they listen on. Settings are everybody's defaults where no comment says
otherwise; compression is not offered by the load of run.py.
"""

import socket
import sys
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import run_loop

__all__ = ["Say", "decode", "encode", "free_socket", "run_loop"]


class Say(msgspec.Struct):
    user: str
    number: int
    text: str
    tags: list[str]


# For those who have no typed messages of their own, so that all do the same work.
decode = msgspec.json.Decoder(Say).decode
encode = msgspec.json.Encoder().encode


def free_socket() -> socket.socket:
    """A listening socket on a port that the kernel chose, which is printed."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(sock.getsockname()[1], flush=True)
    return sock
