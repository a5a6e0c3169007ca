"""deploy/slurm.sh and deploy/tpu_vm.sh, run with stand-ins for srun, scontrol and gcloud on the path."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from our_commands import parsed
from toys import COMPILED
from xla_flags import QUICKLY

from sso_jax.runtime.signals import EXIT_STATUS

ROOT = Path(__file__).resolve().parents[2]
HEEDING_SIGINT = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
)
"""Runs a command that SIGINT reaches; where tests are a background job of a shell, it would be ignored."""
SCRIPTS = sorted((ROOT / "deploy").glob("*.sh"))
WORDS = ("fox", "fig", "cat", "red", "ten", "oak")

SRUN = """
# Starts two tasks with the variables of a job step. The first time it sends both SIGTERM once responses are sampled.
import glob, os, signal, subprocess, sys, time
place = os.environ["PLACE"]
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
def task(i):
    step = {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i),
            "SLURM_STEP_NUM_NODES": "1"}
    return subprocess.Popen(words, env={**os.environ, **step})
tasks = [task(i) for i in range(2)]
if not os.path.exists(place + "/requeued"):
    while not glob.glob(place + "/run/iteration_1/responses.jsonl") and all(t.poll() is None for t in tasks):
        time.sleep(0.05)
    for t in tasks:
        t.send_signal(signal.SIGTERM)
statuses = [t.wait() for t in tasks]
print("statuses", statuses)
sys.exit(max(statuses))
"""
SCONTROL = """
import os, sys
open(os.environ["PLACE"] + "/requeued", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""
GCLOUD = """
# Keeps the state of one slice in a file, and runs the commands of `ssh` here.
import json, os, subprocess, sys
place, words = os.environ["PLACE"], sys.argv[1:]
open(place + "/calls", "a").write(json.dumps(words) + "\\n")
if words[:2] == ["auth", "configure-docker"]:
    sys.exit(0)
assert words[:3] == ["compute", "tpus", "tpu-vm"], words
verb, state = words[3], place + "/state"
if verb == "describe":
    sys.exit(print(open(state).read()) if os.path.exists(state) else 1)
elif verb == "create":
    open(state, "w").write("READY")
elif verb == "delete":
    os.remove(state)
elif verb == "ssh":
    sys.exit(subprocess.run(["bash", "-c", words[words.index("--command") + 1]]).returncode)
"""
DOCKER = """
# `run` notes its command and ends as the next word of the file `ends` says; `stop` has a run that waits end with 75.
import json, os, sys, time
place, words = os.environ["PLACE"], sys.argv[1:]
if words[0] == "stop":
    open(place + "/stop", "w").close()
if words[0] == "run":
    token = os.environ.get("HF_TOKEN")
    open(place + "/runs", "a").write(json.dumps({"words": words, "token": token}) + "\\n")
    first, *rest = open(place + "/ends").read().split()
    open(place + "/ends", "w").write(" ".join(rest))
    if first == "preempted":
        open(place + "/state", "w").write("PREEMPTED")
        sys.exit(255)
    while first == "wait" and not os.path.exists(place + "/stop"):
        time.sleep(0.05)
    sys.exit(75 if first == "wait" else int(first))
"""
TPU = ["my-tpu", "us-east5-b", "v6e-16", "v2-alpha-tpuv6e"]
ARGUMENTS = ["--config", "configs/tiny.yaml", "--run.directory", "gs://bucket/a run", "--queries.per_iteration", "7"]


@pytest.fixture
def stand_ins(tmp_path):
    """Variables with which programs of a folder go before those of the machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    programs = {"srun": SRUN, "scontrol": SCONTROL, "gcloud": GCLOUD, "docker": DOCKER}
    for name, text in programs.items():
        (commands / name).write_text(f"#!{sys.executable}\n{text}")
    (commands / "sudo").write_text('#!/bin/sh\nexec env "$@"\n')
    for path in commands.iterdir():
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PLACE": str(tmp_path)}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run([shellcheck, str(path)], text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout
    assert os.access(path, os.X_OK)


@pytest.fixture
def small_run(model_folder, tmp_path):
    """Arguments of a run of one round, and its folder."""
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"query": f"Spell {word}."}) + "\n" for word in WORDS))
    fields = {
        "run.directory": tmp_path / "run",
        "run.iterations": 1,
        "run.compilation_cache": COMPILED,
        "model.path": model_folder,
        "queries.path": tmp_path / "queries.jsonl",
        "queries.per_iteration": 6,
        "sampling.batch_size": 8,
        "sampling.max_new_tokens": 8,
        "train.batch_size": 2,
        "objective.base": "dpo",
        "logging.tensorboard": "false",
    }
    return [str(part) for name, value in fields.items() for part in (f"--{name}", value)], tmp_path / "run"


def slurm(arguments: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess:
    """The job script as slurmd starts it: from a copy, which it has of it, in the folder of sbatch."""
    place = Path(variables["PLACE"])
    shutil.copyfile(ROOT / "deploy" / "slurm.sh", place / "slurm_script")
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": sys.executable}
    flags = {"XLA_FLAGS": QUICKLY, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = ["bash", str(place / "slurm_script"), *arguments]
    return subprocess.run(command, cwd=place, env={**variables, **job, **flags}, text=True, capture_output=True)


def test_a_stopped_job_of_slurm_is_queued_again_and_goes_on(stand_ins, small_run):
    """Two processes of train.py, joined as jax joins them under SLURM, stopped by SIGTERM and run again."""
    arguments, run = small_run
    first = slurm(arguments, stand_ins)
    assert first.returncode == EXIT_STATUS, first.stderr[-3000:]
    assert f"statuses {[EXIT_STATUS] * 2}" in first.stdout and "is queued again" in first.stdout
    assert (Path(stand_ins["PLACE"]) / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert not (run / "iteration_1" / "done" / "round.json").exists()
    second = slurm(arguments, stand_ins)
    assert second.returncode == 0, second.stderr[-3000:]
    assert (Path(stand_ins["PLACE"]) / "requeued").read_text().count("\n") == 1
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert len(sessions) == 2 and all(session["devices"]["processes"] == 2 for session in sessions)
    assert (run / "iteration_1" / "policy" / "model.safetensors").is_file()


def test_a_job_of_slurm_that_fails_is_not_queued_again(stand_ins):
    failed = slurm(["--run.directory", "none", "--model.pth", "x"], {**stand_ins, "PLACE": stand_ins["PLACE"]})
    assert failed.returncode == 2 and "model.pth: no such field" in failed.stderr
    assert not (Path(stand_ins["PLACE"]) / "requeued").exists()


def tpu_vm(variables: dict[str, str], ends: str, **more: str) -> subprocess.Popen:
    (Path(variables["PLACE"]) / "ends").write_text(ends)
    image = {"IMAGE": "region-docker.pkg.dev/p/r/sso_jax:tpu", "RETRY_SECONDS": "0"}
    command = [str(ROOT / "deploy" / "tpu_vm.sh"), *TPU, *ARGUMENTS]
    command = [sys.executable, "-c", HEEDING_SIGINT, *command]
    return subprocess.Popen(command, env={**variables, **image, **more}, text=True, stderr=subprocess.PIPE)


def lines_of(place: str, name: str) -> list:
    return [json.loads(line) for line in (Path(place) / name).read_text().splitlines()]


def test_a_slice_is_made_once_and_a_stopped_run_goes_on(stand_ins, monkeypatch):
    ended = tpu_vm(stand_ins, "75 75 0", SPOT="1", HF_TOKEN="hf_$x")
    assert ended.wait(60) == 0, ended.stderr.read()
    calls, runs = (lines_of(stand_ins["PLACE"], name) for name in ("calls", "runs"))
    (made,) = [call for call in calls if "create" in call]
    assert made[4] == "my-tpu" and {"--spot", "v6e-16", "v2-alpha-tpuv6e", "us-east5-b"} <= set(made)
    assert all("--worker=all" in call for call in calls if "ssh" in call) and len(runs) == 3
    words = runs[0]["words"]
    command = words[words.index("python") :]
    assert runs[0]["token"] == "hf_$x" and "hf_$x" not in words
    monkeypatch.chdir(ROOT)
    config = parsed(command)
    assert config.run.directory == "gs://bucket/a run" and config.hosts.initialize
    assert words[words.index("python") - 1] == "region-docker.pkg.dev/p/r/sso_jax:tpu"


def test_a_slice_that_was_taken_away_is_replaced(stand_ins):
    ended = tpu_vm(stand_ins, "preempted 0")
    assert ended.wait(60) == 0, ended.stderr.read()
    calls = lines_of(stand_ins["PLACE"], "calls")
    assert [call[3] for call in calls if call[3] in ("create", "delete", "ssh")] == [
        "create",
        "ssh",
        "delete",
        "create",
        "ssh",
    ]
    assert not any("--spot" in call for call in calls)


def test_a_run_that_fails_on_a_slice_ends_with_its_status(stand_ins):
    assert tpu_vm(stand_ins, "2 0").wait(60) == 2
    assert len(lines_of(stand_ins["PLACE"], "runs")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_on_the_slice_and_does_not_start_it_again(number, stand_ins):
    process, runs = tpu_vm(stand_ins, "wait 0"), Path(stand_ins["PLACE"]) / "runs"
    while not runs.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == EXIT_STATUS
    assert "stopping on all hosts" in process.stderr.read() and len(lines_of(stand_ins["PLACE"], "runs")) == 1


def test_tpu_vm_says_how_it_is_used():
    said = subprocess.run([str(ROOT / "deploy" / "tpu_vm.sh")], text=True, capture_output=True)
    assert said.returncode == 2 and said.stderr.startswith("usage: IMAGE=")
