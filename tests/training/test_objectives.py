"""SSO's objectives against numbers derived by hand and against float64 NumPy written from the paper's formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sso_jax.config import ObjectiveConfig
from sso_jax.recipes.objective import build_objective
from sso_jax.training.losses import Pair, base_loss
from sso_jax.training.objectives import (
    OnlineWeights,
    SteeringScale,
    Terms,
    generator_objective,
    online_objective,
    pair_metrics,
    pairwise_objective,
    policy_weight,
)
from sso_jax.training.pair_values import ContextValues, sum_rewards

BETA = 0.2
PLAIN, POSITIVE, NEGATIVE = range(3)
CHOSEN, REJECTED = range(2)
bases = pytest.mark.parametrize("name", ["dpo", "ipo"])


def base_of(name):
    return base_loss(name, {"beta": BETA})[0]


def steered(array, contexts=(PLAIN, POSITIVE, NEGATIVE)):
    """[context, chosen or rejected, B] in the library's types; contexts that are not named are None."""
    pairs = [Pair(*(jnp.asarray(row, jnp.float32) for row in rows)) for rows in array]
    return ContextValues(*(pairs[c] if c in contexts else None for c in range(3)))


def random_triples(seed=0, size=16):
    """Policy, reference, num_tokens, each [3, 2, B] in float64: (x; y+, y-), (x+; y+, y-), (x-; y_o, y+).

    0.5 to 2 nats a token, drift of at most 0.3 nats a token, so |beta D| stays moderate and IPO below its target of
    2.5. Log-probs are multiples of 1/64, so float32 holds them and their differences exactly, and 1e-6 can be asked of
    the objectives.
    """
    rng = np.random.default_rng(seed)
    good, bad, original = rng.integers(4, 60, (3, size)).astype(float)
    num_tokens = np.array([[good, bad], [good, bad], [original, good]])
    reference = -num_tokens * rng.uniform(0.5, 2.0, num_tokens.shape)
    policy = reference + num_tokens * rng.uniform(-0.3, 0.3, num_tokens.shape)
    return np.round(policy * 64) / 64, np.round(reference * 64) / 64, num_tokens


def even_triple():
    """Policy = reference, every mlp = -ln 3, lengths |y+| = 2, |y-| = 5, |y_o| = 3: W is 3/4, every dpo ln 2, every ipo
    6.25.
    """
    num_tokens = np.array([[[2.0], [5.0]], [[2.0], [5.0]], [[3.0], [2.0]]])
    log_probs = -np.log(3) * num_tokens
    return log_probs, log_probs, num_tokens


def numpy_base(name, policy, reference, num_tokens, context):
    """L_base(c, w, l) of one context: dpo on sums, ipo on means."""
    h, counts = (policy - reference)[context], num_tokens[context]
    if name == "dpo":  # -log sigmoid(z) = log(1 + exp(-z))
        return np.logaddexp(0.0, -BETA * (h[CHOSEN] - h[REJECTED]))
    return (h[CHOSEN] / counts[CHOSEN] - h[REJECTED] / counts[REJECTED] - 1 / (2 * BETA)) ** 2


def numpy_nll(policy, num_tokens, context):
    return -policy[context, CHOSEN] / num_tokens[context, CHOSEN]


def numpy_weight(policy, num_tokens, a):
    mlp = policy[PLAIN] / num_tokens[PLAIN]
    return 1 / (1 + np.exp(a * mlp[CHOSEN] + (1 - a) * mlp[REJECTED]))


def numpy_online(name, policy, reference, num_tokens, *, a=0.66, g=0.1, weight=None, with_g=True, scale=(1, 1)):
    """L = base + W*g*G of METHOD.md, version 1; without G it is W*base. `weight` replaces W."""
    base, positive, negative = (numpy_base(name, policy, reference, num_tokens, c) for c in range(3))
    weight = numpy_weight(policy, num_tokens, a) if weight is None else weight
    return base + weight * g * (scale[0] * positive + scale[1] * negative) if with_g else weight * base


def numpy_generator(name, policy, reference, num_tokens, *, gamma=0.1, scale=(1, 1)):
    """L+ + L- of METHOD.md, version 2, each with gamma times the NLL of its winner."""
    good, bad = (
        numpy_base(name, policy, reference, num_tokens, c) + gamma * numpy_nll(policy, num_tokens, c)
        for c in (POSITIVE, NEGATIVE)
    )
    return scale[0] * good + scale[1] * bad


def differences(formula, policy):
    """Central differences per example of a per-example NumPy formula: truncation below 1e-7 * |f'''| / 6, rounding near
    1e-11.
    """
    slope = np.zeros_like(policy)
    for where in np.ndindex(policy.shape[:2]):
        step = np.zeros_like(policy)
        step[where] = 1e-3
        slope[where] = (formula(policy + step) - formula(policy - step)) / 2e-3
    return slope


def gradient(objective, policy, reference, num_tokens):
    """d loss_i / d policy_i as [3, 2, B], from the gradient of the sum, so that a leak between examples would show."""
    loss = jax.grad(lambda p: objective(p, steered(reference), steered(num_tokens)).loss.sum())
    slopes = loss(steered(policy))
    return np.array([slopes.plain, slopes.positive, slopes.negative])


def call(objective, arrays, contexts=(PLAIN, POSITIVE, NEGATIVE), **settings):
    return objective(*(steered(array, contexts) for array in arrays), **settings)


# the weight W


@pytest.mark.parametrize("alpha", [0.0, 0.66, 1.0])
def test_weight_is_three_quarters_where_every_token_has_probability_a_third(alpha):
    """mlp = -ln 3 for both: sigmoid(ln 3) = 3/4 for each a; the lengths differ, so sums in place of means would
    show.
    """
    weight = policy_weight(
        Pair(jnp.array([-2 * np.log(3)]), jnp.array([-5 * np.log(3)])), Pair(jnp.array([2.0]), jnp.array([5.0])), alpha
    )
    np.testing.assert_allclose(weight, [0.75], rtol=1e-6)


@pytest.mark.parametrize(("alpha", "odds"), [(1.0, 3.0), (0.0, 9.0), (0.5, 3**1.5), (0.66, 3**1.34)])
def test_weight_mixes_chosen_by_alpha_and_rejected_by_the_rest(alpha, odds):
    """mlp = (-ln 3, -2 ln 3): W = sigmoid((a + 2(1-a)) ln 3) = odds / (1 + odds), odds = 3^(2-a)."""
    weight = policy_weight(
        Pair(jnp.array([-2 * np.log(3)]), jnp.array([-10 * np.log(3)])), Pair(jnp.array([2.0]), jnp.array([5.0])), alpha
    )
    np.testing.assert_allclose(weight, [odds / (1 + odds)], rtol=1e-6)


# version 1, the online objective


@pytest.mark.parametrize(
    ("settings", "multiple"),
    [
        ({}, 1 + 0.75 * 0.1 * 2),
        ({"steering_weight": 0.4}, 1 + 0.75 * 0.4 * 2),
        ({"use_weight": False}, 1 + 0.1 * 2),
        ({"use_steering": False}, 0.75),
        ({"use_weight": False, "use_steering": False}, 1),
        ({"scale": SteeringScale(0.0, 1.0)}, 1 + 0.75 * 0.1),
        ({"scale": SteeringScale(1.0, 0.0)}, 1 + 0.75 * 0.1),
        ({"scale": SteeringScale(2.0, 3.0)}, 1 + 0.75 * 0.1 * (2 + 3)),
        ({"detach_weight": True}, 1 + 0.75 * 0.1 * 2),
    ],
)
@pytest.mark.parametrize(("name", "even"), [("dpo", np.log(2)), ("ipo", 6.25)])
def test_online_where_every_pair_is_even(name, even, settings, multiple):
    """Each base term is e (ln 2, or 1/(4 * 0.2^2) = 6.25) and W = 3/4, so L = e (1 + W g (l+ + l-)), and W e without
    G.
    """
    terms = call(online_objective, even_triple(), base=base_of(name), weights=OnlineWeights(**settings))
    np.testing.assert_allclose(terms.loss, [even * multiple], rtol=1e-6)


@bases
@pytest.mark.parametrize(("a", "g"), [(0.66, 0.1), (0.25, 1.5)])
def test_online_equals_numpy(name, a, g):
    arrays = random_triples()
    terms = call(online_objective, arrays, base=base_of(name), weights=OnlineWeights(weight_alpha=a, steering_weight=g))
    np.testing.assert_allclose(
        terms.loss, numpy_online(name, *arrays, a=a, g=g), rtol=2e-6
    )  # 2e-6: beta * D reaches 7 in exp


@bases
def test_online_defaults_are_the_papers(name):
    """a = 0.66, g = 0.1, W and G on, no supervised term."""
    arrays = random_triples(seed=1)
    np.testing.assert_allclose(
        call(online_objective, arrays, base=base_of(name)).loss, numpy_online(name, *arrays), rtol=2e-6
    )


@bases
@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({"use_weight": False}, {"weight": 1.0}),
        ({"use_steering": False}, {"with_g": False}),
        ({"use_weight": False, "use_steering": False}, {"with_g": False, "weight": 1.0}),
        ({"scale": SteeringScale(0.0, 1.0)}, {"scale": (0, 1)}),
        ({"scale": SteeringScale(1.0, 0.0)}, {"scale": (1, 0)}),
        ({"scale": SteeringScale(2.0, 0.5)}, {"scale": (2, 0.5)}),
    ],
)
def test_ablations_equal_numpy(name, settings, formula):
    """g = 1 gives the steering terms the weight of the base loss, so that a wrong one shows plainly."""
    arrays = random_triples(seed=2)
    terms = call(online_objective, arrays, base=base_of(name), weights=OnlineWeights(steering_weight=1.0, **settings))
    np.testing.assert_allclose(terms.loss, numpy_online(name, *arrays, g=1.0, **formula), rtol=2e-6)


@bases
def test_without_both_it_is_pairwise(name):
    """Without W and G what is left is L_base(x, y+, y-), which needs the plain context only."""
    arrays = random_triples(seed=3)
    online = call(
        online_objective,
        arrays,
        [PLAIN],
        base=base_of(name),
        weights=OnlineWeights(use_weight=False, use_steering=False),
    )
    pairwise = call(pairwise_objective, arrays, [PLAIN], base=base_of(name))
    expected = numpy_base(name, *arrays, PLAIN)
    np.testing.assert_allclose(online.loss, expected, rtol=2e-6)
    np.testing.assert_allclose(pairwise.loss, expected, rtol=2e-6)


@pytest.mark.parametrize(("kept", "scale"), [(POSITIVE, (1.0, 0.0)), (NEGATIVE, (0.0, 1.0))])
def test_a_context_of_scale_zero_need_not_be_there(kept, scale):
    arrays = random_triples(seed=4)
    terms = call(
        online_objective, arrays, [PLAIN, kept], base=base_of("ipo"), weights=OnlineWeights(scale=SteeringScale(*scale))
    )
    np.testing.assert_allclose(terms.loss, numpy_online("ipo", *arrays, scale=scale), rtol=1e-6)


# 1e-5 below: float32 rounding of a small sigmoid, and base and W pull the rejected response opposite ways; 1e-7 for
# what they cancel


@bases
@pytest.mark.parametrize("with_g", [True, False])
def test_gradient_flows_through_the_weight(name, with_g):
    """As in the authors' code: the slope of the whole formula, W's own dependence on the policy included."""
    policy, reference, num_tokens = random_triples(seed=5)
    expected = differences(lambda p: numpy_online(name, p, reference, num_tokens, g=1.0, with_g=with_g), policy)
    objective = functools.partial(
        online_objective, base=base_of(name), weights=OnlineWeights(steering_weight=1.0, use_steering=with_g)
    )
    np.testing.assert_allclose(gradient(objective, policy, reference, num_tokens), expected, rtol=1e-5, atol=1e-7)


@bases
@pytest.mark.parametrize("with_g", [True, False])
def test_gradient_stops_at_a_detached_weight(name, with_g):
    """The same formula with W held at its value for the unmoved policy; the two slopes differ clearly, or neither test
    says much.
    """
    policy, reference, num_tokens = random_triples(seed=5)
    frozen = numpy_weight(policy, num_tokens, 0.66)
    expected = differences(
        lambda p: numpy_online(name, p, reference, num_tokens, g=1.0, with_g=with_g, weight=frozen), policy
    )
    attached = differences(lambda p: numpy_online(name, p, reference, num_tokens, g=1.0, with_g=with_g), policy)
    assert abs(expected - attached)[PLAIN].min() > 1e-5
    objective = functools.partial(
        online_objective,
        base=base_of(name),
        weights=OnlineWeights(steering_weight=1.0, use_steering=with_g, detach_weight=True),
    )
    np.testing.assert_allclose(gradient(objective, policy, reference, num_tokens), expected, rtol=1e-5, atol=1e-7)


def test_supervised_term_by_hand():
    """gamma * -(mlp(y+|x) + g mlp(y+|x+) + g mlp(y_o|x-)), lengths y+ 3, y- 7, y_o 2.

    Log-probs -6, -12 and -10 of the three winners: 2 + 0.1 * 4 + 0.1 * 5 = 2.9, times gamma 0.5 is 1.45. Policy =
    reference and no W make the rest 1.2 ln 2.
    """
    log_probs = np.array([[[-6.0], [-8.0]], [[-12.0], [-9.0]], [[-10.0], [-11.0]]])
    num_tokens = np.array([[[3.0], [7.0]], [[3.0], [7.0]], [[2.0], [3.0]]])
    terms = call(
        online_objective,
        (log_probs, log_probs, num_tokens),
        base=base_of("dpo"),
        sft_weight=0.5,
        weights=OnlineWeights(use_weight=False),
    )
    np.testing.assert_allclose(terms.sft_loss, [2.9], rtol=1e-6)
    np.testing.assert_allclose(terms.loss, [1.2 * np.log(2) + 1.45], rtol=1e-6)


@bases
def test_supervised_term_equals_numpy_and_is_not_weighed_by_w(name):
    arrays = policy, _, num_tokens = random_triples(seed=6)
    plain, positive, negative = (numpy_nll(policy, num_tokens, context) for context in range(3))
    expected = numpy_online(name, *arrays, g=0.3) + 0.7 * (plain + 0.3 * positive + 0.3 * negative)
    terms = call(
        online_objective, arrays, base=base_of(name), sft_weight=0.7, weights=OnlineWeights(steering_weight=0.3)
    )
    np.testing.assert_allclose(terms.loss, expected, rtol=2e-6)


def test_supervised_term_of_the_plain_pair_alone():
    """Pairwise, and online without W and G: L_base + gamma * NLL(y+|x)."""
    arrays = policy, _, num_tokens = random_triples(seed=7)
    expected = numpy_base("ipo", *arrays, PLAIN) + 0.7 * numpy_nll(policy, num_tokens, PLAIN)
    pairwise = call(pairwise_objective, arrays, [PLAIN], base=base_of("ipo"), sft_weight=0.7)
    online = call(
        online_objective,
        arrays,
        [PLAIN],
        base=base_of("ipo"),
        sft_weight=0.7,
        weights=OnlineWeights(use_weight=False, use_steering=False),
    )
    np.testing.assert_allclose(pairwise.loss, expected, rtol=1e-6)
    np.testing.assert_allclose(online.loss, expected, rtol=1e-6)


# version 2, the generator


def test_generator_where_every_pair_is_even():
    """Each base term ln 2, each NLL ln 3, gamma 0.1 by default: 2 ln 2 + 0.2 ln 3."""
    terms = call(generator_objective, even_triple(), base=base_of("dpo"))
    np.testing.assert_allclose(terms.loss, [2 * np.log(2) + 0.2 * np.log(3)], rtol=1e-6)


@bases
@pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 0.5)])
def test_generator_equals_numpy(name, scale):
    """The factor of L+ or L- is that of all of it, its NLL included."""
    arrays = random_triples(seed=8)
    terms = call(generator_objective, arrays, base=base_of(name), scale=SteeringScale(*scale), sft_weight=0.1)
    np.testing.assert_allclose(terms.loss, numpy_generator(name, *arrays, scale=scale), rtol=2e-6)


@bases
@pytest.mark.parametrize(("kept", "scale"), [(POSITIVE, (1.0, 0.0)), (NEGATIVE, (0.0, 1.0))])
def test_one_half_of_the_generator_alone(name, kept, scale):
    """L+ alone or L- alone, with the NLL of its own winner and without the other's; the other context is not there."""
    arrays = random_triples(seed=9)
    terms = call(generator_objective, arrays, [kept], base=base_of(name), scale=SteeringScale(*scale), sft_weight=0.6)
    np.testing.assert_allclose(terms.loss, numpy_generator(name, *arrays, gamma=0.6, scale=scale), rtol=2e-6)


@bases
def test_naive_negative_term_differs_in_its_pair_only(name):
    """L_base(x-, y-, y+) + gamma * NLL(y-|x-): y- and its own log-probs and length stand where y_o stood."""
    policy, reference, num_tokens = random_triples(seed=10)
    usual = call(generator_objective, (policy, reference, num_tokens), base=base_of(name))
    num_tokens[NEGATIVE, CHOSEN] = num_tokens[PLAIN, REJECTED]
    policy[NEGATIVE, CHOSEN] = -0.75 * num_tokens[PLAIN, REJECTED]
    reference[NEGATIVE, CHOSEN] = -1.0 * num_tokens[PLAIN, REJECTED]
    naive = call(generator_objective, (policy, reference, num_tokens), base=base_of(name))
    np.testing.assert_allclose(naive.loss, numpy_generator(name, policy, reference, num_tokens), rtol=2e-6)
    np.testing.assert_array_equal(naive.positive_loss, usual.positive_loss)


@bases
def test_generator_gradient_equals_finite_differences(name):
    policy, reference, num_tokens = random_triples(seed=11)
    expected = differences(lambda p: numpy_generator(name, p, reference, num_tokens), policy)
    got = gradient(functools.partial(generator_objective, base=base_of(name)), policy, reference, num_tokens)
    np.testing.assert_array_equal(got[PLAIN], 0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


@bases
@pytest.mark.parametrize("objective", [online_objective, generator_objective])
def test_the_original_response_wins_under_the_bad_principle(name, objective):
    """A nat more for y_o under x- lowers L-, a nat more for y+ there raises it; L+ does not move."""
    policy, reference, num_tokens = random_triples(seed=12)
    before = call(objective, (policy, reference, num_tokens), base=base_of(name))
    for response, sign in ((CHOSEN, -1), (REJECTED, 1)):
        raised = policy.copy()
        raised[NEGATIVE, response] += 1.0
        after = call(objective, (raised, reference, num_tokens), base=base_of(name))
        assert (sign * (after.negative_loss - before.negative_loss) > 0).all()
        np.testing.assert_array_equal(after.positive_loss, before.positive_loss)


# what the log shows


@bases
def test_terms_of_online_are_before_w_and_g_and_scale(name):
    arrays = policy, _, num_tokens = random_triples(seed=13)
    terms = call(
        online_objective,
        arrays,
        base=base_of(name),
        weights=OnlineWeights(scale=SteeringScale(2.0, 3.0), weight_alpha=0.3),
    )
    np.testing.assert_allclose(terms.base_loss, numpy_base(name, *arrays, PLAIN), rtol=2e-6)
    np.testing.assert_allclose(terms.positive_loss, numpy_base(name, *arrays, POSITIVE), rtol=2e-6)
    np.testing.assert_allclose(terms.negative_loss, numpy_base(name, *arrays, NEGATIVE), rtol=2e-6)
    np.testing.assert_allclose(terms.weight, numpy_weight(policy, num_tokens, 0.3), rtol=1e-6)


def test_terms_of_the_generator_are_before_gamma():
    arrays = policy, _, num_tokens = random_triples(seed=14)
    terms = call(generator_objective, arrays, base=base_of("ipo"), sft_weight=0.6)
    np.testing.assert_allclose(terms.positive_loss, numpy_base("ipo", *arrays, POSITIVE), rtol=1e-6)
    np.testing.assert_allclose(terms.negative_loss, numpy_base("ipo", *arrays, NEGATIVE), rtol=1e-6)
    np.testing.assert_allclose(
        terms.sft_loss, numpy_nll(policy, num_tokens, POSITIVE) + numpy_nll(policy, num_tokens, NEGATIVE), rtol=1e-6
    )


def test_terms_that_an_objective_lacks_are_none():
    arrays = random_triples(seed=15)
    pairwise = call(pairwise_objective, arrays, base=base_of("dpo"))
    generator = call(generator_objective, arrays, base=base_of("dpo"), scale=SteeringScale(1.0, 0.0))
    assert (pairwise.positive_loss, pairwise.negative_loss, pairwise.weight) == (None, None, None)
    assert (generator.base_loss, generator.negative_loss, generator.weight) == (None, None, None)


def test_pair_metrics_by_hand():
    """beta 0.2. h(y+) = (3, -1, 2), h(y-) = (-2, 1, 2): margins 0.2 * (5, -2, 0), and an even pair is not accurate.

    With |y+| = 1, |y-| = 2, ipo's are 0.2 * (3 + 1, -1 - 0.5, 2 - 1) = (0.8, -0.3, 0.2), and those without a reference
    0.2 * (-7 + 4.5, -6 + 2, -3 + 0.5) = (-0.5, -0.8, -0.5).
    """
    policy = Pair(jnp.array([-7.0, -6.0, -3.0]), jnp.array([-9.0, -4.0, -1.0]))
    reference = Pair(jnp.array([-10.0, -5.0, -5.0]), jnp.array([-7.0, -5.0, -3.0]))
    num_tokens = Pair(jnp.ones(3), 2.0 * jnp.ones(3))

    def metrics_of(base):
        objective = build_objective(ObjectiveConfig(base=base, beta=0.2, form="pairwise"))
        values = (ContextValues(plain=part) for part in (policy, reference, num_tokens))
        return pair_metrics(Terms(loss=jnp.array([4.0, 5.0, 6.0])), *values, objective.rewards)

    for base, margins in (("ipo", [0.8, -0.3, 0.2]), ("simpo", [-0.5, -0.8, -0.5]), ("orpo", [-0.5, -0.8, -0.5])):
        np.testing.assert_allclose(metrics_of(base)["margin"], margins, rtol=1e-6)
        np.testing.assert_array_equal(metrics_of(base)["accuracy"], np.array(margins) > 0)
        np.testing.assert_allclose(metrics_of(base)["sum_margin"], [5.0, -2.0, 0.0], rtol=1e-6)
    metrics = metrics_of("dpo")
    np.testing.assert_allclose(metrics["margin"], [1.0, -0.4, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(metrics["accuracy"], [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(metrics["chosen_log_prob"], [-7.0, -6.0, -3.0])
    np.testing.assert_array_equal(metrics["rejected_log_prob"], [-9.0, -4.0, -1.0])
    np.testing.assert_array_equal(metrics["loss"], [4.0, 5.0, 6.0])


def test_pair_metrics_hold_nothing_that_is_not_there():
    """The generator has no plain pair, hence no margin, and here no L- either."""
    policy, reference, num_tokens = (steered(array, [POSITIVE]) for array in random_triples(seed=16))
    terms = generator_objective(policy, reference, num_tokens, base=base_of("dpo"), scale=SteeringScale(1.0, 0.0))
    assert set(pair_metrics(terms, policy, reference, num_tokens, sum_rewards)) == {"loss", "positive_loss", "sft_loss"}


@bases
@pytest.mark.parametrize("objective", [online_objective, generator_objective])
def test_jit_changes_nothing(name, objective):
    arrays = [steered(array) for array in random_triples(seed=17)]
    compose = functools.partial(objective, base=base_of(name), sft_weight=0.5)
    for jitted, plain in zip(
        jax.tree.leaves(jax.jit(compose)(*arrays)), jax.tree.leaves(compose(*arrays)), strict=True
    ):
        np.testing.assert_allclose(jitted, plain, rtol=2e-6)  # the compiler may fuse and reorder a float32 sum
