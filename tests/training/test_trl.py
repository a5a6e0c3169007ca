"""Base losses against TRL's own code, values and slopes in every token's log-prob. TRL is needed by this file only."""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sso_jax.training.losses import Pair, base_loss

trl = pytest.importorskip("trl", reason="needs trl, of requirements-test.txt")


def SAME(x):
    return x


NAMES = {
    "dpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "fdpo_forward_kl": "sigmoid",
    "fdpo_js": "sigmoid",
    "fdpo_alpha": "sigmoid",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "robust": "robust",
    "sppo": "sppo_hard",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
}
DIVERGENCES = {"fdpo_forward_kl": "forward_kl", "fdpo_js": "js_divergence", "fdpo_alpha": "alpha_divergence"}
NUM, TOKENS = 6, 9


def token_log_probs(seed):
    """Policy log-probs of each token [2 NUM, TOKENS], of the responses chosen first, the masks that count them,
    reference sums.
    """
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, TOKENS + 1, 2 * NUM)
    mask = np.arange(TOKENS) < lengths[:, None]
    log_probs = -draw.uniform(0.1, 2.0, (2 * NUM, TOKENS)) * mask
    return log_probs, mask, log_probs.sum(1) + draw.uniform(-2, 2, 2 * NUM)


def trl_loss(name, settings, log_probs, mask, references):
    """Mean loss of the pairs and its slopes, by `DPOTrainer._compute_loss` on a model that answers with these
    log-probs.
    """
    dtype = torch.float32 if name == "fdpo_alpha" else torch.float64  # TRL has no limit of its exponents in float64
    values = torch.tensor(log_probs, dtype=dtype, requires_grad=True)
    nothing = torch.zeros_like(values)
    outputs = SimpleNamespace(log_probs=values, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=SAME, gather=SAME),
        args=SimpleNamespace(discopop_tau=settings.get("tau")),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=DIVERGENCES.get(name, "reverse_kl"),
        f_alpha_divergence_coef=1.0 - settings.get("alpha", 0.0),  # the exponent of its f' is this less 1
        use_weighting=False,
        loss_types=[NAMES[name]],
        loss_weights=[1.0],
        beta=settings["beta"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    completion = torch.tensor(np.concatenate([np.zeros((2 * NUM, 1), bool), mask], axis=1)).long()
    chosen, rejected = torch.tensor(references, dtype=dtype).chunk(2)
    inputs = {name: completion for name in ("input_ids", "attention_mask", "completion_mask")}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.item(), values.grad.numpy()


def our_loss(name, settings, log_probs, mask, references):
    loss, _ = base_loss(name, settings)

    def halves(values):
        return Pair(*jnp.split(jnp.asarray(values, jnp.float32), 2))

    def mean(tokens):
        return loss(halves(tokens.sum(1)), halves(references), halves(mask.sum(1))).mean()

    value, slope = jax.value_and_grad(mean)(jnp.asarray(log_probs, jnp.float32))
    return float(value), np.asarray(slope)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_losses_with_a_reference_equal_trl(name, factor):
    _, settings = base_loss(name, {})
    settings = {key: value * factor for key, value in settings.items()}
    log_probs, mask, references = token_log_probs(seed=1)
    value, slope = our_loss(name, settings, log_probs, mask, references)
    expected, expected_slope = trl_loss(name, settings, log_probs, mask, references)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(slope * mask, expected_slope * mask, rtol=1e-5, atol=1e-5 * abs(expected_slope).max())


def without_reference(name, settings, trainer, function, means):
    """Per-pair losses and slopes in (chosen, rejected) of one of TRL's trainers without a reference."""
    inputs = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in means]
    losses = function(trainer, *inputs)
    losses.sum().backward()
    return losses.detach().numpy(), [row.grad.numpy() for row in inputs]


def check_without_reference(name, settings, trainer, function):
    draw = np.random.default_rng(2)
    means, ones = -draw.uniform(0.2, 2.0, (2, NUM)), Pair(jnp.ones(NUM), jnp.ones(NUM))
    loss, _ = base_loss(name, settings)
    pair = Pair(*jnp.asarray(means, jnp.float32))
    slope = jax.grad(lambda p: loss(p, Pair(jnp.zeros(NUM), jnp.zeros(NUM)), ones).sum())(pair)
    expected, expected_slope = without_reference(name, settings, trainer, function, means)
    np.testing.assert_allclose(loss(pair, Pair(jnp.zeros(NUM), jnp.zeros(NUM)), ones), expected, rtol=1e-5)
    np.testing.assert_allclose(slope.chosen, expected_slope[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope.rejected, expected_slope[1], rtol=1e-5, atol=1e-6)


CPO = dict(alpha=0.0, accelerator=SimpleNamespace(device=torch.device("cpu")))


def test_simpo_equals_trl():
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = SimpleNamespace(**CPO, loss_type="simpo", beta=2.0, simpo_gamma=0.5, label_smoothing=0.0)
    check_without_reference(
        "simpo", {"beta": 2.0, "margin": 0.5}, trainer, lambda *args: cpo.CPOTrainer.cpo_loss(*args)[0]
    )


def test_cdpo_equals_trl():
    """TRL's smoothed sigmoid is in its trainer without a reference: with log-ratios in place of log-probs it is
    cdpo.
    """
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = SimpleNamespace(**CPO, loss_type="sigmoid", beta=0.3, label_smoothing=0.2)
    check_without_reference(
        "cdpo", {"beta": 0.3, "label_smoothing": 0.2}, trainer, lambda *args: cpo.CPOTrainer.cpo_loss(*args)[0]
    )


def test_orpo_equals_trl():
    """TRL has the odds ratio apart, with the other sign: the loss is the chosen response's mean negative log-prob less
    it.
    """
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = SimpleNamespace(beta=0.1, accelerator=CPO["accelerator"])

    def loss(trainer, chosen, rejected):
        return -chosen - orpo.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]

    check_without_reference("orpo", {"beta": 0.1}, trainer, loss)
