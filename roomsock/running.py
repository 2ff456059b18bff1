"""`run`: the blocking door, for programs that are nothing but a roomsock server.

Starts an event loop, configures logging if nobody did, and turns signals into a stop in order.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import FrameType
from typing import Any, Literal

import anyio
from anyio.lowlevel import current_token

from .app import App
from .errors import CloseCode, SetupError
from .listening import TLS, Sockets, shown
from .server import Server, serving

logger = logging.getLogger("roomsock")

#: Seconds beyond `Limits.shutdown` after which a process whose handlers do not stop is ended.
HARD_STOP = 3.0

#: Seconds that writing to the log may take then: it may wait for what holds the process.
LAST_WORDS = 1.0


def run(
    app: App,
    host: str | Sequence[str] | None = "127.0.0.1",
    port: int = 8000,
    *,
    unix: str | os.PathLike[str] | None = None,
    sock: Sockets | None = None,
    tls: TLS | None = None,
    trusted_proxies: Iterable[str] = (),
    forwarded_header: str = "x-forwarded-for",
    backend: Literal["asyncio", "trio"] = "asyncio",
    uvloop: bool | None = None,
    drain_spread: float = 0.0,
) -> None:
    """Serve an app until SIGINT or SIGTERM; then close every client with 1012 and return.

    Logs to standard error unless logging is configured. A second signal ends the process at once;
    a handler that does not stop within `Limits.shutdown` is named and the exit code is 1.

    Args:
        app: What to serve.
        host, port, unix, sock, tls, trusted_proxies, forwarded_header, drain_spread: As for
            `serve`.
        backend: The event loop: ``"asyncio"`` or ``"trio"`` (to be installed).
        uvloop: Whether asyncio runs on uvloop; None for when it is installed.

    Raises:
        SetupError: The app or these arguments cannot be served with.
        OSError: An address cannot be listened on, or a file cannot be read.
    """
    if _in_event_loop():
        instead = "inside of one use `async with serving(app)`, or `await serve(app)`"
        raise SetupError(f"run() starts an event loop of its own; {instead}")
    if backend not in ("asyncio", "trio"):
        raise SetupError(f'backend is "asyncio" or "trio", not {backend!r}')
    if backend == "trio" and find_spec("trio") is None:
        raise SetupError('backend="trio" needs trio: pip install roomsock[trio]')
    if uvloop is None:
        uvloop = backend == "asyncio" and find_spec("uvloop") is not None
    elif uvloop and (backend == "trio" or find_spec("uvloop") is None):
        raise SetupError("uvloop runs asyncio and must be installed: pip install roomsock[uvloop]")
    if not logger.hasHandlers():
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
    scheme = "http" if tls is None else "https"
    serving_app = serving(
        app,
        host,
        port,
        unix=unix,
        sock=sock,
        tls=tls,
        trusted_proxies=trusted_proxies,
        forwarded_header=forwarded_header,
        drain_spread=drain_spread,
    )
    options: dict[str, Any] = {"use_uvloop": True} if uvloop else {}
    with _Signals() as signals:
        anyio.run(_main, serving_app, scheme, signals, backend=backend, backend_options=options)


async def _main(
    serving_app: AbstractAsyncContextManager[Server], scheme: str, signals: _Signals
) -> None:
    # The start line comes last: who waits for it may send a signal next.
    async with serving_app as server:
        with signals.handled(server):
            places = ", ".join(shown(address, f"{scheme}://") for address in server.addresses)
            logger.info("roomsock %s listens on %s (%s)", _version(), places, server.loop.name)
            await server.stopped()


def _in_event_loop() -> bool:
    try:
        current_token()
    except RuntimeError:
        return False
    return True


def _version() -> str:
    try:
        return version("roomsock")
    except PackageNotFoundError:  # run from a source tree
        return "(not installed)"


class _Signals:
    """Turns the first SIGINT or SIGTERM into a stop in order, and the second into an end.

    The context is around the event loop, which waits for threads before it ends.
    """

    def __init__(self) -> None:
        self._hard_stop: threading.Timer | None = None

    def __enter__(self) -> _Signals:
        return self

    def __exit__(self, *_: object) -> None:
        if self._hard_stop is not None:
            self._hard_stop.cancel()

    @contextmanager
    def handled(self, server: Server) -> Iterator[None]:
        """Handle signals; the event loop's own handlers are back behind it."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals; the caller handles them
            return

        def stop(number: int, _frame: FrameType | None) -> None:
            self._stop(server, number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                # None: it was not set by Python, and cannot be set back by it.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _stop(self, server: Server, number: int) -> None:
        if self._hard_stop is not None:
            os._exit(128 + number)
        seconds = server.drain_spread + server.app.limits.shutdown + HARD_STOP
        self._hard_stop = threading.Timer(seconds, _end, (server,))
        self._hard_stop.daemon = True
        self._hard_stop.start()
        server.call_soon_threadsafe(server.shutdown, CloseCode.SERVICE_RESTART)


def _end(server: Server) -> None:
    """The event loop is held by something that does not stop, perhaps without an await."""
    last = threading.Timer(LAST_WORDS, os._exit, (1,))
    last.daemon = True
    last.start()
    try:
        for name in server.stuck() or ["a thread"]:
            logger.critical("ended although this does not stop: %s", name)
        logging.shutdown()  # flushes
    finally:
        os._exit(1)
