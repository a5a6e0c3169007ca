"""States the error of frozen weights in 8 and 4 bits: loss and gradients of adapters against the weights as they are.

    python -m benchmarks.frozen_bits --model FOLDER

The loss is the mean negative log-prob of the tokens of questions in the model's chat template. Adapters of rank 16 are
drawn at random, A as for training and B with a hundredth of its spread, so that both have gradients.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sso_jax.config import LoraConfig, ModelConfig
from sso_jax.data.chat import make_chat
from sso_jax.data.tokenizer import load_tokenizer
from sso_jax.models.adapters import fresh_adapters, join, split_trainable
from sso_jax.models.attention import causal_mask
from sso_jax.models.hf_config import read_architecture
from sso_jax.models.hf_weights import read_params
from sso_jax.recipes.engine import build_decoder
from sso_jax.runtime.mesh import make_mesh


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frozen_bits", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    questions = Path("examples/questions.jsonl")
    parser.add_argument("--queries", type=Path, default=questions, help="questions (default: %(default)s)")
    parser.add_argument("--num_queries", type=int, default=16, help="default: %(default)s")
    return parser.parse_args()


def rows_of_tokens(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Returns the token ids of the questions, padded to the longest, and their lengths."""
    chat = make_chat(load_tokenizer(options.model))
    lines = options.queries.read_text(encoding="utf-8").splitlines()[: options.num_queries]
    prompts = [chat.prompt_ids(json.loads(line)["query"]) for line in lines]
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts])


def loss_and_gradients(options: argparse.Namespace, bits: int | None) -> tuple[float, np.ndarray]:
    """Returns the loss in nats a token, and the gradients of all adapters in one vector."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    lora = LoraConfig(rank=16)
    model, _ = build_decoder(read_architecture(options.model), ModelConfig(frozen_bits=bits), lora, mesh)
    flat = {
        **flatten_dict(read_params(options.model, model, mesh), sep="/"),
        **{path: _moved(path, leaf) for path, leaf in fresh_adapters(model, mesh, 0).items()},
    }
    tokens, lengths = rows_of_tokens(options)
    width = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    wanted = np.arange(1, width)[None] < lengths[:, None]

    def loss(trainable, frozen):
        params = {"params": join(trainable, frozen)}
        hidden, _ = model.apply(params, jnp.asarray(tokens), positions, causal_mask(width))
        log_probs = jax.nn.log_softmax(model.apply(params, hidden[:, :-1], method="logits"))
        found = jnp.take_along_axis(log_probs, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(wanted, found, 0)) / wanted.sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(*split_trainable(unflatten_dict(flat, sep="/")))
    return float(value), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)]).astype(np.float64)


def _moved(path: str, leaf: jax.Array) -> jax.Array:
    """Draws B of an adapter, which would be zeros."""
    if not path.endswith("adapter_b"):
        return leaf
    return 0.01 * jax.random.normal(jax.random.key(len(path)), leaf.shape, leaf.dtype) / leaf.shape[1] ** 0.5


def main() -> None:
    """Prints a table."""
    options = arguments()
    plain, reference = loss_and_gradients(options, None)
    print(f"loss of the weights as they are: {plain:.4f} nats a token\n")
    print("| bits | loss | difference | gradients: relative error | cosine |\n|---|---|---|---|---|")
    for bits in (8, 4):
        loss, gradients = loss_and_gradients(options, bits)
        error = np.linalg.norm(gradients - reference) / np.linalg.norm(reference)
        cosine = gradients @ reference / np.linalg.norm(gradients) / np.linalg.norm(reference)
        print(f"| {bits} | {loss:.4f} | {loss - plain:+.4f} | {error:.4f} | {cosine:.5f} |", flush=True)


if __name__ == "__main__":
    main()
