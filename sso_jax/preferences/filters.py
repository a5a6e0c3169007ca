"""Filters of scored pairs, which return the reason of every dropped pair."""

import dataclasses
import math
from array import array
from collections.abc import Callable, Sequence

import numpy as np

from sso_jax.data.records import Cell, Dropped, Triple
from sso_jax.preferences.pairs import drop_by_reason, mean_log_probs
from sso_jax.runtime.spool import spooled, subset


def with_rewards(triples: Sequence[Triple], rewards: Sequence[tuple[float, float]]) -> Sequence[Triple]:
    """Sets the rewards (chosen, rejected) of each triple as its scores."""
    return spooled(
        dataclasses.replace(t, scores={"chosen": a, "rejected": b}) for t, (a, b) in zip(triples, rewards, strict=True)
    )


def keep_widest(triples: Sequence[Triple], share: float) -> tuple[Sequence[Triple], Dropped]:
    """Keeps the share of triples with the widest score gap, at least one, in order; the rest is dropped."""
    lead = [_lead(triple) for triple in triples]
    best = set(sorted(range(len(triples)), key=lambda i: (-lead[i], i))[: max(1, round(share * len(triples)))])
    dropped = {triple.id: "reward_rank" for i, triple in enumerate(triples) if i not in best}
    return subset(triples, sorted(best)), dropped


def _lead(triple: Triple) -> float:
    assert triple.scores is not None  # they were set by `with_rewards`, or checked
    return triple.scores["chosen"] - triple.scores["rejected"]


FILTER_CELLS = [
    Cell(context, response) for context in ("plain", "positive", "negative") for response in ("chosen", "rejected")
]
"""The six log-probs that the filter uses."""


def filter_pairs(triples: Sequence[Triple]) -> tuple[Sequence[Triple], Dropped]:
    """Applies the log-probability filter of SSO's release to mean log-probs.

    With `p`, `o`, `n` for the contexts x+, x, x-, it keeps pairs in three steps:

    1. order: p_chosen > o_chosen > n_chosen and n_rejected > o_rejected > p_rejected;
    2. near on-policy: o_chosen and o_rejected are at or above their means over the pairs left by step 1;
    3. clear gap: p_chosen - n_chosen and n_rejected - p_rejected are above their means over the pairs left by step 2.
    """
    dropped: Dropped = {}

    def keep(rows: Sequence[Triple], reason: str, test: Callable[[np.ndarray], np.ndarray]) -> Sequence[Triple]:
        if not rows:
            return rows
        # columns: o_chosen, o_rejected, p_chosen, p_rejected, n_chosen, n_rejected
        values = array("d", (table[c][r] for table in map(mean_log_probs, rows) for c, r in FILTER_CELLS))
        mask = test(np.array(values).reshape(-1, len(FILTER_CELLS)))
        dropped.update({row.id: reason for row, kept in zip(rows, mask, strict=True) if not kept})
        return subset(rows, np.flatnonzero(mask).tolist())

    def ordered(v: np.ndarray) -> np.ndarray:
        return (v[:, 2] > v[:, 0]) & (v[:, 0] > v[:, 4]) & (v[:, 5] > v[:, 1]) & (v[:, 1] > v[:, 3])

    def near_policy(v: np.ndarray) -> np.ndarray:
        return np.all(v[:, :2] >= v[:, :2].mean(axis=0), axis=1)

    def clear_gap(v: np.ndarray) -> np.ndarray:
        gaps = np.stack([v[:, 2] - v[:, 4], v[:, 5] - v[:, 3]], axis=1)
        return np.all(gaps > gaps.mean(axis=0), axis=1)

    kept = keep(triples, "filter_order", ordered)
    kept = keep(kept, "filter_off_policy", near_policy)
    return keep(kept, "filter_small_gap", clear_gap), dropped


def keep_clear_scores(triples: Sequence[Triple], least: float) -> tuple[Sequence[Triple], Dropped]:
    """Keeps triples whose chosen response leads in score by `least` or more; drops those without finite scores too."""

    def reason_of(triple: Triple) -> str | None:
        if triple.scores is None:
            return "no_scores"
        if not math.isfinite(_lead(triple)):
            return "score_not_finite"
        return "small_score_gap" if _lead(triple) < least else None

    return drop_by_reason(triples, reason_of)
