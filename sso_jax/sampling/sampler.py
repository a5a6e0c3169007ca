"""Samples one response per request: slots that end are filled again, and finished responses are journaled."""

import hashlib
import logging
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from sso_jax.models.fingerprint import fingerprint
from sso_jax.models.known_tokens import KnownTokens
from sso_jax.models.paged_cache import page_size_of
from sso_jax.runtime.checksums import json_digest
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.hosts import each_from_first, own_share, stop_now
from sso_jax.runtime.journal import Journal
from sso_jax.runtime.mesh import num_batch_shards
from sso_jax.runtime.progress import progress_bar
from sso_jax.runtime.signals import Stopped
from sso_jax.runtime.spool import Arrivals
from sso_jax.sampling.decode import SamplerPrograms, unrolls_layers
from sso_jax.sampling.sampling_params import SamplingParams
from sso_jax.sampling.slots import Size, Slots, queue_order
from sso_jax.sampling.stage import Request, SamplingStats, Stage, pool_shape, total_stats

log = logging.getLogger(__name__)

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
"""What XLA's errors say if a device's memory is too small."""


class Samples(NamedTuple):
    """Responses in the order of their requests, end of turn included if it was reached, and what they cost."""

    responses: Sequence[list[int]]
    cut: list[bool]
    """Whether each response reached its limit without an end of turn."""
    stats: SamplingStats


def role_numbers(samples: Sequence[Samples], roles: Sequence[Sequence[str]]) -> dict[str, dict[str, float | None]]:
    """Returns the numbers of each role's responses.

    These are the share of responses that were cut at the limit, the mean and the 90th percentile of their tokens, and
    the share of row-steps used in the stages.

    Args:
      samples: responses of one stage or several.
      roles: role of each response.
    """
    share = total_stats(each.stats for each in samples).share_used
    lengths: dict[str, array[int]] = {}
    num_cut: Counter[str] = Counter()
    for each, own in zip(samples, roles, strict=True):
        for role, response, cut in zip(own, each.responses, each.cut, strict=True):
            lengths.setdefault(role, array("q")).append(len(response))
            num_cut[role] += cut
    return {
        role: {
            "cut": num_cut[role] / len(own),
            "mean_tokens": float(np.mean(own)),
            "p90_tokens": float(np.percentile(own, 90)),
            "row_steps_used": share,
        }
        for role, own in lengths.items()
    }


def row_key(seed: int, iteration: int, query_id: str, role: str) -> tuple[int, int]:
    """Returns the random key of a response, two 32-bit words, which does not depend on its place in a batch."""
    digest = hashlib.blake2b(f"{seed}\0{iteration}\0{query_id}\0{role}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


class ResponseSampler(Protocol):
    """What samples responses: a `Sampler`, or a server of the policy."""

    def fits(self, prompt_ids: list[int]) -> bool:
        """Returns whether a prompt leaves room for at least one token of response."""

    def sample(self, params: dict[str, Any], requests: Sequence[Request], stage: str) -> Samples:
        """Samples one response per request; see `Sampler.sample`."""


@dataclass(frozen=True)
class Sampler:
    """A compiled decoder with the sampling settings of a run."""

    programs: SamplerPrograms
    mesh: jax.sharding.Mesh
    strategy: SamplingParams
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    max_tokens: int
    """Maximum tokens of prompt plus response."""
    num_slots: int
    """Responses that are sampled at the same time."""
    shardings: dict | None = None
    """Shardings of the parameters for sampling, to which they are copied for each stage; None uses their own."""
    known_tokens: KnownTokens | None = None
    """The tokens that prompts may have; None does not check them."""
    layers: str = "auto"
    """Whether decoding unrolls the layers, see `unrolls_layers`."""
    journals: Path | None = None
    """Folder for the responses of unfinished stages; None keeps no journal."""
    history: list[SamplingStats] = field(default_factory=list)
    """What each stage so far has cost."""

    def fits(self, prompt_ids: list[int]) -> bool:
        """Returns whether a prompt leaves room for at least one token of response."""
        return len(prompt_ids) < self.max_tokens

    def require_room(self, requests: Sequence[Request], stage: str) -> None:
        """Raises `InputError` if a prompt leaves no room for a response, or has a token that the model does not know.

        Args:
          requests: prompts to answer.
          stage: named in the message.
        """
        if not all(self.fits(request.prompt_ids) for request in requests):
            longest = max(len(request.prompt_ids) for request in requests)
            raise InputError(
                f"{stage}: a prompt of {longest} tokens leaves no room for a response within {self.max_tokens}; "
                "shorten it"
            )
        if self.known_tokens is not None:
            for request in requests:
                self.known_tokens.require(request.prompt_ids, f"{stage}: a prompt")

    def limits(self, requests: Sequence[Request], budget: int) -> list[int]:
        """Returns the maximum tokens of each response: `budget`, or fewer by its own limit and the room left."""
        return [min(budget, r.limit or budget, self.max_tokens - len(r.prompt_ids)) for r in requests]

    def sample(
        self, params: dict[str, Any], requests: Sequence[Request], stage: str, max_new_tokens: int | None = None
    ) -> Samples:
        """Samples one response per request.

        A response depends on its request, the parameters, the settings and the number of slots alone: not on the other
        requests, nor on when it was sampled. With `journals`, each response is on disk soon after it has ended, and an
        interrupted stage resumes with the others. If the devices' memory is too small, the number of slots is halved.

        Args:
          params: the policy's parameters.
          requests: prompts with their random keys.
          stage: title of the progress bar, used in messages too.
          max_new_tokens: maximum tokens of a response; None takes the run's. A response also ends where prompt plus
            response reach `max_tokens`.

        Raises:
          InputError: if a prompt leaves no room for a response, or has a token that the model does not know.
          Stopped: between two windows of decode steps, if a stop was requested.
        """
        budget = max_new_tokens or self.max_new_tokens
        self.require_room(requests, stage)
        journal = self._journal(params, requests, budget)
        done = Arrivals[list[int]](len(requests), () if journal is None else each_from_first(journal.read))
        params = params if self.shardings is None else jax.device_put(params, self.shardings)
        num_slots, stats = self.num_slots, SamplingStats()
        while len(done) < len(requests):
            try:
                stats = self._run(params, requests, budget, num_slots, done, journal, stage)
            except jax.errors.JaxRuntimeError as error:
                if OUT_OF_MEMORY not in str(error) or num_slots <= num_batch_shards(self.mesh):
                    raise
                log.warning("%s: too little memory for %d slots; trying half of them", stage, num_slots)
                num_slots = -(-num_slots // 2)
        responses = done.in_order()
        self.history.append(stats)
        return Samples(responses, [ids[-1] not in self.stop_ids for ids in responses], stats)

    def _run(
        self,
        params: dict[str, Any],
        requests: Sequence[Request],
        budget: int,
        num_slots: int,
        done: Arrivals[list[int]],
        journal: Journal | None,
        stage: str,
    ) -> SamplingStats:
        """Samples what is not in `done`, adds it there, and returns what it has cost."""
        limits = self.limits(requests, budget)
        sizes = [Size(len(r.prompt_ids), limit) for r, limit in zip(requests, limits, strict=True)]
        platform = self.mesh.devices.flat[0].platform
        shape = pool_shape(sizes, num_slots, num_batch_shards(self.mesh), page_size_of(platform))
        num_steps = -(-len(requests) // shape.num_slots) * budget
        unrolled = unrolls_layers(self.layers, platform, num_steps)
        slots = Slots(sizes, queue_order(sizes, done), shape)
        sampling = self.strategy, np.asarray(self.stop_ids, np.int32)
        with progress_bar(stage, len(requests), "response", initial=len(done)) as bar, jax.set_mesh(self.mesh):
            weights = self.programs.prepare(params, unrolled)
            running = Stage(self.programs, self.mesh, weights, requests, slots, sampling)
            for ended in running.run():
                done.update(ended.items())
                bar.update(len(ended))
                if ended and journal is not None:
                    journal.add(dict(own_share(list(ended.items()))))
                if stop_now():
                    raise Stopped(f"a signal in {stage}, after {len(done)} of {len(requests)} responses")
        return running.stats()

    def _journal(self, params, requests: Sequence[Request], budget: int) -> Journal | None:
        """Opens the journal of these requests to this policy, or returns None without a folder for journals."""
        if self.journals is None:
            return None
        settings = [float(number) for number in self.strategy if number is not None]
        rows = ([r.prompt_ids, r.key, r.limit] for r in requests)
        name = json_digest([fingerprint(params), settings, budget], rows, 12)
        return Journal(self.journals / name, name, jax.process_index())
