"""Defines the compared methods, the cells of the study, and the config of each cell."""

import dataclasses
from pathlib import Path

from benchmarks.steering.methods import DPO, IPO, PBAA, V1, V2, Method
from sso_jax.config import Config, parse

CHOOSING_SEED = 0
"""Seed for choosing learning rates; not reported."""
ADAPTER_RATES, WEIGHT_RATES = (1e-4, 3e-4, 1e-3), (1e-6, 5e-6, 2e-5)
"""Learning rates that are tried for adapters and for all weights."""
RANK = 16
ITERATIONS = 3

METHODS = {
    "pbaa": Method("PBAA, DPO", "dpo", {**PBAA, **DPO}),
    "v1_ipo": Method("SSO v1, IPO", "ipo", {**V1, **IPO}),
    "v1_dpo": Method("SSO v1, DPO", "dpo", {**V1, **DPO}),
    "v2": Method("SSO v2, DPO", "dpo", V2),
    "random": Method("control: random order", "dpo", {**PBAA, **DPO, "pairs.control": "random_order"}),
}
"""Their families are the base losses, which have a learning rate each."""
CHOOSING = {"dpo": {**PBAA, **DPO}, "ipo": {**PBAA, **IPO}}
"""Fields of the cells that choose the rate of each base loss."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What all cells share."""

    model: str
    queries: str
    held_out: str
    per_iteration: int
    num_held_out: int
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a method, or in the choice of rates a base loss, from the same start."""

    method: str
    seed: int
    rate: float
    weights: str = "adapters"
    """What is trained: `adapters` or `all`."""
    is_choice: bool = False

    @property
    def name(self) -> str:
        """Name of the cell's run directory."""
        if self.is_choice:
            return f"rates/{self.method}_{self.weights}_{self.rate:g}"
        return f"{self.method}/seed_{self.seed}"

    @property
    def iterations(self) -> int:
        """Iterations of the cell: the choice of rates looks at the first alone."""
        return 1 if self.is_choice else ITERATIONS


def choosing_cells() -> list[Cell]:
    """Returns the cells that choose the learning rates of adapters."""
    return [Cell(base, CHOOSING_SEED, rate, is_choice=True) for base in CHOOSING for rate in ADAPTER_RATES]


def weight_cells() -> list[Cell]:
    """Returns the cells that train all weights in place of adapters, which no method of the study does."""
    return [Cell("ipo", CHOOSING_SEED, rate, "all", is_choice=True) for rate in WEIGHT_RATES]


def study_cells(seeds: list[int], rates: dict[str, float]) -> list[Cell]:
    """Returns the cells of the study, seed by seed, of the methods whose rate is known."""
    known = {name: method for name, method in METHODS.items() if method.family in rates}
    return [Cell(name, seed, rates[method.family]) for seed in seeds for name, method in known.items()]


def cell_config(cell: Cell, sizes: Sizes, root: Path) -> Config:
    """Returns the config of a cell: that of configs/laptop.yaml with the study's sizes and the method's fields.

    The learning rate is constant, because a schedule would depend on the number of pairs that a method keeps.
    """
    fields = {
        "run.directory": str(root / cell.name),
        "run.seed": cell.seed,
        "run.iterations": cell.iterations,
        "model.path": sizes.model,
        "queries.path": sizes.queries,
        "queries.per_iteration": sizes.per_iteration,
        "evaluation.path": sizes.held_out,
        "evaluation.max_queries": sizes.num_held_out,
        "sampling.max_new_tokens": sizes.max_new_tokens,
        "sampling.batch_size": 32,
        "train.batch_size": 8,
        "optimizer.learning_rate": cell.rate,
        "optimizer.schedule": "constant",
        "optimizer.warmup_ratio": 0.0,
        "logging.tensorboard": False,
        **(CHOOSING[cell.method] if cell.is_choice else METHODS[cell.method].fields),
    }
    if cell.weights == "adapters":
        fields |= {"lora.rank": RANK, "lora.export": "adapter"}
    given = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    return parse(Config, ["--config", "configs/laptop.yaml", *given], "real_model", "")
