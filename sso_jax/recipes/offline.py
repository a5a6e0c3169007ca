"""Recipe `offline`: a round trains the policy on given pairs, steered or plain; its reference is the policy at its start."""

from collections import Counter

from sso_jax.config import Config
from sso_jax.data.pair_files import check_parts, load_pairs
from sso_jax.data.records import Triple
from sso_jax.preferences.filters import FILTER_CELLS
from sso_jax.preferences.pairs import drop_empty_contrasts, given_triples
from sso_jax.recipes import run as rounds
from sso_jax.recipes.checks import refuse_fields
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.objective import build_objective, with_original
from sso_jax.recipes.run import Recipe, Run
from sso_jax.recipes.stages.evaluation import evaluate, judge_by_endpoint
from sso_jax.recipes.stages.scoring import referenced_pairs, require_pairs
from sso_jax.runtime.errors import InputError


def read(config: Config) -> list[Triple]:
    """The pairs, after it was seen that they have what the objective needs.

    Raises:
      InputError: names the ids of the pairs that lack something.
    """
    refuse_fields(config, "offline", {"queries.path": config.queries.path, "demonstrations.path": config.demonstrations.path})
    path, objective = config.pairs.path, build_objective(config.objective)
    if path is None:
        raise InputError("pairs.path: not given; recipe 'offline' trains on a file or data set of pairs")
    if config.pairs.control == "judge_order":
        raise InputError("pairs.control: 'judge_order' is for pairs that the toy policy samples; give 'random_order' or 'none'")
    pairs = load_pairs(path, config.pairs.split)
    check_parts(pairs, objective.cells, path, f"objective.form {config.objective.form!r} with base {config.objective.base!r}")
    if config.filter.enabled:
        check_parts(pairs, FILTER_CELLS, path, "filter.enabled")
    rules = config.filter
    if rules.min_score_gap is not None and rules.reward_path is None and all(pair.scores is None for pair in pairs):
        raise InputError(f"filter.min_score_gap: no pair of {path} has scores; give pairs with chosen_score and rejected_score, or null")
    contrasts, dropped = drop_empty_contrasts(pairs, objective.cells)
    if not contrasts:
        raise InputError(f"pairs.path: none of the {len(pairs)} pairs of {path} has a contrast ({dict(Counter(dropped.values()))})")
    return pairs


def settle(config: Config, engine: Engine, pairs: list[Triple]) -> tuple[list[Triple], Counter]:
    """The pairs as token ids; those without a contrast are dropped when a round chooses its pairs."""
    return given_triples(engine.chat.tokenizer, pairs), Counter()


def round(run: Run, iteration: int, params):
    """pairs -> updates -> policy; each round passes over the same pairs, scored anew by the policy at its start."""
    folder, objective = run.folder(iteration), build_objective(run.config.objective)
    compared = objective.cells
    if run.config.train.log_original and all(pair.original is not None for pair in run.material):
        objective = with_original(objective)
    pairs, made = referenced_pairs(run, objective, iteration, params, folder, lambda: drop_empty_contrasts(run.material, compared))
    require_pairs(pairs, len(run.material), made["dropped"], folder / "pairs.jsonl")
    judged = judge_by_endpoint(run, iteration, pairs)
    params, training = rounds.train_on_pairs(run, objective, iteration, params, pairs)
    exported = rounds.export(run, iteration, params)
    evaluation = evaluate(run, iteration, params)
    parts = {"pairs": made, "training": training, "export": exported, "evaluation": evaluation}
    seconds = {name: part["seconds"] for name, part in parts.items()}
    rates = {"sampling": None, "training": training["tokens_per_second"]}
    summary = {**made, "num_queries": len({(pair.query, str(pair.history)) for pair in run.material}), "num_pairs": len(pairs)}
    return params, {**summary, **evaluation, **judged, "seconds": seconds, "tokens_per_second": rates}


RECIPE = Recipe(read, settle, round)
