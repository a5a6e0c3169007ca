"""Sampled responses: each from its own prompt, labels cut at token boundaries, and what cleaning drops, counted by
reason.
"""

import copy
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from toys import DATA

from sso_jax.data.records import SteeredQuery, Triple
from sso_jax.data.tokenizer import encode_text, load_tokenizer, tokens_hash
from sso_jax.preferences.responses import SampleKey, clean_triples, sample_triples, strip_label
from sso_jax.runtime import spool
from sso_jax.runtime.spool import Lazy
from sso_jax.sampling.sampler import Samples
from sso_jax.sampling.stage import SamplingStats
from sso_jax.toy.pretraining import train_tokenizer


@pytest.fixture(scope="module")
def toy():
    return train_tokenizer()


def ended(tokenizer, text: str) -> list[int]:
    return [*encode_text(tokenizer, text), tokenizer.eos_token_id]


def test_each_response_is_sampled_from_its_own_prompt_with_its_own_key(toy):
    records = [SteeredQuery(name, f"query {name}", ("Safety",), "good", "bad") for name in "ab"]
    prompts = {name: {"plain": [n, 0], "positive": [n, 1], "negative": [n, 2]} for name, n in (("a", 10), ("b", 20))}
    seen = []

    def sample(params, requests, stage):
        seen.extend(requests)
        answers = [ended(toy, str(request.prompt_ids)) for request in requests]  # the answer tells the prompt
        return Samples(answers, [False] * len(answers), SamplingStats(row_steps=8, row_steps_used=6))

    sampler = SimpleNamespace(sample=sample)
    triples, roles = sample_triples(sampler, [None], toy, records, prompts, SampleKey(seed=0, iteration=1))
    tokens = [len(ended(toy, f"[{n}, 1]")) for n in (10, 20)]
    assert roles["chosen"] == {
        "cut": 0.0,
        "mean_tokens": np.mean(tokens),
        "p90_tokens": pytest.approx(min(tokens) + 0.9 * (max(tokens) - min(tokens))),
        "row_steps_used": 0.75,
    }
    assert [(t.id, t.query, t.good_system, t.bad_system, t.features) for t in triples] == [
        (name, f"query {name}", "good", "bad", ("Safety",)) for name in "ab"
    ]
    assert [(t.chosen, t.rejected, t.original) for t in triples] == [
        (f"[{n}, 1]", f"[{n}, 2]", f"[{n}, 0]") for n in (10, 20)
    ]
    assert triples[1].response_ids == {
        r: ended(toy, getattr(triples[1], r)) for r in ("chosen", "rejected", "original")
    }
    assert {t.tokens_hash for t in triples} == {tokens_hash(toy)}
    keys = {tuple(request.prompt_ids): request.key for request in seen}
    assert len(set(keys.values())) == 6
    seen.clear()
    sample_triples(sampler, [None], toy, [records[1]], prompts, SampleKey(seed=0, iteration=1))
    assert all(keys[tuple(request.prompt_ids)] == request.key for request in seen)  # whatever else is in the batch


def test_responses_of_several_policies_are_told_apart(toy):
    """Policies "now", "one back", "two back": each answers its share of y+ and y-, y_o is always of now, places are
    kept.
    """
    records = [SteeredQuery(str(n), f"query {n}", ("Safety",), "good", "bad") for n in range(300)]
    prompts = {str(n): {"plain": [n, 0], "positive": [n, 1], "negative": [n, 2]} for n in range(300)}
    calls = []

    def sample(params, requests, stage):
        calls.append((params, stage))
        answers = [ended(toy, f"{params} {request.prompt_ids}") for request in requests]
        return Samples(answers, [params == "now"] * len(answers), SamplingStats(row_steps=8, row_steps_used=6))

    policies = ["now", lambda: "one back", lambda: "two back"]
    triples, roles = sample_triples(
        SimpleNamespace(sample=sample), policies, toy, records, prompts, SampleKey(0, iteration=4)
    )
    now = [triple.extra["policies"]["chosen"] == 0 for triple in triples]
    assert roles["chosen"]["cut"] == np.mean(now) and roles["original"]["cut"] == 1.0  # y_o is the present policy's
    assert [params for params, _ in calls] == ["now", "one back", "two back"] and "2 rounds back" in calls[2][1]
    names = ("now", "one back", "two back")
    for n, triple in enumerate(triples):
        back = triple.extra["policies"]
        assert (
            triple.chosen == f"{names[back['chosen']]} [{n}, 1]"
            and triple.rejected == f"{names[back['rejected']]} [{n}, 2]"
        )
        assert triple.original == f"now [{n}, 0]"
    counts = [sum(t.extra["policies"][r] == k for t in triples for r in ("chosen", "rejected")) for k in range(3)]
    assert all(abs(count - 200) < 60 for count in counts)  # five standard deviations of sqrt(600 * 2/9) = 11.5
    assert any(t.extra["policies"]["chosen"] != t.extra["policies"]["rejected"] for t in triples)


def test_a_policy_may_be_any_number_of_rounds_old(toy):
    """Of 300 policies, those over 127 rounds back answer more than half of 40 queries' y+ and y-."""
    records = [SteeredQuery(str(n), f"query {n}", ("Safety",), "good", "bad") for n in range(40)]
    prompts = {str(n): {context: [n] for context in ("plain", "positive", "negative")} for n in range(40)}

    def sample(params, requests, stage):
        answers = [ended(toy, f"{params}") for _ in requests]
        return Samples(answers, [False] * len(answers), SamplingStats(row_steps=8, row_steps_used=6))

    policies = ["0", *(lambda age=age: str(age) for age in range(1, 300))]
    sampler, key = SimpleNamespace(sample=sample), SampleKey(0, iteration=300)
    triples, _ = sample_triples(sampler, policies, toy, records, prompts, key)
    ages = [t.extra["policies"][side] for t in triples for side in ("chosen", "rejected")]
    assert ages == [int(getattr(t, side)) for t in triples for side in ("chosen", "rejected")]
    assert sum(age > 127 for age in ages) > 40


LABELED = {
    "Helpful response: 7 .": "7 .",
    "Response: With pleasure! 7.": "With pleasure! 7.",
    "\n Unhelpful Answer :\n\n7.": "7.",
    "The letters are a b.": None,
    "In my response: no.": None,
    "It is 7. Answer: 7": None,
}


@pytest.mark.parametrize("text", LABELED)
def test_a_leading_label_is_cut_at_a_token_boundary_and_nothing_else_is(toy, text):
    ids, rest = ended(toy, text), LABELED[text]
    cut = strip_label(toy, ids)
    if rest is None:
        assert cut == ids
    else:
        assert cut == ids[len(ids) - len(cut) :] and len(cut) < len(ids)
        assert toy.decode(cut).strip() == f"{rest}<|im_end|>"


def test_a_response_cut_by_the_length_limit_keeps_its_last_token(toy):
    ids = encode_text(toy, "Helpful response: 7 and 8")
    cut = strip_label(toy, ids)
    assert toy.decode(cut).strip() == "7 and 8" and cut[-1] == ids[-1]


@pytest.mark.parametrize("text", ["Answer:", "Answer: \n", "Answer:fox trot"])
def test_a_label_that_ends_within_a_token_or_is_all_there_is_cannot_be_cut(toy, text):
    tokenizer = copy.deepcopy(toy)
    tokenizer.add_tokens([":fox"])
    assert strip_label(tokenizer, ended(tokenizer, text)) is None


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
def test_labels_are_cut_from_tokens_of_qwen2():
    tokenizer = load_tokenizer(DATA / "tokenizers" / "qwen2")
    for text, rest in (("Helpful response: Paris", "Paris"), ("Answer:\n\n巴黎 😀", "巴黎 😀")):
        assert tokenizer.decode(strip_label(tokenizer, ended(tokenizer, text))).strip() == rest + "<|im_end|>"
    ids = ended(tokenizer, 'Answer:"Paris"')
    assert ':"' in tokenizer.convert_ids_to_tokens(
        ids
    )  # one token holds the end of the label and the start of the response
    assert strip_label(tokenizer, ids) is None


def test_cleaning_saves_stripped_responses_and_counts_what_it_drops_by_reason(toy):
    cases = {
        "kept": ("Helpful response: one", "two", "three"),
        "same": (" one", "one\n", "three"),
        "same_once_stripped": ("Helpful response: one", "one", "three"),
        "chosen_is_original": ("one", "two", "Answer: one"),
        "rejected_is_original": ("one", "two", "two"),
        "all_same": ("one", "one", "one"),
        "empty": ("one", " ", "three"),
        "nothing_but_end_of_turn": ("one", "two", ""),
        "label_alone": ("Answer:", "two", "three"),
        "also_kept": ("one", "two", "three two"),
    }
    names = ("chosen", "rejected", "original")
    triples = [
        Triple(
            case,
            "q",
            "g",
            "b",
            *texts,
            response_ids={name: ended(toy, text) for name, text in zip(names, texts, strict=True)},
        )
        for case, texts in cases.items()
    ]
    kept, dropped = clean_triples(toy, triples)
    assert [triple.id for triple in kept] == ["kept", "also_kept"]
    assert kept[0].chosen.strip() == "one" and (kept[0].rejected, kept[0].original) == ("two", "three")
    assert toy.decode(kept[0].response_ids["chosen"]).strip() == "one<|im_end|>"
    assert kept[1] == triples[-1]
    assert dropped["empty"] == "empty" and dropped["label_alone"] == "label"
    assert Counter(dropped.values()) == {
        "chosen_is_rejected": 3,
        "original_is_chosen_or_rejected": 2,
        "empty": 2,
        "label": 1,
    }


def test_many_stripped_responses_are_not_in_memory(toy, monkeypatch):
    """All of 200 pairs have a label, and about 400 tokens: 3 kB each of pointers to them alone."""
    monkeypatch.setattr(spool, "MOST_IN_MEMORY", 5)
    ids = {side: ended(toy, f"Response: {side}" + " a b" * 100) for side in ("chosen", "rejected")}
    texts = {side: toy.decode(own[:-1]) for side, own in ids.items()}

    def triple(number: int) -> Triple:
        return Triple(f"t{number}", "q", None, None, **texts, original=None, response_ids=ids)

    clean_triples(toy, [triple(0)])  # what a first call keeps
    tracemalloc.start()
    kept, dropped = clean_triples(toy, Lazy(200, triple))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000 and len(kept) == 200 and not dropped
    assert kept[199].id == "t199" and kept[199].chosen.strip() == "chosen" + " a b" * 100
