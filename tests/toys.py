"""Small decoders with random weights, the paths of the real data, and what JAX compiles, for the tests."""

import dataclasses
import logging
import re
from pathlib import Path

import jax
from flax import linen as nn

from sso_jax.models.architecture import Architecture
from sso_jax.models.transformer import Transformer, abstract_params, init_params
from sso_jax.runtime.mesh import param_shardings

QUICKLY = "--xla_backend_optimization_level=0"
"""XLA flag of all tests: programs compile faster, and only rounding changes."""
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


def toy_model(**changes) -> Transformer:
    """A decoder of three layers; `changes` are fields of its architecture."""
    return Transformer(dataclasses.replace(ARCHITECTURE, **changes))


def toy_params(model: Transformer, mesh, scale: float = 10.0):
    """Random weights placed on the mesh; ten times the usual scale makes logits differ clearly."""
    boxed = init_params(model, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, nn.unbox(boxed))
    return jax.device_put(params, param_shardings(abstract_params(model), mesh))


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
