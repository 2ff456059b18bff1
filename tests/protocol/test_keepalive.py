"""Keepalive deadlines with plain numbers for the time. Ping and pong: RFC 6455, 5.5.2 and 5.5.3."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from roomsock.protocol.keepalive import Keepalive


def hear(keepalive: Keepalive, now: float) -> None:
    keepalive.heard_at = now


def test_silence_is_counted_from_the_opening() -> None:
    keepalive = Keepalive(20.0, 10.0, 100.0)
    assert keepalive.next_deadline() == 120.0
    assert not keepalive.ping_due(119.999)
    assert keepalive.ping_due(120.0)
    assert not keepalive.is_dead(1e9)


def test_without_an_interval_nothing_is_ever_due() -> None:
    keepalive = Keepalive(None, 0.0, 100.0)
    assert keepalive.next_deadline() == inf
    assert not keepalive.ping_due(1e300)
    hear(keepalive, 200.0)
    keepalive.excuse(300.0)
    assert keepalive.next_deadline() == inf
    assert not keepalive.is_dead(1e300)


def test_a_byte_puts_the_ping_off() -> None:
    keepalive = Keepalive(20.0, 10.0, 100.0)
    hear(keepalive, 115.0)
    assert not keepalive.ping_due(134.999)
    assert keepalive.ping_due(135.0)
    assert keepalive.next_deadline() == 135.0


def test_a_ping_that_waits_is_not_repeated_and_its_timeout_is_death() -> None:
    keepalive = Keepalive(20.0, 10.0, 100.0)
    keepalive.ping_sent(121.0)  # housekeeping came a second late
    assert keepalive.next_deadline() == 131.0
    assert not keepalive.ping_due(130.0)
    assert not keepalive.is_dead(130.999)
    assert keepalive.is_dead(131.0)


def test_any_byte_answers_a_ping() -> None:
    keepalive = Keepalive(20.0, 10.0, 100.0)
    keepalive.ping_sent(120.0)
    hear(keepalive, 129.0)
    assert not keepalive.is_dead(1e9)
    assert keepalive.next_deadline() == 149.0


def test_a_timeout_longer_than_the_interval_still_sends_one_ping() -> None:
    keepalive = Keepalive(1.0, 60.0, 0.0)
    keepalive.ping_sent(1.0)
    assert not keepalive.ping_due(50.0)
    assert keepalive.next_deadline() == 61.0


def test_excused_silence_begins_again() -> None:
    keepalive = Keepalive(20.0, 10.0, 100.0)
    keepalive.excuse(125.0)
    assert not keepalive.ping_due(144.999)
    assert keepalive.ping_due(145.0)


def test_an_excused_wait_for_an_answer_begins_again() -> None:
    """A ping stays unanswered: only its deadline moves, no second one is due."""
    keepalive = Keepalive(20.0, 10.0, 100.0)
    keepalive.ping_sent(120.0)
    keepalive.excuse(129.0)
    assert keepalive.next_deadline() == 139.0
    assert not keepalive.ping_due(138.0)
    assert not keepalive.is_dead(138.999)
    assert keepalive.is_dead(139.0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["heard", "excuse", "look"]), st.floats(0, 50, allow_nan=False))
    )
)
def test_nothing_happens_before_the_deadline_and_something_does_at_it(
    steps: list[tuple[str, float]],
) -> None:
    now = 1000.0
    keepalive = Keepalive(20.0, 10.0, now)
    for step, wait in steps:
        now += wait
        due = keepalive.ping_due(now) or keepalive.is_dead(now)
        assert due == (now >= keepalive.next_deadline())
        assert not (keepalive.ping_due(now) and keepalive.is_dead(now))
        if step == "heard":
            hear(keepalive, now)
        elif step == "excuse":
            keepalive.excuse(now)
        elif keepalive.ping_due(now):
            keepalive.ping_sent(now)
        assert keepalive.next_deadline() > now or step == "look"
