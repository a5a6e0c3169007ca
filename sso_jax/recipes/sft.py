"""Recipe `sft`: each round trains the policy on prompts with one response, by the mean negative log-prob per token."""

import logging
from collections import Counter

from sso_jax.config import Config
from sso_jax.data.chat import end_of_turn
from sso_jax.data.demonstrations import demonstration_ids, load_demonstrations
from sso_jax.data.records import Demonstration
from sso_jax.data.rows import Records
from sso_jax.recipes.checks import refuse_fields, refuse_open_thoughts, sampling_fields, warn_unused_objective
from sso_jax.recipes.engine import Engine, router_weight
from sso_jax.recipes.input_tables import demonstrations_table, drop_refused_turns
from sso_jax.recipes.run import Params, Recipe, Round, RoundSummary
from sso_jax.recipes.stages.batch_plans import plan_demonstrations
from sso_jax.recipes.stages.evaluation import evaluate
from sso_jax.recipes.stages.policies import export
from sso_jax.recipes.stages.update import train
from sso_jax.runtime.errors import InputError
from sso_jax.training.example_losses import supervised_losses
from sso_jax.training.trees import Branch, Tree

log = logging.getLogger(__name__)


def read(config: Config) -> Records[Demonstration]:
    """Reads the demonstrations; refuses fields of pairs and queries."""
    unused = {
        "queries.path": config.queries.path,
        "pairs.path": config.pairs.path,
        "pairs.control": config.pairs.control,
        "filter.enabled": config.filter.enabled,
        "filter.min_score_gap": config.filter.min_score_gap,
        "model.reference_path": config.model.reference_path,
    }
    refuse_fields("sft", {**unused, **sampling_fields(config)})
    warn_unused_objective(config.objective)
    if config.demonstrations.path is None:
        raise InputError(
            "demonstrations.path: not given; recipe 'sft' needs a file or data set of prompts with responses"
        )
    return load_demonstrations(demonstrations_table(config))


def prepare(config: Config, engine: Engine, found: Records[Demonstration]) -> tuple[list[Tree], Counter]:
    """Returns the demonstrations as token trees; drops or cuts those above the token limit.

    Raises:
      InputError: if all are above the limit.
    """
    refuse_open_thoughts(engine.chat, "sft")
    records, refused = drop_refused_turns(engine.chat, found.records, demonstrations_table(config))
    rows = [demonstration_ids(engine.chat, record) for record in records]
    for record, ids in zip(records, rows, strict=True):
        engine.known_tokens.require([*ids[0], *ids[1]], f"demonstrations.path: demonstration {record.query[:60]!r}")
    limit = engine.max_tokens
    num_long = sum(len(p) + len(response) > limit for p, response in rows)
    if config.train.long_examples == "cut":
        rows = [(p, response[: max(0, limit - len(p))] or response) for p, response in rows]
    trees = [Tree(p, [Branch(response, 0)]) for p, response in rows if len(p) + len(response) <= limit]
    if not trees:
        raise InputError(
            f"demonstrations.path: none of the {len(rows)} demonstrations of {config.demonstrations.path} fits {limit} "
            "tokens; give shorter ones, or raise train.max_tokens"
        )
    too_long = len(rows) - len(trees)
    if num_long:
        log.warning(
            "%d of %d demonstrations have more than %d tokens (train.max_tokens): %d were cut and %d left out",
            *(num_long, len(rows), limit, num_long - too_long, too_long),
        )
    return trees, found.dropped + refused + Counter({"demonstration_too_long": too_long})


def run_round(this: Round[list[Tree]], policy: Params) -> tuple[Params, RoundSummary]:
    """demonstrations -> update -> policy; each round trains on the same demonstrations."""
    trees, end = this.run.dataset, end_of_turn(this.run.engine.chat.tokenizer)
    weight = router_weight(this.run.engine.model.architecture, this.run.config.train)
    losses = supervised_losses(this.run.engine.model, weight)
    policy, training = train(this, losses, plan_demonstrations(this, trees), policy)
    exported = export(this, policy)
    evaluation = evaluate(this, policy)
    return policy, RoundSummary(
        **evaluation.numbers(),
        num_queries=len(trees),
        dropped={},
        num_cut=sum(tree.branches[0].response_ids[-1] != end for tree in trees),
        padding={"updates": training.padding},
        seconds={"training": training.seconds, "export": exported, "evaluation": evaluation.seconds},
        tokens_per_second={"sampling": None, "training": training.tokens_per_second},
    )


RECIPE = Recipe(read, prepare, run_round)
