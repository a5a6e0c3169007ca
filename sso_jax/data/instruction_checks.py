"""Checks of IFEval's verifiable instructions, on a response's text alone.

Zhou et al. 2023, Instruction-Following Evaluation for Large Language Models, arXiv 2311.07911; instructions and
arguments have the names of its data. Not here, and counted as unknown: `language:response_language`, which needs a
model that tells languages, and `change_case:capital_word_frequency`, which needs the word tokenizer of NLTK.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

RELATIONS = ("less than", "at least")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""Answers of `detectable_format:constrained_response`, one of which a response must contain."""
_ABBREVIATION = re.compile(r"mrs?|ms|[djs]r|prof|st|vs|etc|e\.g|i\.e|inc|ltd|co|no|vol|approx|fig|[a-hj-z]")
"""What a point may follow within a sentence: an abbreviation or an initial, which the word I is not."""
_SENTENCE_END = re.compile(r"(\S*?)([.!?]+)[\"'\u201d\u2019)\]*]*(?=\s+(\S)|\s*$)")
"""A word, the marks that end a sentence, and the first character after them, if there is one."""
_FENCED = re.compile(r"(?:```(?:json)?)?(.*?)(?:```)?", re.IGNORECASE | re.DOTALL)
"""A text and the Markdown fence around it, if there is one."""


@dataclass(frozen=True)
class Check:
    """A check of a response, and the names and types of its arguments."""

    follows: Callable[..., bool]
    arguments: dict[str, type] = field(default_factory=dict)


def compare(number: int, relation: str, threshold: int) -> bool:
    """Returns whether a number is `less than`, or `at least`, a threshold."""
    return number < threshold if relation == "less than" else number >= threshold


def count_words(text: str) -> int:
    """Returns the number of runs of letters, digits and underscores: `don't` has two."""
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Returns the number of sentences, a rest without an end mark included.

    A sentence ends with `.`, `!` or `?` before white space, but not after a common abbreviation, a single letter or a
    number at the head of a line, nor before a small letter.
    Departs from IFEval, which has NLTK's punkt: because that is a trained model to download.
    """
    count, end = 0, 0
    for match in _SENTENCE_END.finditer(text):
        word, marks, following = match.group(1), match.group(2), match.group(3) or ""
        at_head = not text[: match.start()].rpartition("\n")[2].strip()
        bare = word.lower().lstrip("(\"'*")
        is_inside = marks == "." and (_ABBREVIATION.fullmatch(bare) or (at_head and bare.isdigit()))
        if following and (is_inside or following.islower()):
            continue
        count, end = count + 1, match.end()
    return count + bool(text[end:].strip())


def count_parts(text: str, divider: str) -> int | None:
    """Returns the number of parts between dividers, which may stand at both ends too; None if one between is blank."""
    parts = text.split(divider)
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return sum(bool(part.strip()) for part in parts)


def _occurrences(text: str, keyword: str) -> int:
    """Counts a keyword in any case, also inside of words; its marks stand for themselves."""
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))


def has_no_forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    """Returns whether none of the words is in the text as a whole word, in any case."""
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def is_json(text: str) -> bool:
    """Returns whether the whole text, without a Markdown fence around it, is JSON."""
    try:
        json.loads(_FENCED.fullmatch(text.strip()).group(1))  # type: ignore[union-attr]  # every text matches
    except (ValueError, RecursionError):
        return False
    return True


def is_quoted(text: str) -> bool:
    """Returns whether the whole text is inside straight double quotation marks."""
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def count_bullets(text: str) -> int:
    """Returns the number of lines that begin with `-`, or with `*` and another character than `*`."""
    return sum(len(re.findall(pattern, text, re.MULTILINE)) for pattern in (r"^\s*\*[^*]", r"^\s*-"))


def count_highlights(text: str) -> int:
    """Returns the number of `*highlights*`; `**one**` of two asterisks counts once."""
    single = re.findall(r"\*[^\n*]*\*", text)
    double = re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(found.strip("*").strip()) for found in single + double)


def has_postscript(text: str, postscript_marker: str) -> bool:
    """Returns whether the marker is in the text in any case; a blank may follow each of its points but the last."""
    pattern = re.escape(postscript_marker.strip()).replace(r"\.", r"\.\s?").removesuffix(r"\s?")
    return re.search(pattern, text, re.IGNORECASE) is not None


def has_title(text: str) -> bool:
    """Returns whether a line has a title in double angular brackets, `<<title>>`."""
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


def begins_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Returns whether there are so many paragraphs, parted by an empty line, and one begins with a word in any case."""
    paragraphs = text.split("\n\n")
    num_found = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if num_found != num_paragraphs or not 1 <= nth_paragraph <= num_found:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    bare = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0] if words else ""
    return bare.lower() == first_word.lower()


def has_two_responses(text: str) -> bool:
    """Returns whether the text is two different responses with `******` between them."""
    parts = [part.strip() for part in text.split("******")]
    return count_parts(text, "******") == 2 and len({part for part in parts if part}) == 2


def ends_with(text: str, end_phrase: str) -> bool:
    """Returns whether the text, without white space and quotation marks around it, ends with a phrase in any case."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _has_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


CHECKS: dict[str, Check] = {
    "change_case:english_capital": Check(str.isupper),
    "change_case:english_lowercase": Check(str.islower),
    "combination:repeat_prompt": Check(
        lambda text, prompt_to_repeat: text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
        {"prompt_to_repeat": str},
    ),
    "combination:two_responses": Check(has_two_responses),
    "detectable_content:number_placeholders": Check(
        lambda text, num_placeholders: len(re.findall(r"\[.*?\]", text)) >= num_placeholders, {"num_placeholders": int}
    ),
    "detectable_content:postscript": Check(has_postscript, {"postscript_marker": str}),
    "detectable_format:constrained_response": Check(lambda text: any(option in text for option in OPTIONS)),
    "detectable_format:json_format": Check(is_json),
    "detectable_format:multiple_sections": Check(_has_sections, {"section_spliter": str, "num_sections": int}),
    "detectable_format:number_bullet_lists": Check(
        lambda text, num_bullets: count_bullets(text) == num_bullets, {"num_bullets": int}
    ),
    "detectable_format:number_highlighted_sections": Check(
        lambda text, num_highlights: count_highlights(text) >= num_highlights, {"num_highlights": int}
    ),
    "detectable_format:title": Check(has_title),
    "keywords:existence": Check(
        lambda text, keywords: all(_occurrences(text, keyword) for keyword in keywords), {"keywords": list}
    ),
    "keywords:forbidden_words": Check(has_no_forbidden_words, {"forbidden_words": list}),
    "keywords:frequency": Check(
        lambda text, keyword, relation, frequency: compare(_occurrences(text, keyword.strip()), relation, frequency),
        {"keyword": str, "relation": str, "frequency": int},
    ),
    "keywords:letter_frequency": Check(
        lambda text, letter, let_relation, let_frequency: compare(
            text.lower().count(letter.lower()), let_relation, let_frequency
        ),
        {"letter": str, "let_relation": str, "let_frequency": int},
    ),
    "length_constraints:nth_paragraph_first_word": Check(
        begins_paragraph, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "length_constraints:number_paragraphs": Check(
        lambda text, num_paragraphs: count_parts(text, "***") == num_paragraphs, {"num_paragraphs": int}
    ),
    "length_constraints:number_sentences": Check(
        lambda text, relation, num_sentences: compare(count_sentences(text), relation, num_sentences),
        {"relation": str, "num_sentences": int},
    ),
    "length_constraints:number_words": Check(
        lambda text, relation, num_words: compare(count_words(text), relation, num_words),
        {"relation": str, "num_words": int},
    ),
    "punctuation:no_comma": Check(lambda text: "," not in text),
    "startend:end_checker": Check(ends_with, {"end_phrase": str}),
    "startend:quotation": Check(is_quoted),
}
"""Checks by the id of the instruction. The cases are checked of any language, where IFEval asks for English as well."""


def loose_variants(response: str) -> list[str]:
    """Returns the eight forms of a response, of which one must follow an instruction to follow it loosely.

    The response, without its first line, its last line and both, each also without asterisks (section 2.2).
    """
    lines = response.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [variant for text in [response, *cut] for variant in (text, text.replace("*", ""))]


def follows(instruction_id: str, arguments: dict[str, Any], response: str) -> bool:
    """Returns whether a response that is not blank follows a known instruction, to the letter (strict)."""
    return bool(response.strip()) and CHECKS[instruction_id].follows(response, **arguments)


def follows_loosely(instruction_id: str, arguments: dict[str, Any], response: str) -> bool:
    """Returns whether one of the `loose_variants` of a response follows a known instruction."""
    return any(follows(instruction_id, arguments, variant) for variant in loose_variants(response))
