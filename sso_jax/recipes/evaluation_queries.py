"""Held-out queries of a model from a folder: read from `evaluation.path`, and kept from the rounds of the same run."""

import random
from collections import Counter

from sso_jax.config import Config
from sso_jax.data.instruction_prompts import InstructedPrompt, load_instructed_prompts
from sso_jax.data.queries import load_queries
from sso_jax.data.records import Query
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.environment import Environment, fitting_queries, no_judge
from sso_jax.recipes.input_tables import drop_refused_turns, evaluation_table
from sso_jax.recipes.relevance import open_embedder
from sso_jax.runtime.errors import InputError

FIELD = "evaluation.path"


def read_evaluation_queries(config: Config) -> list[Query]:
    """Returns `evaluation.max_queries` queries of the file, drawn by `run.seed`; none if no file is given.

    Raises:
      InputError: if the file is not readable, or if nothing would answer its queries.
    """
    path = config.evaluation.path
    if path is None:
        return []
    if config.model.path == "toy":
        raise InputError(f"{FIELD}: {path!r} is not used with model.path toy, which has its own queries; remove it")
    if config.recipe == "reward":
        raise InputError(f"{FIELD}: {path!r} is not used by recipe 'reward', which trains no policy; remove it")
    queries = load_queries(evaluation_table(config)).records
    num = min(config.evaluation.max_queries, len(queries))
    return random.Random(f"{config.run.seed}/evaluation").sample(queries, num)


def read_instructions(config: Config) -> dict[str, InstructedPrompt]:
    """Returns the verifiable instructions of the file of held-out queries, by query; none if it has no column of them.

    Raises:
      InputError: if some rows have the columns of IFEval and others do not; names the line.
    """
    if config.evaluation.path is None:
        return {}
    prompts = load_instructed_prompts(evaluation_table(config), required=False)
    return {prompt.prompt.strip(): prompt for prompt in prompts}


def without_evaluation_queries(config: Config, queries: list[Query]) -> tuple[list[Query], Counter[str]]:
    """Returns the queries that are not held out for evaluation, by their texts, and the number of the others."""
    held_out = {_texts(query) for query in read_evaluation_queries(config)}
    kept = [query for query in queries if _texts(query) not in held_out]
    num_left_out = len(queries) - len(kept)
    return kept, Counter({"held_out_for_evaluation": num_left_out} if num_left_out else {})


def _texts(query: Query) -> tuple[str, str]:
    return query.query, str(query.history)


def folder_environment(config: Config, engine: Engine, queries: list[Query]) -> Environment:
    """Returns the environment of a model from a folder: no judge, and the held-out queries that leave room to answer.

    Raises:
      InputError: if queries are given and none leaves room.
    """
    if not queries:
        return no_judge()
    accepted, _ = drop_refused_turns(engine.chat, queries, evaluation_table(config))
    fitting, _ = fitting_queries(engine, accepted, config.evaluation.path, FIELD)
    embed = open_embedder(config.evaluation.embedding_model)
    return Environment(fitting, None, read_instructions(config), embed)
