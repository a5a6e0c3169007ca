"""Recipe `generator`, version 2 of the paper: a round trains a generator from the policy, and the policy on what that one samples.

The generator starts from the policy and learns L+ + L- (form `generator`) on the policy's own triples. It then answers under good and
bad principles, and the policy as it was before is trained on these pairs under the plain prompt, with the base loss alone.
"""

import dataclasses
import logging
from pathlib import Path

from sso_jax.config import Config
from sso_jax.data.records import Query, SteeredQuery
from sso_jax.recipes import run as rounds
from sso_jax.recipes.objective import LOSS_SETTINGS, Objective, build_objective
from sso_jax.recipes.online import refuse_given_pairs, refuse_scores
from sso_jax.recipes.run import Recipe, Run
from sso_jax.recipes.stages import sampling as sampled
from sso_jax.recipes.stages.evaluation import evaluate, judge_by_endpoint
from sso_jax.runtime import stage_markers as stages

log = logging.getLogger(__name__)


def objectives(config: Config) -> tuple[Objective, Objective]:
    """What the generator and what the policy minimises: L+ + L-, and the base loss on the plain pair."""
    given = config.objective
    if given.form != "generator":
        log.warning("recipe 'generator' does not use objective.form %r: it trains a generator by L+ + L-", given.form)
    of_policy = type(given)(
        form="pairwise",
        sft_weight=0.0,
        **{field: getattr(given, field) for field in ("base", "degree_removal", *LOSS_SETTINGS)},
    )
    return build_objective(dataclasses.replace(given, form="generator")), build_objective(of_policy)


def generator_config(config: Config) -> Config:
    """The config of the generator's training: fields of section `generator` in place of those of the policy's."""
    own = config.generator
    train = {name: value for name in ("batch_size", "epochs") if (value := getattr(own, name)) is not None}
    rate = {} if own.learning_rate is None else {"learning_rate": own.learning_rate}
    micro = config.train.microbatch_size
    if micro is not None and own.batch_size is not None and own.batch_size % micro:
        train["microbatch_size"] = None
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, **train), optimizer=dataclasses.replace(config.optimizer, **rate)
    )


def read(config: Config) -> sampled.Queries:
    """The queries, after the fields that do not go with this recipe were refused."""
    refuse_scores(config, objectives(config)[1])
    generator_config(config)
    refuse_given_pairs(config)
    return sampled.read_queries(config)


def round(run: Run, iteration: int, params):
    """queries -> principles -> triples -> generator -> its pairs -> updates of the policy as it was -> policy."""
    folder = run.folder(iteration)
    of_generator, of_policy = objectives(run.config)
    queries, _ = stages.record_stage(folder, "queries", Query, lambda: (run.material.rounds[iteration - 1], {}))
    steered, principles = sampled.principles(run, iteration, params, queries)
    if stages.whole(folder, "responses") is None or stages.damaged(folder / "generator"):
        params = _train_generator(run, of_generator, iteration, params, steered[: run.config.generator.queries], folder / "generator")
    wanted = tuple(dict.fromkeys(response for _, response in of_policy.cells))
    triples, responses = sampled.responses(run, iteration, params, steered, folder, wanted)
    if stages.finished(folder / "generator", "training") is not None:
        params = rounds.start_params(run, iteration)
    pairs, made = sampled.pairs(run, of_policy, iteration, params, triples, folder)
    judged = judge_by_endpoint(run, iteration, pairs)
    taught = stages.finished(folder / "generator", "training")
    params, training = rounds.train_on_pairs(run, of_policy, iteration, params, pairs, first_step=taught["updates"])
    exported = rounds.export(run, iteration, params)
    evaluation = evaluate(run, iteration, params)
    parts = {"principles": principles, "responses": responses, "pairs": made, "training": training, "export": exported}
    numbers = sampled.numbers({**parts, "evaluation": evaluation}, len(queries), len(pairs), judged)
    for name in ("responses", "pairs", "training"):
        numbers["seconds"][f"generator_{name}"] = stages.finished(folder / "generator", name)["seconds"]
    return params, numbers


def _train_generator(run: Run, objective: Objective, iteration: int, params, steered: list[SteeredQuery], folder: Path):
    """Parameters of the generator; those of the policy are used up. Its stages lie in `iteration_K/generator`."""
    triples, _ = sampled.responses(run, iteration, params, steered, folder, policies=run.config.sampling.policies)
    pairs, _ = sampled.pairs(run, objective, iteration, params, triples, folder)
    own = dataclasses.replace(run, config=generator_config(run.config))
    params, _ = rounds.train_on_pairs(own, objective, iteration, params, pairs, folder=folder)
    return params


RECIPE = Recipe(read, sampled.settle_queries, round)
