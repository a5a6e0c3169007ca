"""The sampling stages of a round: its queries, the principles that steer them, and the responses y+, y- and y_o."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sso_jax.config import Config
from sso_jax.data.queries import deal, load_queries, require_queries
from sso_jax.data.records import RESPONSES, Dropped, Prompts, Query, SteeredQuery, Triple
from sso_jax.data.rows import Records
from sso_jax.models.fingerprint import fingerprint
from sso_jax.preferences.pairs import drop_by_reason
from sso_jax.preferences.principle_sources import (
    UNPARSED_FILE,
    PrincipleSource,
    SteeringCounts,
    endpoint_asker,
    given_principles,
    policy_asker,
    steer_queries,
)
from sso_jax.preferences.responses import RejectedSource, SampledTriples, SampleKey, sample_triples
from sso_jax.recipes.engine import Engine, load_params
from sso_jax.recipes.environment import fitting_queries, toy_queries
from sso_jax.recipes.evaluation_queries import without_evaluation_queries
from sso_jax.recipes.input_tables import drop_refused_turns, queries_table
from sso_jax.recipes.run import Params, Round
from sso_jax.recipes.stages.policies import exported_policy
from sso_jax.recipes.stages.served_sampling import served_sampler
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.stage_markers import record_stage
from sso_jax.sampling.sampler import ResponseSampler


@dataclass(frozen=True)
class QueryRounds:
    """The queries of a recipe that samples."""

    rounds: list[list[Query]]
    """Queries of each round; a single list of all queries until they are prepared."""
    principles: dict[str, SteeredQuery]
    """Given principles by query id, if principles.source is `file`."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of rows of the file that could not be used, by reason."""


@dataclass(frozen=True)
class PrinciplesResult:
    """Result of stage `principles`."""

    queries: Sequence[SteeredQuery]
    counts: SteeringCounts
    seconds: float
    roles: dict[str, dict]
    """Numbers of the policy's answers by what it was asked for (`role_numbers`)."""


@dataclass(frozen=True)
class ResponsesResult:
    """Result of stage `responses`."""

    triples: Sequence[Triple]
    dropped: dict[str, int]
    """Number of queries dropped, by reason."""
    tokens_per_second: float
    seconds: float
    roles: dict[str, dict]
    """Numbers of the responses by role (`role_numbers`)."""


def read_queries(config: Config) -> QueryRounds:
    """Reads the toy world's queries or those of the file, and the principles given for them.

    Raises:
      InputError: if the file is missing, not used, not readable, or has fewer queries than there are rounds.
    """
    toy, path = config.model.path == "toy", config.queries.path
    if toy and path is not None:
        raise InputError(
            f"queries.path: {path!r} is not used with model.path toy, which has its own queries; remove it"
        )
    if not toy and path is None:
        raise InputError("queries.path: not given; a model from a folder needs a file or data set of queries")
    found = Records(toy_queries(config.toy.descriptions)) if toy else load_queries(queries_table(config))
    queries, held_out = without_evaluation_queries(config, found.records)
    require_queries(queries, config.run.iterations)
    return QueryRounds([queries], given_principles(config.principles, queries), found.dropped + held_out)


def prepare_queries(config: Config, engine: Engine, source: QueryRounds) -> tuple[QueryRounds, Counter]:
    """Assigns queries to rounds; drops and counts those without room for a response, or with turns out of order."""
    accepted, refused = drop_refused_turns(engine.chat, source.rounds[0], queries_table(config))
    fitting, too_long = fitting_queries(engine, accepted, config.queries.path)
    rounds = deal(fitting, config.queries.per_iteration, config.run.iterations, config.run.seed)
    return QueryRounds(rounds, source.principles), source.dropped + refused + too_long


def round_queries(this: Round[QueryRounds]) -> Sequence[Query]:
    """Stage `queries`: the queries of the round, in `queries.jsonl`."""
    queries, _ = record_stage(this.folder, "queries", Query, lambda: (this.run.dataset.rounds[this.iteration - 1], {}))
    return queries


def principles(this: Round[QueryRounds], policy: Params, queries: Sequence[Query]) -> PrinciplesResult:
    """Stage `principles`: adds a good and a bad system message to each query, in `principles.jsonl`."""
    run = this.run
    config, given = run.config, run.dataset.principles
    source = PrincipleSource(
        config.principles, given, run.endpoint, config.endpoint.temperature, config.endpoint.thought_tokens
    )
    key = SampleKey(config.run.seed, this.iteration)

    def make() -> tuple[list[SteeredQuery], dict]:
        roles: dict[str, dict] = {}
        steered, counts = steer_from_source(run.engine, policy, queries, source, key, this.folder, roles)
        return steered, {**counts.as_json(), "roles": roles}

    steered, stats = record_stage(this.folder, "principles", SteeredQuery, make, [UNPARSED_FILE])
    return PrinciplesResult(steered, SteeringCounts.of_json(stats), stats["seconds"], stats["roles"])


def steer_from_source(
    engine: Engine,
    policy: Params,
    queries: list[Query],
    source: PrincipleSource,
    key: SampleKey,
    folder: Path | None,
    roles: dict[str, dict] | None = None,
) -> tuple[list[SteeredQuery], SteeringCounts]:
    """Adds principles to the queries, from a file, the endpoint or the policy itself.

    Args:
      engine: the policy's engine.
      policy: the policy's parameters.
      queries: queries to steer.
      source: where the principles come from.
      key: seed and iteration, from which the random keys derive.
      folder: folder for the endpoint's answers and for those that could not be parsed; None stores nothing.
      roles: numbers of the policy's answers are added here.
    """
    if source.rules.source == "file":
        return [source.given[query.id] for query in queries], SteeringCounts()
    if source.rules.source == "endpoint":
        ask = endpoint_asker(source, key.iteration, folder)
    else:
        ask = policy_asker(engine.sampler, policy, engine.chat, key, roles)
    return steer_queries(queries, ask, source.rules, f"{key.seed}/{key.iteration}", folder)


def sample_fitting(
    engine: Engine,
    policies: Sequence,
    queries: Sequence[SteeredQuery],
    prompts: Mapping[str, Prompts],
    key: SampleKey,
    wanted: Sequence[str] = RESPONSES,
    rejected: RejectedSource | None = None,
    sampler: ResponseSampler | None = None,
) -> tuple[SampledTriples, Dropped]:
    """Samples triples for the queries whose prompts all leave room for a response, and drops the others.

    See `sample_triples`; None samples with the engine's own sampler.
    """
    sampler = sampler or engine.sampler

    def fits(own: Prompts) -> bool:
        other = rejected is None or rejected.sampler.fits(own[rejected.context])
        return other and all(sampler.fits(prompt) for prompt in own.values())

    own, dropped = drop_by_reason(queries, lambda query: None if fits(prompts[query.id]) else "prompt_too_long")
    return sample_triples(sampler, policies, engine.chat.tokenizer, own, prompts, key, wanted, rejected), dropped


def rejected_source(this: Round, weights: dict[str, str]) -> RejectedSource | None:
    """Returns what y- is sampled from in place of the round's policy; None by default.

    Adds the fingerprint of its parameters to `weights` once these are loaded.
    """

    def recorded(load: Callable[[], Params]) -> Callable[[], Params]:
        def load_and_record() -> Params:
            params = load()
            weights["rejected_weights"] = fingerprint(params)
            return params

        return load_and_record

    run, config, other = this.run, this.run.config.sampling, this.run.rejected_engine
    if config.anchor_rejected:
        first = recorded(partial(exported_policy, run, 0))
        return RejectedSource("the first policy", run.engine.sampler, first)
    if other is None:
        return None
    load = recorded(partial(load_params, other.source, other))
    return RejectedSource(str(config.rejected_path), other.sampler, load, config.rejected_context)


def responses(
    this: Round,
    policy: Params,
    queries: Sequence[SteeredQuery],
    prompts: Mapping[str, Prompts],
    wanted: Sequence[str] = RESPONSES,
    num_policies: int = 1,
    trained: bool = False,
) -> ResponsesResult:
    """Stage `responses`: samples y+ from x+, y- from x- and y_o from x, those that are `wanted`, in `responses.jsonl`.

    With more than one policy, y+ and y- come from the policies of the last `num_policies` rounds, including this one;
    y- comes from elsewhere with `sampling.anchor_rejected` or `.rejected_path`. With `sampling.source` endpoint a
    server of the policy samples all of them; `trained` is whether this round has trained it.
    """
    run = this.run
    rounds_back = range(1, min(num_policies, this.iteration))
    earlier = [partial(exported_policy, run, this.iteration - 1 - back) for back in rounds_back]

    def make() -> tuple[Sequence[Triple], dict]:
        key = SampleKey(run.config.run.seed, this.iteration)
        weights = {"weights": fingerprint(policy)}
        start, rejected = time.perf_counter(), rejected_source(this, weights)
        server = served_sampler(this, policy, trained)
        policies = [policy, *earlier]
        sampled, dropped = sample_fitting(run.engine, policies, queries, prompts, key, wanted, rejected, server)
        num_tokens = sum(len(ids) for triple in sampled.triples for ids in triple.response_ids.values())
        rate = num_tokens / (time.perf_counter() - start)
        counts = {"dropped": dict(Counter(dropped.values())), "dropped_by_id": dropped}
        checks = {} if server is None else {"server_checks": [check._asdict() for check in server.checks]}
        return sampled.triples, {**counts, "tokens_per_second": rate, "roles": sampled.roles, **weights, **checks}

    triples, stats = record_stage(this.folder, "responses", Triple, make)
    return ResponsesResult(triples, stats["dropped"], stats["tokens_per_second"], stats["seconds"], stats["roles"])
