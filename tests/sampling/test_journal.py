"""Responses kept while a stage is under way: what was written whole is read again, nothing of another list is."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy_model, toy_params

from sso_jax.models.fingerprint import fingerprint
from sso_jax.models.transformer import abstract_params
from sso_jax.runtime.mesh import param_shardings
from sso_jax.sampling.decode import build_generate
from sso_jax.sampling.journal import Journal
from sso_jax.sampling.sampler import Request, Sampler, row_key
from sso_jax.sampling.sampling_params import make_sampling_params

BATCHES = [{0: [5, 6], 3: [7]}, {1: []}, {2: [8, 9, 10]}]


def test_what_is_added_is_read_by_position(tmp_path):
    journal = Journal(tmp_path / "j", "list")
    assert journal.read() == {}
    for batch in BATCHES:
        journal.add(batch)
    assert journal.read() == {0: [5, 6], 3: [7], 1: [], 2: [8, 9, 10]}


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 200))
def test_a_file_cut_anywhere_gives_whole_batches_only_and_goes_on(tmp_path_factory, cut):
    journal = Journal(tmp_path_factory.mktemp("cut") / "j", "list")
    for batch in BATCHES[:2]:
        journal.add(batch)
    part = journal.folder / "part_0.jsonl"
    part.write_bytes(part.read_bytes()[:cut])
    found = journal.read()
    assert found in ({}, BATCHES[0], {**BATCHES[0], **BATCHES[1]})
    journal.add(BATCHES[2])
    assert journal.read() == {**found, **BATCHES[2]}


def test_every_process_reads_the_parts_of_all_and_another_list_is_not_read(tmp_path):
    first, second = (Journal(tmp_path / "j", "list", process) for process in range(2))
    first.add(BATCHES[0])
    second.add(BATCHES[1])
    assert first.read() == second.read() == {**BATCHES[0], **BATCHES[1]}
    other = Journal(tmp_path / "j", "another")
    assert other.read() == {}
    other.add(BATCHES[2])
    assert other.read() == BATCHES[2]


def test_an_interrupted_stage_samples_only_what_is_missing(tmp_path, one_device):
    model = toy_model(num_layers=1)
    params = toy_params(model, one_device)
    calls = []
    generate = build_generate(model, one_device, param_shardings(abstract_params(model), one_device))

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments)

    asked = [Request([5 + i, 6, 7], row_key(0, 1, str(i), "chosen")) for i in range(10)]
    settings = (one_device, make_sampling_params(0.9, 0.95), (), 6, 64, 4)
    expected = Sampler(generate, *settings).sample(params, asked, "whole")
    sampler = Sampler(counted, *settings, journals=tmp_path / "journals")
    try:
        sampler.sample(params, asked, "interrupted")
        raise AssertionError("was not interrupted")
    except KeyboardInterrupt:
        pass
    assert sampler.sample(params, asked, "continued") == expected
    assert len(calls) == 3 + 1  # two batches of four were on disk, the third was lost and is repeated
    changed = jax.tree.map(lambda leaf: leaf * 1.5, params)
    assert sampler.sample(changed, asked, "another policy") != expected and len(calls) == 4 + 3


def test_a_fingerprint_tells_parameters_apart_and_meshes_not(one_device, eight_devices):
    model = toy_model()
    one, eight = toy_params(model, one_device), toy_params(model, eight_devices)
    assert fingerprint(one) == fingerprint(eight)
    embedding = one["embedding"].at[3, 4].add(1e-7)
    assert fingerprint({**one, "embedding": embedding}) != fingerprint(one)
    swapped = {"a": jnp.asarray(np.arange(4.0)), "b": jnp.ones(4)}
    assert fingerprint(swapped) != fingerprint({"a": swapped["b"], "b": swapped["a"]})
