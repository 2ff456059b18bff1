"""Every limit of a server, with its unit and the reason for its default.

Imports nothing. All limits are on by default, because the peer decides what it sends; sizes are
in bytes, times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

KIB = 1024
MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client, and all of them together, may cost.

    Sizes are in bytes, times in seconds. Where None is the default it may be given as well.

    Raises:
        ValueError: A limit is not positive, or None where that means nothing.
        TypeError: A size or a number is no int.
    """

    #: Largest message a client may send, after inflation; above it 1009.
    message: int = MIB
    #: Most fragments one message may have (Autobahn sends 65,536 of them); above it 1009.
    fragments: int = 131_072
    #: Longest time from a message's first byte to its last; above it 1008.
    message_time: float = 60.0
    #: Most messages a client may send in a second (averaged over ten); above it 1008.
    message_rate: float | None = None
    #: Input taken from a client before its handler asks for it; then TCP holds the client back.
    read_ahead: int = 256 * KIB

    #: Most bytes the kernel has refused to take for one client; above it ``slow_consumers`` rules.
    outbox: int = 4 * MIB
    #: Most messages waiting for one client that the kernel has refused to take.
    outbox_messages: int = 4096
    #: A handler that awaits a send to its own client waits while more than this is unsent.
    high_water: int = 256 * KIB
    #: Longest time a waiting outbox may stand still: our kernel takes nothing of it, nor the
    #: client's machine (on Linux) of what our kernel holds. Then the connection is dropped.
    send_timeout: float = 20.0

    #: Request line and headers; above it 431.
    header_block: int = 16 * KIB
    #: Number of header fields; above it 431.
    header_fields: int = 100
    #: Request target; above it 414.
    request_target: int = 8 * KIB
    #: Body of a request to a ``post`` handler; above it 413.
    body: int = MIB

    #: Most connections; above it 503. Unless set: 20,000 or 90 % of the descriptors the process
    #: may open, whichever is less.
    connections: int | None = None
    #: Most connections from one client's address, of IPv6 from one /64 network, which is what one
    #: client has; above it 503. Behind a trusted proxy it is the client's that is counted (see
    #: ``trusted_proxies`` of `serve`), from the end of its request on, and never the proxy's own.
    connections_per_address: int | None = None
    #: Most rooms one connection may be in, its own included.
    rooms_per_connection: int = 32

    #: TLS handshake, request, and ``on_connect`` or the HTTP handler, together.
    open_timeout: float = 10.0
    #: Wait for the client's answer to our close frame; behind a failure none is waited for.
    close_timeout: float = 10.0
    #: What a handler gets to finish after its client is gone, and again after its cancellation.
    close_grace: float = 5.0
    #: Reading away what the client still sends after the closing handshake.
    linger: float = 2.0
    #: What ``on_close`` and an error handler may take each.
    on_close: float = 5.0
    #: What a stopping server waits for its clients and handlers before it cancels them.
    shutdown: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if value is None or not value > 0:
                raise ValueError(f"Limits.{field.name} must be positive, not {value!r}")
            # A float such as 1e6 would pass every comparison, and fail where bytes are counted.
            if "int" in str(field.type) and not isinstance(value, int):
                raise TypeError(f"Limits.{field.name} must be an int, not {value!r}")
