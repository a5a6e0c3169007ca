"""Computes response log-probs from packed rows, summed per cell, without ever holding [B, T, V] logits."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sso_jax.models.attention import tree_mask
from sso_jax.models.experts import LOGITS, ROUTER
from sso_jax.models.layer_layout import build_cast
from sso_jax.models.transformer import Transformer
from sso_jax.runtime.mesh import (
    batch_sharding,
    batch_shards_in_context,
    compiler_options,
    replicated,
)
from sso_jax.training.packing import Rows
from sso_jax.training.token_log_probs import token_log_probs


def cell_log_probs(model: Transformer, params, rows: Rows, num_cells: int) -> Float[Array, "cells"]:
    """Returns the sum of the log-probs of each cell's tokens, at temperature 1, in nats, in float32."""
    return cell_sums(model, params, rows, hidden_states(model, params, rows, rows.source), num_cells)


def hidden_states(
    model: Transformer, params, rows: Rows, query_indices: Int[Array, "R M"] | None = None
) -> Float[Array, "R M D"]:
    """Returns the final hidden states of the tokens `query_indices` of each row, or of all."""
    return _apply(model, params, rows, query_indices)[0]


class Forward(NamedTuple):
    """What a training step takes from the decoder."""

    hidden: Float[Array, "R M D"]
    """Final hidden states of the tokens asked for."""
    router_logits: Float[Array, "L R T E"] | None
    """Those of every token in every layer; None without experts."""


def forward(model: Transformer, params, rows: Rows, query_indices: Int[Array, "R M"] | None) -> Forward:
    """Runs the decoder on rows for a training step; see `hidden_states`."""
    if model.architecture.experts is None:
        return Forward(hidden_states(model, params, rows, query_indices), None)
    (hidden, _), left = _apply(model, params, rows, query_indices, mutable=[ROUTER])
    return Forward(hidden, left[ROUTER]["layers"]["mlp"][LOGITS])


def _apply(model: Transformer, params, rows: Rows, query_indices, **options):
    inputs = rows.tokens, rows.positions, tree_mask(rows.tree, rows.branch)
    sequences = rows.sequences_for(model.row_form)
    return model.apply({"params": params}, *inputs, query_indices=query_indices, sequences=sequences, **options)


def cell_means(rows: Rows, hidden: Float[Array, "R M D"], num_cells: int) -> Float[Array, "cells D"]:
    """Returns the mean of the final hidden states over each cell's tokens except its last, from those at its sources.

    Means are in float32; that of a single-token response is 0.
    """
    in_response = jnp.take_along_axis(rows.branch, rows.source, axis=1) > 0  # False at the prompt's last token
    inside = in_response.astype(jnp.float32)
    totals = sum_by(hidden.astype(jnp.float32) * inside[..., None], rows.cell, num_cells)
    return totals / jnp.maximum(sum_by(inside, rows.cell, num_cells), 1.0)[:, None]


def cell_sums(
    model: Transformer, params, rows: Rows, hidden: Float[Array, "R M D"], num_cells: int
) -> Float[Array, "cells"]:
    """Returns `cell_log_probs` from the hidden states at the sources."""
    return sum_by(response_log_probs(model, params, rows, hidden), rows.cell, num_cells)


def response_log_probs(model: Transformer, params, rows: Rows, hidden: Float[Array, "R M D"]) -> Float[Array, "R M"]:
    """Returns the log-prob of each response token from the hidden states at the sources."""
    head = model.apply({"params": params}, method="head_matrix")
    num_rows, num_targets = rows.target.shape
    tokens_of_device = -(-num_rows // batch_shards_in_context()) * num_targets
    columns = max(1, model.max_logits // tokens_of_device)
    return token_log_probs(head, hidden, rows.target, columns, model.architecture.logit_cap)


def sum_by(values: Float[Array, "R M ..."], group: Int[Array, "R M"], num_groups: int) -> Float[Array, "G ..."]:
    """Returns the sum of the values of each group; those of group `num_groups` are left out."""
    flat = values.reshape(-1, *values.shape[2:])
    return jax.ops.segment_sum(flat, group.reshape(-1), num_segments=num_groups + 1)[:num_groups]


class Score(NamedTuple):
    """`cell_log_probs` compiled: rows sharded over the batch axes, one program per row shape."""

    prepare: Callable[[dict], dict]
    """Converts the parameters to what `log_probs` takes, once for all batches."""
    log_probs: Callable[..., Float[Array, "cells"]]
    """(prepared parameters, rows, number of cells) -> sums."""
    mesh: jax.sharding.Mesh


def build_score(model: Transformer, mesh: jax.sharding.Mesh, param_shardings) -> Score:
    """Compiles the scoring of rows with the model."""

    def score_batch(params, rows: Rows, num_cells: int):
        return cell_log_probs(model, params, rows, num_cells)

    scored = jax.jit(
        score_batch,
        static_argnums=2,
        in_shardings=(param_shardings, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(mesh),
    )
    return Score(build_cast(model, mesh), scored, mesh)
