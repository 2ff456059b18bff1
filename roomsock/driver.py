"""One connection from accept to the closed socket: opens it, runs its handlers, ends it in time.

One task per connection does everything in turn; its `Receiver` and its `Sender` have others only
while a handler is busy, or the kernel's buffer is full. Time comes from the server's housekeeping.
What all this must do is the contract of behaviour in the README.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Iterable
from email.utils import formatdate
from math import inf
from typing import TYPE_CHECKING

import anyio

from .dispatch import Endpoint
from .errors import (
    CloseCode,
    ConnectionClosed,
    ConnectionClosedError,
    ConnectionClosedOK,
    MessageTooBig,
    Reject,
    SlowConsumer,
    header_pairs,
)
from .http import Address, Request, Response
from .protocol.connection import Connection
from .protocol.deflate import Deflater
from .protocol.events import Failed, PeerClosed
from .protocol.frames import encode_frame
from .protocol.handshake import (
    Handshake,
    PeerGone,
    Refused,
    RequestReceived,
    UpgradeRequested,
    allowed_origin,
)
from .receiver import READING, Receiver
from .rooms import NO_WAIT, Pace
from .sender import LET_OTHERS, TURN_MESSAGES, Sender
from .signatures import Role
from .transport import Transport
from .websocket import WebSocket

if TYPE_CHECKING:
    from .server import Server

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger = logging.getLogger("roomsock")
access = logging.getLogger("roomsock.access")

#: A close or a violation that came in while a handler is busy is answered after so many seconds;
#: until then it waits for the replies to what came before it.
ANSWER_AFTER = 0.25

#: What was not looked at for so many seconds is looked at anew.
UNWATCHED = 1.0

#: Close codes by which a client says that all is well. 1005 is what a browser's ``close()`` sends.
CLEAN_CODES = (CloseCode.NORMAL, CloseCode.GOING_AWAY, CloseCode.NO_STATUS)

NOT_IN_TIME = "not answered in time (Limits.open_timeout)\n"
TOOK_TOO_LONG = "%s of %s took too long (Limits.on_close): cancelled"


class Phase:
    """Where a connection stands. No enumeration: each look at a member of one takes as long as 25
    bytecodes (Python 3.11), and a connection takes 15."""

    #: TLS, request, ``on_connect``: the 101 is not queued.
    OPENING = 0
    #: The 101 is queued; messages flow.
    OPEN = 1
    #: It is decided how the connection ends; the close frame is queued where one is due.
    ENDING = 2
    #: The socket is closed.
    GONE = 3


class Driver:
    """Drives one connection; is the `Link` of its `WebSocket`."""

    __slots__ = (
        "_cancelled", "_checked_at", "_close_started", "_conn", "_drop_at", "_early", "_end",
        "_endpoint", "_finishing", "_grace_ends", "_handshake", "_progress_at", "_receiver",
        "_rooms", "_scheme", "_scope", "_server", "_taken", "_target", "_task_ended",
        "_tell", "_timed_out", "_transport", "_waiting", "_ws", "accepted", "busy",
        "cancelled", "client", "deadline", "latency", "phase", "recipient", "refusal", "task",
    )  # fmt: skip

    def __init__(
        self, server: Server, transport: Transport, client: Address | None, scheme: str
    ) -> None:
        self._server = server
        self._transport = transport
        self.client = client
        self._scheme = scheme
        self.refusal: Refused | None = None  # how it is answered, whatever it asks for
        self._target = ""
        self._ws: WebSocket | None = None
        self._endpoint: Endpoint | None = None
        self._handshake: Handshake | None = None
        self._conn: Connection | None = None
        self.task: object = None  # kept, or the event loop might forget it
        self._scope: anyio.CancelScope | None = None  # of what the app's functions do
        self.cancelled = False
        self.phase = Phase.OPENING
        #: Functions of the app may still be running.
        self.busy = True
        #: When housekeeping must call `on_deadline`.
        self.deadline = server.now + server.app.limits.open_timeout
        self._timed_out = False

        app = server.app
        self.recipient = Sender(self, transport, server.flusher, app.limits, app.slow_consumers)
        self._receiver: Receiver | None = None  # from the acceptance on
        self.latency: float | None = None
        self.accepted = False
        self._early: list[bytes] | None = None  # what `on_connect` sends before the 101
        # Whether what was sent gets on; looked at while it may not
        self._taken = 0  # bytes that our kernel took, after it had refused some
        self._waiting = 0  # bytes that it holds
        self._progress_at = inf
        self._checked_at = 0.0  # long ago

        # The end
        self._end: ConnectionClosed | None = None
        self._tell: Exception | None = None  # what the error handler is told of
        self._grace_ends = inf  # when the running handler is cancelled
        self._cancelled = False
        self._finishing = False
        self._rooms: tuple[str, ...] = ()  # left, but not let go of before on_close returned
        self._close_started = False
        self._task_ended = False
        self._drop_at = inf  # when the socket is closed, whoever still waits for it

    # The connection's task

    async def run(self) -> None:
        """Drive the connection to its end. Whatever happens, the socket is closed and no room
        keeps the connection."""
        # An idle connection waits in here. Each coroutine less on the way to its read saves it 0.2
        # to 0.3 KiB.
        try:
            try:
                try:
                    with self._server.new_scope() as self._scope:
                        if self.cancelled:
                            self._scope.cancel()
                        await self._open()
                        # `connect` may have ended it after the acceptance: then there is nobody to
                        # talk to. But what came in before the client closed is still handled.
                        receiver = self._receiver
                        if receiver is not None and (self._end is None or receiver.inbox):
                            assert self._ws is not None and self._endpoint is not None
                            await self._server.dispatcher.converse(self._ws, self, self._endpoint)
                except Exception as error:
                    if self._ws is None or not self.accepted:
                        raise
                    self._server.dispatcher.failed(self._ws, self, self.describe(), error)
                except anyio.get_cancelled_exc_class() as error:
                    if _is_cancelled():
                        raise
                    self._handler_raised(error)
                if self.accepted:
                    await self._finish()
                elif self._timed_out:
                    self._refuse_late()
                self.busy = False
                if self.cancelled:
                    self.abort()
                else:
                    await self.close_transport()
            finally:
                try:
                    if self.accepted and not self._finishing:
                        await self._finish()
                finally:
                    self._leave()
        except BaseException as error:
            self._server.loop.end(contain(error))

    def cancel(self) -> None:
        """The server waits no longer: cancel all that is done here but for ``on_close``."""
        self.cancelled = True
        if self._scope is not None and not self._scope.shield:  # that of ``on_close`` is shielded
            self._scope.cancel()
        if not self.busy:  # it is closing, and goes on when the socket is closed
            self.abort()

    async def _open(self) -> None:
        """Take the request; open the WebSocket or answer otherwise."""
        await self._transport.handshake()
        event = await self._receive_request()
        response: Response | None
        if isinstance(event, UpgradeRequested):
            response = await self._upgrade(event.request)
        elif isinstance(event, RequestReceived):
            self._target = event.request.target
            response = await self._server.dispatcher.respond(event.request)
        elif isinstance(event, Refused):
            self._refuse(event)
            return
        else:
            logger.debug("%s: closed before a request", self.client)
            return
        if response is not None:
            self._respond(response)

    async def _receive_request(self) -> UpgradeRequested | RequestReceived | Refused | PeerGone:
        app = self._server.app
        handshake = Handshake(
            app.limits, client=self.client, scheme=self._scheme, compression=app.compression
        )
        self._handshake = handshake
        event = None
        while event is None:
            data = await self._transport.receive()
            if self.is_gone():
                return PeerGone()
            if data is not None:
                event = handshake.receive_data(data)
        if isinstance(event, (UpgradeRequested, RequestReceived)):
            self._server.identify(self, event.request)
            if self.is_gone():
                return PeerGone()
        return event if self.refusal is None or isinstance(event, PeerGone) else self.refusal

    async def _upgrade(self, request: Request) -> Response | None:
        """Check who may connect, and ask ``on_connect``; None when the connection is open."""
        server = self._server
        self._target = request.target
        found = server.dispatcher.find(request.path)
        if found is None or found[0].mode is None:
            return Response("no WebSocket at this path\n", 404)
        if server.stopping:
            return Response("the server is stopping\n", 503)
        refusal = allowed_origin(request, server.app.origins)
        if refusal is not None:
            access.warning("%s %s refused: %s", _peer(self.client), ascii(self._target), refusal)
            return Response("origin not allowed\n", 403)
        self._endpoint, params = found
        rooms_limit = server.app.limits.rooms_per_connection
        self._ws = WebSocket(self, server.dispatcher.registry, request, params, rooms_limit)
        return await server.dispatcher.connect(self._ws, self, self._endpoint)

    def _respond(self, response: Response) -> None:
        handshake, self._handshake = self._handshake, None
        assert handshake is not None
        status = response.status
        date = ("date", formatdate(usegmt=True))  # RFC 9110, section 6.6.1
        try:
            headers = (date, *header_pairs(response.headers))
            data = handshake.respond(status, response.content, headers)
        except ValueError as error:
            logger.error("%s: %s; answered 500", ascii(self._target), error)
            status = 500
            data = handshake.respond(status, b"internal server error\n", (date,))
        self.recipient.finish(data)
        access.info("%s %s %d", _peer(self.client), ascii(self._target), status)

    def _refuse(self, refused: Refused) -> None:
        self._target = refused.reason  # for the log: there may be no target
        self._respond(Response(refused.reason + "\n", refused.status, refused.headers))

    def _refuse_late(self) -> None:
        """The opening took too long, or the server stops: say so to who began a request."""
        if self._handshake is None:
            return
        if self._server.stopping:
            self._respond(Response("the server is stopping\n", 503))
        elif self.refusal is not None:
            self._refuse(self.refusal)
        elif self._ws is not None or self._target:
            self._respond(Response(NOT_IN_TIME, 503))
        else:
            self._respond(Response("request timeout (Limits.open_timeout)\n", 408))

    def _handler_raised(self, error: BaseException) -> None:
        """Treat a cancellation that is none of ours as what else a handler raises.

        On asyncio, who awaits a task that somebody cancelled is raised a CancelledError. Let
        through, it would take the whole server along.
        """
        logger.error("%s raised %s", self.describe(), type(error).__name__, exc_info=error)
        if self.accepted:
            self.crash(error)
        elif self._handshake is not None:
            self._respond(Response("internal server error\n", 500))

    async def _finish(self) -> None:
        """The handler is over: tell of the end, once, and let go of every room."""
        if self._finishing:
            return
        self._finishing = True
        ws = self._ws
        assert ws is not None and self._endpoint is not None
        if self._end is None:  # the handler was cancelled although nothing had ended
            self.close(CloseCode.GOING_AWAY, "")
        dispatcher = self._server.dispatcher
        self._grace_ends = inf
        try:
            if self._tell is not None:
                told = dispatcher.tell_end(ws, self._endpoint, self._tell)
                await self._bounded(told, "the error handler", anyio.CancelScope())
        finally:
            self._rooms = ws._leave_all()
            try:
                if Role.ON_CLOSE in self._endpoint.handlers:
                    told = dispatcher.tell_close(ws, self._endpoint, self._closed_error())
                    # A stopping server waits no longer, but on_close is owed to every connection.
                    scope = anyio.move_on_after(self._server.app.limits.on_close, shield=True)
                    await self._bounded(told, "on_close", scope)
            finally:
                self._release(ws)

    async def _bounded(self, call: Awaitable[None], what: str, scope: anyio.CancelScope) -> None:
        assert self._endpoint is not None
        cancelled = anyio.get_cancelled_exc_class()
        try:
            with scope:
                self._scope = scope
                if self.cancelled and not scope.shield:
                    scope.cancel()
                self._cancelled = False
                self._grace_ends = self._server.now + self._server.app.limits.on_close
                self._rearm()
                try:
                    await call
                except cancelled as error:
                    if _is_cancelled():
                        raise
                    logger.error("%s of %s raised", what, self._endpoint.path, exc_info=error)
            if scope.cancelled_caught and (scope.shield or not self.cancelled):
                logger.error(TOOK_TOO_LONG, what, self._endpoint.path)
        except Exception as error:  # raised while it was cancelled, and left by the scope
            logger.error("%s of %s raised", what, self._endpoint.path, exc_info=error)
        self._grace_ends = inf

    def _release(self, ws: WebSocket | None) -> None:
        if ws is not None:
            self._server.dispatcher.registry.release(ws, self._rooms + ws._leave_all())
            self._rooms = ()

    async def close_transport(self) -> None:
        """The end of the stream, in order: what is queued leaves, the peer's close frame comes,
        our side is shut, what the peer still sends is read away, the socket is closed.

        Closing at once with input unread would make the kernel reset the connection, and the peer
        would never see our close frame.
        """
        if self._close_started or self.is_gone():
            return
        self._close_started = True
        receiver, conn = self._receiver, self._conn
        try:
            if not self.accepted:
                self._rearm()  # the opening is over
            if self.recipient.blocked:  # else no coroutine, of the few that an end needs
                await self.recipient.flushed()
            if conn is not None and receiver is not None:
                while not conn.close_received and not self.is_gone():
                    await receiver.read()
            limits = self._server.app.limits
            self._drop_in(limits.close_timeout)
            await self._transport.finish_writing()
            self._drop_in(limits.linger)
            if receiver is not None:
                await receiver.take_over()
            while not self.is_gone() and await self._transport.receive() != b"":
                pass
        finally:
            self.abort()

    @property
    def reading(self) -> bool:
        """Whether the connection's own task waits for input."""
        return self._receiver is not None and self._receiver.state == READING

    def is_gone(self) -> bool:
        """Whether the socket is closed."""
        return self.phase == Phase.GONE

    def abort(self) -> None:
        """Close the socket now, whatever was on its way."""
        if self.is_gone():
            return
        self.phase = Phase.GONE
        try:
            self.recipient.abandon()
            self._transport.close()
        finally:
            self._drop_at = inf
            self._server.count_closed(self)
            if self._task_ended:
                self._server.forget(self)

    def _leave(self) -> None:
        """The task ends: no room may keep the connection, and nobody else closes its socket."""
        if not self._finishing:  # else that lets go of them, perhaps in another task and later
            self._release(self._ws)
        self._task_ended = True
        # What refers to each other is freed only when the collector comes.
        self._ws = self._receiver = None
        if self._end is not None:
            self._end.__cause__ = None  # its traceback has the frame of this task
        if self.is_gone():
            self._server.forget(self)
        elif not self._close_started:
            self.abort()

    # Link: opening

    def accept(self, subprotocol: str | None, headers: Iterable[tuple[str, str]]) -> None:
        """See `Link`."""
        if self._handshake is None or self._ws is None:
            raise RuntimeError("the connection was accepted before, or its opening is over")
        if self._timed_out:  # who swallowed the cancellation is no mistake of its own
            raise Reject(503, NOT_IN_TIME)
        handshake = self._handshake
        data = handshake.accept(subprotocol, headers)
        server = self._server
        agreement = handshake.agreement
        self._conn = Connection(
            server.app.limits, server.app.keepalive, now=server.now, agreement=agreement
        )
        if agreement is not None and server.app.compression is not None:
            self.recipient.deflater = Deflater(server.app.compression, agreement)
        self._handshake = None
        self.accepted = True
        self.phase = Phase.OPEN
        self._receiver = Receiver(self, server, self._transport, self._conn, self.recipient)
        self.recipient.queue_kept(data)
        for frame in self._early or ():
            self.recipient.queue_kept(frame)
        self._early = None
        self._ws._enter()
        if access.isEnabledFor(logging.INFO):
            access.info("%s %a accepted %s", _peer(self.client), self._target, self._ws.id)
        if handshake.trailing_data:
            self._receiver.feed(handshake.trailing_data)
        self._rearm()

    # Link: receiving

    @property
    def incoming(self) -> Receiver:
        """See `Link`."""
        if self._receiver is None:
            self.check_open()  # its task has ended
            raise RuntimeError("nothing can be received before the connection is accepted")
        return self._receiver

    def ending_found(self) -> None:
        """See `ReceiverOwner`."""
        self._answer_ending(ANSWER_AFTER)  # the handler has been busy for as long already

    def _answer_ending(self, waited: float) -> None:
        """The handler is busy with what came before the end: how long does that wait for it?"""
        assert self._receiver is not None and self._endpoint is not None
        if self._endpoint.cancel_on_disconnect:
            self.apply_ending()
            self._cancel_handler()
        elif waited >= ANSWER_AFTER:
            self.apply_ending()

    # Link: sending

    def check_open(self) -> None:
        """See `Link`."""
        if self._end is not None:
            raise self._closed_error()

    def send(self, opcode: int, payload: bytes) -> Pace:
        """See `Link`."""
        self.check_open()
        if self._early is None:
            self._early = []
        self._early.append(encode_frame(opcode, payload))
        return NO_WAIT if len(self._early) < TURN_MESSAGES else LET_OTHERS

    # Link: ending

    def close(self, code: int, reason: str) -> None:
        """See `Link`."""
        if not self.accepted:
            raise RuntimeError("the connection is not accepted yet: raise roomsock.Reject")
        self._finish_with(ConnectionClosedOK(code, reason, "server"))

    def fail(self, code: int, reason: str, error: Exception | None) -> None:
        """See `Link`."""
        if error is not None:  # the close frame says less
            logger.info("%s %s: %s", _peer(self.client), self._ws, error)
        end = ConnectionClosedError(code, reason, "server")
        end.__cause__ = error
        self._finish_with(end, tell=error or end)

    def crash(self, error: BaseException) -> None:
        """See `Link`. RFC 6455, section 7.4.1; the reason stays empty, details are nobody's."""
        if self._end is None:
            end = ConnectionClosedError(CloseCode.INTERNAL_ERROR, "", "server")
            end.__cause__ = error
            self._finish_with(end)
        if self._receiver is not None:  # also when it had ended before: nobody handles it any more
            self._receiver.inbox.clear()

    def too_slow(self, limit: str) -> None:
        """See `SenderOwner`."""
        if self._end is None and self.accepted:
            self._server.counters.slow_consumers += 1
            reason = f"too slow ({limit})"
            logger.warning("%s %s is %s", _peer(self.client), self._ws, reason)
            end = SlowConsumer(CloseCode.TRY_AGAIN_LATER, reason, "server")
            self._finish_with(end, tell=end, discard=True)

    def count_drop(self, first: bool) -> None:
        """See `SenderOwner`."""
        self._server.counters.dropped_messages += 1
        if first:
            peer = _peer(self.client)
            policy = self._server.app.slow_consumers
            logger.warning("%s %s is slow: room messages are dropped (%s)", peer, self._ws, policy)

    def start_draining(self) -> None:
        """See `SenderOwner`."""
        self._server.spawn(self.recipient.drain)

    def apply_ending(self) -> None:
        """See `ReceiverOwner`: answer what the peer did, and let everybody know."""
        assert self._receiver is not None
        event, self._receiver.ending = self._receiver.ending, None
        since = self._receiver.ending_at
        end: ConnectionClosed
        if isinstance(event, PeerClosed):
            clean = event.code in CLEAN_CODES
            by_client = ConnectionClosedOK if clean else ConnectionClosedError
            end = by_client(event.code, event.reason, "client")
        elif isinstance(event, Failed):
            big = event.code == CloseCode.MESSAGE_TOO_BIG
            kind = MessageTooBig if big else ConnectionClosedError
            end = kind(event.code, event.reason, "server")
        else:
            end = ConnectionClosedError(CloseCode.ABNORMAL, "", "lost")
        self._finish_with(
            end, tell=None if isinstance(end, ConnectionClosedOK) else end, since=since
        )

    def _finish_with(
        self,
        end: ConnectionClosed,
        *,
        tell: Exception | None = None,
        discard: bool = False,
        since: float | None = None,
    ) -> None:
        """Decide how the connection ends; the first to decide is right.

        Args:
            end: What receiving and sending raise from now on.
            tell: What the error handler is told of, if it is.
            discard: The client does not read: do not let the close frame wait for the rest.
            since: When the peer brought it about, if it did; what it sent before is still handled.
        """
        if self._end is not None:
            return
        receiver = self._receiver
        assert self._ws is not None and self._conn is not None and receiver is not None
        end.connection = self._ws.id
        self._end = end
        self._tell = tell
        self._ws._silence()
        server = self._server
        if self.phase == Phase.OPEN:
            self.phase = Phase.ENDING
            frame = b""
            if end.closed_by != "lost":
                # 5.5.1: the answer to a close frame carries its code.
                reason = end.reason if end.closed_by == "server" else ""
                frame = self._conn.close(end.code, reason)
            self.recipient.finish(frame, discard=discard)
            self._drop_at = server.now + server.app.limits.close_timeout
        if not self._finishing:
            began = server.now if since is None else since
            self._grace_ends = began + server.app.limits.close_grace
        self._rearm()
        receiver.stop(discard=since is None)
        if access.isEnabledFor(logging.INFO):
            access.info("%s %s %s", _peer(self.client), self._ws.id, _escaped(end))

    def _closed_error(self) -> ConnectionClosed:
        """A fresh exception each time: one that is raised twice grows its traceback."""
        end = self._end
        assert end is not None
        error = type(end)(end.code, end.reason, end.closed_by, end.connection)
        error.__cause__ = end.__cause__
        return error

    def go_away(self, code: int) -> None:
        """The server stops: close what is open, refuse what is not."""
        if self.accepted:
            self._finish_with(ConnectionClosedOK(code, "", "server"))
        elif not self._close_started:
            self._cancel_opening()

    # Time

    def _drop_in(self, seconds: float) -> None:
        """Close the socket in so many seconds at the latest."""
        drop_at = self._server.now + seconds
        if drop_at < self._drop_at:
            self._drop_at = drop_at
            self._rearm()

    def _rearm(self) -> None:
        if self.phase == Phase.OPEN and self._conn is not None:
            # A message that drips has no deadline yet when its connection falls silent first.
            limit = self._server.now + self._server.app.limits.message_time / 4
            self.deadline = min(self._conn.next_deadline(), limit)
        elif self.phase != Phase.OPENING or self._close_started:
            self.deadline = min(self._drop_at, self._grace_ends)

    def on_deadline(self, now: float) -> None:
        """A deadline passed; called by housekeeping."""
        if self.phase == Phase.OPENING and not self._close_started:
            if not self._timed_out:
                self._cancel_opening()
            else:
                logger.error("%s does not stop after its cancellation", self.describe())
                self.abort()
            return
        receiver = self._receiver
        if self.phase == Phase.OPEN and self._conn is not None and receiver is not None:
            reading = receiver.is_read and not self._server.was_held_up
            for event in self._conn.handle_timeout(now, reading=reading):
                if isinstance(event, Failed):
                    receiver.ending, receiver.ending_at = event, now
                    self.apply_ending()
            for frame in self._conn.data_to_send():
                self.recipient.queue_urgent(frame)
        if now >= self._drop_at:
            logger.debug("%s: dropped, the closing took too long", _peer(self.client))
            self.abort()
        if now >= self._grace_ends:
            self._lose_patience(now)
        self._rearm()

    def excuse(self, seconds: float) -> None:
        """The event loop stood still: for so long no deadline came any nearer."""
        self._drop_at += seconds
        self._grace_ends += seconds
        self._progress_at += seconds
        if self.phase == Phase.OPENING and not self._close_started:
            self.deadline += seconds
        else:
            self._rearm()

    def _cancel_opening(self) -> None:
        self._timed_out = True
        self.deadline = self._server.now + self._server.app.limits.close_timeout
        if self._scope is not None:
            self._scope.cancel()

    def _cancel_handler(self) -> None:
        self._cancelled = True
        self._grace_ends = self._server.now + self._server.app.limits.close_grace
        self._rearm()
        if self._scope is not None:
            self._scope.cancel()

    def _lose_patience(self, now: float) -> None:
        """A handler goes on although its connection has ended."""
        if not self._cancelled:
            self._cancel_handler()
            return
        self._grace_ends = inf
        logger.error("%s does not stop after its cancellation: left behind", self.describe())
        if self._finishing:  # on_close or the error handler itself
            self._release(self._ws)
        else:
            self._server.spawn(self._finish)

    def describe(self) -> str:
        """What runs here, for the log."""
        if self._endpoint is None or self._endpoint.mode is None:
            return f"the opening of {self._target!a}"
        return f"{self._endpoint.mode.location} for {self._endpoint.path!r}"

    def check_up(self, now: float) -> None:
        """Look after what has no deadline of its own; called by each round of housekeeping while
        the task does not wait for input, or the kernel does not take output."""
        receiver = self._receiver
        if self.recipient.blocked or (receiver is not None and not receiver.is_read):
            self._check_progress(now)
        if receiver is None or receiver.state == READING or self.is_gone():
            return
        if receiver.ending is not None:
            self._answer_ending(now - receiver.ending_at)
        elif self._end is None:
            receiver.help_if_busy()
        elif not self._close_started:
            self._server.spawn(self.close_transport)

    def _check_progress(self, now: float) -> None:
        """End who takes nothing of what is sent to it.

        What our kernel takes from us is a coarse measure: it waits until a third of its buffer is
        free, for which a slow client that reads all the time may need minutes. What it still holds
        is a fine one, and the only one while we do not read, and so see no pong.
        """
        if self.is_gone():
            return
        blocked, taken = self.recipient.blocked, self.recipient.progress
        waiting = self._transport.unacknowledged()
        moved = taken != self._taken or waiting < self._waiting or not (blocked or waiting)
        if moved or now - self._checked_at > UNWATCHED:
            self._progress_at = now
        self._taken, self._waiting, self._checked_at = taken, waiting, now
        still, limit = now - self._progress_at, self._server.app.limits.send_timeout
        if blocked and still >= limit:
            self.too_slow("Limits.send_timeout")
            self.abort()
        elif not blocked and self._end is None and self._server.app.keepalive is not None:
            # Our pings, at least, wait to be taken.
            assert self._receiver is not None
            if still >= max(limit, sum(self._server.app.keepalive)):
                self._receiver.lose()


def contain(error: BaseException) -> BaseException | None:
    """Log what a connection's task raised; returns what is to leave it nevertheless: cancellation,
    and what is no Exception."""
    if isinstance(error, OSError):
        logger.debug("a connection's task ended with %s", error)
    elif isinstance(error, Exception):
        logger.error("roomsock failed on a connection", exc_info=error)
    elif isinstance(error, BaseExceptionGroup):
        # On trio a cancelled task group raises what its tasks raised together with its
        # cancellation: only that may leave, anything else would end the server.
        errors, others = error.split(Exception)
        if errors is not None:
            logger.error("roomsock failed on a connection", exc_info=errors)
        return others
    else:
        return error
    return None


def _is_cancelled() -> bool:
    """Whether a cancellation of ours is what this task is being told of."""
    return anyio.current_effective_deadline() == -inf


def _peer(client: Address | None) -> str:
    return f"{client[0]}:{client[1]}" if client else "unix"


def _escaped(end: ConnectionClosed) -> str:
    """How a connection ended, without a byte that could forge a line of the log."""
    return f"{end.closed_by} {end.code}" + (f" {end.reason!a}" if end.reason else "")
