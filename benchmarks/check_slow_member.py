# Does a member that stops reading cost the others anything, and the server memory without bound?
#
#   python benchmarks/check_slow_member.py [--loop asyncio|uvloop|trio] [--messages 20000]
#
# A room of 50: one member sends 20,000 messages of 1 KiB into it as fast as the server takes
# them, one never reads, and the others (the sender, too) must get every message in one order. Then
# the slow one reads: whole messages, in order, then close code 1013. Prints for each event loop
# what came, the counters, and the server's memory before and at its peak.

from __future__ import annotations

import argparse
import select
import time

import harness

MEMBERS = 50
SIZE = 1024
PATIENCE = 60.0


def serve(loop: str) -> None:
    import roomsock

    app = roomsock.App(keepalive=None)  # pings would stand between the messages

    @app.on_message("/room/<name>")
    async def room(ws, text, name):
        ws.send_text_to_this_room(text)

    harness.serve(app, loop)


def message(number: int) -> bytes:
    return b"%08d" % number + b"x" * (SIZE - 8)


def numbers(stream: bytes) -> list[int]:
    """The sequence numbers of the messages in a stream of whole frames."""
    size = len(harness.server_header(SIZE)) + SIZE
    return [int(stream[at : at + 8]) for at in range(size - SIZE, len(stream), size)]


def check(loop: str, options: argparse.Namespace) -> bool:
    count = options.messages
    with harness.server(__file__, "--serve", loop) as (process, port):
        slow = harness.connect(port, "/room/a", receive_buffer=16 * 1024)
        readers = [harness.connect(port, "/room/a") for _ in range(MEMBERS - 1)]
        before = harness.memory_kib(process.pid)
        sender = readers[0]
        epoll = select.epoll()
        by_fd = {sock.fileno(): sock for sock in readers}
        at = dict.fromkeys(by_fd, 0)
        for sock in readers:
            sock.setblocking(False)
            epoll.register(sock.fileno(), select.EPOLLIN)
        epoll.modify(sender.fileno(), select.EPOLLIN | select.EPOLLOUT)
        due = memoryview(b"".join(harness.client_frame(message(i)) for i in range(count)))
        room = harness.SameStream()
        expected = count * (len(harness.server_header(SIZE)) + SIZE)
        began = time.monotonic()
        closed = 0
        while min(at.values()) < expected and time.monotonic() < began + PATIENCE:
            for fd, events in epoll.poll(1.0):
                if events & select.EPOLLOUT:
                    due = due[sender.send(due[: 1 << 16]) :]
                    if not due:
                        epoll.modify(fd, select.EPOLLIN)
                if events & ~select.EPOLLOUT:
                    data = by_fd[fd].recv(1 << 18)
                    if not data:
                        closed += 1
                        epoll.unregister(fd)
                    at[fd] = room.check(at[fd], data)
        elapsed = time.monotonic() - began
        frames, rest, ended = harness.read_to_end(slow, 1.0)  # before Limits.close_timeout
        complete = sum(position == expected for position in at.values())
        in_order = complete > 0 and numbers(bytes(room.stream[:expected])) == list(range(count))
        texts = [payload for opcode, payload in frames if opcode == harness.TEXT]
        slow_in_order = texts == [message(i) for i in range(len(texts))] and not rest
        code = harness.close_code(frames)
        slow.close()
        stats = harness.get(port, "/stats")
        peak = harness.memory_kib(process.pid, "VmHWM")
        ok = complete == MEMBERS - 1 and in_order and slow_in_order and code == 1013
        ok = ok and stats["slow_consumers"] == 1
        harness.report(
            check="slow_member",
            loop=loop,
            seconds=round(elapsed, 2),
            members_with_all_in_order=complete if in_order else 0,
            readers_closed=closed,
            slow_got=len(texts),
            slow_in_order=slow_in_order,
            slow_close_code=code,
            slow_stream=ended,
            slow_consumers=stats["slow_consumers"],
            memory_before_mib=round(before / 1024, 1),
            memory_peak_mib=round(peak / 1024, 1),
            ok=ok,
        )
        for sock in readers:
            sock.close()
        return ok


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--messages", type=int, default=20_000)
    harness.run_checks(parser, serve, check)


if __name__ == "__main__":
    main()
