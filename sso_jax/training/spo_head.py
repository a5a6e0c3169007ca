"""The self-supervised part of base `spo`: a head that predicts the degree of a graded response.

Li et al. 2024, arXiv 2409.17791 (SPO). From the paper: key content found by RAKE and removed in steps, a classifier
on the model's own representation that predicts the step, its cross-entropy added to the alignment loss, both trained
together. This project's choices: shares 0, 1/3, 2/3, 1 of the phrases of y+, the mean of the final hidden states over
the response tokens before the end of turn, a head of two layers of the model's width, weight 0.1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sso_jax.data.records import Cell
from sso_jax.models.transformer import Transformer
from sso_jax.training.batches import PreferenceBatch
from sso_jax.training.example_losses import CellValues, ExampleLosses, cell_metrics
from sso_jax.training.log_probs import cell_means, cell_sums, forward
from sso_jax.training.objectives import Rewards
from sso_jax.training.router_balance import with_router_loss

HEAD = "degree_head"
NUM_DEGREES = 4
DEGREE_CELLS = [Cell("plain", f"degree_{k}") for k in range(1, NUM_DEGREES)]
"""The graded variants of y+; y+ itself has degree 0."""


def init_head(seed: int, width: int) -> dict:
    """Initializes the head: `D -> D -> degrees`, kernels with variance 1/D, biases 0."""
    first, second = jax.random.split(jax.random.key(seed))

    def draw(key, shape):
        return jax.random.normal(key, shape) / jnp.sqrt(width)

    return {
        "hidden": {"kernel": draw(first, (width, width)), "bias": jnp.zeros(width)},
        "out": {"kernel": draw(second, (width, NUM_DEGREES)), "bias": jnp.zeros(NUM_DEGREES)},
    }


def degree_logits(head: dict, means: Float[Array, "E K D"]) -> Float[Array, "E K K"]:
    """Returns `gelu(m W1 + b1) W2 + b2` for each graded response."""
    hidden = jax.nn.gelu(means @ head["hidden"]["kernel"] + head["hidden"]["bias"][None, None, :])
    return hidden @ head["out"]["kernel"] + head["out"]["bias"][None, None, :]


def degree_terms(head: dict, means: Float[Array, "E K D"]) -> tuple[Float[Array, "E"], Float[Array, "E"]]:
    """Returns the cross-entropy of the degrees 0, 1, ... of each example's responses in nats, and the accuracy.

    Both are means over degrees.
    """
    logits = degree_logits(head, means)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    right = jnp.argmax(logits, axis=-1) == jnp.arange(NUM_DEGREES)[None, :]
    return -jnp.diagonal(log_probs, axis1=1, axis2=2).mean(-1), right.astype(jnp.float32).mean(-1)


def spo_losses(
    model: Transformer, objective, cells: list[Cell], rewards: Rewards, weight: float, router_weight: float = 0.0
) -> ExampleLosses:
    """Returns the loss function `L_align + gamma * CE`; `objective` gets the cells that are not degrees."""
    own = [cell for cell in cells if cell not in DEGREE_CELLS]
    graded = [cells.index(Cell("plain", "chosen")), *(cells.index(cell) for cell in DEGREE_CELLS)]
    columns = jnp.array([cells.index(cell) for cell in own])

    def losses(params, step: PreferenceBatch):
        num_examples, num_cells = step.num_tokens.shape
        policy_params = {name: part for name, part in params.items() if name != HEAD}
        states = forward(model, policy_params, step.rows, step.rows.source)
        sums = cell_sums(model, policy_params, step.rows, states.hidden, num_examples * num_cells)
        means = cell_means(step.rows, states.hidden, num_examples * num_cells)
        values = (sums.reshape(num_examples, num_cells), step.reference_log_probs, step.num_tokens)
        metrics = cell_metrics(objective, own, rewards, CellValues(*(part[:, columns] for part in values)))
        of_degrees = means.reshape(num_examples, num_cells, -1)[:, jnp.array(graded)]
        degree_loss, degree_accuracy = degree_terms(params[HEAD], of_degrees)
        metrics |= {
            "loss": metrics["loss"] + weight * degree_loss,
            "degree_loss": degree_loss,
            "degree_accuracy": degree_accuracy,
        }
        group = step.rows.first_cell // num_cells
        return with_router_loss(metrics, model.architecture.experts, states.router_logits, group, router_weight)

    return losses
