"""Policies on disk: the one that a round starts from, those of earlier rounds, and the export of this round's."""

from pathlib import Path

from sso_jax.config import Config
from sso_jax.models.export import POLICY_FOLDER, export_policy, find_policy
from sso_jax.models.hf_folder import fetch
from sso_jax.recipes.engine import load_params
from sso_jax.recipes.run import Params, Round, Run
from sso_jax.recipes.stages.update import restore_params
from sso_jax.runtime.stage_markers import file_stage


def source_folder(config: Config) -> Path:
    """Returns the folder of the model that the run starts from; the toy has none, because the run trains it."""
    return fetch(find_policy(config.model.path))


def start_policy(run: Run, iteration: int) -> Params:
    """Loads the policy at the start of a round: from the model folder, or the previous round's last checkpoint."""

    def first() -> Params:
        toy = run.config.model.path == "toy"
        return load_params(run.folder(0) / "start" if toy else source_folder(run.config), run.engine)

    if iteration <= 1:
        return first()
    return restore_params(run.engine, run.config, run.folder(iteration - 1), first)


def exported_policy(run: Run, iteration: int) -> Params:
    """Loads the policy that a finished round exported; for round 0 the one that the run started from."""
    if iteration == 0:
        return start_policy(run, 0)
    return load_params(run.folder(iteration) / POLICY_FOLDER, run.engine)


def export(this: Round, policy: Params) -> float:
    """Writes the policy of the round as a Hugging Face folder; returns the seconds this took."""
    engine = this.run.engine

    def write() -> dict:
        export_policy(
            policy,
            engine.model.architecture,
            engine.chat.tokenizer,
            engine.sampler.stop_ids,
            this.folder / POLICY_FOLDER,
            this.run.config.model.export_dtype,
            engine.model.adapters,
            engine.source,
        )
        return {}

    return file_stage(this.folder, "export", write, POLICY_FOLDER)["seconds"]
