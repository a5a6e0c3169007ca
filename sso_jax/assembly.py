"""A config and a model folder in, what a run works with out: decoder, tokenizer, compiled functions, objective, and folders written."""

import dataclasses
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import PreTrainedTokenizerBase

from sso_jax.config import Config, EvaluateConfig, LoraConfig, ModelConfig, ObjectiveConfig, SampleConfig
from sso_jax.errors import InputError
from sso_jax.hosts import is_first
from sso_jax.mesh import check_divides, make_mesh, param_shardings
from sso_jax.models.adapters import fresh_adapters
from sso_jax.models.architecture import Architecture
from sso_jax.models.attend import fastest
from sso_jax.models.hf_config import CONFIG_FILE, GENERATION_FILE, read_architecture, to_hf_config
from sso_jax.models.hf_weights import check_weights, read_params, write_params
from sso_jax.models.layers import Adapters
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.records import files_below, is_remote
from sso_jax.sampling.decode import build_generate
from sso_jax.sampling.sampler import Sampler
from sso_jax.sampling.strategies import make_strategy
from sso_jax.tokens.chat import Chat, make_chat
from sso_jax.tokens.tokenizer import load_tokenizer, stop_ids
from sso_jax.training.log_probs import Score, build_score
from sso_jax.training.losses import BASE_LOSSES, base_loss, check_name
from sso_jax.training.objectives import (
    BaseLoss,
    PlainLoss,
    SteeringScale,
    Terms,
    generator_objective,
    online_objective,
    pairwise_objective,
)
from sso_jax.training.plain_losses import PLAIN_LOSSES, plain_loss
from sso_jax.training.update import cells_of

POLICY_FOLDER = "policy"
LOSS_SETTINGS = ("beta", "label_smoothing", "tau", "eta", "margin", "alpha", "rho", "t_min", "t_max", "clip", "degree_weight")
"""Config fields that are settings of a base loss."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """A decoder on a mesh with its tokenizer and its compiled functions; the parameters are passed to them."""

    model: Transformer
    chat: Chat
    sampler: Sampler
    score: Score
    mesh: jax.sharding.Mesh
    shardings: dict
    """Sharding of each parameter."""
    max_tokens: int
    """Limit of prompt plus response: train.max_tokens or the model's positions, whichever is less."""
    seed: int = 0
    """Of fresh adapters."""

    def abstract_params(self):
        """Shapes and types of the parameters."""
        return nn.unbox(abstract_params(self.model))


@dataclass(frozen=True)
class Objective:
    """What a round of training minimises."""

    cells: list[tuple[str, str]]
    """The (context, response) log-probs that it needs."""
    terms: Callable[..., Terms]
    beta: float
    degree_weight: float | None = None
    """gamma of base `spo`, where the cross-entropy of its degree head is added."""
    degree_removal: str = "keywords"


ONLINE_FIELDS = ("steering_weight", "weight_alpha", "use_weight", "use_steering", "detach_weight")
STEERING_FIELDS = ("positive_weight", "negative_weight", "negative_winner")
USED_FIELDS = {"pairwise": (), "generator": STEERING_FIELDS, "online": ONLINE_FIELDS + STEERING_FIELDS}
"""Config fields that a form uses, of those that belong to forms."""


@lru_cache  # so that what is not used is named once, and not each round
def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that the config describes; settings that its form does not use are named in the log.

    Raises:
      InputError: for an unknown base, a setting that the base does not use, or form "generator" with both of its weights 0.
    """
    base, plain, settings, more = _choose_losses(config)
    scale, form = SteeringScale(config.positive_weight, config.negative_weight), config.form
    sft_weight = config.sft_weight if config.sft_weight is not None else 0.1 if form == "generator" else 0.0
    if form == "generator" and not any(scale):
        raise InputError(
            "objective.positive_weight, objective.negative_weight: both are 0, which leaves form 'generator' nothing; raise one"
        )
    _name_unused(config, plain)
    if form == "pairwise":
        terms = partial(pairwise_objective, base=base, plain=plain, sft_weight=sft_weight)
    elif form == "generator":
        terms = partial(generator_objective, base=base, scale=scale, sft_weight=sft_weight)
    else:
        own = {name: getattr(config, name) for name in ONLINE_FIELDS}
        terms = partial(online_objective, base=base, plain=plain, scale=scale, sft_weight=sft_weight, **own)
    cells = cells_of(form, config.use_steering and any(scale), scale, config.negative_winner, more)
    degree_weight = settings.get("degree_weight") if form != "generator" else None
    return Objective(cells, terms, settings.get("beta", 1.0), degree_weight, config.degree_removal)


def _choose_losses(config: ObjectiveConfig) -> tuple[BaseLoss, PlainLoss | None, dict[str, float], tuple[tuple[str, str], ...]]:
    """The pairwise loss, the loss of the plain prompt where it is another, the settings in force, and the cells that it needs beside."""
    given = {name: getattr(config, name) for name in LOSS_SETTINGS}
    check_name(config.base, [*BASE_LOSSES, *PLAIN_LOSSES])
    if config.degree_removal != "keywords" and config.base != "spo":
        raise InputError(f"objective.degree_removal: {config.degree_removal!r} is not used by base {config.base!r}; remove it")
    if config.base not in PLAIN_LOSSES:
        base, settings = base_loss(config.base, given)
        return base, None, settings, ()
    plain, settings = plain_loss(config.base, given)
    return base_loss("dpo", {"beta": settings["beta"]})[0], plain, settings, PLAIN_LOSSES[config.base].cells


def with_original(objective: Objective) -> Objective:
    """The objective with the log-prob of y_o under x beside those of the plain pair: it is logged, and no part of the loss."""
    rejected, original = ("plain", "rejected"), ("plain", "original")
    if rejected not in objective.cells or original in objective.cells:
        return objective
    at = objective.cells.index(rejected) + 1
    return dataclasses.replace(objective, cells=[*objective.cells[:at], original, *objective.cells[at:]])


def _name_unused(config: ObjectiveConfig, plain: PlainLoss | None) -> None:
    default, used = ObjectiveConfig(), USED_FIELDS[config.form]
    unused = [name for name in USED_FIELDS["online"] if name not in used and getattr(config, name) != getattr(default, name)]
    if unused:
        log.warning("form %r does not use %s", config.form, ", ".join(f"objective.{name}" for name in unused))
    if plain is not None and config.form == "generator":
        log.warning("form 'generator' has no plain pair, on which base %r acts; its steering terms are dpo", config.base)


def _check_mesh(mesh: jax.sharding.Mesh, architecture: Architecture) -> None:
    """Raises `InputError` if the mesh cannot cut the model's matrices evenly."""
    a = architecture
    check_divides(mesh, "heads", "num_attention_heads", a.num_heads)
    check_divides(mesh, "kv_heads", "num_key_value_heads", a.num_kv_heads)
    check_divides(mesh, "hidden", "intermediate_size", a.hidden)
    check_divides(mesh, "vocab", "vocab_size", a.vocab_size)
    check_divides(mesh, "width", "hidden_size", a.width)


def build_decoder(
    architecture: Architecture, config: Config | SampleConfig | EvaluateConfig, mesh: jax.sharding.Mesh
) -> tuple[Transformer, dict]:
    """Decoder with the types, the attention and the adapters that the config asks for, and the sharding of each parameter.

    Raises:
      InputError: if the mesh cannot cut the model evenly.
    """
    _check_mesh(mesh, architecture)
    model, lora = config.model, config.lora if isinstance(config, Config) else LoraConfig()
    attend = fastest(mesh.devices.flat[0].platform) if model.attention == "auto" else model.attention
    adapters = Adapters(lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else Adapters()
    types = jnp.dtype(model.compute_dtype), jnp.dtype(model.param_dtype)
    settings = {"remat": model.remat, "attend": attend, "adapters": adapters, "max_logits": model.max_logits, "laid": model.layers}
    decoder = Transformer(architecture, *types, **settings)
    return decoder, param_shardings(abstract_params(decoder), mesh)


def set_precision(config: ModelConfig) -> None:
    """Tells JAX how exact matrix products are: float32 ones are, unless the config says otherwise.

    A TPU multiplies float32 in one bfloat16 pass by default, and a recent NVIDIA GPU in TF32: wrong in the third digit.
    """
    precision = config.matmul_precision or ("highest" if config.compute_dtype == "float32" else None)
    jax.config.update("jax_default_matmul_precision", precision)


def build_engine(folder: str | Path, config: Config | SampleConfig) -> Engine:
    """Everything that the chain runs on, from a Hugging Face folder and a `Config` or `SampleConfig`; no weights are read yet.

    Raises:
      InputError: for a folder that is incomplete or does not fit together.
    """
    architecture = read_architecture(folder)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    model, shardings = build_decoder(architecture, config, mesh)
    set_precision(config.model)
    check_weights(folder, model)
    tokenizer = load_tokenizer(folder)
    highest = max(tokenizer.get_vocab().values())
    if highest >= architecture.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {highest}, config.json a vocab_size of {architecture.vocab_size}; they do not belong "
            "together"
        )
    max_tokens = min(config.train.max_tokens, architecture.max_positions)
    own = config.sampling.mesh
    sampling_mesh = mesh if own is None else make_mesh(own.data, own.fsdp, own.tensor)
    _check_mesh(sampling_mesh, architecture)
    sampling_shardings = param_shardings(abstract_params(model), sampling_mesh)
    sampler = Sampler(
        generate=build_generate(model, sampling_mesh, sampling_shardings),
        mesh=sampling_mesh,
        strategy=make_strategy(config.sampling.temperature, config.sampling.top_p, config.sampling.top_k),
        stop_ids=stop_ids(tokenizer, folder),
        max_new_tokens=config.sampling.max_new_tokens,
        max_tokens=max_tokens,
        batch_size=config.sampling.batch_size,
        shardings=None if own is None else sampling_shardings,
    )
    score = build_score(model, mesh, shardings)
    return Engine(model, make_chat(tokenizer), sampler, score, mesh, shardings, max_tokens, config.run.seed)


def load_params(folder: str | Path, engine: Engine):
    """Parameters of a folder, placed on the engine's mesh, with fresh adapters where the engine has any."""
    params = flatten_dict(read_params(folder, engine.model, engine.mesh), sep="/")
    return unflatten_dict({**params, **fresh_adapters(engine.model, engine.mesh, engine.seed)}, sep="/")


def export_policy(
    params,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    stops: tuple[int, ...],
    folder: Path,
    dtype: str,
    adapters: Adapters = Adapters(),
) -> None:
    """Writes a complete Hugging Face folder, whole or not at all: config, generation config, tokenizer, safetensors with index."""
    config = to_hf_config(architecture, dtype, tokenizer.bos_token_id, tokenizer.eos_token_id)
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": list(stops) if len(stops) > 1 else stops[0]}
    with whole_folder(folder) as partial_folder:
        for name, fields in ((CONFIG_FILE, config), (GENERATION_FILE, generation)):
            (partial_folder / name).write_text(json.dumps(fields, indent=2), encoding="utf-8")
        tokenizer.save_pretrained(partial_folder)
        write_params(params, architecture, partial_folder, dtype, adapters)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` once the `with` is left without an error.

    In an object store, which renames nothing in one step, its files are copied there one by one. Of several processes only the first
    one's folder is kept.
    """
    if is_first() and not is_remote(folder):
        partial_folder = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        yield partial_folder
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)
        return
    with tempfile.TemporaryDirectory() as local:
        yield Path(local)
        for name in files_below(local) if is_first() else ():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((Path(local) / name).read_bytes())


def find_policy(path: str) -> str:
    """`path` itself, or the newest exported policy where `path` is a run directory."""
    return newest_folder(path, POLICY_FOLDER)


def newest_folder(path: str, name: str) -> str:
    """`path` itself, or where it is a run directory the folder of this name in its newest round that has one."""
    found = sorted(epath.Path(path).glob(f"iteration_*/{name}"), key=lambda p: int(p.parent.name.split("_")[1]))
    return str(found[-1]) if found else path


def prepare_jax(compilation_cache: str = "") -> None:
    """What holds for a whole process, told to JAX before anything asks it for a device.

    A CPU computes in the thread that calls. In one of JAX's own a call's results are there before its working memory is free, and the
    next call takes as much again. Compiled programs are kept in the folder between runs; an empty name keeps none.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(compilation_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
