"""Files of prompts with verifiable instructions: read, refused by line and column, and scored."""

import json

import pytest

from sso_jax.data.instruction_prompts import (
    InstructedPrompt,
    Instruction,
    instruction_accuracy,
    load_instructed_prompts,
)
from sso_jax.data.rows import Table
from sso_jax.runtime.errors import InputError
from tests.toys import DATA

NO_COMMA, WORDS = "punctuation:no_comma", "length_constraints:number_words"
GOOD = {"key": 7, "prompt": "Write.", "instruction_id_list": [NO_COMMA], "kwargs": [{}]}
AT_LEAST_2 = {"relation": "at least", "num_words": 2}


def load(tmp_path, *rows):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return load_instructed_prompts(Table(str(file), "prompts"))


def prompt(*instructions: Instruction) -> InstructedPrompt:
    return InstructedPrompt("p", "Write.", instructions)


def test_a_row_is_a_prompt_with_its_instructions(tmp_path):
    nulls = {"relation": "at least", "num_words": 2.0, "keywords": None}
    row = {**GOOD, "instruction_id_list": [NO_COMMA, WORDS, "new:one"], "kwargs": [None, nulls, {"x": 1}]}
    expected = (Instruction(NO_COMMA, {}), Instruction(WORDS, AT_LEAST_2), Instruction("new:one", {}))
    assert load(tmp_path, row) == [InstructedPrompt("7", "Write.", expected)]


def words(**changes):
    return {"instruction_id_list": [WORDS], "kwargs": [{**AT_LEAST_2, **changes}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "no column prompt; give prompt, instruction_id_list, kwargs"),
        ({"instruction_id_list": None, "kwargs": None}, "no column instruction_id_list, kwargs; give"),
        ({"prompt": " "}, "column prompt is ' '; give a text"),
        ({"instruction_id_list": NO_COMMA}, "column instruction_id_list is 'punctuation:no_comma'; give a list"),
        ({"instruction_id_list": []}, r"column instruction_id_list is \[\]; give a list"),
        ({"kwargs": [{}, {}]}, "column kwargs is .*; give a list of 1 objects"),
        ({"kwargs": ["x"]}, "column kwargs has 'x' for punctuation:no_comma; give an object"),
        (words(num_words=None), "column kwargs: num_words of .*number_words is None; give an integer"),
        (words(num_words=2.5), "column kwargs: num_words of .* is 2.5; give an integer"),
        (words(num_words=True), "column kwargs: num_words of .* is True; give an integer"),
        (words(relation="about"), "column kwargs: relation of .* is 'about'; give less than or at least"),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["a", 1]}]},
            r"column kwargs: keywords of keywords:existence is \['a', 1\]; give a list of texts",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_column(tmp_path, changes, message):
    with pytest.raises(InputError, match=rf"prompts\.jsonl, line 2: {message}"):
        load(tmp_path, GOOD, {**GOOD, **changes})


def test_an_empty_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"prompts: '.*prompts\.jsonl' contains no prompts; give"):
        load(tmp_path)


def test_accuracies_by_instruction_and_by_prompt():
    prompts = [
        prompt(Instruction(NO_COMMA, {}), Instruction(WORDS, AT_LEAST_2)),
        prompt(Instruction(NO_COMMA, {})),
        prompt(Instruction("startend:quotation", {}), Instruction("new:one", {})),
        prompt(Instruction("new:two", {}), Instruction("new:one", {})),
    ]
    found = instruction_accuracy(prompts, ["a b, c", "Well, sure:\nno comma", 'Sure:\n"a"', "x"])
    assert found == {
        "instruction_strict": 1 / 4,  # of two, one and one that are known: the words of the first prompt alone
        "instruction_loose": 3 / 4,  # and, without their first lines, the second and the third
        "prompt_strict": 0,
        "prompt_loose": 1 / 2,
        "num_prompts": 2,
        "num_instructions": 4,
        "unknown": {"new:one": 2, "new:two": 1},
    }


def test_no_known_instruction_has_no_accuracy():
    found = instruction_accuracy([prompt(Instruction("new:one", {}))], ["a"])
    assert found["instruction_strict"] is None and found["prompt_loose"] is None and found["num_prompts"] == 0


def test_a_response_too_few_is_named():
    with pytest.raises(InputError, match="1 responses to 2 prompts"):
        instruction_accuracy([prompt(Instruction(NO_COMMA, {}))] * 2, ["a"])


@pytest.mark.skipif(not DATA.is_dir(), reason="needs shared/data")
def test_ifeval_is_read_whole():
    prompts = load_instructed_prompts(Table(str(DATA / "prompts" / "ifeval.jsonl"), "prompts"))
    found = instruction_accuracy(prompts, ["ok"] * 541)
    assert found["unknown"] == {"change_case:capital_word_frequency": 25, "language:response_language": 31}
    assert found["num_instructions"] == 834 - 25 - 31  # 834 in all
    assert 0 < found["instruction_strict"] < 1 and found["prompt_strict"] <= found["instruction_strict"]
