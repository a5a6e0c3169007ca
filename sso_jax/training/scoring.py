"""Computes log-prob sums of examples in device steps of packed rows."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from sso_jax.data.records import Cell
from sso_jax.runtime.errors import RunError
from sso_jax.runtime.hosts import each_from_first, own_share, stop_now
from sso_jax.runtime.journal import Journal
from sso_jax.runtime.mesh import batch_sharding, place
from sso_jax.runtime.progress import progress_bar
from sso_jax.runtime.signals import Stopped
from sso_jax.runtime.spool import Arrivals
from sso_jax.training.device_steps import StepLimits, StepPlan, plan_in_shapes, plan_steps
from sso_jax.training.log_probs import Score
from sso_jax.training.packing import Rows, pack
from sso_jax.training.step_packing import StepShape
from sso_jax.training.trees import Tree, steered_trees

PACKED_TOGETHER = 64
"""Number of examples whose trees are sorted by size and packed into device steps together."""


class Scorable(NamedTuple):
    """Prompts by context and responses by name, as token ids."""

    prompts: dict[str, list[int]]
    responses: dict[str, list[int]]


class ScoringStep(NamedTuple):
    """The examples of a device step, by their index, and its rows."""

    items: list[int]
    trees: list[Tree]
    bins: list[list[int]]
    shape: StepShape


def plan_scoring(
    items: Sequence[Scorable],
    cells: list[Cell],
    limits: StepLimits,
    earlier: list[StepShape] | None = None,
    is_last: bool = True,
) -> StepPlan:
    """Plans the device steps of scoring; see `plan_steps`, whose updates are groups of PACKED_TOGETHER examples."""
    return plan_steps(_groups(items, cells), limits, earlier, is_last)


def plan_scoring_again(
    items: Sequence[Scorable], cells: list[Cell], limits: StepLimits, shapes: list[StepShape]
) -> StepPlan:
    """Plans like `plan_scoring`, in shapes whose programs are compiled already if the items fit into them."""
    return plan_in_shapes(_groups(items, cells), limits, shapes) or plan_steps(_groups(items, cells), limits)


def _groups(items: Sequence[Scorable], cells: list[Cell]) -> Iterator[list[list[Tree]]]:
    for start in range(0, len(items), PACKED_TOGETHER):
        yield [steered_trees(*item, cells, 0) for item in items[start : start + PACKED_TOGETHER]]


def score_examples(
    score: Score,
    params: dict[str, Any],
    items: Sequence[Scorable],
    cells: list[Cell],
    plan: StepPlan | StepLimits,
    stage: str,
    journal: Journal | None = None,
    may_stop: bool = True,
) -> Sequence[list[float]]:
    """Returns the log-prob sum of every cell (context, response) of each item, in nats, from the training forward pass.

    Args:
      score: compiled scoring.
      params: the model's parameters.
      items: examples.
      cells: cells of each example.
      plan: device steps from `plan_scoring`, or their limits.
      stage: title of the progress bar.
      journal: journal of these items, parameters, cells and steps, in which results are kept as they come.
      may_stop: whether a requested stop is seen between steps; not where the caller has work to save first.

    Raises:
      Stopped: between two steps, if a stop was requested.
    """
    if not items:
        return []
    steps = scoring_steps(items, cells, plan_scoring(items, cells, plan) if isinstance(plan, StepLimits) else plan)
    params = score.prepare(params)
    done = Arrivals[list[float]](len(items), () if journal is None else each_from_first(journal.read))
    with progress_bar(stage, len(items), "example", initial=len(done)) as bar:

        def take(step: ScoringStep, values: jax.Array) -> None:
            rows = jax.device_get(values).reshape(-1, len(cells)).tolist()
            found = dict(zip(step.items, rows, strict=False))  # the rows after the examples fill the step up
            done.update(found.items())
            bar.update(len(found))
            if journal is not None:
                journal.add(dict(own_share(list(found.items()))))

        running: tuple[ScoringStep, jax.Array] | None = None
        for step in steps:  # the device computes a step while the host fetches the previous one
            if all(i in done for i in step.items):
                continue
            with jax.set_mesh(score.mesh):
                num_cells = step.shape.num_examples * len(cells)
                rows: Rows = place(pack(step.trees, step.shape.rows, num_cells, step.bins), batch_sharding(score.mesh))
                running, before = (step, score.log_probs(params, rows, num_cells)), running
            if before is not None:
                take(*before)
            if may_stop and stop_now():
                take(*running)
                raise Stopped(f"a signal in {stage}, after {len(done)} of {len(items)} examples")
        if running is not None:
            take(*running)
    return done.in_order()


def require_finite(sums: Iterable[list[float]], names: Iterable[str], cells: list[Cell]) -> None:
    """Raises `RunError` that names the examples whose log-probs are not finite."""
    broken = [
        f"{name} ({response} under {context}: {value})"
        for name, row in zip(names, sums, strict=True)
        for (context, response), value in zip(cells, row, strict=True)
        if not math.isfinite(value)
    ]
    if broken:
        raise RunError(
            f"log-probs are not finite, for {', '.join(broken[:5])}: the policy is broken; use an earlier one"
        )


def scoring_steps(items: Sequence[Scorable], cells: list[Cell], plan: StepPlan) -> Iterator[ScoringStep]:
    """Yields the device steps of a plan; example e of a step has the cells e*C ... e*C + C-1."""
    for group, of_group in enumerate(plan.updates):
        for step in of_group:
            own = [group * PACKED_TOGETHER + i for i in step.examples]
            trees = [tree for e, i in enumerate(own) for tree in steered_trees(*items[i], cells, e * len(cells))]
            yield ScoringStep(own, trees, step.bins, plan.shapes[step.shape])
