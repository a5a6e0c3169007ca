"""Runs a command for another process, and ends it with all that it has started once that process is gone.

Called as `python -I guarded_command.py WORD ...` with a pipe as its standard input, which the other process never
writes to: the pipe ends when that process closes it, exits, or is killed in whatever way. Imports nothing but Python's
own modules, so that it starts at once.
"""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

NOT_STARTED = 127
"""Exit status if the command cannot be started, as of shells."""
END_SECONDS = 10.0
"""Time for the command to end after SIGTERM; what is left then is killed."""
_POLL_SECONDS = 0.1


def main(argv: list[str]) -> int:
    """Runs the command until it exits or standard input ends; returns its exit status, 128 + N if signal N ended it."""
    try:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
        return NOT_STARTED
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        while child.poll() is None:
            if select.select([0], [], [], _POLL_SECONDS)[0] and not os.read(0, 64):
                break
    finally:
        _end_group(child)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Ends the command and the processes of its session's group."""
    deadline = time.monotonic() + END_SECONDS
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            child.poll()
            os.killpg(child.pid, 0)  # raises once the group is empty
            time.sleep(_POLL_SECONDS)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
