"""Looks for inputs that break what `targets` asserts, guided by coverage (atheris, libFuzzer).

    pip install -e .[fuzz]
    python tests/fuzz/fuzz.py connection -max_total_time=600

The first argument is one of connection, handshake, deflate and json; those behind it are for
libFuzzer. A directory among them is its corpus: inputs that reach something new are kept there. An
input that breaks something is written to a file ``crash-...``: once the cause is mended, add it to
FINDINGS in tests/test_fuzz.py, which every run of the test suite replays.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

# The second opinions as well: what they tell apart is worth trying.
SEEN = ["roomsock", "wsproto", "h11", "json", "tests.fuzz.model"]
with atheris.instrument_imports(include=SEEN):
    from tests.fuzz.targets import TARGETS, seeds


def main(arguments: list[str]) -> None:
    """Fuzz one target until it breaks, or the time is over."""
    if len(arguments) < 2 or arguments[1] not in TARGETS:
        sys.exit(f"usage: {arguments[0]} {'|'.join(TARGETS)} [libFuzzer's options]")
    target = arguments.pop(1)
    with tempfile.TemporaryDirectory() as directory:
        for number, seed in enumerate(seeds(target)):
            Path(directory, f"seed-{number}").write_bytes(seed)
        # The first directory is written to: the user's, if there is one.
        given = [each for each in arguments[1:] if not each.startswith("-")]
        options = [each for each in arguments[1:] if each.startswith("-")]
        atheris.Setup([arguments[0], *options, *given, directory], TARGETS[target])
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
