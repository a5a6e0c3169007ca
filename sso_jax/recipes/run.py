"""Types that all recipes share: a run, one round of it, the summary of a round, and the interface of a recipe."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from sso_jax.config import Config
from sso_jax.data.records import Cell, Triple
from sso_jax.preferences.endpoint import Endpoint
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.environment import Environment
from sso_jax.runtime import stage_markers
from sso_jax.training.metrics import MetricsLog
from sso_jax.training.step_packing import StepShape

Dataset = TypeVar("Dataset")
Source = TypeVar("Source")
Params = dict[str, Any]
"""Parameters of a decoder, nested by module."""


@dataclass(frozen=True)
class Run(Generic[Dataset]):
    """What all rounds of a run share."""

    config: Config
    directory: Path
    engine: Engine
    environment: Environment
    dataset: Dataset
    """The recipe's training data, as returned by its `prepare`."""
    dropped: Counter
    """Number of data dropped before the first round, by reason."""
    metrics: MetricsLog
    held_out: list[Triple] | None = None
    """Pairs of the file of `train.held_out`, which no update sees; None if it names no file."""
    rejected_engine: Engine | None = None
    """The model of `sampling.rejected_path`, if the config has one."""
    endpoint: Endpoint | None = None
    """Server that writes principles or judges pairs, if the config has one."""
    programs: dict[tuple[str, Any], Callable] = field(default_factory=dict)
    """Compiled updates by stage and structure of their batches, shared by all rounds."""

    def folder(self, iteration: int) -> Path:
        """Returns the folder of a round."""
        return self.directory / f"iteration_{iteration}"


@dataclass(frozen=True)
class Round(Generic[Dataset]):
    """One round of a run, or the part of it that trains the generator."""

    run: Run[Dataset]
    iteration: int
    part: str = ""
    """Subfolder for a part of the round: `generator`, or empty for the round itself."""

    @property
    def folder(self) -> Path:
        """Folder of the stages of this round, or of this part of it."""
        folder = self.run.folder(self.iteration)
        return folder / self.part if self.part else folder

    @property
    def seed(self) -> str:
        """Seed of everything that is drawn again in each round."""
        return f"{self.run.config.run.seed}/{self.iteration}"

    @property
    def is_last(self) -> bool:
        """Whether this is the last round."""
        return self.iteration == self.run.config.run.iterations

    def title(self, stage: str) -> str:
        """Returns the name of a stage for progress bars and messages."""
        return f"iteration {self.iteration}: {stage}"

    def previous_step_shapes(self, stage: str) -> list[StepShape]:
        """Returns the shapes of this stage's device steps in the previous round; none if there is no such stage."""
        before = dataclasses.replace(self, iteration=self.iteration - 1)
        stats = stage_markers.finished(before.folder, stage) or {}
        return [StepShape.of_json(shape) for shape in stats.get("step_shapes") or []]


@dataclass(frozen=True)
class RoundSummary:
    """A row of summary.json; None for what a recipe does not have."""

    num_queries: int | None = None
    num_pairs: int | None = None
    dropped: dict[str, int] | None = None
    pair_accuracy: float | None = None
    pair_ties: float | None = None
    chosen_probability: float | None = None
    rejected_probability: float | None = None
    policy_quality: float | None = None
    quality_parts: dict[str, float] | None = None
    response_tokens: float | None = None
    held_out_tokens: float | None = None
    held_out_groups: dict[str, dict[str, float]] | None = None
    held_out_answers: dict[str, Any] | None = None
    """Numbers of the answers to the queries of `evaluation.path` (`measure_answers`)."""
    held_out_log_prob: float | None = None
    sampling: dict[str, dict[str, float | None]] | None = None
    """By role: share of responses `cut` at the limit, `mean_tokens`, `p90_tokens`, and the stage's `row_steps_used`."""
    padding: dict[str, float] | None = None
    """Share of padding among the tokens of the rows of `scoring` and `updates`."""
    num_cut: int | None = None
    """Examples whose responses were cut to train.max_tokens."""
    before_filter: dict[str, Any] | None = None
    random_features: int | None = None
    fallback_principles: int | None = None
    unparsed: int | None = None
    unanswered: dict[str, int] | None = None
    endpoint_judge: dict[str, Any] | None = None
    held_out: dict[str, float] | None = None
    """Numbers on the pairs that no update sees, of the parameters that the round ended with: see `TrainingResult`."""
    reward: dict[str, Any] | None = None
    weights: dict[str, str | None] | None = None
    """Fingerprints of the weights at the `start`, of the `generator`, of those that the responses were `sampled_with`
    and, if others, the rejected ones (`rejected_with`), and of the `trained` ones."""
    warnings: list[str] | None = None
    seconds: dict[str, float] | None = None
    tokens_per_second: dict[str, float | None] | None = None


@dataclass(frozen=True)
class Recipe(Generic[Source, Dataset]):
    """The functions of a recipe."""

    read: Callable[[Config], Source]
    """Checks the fields that this recipe needs or does not use, and reads its data, before anything is written."""
    prepare: Callable[[Config, Engine, Source], tuple[Dataset, Counter]]
    """Returns the part of the data that the engine can use, and the number of data dropped by reason."""
    run_round: Callable[[Round[Dataset], Params], tuple[Params, RoundSummary]]
    """(round, policy at its start) -> policy at its end, and the round's row of summary.json."""
    held_out_cells: Callable[[Config], list[Cell]] | None = None
    """Log-probs that held-out pairs from a file must have; None if the recipe has no pairs."""
