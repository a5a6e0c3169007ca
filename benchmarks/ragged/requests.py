"""The requests of `benchmarks.ragged`: random prompts with given limits, or a file's queries by a model's template."""

import argparse
import json
import math
import random
from pathlib import Path

from benchmarks.speed.shapes import SEED, SHAPES

MEAN, SIGMA, CAP = 350, 0.7, 2048


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
