"""Builds the model, tokenizer and compiled functions from a config and a model folder."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from sso_jax.config import Config, LoraConfig, MeshConfig, ModelConfig, SampleConfig, SamplingConfig, TrainConfig
from sso_jax.data.chat import Chat, make_chat, stop_ids
from sso_jax.data.tokenizer import load_tokenizer
from sso_jax.models.adapters import fresh_adapters
from sso_jax.models.architecture import Architecture
from sso_jax.models.hf_config import read_architecture
from sso_jax.models.hf_folder import fetch
from sso_jax.models.hf_weights import check_weights, read_params
from sso_jax.models.kernels import default_kernel
from sso_jax.models.known_tokens import KnownTokens
from sso_jax.models.layers import Adapters
from sso_jax.models.peft_adapters import (
    ADAPTER_FOLDER,
    REWARD_ADAPTER_FOLDER,
    check_adapter,
    check_writable,
    read_adapter,
)
from sso_jax.models.peft_folder import open_adapter
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.recipes.vocabulary import known_tokens
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.jax_setup import set_matmul_precision
from sso_jax.runtime.mesh import check_divides, make_mesh, num_expert_shards, param_shardings
from sso_jax.runtime.run_dir import newest_folder
from sso_jax.sampling.decode import build_programs
from sso_jax.sampling.sampler import Sampler
from sso_jax.sampling.sampling_params import make_sampling_params
from sso_jax.training.device_steps import StepLimits
from sso_jax.training.log_probs import Score, build_score
from sso_jax.training.step_limits import step_limits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """A decoder on a mesh with its tokenizer and compiled functions; the parameters are passed to these."""

    model: Transformer
    chat: Chat
    sampler: Sampler
    score: Score
    mesh: jax.sharding.Mesh
    shardings: dict
    """Sharding of each parameter."""
    max_tokens: int
    """Maximum tokens of prompt plus response: the lesser of train.max_tokens and the model's positions."""
    step_limits: StepLimits
    """Limits of the device steps of updates and scoring."""
    source: Path
    """Folder that the model and its tokenizer were read from."""
    known_tokens: KnownTokens
    """The tokens that the model has rows for."""
    seed: int = 0
    """Seed of new adapters."""

    def abstract_params(self):
        """Returns the shapes and types of the parameters."""
        return nn.unbox(abstract_params(self.model))


def mesh_of(config: MeshConfig, devices: list | None = None, section: str = "mesh") -> jax.sharding.Mesh:
    """Builds the device mesh that a config section describes, on all devices if none are given."""
    return make_mesh(config.data, config.fsdp, config.tensor, devices, section, config.expert, config.slices)


ROUTER_LOSS = 0.001
"""Weight of the router's loss where the config has none, as in transformers."""


def router_weight(architecture: Architecture, train: TrainConfig) -> float:
    """Returns the weight of the router's loss; raises `InputError` if one is given for a model without experts."""
    given = train.router_loss
    if architecture.experts is None:
        if given is not None:
            raise InputError(f"train.router_loss: {given} for a model without experts; leave it out")
        return 0.0
    return ROUTER_LOSS if given is None else given


def _check_mesh(mesh: jax.sharding.Mesh, architecture: Architecture, section: str = "mesh") -> None:
    """Raises `InputError` if the mesh does not divide the model's matrices evenly."""
    a, expert_shards = architecture, num_expert_shards(mesh)
    if a.experts is None and expert_shards > 1:
        raise InputError(f"{section}.expert: {expert_shards} for a model without experts; set it to 1")
    sizes = {
        "heads": ("num_attention_heads", a.num_heads),
        "kv_heads": ("num_key_value_heads", a.num_kv_heads),
        "mlp": ("intermediate_size", a.mlp_dim) if a.experts is None else ("moe_intermediate_size", a.experts.mlp_dim),
        "experts": ("num_experts", 1 if a.experts is None else a.experts.num_experts),
        "vocab": ("vocab_size", a.vocab_size),
        "embed": ("hidden_size", a.embed_dim),
    }
    for logical, (name, size) in sizes.items():
        check_divides(mesh, logical, name, size, section)


def make_sampling_mesh(
    architecture: Architecture, sampling: SamplingConfig, devices: list[jax.Device] | None = None
) -> jax.sharding.Mesh | None:
    """Returns the mesh of section `sampling.mesh`, None if there is none.

    Raises:
      InputError: if its sizes do not fit the devices, or do not divide the model evenly.
    """
    own = sampling.mesh
    if own is None:
        return None
    mesh = mesh_of(own, devices, "sampling.mesh")
    _check_mesh(mesh, architecture, "sampling.mesh")
    return mesh


def build_decoder(
    architecture: Architecture, model: ModelConfig, lora: LoraConfig, mesh: jax.sharding.Mesh
) -> tuple[Transformer, dict]:
    """Builds the decoder that the config describes, and the sharding of each parameter.

    Args:
      architecture: sizes of the decoder.
      model: types, attention kernel, rematerialization.
      lora: adapters; rank 0 for none.
      mesh: device mesh.

    Raises:
      InputError: if the mesh does not divide the model evenly, or `model.frozen_bits` does not go with the adapters.
    """
    _check_frozen_bits(architecture, model, lora)
    _check_mesh(mesh, architecture)
    platform = mesh.devices.flat[0].platform
    decoder = Transformer(
        architecture,
        jnp.dtype(model.compute_dtype),
        jnp.dtype(model.param_dtype),
        remat=model.remat,
        attend=default_kernel(platform) if model.attention == "auto" else model.attention,
        adapters=Adapters(lora.rank, lora.alpha, tuple(lora.targets), lora.rslora, model.frozen_bits)
        if lora.rank
        else Adapters(),
        max_logits=model.max_logits,
    )
    return decoder, param_shardings(abstract_params(decoder), mesh)


def _check_frozen_bits(architecture: Architecture, model: ModelConfig, lora: LoraConfig) -> None:
    """Raises `InputError` if the config's `model.frozen_bits` does not go with its other fields or the model."""
    bits = model.frozen_bits
    if bits is None:
        return
    if not lora.rank:
        raise InputError(f"model.frozen_bits: {bits} is for weights under adapters; set lora.rank, or remove it")
    if architecture.experts is not None:
        raise InputError(f"model.frozen_bits: {bits} for a model with experts, which are not quantized; remove it")
    if lora.export in ("merged", "both"):
        raise InputError(
            f"lora.export: {lora.export!r} with model.frozen_bits {bits}, whose adapters belong to weights that no "
            "folder has; set it to adapter, and merge that into the base model with PEFT"
        )


def build_engine(folder: str | Path, config: Config | SampleConfig) -> Engine:
    """Builds the model, tokenizer and compiled functions from a config and a Hugging Face folder; reads no weights yet.

    Raises:
      InputError: if the folder is incomplete, or its files are inconsistent.
    """
    architecture = read_architecture(folder)
    router_weight(architecture, config.train)
    mesh = mesh_of(config.mesh)
    lora = config.lora if isinstance(config, Config) else LoraConfig()
    model, shardings = build_decoder(architecture, config.model, lora, mesh)
    set_matmul_precision(config.model.matmul_precision, config.model.compute_dtype)
    check_weights(folder, model)
    if lora.rank and lora.export in ("adapter", "both"):
        check_writable(model)
    if lora.start_from is not None:
        check_adapter(open_adapter(find_adapter(lora.start_from)), model)
    tokenizer = load_tokenizer(folder)
    stops = stop_ids(tokenizer, folder)
    chat = make_chat(tokenizer, config.chat.thinking, config.chat.thought_tokens)
    known = known_tokens(folder, chat, stops, architecture.vocab_size)
    max_tokens = min(config.train.max_tokens, architecture.max_positions)
    sampler = build_sampler(model, mesh, config.sampling, stops, max_tokens)
    limits = step_limits(model, shardings, mesh, config.train.tokens_per_step)
    return Engine(
        model,
        chat,
        replace(sampler, known_tokens=known),
        build_score(model, mesh, shardings),
        mesh,
        shardings,
        max_tokens,
        limits._replace(known_tokens=known),
        Path(folder),
        known,
        config.run.seed,
    )


def build_sampler(
    model: Transformer, mesh: jax.sharding.Mesh, sampling: SamplingConfig, stops: tuple[int, ...], max_tokens: int
) -> Sampler:
    """Builds the compiled sampler of section `sampling`, on its own mesh if the section has one."""
    own = make_sampling_mesh(model.architecture, sampling)
    sampling_mesh = mesh if own is None else own
    shardings = param_shardings(abstract_params(model), sampling_mesh)
    return Sampler(
        programs=build_programs(model, sampling_mesh),
        mesh=sampling_mesh,
        strategy=make_sampling_params(sampling.temperature, sampling.top_p, sampling.top_k),
        stop_ids=stops,
        max_new_tokens=sampling.max_new_tokens,
        max_tokens=max_tokens,
        num_slots=sampling.batch_size,
        shardings=None if own is None else shardings,
        layers=sampling.layers,
    )


def find_adapter(path: str) -> Path:
    """Returns the folder of adapters that `lora.start_from` means: a folder, the newest of a run, or from the hub."""
    found = newest_folder(path, ADAPTER_FOLDER)
    return fetch(newest_folder(path, REWARD_ADAPTER_FOLDER) if found == path else found, "lora.start_from")


def with_start_adapter(lora: LoraConfig, recipe: str) -> LoraConfig:
    """Returns the section with rank, alpha, targets and rslora of the adapters that the run starts from, if any.

    Raises:
      InputError: if these are not supported, the section gives another value, or they are a reward model's and the
        recipe trains none.
    """
    if lora.start_from is None:
        return lora
    adapter, default = open_adapter(find_adapter(lora.start_from)), LoraConfig()
    if adapter.has_head and recipe != "reward":
        raise InputError(
            f"lora.start_from: {lora.start_from!r} has the adapters and the head of a reward model, which recipe "
            f"{recipe!r} does not train; give the adapters of a policy (task_type CAUSAL_LM), or set recipe to reward"
        )
    own = {name: value for name, value in adapter.adapters._asdict().items() if name != "frozen_bits"}
    for name, value in own.items():
        given, known = getattr(lora, name), getattr(default, name)
        same = set(given) == set(value) if name == "targets" else given == value
        if given != known and not same:
            raise InputError(
                f"lora.{name}: {given!r}, but the adapters of lora.start_from {lora.start_from!r} have {value!r}; "
                "remove it, since it is read from them"
            )
    return replace(lora, **own)


def load_params(folder: str | Path, engine: Engine, adapter: str | Path | None = None):
    """Loads the parameters of a folder onto the engine's mesh.

    If the engine has adapters, they are those of the folder `adapter` in PEFT's format, or new ones.
    """
    return with_adapters(read_params(folder, engine.model, engine.mesh), engine, adapter)


def with_adapters(params, engine: Engine, adapter: str | Path | None = None):
    """Returns the parameters with the engine's adapters in place of their own; see `load_params`."""
    if adapter is None:
        own = fresh_adapters(engine.model, engine.mesh, engine.seed)
    else:
        own = read_adapter(adapter, engine.model, engine.mesh)
    return unflatten_dict({**flatten_dict(params, sep="/"), **own}, sep="/")
