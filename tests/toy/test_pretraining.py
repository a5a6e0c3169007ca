"""The toy policy's tokenizer: a folder of it loads as what the policy was trained with."""

import json
import random

import pytest

from sso_jax.data.tokenizer import decode_text, encode_text, load_tokenizer
from sso_jax.toy.pretraining import train_tokenizer
from sso_jax.toy.world import Quality, all_items, demonstrate


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    trained = train_tokenizer()
    trained.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))  # by which transformers picks the class
    return trained, load_tokenizer(folder)


def test_a_saved_folder_splits_every_text_of_the_world_as_training_did(tokenizers):
    trained, loaded = tokenizers
    draw = random.Random(0)
    texts = [text for query, item in all_items().items() for text in (query, demonstrate(item, Quality(), draw))]
    assert sum(any(digit in text for digit in "0123456789") for text in texts) > 100  # where the two once differed
    assert [encode_text(loaded, text) for text in texts] == [encode_text(trained, text) for text in texts]
    assert [decode_text(loaded, encode_text(loaded, text)) for text in texts] == texts


def test_a_saved_folder_keeps_control_tokens_and_template(tokenizers):
    trained, loaded = tokenizers
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 3 plus 14?"}]
    rendered = [one.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) for one in tokenizers]
    assert rendered[0] == rendered[1]
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (
        trained.eos_token_id,
        trained.pad_token_id,
        len(trained),
    )
    assert encode_text(loaded, "<|im_end|>") != [loaded.eos_token_id]
