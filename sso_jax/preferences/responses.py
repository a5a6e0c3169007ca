"""Steered queries in, triples of sampled responses out; then triples in, clean triples out, what is dropped counted by reason."""

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from sso_jax.data.records import RESPONSES, Dropped, SteeredQuery, Triple
from sso_jax.data.tokenizer import decode_text, tokens_hash
from sso_jax.sampling.sampler import Request, Sampler, row_key

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
    earlier: Sequence[Callable[[], Any]] = (),
) -> list[Triple]:
    """y+ from x+, y- from x- and y_o from x for every (steered query, prompts by context), in one stream; y_o only where wanted.

    `earlier` loads the parameters of earlier policies, newest first: y+ and y- are then each sampled from one of all these and the
    present one, by a draw of its own, and the triple's extra key `policies` says how many rounds back. y_o stays the present policy's.
    """
    asked = [(record.id, response, prompts[CONTEXT_OF[response]]) for record, prompts in steered for response in wanted]
    requests = [Request(prompt, row_key(seed, iteration, name, response)) for name, response, prompt in asked]
    backs = [rounds_back(f"{seed}/{iteration}/{name}/{response}", response, len(earlier)) for name, response, _ in asked]
    answers: list[list[int]] = [[]] * len(requests)
    for back in sorted(set(backs)):
        places = [i for i, own in enumerate(backs) if own == back]
        stage = f"iteration {iteration}: responses" + (f" by the policy {back} rounds back" if back else "")
        own = params if back == 0 else earlier[back - 1]()
        for place, ids in zip(places, sampler.sample(own, [requests[i] for i in places], stage), strict=True):
            answers[place] = ids
    sampled, drawn = iter(answers), iter(backs)
    triples = []
    for record, _ in steered:
        ids = {response: next(sampled) for response in wanted}
        from_policies = {response: next(drawn) for response in wanted}
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
                extra={"policies": from_policies} if earlier else {},
                **texts,
            )
        )
    return triples


def rounds_back(seed: str, response: str, num_earlier: int) -> int:
    """How many rounds back the policy lies that gives this response: 0 to `num_earlier` alike, 0 for y_o."""
    return 0 if response == "original" else random.Random(f"{seed}/policy").randrange(num_earlier + 1)


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
