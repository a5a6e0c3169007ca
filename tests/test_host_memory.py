"""What is freed in pieces goes back to the system; on a CPU the heap lies in huge pages."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sso_jax.host_memory import HUGE_PAGES, give_back, on_cpu


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


IN_A_NEW_PROCESS = """
import ctypes, mmap, re, sys
from pathlib import Path
from sso_jax import host_memory

def in_huge_pages(address):
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if part:
            start, end = (int(end, 16) for end in part.split(" ", 1)[0].split("-"))
            if start <= address < end:
                return " hg" in part.split("VmFlags:")[1]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
host_memory.arrange()
before = int(Path("/proc/self/statm").read_text().split()[1])
for gives_back in (False, True):
    if gives_back:
        host_memory.give_back()
    block = libc.malloc(200 << 20)
    print(in_huge_pages(block + (100 << 20)))
    libc.free(block)
print((int(Path("/proc/self/statm").read_text().split()[1]) - before) * mmap.PAGESIZE < 50 << 20)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
@pytest.mark.parametrize("platforms", ["cpu", "cuda"])
def test_large_arrays_lie_in_huge_pages_on_a_cpu_and_what_is_not_used_takes_no_memory(platforms):
    """As /proc/self/smaps says of the address of a large block, at first and after memory was given back."""
    if "[never]" in HUGE_PAGES.read_text():
        pytest.skip("the system gives no huge pages")
    environment = {**os.environ, "JAX_PLATFORMS": platforms}
    ran = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS], capture_output=True, text=True, env=environment, check=True)
    marked = str(platforms == "cpu")
    assert ran.stdout.split() == [marked, marked, "True"]


@pytest.mark.parametrize(("platforms", "expected"), [("cpu", True), ("cuda", False), ("cpu,cuda", False), ("tpu", False)])
def test_the_platform_is_told_by_the_environment_where_it_says(monkeypatch, platforms, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert on_cpu() is expected


@pytest.mark.parametrize("plugins", [[], ["a plugin"]])
def test_without_a_word_it_is_the_cpu_unless_another_platform_is_installed(monkeypatch, plugins):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: plugins)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert on_cpu() is not bool(plugins)
