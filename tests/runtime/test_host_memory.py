"""What is freed in pieces goes back to the system; on a CPU the heap lies in huge pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sso_jax.runtime.host_memory import has_huge_pages, on_cpu, release_memory


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


PROGRAM = """
import ctypes, re, sys
from pathlib import Path
from sso_jax.runtime.host_memory import give_back, keep_few_arenas, use_huge_pages

def in_huge_pages(address):
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if part:
            start, end = (int(end, 16) for end in part.split(" ", 1)[0].split("-"))
            if start <= address < end:
                return " hg" in part.split("VmFlags:")[1]

print("started", *sys.argv[1:], flush=True)
use_huge_pages()
keep_few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
for gives_back in (False, True):
    if gives_back:
        give_back()
    block = libc.malloc(200 << 20)
    print(in_huge_pages(block + (100 << 20)))
    libc.free(block)
"""


@pytest.mark.skipif(not has_huge_pages(), reason="the system gives no huge pages, or this is no CPU")
@pytest.mark.parametrize(
    ("variables", "starts", "marked"),
    [
        ({"JAX_PLATFORMS": "cpu"}, 2, True),
        ({"JAX_PLATFORMS": "cuda"}, 1, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, 1, False),
    ],
)
def test_a_program_on_a_cpu_starts_again_once_with_large_arrays_in_huge_pages(tmp_path, variables, starts, marked):
    """As /proc/self/smaps says of the address of a large block, at first and after memory was given back; arguments
    stay.
    """
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    given = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "JAX_PLATFORMS")}
    given["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, str(program), "--field", "a value"]
    ran = subprocess.run(command, capture_output=True, text=True, env={**given, **variables}, check=True)
    assert ran.stdout.splitlines() == ["started --field a value"] * starts + [str(marked)] * 2


@pytest.mark.parametrize(
    ("platforms", "expected"), [("cpu", True), ("cuda", False), ("cpu,cuda", False), ("tpu", False)]
)
def test_the_platform_is_told_by_the_environment_where_it_says(monkeypatch, platforms, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert on_cpu() is expected


@pytest.mark.parametrize("plugins", [[], ["a plugin"]])
def test_without_a_word_it_is_the_cpu_unless_another_platform_is_installed(monkeypatch, plugins):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: plugins)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert on_cpu() is not bool(plugins)


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
