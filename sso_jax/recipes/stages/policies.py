"""Policies on disk: the one that a round starts from, those of earlier rounds, and the export of this round's."""

from pathlib import Path

from sso_jax.config import Config
from sso_jax.models.export import POLICY_FOLDER, export_policy, find_policy
from sso_jax.models.families import TEXT_MODELS
from sso_jax.models.hf_config import CONFIG_FILE, read_json_file
from sso_jax.models.hf_folder import fetch
from sso_jax.models.peft_adapters import ADAPTER_FOLDER, BaseModel, is_writable, write_adapter
from sso_jax.models.peft_folder import open_adapter
from sso_jax.models.transformer import Transformer
from sso_jax.recipes.engine import Engine, find_adapter, load_params, with_adapters
from sso_jax.recipes.run import Params, Round, Run
from sso_jax.recipes.stages.update import restore_params
from sso_jax.runtime.files import is_remote
from sso_jax.runtime.stage_markers import file_stage


def source_folder(config: Config) -> Path:
    """Returns the folder of the model that the run starts from; the toy has none, because the run trains it."""
    return fetch(find_policy(config.model.path))


def start_policy(run: Run, iteration: int) -> Params:
    """Loads the policy at the start of a round: from the model folder, or the previous round's last checkpoint."""

    def first() -> Params:
        return load_params(run.engine.source, run.engine, start_adapter(run))

    if iteration <= 1:
        return first()
    return restore_params(run.engine, run.config, run.folder(iteration - 1), first)


def start_adapter(run: Run, of_reward: bool = False) -> Path | None:
    """Returns the folder of the adapters that the policy starts from, or the reward model; None for new ones.

    A reward model also continues a policy's adapters. A policy that samples for one does not get the reward model's.
    """
    start = run.config.lora.start_from
    if start is None:
        return None
    folder = find_adapter(start)
    return folder if open_adapter(folder).has_head == of_reward else None


def first_policy(run: Run, policy: Params) -> Params:
    """Returns the policy that the run started from; it shares the frozen weights of `policy` where adapters train."""
    if not run.config.lora.rank:
        return start_policy(run, 1)
    return with_adapters(policy, run.engine, start_adapter(run))


def exported_policy(run: Run, iteration: int) -> Params:
    """Loads the policy that a finished round exported; for round 0 the one that the run started from."""
    if iteration == 0:
        return start_policy(run, 0)
    if leaves_merged(run.config):
        return load_params(run.folder(iteration) / POLICY_FOLDER, run.engine)
    return load_params(run.engine.source, run.engine, run.folder(iteration) / ADAPTER_FOLDER)


def leaves_merged(config: Config) -> bool:
    """Returns whether rounds leave whole weights, `policy/` or `reward_model/`."""
    return not config.lora.rank or (config.lora.export != "adapter" and config.model.frozen_bits is None)


def leaves_adapter(config: Config, model: Transformer) -> bool:
    """Returns whether rounds leave `policy_adapter/` or `reward_model_adapter/`."""
    wanted = is_writable(model) if config.lora.export is None else config.lora.export != "merged"
    return bool(config.lora.rank) and wanted


def base_model(config: Config, source: Path) -> BaseModel:
    """Returns the name under which others find the model that adapters belong to.

    Args:
      config: the run's config.
      source: folder that the model was read from; for a hub id a snapshot, whose name is the revision.
    """
    has_images = read_json_file(source / CONFIG_FILE).get("model_type") in TEXT_MODELS
    if source.parent.name == "snapshots" and not Path(config.model.path).exists():
        return BaseModel(config.model.path, source.name, has_images)
    return BaseModel(config.model.path if is_remote(config.model.path) else str(source.absolute()), None, has_images)


def export(this: Round, policy: Params) -> float:
    """Writes the policy of the round as a Hugging Face folder, and its adapters in PEFT's format.

    Section `lora` says which of both, if there are adapters. Returns the seconds this took.
    """
    seconds = export_adapter(this, policy, this.run.engine, ADAPTER_FOLDER)
    return seconds + _export_merged(this, policy) if leaves_merged(this.run.config) else seconds


def export_adapter(this: Round, params: Params, engine: Engine, name: str) -> float:
    """Writes the adapters of a policy or reward model in PEFT's format if rounds leave them; returns the seconds."""
    config = this.run.config
    if not leaves_adapter(config, engine.model):
        return 0.0

    def write() -> dict:
        base = base_model(config, engine.source)
        write_adapter(params, engine.model.architecture, engine.model.adapters, this.folder / name, base)
        return {}

    return file_stage(this.folder, "export_adapter", write, name)["seconds"]


def _export_merged(this: Round, policy: Params) -> float:
    """Writes the policy of the round, with its adapters merged; returns the seconds this took."""

    def write() -> dict:
        _write_merged(this.run, policy, this.folder / POLICY_FOLDER)
        return {}

    return file_stage(this.folder, "export", write, POLICY_FOLDER)["seconds"]


def _write_merged(run: Run, policy: Params, folder: Path) -> None:
    engine = run.engine
    export_policy(
        policy,
        engine.model.architecture,
        engine.chat.tokenizer,
        engine.sampler.stop_ids,
        folder,
        run.config.model.export_dtype,
        engine.model.adapters,
        engine.source,
    )


def served_policy(this: Round, policy: Params, trained: bool, spare: Path) -> Path:
    """Returns a Hugging Face folder with the policy that samples in a round, for a server.

    That is the folder that the run started from, or what the round before has exported. If neither has these weights
    (a generator, or adapters that are nowhere merged), they are written to `spare`.

    Args:
      this: the round, or the part of it that trains a generator.
      policy: parameters of the policy that samples.
      trained: whether this round has trained them, as it does a generator's.
      spare: folder to write where no other has the weights.
    """
    run, before = this.run, this.iteration - 1
    if not trained and before == 0 and run.config.lora.start_from is None:
        return run.engine.source.absolute()
    if not trained and before > 0 and leaves_merged(run.config):
        return (run.folder(before) / POLICY_FOLDER).absolute()
    _write_merged(run, policy, spare)
    return spare
