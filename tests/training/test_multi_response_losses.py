"""Losses that need more than a pair, and aps and the clipped reward, against second writings in float64 NumPy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar

from sso_jax.config import ObjectiveConfig
from sso_jax.recipes.objective import build_objective
from sso_jax.runtime.errors import InputError
from sso_jax.training.losses import base_loss
from sso_jax.training.multi_response_losses import MULTI_RESPONSE_LOSSES, multi_response_loss, neural_sort, sinkhorn
from sso_jax.training.objectives import OnlineWeights, online_objective
from sso_jax.training.pair_values import ContextValues, Pair

CONTEXTS = ("plain", "score_conditioned_chosen", "score_conditioned_rejected")
DEFAULTS = {
    "rpo": {"beta": 0.01, "eta": 0.005},
    "selm": {"beta": 0.01, "alpha": 0.001},
    "reward_conditioned": {"beta": 0.01},
    "opo": {"beta": 0.1, "tau": 1.0},
}
names = pytest.mark.parametrize("name", DEFAULTS)


def softplus(x):
    return np.logaddexp(0.0, x)


def random_numbers(seed=0, size=12, drift=0.3):
    """Policy and reference sums and token counts as [7, B]: y+ and y- in three contexts, y_o in the first."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(4, 40, (7, size)).astype(float)
    reference = -tokens * draw.uniform(0.5, 2.0, (7, size))
    policy = reference + tokens * draw.uniform(-drift, drift, (7, size))
    return np.round(policy * 64) / 64, np.round(reference * 64) / 64, tokens


def steered(rows):
    rows = jnp.asarray(rows, jnp.float32)
    pairs = {name: Pair(rows[2 * i], rows[2 * i + 1]) for i, name in enumerate(CONTEXTS)}
    return ContextValues(**pairs, original=rows[6])


def numpy_opo(scores, tau=1.0):
    """-NDCG by loops over one example's scores (y+, y_o, y-): labels 2, 1, 0."""
    num, gains = 3, [3.0, 1.0, 0.0]
    matrix = np.zeros((num, num))
    for i in range(num):
        logits = [
            ((num + 1 - 2 * (i + 1)) * scores[j] - sum(abs(scores[j] - scores[m]) for m in range(num))) / tau
            for j in range(num)
        ]
        weights = [math.exp(x - max(logits)) for x in logits]
        matrix[i] = [w / sum(weights) for w in weights]
    for step in range(50):
        if step and max(abs(matrix.sum(0) - 1).max(), abs(matrix.sum(1) - 1).max()) <= 1e-6:
            break
        matrix = matrix / matrix.sum(0, keepdims=True)
        matrix = matrix / matrix.sum(1, keepdims=True)
    dcg = sum((matrix[i] @ gains) / math.log2(i + 2) for i in range(num))
    return -dcg / (3.0 / math.log2(2) + 1.0 / math.log2(3))


def numpy_value(name, policy, reference, settings):
    h, beta = policy - reference, settings["beta"]
    dpo = softplus(-beta * (h[0] - h[1]))
    if name == "rpo":
        return dpo - settings["eta"] * beta * policy[0]
    if name == "selm":
        return dpo + settings["alpha"] * beta * policy[6]
    if name == "reward_conditioned":
        return (softplus(-beta * (h[2] - h[3])) + softplus(-beta * (h[4] - h[5]))) / 2
    return np.array([numpy_opo(beta * h[[0, 6, 1], b], settings["tau"]) for b in range(h.shape[1])])


def differences(name, policy, reference, settings):
    slope = np.zeros_like(policy)
    for row in range(len(policy)):
        step = np.zeros_like(policy)
        step[row] = 1e-4
        up, down = (numpy_value(name, policy + sign * step, reference, settings) for sign in (1, -1))
        slope[row] = (up - down) / 2e-4
    return slope


def test_the_table_holds_these_losses():
    assert set(MULTI_RESPONSE_LOSSES) == {*DEFAULTS, "spo"}  # spo: test_spo_head.py


@names
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_values_and_slopes_equal_the_formula(name, factor):
    settings = {key: value * factor for key, value in DEFAULTS[name].items()}
    assert multi_response_loss(name, {})[1] == DEFAULTS[name]
    loss, _ = multi_response_loss(name, settings)
    policy, reference, tokens = random_numbers()
    arrays = steered(reference), steered(tokens)
    value = loss(steered(policy), *arrays)
    np.testing.assert_allclose(value, numpy_value(name, policy, reference, settings), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(loss)(steered(policy), *arrays), value, rtol=1e-5, atol=1e-6)
    got = jax.grad(lambda p: loss(p, *arrays).sum())(steered(policy))
    rows = [part for name_ in CONTEXTS for part in getattr(got, name_)] + [got.original]
    np.testing.assert_allclose(np.stack(rows), differences(name, policy, reference, settings), rtol=1e-3, atol=1e-5)


@names
@pytest.mark.parametrize("offset", [0.0, 1e-3])
def test_slopes_where_policy_and_reference_are_one(name, offset):
    """At the start of every round, and next to it."""
    _, reference, tokens = random_numbers(size=3)
    policy = reference + offset * np.arange(7)[:, None]
    loss, settings = multi_response_loss(name, {})
    got = jax.grad(lambda p: loss(p, steered(reference), steered(tokens)).sum())(steered(policy))
    rows = [part for name_ in CONTEXTS for part in getattr(got, name_)] + [got.original]
    np.testing.assert_allclose(np.stack(rows), differences(name, policy, reference, settings), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_opo_at_a_tie_has_the_slope_of_its_authors_code(dtype):
    """Of h of y+, y_o and y-, at beta 0.1: numbers computed from the authors' code, which always scales once."""
    zero = jnp.zeros((7, 1), dtype)
    loss, _ = multi_response_loss("opo", {})
    got = jax.grad(lambda p: loss(p, steered(zero), steered(np.ones((7, 1)))).sum())(steered(zero))
    slopes = [float(got.plain.chosen[0]), float(got.original[0]), float(got.plain.rejected[0])]
    np.testing.assert_allclose(slopes, [-0.0153, 0.0031, 0.0122], atol=5e-5)


@names
@pytest.mark.parametrize("rows", list(itertools.permutations((0.0, 1e4, -1e4))))
def test_extreme_log_ratios_give_no_nan(name, rows):
    loss, _ = multi_response_loss(name, {})
    policy = np.zeros((7, 1)) - 3e4
    policy[[0, 1, 6], 0] += rows
    policy[[2, 3], 0] += rows[:2]
    value, gradient = jax.value_and_grad(
        lambda p: loss(p, steered(np.zeros((7, 1)) - 3e4), steered(np.ones((7, 1)))).sum()
    )(steered(policy))
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ((3, 2, 1), -1.0),
        ((3, 1, 2), -1.0 * (3 + 0 / math.log2(3) + 1 / 2) / (3 + 1 / math.log2(3))),
        ((1, 2, 3), -1.0 * (0 + 1 / math.log2(3) + 3 / 2) / (3 + 1 / math.log2(3))),
    ],
)
def test_opo_of_well_parted_scores_is_minus_their_ndcg(order, expected):
    """Scores hundreds apart sort exactly: the NDCG of places by hand, gains 3, 1, 0 and discounts 1, 1/log2(3), 1/2."""
    loss, _ = multi_response_loss("opo", {"beta": 1.0})
    chosen, original, rejected = (300.0 * place for place in order)
    policy = ContextValues(plain=Pair(jnp.array([chosen]), jnp.array([rejected])), original=jnp.array([original]))
    zero = ContextValues(plain=Pair(jnp.zeros(1), jnp.zeros(1)), original=jnp.zeros(1))
    np.testing.assert_allclose(loss(policy, zero, zero), [expected], rtol=1e-6)


def test_opo_where_all_scores_are_even():
    """Every place holds a third of each: DCG = 4/3 (1 + 1/log2(3) + 1/2), over 3 + 1/log2(3)."""
    zero = ContextValues(plain=Pair(jnp.zeros(1), jnp.zeros(1)), original=jnp.zeros(1))
    expected = -4 / 3 * (1.5 + 1 / math.log2(3)) / (3 + 1 / math.log2(3))
    np.testing.assert_allclose(multi_response_loss("opo", {})[0](zero, zero, zero), [expected], rtol=1e-6)


def test_sinkhorn_makes_rows_and_columns_sum_to_one():
    places = sinkhorn(neural_sort(jnp.array([[0.3, -0.4, 1.2], [0.0, 0.1, 0.2]]), 1.0))
    np.testing.assert_allclose(places.sum(1), 1.0, atol=1e-5)
    np.testing.assert_allclose(places.sum(2), 1.0, atol=1e-5)


# aps


@pytest.mark.parametrize(("rho", "published"), [(0.05, 0.649), (0.1, 0.943), (0.3, 1.870)])
def test_aps_scale_is_where_the_entropy_is(rho, published):
    """u* by scipy's root of H(sigmoid(u)) = ln 2 - rho; the loss at z is that at scale |z|/u*."""

    def entropy(u):
        p = 1 / (1 + math.exp(-u))
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    root = brentq(lambda u: entropy(u) - math.log(2) + rho, 1e-6, 20)
    assert root == pytest.approx(published, abs=1e-3)
    loss, _ = base_loss("aps", {"beta": 1.0, "rho": rho})
    for z in (1.0, -1.0):
        t = 1.0 / root
        expected = t * softplus(-z / t) + (rho - math.log(2)) * t
        assert float(
            loss(Pair(jnp.array([z]), jnp.zeros(1)), *[Pair(jnp.zeros(1), jnp.zeros(1))] * 2)[0]
        ) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("z", [-30.0, -3.0, -0.02, 0.05, 0.7, 4.0, 60.0])
def test_aps_is_the_minimum_over_its_scale(z):
    """scipy's bounded minimum over t of the paper's formula; and its slope in z is that at the minimum,
    -sigmoid(-z/t).
    """
    rho, t_min, t_max = 0.1, 0.1, 5.0
    found = minimize_scalar(
        lambda t: t * softplus(-z / t) + (rho - math.log(2)) * t,
        bounds=(t_min, t_max),
        method="bounded",
        options={"xatol": 1e-10},
    )
    loss, settings = base_loss("aps", {"beta": 1.0})
    assert settings == {"beta": 1.0, "rho": 0.1, "t_min": 0.1, "t_max": 5.0}
    zero = Pair(jnp.zeros(1), jnp.zeros(1))
    value, slope = jax.value_and_grad(lambda c: loss(Pair(c, jnp.zeros(1)), zero, zero).sum())(jnp.array([z]))
    assert float(value) == pytest.approx(found.fun, rel=1e-5, abs=1e-6)
    assert float(slope[0]) == pytest.approx(-1 / (1 + math.exp(min(z / found.x, 700))), rel=1e-3, abs=1e-6)


# the clipped reward


@pytest.mark.parametrize(
    ("a", "b", "expected", "slopes"),
    [
        (1.0, -0.5, math.log1p(math.exp(-1.5)), (True, True)),
        (9.0, -0.5, math.log1p(math.exp(-2.5)), (False, True)),
        (1.0, -9.0, math.log1p(math.exp(-3.0)), (True, False)),
        (-9.0, 9.0, 18.0 + math.log1p(math.exp(-18.0)), (True, True)),
    ],
)
def test_clipped_reward_by_hand(a, b, expected, slopes):
    """c = 2: beyond it y+ earns nothing, and below -2 neither does y-; the wrong way round nothing is clipped."""
    loss, _ = base_loss("clipped", {"beta": 0.5, "clip": 2.0})
    zero = Pair(jnp.zeros(1), jnp.zeros(1))
    value, slope = jax.value_and_grad(lambda p: loss(p, zero, zero).sum())(
        Pair(jnp.array([a / 0.5]), jnp.array([b / 0.5]))
    )
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert (float(slope.chosen[0]) != 0, float(slope.rejected[0]) != 0) == slopes


# inside SSO


@names
def test_inside_sso_it_takes_the_plain_place_and_steering_is_dpo(name):
    """L = loss + W g (L+ + L-) with dpo at the same beta under the steered prompts."""
    objective = build_objective(ObjectiveConfig(base=name, beta=0.05, steering_weight=0.4))
    policy, reference, tokens = random_numbers(seed=3)
    arrays = [
        steered(a)._replace(
            positive=Pair(*jnp.asarray(a[2:4], jnp.float32)), negative=Pair(*jnp.asarray(a[4:6], jnp.float32))
        )
        for a in (policy, reference, tokens)
    ]
    terms = objective.terms(*arrays)
    h, mlp = policy - reference, policy / tokens
    settings = {**DEFAULTS[name], "beta": 0.05}
    steering = softplus(-0.05 * (h[2] - h[3])) + softplus(-0.05 * (h[4] - h[5]))
    weight = 1 / (1 + np.exp(0.66 * mlp[0] + 0.34 * mlp[1]))
    expected = numpy_value(name, policy, reference, settings) + weight * 0.4 * steering
    np.testing.assert_allclose(terms.loss, expected, rtol=1e-5)
    assert objective.rewards.keywords == {"beta": 0.05}
    assert ("plain", "chosen") in objective.cells and ("negative", "original") in objective.cells
    assert (("plain", "original") in objective.cells) == (name in ("selm", "opo"))


def test_names_and_settings_of_all_tables_are_checked_alike():
    with pytest.raises(InputError, match=r"objective\.base: there is no loss 'sellm'; give one such as selm"):
        build_objective(ObjectiveConfig(base="sellm"))
    with pytest.raises(
        InputError, match=r"objective\.label_smoothing: 0\.1 is not used by base 'selm', which takes beta, alpha"
    ):
        build_objective(ObjectiveConfig(base="selm", label_smoothing=0.1))
    with pytest.raises(InputError, match=r"objective\.t_min: 6\.0 is above objective\.t_max 5\.0"):
        build_objective(ObjectiveConfig(base="aps", t_min=6.0))


def test_form_generator_has_dpo_where_the_base_needs_the_plain_prompt(caplog):
    objective = build_objective(ObjectiveConfig(base="opo", form="generator"))
    assert "'opo'" in caplog.text
    assert {context for context, _ in objective.cells} == {"positive", "negative"}


def test_online_is_unchanged_where_no_plain_loss_is_given():
    policy, reference, tokens = (steered(a) for a in random_numbers(seed=4))
    base, _ = base_loss("dpo", {})
    alone = online_objective(
        policy, reference, tokens, base=base, weights=OnlineWeights(use_steering=False, use_weight=False)
    )
    np.testing.assert_allclose(alone.loss, base(policy.plain, reference.plain, tokens.plain))
