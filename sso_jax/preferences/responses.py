"""Samples responses to steered queries as triples, and cleans them."""

import dataclasses
import random
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sso_jax.data.records import RESPONSES, Cell, Dropped, Prompts, SteeredQuery, Triple
from sso_jax.data.tokenizer import decode_text, tokens_hash
from sso_jax.preferences.pairs import empty_contrast, ids_of
from sso_jax.runtime.spool import Arrivals, Lazy, Spool, spooled, subset
from sso_jax.sampling.sampler import Request, ResponseSampler, Sampler, Samples, role_numbers, row_key

CONTEXT_OF = {"chosen": "positive", "rejected": "negative", "original": "plain"}
"""The context that each response is sampled from."""
_LABEL = re.compile(r"\s*\**(?:[A-Z][a-z]+(?:(?:,| and) [A-Za-z]+)*\s+)?(?:[Rr]esponse|[Aa]nswer|[Rr]eply)\s*:\**\s*")
"""Matches `Helpful response:`, `Helpful and accurate answer:` and the like, in bold or not."""


OTHER = -1
"""Stands for a `RejectedSource` among the ages of policies."""


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


class SampledTriples(NamedTuple):
    """Sampled triples, and numbers of their responses by role (`role_numbers`)."""

    triples: Sequence[Triple]
    roles: dict[str, dict[str, float | None]]


def sample_triples(
    sampler: ResponseSampler,
    policies: Sequence,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[SteeredQuery],
    prompts: Mapping[str, Prompts],
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
    names, num = [query.id for query in queries], len(wanted)  # response r of query q has the number q * num + r
    ages = array("q", (_age(key, name, response, len(earlier), rejected) for name in names for response in wanted))

    def request(number: int) -> Request:
        name, response = names[number // num], wanted[number % num]
        context = rejected.context if rejected and response == "rejected" else CONTEXT_OF[response]
        return Request(prompts[name][context], row_key(*key, name, response))

    def sampled(age: int, numbers: Sequence[int]) -> Samples:
        own, title = subset(Lazy(len(ages), request), numbers), f"iteration {key.iteration}: responses"
        if age == OTHER and rejected is not None:
            return rejected.sampler.sample(rejected.load(), own, f"{title} by {rejected.name}")
        if age > 0:
            return sampler.sample(earlier[age - 1](), own, f"{title} by the policy {age} rounds back")
        return sampler.sample(present, own, title)

    responses, stages, roles = Arrivals[list[int]](len(ages)), list[Samples](), list[list[str]]()
    for age in sorted(set(ages)):
        numbers = array("q", (number for number, other in enumerate(ages) if other == age))
        stages.append(sampled(age, numbers))
        roles.append([wanted[number % num] for number in numbers])
        responses.update(zip(numbers, stages[-1].responses, strict=True))
    in_order = responses.in_order()

    def triples() -> Iterator[Triple]:
        for q, query in enumerate(queries):
            own = slice(q * num, (q + 1) * num)
            extra = _extra(dict(zip(wanted, ages[own], strict=True)), bool(earlier), rejected)
            yield _triple(query, dict(zip(wanted, in_order[own], strict=True)), tokenizer, extra)

    return SampledTriples(spooled(triples()), role_numbers(stages, roles))


def _age(key: SampleKey, query_id: str, response: str, num_earlier: int, rejected: RejectedSource | None) -> int:
    """Returns the age in rounds of the policy that a response is sampled from; 0 is the present one."""
    if response == "rejected" and rejected is not None:
        return OTHER
    return rounds_back(f"{key.seed}/{key.iteration}/{query_id}/{response}", response, num_earlier)


def _extra(ages: dict[str, int], several: bool, rejected: RejectedSource | None) -> dict[str, Any]:
    """Returns what a triple says about the policies of its responses."""
    extra: dict[str, Any] = {}
    for response, age in ages.items():
        if age == OTHER and rejected is not None:
            extra["rejected_by"] = rejected.name
        elif several:
            extra.setdefault("policies", {})[response] = age
    return extra


def _triple(
    query: SteeredQuery, ids: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, extra: dict[str, Any]
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
        response_ids=ids,
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


def clean_triples(tokenizer: PreTrainedTokenizerBase, triples: Sequence[Triple]) -> tuple[Sequence[Triple], Dropped]:
    """Strips labels from the responses of triples; returns the triples kept, and the reason of each one dropped.

    Drops triples with a label that cannot be stripped, with an empty response, or with two equal responses.
    """
    compared = [Cell("plain", response) for response in (ids_of(triples[0]) if triples else ())]
    stripped: Spool[Triple] = Spool()
    places, dropped = array("q"), Dropped()  # where a kept triple is: its number, or -1 - that in `stripped`
    for number, triple in enumerate(triples):
        own = _without_labels(tokenizer, triple)
        reason = "label" if own is None else empty_contrast(own, compared)
        if reason is not None:
            dropped[triple.id] = reason
        elif own is None or own is triple:
            places.append(number)
        else:
            places.append(-1 - len(stripped))
            stripped.append(own)
    if not stripped:
        return subset(triples, places), dropped
    return spooled(triples[place] if place >= 0 else stripped[-1 - place] for place in places), dropped


def _without_labels(tokenizer: PreTrainedTokenizerBase, triple: Triple) -> Triple | None:
    """Returns the triple, itself if no response has a label; None if a label cannot be stripped."""
    left: dict[str, list[int]] = {}
    for response, ids in ids_of(triple).items():
        stripped = strip_label(tokenizer, ids)
        if stripped is None:
            return None
        left[response] = stripped
    if left == ids_of(triple):
        return triple
    texts: dict[str, Any] = {response: decode_text(tokenizer, ids) for response, ids in left.items()}
    return dataclasses.replace(triple, response_ids=left, **texts)
