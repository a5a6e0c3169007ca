"""Base losses against numbers derived by hand and against float64 NumPy written from the published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sso_jax.runtime.errors import InputError
from sso_jax.training.losses import BASE_LOSSES, Pair, base_loss, dpo_loss, ipo_loss, loss_settings

LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss}
names = pytest.mark.parametrize("name", LOSSES)
betas = pytest.mark.parametrize("beta", [0.1, 0.5])


def numpy_loss(name, policy, reference, num_tokens, beta):
    """The formulas of docs/objectives.md in float64; each argument is [chosen or rejected, B]."""
    h = policy - reference
    if name == "dpo":  # -log sigmoid(z) = log(1 + exp(-z))
        return np.logaddexp(0.0, -beta * (h[0] - h[1]))
    return (h[0] / num_tokens[0] - h[1] / num_tokens[1] - 1 / (2 * beta)) ** 2


def random_pairs(seed=0, size=32):
    """Policy, reference, num_tokens, each [2, B]: 0.5 to 2 nats a token, drift of at most 0.3 nats a token.

    Log-probs are multiples of 1/64, so float32 holds them and their differences exactly, and 1e-6 can be asked of the
    losses.
    """
    rng = np.random.default_rng(seed)
    num_tokens = rng.integers(4, 60, (2, size)).astype(float)
    reference = -num_tokens * rng.uniform(0.5, 2.0, (2, size))
    policy = reference + num_tokens * rng.uniform(-0.3, 0.3, (2, size))
    return np.round(policy * 64) / 64, np.round(reference * 64) / 64, num_tokens


def pair(chosen, rejected):
    return Pair(jnp.atleast_1d(jnp.float32(chosen)), jnp.atleast_1d(jnp.float32(rejected)))


def gradient(loss, policy, reference, num_tokens, beta):
    """d loss_i / d policy_i as [2, B], from the gradient of the sum, so that a leak between pairs would show."""
    return np.array(jax.grad(lambda p: loss(p, pair(*reference), pair(*num_tokens), beta=beta).sum())(pair(*policy)))


def test_dpo_where_beta_times_gap_is_ln_3():
    """-log sigmoid(ln 3) = log(1 + 1/3) = log(4/3), and in the wrong order -log sigmoid(-ln 3) = log(1 + 3) = log 4."""
    beta, gap = 0.1, np.log(3) / 0.1
    good = dpo_loss(pair(gap - 7, -9), pair(-7, -9), pair(5, 3), beta=beta)
    bad = dpo_loss(pair(-7, gap - 9), pair(-7, -9), pair(5, 3), beta=beta)
    np.testing.assert_allclose(good, [np.log(4 / 3)], rtol=1e-6)
    np.testing.assert_allclose(bad, [np.log(4)], rtol=1e-6)


def test_dpo_is_on_sums():
    """h = (6, -4) over (2, 4) tokens, beta ln(3)/10: on sums z = ln 3 and the loss log(4/3); on means z = 0.4 ln 3."""
    loss = dpo_loss(pair(-4, -24), pair(-10, -20), pair(2, 4), beta=np.log(3) / 10)
    np.testing.assert_allclose(loss, [np.log(4 / 3)], rtol=1e-6)


def test_ipo_is_on_means():
    """h = (6, -4) over (2, 4) tokens: gap 3 - (-1) = 4, target 1/(2 * 0.5) = 1, loss 9; on sums it would be (10 - 1)^2
    = 81.
    """
    loss = ipo_loss(pair(-4, -24), pair(-10, -20), pair(2, 4), beta=0.5)
    np.testing.assert_allclose(loss, [9.0], rtol=1e-6)


@betas
def test_at_policy_equal_reference_dpo_is_ln_2_and_ipo_a_quarter_over_beta_squared(beta):
    """D = 0: -log(1/2) = ln 2, and (0 - 1/(2 beta))^2 = 1/(4 beta^2), whatever the log-probs and lengths."""
    same, num_tokens = pair([-3.0, -80.0], [-50.0, -2.0]), pair([2.0, 40.0], [31.0, 1.0])
    np.testing.assert_allclose(dpo_loss(same, same, num_tokens, beta=beta), [np.log(2)] * 2, rtol=1e-6)
    np.testing.assert_allclose(ipo_loss(same, same, num_tokens, beta=beta), [1 / (4 * beta**2)] * 2, rtol=1e-6)


@names
@betas
def test_loss_equals_numpy(name, beta):
    policy, reference, num_tokens = random_pairs()
    loss = LOSSES[name](pair(*policy), pair(*reference), pair(*num_tokens), beta=beta)
    # beta * D reaches 10 at beta 0.5, and exp(-10) carries ten times the rounding of beta: 2e-6
    np.testing.assert_allclose(loss, numpy_loss(name, policy, reference, num_tokens, beta), rtol=2e-6)


@names
@betas
def test_gradient_equals_finite_differences(name, beta):
    """Central differences of the NumPy formula: the error of step 1e-3 is below 1e-7 * |f'''| / 6, that of rounding
    1e-11.
    """
    policy, reference, num_tokens = random_pairs(seed=1)
    expected = np.zeros_like(policy)
    for row in range(2):
        step = np.zeros_like(policy)
        step[row] = 1e-3
        above = numpy_loss(name, policy + step, reference, num_tokens, beta)
        below = numpy_loss(name, policy - step, reference, num_tokens, beta)
        expected[row] = (above - below) / 2e-3
    got = gradient(LOSSES[name], policy, reference, num_tokens, beta)
    # 1e-5: a small sigmoid carries the rounding of beta * D; 1e-8: the differences' own error where the slope has all
    # but vanished
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)


@names
def test_descent_raises_the_chosen_and_lowers_the_rejected(name):
    """dL/dD < 0 for dpo always, for ipo below its target; the gaps here are at most 0.6 nats and the target is 5."""
    chosen, rejected = gradient(LOSSES[name], *random_pairs(seed=2), beta=0.1)
    assert (chosen < 0).all() and (rejected > 0).all()


def test_ipo_pulls_back_beyond_its_target():
    """Gap 4, target 1: the slope 2 * (4 - 1) = 6 over lengths (2, 4) is +3 on the chosen and -1.5 on the rejected."""
    got = gradient(ipo_loss, (-4, -24), (-10, -20), (2, 4), beta=0.5)
    np.testing.assert_allclose(got, [[3.0], [-1.5]], rtol=1e-6)


@names
def test_jit_changes_nothing(name):
    policy, reference, num_tokens = (pair(*rows) for rows in random_pairs(seed=3))
    loss, _ = base_loss(name, {"beta": 0.2})
    np.testing.assert_allclose(
        jax.jit(loss)(policy, reference, num_tokens), loss(policy, reference, num_tokens), rtol=1e-6
    )


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_at_a_gap_of_ten_thousand(beta):
    """-log sigmoid(z) is exp(-z) -> 0 for z = 1e4 beta and -z -> 1e4 beta for the opposite; the slopes in D are 0 and
    -beta.
    """
    policy, reference, num_tokens = (
        ([1e4 - 2, -2.0], [-5.0, 1e4 - 5]),
        ([-2.0, -2.0], [-5.0, -5.0]),
        ([9.0, 9.0], [9.0, 9.0]),
    )
    loss = dpo_loss(pair(*policy), pair(*reference), pair(*num_tokens), beta=beta)
    slope = gradient(dpo_loss, policy, reference, num_tokens, beta)
    np.testing.assert_allclose(loss, [0.0, 1e4 * beta], rtol=1e-6)
    np.testing.assert_allclose(slope, [[0.0, -beta], [0.0, beta]], rtol=1e-6)


@pytest.mark.parametrize(("wrong", "meant"), [("dop", "dpo"), ("ippo", "ipo"), ("IPO_", "ipo")])
def test_an_unknown_name_is_answered_with_near_ones(wrong, meant):
    with pytest.raises(InputError, match=r"objective\.base") as error:
        base_loss(wrong, {})
    assert wrong in str(error.value) and meant in str(error.value).replace(wrong, "")


def test_only_near_names_are_listed():
    with pytest.raises(InputError) as error:
        loss_settings("dop")
    assert "ipo" not in str(error.value)


def test_a_setting_that_the_base_does_not_use_is_refused():
    with pytest.raises(InputError, match=r"objective\.bogus.*dpo"):
        base_loss("dpo", {"beta": 0.2, "bogus": 0.5})


def test_a_setting_of_none_is_as_if_not_given():
    _, settings = base_loss("dpo", {"beta": None, "bogus": None})
    assert settings == {"beta": 0.1}


@names
def test_beta_is_a_tenth_unless_given(name):
    """dpo and ipo default to beta 0.1, in the table and in the function called without settings."""
    policy, reference, num_tokens = random_pairs(seed=4)
    args = pair(*policy), pair(*reference), pair(*num_tokens)
    assert loss_settings(name) == {"beta": 0.1}
    np.testing.assert_allclose(
        BASE_LOSSES[name](*args), numpy_loss(name, policy, reference, num_tokens, 0.1), rtol=2e-6
    )
    loss, settings = base_loss(name, {"beta": 0.3})
    assert settings == {"beta": 0.3}
    np.testing.assert_allclose(loss(*args), numpy_loss(name, policy, reference, num_tokens, 0.3), rtol=2e-6)
    assert loss_settings(name) == {"beta": 0.1}  # what one caller sets does not stay behind for the next
