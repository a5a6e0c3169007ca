"""Reward models: reads them from a folder, builds them from a policy, and scores pairs."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import jax
import jax.numpy as jnp

from sso_jax.config import LoraConfig, ModelConfig
from sso_jax.data.chat import Chat, end_of_turn, make_chat
from sso_jax.data.records import Triple
from sso_jax.data.tokenizer import encode_text, load_tokenizer, tokens_hash
from sso_jax.models.export import REWARD_FOLDER, newest_whole
from sso_jax.models.hf_config import CONFIG_FILE as MODEL_CONFIG
from sso_jax.models.hf_config import check_reward_folder, read_architecture
from sso_jax.models.hf_folder import fetch
from sso_jax.models.hf_weights import check_weights, read_params
from sso_jax.models.known_tokens import KnownTokens
from sso_jax.models.peft_adapters import REWARD_ADAPTER_FOLDER
from sso_jax.models.peft_folder import CONFIG_FILE as ADAPTER_CONFIG
from sso_jax.models.reward_head import RewardModel, reward_model
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.recipes.engine import Engine, build_decoder, with_adapters
from sso_jax.recipes.vocabulary import known_tokens
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.jax_setup import set_matmul_precision
from sso_jax.runtime.mesh import param_shardings
from sso_jax.training.rewards import TokenizedPair, build_reward_fn, compute_rewards

TOKENS_AT_ONCE = 8192
"""Tokens of a batch that is only scored."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardScorer:
    """A reward model on a mesh with its compiled reward function."""

    model: RewardModel
    params: dict
    chat: Chat
    reward_fn: Callable
    mesh: jax.sharding.Mesh
    known_tokens: KnownTokens

    def rewards(self, pairs: list[TokenizedPair], stage: str, may_stop: bool = True) -> list[tuple[float, float]]:
        """Returns the rewards of the chosen and the rejected response of every pair, read at their ends of turn.

        See `compute_rewards` for `stage` and `may_stop`.
        """
        for ids in chain.from_iterable(pairs):
            self.known_tokens.require(ids, f"{stage}: a pair")
        limit = self.model.architecture.max_positions
        too_long = sum(pair.longest() > limit for pair in pairs)
        if too_long:
            log.warning(
                "%s: %d of %d pairs are longer than the model's %d positions", stage, too_long, len(pairs), limit
            )
        return compute_rewards(self.reward_fn, self.mesh, self.params, pairs, TOKENS_AT_ONCE, stage, may_stop)


def tokenize_pair(chat: Chat, triple: Triple, prompt: list[int] | None = None) -> TokenizedPair:
    """Returns a pair and its plain prompt as token ids; each response ends with an end of turn.

    Uses the sampled ids if they are from this tokenizer; otherwise encodes the texts.

    Args:
      chat: chat template and tokenizer.
      triple: the pair.
      prompt: ids of the plain prompt, if already known.
    """
    ids, end = triple.response_ids or {}, end_of_turn(chat.tokenizer)
    own = triple.tokens_hash == tokens_hash(chat.tokenizer)

    def response(name: str) -> list[int]:
        tokens = ids[name] if own and ids.get(name) else encode_text(chat.tokenizer, getattr(triple, name))
        return tokens if tokens and tokens[-1] == end else [*tokens, end]

    prompt = chat.prompt_ids(triple.query, history=triple.history) if prompt is None else prompt
    return TokenizedPair(prompt, response("chosen"), response("rejected"))


def find_reward_model(path: str, field: str = "model.path") -> Path:
    """Returns the folder of a reward model: `path` itself, the newest one of a run directory, or a copy from the hub.

    Args:
      path: folder, run directory or hub id.
      field: config field of the path, which errors name.

    Raises:
      InputError: if there is no such folder, it has no reward model with one label, or there are adapters alone.
    """
    folder = fetch(newest_whole(path, REWARD_FOLDER, REWARD_ADAPTER_FOLDER), field)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / MODEL_CONFIG).is_file():
        raise InputError(
            f"{field}: {path} has adapters alone, and no weights; merge them with PEFT's merge_and_unload and give "
            "that folder, or continue from them in recipe reward with lora.start_from"
        )
    check_reward_folder(folder)
    return folder


def check_reward_model(path: str, field: str, config: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises what `open_reward_scorer` would, except for values that are not finite; reads no weights."""
    folder = find_reward_model(path, field)
    _build(folder, config, mesh)
    make_chat(load_tokenizer(folder))


def _build(folder: Path, config: ModelConfig, mesh: jax.sharding.Mesh) -> RewardModel:
    """Builds the model of a folder, whose weights must belong to it."""
    plain = dataclasses.replace(config, frozen_bits=None)  # a field of the policy, whose adapters alone are trained
    decoder, _ = build_decoder(read_architecture(folder), plain, LoraConfig(), mesh)
    model = as_reward_model(decoder)
    check_weights(folder, model)
    return model


def open_reward_scorer(path: str, config: ModelConfig, mesh: jax.sharding.Mesh, thinking: str = "auto") -> RewardScorer:
    """Loads the reward model of a folder onto a mesh, with the types of `config`.

    Args:
      path: folder, run directory or hub id.
      config: types and attention kernel.
      mesh: device mesh.
      thinking: see `make_chat`.

    Raises:
      InputError: if the folder is not a reward model, is incomplete, or its files are inconsistent.
    """
    folder = find_reward_model(path)
    model = _build(folder, config, mesh)
    set_matmul_precision(config.matmul_precision, config.compute_dtype)
    shardings = param_shardings(abstract_params(model), mesh)
    chat = make_chat(load_tokenizer(folder), thinking)
    known = known_tokens(folder, chat, (end_of_turn(chat.tokenizer),), model.architecture.vocab_size)
    reward_fn = build_reward_fn(model, mesh, shardings)
    return RewardScorer(model, read_params(folder, model, mesh), chat, reward_fn, mesh, known)


def as_reward_model(decoder: Transformer) -> RewardModel:
    """Returns a reward model on a decoder, with the same types and options."""
    taken = ("architecture", "parent", "name")
    names = [field.name for field in dataclasses.fields(decoder) if field.name not in taken]
    return reward_model(decoder.architecture, **{name: getattr(decoder, name) for name in names})


def reward_engine(engine: Engine) -> Engine:
    """Returns the engine with a reward model on its decoder; its sampler and scoring remain the policy's."""
    model = as_reward_model(engine.model)
    return dataclasses.replace(engine, model=model, shardings=param_shardings(abstract_params(model), engine.mesh))


def reward_params(params: dict, engine: Engine, adapter: Path | None = None) -> dict:
    """Converts a policy's parameters, without a copy: removes its head and adds a row of zeros for the rewards.

    Args:
      params: the policy's parameters.
      engine: the engine of the reward model.
      adapter: folder of a reward model's adapters, which take the place of the policy's, and its row that of zeros.
    """
    score = engine.abstract_params()["score"]
    zeros = jax.device_put(jnp.zeros(score.shape, score.dtype), engine.shardings["score"])
    reward = {**{name: value for name, value in params.items() if name != "head"}, "score": zeros}
    return reward if adapter is None else with_adapters(reward, engine, adapter)


def accuracy_of(rewards: list[tuple[float, float]]) -> float:
    """Returns the share of pairs whose chosen response has the higher reward, ties as half."""
    return sum((a > b) + 0.5 * (a == b) for a, b in rewards) / len(rewards)
