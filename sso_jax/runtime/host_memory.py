"""Nothing in, a heap that suits the run out, and memory that the process holds for nothing back to the system. Of glibc
only.
"""

import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

M_ARENA_MAX = -8
"""Of glibc's mallopt."""
VARIABLE = "GLIBC_TUNABLES"
SETTINGS = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 2**60, "arena_max": 1}
"""Of glibc's malloc: one arena in huge pages serves all threads and keeps what is freed."""
FIRST_GLIBC = (2, 35)
"""The first one that knows all of them."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Has a process that will compute on the CPU start again, once, with its heap in huge pages; the first thing that a
    program does.

    A compiled function allocates its arrays from the heap, anew at each call. By default glibc has the system map them
    in pages of 4 kB, cleared one by one as they are first touched, and unmaps them again. It reads how to do otherwise
    before Python runs: hence the start. Nothing happens where GLIBC_TUNABLES is set already.
    """
    if VARIABLE not in os.environ and has_huge_pages():
        os.environ[VARIABLE] = ":".join(f"glibc.malloc.{name}={value}" for name, value in SETTINGS.items())
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def has_huge_pages() -> bool:
    """Whether arrays live in a heap that can lie in huge pages: JAX computes on the CPU, and the system gives such
    pages to who asks.
    """
    name, version = platform.libc_ver()
    known = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= FIRST_GLIBC
    return known and on_cpu() and HUGE_PAGES.is_file() and "[never]" not in HUGE_PAGES.read_text()


def on_cpu() -> bool:
    """Whether JAX will compute on the CPU, told without loading it: by JAX_PLATFORMS, or since no other platform is
    installed.
    """
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not (importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"))


def keep_few_arenas() -> None:
    """Has the threads of a process share one arena of the heap a core in place of eight; called before they are
    started.

    JAX, Orbax and TensorStore free in one thread what another allocated, which leaves holes in arena after arena. Where
    GLIBC_TUNABLES says how many there are, that stays.
    """
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None and "arena_max" not in os.environ.get(VARIABLE, ""):
        choose(M_ARENA_MAX, max(2, os.cpu_count() or 1))


def release_memory() -> None:
    """Gives the system what is freed but still held. A run of many rounds would otherwise look as if it leaked.

    Where the C library has no `malloc_trim` (it is glibc's) nothing happens.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
