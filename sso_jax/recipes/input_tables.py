"""The files of a config as `Table`s, and the rows whose turns a chat template refuses."""

from collections import Counter
from typing import TypeVar

from sso_jax.config import (
    Config,
    DataConfig,
    DemonstrationsConfig,
    EvaluateConfig,
    EvaluationConfig,
    PairsConfig,
    QueriesConfig,
    SampleConfig,
)
from sso_jax.data.chat import Chat
from sso_jax.data.records import Demonstration, Query, Triple
from sso_jax.data.rows import RowError, Table, drop_unusable

Asked = TypeVar("Asked", bound=Query | Triple | Demonstration)


def queries_table(config: Config | SampleConfig) -> Table:
    """Returns the file of the queries."""
    return _table("queries.path", config.queries, config.data)


def pairs_table(config: Config | EvaluateConfig) -> Table:
    """Returns the file of the pairs."""
    return _table("pairs.path", config.pairs, config.data)


def demonstrations_table(config: Config) -> Table:
    """Returns the file of the demonstrations."""
    return _table("demonstrations.path", config.demonstrations, config.data)


def evaluation_table(config: Config) -> Table:
    """Returns the file of the held-out queries."""
    return _table("evaluation.path", config.evaluation, config.data)


Given = QueriesConfig | PairsConfig | DemonstrationsConfig | EvaluationConfig
"""A section that names a file."""


def _table(field: str, given: Given, data: DataConfig) -> Table:
    return Table(str(given.path), field, given.split, given.name, data.on_bad_rows)


def annotated_table(config: Config) -> Table:
    """Returns the file of the annotated pairs that recipe `reward` mixes in."""
    given = config.reward
    names = given.annotated_split, given.annotated_name
    return Table(str(given.annotated_path), "reward.annotated_path", *names, config.data.on_bad_rows)


def drop_refused_turns(chat: Chat, records: list[Asked], table: Table) -> tuple[list[Asked], Counter[str]]:
    """Drops records whose turns the chat template refuses, such as two of a user in a row.

    Raises:
      InputError: if more than a tenth of the records are refused, or one is and `on_bad_rows` is `refuse`.
    """

    def problem(record: Asked) -> RowError | None:
        refusal = chat.refusal((*(turn["role"] for turn in record.history), "user"))
        if refusal is None:
            return None
        return RowError("template_refuses_turns", f"{table.path}, id {record.id}: {refusal}")

    return drop_unusable(records, table, problem)
