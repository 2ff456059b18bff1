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

    Attributes:
        heard_at: When bytes arrived last, to be set (no call for every read); None while a ping
            waits for an answer.
    """

    __slots__ = ("_asked", "_interval", "_pinged_at", "_timeout", "heard_at")

    def __init__(self, interval: float | None, timeout: float, now: float) -> None:
        self._interval = inf if interval is None else interval
        self._timeout = timeout
        self.heard_at: float | None = now
        self._asked = self._pinged_at = now

    def next_deadline(self) -> float:
        """When `is_dead` or `ping_due` may next turn true."""
        if self.heard_at is None:
            return self._pinged_at + self._timeout
        return self.heard_at + self._interval

    def is_dead(self, now: float) -> bool:
        """Whether a ping went unanswered for too long."""
        return self.heard_at is None and now >= self._pinged_at + self._timeout

    def ping_due(self, now: float) -> bool:
        """Whether the client was silent for so long that it must be asked."""
        return self.heard_at is not None and now >= self.heard_at + self._interval

    def ping_sent(self, now: float) -> None:
        """A ping was queued: the wait for its answer begins."""
        self.heard_at = None
        self._pinged_at = self._asked = now

    def excuse(self, now: float) -> bool:
        """We did not read, so silence proves nothing: the wait for the answer begins again.

        Returns:
            Whether a ping is due nevertheless: what the machine of a client that is gone answers
            to it is seen without reading.
        """
        if self.heard_at is None:
            self._pinged_at = now
        else:
            self.heard_at = now
        return now >= self._asked + self._interval
