"""The laws of the house, enforced by reading the source.

Who may import whom, who may know an event loop, what is public, and how long things may get.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

import roomsock

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "roomsock"
TESTS = ROOT / "tests"

#: Each module may import those before it. The rows are the layers of the house.
ORDER = [
    *("errors", "limits"),
    *("http",),
    *("protocol", "protocol.events", "protocol.frames", "protocol.keepalive"),
    *("protocol.deflate",),
    *("protocol.outbox", "protocol.handshake", "protocol.connection"),
    *("protocol.proxies",),
    *("routing", "signatures", "messages", "rooms", "websocket", "dispatch", "app"),
    *("listening", "transport", "sender", "receiver", "driver", "server"),
    *("running",),
    *("__init__",),
]
#: For the type checker alone a module may name its neighbours.
NEIGHBOURS = [{"rooms", "websocket"}, {"driver", "server"}, {"receiver", "server"}]

#: Who may know an event loop, and by which names they are known.
DRIVERS = {"listening", "transport", "sender", "receiver", "driver", "server", "running"}
EVENT_LOOPS = {"anyio", "asyncio", "trio", "uvloop", "sniffio", "selectors"}
CLOCKS = {"time", "datetime", "sched"}

#: Tests of something else than one module.
OTHER_TESTS = {
    *("house", "readme", "examples", "browser", "stop", "faults", "limits_held", "autobahn"),
    *("fuzz", "counts"),
}

PUBLIC = {
    *("App", "WebSocket", "Room", "Request", "Response", "Limits", "CloseCode", "Compression"),
    *("RoomsockError", "SetupError", "Reject", "InvalidMessage", "MessageTooBig", "SlowConsumer"),
    *("ConnectionClosed", "ConnectionClosedOK", "ConnectionClosedError"),
    *("run", "serve", "serving"),
}
ROLES = ("serve", "on_json", "on_message", "on_connect", "on_close", "on_error", "get", "post")
SENDS = {"send_json", "send_text", "send_bytes"}
MEMBERS = {
    roomsock.App: {
        *ROLES,
        *(f"add_{role}" for role in ROLES),
        *("include", "room", "rooms", "all", "flushed", "call_soon_threadsafe"),
    },
    roomsock.WebSocket: {
        *(send + to for send in SENDS for to in ("", "_to_this_room", "_to_room", "_to_all")),
        *("id", "path", "params", "request", "subprotocol", "state", "latency"),
        *("accept", "close", "receive", "receive_text", "receive_json"),
        *("room", "rooms", "join", "leave"),
    },
    roomsock.Room: {*SENDS, "name", "members", "others", "state", "flushed"},
}

#: In lines of code. 700 of them came with what strangers make necessary: bounded inflation, trusted
#: proxies, a handshake checked in full; 350 with being fast.
MOST_CODE = 5_350
LONGEST_FUNCTION = 60


class Module(NamedTuple):
    """One source file."""

    name: str
    source: str
    tree: ast.Module


def _read(path: Path) -> Module:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    source = path.read_text()
    return Module(name.replace("protocol.__init__", "protocol"), source, ast.parse(source))


MODULES = {module.name: module for module in map(_read, sorted(PACKAGE.rglob("*.py")))}

each_module = pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))


class Import(NamedTuple):
    """One imported module: ``anyio.abc``, or ``.rooms`` for our own."""

    target: str
    for_types: bool


def imports(module: Module) -> Iterator[Import]:
    for_types = {
        node
        for branch in ast.walk(module.tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(_own(alias.name), node in for_types)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the module's own package, two the one above.
            package = module.name.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            parts = [*above, *([node.module] if node.module else [])]
            target = ".".join(parts)
            yield Import(f".{target}" if node.level else _own(target), node in for_types)


def _own(target: str) -> str:
    return target.removeprefix("roomsock") if target.startswith("roomsock.") else target


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


# Who may import whom


def test_every_module_has_its_place_in_the_house() -> None:
    assert sorted(ORDER) == sorted(MODULES)


@each_module
def test_a_module_imports_only_what_stands_above_it(module: Module) -> None:
    above = {f".{name}" for name in ORDER[: ORDER.index(module.name)]}
    for imported in imports(module):
        target = imported.target
        if target.startswith(".") and target not in above:
            assert imported.for_types, f"{module.name} imports {target}, which stands below it"
            assert {module.name, target[1:]} in NEIGHBOURS


@each_module
def test_only_the_driver_knows_an_event_loop(module: Module) -> None:
    used = {imported.target.partition(".")[0] for imported in imports(module)}
    if module.name not in DRIVERS:
        assert used.isdisjoint(EVENT_LOOPS)


@each_module
def test_the_protocol_knows_neither_async_nor_time(module: Module) -> None:
    if not module.name.startswith("protocol"):
        return
    used = {imported.target.partition(".")[0] for imported in imports(module)}
    assert used.isdisjoint(EVENT_LOOPS | CLOCKS)
    asynchronous = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert not any(isinstance(node, asynchronous) for node in ast.walk(module.tree))


@each_module
def test_names_are_imported_one_by_one(module: Module) -> None:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            assert "*" not in {alias.name for alias in node.names}


# What is public


def test_the_public_names_are_those_of_the_design() -> None:
    assert set(roomsock.__all__) == PUBLIC
    assert roomsock.__all__ == sorted(roomsock.__all__)
    assert all(hasattr(roomsock, name) for name in PUBLIC)


@pytest.mark.parametrize("kind", MEMBERS, ids=lambda kind: kind.__name__)
def test_what_users_hold_has_the_members_of_the_design(kind: type) -> None:
    assert {name for name in dir(kind) if not name.startswith("_")} == MEMBERS[kind]


@each_module
def test_whatever_is_public_says_what_it_does(module: Module) -> None:
    missing = [name for name, node in _public(module.tree) if not ast.get_docstring(node)]
    assert ast.get_docstring(module.tree)
    assert not missing


def _public(
    node: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_") or "overload" in map(ast.unparse, child.decorator_list):
            continue
        yield prefix + child.name, child
        if isinstance(child, ast.ClassDef):
            yield from _public(child, f"{prefix}{child.name}.")


# One test file for each module


def test_every_module_has_its_test_file_and_back() -> None:
    for package, tests in ((PACKAGE, TESTS), (PACKAGE / "protocol", TESTS / "protocol")):
        modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
        tested = {path.stem.removeprefix("test_") for path in tests.glob("test_*.py")}
        assert modules - tested == set()
        assert tested - modules - OTHER_TESTS == set()


# Size


def code_lines(module: Module) -> set[int]:
    """The lines that hold code: blank ones, comments and docstrings are free."""
    docstrings = {
        line
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(module.source).readline)
        if token.type not in layout
        for line in range(token.start[0], token.end[0] + 1)
    }
    return code - docstrings


def test_the_house_stays_small() -> None:
    table = [
        (name, len(module.source.splitlines()), len(code_lines(module)))
        for name, module in MODULES.items()
    ]
    table.append(("total", *(sum(column) for column in list(zip(*table, strict=True))[1:])))
    print("\n".join(f"{name:24}{lines:7}{code:7}" for name, lines, code in table))
    assert table[-1][2] < MOST_CODE


@each_module
def test_no_function_is_longer_than_a_screen(module: Module) -> None:
    code = code_lines(module)
    for node in functions(module):
        lines = code.intersection(range(node.lineno, (node.end_lineno or 0) + 1))
        assert len(lines) <= LONGEST_FUNCTION, f"{module.name}.{node.name}"


@each_module
def test_what_is_left_to_do_says_when(module: Module) -> None:
    for line in module.source.splitlines():
        if re.search("TODO|FIXME|XXX", line):
            assert " when " in line


# Types


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_decorators_keep_the_type_of_the_function_and_mistakes_are_found() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "tests/type_check/decorators.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
