"""Events are values: equal by what they say, and nobody changes them on their way."""

from __future__ import annotations

import dataclasses
import pickle
from typing import get_args

import pytest

from roomsock.protocol.events import Event, Failed, PeerClosed, PeerLost, PongReceived

VALUES = [
    pytest.param(PongReceived(1.5), PongReceived(2.5), id="pong"),
    pytest.param(PeerClosed(1000, "bye"), PeerClosed(1000, ""), id="closed"),
    pytest.param(Failed(1009, "too big"), Failed(1002, "too big"), id="failed"),
    pytest.param(PeerLost(), PeerLost("reset"), id="lost"),
]


@pytest.mark.parametrize(("event", "other"), VALUES)
def test_events_are_equal_by_value(event: object, other: object) -> None:
    assert event == dataclasses.replace(event)  # type: ignore[type-var]
    assert hash(event) == hash(dataclasses.replace(event))  # type: ignore[type-var]
    assert event != other
    assert pickle.loads(pickle.dumps(event)) == event


@pytest.mark.parametrize(("event", "other"), VALUES)
def test_events_cannot_be_changed_and_carry_nothing_else(event: object, other: object) -> None:
    field = dataclasses.fields(event)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, field, getattr(other, field))
    assert not hasattr(event, "__dict__")


def test_failed_and_closed_with_the_same_words_differ() -> None:
    """What the peer said and what we found are told apart by type alone."""
    closed: Event = PeerClosed(1002, "x")
    failed: Event = Failed(1002, "x")
    assert closed != failed


def test_messages_are_plain_and_all_else_is_a_class_of_this_module() -> None:
    assert set(get_args(Event)) == {str, bytes, PongReceived, PeerClosed, Failed, PeerLost}
