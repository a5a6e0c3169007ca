"""Recipe `online`, version 1 of the paper: a round samples triples for its queries, and trains the policy on their contrast."""

from sso_jax.config import Config
from sso_jax.data.records import Query
from sso_jax.recipes import run as rounds
from sso_jax.recipes.checks import refuse_fields
from sso_jax.recipes.objective import Objective, build_objective, with_original
from sso_jax.recipes.run import Recipe, Run
from sso_jax.recipes.stages import sampling as sampled
from sso_jax.recipes.stages.evaluation import evaluate, judge_by_endpoint
from sso_jax.runtime import stage_markers as stages
from sso_jax.runtime.errors import InputError


def read(config: Config) -> sampled.Queries:
    """The queries, after the fields that sampling does not use were refused."""
    refuse_scores(config, build_objective(config.objective))
    refuse_given_pairs(config)
    return sampled.read_queries(config)


def refuse_scores(config: Config, objective: Objective) -> None:
    """Raises `InputError` for an objective that needs scores, which sampled pairs do not have."""
    if any(context.startswith("score_conditioned_") for context, _ in objective.cells):
        raise InputError(
            f"objective.base: {config.objective.base!r} needs pairs with scores, and recipe {config.recipe!r} samples pairs without; "
            "give recipe offline and a pairs file with scores, or another base"
        )


def refuse_given_pairs(config: Config) -> None:
    """Raises `InputError` for fields of pairs that come from a file, and for the judge's order without a judge."""
    refuse_fields(config, config.recipe, {"pairs.path": config.pairs.path, "demonstrations.path": config.demonstrations.path})
    sampled.check_sampling(config)


def round(run: Run, iteration: int, params):
    """queries -> principles -> responses -> pairs -> updates -> policy."""
    folder, objective = run.folder(iteration), build_objective(run.config.objective)
    objective = with_original(objective) if run.config.train.log_original else objective
    queries, _ = stages.record_stage(folder, "queries", Query, lambda: (run.material.rounds[iteration - 1], {}))
    steered, principles = sampled.principles(run, iteration, params, queries)
    triples, responses = sampled.responses(run, iteration, params, steered, folder, policies=run.config.sampling.policies)
    pairs, made = sampled.pairs(run, objective, iteration, params, triples, folder)
    judged = judge_by_endpoint(run, iteration, pairs)
    params, training = rounds.train_on_pairs(run, objective, iteration, params, pairs)
    exported = rounds.export(run, iteration, params)
    evaluation = evaluate(run, iteration, params)
    parts = {"principles": principles, "responses": responses, "pairs": made, "training": training, "export": exported}
    return params, sampled.numbers({**parts, "evaluation": evaluation}, len(queries), len(pairs), judged)


RECIPE = Recipe(read, sampled.settle_queries, round)
