"""The words of the toy world, from `words.yaml` beside this file."""

from functools import lru_cache
from importlib import resources

import yaml


@lru_cache
def words() -> dict:
    """Returns the word lists."""
    return yaml.safe_load(resources.files(__package__).joinpath("words.yaml").read_text(encoding="utf-8"))
