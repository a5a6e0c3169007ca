"""SIGTERM and SIGINT in, a stop at the next safe point out: between device steps, after what is done was saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EXIT_STATUS = 75
"""Of a run that stopped on request: run the same command again."""


class Stopped(Exception):
    """A run stopped because it was asked to; what was done is saved."""


@dataclass
class _Request:
    signal: int | None = None


_REQUEST = _Request()


def stop_requested() -> bool:
    """Whether a signal asked this process to stop."""
    return _REQUEST.signal is not None


def raise_if_stopped() -> None:
    """Raises `Stopped` where a signal has asked for it; called where nothing would be lost."""
    if stop_requested():
        raise Stopped(signal.Signals(_REQUEST.signal).name)


@contextmanager
def stop_at_safe_points() -> Iterator[None]:
    """Within it the first SIGTERM or SIGINT only asks for a stop; a second one ends the process at once, as always."""

    def ask(number: int, frame) -> None:
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
