"""From a connection's messages to the functions that handle them.

Holds what is resolved when serving starts (one `Endpoint` per path pattern) and runs handlers in
the connection's own task. Knows no event loop: it waits through the connection's `Link`.
"""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import CoroutineType
from typing import Any, Literal

from .errors import CloseCode, ConnectionClosed, InvalidMessage, Reject
from .http import Request, Response
from .messages import JsonDecoder, encode_json
from .rooms import Pace, Queued, Registry
from .routing import Router
from .signatures import Handler, Role
from .websocket import Link, WebSocket

logger = logging.getLogger("roomsock")

#: The three ways to take a client's messages: the first that a path declares is used.
MODES = (Role.SERVE, Role.ON_JSON, Role.ON_MESSAGE)

InvalidPolicy = Literal["close", "report"]


@dataclass(slots=True)
class Endpoint:
    """What is declared for one path pattern, and what follows from it when serving starts."""

    path: str
    handlers: dict[Role, Handler] = field(default_factory=dict)
    invalid: InvalidPolicy = "close"
    cancel_on_disconnect: bool = False
    decoder: JsonDecoder | None = None
    takes: frozenset[type] = frozenset((str,))
    returned: set[Role] = field(default_factory=set)
    #: The handler that takes the messages.
    mode: Handler | None = field(init=False)

    def __post_init__(self) -> None:
        modes = [self.handlers[role] for role in MODES if role in self.handlers]
        self.mode = modes[0] if modes else None

    async def call(
        self, handler: Handler, params: Mapping[str, Any], *args: Any, **named: Any
    ) -> Any:
        """Call a handler with its path values, and wait for what it leaves to be awaited."""
        result = handler.function(*args, **named, **handler.arguments(params))
        return await result if _is_awaitable(result) else result

    async def run(
        self, handler: Handler, params: Mapping[str, Any], *args: Any, **named: Any
    ) -> None:
        """`call` a handler whose return value goes nowhere."""
        # Not by `call`: who serves an idle connection waits in here, and would in both (0.3 KiB).
        result = handler.function(*args, **named, **handler.arguments(params))
        if _is_awaitable(result):
            result = await result
        if result is not None:
            self.report_return(handler, result)

    def report_return(self, handler: Handler, result: Any) -> None:
        """Say once that a return value is not used. (What a send returned is no such value.)"""
        if handler.role not in self.returned and not isinstance(result, (Pace, Queued)):
            self.returned.add(handler.role)
            instead = "it is not sent, use ws.send_json(...)"
            if handler.role is Role.ON_CONNECT:
                instead = "it decides nothing, raise roomsock.Reject to refuse a client"
            logger.warning("%s returned %s: %s", handler.location, type(result).__name__, instead)


class Dispatcher:
    """Finds the endpoint of a path and runs its handlers, one connection at a time."""

    def __init__(self, router: Router[Endpoint], registry: Registry) -> None:
        self._router = router
        self.registry = registry

    def find(self, path: str) -> tuple[Endpoint, dict[str, Any]] | None:
        """The endpoint whose pattern matches the path best, and the path values."""
        return self._router.match(path)

    # HTTP

    async def respond(self, request: Request) -> Response:
        """Answer a plain HTTP request of any method (HEAD as GET); what a handler raises becomes
        a status."""
        found = self._router.match(request.path)
        if found is None:
            return _plain(404, "no such path")
        endpoint, params = found
        role = _ROLES.get(request.method)
        handler = endpoint.handlers.get(role) if role is not None else None
        if handler is None:
            return self._refuse_method(endpoint)
        try:
            result = await endpoint.call(handler, params, request)
            return Response.of(result, encode_json)
        except Exception as error:
            return _refusal(error, handler.location, request.path)

    @staticmethod
    def _refuse_method(endpoint: Endpoint) -> Response:
        allow = [method for method, role in _ROLES.items() if role in endpoint.handlers]
        if allow:
            return _plain(405, "method not allowed", ("allow", ", ".join(allow)))
        # RFC 9110, section 15.5.22: 426 names the protocol to upgrade to.
        return _plain(
            426,
            "this path is a WebSocket",
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
        )

    # WebSocket

    async def connect(self, ws: WebSocket, link: Link, endpoint: Endpoint) -> Response | None:
        """Ask ``on_connect``, then accept.

        Returns:
            None when the connection is open (or already ended by a handler's failure after its
            acceptance), else the response that refuses it.
        """
        handler = endpoint.handlers.get(_ON_CONNECT)
        try:
            if handler is not None:
                await endpoint.run(handler, ws.params, ws)
            if not link.accepted:
                ws.accept()
        except Exception as error:
            where = handler.location if handler is not None else "accepting"
            if not link.accepted:
                return _refusal(error, where, ws.path)
            self.failed(ws, link, where, error)
        return None

    def converse(self, ws: WebSocket, link: Link, endpoint: Endpoint) -> Coroutine[Any, Any, None]:
        """Run the path's mode until the connection ends; what it raises is for `failed`."""
        handler = endpoint.mode
        assert handler is not None
        run = self._serve if handler.role is _SERVE else self._take_messages
        return run(ws, link, endpoint, handler)

    async def _serve(self, ws: WebSocket, link: Link, endpoint: Endpoint, handler: Handler) -> None:
        await endpoint.run(handler, ws.params, ws)
        link.close(CloseCode.NORMAL, "")

    async def _take_messages(
        self, ws: WebSocket, link: Link, endpoint: Endpoint, handler: Handler
    ) -> None:
        function = handler.function
        arguments = handler.arguments(ws.params)
        if handler.wants_error:
            arguments = {**arguments, "error": None}
        if arguments:
            function = partial(function, **arguments)
        decode = endpoint.decoder.decode if endpoint.decoder is not None else None
        takes = endpoint.takes
        incoming = link.incoming
        receive = incoming.receive
        while True:
            message = due = None  # who waits must not keep the last one
            message = await receive()
            due = incoming.turn(message) if incoming.inbox else [message]
            for message in due:
                if decode is not None:
                    if type(due) is list:
                        due.clear()  # nor the text beside what it says
                    try:
                        message = decode(message)
                    except InvalidMessage as error:
                        if endpoint.invalid == "close":
                            link.fail(error.code, error.reason, error)
                        else:
                            await self.tell_error(ws, endpoint, error)
                        continue
                elif type(message) not in takes:
                    expected = " or ".join(sorted(_KINDS[kind] for kind in takes))
                    link.fail(CloseCode.UNSUPPORTED_DATA, f"{expected} expected", None)
                    continue
                # `Endpoint.run`, without its two coroutines for every message; the first comparison
                # spares what an `async def` returns the second, which takes 0.1 us.
                try:
                    result = function(ws, message)
                    if result is not None:
                        if type(result) is CoroutineType or _is_awaitable(result):
                            result = await result
                        if result is not None:
                            endpoint.report_return(handler, result)
                except Exception as error:
                    # Who cannot reply any more must still see the messages that came before the
                    # end: receiving raises behind the last of them.
                    if not _is_own_end(error, ws):
                        raise
                    logger.debug("%a: %s ended with %r", ws.path, handler.location, error)

    def failed(self, ws: WebSocket, link: Link, where: str, error: Exception) -> None:
        """A handler raised: that costs its own connection, unless it only met that one's end.

        An InvalidMessage that `receive_json` raised and nobody caught is the client's failure.
        """
        if _is_own_end(error, ws):
            logger.debug("%a: %s ended with %r", ws.path, where, error)
            link.crash(error)  # nothing that came before the end is handled any more
            return
        invalid = _only(error)
        if isinstance(invalid, InvalidMessage):
            link.fail(invalid.code, invalid.reason, invalid)
            return
        logger.error("%s raised; its connection is closed with 1011", where, exc_info=error)
        link.crash(error)

    async def tell_error(self, ws: WebSocket, endpoint: Endpoint, error: Exception) -> None:
        """Call the path's error handler: the mode's with ``error``, or ``on_error``."""
        mode = endpoint.mode
        handler = endpoint.handlers.get(Role.ON_ERROR)
        if mode is not None and mode.wants_error:
            await endpoint.run(mode, ws.params, ws, None, error=error)
        elif handler is not None:
            await endpoint.run(handler, ws.params, ws, error)

    async def tell_end(self, ws: WebSocket, endpoint: Endpoint, error: Exception) -> None:
        """`tell_error`, once the connection has ended: what the handler raises is only logged."""
        try:
            await self.tell_error(ws, endpoint, error)
        except Exception as raised:
            _log_raised("the error handler", endpoint, ws, raised)

    async def tell_close(self, ws: WebSocket, endpoint: Endpoint, reason: ConnectionClosed) -> None:
        """Call ``on_close``; what it raises is only logged."""
        handler = endpoint.handlers.get(Role.ON_CLOSE)
        if handler is None:
            return
        try:
            await endpoint.run(handler, ws.params, ws, reason)
        except Exception as raised:
            _log_raised("on_close", endpoint, ws, raised)


# A look at a member of an enumeration takes as long as 25 bytecodes (Python 3.11).
_SERVE, _ON_CONNECT = Role.SERVE, Role.ON_CONNECT

_ROLES = {"GET": Role.GET, "HEAD": Role.GET, "POST": Role.POST}
_KINDS: dict[type, str] = {str: "text", bytes: "binary"}


def _is_awaitable(result: Any) -> bool:
    """Whether a handler left something to wait for.

    What it returned decides and not how it was defined: a lambda may pass on a coroutine, and the
    decorator of an ``async def`` may decline without one. The count of a send need not be awaited:
    that would end the tick after every message.
    """
    return hasattr(result, "__await__") and not isinstance(result, Queued)


def _log_raised(what: str, endpoint: Endpoint, ws: WebSocket, raised: Exception) -> None:
    if _is_own_end(raised, ws):
        logger.debug("%s: %s ended with %r", endpoint.path, what, raised)
    else:
        logger.error("%s of %s raised", what, endpoint.path, exc_info=raised)


def _is_own_end(error: BaseException, ws: WebSocket) -> bool:
    """Whether this is the connection's own `ConnectionClosed`, or a group of nothing else."""
    if isinstance(error, ConnectionClosed):  # mostly: every connection ends in here
        return error.connection == ws.id
    leaves = _leaves(error)
    return leaves != [error] and all(_is_own_end(leaf, ws) for leaf in leaves)


def _leaves(error: BaseException) -> list[BaseException]:
    """What an exception group holds, at any depth; of another exception itself."""
    inner = getattr(error, "exceptions", None)  # Python 3.10 has no class to ask for
    if not isinstance(inner, tuple) or not inner:
        return [error]
    return [leaf for each in inner for leaf in _leaves(each)]


def _only(error: Exception) -> BaseException:
    """The one exception that a task group wrapped, or the exception itself."""
    leaves = _leaves(error)
    return leaves[0] if len(leaves) == 1 else error


def _refusal(error: Exception, where: str, path: str) -> Response:
    """What is answered when a handler raised and nothing was answered yet."""
    rejection = _only(error)
    if isinstance(rejection, Reject):
        return Response(rejection.body, rejection.status, rejection.headers)
    logger.error("%s raised; %a answered 500", where, path, exc_info=error)
    return _plain(500, "internal server error")


def _plain(status: int, text: str, *headers: tuple[str, str]) -> Response:
    return Response(text + "\n", status, headers)
