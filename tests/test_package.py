"""Wheel and sdist: built from a tagged copy, installed in fresh environments, and run from elsewhere."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from our_commands import SHORT_TOY

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("build", "setuptools", "setuptools_scm")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed, which building needs"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout"),
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
]


def run(*argv, cwd, **environment) -> str:
    """Standard output of a command, which must succeed."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, argv)), cwd=cwd, env={**own, **environment}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and an sdist, built without network from a copy of the files with a tag of its own."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in listed:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "-A"), (*who, "commit", "-qm", "copy"), ("tag", "v7.8.9")):
        run("git", *command, cwd=copy)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy, cwd=out)
    return out


def installed(package: Path, folder: Path) -> Path:
    """A fresh environment with the package; its requirements are those of this environment."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q"]
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", package, cwd=folder.parent)
    return folder / "bin"


def test_both_have_the_version_of_the_tag_and_all_configs(built):
    assert sorted(path.name for path in built.iterdir()) == ["sso_jax-7.8.9-py3-none-any.whl", "sso_jax-7.8.9.tar.gz"]
    configs = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    wheel = zipfile.ZipFile(built / "sso_jax-7.8.9-py3-none-any.whl").namelist()
    with tarfile.open(built / "sso_jax-7.8.9.tar.gz") as archive:
        sdist = archive.getnames()
    assert {name.split("/")[-1] for name in wheel if name.startswith("sso_jax/configs/")} == configs
    assert {name.split("/")[-1] for name in sdist if name.startswith("sso_jax-7.8.9/configs/")} - {"configs"} == configs
    data = [path for path in (ROOT / "sso_jax").rglob("*") if path.suffix in (".txt", ".jinja", ".js", ".py")]
    assert {str(path.relative_to(ROOT)) for path in data} <= set(wheel)
    assert not any(name.startswith(("tests/", "configs/")) for name in wheel)


def test_the_wheel_runs_the_toy_by_its_configs_name_from_anywhere(built, tmp_path):
    commands = installed(built / "sso_jax-7.8.9-py3-none-any.whl", tmp_path / "environment")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(commands / "python", "-c", "import sso_jax; print(sso_jax.__file__)", cwd=elsewhere)
    assert where.startswith(str(tmp_path / "environment"))
    fields = [part for name, value in SHORT_TOY.items() for part in (f"--{name}", value)]
    run(commands / "sso-train", "--config", "tiny", *fields, cwd=elsewhere, JAX_PLATFORMS="cpu")
    left = elsewhere / "runs" / "tiny"  # run.directory of configs/tiny.yaml
    assert (left / "summary.json").is_file() and (left / "iteration_1" / "policy" / "config.json").is_file()
    assert "--prompts" in run(commands / "sso-check", "--help", cwd=elsewhere, JAX_PLATFORMS="cpu")


def test_the_wheel_names_its_requirements_and_extras(built):
    with zipfile.ZipFile(built / "sso_jax-7.8.9-py3-none-any.whl") as wheel:
        metadata = wheel.read("sso_jax-7.8.9.dist-info/METADATA").decode()
    needed = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-D")]
    assert any(line.startswith("jax<") and "extra" not in line for line in needed)
    for extra, name in (
        ("cuda", "jax[cuda13]"),
        ("tpu", "jax[tpu]"),
        ("dev", "pytest"),
        ("docs", "mkdocs"),
        ("relevance", "sentence-tr"),
    ):
        assert any(line.startswith(name) and f'extra == "{extra}"' in line for line in needed), extra


def test_the_sdist_installs_with_the_same_version_and_configs(built, tmp_path):
    commands = installed(built / "sso_jax-7.8.9.tar.gz", tmp_path / "environment")
    code = (
        "from importlib.metadata import version; from sso_jax.config.shipped import shipped_configs, find_config;"
        "print(version('sso_jax'), len(shipped_configs()), find_config('tiny'))"
    )
    version, number, found = run(commands / "python", "-c", code, cwd=tmp_path).split()
    assert version == "7.8.9" and int(number) == len(list((ROOT / "configs").glob("*.yaml")))
    assert Path(found).read_text() == (ROOT / "configs" / "tiny.yaml").read_text()
    assert found.startswith(str(tmp_path / "environment"))
