"""What is freed in pieces goes back to the system."""

import sys
from pathlib import Path

import pytest

from sso_jax.host_memory import give_back


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="glibc gives memory back")
def test_memory_full_of_holes_is_given_back():
    pieces = [bytes(2000) for _ in range(100_000)]
    kept = pieces[::50]  # holes between them: the heap cannot shrink from its end
    del pieces
    before = resident_megabytes()
    give_back()
    assert before - resident_megabytes() > 100 and len(kept) == 2000
