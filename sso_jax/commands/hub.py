"""Uploads the policies of a run to the Hugging Face hub: `run.push_to_hub`."""

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sso_jax.config.parsing import without_tokens
from sso_jax.config.values import HUB_REMEDY
from sso_jax.models.export import POLICY_FOLDER, REWARD_FOLDER
from sso_jax.models.peft_adapters import ADAPTER_FOLDER, REWARD_ADAPTER_FOLDER
from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.files import files_below, is_remote
from sso_jax.runtime.hosts import on_first_process
from sso_jax.runtime.signals import stop_requested
from sso_jax.runtime.stage_markers import finish, finished

FOLDERS = (POLICY_FOLDER, REWARD_FOLDER, ADAPTER_FOLDER, REWARD_ADAPTER_FOLDER)
"""What is uploaded of a round: the first of these that it left."""
STAGE = "push"
WAITS_SECONDS = (2.0, 10.0)
"""Waits before the second and the third attempt."""
STALE = ["*.safetensors", "*.safetensors.index.json"]
"""Files of the repository that are deleted where a later round has none of that name: shards of another number."""
log = logging.getLogger(__name__)


def check_push(repository: str | None) -> None:
    """Makes sure that a run can be pushed, before it starts; creates the repository if there is none.

    A hub that does not answer is a warning only: it is asked again at the end of each round.

    Raises:
      InputError: if the name is none, there is no token, or the hub refuses it.
    """
    if repository is not None:
        on_first_process(lambda: _check(repository))


def _check(repository: str) -> None:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(
            f"run.push_to_hub: {repository!r} is not the name of a repository; give OWNER/NAME, or NAME for your own"
        ) from error
    if get_token() is None:
        raise InputError(f"run.push_to_hub: no token for {repository!r}; {HUB_REMEDY}")
    try:
        HfApi().create_repo(repository, exist_ok=True)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            raise InputError(
                f"run.push_to_hub: the hub refuses {repository!r} ({_reason(error)}); check the name, and that the "
                "token may write there"
            ) from error
        _warn_later(repository, error)
    except Exception as error:  # whatever a client without a network raises: the run does not need it yet
        _warn_later(repository, error)


def _warn_later(repository: str, error: Exception) -> None:
    log.warning("run.push_to_hub: the hub does not answer for %s now (%s); the run goes on", repository, _reason(error))


def push_round(folder: Path, iteration: int, repository: str | None) -> None:
    """Uploads what a finished round left as one commit; a failure is a warning, as `finish_push` tries again.

    The newest round is what the repository shows, and its history has the earlier ones. Round 0 leaves nothing.

    Args:
      folder: folder of the round.
      iteration: number of the round.
      repository: name of the repository; None for no upload.
    """
    if repository is not None:
        _push(folder, iteration, repository)


def finish_push(directory: Path, iteration: int, repository: str | None) -> None:
    """Uploads the last round if that is not done yet; called when the run is finished.

    Args:
      directory: the run directory.
      iteration: number of the last round.
      repository: name of the repository; None for no upload.

    Raises:
      RunError: if the upload fails again; the run itself is complete.
    """
    if repository is None:
        return
    folder = directory / f"iteration_{iteration}"
    reason = _push(folder, iteration, repository)
    if reason is not None:
        name = on_first_process(lambda: _left(folder)) or POLICY_FOLDER
        raise RunError(
            f"run.push_to_hub: {repository} does not have iteration {iteration} ({reason}); the run is complete in "
            f"{directory}: run the same command again to push it, or `hf upload {repository} {folder / name}`"
        )


def _push(folder: Path, iteration: int, repository: str) -> str | None:
    """Uploads a round unless its marker says that it is there; returns why it failed, or None."""
    marker = finished(folder, STAGE)
    if marker is not None and marker["repository"] == repository:
        return None
    reason: str | None = on_first_process(lambda: _attempts(folder, iteration, repository))
    if reason == "":
        return None  # nothing to upload
    if reason is not None:
        log.warning("run.push_to_hub: iteration %d is not on %s (%s); the run goes on", iteration, repository, reason)
        return reason
    finish(folder, STAGE, {"repository": repository})
    log.info("iteration %d is on the hub: %s", iteration, repository)
    return None


def _attempts(folder: Path, iteration: int, repository: str) -> str | None:
    """Uploads, three times at most; returns None if it succeeded, "" without anything to upload, else the reason."""
    from huggingface_hub import HfApi

    name = _left(folder)
    if name is None:
        return ""
    reason = None
    for wait in (*WAITS_SECONDS, None):
        try:
            with _local_copy(folder / name) as local:
                api = HfApi()
                api.create_repo(repository, exist_ok=True)
                api.upload_folder(
                    repo_id=repository,
                    folder_path=str(local),
                    commit_message=f"Iteration {iteration}",
                    delete_patterns=STALE,
                )
            return None
        except Exception as error:  # of a client with many kinds of failure; none of them is worth the run
            reason = _reason(error)
        if wait is None or stop_requested():
            break
        time.sleep(wait)
    return reason


def _left(folder: Path) -> str | None:
    return next((name for name in FOLDERS if (folder / name).is_dir()), None)


@contextmanager
def _local_copy(folder: Path) -> Iterator[Path]:
    """Yields a local folder with the files of `folder`, which may be in an object store."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="sso_jax-") as local:
        for name in files_below(folder):
            (Path(local) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(local) / name).write_bytes((folder / name).read_bytes())
        yield Path(local)


def _reason(error: Exception) -> str:
    """Returns an error in one line, without a token."""
    return without_tokens(" ".join(f"{type(error).__name__}: {error}".split())[:200])
