"""Dockerfile and .dockerignore: linted, and their steps replayed without Docker."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from our_commands import SHORT_TOY, parsed
from xla_flags import QUICKLY

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Name and rest of each instruction, with its lines joined."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines()]


def sent(name: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that fits it or a folder above it decides."""
    parts, kept = name.split("/"), True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if not pattern or pattern.startswith("#"):
            continue
        wanted, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        above = ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]
        anywhere = pattern.removeprefix("**/")
        names = parts if anywhere != pattern else above if "/" in pattern else parts[:1]
        if any(fnmatchcase(each, anywhere) for each in names):
            kept = wanted
    return kept


def context() -> list[str]:
    """Paths of the checkout that are sent to Docker."""
    names = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in (".git", ".venv", "runs", "build", "site")]
        names += [str((Path(folder) / name).relative_to(ROOT)) for name in files]
    return [name for name in names if sent(name)]


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    checked = subprocess.run([hadolint, str(ROOT / "Dockerfile")], text=True, capture_output=True)
    assert checked.returncode == 0 and not checked.stdout, checked.stdout


def test_what_is_copied_is_there_and_is_sent():
    names = context()
    copied = [shlex.split(rest) for name, rest in instructions() if name == "COPY"]
    assert copied[-1] == [".", "."]
    assert all((ROOT / source).exists() and source in names for source in copied[0][:-1])
    assert {"train.py", "configs/tiny.yaml", "examples/questions.jsonl", "sso_jax/commands/cli.py"} <= set(names)
    assert not any(name.startswith(("tests/", "docs/", "runs/", ".git")) or "__pycache__" in name for name in names)


def test_the_requirements_come_before_the_code_and_root_does_not_run_it():
    names = [name for name, _ in instructions()]
    copies = [i for i, name in enumerate(names) if name == "COPY"]
    install = next(i for i, (name, rest) in enumerate(instructions()) if name == "RUN" and "pip install" in rest)
    assert copies[0] < install < copies[1] < names.index("USER") < names.index("CMD")
    user = dict(instructions())["USER"]
    assert user.isdigit() and user != "0" and f"--uid {user}" in TEXT


@pytest.mark.parametrize("device", ["cpu", "cuda", "tpu", "gpu"])
def test_each_device_installs_its_requirements(device, tmp_path):
    step = next(rest for name, rest in instructions() if name == "RUN" and "pip install" in rest)
    (tmp_path / "pip").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "pip").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": device}
    ran = subprocess.run(
        ["sh", "-c", step.partition(" ")[2].strip()], env=variables, cwd=ROOT, text=True, capture_output=True
    )
    if device == "gpu":
        assert ran.returncode == 2 and ran.stderr == "DEVICE is gpu; give cpu, cuda or tpu\n"
        return
    words = ran.stdout.splitlines()
    files = [words[i + 1] for i, word in enumerate(words) if word == "-r"]
    more = [] if device == "cpu" else [f"requirements-{device}.txt"]
    assert ran.returncode == 0 and files == ["requirements.txt", *more]
    assert all((ROOT / file).is_file() for file in files)


def test_the_commands_of_the_file_are_ours(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = json.loads(dict(instructions())["CMD"])
    assert parsed(command).run.directory == "runs/tiny"
    (other,) = re.findall(r"^#.*sso_jax (python train\.py \S+ \S+)", TEXT, re.MULTILINE)
    assert parsed(shlex.split(other)).model.path


def test_what_is_sent_runs_the_toy_and_the_quick_start(tmp_path):
    """The file's command, in a folder with what COPY puts there; the requirements are those of this environment."""
    for name in context():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    _, *command = json.loads(dict(instructions())["CMD"])
    assert (tmp_path / "requirements.txt").is_file() and " ".join(command) in (ROOT / "README.md").read_text()
    fields = [part for name, value in SHORT_TOY.items() for part in (f"--{name}", str(value))]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICKLY}
    ran = subprocess.run(
        [sys.executable, *command, *fields], cwd=tmp_path, env={**own, **flags}, text=True, capture_output=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()
