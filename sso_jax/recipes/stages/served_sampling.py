"""The sampler of `sampling.source` endpoint: a server of the policy that samples in a round."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from sso_jax.data.records import Cell
from sso_jax.preferences.policy_server import OUTPUT_FILE
from sso_jax.preferences.server_sampler import ServerSampler
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.run import Params, Round
from sso_jax.recipes.stages.policies import served_policy
from sso_jax.runtime.files import is_remote
from sso_jax.training.scoring import Scorable
from sso_jax.training.token_scoring import score_tokens

JOURNAL_FILE, SERVED_FOLDER = "server_responses.jsonl", "served_policy"
"""Among the journals of a run: responses as they arrive, and a policy that no other folder has."""
RESPONSE = Cell("plain", "response")


def served_sampler(this: Round, policy: Params, trained: bool) -> ServerSampler | None:
    """Returns the sampler of a round's responses if a server samples them, else None.

    Args:
      this: the round, or the part of it that trains a generator.
      policy: parameters of the policy that samples.
      trained: whether this round has trained them.
    """
    run, engine = this.run, this.run.engine
    if run.config.sampling.source != "endpoint":
        return None
    temporary = engine.sampler.journals or this.folder
    local = Path(tempfile.mkdtemp()) if is_remote(this.folder) else this.folder
    return ServerSampler(
        engine.sampler,
        run.config.sampling,
        run.config.endpoint.retries,
        partial(served_policy, this, policy, trained, temporary / SERVED_FOLDER),
        partial(response_log_probs, engine),
        temporary / JOURNAL_FILE,
        local / OUTPUT_FILE,
    )


def response_log_probs(engine: Engine, params: dict[str, Any], items: list[Scorable]) -> list[list[float]]:
    """Returns the log-probs of the tokens of each item's response, in nats, from the forward pass of training.

    Args:
      engine: the policy's engine.
      params: its parameters.
      items: examples with the prompt `plain` and one `response`.
    """
    found = score_tokens(engine.score, params, items, [RESPONSE], engine.step_limits, "our own log-probs")
    return [log_probs[RESPONSE] for log_probs in found]
