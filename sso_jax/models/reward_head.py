"""Hidden states [..., D] in, rewards [...] out: the decoder with one row of weights in place of its head."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sso_jax.models.architecture import Architecture
from sso_jax.models.transformer import Transformer


class RewardModel(Transformer):
    """`reward = score . hidden`, without a bias, as Hugging Face's sequence classification with one label; build it by
    `reward_model`.

    The row starts at 0, so that every reward is 0 and the Bradley-Terry loss ln 2 before the first update.
    """

    def setup(self):
        super().setup()
        score = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, "embed"))
        self.score = self.param("score", score, (1, self.architecture.embed_dim), self.param_dtype)

    def rewards(self, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
        """Rewards of hidden states, float32."""
        return jnp.einsum("...d,d->...", hidden, self.score[0].astype(self.dtype), preferred_element_type=jnp.float32)


def reward_model(architecture: Architecture, **options) -> RewardModel:
    """Reward model on the decoder of `architecture`; the head over the vocabulary, if it has one of its own, is left
    out.
    """
    return RewardModel(dataclasses.replace(architecture, tied_head=True), **options)
