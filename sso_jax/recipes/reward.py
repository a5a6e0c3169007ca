"""Recipe `reward`: trains a Bradley-Terry reward model on the policy's decoder, from given or sampled pairs."""

import dataclasses
import logging
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TypeVar

import jax
import numpy as np

from sso_jax.config import Config, RewardConfig
from sso_jax.data.pair_files import load_pairs
from sso_jax.data.records import Cell, Triple
from sso_jax.data.rows import Records
from sso_jax.models.export import REWARD_FOLDER, export_reward_model
from sso_jax.models.peft_adapters import REWARD_ADAPTER_FOLDER
from sso_jax.preferences.filters import with_rewards
from sso_jax.preferences.pairs import drop_empty_contrasts, given_triples
from sso_jax.preferences.splits import without_queries
from sso_jax.recipes.checks import (
    check_sampling,
    refuse_fields,
    refuse_judge_order,
    refuse_open_thoughts,
    refuse_unknown_tokens,
    sampling_fields,
    warn_unused_objective,
)
from sso_jax.recipes.engine import Engine, router_weight
from sso_jax.recipes.environment import order_accuracy
from sso_jax.recipes.input_tables import annotated_table, drop_refused_turns, pairs_table
from sso_jax.recipes.reward_model import RewardScorer, accuracy_of, reward_engine, reward_params, tokenize_pair
from sso_jax.recipes.run import Params, Recipe, Round, RoundSummary
from sso_jax.recipes.stages.batch_plans import plan_rewards
from sso_jax.recipes.stages.evaluation import judge_by_endpoint
from sso_jax.recipes.stages.held_out import Measure, split_round
from sso_jax.recipes.stages.policies import export_adapter, leaves_merged, start_adapter
from sso_jax.recipes.stages.prompts import render_prompts
from sso_jax.recipes.stages.sampling import (
    PrinciplesResult,
    QueryRounds,
    ResponsesResult,
    prepare_queries,
    principles,
    read_queries,
    responses,
    round_queries,
)
from sso_jax.recipes.stages.scoring import (
    PairsResult,
    apply_filters,
    in_control_order,
    require_pairs,
    sampled_candidates,
    score_and_filter,
)
from sso_jax.recipes.stages.update import TrainingResult, train
from sso_jax.recipes.summary import padding_of, role_numbers
from sso_jax.recipes.vocabulary import with_known_padding
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.json_lines import write_records
from sso_jax.runtime.stage_markers import file_stage, record_stage
from sso_jax.training.losses import Pair
from sso_jax.training.rewards import TokenizedPair, bradley_terry_loss, build_reward_fn, reward_losses

PLAIN_PAIR = [Cell("plain", "chosen"), Cell("plain", "rejected")]
"""Cells of the plain pair."""
log = logging.getLogger(__name__)
HELD_OUT_FILE = "held_out.jsonl"
Mixed = TypeVar("Mixed")
TokenizedPairs = dict[str, TokenizedPair]
"""Pairs as token ids, by id."""


@dataclass(frozen=True)
class RewardData:
    """The training data: pairs of a file, or queries to sample pairs for, and annotated pairs to mix in."""

    pairs: list[Triple] | None
    queries: QueryRounds | None
    annotated: list[Triple]
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of rows of the files that could not be used, by reason."""


@dataclass(frozen=True)
class _OwnPairs:
    """The round's pairs as token ids, and the results of the stages that made them."""

    result: PairsResult
    tokens: TokenizedPairs
    num_queries: int
    judged: dict | None = None
    steered: PrinciplesResult | None = None
    sampled: ResponsesResult | None = None


def read(config: Config) -> RewardData:
    """Reads the pairs or queries, and the annotated pairs.

    Raises:
      InputError: for conflicting fields, or unreadable files.
    """
    unused = {"demonstrations.path": config.demonstrations.path, "model.reference_path": config.model.reference_path}
    refuse_fields("reward", unused)
    if config.train.long_examples == "cut":
        raise InputError(
            "train.long_examples: 'cut' leaves no end of turn, where recipe 'reward' reads a reward; set it to drop"
        )
    if config.run.iterations != 1:
        raise InputError(f"run.iterations: {config.run.iterations} rounds; recipe 'reward' has only one, set it to 1")
    warn_unused_objective(config.objective)
    mixed = Records[Triple]([])
    if config.reward.annotated_path is not None:
        mixed = load_pairs(annotated_table(config))
    if config.pairs.path is None:
        check_sampling(config)
        return RewardData(None, read_queries(config), mixed.records, mixed.dropped)
    unused = {"queries.path": config.queries.path, "filter.enabled": config.filter.enabled}
    refuse_fields("reward with pairs.path", {**unused, **sampling_fields(config)})
    refuse_judge_order(config)
    given = load_pairs(pairs_table(config))
    return RewardData(given.records, None, mixed.records, given.dropped + mixed.dropped)


def prepare(config: Config, engine: Engine, source: RewardData) -> tuple[RewardData, Counter]:
    """Tokenizes the pairs, or selects the queries of the round; drops annotated pairs without a contrast."""
    tokenizer = engine.chat.tokenizer
    accepted, refused = drop_refused_turns(engine.chat, source.annotated, annotated_table(config))
    annotated, dropped = drop_empty_contrasts(given_triples(tokenizer, accepted), PLAIN_PAIR)
    refuse_unknown_tokens(annotated, engine.known_tokens, "reward.annotated_path")
    reasons = source.dropped + refused + Counter(f"annotated_{reason}" for reason in dropped.values())
    if source.pairs is not None:
        refuse_open_thoughts(engine.chat, "reward")
        pairs, refused = drop_refused_turns(engine.chat, source.pairs, pairs_table(config))
        given = given_triples(tokenizer, pairs)
        refuse_unknown_tokens(given, engine.known_tokens, "pairs.path")
        return RewardData(given, None, annotated), reasons + refused
    queries, unfit = prepare_queries(config, engine, source.queries)
    return RewardData(None, queries, annotated), reasons + unfit


def run_round(this: Round[RewardData], policy: Params) -> tuple[Params, RoundSummary]:
    """(queries -> principles -> responses ->) pairs -> update on all except held-out pairs -> reward model."""
    run, data = this.run, this.run.dataset
    own = _sampled_pairs(this, policy) if data.pairs is None else _given_pairs(this)
    require_pairs(own.result, len(data.pairs or data.queries.rounds[0]), this.folder / "pairs.jsonl")
    train_pairs, held_out, held_out_tokens = _hold_out(this, own)
    annotated = [tokenize_pair(run.engine.chat, pair) for pair in without_queries(data.annotated, held_out)]
    mixed = mix([own.tokens[pair.id] for pair in train_pairs], annotated, run.config.reward, this.seed)

    engine = reward_engine(run.engine)
    reward = reward_params(policy, engine, start_adapter(run, of_reward=True))
    reward, training = _train(this, engine, reward, mixed, held_out_tokens)
    exported = _export(this, engine, reward)
    measured = _measure_held_out(this, engine, reward, held_out, held_out_tokens)
    return reward, _summarize(own, len(mixed), training, exported, measured)


def _given_pairs(this: Round[RewardData]) -> _OwnPairs:
    """Stage `pairs` for given pairs: keeps those with a contrast within the token limit, and applies the filters."""
    given, engine = this.run.dataset.pairs, this.run.engine
    contrasts, dropped = drop_empty_contrasts(given, PLAIN_PAIR)
    ordered = in_control_order(this, contrasts)
    tokens = {pair.id: tokenize_pair(engine.chat, pair) for pair in ordered}

    def make() -> tuple[list[Triple], dict]:
        too_long = {pair.id: "pair_too_long" for pair in ordered if tokens[pair.id].longest() > engine.max_tokens}
        fitting = [pair for pair in ordered if pair.id not in too_long]
        return apply_filters(this, fitting, {**dropped, **too_long})

    result = PairsResult.of_stage(*record_stage(this.folder, "pairs", Triple, make))
    return _OwnPairs(result, tokens, len({(pair.query, str(pair.history)) for pair in given}))


def _sampled_pairs(this: Round[RewardData], policy: Params) -> _OwnPairs:
    """queries -> principles -> responses -> pairs, as in recipe `online`."""
    sampling_round = replace(this, run=replace(this.run, dataset=this.run.dataset.queries))
    queries = round_queries(sampling_round)
    steered = principles(sampling_round, policy, queries)
    prompts = render_prompts(this, steered.queries)
    sampled = responses(this, policy, steered.queries, prompts)
    chosen = score_and_filter(this, None, policy, prompts, lambda: sampled_candidates(this, sampled.triples))
    chat = this.run.engine.chat
    tokens = {pair.id: tokenize_pair(chat, pair, prompts[pair.id]["plain"]) for pair in chosen.pairs}
    judged = judge_by_endpoint(this, chosen.pairs)
    return _OwnPairs(chosen, tokens, len(queries), judged, steered, sampled)


def mix(own: list[Mixed], annotated: list[Mixed], config: RewardConfig, seed: str) -> list[Mixed]:
    """Mixes own and annotated pairs, so that the annotated ones have their share; drops the rest at random by the seed.

    Raises:
      InputError: if the share leaves no pairs of one kind.
    """
    if not annotated or config.annotated_share is None:
        return own + annotated
    share = config.annotated_share
    wanted = int(len(own) * share / (1 - share) + 0.5)  # to go with all of our own
    enough = len(annotated) >= wanted
    num_annotated = wanted if enough else len(annotated)
    num_own = len(own) if enough else min(len(own), int(len(annotated) * (1 - share) / share + 0.5))
    if not num_annotated or not num_own:
        counts = f"{len(own)} own and {len(annotated)} annotated pairs"
        raise InputError(
            f"reward.annotated_share: {share} of {counts} leaves no pairs of one kind; give more pairs, or null"
        )
    draw = random.Random(f"{seed}/mix")
    return draw.sample(own, num_own) + draw.sample(annotated, num_annotated)


def _hold_out(this: Round, own: _OwnPairs) -> tuple[list[Triple], list[Triple], list[TokenizedPair]]:
    """Returns the pairs to train on, and those held out with their token ids: a share of the round's, or a file's.

    Raises:
      InputError: if one of the sides has no pair.
    """
    trained, held_out = split_round(this, own.result.pairs)
    if this.run.held_out is None:
        return trained, held_out, [own.tokens[pair.id] for pair in held_out]
    chat, limit = this.run.engine.chat, this.run.engine.max_tokens
    tokens = {pair.id: tokenize_pair(chat, pair) for pair in held_out}
    fitting = [pair for pair in held_out if tokens[pair.id].longest() <= limit]
    if not fitting:
        raise InputError(
            f"train.held_out: none of the {len(held_out)} pairs has at most {limit} tokens; raise train.max_tokens"
        )
    if len(fitting) < len(held_out):
        log.warning("train.held_out: %d pairs have more than %d tokens", len(held_out) - len(fitting), limit)
    return trained, fitting, [tokens[pair.id] for pair in fitting]


def _scorer(this: Round, engine: Engine, reward: Params) -> RewardScorer:
    reward_fn = build_reward_fn(engine.model, engine.mesh, engine.shardings)
    return RewardScorer(engine.model, reward, this.run.engine.chat, reward_fn, engine.mesh, engine.known_tokens)


def _train(
    this: Round, engine: Engine, reward: Params, pairs: list[TokenizedPair], held_out: list[TokenizedPair]
) -> tuple[Params, TrainingResult]:
    """Trains the reward model; the metrics of every checkpointed update include the numbers on held-out pairs."""
    rules = this.run.config.reward
    settings = {name: getattr(rules, name) for name in ("label_smoothing", "margin", "center_coefficient")}
    weight = router_weight(engine.model.architecture, this.run.config.train)
    losses = reward_losses(engine.model, **settings, router_weight=weight)
    scorer = _scorer(this, engine, {})

    def numbers(params: Params) -> dict[str, float]:
        # The updates before it are not saved yet, so a stop waits.
        rewards = replace(scorer, params=params).rewards(held_out, "held-out pairs", may_stop=False)
        chosen, rejected = (np.array(side, np.float32) for side in zip(*rewards, strict=True))
        loss = jax.device_get(bradley_terry_loss(Pair(chosen, rejected), **settings))
        return {
            "loss": float(np.mean(loss, dtype=np.float64)),
            "accuracy": accuracy_of(rewards),
            "margin": float(np.mean(chosen - rejected, dtype=np.float64)),
        }

    measure = Measure(numbers, len(held_out)) if held_out else None
    return train(this, losses, plan_rewards(this, pairs), reward, engine=engine, measure=measure)


def _export(this: Round, engine: Engine, reward: Params) -> float:
    """Writes the reward model as a Hugging Face folder, and its adapters in PEFT's format; returns the seconds.

    Section `lora` says which of both, if there are adapters.
    """
    seconds = export_adapter(this, reward, engine, REWARD_ADAPTER_FOLDER)
    if not leaves_merged(this.run.config):
        return seconds

    def write() -> dict:
        dtype = this.run.config.model.export_dtype
        tokenizer = with_known_padding(this.run.engine.chat.tokenizer, engine.known_tokens)
        architecture, folder = engine.model.architecture, this.folder / REWARD_FOLDER
        export_reward_model(reward, architecture, tokenizer, folder, dtype, engine.model.adapters)
        return {}

    return seconds + file_stage(this.folder, "export", write, REWARD_FOLDER)["seconds"]


def _measure_held_out(
    this: Round, engine: Engine, reward: Params, held_out: list[Triple], tokens: list[TokenizedPair]
) -> dict:
    """Stage `held_out`: accuracy on held-out pairs, by their order and by the judge's; rewards in `held_out.jsonl`."""

    def measure() -> dict:
        if not held_out:
            return {"num_held_out": 0}
        rewards = _scorer(this, engine, reward).rewards(tokens, "held-out pairs")
        scored = with_rewards(held_out, rewards)
        write_records(scored, this.folder / HELD_OUT_FILE)
        by_judge = order_accuracy(this.run.environment, this.run.engine, scored)
        return {"num_held_out": len(held_out), "held_out_accuracy": accuracy_of(rewards), **by_judge}

    return file_stage(this.folder, "held_out", measure, HELD_OUT_FILE)


def _summarize(
    own: _OwnPairs, num_trained: int, training: TrainingResult, export_seconds: float, measured: dict
) -> RoundSummary:
    counts = dataclasses.asdict(own.steered.counts) if own.steered else {}
    stages = {"principles": own.steered, "responses": own.sampled, "pairs": own.result, "training": training}
    seconds = {name: result.seconds for name, result in stages.items() if result is not None}
    dropped = Counter(own.sampled.dropped if own.sampled else {}) + Counter(own.result.dropped)
    held_out = {name: value for name, value in measured.items() if name != "seconds"}
    return RoundSummary(
        **vars(own.result.numbers),
        **counts,
        num_queries=own.num_queries,
        num_pairs=len(own.result.pairs),
        dropped=dict(dropped),
        before_filter=own.result.before_filter,
        endpoint_judge=own.judged,
        padding=padding_of(own.result, training),
        num_cut=own.result.num_cut,
        sampling=role_numbers(own.steered, own.sampled),
        held_out=training.held_out,
        reward={"num_trained": num_trained, **held_out},
        seconds={**seconds, "export": export_seconds, "held_out": measured["seconds"]},
        tokens_per_second={
            "sampling": own.sampled.tokens_per_second if own.sampled else None,
            "training": training.tokens_per_second,
        },
    )


RECIPE = Recipe(read, prepare, run_round, lambda config: PLAIN_PAIR)
