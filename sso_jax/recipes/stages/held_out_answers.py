"""Measures a policy without a judge on held-out queries: its answers, and how well principles still steer it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sso_jax.data.chat import encode_response
from sso_jax.data.instruction_prompts import followed, instruction_accuracy
from sso_jax.data.records import Cell, Prompts, Query, SteeredQuery
from sso_jax.data.response_measures import measure_responses
from sso_jax.data.tokenizer import decode_text
from sso_jax.preferences.principles import choose_features
from sso_jax.preferences.steering import steer, steered_prompts
from sso_jax.recipes.environment import answer_row
from sso_jax.recipes.relevance import relevances
from sso_jax.recipes.run import Params, Round, Run
from sso_jax.recipes.stages.policies import first_policy
from sso_jax.runtime.hosts import map_across_processes, on_first_process
from sso_jax.sampling.sampler import Request, row_key
from sso_jax.training.scoring import Scorable, require_finite, score_examples

STEERING_RECIPES = ("online", "generator")
"""Recipes that sample under principles, of which the rest of the steerability is measured."""
ANSWER = Cell("plain", "answer")
STEERED = [Cell(context, name) for name in ("chosen", "rejected") for context in ("positive", "negative")]


@dataclass(frozen=True)
class Answer:
    """A held-out query with the prompts of its answers, and the sampled answers, by context and by name."""

    query: Query
    prompts: Prompts
    responses: dict[str, list[int]]
    cut: bool = False
    """Whether the unsteered answer reached the token limit."""


def measure_answers(this: Round, policy: Params) -> tuple[list[dict], dict[str, Any]]:
    """Samples answers to the held-out queries and measures them; returns the unsteered ones as rows, and the numbers.

    The numbers are `held_out_tokens`, and in `held_out_answers`: those of `ResponseMeasures`; `relevance`, the mean
    cosine of query and answer; `instructions`, the numbers of `instruction_accuracy`; `start_log_ratio`; and
    `steerability`, see the functions below. What cannot be measured is None.
    """
    run, stage = this.run, this.title("held-out answers")
    answers = _sample(run, policy, stage)
    texts = [decode_text(run.engine.chat.tokenizer, answer.responses["answer"]) for answer in answers]
    num_tokens = [len(answer.responses["answer"]) for answer in answers]
    found = measure_responses(texts, num_tokens, [answer.cut for answer in answers])
    rows = [
        {**answer_row(answer.query, text), "tokens": num, "cut": answer.cut}
        for answer, text, num in zip(answers, texts, num_tokens, strict=True)
    ]
    numbers = {
        **found._asdict(),
        "relevance": _add_relevance(run, rows),
        "instructions": _add_instructions(run, rows),
        "start_log_ratio": start_log_ratio(this, policy, answers),
        "steerability": steerability(run, policy, answers, f"{stage}: steerability"),
    }
    return rows, {"policy_quality": None, "held_out_tokens": found.mean_tokens, "held_out_answers": numbers}


def _sample(run: Run, policy: Params, stage: str) -> list[Answer]:
    """Samples an unsteered answer to each held-out query, and y+ and y- where a recipe steers and the prompts fit."""
    engine, config = run.engine, run.config
    queries = run.environment.held_out
    prompts = map_across_processes(lambda query: steered_prompts(engine.chat, steered_query(run, query)), queries)
    roles = {"answer": "plain"}
    if config.recipe in STEERING_RECIPES:
        roles |= {"chosen": "positive", "rejected": "negative"}

    def names(own: Prompts) -> list[str]:
        return list(roles) if all(engine.sampler.fits(own[context]) for context in roles.values()) else ["answer"]

    asked = [(i, name) for i, own in enumerate(prompts) for name in names(own)]
    requests = [
        Request(
            prompts[i][roles[name]],
            row_key(config.run.seed, 0, queries[i].id, "evaluation" if name == "answer" else f"evaluation/{name}"),
        )
        for i, name in asked
    ]
    samples = engine.sampler.sample(policy, requests, stage)
    responses: list[dict[str, list[int]]] = [{} for _ in queries]
    cut = [False] * len(queries)
    for (i, name), ids, at_limit in zip(asked, samples.responses, samples.cut, strict=True):
        responses[i][name] = ids
        if name == "answer":
            cut[i] = bool(at_limit)
    return [Answer(*parts) for parts in zip(queries, prompts, responses, cut, strict=True)]


def steered_query(run: Run, query: Query) -> SteeredQuery:
    """Returns a held-out query with principles of the table, drawn by `run.seed`: the same ones for every policy."""
    rules = run.config.principles
    seed = f"{run.config.run.seed}/evaluation"
    return steer(choose_features(query, None, rules.features_per_query, rules.concision_probability, seed))


def _add_relevance(run: Run, rows: list[dict]) -> float | None:
    """Adds `relevance` to the rows; returns its mean, None without an embedding model."""
    embed = run.environment.embed
    if embed is None:
        return None
    texts = [row["query"] for row in rows], [row["response"] for row in rows]
    found = on_first_process(lambda: relevances(embed, *texts))  # one for all, whose packages may differ
    for row, value in zip(rows, found, strict=True):
        row["relevance"] = value
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def _add_instructions(run: Run, rows: list[dict]) -> dict[str, Any] | None:
    """Adds to the rows which instructions are followed, `strict` and `loose`; returns the accuracies, None without."""
    given = run.environment.instructions
    asked = [(row, given[row["query"].strip()]) for row in rows if row["query"].strip() in given]
    for row, prompt in asked:
        row["instructions"] = [one.id for one in prompt.instructions]
        row |= followed(prompt, row["response"])
    return instruction_accuracy([p for _, p in asked], [row["response"] for row, _ in asked]) if asked else None


def start_log_ratio(this: Round, policy: Params, answers: list[Answer]) -> float:
    """Returns the mean over a policy's unsteered answers of log pi_start(y|x) - log pi(y|x), in nats an answer.

    0 at the start, and in the mean below 0 after it: its negative estimates the divergence KL(pi || pi_start).
    """
    run, stage = this.run, this.title("held-out answers")
    if this.iteration == 0:
        return 0.0
    now = _scores(run, policy, answers, [ANSWER], f"{stage}: log-probs")
    start = _scores(run, first_policy(run, policy), answers, [ANSWER], f"{stage}: first policy's log-probs")
    return float(np.mean(start - now))


def steerability(run: Run, policy: Params, answers: list[Answer], stage: str) -> dict[str, float] | None:
    """Returns how far apart principles still put a policy's responses, in nats a token; None where nothing is steered.

    `chosen`: mean of (log pi(y+|x+) - log pi(y+|x-)) / |y+| over the held-out queries, y+ sampled from x+.
    `rejected`: mean of (log pi(y-|x-) - log pi(y-|x+)) / |y-|, y- sampled from x-.
    Each estimates a divergence, per token, between the policy under x+ and under x-; 0 if principles change nothing.
    """
    steered = [answer for answer in answers if "chosen" in answer.responses]
    if not steered:
        return None
    sums = _scores(run, policy, steered, STEERED, stage).reshape(-1, 2, 2)
    lengths = np.array([[max(len(a.responses[name]), 1) for name in ("chosen", "rejected")] for a in steered])
    gaps = np.mean((sums[..., 0] - sums[..., 1]) / lengths, axis=0)
    return {"chosen": float(gaps[0]), "rejected": -float(gaps[1])}


def mean_log_prob(run: Run, policy: Params, rows: list[dict], stage: str) -> float:
    """Returns the mean log-prob per token, in nats, of rows of `evaluation.jsonl` under the plain prompt."""
    chat, answers = run.engine.chat, []
    for row in rows:
        query = Query(row["id"], row["query"], tuple(row.get("history", ())))
        ids = encode_response(chat.tokenizer, row["response"])
        answers.append(Answer(query, {"plain": chat.prompt_ids(query.query, history=query.history)}, {"answer": ids}))
    sums = _scores(run, policy, answers, [ANSWER], stage)[:, 0]
    return float(np.mean(sums / [len(answer.responses["answer"]) for answer in answers]))


def _scores(run: Run, policy: Params, answers: list[Answer], cells: list[Cell], stage: str) -> np.ndarray:
    """Returns the log-prob sums [answers, cells]."""
    engine = run.engine
    contexts, names = {cell.context for cell in cells}, {cell.response for cell in cells}
    items = [
        Scorable({c: a.prompts[c] for c in contexts}, {name: a.responses[name] for name in names}) for a in answers
    ]
    sums = score_examples(engine.score, policy, items, cells, engine.step_limits, stage)
    require_finite(sums, [answer.query.query[:60] for answer in answers], cells)
    return np.array(sums)
