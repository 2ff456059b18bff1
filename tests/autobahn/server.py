"""The server that Autobahn's suite tests: ``python server.py asyncio|uvloop|trio``.

It echoes text and bytes at ``/echo``, prints the port that the kernel chose, and serves until its
standard input ends, so that it never outlives whoever started it.
"""

from __future__ import annotations

import sys

import anyio
import anyio.to_thread

import roomsock

MIB = 1024 * 1024

# The suite's largest messages have 16 MiB, and their echo may wait as a whole.
LIMITS = roomsock.Limits(message=16 * MIB, outbox=64 * MIB)

app = roomsock.App(compression=True, limits=LIMITS)


@app.on_message("/echo")
async def echo(ws: roomsock.WebSocket, message: str | bytes) -> None:
    if isinstance(message, str):
        await ws.send_text(message)
    else:
        await ws.send_bytes(message)


async def main() -> None:
    async with roomsock.serving(app, port=0) as server:
        print(server.addresses[0][1], flush=True)
        await anyio.to_thread.run_sync(sys.stdin.read)


if __name__ == "__main__":
    loop = sys.argv[1]
    anyio.run(
        main,
        backend="trio" if loop == "trio" else "asyncio",
        backend_options={"use_uvloop": True} if loop == "uvloop" else {},
    )
