"""Continues prompts greedily here and in transformers with PyTorch, and compares tokens and log-probs."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from sso_jax.data.records import Cell
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.run import Params
from sso_jax.sampling.sampler import Request
from sso_jax.training.scoring import Scorable, score_examples

TOLERANCE = 1e-3
"""Largest difference, in nats a token, between log-probs of two float32 routes; also that of a tie of two tokens."""


class Continued(NamedTuple):
    """A prompt with its greedy continuation by both routes, as token ids."""

    ours: list[int]
    theirs: list[int]
    our_log_prob: float
    """Sum over `ours`, in nats."""
    their_log_prob: float
    """Theirs of the same tokens."""
    gap: float
    """By how much, in nats, theirs prefer their token where the two part; 0 where they do not."""

    @property
    def error(self) -> float:
        """Difference of the log-probs, in nats a token."""
        return abs(self.our_log_prob - self.their_log_prob) / max(1, len(self.ours))

    @property
    def differs(self) -> bool:
        """Whether log-probs differ, or tokens do where they are no tie."""
        return not (self.error <= TOLERANCE and self.gap <= TOLERANCE)


def has_torch() -> bool:
    """Returns whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def compare_routes(
    folder: Path, engine: Engine, params: Params, queries: list[str], num_tokens: int
) -> list[Continued]:
    """Continues each query by at most `num_tokens` tokens; both routes compute in float32."""
    prompts = [engine.chat.prompt_ids(query) for query in queries]
    requests = [Request(prompt, (0, number)) for number, prompt in enumerate(prompts)]
    ours = engine.sampler.sample(params, requests, "greedy continuations", num_tokens).responses
    items = [Scorable({"plain": p}, {"response": r}) for p, r in zip(prompts, ours, strict=True)]
    cells = [Cell("plain", "response")]
    sums = [row[0] for row in score_examples(engine.score, params, items, cells, engine.step_limits, "log-probs")]
    return _continued_by_torch(folder, engine.sampler.stop_ids, prompts, ours, sums, num_tokens)


def _continued_by_torch(
    folder: Path, stops: tuple[int, ...], prompts: list, ours: list, sums: list[float], num_tokens: int
) -> list[Continued]:
    """Continues the prompts in transformers, and scores our continuations there."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=num_tokens, eos_token_id=list(stops), pad_token_id=stops[0]
    )
    found = []
    for prompt, own, total in zip(prompts, ours, sums, strict=True):
        with torch.no_grad():
            theirs = model.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist()
            log_probs = model(torch.tensor([[*prompt, *own]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        their_sum = log_probs.gather(1, torch.tensor(own)[:, None]).sum().item()
        at = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), None)
        gap = 0.0 if at is None else (log_probs[at, theirs[at]] - log_probs[at, own[at]]).item()
        found.append(Continued(own, theirs, total, their_sum, gap))
    return found


def describe_routes(rows: list[Continued]) -> list[str]:
    """Returns lines about the comparison: all together, and the first continuation that differs."""
    same = sum(row.ours == row.theirs for row in rows)
    num_tokens, worst = sum(len(row.ours) for row in rows), max(row.error for row in rows)
    lines = [
        f"greedy continuations: {same} of {len(rows)} have the same tokens as transformers' ({num_tokens} tokens); "
        f"log-probs differ by at most {worst:.1e} nats a token (limit {TOLERANCE:.0e})"
    ]
    ties = sum(row.ours != row.theirs and not row.differs for row in rows)
    if ties:
        lines.append(f"{ties} part at a tie, where two tokens are within {TOLERANCE:.0e} nats")
    first = next((number for number, row in enumerate(rows) if row.differs), None)
    if first is not None:
        row = rows[first]
        lines.append(
            f"prompt {first + 1} differs: log-probs {row.our_log_prob:.4f} here, {row.their_log_prob:.4f} there; where "
            f"the tokens part, transformers prefers its own by {row.gap:.1e} nats"
        )
    return lines
