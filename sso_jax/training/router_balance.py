"""The loss that keeps a router from giving most tokens to few experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sso_jax.models.architecture import Experts
from sso_jax.training.log_probs import sum_by


def balance_losses(
    logits: Float[Array, "L R T E"], num_per_token: int, group: Int[Array, "R T"], num_groups: int
) -> Float[Array, "G"]:
    """Returns `E sum_e f_e P_e` of each group of tokens (Fedus et al. 2021, Switch Transformer, eq. 4 to 6).

    f_e is the number of times that expert e is chosen by a token and layer, over the number of tokens and layers, and
    P_e the mean of its probability. With all tokens in one group it is the loss of transformers' Qwen3-MoE, which is
    `num_per_token` if tokens are spread evenly.

    Args:
      logits: router logits of L layers.
      num_per_token: experts of a token.
      group: group of each token; `num_groups` for a token of none.
      num_groups: number of groups; one without tokens has loss 0.
    """
    num_layers, num_experts = logits.shape[0], logits.shape[-1]
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, chosen = jax.lax.top_k(probs, num_per_token)  # [L, R, T, Q]
    picks = jnp.sum(jax.nn.one_hot(chosen, num_experts), axis=(0, 3))  # [R, T, E]

    def total(values: Float[Array, "R T ..."]):
        return sum_by(values, group, num_groups)

    count = num_layers * jnp.maximum(1.0, total(jnp.ones(group.shape)))[:, None]
    return num_experts * jnp.sum(total(picks) / count * total(jnp.sum(probs, axis=0)) / count, axis=-1)


def with_router_loss(
    metrics: dict[str, Float[Array, "E"]],
    experts: Experts | None,
    router_logits: Float[Array, "L R T E"] | None,
    group: Int[Array, "R T"],
    weight: float,
    scale: Float[Array, "E"] | float = 1.0,
) -> tuple[Float[Array, "E"], dict[str, Float[Array, "E"]]]:
    """Returns the losses and metrics of examples: `metrics["loss"]`, plus `weight * scale * balance_losses`.

    Without experts nothing is added; with them the metrics have `router_loss`. A group is an example: all trees of one
    are in the same device step, so that the loss of an update depends neither on how examples are packed nor on the
    budget of a step.

    Args:
      metrics: metrics of the examples.
      experts: the model's experts.
      router_logits: from `log_probs.forward`.
      group: example of each token.
      weight: `train.router_loss`.
      scale: what the loss of an example has to be multiplied with for its mean over the update.
    """
    loss = metrics["loss"]
    if experts is None:
        return loss, metrics
    balance = scale * balance_losses(router_logits, experts.num_per_token, group, loss.shape[0])
    return loss + weight * balance, {**metrics, "router_loss": balance}
