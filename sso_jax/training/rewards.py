"""Rewards of pairs: their batches, the Bradley-Terry loss, and scoring.

A reward is read at the last token of a response, its end of turn.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from sso_jax.data.buckets import bucket
from sso_jax.models.reward_head import RewardModel
from sso_jax.runtime.errors import RunError
from sso_jax.runtime.hosts import stop_now
from sso_jax.runtime.mesh import batch_sharding, num_batch_shards, replicated
from sso_jax.runtime.progress import progress_bar
from sso_jax.runtime.signals import Stopped
from sso_jax.training.example_losses import ExampleLosses
from sso_jax.training.log_probs import forward, hidden_states
from sso_jax.training.packing import Rows, pack
from sso_jax.training.pair_values import Pair
from sso_jax.training.router_balance import with_router_loss
from sso_jax.training.row_shapes import RowShape
from sso_jax.training.step_packing import StepShape
from sso_jax.training.trees import Branch, Tree, first_fit

SHORTEST_ROW = 128
"""Length of the shortest rows for scoring."""


class TokenizedPair(NamedTuple):
    """A prompt and two responses as token ids; each response ends with an end of turn."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def num_tokens(self) -> int:
        """Returns the number of tokens of the prompt and both responses."""
        return sum(map(len, self))

    def longest(self) -> int:
        """Returns the number of tokens of the prompt and the longer response."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


class RewardBatch(NamedTuple):
    """E pairs: those of a device step, or, with a leading axis A, of A steps of one shape.

    Ends are in the order [chosen of pair 0, rejected of pair 0, chosen of pair 1, ...].
    """

    rows: Rows
    ends: Int[np.ndarray, "2E 2"]
    """Row and column of the last token of each response."""
    weights: np.ndarray
    """[E]; they sum to 1 over the update, and are 0 for pairs that only fill a step up."""


def bradley_terry_loss(
    rewards: Pair, *, label_smoothing: float = 0.0, margin: float = 0.0, center_coefficient: float = 0.0
) -> Float[Array, "E"]:
    """`-(1-e) log sigmoid(d - m) - e log sigmoid(-d - m) + c (r_chosen + r_rejected)^2`, d = r_chosen - r_rejected.

    With e = m = c = 0 it is Ouyang et al. 2022 (arXiv 2203.02155), eq. 1, and ln 2 if both rewards are equal. The
    margin m is that of Touvron et al. 2023 (2307.09288), eq. 2; the centering term c that of Eisenstein et al. 2023
    (2312.09244), sec. 3, which keeps rewards near 0, since a loss of differences alone lets them drift; e is the share
    of labels that are assumed to be wrong.
    """
    gap = rewards.chosen - rewards.rejected
    kept = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(gap - margin)
    flipped = -label_smoothing * jax.nn.log_sigmoid(-gap - margin)
    return kept + flipped + center_coefficient * (rewards.chosen + rewards.rejected) ** 2


def pair_trees(pairs: list[TokenizedPair]) -> list[Tree]:
    """Returns one tree per pair: the prompt with both responses, which are cells 2e and 2e + 1."""
    return [
        Tree(p.prompt_ids, [Branch(p.chosen_ids, 2 * e), Branch(p.rejected_ids, 2 * e + 1)])
        for e, p in enumerate(pairs)
    ]


def branch_ends(
    trees: list[Tree], shape: RowShape, num_cells: int, bins: list[list[int]] | None = None
) -> Int[np.ndarray, "cells 2"]:
    """Returns row and column of the last token of each cell's response, as placed by `pack` with the same arguments.

    Missing cells have [0, 0].
    """
    ends = np.zeros((num_cells, 2), np.int32)
    bins = first_fit([tree.num_tokens() for tree in trees], shape.num_tokens) if bins is None else bins
    for row, members in enumerate(bins):
        at = 0
        for member in members:
            at += len(trees[member].prompt_ids)
            for branch in trees[member].branches:
                at += len(branch.response_ids)
                ends[branch.cell] = row, at - 1
    return ends


def reward_step(
    pairs: list[TokenizedPair], shape: StepShape, bins: list[list[int]] | None, *, weight: float
) -> RewardBatch:
    """Builds a device step of pairs, each of which has the given weight."""
    trees, num_cells = pair_trees(pairs), 2 * shape.num_examples
    weights = np.zeros(shape.num_examples, np.float32)
    weights[: len(pairs)] = weight
    rows = pack(trees, shape.rows, num_cells, bins)
    return RewardBatch(rows, branch_ends(trees, shape.rows, num_cells, bins), weights)


def end_rewards(model: RewardModel, params, rows: Rows, ends: Int[Array, "C 2"]) -> Float[Array, "C"]:
    """Returns the rewards at the ends of responses, in float32."""
    return _rewards_at(model, params, hidden_states(model, params, rows), ends)


def _rewards_at(model: RewardModel, params, hidden: Float[Array, "R T D"], ends: Int[Array, "C 2"]):
    return model.apply({"params": params}, hidden[ends[:, 0], ends[:, 1]], method="rewards")


def reward_losses(
    model: RewardModel, label_smoothing: float, margin: float, center_coefficient: float, router_weight: float = 0.0
) -> ExampleLosses:
    """Returns the loss function of pairs: Bradley-Terry losses, with the router's if the model has experts.

    Metrics are the rewards, their gap, and the accuracy (share of gaps above 0, ties as half).
    """

    def losses(params, step: RewardBatch):
        states = forward(model, params, step.rows, None)
        rewards = _rewards_at(model, params, states.hidden, step.ends)
        pair = Pair(rewards[0::2], rewards[1::2])
        loss = bradley_terry_loss(
            pair, label_smoothing=label_smoothing, margin=margin, center_coefficient=center_coefficient
        )
        gap = pair.chosen - pair.rejected
        accuracy = (gap > 0) + 0.5 * (gap == 0)
        metrics = {
            "loss": loss,
            "chosen_reward": pair.chosen,
            "rejected_reward": pair.rejected,
            "margin": gap,
            "accuracy": accuracy,
        }
        group = step.rows.first_cell // 2
        return with_router_loss(metrics, model.architecture.experts, states.router_logits, group, router_weight)

    return losses


def build_reward_fn(model: RewardModel, mesh: jax.sharding.Mesh, param_shardings) -> Callable[..., Float[Array, "C"]]:
    """Compiles `end_rewards`: rows sharded over the batch axes, one program per row shape."""

    def rate_batch(params, rows: Rows, ends: Int[Array, "C 2"]):
        return end_rewards(model, params, rows, ends)

    shardings = (param_shardings, batch_sharding(mesh), replicated(mesh))
    return jax.jit(rate_batch, in_shardings=shardings, out_shardings=replicated(mesh))


def compute_rewards(
    rate: Callable,
    mesh: jax.sharding.Mesh,
    params,
    pairs: list[TokenizedPair],
    tokens_at_once: int,
    stage: str,
    may_stop: bool = True,
) -> list[tuple[float, float]]:
    """Returns (reward of chosen, reward of rejected) of every pair.

    A row has one response, or as many of the shortest as fit; longer responses are in smaller batches.

    Args:
      rate: compiled rewards, from `build_reward_fn`.
      mesh: device mesh.
      params: the reward model's parameters.
      pairs: pairs to score.
      tokens_at_once: tokens of a batch.
      stage: title of the progress bar, used in messages too.
      may_stop: whether a requested stop is seen between batches; not where the caller has work to save first.

    Raises:
      RunError: if a reward is not finite.
      Stopped: between two batches, if a stop was requested.
    """
    shards = num_batch_shards(mesh)
    trees = [Tree(p.prompt_ids, [Branch(response, 0)]) for p in pairs for response in (p.chosen_ids, p.rejected_ids)]
    rewards = np.zeros(len(trees), np.float32)
    lengths: dict[int, list[int]] = {}
    for i, tree in enumerate(trees):
        lengths.setdefault(bucket(tree.num_tokens(), SHORTEST_ROW), []).append(i)
    with progress_bar(stage, len(trees), "response") as bar:
        for length, members in sorted(lengths.items()):
            num_rows = -(-max(1, tokens_at_once // length) // shards) * shards
            # Except in the shortest rows, a response takes more than half of its row and is therefore alone.
            alone = (1, length) if length > SHORTEST_ROW else ()
            shape = RowShape(num_rows, length, length, *alone)
            for start in range(0, len(members), num_rows):
                batch = members[start : start + num_rows]
                rows = [
                    Tree(trees[i].prompt_ids, [trees[i].branches[0]._replace(cell=cell)])
                    for cell, i in enumerate(batch)
                ]
                packed, ends = pack(rows, shape, num_rows), branch_ends(rows, shape, num_rows)
                with jax.set_mesh(mesh):
                    values = jax.device_get(rate(params, packed, ends))
                rewards[batch] = values[: len(batch)]
                bar.update(len(batch))
                if may_stop and stop_now():
                    raise Stopped(f"a signal in {stage}, after {bar.n} of {len(trees)} responses")
    if broken := int(np.sum(~np.isfinite(rewards))):
        raise RunError(
            f"{stage}: {broken} of {len(rewards)} rewards are not finite; the reward model is broken, use another one, "
            "or model.compute_dtype float32"
        )
    return [(float(a), float(b)) for a, b in rewards.reshape(-1, 2)]
