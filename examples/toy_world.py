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
# # The toy world, step by step
#
# Self-Steering Optimization on a laptop, without a model to download. A small policy is trained from scratch on an
# embedded toy world, and then aligns itself on its own contrast. Open this file as a notebook with `jupytext --to
# notebook examples/toy_world.py`, or run it as a script from the repository's root: `python examples/toy_world.py`.

# %%
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt

import sso_jax
from sso_jax.config import QueriesConfig, RunConfig, SamplingConfig, ToyConfig, TrainConfig
from sso_jax.preferences.principles import predefined
from sso_jax.preferences.steering import steer
from sso_jax.toy import world
from sso_jax.toy.judge import judge

FAST = "SSO_FAST_EXAMPLES" in os.environ  # a few updates only, to test that this file runs; the policy learns nothing
folder = Path(tempfile.mkdtemp()) / "run"

# %% [markdown]
# ## The world
#
# Its queries are sums, opposites, lists, spelling and greetings. Its judge scores an answer by truth, completeness,
# politeness and concision. The judge measures; nothing that trains ever sees it.

# %%
queries = world.queries("alignment")
query = next(q for q in queries if q.id.startswith("sum"))
print(f"{len(queries)} queries to align on, for example {query.query!r}")
for answer in ("With pleasure! It is 7.", "It is 7. One could say a lot more.", "That is hard to say."):
    print(f"{judge(query.query, answer).score:.2f}  {answer}")

# %% [markdown]
# ## Good and bad principles
#
# A query is steered by features. Each has a good and a bad side, which become the system messages of the prompts x+ and
# x-. The response to the good one is y+, the response to the bad one y-, and the response to the plain prompt x is y_o.

# %%
steered = steer(predefined(query, ("Engagement", "Accuracy")))
print("p+:", steered.good_system)
print("p-:", steered.bad_system)

# %% [markdown]
# ## One run
#
# The same as `python train.py --config configs/tiny.yaml`, from Python. A supervised start teaches the policy what
# principles mean; then each round samples triples, trains on their contrast and exports the policy.

# %%
config = sso_jax.Config(
    run=RunConfig(directory=str(folder), iterations=1 if FAST else 2),
    toy=ToyConfig(fact_updates=4, style_updates=0, width=32, num_layers=1) if FAST else ToyConfig(),
    queries=QueriesConfig(per_iteration=16 if FAST else 200),
    sampling=SamplingConfig(max_new_tokens=8 if FAST else 48, batch_size=128),
    train=TrainConfig(batch_size=16, max_tokens=512),
)
config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-4))
sso_jax.run(config)

# %% [markdown]
# ## What the policy says, steered and not

# %%
sampling = SamplingConfig(temperature=0.0, max_new_tokens=8 if FAST else 48, batch_size=8)
settings = sso_jax.SampleConfig(sampling=sampling, train=TrainConfig(max_tokens=512))
policy = sso_jax.read_policy(folder / "iteration_0" / "start", settings)
for name, system in (("x+", steered.good_system), ("x-", steered.bad_system), ("x", None)):
    (answer,) = sso_jax.sample(policy, [query.query], system)
    (log_prob,) = sso_jax.score(policy, [query.query], [answer], system)
    print(f"{name:>2}: {answer!r}, log-prob {log_prob:.2f} nats")

# %% [markdown]
# ## Curves
#
# Quality of unsteered answers to held-out queries after each round, and the loss of each update.

# %%
summary = json.loads((folder / "summary.json").read_text())
updates = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot([row["iteration"] for row in summary], [row["policy_quality"] for row in summary], marker="o")
left.set(title="Policy quality", xlabel="iteration", ylim=(0, 1))
right.plot([line["loss"] for line in updates])
right.set(title="Loss", xlabel="update")
plt.show()
