"""Configs by name: a file goes before a name, and a name that is none is told with those there are."""

from pathlib import Path

import pytest

from sso_jax.config import Config, parse
from sso_jax.config.shipped import find_config, shipped_configs
from sso_jax.runtime.errors import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_every_config_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_configs() == {path.stem: path for path in CONFIGS.glob("*.yaml")}
    for argv in (["--config", "tiny"], ["--config=tiny"], ["--config", "tiny.yaml"]):
        config = parse(Config, argv, "train.py", "")
        assert config.run.directory == "runs/tiny" and config.objective.beta == 0.2


def test_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text("run: {seed: 77}\n")
    assert parse(Config, ["--config", "tiny"], "train.py", "").run.seed == 77


def test_overrides_follow_a_named_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(Config, ["--config", "tiny", "--objective.beta", "0.7"], "train.py", "").objective.beta == 0.7


def test_a_name_that_is_none_is_told_with_those_there_are():
    with pytest.raises(
        InputError, match=r"--config: no file 'tinny', and no config of that name; give .*, tiny, tiny_r"
    ):
        parse(Config, ["--config", "tinny"], "train.py", "")


def test_a_path_is_never_taken_for_a_name():
    assert find_config("somewhere/tiny") == "somewhere/tiny"
    with pytest.raises(InputError):
        parse(Config, ["--config", "somewhere/tiny"], "train.py", "")
