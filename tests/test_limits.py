"""The limits: on by default, and refused at once where they mean nothing."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from math import inf, nan
from typing import Any

import pytest

from roomsock.limits import KIB, MIB, Limits

NAMES = [field.name for field in fields(Limits)]
INTS = [field.name for field in fields(Limits) if "int" in str(field.type)]
OPTIONAL = ["message_rate", "connections", "connections_per_address"]


def limits(**values: Any) -> Limits:
    return Limits(**values)


def test_the_defaults_are_those_of_the_contract() -> None:
    assert {name: getattr(Limits(), name) for name in NAMES} == {
        "message": MIB,
        "fragments": 131_072,
        "message_time": 60.0,
        "message_rate": None,
        "read_ahead": 256 * KIB,
        "outbox": 4 * MIB,
        "outbox_messages": 4096,
        "high_water": 256 * KIB,
        "send_timeout": 20.0,
        "header_block": 16 * KIB,
        "header_fields": 100,
        "request_target": 8 * KIB,
        "body": MIB,
        "connections": None,
        "connections_per_address": None,
        "rooms_per_connection": 32,
        "open_timeout": 10.0,
        "close_timeout": 10.0,
        "close_grace": 5.0,
        "linger": 2.0,
        "on_close": 5.0,
        "shutdown": 10.0,
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, -1, nan])
def test_a_limit_that_is_not_positive_is_refused_by_its_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Limits\.{name} must be positive, not"):
        limits(**{name: value})


@pytest.mark.parametrize("name", NAMES)
def test_none_is_accepted_only_where_it_is_the_default(name: str) -> None:
    if name in OPTIONAL:
        assert getattr(limits(**{name: None}), name) is None
    else:
        with pytest.raises(ValueError, match=rf"Limits\.{name} must be positive, not None"):
            limits(**{name: None})


@pytest.mark.parametrize("name", INTS)
def test_what_is_counted_is_an_int(name: str) -> None:
    """``message=1e6`` would pass every comparison, and fail when the first bytes are sliced."""
    with pytest.raises(TypeError, match=rf"Limits\.{name} must be an int, not 1000000\.0"):
        limits(**{name: 1e6})
    assert getattr(limits(**{name: 7}), name) == 7


def test_times_may_be_any_number_and_endless() -> None:
    assert limits(send_timeout=3, shutdown=inf, message_rate=0.5).shutdown == inf


def test_limits_are_given_by_name_and_do_not_change() -> None:
    with pytest.raises(TypeError):
        Limits(MIB)  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        Limits().message = 5  # type: ignore[misc]
