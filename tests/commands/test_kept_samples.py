"""A run that is killed before a round's marker, or behind it, has the samples of that round in TensorBoard."""

import json

import pytest
from test_logged_samples import texts

import train
from sso_jax.commands import train as train_command
from sso_jax.training.metrics import MetricsLog

PAIRS = [{"id": w, "prompt": f"Spell {w}.", "chosen": " ".join(w), "rejected": "No."} for w in ("fox", "fig", "cat")]


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("step, times", [("finish", 2), ("_tell", 1)])
def test_a_kill_around_the_marker_loses_no_samples(step, times, model_folder, tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    fields = {"recipe": "offline", "model.path": model_folder, "pairs.path": tmp_path / "pairs.jsonl"}
    fields |= {"run.directory": tmp_path / "run", "run.iterations": 1, "objective.form": "pairwise"}
    fields |= {"objective.base": "dpo", "model.remat": "false"}
    command = [str(part) for name, value in fields.items() for part in (f"--{name}", value)]
    taken = getattr(train_command, step)

    def kill(*given):
        if (tmp_path / "run" / "iteration_1").exists():
            raise Killed
        return taken(*given)

    monkeypatch.setattr(train_command, "write_report", lambda directory: None)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_command, step, kill)
        patch.setattr(MetricsLog, "close", lambda metrics: None)  # nothing is flushed at a kill
        train.main(command)
    assert [at for at, _ in texts(tmp_path / "run" / "tensorboard")] == [1]
    assert train.main(command) == 0
    found = texts(tmp_path / "run" / "tensorboard")
    assert [at for at, _ in found] == [1] * times and len(set(found)) == 1 and "Spell fig." in found[0][1]
