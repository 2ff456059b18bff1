# How long does one busy client, or one busy handler, hold up everybody else?
#
#   python benchmarks/check_fairness.py [--loop asyncio|uvloop|trio]
#
# (a) burst: one member of a room of 1,000 sends a whole 64 KiB read of tiny frames (9,362).
# (b) loop: a handler sends 100,000 messages to its room (of 10, of 50) without an await; it
#     holds the event loop by nature, and must close nobody who reads.
# Meanwhile a bystander, a process of its own, measures round trips on /echo. Prints for each
# loop: members that got everything in order (all is right), the seconds it took, and the
# bystander's median and worst round trip in milliseconds, also while nothing else happens.

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import harness

BURST = 9_362
LOOP = 100_000
PATIENCE = 90.0


def serve(loop: str) -> None:
    import roomsock

    app = roomsock.App(keepalive=None)  # pings would stand between the messages

    @app.on_message("/echo")
    async def echo(ws, text):
        await ws.send_text(text)

    @app.on_message("/burst")
    async def burst(ws, text):
        ws.send_text_to_this_room(text)

    @app.on_message("/loop/<size>")
    async def loop_handler(ws, text, size):
        for number in range(LOOP):
            ws.send_text_to_this_room(f"{number:08}")

    harness.serve(app, loop)


def bystander(port: int) -> None:
    """Echo until standard input has something; print when each round trip began, and its ms."""
    sock = harness.connect(port, "/echo")
    sock.settimeout(PATIENCE)
    frame = harness.client_frame(b"hello")
    trips = []
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.002)[0]:
        sent = time.monotonic()
        sock.sendall(frame)
        sock.recv(100)
        trips.append((sent, (time.monotonic() - sent) * 1000))
    print(json.dumps(trips))


def watch(port: int, action: Callable[[], None]) -> dict[str, float]:
    """Do something while a bystander measures: its round trips in milliseconds."""
    command = [sys.executable, __file__, "--bystander", str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        began = time.monotonic()
        action()
        ended = time.monotonic()
        out, _ = process.communicate("done\n")
    trips = [ms for sent, ms in json.loads(out) if began - 0.01 < sent < ended]
    return {"trips": len(trips), "median": round(median(trips), 2), "worst": round(max(trips), 1)}


def check(loop: str, name: str, path: str, members: int, send: bytes, expected: bytes) -> bool:
    with harness.server(__file__, "--serve", loop) as (process, port):
        quiet = watch(port, lambda: time.sleep(1))
        socks = [harness.connect(port, path) for _ in range(members)]
        epoll = select.epoll()
        by_fd = {sock.fileno(): sock for sock in socks}
        at = dict.fromkeys(by_fd, 0)
        for sock in socks:
            sock.setblocking(False)
            epoll.register(sock.fileno(), select.EPOLLIN)
        before = harness.memory_kib(process.pid)
        state = {"seconds": 0.0, "closed": 0, "in_order": True}

        def action() -> None:
            began = time.monotonic()
            socks[0].setblocking(True)
            socks[0].sendall(send)
            socks[0].setblocking(False)
            missing = members
            while missing and time.monotonic() < began + PATIENCE:
                for fd, _ in epoll.poll(1.0):
                    data = by_fd[fd].recv(1 << 18)
                    position = at[fd]
                    at[fd] += len(data)
                    if data and data == expected[position : at[fd]]:
                        missing -= at[fd] == len(expected)
                        continue
                    state["in_order"] = False
                    state["closed"] += not data
                    missing -= 1
                    epoll.unregister(fd)
            state["seconds"] = time.monotonic() - began

        busy = watch(port, action)
        complete = sum(position == len(expected) for position in at.values())
        stats = harness.get(port, "/stats")
        ok = complete == members and state["in_order"] and not stats["slow_consumers"]
        harness.report(
            check=f"fairness, {name}",
            loop=loop,
            members=members,
            members_with_all_in_order=complete if state["in_order"] else 0,
            closed=state["closed"],
            seconds=round(state["seconds"], 2),
            quiet_echo_ms=quiet,
            busy_echo_ms=busy,
            slow_consumers=stats["slow_consumers"],
            memory_before_mib=round(before / 1024, 1),
            memory_peak_mib=round(harness.memory_kib(process.pid, "VmHWM") / 1024, 1),
            ok=ok,
        )
        for sock in socks:
            sock.close()
        return ok


def check_all(loop: str, _options: argparse.Namespace) -> bool:
    texts = [bytes((32 + number % 90,)) for number in range(BURST)]
    burst = b"".join(map(harness.client_frame, texts))
    copies = b"".join(harness.server_header(1) + text for text in texts)
    numbers = b"".join(harness.server_header(8) + b"%08d" % number for number in range(LOOP))
    go = harness.client_frame(b"go")
    results = [
        check(loop, "burst", "/burst", 1000, burst, copies),
        check(loop, "loop", "/loop/10", 10, go, numbers),
        check(loop, "loop", "/loop/50", 50, go, numbers),
    ]
    return all(results)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bystander", type=int, help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args()
    if options.bystander:
        bystander(options.bystander)
    else:
        harness.raise_descriptor_limit()
        harness.run_checks(parser, serve, check_all)


if __name__ == "__main__":
    main()
