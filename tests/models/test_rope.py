"""Rotary scalings, held to transformers' functions on the same numbers, and what their limits are."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sso_jax.models.hf_config import read_architecture, to_hf_config
from sso_jax.models.rope import DynamicRope, LinearRope, YarnRope

FACTORS = dict(short_factor=[1.0 + 0.1 * i for i in range(32)], long_factor=[1.0 + i for i in range(32)])
SCALINGS = {
    "linear": dict(rope_type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=4.0),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    "yarn_qwen2.5": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
    "yarn_deepseek": dict(
        rope_type="yarn",
        factor=40.0,
        beta_fast=32,
        beta_slow=1,
        mscale=1.0,
        mscale_all_dim=0.8,
        original_max_position_embeddings=4096,
    ),
    "yarn_gpt_oss": dict(rope_type="yarn", factor=32.0, truncate=False, original_max_position_embeddings=4096),
    "longrope": dict(rope_type="longrope", **FACTORS, original_max_position_embeddings=4096),
    "longrope_given": dict(
        rope_type="longrope", **FACTORS, original_max_position_embeddings=4096, factor=8.0, attention_factor=1.3
    ),
}


def config_of(scaling: dict) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": 1e6},
    )


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("spelling", ["transformers 5", "transformers 4"])
def test_frequencies_and_attention_factor_are_those_of_transformers(tmp_path, name, spelling):
    config = config_of(SCALINGS[name])
    expected, attention_factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    fields = config.to_dict()
    if spelling == "transformers 4":
        fields["rope_scaling"] = {"type": SCALINGS[name]["rope_type"], **SCALINGS[name]}
        fields["rope_theta"] = 1e6
        del fields["rope_parameters"], fields["rope_scaling"]["rope_type"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    architecture = read_architecture(tmp_path)
    (kind,) = architecture.kinds
    ours = kind.rope.frequencies(architecture.head_size)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=2e-6)
    assert kind.rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_the_settings_come_back_from_an_export(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(config_of(SCALINGS[name]).to_dict()))
    architecture = read_architecture(tmp_path)
    written = to_hf_config(architecture, "float32", 1, 2)
    assert written["rope_parameters"] == {**SCALINGS[name], "rope_theta": 1e6} | (
        {} if "yarn" not in name else {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": "gpt" not in name}
    )
    assert {**written["rope_scaling"], "rope_theta": written["rope_theta"]} == written["rope_parameters"]
    assert written["max_position_embeddings"] == 131072
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_architecture(tmp_path) == architecture


def test_by_hand():
    """Head of 4: pairs of 1 and 1/100 radians a position at base 10,000."""
    np.testing.assert_allclose(LinearRope(2.0).frequencies(4, 1e4), [0.5, 0.005])
    np.testing.assert_allclose(DynamicRope(2.0).frequencies(4, 1e4), [1.0, 0.01])
    # 64 positions: pair 0 turns 10.2 times, more than 4, and stays; pair 1 turns 0.1 times, less than 1, and is divided
    np.testing.assert_allclose(YarnRope(8.0, 64, beta_fast=4.0).frequencies(4, 1e4), [1.0, 0.01 / 8])
    assert YarnRope(np.e**2, 64).attention_factor == pytest.approx(1.2)


def test_longrope_ends_at_its_original_context(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(config_of(SCALINGS["longrope"]).to_dict()))
    assert read_architecture(tmp_path).max_positions == 4096
    assert "longrope is used up to its original context of 4096 tokens, not to 131072" in caplog.text
