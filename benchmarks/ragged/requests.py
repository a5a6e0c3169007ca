"""The requests of `benchmarks.ragged`: random prompts with given limits, or a file's queries by a model's template."""

import argparse
import json
import math
import random
from pathlib import Path

from benchmarks.speed.shapes import SEED, SHAPES

MEAN, SIGMA, CAP = 350, 0.7, 2048
"""Of log-normal responses, in tokens: their mean, the standard deviation of the logarithm, and the most."""


def lengths_of(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Returns (prompt tokens, response tokens) of the requests for random weights."""
    rng = random.Random(SEED)
    if options.equal:
        return [tuple(options.equal)] * options.requests
    if options.lengths is None:
        prompts = [rng.randint(20, 200) for _ in range(options.requests)]
        mu = math.log(MEAN) - SIGMA**2 / 2
        responses = [min(CAP, rng.lognormvariate(mu, SIGMA)) for _ in range(options.requests)]
    else:
        rows = [json.loads(line) for line in Path(options.lengths).read_text(encoding="utf-8").splitlines()]
        drawn = [rng.choice(rows) for _ in range(options.requests)]
        prompts, responses = [row["prompt"] for row in drawn], [min(CAP, rng.choice(row["responses"])) for row in drawn]
    return [
        (max(1, int(p * options.scale)), max(2, int(r * options.scale)))
        for p, r in zip(prompts, responses, strict=True)
    ]


def draw_lengths(
    lengths: str | None, count: int, scale: float, policy: int = 0, sigma: float = SIGMA
) -> list[tuple[int, list[int]]]:
    """Returns the tokens of the prompt and of the three responses of examples.

    Args:
      lengths: file of records with `prompt` and `responses`, or None for log-normal lengths.
      count: number of examples.
      scale: factor of all lengths.
      policy: number of the policy whose responses of the file are taken.
      sigma: standard deviation of the logarithm of log-normal lengths.
    """
    rng = random.Random(SEED)
    if lengths is None:
        mu = math.log(MEAN) - sigma**2 / 2
        drawn = [
            (rng.randint(20, 200), [min(CAP, rng.lognormvariate(mu, sigma)) for _ in range(3)]) for _ in range(count)
        ]
    else:
        rows = [json.loads(line) for line in Path(lengths).read_text(encoding="utf-8").splitlines()]
        drawn = [
            (rng.choice(rows)["prompt"], [min(CAP, rng.choice(rows)["responses"][policy]) for _ in range(3)])
            for _ in range(count)
        ]
    return [(max(1, int(p * scale)), [max(2, int(r * scale)) for r in responses]) for p, responses in drawn]


def kinds_of(lengths: str | None) -> dict[str, dict]:
    """Returns arguments of `draw_lengths` by name: one for each policy of a file, or for each of three sigmas."""
    if lengths is None:
        return {f"log-normal, sigma {sigma}": {"sigma": sigma} for sigma in (0.4, 0.7, 1.0)}
    first = json.loads(Path(lengths).read_text(encoding="utf-8").split("\n", 1)[0])
    return {f"policy {number}": {"policy": number} for number in range(len(first["responses"]))}


def random_requests(options: argparse.Namespace) -> list[tuple[list[int], int]]:
    """Returns (prompt, response tokens) of the requests for random weights."""
    rng = random.Random(SEED)
    return [([rng.randrange(SHAPES[options.shape].vocab_size) for _ in range(p)], r) for p, r in lengths_of(options)]


def model_prompts(options: argparse.Namespace) -> list[list[int]]:
    """Returns the prompts of the queries in the file, by the model's chat template."""
    from sso_jax.data.chat import make_chat
    from sso_jax.data.queries import load_queries
    from sso_jax.data.rows import Table
    from sso_jax.data.tokenizer import load_tokenizer

    queries = load_queries(Table(options.queries, "--queries")).records
    chat = make_chat(load_tokenizer(options.model))
    return [chat.prompt_ids(query.query) for query in queries[: options.requests]]
