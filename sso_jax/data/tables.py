"""Reads rows of JSON, JSON Lines, tables and hub data sets, each with the place that errors about it name."""

import json
from pathlib import Path
from typing import Any

from sso_jax.runtime.errors import InputError
from sso_jax.runtime.json_lines import read_numbered_lines

ID_FIELDS = ("id", "uuid", "idx", "question_id", "key")
TABLES = {".parquet": "parquet", ".csv": "csv"}
"""File suffixes that `datasets` reads -> name of its reader."""


def read_rows(path: str, split: str, field: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the (place, row) of every row of a file, or of a data set that `datasets` loads.

    Args:
      path: file or data set.
      split: split of a data set.
      field: config field that gave the path, for errors.

    Raises:
      InputError: for a path that does not exist, or is not UTF-8 or not JSON; names the file and the line.
    """
    file = Path(path)
    if file.is_file() and file.suffix == ".jsonl":
        return [(f"{path}, line {number}", row) for number, row in read_numbered_lines(file)]
    if file.is_file() and file.suffix == ".json":
        return _read_json(file)
    names_a_file = file.suffix in (".json", ".jsonl", *TABLES) or file.is_absolute() or path.startswith(".")
    if not file.exists() and names_a_file:
        raise InputError(f"{field}: no file {path!r}; give JSON, JSON Lines, Parquet or the id of a data set")
    if file.is_file() and file.suffix not in TABLES:
        raise InputError(
            f"{field}: {path!r} has no supported format; give .json, .jsonl, {', '.join(TABLES)} or the id of a data "
            "set"
        )
    import datasets  # here, because it is slow to import and most runs do not need it

    try:
        if file.is_file():
            table = datasets.load_dataset(TABLES[file.suffix], data_files=str(file), split="train")
        else:
            table = datasets.load_dataset(path, split=split)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{field}: {path!r} cannot be read as a data set ({reason}); check the name, the split or the network"
        ) from error
    return [(f"{path}, row {i}", row) for i, row in enumerate(table)]


def _read_json(file: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}, line {error.lineno}: not valid JSON ({error.msg}); give a list of objects"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error}); give a list of objects") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f'{file}: not a list of JSON objects; give [{{"query": ...}}, ...]')
    return [(f"{file}, record {i}", row) for i, row in enumerate(rows, start=1)]


def given_id(row: dict[str, Any]) -> str | None:
    """Returns the row's own id, or None if it has none."""
    return next((str(row[field]) for field in ID_FIELDS if row.get(field) is not None), None)


def check_characters(text: str, place: str) -> str:
    """Returns the text unchanged; raises `InputError` if it contains half of a surrogate pair."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{place}: contains half of a surrogate pair, which is not a valid character; fix the text")
    return text
