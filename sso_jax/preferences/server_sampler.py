"""Samples responses by a server of the policy, whose weights are checked by the log-probs of its responses."""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sso_jax.config import SamplingConfig
from sso_jax.data.records import evenly_spaced
from sso_jax.models.fingerprint import fingerprint
from sso_jax.preferences.completions import PATH, completion_body, read_completion
from sso_jax.preferences.gathering import Asked, Gathering, kept_answers
from sso_jax.preferences.policy_server import PolicyServer, server_field
from sso_jax.runtime.checksums import json_digest
from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.hosts import is_first, on_first_process, stop_now
from sso_jax.runtime.json_lines import with_shared
from sso_jax.runtime.progress import progress_bar
from sso_jax.runtime.signals import Stopped
from sso_jax.sampling.sampler import Request, Sampler, Samples
from sso_jax.sampling.stage import SamplingStats
from sso_jax.training.scoring import Scorable

CHECKED_RESPONSES, CHECKED_TOKENS = 20, 64
"""Number of responses whose log-probs are compared with our own, and their maximum length."""
AS_THEY_ARE = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
"""Settings at which every server's log-probs are those of the model itself."""
KEY_BYTES = 12
"""Bytes of the digest by which a response is found in the journal: of the policy and the request, not the server."""
SLICE_SECONDS = 1.0
"""How often all processes look for a stop while the first one waits for the server."""
log = logging.getLogger(__name__)


class WeightCheck(NamedTuple):
    """How far the log-probs of a server are from our own, in nats a token."""

    num_responses: int
    num_tokens: int
    mean_difference: float
    """Mean of the absolute differences."""
    largest_difference: float


@dataclass
class ServerSampler:
    """Samples like a `Sampler`, by a server that it starts for each stage; only the first process talks to it."""

    own: Sampler
    """Our own sampler, whose settings the server gets."""
    config: SamplingConfig
    """Section `sampling`."""
    retries: int
    """Retries of a request after a transient failure."""
    folder: Callable[[], Path]
    """Returns the folder of the policy, which it may have to write first."""
    log_probs: Callable[[dict[str, Any], list[Scorable]], list[list[float]]]
    """(parameters, examples with one prompt and one response) -> our own log-probs of the responses' tokens."""
    journal: Path
    """File to which responses are appended as they arrive."""
    output: Path
    """File for what a started server prints."""
    checks: list[WeightCheck] = field(default_factory=list)
    """What was found for each server that was started or reached."""

    def fits(self, prompt_ids: list[int]) -> bool:
        """Returns whether a prompt leaves room for at least one token of response."""
        return self.own.fits(prompt_ids)

    def sample(self, params: dict[str, Any], requests: list[Request], stage: str) -> Samples:
        """Samples one response per request; see `Sampler.sample`.

        The server gets temperature, top_p, top_k and, for each request, a seed of its random key. Responses that the
        journal has are not sampled again; if it has all, no server is started.

        Args:
          params: the policy's parameters, which the server must have as well.
          requests: prompts with their random keys.
          stage: title of the progress bars, used in messages too.

        Raises:
          InputError: if the server cannot be started or reached, returns text alone, or has other weights.
          RunError: if the server ends while it samples, or responses are lost. Those that came are kept.
          Stopped: if a stop was requested.
        """
        self.own.require_room(requests, stage)
        start, weights = time.perf_counter(), fingerprint(params)
        settings = self.config.temperature, self.config.top_p, self.config.top_k
        limits = self.own.limits(requests, self.own.max_new_tokens)
        bodies = [
            completion_body(r, limit, settings, self.own.stop_ids) for r, limit in zip(requests, limits, strict=True)
        ]
        asked = [Asked(json_digest([weights, body], (), KEY_BYTES), body, {}) for body in bodies]
        kept = on_first_process(lambda: [one["ids"] for one in kept_answers(self.journal, asked).values()])
        responses = kept if len(kept) == len(requests) else self._by_server(params, asked, stage)
        num_tokens = sum(map(len, responses)) - sum(map(len, kept))
        cut = [ids[-1] not in self.own.stop_ids for ids in responses]
        return Samples(responses, cut, SamplingStats(num_tokens, time.perf_counter() - start))

    def _by_server(self, params: dict[str, Any], asked: list[Asked], stage: str) -> list[list[int]]:
        """Starts the server, checks its weights, samples what the journal lacks, and stops the server."""
        server = PolicyServer(self.config, self.retries, self.folder(), self.output)
        try:
            on_first_process(server.start)
            self._wait(server, f"{stage}: start of the server")
            model = on_first_process(lambda: server.model)
            requests = [one._replace(body={**one.body, "model": model}) for one in asked]
            self._check(server, params, requests, stage)
            answers = self._gather(server, requests, stage, self.journal)
            return [with_shared(answer["ids"]) for answer in answers]
        finally:
            server.stop()

    def _wait(self, server: PolicyServer, stage: str) -> None:
        """Waits until the server is healthy."""
        limit = int(self.config.server_start_seconds)
        with progress_bar(stage, limit, "s") if is_first() else nullcontext() as bar:
            while (waited := on_first_process(lambda: server.wait(SLICE_SECONDS))) is not None:
                if bar is not None:
                    bar.update(int(waited) - bar.n)
                if stop_now():
                    raise Stopped(f"a signal in {stage}")

    def _gather(
        self, server: PolicyServer, asked: list[Asked], stage: str, journal: Path | None
    ) -> list[dict[str, Any]]:
        """Returns the server's answers in the order of the requests."""
        gathering = Gathering(server.connection(), PATH, asked, self._read, stage, journal) if is_first() else None

        def advance() -> list[Any]:
            assert gathering is not None  # called on the first process only
            try:
                done = gathering.advance(SLICE_SECONDS)
            except InputError:
                server.require_running(gathering.num_kept)
                raise
            if not done:
                server.require_running(gathering.num_kept)
            return [done, gathering.num_kept]

        try:
            done = False
            while not done:
                done, num_kept = on_first_process(advance)
                if not done and stop_now():
                    raise Stopped(f"a signal in {stage}, after {num_kept} of {len(asked)} responses")
            return on_first_process(lambda: _answers(gathering, server))
        except BaseException:
            server.stop()  # ends what is under way, which closing waits for
            raise
        finally:
            if gathering is not None:
                gathering.close()

    def _read(self, payload: Any, body: dict[str, Any]) -> dict[str, Any]:
        """Returns the values of an answer, whose ids are tokens of the model (see `read_completion`)."""
        server = server_field(self.config)
        values = read_completion(payload, body, server)
        if self.own.known_tokens is not None:
            self.own.known_tokens.require(values["ids"], f"{server}: a response of the server")
        return values

    def _check(self, server: PolicyServer, params: dict[str, Any], requests: list[Asked], stage: str) -> None:
        """Raises `InputError` if the server's log-probs of its responses to some requests are not our own."""
        bodies = [_checked_body(one.body) for one in evenly_spaced(requests, CHECKED_RESPONSES)]
        asked = [Asked("", body, {}) for body in bodies]
        answers = self._gather(server, asked, f"{stage}: check of the server's weights", None)
        theirs = [answer["log_probs"] for answer in answers]
        items = [
            Scorable({"plain": body["prompt"]}, {"response": answer["ids"]})
            for body, answer in zip(bodies, answers, strict=True)
        ]
        ours = self.log_probs(params, items)
        gaps = np.concatenate(
            [np.abs(np.subtract(their, our[: len(their)])) for their, our in zip(theirs, ours, strict=True)]
        )
        found = WeightCheck(len(answers), gaps.size, float(gaps.mean()), float(gaps.max()))
        said = (
            f"log-probs of {found.num_responses} of its responses ({found.num_tokens} tokens) differ from our own by "
            f"{found.mean_difference:.2g} nats a token in mean, at most by {found.largest_difference:.2g}"
        )
        if not found.mean_difference <= self.config.server_tolerance:
            raise InputError(
                f"{server_field(self.config)}: the server has other weights than {server.folder}: {said}; "
                f"sampling.server_tolerance allows {self.config.server_tolerance:g}; have it serve that folder, and "
                "run the same command again"
            )
        self.checks.append(found)
        if is_first():
            log.info("%s: the server has the policy's weights: %s", stage, said)


def _checked_body(body: dict[str, Any]) -> dict[str, Any]:
    """Returns the request with log-probs, short, and sampled from the model's own distribution."""
    return {**body, **AS_THEY_ARE, "logprobs": 1, "max_tokens": min(body["max_tokens"], CHECKED_TOKENS)}


def _answers(gathering: Gathering | None, server: PolicyServer) -> list[dict[str, Any]]:
    """Returns all answers; raises `RunError` if some are lost."""
    assert gathering is not None  # called on the first process only
    outcomes = [gathering.outcomes[i] for i in range(gathering.num_done)]
    lost = [outcome for outcome in outcomes if outcome.values is None]
    if lost:
        server.require_running(len(outcomes) - len(lost))
        said = f" ({lost[0].detail})" if lost[0].detail else ""
        raise RunError(
            f"{server_field(server.config)}: {len(lost)} of {len(outcomes)} responses are lost, the first as "
            f"{lost[0].lost}{said}; the others are kept, run the same command again for the lost ones"
        )
    return [outcome.values for outcome in outcomes if outcome.values is not None]
