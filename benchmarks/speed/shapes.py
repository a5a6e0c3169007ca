"""Defines the timed shapes: model sizes, prompts and examples, the same for every implementation."""

import dataclasses
import random
from dataclasses import dataclass

SEED = 0
TEMPERATURE, TOP_P = 0.7, 0.8
CONTEXTS = ("plain", "positive", "negative")
CELLS = [
    ("plain", "chosen"),
    ("plain", "rejected"),
    ("positive", "chosen"),
    ("positive", "rejected"),
    ("negative", "original"),
    ("negative", "chosen"),
]
"""(context, response) of each log-prob that version 1 needs, winner before loser; in the releases, one row each."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 decoder with an untied head, and of the work that is timed on it."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden: int
    vocab_size: int
    head_size: int
    dtype: str
    sample_rows: int = 16
    sample_prompt: int = 128
    sample_new: int = 64
    update_examples: int = 4
    update_prompt: int = 256
    update_response: int = 128
    update_microbatch: int = 1
    """Examples per device step, whose tokens are train.tokens_per_step of this project."""
    max_logits: int = 2**25
    """model.max_logits of this project."""
    adapter_rank: int = 0
    """Rank of the trained adapters on all projections; weights are then frozen and in `dtype`. 0 trains all weights."""

    @property
    def adapter_params(self) -> int:
        """Number of adapter parameters in all layers."""
        heads, kv_heads = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        # Inputs and outputs of all projections of a layer.
        ends = 2 * (self.width + heads) + 2 * (self.width + kv_heads) + 3 * (self.width + self.hidden)
        return self.num_layers * self.adapter_rank * ends

    @property
    def layer_params(self) -> int:
        """Number of parameters in the matrices of all layers."""
        heads = self.num_heads * self.head_size
        attention = self.width * (2 * heads + 2 * self.num_kv_heads * self.head_size)
        return self.num_layers * (attention + 3 * self.width * self.hidden)

    @property
    def head_params(self) -> int:
        return self.width * self.vocab_size

    @property
    def num_params(self) -> int:
        """Number of parameters in all matrices, including embedding and head."""
        return self.layer_params + 2 * self.head_params


CPU = Shape(512, 8, 8, 2, 1536, 32000, 64, "float32")
"""56.9M parameters."""
LARGE = dict(
    dtype="bfloat16",
    sample_rows=64,
    sample_prompt=512,
    sample_new=256,
    update_examples=8,
    update_prompt=512,
    update_response=512,
    update_microbatch=2,
    max_logits=2**30,
)
SHAPES = {
    "57m": CPU,
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936, 64, **LARGE),
    "1.5b": Shape(1536, 28, 12, 2, 8960, 151936, 128, **LARGE),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, 128, **{**LARGE, "update_microbatch": 1}, adapter_rank=64),
}
"""Shapes by name. The larger ones have the sizes of Qwen2 models and need a GPU.

All weights of the largest and their moments would take 122 GB, so its update trains adapters.
"""


def smaller(shape: Shape) -> Shape:
    """Returns the shape with a model that runs in a second, to test the benchmark itself."""
    return dataclasses.replace(
        shape,
        width=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        hidden=128,
        vocab_size=512,
        head_size=16,
        sample_new=8,
    )


def prompt_ids(shape: Shape, num: int, length: int) -> list[list[int]]:
    """Returns `num` prompts of random tokens."""
    draw = random.Random(SEED)
    return [[draw.randrange(shape.vocab_size) for _ in range(length)] for _ in range(num)]


def example_ids(shape: Shape) -> list[tuple[dict[str, list[int]], dict[str, list[int]]]]:
    """Returns the prompts by context and the responses by name of each example of the update."""
    draw = random.Random(SEED + 1)

    def ids(length):
        return [draw.randrange(shape.vocab_size) for _ in range(length)]

    return [
        (
            {context: ids(shape.update_prompt) for context in CONTEXTS},
            {name: ids(shape.update_response) for name in ("chosen", "rejected", "original")},
        )
        for _ in range(shape.update_examples)
    ]


def needed_update_flops(shape: Shape) -> dict[str, float]:
    """Returns the minimum operations of one update: products with parameters, and attention to visible tokens.

    A multiply-add counts as two. Forward and backward pass cost three forward passes, or two for products with frozen
    weights; the reference costs one more.

    Returns:
      shared: each context's prompt runs once for its two responses. Only tokens that predict a response token meet the
        vocabulary; for the others, the last layer computes only keys and values.
      releases: each of the six log-probs has a separate row, and every token meets the vocabulary.
    """
    prompt, response = shape.update_prompt, shape.update_response
    trees, rows, length = 3 * shape.update_examples, 6 * shape.update_examples, prompt + response
    # Multiply-adds of a layer for each visible pair of tokens: scores and values.
    attended = 2 * shape.num_heads * shape.head_size

    def visible_pairs(tokens, before=0):
        return tokens * before + tokens * (tokens + 1) // 2

    pairs = visible_pairs(prompt) + 2 * visible_pairs(response, prompt)
    # In the last layer, only the prompt's last token and all but the last of each response attend.
    last_layer_pairs = 2 * (prompt + visible_pairs(response - 1, prompt))
    of_layer = shape.layer_params / shape.num_layers
    keys_and_values = 2 * shape.width * shape.num_kv_heads * shape.head_size
    passes = 3 if shape.adapter_rank else 4
    of_adapters = shape.adapter_params / shape.num_layers
    adapter_keys_and_values = 2 * shape.adapter_rank * (shape.width + shape.num_kv_heads * shape.head_size)

    def layer_products(of_layer: float, keys_and_values: float) -> float:
        """Returns the multiply-adds of a tree's tokens with parameters of all layers."""
        below_last = (shape.num_layers - 1) * of_layer + keys_and_values
        return (prompt + 2 * response) * below_last + 2 * response * (of_layer - keys_and_values)

    products = layer_products(of_layer, keys_and_values) + 2 * response * shape.head_params
    attention = ((shape.num_layers - 1) * pairs + last_layer_pairs) * attended
    shared = passes * products + 4 * (layer_products(of_adapters, adapter_keys_and_values) + attention)
    whole_rows = passes * length * (shape.layer_params + shape.head_params) + 4 * length * shape.adapter_params
    return {
        "shared": 2.0 * trees * shared,
        "releases": 2.0 * rows * (whole_rows + 4 * visible_pairs(length) * shape.num_layers * attended),
    }


def needed_sample_bytes(shape: Shape) -> float:
    """Returns the bytes of weights that decoding must read: each weight once per step."""
    size = 2 if shape.dtype == "bfloat16" else 4
    return float(size * (shape.layer_params + shape.head_params) * (shape.sample_new - 1))


def needed_decode_bytes(shape: Shape) -> float:
    """Returns the bytes that decoding must read: weights and, at each step, the keys and values of earlier tokens."""
    size = 2 if shape.dtype == "bfloat16" else 4
    tokens = sum(range(shape.sample_prompt + 1, shape.sample_prompt + shape.sample_new))
    cached = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * size  # per token
    return needed_sample_bytes(shape) + float(shape.sample_rows * tokens * cached)


def needed_sample_flops(shape: Shape) -> float:
    """Returns the minimum operations of prefill and decoding.

    In prefill, the last layer computes only keys and values, except for the last token of each row.
    """
    keys_and_values = 2 * shape.width * shape.num_kv_heads * shape.head_size
    before_last = shape.layer_params * (shape.num_layers - 1) / shape.num_layers + keys_and_values
    prefill = shape.sample_rows * shape.sample_prompt * before_last
    return 2.0 * (prefill + shape.sample_rows * shape.sample_new * (shape.layer_params + shape.head_params))
