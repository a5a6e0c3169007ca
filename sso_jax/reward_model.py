"""A reward model's folder in, rewards of pairs out; and a trained reward model in, its Hugging Face folder out."""

import copy
import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from sso_jax.assembly import Engine, build_decoder, newest_folder, set_precision, whole_folder
from sso_jax.config import EvaluateConfig, ModelConfig
from sso_jax.mesh import param_shardings
from sso_jax.models.architecture import Architecture
from sso_jax.models.hf_config import CONFIG_FILE, check_reward_folder, fetch, read_architecture, to_hf_reward_config
from sso_jax.models.hf_weights import check_weights, read_params, write_params
from sso_jax.models.reward import RewardModel, reward_model
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.records import Dropped, Triple
from sso_jax.tokens.chat import Chat, make_chat
from sso_jax.tokens.tokenizer import encode_text, load_tokenizer, tokens_hash
from sso_jax.training.rewards import Rated, build_rate, rate_pairs

REWARD_FOLDER = "reward_model"
TOKENS_AT_ONCE = 8192
"""Tokens of a batch that is only rated."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rater:
    """A reward model on a mesh, ready to rate."""

    model: RewardModel
    params: dict
    chat: Chat
    rate: Callable
    mesh: jax.sharding.Mesh

    def rewards(self, triples: list[Triple], stage: str) -> list[tuple[float, float]]:
        """Rewards of the chosen and the rejected response of every pair, read at their ends of turn."""
        pairs = [rated(self.chat, triple) for triple in triples]
        longest = max(map(_longest_text, pairs), default=0)
        if longest > self.model.architecture.max_positions:
            beyond = sum(_longest_text(pair) > self.model.architecture.max_positions for pair in pairs)
            positions = self.model.architecture.max_positions
            log.warning("%s: %d of %d pairs are longer than the model's %d positions", stage, beyond, len(pairs), positions)
        return rate_pairs(self.rate, self.mesh, self.params, pairs, TOKENS_AT_ONCE, stage)


def _longest_text(pair: Rated) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def rated(chat: Chat, triple: Triple) -> Rated:
    """Token ids of a pair under its plain prompt: sampled ids where they are this tokenizer's, each with an end of turn at its end."""
    ids, end = triple.response_ids or {}, chat.tokenizer.eos_token_id
    own = triple.tokens_hash == tokens_hash(chat.tokenizer)

    def response(name: str) -> list[int]:
        tokens = ids[name] if own and ids.get(name) else encode_text(chat.tokenizer, getattr(triple, name))
        return tokens if tokens and tokens[-1] == end else [*tokens, end]

    prompt = chat.prompt_ids(triple.query, history=triple.history)
    return Rated(prompt, response("chosen"), response("rejected"))


def find_reward_model(path: str, field: str = "model.path") -> Path:
    """Folder of a reward model: `path` itself, the newest one of a run directory, or the hub's; errors name the config's `field`.

    Raises:
      InputError: if there is none, or what is there is no reward model with one label.
    """
    folder = fetch(newest_folder(path, REWARD_FOLDER), field)
    check_reward_folder(folder)
    return folder


def open_rater(path: str, config: ModelConfig, mesh: jax.sharding.Mesh) -> Rater:
    """The reward model of a folder on a mesh, with the types of `config`.

    Raises:
      InputError: for a folder that is no reward model, is incomplete or does not fit together.
    """
    folder = find_reward_model(path)
    decoder, _ = build_decoder(read_architecture(folder), EvaluateConfig(model=config), mesh)
    model = as_reward_model(decoder)
    set_precision(config)
    check_weights(folder, model)
    shardings = param_shardings(abstract_params(model), mesh)
    chat = make_chat(load_tokenizer(folder))
    return Rater(model, read_params(folder, model, mesh), chat, build_rate(model, mesh, shardings), mesh)


def as_reward_model(decoder: Transformer) -> RewardModel:
    """Reward model on a decoder, with the same types and options."""
    taken = ("architecture", "parent", "name")
    options = {field.name: getattr(decoder, field.name) for field in dataclasses.fields(decoder) if field.name not in taken}
    return reward_model(decoder.architecture, **options)


def reward_engine(engine: Engine) -> Engine:
    """The engine with a reward model on its decoder; what samples and scores is the policy's still."""
    model = as_reward_model(engine.model)
    return dataclasses.replace(engine, model=model, shardings=param_shardings(abstract_params(model), engine.mesh))


def reward_params(params: dict, engine: Engine) -> dict:
    """A policy's parameters, taken over, without its head and with a row of zeros for the rewards."""
    score = engine.abstract_params()["score"]
    zeros = jax.device_put(jnp.zeros(score.shape, score.dtype), engine.shardings["score"])
    return {**{name: value for name, value in params.items() if name != "head"}, "score": zeros}


def padding_for_rewards(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer whose padding is not its end of turn: transformers reads a reward at the last token that is not padding.

    Where the padding is the end of turn or missing, another special token takes its place, or else the token of id 0 or 1.
    """
    tokenizer = copy.deepcopy(tokenizer)
    end = tokenizer.eos_token_id
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == end:
        special = sorted(set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special})
        others = [i for i in special if i != end] or [int(end == 0)]
        preferred = next((i for i in others if "pad" in tokenizer.convert_ids_to_tokens(i).lower()), others[0])
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(preferred)
    return tokenizer


def export_reward_model(params, architecture: Architecture, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> None:
    """Writes a complete folder for `AutoModelForSequenceClassification`, whole or not at all."""
    tokenizer = padding_for_rewards(tokenizer)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    with whole_folder(folder) as partial_folder:
        config = to_hf_reward_config(architecture, dtype, *ids)
        (partial_folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
        tokenizer.save_pretrained(partial_folder)
        write_params(params, architecture, partial_folder, dtype)


def accuracy_of(rewards: list[tuple[float, float]]) -> float:
    """Share of pairs whose chosen response has the higher reward, ties as half."""
    return sum((a > b) + 0.5 * (a == b) for a, b in rewards) / len(rewards)


def with_rewards(triples: list[Triple], rewards: list[tuple[float, float]]) -> list[Triple]:
    """Triples scored by their rewards."""
    return [dataclasses.replace(t, scores={"chosen": a, "rejected": b}) for t, (a, b) in zip(triples, rewards, strict=True)]


def keep_widest(triples: list[Triple], share: float) -> tuple[list[Triple], Dropped]:
    """The share of the scored triples whose chosen response leads by most, at least one, in their order; the rest is dropped."""
    lead = [triple.scores["chosen"] - triple.scores["rejected"] for triple in triples]
    best = set(sorted(range(len(triples)), key=lambda i: (-lead[i], i))[: max(1, round(share * len(triples)))])
    kept = [triple for i, triple in enumerate(triples) if i in best]
    return kept, {triple.id: "reward_rank" for i, triple in enumerate(triples) if i not in best}
