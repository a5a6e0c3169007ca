"""What people get wrong, told in one line on standard error with status 2, before anything is written."""

import json
from pathlib import Path

import pytest
from toys import ARCHITECTURE, toy_model, toy_params

import sample
import train
from sso_jax.assembly import export_policy
from sso_jax.config import Config, ObjectiveConfig, parse
from sso_jax.toy.pretraining import train_tokenizer

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, one_device):
    """A random policy with a real tokenizer and 128 positions."""
    tokenizer = train_tokenizer()
    model = toy_model(vocab_size=1024)
    folder = tmp_path_factory.mktemp("model") / "policy"
    export_policy(toy_params(model, one_device), model.architecture, tokenizer, (tokenizer.eos_token_id,), folder, "float32")
    return folder


@pytest.fixture
def good(model_folder, tmp_path):
    """Arguments of a run that would be accepted, writing under tmp_path/run."""
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query": "Spell fox."}\n{"query": "What is 1 plus 1?"}\n')
    return {
        "--model.path": str(model_folder),
        "--queries.path": str(queries),
        "--run.directory": str(tmp_path / "run"),
        "--run.iterations": "1",
    }


def refusal(main, arguments: dict, capsys) -> str:
    """The one line that a command answers with; fails unless the status is 2."""
    before = capsys.readouterr()
    del before
    status = main([part for pair in arguments.items() for part in pair])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith(("train.py", "sample.py"))]
    assert status == 2 and out == "" and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


BAD_ARGUMENTS = {
    "unknown_field": ({"--run.sead": "1"}, ("run.sead", "run.seed")),
    "unknown_section": ({"--modle.path": "x"}, ("modle.path", "model.path")),
    "wrong_type": ({"--train.batch_size": "many"}, ("train.batch_size", "many")),
    "wrong_choice": ({"--optimizer.schedule": "linear"}, ("optimizer.schedule", "linear", "cosine")),
    "unknown_recipe": ({"--recipe": "magic"}, ("recipe", "magic")),
    "top_p_above_one": ({"--sampling.top_p": "1.5"}, ("sampling.top_p", "1.5", "(0, 1]")),
    "negative_temperature": ({"--sampling.temperature": "-1"}, ("sampling.temperature", "-1")),
    "no_iterations": ({"--run.iterations": "0"}, ("run.iterations", "0")),
    "no_new_tokens": ({"--sampling.max_new_tokens": "0"}, ("sampling.max_new_tokens", "0")),
    "b1_of_one": ({"--optimizer.b1": "1.0"}, ("optimizer.b1", "1.0")),
    "microbatch_that_does_not_divide": ({"--train.microbatch_size": "3"}, ("train.microbatch_size", "3", "train.batch_size 64")),
    "two_free_mesh_axes": ({"--mesh.data": "-1"}, ("mesh", "-1 to one axis")),
    "mesh_that_does_not_fit": ({"--mesh.tensor": "3"}, ("mesh.tensor 3", "number of devices, 8")),
    "heads_that_the_mesh_does_not_cut": (
        {"--mesh.fsdp": "2", "--mesh.tensor": "4"},
        ("mesh.tensor", "4", "num_key_value_heads 2"),
    ),
    "width_that_the_mesh_does_not_cut": ({"--sampling.mesh": '{"data": 1, "fsdp": 7}'}, ("mesh.fsdp 7", "number of devices, 8")),
    "unknown_loss": ({"--objective.base": "dop"}, ("objective.base", "'dop'", "dpo")),
    "setting_of_another_loss": ({"--objective.tau": "0.5"}, ("objective.tau", "0.5", "ipo")),
    "label_smoothing_of_half": ({"--objective.base": "robust", "--objective.label_smoothing": "0.5"}, ("label_smoothing", "[0, 0.5)")),
    "exo_without_smoothing": ({"--objective.base": "exo", "--objective.label_smoothing": "0"}, ("label_smoothing", "exo")),
    "judge_without_a_judge": ({"--pairs.control": "judge_order"}, ("pairs.control", "judge_order", "toy")),
    "missing_config_file": ({"--config": "no_such.yaml"}, ("config", "no_such.yaml")),
    "missing_queries_file": ({"--queries.path": "no_such.jsonl"}, ("queries.path", "no_such.jsonl")),
    "endpoint_without_address": ({"--principles.source": "endpoint"}, ("endpoint.url", "not given")),
    "endpoint_that_is_down": (
        {"--principles.source": "endpoint", "--endpoint.url": "http://127.0.0.1:9/v1"},
        ("endpoint.url", "127.0.0.1:9", "cannot be reached"),
    ),
    "judging_without_endpoint": ({"--judging.pairs": "5"}, ("endpoint.url", "judging.pairs")),
    "endpoint_of_another_kind": ({"--endpoint.url": "localhost:8000"}, ("endpoint.url", "localhost:8000", "http")),
    "principles_file_without_path": ({"--principles.source": "file"}, ("principles.path", "None", "file")),
    "principles_path_without_file": ({"--principles.path": "p.jsonl"}, ("principles.path", "p.jsonl", "predefined")),
    "missing_principles_file": (
        {"--principles.source": "file", "--principles.path": "no_such.jsonl"},
        ("principles.path", "no_such.jsonl"),
    ),
    "missing_model_folder": ({"--model.path": "./no_such_folder"}, ("model.path", "no_such_folder")),
    "unreachable_hub_id": ({"--model.path": "nobody/nothing"}, ("model.path", "nobody/nothing")),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_of_a_run(good, capsys, tmp_path, case):
    changes, words = BAD_ARGUMENTS[case]
    line = refusal(train.main, {**good, **changes}, capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


SECRET = "sk-4711-very-secret"


@pytest.mark.parametrize("field", ["endpoint.key", "endpoint.api_key", "principles.token", "OPENAI_API_KEY"])
@pytest.mark.parametrize("place", ["file", "argument", "argument_with_equals"])
def test_a_key_outside_the_environment_is_refused_and_not_repeated(good, capsys, tmp_path, field, place):
    section, _, name = field.rpartition(".")
    (tmp_path / "c.yaml").write_text(f"{section}:\n  {name}: {SECRET}\n" if section else f"{name}: {SECRET}\n")
    if place == "file":
        extra = {"--config": str(tmp_path / "c.yaml")}
    else:
        extra = {f"--{field}": SECRET} if place == "argument" else {f"--{field}={SECRET}": "--run.seed=1"}
    line = refusal(train.main, {**good, **extra}, capsys)
    assert field in line and "environment" in line and SECRET not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"--endpoint.url": f"http://me:{SECRET}@host/v1"},
        {"--endpoint.url": f"http://host/v1?k={SECRET}"},
        {"--endpoint.key_variable": SECRET},
    ],
)
def test_a_key_in_another_field_is_refused_and_not_repeated(good, capsys, change):
    line = refusal(train.main, {**good, **change}, capsys)
    assert "environment" in line and SECRET not in line and next(iter(change)).lstrip("-") in line


BAD_QUERIES = {
    "empty_file": ("", ("q.jsonl", "no queries")),
    "malformed_line": ('{"query": "a"}\n{"query": "b"\n', ("q.jsonl, line 2", "not valid JSON")),
    "line_of_another_type": ('{"query": "a"}\n\n["b"]\n', ("q.jsonl, line 3", "list")),
    "line_without_text": ('{"text": "a"}\n', ("q.jsonl, line 1", "no text", "prompt")),
    "id_used_twice": ('{"id": 1, "query": "a"}\n{"id": 1, "query": "b"}\n', ("q.jsonl, line 2", "'1'")),
    "too_long_for_the_model": (json.dumps({"query": "fox " * 200}) + "\n", ("q.jsonl", "128 tokens")),
}


@pytest.mark.parametrize("case", BAD_QUERIES)
@pytest.mark.parametrize("command", ["train", "sample"])
def test_bad_queries(good, capsys, tmp_path, case, command):
    text, words = BAD_QUERIES[case]
    (tmp_path / "q.jsonl").write_text(text)
    arguments = {**good, "--queries.path": str(tmp_path / "q.jsonl")}
    if command == "sample":
        arguments = {"--model.path": arguments["--model.path"], "--queries.path": arguments["--queries.path"]}
        arguments["--out"] = str(tmp_path / "run")
    line = refusal({"train": train.main, "sample": sample.main}[command], arguments, capsys)
    needed = words if command == "train" or case != "too_long_for_the_model" else words[1:]
    assert all(word in line for word in needed), line
    assert not (tmp_path / "run").exists()


def remove(name):
    return lambda folder: (folder / name).unlink()


def shrink_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))


BAD_FOLDERS = {
    "no_weights": (lambda folder: [path.unlink() for path in folder.glob("model*")], ("no model.safetensors",)),
    "no_config": (remove("config.json"), ("config.json", "no such file")),
    "no_tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], ("tokenizer",)),
    "half_a_weights_file": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" * 40), ("model.safetensors",)),
    "vocabulary_of_another_model": (shrink_vocabulary, ("model.embed_tokens.weight", "(64, 32)")),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_model_folders(good, model_folder, capsys, tmp_path, case):
    damage, words = BAD_FOLDERS[case]
    folder = tmp_path / "policy"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    line = refusal(train.main, {**good, "--model.path": str(folder)}, capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(good, capsys, tmp_path, one_device):
    model, tokenizer, folder = toy_model(), train_tokenizer(), tmp_path / "policy"
    export_policy(toy_params(model, one_device), model.architecture, tokenizer, (2,), folder, "float32")
    line = refusal(train.main, {**good, "--model.path": str(folder)}, capsys)
    assert f"ids up to {len(tokenizer) - 1}" in line and f"vocab_size of {ARCHITECTURE.vocab_size}" in line


def test_queries_for_the_toy_world_are_refused(capsys, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"query": "a"}\n')
    arguments = {"--model.path": "toy", "--queries.path": str(tmp_path / "q.jsonl"), "--run.directory": str(tmp_path / "run")}
    assert "queries of its own" in refusal(train.main, arguments, capsys)


def test_a_model_without_queries_is_refused(good, capsys):
    arguments = {name: value for name, value in good.items() if name != "--queries.path"}
    assert "queries.path: not given" in refusal(train.main, arguments, capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--model.path": "toy"}, ("model.path",)),
        ({"--out": "no/such/folder/out.jsonl"}, ("out", "no/such/folder")),
        ({"--query": "Spell fox."}, ("query", "one of them")),
        ({"--optimizer.learning_rate": "1"}, ("optimizer.learning_rate",)),
    ],
)
def test_bad_arguments_of_sampling(good, capsys, tmp_path, changes, words):
    arguments = {"--model.path": good["--model.path"], "--queries.path": good["--queries.path"], "--out": str(tmp_path / "out.jsonl")}
    line = refusal(sample.main, {**arguments, **changes}, capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out.jsonl").exists()


def test_a_misspelt_field_in_a_file_is_named_with_its_neighbour(good, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("sampling:\n  temprature: 1.0\n")
    line = refusal(train.main, {"--config": str(tmp_path / "c.yaml"), **good}, capsys)
    assert "temprature" in line and "sampling.temperature" in line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses(path):
    config = parse(Config, ["--config", str(path)], "train.py", "")
    assert isinstance(config.objective, ObjectiveConfig)


def test_help_names_every_field_with_type_and_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "--objective.weight_alpha" in text and "share of the chosen response in W" in text and "default: 0.66" in text
