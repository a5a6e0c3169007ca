"""--help names every field and explains each, and null can be written as people write it."""

import dataclasses
import json
import re
from typing import get_args

import pytest

import evaluate
import sample
import train
from sso_jax.config import Config, EvaluateConfig, SampleConfig, parse, to_dict

NULLS = ("none", "None", "NONE", "null", "Null")


def declared(config_class: type, prefix: str = "") -> dict[str, object]:
    """The type of every field by dotted name, from the dataclasses themselves."""
    found: dict[str, object] = {}
    for each in dataclasses.fields(config_class):
        is_section = not prefix and dataclasses.is_dataclass(each.type)
        found |= declared(each.type, f"{each.name}.") if is_section else {prefix + each.name: each.type}
    return found


def help_of(command, capsys, *topic: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help", *topic])
    assert stopped.value.code == 0
    return capsys.readouterr().out


CLASSES = {"train": (train, Config), "sample": (sample, SampleConfig), "evaluate": (evaluate, EvaluateConfig)}


@pytest.mark.parametrize("name", CLASSES)
def test_help_is_a_page_that_names_every_field_by_section(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "88")
    command, config_class = CLASSES[name]
    page = help_of(command, capsys)
    assert page.startswith(f"usage: {name}.py") and page.count(f"\n  python {name}.py ") == 2
    assert "--help SECTION" in page and "--help all" in page and len(page.splitlines()) < 75
    for field in declared(config_class):
        section, _, own = field.rpartition(".")
        if section:
            after_head = page[page.index(f"\n{section}: ") + 1 :].split("\n", 1)[1]
            assert own in re.split(r"(?m)^\w+: ", after_head)[0].split(), field
        else:
            assert f"--{own}" in page.split(), field


@pytest.mark.parametrize("name", CLASSES)
def test_help_all_has_type_default_and_meaning_of_every_field(capsys, name):
    command, config_class = CLASSES[name]
    text = " ".join(help_of(command, capsys, "all").split()) + " --"
    for field in declared(config_class):
        about = re.search(rf" --{re.escape(field)} (.+?); default: (\S+) (.+?) --", text)
        assert about and re.match("a |one of |true or false", about.group(1)) and len(about.group(3)) > 10, field
    alone = " ".join(help_of(command, capsys, "model").split())
    assert alone in text and "--run.seed" not in alone


def test_help_has_type_default_and_meaning(capsys):
    for topic in ("objective", "objective.weight_alpha", "all"):
        text = " ".join(help_of(train, capsys, topic).split())
        assert "--objective.weight_alpha a number; default: 0.66" in text
        assert "share of the chosen response in W" in text
    assert "--run.seed" not in help_of(train, capsys, "objective")
    assert "a whole number, or null; default: null" in help_of(train, capsys, "sampling.top_k")
    assert "one of cosine, linear, wsd, constant; default: cosine" in help_of(train, capsys, "optimizer.schedule")
    assert "true or false; default: true" in help_of(train, capsys, "logging.tensorboard")


@pytest.mark.parametrize("spelling", NULLS)
@pytest.mark.parametrize("place", ["argument", "argument_with_equals", "file"])
def test_none_and_null_in_any_case_are_null_for_every_field_that_may_be(tmp_path, spelling, place):
    names = sorted(name for name, kind in declared(Config).items() if type(None) in get_args(kind))
    assert len(names) > 30 and {"sampling.top_k", "sampling.mesh", "dry_run", "model.matmul_precision"} <= {*names}
    if place == "file":
        rows: dict = {"sampling": {"top_k": 5}}
        for name in names:
            section, _, field = name.rpartition(".")
            (rows.setdefault(section, {}) if section else rows)[field] = spelling
        (tmp_path / "c.yaml").write_text(json.dumps(rows))
        argv = ["--config", str(tmp_path / "c.yaml")]
    else:
        argv = ["--sampling.top_k", "5"]
        for name in names:
            argv += [f"--{name}={spelling}"] if place == "argument_with_equals" else [f"--{name}", spelling]
    fields = to_dict(parse(Config, argv, "train.py", ""))
    for name in names:
        section, _, field = name.rpartition(".")
        assert (fields[section] if section else fields)[field] is None, name


def test_none_stays_a_text_where_null_is_no_value():
    argv = ["--pairs.control", "none", "--run.directory", "None"]
    parsed = parse(Config, argv, "train.py", "")
    assert (parsed.pairs.control, parsed.run.directory) == ("none", "None")
