"""Writes policies and reward models as complete Hugging Face folders."""

import copy
import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sso_jax.data.chat import end_of_turn
from sso_jax.models.architecture import Architecture
from sso_jax.models.hf_config import CONFIG_FILE, GENERATION_FILE, read_json_file, to_hf_config, to_hf_reward_config
from sso_jax.models.hf_weights import write_params
from sso_jax.models.layers import Adapters
from sso_jax.models.peft_adapters import ADAPTER_FOLDER
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import replace_folder
from sso_jax.runtime.run_dir import newest_folder

POLICY_FOLDER = "policy"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
    "chat_template.json",
)


def export_policy(
    params,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    stops: tuple[int, ...],
    folder: Path,
    dtype: str,
    adapters: Adapters = Adapters(),
    source: Path | None = None,
) -> None:
    """Writes a policy as a complete Hugging Face folder, atomically.

    The folder has config.json, generation_config.json, the tokenizer, and safetensors with an index.

    Args:
      params: the policy's parameters.
      architecture: its architecture.
      tokenizer: its tokenizer.
      stops: tokens that end a response, the end of turn first.
      folder: folder to write.
      dtype: type of the tensors, "float32" or "bfloat16".
      adapters: adapters to merge into the weights.
      source: folder that the policy started from, whose tokenizer files are copied as they are, so that the versions
        of transformers that open it open the export too, and whose generation config keeps its other fields.
    """
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": list(stops) if len(stops) > 1 else stops[0]}
    config = to_hf_config(architecture, dtype, ends["bos_token_id"], ends["eos_token_id"])
    generation = {**_generation_config(source), **ends}
    with replace_folder(folder) as partial_folder:
        for name, fields in ((CONFIG_FILE, config), (GENERATION_FILE, generation)):
            (partial_folder / name).write_text(json.dumps(fields, indent=2), encoding="utf-8")
        write_tokenizer(tokenizer, partial_folder, source)
        write_params(params, architecture, partial_folder, dtype, adapters)


def _generation_config(source: Path | None) -> dict:
    if source is None or not (source / GENERATION_FILE).is_file():
        return {}
    return read_json_file(source / GENERATION_FILE)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, source: Path | None) -> None:
    """Copies the tokenizer's files from the folder that it was read from, or writes them if there is none.

    A chat template that the folder does not have is added.
    """
    if source is None:
        _save_tokenizer(tokenizer, folder)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for templates in source.glob("additional_chat_templates"):
        shutil.copytree(templates, folder / templates.name)
    config = read_json_file(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    has_template = any((source / name).is_file() for name in (TEMPLATE_FILE, "chat_template.json"))
    if not has_template and not config.get("chat_template"):
        (folder / TEMPLATE_FILE).write_text(str(tokenizer.chat_template), encoding="utf-8")


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer with the field names and the class of transformers 4, which transformers 5 reads too."""
    tokenizer.save_pretrained(folder)
    config = read_json_file(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def find_policy(path: str) -> str:
    """Returns the newest exported policy if `path` is a run directory, else `path` itself.

    Raises:
      InputError: if the run left adapters alone.
    """
    return newest_whole(path, POLICY_FOLDER, ADAPTER_FOLDER)


def newest_whole(path: str, name: str, adapters: str) -> str:
    """Returns the newest folder `name` if `path` is a run directory, else `path` itself.

    Raises:
      InputError: if the run left adapters, the folder `adapters`, alone.
    """
    found = newest_folder(path, name)
    if found == path and newest_folder(path, adapters) != path:
        raise InputError(
            f"{path}: this run left adapters and no {name} (lora.export adapter); merge {adapters} with PEFT's "
            "merge_and_unload and give that folder, or train with lora.export both"
        )
    return found


REWARD_FOLDER = "reward_model"


def padding_for_rewards(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a copy of the tokenizer whose padding token is not its end of turn.

    transformers reads a reward at the last token that is not padding. If the padding token is the end of turn or
    missing, another special token is used, or else the token with id 0 or 1.
    """
    end = end_of_turn(tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == end:
        special = sorted(
            set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        )
        others = [i for i in special if i != end] or [int(end == 0)]
        preferred = next((i for i in others if "pad" in tokenizer.convert_ids_to_tokens(i).lower()), others[0])
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(preferred)
    return tokenizer


def export_reward_model(
    params,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str,
    adapters: Adapters = Adapters(),
) -> None:
    """Writes a reward model as a complete folder for `AutoModelForSequenceClassification`, atomically.

    Adapters are merged into the weights.

    Its tokenizer is written anew, because its padding token differs from the end of turn.
    """
    tokenizer, end = padding_for_rewards(tokenizer), end_of_turn(tokenizer)
    with replace_folder(folder) as partial_folder:
        config = to_hf_reward_config(architecture, dtype, tokenizer.bos_token_id, end, tokenizer.pad_token_id)
        (partial_folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
        _save_tokenizer(tokenizer, partial_folder)
        write_params(params, architecture, partial_folder, dtype, adapters)
