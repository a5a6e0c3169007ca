"""Steered queries in, triples of sampled responses out; then triples in, clean triples out, what is dropped counted by reason."""

import dataclasses
import re

from transformers import PreTrainedTokenizerBase

from sso_jax.records import RESPONSES, Dropped, SteeredQuery, Triple
from sso_jax.sampling.sampler import Request, Sampler, row_key
from sso_jax.tokens.tokenizer import decode_text, tokens_hash

CONTEXT_OF = {"chosen": "positive", "rejected": "negative", "original": "plain"}
"""The context that each response is sampled from."""
_LABEL = re.compile(r"\s*\**(?:[A-Z][a-z]+(?:(?:,| and) [A-Za-z]+)*\s+)?(?:[Rr]esponse|[Aa]nswer|[Rr]eply)\s*:\**\s*")
"""`Helpful response:`, `Helpful and accurate answer:`, bold or not."""


def sample_triples(
    sampler: Sampler,
    params,
    tokenizer: PreTrainedTokenizerBase,
    steered: list[tuple[SteeredQuery, dict[str, list[int]]]],
    seed: int,
    iteration: int,
    wanted: tuple[str, ...] = RESPONSES,
) -> list[Triple]:
    """y+ from x+, y- from x- and y_o from x for every (steered query, prompts by context), in one stream; y_o only where wanted."""
    requests = [
        Request(prompts[CONTEXT_OF[response]], row_key(seed, iteration, record.id, response))
        for record, prompts in steered
        for response in wanted
    ]
    sampled = iter(sampler.sample(params, requests, f"iteration {iteration}: responses"))
    triples = []
    for record, _ in steered:
        ids = {response: next(sampled) for response in wanted}
        texts = {response: decode_text(tokenizer, ids[response]) if response in ids else None for response in RESPONSES}
        triples.append(
            Triple(
                id=record.id,
                query=record.query,
                good_system=record.good_system,
                bad_system=record.bad_system,
                features=record.features,
                response_ids=ids,
                tokens_hash=tokens_hash(tokenizer),
                **texts,
            )
        )
    return triples


def strip_label(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int] | None:
    """Ids without a leading label such as "Helpful response:", cut at a token boundary.

    `Helpful response: 7 .` becomes `7 .`. None where the label ends in the middle of a token, or nothing is left of the response.
    """
    text = decode_text(tokenizer, ids)
    label = _LABEL.match(text)
    if label is None:
        return ids
    rest = text[label.end() :].strip()
    for start in range(1, len(ids)):
        if decode_text(tokenizer, ids[start:]).strip() == rest and rest:
            return ids[start:]
    return None


def clean_triples(tokenizer: PreTrainedTokenizerBase, triples: list[Triple]) -> tuple[list[Triple], Dropped]:
    """Triples without labels; dropped are those with a label that cannot be cut, an empty response, or two that are the same."""
    kept: list[Triple] = []
    dropped: Dropped = {}
    for triple in triples:
        ids = {response: strip_label(tokenizer, sampled) for response, sampled in triple.response_ids.items()}
        if any(value is None for value in ids.values()):
            dropped[triple.id] = "label"
            continue
        texts = {response: decode_text(tokenizer, kept_ids) for response, kept_ids in ids.items()}
        stripped = {response: text.strip() for response, text in texts.items()}
        if not all(stripped.values()):
            dropped[triple.id] = "empty"
        elif stripped["chosen"] == stripped["rejected"]:
            dropped[triple.id] = "chosen_is_rejected"
        elif stripped.get("original") in (stripped["chosen"], stripped["rejected"]):
            dropped[triple.id] = "original_is_chosen_or_rejected"
        else:
            kept.append(dataclasses.replace(triple, response_ids=ids, **texts))
    return kept, dropped
