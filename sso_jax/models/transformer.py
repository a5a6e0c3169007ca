"""Token ids [B, T] in, hidden states [B, T, D] and, by a method of their own, logits [..., V] out."""

from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from sso_jax.models.architecture import Architecture
from sso_jax.models.attention import Attention, Cache, causal_mask, empty_cache
from sso_jax.models.kernels import BY_SEQUENCE
from sso_jax.models.layers import Adapters, RMSNorm, SwiGLU, at_tokens, projection_options, rotation
from sso_jax.models.remat_policy import save_for_backward, save_marked
from sso_jax.models.sequences import make_sequences
from sso_jax.runtime.mesh import constrain, gathered


class Layer(nn.Module):
    """`x += attention(norm(x)); x += unit(norm(x))`."""

    architecture: Architecture
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    attend: str
    adapters: Adapters
    outputs_first: bool

    @nn.compact
    def __call__(self, carry, layer, turn, mask, slot, sequences=None, query_indices=None):
        x, cache = carry
        x = constrain(x, "batch", None, None)
        settings = projection_options(self)
        normed = RMSNorm(self.architecture.norm_eps, self.param_dtype, name="attention_norm")(x)
        attended, cache = Attention(self.architecture, **settings, attend=self.attend, name="attention")(
            normed, turn, mask, cache, layer, slot, query_indices, sequences
        )
        x = save_for_backward(at_tokens(x, query_indices) + attended)
        normed = RMSNorm(self.architecture.norm_eps, self.param_dtype, name="unit_norm")(x)
        return (x + SwiGLU(self.architecture, **settings, name="unit")(normed), cache), None


class Transformer(nn.Module):
    """The decoder of `architecture`; its layers are one scanned layer, so that compile time does not grow with depth.

    `dtype` is the type of the arithmetic, `param_dtype` that of the weights; `remat` recomputes all of each layer in
    the backward pass, where otherwise what is `save_for_backward` of it is not; `attend` names the attention of whole
    sequences (`attend.ATTEND`), `adapters` adds low-rank parameters to projections.
    """

    architecture: Architecture
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: bool = False
    attend: str = "plain"
    adapters: Adapters = Adapters()
    max_logits: int = 2**25
    """How many logits a device holds at once where log-probs are taken (`training.log_probs`)."""
    laid: str = "auto"
    """How programs have the layers: "stacked", "apart", or as `models.layout` finds faster."""
    stacked: bool = True
    """Whether the layers are one scanned layer, or each has parameters and a cache of its own (`models.layout`)."""
    outputs_first: bool = False
    """Of layers apart: whether the output axes of kernels are the first ones, see `Projection`."""

    def setup(self):
        a = self.architecture
        init = nn.initializers.normal(0.02)
        embedding = nn.with_logical_partitioning(init, ("vocab", "embed"))
        self.embedding = self.param("embedding", embedding, (a.vocab_size, a.embed_dim), self.param_dtype)
        settings = (a, self.dtype, self.param_dtype, self.attend, self.adapters, self.outputs_first)
        self.layers = self._scanned()(*settings) if self.stacked else [Layer(*settings) for _ in range(a.num_layers)]
        self.final_norm = RMSNorm(a.norm_eps, self.param_dtype)
        if not a.tied_head:
            head = nn.with_logical_partitioning(init, ("embed", "vocab"))
            self.head = self.param("head", head, (a.embed_dim, a.vocab_size), self.param_dtype)

    @property
    def by_sequence(self) -> bool:
        """Whether the attention of whole sequences takes packed rows as sequences, see `__call__`."""
        return self.attend in BY_SEQUENCE

    def _scanned(self) -> type[nn.Module]:
        return nn.scan(
            nn.remat(Layer, prevent_cse=False, policy=None if self.remat else save_marked),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.architecture.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#B T S"],
        cache: Cache | tuple[Cache, ...] | None = None,
        slot: Int[Array, ""] | int = 0,
        query_indices: Int[Array, "B W"] | None = None,
        sequences: Int[Array, "B Z U"] | None = None,
        place: Int[Array, "B W"] | None = None,
    ) -> tuple[Float[Array, "B W D"], Cache | tuple[Cache, ...] | None]:
        """Normed hidden states after the last layer, and the cache with these tokens written at `slot` (None stays
        None).

        They are those of the `query_indices` tokens of each row, of all T where None. Where layers are not stacked and
        fewer are wanted than there are, the last one computes keys and values of all tokens and the rest of these
        alone. `sequences` say the same as the mask, in columns (`make_sequences`), for the attention that takes them,
        and `place` where the wanted tokens stand in them.
        """
        table = gathered(self.embedding.astype(self.dtype), "vocab", "embed")  # rows are cut by batch
        x = constrain(jnp.take(table, tokens, axis=0), "batch", None, None)  # [B, T, D]
        num_layers = self.architecture.num_layers
        turn, slot = rotation(positions, self.architecture), jnp.asarray(slot)
        by_sequence = self.by_sequence and sequences is not None and sequences.size > 0
        of_all = make_sequences(sequences, positions) if by_sequence else None
        if self.stacked:
            (x, cache), _ = self.layers((x, cache), jnp.arange(num_layers), turn, mask, slot, of_all)
            return self.final_norm(at_tokens(x, query_indices)), cache
        in_last, behind = (
            (query_indices, None)
            if query_indices is not None and query_indices.shape[1] < tokens.shape[1]
            else (None, query_indices)
        )
        of_last = make_sequences(sequences, positions, place) if by_sequence and in_last is not None else of_all
        turn, mask, of_all, of_last = computed_once((turn, mask, of_all, of_last), positions)
        caches = []
        for number, (layer, own) in enumerate(zip(self.layers, cache or (None,) * num_layers, strict=True), 1):
            last = number == num_layers
            (x, own), _ = layer(
                (x, own), None, turn, mask, slot, of_last if last else of_all, in_last if last else None
            )
            caches.append(own)
        return self.final_norm(at_tokens(x, behind)), None if cache is None else tuple(caches)

    def head_matrix(self) -> Float[Array, "D V"]:
        """What hidden states are multiplied with, in the type of the arithmetic, cut over the devices as its parameter
        is.
        """
        return (self.embedding.T if self.architecture.tied_head else self.head).astype(self.dtype)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of the next token, float32."""
        return project(hidden, gathered(self.head_matrix(), "embed", "vocab"))


def computed_once(tree, positions: Int[Array, "B T"]):
    """`tree`, which XLA on a CPU would compute anew in each of the layers that read it, barrier or not, since they are
    no loop's.

    It does not see through a branch whose condition it cannot know, such as that a position is not negative. A single
    token's is not worth a branch.
    """
    if positions.shape[1] == 1:
        return tree
    return jax.lax.cond(positions[0, 0] >= 0, lambda own: own, lambda own: jax.tree.map(jnp.zeros_like, own), tree)


def project(hidden: Float[Array, "... D"], head: Float[Array, "D V"]) -> Float[Array, "... V"]:
    """Scores of the next token, float32, from hidden states and `Transformer.head_matrix`, or columns of it."""
    flat = hidden.reshape(-1, hidden.shape[-1])  # for the reason in `flat_product`
    return jnp.matmul(flat, head, preferred_element_type=jnp.float32).reshape(*hidden.shape[:-1], -1)


def make_cache(model: Transformer, batch_size: int, num_slots: int) -> Cache | tuple[Cache, ...]:
    """Cache of zeros as the decoder takes it: of all layers in one, or one each where they are not stacked."""
    sizes = model.architecture, batch_size, num_slots, model.dtype
    layers = range(model.architecture.num_layers)
    return empty_cache(*sizes) if model.stacked else tuple(empty_cache(*sizes, of_one_layer=True) for _ in layers)


def init_params(model: Transformer, key: jax.Array):
    """Random parameters in boxes that carry the logical names of their axes."""
    tokens = jnp.zeros((1, 1), jnp.int32)

    def everything(module, tokens):
        return module.logits(module(tokens, tokens, causal_mask(1))[0])

    return model.init(key, tokens, method=everything)["params"]


@lru_cache
def abstract_params(model: Transformer):
    """Shapes, types and logical axis names of the parameters; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
