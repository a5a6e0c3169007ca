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
from sso_jax.training.example_losses import ExampleLosses


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


def batch_shardings(batch: NamedTuple, mesh: jax.sharding.Mesh):
    """Returns the shardings of a batch: rows over the batch axes on their second axis, small arrays replicated.

    The first axis of rows is that of the microbatches.
    """
    rows = NamedSharding(mesh, PartitionSpec(None, *spec("batch")))
    whole = replicated(mesh)
    return type(batch)(*(type(part)(*([rows] * len(part))) if isinstance(part, tuple) else whole for part in batch))


def build_update(
    example_losses: ExampleLosses,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
    batch: NamedTuple,
    cast: Callable[[dict], dict] = lambda params: params,
) -> Callable[[TrainState, NamedTuple, float], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Compiles `state, batch, learning rate -> state, metrics` for batches like `batch`; the old state is donated.

    The rate is an argument, and `optimizer` has learning rate 1, so that rounds with different numbers of updates share
    a program. The loss is `sum_i weights_i * loss_i` over all microbatches, whose gradients are summed in float32
    before the update. Metrics are means with the same weights, `grad_norm` before clipping, and the learning rate.

    Args:
      example_losses: losses and metrics of a microbatch.
      optimizer: optimizer with learning rate 1.
      mesh: device mesh.
      shardings: shardings of the state.
      batch: a batch with the shapes to compile for.
      cast: converts the parameters for the losses (`cast_to_compute`), once for all microbatches; gradients have the
        resulting types until they are summed.
    """

    def weighted(params, frozen, micro):
        losses, metrics = example_losses(join(params, frozen), micro)
        means = {name: jnp.sum(micro.weights * value) for name, value in metrics.items()}
        return jnp.sum(micro.weights * losses), means

    def gradient_of(params, frozen, micro):
        """Returns the gradient of one microbatch in float32, and its share of the metrics."""
        (_, means), gradient = jax.value_and_grad(weighted, has_aux=True)(params, frozen, micro)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradient), means

    def update_batch(state: TrainState, batch: NamedTuple, rate):
        of_micro = partial(gradient_of, cast(state.params), cast(state.frozen))
        first = jax.tree.map(lambda part: part[0], batch)
        if batch.weights.shape[0] == 1:  # no sum, and no second gradient in memory
            gradient, means = of_micro(first)
        else:
            zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), jax.eval_shape(of_micro, first))

            def add(total, micro):
                return (jax.tree.map(jnp.add, total, of_micro(micro)), None)

            (gradient, means), _ = jax.lax.scan(add, zeros, batch)
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
