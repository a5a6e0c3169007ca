"""A training state and a batch in, the updated state and its metrics out, in one compiled, sharded and donated step."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sso_jax.host_memory import give_back
from sso_jax.mesh import compiler_options, place, replicated, spec
from sso_jax.models.adapters import join, split_trainable
from sso_jax.models.layout import AS_STORED, Layout
from sso_jax.models.transformer import Transformer
from sso_jax.training.batches import PreferenceBatch, SupervisedBatch
from sso_jax.training.log_probs import cell_log_probs
from sso_jax.training.losses import Pair, Steered
from sso_jax.training.objectives import Terms, pair_metrics


class TrainState(NamedTuple):
    """What an update changes, and what it only reads."""

    params: dict
    """All parameters, or the adapters alone where there are any."""
    optimizer: optax.OptState
    step: Int[Array, ""]
    frozen: dict = {}  # noqa: RUF012 (an empty tree of arrays)
    """The parameters beneath the adapters."""

    def whole_params(self) -> dict:
        """The decoder's parameters, as sampling and scoring take them."""
        return join(self.params, self.frozen)


ExampleLosses = Callable[[dict, NamedTuple], tuple[Float[Array, "E"], dict[str, Float[Array, "E"]]]]
"""(params, microbatch) -> loss and metrics of each example."""


def cells_of(
    form: str, use_steering: bool, scale: tuple[float, float], negative_winner: str, more: tuple[tuple[str, str], ...] = ()
) -> list[tuple[str, str]]:
    """The (context, response) log-probs that an objective needs: winner before loser in each context; `more` go with the plain pair."""
    plain = [("plain", "chosen"), ("plain", "rejected"), *more]
    positive = [("positive", "chosen"), ("positive", "rejected")] if scale[0] else []
    negative = [("negative", negative_winner), ("negative", "chosen")] if scale[1] else []
    steered = positive + negative
    return {"pairwise": plain, "online": plain + (steered if use_steering else []), "generator": steered}[form]


def to_steered(values: Float[Array, "E C"], cells: list[tuple[str, str]]) -> Steered:
    """Columns of `values`, one a cell, by context: of a context's responses the winner comes first, then the loser; y_o of x apart."""
    columns: dict[str, list] = {}
    for i, cell in enumerate(cells):
        columns.setdefault("original" if cell == ("plain", "original") else cell[0], []).append(values[:, i])
    return Steered(**{name: of_context[0] if name == "original" else Pair(*of_context) for name, of_context in columns.items()})


def preference_losses(model: Transformer, objective: Callable[..., Terms], cells: list[tuple[str, str]], beta: float) -> ExampleLosses:
    """Losses of preference microbatches under `objective`."""

    def losses(params, micro: PreferenceBatch):
        num_examples, num_cells = micro.num_tokens.shape
        log_probs = cell_log_probs(model, params, micro.rows, num_examples * num_cells)
        policy = to_steered(log_probs.reshape(num_examples, num_cells), cells)
        reference = to_steered(micro.reference_log_probs, cells)
        num_tokens = to_steered(micro.num_tokens.astype(jnp.float32), cells)
        terms = objective(policy, reference, num_tokens)
        return terms.loss, pair_metrics(terms, policy, reference, beta)

    return losses


def loss_at_reference(objective: Callable[..., Terms], cells: list[tuple[str, str]], batch: PreferenceBatch) -> float:
    """Loss of a batch where policy and reference are one: what the first update of a round must show, such as ln 2 for DPO."""
    return float(_loss_at_reference(objective, tuple(cells), batch.reference_log_probs, batch.num_tokens, batch.weights))


@partial(jax.jit, static_argnums=(0, 1))
def _loss_at_reference(objective: Callable[..., Terms], cells: tuple[tuple[str, str], ...], reference_log_probs, num_tokens, weights):
    """One program for a dozen small ones, and the same one in every round."""
    flat = lambda part: to_steered(part.astype(jnp.float32).reshape(-1, len(cells)), list(cells))  # noqa: E731
    reference, weights = flat(reference_log_probs), weights.reshape(-1)
    losses = objective(reference, reference, flat(num_tokens)).loss
    return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0))


def supervised_losses(model: Transformer) -> ExampleLosses:
    """Negative log-prob sums of supervised microbatches; the batch's weights make them a mean over tokens."""

    def losses(params, micro: SupervisedBatch):
        nll = -cell_log_probs(model, params, micro.rows, micro.weights.shape[0])
        return nll, {"loss": nll}

    return losses


def decayed(params) -> dict:
    """True for matrices, False for norms and biases."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: path.split("/")[-1] not in ("scale", "bias") for path in flat}, sep="/")


def learning_rates(peak: float, kind: str, warmup_ratio: float, num_updates: int) -> list[float]:
    """Learning rate of each update: a linear warm-up from 0 over `warmup_ratio` of them, then a cosine to 0 or the peak kept."""
    warmup = round(warmup_ratio * num_updates)
    if kind == "constant":
        rest = optax.constant_schedule(peak)
    else:
        rest = optax.cosine_decay_schedule(peak, max(1, num_updates - warmup))
    schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup]) if warmup else rest
    return [float(schedule(step)) for step in range(num_updates)]


def make_optimizer(b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float) -> optax.GradientTransformation:
    """The step of AdamW at learning rate 1, with float32 moments (Loshchilov & Hutter 2019, alg. 2), after clipping the global norm.

    Moments are float32 whatever the parameters are: a second one of type bfloat16 would never fall at b2 = 0.999.
    """
    adamw = optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed, mu_dtype=jnp.float32)
    optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw
    return optax.GradientTransformation(lambda params: optimizer.init(optax.tree.cast(params, jnp.float32)), optimizer.update)


def state_shardings(params, param_shardings, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Sharding of each part of the state: moments lie as their parameters, counters everywhere."""
    trainable, _ = split_trainable(params)
    placed, frozen = split_trainable(param_shardings)
    abstract = jax.eval_shape(optimizer.init, trainable)
    whole = replicated(mesh)
    moments = optax.tree.map_params(optimizer, lambda _, sharding: sharding, abstract, placed, transform_non_params=lambda _: whole)
    return TrainState(placed, moments, whole, frozen)


def init_state(params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """State before the first update; `params` are taken over, not copied."""
    trainable, frozen = split_trainable(params)
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trainable)
    step = jax.device_put(place(np.int32(0), shardings.step), shardings.step)
    return TrainState(trainable, moments, step, frozen)


def batch_shardings(batch: NamedTuple, mesh: jax.sharding.Mesh):
    """Rows over the batch axes (their second axis, behind the microbatches); the small arrays of examples on every device."""
    rows = NamedSharding(mesh, PartitionSpec(None, *spec("batch")))
    whole = replicated(mesh)
    return type(batch)(*(type(part)(*([rows] * len(part))) if isinstance(part, tuple) else whole for part in batch))


def build_update(
    example_losses: ExampleLosses,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
    batch: NamedTuple,
    layout: Layout = AS_STORED,
) -> Callable[[TrainState, NamedTuple, float], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Compiles `state, batch, learning rate -> state, metrics` for batches like `batch`; the old state's memory is given to the new.

    The rate is an argument and `optimizer` gives the step at rate 1, so that rounds with other numbers of updates share a program.
    The loss is `sum_i weights_i * loss_i` over all microbatches; their gradients are summed in float32 before the one update.
    Metrics are means with the same weights, `grad_norm` before clipping, and the learning rate.

    The losses are given the parameters by `layout` (`training_layout`), once for all microbatches; those of the state stay as they are.
    """

    def weighted(params, frozen, micro):
        losses, metrics = example_losses(join(params, frozen), micro)
        means = {name: jnp.sum(micro.weights * value) for name, value in metrics.items()}
        return jnp.sum(micro.weights * losses), means

    def gradient_of(params, frozen, micro):
        """Gradient of one microbatch in float32, and its share of the metrics."""
        (_, means), gradient = jax.value_and_grad(weighted, has_aux=True)(params, frozen, micro)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradient), means

    def update_batch(state: TrainState, batch: NamedTuple, rate):
        of_micro = partial(gradient_of, layout.lay_out(state.params), layout.lay_out(state.frozen))
        first = jax.tree.map(lambda part: part[0], batch)
        if batch.weights.shape[0] == 1:  # nothing to add up, and no second gradient in memory
            gradient, means = of_micro(first)
        else:
            zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), jax.eval_shape(of_micro, first))
            add = lambda total, micro: (jax.tree.map(jnp.add, total, of_micro(micro)), None)  # noqa: E731
            (gradient, means), _ = jax.lax.scan(add, zeros, batch)
        gradient = layout.lay_back(gradient)
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


def compile_ahead(update: Callable, state: TrainState, batch: NamedTuple, mesh: jax.sharding.Mesh) -> None:
    """Compiles what `build_update` gave for a state and batches like these, and gives the system what compiling leaves in the heap.

    The update finds the program when it is called; its arrays would otherwise come on top of that.
    """
    with jax.set_mesh(mesh):
        update.lower(state, place(batch, batch_shardings(batch, mesh)), np.float32(0.0)).compile()
    give_back()
