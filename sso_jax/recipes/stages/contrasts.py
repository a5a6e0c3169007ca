"""Stage `contrasts`: weights of the tokens of a round's pairs by the contrast of its principles."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from sso_jax.data.records import Cell, Prompts, TokenContrast, Triple
from sso_jax.preferences.contrast import CONTRAST_CELLS, SIDES, token_weights
from sso_jax.recipes.run import Params, Round
from sso_jax.recipes.stages.scoring import reference_of
from sso_jax.runtime.spool import Table
from sso_jax.runtime.stage_markers import finished, record_stage, reopen
from sso_jax.training.scoring import Scorable
from sso_jax.training.token_scoring import TokenLogProbs, score_tokens

KEY = "contrasts_key"
"""Field of the stage's statistics with a hash of what the weights depend on."""


def token_contrasts(
    this: Round, strength: float, policy: Params, pairs: Sequence[Triple], prompts: Mapping[str, Prompts]
) -> Mapping[str, TokenContrast]:
    """Returns the weights of the tokens of each pair's responses, by id; stored in `contrasts.jsonl`.

    Args:
      this: the round.
      strength: share of the contrast in the weights.
      policy: the round's first policy, which is the reference unless `model.reference_path` names another.
      pairs: the round's scored pairs.
      prompts: prompts by query id and context.
    """
    of_pairs = (finished(this.folder, "pairs") or {}).get("reference_key")
    content = json.dumps([of_pairs, strength, [pair.id for pair in pairs]])
    key = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    stored = finished(this.folder, "contrasts")
    if stored is not None and stored[KEY] != key:
        reopen(this.folder, "contrasts")

    def make() -> tuple[list[TokenContrast], dict]:
        engine, stage = this.run.engine, this.title("contrasts of tokens")
        items = [Scorable(prompts[pair.id], {side: pair.response_ids[side] for side in SIDES}) for pair in pairs]
        reference = reference_of(this, policy)
        scored = score_tokens(engine.score, reference, items, CONTRAST_CELLS, engine.step_limits, stage)
        return [_contrast(pair.id, own, strength) for pair, own in zip(pairs, scored, strict=True)], {KEY: key}

    records, _ = record_stage(this.folder, "contrasts", TokenContrast, make)
    return Table((record.id, record) for record in records)


def _contrast(name: str, scored: TokenLogProbs, strength: float) -> TokenContrast:
    weights = {
        side: token_weights(scored[Cell("positive", side)], scored[Cell("negative", side)], strength) for side in SIDES
    }
    sums = {side: float(np.dot(weights[side], scored[Cell("plain", side)])) for side in SIDES}
    return TokenContrast(name, weights, sums)
