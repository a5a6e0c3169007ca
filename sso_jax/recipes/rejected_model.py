"""The model of `sampling.rejected_path`, which samples y- in place of the policy."""

import dataclasses

from sso_jax.config import Config, LoraConfig
from sso_jax.models.export import find_policy
from sso_jax.models.hf_folder import fetch
from sso_jax.recipes.engine import Engine, build_engine
from sso_jax.runtime.errors import InputError

FIELD = "sampling.rejected_path"


def build_rejected_engine(config: Config, engine: Engine) -> Engine | None:
    """Builds the engine of the other model, which answers the policy's prompts; None if the config names none.

    Its responses end where the policy's end.

    Raises:
      InputError: if the folder has no model, or its tokenizer is not the policy's.
    """
    path = config.sampling.rejected_path
    if path is None:
        return None
    folder = fetch(find_policy(path), FIELD)
    train = dataclasses.replace(config.train, router_loss=None)  # a field of the policy, which alone is trained
    model = dataclasses.replace(config.model, frozen_bits=None)
    other = build_engine(folder, dataclasses.replace(config, lora=LoraConfig(), train=train, model=model))
    if other.chat.tokenizer.get_vocab() != engine.chat.tokenizer.get_vocab():
        raise InputError(
            f"{FIELD}: {path} has another vocabulary than the policy, so that its responses would be other texts; give "
            "a model of the same family"
        )
    return dataclasses.replace(other, sampler=dataclasses.replace(other.sampler, stop_ids=engine.sampler.stop_ids))
