"""The reward model: the decoder with a single reward row in place of its vocabulary head."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sso_jax.models.architecture import Architecture
from sso_jax.models.transformer import Transformer


class RewardModel(Transformer):
    """`reward = score . hidden`, without a bias, like Hugging Face's sequence classification with one label.

    Build it with `reward_model`. The row is initialized with zeros, so that before the first update every reward is 0
    and the Bradley-Terry loss is ln 2.
    """

    def setup(self):
        """Declares the decoder's parameters and the reward row."""
        super().setup()
        score = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, "embed"))
        self.score = self.param("score", score, (1, self.architecture.embed_dim), self.param_dtype)

    def rewards(self, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
        """Returns the rewards of hidden states, in float32."""
        return jnp.einsum("...d,d->...", hidden, self.score[0].astype(self.dtype), preferred_element_type=jnp.float32)


def reward_model(architecture: Architecture, **options) -> RewardModel:
    """Returns a reward model on the decoder of `architecture`, without an untied vocabulary head."""
    return RewardModel(dataclasses.replace(architecture, tied_head=True), **options)
