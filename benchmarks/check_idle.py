# What does an idle connection cost, and do 10,000 of them live through keepalive?
#
#   python benchmarks/check_idle.py [--connections 10000] [--loop asyncio|uvloop|trio]
#
# Opens the connections with a browser's headers, answers pings until every connection got two,
# and prints for each event loop: resident KiB per connection, connections dropped (0 is right),
# pings seen, the server's processor time per handshake, and its share of a core meanwhile. Needs
# descriptors for all connections in two processes (ulimit -n). The exit code is 1 if any was
# dropped.

from __future__ import annotations

import argparse
import select
import time

import harness

KEEPALIVE = (2.0, 2.0)
PATIENCE = 20.0  # seconds for two rounds of pings


def serve(loop: str) -> None:
    import roomsock

    app = roomsock.App(keepalive=KEEPALIVE, origins="*")

    @app.on_message("/idle")
    async def idle(ws, text):
        pass

    harness.serve(app, loop)


def check(loop: str, options: argparse.Namespace) -> bool:
    connections = options.connections
    with harness.server(__file__, "--serve", loop) as (process, port):
        harness.get(port, "/stats")  # everything is imported
        before = harness.memory_kib(process.pid)
        began_cpu = harness.cpu_seconds(process.pid)
        epoll = select.epoll()
        socks, pings = {}, {}

        def answer_pings(seconds: float) -> None:
            for fd, _ in epoll.poll(seconds, 1024):
                frames, _ = harness.split_frames(data := socks[fd].recv(65536))
                if not data or harness.close_code(frames) is not None:
                    epoll.unregister(fd)
                    del pings[fd]
                for opcode, payload in frames:
                    if opcode == harness.PING:
                        pings[fd] += 1
                        socks[fd].send(harness.client_frame(payload, harness.PONG))

        first = min(1000, connections)  # no ping falls due while they are opened
        us_per_handshake = 0.0
        for number in range(connections):
            if number == first - 1:
                us_per_handshake = (harness.cpu_seconds(process.pid) - began_cpu) / first * 1e6
            sock = harness.connect(port, "/idle", harness.BROWSER_HEADERS)
            sock.setblocking(False)
            socks[sock.fileno()] = sock
            pings[sock.fileno()] = 0
            epoll.register(sock.fileno(), select.EPOLLIN)
            answer_pings(0)
        opened = time.monotonic()
        opening_cpu = harness.cpu_seconds(process.pid)
        rss = harness.memory_kib(process.pid)
        asked = dict(pings)
        while pings and time.monotonic() < opened + PATIENCE:
            answer_pings(0.1)
            if min((pings[fd] - asked[fd] for fd in pings), default=0) >= 2:
                break
        waited = time.monotonic() - opened
        dropped = connections - len(pings)
        ok = not dropped and min(pings[fd] - asked[fd] for fd in pings) >= 2
        harness.report(
            check="idle",
            loop=loop,
            connections=connections,
            kib_per_connection=round((rss - before) / connections, 2),
            kib_per_connection_after_keepalive=round(
                (harness.memory_kib(process.pid) - before) / connections, 2
            ),
            dropped=dropped,
            pings=sum(pings.values()),
            us_per_handshake=round(us_per_handshake),
            cpu_share_during_keepalive=round(
                (harness.cpu_seconds(process.pid) - opening_cpu) / waited, 2
            ),
            server_open=harness.get(port, "/stats")["open"] - 1,
            ok=ok,
        )
        for sock in socks.values():
            sock.close()
        return ok


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--connections", type=int, default=10_000)
    harness.raise_descriptor_limit()
    harness.run_checks(parser, serve, check)


if __name__ == "__main__":
    main()
