"""Names in, configs out: the methods that are compared, the studies that compare them, and the cells of each."""

import dataclasses
from pathlib import Path
from typing import Any

from sso_jax.config import Config, LoggingConfig

CHOOSING_SEED = 0
"""Seed on which learning rates are chosen; it is in no table."""
ITERATIONS = 3
"""Of study main, and of what chooses the rates: the rate that is ahead after two may have worn the policy out after
three."""
RATES = (1e-4, 2e-4, 4e-4, 8e-4)

IPO, DPO = {"objective.base": "ipo", "objective.beta": 0.2}, {"objective.base": "dpo", "objective.beta": 0.2}
REACHABLE = {"objective.base": "ipo", "objective.beta": 1.0}
"""IPO whose target, 1/(2 beta) = 0.5 nats a token, its updates can reach; at the paper's 0.2 it is 2.5."""
PBAA, V1 = {"objective.form": "pairwise"}, {"objective.form": "online"}
V1_DPO = {**V1, **DPO}
STRONG = {**V1_DPO, "objective.steering_weight": 1.0}
"""With the steering terms as heavy as the base loss, so that what they do shows."""
V2 = {"recipe": "generator", "objective.form": "generator", "objective.base": "dpo", "objective.beta": 0.1}
NO_W = {"objective.use_weight": False, "objective.steering_weight": 0.059}
"""W is near 0.59 here: without it, g is scaled by that, or the ablation would be of g."""


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method is called, whose learning rate it takes, and the config fields that make it."""

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
"""The order of study main: every seed of a group before the next group."""
FAMILIES = ("pbaa_ipo", "pbaa_dpo", "v1_ipo", "v1_dpo", "v2")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a table: a method from the start of a seed."""

    study: str
    method: str
    seed: int
    iterations: int
    queries: int
    rate: float | None = None
    """Learning rate; None is the one chosen for the method's family."""
    width: int = 64
    descriptions: bool = False
    """Whether the world has the family in which longer looks better."""

    @property
    def name(self) -> str:
        """Folder of the cell under the benchmark's."""
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
    """The cells of a study, in the order in which they are run."""
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
    """The cells by which learning rates are chosen: each family's own method at every rate, over as many iterations as
    study main has.
    """
    return [Cell("rates", family, CHOOSING_SEED, ITERATIONS, queries, rate) for family in FAMILIES for rate in RATES]


def cell_config(cell: Cell, rate: float, directory: Path) -> Config:
    """The config of a cell: that of configs/tiny.yaml in sizes, with the method's own fields.

    The learning rate is constant, so that its schedule does not follow the number of pairs that a method keeps.
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
