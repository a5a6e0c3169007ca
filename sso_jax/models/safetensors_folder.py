"""The safetensors of a model folder: opens them, and checks names, shapes and types of their tensors."""

from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sso_jax.models.hf_config import read_json_file
from sso_jax.runtime.errors import InputError

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ROWS_AT_ONCE = 8192
"""Rows of two matrices that are compared at once."""
TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Types of tensors that are read, by safetensors' names; they are rounded to the type of the parameters."""


def open_safetensors(path: Path):
    """Opens a file of tensors; raises `InputError` if it is missing or truncated."""
    try:
        return safe_open(path, "numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: missing, truncated or not safetensors ({error}); fetch the file again") from error


def require_float(tensor, name: str, place: Path) -> None:
    """Raises `InputError` unless an opened tensor has one of `TYPES`."""
    if tensor.get_dtype() not in TYPES:
        raise InputError(f"{place}: tensor {name} is {tensor.get_dtype()}; convert it to one of {', '.join(TYPES)}")


class SafetensorsFolder:
    """The tensors of a folder by name, read as slices.

    Raises:
      InputError: if there are no safetensors, or a file is missing or truncated.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.slices, self.files = {}, []
        for file in self._weight_files():
            opened = open_safetensors(folder / file)
            self.files.append(opened)
            self.slices.update({name: opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118 (not a mapping)

    def _weight_files(self) -> list[str]:
        index = self.folder / INDEX_FILE
        if (self.folder / WEIGHTS_FILE).is_file():  # as in transformers, it goes before an index
            return [WEIGHTS_FILE]
        if index.is_file():
            listed = read_json_file(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
                raise InputError(f"{index}: weight_map does not map tensors to files; fetch the file again")
            return sorted(set(listed.values()))
        pickled = sorted(path.name for path in self.folder.glob("pytorch_model*.bin"))
        only = f", only {pickled[0]}" if pickled else ""
        raise InputError(
            f"{self.folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}{only}; load the model in transformers and write it "
            "with save_pretrained(folder, safe_serialization=True)"
        )

    def require_equal(self, name: str, other: str) -> None:
        """Raises `InputError` if two matrices that config.json ties are both stored, and differ."""
        first, second = self.slices.get(name), self.slices.get(other)
        if first is None or second is None or first.get_shape() != second.get_shape():
            return
        num_rows = first.get_shape()[0]
        for start in range(0, num_rows, ROWS_AT_ONCE):
            rows = slice(start, min(num_rows, start + ROWS_AT_ONCE))
            if not np.array_equal(np.asarray(first[rows]), np.asarray(second[rows])):
                raise InputError(
                    f"{self.folder}: config.json says tie_word_embeddings, but {name} is another matrix than {other}; "
                    "set tie_word_embeddings to false, or fetch both again"
                )

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises `InputError` unless the folder has exactly the tensors `expected`, in these shapes and float types."""
        missing, extra = sorted(expected.keys() - self.slices.keys()), sorted(self.slices.keys() - expected.keys())
        if missing or extra:
            kind, names = ("missing", missing) if missing else ("unexpected", extra)
            raise InputError(
                f"{self.folder}: {len(names)} {kind} tensor(s), the first is {names[0]}; the weights do not match "
                "config.json, fetch both again"
            )
        for name, shape in expected.items():
            found = tuple(self.slices[name].get_shape())
            if found != shape:
                raise InputError(
                    f"{self.folder}: tensor {name} has shape {found}, config.json says {shape}; fetch both again"
                )
            require_float(self.slices[name], name, self.folder)
