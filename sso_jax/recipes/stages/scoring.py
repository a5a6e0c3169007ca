"""Clean triples and the policy in, the pairs of a round out: ordered, scored by the reference, filtered, and kept with their key.

The reference scores every pair once, right after sampling. The key of a finished stage says by which weights, tokenizer and rows; under
another one the log-probs are stale, and are computed anew.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

from sso_jax.config import Config
from sso_jax.data.records import Dropped, Triple
from sso_jax.data.tokenizer import tokens_hash
from sso_jax.models.fingerprint import fingerprint
from sso_jax.models.hf_folder import fetch
from sso_jax.preferences import pairs as pair_stage
from sso_jax.preferences.filters import FILTER_CELLS, filter_pairs, keep_clear_scores, keep_widest, with_rewards
from sso_jax.preferences.steering import steered_prompts
from sso_jax.recipes.engine import Engine, load_params
from sso_jax.recipes.environment import judged, pair_accuracy
from sso_jax.recipes.objective import Objective
from sso_jax.recipes.reward_model import open_reward_scorer
from sso_jax.recipes.run import Run
from sso_jax.runtime import stage_markers as stages
from sso_jax.runtime.errors import RunError
from sso_jax.runtime.hosts import on_first_process
from sso_jax.runtime.json_lines import read_records
from sso_jax.runtime.mesh import num_batch_shards
from sso_jax.training.row_shapes import RowShape, stable_row_shape
from sso_jax.training.scoring import Scorable, score_examples, scoring_batches

log = logging.getLogger(__name__)
PAIRS_FILE = "pairs.jsonl"
KEPT_FOR_LATER = ("reference_key", "row_shape")
"""What the stage's marker holds for a resumed run and for the next round, and nobody else wants to know."""


def reference_cells(config: Config, objective: Objective) -> list[tuple[str, str]]:
    """The (context, response) log-probs that the reference gives of every pair."""
    return sorted({*pair_stage.SCORED_CELLS, *objective.cells, *(FILTER_CELLS if config.filter.enabled else [])})


def referenced_pairs(
    run: Run, objective: Objective, iteration: int, params, folder: Path, candidates: Callable[[], tuple[list[Triple], Dropped]]
) -> tuple[list[Triple], dict]:
    """Stage `pairs` of a round, or of its part `folder`: what `choose_pairs` makes of the candidates (clean triples, what was dropped).

    Raises:
      RunError: if the log-probs on disk are of another reference and updates have been made with them.
    """
    cells = reference_cells(run.config, objective)
    reference = cache(lambda: _reference_params(run, params))
    key = lambda pairs: reference_key(run.engine, reference(), cells, pairs)  # noqa: E731
    stats, path = stages.whole(folder, "pairs"), folder / PAIRS_FILE
    in_use = stats is not None and stages.finished(folder, "training") is None
    if in_use and key(read_records(Triple, path)) != stats.get("reference_key"):
        if on_first_process(lambda: (folder / "checkpoints").exists()):
            raise RunError(
                f"{path}: its log-probs are not of this reference, tokenizer and pairs, and updates were made with them; put back what was "
                f"changed, or delete {folder / 'checkpoints'} to do them again"
            )
        log.warning("%s: its log-probs are not of this reference, tokenizer and pairs; they are computed anew", path)
        stages.reopen(folder, "pairs")

    def make() -> tuple[list[Triple], dict]:
        kept, numbers = choose_pairs(run, cells, iteration, reference(), *candidates(), folder)
        return kept, {**numbers, "reference_key": key(kept)}

    pairs, stats = stages.record_stage(folder, "pairs", Triple, make)
    return pairs, {name: value for name, value in stats.items() if name not in KEPT_FOR_LATER}


def _reference_params(run: Run, params):
    """Parameters of the policy as it is now, or of the model that `model.reference_path` names."""
    path = run.config.model.reference_path
    return params if path is None else load_params(fetch(path), run.engine)


def reference_key(engine: Engine, params, cells: list[tuple[str, str]], pairs: list[Triple]) -> str:
    """Hash of all that the reference's log-probs of these pairs follow from: its weights, the tokenizer, the cells, the rows' token ids."""
    rows = [[steered_prompts(engine.chat, triple), triple.response_ids] for triple in pairs]
    whole = json.dumps([fingerprint(params), tokens_hash(engine.chat.tokenizer), cells, rows])
    return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()


def choose_pairs(
    run: Run, cells: list[tuple[str, str]], iteration: int, reference, triples: list[Triple], dropped: Dropped, folder: Path
) -> tuple[list[Triple], dict]:
    """Clean triples reordered (controls), scored by the reference's parameters and filtered; and what there is to say of the pairs."""
    config, engine = run.config, run.engine
    if config.pairs.control == "random_order":
        triples = pair_stage.random_order(triples, f"{config.run.seed}/{iteration}")
    elif config.pairs.control == "judge_order":
        triples = pair_stage.judge_order(triples, lambda triple, response: judged(run.environment, engine, triple, response))
    prompts = [steered_prompts(engine.chat, triple) for triple in triples]
    fits = [pair_stage.fits(p, t.response_ids, cells, engine.max_tokens) for p, t in zip(prompts, triples, strict=True)]
    dropped |= {triple.id: "pair_too_long" for triple, ok in zip(triples, fits, strict=True) if not ok}
    items = [Scorable(p, t.response_ids) for p, t, ok in zip(prompts, triples, fits, strict=True) if ok]
    triples = [triple for triple, ok in zip(triples, fits, strict=True) if ok]
    sums, shape = _reference_log_probs(run, iteration, reference, items, cells, folder)
    _require_finite(sums, triples, cells)
    scored = [pair_stage.with_log_probs(triple, cells, row) for triple, row in zip(triples, sums, strict=True)]
    kept, numbers = filtered(run, scored, dropped)
    return kept, {**numbers, "row_shape": shape}


def _require_finite(sums: list[list[float]], triples: list[Triple], cells: list[tuple[str, str]]) -> None:
    broken = [
        f"{triple.id} ({response} under {context}: {value})"
        for triple, row in zip(triples, sums, strict=True)
        for (context, response), value in zip(cells, row, strict=True)
        if not math.isfinite(value)
    ]
    if broken:
        raise RunError(f"reference log-probs that are not finite, of {', '.join(broken[:5])}: the policy is broken; take an earlier one")


def within_limit(run: Run, triples: list[Triple], dropped: Dropped) -> list[Triple]:
    """Triples whose plain prompt leaves room for both sides of the pair; the others are dropped."""
    prompts = [run.engine.chat.prompt_ids(triple.query, history=triple.history) for triple in triples]
    sides = [max(len(triple.response_ids[side]) for side in ("chosen", "rejected")) for triple in triples]
    longest = [len(prompt) + side for prompt, side in zip(prompts, sides, strict=True)]
    limit = run.engine.max_tokens
    dropped |= {triple.id: "pair_too_long" for triple, length in zip(triples, longest, strict=True) if length > limit}
    return [triple for triple, length in zip(triples, longest, strict=True) if length <= limit]


def filtered(run: Run, scored: list[Triple], dropped: Dropped) -> tuple[list[Triple], dict]:
    """The pairs that the filters let through; where one is on, the numbers of all of them are said too."""
    rules, kept = run.config.filter, scored
    least = rules.min_score_gap
    if rules.reward_path is not None and kept:
        rater = open_reward_scorer(rules.reward_path, run.config.model, run.engine.mesh)
        kept = with_rewards(kept, rater.rewards(kept, "filter: rewards"))
        least = 0.0 if least is None else least
    if least is not None:
        kept, small = keep_clear_scores(kept, least)
        dropped |= small
    if rules.reward_share < 1 and kept:
        kept, low = keep_widest(kept, rules.reward_share)
        dropped |= low
    if rules.enabled:
        kept, off = filter_pairs(kept)
        dropped |= off
    before = {} if kept is scored else {"before_filter": {"num_pairs": len(scored), **_numbers_of_pairs(run, scored)}}
    counts = {"dropped": dict(Counter(dropped.values())), "dropped_by_id": dropped}
    return kept, {**counts, **_numbers_of_pairs(run, kept), **before}


def _numbers_of_pairs(run: Run, pairs: list[Triple]) -> dict:
    return {**pair_stage.summarize(pairs), **pair_accuracy(run.environment, run.engine, pairs)}


def _reference_log_probs(
    run: Run, iteration: int, reference, items: list[Scorable], cells: list[tuple[str, str]], folder: Path
) -> tuple[list[list[float]], RowShape | None]:
    """Log-prob sums by the reference, and the shape of their rows."""
    engine, config = run.engine, run.config
    micro = config.train.microbatch_size or config.train.batch_size
    batches, stage = scoring_batches(items, cells, micro), f"iteration {iteration}: reference log-probs"
    if not batches:
        return [], None
    earlier, is_last = run.earlier_shape(iteration, folder, "pairs"), iteration == config.run.iterations
    shape = stable_row_shape(batches, num_batch_shards(engine.mesh), earlier, is_last, engine.model.by_sequence)
    return score_examples(engine.score, engine.mesh, reference, items, cells, micro, stage, shape), shape


def require_pairs(pairs: list[Triple], count: int, dropped: dict, path: Path) -> None:
    """Raises `RunError` with the reasons where none of `count` candidates was kept."""
    if not pairs:
        raise RunError(
            f"{path.parent}: none of {count} triples was kept ({dropped}); look at {path}, and start anew with other settings or queries"
        )
