"""Writes the pairs of a finished round as files for other trainers and for people."""

from pathlib import Path

from sso_jax.data.records import Triple
from sso_jax.preferences.pairs import to_preference
from sso_jax.runtime import stage_markers as stages
from sso_jax.runtime.json_lines import each_record, write_records

DATASET_FILE, DROPPED_FILE = "preference_dataset.jsonl", "dropped.jsonl"


def write_preference_dataset(folder: Path) -> None:
    """Writes `preference_dataset.jsonl` (`prompt, chosen, rejected` messages) and `dropped.jsonl` (`id, reason`).

    Writes nothing for a round without pairs.
    """
    pairs = stages.finished(folder, "pairs")
    if pairs is None:
        return
    triples = each_record(Triple, folder / "pairs.jsonl")
    write_records((to_preference(triple) for triple in triples), folder / DATASET_FILE)
    responses = stages.finished(folder, "responses") or {}
    dropped = {**responses.get("dropped_by_id", {}), **pairs["dropped_by_id"]}
    write_records(({"id": name, "reason": reason} for name, reason in dropped.items()), folder / DROPPED_FILE)
