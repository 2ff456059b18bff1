"""The app: decorators over plain ``add_*`` methods, the rooms, and nothing that does I/O.

What is wrong with a registration is a `SetupError` there and then, naming function, file and line.
The driver (`server.py`) knows the app; the app never knows the driver.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from .dispatch import MODES, Dispatcher, Endpoint, InvalidPolicy
from .errors import SetupError
from .limits import Limits
from .messages import JsonDecoder, message_type_of, takes, type_name
from .protocol.deflate import Compression
from .protocol.outbox import SlowConsumers
from .rooms import Everyone, Queued, Registry, Room
from .routing import Pattern, Router
from .signatures import Handler, Role, inspect_handler, location_of

logger = logging.getLogger("roomsock")

_INCLUDED = "it was included in another app"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class _Registration:
    """One decorated function, kept as it was written so that `App.include` can repeat it."""

    role: Role
    path: str
    function: Callable[..., Any]
    handler: Handler
    invalid: InvalidPolicy = "close"
    cancel_on_disconnect: bool = False
    #: What messages are decoded to, or which kinds are taken; None until its names are defined.
    wanted: Any = None
    #: The locals of the caller, while they are needed to find that out.
    local_names: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self) -> NameError | None:
        """Evaluate the annotation of the message; returns what it names and is not defined yet.

        Raises:
            SetupError: The annotation cannot be what messages are decoded to.
        """
        handler = self.handler
        # Neither the caller's frame nor what it held stays alive longer than it is needed.
        local_names, self.local_names = dict(self.local_names), {}
        if self.wanted is not None or self.role not in (Role.ON_JSON, Role.ON_MESSAGE):
            return None
        resolve = message_type_of if self.role is Role.ON_JSON else takes
        try:
            wanted = resolve(handler.message_annotation, handler.function, local_names)
            if self.role is Role.ON_JSON:
                JsonDecoder(wanted)
        except NameError as error:
            self.local_names = local_names
            return error.with_traceback(None)
        except Exception as error:
            raise SetupError(f"{handler.location}: {error}") from error
        self.wanted = wanted
        return None


class App:
    """A set of decorated functions and the rooms they share.

    Args:
        limits: What a client may cost; see `Limits`.
        origins: Which pages may connect: None for those of the same host, a list such as
            ``["https://example.com"]``, or ``"*"`` for all. Requests without an Origin header
            (programs, not pages) are always accepted.
        keepalive: ``(interval, timeout)`` in seconds: a client silent for the interval is pinged,
            and closed when nothing arrives within the timeout. None sends no pings.
        slow_consumers: What happens when a room message would pass a member's outbox limit:
            ``"close"`` it with 1013, ``"drop_newest"`` or ``"drop_oldest"`` room messages.
        compression: True, or a `Compression`, to compress messages for clients that offer
            permessage-deflate, as browsers do. A message to a room is compressed once for each
            window size its members ask for.

    Raises:
        SetupError: A setting that means nothing.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        origins: Sequence[str] | Literal["*"] | None = None,
        keepalive: tuple[float, float] | None = (20.0, 20.0),
        slow_consumers: SlowConsumers = "close",
        compression: bool | Compression = False,
    ) -> None:
        if isinstance(origins, str) and origins != "*":
            raise SetupError(f'origins is a list, "*" or None: origins=[{origins!r}]')
        for origin in origins if origins is not None and origins != "*" else ():
            # What a browser sends; a name alone, or one with a path, would match nothing ever.
            if origin != "null" and ("://" not in origin or origin.count("/") != 2):
                raise SetupError(f'an origin looks like "https://example.com", not {origin!r}')
        if slow_consumers not in get_args(SlowConsumers):
            raise SetupError(f"slow_consumers is one of {get_args(SlowConsumers)}")
        if keepalive is not None and not (
            isinstance(keepalive, Sequence) and len(keepalive) == 2 and min(keepalive) > 0
        ):
            raise SetupError("keepalive is (interval, timeout) in seconds, or None")
        if not isinstance(limits, (Limits, type(None))):
            raise SetupError(f"limits is roomsock.Limits(...), not {limits!r}")
        if not isinstance(compression, (Compression, bool)):
            raise SetupError(f"compression is a bool or roomsock.Compression(...): {compression!r}")
        settings = Compression() if compression is True else compression or None
        if settings is not None and settings.context_takeover and slow_consumers != "close":
            # What is compressed next would refer to what was dropped.
            raise SetupError("context takeover and dropping messages exclude each other")
        self.limits = limits or Limits()
        self.origins = origins
        self.keepalive = keepalive
        self.slow_consumers: SlowConsumers = slow_consumers
        self.compression = settings
        self._registry = Registry()
        if settings is not None:
            self._registry.compress_from = settings.threshold
        self._registrations: list[_Registration] = []
        self._setup_over: str | None = None

    # Rooms

    def room(self, name: str) -> Room:
        """The room of that name (a URL path, or a name given to `WebSocket.join`)."""
        return Room(self._registry, name)

    @property
    def rooms(self) -> tuple[Room, ...]:
        """The rooms that exist now, in the order they came into being: a snapshot."""
        return tuple(Room(self._registry, name) for name in self._registry.rooms)

    @property
    def all(self) -> Everyone:
        """Every open connection of the server."""
        return Everyone(self._registry)

    async def flushed(self) -> None:
        """Wait until the kernel has taken everything queued so far; a producer paces itself."""
        await self.all.flushed()

    def call_soon_threadsafe(self, function: Callable[..., object], *args: Any) -> None:
        """Have the event loop call ``function(*args)`` soon: the way in from other threads.

        Fire and forget, in the order of the calls, from any thread, the loop's own included. What
        the function raises is logged.

        Raises:
            RuntimeError: The app is not being served.
            TypeError: The function is a coroutine function.
        """
        self._registry.call_soon_threadsafe(function, *args)

    # Registration: decorators

    def serve(self, path: str, *, cancel_on_disconnect: bool = False) -> Callable[[F], F]:
        """Decorate ``(ws, **path values)``: the function owns the loop and the connection."""
        return self._decorator(Role.SERVE, path, cancel_on_disconnect=cancel_on_disconnect)

    def on_json(
        self, path: str, *, invalid: InvalidPolicy = "close", cancel_on_disconnect: bool = False
    ) -> Callable[[F], F]:
        """Decorate ``(ws, message, **path values)``: called with each message, decoded from JSON
        to the type that the message parameter is annotated with.

        Args:
            path: The path pattern.
            invalid: ``"close"`` the connection of who sends a message that does not fit (1007),
                or ``"report"`` it to the error handler and go on.
            cancel_on_disconnect: Cancel the function as soon as its client is gone.
        """
        return self._decorator(
            Role.ON_JSON, path, invalid=invalid, cancel_on_disconnect=cancel_on_disconnect
        )

    def on_message(self, path: str, *, cancel_on_disconnect: bool = False) -> Callable[[F], F]:
        """Decorate ``(ws, text, **path values)``: called with each text message. Annotate it with
        ``bytes`` or ``str | bytes`` to take binary ones."""
        return self._decorator(Role.ON_MESSAGE, path, cancel_on_disconnect=cancel_on_disconnect)

    def on_connect(self, path: str) -> Callable[[F], F]:
        """Decorate ``(ws, **path values)``: called before the upgrade, may raise `Reject`."""
        return self._decorator(Role.ON_CONNECT, path)

    def on_close(self, path: str) -> Callable[[F], F]:
        """Decorate ``(ws, reason, **path values)``: called once when a connection has left its
        rooms; ``reason`` is the `ConnectionClosed` that ended it."""
        return self._decorator(Role.ON_CLOSE, path)

    def on_error(self, path: str) -> Callable[[F], F]:
        """Decorate ``(ws, error, **path values)``: called once when a connection failed."""
        return self._decorator(Role.ON_ERROR, path)

    def get(self, path: str) -> Callable[[F], F]:
        """Decorate ``(request, **path values)``: answers GET and HEAD with what it returns
        (str as HTML, bytes, dict as JSON, Path as a file, or `Response`)."""
        return self._decorator(Role.GET, path)

    def post(self, path: str) -> Callable[[F], F]:
        """Decorate ``(request, **path values)``: answers POST; ``request.body`` is bytes."""
        return self._decorator(Role.POST, path)

    def _decorator(self, role: Role, path: str, **options: Any) -> Callable[[F], F]:
        if callable(path):  # @app.get without its path: the handler would be lost silently
            raise SetupError(f'{location_of(path)}: write @app.{role.value}("/path")')

        def decorate(function: F) -> F:
            self._add(role, path, function, sys._getframe(1).f_locals, **options)
            return function

        return decorate

    # Registration: plain methods

    def add_serve(
        self, path: str, function: Callable[..., Any], *, cancel_on_disconnect: bool = False
    ) -> None:
        """What the decorator `serve` does."""
        self._add(Role.SERVE, path, function, cancel_on_disconnect=cancel_on_disconnect)

    def add_on_json(
        self,
        path: str,
        function: Callable[..., Any],
        *,
        invalid: InvalidPolicy = "close",
        cancel_on_disconnect: bool = False,
    ) -> None:
        """What the decorator `on_json` does."""
        self._add(
            Role.ON_JSON,
            path,
            function,
            sys._getframe(1).f_locals,
            invalid=invalid,
            cancel_on_disconnect=cancel_on_disconnect,
        )

    def add_on_message(
        self, path: str, function: Callable[..., Any], *, cancel_on_disconnect: bool = False
    ) -> None:
        """What the decorator `on_message` does."""
        frame = sys._getframe(1).f_locals
        self._add(Role.ON_MESSAGE, path, function, frame, cancel_on_disconnect=cancel_on_disconnect)

    def add_on_connect(self, path: str, function: Callable[..., Any]) -> None:
        """What the decorator `on_connect` does."""
        self._add(Role.ON_CONNECT, path, function)

    def add_on_close(self, path: str, function: Callable[..., Any]) -> None:
        """What the decorator `on_close` does."""
        self._add(Role.ON_CLOSE, path, function)

    def add_on_error(self, path: str, function: Callable[..., Any]) -> None:
        """What the decorator `on_error` does."""
        self._add(Role.ON_ERROR, path, function)

    def add_get(self, path: str, function: Callable[..., Any]) -> None:
        """What the decorator `get` does."""
        self._add(Role.GET, path, function)

    def add_post(self, path: str, function: Callable[..., Any]) -> None:
        """What the decorator `post` does."""
        self._add(Role.POST, path, function)

    def include(self, other: App, *, prefix: str = "") -> None:
        """Take over everything registered on another app, below a prefix.

        The other app is set up by then, and its rooms are this app's from now on; limits, origins,
        compression and the like are those of this app.

        Raises:
            SetupError: The prefix is no path, the other app was included before, or something of
                it clashes with what is registered here.
        """
        self._check_setup("include()")
        if other is self:
            raise SetupError("an app cannot include itself")
        if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
            raise SetupError(f"a prefix starts with / and does not end with it, unlike {prefix!r}")
        other._check_setup("being included")
        for each in other._registrations:
            self._add(
                each.role,
                prefix + each.path,
                each.function,
                each.local_names,
                invalid=each.invalid,
                cancel_on_disconnect=each.cancel_on_disconnect,
                wanted=each.wanted,
            )
        other._setup_over = _INCLUDED
        other._registry.become(self._registry)

    def _check_setup(self, what: str) -> None:
        if self._setup_over is not None:
            raise SetupError(f"{what} comes too late for this app: {self._setup_over}")

    def _add(
        self,
        role: Role,
        path: str,
        function: Callable[..., Any],
        local_names: Mapping[str, Any] | None = None,
        *,
        invalid: InvalidPolicy = "close",
        cancel_on_disconnect: bool = False,
        wanted: Any = None,
    ) -> None:
        where = f"{location_of(function)}, " if callable(function) else ""
        self._check_setup(f"{where}{role.value}({path!r})")
        try:
            pattern = Pattern(path)
        except ValueError as error:
            where = f"{location_of(function)}, " if callable(function) else ""
            raise SetupError(f"{where}{role.value}({path!r}): {error}") from None
        handler = inspect_handler(function, role, pattern)
        if invalid not in get_args(InvalidPolicy):
            raise SetupError(f'{handler.location}: invalid is "close" or "report"')
        options = (invalid, cancel_on_disconnect, wanted, local_names or {})
        registration = _Registration(role, path, function, handler, *options)
        self._check_clashes(registration)
        registration.resolve()
        self._registrations.append(registration)

    def _check_clashes(self, new: _Registration) -> None:
        for old in self._registrations:
            there, here = old.handler, new.handler
            if there.pattern.shape != here.pattern.shape:
                continue
            if there.pattern.text != here.pattern.text:
                raise SetupError(
                    f"{here.location}: {new.path!r} matches the same paths as {old.path!r} of "
                    f"{there.location}: write both alike"
                )
            if there.role is here.role:
                raise SetupError(
                    f"{here.location}: {new.role.value}({new.path!r}) is taken by {there.location}"
                )
            for one, two in ((there, here), (here, there)):
                if one.role is Role.ON_ERROR and two.wants_error:
                    raise SetupError(
                        f"{here.location}: {new.path!r} has on_error ({one.location}) and a "
                        f"handler that declares `error` ({two.location}): write one of them"
                    )

    # Serving

    def _begin_serving(
        self, thread: int, queued: type[Queued], call_soon_threadsafe: Callable[..., None]
    ) -> Dispatcher:
        """Close the set-up and resolve what is declared; for the driver.

        Raises:
            SetupError: The app is being served already, or its set-up is incomplete.
        """
        registry = self._registry
        if self._setup_over == _INCLUDED:
            raise SetupError(f"this app cannot be served by itself: {_INCLUDED}")
        if registry.thread is not None:
            raise SetupError("this app is being served already")
        router: Router[Endpoint] = Router()
        for endpoint, pattern in self._endpoints():
            router.add(pattern, endpoint)
        self._setup_over = "serving has started"
        registry.thread = thread
        registry.queued = queued
        registry.call_soon_threadsafe = call_soon_threadsafe
        return Dispatcher(router, registry)

    def _end_serving(self) -> None:
        """The driver has ended; the app may be served again."""
        self._registry.reset()

    def _endpoints(self) -> list[tuple[Endpoint, Pattern]]:
        handlers: dict[str, dict[Role, Handler]] = {}
        for each in self._registrations:
            handlers.setdefault(each.path, {})[each.role] = each.handler
        endpoints = {path: Endpoint(path, declared) for path, declared in handlers.items()}
        for each in self._registrations:
            self._finish(each, endpoints[each.path])
        patterns = {each.path: each.handler.pattern for each in reversed(self._registrations)}
        return [(endpoint, patterns[path]) for path, endpoint in endpoints.items()]

    def _finish(self, each: _Registration, endpoint: Endpoint) -> None:
        handler, mode = each.handler, endpoint.mode
        if (missing := each.resolve()) is not None:
            raise SetupError(
                f"{handler.location}: the annotation of its message, "
                f"{handler.message_annotation!r}: {missing}"
            )
        if each.role in MODES and mode is not None and handler is not mode:
            logger.warning(
                "%s: %s is not used, %s comes first (serve > on_json > on_message)",
                each.path,
                handler.location,
                mode.location,
            )
        if handler is mode:
            endpoint.cancel_on_disconnect = each.cancel_on_disconnect
            endpoint.invalid = each.invalid
            if each.role is Role.ON_JSON:
                kind = "JSON" if each.wanted is Any else type_name(each.wanted)
                where = f"{each.path} expects {kind}"
                endpoint.decoder = JsonDecoder(each.wanted, where)
            elif each.role is Role.ON_MESSAGE:
                endpoint.takes = each.wanted
            told = handler.wants_error or Role.ON_ERROR in endpoint.handlers
            if each.invalid == "report" and not told:
                raise SetupError(
                    f'{handler.location}: invalid="report" needs somebody to report to: declare '
                    f"`error`, or on_error({each.path!r})"
                )
        if mode is None and each.role not in (Role.GET, Role.POST):
            raise SetupError(
                f"{handler.location}: {each.path!r} has {each.role.value} but no serve, on_json or "
                "on_message"
            )
