"""Turns SIGTERM and SIGINT into a stop at the next safe point: between device steps, once finished work is saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT_STATUS = 75
"""Exit status of a run that stopped on request; the same command resumes it."""


class Stopped(Exception):
    """A run stopped on request; finished work is saved."""


@dataclass
class _Request:
    signal: int | None = None


_REQUEST = _Request()


def stop_requested() -> bool:
    """Returns whether a signal has asked this process to stop."""
    return _REQUEST.signal is not None


def raise_if_stopped() -> None:
    """Raises `Stopped` if a signal has asked for it; call it where no work would be lost."""
    if _REQUEST.signal is not None:
        raise Stopped(signal.Signals(_REQUEST.signal).name)


@contextmanager
def stop_at_safe_points() -> Iterator[None]:
    """In this context the first SIGTERM or SIGINT only requests a stop; a second one acts at once, as usual."""

    def ask(number: int, frame: FrameType | None) -> None:
        if not stop_requested():
            _REQUEST.signal = number
            return
        for name, handler in before.items():
            signal.signal(name, handler)
        signal.raise_signal(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        _REQUEST.signal = None
        for number, handler in before.items():
            signal.signal(number, handler)
