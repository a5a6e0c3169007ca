"""What `sso-check` finds out about a folder by itself: sizes, bytes there and back, and trained tokens."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import linen as nn

from sso_jax.data.chat import TEMPLATE_ERRORS, Chat, encode_response, render
from sso_jax.models.hf_weights import hf_tensors
from sso_jax.models.safetensors_folder import SafetensorsFolder
from sso_jax.models.transformer import Transformer, abstract_params

SYSTEM, USER, ASSISTANT = "Answer in one word.", "What is the capital of France?", "Paris."
"""An exchange that shows what is trained."""
TRAINED = ("⟦", "⟧")
"""Marks around each trained token."""
MOST_NAMES = 3
"""Tensors that are named where some differ."""


class Difference(NamedTuple):
    """Tensors that are others after a conversion there and back."""

    num_tensors: int
    """Number of all tensors."""
    names: list[str]
    """Names of those that differ."""

    def describe(self) -> str:
        """Returns one line."""
        if not self.names:
            return f"there and back: all {self.num_tensors} tensors have the same bytes"
        named, more = ", ".join(self.names[:MOST_NAMES]), len(self.names) - MOST_NAMES
        others = f" and {more} more" if more > 0 else ""
        return f"there and back: {len(self.names)} of {self.num_tensors} tensors differ: {named}{others}"


def stored_type(source: SafetensorsFolder) -> str:
    """Returns the type of parameters that holds every tensor of the folder without rounding, except float64."""
    types = {piece.get_dtype() for piece in source.slices.values()}
    return "bfloat16" if types == {"BF16"} else "float32"


def describe_model(model: Transformer, source: SafetensorsFolder) -> list[str]:
    """Returns lines about the family, the sizes and the stored types."""
    a, leaves = model.architecture, jax.tree.leaves(nn.unbox(abstract_params(model)))
    num_params = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    types = Counter(piece.get_dtype() for piece in source.slices.values())
    experts = "" if a.experts is None else f", {a.experts.num_experts} experts"
    return [
        f"family: {a.model_type}",
        f"parameters: {num_params:,} ({a.num_layers} layers, width {a.embed_dim}, {a.num_heads} heads, "
        f"{a.num_kv_heads} key/value heads{experts}, {a.vocab_size:,} tokens, {a.max_positions:,} positions)",
        "stored as: " + ", ".join(f"{number} tensors of {name}" for name, number in types.most_common()),
    ]


def compare_bytes(params, model: Transformer, source: SafetensorsFolder) -> Difference:
    """Converts parameters back to Hugging Face's tensors, one at a time, and compares them with the stored bytes.

    float64 is compared as float32, to which reading rounds it.
    """
    tensors, differing = hf_tensors(params, model.architecture), []
    for name in sorted(source.slices):
        stored = np.asarray(source.slices[name][:])
        stored = stored.astype(np.float32) if stored.dtype == np.float64 else stored
        made = tensors.tensor(name, stored.dtype) if name in tensors.pieces else None
        if made is None or made.shape != stored.shape or not np.array_equal(_bits(made), _bits(stored)):
            differing.append(name)
    return Difference(len(source.slices), differing)


def _bits(values: np.ndarray) -> np.ndarray:
    """Returns the bit patterns, by which -0.0 and 0.0 differ."""
    unsigned = {np.dtype(np.float32): np.uint32, np.dtype(np.float16): np.uint16, np.dtype(ml_dtypes.bfloat16): "u2"}
    return np.ascontiguousarray(values).view(unsigned[values.dtype])


def show_exchange(chat: Chat) -> list[str]:
    """Returns an exchange of a system, a user and an assistant turn as training sees it, trained tokens marked.

    The last line says whether the chat template renders the finished exchange with the same tokens.
    """
    tokenizer = chat.tokenizer
    prompt, response = chat.prompt_ids(USER, SYSTEM), encode_response(tokenizer, ASSISTANT)
    marked = "".join(f"{TRAINED[0]}{tokenizer.decode([token])}{TRAINED[1]}" for token in response)
    lines = [
        f"one exchange of {len(prompt)} prompt tokens and {len(response)} trained ones, in {''.join(TRAINED)}:",
        tokenizer.decode(prompt) + marked,
    ]
    return [*lines, _own_rendering(chat, [*prompt, *response])]


def _own_rendering(chat: Chat, row: list[int]) -> str:
    """Returns a line that compares a row with the template's own rendering of the finished exchange."""
    system = [{"role": "system", "content": SYSTEM}] if chat.system_role else []
    user = USER if chat.system_role else f"{SYSTEM}\n\n{USER}"
    turns = [*system, {"role": "user", "content": user}, {"role": "assistant", "content": ASSISTANT}]
    try:
        text = render(chat.tokenizer, turns, chat.switch, header=False)
    except TEMPLATE_ERRORS as error:
        return f"the template itself does not render the finished exchange ({error})"
    own = chat.tokenizer(text, add_special_tokens=False).input_ids
    if own[: len(row)] == row:
        return "the template's own rendering of the finished exchange begins with the same tokens"
    same = next((i for i, (a, b) in enumerate(zip(own, row, strict=False)) if a != b), min(len(own), len(row)))
    return (
        f"note: the template's own rendering of the finished exchange differs from token {same} on: "
        f"{chat.tokenizer.decode(own[same : same + 8])!r} instead of {chat.tokenizer.decode(row[same : same + 8])!r}"
    )


def read_prompts(path: Path = Path(__file__).with_name("check_prompts.txt")) -> list[str]:
    """Returns the prompts that are continued."""
    return path.read_text(encoding="utf-8").splitlines()
