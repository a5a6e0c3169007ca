"""A call in, its seconds out; one call at a time in turn with other processes where whoever started this one asks for it."""

import os
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
    """Seconds of the first call, which warms up and compiles, and of each of the repeats; `work` returns when all is done."""
    seconds = []
    for _ in range(repeats + 1):
        if TURNS_VARIABLE in os.environ:
            wait_for_turn()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "seconds": seconds[1:]}
