"""Nothing in, a heap that suits the run out, and memory that the process holds for nothing back to the system. Of glibc only."""

import ctypes
import gc
import importlib.metadata
import importlib.util
import mmap
import os
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Of glibc's mallopt."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HEAP_SHARE = 0.75
"""Of the machine's memory, that the heap has addresses in huge pages for; what it does not use takes no memory."""


def arrange() -> None:
    """Arranges the heap for a run; called before JAX is loaded and threads are started.

    JAX, Orbax and TensorStore free in one thread what another allocated, which leaves holes in arena after arena of the heap: threads
    share one arena a core in place of eight.

    On a CPU a compiled function allocates its arrays from the heap, anew at each call. By default glibc has the system map them in pages of
    4 kB, cleared one by one as they are first touched, and unmaps them again. Here one arena serves all threads, keeps what is freed, and
    lies in huge pages.
    """
    if not has_huge_pages():
        _mallopt(M_ARENA_MAX, max(2, os.cpu_count() or 1))
        return
    _mallopt(M_ARENA_MAX, 1)
    _mallopt(M_MMAP_MAX, 0)
    _mallopt(M_TRIM_THRESHOLD, -1)
    _reserve_huge_pages()


def has_huge_pages() -> bool:
    """Whether arrays live in a heap that can lie in huge pages: JAX computes on the CPU, and the system gives such pages to who asks."""
    return on_cpu() and HUGE_PAGES.is_file() and "[never]" not in HUGE_PAGES.read_text()


def on_cpu() -> bool:
    """Whether JAX will compute on the CPU, told without loading it: by JAX_PLATFORMS, or since no other platform is installed."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not (importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"))


def _reserve_huge_pages() -> None:
    """Lets the heap grow at once as far as it may, marks that for huge pages, and frees it: none of it is touched, so no memory is taken.

    glibc would mark its heap itself where GLIBC_TUNABLES asks for it, but reads that before any Python runs. Without `arrange` before, the
    addresses are no part of the heap, and nothing changes.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = (ctypes.c_size_t,), (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = int(HEAP_SHARE * os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE)
    if start := libc.malloc(size):
        libc.madvise(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, size - mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
        libc.free(start)


def _mallopt(parameter: int, value: int) -> None:
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None:
        choose(parameter, value)


def give_back() -> None:
    """Gives the system what is freed but still held. A run of many rounds would otherwise look as if it leaked.

    Where the C library has no `malloc_trim` (it is glibc's) nothing happens.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
        if has_huge_pages():  # what the heap grows by from now on is none of what was marked
            _reserve_huge_pages()
