"""A few pairs of a round as texts, for TensorBoard and Weights & Biases."""

from pathlib import Path

from sso_jax.data.records import evenly_spaced
from sso_jax.runtime.hosts import is_first
from sso_jax.runtime.json_lines import read_json_lines

NAMES = ("query", "good_system", "bad_system", "chosen", "rejected", "original")
"""Fields of a pair that are shown, where the round's pairs have them."""
MOST_CHARACTERS = 2000
PAIRS_FILE = "pairs.jsonl"


def samples_of_round(folder: Path, number: int) -> list[dict[str, str]]:
    """Returns texts of pairs of a round, evenly spaced in its file; none without a file or on another process.

    Args:
      folder: folder of the round.
      number: how many pairs.
    """
    path = folder / PAIRS_FILE
    if number == 0 or not is_first() or not path.is_file():
        return []
    chosen = evenly_spaced(list(read_json_lines(path)), number)
    names = [name for name in NAMES if any(row.get(name) for row in chosen)]
    return [{name: _shortened(row.get(name) or "") for name in names} for row in chosen]


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} [{len(text) - MOST_CHARACTERS} more characters]"
