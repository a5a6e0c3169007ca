"""Samples responses to steered queries as triples, and cleans them."""

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sso_jax.data.records import RESPONSES, Cell, Dropped, Prompts, SteeredQuery, Triple
from sso_jax.data.tokenizer import decode_text, tokens_hash
from sso_jax.preferences.pairs import drop_empty_contrasts, ids_of
from sso_jax.sampling.sampler import Request, ResponseSampler, Sampler, Samples, role_numbers, row_key

CONTEXT_OF = {"chosen": "positive", "rejected": "negative", "original": "plain"}
"""The context that each response is sampled from."""
_LABEL = re.compile(r"\s*\**(?:[A-Z][a-z]+(?:(?:,| and) [A-Za-z]+)*\s+)?(?:[Rr]esponse|[Aa]nswer|[Rr]eply)\s*:\**\s*")
"""Matches `Helpful response:`, `Helpful and accurate answer:` and the like, in bold or not."""


OTHER = -1


class SampleKey(NamedTuple):
    """What the random keys of a round's samples are derived from, besides the query and the response."""

    seed: int
    iteration: int


class RejectedSource(NamedTuple):
    """Another policy, which all y- are sampled from in place of the present one."""

    name: str
    """What the triples' extra key `rejected_by` says."""
    sampler: Sampler
    load: Callable[[], Any]
    """Returns its parameters."""
    context: str = "negative"
    """Context of the prompt that it answers."""


class _Draw(NamedTuple):
    """One response to sample."""

    query_id: str
    response: str
    request: Request
    back: int
    """Age in rounds of the policy that is sampled; 0 is the present one, OTHER a `RejectedSource`."""


class SampledTriples(NamedTuple):
    """Sampled triples, and numbers of their responses by role (`role_numbers`)."""

    triples: list[Triple]
    roles: dict[str, dict[str, float | None]]


def sample_triples(
    sampler: ResponseSampler,
    policies: Sequence,
    tokenizer: PreTrainedTokenizerBase,
    queries: list[SteeredQuery],
    prompts: dict[str, Prompts],
    key: SampleKey,
    wanted: Sequence[str] = RESPONSES,
    rejected: RejectedSource | None = None,
) -> SampledTriples:
    """Samples y+ from x+, y- from x- and y_o from x for every query.

    Args:
      sampler: samples the responses.
      policies: the present policy's parameters, then functions that load those of earlier ones, newest first. With
        several, y+ and y- are each sampled from one of them, drawn independently, and the triple's extra key `policies`
        holds its age in rounds. y_o is always sampled from the present policy.
      tokenizer: tokenizer of the policy.
      queries: queries to answer.
      prompts: prompts by query id and context.
      key: seed and iteration, from which the random keys derive.
      wanted: the responses to sample, of `chosen` (y+), `rejected` (y-) and `original` (y_o).
      rejected: what y- is sampled from instead; the triple's extra key `rejected_by` has its name.
    """
    present, *earlier = policies

    def draw(query_id: str, response: str) -> _Draw:
        other = rejected if response == "rejected" else None
        context = CONTEXT_OF[response] if other is None else other.context
        request = Request(prompts[query_id][context], row_key(*key, query_id, response))
        seed = f"{key.seed}/{key.iteration}/{query_id}/{response}"
        return _Draw(query_id, response, request, rounds_back(seed, response, len(earlier)) if other is None else OTHER)

    draws = [draw(query.id, response) for query in queries for response in wanted]
    sampled: dict[str, dict[str, list[int]]] = {query.id: {} for query in queries}
    stages: list[Samples] = []
    roles: list[list[str]] = []
    for back in sorted({draw.back for draw in draws}):
        own = [draw for draw in draws if draw.back == back]
        stage, requests = f"iteration {key.iteration}: responses", [draw.request for draw in own]
        if back == OTHER and rejected is not None:
            stages.append(rejected.sampler.sample(rejected.load(), requests, f"{stage} by {rejected.name}"))
        else:
            policy = present if back == 0 else earlier[back - 1]()
            stages.append(
                sampler.sample(policy, requests, stage + (f" by the policy {back} rounds back" if back else ""))
            )
        roles.append([draw.response for draw in own])
        for one, ids in zip(own, stages[-1].responses, strict=True):
            sampled[one.query_id][one.response] = ids
    extra = _extra(draws, bool(earlier), rejected)
    triples = [_triple(query, sampled[query.id], wanted, tokenizer, extra.get(query.id, {})) for query in queries]
    return SampledTriples(triples, role_numbers(stages, roles))


def _extra(draws: list[_Draw], several: bool, rejected: RejectedSource | None) -> dict[str, dict[str, Any]]:
    """Returns what the triples say about the policies of their responses, by query id."""
    extra: dict[str, dict[str, Any]] = {draw.query_id: {} for draw in draws}
    for draw in draws:
        if draw.back == OTHER and rejected is not None:
            extra[draw.query_id]["rejected_by"] = rejected.name
        elif several:
            extra[draw.query_id].setdefault("policies", {})[draw.response] = draw.back
    return extra


def _triple(
    query: SteeredQuery,
    ids: dict[str, list[int]],
    wanted: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    extra: dict,
) -> Triple:
    texts = {response: decode_text(tokenizer, own) for response, own in ids.items()}
    return Triple(
        id=query.id,
        query=query.query,
        good_system=query.good_system,
        bad_system=query.bad_system,
        chosen=texts["chosen"],
        rejected=texts["rejected"],
        original=texts.get("original"),
        features=query.features,
        response_ids={response: ids[response] for response in wanted},
        tokens_hash=tokens_hash(tokenizer),
        history=query.history,
        extra=extra,
    )


def rounds_back(seed: str, response: str, num_earlier: int) -> int:
    """Draws the age in rounds of the policy for a response: uniform from 0 to `num_earlier`, always 0 for y_o."""
    return 0 if response == "original" else random.Random(f"{seed}/policy").randrange(num_earlier + 1)


def strip_label(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int] | None:
    """Removes a leading label such as "Helpful response:" from token ids, at a token boundary.

    `Helpful response: 7 .` becomes `7 .`. Returns None if the label ends inside a token, or if nothing follows it.
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
    """Strips labels from the responses of triples; returns the triples kept, and the reason of each one dropped.

    Drops triples with a label that cannot be stripped, with an empty response, or with two equal responses.
    """
    unlabelled: list[Triple] = []
    dropped: Dropped = {}
    for triple in triples:
        stripped = {response: strip_label(tokenizer, ids) for response, ids in ids_of(triple).items()}
        left = {response: ids for response, ids in stripped.items() if ids is not None}
        if len(left) < len(stripped):
            dropped[triple.id] = "label"
        else:
            texts: dict[str, Any] = {response: decode_text(tokenizer, ids) for response, ids in left.items()}
            unlabelled.append(dataclasses.replace(triple, response_ids=left, **texts))
    compared = [Cell("plain", response) for response in (ids_of(triples[0]) if triples else ())]
    kept, empty = drop_empty_contrasts(unlabelled, compared)
    reasons = {**dropped, **empty}
    return kept, {triple.id: reasons[triple.id] for triple in triples if triple.id in reasons}
