"""The training update: a compiled, sharded step that donates the old state and returns the new state and metrics."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sso_jax.models.adapters import join, split_trainable
from sso_jax.runtime.mesh import compiler_options, place, replicated, spec
from sso_jax.training.batches import UpdateBatch
from sso_jax.training.example_losses import ExampleLosses
from sso_jax.training.packing import Rows


class TrainState(NamedTuple):
    """What an update changes, and the parameters that it only reads."""

    params: dict
    """All parameters, or only the adapters if there are any."""
    optimizer: optax.OptState
    step: Int[Array, ""]
    frozen: dict = {}  # noqa: RUF012 (an empty tree of arrays)
    """The parameters that the adapters modify."""

    def all_params(self) -> dict:
        """Returns the decoder's parameters, for sampling and scoring."""
        return join(self.params, self.frozen)


def state_shardings(
    params, param_shardings, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Returns the shardings of the state: moments like their parameters, counters replicated."""
    trainable, _ = split_trainable(params)
    placed, frozen = split_trainable(param_shardings)
    abstract = jax.eval_shape(optimizer.init, trainable)
    whole = replicated(mesh)
    moments = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, abstract, placed, transform_non_params=lambda _: whole
    )
    return TrainState(placed, moments, whole, frozen)


def init_state(params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Returns the state before the first update; takes over `params` without a copy."""
    trainable, frozen = split_trainable(params)
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trainable)
    step = jax.device_put(place(np.int32(0), shardings.step), shardings.step)
    return TrainState(trainable, moments, step, frozen)


def batch_shardings(batch: UpdateBatch, mesh: jax.sharding.Mesh) -> UpdateBatch:
    """Returns the shardings of a batch: rows over the batch axes on their second axis, small arrays replicated.

    The first axis of rows is that of the device steps.
    """
    rows, whole = NamedSharding(mesh, PartitionSpec(None, *spec("batch"))), replicated(mesh)

    def of_group(group: NamedTuple) -> NamedTuple:
        return type(group)(*(jax.tree.map(lambda _: rows, p) if isinstance(p, Rows) else whole for p in group))

    return UpdateBatch(tuple(map(of_group, batch.groups)), whole)


def build_update(
    example_losses: ExampleLosses,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
    batch: UpdateBatch,
    cast: Callable[[dict], dict] = lambda params: params,
) -> Callable[[TrainState, UpdateBatch, float], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Compiles `state, batch, learning rate -> state, metrics` for batches like `batch`; the old state is donated.

    The rate is an argument, and `optimizer` has learning rate 1, so that rounds with different numbers of updates share
    a program; so do batches with different numbers of device steps. The loss is `sum_i weights_i * loss_i` over the
    examples of all steps, whose gradients are summed in float32 before the update. Metrics are means with the same
    weights, `grad_norm` before clipping, and the learning rate.

    Args:
      example_losses: losses and metrics of a device step.
      optimizer: optimizer with learning rate 1.
      mesh: device mesh.
      shardings: shardings of the state.
      batch: a batch with the shapes to compile for.
      cast: converts the parameters for the losses (`cast_to_compute`), once for all steps; gradients have the resulting
        types until they are summed.
    """

    def weighted(params, frozen, step):
        losses, metrics = example_losses(join(params, frozen), step)
        means = {name: jnp.sum(step.weights * value) for name, value in metrics.items()}
        return jnp.sum(step.weights * losses), means

    def gradient_of(params, frozen, step):
        """Returns the gradient of one step in float32, and its share of the metrics."""
        (_, means), gradient = jax.value_and_grad(weighted, has_aux=True)(params, frozen, step)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradient), means

    def update_batch(state: TrainState, batch: UpdateBatch, rate):
        of_step = partial(gradient_of, cast(state.params), cast(state.frozen))
        gradient, means = _sum_over_steps(of_step, batch)
        changes, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, optax.tree.scale(rate, changes))
        metrics = {**means, "grad_norm": optax.tree.norm(gradient), "learning_rate": rate}
        return TrainState(params, moments, state.step + 1, state.frozen), metrics

    return jax.jit(
        update_batch,
        donate_argnums=0,
        in_shardings=(shardings, batch_shardings(batch, mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=compiler_options(mesh),
    )


def _sum_over_steps(of_step: Callable[[NamedTuple], tuple[dict, dict]], batch: UpdateBatch) -> tuple[dict, dict]:
    """Returns the sum of `of_step` over the steps that a batch really has, shape after shape."""

    def at(group: NamedTuple, number: Int[Array, ""] | int) -> NamedTuple:
        return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, number, keepdims=False), group)

    first, *others = batch.groups
    if not others and first.weights.shape[0] == 1:  # no sum, and no second gradient in memory
        return of_step(at(first, 0))
    total = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), jax.eval_shape(of_step, at(first, 0)))
    for group, num_steps in zip(batch.groups, list(batch.num_steps), strict=True):

        def add(number, total, group=group):
            return jax.tree.map(jnp.add, total, of_step(at(group, number)))

        total = jax.lax.fori_loop(0, num_steps, add, total)
    return total
