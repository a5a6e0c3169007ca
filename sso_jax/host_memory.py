"""Nothing in, memory that the process holds for nothing back to the system."""

import ctypes
import gc


def give_back() -> None:
    """Gives the system what is freed but still held: threads of JAX, Orbax and the report each leave an arena of the heap full of holes.

    A run of many rounds would otherwise look as if it leaked. Where the C library has no `malloc_trim` (it is glibc's) nothing happens.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
