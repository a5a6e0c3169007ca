"""Prepares triples for training: tokenizes given ones, reorders them for controls, drops those without a contrast."""

import dataclasses
import random
from array import array
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from sso_jax.data.chat import encode_response
from sso_jax.data.records import RESPONSES, Cell, Dropped, SteeredQuery, Triple
from sso_jax.data.tokenizer import tokens_hash
from sso_jax.runtime.spool import spooled, subset

Value = TypeVar("Value")
Record = TypeVar("Record", SteeredQuery, Triple)
SCORED_CELLS = [Cell("plain", "chosen"), Cell("plain", "rejected")]


_OTHER = {"chosen": "rejected", "rejected": "chosen", "original": "original"}


def swap(triple: Triple) -> Triple:
    """Swaps chosen and rejected in a triple's texts, ids, scores and log-probs."""
    ids, log_probs, scores = triple.response_ids, triple.log_probs, triple.scores
    return dataclasses.replace(
        triple,
        chosen=triple.rejected,
        rejected=triple.chosen,
        response_ids=None if ids is None else _exchanged(ids),
        log_probs=None if log_probs is None else {context: _exchanged(row) for context, row in log_probs.items()},
        scores=None if scores is None else _exchanged(scores),
        swapped=not triple.swapped,
    )


def _exchanged(row: dict[str, Value]) -> dict[str, Value]:
    return {response: row[_OTHER[response]] for response in row}


def random_order(triples: Sequence[Triple], seed: str) -> Sequence[Triple]:
    """Control: swaps each pair with probability 1/2."""
    return spooled(swap(t) if random.Random(f"{seed}/{t.id}/order").random() < 0.5 else t for t in triples)


def judge_order(triples: Sequence[Triple], score: Callable[[Triple, str], float]) -> Sequence[Triple]:
    """Control: orders each pair by `score(triple, response)`; the only place where a judge influences training."""
    return spooled(swap(t) if score(t, "rejected") > score(t, "chosen") else t for t in triples)


def fits(prompts: dict[str, list[int]], response_ids: dict[str, list[int]], cells: list[Cell], limit: int) -> bool:
    """Returns whether the prompt and response of every cell have at most `limit` tokens together."""
    return all(len(prompts[context]) + len(response_ids[response]) <= limit for context, response in cells)


def cut_to(triple: Triple, prompts: dict[str, list[int]], cells: list[Cell], limit: int) -> Triple:
    """Cuts responses so that the prompt and response of every cell have at most `limit` tokens together.

    Only token ids are cut, not texts; a cut response has no end of turn. Returns the triple itself if nothing is too
    long, or if cutting would leave an empty response or two equal ones: it then does not fit.
    """
    whole = ids_of(triple)
    ids = dict(whole)
    for context, response in cells:
        ids[response] = ids[response][: max(0, limit - len(prompts[context]))]
    names = {response for _, response in cells}
    if ids == whole or not all(ids[name] for name in names):
        return triple
    different = len({tuple(ids[name]) for name in names}) == len({tuple(whole[name]) for name in names})
    return dataclasses.replace(triple, response_ids=ids) if different else triple


def with_log_probs(triple: Triple, cells: list[Cell], sums: list[float]) -> Triple:
    """Adds the reference's log-prob sums to a triple; `sums` has one value per cell."""
    table: dict[str, dict[str, float]] = {}
    for (context, response), value in zip(cells, sums, strict=True):
        table.setdefault(context, {})[response] = value
    return dataclasses.replace(triple, log_probs=table)


def ids_of(triple: Triple) -> dict[str, list[int]]:
    """Returns the token ids of a triple's responses, by response."""
    assert triple.response_ids is not None  # they were sampled, or set by `given_triples`
    return triple.response_ids


def mean_log_probs(triple: Triple) -> dict[str, dict[str, float]]:
    """Returns log-probs per token, in nats, by context and response.

    These are the sums divided by the number of response tokens, end of turn included.
    """
    ids = ids_of(triple)
    assert triple.log_probs is not None  # the reference scored the triple
    return {
        context: {response: value / len(ids[response]) for response, value in row.items()}
        for context, row in triple.log_probs.items()
    }


def given_triples(tokenizer: PreTrainedTokenizerBase, triples: list[Triple]) -> list[Triple]:
    """Adds token ids to the triples of a file.

    These are the sampled ids if this tokenizer made them, else those of the text and an end of turn.
    """
    hashed = tokens_hash(tokenizer)

    def ids(triple: Triple, response: str) -> list[int]:
        if triple.tokens_hash == hashed and triple.response_ids is not None and triple.response_ids.get(response):
            return triple.response_ids[response]
        return encode_response(tokenizer, getattr(triple, response))

    def present(triple: Triple) -> list[str]:
        return [response for response in RESPONSES if getattr(triple, response) is not None]

    return [
        dataclasses.replace(t, response_ids={r: ids(t, r) for r in present(t)}, tokens_hash=hashed, log_probs=None)
        for t in triples
    ]


def drop_empty_contrasts(triples: Sequence[Triple], cells: list[Cell]) -> tuple[Sequence[Triple], Dropped]:
    """Drops triples in which responses that `cells` compare are empty or equal; returns the rest and the reasons.

    If the prompts state scores, pairs with equal scores are dropped too.
    """
    return drop_by_reason(triples, lambda triple: empty_contrast(triple, cells))


def drop_by_reason(
    records: Sequence[Record], reason_of: Callable[[Record], str | None]
) -> tuple[Sequence[Record], Dropped]:
    """Drops the records for which `reason_of` returns a reason; returns the rest and the reasons by id."""
    kept, dropped = array("q"), Dropped()
    for number, record in enumerate(records):
        reason = reason_of(record)
        if reason is None:
            kept.append(number)
        else:
            dropped[record.id] = reason
    return subset(records, kept), dropped


def empty_contrast(triple: Triple, cells: list[Cell]) -> str | None:
    """Returns why a triple has no contrast in the responses that `cells` compare; None if it has one."""
    texts = {response: getattr(triple, response).strip() for response in {response for _, response in cells}}
    sides = [texts[side] for side in ("chosen", "rejected") if side in texts]
    if not all(texts.values()):
        return "empty"
    if len(set(sides)) < len(sides):
        return "chosen_is_rejected"
    if texts.get("original") in sides:
        return "original_is_chosen_or_rejected"
    states_scores = any(context.startswith("score_conditioned_") for context, _ in cells)
    if states_scores and triple.scores is not None and triple.scores["chosen"] == triple.scores["rejected"]:
        return "equal_scores"
    return None


def to_preference(triple: Triple) -> dict:
    """Converts a triple to a preference dataset row as in TRL: `prompt, chosen, rejected`, each a list of messages."""
    prompt = [*triple.history, {"role": "user", "content": triple.query}]
    answers = {side: [{"role": "assistant", "content": getattr(triple, side)}] for side in ("chosen", "rejected")}
    return {"prompt": prompt, **answers}


def summarize(triples: Sequence[Triple]) -> dict[str, float | None]:
    """Summarizes pairs: average on-policy probabilities, `exp(mean log-prob)` under x, and tokens per response.

    The probabilities are None for pairs without log-probs.
    """
    if not triples:
        return {"chosen_probability": None, "rejected_probability": None, "response_tokens": None}
    lengths = array("q", (len(ids) for t in triples for ids in ids_of(t).values()))
    if any(t.log_probs is None for t in triples):
        return {"chosen_probability": None, "rejected_probability": None, "response_tokens": float(np.mean(lengths))}
    means = array("d", (table[side] for table in map(_plain_means, triples) for side in ("chosen", "rejected")))
    chosen, rejected = np.exp(means).reshape(-1, 2).T
    return {
        "chosen_probability": float(np.mean(chosen)),
        "rejected_probability": float(np.mean(rejected)),
        "response_tokens": float(np.mean(lengths)),
    }


def _plain_means(triple: Triple) -> dict[str, float]:
    return mean_log_probs(triple)["plain"]
