"""Times calls and measures peak memory; optionally takes turns with other processes, call by call."""

import os
import resource
import sys
import time
from collections.abc import Callable

TURNS_VARIABLE = "SPEED_TAKES_TURNS"
"""Environment variable; if it is set, each call waits for its turn."""
READY = "ready for a turn"


def wait_for_turn() -> None:
    """Announces the next call on standard output and waits for a line on standard input."""
    print(READY, flush=True)
    sys.stdin.readline()


def timed(work: Callable[[], object], repeats: int) -> dict:
    """Returns the seconds of a first call, which compiles, the seconds of each repeat, and the peak memory.

    `work` must return only when its computation is complete.
    """
    seconds = []
    for _ in range(repeats + 1):
        if TURNS_VARIABLE in os.environ:
            wait_for_turn()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"first": seconds[0], "seconds": seconds[1:], "host_peak_bytes": peak}
