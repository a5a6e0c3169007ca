"""The orders of `benchmarks.ragged`: windows of sampling stages whose requests wait in this order or that.

Each query of a file of lengths has three responses, which stand for the roles of a round. Orders are longest first, by

- prompt: the prompt's length, as the sampler has it (`queue_order`).
- role: the mean length of the role, which a run knows from the round before, then the prompt's length.
- other: the length of another response to the same query, which is closer than any length of another round's queries.
- true: the response's own length, which nobody knows.

`given` is query by query.
"""

import json
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.ragged.requests import CAP
from benchmarks.ragged.slots import ACCELERATOR, BATCHES, count
from benchmarks.speed.shapes import SEED
from sso_jax.sampling.slots import Size, queue_order

SHUFFLES = 10
"""Orders of the queries that a stage of a whole file is simulated in."""
ORDERS = ("given", "role", "other", "true")
"""What is compared with `prompt`."""
Queries = Sequence[tuple[int, Sequence[int]]]
"""(prompt tokens, response tokens) of each query."""


def read_queries(path: str) -> list[tuple[int, list[int]]]:
    """Returns the queries of a file of lengths, each response cut at CAP."""
    rows = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    return [(row["prompt"], [min(CAP, length) for length in row["responses"]]) for row in rows]


def queues(queries: Queries) -> dict[str, list[int]]:
    """Returns the order of the requests, by the names above; request i is response i modulo their number of a query."""
    requests = _requests(queries)
    prompts, lengths = zip(*requests, strict=True)
    of_query = [responses for _, responses in queries for _ in responses]
    roles = [role for _, responses in queries for role in range(len(responses))]
    means = [statistics.mean(responses) for responses in zip(*(responses for _, responses in queries), strict=True)]

    def longest_first(*keys: Sequence[float]) -> list[int]:
        return sorted(range(len(requests)), key=lambda i: (*(-key[i] for key in keys), i))

    others = [responses[(role + 1) % len(responses)] for responses, role in zip(of_query, roles, strict=True)]
    return {
        "prompt": queue_order([Size(prompt, CAP) for prompt in prompts]),
        "given": list(range(len(requests))),
        "role": longest_first([means[role] for role in roles], prompts),
        "other": longest_first(others, prompts),
        "true": longest_first(lengths),
    }


def _requests(queries: Queries) -> list[tuple[int, int]]:
    return [(prompt, length) for prompt, responses in queries for length in responses]


def stages(queries: Queries, num_requests: int) -> Iterator[Queries]:
    """Yields the queries of stages: shuffles of all there are, or one longer stage of queries drawn from them."""
    rng, num_queries = random.Random(SEED), -(-num_requests // len(queries[0][1]))
    if num_queries > len(queries):
        yield rng.choices(queries, k=num_queries)
        return
    for _ in range(SHUFFLES):
        yield rng.sample(queries, num_queries)


def print_orders(path: str, num_requests: int) -> None:
    """Prints a Markdown table of stages of the whole file and of so many requests, row by row."""
    queries = read_queries(path)
    print(f"| requests | slots | windows by prompt | {' | '.join(ORDERS)} | restarts of true |\n" + "|---" * 8 + "|")
    for size in (sum(len(responses) for _, responses in queries), num_requests):
        for batch in (batch for batch in BATCHES if batch[1] == 1):
            runs = [
                {name: count(_requests(own), batch, ACCELERATOR, queue) for name, queue in queues(own).items()}
                for own in stages(queries, size)
            ]
            shares = [[run[name].windows / run["prompt"].windows for run in runs] for name in ORDERS]
            told = " | ".join(f"{statistics.mean(own):.3f} ± {statistics.pstdev(own):.3f}" for own in shares)
            windows, restarts = (
                statistics.mean(numbers)
                for numbers in ([run["prompt"].windows for run in runs], [run["true"].restarts for run in runs])
            )
            print(f"| {size:,} | {batch[0]} | {windows:,.0f} | {told} | {restarts:,.0f} |", flush=True)
