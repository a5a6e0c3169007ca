"""A run directory in an object store, played by fsspec's file system in memory: stages, metrics, the config and an
exported policy.

Orbax reaches gs:// by a driver of its own, which needs the real thing; checkpoints are not tried here.
"""

import json

import fsspec
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from toys import toy_model, toy_params

from sso_jax.commands.train import resumed_config
from sso_jax.config import Config, LoggingConfig, RunConfig, to_json_dict
from sso_jax.data.records import Query
from sso_jax.data.tokenizer import load_tokenizer
from sso_jax.models.export import export_policy, find_policy
from sso_jax.models.hf_folder import fetch
from sso_jax.models.hf_weights import read_params
from sso_jax.runtime import files
from sso_jax.runtime import stage_markers as stages
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import append_lines as put
from sso_jax.runtime.files import is_remote
from sso_jax.runtime.json_lines import read_json_lines
from sso_jax.runtime.run_dir import claim
from sso_jax.toy.pretraining import train_tokenizer
from sso_jax.training import metrics as metrics_log
from sso_jax.training.metrics import open_metrics


class Bucket(MemoryFileSystem):
    """gs:// in memory."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def glob(self, path, **options):
        return [found.lstrip("/") for found in super().glob(path, **options)]


@pytest.fixture
def run(monkeypatch):
    """A run directory in a fresh bucket."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    return epath.Path("gs://bucket/run")


def test_a_path_says_whether_it_is_remote(run):
    assert is_remote(run) and is_remote("gs://a/b") and not is_remote("runs/a") and not is_remote(epath.Path("/runs"))


def test_a_stage_is_done_once_and_read_from_the_bucket_afterwards(run):
    made = []

    def make():
        made.append(1)
        return [Query("1", "wörd")], {"count": 1}

    first, stats = stages.record_stage(run / "iteration_1", "queries", Query, make)
    again, same = stages.record_stage(run / "iteration_1", "queries", Query, make)
    assert first == again == [Query("1", "wörd")] and stats == same and made == [1]
    assert sorted(name.rsplit("run/", 1)[1] for name in Bucket.store) == [
        "iteration_1/done/queries.json",
        "iteration_1/queries.jsonl",
    ]


def test_another_config_is_refused_by_field(run):
    with claim(run, to_json_dict(Config())):
        pass
    with pytest.raises(InputError, match=r"gs://bucket/run was started with other values of run.seed \(0, now 1\)"):
        resumed_config(run, Config(run=RunConfig(seed=1)))


def test_metrics_are_appended_and_rewound(run):
    metrics = open_metrics(run, LoggingConfig(tensorboard=False), {}, writes=True)
    for step in range(3):
        metrics.write({"iteration": 1, "step": step, "loss": 0.5}, 0)
    metrics.rewind(1, 2)
    assert steps_in(run) == [0, 1]


def steps_in(run) -> list[int]:
    path = run / "metrics.jsonl"
    return [row["step"] for row in read_json_lines(path)] if path.exists() else []


def write_steps(metrics, *steps) -> None:
    for step in steps:
        metrics.write({"iteration": 1, "step": step, "loss": 0.5}, 0)


@pytest.fixture
def clock(monkeypatch):
    """Seconds, in a list of one, in place of the machine's."""
    now = [1000.0]
    monkeypatch.setattr(metrics_log, "monotonic", lambda: now[0])
    return now


def test_metrics_are_written_once_a_minute_before_a_checkpoint_and_at_the_end(run, clock, monkeypatch):
    puts = []
    monkeypatch.setattr(metrics_log, "append_lines", lambda lines, path: puts.append(len(lines)) or put(lines, path))
    metrics = open_metrics(run, LoggingConfig(tensorboard=False), {}, writes=True)
    write_steps(metrics, 0, 1)
    clock[0] += 59
    write_steps(metrics, 2)
    assert steps_in(run) == [0] and puts == [1]  # the first one does not wait
    clock[0] += 1
    write_steps(metrics, 3, 4)
    assert steps_in(run) == [0, 1, 2, 3] and puts == [1, 3]
    metrics.flush()
    metrics.flush()
    assert steps_in(run) == [0, 1, 2, 3, 4] and puts == [1, 3, 1]
    write_steps(metrics, 5)
    metrics.close()
    assert steps_in(run) == [0, 1, 2, 3, 4, 5] and puts == [1, 3, 1, 1]


def test_what_a_kill_loses_are_lines_of_updates_that_are_done_again(run, clock):
    """Checkpoints after updates 1 and 3 (`flush`), a kill after update 5, and a start from each of the checkpoints."""
    for resumed in (2, 4):
        metrics = open_metrics(run, LoggingConfig(tensorboard=False), {}, writes=True)
        metrics.rewind(1, 0)
        write_steps(metrics, 0, 1)
        metrics.flush()
        write_steps(metrics, 2, 3)
        metrics.flush()
        write_steps(metrics, 4, 5)  # never written
        metrics = open_metrics(run, LoggingConfig(tensorboard=False), {}, writes=True)
        metrics.rewind(1, resumed)
        assert steps_in(run) == list(range(resumed))
        write_steps(metrics, *range(resumed, 7))
        metrics.close()
        assert steps_in(run) == list(range(7))


def test_lines_that_wait_are_rewound_too(run, clock):
    metrics = open_metrics(run, LoggingConfig(tensorboard=False), {}, writes=True)
    write_steps(metrics, 0, 1, 2)
    metrics.rewind(1, 1)
    write_steps(metrics, 1)
    metrics.close()
    assert steps_in(run) == [0, 1]


def test_a_joined_process_writes_no_metrics_and_keeps_none(run, clock, monkeypatch):
    monkeypatch.setattr(files._WRITER, "here", False)
    metrics = open_metrics(run, LoggingConfig(), {}, writes=False)
    write_steps(metrics, 0, 1)
    metrics.flush()
    assert metrics.waiting == [] and Bucket.store == {}


def test_a_local_file_has_each_line_at_once(tmp_path):
    metrics = open_metrics(tmp_path, LoggingConfig(tensorboard=False), {}, writes=True)
    write_steps(metrics, 0)
    assert steps_in(tmp_path) == [0]


def test_a_policy_goes_out_and_comes_back(run, one_device):
    model, tokenizer = toy_model(vocab_size=1024, num_layers=1), train_tokenizer()
    templates = {
        "default": tokenizer.chat_template,
        "tool_use": "{{ messages }}",
    }  # the second one is written to a folder of its own
    tokenizer.chat_template = templates
    params = toy_params(model, one_device)
    folder = run / "iteration_2"

    def export():
        return (
            export_policy(
                params, model.architecture, tokenizer, (tokenizer.eos_token_id,), folder / "policy", "float32"
            )
            or {}
        )

    stages.file_stage(folder, "export", export, "policy")
    marked = json.loads((folder / "done" / "export.json").read_text())["files"]
    assert {
        "policy/config.json",
        "policy/model.safetensors",
        "policy/additional_chat_templates/tool_use.jinja",
    } <= marked.keys()
    assert stages.read_verified(folder, "export") is not None
    found = find_policy("gs://bucket/run")
    assert found == "gs://bucket/run/iteration_2/policy"
    (folder / "policy" / "original").mkdir()
    (folder / "policy" / "original" / "params.json").write_text("{}")
    local = fetch(found)
    assert not (local / "original").exists()  # as of the hub
    assert [path.name for path in fetch(found, files=("config.json",)).iterdir()] == ["config.json"]
    assert json.loads((local / "config.json").read_text())["vocab_size"] == 1024
    again = read_params(local, model, one_device)
    np.testing.assert_array_equal(again["embedding"], params["embedding"])
    assert load_tokenizer(local).chat_template == templates
    (folder / "policy" / "additional_chat_templates" / "tool_use.jinja").write_text("another")
    assert stages.read_verified(folder, "export") is None
    with pytest.raises(InputError, match=r"model\.path: no folder 'gs://bucket/other'"):
        fetch("gs://bucket/other")
    with pytest.raises(InputError, match=r"filter\.reward_path: no folder"):
        fetch("gs://bucket/other", "filter.reward_path")
