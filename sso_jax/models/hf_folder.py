"""Finds the local folder of a model, and downloads it from an object store or the hub if necessary."""

import tempfile
from pathlib import Path

from etils import epath

from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import files_below, is_remote

FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Patterns of the files that are downloaded."""
LEFT_ON_THE_HUB = ["consolidated*", "original/*"]
"""Not downloaded: second copies of the weights, which Mistral and Llama publish in their own format."""


def fetch(path: str, field: str = "model.path", files: tuple[str, ...] = FETCHED) -> Path:
    """Returns the local folder of a model: `path` itself, or a copy of the files from an object store or the hub.

    Args:
      path: local folder, URL of an object store, or hub id.
      field: config field of the path, which errors name.
      files: patterns of the files to copy.

    Raises:
      InputError: if `path` is none of the three, or the download fails.
    """
    if is_remote(path):
        return _copied(epath.Path(path), field, files)
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.count("/") != 1 or path.startswith("."):
        raise InputError(
            f"{field}: no folder {path!r}; give a Hugging Face folder, a hub id such as Qwen/Qwen2-7B-Instruct, or toy"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=list(files), ignore_patterns=LEFT_ON_THE_HUB))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{field}: no folder {path!r}, and not available on the hub ({reason}); check the name or the network"
        ) from error


def _copied(folder: epath.Path, field: str, files: tuple[str, ...]) -> Path:
    """Copies the files from an object store to a local folder, since safetensors can only be sliced in local files."""
    from huggingface_hub.utils import filter_repo_objects

    if not folder.is_dir():
        raise InputError(f"{field}: no folder {str(folder)!r}; check the name and the permission to read it")
    local = Path(tempfile.mkdtemp(prefix="sso_jax-"))
    for name in filter_repo_objects(files_below(folder), allow_patterns=list(files), ignore_patterns=LEFT_ON_THE_HUB):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).copy(local / name)
    return local
