"""Measures a policy on held-out queries, and has an endpoint judge a sample of the pairs."""

import jax
import numpy as np

from sso_jax.data.records import Triple
from sso_jax.data.tokenizer import encode_text
from sso_jax.preferences import judging
from sso_jax.preferences.endpoint import JOURNAL_FILE
from sso_jax.recipes.environment import measure_policy
from sso_jax.recipes.run import Run
from sso_jax.runtime import stage_markers as stages
from sso_jax.runtime.hosts import on_first_process
from sso_jax.runtime.json_lines import read_json_lines, write_records
from sso_jax.training.scoring import Scorable, score_examples

ANSWERS_SCORED_TOGETHER = 64


EVALUATION_FILE = "evaluation.jsonl"


def judge_by_endpoint(run: Run, iteration: int, pairs: list[Triple]) -> dict:
    """What the endpoint says of a sample of the round's pairs, in `judgments.jsonl` and as numbers; it measures and nothing more."""
    if not run.config.judging.pairs or not pairs:
        return {}
    folder = run.folder(iteration)

    def judge() -> dict:
        sample = judging.draw_pairs(pairs, run.config.judging.pairs, f"{run.config.run.seed}/{iteration}")
        questions = judging.judging_questions(sample)
        stage = f"iteration {iteration}: judgments"
        ask = lambda: run.endpoint.ask(questions, stage, judging.VERDICT_TOKENS, 0.0, folder / JOURNAL_FILE)  # noqa: E731
        rows = on_first_process(lambda: judging.judgments(sample, ask()))
        write_records(rows, folder / "judgments.jsonl")
        return judging.summarize_judgments(rows)

    numbers = stages.plain_stage(folder, "judgments", judge, "judgments.jsonl")
    return {"endpoint_judge": {name: value for name, value in numbers.items() if name != "seconds"}}


def evaluate(run: Run, iteration: int, params) -> dict:
    """Quality of the unsteered policy on held-out queries, where there is a judge; its answers go to evaluation.jsonl.

    `held_out_log_prob` is what the policy thinks of the answers that the policy before any update gave: they are in no pair.
    """

    def measure() -> dict:
        stage = f"iteration {iteration}: held-out answers"
        rows, means = measure_policy(run.environment, run.engine, params, run.config.run.seed, stage)
        if rows:
            write_records(rows, run.folder(iteration) / EVALUATION_FILE)
        first = run.folder(0) / EVALUATION_FILE
        if rows and jax.process_count() == 1 and first.is_file():  # other hosts may not see the file
            means = {**means, "held_out_log_prob": _mean_log_prob(run, params, read_json_lines(first), f"{stage}: log-probs")}
        return means

    return stages.plain_stage(run.folder(iteration), "evaluation", measure, EVALUATION_FILE)


def _mean_log_prob(run: Run, params, rows: list[dict], stage: str) -> float:
    """Log-prob a token, in nats, of the answers (`query`, `response`) under the plain prompt: where mass goes that pairs do not show."""
    chat, cells = run.engine.chat, [("plain", "answer")]
    ids = [[*encode_text(chat.tokenizer, row["response"]), chat.tokenizer.eos_token_id] for row in rows]
    items = [Scorable({"plain": chat.prompt_ids(row["query"])}, {"answer": own}) for row, own in zip(rows, ids, strict=True)]
    sums = score_examples(run.engine.score, run.engine.mesh, params, items, cells, ANSWERS_SCORED_TOGETHER, stage)
    return float(np.mean([total / len(own) for (total,), own in zip(sums, ids, strict=True)]))
