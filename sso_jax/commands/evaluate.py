"""Command evaluate.py: scores preference pairs with a reward model, and writes accuracies and rewards as JSON."""

import json
import logging
from functools import lru_cache
from importlib import resources
from pathlib import Path

import yaml

from sso_jax.config import EvaluateConfig
from sso_jax.data.pair_files import load_pairs
from sso_jax.data.records import Triple
from sso_jax.data.rows import Records, RowError, Table, drop_unusable
from sso_jax.recipes.engine import mesh_of
from sso_jax.recipes.input_tables import drop_refused_turns, pairs_table
from sso_jax.recipes.reward_model import accuracy_of, open_reward_scorer, tokenize_pair
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import write_text
from sso_jax.runtime.jax_setup import prepare_jax, require_devices

DOMAIN_FIELDS = ("subset", "domain", "category", "section", "task", "source", "dataset")
"""Fields that may hold the kind of a pair; the first one present is used."""
log = logging.getLogger(__name__)
Rewards = list[tuple[float, float]]


def run(config: EvaluateConfig) -> None:
    """Runs the command.

    Raises:
      InputError: for anything wrong with the config or its files, before anything is written.
    """
    if config.pairs.path is None:
        raise InputError("pairs.path: not given; give a file or data set of preference pairs")
    if config.pairs.control != "none":
        raise InputError(f"pairs.control: {config.pairs.control!r} is for training; remove it")
    if config.out is None or not Path(config.out).absolute().parent.is_dir() or Path(config.out).is_dir():
        raise InputError(f"out: {config.out!r} cannot be written; give a JSON file to write, in an existing folder")
    found = drop_equal_sides(load_pairs(pairs_table(config)), pairs_table(config))
    prepare_jax(config.run.compilation_cache)
    require_devices()
    mesh = mesh_of(config.mesh)
    scorer = open_reward_scorer(config.model.path, config.model, mesh, config.chat.thinking)
    pairs, refused = drop_refused_turns(scorer.chat, found.records, pairs_table(config))
    rewards = scorer.rewards([tokenize_pair(scorer.chat, pair) for pair in pairs], "rewards")
    result = {**evaluate(pairs, rewards), "dropped": dict(found.dropped + refused)}
    write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", config.out)
    print(table(result), flush=True)
    log.info("%d pairs -> %s", len(pairs), config.out)


def drop_equal_sides(found: Records[Triple], table: Table) -> Records[Triple]:
    """Drops pairs with two equal responses, which no reward can order, or refuses the file (`drop_bad_rows`)."""

    def is_equal(pair: Triple) -> bool:
        return pair.chosen.strip() == pair.rejected.strip()

    told = f"{sum(map(is_equal, found.records))} pairs have equal sides"

    def problem(pair: Triple) -> RowError | None:
        return RowError("chosen_is_rejected", f"{table.path}, id {pair.id!r}: {told}") if is_equal(pair) else None

    kept, dropped = drop_unusable(found.records, table, problem)
    return Records(kept, found.dropped + dropped)


def evaluate(pairs: list[Triple], rewards: Rewards) -> dict:
    """Returns the JSON object of evaluate.py: the accuracy in total and by section, and every reward.

    It also has the accuracy of each RewardBench subset and RewardBench's weighted scores. `sections` are those of
    RewardBench if a row's `subset` belongs to one, else what the row has in one of `DOMAIN_FIELDS`.
    """
    domains = [_domain(pair) for pair in pairs]
    in_section = {subset: section for section, weights in rewardbench().items() for subset in weights}
    subsets = _grouped([domain if domain in in_section else None for domain in domains], rewards)
    return {
        "accuracy": accuracy_of(rewards),
        "ties": sum(chosen == rejected for chosen, rejected in rewards),
        "num_pairs": len(pairs),
        "sections": _grouped([in_section.get(domain, domain) for domain in domains], rewards),
        "subsets": subsets,
        "rewardbench": rewardbench_scores(subsets),
        "scores": [{"id": pair.id, "chosen": a, "rejected": b} for pair, (a, b) in zip(pairs, rewards, strict=True)],
    }


@lru_cache
def rewardbench() -> dict[str, dict[str, int]]:
    """Returns the sections of RewardBench: the weight of each of their subsets."""
    return yaml.safe_load(resources.files(__package__).joinpath("rewardbench.yaml").read_text(encoding="utf-8"))


def rewardbench_scores(subsets: dict[str, dict]) -> dict[str, float]:
    """Returns RewardBench's score of each section, a weighted mean over the subsets present.

    `Average` is added if all sections are present.
    """
    scores = {}
    for section, weights in rewardbench().items():
        there = {subset: weight for subset, weight in weights.items() if subset in subsets}
        if there:
            total = sum(weight * subsets[subset]["accuracy"] for subset, weight in there.items())
            scores[section] = total / sum(there.values())
    if len(scores) == len(rewardbench()):
        scores["Average"] = sum(scores.values()) / len(scores)
    return scores


def _domain(pair: Triple) -> str | None:
    return next((str(pair.extra[field]) for field in DOMAIN_FIELDS if pair.extra.get(field) not in (None, "")), None)


def _grouped(names: list[str | None], rewards: Rewards) -> dict[str, dict]:
    """Returns accuracy and number of pairs by name, in order of first appearance; skips pairs without a name."""
    groups: dict[str, Rewards] = {}
    for name, pair in zip(names, rewards, strict=True):
        if name is not None:
            groups.setdefault(name, []).append(pair)
    return {name: {"accuracy": accuracy_of(group), "num_pairs": len(group)} for name, group in groups.items()}


def table(result: dict) -> str:
    """Formats the accuracies for the terminal."""
    rows = [("all pairs", result["accuracy"], result["num_pairs"])]
    rows += [(name, row["accuracy"], row["num_pairs"]) for name, row in result["sections"].items()]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"  {name:<{width}}  {accuracy:.3f}  of {count} pairs" for name, accuracy, count in rows]
    return "\n".join([f"== accuracy, {result['ties']} ties as half ".ljust(width + 30, "="), *lines])
