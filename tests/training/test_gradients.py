"""The gradient of an offline update on every tensor of a folder, held to PyTorch's autograd on transformers' model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from toys import FAMILIES, toy_model, toy_params

from sso_jax.config import ObjectiveConfig
from sso_jax.models.hf_config import CONFIG_FILE, to_hf_config
from sso_jax.models.hf_weights import WEIGHTS_FILE, write_params
from sso_jax.recipes.objective import build_objective
from sso_jax.training.batches import Example, example_trees, preference_step
from sso_jax.training.example_losses import preference_losses
from sso_jax.training.row_shapes import row_shape
from sso_jax.training.step_packing import StepShape

BETA = 0.3
PAIRS = [
    dict(prompt=[5, 9, 33, 2, 71, 40, 8], chosen=[8, 14, 3, 90, 77, 12, 6], rejected=[50, 3]),
    dict(prompt=[60, 61], chosen=[7, 44], rejected=[21, 22, 23, 24, 25, 26, 27, 28, 29, 30]),
]
REFERENCES = [(-30.0, -8.0), (-9.5, -44.0)]


def our_gradients(model, params):
    """Of the mean DPO loss of both pairs, packed with shared prompts."""
    objective = build_objective(ObjectiveConfig(base="dpo", beta=BETA, form="pairwise"))
    assert [tuple(cell) for cell in objective.cells] == [("plain", "chosen"), ("plain", "rejected")]
    examples = [
        Example(str(i), {"plain": row["prompt"]}, {side: row[side] for side in ("chosen", "rejected")}, list(reference))
        for i, (row, reference) in enumerate(zip(PAIRS, REFERENCES, strict=True))
    ]
    trees = example_trees(examples, objective.cells)
    shape = StepShape(row_shape([trees]), len(examples), len(trees))
    step = preference_step(examples, shape, None, cells=objective.cells, weight=0.5)
    losses = preference_losses(model, objective.terms, objective.cells, objective.rewards)
    return jax.jit(jax.grad(lambda params: jnp.sum(step.weights * losses(params, step)[0])))(params)


def their_gradients(folder):
    """One row per response, no packing, float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")

    def log_prob(prompt, response):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()

    for row, (chosen, rejected) in zip(PAIRS, REFERENCES, strict=True):
        gap = log_prob(row["prompt"], row["chosen"]) - chosen - log_prob(row["prompt"], row["rejected"]) + rejected
        (-torch.nn.functional.logsigmoid(BETA * gap) / 2).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo3", "phi3", "smollm3", "mistral"])
def test_the_gradient_of_every_tensor_is_that_of_autograd(one_device, tmp_path, family):
    model = toy_model(**FAMILIES[family])
    params, a = toy_params(model, one_device, scale=3.0), model.architecture
    for folder, values in (("model", params), ("gradient", our_gradients(model, params))):
        (tmp_path / folder).mkdir()
        write_params(values, a, tmp_path / folder, "float32")
    (tmp_path / "model" / CONFIG_FILE).write_text(json.dumps(to_hf_config(a, "float32", None, 2)))
    ours, theirs = load_file(tmp_path / "gradient" / WEIGHTS_FILE), their_gradients(tmp_path / "model")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert np.abs(expected).max() > 0, name
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)
