"""Local folders of models: as given, or copied from an object store or the hub."""

import tempfile
from pathlib import Path

from etils import epath

from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import files_below, is_remote

FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


LEFT_ON_THE_HUB = ["consolidated*", "original/*"]
"""The same weights again, as Mistral and Llama publish them beside Hugging Face's."""


def fetch(path: str, field: str = "model.path", files: tuple[str, ...] = FETCHED) -> Path:
    """Local folder of a model: `path` itself, or a copy of these files of an object store or the hub; errors name the
    config's `field`.

    Raises:
      InputError: if it is neither.
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
            f"{field}: no folder {path!r}, and the hub does not give it ({reason}); check the name or the network"
        ) from error


def _copied(folder: epath.Path, field: str, files: tuple[str, ...]) -> Path:
    """These files of a folder of an object store, copied to this machine: safetensors are read in slices, which needs a
    file.
    """
    from huggingface_hub.utils import filter_repo_objects

    if not folder.is_dir():
        raise InputError(f"{field}: no folder {str(folder)!r}; check the name and the rights to read it")
    local = Path(tempfile.mkdtemp(prefix="sso_jax-"))
    for name in filter_repo_objects(files_below(folder), allow_patterns=list(files), ignore_patterns=LEFT_ON_THE_HUB):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).copy(local / name)
    return local
