"""A round's queries in, steered queries and the triples that the policy samples for them out: the sampling stages of a round."""

import time
from collections import Counter
from pathlib import Path

from sso_jax import stages
from sso_jax.assembly import Engine
from sso_jax.config import Config
from sso_jax.environment import fitting_queries, toy_queries
from sso_jax.errors import InputError
from sso_jax.preferences.principles import choose_features, name_features
from sso_jax.preferences.queries import deal, load_queries
from sso_jax.preferences.responses import clean_triples, sample_triples
from sso_jax.preferences.steering import steer, steered_prompts
from sso_jax.records import Query, SteeredQuery, Triple
from sso_jax.rounds import Run


def read_queries(config: Config) -> list[Query]:
    """The toy world's queries, or those of the file.

    Raises:
      InputError: for a file that is missing, not needed or not readable, or with fewer queries than rounds.
    """
    toy, path = config.model.path == "toy", config.queries.path
    if toy and path is not None:
        raise InputError(f"queries.path: {path!r} does not go with model.path toy, which has queries of its own; leave it out")
    if not toy and path is None:
        raise InputError("queries.path: not given; a model from a folder needs a file or data set of queries")
    queries = toy_queries() if toy else load_queries(path, config.queries.split)
    deal(queries, config.queries.per_iteration, config.run.iterations, config.run.seed)
    return queries


def settle_queries(config: Config, engine: Engine, queries: list[Query]) -> tuple[list[list[Query]], Counter]:
    """The queries of each round; those without room for a response are dropped and counted."""
    fitting, dropped = fitting_queries(engine, queries, config.queries.path)
    return deal(fitting, config.queries.per_iteration, config.run.iterations, config.run.seed), dropped


def principles(run: Run, iteration: int, params, queries: list[Query]) -> tuple[list[SteeredQuery], dict]:
    """The queries with their two system messages, and how many features were drawn at random."""
    config, engine = run.config, run.engine
    count = config.principles.features_per_query

    def make() -> tuple[list[SteeredQuery], dict]:
        texts = name_features(engine.sampler, params, engine.chat, queries, count, config.run.seed, iteration)
        seed = f"{config.run.seed}/{iteration}"
        steered = [
            steer(choose_features(query, text, count, config.principles.concision_probability, seed))
            for query, text in zip(queries, texts, strict=True)
        ]
        random_features = sum(record.num_random_features for record in steered)
        return steered, {"random_features": random_features, "questions_too_long": texts.count(None)}

    return stages.record_stage(run.folder(iteration), "principles", SteeredQuery, make)


def responses(run: Run, iteration: int, params, steered: list[SteeredQuery], folder: Path) -> tuple[list[Triple], dict]:
    """The triples that the policy with `params` samples, written to `folder/responses.jsonl`."""
    engine = run.engine

    def make() -> tuple[list[Triple], dict]:
        prompted = [(record, steered_prompts(engine.chat, record)) for record in steered]
        fitting = [item for item in prompted if all(engine.sampler.fits(prompt) for prompt in item[1].values())]
        start = time.perf_counter()
        triples = sample_triples(engine.sampler, params, engine.chat.tokenizer, fitting, run.config.run.seed, iteration)
        num_tokens = sum(len(ids) for triple in triples for ids in triple.response_ids.values())
        rate = num_tokens / (time.perf_counter() - start)
        dropped = {"prompt_too_long": len(prompted) - len(fitting)} if len(fitting) < len(prompted) else {}
        return triples, {"dropped": dropped, "tokens_per_second": rate}

    return stages.record_stage(folder, "responses", Triple, make)


def cleaned(run: Run, triples: list[Triple]) -> tuple[list[Triple], Counter]:
    """Sampled triples without labels, empty responses and copies; what is dropped, by reason."""
    return clean_triples(run.engine.chat.tokenizer, triples)
