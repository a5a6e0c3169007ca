"""The decoder: token ids to hidden states, with or without a key/value cache, and hidden states to logits."""

from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from sso_jax.models.architecture import Architecture
from sso_jax.models.attention import Attention, AttentionInputs, Cache, Pages, causal_mask, layer_view
from sso_jax.models.experts import ROUTER, ExpertsMLP
from sso_jax.models.kernels import ROW_FORMS
from sso_jax.models.layers import Adapters, GatedMLP, RMSNorm, at_tokens, projection_options
from sso_jax.models.places import Columns, Places, make_places
from sso_jax.models.remat_policy import save_for_backward, save_marked
from sso_jax.models.sequences import RowForm, Sequences, make_sequences
from sso_jax.runtime.mesh import constrain, gathered


class Layer(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`, with norms before attention and MLP, after them, or both."""

    architecture: Architecture
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    attend: str
    adapters: Adapters

    @nn.compact
    def __call__(self, carry, layer, inputs: AttentionInputs):
        """Runs one step of the scan over layers.

        Args:
          carry: activations and cache.
          layer: index of the layer in the cache.
          inputs: what all layers share.
        """
        x, cache = carry
        x = constrain(x, "batch", None, None)
        options = projection_options(self)
        attention = Attention(self.architecture, **options, attend=self.attend, name="attention")
        attended, cache = attention(self._before("attention", x), inputs, cache, layer)
        x = save_for_backward(x + self._after("attention", attended))
        if self.architecture.experts is None:
            mlp: nn.Module = GatedMLP(self.architecture, **options, name="mlp")
        else:
            mlp = ExpertsMLP(self.architecture, self.attend, **options, name="mlp")
        out = mlp(self._before("mlp", x))
        return (x + self._after("mlp", out), cache), None

    def _before(self, part: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Norms the input of a part, if the architecture does."""
        return x if self.architecture.norms == "after" else self._norm(f"{part}_norm", x)

    def _after(self, part: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Norms the output of a part, if the architecture does."""
        return x if self.architecture.norms == "before" else self._norm(f"{part}_out_norm", save_for_backward(x))

    def _norm(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        a = self.architecture
        return RMSNorm(a.norm_eps, a.norm_offset, self.param_dtype, name=name)(x)


class Transformer(nn.Module):
    """The decoder of an architecture; its layers are scanned, so that compile time does not grow with depth."""

    architecture: Architecture
    dtype: jnp.dtype = jnp.float32
    """Compute type."""
    param_dtype: jnp.dtype = jnp.float32
    """Type of the weights."""
    remat: bool = False
    """Whether the backward pass recomputes each whole layer; otherwise only what `save_for_backward` does not mark."""
    attend: str = "plain"
    """Name in `KERNELS` of the kernel for whole sequences."""
    adapters: Adapters = Adapters()
    """Low-rank adapters of the projections."""
    max_logits: int = 2**25
    """Maximum number of logits in a device's memory when log-probs are computed (`training.log_probs`)."""
    scanned: bool = True
    """False gives each layer its own parameters (`models.layer_layout`), for decoding."""

    def setup(self):
        """Declares the parameters."""
        a = self.architecture
        init = nn.initializers.normal(0.02)
        embedding = nn.with_logical_partitioning(init, ("vocab", "embed"))
        self.embedding = self.param("embedding", embedding, (a.vocab_size, a.embed_dim), self.param_dtype)
        options = (a, self.dtype, self.param_dtype, self.attend, self.adapters)
        self.layers = self._scan()(*options) if self.scanned else [Layer(*options) for _ in range(a.num_layers)]
        self.final_norm = RMSNorm(a.norm_eps, a.norm_offset, self.param_dtype)
        if not a.tied_head:
            head = nn.with_logical_partitioning(init, ("embed", "vocab"))
            self.head = self.param("head", head, (a.embed_dim, a.vocab_size), self.param_dtype)

    @property
    def row_form(self) -> RowForm:
        """What packed rows hold for the kernel for whole sequences."""
        return ROW_FORMS.get(self.attend, RowForm.MASK)

    def _scan(self) -> type[nn.Module]:
        return nn.scan(
            nn.remat(Layer, prevent_cse=False, policy=None if self.remat else save_marked),
            variable_axes={"params": 0, ROUTER: 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.architecture.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#B T S"],
        cache: Cache | None = None,
        slot: Int[Array, ""] | int = 0,
        query_indices: Int[Array, "B W"] | None = None,
        sequences: Int[Array, "B Z U"] | Columns | None = None,
        pages: Pages | None = None,
    ) -> tuple[Float[Array, "B W D"], Cache | None]:
        """Returns the normed hidden states after the last layer, and the cache with these tokens written at `slot`.

        Args:
          tokens: token ids.
          positions: position of each token.
          mask: which token (second axis) sees which token (third axis); with pages, which slot of the cache.
          cache: cache that the tokens are written to; None stays None.
          slot: cache slot of the first token.
          query_indices: tokens of each row whose hidden states are returned; None returns all T.
          sequences: columns of the sequences of each row (`make_sequences`, `make_places`), which describe the same
            visibility as the mask; for kernels that take them in this form.
          pages: what the one token of each row sees besides the cache; None in a prefill and without a cache.
        """
        table = gathered(self.embedding.astype(self.dtype), "vocab", "embed")  # tokens are sharded by batch
        x = constrain(jnp.take(table, tokens, axis=0), "batch", None, None)  # [B, T, D]
        x = x * jnp.asarray(self.architecture.embedding_factor, x.dtype)
        key_positions = positions if pages is None else pages.window_positions
        views = tuple(
            layer_view(kind, self.architecture.rotary_size, positions, key_positions, mask)
            for kind in self.architecture.kinds
        )
        inputs = AttentionInputs(views, jnp.asarray(slot), _laid_out(sequences, positions), pages)
        x, cache = (self._run_scanned if self.scanned else self._run_unrolled)(x, cache, inputs)
        return self.final_norm(at_tokens(x, query_indices)), cache

    def _run_scanned(self, x: Float[Array, "B T D"], cache: Cache | None, inputs: AttentionInputs):
        (x, cache), _ = self.layers((x, cache), jnp.arange(self.architecture.num_layers), inputs)
        return x, cache

    def _run_unrolled(self, x: Float[Array, "B T D"], cache: Cache | None, inputs: AttentionInputs):
        for number, layer in enumerate(self.layers):
            (x, cache), _ = layer((x, cache), number, inputs)
        return x, cache

    def head_matrix(self) -> Float[Array, "D V"]:
        """Returns the matrix from hidden states to logits, in the compute type; it is sharded like its parameter."""
        return (self.embedding.T if self.architecture.tied_head else self.head).astype(self.dtype)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns the logits of the next token, in float32."""
        return project(hidden, gathered(self.head_matrix(), "embed", "vocab"), self.architecture.logit_cap)


def _laid_out(
    sequences: Int[Array, "B Z U"] | Columns | None, positions: Int[Array, "B T"]
) -> Sequences | Places | None:
    """Returns the sequences of rows for a kernel; None if there are none."""
    if sequences is None:
        return None
    return make_places(sequences, positions) if isinstance(sequences, Columns) else make_sequences(sequences, positions)


def project(
    hidden: Float[Array, "... D"], head: Float[Array, "D V"], cap: float | None = None
) -> Float[Array, "... V"]:
    """Returns logits, in float32, from hidden states and `Transformer.head_matrix` or some of its columns.

    With a cap they are `cap * tanh(logits / cap)`.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])  # see `flat_product`
    logits = jnp.matmul(flat, head, preferred_element_type=jnp.float32).reshape(*hidden.shape[:-1], -1)
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def init_params(model: Transformer, key: jax.Array):
    """Returns random parameters, boxed with the logical names of their axes."""
    tokens = jnp.zeros((1, 1), jnp.int32)

    def everything(module, tokens):
        return module.logits(module(tokens, tokens, causal_mask(1))[0])

    return model.init(key, tokens, method=everything)["params"]


@lru_cache
def abstract_params(model: Transformer):
    """Returns shapes, types and logical axis names of the parameters, without allocating them."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
