"""Recipe `reward`: a Bradley-Terry reward model on the policy's decoder, from given pairs or from pairs that the policy samples."""

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, replace

from sso_jax.config import Config, RewardConfig
from sso_jax.data.pair_files import load_pairs
from sso_jax.data.records import Query, Triple
from sso_jax.models.export import REWARD_FOLDER, export_reward_model
from sso_jax.preferences.filters import with_rewards
from sso_jax.preferences.pairs import drop_empty_contrasts, given_triples, random_order
from sso_jax.recipes import run as rounds
from sso_jax.recipes.checks import refuse_fields, warn_unused_objective
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.environment import order_accuracy
from sso_jax.recipes.objective import Objective
from sso_jax.recipes.reward_model import RewardScorer, accuracy_of, reward_engine, reward_params, tokenize_pair
from sso_jax.recipes.run import Recipe, Run
from sso_jax.recipes.stages import sampling as sampled
from sso_jax.recipes.stages.batch_plans import plan_rewards
from sso_jax.recipes.stages.evaluation import judge_by_endpoint
from sso_jax.recipes.stages.scoring import filtered, referenced_pairs, require_pairs, within_limit
from sso_jax.runtime import stage_markers as stages
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.json_lines import write_records
from sso_jax.training.rewards import build_reward_fn, reward_losses

PLAIN_PAIR = [("plain", "chosen"), ("plain", "rejected")]


@dataclass(frozen=True)
class Material:
    """What a reward model is trained from: pairs of a file, or queries to sample them for; and annotated pairs to mix in."""

    pairs: list[Triple] | None
    principles: dict
    rounds: list[list[Query]]
    annotated: list[Triple]


def read(config: Config) -> Material:
    """The pairs or queries, and the annotated pairs.

    Raises:
      InputError: for fields that do not go together, and for files that cannot be read.
    """
    unused = {"demonstrations.path": config.demonstrations.path, "model.reference_path": config.model.reference_path}
    refuse_fields(config, "reward", unused)
    if config.lora.rank:
        raise InputError(f"lora.rank: {config.lora.rank} is not used by recipe 'reward', which trains the whole decoder; remove it")
    if config.run.iterations != 1:
        raise InputError(f"run.iterations: {config.run.iterations} rounds; recipe 'reward' has one, set it to 1")
    warn_unused_objective(config.objective)
    given, annotated = config.pairs.path, config.reward.annotated_path
    mixed = [] if annotated is None else load_pairs(annotated, config.reward.annotated_split, "reward.annotated_path")
    if given is None:
        sampled.check_sampling(config)
        queries = sampled.read_queries(config)
        return Material(None, queries.principles, queries.rounds, mixed)
    unused = {"queries.path": config.queries.path, "filter.enabled": config.filter.enabled}
    refuse_fields(config, "reward with pairs.path", unused)
    if config.pairs.control == "judge_order":
        raise InputError("pairs.control: 'judge_order' is for pairs that the toy policy samples; give 'random_order' or 'none'")
    return Material(load_pairs(given, config.pairs.split), {}, [], mixed)


def settle(config: Config, engine: Engine, read: Material) -> tuple[Material, Counter]:
    """Token ids of the pairs, or the queries of the round; annotated pairs without a contrast are dropped."""
    annotated, dropped = drop_empty_contrasts(given_triples(engine.chat.tokenizer, read.annotated), PLAIN_PAIR)
    dropped = Counter(f"annotated_{reason}" for reason in dropped.values())
    if read.pairs is not None:
        return replace(read, pairs=given_triples(engine.chat.tokenizer, read.pairs), annotated=annotated), dropped
    queries, unfit = sampled.settle_queries(config, engine, sampled.Queries(read.rounds, read.principles))
    return replace(read, rounds=queries.rounds, annotated=annotated), dropped + unfit


def round(run: Run, iteration: int, params):
    """(queries -> principles -> responses ->) pairs -> held-out ones, and updates on the others -> reward model."""
    folder, seconds = run.folder(iteration), {}
    if run.material.pairs is None:
        pairs, made, seconds = _sampled_pairs(run, iteration, params)
    else:
        pairs, made = stages.record_stage(folder, "pairs", Triple, lambda: _given_pairs(run, iteration))
    require_pairs(pairs, len(run.material.pairs or run.material.rounds[0]), made["dropped"], folder / "pairs.jsonl")
    train, held_out = split_pairs(pairs, run.config.reward.held_out)
    train = mix(train, run.material.annotated, run.config.reward, f"{run.config.run.seed}/{iteration}")
    engine = reward_engine(run.engine)
    params, training = _train(run, engine, iteration, reward_params(params, engine), train, held_out)

    def write() -> dict:
        dtype = run.config.model.export_dtype
        export_reward_model(params, engine.model.architecture, run.engine.chat.tokenizer, folder / REWARD_FOLDER, dtype)
        return {}

    exported = stages.plain_stage(folder, "export", write, REWARD_FOLDER)
    measured = stages.plain_stage(folder, "held_out", lambda: _measure(run, engine, iteration, params, held_out), "held_out.jsonl")
    parts = {"pairs": made, "training": training, "export": exported, "held_out": measured}
    seconds = {**seconds, **{name: part["seconds"] for name, part in parts.items()}}
    rates = {"sampling": made.get("sampling_rate"), "training": training["tokens_per_second"]}
    measured = {name: value for name, value in measured.items() if name != "seconds"}
    numbers = {**made, "num_pairs": len(pairs), "policy_quality": None, "reward": {"num_trained": len(train), **measured}}
    return params, {**numbers, "seconds": seconds, "tokens_per_second": rates}


def _given_pairs(run: Run, iteration: int) -> tuple[list[Triple], dict]:
    """The pairs of the file with a contrast, within the limit, filtered by scores or a reward model."""
    pairs, dropped = drop_empty_contrasts(run.material.pairs, PLAIN_PAIR)
    if run.config.pairs.control == "random_order":
        pairs = random_order(pairs, f"{run.config.run.seed}/{iteration}")
    pairs = within_limit(run, pairs, dropped)
    kept, numbers = filtered(run, pairs, dropped)
    return kept, {**numbers, "num_queries": len({(pair.query, str(pair.history)) for pair in run.material.pairs})}


def _sampled_pairs(run: Run, iteration: int, params) -> tuple[list[Triple], dict, dict]:
    """Pairs that the policy samples, as in recipe `online`; what there is to say of them, and the seconds of its stages."""
    folder = run.folder(iteration)
    queries, _ = stages.record_stage(folder, "queries", Query, lambda: (run.material.rounds[iteration - 1], {}))
    steered, principles = sampled.principles(run, iteration, params, queries)
    triples, responses = sampled.responses(run, iteration, params, steered, folder)
    pairs, made = referenced_pairs(run, Objective([], None, 1.0), iteration, params, folder, lambda: sampled.cleaned(run, triples))
    judged = judge_by_endpoint(run, iteration, pairs)
    dropped = dict(Counter(responses["dropped"]) + Counter(made["dropped"]))
    steering = {name: value for name, value in principles.items() if name != "seconds"}
    rate = {"num_queries": len(queries), "dropped": dropped, "sampling_rate": responses["tokens_per_second"]}
    seconds = {"principles": principles["seconds"], "responses": responses["seconds"]}
    return pairs, {**made, **steering, **judged, **rate}, seconds


def split_pairs(pairs: list[Triple], held_out: float) -> tuple[list[Triple], list[Triple]]:
    """(pairs to train on, held-out pairs): by the hash of the query, so that no query is on both sides."""

    def is_held_out(pair: Triple) -> bool:
        text = f"{pair.query}\0{pair.history}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64 < held_out

    sides = [is_held_out(pair) for pair in pairs]
    train = [pair for pair, out in zip(pairs, sides, strict=True) if not out]
    if not train:
        raise InputError(f"reward.held_out: {held_out} of {len(pairs)} pairs leaves none to train on; lower it, or give more pairs")
    return train, [pair for pair, out in zip(pairs, sides, strict=True) if out]


def mix(own: list[Triple], annotated: list[Triple], config: RewardConfig, seed: str) -> list[Triple]:
    """Own pairs and annotated ones, so many of each that the annotated have their share; those left out are drawn by the seed.

    Raises:
      InputError: if the share leaves nothing of one side.
    """
    if not annotated or config.annotated_share is None:
        return own + annotated
    share = config.annotated_share
    wanted = int(len(own) * share / (1 - share) + 0.5)  # beside all of our own
    enough = len(annotated) >= wanted
    num_annotated = wanted if enough else len(annotated)
    num_own = len(own) if enough else min(len(own), int(len(annotated) * (1 - share) / share + 0.5))
    if not num_annotated or not num_own:
        counts = f"{len(own)} own and {len(annotated)} annotated pairs"
        raise InputError(f"reward.annotated_share: {share} of {counts} leaves nothing of one side; give more pairs, or null")
    draw = random.Random(f"{seed}/mix")
    return draw.sample(own, num_own) + draw.sample(annotated, num_annotated)


def _train(run: Run, engine: Engine, iteration: int, params, train: list[Triple], held_out: list[Triple]) -> tuple[dict, dict]:
    """The trained reward model; the line of an update after which there is a checkpoint says the accuracy on held-out pairs too."""
    rules = run.config.reward
    earlier = run.earlier_shape(iteration, run.folder(iteration), "training")
    plan = plan_rewards(engine, run.config, iteration, [tokenize_pair(engine.chat, pair) for pair in train], earlier)
    losses = reward_losses(engine.model, rules.label_smoothing, rules.margin, rules.center_coefficient)
    rate = build_reward_fn(engine.model, engine.mesh, engine.shardings)

    def look(params) -> dict:
        rater = RewardScorer(engine.model, params, engine.chat, rate, engine.mesh)
        return {"held_out_accuracy": accuracy_of(rater.rewards(held_out, "held-out pairs"))} if held_out else {}

    return rounds.train(run, losses, plan, iteration, params, engine=engine, look=look)


def _measure(run: Run, engine: Engine, iteration: int, params, held_out: list[Triple]) -> dict:
    """Accuracy on held-out pairs by their own order and, where there is a judge, by the judge's; the rewards go to held_out.jsonl."""
    if not held_out:
        return {"num_held_out": 0}
    rate = build_reward_fn(engine.model, engine.mesh, engine.shardings)
    rewards = RewardScorer(engine.model, params, engine.chat, rate, engine.mesh).rewards(held_out, "held-out pairs")
    scored = with_rewards(held_out, rewards)
    write_records(scored, run.folder(iteration) / "held_out.jsonl")
    by_judge = order_accuracy(run.environment, run.engine, scored)
    return {"num_held_out": len(held_out), "held_out_accuracy": accuracy_of(rewards), **by_judge}


RECIPE = Recipe(read, settle, round)
