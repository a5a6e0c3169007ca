"""The update of `benchmarks.ragged`: examples of unequal lengths, here and as PyTorch scripts compute them."""

import argparse
import functools
import random
from collections.abc import Callable
from itertools import product

import numpy as np

from benchmarks.ragged.requests import draw_lengths, kinds_of
from benchmarks.speed.shapes import CELLS, CONTEXTS, SEED, SHAPES, Shape
from benchmarks.speed.timing import timed
from sso_jax.data.records import RESPONSES
from sso_jax.training.device_steps import StepLimits, plan_steps
from sso_jax.training.trees import Tree, steered_trees

PRINCIPLE_TOKENS = 40
"""Tokens by which a prompt with a principle is longer."""
PEER_MICROBATCH = 4
"""Examples of a microbatch of the peer, whose rows are padded to the longest."""
Ids = tuple[dict[str, list[int]], dict[str, list[int]]]
"""Prompts by context and responses by name."""


def examples_of(options: argparse.Namespace) -> list[Ids]:
    """Returns examples of random tokens."""
    rng = random.Random(SEED + 1)

    def ids(count: int) -> list[int]:
        return [rng.randrange(SHAPES[options.shape].vocab_size) for _ in range(count)]

    principle = int(PRINCIPLE_TOKENS * options.scale)
    return [
        (
            {context: ids(prompt + (0 if context == "plain" else principle)) for context in CONTEXTS},
            {name: ids(length) for name, length in zip(RESPONSES, responses, strict=True)},
        )
        for prompt, responses in draw_lengths(options.lengths, options.batch_size, options.scale)
    ]


def run_ours(options: argparse.Namespace) -> dict:
    """Times the reference's scoring and one update of all examples, packing included."""
    import jax

    from benchmarks.speed import machine
    from benchmarks.speed.ours import RATE, make_trained_model, random_params
    from sso_jax.config import ObjectiveConfig
    from sso_jax.models.layer_layout import cast_to_compute
    from sso_jax.models.transformer import abstract_params
    from sso_jax.recipes.objective import build_objective
    from sso_jax.runtime.jax_setup import prepare_jax
    from sso_jax.runtime.mesh import param_shardings
    from sso_jax.training.batches import Example, preference_step, update_batch
    from sso_jax.training.example_losses import preference_losses
    from sso_jax.training.log_probs import build_score
    from sso_jax.training.optimizer import make_optimizer
    from sso_jax.training.scoring import Scorable, plan_scoring, score_examples
    from sso_jax.training.step_limits import step_limits
    from sso_jax.training.update import build_update, init_state, state_shardings

    prepare_jax()
    machine.require(options.device)
    shape = SHAPES[options.shape]
    model, mesh = make_trained_model(shape)
    shardings = param_shardings(abstract_params(model), mesh)
    params = random_params(model, shardings)
    objective = build_objective(ObjectiveConfig(base="ipo", beta=0.2))
    optimizer = make_optimizer(0.9, 0.999, 1e-8, 0.0, 1.0)
    items = [Scorable(*ids) for ids in examples_of(options)]
    limits, cells = step_limits(model, shardings, mesh, options.tokens_per_step), objective.cells
    trees = [steered_trees(*item, cells, 0) for item in items]
    plan, scoring = plan_steps([trees], limits), plan_scoring(items, cells, limits)
    score, update, held = build_score(model, mesh, shardings), [], []
    placed = state_shardings(params, shardings, optimizer, mesh)
    held.append(init_state(params, optimizer, placed))
    losses = preference_losses(model, objective.terms, cells, objective.rewards)
    build = functools.partial(preference_step, cells=cells, weight=1.0 / len(items))

    def work() -> None:
        sums = score_examples(score, held[0].all_params(), items, cells, scoring, "reference")
        examples = [Example(str(i), *item, row) for i, (item, row) in enumerate(zip(items, sums, strict=True))]
        batch = update_batch(examples, plan.updates[0], plan.shapes, build)
        if not update:
            cast = functools.partial(cast_to_compute, model)
            update.append(build_update(losses, optimizer, mesh, placed, batch, cast))
        with jax.set_mesh(mesh):
            held[0], metrics = update[0](held[0], batch, np.float32(RATE))
        jax.block_until_ready((held[0], metrics))

    result = timed(work, options.repeats)
    return {
        **result,
        "examples": len(items),
        "padding": plan.padding(),
        "scoring_padding": scoring.padding(),
        "needed_flops": needed_flops(shape, [tree for own in trees for tree in own]),
        "device_peak_bytes": machine.device_peak_bytes(),
    }


def needed_flops(shape: Shape, trees: list[Tree]) -> float:
    """Returns the operations of real tokens in an update of these trees and its scoring; a multiply-add counts as two.

    Forward and backward pass cost three forward passes, or two for products with frozen weights; the reference costs
    one more. Prompts run once for all their responses, and only responses meet the vocabulary.
    """
    passes = 3 if shape.adapter_rank else 4
    attended = 2 * shape.num_layers * shape.num_heads * shape.head_size
    total = 0
    for tree in trees:
        prompt, responses = len(tree.prompt_ids), [len(branch.response_ids) for branch in tree.branches]
        pairs = prompt * (prompt + 1) // 2 + sum(r * prompt + r * (r + 1) // 2 for r in responses)
        products = tree.num_tokens() * shape.layer_params + sum(responses) * shape.head_params
        total += passes * products + 4 * (tree.num_tokens() * shape.adapter_params + pairs * attended)
    return 2.0 * total


def run_transformers(options: argparse.Namespace) -> dict:
    """Times PyTorch's way: microbatches of rows padded to the longest, six rows an example, reference beside policy."""
    import torch

    from benchmarks.speed.peer_transformers import ALPHA, BETA, STEERING_WEIGHT, make_model

    shape = SHAPES[options.shape]
    policy, reference = make_model(shape).train(), make_model(shape).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    examples = examples_of(options)
    padding = []

    def log_probs(model, micro: list[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns sums over the responses and their lengths, [examples, cells]."""
        rows = [(prompts[context], responses[name]) for prompts, responses in micro for context, name in CELLS]
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
        attention = torch.zeros(len(rows), width, dtype=torch.long)
        for row, (prompt, response) in enumerate(rows):
            whole = prompt + response
            ids[row, : len(whole)], attention[row, : len(whole)] = torch.tensor(whole), 1
            mask[row, len(prompt) : len(whole)] = 1.0
        padding.append(1.0 - attention.float().mean().item())
        logits = model(ids, attention_mask=attention).logits[:, :-1].float().log_softmax(-1)
        of_tokens = logits.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
        shape = (len(micro), len(CELLS))
        return of_tokens.sum(-1).view(shape), mask.sum(-1).view(shape)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(examples), PEER_MICROBATCH):
            micro = examples[start : start + PEER_MICROBATCH]
            with torch.no_grad():
                of_reference, _ = log_probs(reference, micro)
            of_policy, lengths = log_probs(policy, micro)
            ratios, means = (of_policy - of_reference) / lengths, of_policy / lengths

            def ipo(first: int, ratios=ratios) -> torch.Tensor:
                return (ratios[:, first] - ratios[:, first + 1] - 1.0 / (2.0 * BETA)) ** 2

            weight = torch.sigmoid(-(ALPHA * means[:, 0] + (1.0 - ALPHA) * means[:, 1]))
            loss = ipo(0) + STEERING_WEIGHT * weight * (ipo(2) + ipo(4))
            (loss.sum() / len(examples)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()

    result = timed(work, options.repeats)
    return {**result, "examples": len(examples), "padding": float(np.mean(padding))}


RUN: dict[str, Callable[[argparse.Namespace], dict]] = {
    "ours_update": run_ours,
    "transformers_update": run_transformers,
}
"""Timed functions by cell."""


def padding_table(lengths: str | None) -> str:
    """Returns a Markdown table of the padding of updates on 1 and 16 batch shards, of 1,024 examples each.

    With a file it has the lengths of each of its policies, else log-normal ones; unscaled.
    """
    lines = ["| lengths | shards | examples of an update | tokens of a step | shapes | padding |", "|---" * 6 + "|"]
    for name, kind in kinds_of(lengths).items():
        examples = [_trees(*drawn) for drawn in draw_lengths(lengths, 1024, 1.0, **kind)]
        for shards, size, tokens in product((1, 16), (8, 32, 64), (16384, 65536)):
            updates = [examples[start : start + size] for start in range(0, 1024, size)]
            plan = plan_steps(updates, StepLimits(tokens * shards, shards))
            shapes = ", ".join(f"{shape.rows.num_rows} x {shape.rows.num_tokens}" for shape in plan.shapes)
            lines.append(f"| {name} | {shards} | {size} | {tokens * shards:,} | {shapes} | {plan.padding():.1%} |")
    return "\n".join(lines)


def _trees(prompt: int, responses: list[int]) -> list[Tree]:
    """Returns the trees of an example of version 1, of token 0."""
    of_response = {name: [0] * length for name, length in zip(RESPONSES, responses, strict=True)}
    principle = {context: 0 if context == "plain" else PRINCIPLE_TOKENS for context in CONTEXTS}
    prompts = {context: [0] * (prompt + more) for context, more in principle.items()}
    return steered_trees(prompts, of_response, [("plain", "original"), *CELLS], 0)
