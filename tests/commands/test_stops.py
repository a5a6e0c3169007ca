"""Ctrl-C and SIGTERM in the commands themselves: a line at once, seconds to the exit, nothing half written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from flax import linen as nn
from toys import toy_model

from sso_jax.models.export import export_reward_model
from sso_jax.models.reward_head import reward_model
from sso_jax.models.transformer import init_params
from sso_jax.runtime.signals import ASKED, GRACE_SECONDS
from sso_jax.toy.pretraining import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = GRACE_SECONDS + 4
"""To the exit, on a machine that does other work too."""
NOTHING = "nothing was written; run the same command again"
SAVED = "all progress is saved, run the same command again"


@pytest.fixture(scope="module")
def sampling(model_folder, tmp_path_factory):
    """Arguments of sample.py for work of minutes."""
    path = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    path.write_text("".join(json.dumps({"id": f"{i}", "query": f"Spell fox {i}."}) + "\n" for i in range(2000)))
    return ["--model.path", model_folder, "--queries.path", path, "--sampling.max_new_tokens", "256"]


@pytest.fixture(scope="module")
def rating(tmp_path_factory):
    """Arguments of evaluate.py for work of minutes."""
    folder, tokenizer = tmp_path_factory.mktemp("rating"), train_tokenizer()
    model = reward_model(toy_model(vocab_size=1024, max_positions=512).architecture)
    params = nn.unbox(init_params(model, jax.random.key(0)))
    export_reward_model(params, model.architecture, tokenizer, folder / "model", "float32")
    rows = [{"id": i, "prompt": f"Spell {i}.", "chosen": "f o x " * 40, "rejected": f"{i}"} for i in range(10000)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model.path", folder / "model", "--pairs.path", folder / "pairs.jsonl"]


def started(program: str, arguments: list, out: Path) -> subprocess.Popen:
    """The command, with its programs compiled into `out/xla` and its results in `out/result`.

    They are compiled as a user's are: with the flags of the tests some take less time than the cache keeps.
    """
    into = "--run.directory" if program == "train.py" else "--out"
    more = [into, out / "result", "--run.compilation_cache", out / "xla"]
    command = [sys.executable, program, *map(str, [*arguments, *more])]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(reached, process: subprocess.Popen) -> None:
    while not reached():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def imports_jax(process: subprocess.Popen):
    """Whether the process has loaded a part of JAX, with much left to import."""
    return lambda: "jaxlib" in Path(f"/proc/{process.pid}/maps").read_text()


def has_compiled(out: Path, name: str):
    return lambda: any((out / "xla").glob(f"jit_{name}*"))


def stopped(process: subprocess.Popen, *numbers: signal.Signals) -> tuple[int, list[str]]:
    """Sends the signals, each once the one before it is answered; returns the exit status and the lines said."""
    start, said = time.monotonic(), []
    for number in numbers:
        process.send_signal(number)
        while ASKED not in said:
            said.append(process.stderr.readline().rstrip("\n"))
            assert said[-1] or process.poll() is None, said
        assert number == numbers[-1] or time.monotonic() - start < 2
    rest = process.communicate(timeout=60)[1].splitlines()
    assert time.monotonic() - start < MOST_SECONDS
    assert "Traceback" not in "".join([*said, *rest])
    return process.returncode, rest


@pytest.mark.parametrize(
    ("program", "farewell"), [("train.py", SAVED), ("sample.py", NOTHING), ("evaluate.py", NOTHING)]
)
def test_a_stop_during_the_imports(sampling, rating, tmp_path, program, farewell):
    arguments = {"train.py": sampling, "sample.py": sampling, "evaluate.py": rating}[program]
    process = started(program, arguments, tmp_path)
    wait_for(imports_jax(process), process)
    assert stopped(process, signal.SIGINT) == (75, [f"{program}: stopped by SIGINT; {farewell}"])
    assert not list(tmp_path.iterdir())


def check_stopped_within(process, number, program, stage, total, folder):
    """A stop at a safe point of the stage: the line says how far it came, and nothing is written."""
    status, (*progress, line) = stopped(process, number)
    assert status == 75 and all(told.startswith(f"{stage}: ") for told in progress)
    assert line.startswith(f"{program}: stopped by a signal in {stage}, after ")
    assert line.endswith(f" of {total} responses; {NOTHING}") and not (folder / "result").exists()


def test_a_stop_between_two_windows_of_sample(sampling, tmp_path):
    process = started("sample.py", sampling, tmp_path)
    wait_for(has_compiled(tmp_path, "decode"), process)
    check_stopped_within(process, signal.SIGINT, "sample.py", "answers", 2000, tmp_path)


def test_a_stop_between_two_batches_of_evaluate(rating, tmp_path):
    process = started("evaluate.py", rating, tmp_path)
    wait_for(has_compiled(tmp_path, "rate_batch"), process)
    check_stopped_within(process, signal.SIGTERM, "evaluate.py", "rewards", 20000, tmp_path)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("reached", ["imports", "compilation"])
def test_a_second_signal_ends_the_command_at_once(sampling, tmp_path, number, status, reached):
    process = started("sample.py", sampling, tmp_path)
    wait_for(imports_jax(process) if reached == "imports" else has_compiled(tmp_path, "admit_prompts"), process)
    ended = stopped(process, number, number)
    assert ended == (status, [f"sample.py: stopped at once by {number.name}; {NOTHING}"])
    assert not (tmp_path / "result").exists()
