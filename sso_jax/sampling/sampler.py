"""Prompts as token ids in, responses as token ids out: sorted by length, cut into padded batches, decoded batch by
batch.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
"""What all prompts of a stage start with is run once, in multiples of this many tokens: few shapes, and nothing for a
few tokens."""


@dataclass(frozen=True)
class Request:
    """A prompt to answer, and the key that makes its response its own."""

    prompt_ids: list[int]
    key: tuple[int, int]


def row_key(seed: int, iteration: int, query_id: str, role: str) -> tuple[int, int]:
    """Random key of one response, two 32-bit words, from what the response is and not from where it stands in a
    batch.
    """
    digest = hashlib.blake2b(f"{seed}\0{iteration}\0{query_id}\0{role}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")


def cut_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Positions of the prompts in batches of like length; what the batches hold follows from the whole list alone."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def shared_prefix(prompts: list[list[int]]) -> list[int]:
    """What all prompts start with, such as few-shot examples, in multiples of PREFIX_STEP; every prompt goes on behind
    it.
    """
    first, last = (
        min(prompts),
        max(prompts),
    )  # in the order of their tokens: what these two share, all between them share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    most = min(same, min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
    return first[: most // PREFIX_STEP * PREFIX_STEP]


def pad_prompts(
    requests: list[Request], batch_size: int, prompt_slots: int, prefix: list[int] | None = None
) -> Prompts:
    """The requests, which all start with `prefix`, as arrays, filled up to `batch_size` rows with unused ones."""
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
    """Length that prompts are padded to where no earlier round left lengths to reuse."""
    return bucket(length)


@dataclass(frozen=True)
class Sampler:
    """A compiled decoder with the settings of a run."""

    generate: Callable[..., Samples]
    mesh: jax.sharding.Mesh
    strategy: SamplingParams
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    max_tokens: int
    """Limit of prompt plus response."""
    batch_size: int
    shardings: dict | None = None
    """Where the parameters lie while sampling, if not where they lie anyway: they are copied there for a stage."""
    layers: str = "auto"
    """How decoding runs the layers, see `unrolls_layers`."""
    journals: Path | None = None
    """Folder that keeps the responses of stages that are not done yet."""
    slots: Callable[[int, str], int] = pad_to_bucket
    """(length of the longest prompt of a batch, what else its program depends on) -> length to which all of them are
    padded."""

    def fits(self, prompt_ids: list[int]) -> bool:
        """Whether a prompt leaves room for at least one token of response."""
        return len(prompt_ids) < self.max_tokens

    def sample(self, params, requests: list[Request], stage: str, max_new_tokens: int | None = None) -> list[list[int]]:
        """Response ids of each request, in the order of the requests, end of turn included where it was reached.

        A response is cut after `max_new_tokens` (the run's where None), or where prompt plus response would pass
        `max_tokens`.

        With `journals` each batch is on disk when it is done, and a stage that was interrupted goes on behind the last
        one.

        Raises:
          InputError: if a prompt leaves no room for a response.
          Stopped: where a stop was asked for, between two batches.
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
        """Where the responses to these requests by this policy are kept while there are more to come."""
        if self.journals is None:
            return None
        settings = [float(number) for number in self.strategy if number is not None]
        whole_list = json.dumps([fingerprint(params), settings, budget, [[r.prompt_ids, r.key] for r in requests]])
        name = hashlib.blake2b(whole_list.encode(), digest_size=12).hexdigest()
        return Journal(self.journals / name, name, jax.process_index())
