"""Every example is served and talked to; the pages are looked at in ``test_browser.py``."""

from __future__ import annotations

import importlib.util
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest
import trustme

from roomsock import serving

from .client import Refusal, connected, http

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example() -> Any:
    """Import an example afresh: an app is served by one test only."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[spec.name]
        return module

    return load


Load = Callable[[str], ModuleType]


def test_every_example_is_tested_and_starts_by_saying_what_to_run() -> None:
    tests = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}")' in tests
        text = path.read_text()
        assert text.startswith("#")
        assert f"examples/{path.name}" in text.partition("\n\n")[0]
        assert len(text.splitlines()) <= 72


async def test_pages_are_served(example: Load) -> None:
    for path in EXAMPLES.glob("*.html"):
        async with serving(example(path.stem).app, port=0) as server:
            status, headers, body = await http(server, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status == 200
        assert headers["content-type"] == "text/html; charset=utf-8"
        assert body == path.read_bytes()


async def test_echo_sends_back_what_it_gets(example: Load) -> None:
    async with (
        serving(example("echo").app, port=0) as server,
        connected(server, "/echo") as client,
    ):
        await client.send("hello")
        assert await client.receive() == "hello"


async def test_chat_tells_who_is_here_and_who_left(example: Load) -> None:
    async with serving(example("chat").app, port=0) as server:
        with pytest.raises(Refusal) as refused:
            async with connected(server, "/chat/lobby?name=%20"):
                pass
        assert refused.value.status == 400
        async with connected(server, "/chat/lobby?name=ann") as ann:
            assert (await ann.receive_json())["type"] == "welcome"
            assert names(await ann.receive_json(), "joined") == ["ann"]
            async with connected(server, "/chat/lobby?name=bob") as bob:
                assert names(await ann.receive_json(), "joined") == ["ann", "bob"]
                await bob.send_json({"type": "say", "text": "hello"})
                said = await ann.receive_json()
                assert (said["type"], said["name"], said["text"]) == ("said", "bob", "hello")
                await ann.send_json({"type": "typing"})
                await bob.close()
                await bob.ended()
            assert names(await ann.receive_json(), "left") == ["ann"]


def names(message: Any, kind: str) -> list[str]:
    assert message["type"] == kind
    return [member["name"] for member in message["members"]]


async def test_typed_messages_answers_nonsense_and_goes_on(example: Load) -> None:
    async with (
        serving(example("typed_messages").app, port=0) as server,
        connected(server, "/lamp") as client,
    ):
        assert (await client.receive_json())["lamp"]["percent"] == 80
        await client.send_json({"type": "dim", "percent": 1})
        assert "$.percent" in (await client.receive_json())["error"]
        await client.send_json({"type": "dim", "percent": 50})
        assert (await client.receive_json())["lamp"]["percent"] == 50


async def test_ticker_publishes_from_a_background_task(example: Load) -> None:
    module = example("ticker")
    async with (
        serving(module.app, port=0) as server,
        connected(server, "/ticker") as client,
        anyio.create_task_group() as tg,
    ):
        assert (await client.receive_json())["past"] == [100.0]
        tg.start_soon(module.walk)
        assert (await client.receive_json())["watchers"] == 1
        tg.cancel_scope.cancel()


async def test_serve_mode_plays_until_the_number_is_found(example: Load) -> None:
    async with (
        serving(example("serve_mode").app, port=0) as server,
        connected(server, "/guess") as client,
    ):
        assert "thinking" in (await client.receive_json())["say"]
        await client.send("101")
        assert "does not count" in (await client.receive_json())["say"]
        low, high = 1, 100
        while True:
            await client.send_json({"number": (low + high) // 2})
            answer = await client.receive_json()
            if "won" in answer:
                break
            if answer["say"] == "Higher.":
                low = (low + high) // 2 + 1
            else:
                high = (low + high) // 2 - 1


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_embed_in_trio_tells_the_time_to_who_listens(example: Load) -> None:
    # It is about trio alone.
    module = example("embed_in_trio")
    async with (
        serving(module.app, port=0) as server,
        connected(server, "/clock") as client,
        anyio.create_task_group() as tg,
    ):
        tg.start_soon(module.clock)
        assert "1 watching" in str(await client.receive())
        tg.cancel_scope.cancel()


async def test_from_a_thread_publishes_lines_in_order(example: Load) -> None:
    module = example("from_a_thread")
    async with (
        serving(module.app, port=0) as server,
        connected(server, "/lines") as client,
    ):
        await anyio.to_thread.run_sync(module.publish, ["one", "two"])
        assert [await client.receive(), await client.receive()] == ["one", "two"]


async def test_tls_serves_the_page_and_the_socket(example: Load, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "all.pem")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    files = (tmp_path / "all.pem", tmp_path / "all.pem")
    async with (
        serving(example("tls").app, port=0, tls=files) as server,
        connected(server, "/echo", tls=trusting) as client,
    ):
        await client.send("secret")
        assert await client.receive() == "secret"
