"""Model cards: README.md of the exported policy and of its adapters, in Hugging Face's form."""

import dataclasses
from typing import Any

import yaml

from sso_jax.commands.run_record import versions
from sso_jax.config import Config
from sso_jax.models.export import POLICY_FOLDER
from sso_jax.models.peft_adapters import ADAPTER_FOLDER, BaseModel
from sso_jax.recipes.run import Round, RoundSummary
from sso_jax.recipes.stages.policies import base_model
from sso_jax.runtime.files import write_text
from sso_jax.runtime.hosts import is_first

CARD_FILE = "README.md"
LIBRARIES = {POLICY_FOLDER: "transformers", ADAPTER_FOLDER: "peft"}
"""Folders that get a card, and the library that opens each."""
PAPER = "Self-Steering Optimization (arXiv 2410.17131)"
LIMITS = (
    "The pairs say which answer followed which principle, or what their file says; nothing here checks that an answer "
    "is true, safe or fair.",
    "What the base model gets wrong, and the license under which it may be used, are inherited.",
)
NO_JUDGE = "No judge measured the answers of this run; evaluate the policy before it is used."
TOY = "The policy knows the embedded toy world only, whose judge is made up."


def write_cards(this: Round, summaries: list[dict[str, Any]]) -> None:
    """Writes the cards of a round that is about to end, beside the files of the policy and of the adapters.

    Does nothing for a round that leaves neither. The same run gives the same card: it has no times.

    Args:
      this: the round.
      summaries: those of all rounds up to this one, the start's first.
    """
    if not is_first():
        return
    rows = [{"iteration": k, **row} for k, row in enumerate(summaries)]
    for folder, library in LIBRARIES.items():
        if (this.folder / folder).exists():
            write_text(_card(this, library, rows), this.folder / folder / CARD_FILE)


def _card(this: Round, library: str, rows: list[dict[str, Any]]) -> str:
    """Returns the text of a card."""
    config, base = this.run.config, base_model(this.run.config, this.run.engine.source)
    front = yaml.safe_dump(_front_matter(config, base, library), sort_keys=False, allow_unicode=True)
    toy = config.model.path == "toy"
    start = "a small policy of the toy world" if toy else f"`{base.name}`"
    kind = "Adapters for" if library == "peft" else "A policy trained from"
    limits = [*LIMITS, *([TOY] if toy else []), *([] if this.run.environment.judge else [NO_JUDGE])]
    warnings = [f"Warning of round {row['iteration']}: {text}" for row in rows for text in row.get("warnings") or []]
    used = ", ".join(f"{name} {version}" for name, version in versions().items() if version is not None)
    parts = [
        f"---\n{front}---",
        f"# {this.run.directory.name}, iteration {this.iteration}",
        f"{kind} {start} by sso_jax: {PAPER}, recipe `{config.recipe}`.",
        "## Training",
        "\n".join(f"- {name}: {value}" for name, value in _settings(config).items()),
        "## Results",
        "Iteration 0 is the policy before any update; the names are those of `summary.json`.",
        _table(rows),
        "## Limits",
        "\n".join(f"- {line}" for line in [*limits, *warnings]),
        "## Versions",
        used,
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Config, base: BaseModel, library: str) -> dict[str, Any]:
    """Returns the fields that the hub reads; the base model only if it is from there."""
    relation = "adapter" if library == "peft" else "finetune"
    from_hub = {"base_model": base.name, "base_model_relation": relation} if base.revision is not None else {}
    objective = [] if config.recipe == "sft" else [config.objective.base]
    return {
        **from_hub,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["sso_jax", "self-steering-optimization", config.recipe, *objective]
        + (["lora"] if config.lora.rank else []),
    }


def _settings(config: Config) -> dict[str, Any]:
    """Returns what was trained on and how, by name."""
    toy = "the toy world's own" if config.model.path == "toy" else None
    data = {
        "pairs": config.pairs.path,
        "demonstrations": config.demonstrations.path,
        "queries": config.queries.path or (toy if config.recipe in ("online", "generator") else None),
    }
    objective, optimizer = config.objective, config.optimizer
    beta = "its default beta" if objective.beta is None else f"beta {objective.beta}"
    loss = (
        "mean negative log-prob of a token" if config.recipe == "sft" else f"{objective.base}, {beta}, {objective.form}"
    )
    adapters = f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {', '.join(config.lora.targets)}"
    return {
        **{name: f"`{path}`" if path != toy else path for name, path in data.items() if path is not None},
        "objective": loss,
        "optimizer": f"AdamW, learning rate {optimizer.learning_rate:g}, schedule {optimizer.schedule}",
        "batch": f"{config.train.batch_size} examples an update, {config.train.epochs} epochs a round",
        **({"adapters": adapters} if config.lora.rank else {}),
        "seed": config.run.seed,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    """Returns the numbers of all rounds as a table, without columns that have none."""
    names = ["iteration", *(field.name for field in dataclasses.fields(RoundSummary))]
    kept = [name for name in names if any(isinstance(row.get(name), int | float) for row in rows)]
    lines = [kept, ["---"] * len(kept), *([_cell(row.get(name)) for name in kept] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, int) else "-"
