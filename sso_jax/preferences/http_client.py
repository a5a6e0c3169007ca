"""Client of an OpenAI-compatible server that limits its rate, retries, and says why a request failed."""

import difflib
import email.utils
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx2

from sso_jax.runtime.errors import InputError

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
"""Waits before retries: doubled from the first up to the longest, each times a random factor in [1/2, 1]."""
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""HTTP statuses of transient failures, which are retried."""
HEALTH_SECONDS = 5.0
"""Longest wait for a server to say whether it is ready."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that are reached without the proxy of the environment."""


class ClientFields(NamedTuple):
    """The config fields that error messages name."""

    url: str = "endpoint.url"
    model: str = "endpoint.model"
    key_variable: str = "endpoint.key_variable"
    timeout_seconds: str = "endpoint.timeout_seconds"


class Failure(Exception):
    """An attempt without an answer; `passing` is whether to retry, `wait_seconds` the wait that the server asked for.

    `detail` is what the server said.
    """

    def __init__(self, reason: str, passing: bool = True, wait_seconds: float | None = None, detail: str = ""):
        super().__init__(reason)
        self.reason, self.passing, self.wait_seconds, self.detail = reason, passing, wait_seconds, detail


class Outcome(NamedTuple):
    """What became of a request: the values of its answer, or None and, in `lost`, the reason."""

    values: dict[str, Any] | None
    lost: str | None = None
    detail: str = ""
    """What the server said about a lost one."""


Read = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""(JSON of the server, body of the request) -> the values to keep; raises `Failure`, or an error that ends the work."""


def retry_after_seconds(header: str | None, now: float) -> float | None:
    """Returns the wait that a Retry-After header requests, as a number or a date (RFC 9110, 10.2.3), or None.

    Args:
      header: value of the header; None if it is missing.
      now: present time, in seconds since the epoch.
    """
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except ValueError:
        return None


@dataclass
class _Pace:
    """Rate limiter: at most `per_minute` requests, and none before the time that the server requested."""

    per_minute: float | None
    free_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def turn(self) -> float:
        """Reserves the next free slot; returns the seconds until it starts."""
        with self.lock:
            moment = max(time.monotonic(), self.free_at)
            self.free_at = moment + (60.0 / self.per_minute if self.per_minute else 0.0)
            return moment - time.monotonic()

    def hold(self, seconds: float) -> None:
        """Blocks all requests for this long."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic() + seconds)


class HttpClient:
    """Client of an OpenAI-compatible server; the API key is kept here only."""

    def __init__(
        self,
        url: str,
        fields: ClientFields = ClientFields(),
        key_variable: str | None = None,
        timeout_seconds: float = 120.0,
        retries: int = 5,
        requests_per_minute: float | None = None,
        concurrency: int = 8,
    ):
        """Prepares a client; nothing is sent yet.

        Args:
          url: base URL, such as http://localhost:8000/v1.
          fields: names of the config fields for messages.
          key_variable: environment variable that holds the API key; None for none.
          timeout_seconds: maximum time to wait for the server to answer, or to continue an answer.
          retries: retries of a request after a transient failure.
          requests_per_minute: maximum rate; None for no limit.
          concurrency: maximum number of concurrent requests.
        """
        self.url, self.fields, self._key_variable = url.rstrip("/"), fields, key_variable
        self.retries, self.concurrency = retries, concurrency
        key = os.environ.get(key_variable, "").strip() if key_variable else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=concurrency)
        proxied = urllib.parse.urlsplit(url).hostname not in LOOPBACK
        self._client = httpx2.Client(headers=headers, timeout=timeout_seconds, limits=limits, trust_env=proxied)
        self._pace = _Pace(requests_per_minute)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def is_healthy(self) -> bool:
        """Returns whether the server says that it is ready: at /health, or where it has none by listing its models."""
        root = self.url.removesuffix("/v1")
        try:
            status = self._client.get(f"{root}/health", timeout=HEALTH_SECONDS).status_code
            if status == 404:
                status = self._client.get(f"{self.url}/models", timeout=HEALTH_SECONDS).status_code
        except httpx2.HTTPError:
            return False
        return status == 200

    def find_model(self, wanted: str | None) -> str:
        """Returns the name of the model to ask for.

        Args:
          wanted: name of the model; None takes the server's model if it lists exactly one.

        Raises:
          InputError: if the server does not answer, rejects the key, is not OpenAI-compatible, or lacks the model.
        """
        try:
            response = self._client.get(f"{self.url}/models")
        except httpx2.TimeoutException as error:
            raise InputError(
                f"{self.fields.url}: {self.url} timed out; start the server or raise {self.fields.timeout_seconds}"
            ) from error
        except httpx2.HTTPError as error:
            raise InputError(
                f"{self.fields.url}: {self.url} cannot be reached ({error}); start the server or fix the address"
            ) from error
        self._refuse_status(response)
        try:
            listed = [row["id"] for row in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            if wanted is not None and response.status_code == 404:
                return wanted  # some servers answer questions but do not list models
            raise InputError(
                f"{self.fields.url}: {self.url}/models returned {response.status_code} and lists no models; "
                "give the base URL of an OpenAI-compatible server, which often ends with /v1"
            ) from error
        if wanted is None and len(listed) == 1:
            return listed[0]
        if wanted is None or wanted not in listed:
            near = difflib.get_close_matches(wanted or "", listed, n=3) or listed[:5]
            raise InputError(
                f"{self.fields.model}: {wanted!r} is not a model of {self.url}; give one of its {len(listed)} models, "
                f"such as {near}"
            )
        return wanted

    def _refuse_status(self, response: httpx2.Response) -> None:
        """Raises `InputError` for statuses that no retry will fix: a rejected key, a wrong URL."""
        if response.status_code in (401, 403) and self._key_variable is None:
            raise InputError(
                f"{self.fields.key_variable}: {self.url} returned {response.status_code} without a key; name the "
                "environment variable that holds one"
            )
        if response.status_code in (401, 403):
            raise InputError(
                f"{self.fields.key_variable}: {self.url} returned {response.status_code} for the key in "
                f"{self._key_variable}; set that environment variable to a key of the server"
            )
        if response.status_code == 404 and not response.url.path.endswith("/models"):
            raise InputError(
                f"{self.fields.url}: {response.url} returned 404; give the base URL, which often ends with /v1, and a "
                "model of that server"
            )

    def exchange(self, path: str, body: dict[str, Any], read: Read, stopped: threading.Event) -> Outcome:
        """Sends a request until there is an answer, a permanent failure, no retry left, or `stopped` is set.

        Args:
          path: path below the base URL.
          body: JSON of the request.
          read: takes the values from the server's JSON.
          stopped: ends the waits.
        """
        wait = FIRST_WAIT_SECONDS
        for attempt in range(self.retries + 1):
            stopped.wait(self._pace.turn())
            if stopped.is_set():
                return Outcome(None, "stopped")
            try:
                return Outcome(read(self._post(path, body), body))
            except Failure as failure:
                if not failure.passing or attempt == self.retries:
                    return Outcome(None, failure.reason, failure.detail)
                if failure.wait_seconds is not None:
                    self._pace.hold(min(failure.wait_seconds, LONGEST_WAIT_SECONDS))
                else:
                    stopped.wait(wait * random.uniform(0.5, 1.0))
                    wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        raise AssertionError("unreachable")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """Sends a request once and returns the server's JSON; raises `Failure`."""
        try:
            response = self._client.post(f"{self.url}/{path}", json=body)
        except httpx2.TimeoutException as error:
            raise Failure("timeout") from error
        except httpx2.HTTPError as error:
            raise Failure("unreachable") from error
        self._refuse_status(response)
        if response.status_code != 200:
            other = "server_error" if response.status_code >= 500 else "refused"
            reason = "rate_limited" if response.status_code == 429 else other
            wait = retry_after_seconds(response.headers.get("Retry-After"), time.time())
            said = f"{response.status_code}: {' '.join(response.text.split())[:200]}"
            raise Failure(reason, response.status_code in PASSING, wait, said)
        try:
            return response.json()
        except ValueError as error:
            raise Failure("no_text") from error
