"""Recipe `offline`: each round trains the policy on given pairs; the reference is the policy at the round's start.

Pairs are steered or plain.
"""

from collections import Counter

from sso_jax.config import Config
from sso_jax.data.pair_files import complete_pairs, load_pairs
from sso_jax.data.records import Triple
from sso_jax.data.rows import Records
from sso_jax.preferences.filters import FILTER_CELLS
from sso_jax.preferences.pairs import drop_empty_contrasts, given_triples
from sso_jax.recipes.checks import (
    refuse_fields,
    refuse_judge_order,
    refuse_open_thoughts,
    refuse_unknown_tokens,
    sampling_fields,
)
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.input_tables import drop_refused_turns, pairs_table
from sso_jax.recipes.objective import build_objective, needed_cells, with_original
from sso_jax.recipes.run import Params, Recipe, Round, RoundSummary
from sso_jax.recipes.stages.evaluation import evaluate, judge_by_endpoint
from sso_jax.recipes.stages.policies import export
from sso_jax.recipes.stages.prompts import render_prompts
from sso_jax.recipes.stages.scoring import in_control_order, require_pairs, score_and_filter
from sso_jax.recipes.stages.update import train_on_pairs
from sso_jax.recipes.summary import summarize
from sso_jax.runtime.errors import InputError


def read(config: Config) -> Records[Triple]:
    """Reads the pairs and checks that they have what the objective needs.

    Raises:
      InputError: if pairs lack something; names their ids.
    """
    unused = {"queries.path": config.queries.path, "demonstrations.path": config.demonstrations.path}
    refuse_fields("offline", {**unused, **sampling_fields(config)})
    path, objective = config.pairs.path, build_objective(config.objective)
    if path is None:
        raise InputError("pairs.path: not given; recipe 'offline' needs a file or data set of pairs")
    refuse_judge_order(config)
    table = pairs_table(config)
    needed_by = f"objective.form {config.objective.form!r} with base {config.objective.base!r}"
    found = complete_pairs(load_pairs(table), needed_cells(config.objective), table, needed_by)
    if config.filter.enabled:
        found = complete_pairs(found, FILTER_CELLS, table, "filter.enabled")
    pairs = found.records
    rules = config.filter
    if rules.min_score_gap is not None and rules.reward_path is None and all(pair.scores is None for pair in pairs):
        raise InputError(
            f"filter.min_score_gap: no pair of {path} has scores; give pairs with chosen_score and rejected_score, or "
            "remove the field"
        )
    contrasts, dropped = drop_empty_contrasts(pairs, objective.cells)
    if not contrasts:
        reasons = dict(Counter(dropped.values()))
        raise InputError(
            f"pairs.path: none of the {len(pairs)} pairs of {path} has a contrast ({reasons}); give pairs with two "
            "different responses"
        )
    return found


def prepare(config: Config, engine: Engine, found: Records[Triple]) -> tuple[list[Triple], Counter]:
    """Tokenizes the pairs; those without a contrast are dropped later, when a round selects its pairs."""
    refuse_open_thoughts(engine.chat, "offline")
    pairs, refused = drop_refused_turns(engine.chat, found.records, pairs_table(config))
    given = given_triples(engine.chat.tokenizer, pairs)
    refuse_unknown_tokens(given, engine.known_tokens, "pairs.path")
    return given, found.dropped + refused


def run_round(this: Round[list[Triple]], policy: Params) -> tuple[Params, RoundSummary]:
    """pairs -> update -> policy; each round trains on the same pairs, rescored with the policy at its start."""
    config, given = this.run.config, this.run.dataset
    objective = build_objective(config.objective)
    contrasts, dropped = drop_empty_contrasts(given, objective.cells)
    if config.train.log_original and all(pair.original is not None for pair in given):
        objective = with_original(objective)

    ordered = in_control_order(this, contrasts)
    prompts = render_prompts(this, ordered)
    chosen = score_and_filter(this, objective, policy, prompts, lambda: (ordered, dropped))
    require_pairs(chosen, len(given), this.folder / "pairs.jsonl")
    judged = judge_by_endpoint(this, chosen.pairs)
    policy, training = train_on_pairs(this, objective, policy, chosen.pairs, prompts)
    exported = export(this, policy)
    evaluation = evaluate(this, policy)
    num_queries = len({(pair.query, str(pair.history)) for pair in given})
    return policy, summarize(num_queries, chosen, training, exported, evaluation, judged)


RECIPE = Recipe(read, prepare, run_round, lambda config: build_objective(config.objective).cells)
