"""Writes policies and reward models as complete Hugging Face folders."""

import copy
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sso_jax.models.architecture import Architecture
from sso_jax.models.hf_config import CONFIG_FILE, GENERATION_FILE, to_hf_config, to_hf_reward_config
from sso_jax.models.hf_weights import write_params
from sso_jax.models.layers import Adapters
from sso_jax.runtime.files import replace_folder
from sso_jax.runtime.run_dir import newest_folder

POLICY_FOLDER = "policy"


def export_policy(
    params,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    stops: tuple[int, ...],
    folder: Path,
    dtype: str,
    adapters: Adapters = Adapters(),
) -> None:
    """Writes a policy as a complete Hugging Face folder, atomically.

    The folder has config.json, generation_config.json, the tokenizer, and safetensors with an index.
    """
    config = to_hf_config(architecture, dtype, tokenizer.bos_token_id, tokenizer.eos_token_id)
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": list(stops) if len(stops) > 1 else stops[0]}
    with replace_folder(folder) as partial_folder:
        for name, fields in ((CONFIG_FILE, config), (GENERATION_FILE, generation)):
            (partial_folder / name).write_text(json.dumps(fields, indent=2), encoding="utf-8")
        tokenizer.save_pretrained(partial_folder)
        write_params(params, architecture, partial_folder, dtype, adapters)


def find_policy(path: str) -> str:
    """Returns the newest exported policy if `path` is a run directory, else `path` itself."""
    return newest_folder(path, POLICY_FOLDER)


REWARD_FOLDER = "reward_model"


def padding_for_rewards(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a copy of the tokenizer whose padding token is not its end of turn.

    transformers reads a reward at the last token that is not padding. If the padding token is the end of turn or
    missing, another special token is used, or else the token with id 0 or 1.
    """
    tokenizer = copy.deepcopy(tokenizer)
    end = tokenizer.eos_token_id
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == end:
        special = sorted(
            set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        )
        others = [i for i in special if i != end] or [int(end == 0)]
        preferred = next((i for i in others if "pad" in tokenizer.convert_ids_to_tokens(i).lower()), others[0])
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(preferred)
    return tokenizer


def export_reward_model(
    params, architecture: Architecture, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str
) -> None:
    """Writes a reward model as a complete folder for `AutoModelForSequenceClassification`, atomically."""
    tokenizer = padding_for_rewards(tokenizer)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    with replace_folder(folder) as partial_folder:
        config = to_hf_reward_config(architecture, dtype, *ids)
        (partial_folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
        tokenizer.save_pretrained(partial_folder)
        write_params(params, architecture, partial_folder, dtype)
