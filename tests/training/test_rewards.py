"""Reward models: the loss against hand-made numbers, rewards against transformers, the places where they are read, and
mixing.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from jax import numpy as jnp
from toys import FAMILIES, toy_architecture

from sso_jax.config import ModelConfig, RewardConfig
from sso_jax.data.chat import make_chat
from sso_jax.data.records import Triple
from sso_jax.data.tokenizer import encode_text, tokens_hash
from sso_jax.models.export import export_reward_model, padding_for_rewards
from sso_jax.models.kernels import KERNELS, cudnn_attend
from sso_jax.models.reward_head import reward_model
from sso_jax.models.transformer import abstract_params, init_params
from sso_jax.preferences.filters import keep_widest, with_rewards
from sso_jax.recipes.reward import mix
from sso_jax.recipes.reward_model import accuracy_of, find_reward_model, open_reward_scorer, tokenize_pair
from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.mesh import param_shardings
from sso_jax.runtime.signals import Stopped
from sso_jax.toy.pretraining import train_tokenizer
from sso_jax.training import rewards
from sso_jax.training.losses import Pair
from sso_jax.training.packing import pack
from sso_jax.training.rewards import (
    TokenizedPair,
    bradley_terry_loss,
    branch_ends,
    build_reward_fn,
    compute_rewards,
    reward_losses,
    reward_step,
)
from sso_jax.training.row_shapes import RowShape
from sso_jax.training.step_packing import StepShape
from sso_jax.training.trees import Branch, Tree


def loss_of(chosen: float, rejected: float, **settings) -> float:
    pair = Pair(jnp.array([chosen]), jnp.array([rejected]))
    plain, jitted = (
        f(pair)
        for f in (lambda p: bradley_terry_loss(p, **settings), jax.jit(lambda p: bradley_terry_loss(p, **settings)))
    )
    assert plain[0] == pytest.approx(float(jitted[0]), rel=1e-6)
    return float(plain[0])


def test_the_loss_by_hand():
    """With log sigmoid(x) = -log(1 + exp(-x)), each value worked out from the formula with `math`."""

    def softplus(x):
        return math.log1p(math.exp(x))

    assert loss_of(0.0, 0.0) == pytest.approx(math.log(2), rel=1e-6)
    assert loss_of(1.5, -0.5) == pytest.approx(softplus(-2.0), rel=1e-6)
    assert loss_of(1.5, -0.5, margin=1.0) == pytest.approx(softplus(-1.0), rel=1e-6)
    assert loss_of(1.5, -0.5, label_smoothing=0.1) == pytest.approx(
        0.9 * softplus(-2.0) + 0.1 * softplus(2.0), rel=1e-6
    )
    assert loss_of(1.5, -0.5, label_smoothing=0.1, margin=1.0) == pytest.approx(
        0.9 * softplus(-1.0) + 0.1 * softplus(3.0), rel=1e-6
    )
    assert loss_of(1.5, -0.5, center_coefficient=0.01) == pytest.approx(softplus(-2.0) + 0.01 * 1.0, rel=1e-6)
    assert loss_of(200.0, -200.0) == 0.0 and math.isfinite(loss_of(-200.0, 200.0))


def test_smoothing_is_least_where_the_odds_are_those_of_the_labels():
    """The derivative in the gap d is sigmoid(d) - (1 - e): it is 0 at d = log((1 - e) / e)."""
    best = math.log(0.8 / 0.2)
    slope = jax.grad(lambda gap: bradley_terry_loss(Pair(gap, jnp.zeros(())), label_smoothing=0.2))
    assert slope(best) == pytest.approx(0.0, abs=1e-6) and slope(best - 1) < 0 < slope(best + 1)


def small(family):
    return toy_architecture(num_layers=2, **FAMILIES[family])


def random_reward_model(architecture, mesh):
    """A reward model whose weights are three times the usual: rewards differ clearly, and float32 still holds five
    digits.
    """
    model = reward_model(dataclasses.replace(architecture, vocab_size=1024, max_positions=512))
    params = jax.tree.map(
        lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, nn.unbox(init_params(model, jax.random.key(1)))
    )
    params["score"] = jax.random.normal(jax.random.key(2), params["score"].shape)
    return model, jax.device_put(params, param_shardings(abstract_params(model), mesh))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


EARLIER = ({"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"})
PAIRS = [
    Triple("a", "Spell fox.", None, None, "The letters are f o x.", "Do not bother me.", None),
    Triple("b", "What is 1 plus 1?", None, None, "It is 2. " * 12, "3", None),
    Triple(
        "c",
        "Now 2?",
        None,
        None,
        "It is 4.",
        "no",
        None,
        history=({"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}),
    ),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_those_of_transformers(family, tokenizer, one_device, tmp_path):
    model, params = random_reward_model(small(family), one_device)
    export_reward_model(params, model.architecture, tokenizer, tmp_path / "rm", "float32")
    scorer = open_reward_scorer(str(tmp_path / "rm"), ModelConfig(), one_device)
    ours = scorer.rewards([tokenize_pair(scorer.chat, pair) for pair in PAIRS], "stage")

    theirs, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert theirs.config.pad_token_id not in (None, tokenizer.eos_token_id) and theirs.config.num_labels == 1
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "rm")
    texts = []
    for pair in PAIRS:
        messages = [*pair.history, {"role": "user", "content": pair.query}]
        prompt = other.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for response in (pair.chosen, pair.rejected):
            texts.append(prompt + other(response, add_special_tokens=False).input_ids + [other.eos_token_id])
    batch = other.pad({"input_ids": texts}, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        expected = theirs(**batch).logits.reshape(-1, 2).numpy()
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_a_reward_does_not_depend_on_packing_or_on_the_mesh(one_device, eight_devices):
    draw = np.random.default_rng(0)

    def ids(low, high):
        return draw.integers(3, 1024, draw.integers(low, high)).tolist()

    pairs = [TokenizedPair(ids(2, 9), ids(1, 30), ids(1, 150)) for _ in range(7)]
    architecture = dataclasses.replace(small("qwen2"), mlp_dim=64)
    model, params = random_reward_model(architecture, one_device)
    rate = build_reward_fn(model, one_device, jax.tree.map(lambda x: x.sharding, params))
    alone = [compute_rewards(rate, one_device, params, [pair], 128, "s")[0] for pair in pairs]
    shape, weight = StepShape(RowShape(4, 256, 256), 4, 2), 1 / 7
    steps = [reward_step(pairs[start : start + 4], shape, None, weight=weight) for start in (0, 4)]
    of_step = jax.jit(reward_losses(model, 0.0, 0.0, 0.0))
    for number, step in enumerate(steps):
        losses, metrics = of_step(params, step)
        mine = alone[4 * number : 4 * number + 4]
        np.testing.assert_allclose(metrics["chosen_reward"][: len(mine)], [c for c, _ in mine], atol=1e-4)
        np.testing.assert_allclose(losses[: len(mine)], [math.log1p(math.exp(r - c)) for c, r in mine], atol=1e-4)
    weights = np.concatenate([step.weights for step in steps])
    assert weights.sum() == pytest.approx(1.0) and (weights > 0).sum() == 7
    spread, sharded = random_reward_model(architecture, eight_devices)
    rate = build_reward_fn(spread, eight_devices, jax.tree.map(lambda x: x.sharding, sharded))
    np.testing.assert_allclose(compute_rewards(rate, eight_devices, sharded, pairs, 512, "s"), alone, atol=1e-3)


def test_rewards_that_are_not_finite_are_an_error(one_device):
    def rate(params, rows, ends):
        return np.where(np.arange(len(ends)) == 1, np.nan, 0.5)

    pairs = [TokenizedPair([5, 6], [7, 8], [9])] * 2
    with pytest.raises(RunError, match="rate: 1 of 4 rewards are not finite; the reward model is broken"):
        compute_rewards(rate, one_device, {}, pairs, 4096, "rate")


def test_a_stop_is_seen_after_a_batch_unless_the_caller_has_work_to_save(one_device, monkeypatch):
    calls = []

    def rate(params, rows, ends):
        calls.append(len(ends))
        return np.zeros(len(ends))

    pairs = [TokenizedPair([5, 6], [7, 8], [9])] * 3
    monkeypatch.setattr(rewards, "stop_now", lambda: True)
    with pytest.raises(Stopped, match="a signal in rate, after 2 of 6 responses"):
        compute_rewards(rate, one_device, {}, pairs, 256, "rate")
    assert len(calls) == 1
    assert compute_rewards(rate, one_device, {}, pairs, 256, "rate", may_stop=False) == [(0.0, 0.0)] * 3


@pytest.mark.parametrize("family", ["qwen2", "qwen2_windowed", "gemma3"])
def test_rewards_by_sequences_are_those_by_the_mask(one_device, monkeypatch, family):
    """cuDNN itself needs a GPU, the same call without it stands in."""
    given = []

    def attend(queries, keys, values, mask, rule, within=None):
        given.append(within is not None)
        return cudnn_attend(queries, keys, values, mask, rule, within, implementation="xla")

    monkeypatch.setitem(KERNELS, "cudnn", attend)
    draw = np.random.default_rng(1)
    pairs = [
        TokenizedPair(*(draw.integers(3, 1024, size).tolist() for size in sizes))
        for sizes in [(5, 9, 30), (3, 200, 1), (40, 20, 60)]
    ]
    model, params = random_reward_model(small(family), one_device)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    expected, found = (
        compute_rewards(build_reward_fn(m, one_device, shardings), one_device, params, pairs, 256, "s")
        for m in (model, model.clone(attend="cudnn"))
    )
    assert {True, False} == set(given)  # rows of the shortest length hold several responses, and go by the mask
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ends_are_where_pack_writes_the_last_tokens():
    trees = [
        Tree([1] * p, [Branch([2] * (a - 1) + [90 + 2 * e], 2 * e), Branch([3] * (b - 1) + [91 + 2 * e], 2 * e + 1)])
        for e, (p, a, b) in enumerate([(3, 1, 1), (5, 9, 2), (2, 1, 7), (4, 4, 4)])
    ]
    shape = RowShape(3, 20, 20)
    rows, ends = pack(trees, shape, 10), branch_ends(trees, shape, 10)
    assert [int(rows.tokens[row, column]) for row, column in ends[:8]] == list(range(90, 98))
    assert (ends[8:] == 0).all()


def test_before_the_first_update_every_reward_is_zero(one_device):
    model = reward_model(small("qwen3"))
    params = nn.unbox(init_params(model, jax.random.key(0)))
    assert "head" not in params
    losses, metrics = reward_losses(model, 0.0, 0.0, 0.0)(
        params, reward_step([TokenizedPair([5], [6], [7])], StepShape(RowShape(1, 32, 16), 1, 1), None, weight=1.0)
    )
    assert losses[0] == pytest.approx(math.log(2)) and metrics["accuracy"][0] == 0.5


def test_ids_of_a_pair_end_with_the_end_of_turn(tokenizer):
    chat, end = make_chat(tokenizer), tokenizer.eos_token_id
    cut = encode_text(tokenizer, "It is 2 and then")
    pair = Triple(
        "1",
        "q",
        "g",
        "b",
        "x",
        "y",
        "z",
        response_ids={"chosen": [5, 6, end], "rejected": cut},
        tokens_hash=tokens_hash(tokenizer),
    )
    assert tokenize_pair(chat, pair) == TokenizedPair(
        chat.prompt_ids("q"), [5, 6, end], [*cut, end]
    )  # no system message: the plain prompt
    foreign = dataclasses.replace(pair, tokens_hash="other")
    assert tokenize_pair(chat, foreign).chosen_ids == [*encode_text(tokenizer, "x"), end]


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "<|endoftext|>"])
def test_padding_is_never_the_end_of_turn(tokenizer, pad):
    given = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token=pad
    )
    made = padding_for_rewards(given)
    assert made.pad_token_id not in (None, made.eos_token_id) and given.pad_token == pad
    assert len(made) == len(given) and (pad != "<|endoftext|>" or made.pad_token == pad)


def triples(count: int, name: str = "own") -> list[Triple]:
    return [Triple(f"{name}{i}", f"{name} query {i // 2}", None, None, "good", "bad", None) for i in range(count)]


@pytest.mark.parametrize(
    ("own", "annotated", "share", "expected"),
    [(90, 100, 0.1, (90, 10)), (31, 9, 0.1, (31, 3)), (90, 5, 0.1, (45, 5)), (10, 100, 0.5, (10, 10))],
)
def test_annotated_pairs_have_their_share(own, annotated, share, expected):
    rules = RewardConfig(annotated_path="x", annotated_share=share)
    mixed = mix(triples(own), triples(annotated, "given"), rules, "0/1")
    assert (sum(t.id.startswith("own") for t in mixed), sum(t.id.startswith("given") for t in mixed)) == expected
    assert len({t.id for t in mixed}) == len(mixed) and mixed == mix(
        triples(own), triples(annotated, "given"), rules, "0/1"
    )
    assert (
        len(mix(triples(own), triples(annotated, "given"), RewardConfig(annotated_path="x"), "0/1")) == own + annotated
    )
    with pytest.raises(InputError, match=r"annotated_share"):
        mix(triples(1), triples(1, "given"), RewardConfig(annotated_path="x", annotated_share=0.01), "0/1")


def test_rewards_rank_pairs_and_count_ties_as_half():
    rewards = [(1.0, 0.0), (0.0, 2.0), (3.0, 3.0), (5.0, 1.0)]
    assert accuracy_of(rewards) == 2.5 / 4
    kept, dropped = keep_widest(with_rewards(triples(4), rewards), 0.5)
    assert [t.id for t in kept] == ["own0", "own3"] and dropped == {"own1": "reward_rank", "own2": "reward_rank"}
    assert kept[1].scores == {"chosen": 5.0, "rejected": 1.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["Qwen2ForCausalLM"]},
            r"config.json: architectures \['Qwen2ForCausalLM'\] is not a reward model",
        ),
        (
            {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
            r"config.json: 2 labels",
        ),
    ],
)
def test_a_folder_that_is_no_reward_model_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        find_reward_model(str(tmp_path))
