"""A round's queries in, steered queries and the triples that the policy samples for them out: the sampling stages of a round."""

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sso_jax.config import Config
from sso_jax.data.queries import deal, load_queries
from sso_jax.data.records import RESPONSES, Dropped, Query, SteeredQuery, Triple
from sso_jax.preferences.principle_sources import UNPARSED_FILE, given_principles, steer_queries
from sso_jax.preferences.responses import clean_triples, sample_triples
from sso_jax.preferences.steering import steered_prompts
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.environment import fitting_queries, toy_queries
from sso_jax.recipes.objective import Objective
from sso_jax.recipes.run import Run, earlier_params
from sso_jax.recipes.stages.scoring import referenced_pairs, require_pairs
from sso_jax.runtime import stage_markers as stages
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.hosts import map_across_processes


@dataclass(frozen=True)
class Queries:
    """What a recipe that samples works on."""

    rounds: list[list[Query]]
    """Queries of each round; before they are settled, all of them as one."""
    principles: dict[str, SteeredQuery]
    """Given ones by query id, for principles.source `file`."""


def check_sampling(config: Config) -> None:
    """Raises `InputError` for the judge's order without a judge, and for a gap of scores where nothing scores the pairs."""
    if config.pairs.control == "judge_order" and config.model.path != "toy":
        raise InputError("pairs.control: 'judge_order' needs the toy world's judge; set model.path to toy, or another control")
    gap = config.filter.min_score_gap
    if gap is not None and config.filter.reward_path is None:
        raise InputError(f"filter.min_score_gap: {gap} of pairs that nobody scores; give filter.reward_path, or leave it out")


def read_queries(config: Config) -> Queries:
    """The toy world's queries, or those of the file, and the principles that are given for them.

    Raises:
      InputError: for a file that is missing, not needed or not readable, or with fewer queries than rounds.
    """
    toy, path = config.model.path == "toy", config.queries.path
    if toy and path is not None:
        raise InputError(f"queries.path: {path!r} does not go with model.path toy, which has queries of its own; leave it out")
    if not toy and path is None:
        raise InputError("queries.path: not given; a model from a folder needs a file or data set of queries")
    queries = toy_queries(config.toy.descriptions) if toy else load_queries(path, config.queries.split)
    deal(queries, config.queries.per_iteration, config.run.iterations, config.run.seed)
    return Queries([queries], given_principles(config.principles, queries))


def settle_queries(config: Config, engine: Engine, read: Queries) -> tuple[Queries, Counter]:
    """The queries of each round; those without room for a response are dropped and counted."""
    fitting, dropped = fitting_queries(engine, read.rounds[0], config.queries.path)
    rounds = deal(fitting, config.queries.per_iteration, config.run.iterations, config.run.seed)
    return Queries(rounds, read.principles), dropped


def principles(run: Run, iteration: int, params, queries: list[Query]) -> tuple[list[SteeredQuery], dict]:
    """The queries with their two system messages, and how much of these was drawn at random, fell back or was not answered."""
    config, folder = run.config, run.folder(iteration)

    def make() -> tuple[list[SteeredQuery], dict]:
        given = run.material.principles
        return steer_queries(config, given, run.endpoint, run.engine, params, queries, iteration, folder)

    return stages.record_stage(folder, "principles", SteeredQuery, make, [UNPARSED_FILE])


def responses(
    run: Run,
    iteration: int,
    params,
    steered: list[SteeredQuery],
    folder: Path,
    wanted: tuple[str, ...] = RESPONSES,
    policies: int = 1,
) -> tuple[list[Triple], dict]:
    """The triples that the policy with `params` samples, or as much of them as is wanted, written to `folder/responses.jsonl`.

    With more `policies`, y+ and y- come from those of so many rounds, as far as there are any, this one's included.
    """
    engine = run.engine
    earlier = [partial(earlier_params, run, iteration - 1 - back) for back in range(1, min(policies, iteration))]

    def make() -> tuple[list[Triple], dict]:
        prompts = map_across_processes(lambda record: steered_prompts(engine.chat, record), steered)
        fitting = [item for item in zip(steered, prompts, strict=True) if all(engine.sampler.fits(prompt) for prompt in item[1].values())]
        start = time.perf_counter()
        triples = sample_triples(engine.sampler, params, engine.chat.tokenizer, fitting, run.config.run.seed, iteration, wanted, earlier)
        num_tokens = sum(len(ids) for triple in triples for ids in triple.response_ids.values())
        rate = num_tokens / (time.perf_counter() - start)
        with_headroom = {record.id for record, _ in fitting}
        dropped: Dropped = {record.id: "prompt_too_long" for record in steered if record.id not in with_headroom}
        counts = {"dropped": dict(Counter(dropped.values())), "dropped_by_id": dropped}
        return triples, {**counts, "tokens_per_second": rate}

    return stages.record_stage(folder, "responses", Triple, make)


def cleaned(run: Run, triples: list[Triple]) -> tuple[list[Triple], Dropped]:
    """Sampled triples without labels, empty responses and copies; what is dropped, with the reason."""
    return clean_triples(run.engine.chat.tokenizer, triples)


def pairs(run: Run, objective: Objective, iteration: int, params, triples: list[Triple], folder: Path) -> tuple[list[Triple], dict]:
    """The pairs that sampled triples leave, cleaned, scored and filtered, in `folder/pairs.jsonl`; none at all is refused."""
    kept, made = referenced_pairs(run, objective, iteration, params, folder, lambda: cleaned(run, triples))
    require_pairs(kept, len(triples), made["dropped"], folder / "responses.jsonl")
    return kept, made


def numbers(parts: dict[str, dict], num_queries: int, num_pairs: int, judged: dict) -> dict:
    """The row of a round in summary.json, from what its stages said of themselves (`parts`, by stage) and what an endpoint judged."""
    dropped = Counter(parts["responses"]["dropped"]) + Counter(parts["pairs"]["dropped"])
    steering = {name: value for name, value in parts["principles"].items() if name != "seconds"}
    counts = {"num_queries": num_queries, "num_pairs": num_pairs, "dropped": dict(dropped)}
    rates = {"sampling": parts["responses"]["tokens_per_second"], "training": parts["training"]["tokens_per_second"]}
    seconds = {name: part["seconds"] for name, part in parts.items()}
    return {**parts["pairs"], **counts, **parts["evaluation"], **steering, **judged, "seconds": seconds, "tokens_per_second": rates}
