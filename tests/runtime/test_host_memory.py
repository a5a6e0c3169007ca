"""Freed memory goes back to the system, and a CPU computes in the calling thread."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sso_jax.runtime.host_memory import release_memory


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="glibc gives memory back")
def test_memory_full_of_holes_is_given_back():
    pieces = [bytes(2000) for _ in range(100_000)]
    kept = pieces[::50]  # holes between them: the heap cannot shrink from its end
    del pieces
    before = resident_megabytes()
    release_memory()
    assert before - resident_megabytes() > 100 and len(kept) == 2000


DISPATCH = """
import jax, jax.numpy as jnp
from sso_jax.runtime.jax_setup import prepare_jax
prepare_jax()
squared = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: y @ y / 1024, x))
start = jnp.ones((1024, 1024))
squared(start).block_until_ready()
print(all(squared(start).is_ready() for _ in range(5)))
"""


def test_a_cpu_computes_in_the_thread_that_calls():
    """Its result is there when the call returns: no other call can have begun before this one's memory was free."""
    given = {
        name: value for name, value in os.environ.items() if name != "XLA_FLAGS"
    }  # with several devices it always computes elsewhere
    command = [sys.executable, "-c", DISPATCH]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=given, cwd=Path(__file__).resolve().parents[2], check=True
    )
    assert ran.stdout.split() == ["True"]
