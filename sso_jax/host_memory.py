"""Nothing in, a heap with few holes out, and memory that the process holds for nothing back to the system."""

import ctypes
import gc
import os

M_ARENA_MAX = -8
"""Of glibc's mallopt."""


def keep_few_arenas() -> None:
    """Has the threads of a process share one arena of the heap a core in place of eight; called before they are started.

    JAX, Orbax and TensorStore free in one thread what another allocated, which leaves holes in arena after arena.
    """
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None:
        choose(M_ARENA_MAX, max(2, os.cpu_count() or 1))


def give_back() -> None:
    """Gives the system what is freed but still held. A run of many rounds would otherwise look as if it leaked.

    Where the C library has no `malloc_trim` (it is glibc's) nothing happens.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
