"""Recipe `online`, version 1 of the paper: each round samples triples and trains the policy on their contrast."""

from sso_jax.config import Config
from sso_jax.recipes.checks import refuse_given_pairs, refuse_missing_scores
from sso_jax.recipes.objective import build_objective, round_objective
from sso_jax.recipes.run import Params, Recipe, Round, RoundSummary
from sso_jax.recipes.stages.evaluation import evaluate, judge_by_endpoint
from sso_jax.recipes.stages.policies import export
from sso_jax.recipes.stages.prompts import render_prompts
from sso_jax.recipes.stages.sampling import (
    QueryRounds,
    prepare_queries,
    principles,
    read_queries,
    responses,
    round_queries,
)
from sso_jax.recipes.stages.scoring import require_pairs, sampled_candidates, score_and_filter
from sso_jax.recipes.stages.update import train_on_pairs
from sso_jax.recipes.summary import summarize


def read(config: Config) -> QueryRounds:
    """Reads the queries; refuses fields that this recipe does not use."""
    refuse_missing_scores(config, build_objective(config.objective))
    refuse_given_pairs(config)
    return read_queries(config)


def run_round(this: Round[QueryRounds], policy: Params) -> tuple[Params, RoundSummary]:
    """queries -> principles -> responses (y+, y-, y_o) -> pairs -> update -> policy."""
    config = this.run.config
    objective = round_objective(config)

    queries = round_queries(this)
    steered = principles(this, policy, queries)
    prompts = render_prompts(this, steered.queries)
    sampled = responses(this, policy, steered.queries, prompts, num_policies=config.sampling.policies)
    chosen = score_and_filter(this, objective, policy, prompts, lambda: sampled_candidates(this, sampled.triples))
    require_pairs(chosen, len(sampled.triples), this.folder / "responses.jsonl")
    judged = judge_by_endpoint(this, chosen.pairs)
    policy, training = train_on_pairs(this, objective, policy, chosen.pairs, prompts)
    exported = export(this, policy)
    evaluation = evaluate(this, policy)
    return policy, summarize(
        len(queries), chosen, training, exported, evaluation, judged, steered=steered, sampled=sampled
    )


RECIPE = Recipe(read, prepare_queries, run_round, lambda config: build_objective(config.objective).cells)
