"""A call in, its seconds and the process' memory out; one call at a time in turn with others where whoever started this
one asks for it.
"""

import os
import resource
import sys
import time
from collections.abc import Callable

TURNS_VARIABLE = "SPEED_TAKES_TURNS"
"""Where the environment has it, each call waits for its turn."""
READY = "ready for a turn"


def wait_for_turn() -> None:
    """Says on standard output that the next call may begin, and waits for a line on standard input."""
    print(READY, flush=True)
    sys.stdin.readline()


def timed(work: Callable[[], object], repeats: int) -> dict:
    """Seconds of the first call, which warms up and compiles, and of each of the repeats, and the peak memory behind
    them.

    `work` returns when all is done.
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
