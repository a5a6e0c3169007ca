"""Stage `prompts`: renders and tokenizes each prompt of a round once; later stages look up the ids."""

from collections.abc import Iterator, Mapping, Sequence

from sso_jax.data.records import PromptRecord, Prompts, SteeredQuery, Triple
from sso_jax.data.tokenizer import tokens_hash
from sso_jax.preferences.steering import steered_prompts
from sso_jax.recipes.run import Round
from sso_jax.runtime.checksums import json_digest
from sso_jax.runtime.hosts import each_across_processes
from sso_jax.runtime.spool import Table
from sso_jax.runtime.stage_markers import read_verified, record_stage, reopen

KEY = "prompts_key"
"""Field of the stage's statistics with the hash of what the prompts depend on."""


def render_prompts(this: Round, records: Sequence[SteeredQuery] | Sequence[Triple]) -> Mapping[str, Prompts]:
    """Returns the token ids of the prompts x, x+, x- of each record, by record id and context.

    They are stored in `prompts.jsonl`, and rendered again if the tokenizer, its template or a text has changed.
    """
    chat = this.run.engine.chat
    texts = ([r.id, r.query, r.good_system, r.bad_system, r.history, *_of_triple(r)] for r in records)
    key = json_digest([tokens_hash(chat.tokenizer)], texts, 16)
    stored = read_verified(this.folder, "prompts")
    if stored is not None and stored[KEY] != key:
        reopen(this.folder, "prompts")

    def render() -> tuple[Iterator[PromptRecord], dict]:
        prompts = each_across_processes(lambda record: steered_prompts(chat, record), records)
        return (PromptRecord(record.id, own) for record, own in zip(records, prompts, strict=True)), {KEY: key}

    stored, _ = record_stage(this.folder, "prompts", PromptRecord, render)
    return Table((record.id, record.prompts) for record in stored)


def _of_triple(record: SteeredQuery | Triple) -> list:
    """Returns what else the prompts of a given pair depend on."""
    return [record.scores] if isinstance(record, Triple) else []
