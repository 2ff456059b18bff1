"""Autobahn's WebSocket test suite against a roomsock echo server, on each event loop.

Every case, and the closing of every case, must be OK or INFORMATIONAL, and every chosen case must
have been run. The suite needs a CPython 2.7: $PYTHON27, or one on PATH, or one of pyenv's. Its
virtualenv is made once, from requirements.txt beside this file (pip and gcc; about 20 seconds).

Exit status: 0 all is well; 1 a case is not; 2 the suite could not run; 3 it could not because
this machine has no CPython 2.7.
"""

from __future__ import annotations

import argparse
import fnmatch
import html
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".autobahn"
REQUIREMENTS = HERE / "requirements.txt"
#: The last one that can make environments of 2.7; it carries a pip for them.
VIRTUALENV = "virtualenv==20.21.1"

LOOPS = ("asyncio", "uvloop", "trio")
FINE = {"OK", "INFORMATIONAL"}
COLUMNS = ("OK", "INFORMATIONAL", "NON-STRICT", "FAILED", "UNIMPLEMENTED", "BAD CLOSE", "MISSING")

#: How many cases each group of the suite has. 9 is about speed, 12 and 13 about compression.
_SIZES = """
    1.1:8 1.2:8 2:11 3:7 4.1:5 4.2:5 5:20
    6.1:3 6.2:4 6.3:2 6.4:4 6.5:5 6.6:11 6.7:4 6.8:2 6.9:4 6.10:3 6.11:5 6.12:8 6.13:5 6.14:10
    6.15:1 6.16:3 6.17:5 6.18:5 6.19:5 6.20:7 6.21:8 6.22:34 6.23:7
    7.1:6 7.3:6 7.5:1 7.7:13 7.9:9 7.13:2
    9.1:6 9.2:6 9.3:9 9.4:9 9.5:6 9.6:6 9.7:6 9.8:6 10.1:1
    12.1:18 12.2:18 12.3:18 12.4:18 12.5:18
    13.1:18 13.2:18 13.3:18 13.4:18 13.5:18 13.6:18 13.7:18
"""
CASES = [
    f"{group}.{number + 1}"
    for group, _, size in (entry.partition(":") for entry in _SIZES.split())
    for number in range(int(size))
]

PROTOCOL = "[1-7].*,10.*"
#: Each payload and each set of parameters, with messages from 16 octets to 16 KiB, whole (1, 3, 5,
#: 7) and in fragments (11), and three larger ones.
COMPRESSION = "1[23].?.[1357],1[23].?.11,12.1.13,12.2.9,13.3.10"
PRESETS = {
    "protocol": PROTOCOL,
    "fast": f"{PROTOCOL},9.*,{COMPRESSION}",
    "compression": COMPRESSION,
    "all": "*",
}


class CannotRun(Exception):
    """The suite could not run, or not to its end; says nothing about conformance."""


class NoPython27(CannotRun):
    """This machine has no CPython 2.7."""


# Which cases


def choose(patterns: str) -> list[str]:
    """The cases that a preset, or ids and patterns with commas between them, stand for.

    Raises:
        ValueError: A pattern fits no case.
    """
    chosen: set[str] = set()
    for pattern in PRESETS.get(patterns, patterns).split(","):
        fitting = fnmatch.filter(CASES, pattern)
        if not fitting:
            raise ValueError(f"the suite has no case {pattern!r}")
        chosen.update(fitting)
    return [case for case in CASES if case in chosen]


def time_limit(cases: Iterable[str]) -> float:
    """In seconds: several times what the cases take on a slow machine."""
    return 60 + sum(15 if case.startswith(("9.", "12.", "13.")) else 0.5 for case in cases)


# The suite and its Python


def python27() -> str:
    """The CPython 2.7 of this machine.

    Raises:
        NoPython27: There is none.
        CannotRun: $PYTHON27 is not one.
    """
    if named := os.environ.get("PYTHON27"):
        if not _is_python27(named):
            raise CannotRun(f"PYTHON27={named} is no CPython 2.7 with ctypes, ssl and zlib")
        return named
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [Path(folder) / "python2.7" for folder in os.get_exec_path()]
    candidates += sorted(pyenv.glob("versions/2.7*/bin/python2.7"))
    for candidate in candidates:
        if _is_python27(candidate):
            return str(candidate)
    raise NoPython27("no CPython 2.7 on PATH or in pyenv, and PYTHON27 is not set")


def _is_python27(path: str | Path) -> bool:
    # Not by its name: pyenv's shims are there for versions that are switched off.
    check = "import ctypes, platform, ssl, sys, zlib; print(platform.python_implementation())"
    try:
        checked = subprocess.run(
            [path, "-c", f"{check}; assert sys.version_info[:2] == (2, 7)"],
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return checked.returncode == 0 and checked.stdout.strip() == b"CPython"


def _environment() -> dict[str, str]:
    """Without what is meant for the Python that runs this."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**ours, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_PYTHON_VERSION_WARNING": "1"}


def suite(folder: Path) -> Path:
    """The Python that has the suite; its virtualenv is made unless it is there and complete."""
    venv = folder / "venv"
    python, complete = venv / "bin" / "python", venv / "complete"
    requirements = REQUIREMENTS.read_text()
    if complete.is_file() and complete.read_text() == requirements and _is_python27(python):
        return python
    interpreter = python27()
    print(f"making the suite's virtualenv in {venv} with {interpreter}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "setup.log"
    log.write_bytes(b"")
    with tempfile.TemporaryDirectory(prefix="boot-", dir=folder) as boot:
        tool = f"{boot}/venv/bin/python"
        _step(log, sys.executable, "-m", "venv", f"{boot}/venv")
        _step(log, tool, "-m", "pip", "install", VIRTUALENV)
        data = ("--app-data", f"{boot}/data", "--no-periodic-update")
        _step(log, tool, "-m", "virtualenv", "--clear", "-p", interpreter, *data, str(venv))
    install = ("-m", "pip", "install", "--no-build-isolation", "-r", str(REQUIREMENTS))
    _step(log, str(python), *install)
    _step(log, str(python), "-m", "autobahntestsuite.wstest", "--autobahnversion")
    complete.write_text(requirements)
    return python


def _step(log: Path, *command: str) -> None:
    with log.open("ab") as output:
        done = subprocess.run(
            command, env=_environment(), stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise CannotRun(f"{' '.join(command)} failed\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return textwrap.indent("\n".join(lines[-15:]), "    ") + f"\n    (all of it: {log})"


# One run


@contextmanager
def echo_server(loop: str, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The echo server on an event loop, and its port; ended in any case."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, HERE / "server.py", loop],
            stdin=subprocess.PIPE,  # it serves until this ends
            stdout=subprocess.PIPE,
            stderr=output,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = b""
            if select.select([process.stdout], [], [], 60)[0]:
                line = process.stdout.readline()
            if not line.strip().isdigit():
                raise CannotRun(f"the echo server did not start\n{_tail(log)}")
            yield process, int(line)
        finally:
            process.kill()


def fuzz(python: Path, port: int, loop: str, cases: Sequence[str], out: Path, limit: float) -> None:
    """Let the suite's client loose on the server; its reports go to a folder.

    Raises:
        CannotRun: It came to no end within the limit in seconds, or left no report.
    """
    for old in (*out.glob("*.json"), *out.glob("*.html")):
        old.unlink()
    spec = {
        "outdir": ".",
        "servers": [{"agent": loop, "url": f"ws://127.0.0.1:{port}/echo"}],
        "cases": list(cases),
    }
    (out / "spec.json").write_text(json.dumps(spec))
    log = out / "suite.log"
    module = ("-u", "-m", "autobahntestsuite.wstest")
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                [python, *module, "--mode", "fuzzingclient", "--spec", "spec.json"],
                cwd=out,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CannotRun(f"no end after {limit:.0f} seconds\n{_tail(log)}") from None
    # Its exit status is 0 even if it was refused: what counts are the reports.
    if done.returncode or not (out / "index.json").is_file():
        raise CannotRun(f"the suite ended with {done.returncode}, and no report\n{_tail(log)}")


class Problem(NamedTuple):
    """A case that is not fine."""

    case: str
    behavior: str
    close: str
    description: str
    report: str

    def __str__(self) -> str:
        verdict = f"{self.case}: {self.behavior}" + (self.close and f", close {self.close}")
        return "\n    ".join(filter(None, (verdict, self.description, self.report)))


@dataclass
class Summary:
    """What the suite says about the server on one event loop, or why it says nothing."""

    loop: str
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    error: str = ""

    @property
    def fine(self) -> bool:
        """Whether cases were run, and each was fine."""
        return self.counts.total() > 0 and not self.problems

    def __str__(self) -> str:
        if self.error:
            return f"{self.loop:8}  could not run"
        cells = (f"{self.counts[column]:>{len(column) + 2}}" for column in COLUMNS)
        return f"{self.loop:8}{''.join(cells)}{self.seconds:9.1f}"

    def as_json(self) -> dict[str, object]:
        """All of it, in plain values."""
        return {
            "loop": self.loop,
            "fine": self.fine,
            "seconds": round(self.seconds, 1),
            "counts": dict(self.counts),
            "problems": [problem._asdict() for problem in self.problems],
            "error": self.error,
        }


def summarise(reports: Path, loop: str, cases: Iterable[str], seconds: float) -> Summary:
    """Judge the reports strictly: each case has to be there, and both its verdicts fine."""
    index = json.loads((reports / "index.json").read_text()).get(loop, {})
    counts: Counter[str] = Counter()
    problems = []
    for case in cases:
        if case not in index:
            counts["MISSING"] += 1
            problems.append(Problem(case, "MISSING", "", "", ""))
            continue
        behavior, close = index[case]["behavior"], index[case]["behaviorClose"]
        counts[behavior] += 1
        counts["BAD CLOSE"] += close not in FINE
        if not {behavior, close} <= FINE:
            report = reports / index[case]["reportfile"]
            problems.append(Problem(case, behavior, close, _description(report), str(report)))
    return Summary(loop, seconds, counts, problems)


def _description(report: Path) -> str:
    # What was on the wire is in there as well, and need not be UTF-8.
    text = json.loads(report.read_text(errors="replace"))["description"]
    return textwrap.shorten(html.unescape(re.sub(r"<[^>]+>", " ", text)), 200)


def conformance(python: Path, loop: str, cases: Sequence[str], out: Path, limit: float) -> Summary:
    """Run the cases against a server of its own, and judge what came of it."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with echo_server(loop, out / "server.log") as (server, port):
            fuzz(python, port, loop, cases, out, limit)
            if server.poll() is not None:
                raise CannotRun(f"the server ended by itself\n{_tail(out / 'server.log')}")
    except CannotRun as error:
        return Summary(loop, error=str(error))
    return summarise(out, loop, cases, time.monotonic() - started)


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases",
        nargs="?",
        default="protocol",
        help="protocol (the default: all but speed and compression, ten seconds a loop), "
        "compression (a choice of 12 and 13, a minute), fast (protocol, 9 and compression, three "
        "minutes), all (twenty minutes), or ids and patterns with commas: '7.1.5,9.*'",
    )
    parser.add_argument(
        "--loops",
        default=",".join(LOOPS),
        help="event loops, with commas (default: %(default)s)",
    )
    parser.add_argument(
        "--suite",
        type=Path,
        default=CACHE,
        metavar="DIR",
        help="where the suite's virtualenv is, or is made (default: .autobahn of the repository)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=CACHE / "reports",
        metavar="DIR",
        help="the suite's reports, a folder for each loop; index.html is for reading "
        "(default: .autobahn/reports)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summaries there too")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="longest time for one loop (default: by the cases; 3 minutes for protocol)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    loops = options.loops.split(",")
    if unknown := set(loops) - set(LOOPS):
        parser.error(f"no event loop of ours: {', '.join(sorted(unknown))}")
    try:
        cases = choose(options.cases)
    except ValueError as error:
        parser.error(str(error))

    try:
        python = suite(options.suite.resolve())
    except CannotRun as error:
        print(f"The suite could not run: {error}", file=sys.stderr)
        return 3 if isinstance(error, NoPython27) else 2

    print(f"Autobahn, {len(cases)} cases: {options.cases}")
    print(f"{'':8}{''.join(f'  {column}' for column in COLUMNS)}  seconds", flush=True)
    limit = options.limit or time_limit(cases)
    summaries = []
    for loop in loops:
        summary = conformance(python, loop, cases, options.out.resolve() / loop, limit)
        print(summary, flush=True)
        summaries.append(summary)
    for summary in summaries:
        for problem in summary.problems:
            print(f"{summary.loop} {problem}")
        if summary.error:
            print(f"The suite could not run on {summary.loop}: {summary.error}", file=sys.stderr)
    if options.json:
        results = [summary.as_json() for summary in summaries]
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if any(summary.error for summary in summaries):
        return 2
    return int(not all(summary.fine for summary in summaries))


if __name__ == "__main__":
    # Ended by a signal, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    sys.exit(main())
