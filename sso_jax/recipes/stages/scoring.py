"""Stage `pairs`: orders triples, scores them with the reference, and filters them.

The reference scores every pair once, right after sampling. The marker of the finished stage has a key of the
reference's weights, the tokenizer and the token ids; if these have changed, the log-probs are stale and are computed
again.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from sso_jax.data.records import Cell, Dropped, Prompts, Triple
from sso_jax.data.tokenizer import tokens_hash
from sso_jax.models.fingerprint import fingerprint
from sso_jax.models.hf_folder import fetch
from sso_jax.preferences import pairs as pair_rules
from sso_jax.preferences.contrast import CONTRAST_CELLS
from sso_jax.preferences.filters import FILTER_CELLS, filter_pairs, keep_clear_scores, keep_widest, with_rewards
from sso_jax.preferences.responses import clean_triples
from sso_jax.recipes.engine import load_params
from sso_jax.recipes.environment import judged, pair_accuracy
from sso_jax.recipes.objective import Objective
from sso_jax.recipes.reward_model import open_reward_scorer, tokenize_pair
from sso_jax.recipes.run import Params, Round
from sso_jax.runtime.checksums import json_digest
from sso_jax.runtime.errors import RunError
from sso_jax.runtime.hosts import on_first_process
from sso_jax.runtime.journal import Journal
from sso_jax.runtime.json_lines import each_record
from sso_jax.runtime.spool import Lazy, spooled
from sso_jax.runtime.stage_markers import finished, read_verified, record_stage, reopen
from sso_jax.training.scoring import Scorable, plan_scoring, require_finite, score_examples

PAIRS_FILE = "pairs.jsonl"
log = logging.getLogger(__name__)
Candidates = tuple[Sequence[Triple], Dropped]
"""Clean triples, and those dropped before them."""


@dataclass(frozen=True)
class PairNumbers:
    """Statistics of a set of pairs."""

    chosen_probability: float | None = None
    rejected_probability: float | None = None
    response_tokens: float | None = None
    pair_accuracy: float | None = None
    pair_ties: float | None = None


@dataclass(frozen=True)
class PairsResult:
    """Result of stage `pairs`."""

    pairs: Sequence[Triple]
    numbers: PairNumbers
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of triples dropped, by reason."""
    before_filter: dict[str, Any] | None = None
    """`num_pairs` and the statistics of the pairs before the filters; None without filters."""
    num_cut: int | None = None
    """Number of pairs whose responses were cut to the token limit."""
    padding: float | None = None
    """Share of padding among the tokens that the reference computed; None if it computed nothing."""
    seconds: float = 0.0

    @classmethod
    def of_stage(cls, pairs: Sequence[Triple], stats: dict) -> "PairsResult":
        """Builds the result from the records and the statistics of the finished stage."""
        numbers = PairNumbers(**{f.name: stats.get(f.name) for f in dataclasses.fields(PairNumbers)})
        own = {name: stats.get(name) for name in ("before_filter", "num_cut", "padding")}
        return cls(pairs, numbers, stats["dropped"], **own, seconds=stats["seconds"])


def reference_cells(objective: Objective | None, filter_enabled: bool) -> list[Cell]:
    """Returns the log-probs that the reference computes for every pair."""
    cells = {
        *pair_rules.SCORED_CELLS,
        *(objective.cells if objective else ()),
        *(FILTER_CELLS if filter_enabled else ()),
        *(CONTRAST_CELLS if objective and objective.token_contrast else ()),  # must fit the token limit too
    }
    return sorted(cells)


def in_control_order(this: Round, triples: Sequence[Triple]) -> Sequence[Triple]:
    """Orders the chosen and rejected response of each triple as `pairs.control` says."""
    control = this.run.config.pairs.control
    if control == "random_order":
        return pair_rules.random_order(triples, this.seed)
    if control == "judge_order":
        environment, engine = this.run.environment, this.run.engine
        return pair_rules.judge_order(triples, lambda triple, response: judged(environment, engine, triple, response))
    return triples


def sampled_candidates(this: Round, triples: Sequence[Triple]) -> Candidates:
    """Cleans sampled triples and puts them in control order; returns them and those dropped."""
    clean, dropped = clean_triples(this.run.engine.chat.tokenizer, triples)
    return in_control_order(this, clean), dropped


def score_and_filter(
    this: Round,
    objective: Objective | None,
    policy: Params,
    prompts: Mapping[str, Prompts],
    candidates: Callable[[], Candidates],
) -> PairsResult:
    """Stage `pairs`: scores the candidates with the reference and filters them, in `pairs.jsonl`.

    Args:
      this: the round.
      objective: objective whose log-probs are needed; None for those of the plain pair alone.
      policy: the reference, unless `model.reference_path` names another.
      prompts: prompts by query id and context.
      candidates: returns the candidates; called only if the stage is not finished.

    Raises:
      RunError: if a log-prob is not finite, or the stored log-probs are from another reference and updates have already
        used them.
    """
    cells = reference_cells(objective, this.run.config.filter.enabled)
    stored, trained = read_verified(this.folder, "pairs"), finished(this.folder, "training") is not None
    if stored is not None and trained:
        return PairsResult.of_stage(spooled(each_record(Triple, this.folder / PAIRS_FILE)), stored)
    reference = reference_of(this, policy)
    reference_hash = fingerprint(reference)
    if stored is not None:
        _discard_stale_pairs(this, reference_hash, cells, prompts, stored)

    def make() -> tuple[Sequence[Triple], dict]:
        triples, dropped = candidates()
        scored, scoring = _score(this, reference, reference_hash, triples, cells, prompts, dropped)
        kept, stats = apply_filters(this, scored, dropped)
        key = _reference_key(this, reference_hash, cells, kept, prompts)
        return kept, {**stats, **scoring, "reference_key": key}

    return PairsResult.of_stage(*record_stage(this.folder, "pairs", Triple, make))


def reference_of(this: Round, policy: Params) -> Params:
    """Returns the current policy, or the model at `model.reference_path`."""
    path = this.run.config.model.reference_path
    return policy if path is None else load_params(fetch(path), this.run.engine)


def _discard_stale_pairs(
    this: Round, reference_hash: str, cells: list[Cell], prompts: Mapping[str, Prompts], stored: dict
) -> None:
    """Reopens the finished stage if its log-probs are not from this reference, tokenizer and token ids."""
    path = this.folder / PAIRS_FILE
    pairs = each_record(Triple, path)
    if _reference_key(this, reference_hash, cells, pairs, prompts) == stored.get("reference_key"):
        return
    if on_first_process(lambda: (this.folder / "checkpoints").exists()):
        raise RunError(
            f"{path}: its log-probs are not from this reference, tokenizer and pairs, and updates have used them; "
            f"restore what was changed, or delete {this.folder / 'checkpoints'} to run the updates again"
        )
    log.warning("%s: its log-probs are not from this reference, tokenizer and pairs; they are computed again", path)
    reopen(this.folder, "pairs")


def _reference_key(
    this: Round, reference_hash: str, cells: list[Cell], pairs: Iterable[Triple], prompts: Mapping[str, Prompts]
) -> str:
    """Returns a hash of what the reference's log-probs depend on: weights, tokenizer, cells and token ids."""
    rows = ([prompts.get(triple.id), triple.response_ids] for triple in pairs)
    return json_digest([reference_hash, tokens_hash(this.run.engine.chat.tokenizer), cells], rows, 16)


def _score(
    this: Round,
    reference: Params,
    reference_hash: str,
    triples: Sequence[Triple],
    cells: list[Cell],
    prompts: Mapping[str, Prompts],
    dropped: Dropped,
) -> tuple[Sequence[Triple], dict]:
    """Scores the triples within the token limit with the reference; returns them and the statistics of scoring.

    The other triples are added to `dropped`, or cut, as `train.long_examples` says.
    """
    engine, stage = this.run.engine, this.title("reference log-probs")
    triples, num_cut = _within_limit(this, triples, cells, prompts)

    def reason_of(triple: Triple) -> str | None:
        fits = pair_rules.fits(prompts[triple.id], triple.response_ids, cells, engine.max_tokens)
        return None if fits else "pair_too_long"

    fitting, too_long = pair_rules.drop_by_reason(triples, reason_of)
    dropped |= too_long
    if not fitting:
        return [], {"num_cut": num_cut}
    items = scorables(fitting, prompts)
    earlier = this.previous_step_shapes("pairs")
    plan = plan_scoring(items, cells, engine.step_limits, earlier, this.is_last)
    log.info("%s: %s", stage, plan.describe())
    journal = _open_journal(this, _reference_key(this, reference_hash, cells, fitting, prompts))
    sums = score_examples(engine.score, reference, items, cells, plan, stage, journal)
    require_finite(sums, (triple.id for triple in fitting), cells)
    scored = spooled(pair_rules.with_log_probs(t, cells, row) for t, row in zip(fitting, sums, strict=True))
    return scored, {"num_cut": num_cut, "step_shapes": plan.shapes, "padding": plan.padding()}


def scorables(triples: Sequence[Triple], prompts: Mapping[str, Prompts]) -> Sequence[Scorable]:
    """Returns what is scored of triples with token ids, made anew each time that it is read."""

    def make(number: int) -> Scorable:
        triple = triples[number]
        return Scorable(prompts[triple.id], triple.response_ids)

    return Lazy(len(triples), make)


def _within_limit(
    this: Round, triples: Sequence[Triple], cells: list[Cell], prompts: Mapping[str, Prompts]
) -> tuple[Sequence[Triple], int]:
    """Returns the triples, cut to the token limit if `train.long_examples` is `cut`, and the number that was cut."""
    if this.run.config.train.long_examples == "drop":
        return triples, 0
    limit = this.run.engine.max_tokens

    def cut(triple: Triple) -> Triple:
        return pair_rules.cut_to(triple, prompts[triple.id], cells, limit)

    num_cut = sum(cut(triple) is not triple for triple in triples)
    if not num_cut:
        return triples, 0
    log.warning("%d of %d pairs were cut to %d tokens of prompt and response", num_cut, len(triples), limit)
    return spooled(map(cut, triples)), num_cut


def _open_journal(this: Round, reference_key: str) -> Journal | None:
    """Opens the journal of log-probs with this key, next to those of sampling; None without a folder for journals."""
    folder, engine = this.run.engine.sampler.journals, this.run.engine
    if folder is None:
        return None
    name = f"{reference_key}-{engine.step_limits.tokens}"
    return Journal(folder / name, name, jax.process_index())


def apply_filters(this: Round, scored: Sequence[Triple], dropped: Dropped) -> tuple[Sequence[Triple], dict]:
    """Returns the pairs that pass the filters, and the statistics of the stage, including those before the filters."""
    rules, kept, least = this.run.config.filter, scored, this.run.config.filter.min_score_gap
    if rules.reward_path is not None and kept:
        scorer = open_reward_scorer(
            rules.reward_path, this.run.config.model, this.run.engine.mesh, this.run.config.chat.thinking
        )
        tokenized = spooled(tokenize_pair(scorer.chat, triple) for triple in kept)
        kept = with_rewards(kept, scorer.rewards(tokenized, "filter: rewards"))
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
    before = {}
    if kept is not scored:
        before = {"before_filter": {"num_pairs": len(scored), **_numbers(this, scored)}}
    counts = {"dropped": dict(Counter(dropped.values())), "dropped_by_id": dropped}
    return kept, {**counts, **_numbers(this, kept), **before}


def _numbers(this: Round, pairs: Sequence[Triple]) -> dict:
    return {**pair_rules.summarize(pairs), **pair_accuracy(this.run.environment, this.run.engine, pairs)}


def require_pairs(result: PairsResult, count: int, path: Path) -> PairsResult:
    """Returns the result; raises `RunError` with the reasons if none of `count` candidates was kept."""
    if not result.pairs:
        raise RunError(
            f"{path.parent}: none of {count} triples was kept ({result.dropped}); look at {path}, and start again with "
            "other settings or queries"
        )
    return result
