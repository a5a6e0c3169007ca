"""A reward model's folder and a file of preference pairs in, one JSON object out: accuracy, in all and by section, and
every reward.
"""

import json
import logging
from functools import lru_cache
from importlib import resources
from pathlib import Path

import yaml

from sso_jax.config import EvaluateConfig
from sso_jax.data.pair_files import load_pairs
from sso_jax.data.records import Triple
from sso_jax.recipes.reward_model import accuracy_of, open_reward_scorer, tokenize_pair
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import write_text
from sso_jax.runtime.jax_setup import prepare_jax
from sso_jax.runtime.mesh import make_mesh

DOMAIN_FIELDS = ("subset", "domain", "category", "section", "task", "source", "dataset")
"""Keys under which a file says what kind of pair a row is; the first that is there counts."""
log = logging.getLogger(__name__)
Rewards = list[tuple[float, float]]


def run(config: EvaluateConfig) -> None:
    """Does what the command line asks for.

    Raises:
      InputError: for anything wrong with the config or its files, before anything is written.
    """
    if config.pairs.path is None:
        raise InputError("pairs.path: not given; name a file or data set of preference pairs")
    if config.pairs.control != "none":
        raise InputError(f"pairs.control: {config.pairs.control!r} is for training; leave it out")
    if config.out is None or not Path(config.out).absolute().parent.is_dir() or Path(config.out).is_dir():
        raise InputError(
            f"out: {config.out!r} cannot be written; name the JSON file to write, in a folder that is there"
        )
    pairs = load_pairs(config.pairs.path, config.pairs.split)
    refuse_equal_sides(pairs, config.pairs.path)
    prepare_jax(config.run.compilation_cache)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    scorer = open_reward_scorer(config.model.path, config.model, mesh)
    rewards = scorer.rewards([tokenize_pair(scorer.chat, pair) for pair in pairs], "rewards")
    result = evaluate(pairs, rewards)
    write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", config.out)
    print(table(result), flush=True)
    log.info("%d pairs -> %s", len(pairs), config.out)


def refuse_equal_sides(pairs: list[Triple], path: str) -> None:
    """Raises `InputError` for a pair whose two responses are the same: no reward can tell which is better."""
    equal = [pair.id for pair in pairs if pair.chosen.strip() == pair.rejected.strip()]
    if equal:
        raise InputError(
            f"pairs.path: {path}: {len(equal)} pairs have equal sides, the first is id {equal[0]!r}; take them out"
        )


def evaluate(pairs: list[Triple], rewards: Rewards) -> dict:
    """What INTERFACE.md asks of evaluate.py, and beside it the accuracy of each RewardBench subset and the weighted
    scores.

    `sections` are RewardBench's where a row's `subset` is one of its, else what the row itself names under one of
    `DOMAIN_FIELDS`.
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
    """Sections of RewardBench: their subsets with weights."""
    return yaml.safe_load(resources.files(__package__).joinpath("rewardbench.yaml").read_text(encoding="utf-8"))


def rewardbench_scores(subsets: dict[str, dict]) -> dict[str, float]:
    """RewardBench's own score of each section, its subsets weighted, over those that are there; `Average` where all
    sections are.
    """
    scores = {}
    for section, weights in rewardbench().items():
        there = {subset: weight for subset, weight in weights.items() if subset in subsets}
        if there:
            scores[section] = sum(weight * subsets[subset]["accuracy"] for subset, weight in there.items()) / sum(
                there.values()
            )
    if len(scores) == len(rewardbench()):
        scores["Average"] = sum(scores.values()) / len(scores)
    return scores


def _domain(pair: Triple) -> str | None:
    return next((str(pair.extra[field]) for field in DOMAIN_FIELDS if pair.extra.get(field) not in (None, "")), None)


def _grouped(names: list[str | None], rewards: Rewards) -> dict[str, dict]:
    """Accuracy and number of pairs by name, in the order in which names come; pairs without one are left out."""
    groups: dict[str, Rewards] = {}
    for name, pair in zip(names, rewards, strict=True):
        if name is not None:
            groups.setdefault(name, []).append(pair)
    return {name: {"accuracy": accuracy_of(group), "num_pairs": len(group)} for name, group in groups.items()}


def table(result: dict) -> str:
    """The accuracies for the terminal."""
    rows = [("all pairs", result["accuracy"], result["num_pairs"])]
    rows += [(name, row["accuracy"], row["num_pairs"]) for name, row in result["sections"].items()]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"  {name:<{width}}  {accuracy:.3f}  of {count} pairs" for name, accuracy, count in rows]
    return "\n".join([f"== accuracy, {result['ties']} ties as half ".ljust(width + 30, "="), *lines])
