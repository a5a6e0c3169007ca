"""The pairwise losses besides DPO and IPO: published values, float64 NumPy from the formulas, finite differences,
extremes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sso_jax.training.losses import BASE_LOSSES, Pair, base_loss, loss_settings


def log_sigmoid(z):
    return -np.logaddexp(0.0, -z)


def sigmoid(z):
    return np.exp(log_sigmoid(z))


# Of a = h(chosen), b = h(rejected), the means mw and ml, and the settings; written from the table of formulas, float64.
FORMULAS = {
    "dpo_norm": lambda a, b, mw, ml, beta, nw, nl: -log_sigmoid(beta * (a / nw - b / nl)),
    "fdpo_forward_kl": lambda a, b, mw, ml, beta: -log_sigmoid(beta * (np.exp(-b) - np.exp(-a))),
    "fdpo_js": lambda a, b, mw, ml, beta: (
        -log_sigmoid(beta * (np.log(2 * np.exp(a) / (1 + np.exp(a))) - np.log(2 * np.exp(b) / (1 + np.exp(b)))))
    ),
    "fdpo_alpha": lambda a, b, mw, ml, beta, alpha: (
        -log_sigmoid(beta * (np.exp(-alpha * b) - np.exp(-alpha * a)) / alpha)
    ),
    "cdpo": lambda a, b, mw, ml, beta, label_smoothing: (
        -(1 - label_smoothing) * log_sigmoid(beta * (a - b)) - label_smoothing * log_sigmoid(-beta * (a - b))
    ),
    "robust": lambda a, b, mw, ml, beta, label_smoothing: (
        (-(1 - label_smoothing) * log_sigmoid(beta * (a - b)) + label_smoothing * log_sigmoid(-beta * (a - b)))
        / (1 - 2 * label_smoothing)
    ),
    "hinge": lambda a, b, mw, ml, beta: np.maximum(0, 1 - beta * (a - b)),
    "simpo": lambda a, b, mw, ml, beta, margin: -log_sigmoid(beta * (mw - ml) - margin),
    "orpo": lambda a, b, mw, ml, beta: (
        -mw - beta * log_sigmoid((mw - ml) - (np.log(1 - np.exp(mw)) - np.log(1 - np.exp(ml))))
    ),
    "exo": lambda a, b, mw, ml, beta, label_smoothing: (
        sigmoid(beta * (a - b)) * (log_sigmoid(beta * (a - b)) - np.log(1 - label_smoothing))
        + (1 - sigmoid(beta * (a - b))) * (log_sigmoid(-beta * (a - b)) - np.log(label_smoothing))
    ),
    "nca": lambda a, b, mw, ml, beta: (
        -log_sigmoid(beta * a) - 0.5 * log_sigmoid(-beta * a) - 0.5 * log_sigmoid(-beta * b)
    ),
    "sppo": lambda a, b, mw, ml, beta: (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2,
    "apo_zero": lambda a, b, mw, ml, beta: 1 - sigmoid(beta * a) + sigmoid(beta * b),
    "apo_down": lambda a, b, mw, ml, beta: sigmoid(beta * a) + 1 - sigmoid(beta * (a - b)),
    "discopop": lambda a, b, mw, ml, beta, tau: (
        (1 - sigmoid(beta * (a - b) / tau)) * np.log1p(np.exp(-beta * (a - b)))
        + sigmoid(beta * (a - b) / tau) * np.exp(-beta * (a - b))
    ),
}
DEFAULTS = {
    "dpo_norm": dict(beta=5.0),
    "fdpo_forward_kl": dict(beta=0.1),
    "fdpo_js": dict(beta=0.1),
    "fdpo_alpha": dict(beta=0.1, alpha=0.5),
    "cdpo": dict(beta=0.1, label_smoothing=0.1),
    "robust": dict(beta=0.1, label_smoothing=0.1),
    "hinge": dict(beta=0.1),
    "simpo": dict(beta=2.0, margin=0.5),
    "orpo": dict(beta=0.1),
    "exo": dict(beta=0.1, label_smoothing=1e-3),
    "nca": dict(beta=0.01),
    "sppo": dict(beta=0.001),
    "apo_zero": dict(beta=0.1),
    "apo_down": dict(beta=0.1),
    "discopop": dict(beta=0.05, tau=0.05),
}
names = pytest.mark.parametrize("name", FORMULAS)


def random_pairs(seed=0, size=24):
    """[chosen, rejected] of policy, reference and token counts; multiples of 1/64, which float32 holds exactly."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(4, 40, (2, size)).astype(float)
    reference = -tokens * draw.uniform(0.5, 2.0, (2, size))
    policy = np.minimum(reference + tokens * draw.uniform(-0.3, 0.3, (2, size)), -1.0)
    return np.round(policy * 64) / 64, np.round(reference * 64) / 64, tokens


def numpy_value(name, policy, reference, tokens, settings):
    (a, b), (mw, ml) = policy - reference, policy / tokens
    lengths = dict(zip(("nw", "nl"), tokens, strict=True)) if name == "dpo_norm" else {}
    return FORMULAS[name](a, b, mw, ml, **settings, **lengths)


def as_pair(values):
    return Pair(*jnp.asarray(values, jnp.float32))


def test_the_table_holds_these_losses_and_no_other():
    assert set(BASE_LOSSES) == {
        *FORMULAS,
        "dpo",
        "ipo",
        "aps",
        "clipped",
    }  # the last two: test_multi_response_losses.py


@names
def test_defaults_are_the_published_ones(name):
    assert loss_settings(name) == DEFAULTS[name]


@names
@pytest.mark.parametrize("changed", [False, True])
def test_values_equal_the_formula(name, changed):
    settings = {key: value * 1.5 for key, value in DEFAULTS[name].items()} if changed else DEFAULTS[name]
    policy, reference, tokens = random_pairs()
    loss, _ = base_loss(name, settings)
    expected = numpy_value(name, policy, reference, tokens, settings)
    got = loss(as_pair(policy), as_pair(reference), as_pair(tokens))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(loss)(as_pair(policy), as_pair(reference), as_pair(tokens)), got, rtol=1e-5, atol=1e-6
    )


@names
def test_gradients_equal_finite_differences_of_the_formula(name):
    policy, reference, tokens = random_pairs(seed=1, size=8)
    loss, _ = base_loss(name, {})
    ours = jax.grad(lambda p: loss(p, as_pair(reference), as_pair(tokens)).sum())(as_pair(policy))
    for side in (0, 1):
        step = np.zeros_like(policy)
        step[side] = 1e-4
        up, down = (numpy_value(name, policy + sign * step, reference, tokens, DEFAULTS[name]) for sign in (1, -1))
        np.testing.assert_allclose(ours[side], (up - down) / 2e-4, rtol=1e-4, atol=1e-6)


@names
@pytest.mark.parametrize("offset", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_where_policy_and_reference_are_one(name, offset, dtype):
    """At the start of every round, and next to it; against central differences of the formula, at values that both
    types hold.
    """
    reference, tokens = np.array([[-16.0, -40.0], [-24.0, -8.0]]), np.array([[8.0, 16.0], [16.0, 8.0]])
    policy = reference + offset
    loss, _ = base_loss(name, {})
    ours = jax.grad(lambda p: loss(p, as_pair(reference), as_pair(tokens)).sum())(
        Pair(*(jnp.asarray(part, dtype).astype("float32") for part in policy))
    )
    for side in (0, 1):
        step = np.zeros_like(policy)
        step[side] = 1e-4
        up, down = (numpy_value(name, policy + sign * step, reference, tokens, DEFAULTS[name]) for sign in (1, -1))
        np.testing.assert_allclose(ours[side], (up - down) / 2e-4, rtol=2e-3, atol=1e-6)


@names
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_log_ratios_give_no_nan(name, gap):
    loss, _ = base_loss(name, {})
    reference, tokens = Pair(jnp.array([-2e4]), jnp.array([-2e4])), Pair(jnp.array([50.0]), jnp.array([50.0]))
    policy = Pair(jnp.array([-2e4 + max(gap, 0)]), jnp.array([-2e4 + max(-gap, 0)]))
    value, gradient = jax.value_and_grad(lambda p: loss(p, reference, tokens).sum())(policy)
    assert np.isfinite(value) and np.isfinite(gradient.chosen).all() and np.isfinite(gradient.rejected).all()


@pytest.mark.parametrize("alpha", [1e-4, 1.0])
def test_alpha_divergences_are_between_the_two_kls(alpha):
    """Near 0 the reverse KL, which is dpo, and at 1 the forward KL."""
    values = [as_pair(part) for part in random_pairs(seed=3)]
    ours, _ = base_loss("fdpo_alpha", {"alpha": alpha})
    other, _ = base_loss("dpo" if alpha < 1 else "fdpo_forward_kl", {})
    np.testing.assert_allclose(ours(*values), other(*values), rtol=1e-2 if alpha < 1 else 1e-6, atol=1e-6)


def test_orpo_stays_finite_where_a_response_is_certain():
    loss, _ = base_loss("orpo", {})
    one = Pair(jnp.array([1.0]), jnp.array([1.0]))
    value, gradient = jax.value_and_grad(lambda p: loss(p, p, one).sum())(Pair(jnp.array([0.0]), jnp.array([-1e-3])))
    assert np.isfinite(value) and np.isfinite(gradient.rejected).all()


@pytest.mark.parametrize(("u", "expected"), [(0.0, 0.846574), (-0.11857, 0.785924), (0.072006, 0.878290)])
def test_discopop_has_its_published_values(u, expected):
    loss, _ = base_loss("discopop", {})
    zero, one = Pair(jnp.zeros(1), jnp.zeros(1)), Pair(jnp.ones(1), jnp.ones(1))
    assert float(loss(Pair(jnp.array([u / 0.05]), jnp.zeros(1)), zero, one)[0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("tau", "sign"), [(0.05, 1), (0.10, 1), (0.11, -1), (1.0, -1)])
def test_discopop_slope_at_no_margin_is_wrong_below_tau_0_11(tau, sign):
    loss, _ = base_loss("discopop", {"tau": tau})
    zero, one = Pair(jnp.zeros(1), jnp.zeros(1)), Pair(jnp.ones(1), jnp.ones(1))
    slope = jax.grad(lambda chosen: loss(Pair(chosen, jnp.zeros(1)), zero, one).sum())(jnp.zeros(1))
    assert np.sign(float(slope[0])) == sign


def test_robust_is_dpo_on_average_over_flipped_labels():
    policy, reference, tokens = (as_pair(part) for part in random_pairs())

    def flip(pair):
        return Pair(pair.rejected, pair.chosen)

    robust, dpo = base_loss("robust", {"label_smoothing": 0.2})[0], base_loss("dpo", {})[0]
    average = 0.8 * robust(policy, reference, tokens) + 0.2 * robust(flip(policy), flip(reference), flip(tokens))
    np.testing.assert_allclose(average, dpo(policy, reference, tokens), rtol=1e-5, atol=1e-6)
