"""The router's loss held to transformers' Qwen3-MoE, value and gradient, and its independence of packing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from toys import FAMILIES, toy_model, toy_params
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from sso_jax.config import ObjectiveConfig
from sso_jax.models.hf_config import read_architecture
from sso_jax.models.hf_weights import read_params
from sso_jax.models.layer_layout import cast_to_compute
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.recipes.objective import build_objective
from sso_jax.runtime.mesh import param_shardings
from sso_jax.training.batches import Example, example_trees, preference_step, supervised_step, update_batch
from sso_jax.training.device_steps import StepLimits, plan_steps
from sso_jax.training.example_losses import preference_losses, supervised_losses
from sso_jax.training.optimizer import make_optimizer
from sso_jax.training.router_balance import balance_losses
from sso_jax.training.row_shapes import row_shape
from sso_jax.training.step_packing import StepShape
from sso_jax.training.trees import Branch, Tree
from sso_jax.training.update import build_update, init_state, state_shardings


def test_the_loss_of_groups_is_transformers_with_its_gradient():
    """Three layers, five experts, two of them a token; rows hold tokens of three groups and padding."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(3, 2, 9, 5)).astype(np.float32)
    group = np.array([[0] * 4 + [1] * 3 + [3] * 2, [1] * 2 + [2] * 6 + [3]])
    given = torch.tensor(logits, requires_grad=True)
    expected = []
    for number in range(3):
        own = tuple(layer[torch.tensor(group == number)] for layer in given)
        expected.append(load_balancing_loss_func(own, 5, 2))
    weights = np.array([1.0, -2.0, 0.5], np.float32)
    sum(w * loss for w, loss in zip(weights.tolist(), expected, strict=True)).backward()

    def loss(logits):
        found = balance_losses(logits, 2, jnp.array(group), 3)
        return jnp.sum(found * weights), found

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(logits)
    np.testing.assert_allclose(found, [value.item() for value in expected], rtol=1e-6)
    np.testing.assert_allclose(gradient, given.grad.numpy(), atol=1e-7)


def test_tokens_that_are_spread_evenly_have_the_number_of_their_experts_as_loss():
    """Each of four experts is chosen by half of the tokens, with a mean probability of a quarter: 4 * 4 * 1/2 * 1/4."""
    logits = jnp.array([[[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]]])
    assert balance_losses(logits, 2, jnp.zeros((1, 2), jnp.int32), 1) == pytest.approx([2.0])


def test_the_gradient_of_demonstrations_is_transformers_with_the_router_loss(tmp_path, one_device):
    """One demonstration: mean negative log-prob of the response plus 0.7 times the loss of all its tokens."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path)
    model = Transformer(read_architecture(tmp_path))
    params = read_params(tmp_path, model, one_device)
    prompt, response = [5, 9, 33, 2, 71], [8, 14, 3]
    tree = Tree(prompt, [Branch(response, 0)])
    step = supervised_step([tree], StepShape(row_shape([[tree]]), 1, 1), None, weight=1 / 3)

    def loss(params):
        losses, metrics = supervised_losses(model, 0.7)(params, step)
        return jnp.sum(step.weights * losses), metrics

    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(params)
    out = theirs(torch.tensor([prompt + response]), output_router_logits=True)
    log_probs = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(response)[:, None])
    balance = load_balancing_loss_func(out.router_logits, 6, 2)
    (-log_probs.mean() + 0.7 * balance).backward()
    assert metrics["router_loss"][0] / 3 == pytest.approx(balance.item(), rel=1e-5)
    assert metrics["loss"][0] / 3 == pytest.approx(-log_probs.mean().item(), rel=1e-5)
    for layer in range(2):
        own = theirs.model.layers[layer].mlp
        router = gradient["layers"]["mlp"]["router"]["kernel"][layer]
        np.testing.assert_allclose(router.T, own.gate.weight.grad.numpy(), atol=1e-5)
        down = gradient["layers"]["mlp"]["down"]["kernel"][layer]
        np.testing.assert_allclose(down.swapaxes(1, 2), own.experts.down_proj.grad.numpy(), atol=1e-5)


def run_update(mesh, tokens: int, reverse: bool):
    """Parameters and metrics after an update on nine uneven pairs, in steps of so many tokens."""
    draw = np.random.default_rng(3)

    def ids(low, high):
        return draw.integers(3, 96, int(draw.integers(low, high))).tolist()

    objective = build_objective(ObjectiveConfig(base="dpo", beta=0.2, form="online"))
    names = {context for context, _ in objective.cells}, {response for _, response in objective.cells}
    examples = [
        Example(
            str(i),
            {n: ids(3, 20) for n in sorted(names[0])},
            {n: ids(2, 60) for n in sorted(names[1])},
            [0.0] * len(objective.cells),
        )
        for i in range(9)
    ]
    examples = examples[::-1] if reverse else examples
    model = toy_model(**FAMILIES["qwen3_moe"])
    params = toy_params(model, mesh, scale=2.0)
    optimizer = make_optimizer(0.9, 0.95, 1e-8, 0.1, 0.0)
    shardings = state_shardings(params, param_shardings(abstract_params(model), mesh), optimizer, mesh)
    plan = plan_steps([[example_trees([example], objective.cells) for example in examples]], StepLimits(tokens, 4))
    build = partial(preference_step, cells=objective.cells, weight=1 / 9)
    batch = update_batch(examples, plan.updates[0], plan.shapes, build)
    losses = preference_losses(model, objective.terms, objective.cells, objective.rewards, 5.0)
    update = build_update(losses, optimizer, mesh, shardings, batch, partial(cast_to_compute, model))
    with jax.set_mesh(mesh):
        state, metrics = update(init_state(params, optimizer, shardings), batch, np.float32(0.0))
    moments = jax.device_get(state.optimizer)
    return sum(int(n) for n in batch.num_steps), metrics, moments


def test_the_update_depends_neither_on_packing_nor_on_the_budget_nor_on_the_mesh(one_device, eight_devices):
    """Moments after one update at rate 0 are the gradient times constants."""
    one_step, metrics, moments = run_update(one_device, 2**14, False)
    for mesh, tokens, reverse in ((one_device, 1024, True), (eight_devices, 1024, False)):
        steps, other_metrics, other_moments = run_update(mesh, tokens, reverse)
        assert steps > one_step
        for name in ("loss", "router_loss", "grad_norm"):
            assert float(other_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-5)
        for a, b in zip(jax.tree.leaves(other_moments), jax.tree.leaves(moments), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1e-6, float(np.abs(b).max())))
    assert float(metrics["router_loss"]) > 3.0  # more than evenly spread
