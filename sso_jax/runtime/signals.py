"""Stops on SIGTERM and SIGINT: at the next safe point, or after a few seconds where no work would be lost.

A machine that is taken away leaves only so many seconds after SIGTERM: a limit ends a longer stop, saved or not.

Python runs its signal handlers between two of its own instructions, so not while XLA compiles or a device step runs. A
thread therefore answers the signals: the first one at once with a line, the second one by ending the process.
"""

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

EXIT_STATUS = 75
"""Exit status of a run that stopped on request; the same command resumes it."""
GRACE_SECONDS = 3.0
"""Time to reach a safe point, after which the process ends where it is unless it holds unsaved work."""
ASKED = "stopping after this step; press Ctrl-C again to stop now"
"""What the first signal is answered with."""
NOTHING_WRITTEN = "nothing was written; run the same command again"
_POLL_SECONDS = 0.05
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run stopped on request; finished work is saved."""


@dataclass(frozen=True)
class Farewell:
    """What the last line of a stopped command says about its work."""

    stopped: str = "all progress is saved, run the same command again"
    """After a stop at a safe point, or where nothing is lost but the step that was running."""
    at_once: str = "its last save is kept, run the same command again"
    """After a second signal, or when the time of a stop was up."""


@dataclass
class _State:
    """What the signals of this process have asked for, and what must be done before it ends."""

    signal: int | None = None
    unsaved: list[None] = field(default_factory=list)
    """An entry for each open `unsaved_work` context, of any thread."""
    joined: bool = False
    """Whether other processes of the run wait for this one, which then stops at safe points only."""
    limit: float | None = None
    """Maximum seconds from SIGTERM to the end of the process."""
    end: float = math.inf
    """When the process ends, saved or not, in seconds of `time.monotonic`."""
    wake_fd: int | None = None
    """Pipe to the thread that answers signals; a zero has it look at `end`."""
    program: str = ""
    farewell: Farewell = field(default_factory=Farewell)


_STATE = _State()


def stop_requested() -> bool:
    """Returns whether a signal has asked this process to stop."""
    return _STATE.signal is not None


def raise_if_stopped() -> None:
    """Raises `Stopped` if a signal has asked for it; call it where no work would be lost."""
    if _STATE.signal is not None:
        raise Stopped(signal.Signals(_STATE.signal).name)


@contextmanager
def unsaved_work() -> Iterator[None]:
    """In this context a stop waits for a safe point, however long that takes; a second signal does not."""
    unsaved = _STATE.unsaved
    unsaved.append(None)
    try:
        yield
    finally:
        unsaved.pop()


def stop_with_others() -> None:
    """Has this process stop at safe points only, because it has joined other processes, which reach them too."""
    _STATE.joined = True


def limit_stops(seconds: float | None) -> None:
    """Has a stop end the process so many seconds after SIGTERM, also where work is unsaved; None waits for it."""
    _STATE.limit = seconds


def start_limit(since: float, spare: float = 0.0) -> None:
    """Starts the limit of a stop; it leaves GRACE_SECONDS at least, so that what is quick is still saved.

    Args:
      since: when the stop was asked for, or may have been at the earliest, in seconds of `time.monotonic`.
      spare: seconds that this process may take longer, because others need it until they have ended.
    """
    if _STATE.limit is not None and _STATE.end == math.inf:
        _STATE.end = max(since + _STATE.limit, time.monotonic() + GRACE_SECONDS) + spare
        if _STATE.wake_fd is not None:
            os.write(_STATE.wake_fd, b"\0")


def say_when_stopped(farewell: Farewell) -> None:
    """Sets what the last line of the command says if it is stopped from now on."""
    _STATE.farewell = farewell


def stop_line(reason: str) -> str:
    """Returns the last line of a command that stopped at a safe point."""
    return f"{_STATE.program}: stopped by {reason}; {_STATE.farewell.stopped}"


def exit_stopped(reason: str) -> None:
    """Ends the process with the last line, without waiting for its threads; returns if it has joined others."""
    if not _STATE.joined:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        _leave(stop_line(reason), EXIT_STATUS)


def end_on_any_signal() -> None:
    """Has a signal end the process without a traceback, where its work is done and only Python's own exit is left."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def stop_at_safe_points(program: str = "", farewell: Farewell = Farewell()) -> Iterator[None]:
    """In this context the first SIGTERM or SIGINT requests a stop, and a second one ends the process.

    A stop that no safe point has seen after GRACE_SECONDS ends the process too, unless there is unsaved work.

    Args:
      program: name at the head of the last line.
      farewell: what the last line says.
    """

    def ask(number: int, frame: FrameType | None) -> None:
        _STATE.signal = _STATE.signal or number

    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    _STATE.signal, _STATE.unsaved, _STATE.joined = None, [], False
    _STATE.limit, _STATE.end, _STATE.wake_fd = None, math.inf, write_end
    _STATE.program, _STATE.farewell = program, farewell
    watcher = threading.Thread(target=_watch, args=(read_end,), daemon=True)
    watcher.start()
    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    fd_before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        _STATE.wake_fd = None
        os.close(write_end)
        watcher.join()
        os.close(read_end)
        _STATE.signal = None


def _watch(read_end: int) -> None:
    """Answers the signals whose numbers arrive in the pipe, until its other end is closed."""
    deadline = None
    while True:
        waits = deadline is None and _STATE.end == math.inf
        ready, _, _ = select.select([read_end], [], [], None if waits else _POLL_SECONDS)
        numbers = os.read(read_end, 64) if ready else None
        if numbers == b"":
            return
        for number in numbers or ():
            if number not in _SIGNALS:
                continue
            if deadline is not None:
                name = signal.Signals(number).name
                _leave(f"{_STATE.program}: stopped at once by {name}; {_STATE.farewell.at_once}", 128 + number)
            deadline = time.monotonic() + GRACE_SECONDS
            _STATE.signal = number
            if number == signal.SIGTERM:
                start_limit(time.monotonic())
            _say(ASKED)
        if deadline is not None and time.monotonic() >= deadline and not _STATE.unsaved and not _STATE.joined:
            _leave(stop_line(signal.Signals(_STATE.signal or signal.SIGTERM).name), EXIT_STATUS)
        if time.monotonic() >= _STATE.end:
            after = f"{_STATE.program}: stopped after {_STATE.limit:g} seconds (checkpoint.stop_seconds), not all saved"
            _leave(f"{after}; {_STATE.farewell.at_once}", EXIT_STATUS)


def _say(line: str) -> None:
    """Writes a line to standard error, below a progress bar on a terminal."""
    with suppress(OSError):
        os.write(2, (("\n" if os.isatty(2) else "") + line + "\n").encode())


def _leave(line: str, status: int) -> None:
    """Ends the process with a last line; nothing else is finished, and no stream is flushed, which might wait."""
    _say(line)
    os._exit(status)
