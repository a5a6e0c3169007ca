"""Gathers a server's answers to a list of requests, several at a time, with a journal from which it resumes."""

import json
import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sso_jax.preferences.http_client import HttpClient, Outcome, Read
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import is_remote
from sso_jax.runtime.json_lines import load_json
from sso_jax.runtime.progress import progress_bar
from sso_jax.runtime.signals import stop_requested

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """A request."""

    key: str
    """What its answer is found by in a journal."""
    body: dict[str, Any]
    label: dict[str, Any]
    """Further fields of its line in the journal."""


class Gathering:
    """Answers to a list of requests, from a journal or the server; `close` it."""

    def __init__(
        self, client: HttpClient, path: str, asked: Sequence[Asked], read: Read, stage: str, journal: Path | None
    ):
        """Reads the journal, and starts asking the server.

        Args:
          client: client of the server.
          path: path below the base URL.
          asked: the requests.
          read: takes the values from the server's JSON.
          stage: title of the progress bar.
          journal: JSON Lines file to which answers are appended as they arrive, and whose answers are not asked for
            again.
        """
        self._client, self._asked, self._journal = client, asked, journal
        self.outcomes = {i: Outcome(values) for i, values in kept_answers(journal, asked).items()}
        if self.outcomes:
            log.info("%s: %d of %d answers are already in the journal", stage, len(self.outcomes), len(asked))
        self._path, self._read = path, read
        self._stopped = threading.Event()
        self._arrived: queue.SimpleQueue[Future[tuple[int, Outcome]]] = queue.SimpleQueue()
        self._failures_in_row = 0
        self._bar = progress_bar(stage, len(asked), "answer", initial=len(self.outcomes))
        self._pool = ThreadPoolExecutor(client.concurrency)
        for i in range(len(asked)):
            if i not in self.outcomes:
                self._pool.submit(self._exchange, i).add_done_callback(self._arrived.put)

    @property
    def num_done(self) -> int:
        """Number of requests that are done, answered or not."""
        return len(self.outcomes)

    @property
    def num_kept(self) -> int:
        """Number of requests that have an answer."""
        return sum(outcome.values is not None for outcome in self.outcomes.values())

    def advance(self, seconds: float) -> bool:
        """Takes what arrives within so many seconds; returns whether all requests are done.

        Raises:
          InputError: if the server rejects the key, or so many requests in a row fail that it must be unavailable.
            Earlier answers are in the journal.
        """
        deadline = time.monotonic() + seconds
        while self.num_done < len(self._asked):
            try:
                self._take(*self._arrived.get(timeout=max(0.0, deadline - time.monotonic())).result())
            except queue.Empty:
                return False
        return True

    def _exchange(self, i: int) -> tuple[int, Outcome]:
        return i, self._client.exchange(self._path, self._asked[i].body, self._read, self._stopped)

    def _take(self, i: int, outcome: Outcome) -> None:
        self.outcomes[i] = outcome
        if outcome.values is not None:
            _append(self._journal, {"key": self._asked[i].key, **self._asked[i].label, **outcome.values})
        self._failures_in_row = self._failures_in_row + 1 if outcome.values is None else 0
        self._refuse_silence(outcome)
        self._bar.update()

    def _refuse_silence(self, last: Outcome) -> None:
        """Raises `InputError` if so many requests failed in a row that the server must be down or refuse them all."""
        client, failed = self._client, self._failures_in_row
        if failed >= min(max(8, 2 * client.concurrency), len(self._asked)):
            said = f", at last with {last.detail}" if last.detail else ""
            raise InputError(
                f"{client.fields.url}: {client.url} failed {failed} questions in a row ({last.lost}){said}; "
                f"{self.num_kept} of {len(self._asked)} answers are kept; run the same command again to resume "
                "from there"
            )

    def close(self) -> None:
        """Cancels what has not been sent; waits for what is under way unless a stop was requested."""
        self._stopped.set()
        self._pool.shutdown(wait=not stop_requested(), cancel_futures=True)
        self._bar.close()


def kept_answers(journal: Path | None, asked: Sequence[Asked]) -> dict[int, dict[str, Any]]:
    """Returns the values of the requests that a journal answers, by index; skips truncated lines."""
    if journal is None or not journal.is_file():
        return {}
    rows = {}
    for line in journal.read_bytes().decode("utf-8", errors="replace").split("\n"):
        try:
            row = load_json(line)
            rows[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return {i: rows[one.key] for i, one in enumerate(asked) if one.key in rows}


def _append(path: Path | None, row: dict) -> None:
    """Appends a row as a line; the newline comes first, so that a truncated line before it does not spoil this one."""
    if path is not None and not is_remote(path):  # an object store cannot append: a stage is repeated from its start
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(row, ensure_ascii=False))
