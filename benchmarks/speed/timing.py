"""Times calls and measures peak memory; optionally takes turns with other processes, call by call."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

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


def _to_next_turn(process: subprocess.Popen) -> str | None:
    """Waits until the process asks for a turn or ends; returns None or its last line.

    Raises:
      SystemExit: if the process fails.
    """
    last = ""
    for line in process.stdout:
        if line.strip() == READY:
            return None
        last = line
    if process.wait():
        raise SystemExit(f"{' '.join(process.args)} failed with exit status {process.returncode}; its error is above")
    return last


def in_turns(commands: dict[str, list[str]]) -> dict[str, dict]:
    """Runs the commands side by side, one call at a time in turn, and returns the results that they print."""
    environment, running, results = {**os.environ, TURNS_VARIABLE: "1"}, {}, {}
    with ExitStack() as stack:
        for cell, parts in commands.items():
            running[cell] = subprocess.Popen(
                parts, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            stack.enter_context(running[cell])
            stack.callback(running[cell].kill)
        started = False  # a process reaches its first turn without being asked
        while running:
            for cell, process in list(running.items()):
                if started:
                    print(file=process.stdin, flush=True)
                last = _to_next_turn(process)
                if last is not None:
                    results[cell] = json.loads(last)
                    del running[cell]
            started = True
    return results
