"""Samples responses to a list of prompts in padded batches of similar length, with a journal for resuming."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sso_jax.data.buckets import bucket
from sso_jax.models.fingerprint import fingerprint
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.hosts import on_first_process, own_share, stop_now
from sso_jax.runtime.mesh import num_batch_shards, place, replicated
from sso_jax.runtime.progress import progress_bar
from sso_jax.runtime.signals import Stopped
from sso_jax.sampling.decode import prompt_shardings, unrolls_layers
from sso_jax.sampling.journal import Journal
from sso_jax.sampling.prefill import Prompts, Samples
from sso_jax.sampling.sampling_params import SamplingParams

PREFIX_STEP = 64
"""Unit, in tokens, of the shared prefix of a stage's prompts: few shapes, and no tiny prefixes."""


@dataclass(frozen=True)
class Request:
    """A prompt to answer, and the random key of its response."""

    prompt_ids: list[int]
    key: tuple[int, int]


def row_key(seed: int, iteration: int, query_id: str, role: str) -> tuple[int, int]:
    """Returns the random key of a response, two 32-bit words, which does not depend on its place in a batch."""
    digest = hashlib.blake2b(f"{seed}\0{iteration}\0{query_id}\0{role}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


def cut_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Splits prompts into batches of similar length, as indices; depends on the whole list of lengths alone."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def shared_prefix(prompts: list[list[int]]) -> list[int]:
    """Returns the tokens that all prompts start with, such as few-shot examples, in multiples of PREFIX_STEP.

    Every prompt has at least one token after the prefix.
    """
    first, last = min(prompts), max(prompts)  # in lexicographic order, so that all prompts share what these two share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    most = min(same, min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
    return first[: most // PREFIX_STEP * PREFIX_STEP]


def pad_prompts(
    requests: list[Request], batch_size: int, prompt_slots: int, prefix: list[int] | None = None
) -> Prompts:
    """Returns the requests, which all start with `prefix`, as arrays, with unused rows up to `batch_size`."""
    prefix = np.asarray(prefix or [], np.int32)
    tokens = np.zeros((batch_size, prompt_slots), np.int32)
    lengths = np.ones((batch_size,), np.int32)
    keys = np.zeros((batch_size, 2), np.uint32)
    for row, request in enumerate(requests):
        rest = request.prompt_ids[prefix.size :]
        tokens[row, : len(rest)] = rest
        lengths[row] = len(rest)
        keys[row] = request.key
    return Prompts(prefix, tokens, lengths, keys, np.arange(batch_size) < len(requests))


def pad_to_bucket(length: int, kind: str) -> int:
    """Returns the padded length of prompts when there are no earlier rounds whose lengths to reuse."""
    return bucket(length)


@dataclass(frozen=True)
class Sampler:
    """A compiled decoder with the sampling settings of a run."""

    generate: Callable[..., Samples]
    mesh: jax.sharding.Mesh
    strategy: SamplingParams
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    max_tokens: int
    """Maximum tokens of prompt plus response."""
    batch_size: int
    shardings: dict | None = None
    """Shardings of the parameters for sampling, to which they are copied for each stage; None uses their own."""
    layers: str = "auto"
    """Whether decoding unrolls the layers, see `unrolls_layers`."""
    journals: Path | None = None
    """Folder for the responses of unfinished stages; None keeps no journal."""
    slots: Callable[[int, str], int] = pad_to_bucket
    """(longest prompt of a batch, what else its program depends on) -> length that its prompts are padded to."""

    def fits(self, prompt_ids: list[int]) -> bool:
        """Returns whether a prompt leaves room for at least one token of response."""
        return len(prompt_ids) < self.max_tokens

    def sample(
        self, params: dict[str, Any], requests: list[Request], stage: str, max_new_tokens: int | None = None
    ) -> list[list[int]]:
        """Samples one response per request, in the order of the requests, end of turn included if it was reached.

        With `journals`, each batch is on disk when it is done, and an interrupted stage resumes after the last one.

        Args:
          params: the policy's parameters.
          requests: prompts with their random keys.
          stage: title of the progress bar, used in messages too.
          max_new_tokens: maximum tokens of a response; None takes the run's. A response also ends where prompt plus
            response reach `max_tokens`.

        Raises:
          InputError: if a prompt leaves no room for a response.
          Stopped: between two batches, if a stop was requested.
        """
        shards = num_batch_shards(self.mesh)
        batch_size = -(-self.batch_size // shards) * shards
        budget = min(max_new_tokens or self.max_new_tokens, self.max_tokens)
        stops = np.asarray(self.stop_ids, np.int32)
        lengths = [len(request.prompt_ids) for request in requests]
        if not all(self.fits(request.prompt_ids) for request in requests):
            raise InputError(
                f"{stage}: a prompt of {max(lengths)} tokens leaves no room for a response within {self.max_tokens}; "
                "shorten it"
            )
        journal = self._journal(params, requests, budget)
        done = {} if journal is None else {int(i): ids for i, ids in on_first_process(journal.read).items()}
        params = params if self.shardings is None else jax.device_put(params, self.shardings)
        strategy, stops = place((self.strategy, stops), replicated(self.mesh))
        prefix = shared_prefix([request.prompt_ids for request in requests]) if requests else []
        batches = cut_batches(lengths, batch_size)
        platform = self.mesh.devices.flat[0].platform
        unrolled = unrolls_layers(self.layers, platform, len(batches) * budget)
        with progress_bar(stage, len(requests), "response", initial=len(done)) as bar:
            for batch in batches:
                if all(i in done for i in batch):
                    continue
                slots = self.slots(max(lengths[i] for i in batch) - len(prefix), f"{len(prefix)}+{budget}")
                prompts = pad_prompts([requests[i] for i in batch], batch_size, slots, prefix)
                with jax.set_mesh(self.mesh):
                    placed = place(prompts, prompt_shardings(self.mesh))
                    samples = self.generate(params, placed, strategy, stops, budget, unrolled)
                tokens, num_tokens = jax.device_get(samples)
                fresh = {
                    i: tokens[row, : min(num_tokens[row], self.max_tokens - lengths[i])].tolist()
                    for row, i in enumerate(batch)
                }
                done.update(fresh)
                if journal is not None:
                    journal.add(dict(own_share(list(fresh.items()))))
                    if stop_now():
                        raise Stopped(f"a signal in {stage}, after {len(done)} of {len(requests)} responses")
                bar.update(len(batch))
        return [done[i] for i in range(len(requests))]

    def _journal(self, params, requests: list[Request], budget: int) -> Journal | None:
        """Opens the journal of these requests to this policy, or returns None without a folder for journals."""
        if self.journals is None:
            return None
        settings = [float(number) for number in self.strategy if number is not None]
        whole_list = json.dumps([fingerprint(params), settings, budget, [[r.prompt_ids, r.key] for r in requests]])
        name = hashlib.blake2b(whole_list.encode(), digest_size=12).hexdigest()
        return Journal(self.journals / name, name, jax.process_index())
