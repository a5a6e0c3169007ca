"""Recipe `sft`: a round trains the policy on demonstrations, prompts with a response each, by their mean negative log-prob a token."""

from collections import Counter

from sso_jax.config import Config
from sso_jax.data.demonstrations import demonstration_ids, load_demonstrations
from sso_jax.data.records import Demonstration
from sso_jax.recipes import run as rounds
from sso_jax.recipes.checks import refuse_fields, warn_unused_objective
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.run import Recipe, Run
from sso_jax.recipes.stages.batch_plans import plan_demonstrations
from sso_jax.recipes.stages.evaluation import evaluate
from sso_jax.runtime.errors import InputError
from sso_jax.training.example_losses import supervised_losses
from sso_jax.training.trees import Branch, Tree


def read(config: Config) -> list[Demonstration]:
    """The demonstrations, after the fields of pairs and queries were refused."""
    unused = {
        "queries.path": config.queries.path,
        "pairs.path": config.pairs.path,
        "pairs.control": config.pairs.control,
        "filter.enabled": config.filter.enabled,
        "filter.min_score_gap": config.filter.min_score_gap,
        "model.reference_path": config.model.reference_path,
    }
    refuse_fields(config, "sft", unused)
    warn_unused_objective(config.objective)
    if config.demonstrations.path is None:
        raise InputError("demonstrations.path: not given; recipe 'sft' trains on a file or data set of prompts with responses")
    return load_demonstrations(config.demonstrations.path, config.demonstrations.split)


def settle(config: Config, engine: Engine, records: list[Demonstration]) -> tuple[list[Tree], Counter]:
    """Token trees of the demonstrations; those longer than the limit are dropped, and refused if they are all."""
    rows = [demonstration_ids(engine.chat, record) for record in records]
    trees = [Tree(prompt, [Branch(response, 0)]) for prompt, response in rows if len(prompt) + len(response) <= engine.max_tokens]
    if not trees:
        raise InputError(
            f"demonstrations.path: none of the {len(rows)} demonstrations of {config.demonstrations.path} fits {engine.max_tokens} tokens"
        )
    too_long = len(rows) - len(trees)
    return trees, Counter({"demonstration_too_long": too_long} if too_long else {})


def round(run: Run, iteration: int, params):
    """demonstrations -> updates -> policy; each round passes over the same ones."""
    plan = plan_demonstrations(
        run.engine, run.config, iteration, run.material, run.earlier_shape(iteration, run.folder(iteration), "training")
    )
    params, training = rounds.train(run, supervised_losses(run.engine.model), plan, iteration, params)
    exported = rounds.export(run, iteration, params)
    evaluation = evaluate(run, iteration, params)
    seconds = {"training": training["seconds"], "export": exported["seconds"], "evaluation": evaluation["seconds"]}
    rates = {"sampling": None, "training": training["tokens_per_second"]}
    numbers = {"num_queries": len(run.material), "dropped": {}, **evaluation, "seconds": seconds, "tokens_per_second": rates}
    return params, numbers


RECIPE = Recipe(read, settle, round)
