"""deploy/skypilot*.yaml: read by SkyPilot where it is installed; their commands by our own parser."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from our_commands import parsed

from sso_jax.runtime.signals import EXIT_STATUS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "deploy").glob("skypilot*.yaml"))
SKYPILOT = os.environ.get("SSO_SKYPILOT")
"""Python of an environment with SkyPilot, which pulls too much for the test requirements."""
READ = """
import sys, sky
for name in sys.argv[1:]:
    task = sky.Task.from_yaml(name)
    for resources in task.resources:
        assert resources.job_recovery["recover_on_exit_codes"] == [75], resources.job_recovery
        print(name, resources)
"""


def commands(script: str, variables: dict[str, str]) -> list[list[str]]:
    """The command lines of a script, without `exec` and with its variables put in."""
    lines = script.replace("\\\n", " ").splitlines()
    for name, value in variables.items():
        lines = [line.replace(f"${name}", value) for line in lines]
    return [shlex.split(line.removeprefix("exec ")) for line in lines if line.strip()]


@pytest.mark.skipif(SKYPILOT is None, reason="SSO_SKYPILOT does not name the Python of an environment with SkyPilot")
def test_skypilot_reads_them(tmp_path):
    read = subprocess.run(
        [SKYPILOT, "-c", READ, *map(str, FILES)],
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert read.returncode == 0, read.stderr[-2000:]
    assert "tpu-v6e-16" in read.stdout and "[Spot]" in read.stdout and "'L4': 1" in read.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_stop_is_recovered_from_and_the_run_is_ours(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    task = yaml.safe_load(path.read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_STATUS]
    (command,) = commands(task["run"], task["envs"])
    config = parsed(command)
    assert config.run.directory == task["envs"]["RUN"]
    spot = bool(task["resources"].get("use_spot"))
    assert config.hosts.initialize == config.run.directory.startswith("gs://") == spot == ("tpu" in path.name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_setup_installs_the_requirements(path):
    task = yaml.safe_load(path.read_text())
    strict, make, install = task["setup"].splitlines()
    assert strict == "set -e" and "uv venv --python 3.12 ~/sso" in make
    words = shlex.split(install)
    assert (ROOT / words[words.index("-r") + 1]).is_file() and "gcsfs" in words
    assert subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True).returncode == 0
