"""Rounds share a compiled update where their batches have one structure, and only there."""

from types import SimpleNamespace

import numpy as np
import pytest

from sso_jax.config import Config
from sso_jax.recipes.stages import update as stage
from sso_jax.training.batches import UpdateBatch

pytestmark = pytest.mark.quick


def plan(num_shapes: int) -> SimpleNamespace:
    """A plan whose device steps have so many shapes."""
    groups = tuple(np.zeros(1) for _ in range(num_shapes))
    return SimpleNamespace(make_batch=lambda step: UpdateBatch(groups, np.ones(num_shapes, np.int32)))


def test_a_round_whose_steps_have_another_number_of_shapes_has_an_update_of_its_own(monkeypatch):
    built: list[int] = []

    def build(losses, optimizer, mesh, shardings, batch, cast):
        built.append(len(batch.groups))
        return SimpleNamespace(number=len(built))

    monkeypatch.setattr(stage, "build_update", build)
    engine = SimpleNamespace(model=None, mesh=None)
    run = SimpleNamespace(programs={}, config=Config())

    def update_of(num_shapes: int, part: str = "") -> int:
        this = SimpleNamespace(run=run, part=part)
        return stage._compiled_update(this, None, plan(num_shapes), engine, None).number

    assert [update_of(1), update_of(2), update_of(1), update_of(2), update_of(3)] == [1, 2, 1, 2, 3]
    assert [update_of(1, "generator"), update_of(1, "generator"), update_of(1)] == [4, 4, 1]
    assert built == [1, 2, 3, 1]
