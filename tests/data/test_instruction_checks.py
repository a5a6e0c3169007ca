"""IFEval's checks, each on responses that follow an instruction by a hair and on ones that just miss it."""

import pytest

from sso_jax.data.instruction_checks import (
    CHECKS,
    OPTIONS,
    count_parts,
    count_sentences,
    count_words,
    follows,
    follows_loosely,
    loose_variants,
)

pytestmark = pytest.mark.quick

CASES = {
    "change_case:english_capital": ({}, ["ALL BIG, 2 OF THEM."], ["ALL BIG BUT one", "12"]),
    "change_case:english_lowercase": ({}, ["all small."], ["all small But one"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, ["say hi. Hi!"], ["Well: say hi."]),
    "combination:two_responses": (
        {},
        ["one\n******\ntwo", "******one******two******"],
        ["one", "one******one", "a******b******c", "a************b"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[a] and [b]"], ["[a] and (b)"]),
    "detectable_content:postscript": (
        {"postscript_marker": "P.P.S"},
        ["Bye\np. p. s. more", "P.P.S more"],
        ["P.S. more", "PPS"],
    ),
    "detectable_format:constrained_response": ({}, [f"Well. {OPTIONS[1]}"], ["My answer is yes"]),
    "detectable_format:json_format": (
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', '```\n"a"\n```', "[]"],
        ["{a: 1}", 'Here: {"a": 1}', "```json\n```"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1\na", "section 1 section 2", "Section one, Section two"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b", "text\n* a\n- b"],
        ["* a", "* a\n* b\n* c", "** a\n** b"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and *b*", "**a** and *b*"],
        ["*a* and b", "** ** and *a*", "*a\nb* and *c*"],
    ),
    "detectable_format:title": ({}, ["x\n<<On hens>>"], ["<On hens>", "<< >>", "<<On\nhens>>"]),
    "keywords:existence": ({"keywords": ["hen", "c++"]}, ["Hens in C++."], ["hens in C", "c++"]),
    "keywords:forbidden_words": ({"forbidden_words": ["hen", "fox"]}, ["hens, foxes"], ["A HEN.", "fox"]),
    "keywords:frequency": (
        {"keyword": "hen", "relation": "less than", "frequency": 2},
        ["a hen", "none"],
        ["hens and Hen"],
    ),
    "keywords:letter_frequency": (
        {"letter": "N", "let_relation": "at least", "let_frequency": 3},
        ["Nina can"],
        ["Nina"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "hens"},
        ["a\n\nHens, too", "a\n\n'Hens' sleep"],
        ["a\n\nb hens", "Hens\n\nb", "a\n\nhens\n\nc", "a\nhens"],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a\n\nb", "a\n***\n***\nb", "a***b***c"],
    ),
    "length_constraints:number_sentences": (
        {"relation": "at least", "num_sentences": 2},
        ["One. Two."],
        ["One, Mr. Two."],
    ),
    "length_constraints:number_words": ({"relation": "less than", "num_words": 3}, ["a-b"], ["a b c"]),
    "punctuation:no_comma": ({}, ["a; b"], ["a, b"]),
    "startend:end_checker": ({"end_phrase": "The end."}, ["It is the END. ", '"x the end."'], ["The end. Or not."]),
    "startend:quotation": ({}, ['"a"', ' "a" and "b"\n'], ['"a" said', '"', "'a'"]),
}


def test_every_check_has_cases():
    assert set(CASES) == set(CHECKS)


@pytest.mark.parametrize("name", CASES)
def test_a_check_tells_what_follows_from_what_does_not(name):
    arguments, good, bad = CASES[name]
    assert set(arguments) == set(CHECKS[name].arguments)
    assert [text for text in good if not follows(name, arguments, text)] == []
    assert [text for text in bad if follows(name, arguments, text)] == []


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_blank_response_follows_nothing(text):
    assert not follows("punctuation:no_comma", {}, text) and not follows_loosely("punctuation:no_comma", {}, text)


@pytest.mark.parametrize(
    ("relation", "following"), [("less than", [True, False, False]), ("at least", [False, True, True])]
)
def test_the_threshold_itself_is_not_less_than_it(relation, following):
    arguments = {"relation": relation, "num_words": 2}
    assert [follows("length_constraints:number_words", arguments, text) for text in ("a", "a b", "a b c")] == following


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("No mark", 1),
        ("One. Two! Three? Four", 4),
        ("Really?! Yes...", 2),
        ('He said "Go." Then he left.', 2),
        ("Dr. Lee met Mrs. Poe at 3.30, e.g. for tea.", 1),
        ("J. Smith sings. I do, and so can I. We all do.", 3),
        ("1. Rest well.\n2. Drink water.", 2),
        ("It was 1999. Snow fell.", 2),
        ("See example.com. It works.", 2),
        ("Wait ... what?", 1),
    ],
)
def test_sentences_end_with_marks_that_end_one(text, count):
    assert count_sentences(text) == count


def test_words_are_runs_of_letters_and_digits():
    assert count_words("Don't stop: 3 well-known na\u00efve_ones") == 7


@pytest.mark.parametrize(("text", "count"), [("", 0), ("a", 1), ("|", 0), ("|a", 1), ("a|b|", 2), ("a| |b", None)])
def test_parts_between_dividers(text, count):
    assert count_parts(text, "|") == count


def test_the_loose_forms_are_the_eight_of_the_paper():
    assert loose_variants("Sure:\n*a*\nbye") == [
        "Sure:\n*a*\nbye",
        "Sure:\na\nbye",
        "*a*\nbye",
        "a\nbye",
        "Sure:\n*a*",
        "Sure:\na",
        "*a*",
        "a",
    ]


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("startend:quotation", 'Sure:\n"a"'),
        ("startend:quotation", '"a"\nHope it helps!'),
        ("startend:quotation", 'Sure:\n"a"\nHope it helps!'),
        ("startend:quotation", '*"a"*'),
        ("change_case:english_lowercase", "Here you are:\n\nall small"),
    ],
)
def test_a_frame_around_the_answer_is_followed_loosely_alone(name, response):
    assert follows_loosely(name, {}, response) and not follows(name, {}, response)


def test_two_lines_too_many_are_not_followed_loosely():
    assert not follows_loosely("startend:quotation", {}, 'Sure.\nHere:\n"a"')
