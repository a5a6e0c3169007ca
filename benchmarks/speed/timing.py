"""A call in, its seconds out."""

import time
from collections.abc import Callable


def timed(work: Callable[[], object], repeats: int) -> dict:
    """Seconds of the first call, which warms up and compiles, and of each of the repeats; `work` returns when all is done."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "seconds": seconds[1:]}
