"""transformers' sampling on the requests of `benchmarks.ragged`: `generate` in sorted batches, and `generate_batch`."""

import argparse

import torch
import transformers

from benchmarks.ragged.requests import model_prompts, random_requests
from benchmarks.speed.peer_transformers import make_model
from benchmarks.speed.shapes import SEED, SHAPES, TEMPERATURE, TOP_P
from benchmarks.speed.timing import timed

PAGE = 64
"""Tokens of a page of continuous batching."""
SETTINGS = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
Work = tuple[list[tuple[list[int], int]], int, int | list[int] | None]
"""(prompt, most tokens) of the requests, the padding token, and tokens that end a turn."""


def _work(options: argparse.Namespace) -> tuple[transformers.PreTrainedModel, Work]:
    torch.manual_seed(SEED)
    if not options.model:
        return make_model(SHAPES[options.shape]).eval(), (random_requests(options), 0, None)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    pad = model.generation_config.pad_token_id or model.config.pad_token_id or 0
    requests = [(ids, options.max_new_tokens) for ids in model_prompts(options)]
    return model, (requests, pad, model.generation_config.eos_token_id)


def run_generate(options: argparse.Namespace) -> dict:
    """Times `generate` on batches sorted by the length of the prompt."""
    model, (requests, pad, stops) = _work(options)
    order, counts = sorted(requests, key=lambda request: len(request[0])), []

    def work() -> None:
        total = 0
        for start in range(0, len(order), options.slots):
            batch = order[start : start + options.slots]
            width, limit = max(len(ids) for ids, _ in batch), max(limit for _, limit in batch)
            ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in batch], device=model.device)
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in batch], device=model.device)
            with torch.no_grad():
                out = model.generate(ids, attention_mask=mask, max_new_tokens=limit, pad_token_id=pad, **SETTINGS)
            total += _count(out[:, width:].tolist(), [limit for _, limit in batch], stops)
        counts.append(total)

    return {**timed(work, options.repeats), "tokens": counts[-1]}


def run_generate_batch(options: argparse.Namespace) -> dict:
    """Times continuous batching, whose requests all have the same limit."""
    model, (requests, pad, stops) = _work(options)
    limit, counts = max(limit for _, limit in requests), []
    config = transformers.GenerationConfig(
        max_new_tokens=limit, eos_token_id=-1 if stops is None else stops, pad_token_id=pad, **SETTINGS
    )
    longest = max(len(ids) for ids, _ in requests) + limit
    pages = transformers.ContinuousBatchingConfig(  # by default it takes most of the memory for its cache
        page_size=PAGE, num_blocks=options.slots * -(-longest // PAGE), max_requests_per_batch=options.slots
    )

    def work() -> None:
        found = model.generate_batch(
            [ids for ids, _ in requests],
            generation_config=config,
            continuous_batching_config=pages,
            progress_bar=False,
        )
        counts.append(_count([out.generated_tokens for out in found.values()], [limit] * len(requests), stops))

    return {**timed(work, options.repeats), "tokens": counts[-1]}


def _count(responses: list[list[int]], limits: list[int], stops: int | list[int] | None) -> int:
    """Counts the tokens of responses, each up to its first end of turn or its limit."""
    ends = set() if stops is None else {stops} if isinstance(stops, int) else set(stops)
    total = 0
    for response, limit in zip(responses, limits, strict=True):
        end = next((i + 1 for i, token in enumerate(response) if token in ends), len(response))
        total += min(end, limit)
    return total
