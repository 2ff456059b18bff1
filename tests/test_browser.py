"""The examples' pages, in a real browser: Debian's chromium, headless, driven by playwright.

Without chromium these tests are skipped, unless ROOMSOCK_REQUIRE_BROWSER says that they must run.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EXAMPLES = Path(__file__).parents[1] / "examples"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
REQUIRED = bool(os.environ.get("ROOMSOCK_REQUIRE_BROWSER"))

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="chromium is not installed"),
    # playwright's own event loop is closed late, when the garbage collector finds it
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# Without these a headless browser looks things up that have nothing to do with the page.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "ROOMSOCK_REQUIRE_BROWSER is set, and there is no chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@contextmanager
def running(name: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run an example as a user would; yields its process and its address."""
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"listens on (http://\S+)", line)
        assert found, line + process.stderr.read()
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@contextmanager
def window(browser: Browser, url: str) -> Iterator[Page]:
    """A window of its own, with no cookie or storage of another; errors on the page fail."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(10_000)
    errors: list[Any] = []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(url)
    yield page
    context.close()
    assert errors == []


def say(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.click("#send")


def said(page: Page, text: str) -> None:
    page.wait_for_selector(f"#messages .message .text:text-is('{text}')")


def live(page: Page) -> None:
    page.wait_for_selector("#status[data-state=live]")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_two_windows_talk_in_one_room_and_not_in_the_other(browser: Browser, backend: str) -> None:
    with (
        running("chat.py", "--port", "0", "--backend", backend) as (process, url),
        window(browser, f"{url}/?name=ann&room=lobby") as ann,
        window(browser, f"{url}/?name=bob&room=lobby") as bob,
    ):
        live(ann)
        live(bob)
        ann.wait_for_function("document.querySelectorAll('#members li').length == 2")
        say(ann, "hello bob")
        said(bob, "hello bob")
        said(ann, "hello bob")

        bob.click("#room-list [data-room=python]")
        ann.wait_for_function("document.querySelectorAll('#members li').length == 1")
        live(bob)
        say(bob, "only in python")
        said(bob, "only in python")
        say(ann, "only in the lobby")
        said(ann, "only in the lobby")
        # Frames to one client are in order: what comes back to ann last would be behind it.
        assert "only in python" not in ann.inner_text("#messages")
        assert "only in the lobby" not in bob.inner_text("#messages")

        say(ann, "<img src=x onerror=alert(1)>")
        ann.wait_for_function(
            "document.querySelector('#messages').textContent.includes('<img src=x')"
        )
        assert ann.query_selector("#messages img") is None

        process.send_signal(signal.SIGTERM)
        ann.wait_for_selector("#status[data-state=reconnecting]")
        assert process.wait(10) == 0


def test_the_page_asks_for_a_name_and_finds_its_way_back(browser: Browser) -> None:
    with running("chat.py", "--port", "0") as (first, url):
        port = url.rpartition(":")[2]
        with window(browser, url) as page:
            page.fill("#name", "ann")
            page.click("#join")
            live(page)
            first.send_signal(signal.SIGTERM)
            assert first.wait(10) == 0
            page.wait_for_selector("#status[data-state=reconnecting]")
            with running("chat.py", "--port", port):
                live(page)
                say(page, "back again")
                said(page, "back again")
