"""Small decoders with random weights, the paths of the real data, and what JAX compiles, for the tests."""

import dataclasses
import functools
import logging
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sso_jax.models.architecture import Architecture, Experts, LayerKind
from sso_jax.models.attention import causal_mask
from sso_jax.models.rope import LinearRope, Llama3Rope, Rope, YarnRope
from sso_jax.models.transformer import Transformer, abstract_params, init_params
from sso_jax.runtime.mesh import param_shardings

COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"]
"""Folder of this test run's compiled programs, for runs in processes of their own."""
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ARCHITECTURE = Architecture(
    model_type="qwen2",
    vocab_size=96,
    embed_dim=32,
    mlp_dim=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    max_positions=128,
    qkv_bias=True,
)


WINDOW_AND_FULL = (LayerKind(Rope(100.0), sliding_window=5), LayerKind(Rope(1e4, LinearRope(2.0))))
"""Kinds of layers that see five positions, or all; the window is shorter than most prompts and responses."""
GEMMA = dict(
    qkv_bias=False,
    norms="both",
    norm_offset=1.0,
    activation="gelu_tanh",
    embedding_factor=32**0.5,
    tied_head=True,
    pattern=(0, 1),
)
FAMILIES = {
    "llama": dict(model_type="llama", qkv_bias=False, kinds=(LayerKind(Rope(1e4, Llama3Rope(8.0, 1.0, 4.0, 64))),)),
    "qwen2": dict(tied_head=True),
    "qwen2_windowed": dict(kinds=(LayerKind(), LayerKind(sliding_window=4)), pattern=(0, 1)),
    "qwen3": dict(model_type="qwen3", qkv_bias=False, qk_norm="head"),
    "mistral": dict(model_type="mistral", qkv_bias=False, kinds=(LayerKind(sliding_window=6),)),
    "qwen3_moe": dict(model_type="qwen3_moe", qkv_bias=False, qk_norm="head", experts=Experts(8, 3, 16, True)),
    "olmo2": dict(model_type="olmo2", qkv_bias=False, qk_norm="all_heads", norms="after"),
    "olmo3": dict(
        model_type="olmo3",
        qkv_bias=False,
        qk_norm="all_heads",
        norms="after",
        kinds=(LayerKind(sliding_window=5), LayerKind(Rope(1e4, YarnRope(4.0, 32)))),
        pattern=(0, 1),
    ),
    "smollm3": dict(model_type="smollm3", qkv_bias=False, kinds=(LayerKind(), LayerKind(None)), pattern=(0, 1)),
    "gemma2": dict(
        **GEMMA,
        model_type="gemma2",
        query_scalar=24,
        score_cap=2.0,
        logit_cap=3.0,
        kinds=(LayerKind(sliding_window=5), LayerKind()),
    ),
    "gemma3": dict(**GEMMA, model_type="gemma3_text", query_scalar=16, qk_norm="head", kinds=WINDOW_AND_FULL),
    "phi3": dict(model_type="phi3", qkv_bias=False, rotated_features=4),
}
"""Changes of `ARCHITECTURE` that give a small member of each family; `pattern` repeats over the layers."""


def toy_architecture(pattern: tuple[int, ...] = (), **changes) -> Architecture:
    """The architecture of a small decoder; `changes` are its fields, `pattern` the kinds of layers, repeated."""
    changed = dataclasses.replace(ARCHITECTURE, **changes)
    indices = tuple(pattern[i % len(pattern)] for i in range(changed.num_layers)) if pattern else ()
    return dataclasses.replace(changed, kind_of_layer=indices)


def toy_model(**changes) -> Transformer:
    """A decoder of three layers; `changes` are those of `toy_architecture`."""
    return Transformer(toy_architecture(**changes))


def toy_params(model: Transformer, mesh, scale: float = 10.0):
    """Random weights placed on the mesh; ten times the usual scale makes logits differ clearly."""
    copies = jax.tree.map(np.copy, _random_params(model, scale))
    return jax.device_put(copies, param_shardings(abstract_params(model), mesh))


@functools.cache
def _random_params(model: Transformer, scale: float):
    """Weights as NumPy arrays, drawn once a process: half a hundred small programs draw them."""
    drawn = jax.device_get(nn.unbox(init_params(model, jax.random.key(0))))
    return jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, drawn)


def share_of_clear_tokens(model: Transformer, params, prompt_ids: list[int], response: list[int]) -> float:
    """Checks that each token of a greedy response is the likeliest one by a pass over the whole sequence.

    Tokens that another is as likely as, within 1e-4, are left out; returns the share of the others.
    """
    whole = jnp.asarray([prompt_ids + response])
    positions = jnp.arange(whole.shape[1])[None]
    hidden, _ = model.apply({"params": params}, whole, positions, causal_mask(whole.shape[1]))
    logits = np.asarray(model.apply({"params": params}, hidden, method="logits")[0])[len(prompt_ids) - 1 : -1]
    best = np.sort(logits, axis=-1)
    clear = best[:, -1] - best[:, -2] > 1e-4
    np.testing.assert_array_equal(np.asarray(response)[clear], np.argmax(logits, axis=-1)[clear])
    return float(clear.mean())


class Compilations(logging.Handler):
    """Names of the programs that JAX compiles while it is open, from JAX's own log."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def emit(self, record):
        found = re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage())
        self.names += [found.group(1)] if found else []

    def __enter__(self):
        logging.getLogger("jax").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("jax").removeHandler(self)
