"""Model cards: what the hub reads of them, and that their numbers are those of summary.json."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import train
from sso_jax.commands import model_card
from sso_jax.commands import train as train_command
from sso_jax.commands.run_record import versions
from sso_jax.config import Config, ModelConfig
from sso_jax.recipes.stages import policies

PAIRS = [
    {"prompt": f"Spell {word}.", "chosen": f"The letters are {' '.join(word)}.", "rejected": "That is hard."}
    for word in ("fox", "fig", "cat", "red", "ten", "oak")
]


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """A run of two rounds with adapters, of a model from a local folder."""
    folder = tmp_path_factory.mktemp("cards")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    fields = {
        "recipe": "offline",
        "run.directory": folder / "mine",
        "run.iterations": 2,
        "model.path": model_folder,
        "pairs.path": folder / "pairs.jsonl",
        "train.batch_size": 3,
        "train.max_tokens": 256,
        "objective.base": "dpo",
        "objective.beta": 0.25,
        "objective.form": "pairwise",
        "lora.rank": 2,
        "lora.targets": "[query, value]",
        "logging.tensorboard": "false",
    }
    patch = pytest.MonkeyPatch()
    patch.setattr(train_command, "write_report", lambda directory: None)
    assert train.main([str(part) for name, value in fields.items() for part in (f"--{name}", value)]) == 0
    patch.undo()
    return folder / "mine", model_folder


def table_of(text):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return rows[0], rows[2:]


@pytest.mark.parametrize("folder, library", [("policy", "transformers"), ("policy_adapter", "peft")])
def test_the_hub_reads_the_front_matter(folder, library, run):
    card = ModelCard.load(run[0] / "iteration_1" / folder / "README.md")
    assert card.data.library_name == library and card.data.pipeline_tag == "text-generation"
    assert {"sso_jax", "offline", "dpo", "lora"} <= set(card.data.tags)
    assert card.data.base_model is None  # a local folder is none of the hub's
    assert f"`{run[1]}`" in card.text


def test_the_numbers_are_those_of_the_summary_up_to_this_round(run):
    summary = json.loads((run[0] / "summary.json").read_text())
    for iteration in (1, 2):
        names, rows = table_of((run[0] / f"iteration_{iteration}" / "policy" / "README.md").read_text())
        assert len(rows) == iteration + 1 and {"iteration", "num_pairs"} <= set(names)
        for cells, row in zip(rows, summary, strict=False):
            for name, cell in zip(names, cells, strict=True):
                value = row.get(name)
                assert cell == "-" if value is None else float(cell) == pytest.approx(value, rel=1e-3)
        numbers = {name for row in summary[: iteration + 1] for name, v in row.items() if isinstance(v, int | float)}
        assert set(names) == numbers


def test_settings_limits_and_versions_are_named(run):
    text = (run[0] / "iteration_2" / "policy" / "README.md").read_text()
    assert "# mine, iteration 2\n" in text and f"- pairs: `{run[0].parent / 'pairs.jsonl'}`\n" in text
    assert "- objective: dpo, beta 0.25, pairwise\n" in text
    assert "- adapters: rank 2, alpha 32, on query, value\n" in text
    assert "No judge measured" in text and "toy world" not in text
    assert all(f"{name} {version}" in text for name, version in versions().items() if version)


def test_a_base_from_the_hub_is_named_as_such(monkeypatch):
    """Of a snapshot in the hub's cache the name is the config's, and the revision that of its folder."""
    monkeypatch.setattr(policies, "read_json_file", lambda path: {"model_type": "gemma3"})
    config = Config(model=ModelConfig(path="owner/base"))
    base = policies.base_model(config, Path("/cache/models--owner--base/snapshots/12ab"))
    assert base == ("owner/base", "12ab", True)

    assert model_card._front_matter(config, base, "transformers")["base_model"] == "owner/base"
    assert model_card._front_matter(config, base, "peft")["base_model_relation"] == "adapter"
