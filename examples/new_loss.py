# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A new loss, from idea to curve
#
# A pairwise loss is one function of `(policy, reference, num_tokens)` with its settings as keyword arguments. Once it
# stands in the table `BASE_LOSSES`, every recipe and every context of SSO can use it. Open this file as a notebook with
# `jupytext --to notebook examples/new_loss.py`, or run it from the repository's root: `python examples/new_loss.py`.

# %%
import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import sso_jax
from sso_jax.config import (
    ObjectiveConfig,
    OptimizerConfig,
    QueriesConfig,
    RunConfig,
    SamplingConfig,
    ToyConfig,
    TrainConfig,
)

FAST = "SSO_FAST_EXAMPLES" in os.environ  # a few updates only, to test that this file runs
root = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The idea
#
# DPO's gradient never vanishes: a pair that is already well separated still pushes. A squared hinge stops at a margin
# of 1/beta, and pushes harder the further a pair is from it.


# %%
def squared_hinge_loss(policy, reference, num_tokens, *, beta=0.1):
    """`max(0, 1 - beta*D)^2` on sums; D is the log-ratio of the chosen response minus that of the rejected one."""
    del num_tokens  # sums, not means
    return jax.nn.relu(1.0 - beta * sso_jax.margin(policy, reference)) ** 2


sso_jax.BASE_LOSSES["squared_hinge"] = squared_hinge_loss

# %% [markdown]
# ## Its shape
#
# Loss and gradient over the margin D in nats, beside those of DPO. Where policy and reference are the same, D is 0: the
# loss is 1 and its slope -2 beta. A first update that shows another loss has stale log-probs.

# %%
margins = jnp.linspace(-30.0, 30.0, 121)
zeros = jnp.zeros_like(margins)
tokens = sso_jax.Pair(zeros + 10.0, zeros + 10.0)


def loss_of(loss, margins):
    """Loss of pairs with these margins; the reference is 0 everywhere."""
    return loss(sso_jax.Pair(margins, zeros), sso_jax.Pair(zeros, zeros), tokens, beta=0.1)


losses = {"dpo": sso_jax.dpo_loss, "squared hinge": squared_hinge_loss}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for name, loss in losses.items():
    left.plot(margins, loss_of(loss, margins), label=name)
    right.plot(margins, jax.grad(lambda m, loss=loss: loss_of(loss, m).sum())(margins), label=name)
left.set(title="Loss", xlabel="margin D, nats")
right.set(title="Gradient", xlabel="margin D, nats")
left.legend()
plt.show()

at_reference = float(squared_hinge_loss(sso_jax.Pair(0.0, 0.0), sso_jax.Pair(0.0, 0.0), tokens))
assert at_reference == 1.0

# %% [markdown]
# ## In a run
#
# One round on the toy world under the new loss, in every context of version 1 of SSO: `L_base + W*g*G`.


# %%
def run(base: str, beta: float) -> list[dict]:
    """Metrics of each update of one round with this base loss."""
    config = sso_jax.Config(
        run=RunConfig(directory=str(root / base), iterations=1),
        toy=ToyConfig(fact_updates=4, style_updates=0, width=32, num_layers=1) if FAST else ToyConfig(),
        queries=QueriesConfig(per_iteration=16 if FAST else 200),
        sampling=SamplingConfig(max_new_tokens=8 if FAST else 48, batch_size=128),
        objective=ObjectiveConfig(base=base, beta=beta),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        train=TrainConfig(batch_size=16, max_tokens=512),
    )
    sso_jax.run(config)
    return [json.loads(line) for line in (root / base / "metrics.jsonl").read_text().splitlines()]


curves = {base: run(base, beta) for base, beta in {"dpo": 0.1, "squared_hinge": 0.05}.items()}

# %% [markdown]
# ## The curves
#
# The first base loss is the one derived above: ln 2 for DPO, 1 for the squared hinge.

# %%
print({base: round(lines[0]["base_loss"], 4) for base, lines in curves.items()})
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for base, lines in curves.items():
    axes[0].plot([line["base_loss"] / lines[0]["base_loss"] for line in lines], label=base)
    axes[1].plot([line["margin"] for line in lines], label=base)
axes[0].set(title="Base loss, relative to the first", xlabel="update")
axes[1].set(title="Margin, beta times D", xlabel="update")
axes[0].legend()
plt.show()
