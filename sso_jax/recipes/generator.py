"""Recipe `generator`, version 2 of the paper: each round trains a generator, and the policy on the generator's pairs.

The generator starts from the policy and learns L+ + L- (form `generator`) on the policy's own triples. It then answers
under good and bad principles, and the policy from the start of the round is trained on these pairs with the plain
prompt and the base loss alone.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from sso_jax.config import Config
from sso_jax.data.records import Cell, Prompts, SteeredQuery
from sso_jax.recipes.checks import refuse_given_pairs, refuse_missing_scores
from sso_jax.recipes.objective import LOSS_SETTINGS, Objective, build_objective
from sso_jax.recipes.run import Params, Recipe, Round, RoundSummary
from sso_jax.recipes.stages.evaluation import evaluate, judge_by_endpoint
from sso_jax.recipes.stages.policies import export, start_policy
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
from sso_jax.runtime.stage_markers import damaged, finished, read_verified

GENERATOR_FOLDER = "generator"
"""Subfolder of a round for the generator's stages."""
log = logging.getLogger(__name__)


def objectives(config: Config) -> tuple[Objective, Objective]:
    """Returns the objectives of the generator, L+ + L-, and of the policy, the base loss on the plain pair."""
    given = config.objective
    if given.form != "generator":
        log.warning("recipe 'generator' does not use objective.form %r: it trains a generator on L+ + L-", given.form)
    shared = {field: getattr(given, field) for field in ("base", "degree_removal", "token_contrast", *LOSS_SETTINGS)}
    of_policy = type(given)(form="pairwise", sft_weight=0.0, **shared)
    of_generator = dataclasses.replace(given, form="generator", token_contrast=0.0)
    return build_objective(of_generator), build_objective(of_policy)


def generator_config(config: Config) -> Config:
    """Returns the config of the generator's training: section `generator` overrides the fields of the policy's."""
    own = config.generator
    train = {name: value for name in ("batch_size", "epochs") if (value := getattr(own, name)) is not None}
    rate = {} if own.learning_rate is None else {"learning_rate": own.learning_rate}
    optimizer = dataclasses.replace(config.optimizer, **rate)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train), optimizer=optimizer)


def read(config: Config) -> QueryRounds:
    """Reads the queries; refuses fields that conflict with this recipe."""
    refuse_missing_scores(config, objectives(config)[1])
    generator_config(config)
    refuse_given_pairs(config)
    return read_queries(config)


def run_round(this: Round[QueryRounds], policy: Params) -> tuple[Params, RoundSummary]:
    """queries -> principles -> generator -> its responses -> pairs -> update of the round's first policy -> policy."""
    config = this.run.config
    generator_objective, policy_objective = objectives(config)
    generator_round = dataclasses.replace(this, part=GENERATOR_FOLDER)

    queries = round_queries(this)
    steered = principles(this, policy, queries)
    prompts = render_prompts(this, steered.queries)
    generator = None
    if read_verified(this.folder, "responses") is None or damaged(generator_round.folder):
        own = steered.queries[: config.generator.queries]
        generator = train_generator(generator_round, generator_objective, policy, own, prompts)
    wanted = tuple(dict.fromkeys(cell.response for cell in policy_objective.cells))
    samples_with = policy if generator is None else generator
    sampled = responses(this, samples_with, steered.queries, prompts, wanted, trained=generator is not None)
    if generator is not None:  # its training has consumed the policy's parameters
        policy = start_policy(this.run, this.iteration)
    chosen = score_and_filter(
        this, policy_objective, policy, prompts, lambda: sampled_candidates(this, sampled.triples)
    )
    require_pairs(chosen, len(sampled.triples), this.folder / "responses.jsonl")
    judged = judge_by_endpoint(this, chosen.pairs)
    first_step = finished(generator_round.folder, "training")["updates"]
    policy, training = train_on_pairs(this, policy_objective, policy, chosen.pairs, prompts, first_step)
    exported = export(this, policy)
    evaluation = evaluate(this, policy)
    summary = summarize(len(queries), chosen, training, exported, evaluation, judged, steered=steered, sampled=sampled)
    return policy, dataclasses.replace(summary, seconds={**summary.seconds, **_seconds(generator_round)})


def train_generator(
    this: Round, objective: Objective, policy: Params, queries: Sequence[SteeredQuery], prompts: Mapping[str, Prompts]
) -> Params:
    """Trains the generator: responses of the policy -> pairs -> update -> generator.

    The policy's parameters are donated.
    """
    sampled = responses(this, policy, queries, prompts, num_policies=this.run.config.sampling.policies)
    chosen = score_and_filter(this, objective, policy, prompts, lambda: sampled_candidates(this, sampled.triples))
    require_pairs(chosen, len(sampled.triples), this.folder / "responses.jsonl")
    run = dataclasses.replace(this.run, config=generator_config(this.run.config))
    generator, _ = train_on_pairs(dataclasses.replace(this, run=run), objective, policy, chosen.pairs, prompts)
    return generator


def _seconds(generator_round: Round) -> dict[str, float]:
    """Returns the seconds of the generator's own stages."""
    stages = ("responses", "pairs", "training")
    return {f"generator_{stage}": finished(generator_round.folder, stage)["seconds"] for stage in stages}


def held_out_cells(config: Config) -> list[Cell]:
    """Returns the log-probs that held-out pairs need: those of the generator's objective and of the policy's."""
    return list(dict.fromkeys(cell for objective in objectives(config) for cell in objective.cells))


RECIPE = Recipe(read, prepare_queries, run_round, held_out_cells)
