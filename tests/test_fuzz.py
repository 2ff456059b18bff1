"""What tests/fuzz asserts, of its seeds, of what it has found, and of a few random inputs.

No atheris is needed. The search itself is a command of its own: see tests/fuzz/fuzz.py.
"""

from __future__ import annotations

import random

import pytest

from .fuzz.targets import TARGETS, seeds

#: Inputs that once broke something: the target, the input in hexadecimal, and what was wrong.
FINDINGS = [
    # A continuation of nothing was inflated behind a compressed message: 1007 instead of 1002,
    # unless that message had come in one piece.
    ("connection", "160800 02c100 000062 6f6d6262067769746e"),
    # Blanks before a bare CR or LF, in a header, a chunk's header and a trailer: h11 refused them
    # in quadratic time, a second for a head of 16 KiB.
    (
        "handshake",
        "0101474554202f20485454502f312e310d0a486f73743a20610d0a613a20202020202020200d780d0a0d0a",
    ),
    (
        "handshake",
        "0101"
        "504f5354202f6120485454502f312e310d0a486f73743a20610d0a"
        "5472616e736665722d456e636f64696e673a206368756e6b65640d0a0d0a"
        "313b20202020202020200a0d0a",
    ),
    (
        "handshake",
        "0101"
        "504f5354202f6120485454502f312e310d0a486f73743a20610d0a"
        "5472616e736665722d456e636f64696e673a206368756e6b65640d0a0d0a"
        "300d0a613a20202020202020200d780d0a0d0a",
    ),
]


@pytest.mark.parametrize(("target", "data"), FINDINGS)
def test_what_was_found_once_stays_mended(target: str, data: str) -> None:
    TARGETS[target](bytes.fromhex(data))


@pytest.mark.parametrize("target", TARGETS)
def test_the_inputs_to_begin_with_break_nothing(target: str) -> None:
    for data in seeds(target):
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
def test_the_inputs_to_begin_with_break_nothing_when_they_are_damaged(target: str) -> None:
    """The same every time: a search belongs to the fuzzer."""
    chance = random.Random(target)
    for data in seeds(target):
        for _ in range(5):
            damaged = bytearray(data)
            for _ in range(chance.randint(1, 3)):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            TARGETS[target](bytes(damaged[: chance.choice([None, -1, len(data) // 2])]))
