"""Builds the summary of a round from the results of its stages."""

from collections import Counter
from typing import Any

from sso_jax.recipes.run import RoundSummary
from sso_jax.recipes.stages.evaluation import EvaluationResult
from sso_jax.recipes.stages.sampling import PrinciplesResult, ResponsesResult
from sso_jax.recipes.stages.scoring import PairsResult
from sso_jax.recipes.stages.update import TrainingResult


def role_numbers(steered: PrinciplesResult | None, sampled: ResponsesResult | None) -> dict[str, dict]:
    """Returns the numbers of all that the policy sampled in a round, by role."""
    return {**(steered.roles if steered else {}), **(sampled.roles if sampled else {})}


def padding_of(chosen: PairsResult, training: TrainingResult) -> dict[str, float]:
    """Returns the share of padding among the tokens of the rows of scoring and updates."""
    scoring = {} if chosen.padding is None else {"scoring": chosen.padding}
    return {**scoring, "updates": training.padding}


def summarize(
    num_queries: int,
    chosen: PairsResult,
    training: TrainingResult,
    export_seconds: float,
    evaluation: EvaluationResult,
    judged: dict[str, Any] | None,
    steered: PrinciplesResult | None = None,
    sampled: ResponsesResult | None = None,
) -> RoundSummary:
    """Returns the summary of a round that trained on pairs; `steered` and `sampled` are None if pairs were given."""
    counts = steered.counts if steered else None
    stages = {"principles": steered, "responses": sampled, "pairs": chosen, "training": training}
    seconds = {name: result.seconds for name, result in stages.items() if result is not None}
    dropped = Counter(sampled.dropped if sampled else {}) + Counter(chosen.dropped)
    return RoundSummary(
        **vars(chosen.numbers),
        **evaluation.numbers(),
        num_queries=num_queries,
        num_pairs=len(chosen.pairs),
        dropped=dict(dropped),
        before_filter=chosen.before_filter,
        random_features=counts.random_features if counts else None,
        fallback_principles=counts.fallback_principles if counts else None,
        unparsed=counts.unparsed if counts else None,
        unanswered=counts.unanswered if counts else None,
        endpoint_judge=judged,
        held_out=training.held_out,
        padding=padding_of(chosen, training),
        num_cut=chosen.num_cut,
        sampling=role_numbers(steered, sampled),
        seconds={**seconds, "export": export_seconds, "evaluation": evaluation.seconds},
        tokens_per_second={
            "sampling": sampled.tokens_per_second if sampled else None,
            "training": training.tokens_per_second,
        },
    )
