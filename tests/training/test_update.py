"""One update held to several routes: sharded and not, in one device step and in several, PyTorch's AdamW, and what
step 0 must be.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from toys import Compilations, toy_model, toy_params

from sso_jax.config import ObjectiveConfig
from sso_jax.models.layer_layout import cast_to_compute
from sso_jax.models.transformer import abstract_params
from sso_jax.recipes.objective import build_objective
from sso_jax.runtime.mesh import param_shardings, place, replicated
from sso_jax.training.batches import (
    Example,
    example_trees,
    one_step,
    preference_step,
    supervised_step,
    token_weight,
    update_batch,
)
from sso_jax.training.device_steps import StepLimits, plan_steps
from sso_jax.training.example_losses import preference_losses, supervised_losses
from sso_jax.training.log_probs import build_score
from sso_jax.training.optimizer import decayed, learning_rates, make_optimizer
from sso_jax.training.row_shapes import RowShape
from sso_jax.training.scoring import PACKED_TOGETHER, Scorable, score_examples
from sso_jax.training.step_packing import DeviceStep, StepShape
from sso_jax.training.trees import Branch, Tree, steered_trees
from sso_jax.training.update import batch_shardings, build_update, init_state, state_shardings


def random_examples(count, seed=0):
    draw = np.random.default_rng(seed)

    def ids(low, high):
        return draw.integers(3, 96, draw.integers(low, high)).tolist()

    return [
        Example(
            str(i),
            {context: ids(3, 14) for context in ("plain", "positive", "negative")},
            {response: ids(2, 9) for response in ("chosen", "rejected", "original")},
            [],
        )
        for i in range(count)
    ]


def scored(model, params, mesh, examples, cells, noise):
    """The examples with the model itself, plus noise of this deviation, as their reference."""
    score = build_score(model, mesh, param_shardings(abstract_params(model), mesh))
    items = [Scorable(example.prompts, example.responses) for example in examples]
    trees = [steered_trees(*item, cells, 0) for item in items]
    assert len(items) <= PACKED_TOGETHER
    plan = plan_steps(
        [trees], StepLimits(512, 4)
    )  # on any mesh the same: gradients here blow up a rounding of these sums
    sums = score_examples(score, params, items, cells, plan, "test")
    off = np.random.default_rng(1).normal(0, noise, (len(examples), len(cells)))
    return [
        e._replace(reference_log_probs=(np.array(row) + o).tolist())
        for e, row, o in zip(examples, sums, off, strict=True)
    ]


def run_steps(mesh, objective_config, num_steps=3, tokens=4096, num_examples=8, learning_rate=1e-3, noise=1.0):
    """Metrics of each of `num_steps` updates on one batch, and the parameters after them.

    The reference is the model itself plus `noise` nats, so that margins differ from 0 by more than rounding.
    """
    model = toy_model()
    params = toy_params(
        model, mesh, scale=3.0
    )  # at ten times the usual scale gradients are too ill-conditioned for float32
    objective = build_objective(objective_config)
    examples = scored(model, params, mesh, random_examples(num_examples), objective.cells, noise)
    batch = batch_of(examples, objective.cells, tokens)
    optimizer = make_optimizer(0.9, 0.95, 1e-8, 0.1, 1.0)
    shardings = state_shardings(params, param_shardings(abstract_params(model), mesh), optimizer, mesh)
    losses = preference_losses(model, objective.terms, objective.cells, objective.rewards)
    update = build_update(losses, optimizer, mesh, shardings, batch, partial(cast_to_compute, model))
    state, metrics = init_state(params, optimizer, shardings), []
    with jax.set_mesh(mesh):
        for _ in range(num_steps):
            state, numbers = update(state, batch, np.float32(learning_rate))
            metrics.append({name: float(value) for name, value in numbers.items()})
    assert update._cache_size() == 1
    return metrics, jax.device_get(state.params)


def batch_of(examples, cells, tokens):
    """The batch of one update in steps of so many tokens, with the same rows on any mesh of up to four shards."""
    plan = plan_steps([[example_trees([example], cells) for example in examples]], StepLimits(tokens, 4))
    build = partial(preference_step, cells=cells, weight=1.0 / len(examples))
    return update_batch(examples, plan.updates[0], plan.shapes, build)


ONLINE_IPO = ObjectiveConfig(base="ipo", beta=0.2, form="online")


def assert_same_metrics(ours, theirs):
    """Equal to 1e-5. After the first update the gradient's norm (100 here) may differ more: Adam turns the rounding of
    a gradient near 0 into a step of 1e-4 either way.
    """
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            relative = 1e-3 if name == "grad_norm" and step > 0 else 1e-5
            assert a[name] == pytest.approx(b[name], rel=relative, abs=1e-5), (step, name)


def test_eight_devices_train_as_one_does(one_device, eight_devices):
    (one, params_one), (eight, params_eight) = (
        run_steps(mesh, ONLINE_IPO, learning_rate=1e-4) for mesh in (one_device, eight_devices)
    )
    assert_same_metrics(one, eight)
    for a, b in zip(jax.tree.leaves(params_one), jax.tree.leaves(params_eight), strict=True):
        # Adam divides by the root of the second moment: where a gradient is near 0, its rounding decides the sign of a
        # step of 1e-4
        np.testing.assert_allclose(a, b, atol=3.1e-4)
        assert np.mean(np.abs(a - b) > 1e-6) < 0.02


def test_device_steps_sum_to_the_whole_update(one_device):
    settings = dict(num_examples=7, learning_rate=1e-4)
    whole, _ = run_steps(one_device, ONLINE_IPO, **settings)
    parts, _ = run_steps(one_device, ONLINE_IPO, tokens=256, **settings)
    assert_same_metrics(whole, parts)


def uneven_examples(count, seed=0):
    """Examples whose responses have 1 to 150 tokens."""
    draw = np.random.default_rng(seed)

    def ids(length):
        return draw.integers(3, 96, length).tolist()

    return [
        Example(
            str(i),
            {context: ids(3 + i) for context in ("plain", "positive", "negative")},
            {response: ids(int(150 ** draw.random())) for response in ("chosen", "rejected", "original")},
            [],
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_gradient_depends_neither_on_the_budget_of_a_step_nor_on_its_placement(one_device, eight_devices, sharded):
    """Very uneven examples, in one step and in several steps of up to three shapes, in two orders: the same gradient to
    1e-6 of its norm, and the same metrics. At ten times this scale of the weights attention is so sharp that rounding
    alone is more.
    """
    mesh = eight_devices if sharded else one_device
    model = toy_model(num_layers=1)
    params = toy_params(model, mesh, scale=1.0)
    objective = build_objective(ONLINE_IPO)
    examples = scored(model, params, mesh, uneven_examples(12), objective.cells, 1.0)
    optimizer = optax.sgd(1.0)
    shardings = state_shardings(params, param_shardings(abstract_params(model), mesh), optimizer, mesh)
    losses = preference_losses(model, objective.terms, objective.cells, objective.rewards)
    before = jax.device_get(params)

    def gradient(examples, tokens):
        batch = batch_of(examples, objective.cells, tokens)
        update = build_update(losses, optimizer, mesh, shardings, batch)
        state = init_state(jax.device_put(before, shardings.params), optimizer, shardings)
        with jax.set_mesh(mesh):
            state, metrics = update(state, batch, np.float32(1e5))  # so that the parameters' own rounding is none
        after = jax.device_get(state.params)
        return batch, jax.tree.map(np.subtract, before, after), {name: float(x) for name, x in metrics.items()}

    whole, expected, metrics = gradient(examples, 2**20)
    assert whole.num_steps.tolist() == [1]
    most_shapes = 1
    for own, tokens in ((examples, 2048), (examples[::-1], 2048), (examples[::-1], 1536)):
        parts, found, numbers = gradient(own, tokens)
        assert parts.num_steps.sum() > 1
        most_shapes = max(most_shapes, len(parts.groups))
        off = optax.tree.norm(jax.tree.map(np.subtract, found, expected)) / optax.tree.norm(expected)
        assert off < 1e-6
        assert numbers == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert most_shapes > 1


@pytest.mark.parametrize(
    ("base", "beta", "expected"), [("dpo", 0.2, math.log(2)), ("ipo", 0.2, 6.25), ("ipo", 0.1, 25.0)]
)
@pytest.mark.parametrize("form", ["online", "generator", "pairwise"])
def test_where_the_reference_is_the_policy_each_term_has_its_step_0_value(one_device, base, beta, expected, form):
    metrics, _ = run_steps(one_device, ObjectiveConfig(base=base, beta=beta, form=form), num_steps=1, noise=0.0)
    terms = {"online": ("base", "positive", "negative"), "generator": ("positive", "negative"), "pairwise": ("base",)}[
        form
    ]
    for term in terms:
        assert metrics[0][f"{term}_loss"] == pytest.approx(expected, rel=1e-5)
    if form != "generator":
        assert metrics[0]["margin"] == pytest.approx(0.0, abs=1e-5)


def test_the_loss_falls(one_device):
    metrics, _ = run_steps(one_device, ObjectiveConfig(base="dpo", beta=0.2), num_steps=6)
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    assert metrics[-1]["margin"] > metrics[0]["margin"]


def test_steps_equal_pytorch_adamw_on_the_same_gradients(one_device):
    model = toy_model(num_layers=1)
    params = toy_params(model, one_device)
    draw = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda p: draw.normal(size=p.shape).astype(np.float32), params) for _ in range(3)]
    optimizer = make_optimizer(0.9, 0.95, 1e-8, 0.1, 1.0)
    state, ours = optimizer.init(params), params
    leaves, mask = [jax.tree.leaves(tree) for tree in (params, decayed(params))]
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in leaves]
    groups = [
        {
            "params": [t for t, d in zip(tensors, mask, strict=True) if d == wanted],
            "weight_decay": 0.1 if wanted else 0.0,
        }
        for wanted in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    # two updates of warm-up from 0, then a cosine over the other three
    rates = [0.0, 0.5e-2, 1e-2]
    np.testing.assert_allclose(learning_rates(1e-2, "cosine", 0.4, 5)[:3], rates, rtol=1e-6)
    for rate, gradient in zip(rates, gradients, strict=True):
        changes, state = optimizer.update(gradient, state, ours)
        ours = jax.tree.map(lambda p, change, rate=rate: p + rate * change, ours, changes)
        for tensor, g in zip(tensors, jax.tree.leaves(gradient), strict=True):
            tensor.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
    for a, b in zip(jax.tree.leaves(ours), tensors, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=2e-6)
    assert 0 < sum(mask) < len(mask)


def test_moments_of_bfloat16_weights_are_float32(one_device):
    """After a gradient of 1 and n of 0: m = (1 - b1) b1^n, v = (1 - b2) b2^n, which bfloat16 would round back to where
    it was.
    """
    weights = {"kernel": jnp.ones((2, 3), jnp.bfloat16)}
    optimizer = make_optimizer(0.9, 0.999, 1e-8, 0.0, 0.0)
    state = optimizer.init(weights)
    for gradient in (1.0, 0.0, 0.0, 0.0):
        _, state = optimizer.update({"kernel": jnp.full((2, 3), gradient, jnp.float32)}, state, weights)
    first, second = state[0].mu["kernel"], state[0].nu["kernel"]
    assert first.dtype == second.dtype == jnp.float32
    np.testing.assert_allclose(first, 0.1 * 0.9**3, rtol=1e-6)
    np.testing.assert_allclose(second, 0.001 * 0.999**3, rtol=1e-5)
    shardings = state_shardings(weights, {"kernel": replicated(one_device)}, optimizer, one_device)
    assert jax.tree.structure(shardings.optimizer) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("kind", "expected"), [("cosine", [0.0, 0.5, 1.0, 0.5 * (1 + math.cos(math.pi / 8))]), ("constant", [0, 0.5, 1, 1])]
)
def test_schedule_warms_up_from_0_to_the_peak(kind, expected):
    rates = learning_rates(1.0, kind, 0.2, 10)
    np.testing.assert_allclose(rates[:4], expected, atol=1e-6)
    assert len(rates) == 10


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.2])
@pytest.mark.parametrize("num_updates", [1, 10, 37])
@pytest.mark.parametrize("kind", ["linear", "wsd", "cosine", "constant"])
def test_schedules_are_those_of_transformers(kind, num_updates, warmup_ratio):
    warmup, decay = math.ceil(warmup_ratio * num_updates), math.ceil(0.3 * num_updates)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    if kind == "wsd":
        theirs = transformers.get_wsd_schedule(
            optimizer, warmup, min(decay, num_updates - warmup), num_updates, decay_type="linear"
        )
    else:
        name = kind if kind != "constant" else "constant_with_warmup"
        theirs = transformers.get_scheduler(name, optimizer, warmup, num_updates)
    expected = []
    for _ in range(num_updates):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = learning_rates(2.0, kind, warmup_ratio, num_updates, 0.3 if kind == "wsd" else None)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_supervised_loss_is_the_mean_over_the_response_tokens_of_the_batch(one_device):
    model = toy_model()
    params = toy_params(model, one_device)
    trees = [Tree([5, 6, 7], [Branch([8, 9], 0)]), Tree([5], [Branch([10, 11, 12, 13, 14], 0)])]
    optimizer = make_optimizer(0.9, 0.95, 1e-8, 0.0, 0.0)
    shardings = state_shardings(params, param_shardings(abstract_params(model), one_device), optimizer, one_device)
    score = build_score(model, one_device, shardings.params)
    items = [Scorable({"plain": tree.prompt_ids}, {"chosen": tree.branches[0].response_ids}) for tree in trees]
    sums = score_examples(score, params, items, [("plain", "chosen")], StepLimits(64), "test")
    steps, shapes = [DeviceStep(0, [i], [[0]]) for i in range(2)], [StepShape(RowShape(1, 32, 16), 1, 2)]
    batch = update_batch(trees, steps, shapes, partial(supervised_step, weight=token_weight(trees)))
    update = build_update(supervised_losses(model), optimizer, one_device, shardings, batch)
    with jax.set_mesh(one_device):
        _, metrics = update(init_state(params, optimizer, shardings), batch, np.float32(0))
    assert float(metrics["loss"]) == pytest.approx(-(sums[0][0] + sums[1][0]) / 7, rel=1e-5)


@pytest.mark.parametrize("devices", ["one_device", "eight_devices"])
def test_an_update_is_compiled_once_for_the_first_state_and_those_that_it_gives(devices, request):
    """A batch of another length is compiled for when it comes."""
    mesh, model = request.getfixturevalue(devices), toy_model()
    params, optimizer = toy_params(model, mesh), make_optimizer(0.9, 0.95, 1e-8, 0.0, 1.0)
    shardings = state_shardings(params, param_shardings(abstract_params(model), mesh), optimizer, mesh)
    trees = [Tree([5, 6, 7], [Branch([8, 9], 0)])]
    batches = [
        one_step(supervised_step(trees, StepShape(RowShape(4, num_tokens, 4), 1, 1), None, weight=1.0))
        for num_tokens in (8, 16)
    ]
    assert jax.tree.structure(batch_shardings(batches[0], mesh)) == jax.tree.structure(batches[0])
    update = build_update(supervised_losses(model), optimizer, mesh, shardings, batches[0])
    state, counts = init_state(params, optimizer, shardings), []
    with jax.log_compiles(), Compilations() as compilations, jax.set_mesh(mesh):
        for batch in (batches[0], batches[0], batches[1]):
            state, _ = update(state, place(batch, batch_shardings(batch, mesh)), np.float32(1e-3))
            counts.append(compilations.names.count("update_batch"))
    assert counts == [1, 1, 2]
