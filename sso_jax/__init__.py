"""Self-Steering Optimization in JAX: the public API, loaded when a name is first used.

import sso_jax

policy = sso_jax.read_policy("FOLDER")
answers = sso_jax.sample(policy, ["Name two fruits."])
log_probs = sso_jax.score(policy, ["Name two fruits."], answers)
"""

import importlib
from typing import Any

_MODULES = {
    "sso_jax.training.losses": (
        "BASE_LOSSES",
        "apo_down_loss",
        "apo_zero_loss",
        "aps_loss",
        "base_loss",
        "cdpo_loss",
        "clipped_loss",
        "discopop_loss",
        "dpo_loss",
        "dpo_norm_loss",
        "exo_loss",
        "hinge_loss",
        "ipo_loss",
        "nca_loss",
        "orpo_loss",
        "robust_loss",
        "simpo_loss",
        "sppo_loss",
    ),
    "sso_jax.training.pair_values": ("ContextValues", "Pair", "log_ratios", "margin", "mean_log_probs"),
    "sso_jax.training.f_dpo": ("fdpo_alpha_loss", "fdpo_forward_kl_loss", "fdpo_js_loss"),
    "sso_jax.training.multi_response_losses": (
        "MULTI_RESPONSE_LOSSES",
        "opo_loss",
        "reward_conditioned_loss",
        "rpo_loss",
        "selm_loss",
        "spo_loss",
    ),
    "sso_jax.training.objectives": (
        "OnlineWeights",
        "SteeringScale",
        "Terms",
        "generator_objective",
        "online_objective",
        "pairwise_objective",
        "policy_weight",
    ),
    "sso_jax.training.rewards": ("bradley_terry_loss",),
    "sso_jax.sampling.sampler": ("Request", "Sampler"),
    "sso_jax.config": ("Config", "EvaluateConfig", "SampleConfig", "parse"),
    "sso_jax.recipes": ("RECIPES",),
    "sso_jax.commands.library": ("Policy", "read_policy", "run", "sample", "score", "write_policy"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Loads a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sso_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names."""
    return list(__all__)
