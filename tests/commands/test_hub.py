"""run.push_to_hub with a hub of the test's own: what is uploaded and when, what is refused, and that no failure loses
the run.
"""

import inspect
import json
import logging
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from etils import epath
from huggingface_hub.errors import HfHubHTTPError

import train
from sso_jax.commands import hub
from sso_jax.commands import train as train_command
from sso_jax.config import Config, parse
from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.stage_markers import finished

TOKEN = "hf_" + "a1B2" * 8
PAIRS = [
    {"prompt": f"Spell {word}.", "chosen": f"The letters are {' '.join(word)}.", "rejected": "That is hard."}
    for word in ("fox", "fig", "cat", "red", "ten", "oak")
]


class Hub:
    """In place of `HfApi`: keeps what is uploaded, and fails as often as it is told."""

    def __init__(self):
        self.made, self.commits, self.failures, self.error = [], [], 0, ConnectionError("no network")

    def create_repo(self, repository, exist_ok):
        assert exist_ok
        self.made.append(repository)

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        if self.failures:
            self.failures -= 1
            raise self.error
        assert "*.safetensors" in delete_patterns
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.commits.append((repo_id, commit_message, files))


@pytest.fixture
def fake(monkeypatch):
    one = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: one)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(hub, "WAITS_SECONDS", (0.0, 0.0))
    return one


@pytest.fixture
def arguments(model_folder, tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    monkeypatch.setattr(train_command, "write_report", lambda directory: None)
    fields = {
        "recipe": "offline",
        "run.directory": tmp_path / "run",
        "run.iterations": 2,
        "run.push_to_hub": "me/mine",
        "model.path": model_folder,
        "pairs.path": tmp_path / "pairs.jsonl",
        "train.batch_size": 3,
        "train.max_tokens": 256,
        "objective.base": "dpo",
        "objective.form": "pairwise",
        "logging.tensorboard": "false",
    }
    return [str(part) for name, value in fields.items() for part in (f"--{name}", value)]


def test_every_round_is_one_commit_of_its_policy(fake, arguments, tmp_path):
    assert train.main(arguments) == 0
    assert [(repository, message) for repository, message, _ in fake.commits] == [
        ("me/mine", "Iteration 1"),
        ("me/mine", "Iteration 2"),
    ]
    for iteration, (_, _, files) in enumerate(fake.commits, 1):
        policy = tmp_path / "run" / f"iteration_{iteration}" / "policy"
        assert files == {path.name: path.read_bytes() for path in policy.iterdir()} and "README.md" in files
    assert train.main(arguments) == 0 and len(fake.commits) == 2  # finished and pushed: nothing is left to do


def test_a_hub_that_fails_once_is_asked_again(fake, arguments):
    fake.failures = 2
    assert train.main(arguments) == 0
    assert [message for _, message, _ in fake.commits] == ["Iteration 1", "Iteration 2"]


def test_a_hub_that_is_gone_does_not_cost_the_run_and_the_same_command_pushes(fake, arguments, tmp_path, capfd):
    fake.failures = 1000
    assert train.main(arguments) == 1
    assert (tmp_path / "run" / "iteration_2" / "policy" / "model.safetensors").is_file()
    assert finished(tmp_path / "run" / "iteration_2", "round") is not None
    last = capfd.readouterr().err.splitlines()[-1]
    assert "me/mine does not have iteration 2 (ConnectionError: no network); the run is complete in" in last
    assert "run the same command again to push it, or `hf upload me/mine" in last
    fake.failures = 0
    assert train.main(arguments) == 0
    assert [message for _, message, _ in fake.commits] == ["Iteration 2"]  # the newest is what the repository shows


def test_a_finished_run_is_pushed_to_a_repository_that_is_named_later(fake, arguments):
    assert train.main(arguments) == 0
    assert train.main([*arguments, "--run.push_to_hub", "me/other"]) == 0
    assert [repository for repository, *_ in fake.commits] == ["me/mine", "me/mine", "me/other"]


@pytest.mark.parametrize("left, pushed", [(["policy", "policy_adapter"], "policy"), (["policy_adapter"],) * 2])
def test_a_round_of_adapters_alone_pushes_these(left, pushed, fake, tmp_path):
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(name)
    hub.push_round(tmp_path, 3, "me/mine")
    assert fake.commits == [("me/mine", "Iteration 3", {"README.md": (pushed if left[1:] else left[0]).encode()})]


@pytest.mark.parametrize("name", ["create_repo", "upload_folder"])
def test_the_fake_takes_what_the_client_takes(name):
    real, own = (inspect.signature(getattr(each, name)).parameters for each in (huggingface_hub.HfApi, Hub))
    assert {key for key in own if key not in ("self", "repository")} <= set(real)
    assert list(real)[1] == "repo_id"  # create_repo's first one, which is given by its place


def test_the_start_of_a_run_has_nothing_to_push(fake, tmp_path):
    hub.push_round(tmp_path, 0, "me/mine")
    hub.push_round(tmp_path, 0, None)
    assert fake.made == [] and finished(tmp_path, "push") is None


def test_a_folder_of_an_object_store_is_pushed_from_a_copy(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "is_remote", lambda path: True)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    hub.push_round(epath.Path(tmp_path), 1, "me/mine")
    assert fake.commits == [("me/mine", "Iteration 1", {"config.json": b"{}"})]


def refusing(status: int) -> HfHubHTTPError:
    request = httpx2.Request("POST", "http://localhost/")
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, f"{status} for {TOKEN}")
    error.response = httpx2.Response(status, request=request)
    return error


def test_what_cannot_be_pushed_is_refused_before_the_run(fake, arguments, tmp_path, monkeypatch, capfd):
    assert train.main([*arguments, "--run.push_to_hub", "a/b/c"]) == 2
    assert "run.push_to_hub: 'a/b/c' is not the name of a repository; give OWNER/NAME" in capfd.readouterr().err

    def refuse(*_, **__):
        raise refusing(403)

    monkeypatch.setattr(fake, "create_repo", refuse)
    assert train.main(arguments) == 2
    said = capfd.readouterr().err
    assert "run.push_to_hub: the hub refuses 'me/mine'" in said and "may write there" in said and TOKEN not in said
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert train.main(arguments) == 2
    assert "run.push_to_hub: no token for 'me/mine'; set HF_TOKEN in the environment" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ConnectionError("gone"), refusing(503), refusing(429)])
def test_a_hub_that_does_not_answer_at_the_start_is_a_warning(error, fake, monkeypatch, caplog):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(fake, "create_repo", fail)
    with caplog.at_level(logging.WARNING, "sso_jax"):
        hub.check_push("me/mine")
    assert "the hub does not answer for me/mine now" in caplog.text and TOKEN not in caplog.text


def test_the_end_says_what_is_missing(fake, tmp_path):
    (tmp_path / "iteration_1" / "policy_adapter").mkdir(parents=True)
    fake.failures, fake.error = 3, OSError(f"bad {TOKEN}")
    with pytest.raises(RunError, match=r"\(OSError: bad hf_\*\*\*\).*hf upload me/mine .*policy_adapter`"):
        hub.finish_push(tmp_path, 1, "me/mine")


@pytest.mark.parametrize(
    "given, field",
    [
        (["--run.push_to_hub", f"me/mine:{TOKEN}"], "run.push_to_hub"),
        ([f"--run.hub_token={TOKEN}"], "run.hub_token"),
        (["--run.hub_token", "secret"], "run.hub_token"),
        (["--model.path", TOKEN], "model.path"),
        (None, "run.hub_token"),
    ],
)
def test_a_token_in_a_config_is_refused_by_the_name_of_its_field(given, field, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"run:\n  hub_token: {TOKEN}\n")
    with pytest.raises(InputError) as refused:
        parse(Config, given or ["--config", str(file)], "train.py", "")
    assert str(refused.value).startswith(f"{field}: an API token does not belong")
    assert "set HF_TOKEN in the environment, or log in with `hf auth login`" in str(refused.value)
    assert TOKEN not in str(refused.value) and "secret" not in str(refused.value)
