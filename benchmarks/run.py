# How fast are echoes and rooms, compared with what else there is?
#
#   pip install -e '.[bench]' && python benchmarks/run.py
#     [--workloads 'echo-*,json'] [--servers 'roomsock*,picows*'] [--rounds 5] [--seconds 1]
#     [--out DIR] [--base NAME] [--quick] [--list] [--plot results.json]
#
# All of it takes some 50 minutes; --list says what there is. Every server has one core, the load
# another; neither core ever sleeps, nor does the load. The rounds of a workload go through all
# servers, in another order each time, while the others are stopped. Figures are medians of the
# rounds; a ratio is taken within each round: of rates, or of the servers' CPU time (marked) where
# the load was the limit on either side. Prints Markdown tables, and writes them with the raw
# figures and plots to DIR.
#
# The exit code is 1 when a server lost, changed or reordered a message, or broke down; the tables
# say so as well. --quick is a smoke test of half a minute: everything small, no figure means
# anything.

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import signal
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import harness
import report
from load import Result, Wrong
from workloads import WORKLOADS, Server, Workload, measure

SERVERS_DIR = Path(__file__).parent / "servers"


@dataclass(frozen=True)
class Peer:
    """A way to make a server."""

    name: str
    script: str
    arguments: str = ""
    needs: tuple[str, ...] = ()  # modules
    quick: bool = False  # part of the smoke test
    checked: bool = True
    only: tuple[str, ...] = ()  # workloads

    def missing(self) -> list[str]:
        return [module for module in self.needs if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


#: What the floor with handlers is one for.
HANDLED = tuple(w.name for w in WORKLOADS if w.kind in ("messages", "latency") and w.size < 1 << 20)
PEERS = (
    Peer("roomsock asyncio", "with_roomsock.py", "asyncio", quick=True),
    Peer("roomsock uvloop", "with_roomsock.py", "uvloop", ("uvloop",), quick=True),
    Peer("roomsock trio", "with_roomsock.py", "trio", ("trio",), quick=True),
    Peer("roomsock asyncio-pure", "with_roomsock.py", "asyncio pure", only=("echo-16k", "echo-1m")),
    Peer("websockets asyncio", "with_websockets.py", "asyncio", ("websockets",), quick=True),
    Peer("websockets uvloop", "with_websockets.py", "uvloop", ("websockets", "uvloop")),
    Peer("websockets trio", "with_websockets_trio.py", "trio", ("websockets.trio", "trio")),
    Peer(
        "uvicorn websockets",
        "with_uvicorn.py",
        "websockets-sansio",
        ("starlette", "uvicorn", "uvloop", "httptools", "websockets"),
    ),
    Peer(
        "uvicorn wsproto",
        "with_uvicorn.py",
        "wsproto",
        ("starlette", "uvicorn", "uvloop", "httptools", "wsproto"),
    ),
    Peer("hypercorn asyncio", "with_hypercorn.py", "asyncio", ("starlette", "hypercorn", "trio")),
    Peer("hypercorn trio", "with_hypercorn.py", "trio", ("starlette", "hypercorn", "trio")),
    Peer("aiohttp asyncio", "with_aiohttp.py", "asyncio", ("aiohttp",)),
    Peer("aiohttp uvloop", "with_aiohttp.py", "uvloop", ("aiohttp", "uvloop")),
    Peer("tornado asyncio", "with_tornado.py", "asyncio", ("tornado",)),
    Peer("trio-websocket trio", "with_trio_websocket.py", "trio", ("trio_websocket",)),
    Peer("picows uvloop", "with_picows.py", "uvloop", ("picows", "uvloop"), quick=True),
    Peer("socketify libuv", "with_socketify.py", "libuv", ("socketify",)),
    Peer("floor epoll", "floor.py", "epoll", quick=True, checked=False),
    Peer("floor handler", "floor.py", "handler", quick=True, only=HANDLED),
    Peer("floor handler-pure", "floor.py", "handler-pure", only=("echo-16k",)),
)
QUICK = (
    *("echo-1", "pipelined", "echo-16k", "json", "room-100", "room-100-20", "rooms-200"),
    *("handshakes", "memory", "latency-room"),
)


class Progress:
    """A bar on a terminal; elsewhere a line for each workload."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.began = total, 0, time.monotonic()
        self.last = ""

    def show(self, workload: str, server: str) -> None:
        if not sys.stderr.isatty():
            if workload != self.last:
                print(f"{self.done}/{self.total} {workload}", file=sys.stderr, flush=True)
            self.last = workload
            return
        filled = 30 * self.done // self.total
        left = ""
        if self.done:
            seconds = (time.monotonic() - self.began) * (self.total - self.done) / self.done
            left = f", {seconds // 60:.0f}:{seconds % 60:02.0f} left"
        bar = "#" * filled + "." * (30 - filled)
        line = f"[{bar}] {self.done}/{self.total}{left}  {workload}: {server}"
        print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr)

    def end(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Servers:
    """Server processes, started when they are first needed; stopped while it is not their turn."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.running: dict[str, Server] = {}
        self.failed: dict[str, str] = {}
        self.stack = ExitStack()

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End them all: the next turn of each is with a new process."""
        self.stack.close()
        self.running.clear()
        self.failed.clear()

    def measure(self, peer: Peer, workload: Workload, seconds: float) -> Result | None:
        """One turn of a server, or none after its failure."""
        if peer.name in self.failed:
            return None
        try:
            server = self.running.get(peer.name) or self._start(peer)
            os.kill(server.pid, signal.SIGCONT)
            result = measure(workload, server, seconds)
            os.kill(server.pid, signal.SIGSTOP)
        except Wrong as error:
            self.failed[peer.name] = str(error)
            if peer.name in self.running:
                os.kill(self.running[peer.name].pid, signal.SIGKILL)
            said = (self.logs / f"{peer.name}.log").read_text().splitlines()[-30:]
            print(f"\n{peer.name}: {error}", *said, sep="\n", file=sys.stderr)
            return None
        return result

    def _start(self, peer: Peer) -> Server:
        log = self.stack.enter_context((self.logs / f"{peer.name}.log").open("a"))
        command = [str(SERVERS_DIR / peer.script), *peer.arguments.split()]
        try:
            process, port = self.stack.enter_context(harness.server(*command, errors=log))
            harness.connect(port, "/echo").close()  # it serves
        except (SystemExit, ValueError, OSError) as error:
            raise Wrong(f"did not start: {error}") from error
        self.running[peer.name] = Server(port, process.pid, peer.checked)
        return self.running[peer.name]


def run(
    workloads: list[Workload],
    peers: list[Peer],
    rounds: int,
    seconds: float,
    out: Path,
    fresh: bool,
) -> None:
    """Measure everything; after each workload the results so far are in ``results.json``.

    With ``fresh`` the servers of each workload are new processes.
    """
    rows: list[report.Row] = []
    order = random.Random(1)
    turns = [
        (workload, [peer for peer in peers if not peer.only or workload.name in peer.only])
        for workload in workloads
    ]
    progress = Progress(sum(_rounds(w, rounds) * len(some) for w, some in turns))
    with Servers(out) as servers:
        for workload, some in turns:
            results: dict[str, list[Result]] = {peer.name: [] for peer in some}
            failed: dict[str, str] = {}
            for number in range(_rounds(workload, rounds)):
                # Memory that was given back within a process would be used again.
                if fresh and (number == 0 or workload.kind == "memory"):
                    servers.end()
                for peer in order.sample(some, len(some)):
                    progress.show(workload.name, peer.name)
                    result = servers.measure(peer, workload, seconds)
                    if result is not None:
                        results[peer.name].append(result)
                    progress.done += 1
                failed.update(servers.failed)
            for name, of_server in results.items():
                rows.append(report.Row(workload, name, of_server, failed.get(name)))
            report.write_json(rows, out)
    progress.end()


def _rounds(workload: Workload, rounds: int) -> int:
    """For the memory two do: each takes as long as ten others, and they hardly differ."""
    return min(rounds, 2) if workload.kind == "memory" else rounds


def chosen(patterns: str, names: list[str]) -> list[str]:
    """Those names that match one of several patterns of a shell."""
    return [name for name in names if any(fnmatch(name, one) for one in patterns.split(","))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure WebSocket servers side by side.")
    parser.add_argument("--workloads", default="*", help="patterns, separated by commas")
    parser.add_argument("--servers", help="patterns, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--out", type=Path, help="default: bench-results; a smoke test keeps none")
    parser.add_argument("--base", default="websockets asyncio", help="what ratios are to")
    parser.add_argument("--quick", action="store_true", help="smoke test")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--plot", type=Path, help="only tables and plots, of such a results.json")
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.out is None and options.quick:
            options.out = Path(stack.enter_context(TemporaryDirectory()))
        out: Path = options.out or Path("bench-results")
        out.mkdir(parents=True, exist_ok=True)
        if not options.plot:
            measure_all(options, out)
        rows, about = report.read_json(options.plot or out / "results.json")
        tables = report.tables(rows, options.base, about)
        print(tables)
        (out / "results.md").write_text(tables)
        if not options.quick:
            report.plots(rows, options.base, out)
    sys.exit(any(row.failed for row in rows))


def measure_all(options: argparse.Namespace, out: Path) -> None:
    workload_names = chosen(options.workloads, [workload.name for workload in WORKLOADS])
    workloads = [workload for workload in WORKLOADS if workload.name in workload_names]
    peer_names = chosen(options.servers or "*", [peer.name for peer in PEERS])
    peers = [peer for peer in PEERS if peer.name in peer_names]
    if options.quick:
        options.rounds, options.seconds = 1, 0.1
        workloads = [workload.small() for workload in workloads if workload.name in QUICK]
        if options.servers is None:
            peers = [peer for peer in peers if peer.quick]
    for peer in list(peers):
        if missing := peer.missing():
            print(f"skipped: {peer.name} ({', '.join(missing)} not installed)", file=sys.stderr)
            peers.remove(peer)
    if options.list:
        print(*(f"workload {w.name:14} {w.title}, {w.unit}" for w in workloads), sep="\n")
        print(*(f"server   {peer.name}" for peer in peers), sep="\n")
        sys.exit()
    report.machine()  # its load before ours
    harness.raise_descriptor_limit()  # of the servers as well
    gc.disable()  # the load leaves no cycles worth a pause
    with harness.kept_awake() if not options.quick else nullcontext():
        run(workloads, peers, options.rounds, options.seconds, out, fresh=not options.quick)


if __name__ == "__main__":
    main()
