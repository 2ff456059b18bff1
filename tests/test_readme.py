"""Every block of the README is run, and its tables say what the code says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

import roomsock
from roomsock import App, Limits, serving

from .client import Refusal, connected, http

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


@pytest.fixture
def run_block(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a block of the README; `roomsock.run` returns at once there."""

    def run(name: str) -> dict[str, Any]:
        served: list[App] = []
        monkeypatch.setattr(roomsock, "run", served.append)
        # A module of its own, so that annotations are resolved as in a user's file.
        namespace: dict[str, Any] = {"__name__": f"readme_{name}"}
        exec(compile(BLOCKS[name], f"README.md:{name}", "exec"), namespace)
        assert served == [namespace["app"]] or "roomsock.run" not in BLOCKS[name]
        return namespace

    return run


def test_every_python_block_is_run_by_a_test() -> None:
    assert README.count("```python") == len(BLOCKS)
    tests = Path(__file__).read_text()
    assert [name for name in BLOCKS if f'run_block("{name}")' not in tests] == []


async def test_the_chat_of_the_first_screen_talks_within_a_room(run_block: Any) -> None:
    app = run_block("chat")["app"]
    async with (
        serving(app, port=0) as server,
        connected(server, "/chat/python?name=ann") as ann,
        connected(server, "/chat/python") as bob,
        connected(server, "/chat/go") as cid,
    ):
        await ann.send_json({"text": "hello"})
        assert await ann.receive_json() == {"from": "ann", "text": "hello"}
        assert await bob.receive_json() == {"from": "ann", "text": "hello"}
        await cid.send_json({"text": "alone"})
        assert await cid.receive_json() == {"from": "somebody", "text": "alone"}


async def test_the_messages_are_typed_echoed_and_summed(run_block: Any) -> None:
    app = run_block("messages")["app"]
    async with serving(app, port=0) as server:
        async with connected(server, "/game/7") as ann, connected(server, "/game/7") as bob:
            await ann.send_json({"type": "move", "x": 1, "y": 2})
            assert (await bob.receive_json())["at"] == [1, 2]
            await ann.send_json({"type": "say", "text": "hi"})
            assert (await ann.receive_json())["says"] == "hi"
            await bob.send_json({"type": "move", "x": "left"})
            assert await bob.closed() == (
                1007,
                "invalid message: /game/<int:table> expects Say | Move",
            )
        async with connected(server, "/echo") as client:
            await client.send("hello")
            assert await client.receive() == "hello"
        async with connected(server, "/sum") as client:
            await client.send("2")
            await client.send("3")
            assert [await client.receive(), await client.receive()] == ["2", "5"]
        status, _, body = await http(server, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (status, body) == (200, b"<h1>It works</h1>")


async def test_a_message_that_does_not_fit_is_reported_and_its_client_stays(run_block: Any) -> None:
    app = run_block("report")["app"]
    async with serving(app, port=0) as server, connected(server, "/chat/a") as client:
        await client.send_json({"txt": 1})
        assert "missing required field `text`" in (await client.receive_json())["error"]
        await client.send_json({"text": "better"})
        assert await client.receive_json() == {"text": "better"}


async def test_private_rooms_are_entered_by_members_only(
    run_block: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    app = run_block("private")["app"]
    async with serving(app, port=0) as server:
        with pytest.raises(Refusal) as refused:
            async with connected(server, "/notices"):
                pass
        assert (refused.value.status, refused.value.body) == (403, b"members only")
        async with connected(server, "/notices", [("Cookie", "token=s3cret")]) as ann:
            await ann.send("to myself")
            assert await ann.receive() == "to myself"
            await ann.close()
            await ann.ended()
    assert "left: 1000" in capsys.readouterr().out


async def test_the_app_can_be_embedded(run_block: Any) -> None:
    await run_block("embedding")["main"]()


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_the_app_can_be_served_in_a_nursery(
    run_block: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # It is about trio alone. Its nursery ends by its own cancellation.
    with anyio.fail_after(10):
        await run_block("trio")["main"]()
    assert "127.0.0.1" in capsys.readouterr().out


def test_the_table_of_limits_names_every_limit_and_its_default() -> None:
    table = README.partition("<!-- limits -->")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]+) \|", table, re.MULTILINE)
    units = {"KiB": 1024, "MiB": 1024**2, "s": 1}
    defaults = Limits()
    for name, text in rows:
        value = getattr(defaults, name)
        if value is None:
            assert text.startswith(("off", "20,000"))
        else:
            number, _, unit = text.replace(",", "").partition(" ")
            assert value == int(number) * units.get(unit, 1), name
    assert [name for name, _ in rows] and {name for name, _ in rows} == set(
        Limits.__dataclass_fields__
    )


def test_the_first_command_runs_an_example_that_exists() -> None:
    command = re.search(r"<!-- setup: chat -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    assert command is not None
    assert (Path(__file__).parents[1] / command[1].split()[-1]).is_file()


def test_the_examples_it_names_are_those_there_are() -> None:
    named = set(re.findall(r"`(\w+\.py)`", README.partition("## Examples")[2]))
    there = {path.name for path in (Path(__file__).parents[1] / "examples").glob("*.py")}
    assert named == there


def test_the_picture_names_files_that_exist() -> None:
    package = Path(roomsock.__file__).parent
    for name in ("transport", "sender", "driver", "server", "dispatch", "routing", "messages"):
        assert (package / f"{name}.py").is_file()
    assert sys.version_info >= (3, 10)
