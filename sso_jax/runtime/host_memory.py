"""Tunes malloc and returns freed memory to the OS (glibc only)."""

import ctypes
import gc
import os

M_ARENA_MAX = -8
"""Parameter number of glibc's `mallopt`."""


def keep_few_arenas() -> None:
    """Limits malloc to one arena per core instead of eight; call it before any threads start.

    JAX, Orbax and TensorStore free in one thread what another allocated, which fragments arena after arena. A number of
    arenas set in GLIBC_TUNABLES is kept.
    """
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None and "arena_max" not in os.environ.get("GLIBC_TUNABLES", ""):
        choose(M_ARENA_MAX, max(2, os.cpu_count() or 1))


def release_memory() -> None:
    """Returns freed memory to the OS; without it a run of many rounds appears to leak.

    Does nothing where the C library has no `malloc_trim` (a glibc function).
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
