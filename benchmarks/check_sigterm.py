# Does SIGTERM end a `roomsock.run` process in order?
#
#   python benchmarks/check_sigterm.py [--loop asyncio|uvloop|trio] [--connections 100]
#
# Connects 100 clients, half of them in the middle of a conversation, sends SIGTERM, and prints for
# each event loop how many were closed with 1012, the exit code, and the time until the exit, which
# must be less than two seconds when the clients answer the close.

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import time

import harness

LIMIT = 2.0


def serve(loop: str) -> None:
    import roomsock

    logging.basicConfig(level=logging.WARNING)
    app = roomsock.App()

    @app.on_message("/echo")
    async def echo(ws, text):
        await ws.send_text(text)

    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    signal.alarm(harness.SERVER_LIFE)
    backend = "trio" if loop == "trio" else "asyncio"
    roomsock.run(app, sock=listener, backend=backend, uvloop=loop == "uvloop")


def check(loop: str, options: argparse.Namespace) -> bool:
    connections = options.connections
    with harness.server(__file__, "--serve", loop) as (process, port):
        socks = [harness.connect(port, "/echo") for _ in range(connections)]
        for sock in socks[::2]:
            sock.sendall(harness.client_frame(b"hello"))
        began = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        codes = []
        for sock in socks:
            received = b""
            while (code := harness.close_code(harness.split_frames(received)[0])) is None:
                data = sock.recv(65536)
                if not data:
                    break
                received += data
            codes.append(code)
            answer = (code or 1000).to_bytes(2, "big")
            sock.sendall(harness.client_frame(answer, harness.CLOSE))
        ends = []
        for sock in socks:  # the server ends the stream first (RFC 6455, section 7.1.1)
            ends.append(harness.read_to_end(sock, 5)[2])
            sock.close()
        try:
            exit_code = process.wait(20)
        except subprocess.TimeoutExpired:
            exit_code = None
        seconds = time.monotonic() - began
        got_1012 = sum(code == 1012 for code in codes)
        ok = got_1012 == connections and exit_code == 0 and seconds < LIMIT
        harness.report(
            check="sigterm",
            loop=loop,
            connections=connections,
            closed_with_1012=got_1012,
            clean_ends=ends.count("eof"),
            exit_code=exit_code,
            seconds_until_exit=round(seconds, 3),
            ok=ok,
        )
        return ok


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--connections", type=int, default=100)
    harness.run_checks(parser, serve, check)


if __name__ == "__main__":
    main()
