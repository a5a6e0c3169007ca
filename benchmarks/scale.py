"""Computes hours and chip-hours of one round of recipe `online` on TPU slices, by arithmetic; runs nothing.

    python -m benchmarks.scale --queries 20000
    python -m benchmarks.scale --stops

Each stage takes the longest of what the chips must compute, read from memory, and send each other, at a share of the
published peak that was measured elsewhere (`SHARES`), and the table says which it was. Not counted: compilation, the
host's own work (`python -m benchmarks.million`), start and stops.

`--stops` prints how long several hosts that train 8B need to stop, by what is running when the signal comes.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import NamedTuple

import jax
from flax import linen as nn

from sso_jax.models.hf_weights import MAX_SHARD_BYTES
from sso_jax.models.presets import PRESETS
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.sampling.slots import WINDOW
from sso_jax.training.step_limits import FLOPS_PER_PARAM, MOST_TOKENS, active_params


class Chip(NamedTuple):
    """Published figures of a chip: bfloat16 operations, bytes of memory, and bytes from other chips, a second."""

    flops: float
    memory: float
    links: float


CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9),
    "v5p": Chip(459e12, 2765e9, 600e9),
    "v6e": Chip(918e12, 1638e9, 400e9),
}
"""From the pages of Cloud TPU on each generation; of the links' two directions one is counted."""


class Shares(NamedTuple):
    """Measured shares of the peak."""

    update: float
    """Of the operations: 7B with adapters on an H100, docs/performance.md (1.5B with all weights: 50.5%)."""
    memory: float
    """Of the memory's bandwidth in decoding: 7B on an H200, docs/performance.md, there of the copy bandwidth."""
    slots: float
    """Row-steps that draw a token of a response: SmolLM2-135M, docs/performance.md."""
    padding: float
    """Padding of updates of 64 examples on 16 shards, the largest of docs/performance.md."""


SHARES = Shares(update=0.507, memory=0.61, slots=0.78, padding=0.078)


class Work(NamedTuple):
    """Tokens of a query, and what the config asks for."""

    prompt: int = 200
    """Tokens of x; an assumption."""
    principle: int = 100
    """Tokens of the system message of x+ or x-; an assumption."""
    response: int = 404
    """The mean of three models' answers to the AlpacaEval prompts, four times the 101 in docs/performance.md."""
    question: int = 700
    """Tokens of the question for features, examples included; an assumption."""
    answer: int = 32
    """Most tokens of its answer (`NAMING_TOKENS`)."""
    batch_size: int = 64
    host_write: float = 0.5e9
    """Bytes a second that a host writes to storage; an assumption."""

    def trained_tokens(self) -> int:
        """Returns the tokens of a query's three trees: x with y+, y- and y_o, x+ and x- with y+ and y-."""
        return 3 * self.prompt + 2 * self.principle + 7 * self.response


@dataclass(frozen=True)
class Model:
    """Sizes of a model; numbers of parameters."""

    params: int
    active: int
    """Parameters that a token is computed with."""
    token_bytes: int
    """Bytes of keys and values of a token, in bfloat16."""
    layer_bytes: int
    """Bytes of a token between layers, times the number of layers, in bfloat16."""


@dataclass(frozen=True)
class Slice:
    """A slice, and its sampling."""

    chip: Chip
    chips: int
    slots: int
    split: int | None
    """Chips among which decoding splits the weights (`sampling.mesh`); None if every step gathers them on each chip, as
    on a mesh of axis fsdp alone."""
    chips_per_host: int = 8


class Part(NamedTuple):
    """Seconds of a stage, and what limits it."""

    seconds: float
    limit: str


def decode_step(model: Model, slice_: Slice, work: Work, shares: Shares = SHARES) -> Part:
    """Returns the seconds of one decode step of all slots."""
    chip, n, rows = slice_.chip, slice_.chips, slice_.slots / slice_.chips
    weights, cache = 2 * model.params, rows * (work.prompt + work.principle + work.response / 2) * model.token_bytes
    if slice_.split is None:
        read, sent = weights, weights * (n - 1) / n
    else:  # the two products of a layer that sum over the chips, each twice the rows of a replica
        share = (slice_.split - 1) / slice_.split
        read, sent = weights / slice_.split, 4 * rows * slice_.split * model.layer_bytes * share
    step = {
        "memory": (read + cache) / (chip.memory * shares.memory),
        "links": sent / chip.links,
        "operations": 2 * model.active * rows / (chip.flops * shares.update),
    }
    limit = max(step, key=lambda name: step[name])
    return Part(step[limit], limit)


def sampling(model: Model, slice_: Slice, work: Work, queries: int, shares: Shares = SHARES) -> Part:
    """Returns the seconds of the questions for features and the three responses, prompts included."""
    steps = queries * (3 * work.response + work.answer) / (slice_.slots * shares.slots)
    step = decode_step(model, slice_, work, shares)
    prompts = queries * (work.question + 3 * work.prompt + 2 * work.principle)
    flops = 2 * model.active * prompts
    return Part(steps * step.seconds + flops / (slice_.chips * slice_.chip.flops * shares.update), step.limit)


def scoring(model: Model, slice_: Slice, work: Work, queries: int, shares: Shares = SHARES) -> Part:
    """Returns the seconds of the reference's pass: two operations per parameter and token."""
    flops = 2 * model.active * queries * work.trained_tokens() / (1 - shares.padding)
    return Part(flops / (slice_.chips * slice_.chip.flops * shares.update), "operations")


def update(model: Model, slice_: Slice, work: Work, queries: int, shares: Shares = SHARES) -> Part:
    """Returns the seconds of the updates: operations with `model.remat`, and the weights gathered three times a step.

    A device step is as small as an update that fits whole; with several steps an update, gathers are more.
    """
    chip, n = slice_.chip, slice_.chips
    flops = FLOPS_PER_PARAM * model.active * queries * work.trained_tokens() / (1 - shares.padding)
    updates = -(-queries // work.batch_size)
    # bfloat16 weights forward, again and backward, and the float32 gradient scattered
    links = updates * (3 * 2 + 4) * model.params * (n - 1) / n / chip.links
    seconds = {"operations": flops / (n * chip.flops * shares.update), "links": links}
    limit = max(seconds, key=lambda name: seconds[name])
    return Part(seconds[limit], limit)


def saving(model: Model, slice_: Slice, work: Work) -> Part:
    """Returns the seconds of the last checkpoint, by all hosts, and of the bfloat16 export, by the first one.

    Earlier checkpoints are written while updates run.
    """
    hosts = -(-slice_.chips // slice_.chips_per_host)
    return Part((12 * model.params / hosts + 2 * model.params) / work.host_write, "storage")


def stops(model: Model, slice_: Slice, work: Work, shares: Shares = SHARES) -> dict[str, Part]:
    """Returns the seconds from a signal to the exit of several hosts, which stop at a safe point that all reach.

    A result is read one window, step or update late, and the hosts agree on the next safe point: two of each pass.
    After that the state of the updates is saved, as far as `checkpoint.stop_seconds` allows; nothing else has to be.
    """
    step_queries = slice_.chips * MOST_TOKENS * (1 - shares.padding) / work.trained_tokens()
    hosts = -(-slice_.chips // slice_.chips_per_host)
    step = decode_step(model, slice_, work, shares)
    scored = scoring(model, slice_, work, 1, shares)
    running = update(model, slice_, work, work.batch_size, shares)
    return {
        "sampling: two windows of decode steps": step._replace(seconds=2 * WINDOW * step.seconds),
        "scoring: two device steps": scored._replace(seconds=2 * step_queries * scored.seconds),
        "updates: two updates": running._replace(seconds=2 * running.seconds),
        "updates: their save": Part(12 * model.params / hosts / work.host_write, "storage"),
        "export: two files": Part(min(2 * model.params, 2 * MAX_SHARD_BYTES) / work.host_write, "storage"),
    }


STAGES = {"sampling": sampling, "scoring": scoring, "update": update}
ROWS = (
    ("Qwen/Qwen2-7B-Instruct", "v5e", 16, 256, None),
    ("Qwen/Qwen2-7B-Instruct", "v5e", 16, 256, 4),
    ("Qwen/Qwen3-30B-A3B", "v6e", 32, 256, 32),
    ("meta-llama/Llama-3.1-70B-Instruct", "v6e", 64, 256, None),
    ("meta-llama/Llama-3.1-70B-Instruct", "v6e", 64, 256, 8),
    ("meta-llama/Llama-3.1-70B-Instruct", "v6e", 64, 1024, 8),
    ("meta-llama/Llama-3.1-70B-Instruct", "v5p", 16, 256, 8),
)
"""Model, generation, chips, slots, and `Slice.split`: at most the key/value heads, or of experts all chips."""


def model_of(name: str) -> Model:
    """Returns the sizes of a preset."""
    decoder = Transformer(PRESETS[name])
    a = decoder.architecture
    params = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(abstract_params(decoder))))
    of_cache = 2 * 2 * a.num_layers * a.num_kv_heads * a.head_size
    return Model(params, active_params(decoder), of_cache, 2 * a.num_layers * a.embed_dim)


def table(queries: int, work: Work = Work()) -> str:
    """Returns the table in Markdown."""
    heads = ["model", "chips", "slots", "decoding", *STAGES, "last save and export", "round", "chip-hours"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, kind, chips, slots, split in ROWS:
        model, own = model_of(name), Slice(CHIPS[kind], chips, slots, split, 4 if kind == "v5p" else 8)
        parts = [stage(model, own, work, queries) for stage in STAGES.values()] + [saving(model, own, work)]
        hours = sum(part.seconds for part in parts) / 3600
        cells = [f"{part.seconds / 3600:.2f} h ({part.limit})" for part in parts]
        how = "weights gathered" if split is None else f"weights split by {split}"
        row = [
            name.split("/")[1],
            f"{chips} {kind}",
            str(slots),
            how,
            *cells,
            f"{hours:.1f} h",
            f"{hours * chips:,.0f}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def stops_table(work: Work = Work()) -> str:
    """Returns the seconds of `stops` for the config of an 8B model, in Markdown."""
    own = Slice(CHIPS["v5e"], 16, 256, None, 4)
    parts = stops(model_of("meta-llama/Llama-3.1-8B-Instruct"), own, work)
    rows = [f"| {name} | {part.seconds:.1f} s ({part.limit}) |" for name, part in parts.items()]
    return "\n".join(["| Llama-3.1-8B-Instruct on 16 v5e, 4 hosts | until then |", "|---|---|", *rows])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20_000, help="queries of the round (default: %(default)s)")
    parser.add_argument("--stops", action="store_true", help="print the seconds until a stop")
    args = parser.parse_args(argv)
    print(stops_table() if args.stops else table(args.queries))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
