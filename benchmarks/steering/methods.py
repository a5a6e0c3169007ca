"""Defines the compared methods, the studies that compare them, and the config of each cell."""

import dataclasses
from pathlib import Path
from typing import Any

from sso_jax.config import Config, LoggingConfig

CHOOSING_SEED = 0
"""Seed for choosing learning rates; not reported in any study."""
ITERATIONS = 3
"""Iterations of study main, and of the cells that choose rates.

Two would not be enough for choosing: the rate that is best after two may have degraded the policy after three.
"""
RATES = (1e-4, 2e-4, 4e-4, 8e-4)

IPO, DPO = {"objective.base": "ipo", "objective.beta": 0.2}, {"objective.base": "dpo", "objective.beta": 0.2}
REACHABLE = {"objective.base": "ipo", "objective.beta": 1.0}
"""IPO with a target that its updates can reach: 1/(2 beta) = 0.5 nats per token; at the paper's 0.2 it is 2.5."""
PBAA, V1 = {"objective.form": "pairwise"}, {"objective.form": "online"}
V1_DPO = {**V1, **DPO}
STRONG = {**V1_DPO, "objective.steering_weight": 1.0}
"""Steering terms with the same weight as the base loss, so that their effect is visible."""
V2 = {"recipe": "generator", "objective.form": "generator", "objective.base": "dpo", "objective.beta": 0.1}
NO_W = {"objective.use_weight": False, "objective.steering_weight": 0.059}
"""W is near 0.59 here: g is scaled by 0.59 so that only W is ablated, not the size of the steering terms."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Title of a method, the family whose learning rate it uses, and its config fields."""

    title: str
    family: str
    fields: dict[str, Any]


METHODS = {
    "pbaa_ipo": Method("PBAA, IPO", "pbaa_ipo", {**PBAA, **IPO}),
    "pbaa_dpo": Method("PBAA, DPO", "pbaa_dpo", {**PBAA, **DPO}),
    "v1_ipo": Method("SSO v1, IPO", "v1_ipo", {**V1, **IPO}),
    "v1_dpo": Method("SSO v1, DPO", "v1_dpo", V1_DPO),
    "v2": Method("SSO v2, DPO", "v2", V2),
    "random": Method("control: random order", "pbaa_dpo", {**PBAA, **DPO, "pairs.control": "random_order"}),
    "judge": Method("control: judge's order", "pbaa_dpo", {**PBAA, **DPO, "pairs.control": "judge_order"}),
    "v1_without_w": Method("v1 DPO without W, g rescaled", "v1_dpo", {**V1_DPO, **NO_W}),
    "v1_without_g": Method("v1 DPO without G", "v1_dpo", {**V1_DPO, "objective.use_steering": False}),
    "v1_g_1": Method("v1 DPO, g 1", "v1_dpo", STRONG),
    "v1_positive": Method("v1 DPO, g 1, L+ alone", "v1_dpo", {**STRONG, "objective.negative_weight": 0.0}),
    "v1_negative": Method("v1 DPO, g 1, L- alone", "v1_dpo", {**STRONG, "objective.positive_weight": 0.0}),
    "v1_naive": Method("v1 DPO, g 1, naive L-", "v1_dpo", {**STRONG, "objective.negative_winner": "rejected"}),
    "v2_positive": Method("v2, L+ alone", "v2", {**V2, "objective.negative_weight": 0.0}),
    "v2_negative": Method("v2, L- alone", "v2", {**V2, "objective.positive_weight": 0.0}),
    "v2_naive": Method("v2, naive L-", "v2", {**V2, "objective.negative_winner": "rejected"}),
    "v1_filter": Method("SSO v1, DPO, filter", "v1_dpo", {**V1_DPO, "filter.enabled": True}),
    "pbaa_filter": Method("PBAA, DPO, filter", "pbaa_dpo", {**PBAA, **DPO, "filter.enabled": True}),
    "pbaa_ipo_1": Method("PBAA, IPO, beta 1", "pbaa_ipo", {**PBAA, **REACHABLE}),
    "v1_ipo_1": Method("SSO v1, IPO, beta 1", "v1_ipo", {**V1, **REACHABLE}),
}
GROUPS = (
    ("pbaa_dpo", "v1_dpo", "v2", "pbaa_ipo", "v1_ipo", "random", "judge"),
    ("v1_g_1", "v1_positive", "v1_negative", "v1_naive"),
    ("pbaa_filter", "v1_filter"),
    ("v1_without_w", "v1_without_g"),
    ("v2_positive", "v2_negative", "v2_naive"),
    ("pbaa_ipo_1", "v1_ipo_1"),
)
"""Order of study main: all seeds of a group run before the next group."""
FAMILIES = ("pbaa_ipo", "pbaa_dpo", "v1_ipo", "v1_dpo", "v2")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study: a method from the start of a seed."""

    study: str
    method: str
    seed: int
    iterations: int
    queries: int
    rate: float | None = None
    """Learning rate; None means the rate chosen for the method's family."""
    width: int = 64
    descriptions: bool = False
    """Whether the world has the family in which longer answers look better."""

    @property
    def name(self) -> str:
        """Folder of the cell, relative to the benchmark's directory."""
        rate = "" if self.rate is None else f"_rate_{self.rate:g}"
        return f"{self.study}/{self.method}_queries_{self.queries}{rate}/seed_{self.seed}"


STUDIES = {
    "main": "every method, three iterations",
    "endurance": "ten iterations, long enough for a method to wear out",
    "data": "one iteration of 64 to 1,024 queries",
    "larger": "a policy of twice the width",
    "length": "a world in which longer looks better in one family, so that lengths can drift",
}


def cells_of_study(study: str, seeds: list[int], queries: int) -> list[Cell]:
    """Returns the cells of a study in the order in which they are run."""
    if study == "main":
        return [
            Cell(study, method, seed, ITERATIONS, queries) for group in GROUPS for seed in seeds for method in group
        ]
    if study == "endurance":
        return [
            Cell(study, method, seed, 10, 96)
            for seed in seeds
            for method in ("pbaa_dpo", "v1_dpo", "v2", "pbaa_ipo", "v1_ipo")
        ]
    if study == "data":
        sizes = (64, 128, 256, 512, 1024)
        return [
            Cell(study, method, seed, 1, size) for seed in seeds for size in sizes for method in ("pbaa_dpo", "v1_dpo")
        ]
    if study == "length":
        methods = ("pbaa_dpo", "v1_dpo", "v1_g_1", "v2", "pbaa_ipo", "v1_ipo", "random")
        return [Cell(study, method, seed, 5, queries, descriptions=True) for seed in seeds for method in methods]
    return [
        Cell(study, method, seed, ITERATIONS, queries, width=128)
        for seed in seeds
        for method in ("pbaa_dpo", "v1_dpo", "v2")
    ]


def choosing_cells(queries: int) -> list[Cell]:
    """Returns the cells for choosing learning rates: each family at every rate, with the iterations of study main."""
    return [Cell("rates", family, CHOOSING_SEED, ITERATIONS, queries, rate) for family in FAMILIES for rate in RATES]


def cell_config(cell: Cell, rate: float, directory: Path) -> Config:
    """Returns the config of a cell: the sizes of configs/tiny.yaml and the fields of the method.

    The learning rate is constant because a schedule would depend on the number of pairs that a method keeps.
    """
    fields = {
        "run.directory": str(directory),
        "run.seed": cell.seed,
        "run.iterations": cell.iterations,
        "queries.per_iteration": cell.queries,
        "toy.descriptions": cell.descriptions,
        "sampling.max_new_tokens": 64 if cell.descriptions else 48,
        "sampling.batch_size": 128,
        "optimizer.learning_rate": rate,
        "optimizer.schedule": "constant",
        "optimizer.warmup_ratio": 0.0,
        "train.batch_size": 16,
        "train.max_tokens": 512,
        "generator.queries": cell.queries // 2,
        **METHODS[cell.method].fields,
    }
    config = Config(logging=LoggingConfig(tensorboard=False))
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        if section:
            config = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
            )
        else:
            config = dataclasses.replace(config, **{field: value})
    return config
