"""Keepalive deadlines of one WebSocket connection.

Pure arithmetic: callers pass the time in (seconds), nothing here reads a clock.
Ping and pong frames: RFC 6455, sections 5.5.2 and 5.5.3.
"""

from __future__ import annotations

from math import inf


class Keepalive:
    """Says when to ping a silent client and when to give it up. Any received byte is life.

    Args:
        interval: Seconds of silence before a ping; None never pings.
        timeout: Seconds an unanswered ping is waited for.
        now: The time at which the connection opened.
    """

    __slots__ = ("_asked", "_heard", "_interval", "_pinged", "_timeout")

    def __init__(self, interval: float | None, timeout: float, now: float) -> None:
        self._interval = inf if interval is None else interval
        self._timeout = timeout
        self._heard = now
        self._asked = now
        self._pinged: float | None = None

    def heard(self, now: float) -> None:
        """Bytes arrived."""
        self._heard = now
        self._pinged = None

    def next_deadline(self) -> float:
        """When `is_dead` or `ping_due` may next turn true."""
        if self._pinged is not None:
            return self._pinged + self._timeout
        return self._heard + self._interval

    def is_dead(self, now: float) -> bool:
        """Whether a ping went unanswered for too long."""
        return self._pinged is not None and now >= self._pinged + self._timeout

    def ping_due(self, now: float) -> bool:
        """Whether the client was silent for so long that it must be asked."""
        return self._pinged is None and now >= self._heard + self._interval

    def ping_sent(self, now: float) -> None:
        """A ping was queued: the wait for its answer begins."""
        self._pinged = self._asked = now

    def excuse(self, now: float) -> bool:
        """We did not read, so silence proves nothing: the wait for the answer begins again.

        Returns:
            Whether a ping is due nevertheless: what the machine of a client that is gone answers
            to it is seen without reading.
        """
        if self._pinged is not None:
            self._pinged = now
        else:
            self._heard = now
        return now >= self._asked + self._interval
