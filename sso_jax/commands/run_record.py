"""What a run was, in `run.json`: versions, devices, hash of the config, hours, and the weights of every round.

A *session* is one start of the command; an interrupted run has several, perhaps on other devices.
"""

import hashlib
import json
import platform
import subprocess
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from sso_jax.models.fingerprint import fingerprint
from sso_jax.recipes.generator import GENERATOR_FOLDER
from sso_jax.recipes.run import Params, Round, Run
from sso_jax.runtime.errors import RunError
from sso_jax.runtime.files import write_text
from sso_jax.runtime.hosts import on_first_process
from sso_jax.runtime.stage_markers import finished

RUN_FILE = "run.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers")
ROOT = Path(__file__).resolve().parents[2]
GIT_SECONDS = 10
"""Maximum time to wait for git."""


@lru_cache
def versions() -> dict[str, str | None]:
    """Returns the versions of Python, of the packages that compute, and of this project with its git commit."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*PACKAGES, "sso_jax"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "commit": git_commit(ROOT)}


def git_commit(root: Path) -> str | None:
    """Returns the commit of the repository at `root`, with `+changes` if files differ; None without a repository."""
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout.strip()


def devices() -> dict[str, Any]:
    """Returns the kind and number of the devices of all processes."""
    first = jax.devices()[0]
    counts = {"count": jax.device_count(), "processes": jax.process_count()}
    return {"kind": first.device_kind, "platform": first.platform, **counts}


def config_hash(fields: dict[str, Any], may_change: tuple[str, ...]) -> str:
    """Returns a hash of a config without the fields that a resumed run may change, such as its folder and mesh."""
    kept = {
        name: {key: part for key, part in value.items() if f"{name}.{key}" not in may_change}
        if isinstance(value, dict)
        else value
        for name, value in fields.items()
        if name not in may_change
    }
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass
class RunRecord:
    """`run.json` while the run goes on."""

    path: Path
    config_hash: str
    sessions: list[dict[str, Any]]
    weights: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def write(self) -> None:
        """Writes what is known, with the hours up to now."""
        self.sessions[-1]["hours"] = (time.perf_counter() - self.started) / 3600
        content = {
            "config_hash": self.config_hash,
            "hours": sum(session["hours"] for session in self.sessions),
            "device_hours": sum(session["hours"] * session["devices"]["count"] for session in self.sessions),
            "sessions": self.sessions,
            "weights": self.weights,
        }
        write_text(json.dumps(content, indent=2), self.path)


def open_record(directory: Path, own_hash: str) -> RunRecord:
    """Adds this session to the run's record, and writes it."""
    path = directory / RUN_FILE
    stored = on_first_process(lambda: _read(path))
    session = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "hours": 0.0}
    session |= {"versions": versions(), "devices": devices()}
    record = RunRecord(path, own_hash, [*stored.get("sessions", []), session], stored.get("weights", []))
    record.write()
    return record


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:  # damaged: only the record of earlier sessions is lost
        return {}


def check_start(run: Run, iteration: int, policy: Params) -> str:
    """Returns the fingerprint of the weights that a round starts from.

    Raises:
      RunError: if they are not those that the round before ended with.
    """
    own = fingerprint(policy)
    before = (finished(run.folder(iteration - 1), "round") or {}).get("weights") if iteration else None
    if before is not None and before["trained"] != own:
        raise RunError(
            f"iteration {iteration}: its weights have the fingerprint {own}, those that iteration {iteration - 1} "
            f"ended with {before['trained']}: a model folder or checkpoint was changed. Restore it, or delete "
            f"{run.folder(iteration)} and what it follows from, to run that again"
        )
    return own


def weights_of_round(this: Round, start: str, policy: Params) -> dict[str, str | None]:
    """Returns the fingerprints of a round's weights: at its start, those that its responses came from, at its end.

    Raises:
      RunError: if its responses came from other weights than those of its start, or of its generator, or its anchored
        y- from others than the run's first.
    """
    stats = finished(this.folder, "responses") or {}
    sampled, rejected = stats.get("weights"), stats.get("rejected_weights")
    generator = (finished(this.folder / GENERATOR_FOLDER, "training") or {}).get("weights")
    first = (finished(this.run.folder(0), "round") or {}).get("weights") or {}
    expected = {"the round's own": (sampled, start if generator is None else generator)}
    if this.run.config.sampling.anchor_rejected:
        expected["those that the run started from"] = (rejected, first.get("trained"))
    for name, (own, wanted) in expected.items():
        if None not in (own, wanted) and own != wanted:
            raise RunError(
                f"{this.folder / 'responses.jsonl'}: sampled by weights with the fingerprint {own}, not by {name}, "
                f"{wanted}; delete {this.folder} to run it again"
            )
    sampling = {"generator": generator, "sampled_with": sampled, "rejected_with": rejected}
    return {"start": start, **sampling, "trained": fingerprint(policy)}
