"""A clock that tests move by hand, for the driver and real sockets, on any event loop."""

from __future__ import annotations

import anyio
from anyio.lowlevel import checkpoint

from roomsock.server import ROUND


async def settled() -> None:
    """Wait until nothing happens any more: every task waits, and no socket has news for one."""
    # asyncio calls a task blocked although the kernel has bytes for it, which it learns of when it
    # next polls: once for each turn of the loop. An answer to an answer takes two.
    for _ in range(4):
        await checkpoint()
    await anyio.wait_all_tasks_blocked()


class FakeClock:
    """Stands still until `advance`; nothing in the server sees any other time."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._sleepers: list[tuple[float, anyio.Event]] = []

    def now(self) -> float:
        return self._now

    async def sleep_until(self, deadline: float) -> None:
        if deadline <= self._now:
            await checkpoint()
            return
        event = anyio.Event()
        self._sleepers.append((deadline, event))
        await event.wait()

    async def advance(self, seconds: float) -> None:
        """Let so much time pass, in steps of the server's housekeeping: whatever falls due in a
        step has run before the next begins."""
        target = self._now + seconds
        while self._now < target:
            await settled()
            self.tick(min(ROUND, target - self._now))
        await settled()

    def tick(self, seconds: float = ROUND) -> None:
        """Let so much time pass at once, whether or not anybody is ready for it."""
        self._now += seconds
        due = [event for deadline, event in self._sleepers if deadline <= self._now]
        self._sleepers = [each for each in self._sleepers if each[0] > self._now]
        for event in due:
            event.set()
