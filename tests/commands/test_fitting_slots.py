"""The number of slots that fits: the largest for sizes of a known form, few compilations, and what is said of it."""

import dataclasses
import json

import jax
import pytest
from toys import ARCHITECTURE

from sso_jax.commands import dry_run, programs
from sso_jax.commands.fitting_slots import PROGRAMS, USED_SHARE, describe, find_slots, with_slots
from sso_jax.config import Config, MeshConfig, ModelConfig, QueriesConfig, SamplingConfig, TrainConfig
from sso_jax.models.hf_config import to_hf_config

SHARDS, PARAMS, MIB = 4, 3 * 2**20, 2**20
TRACES = (programs.trace_prefill, programs.trace_decode)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A plan of 8 slots on 4 batch shards, with as many queries as 600 responses need."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(to_hf_config(ARCHITECTURE, "float32", 1, 2)))
    config = Config(
        model=ModelConfig(path=str(folder)),
        dry_run="v5e:2x4",
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        queries=QueriesConfig(path="x", per_iteration=200),
        sampling=SamplingConfig(batch_size=8, max_new_tokens=8),
        train=TrainConfig(batch_size=8, tokens_per_step=1408, max_tokens=64, log_original=False),
    )
    return programs.make_plan(config, jax.devices(), 16 * programs.GIB)


def made_up(plan, num_slots, page_bytes=(9000, 14000), slot_bytes=0, told=1.0):
    """Programs of parameters, pages and slots. Of one that does not fit, `told` times the bytes are told."""
    pages = programs.sampling_shape(with_slots(plan, num_slots)).num_pages
    totals = [PARAMS + each * pages + slot_bytes * num_slots for each in page_bytes]
    return [
        programs.Program(name, PARAMS, 0, 8000 * pages, int(total * (1.0 if fits else told)), fits, 0, 0.0)
        for name, total in zip(PROGRAMS, totals, strict=True)
        for fits in [total <= plan.device_bytes]
    ]


def largest(plan, **sizes):
    """The largest number of slots that fits, by trying all of them."""

    def fits(num_slots):
        return all(p.total_bytes <= USED_SHARE * plan.device_bytes for p in made_up(plan, num_slots, **sizes))

    return max((n for n in range(SHARDS, 601, SHARDS) if fits(n)), default=0)


@pytest.mark.parametrize("now", [4, 8, 100, 600])
@pytest.mark.parametrize("device", [4 * MIB, 5 * MIB, 9 * MIB])
@pytest.mark.parametrize("sizes", [{}, {"page_bytes": (20000, 100)}, {"told": 1.6}])
def test_the_largest_number_is_found_with_few_compilations_where_bytes_are_linear_in_pages(plan, now, device, sizes):
    plan = dataclasses.replace(with_slots(plan, now), device_bytes=device)
    compiled = []

    def compile_at(num_slots):
        compiled.append(num_slots)
        return made_up(plan, num_slots, **sizes)

    found = find_slots(plan, made_up(plan, now, **sizes), compile_at)
    assert found.best.num_slots == largest(plan, **sizes) and found.num_responses == 600
    assert len(compiled) <= 5 and now not in compiled


@pytest.mark.parametrize("now", [8, 600])
def test_a_number_that_does_not_fit_when_compiled_is_corrected(plan, now):
    """Bytes of slots, which the line in pages does not know."""
    plan = dataclasses.replace(with_slots(plan, now), device_bytes=7 * MIB)
    compiled = []

    def compile_at(num_slots):
        compiled.append(made_up(plan, num_slots, slot_bytes=9000))
        return compiled[-1]

    found = find_slots(plan, made_up(plan, now, slot_bytes=9000), compile_at)
    best = largest(plan, slot_bytes=9000)
    assert 0.6 * best <= found.best.num_slots <= best and len(compiled) <= 5
    assert found.best.fits(plan.device_bytes)


def test_slots_of_a_round_are_enough(plan):
    found = find_slots(plan, made_up(plan, 8), lambda num_slots: made_up(plan, num_slots))
    assert found.best.num_slots == found.num_responses == 600
    assert "sampling.batch_size: at most 600 slots fit 95% of a chip (prefill 0.01, decode" in (
        text := describe(found, plan)
    )
    assert "; now 8; a round has no more than 600 responses, raise it to sample more" in text


def test_no_more_slots_are_proposed_than_a_round_has_responses(plan):
    """200 queries have 600: y+, y- and y_o of each. There is memory for 800 slots."""
    many = with_slots(plan, 700)
    found = find_slots(many, made_up(many, 700), lambda num_slots: pytest.fail(f"compiled {num_slots}"))
    assert describe(found, many).endswith("; now 700; a round has no more than 600 responses")
    memory = int(made_up(plan, 800)[1].total_bytes / USED_SHARE) + 1
    too_many = dataclasses.replace(with_slots(plan, 1500), device_bytes=memory)
    found = find_slots(too_many, made_up(too_many, 1500), lambda num_slots: made_up(too_many, num_slots))
    assert found.best.num_slots == 600 and describe(found, too_many).endswith("600 responses, lower it")


def test_too_many_slots_are_lowered_and_no_slots_are_said(plan):
    tight = dataclasses.replace(with_slots(plan, 400), device_bytes=5 * MIB)
    found = find_slots(tight, made_up(tight, 400), lambda num_slots: made_up(tight, num_slots))
    assert 8 < found.best.num_slots < 400
    assert describe(found, tight).endswith("; now 400, lower it")
    none = dataclasses.replace(tight, device_bytes=PARAMS)
    nothing = find_slots(none, made_up(none, 400), lambda num_slots: pytest.fail(f"compiled {num_slots}"))
    assert nothing.best is None and "take more chips than 8, or lower sampling.max_new_tokens" in describe(
        nothing, none
    )


def test_a_few_more_slots_are_named_and_not_advised(plan):
    tight = dataclasses.replace(with_slots(plan, 150), device_bytes=6 * MIB)
    found = find_slots(tight, made_up(tight, 150), lambda num_slots: made_up(tight, num_slots))
    assert 150 < found.best.num_slots < 300 and describe(found, tight).endswith("; now 150")


@pytest.fixture
def on_one_device(plan, monkeypatch):
    """The plan's config for the first device that is here, with memory for 64 slots and little more."""
    config = dataclasses.replace(plan.config, mesh=MeshConfig(data=1, fsdp=1, tensor=1))
    own = with_slots(programs.make_plan(config, jax.devices()[:1], 2**40), 64)
    memory = max(programs.compiled(trace(own), "", 2**40).total_bytes for trace in TRACES) / USED_SHARE + 1000
    monkeypatch.setattr(dry_run, "find_devices", lambda *of: jax.devices()[:1])
    monkeypatch.setattr(dry_run, "chip_gib", lambda topology: memory / programs.GIB)
    return with_slots(own, 48).config


def test_the_dry_run_compiles_what_it_proposes(on_one_device, capsys, caplog):
    """64 slots have 64 pages, the next number has 96."""
    caplog.set_level("INFO")
    dry_run.run(on_one_device, PROGRAMS)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("sampling.batch_size: at most 64 slots fit 95% of a chip (prefill")
    assert last.endswith("; now 48")
    assert "compiling prefill for 64 slots" in caplog.text and "compiling decode for 64 slots" in caplog.text


def test_without_both_programs_of_sampling_nothing_is_said_of_slots(on_one_device, capsys):
    dry_run.run(on_one_device, ["prefill"])
    assert "sampling.batch_size" not in capsys.readouterr().out
