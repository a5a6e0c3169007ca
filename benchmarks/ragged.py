"""Times sampling and updates on responses of unequal lengths, next to transformers.

    python -m benchmarks.ragged --model FOLDER --queries FILE --peers transformers    a model with its own ends of turn
    python -m benchmarks.ragged --lengths FILE                                        random weights, lengths of a file
    python -m benchmarks.ragged                                                       random weights, drawn lengths
    python -m benchmarks.ragged --equal 128 64 --earlier CHECKOUT                     equal lengths, beside db61208
    python -m benchmarks.ragged --work update --peers transformers                    scoring and one update
    python -m benchmarks.ragged --work padding                                        padding of updates, no timing
    python -m benchmarks.ragged --work slots                                          row-steps of sampling, no timing
    python -m benchmarks.ragged --work order --lengths FILE                           orders of requests, no timing

Without `--model` the model is that of `benchmarks.speed --shapes 57m`, and each response is as long as its limit says.
Lengths are those of the file (records with `prompt` and `responses`) or log-normal with mean 350, sigma 0.7 and at most
2,048 tokens; `--scale` multiplies them. Implementations take turns, call by call, each in a separate process. A rate
counts tokens of responses, ends of turn included. transformers runs batches of prompts sorted by length (`generate`)
and its continuous batching (`generate_batch`).
"""

import argparse
import dataclasses
import json
import math
import os
import random
import statistics
import sys
from pathlib import Path

import numpy as np

from benchmarks import ragged_order, ragged_slots, ragged_update
from benchmarks.ragged_earlier import run_earlier
from benchmarks.speed.shapes import CPU, SEED, TEMPERATURE, TOP_P
from benchmarks.speed.timing import in_turns, timed

MEAN, SIGMA, CAP = 350, 0.7, 2048
PAGE = 64
"""Tokens of a page of transformers' continuous batching."""
CELLS = {
    "sample": {"ours": ["ours"], "transformers": ["generate", "generate_batch"]},
    "update": {"ours": ["ours_update"], "transformers": ["transformers_update"]},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ragged", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", choices=["sample", "update", "padding", "slots", "order"], default="sample")
    parser.add_argument("--batch_size", type=int, default=16, help="examples of the update (default: %(default)s)")
    parser.add_argument("--tokens_per_step", type=int, help="tokens of a device step (default: what fits)")
    parser.add_argument("--model", help="folder of a model whose own ends of turn count")
    parser.add_argument("--queries", help="queries for the model")
    parser.add_argument("--lengths", help="JSON Lines with prompt and responses lengths, for random weights")
    parser.add_argument("--equal", nargs=2, type=int, metavar=("PROMPT", "RESPONSE"), help="lengths of every request")
    parser.add_argument("--scale", type=float, default=0.25, help="factor of all lengths (default: %(default)s)")
    requests = f"number of requests (default: 256; of work slots and order {ragged_slots.REQUESTS:,})"
    parser.add_argument("--requests", type=int, help=requests)
    parser.add_argument("--slots", type=int, default=64, help="slots, or rows of a batch (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="limit with --model (default: %(default)s)")
    parser.add_argument("--peers", nargs="*", choices=["transformers"], default=[])
    parser.add_argument("--earlier", help="checkout of commit db61208, whose sampler takes turns")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work == "order" and options.lengths is None:
        parser.error("--work order: give --lengths, a file with several responses to each prompt")
    simulated = options.work in ("slots", "order")
    options.requests = options.requests or (ragged_slots.REQUESTS if simulated else 256)
    return options


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
    return [([rng.randrange(CPU.vocab_size) for _ in range(p)], r) for p, r in lengths_of(options)]


def model_prompts(options: argparse.Namespace) -> list[list[int]]:
    """Returns the prompts of the queries in the file, by the model's chat template."""
    from sso_jax.data.chat import make_chat
    from sso_jax.data.queries import load_queries
    from sso_jax.data.rows import Table
    from sso_jax.data.tokenizer import load_tokenizer

    queries = load_queries(Table(options.queries, "--queries")).records
    chat = make_chat(load_tokenizer(options.model))
    return [chat.prompt_ids(query.query) for query in queries[: options.requests]]


def run_ours(options: argparse.Namespace) -> dict:
    """Times this project's sampler."""
    from sso_jax.models.paged_cache import chunk_size
    from sso_jax.runtime.jax_setup import prepare_jax
    from sso_jax.sampling.sampler import Request

    prepare_jax()
    sampler, params = _model_sampler(options) if options.model else _random_sampler(options)
    if options.model:
        requests = [Request(ids, (SEED, row)) for row, ids in enumerate(model_prompts(options))]
    else:
        drawn = random_requests(options)
        requests = [Request(ids, (SEED, row), limit) for row, (ids, limit) in enumerate(drawn)]
    read = []

    def window(weights, state, inputs, *rest):
        num_pages, page_size = state.cache.values.shape[1], state.cache.values.shape[3]
        size = chunk_size(num_pages, "plain")
        read.append(
            (math.ceil(inputs.table.num_used[0] / size) * size * page_size, int((inputs.table.positions >= 0).sum()))
        )
        return sampler.programs.window(weights, state, inputs, *rest)

    counted = dataclasses.replace(sampler, programs=sampler.programs._replace(window=window))
    samples = []
    result = timed(lambda: samples.append(counted.sample(params, requests, "sampling")), options.repeats)
    lengths = [len(response) for response in samples[-1].responses]
    return {
        **result,
        "tokens": sum(lengths),
        "row_steps_used": samples[-1].stats.share_used,
        "read_over_live": sum(all_ for all_, _ in read) / sum(live for _, live in read),
        "mean_length": statistics.mean(lengths),
        "p90_length": float(np.percentile(lengths, 90)),
    }


def _random_sampler(options: argparse.Namespace):
    from benchmarks.speed.ours import make_model, random_params
    from sso_jax.models.transformer import abstract_params
    from sso_jax.runtime.mesh import param_shardings
    from sso_jax.sampling.decode import build_programs
    from sso_jax.sampling.sampler import Sampler
    from sso_jax.sampling.sampling_params import make_sampling_params

    model, mesh = make_model(CPU)
    params = random_params(model, param_shardings(abstract_params(model), mesh))
    sampler = Sampler(
        programs=build_programs(model, mesh),
        mesh=mesh,
        strategy=make_sampling_params(TEMPERATURE, TOP_P),
        stop_ids=(),
        max_new_tokens=int(CAP * options.scale),
        max_tokens=4096,
        num_slots=options.slots,
    )
    return sampler, params


def _model_sampler(options: argparse.Namespace):
    from sso_jax.config import ModelConfig, SampleConfig, SamplingConfig
    from sso_jax.recipes.engine import build_engine, load_params

    sampling = SamplingConfig(TEMPERATURE, TOP_P, max_new_tokens=options.max_new_tokens, batch_size=options.slots)
    config = SampleConfig(model=ModelConfig(path=options.model), sampling=sampling)
    engine = build_engine(options.model, config)
    return engine.sampler, load_params(options.model, engine)


def run_transformers(options: argparse.Namespace, continuous: bool) -> dict:
    """Times transformers: `generate` on batches sorted by prompt length, or `generate_batch`."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    settings = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
    if options.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        requests = [(ids, options.max_new_tokens) for ids in model_prompts(options)]
        pad = model.generation_config.pad_token_id or model.config.pad_token_id or 0
        stops = model.generation_config.eos_token_id
    else:
        from benchmarks.speed.peer_transformers import make_model

        model, pad, stops = make_model(CPU).eval(), 0, None
        requests = random_requests(options)
    counts = []

    def by_batch() -> None:
        total, order = 0, sorted(requests, key=lambda request: len(request[0]))
        for start in range(0, len(order), options.slots):
            batch = order[start : start + options.slots]
            width = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in batch])
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in batch])
            limit = max(limit for _, limit in batch)
            with torch.no_grad():
                out = model.generate(ids, attention_mask=mask, max_new_tokens=limit, pad_token_id=pad, **settings)
            total += _count(out[:, width:].tolist(), [limit for _, limit in batch], stops)
        counts.append(total)

    def by_request() -> None:
        limit = max(limit for _, limit in requests)
        config = transformers.GenerationConfig(
            max_new_tokens=limit, eos_token_id=-1 if stops is None else stops, pad_token_id=pad, **settings
        )
        longest = max(len(ids) for ids, _ in requests) + limit
        pages = transformers.ContinuousBatchingConfig(  # by default it takes most of the memory for its cache
            page_size=PAGE, num_blocks=options.slots * -(-longest // PAGE), max_requests_per_batch=options.slots
        )
        found = model.generate_batch(
            [ids for ids, _ in requests],
            generation_config=config,
            continuous_batching_config=pages,
            progress_bar=False,
        )
        counts.append(_count([out.generated_tokens for out in found.values()], [limit] * len(requests), stops))

    result = timed(by_request if continuous else by_batch, options.repeats)
    return {**result, "tokens": counts[-1]}


def _count(responses: list[list[int]], limits: list[int], stops: int | list[int] | None) -> int:
    """Counts the tokens of responses, each up to its first end of turn or its limit."""
    ends = set() if stops is None else {stops} if isinstance(stops, int) else set(stops)
    total = 0
    for response, limit in zip(responses, limits, strict=True):
        end = next((i + 1 for i, token in enumerate(response) if token in ends), len(response))
        total += min(end, limit)
    return total


def main() -> int:
    options = arguments()
    if options.earlier and (options.model or options.work != "sample"):
        raise SystemExit("--earlier: only for samples of random weights")
    if bool(options.model) != bool(options.queries):
        raise SystemExit("--model and --queries: give both or neither")
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if options.work == "padding":
        print(ragged_update.padding_table(options.lengths))
        return 0
    if options.work == "slots":
        ragged_slots.print_slots(options.lengths, options.requests)
        return 0
    if options.work == "order":
        ragged_order.print_orders(options.lengths, options.requests)
        return 0
    if options.cell:
        print(json.dumps(run_cell(options)))
        return 0
    cells = [cell for name in ("ours", *options.peers) for cell in CELLS[options.work][name]]
    cells += ["earlier"] if options.earlier else []
    if not options.model:
        cells = [cell for cell in cells if cell != "generate_batch"]  # it has no limit for each request
    common = [sys.executable, "-m", "benchmarks.ragged", *sys.argv[1:]]
    results = in_turns({cell: [*common, "--cell", cell] for cell in cells})
    print_updates(results) if options.work == "update" else print_samples(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2), encoding="utf-8")
    return 0


def run_cell(options: argparse.Namespace) -> dict:
    """Times one cell."""
    if options.cell in ragged_update.RUN:
        return ragged_update.RUN[options.cell](options)
    if options.cell == "earlier":
        return run_earlier(options.earlier, random_requests(options), options.slots, options.repeats)
    return run_ours(options) if options.cell == "ours" else run_transformers(options, "batch" in options.cell)


def print_updates(results: dict[str, dict]) -> None:
    """Prints a table of updates with the reference's scoring."""
    print("| update | median | examples/s | ours over it | padding | first call | peak GB |")
    print("|---|---|---|---|---|---|---|")
    rates = {cell: result["examples"] / statistics.median(result["seconds"]) for cell, result in results.items()}
    for cell, result in results.items():
        print(
            f"| {cell} | {statistics.median(result['seconds']):.1f} s | {rates[cell]:.3f} | "
            f"{rates['ours_update'] / rates[cell]:.2f} | {result['padding']:.0%} | {result['first']:.1f} s | "
            f"{result['host_peak_bytes'] / 1e9:.2f} |"
        )


def print_samples(results: dict[str, dict]) -> None:
    """Prints a table of sampling."""
    print("| sampling | median | tokens | tokens/s | ours over it | first call | peak GB |")
    print("|---|---|---|---|---|---|---|")
    rates = {cell: result["tokens"] / statistics.median(result["seconds"]) for cell, result in results.items()}
    for cell, result in results.items():
        print(
            f"| {cell} | {statistics.median(result['seconds']):.1f} s | {result['tokens']} | {rates[cell]:.0f} | "
            f"{rates['ours'] / rates[cell]:.2f} | {result['first']:.1f} s | {result['host_peak_bytes'] / 1e9:.2f} |"
        )
    ours = results["ours"]
    print(
        f"ours: {ours['row_steps_used']:.0%} of row-steps used, {ours['read_over_live']:.2f} times the live keys and "
        f"values read; mean length {ours['mean_length']:.0f}, 90th percentile {ours['p90_length']:.0f}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
