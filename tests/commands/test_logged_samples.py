"""The pairs of a round that TensorBoard and Weights & Biases show."""

import json
import sys
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from sso_jax.commands.logged_samples import MOST_CHARACTERS, samples_of_round
from sso_jax.config import LoggingConfig
from sso_jax.runtime.errors import InputError
from sso_jax.training.metrics import MetricsLog, open_metrics


def pairs(folder, number, **more):
    rows = [{"id": f"{i}", "query": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}", **more} for i in range(number)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_pairs_are_spread_over_the_file_and_fields_without_values_are_left_out(tmp_path):
    pairs(tmp_path, 10, good_system="be good", original=None)
    found = samples_of_round(tmp_path, 4)
    assert [row["query"] for row in found] == ["q0", "q2", "q5", "q7"]
    assert list(found[0]) == ["query", "good_system", "chosen", "rejected"]
    assert len(samples_of_round(tmp_path, 99)) == 10 and samples_of_round(tmp_path, 0) == []


def test_a_long_text_is_shortened_and_a_round_without_pairs_has_none(tmp_path):
    assert samples_of_round(tmp_path, 4) == []
    pairs(tmp_path, 1, original="x" * (MOST_CHARACTERS + 7))
    assert samples_of_round(tmp_path, 4)[0]["original"].endswith("x [7 more characters]")


def texts(folder) -> list[tuple[int, str]]:
    """Steps and texts of files of events: records of a length, 12 bytes of head and 4 of a checksum."""
    found = []
    for content in (path.read_bytes() for path in sorted(folder.glob("events*"))):
        at = 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += 16 + size
            values = (value.tensor.string_val for value in event.summary.value)
            found += [(event.step, value[0].decode()) for value in values if value]
    return found


def test_tensorboard_has_a_text_at_the_step_of_the_round(tmp_path):
    metrics = open_metrics(tmp_path, LoggingConfig(), {}, writes=True)
    metrics.write_samples([{"query": "*why*\nso", "chosen": ""}, {"query": "b", "chosen": "c"}], 2)
    ((step, text),) = texts(tmp_path / "tensorboard")  # on disk, although the run goes on
    metrics.close()
    assert step == 2 and "**query**\n\n    *why*\n    so\n\n**chosen**" in text and text.count("---") == 1


def test_rounds_that_end_in_one_second_keep_their_texts(tmp_path):
    metrics = open_metrics(tmp_path, LoggingConfig(), {}, writes=True)
    for iteration in (1, 2, 3):
        metrics.write_samples([{"query": f"q{iteration}"}], iteration)
    metrics.close()
    assert sorted(step for step, _ in texts(tmp_path / "tensorboard")) == [1, 2, 3]


def test_weights_and_biases_has_a_table_at_the_last_update(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=lambda columns, data: (columns, data)))
    run = SimpleNamespace(log=lambda values, step: logged.append((values, step)))
    metrics = MetricsLog(tmp_path / "metrics.jsonl", None, run)
    metrics.write_samples([{"query": "a", "chosen": "b"}], 1)
    for step in range(3):
        metrics.write({"iteration": 1, "step": step, "loss": 0.5}, 0)
    metrics.write_samples([{"query": "a", "chosen": "b"}], 2)
    metrics.write_samples([], 3)
    assert logged[0] == ({"samples/iteration_1": (["query", "chosen"], [["a", "b"]])}, 0)
    assert logged[-1][1] == 2 and "samples/iteration_2" in logged[-1][0]


def test_a_number_below_zero_is_refused():
    with pytest.raises(InputError, match=r"logging\.samples: -1 is out of range; give 0 or more"):
        LoggingConfig(samples=-1)
