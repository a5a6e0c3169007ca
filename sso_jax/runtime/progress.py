"""Progress of long stages: a tqdm bar on a terminal, a line every ten seconds elsewhere."""

import sys
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm


class _LineBar(tqdm):
    """tqdm for logs: prints each update on its own line."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        def print_line(text: str) -> None:
            if text.strip():
                file.write(text.strip() + "\n")
                file.flush()

        return print_line


def progress_bar(description: str, total: int, unit: str, initial: int = 0) -> tqdm:
    """Creates a progress bar over `total` units with rate and time left; use it in a `with` and call `update(n)`."""
    if sys.stderr.isatty():
        return tqdm(desc=description, total=total, unit=unit, initial=initial, dynamic_ncols=True)
    return _LineBar(
        desc=description, total=total, unit=unit, initial=initial, mininterval=10, ncols=100, leave=False, delay=10
    )
