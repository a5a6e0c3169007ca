"""Results kept while a stage runs: what was written whole is read again, nothing of another list is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy_model, toy_params

from sso_jax.data.records import Cell
from sso_jax.models.fingerprint import fingerprint
from sso_jax.models.transformer import abstract_params
from sso_jax.runtime.journal import Journal
from sso_jax.runtime.mesh import param_shardings
from sso_jax.runtime.signals import Stopped
from sso_jax.sampling.decode import build_programs
from sso_jax.sampling.sampler import Request, Sampler, row_key
from sso_jax.sampling.sampling_params import make_sampling_params
from sso_jax.training import scoring
from sso_jax.training.device_steps import StepLimits
from sso_jax.training.log_probs import build_score
from sso_jax.training.scoring import Scorable, plan_scoring, score_examples

BATCHES = [{0: [5, 6], 3: [7]}, {1: []}, {2: [8, 9, 10]}]


def test_what_is_added_is_read_by_position(tmp_path):
    journal = Journal(tmp_path / "j", "list")
    assert dict(journal.read()) == {}
    for batch in BATCHES:
        journal.add(batch)
    assert dict(journal.read()) == {0: [5, 6], 3: [7], 1: [], 2: [8, 9, 10]}


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 200))
def test_a_file_cut_anywhere_gives_whole_batches_only_and_goes_on(tmp_path_factory, cut):
    journal = Journal(tmp_path_factory.mktemp("cut") / "j", "list")
    for batch in BATCHES[:2]:
        journal.add(batch)
    part = journal.folder / "part_0.jsonl"
    part.write_bytes(part.read_bytes()[:cut])
    found = dict(journal.read())
    assert found in ({}, BATCHES[0], {**BATCHES[0], **BATCHES[1]})
    journal.add(BATCHES[2])
    assert dict(journal.read()) == {**found, **BATCHES[2]}


def test_every_process_reads_the_parts_of_all_and_another_list_is_not_read(tmp_path):
    first, second = (Journal(tmp_path / "j", "list", process) for process in range(2))
    first.add(BATCHES[0])
    second.add(BATCHES[1])
    assert dict(first.read()) == dict(second.read()) == {**BATCHES[0], **BATCHES[1]}
    other = Journal(tmp_path / "j", "another")
    assert dict(other.read()) == {}
    other.add(BATCHES[2])
    assert dict(other.read()) == BATCHES[2]


def test_an_interrupted_stage_samples_only_what_is_missing(tmp_path, one_device):
    model = toy_model(num_layers=1)
    params, programs = toy_params(model, one_device), build_programs(model, one_device)
    windows, admitted = [], []

    def window(*arguments):
        windows.append(1)
        if len(windows) == 3:
            raise KeyboardInterrupt
        return programs.window(*arguments)

    def admit(weights, state, prompts, *rest):
        admitted.extend(np.flatnonzero(prompts.slots < 4).tolist())
        return programs.admit(weights, state, prompts, *rest)

    asked = [Request([5 + i, 6, 7], row_key(0, 1, str(i), "chosen")) for i in range(10)]
    settings = (one_device, make_sampling_params(0.9, 0.95), (), 6, 64, 4)
    expected = Sampler(programs, *settings).sample(params, asked, "whole").responses
    sampler = Sampler(programs._replace(window=window, admit=admit), *settings, journals=tmp_path / "journals")
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(params, asked, "interrupted")
    assert len(admitted) == 10  # four in each of two windows, which ended, and two in the third
    assert sampler.sample(params, asked, "continued").responses == expected
    assert len(admitted) == 10 + 2
    assert sampler.sample(params, asked, "a third time").responses == expected and len(admitted) == 12
    changed = jax.tree.map(lambda leaf: leaf * 1.5, params)
    assert sampler.sample(changed, asked, "another policy").responses != expected and len(admitted) == 22


def test_responses_are_on_disk_as_they_end(tmp_path, one_device):
    """Not when the last one of those sampled together has ended."""
    model = toy_model(num_layers=1)
    programs, kept = build_programs(model, one_device), []

    def window(*arguments):
        rows = [json.loads(line) for path in tmp_path.glob("*/part_0.jsonl") for line in path.open().readlines()[1:]]
        kept.append(sum(len(row["at"]) for row in rows))
        return programs.window(*arguments)

    sampler = Sampler(
        programs._replace(window=window),
        one_device,
        make_sampling_params(0.9, 0.95),
        (),
        200,
        64,
        2,
        journals=tmp_path,
    )
    lengths = [1, 50, 40, 30]  # responses of 63, 14, 24 and 34 tokens
    sampler.sample(toy_params(model, one_device), [Request([5] * n, (0, n)) for n in lengths], "test")
    # Longest prompts first: 14 and 24 tokens take one and two windows, then 34 takes three and 63 takes four.
    assert kept == [0, 1, 2, 2, 3, 3]


def test_a_fingerprint_tells_parameters_apart_and_meshes_not(one_device, eight_devices):
    model = toy_model()
    one, eight = toy_params(model, one_device), toy_params(model, eight_devices)
    assert fingerprint(one) == fingerprint(eight)
    embedding = one["embedding"].at[3, 4].add(1e-7)
    assert fingerprint({**one, "embedding": embedding}) != fingerprint(one)
    swapped = {"a": jnp.asarray(np.arange(4.0)), "b": jnp.ones(4)}
    assert fingerprint(swapped) != fingerprint({"a": swapped["b"], "b": swapped["a"]})


def test_scoring_stops_after_a_step_and_goes_on_with_the_next(tmp_path, one_device, monkeypatch):
    """Stopped while the second step is computed: both are kept, and the others are left."""
    model = toy_model(num_layers=1)
    params, shardings = toy_params(model, one_device), param_shardings(abstract_params(model), one_device)
    score, cells = build_score(model, one_device, shardings), [Cell("plain", "chosen"), Cell("plain", "rejected")]
    draw = np.random.default_rng(0)
    items = [
        Scorable({"plain": draw.integers(3, 96, 4 + i).tolist()}, {"chosen": [5, 6 + i], "rejected": [7, 8, 9]})
        for i in range(9)
    ]
    plan, calls = plan_scoring(items, cells, StepLimits(32)), []
    sizes = [len(step.examples) for group in plan.updates for step in group]
    assert len(sizes) > 3 and sum(sizes) == 9

    def counted(*arguments):
        calls.append(1)
        return score.log_probs(*arguments)

    def run(journal):
        own = score._replace(log_probs=counted)
        return score_examples(own, params, items, cells, plan, "test", journal)

    expected = run(None)
    assert len(calls) == len(sizes) and len(expected) == 9
    monkeypatch.setattr(scoring, "stop_now", lambda: len(calls) == len(sizes) + 2)
    with pytest.raises(Stopped, match=f"after {sum(sizes[:2])} of 9 examples"):
        run(Journal(tmp_path / "j", "list"))
    assert run(Journal(tmp_path / "j", "list")) == expected and len(calls) == 2 * len(sizes)
    assert run(Journal(tmp_path / "j", "list")) == expected and len(calls) == 2 * len(sizes)
