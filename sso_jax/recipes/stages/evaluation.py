"""Measures the policy on held-out queries, and has an endpoint judge a sample of pairs; never trained on."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from sso_jax.data.records import Triple
from sso_jax.preferences import judging
from sso_jax.preferences.endpoint import JOURNAL_FILE
from sso_jax.recipes.environment import judge_policy
from sso_jax.recipes.run import Params, Round
from sso_jax.recipes.stages.held_out_answers import mean_log_prob, measure_answers
from sso_jax.runtime.hosts import on_first_process
from sso_jax.runtime.json_lines import read_json_lines, write_records
from sso_jax.runtime.stage_markers import file_stage

EVALUATION_FILE, JUDGMENTS_FILE = "evaluation.jsonl", "judgments.jsonl"


@dataclass(frozen=True)
class EvaluationResult:
    """Result of stage `evaluation`; the qualities are None without a judge, the rest without held-out queries."""

    policy_quality: float | None
    seconds: float
    quality_parts: dict[str, float] | None = None
    held_out_tokens: float | None = None
    held_out_groups: dict[str, dict[str, float]] | None = None
    held_out_answers: dict[str, Any] | None = None
    """Numbers of the answers to held-out queries that no judge scores (`measure_answers`)."""
    held_out_log_prob: float | None = None
    """Mean log-prob per token of the initial policy's answers, which are in no pair, in nats."""

    @classmethod
    def of_stage(cls, stats: dict) -> "EvaluationResult":
        """Builds the result from the statistics of the finished stage."""
        return cls(**stats)

    def numbers(self) -> dict[str, Any]:
        """Returns the fields for a round's summary."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "seconds"}


def evaluate(this: Round, policy: Params) -> EvaluationResult:
    """Stage `evaluation`: the unsteered policy's answers to held-out queries, measured, in `evaluation.jsonl`."""
    run = this.run

    def measure() -> dict:
        rows, means = measure_policy(this, policy)
        if rows:
            write_records(rows, this.folder / EVALUATION_FILE)
        first = run.folder(0) / EVALUATION_FILE
        if rows and jax.process_count() == 1 and first.is_file():  # other hosts may not see the file
            stage = this.title("held-out answers of the first policy")
            log_prob = mean_log_prob(run, policy, read_json_lines(first), f"{stage}: log-probs")
            means = {**means, "held_out_log_prob": log_prob}
        return means

    return EvaluationResult.of_stage(file_stage(this.folder, "evaluation", measure, EVALUATION_FILE))


def measure_policy(this: Round, policy: Params) -> tuple[list[dict], dict[str, Any]]:
    """Returns the unsteered answers to the held-out queries as rows, and their numbers; no rows without queries."""
    run = this.run
    if not run.environment.held_out:
        return [], {"policy_quality": None}
    if run.environment.judge is None:
        return measure_answers(this, policy)
    return judge_policy(run.environment, run.engine, policy, run.config.run.seed, this.title("held-out answers"))


def judge_by_endpoint(this: Round, pairs: Sequence[Triple]) -> dict[str, Any] | None:
    """Stage `judgments`: the endpoint's judgments of a sample of the pairs, in `judgments.jsonl`; None without one."""
    run = this.run
    if not run.config.judging.pairs or not pairs:
        return None

    def judge() -> dict:
        sample = judging.draw_pairs(pairs, run.config.judging.pairs, this.seed)
        questions = judging.judging_questions(sample)

        def ask() -> list[dict]:
            journal = this.folder / JOURNAL_FILE
            limit = judging.VERDICT_TOKENS + run.config.endpoint.thought_tokens
            answers = run.endpoint.ask(questions, this.title("judgments"), limit, 0.0, journal)
            return judging.judgments(sample, answers)

        rows = on_first_process(ask)
        write_records(rows, this.folder / JUDGMENTS_FILE)
        return judging.summarize_judgments(rows)

    stats = file_stage(this.folder, "judgments", judge, JUDGMENTS_FILE)
    return {name: value for name, value in stats.items() if name != "seconds"}
