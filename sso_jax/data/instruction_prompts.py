"""Reads prompts with verifiable instructions, as IFEval publishes them, and counts which responses follow them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sso_jax.data.instruction_checks import CHECKS, RELATIONS, follows, follows_loosely
from sso_jax.data.rows import Row, Table
from sso_jax.data.tables import read_rows
from sso_jax.runtime.errors import InputError

COLUMNS = ("prompt", "instruction_id_list", "kwargs")
TYPE_NAMES = {int: "an integer", str: "a text", list: "a list of texts"}


class Instruction(NamedTuple):
    """An instruction in a prompt."""

    id: str
    arguments: dict[str, Any]
    """Arguments of its check; empty if the instruction is unknown."""

    @property
    def is_known(self) -> bool:
        """Whether there is a check of it."""
        return self.id in CHECKS


@dataclass(frozen=True)
class InstructedPrompt:
    """A prompt and the instructions in it."""

    id: str
    prompt: str
    instructions: tuple[Instruction, ...]


def load_instructed_prompts(table: Table, required: bool = True) -> list[InstructedPrompt]:
    """Reads the rows `prompt, instruction_id_list, kwargs` of a file, of which `kwargs` may hold nulls.

    Every row counts in the result, so none is dropped.

    Args:
      table: the file.
      required: whether a file without the columns of instructions is refused; else it has no prompts with any.

    Raises:
      InputError: for a row without its columns or with a wrong argument; names file, line and column.
    """
    rows = read_rows(table)
    if not required and all(row.fields.get(name) is None for row in rows for name in COLUMNS[1:]):
        return []
    if not rows:
        raise InputError(f"{table.field}: {table.path!r} contains no prompts; give a file with at least one")
    return [_read(row, number) for number, row in enumerate(rows)]


def _read(row: Row, number: int) -> InstructedPrompt:
    missing = [name for name in COLUMNS if row.fields.get(name) is None]
    if missing:
        raise row.error("no_column", f"no column {', '.join(missing)}; give {', '.join(COLUMNS)}, as IFEval has them")
    prompt, ids, arguments = (row.take(name) for name in COLUMNS)
    if not isinstance(prompt, str) or not prompt.strip():
        raise row.error("no_prompt", f"column prompt is {prompt!r}; give a text")
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise row.error("no_instructions", f"column instruction_id_list is {ids!r}; give a list of texts")
    if not isinstance(arguments, list) or len(arguments) != len(ids):
        raise row.error("bad_arguments", f"column kwargs is {arguments!r}; give a list of {len(ids)} objects")
    instructions = tuple(_instruction(row, name, given) for name, given in zip(ids, arguments, strict=True))
    return InstructedPrompt(row.given_id() or str(number), prompt, instructions)


def _instruction(row: Row, name: str, given: Any) -> Instruction:
    """Returns an instruction with the arguments that its check takes."""
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise row.error("bad_arguments", f"column kwargs has {given!r} for {name}; give an object")
    if name not in CHECKS:
        return Instruction(name, {})
    arguments = {}
    for key, kind in CHECKS[name].arguments.items():
        value = given.get(key)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of numbers with nulls is one of floats in Parquet
        if not _has_type(value, kind):
            raise row.error("bad_arguments", f"column kwargs: {key} of {name} is {value!r}; give {TYPE_NAMES[kind]}")
        if key.endswith("relation") and value not in RELATIONS:
            raise row.error(
                "bad_arguments", f"column kwargs: {key} of {name} is {value!r}; give {' or '.join(RELATIONS)}"
            )
        arguments[key] = value
    return Instruction(name, arguments)


def _has_type(value: Any, kind: type) -> bool:
    if isinstance(value, list):
        return kind is list and all(isinstance(part, str) for part in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def followed(prompt: InstructedPrompt, response: str) -> dict[str, list[bool | None]]:
    """Returns which instructions of a prompt a response follows, `strict` and `loose`; None for one without a check."""
    checks = {"strict": follows, "loose": follows_loosely}
    return {
        name: [check(one.id, one.arguments, response) if one.is_known else None for one in prompt.instructions]
        for name, check in checks.items()
    }


def _share(marks: list[bool]) -> float | None:
    return sum(marks) / len(marks) if marks else None


def instruction_accuracy(prompts: Sequence[InstructedPrompt], responses: Sequence[str]) -> dict[str, Any]:
    """Returns the accuracies of IFEval (section 2.2 of arXiv 2311.07911) over the instructions that are known.

    Args:
      prompts: the prompts.
      responses: the response to each.

    Returns:
      `instruction_strict`, `instruction_loose`: share of the `num_instructions` known instructions that are followed;
      `prompt_strict`, `prompt_loose`: share of the `num_prompts` prompts without an unknown instruction of which all
      are followed; `unknown`: number of the instructions left out, by id. A share of none is None.

    Raises:
      InputError: if there are not as many responses as prompts.
    """
    if len(prompts) != len(responses):
        raise InputError(f"{len(responses)} responses to {len(prompts)} prompts; give one to each")
    unknown = Counter(one.id for prompt in prompts for one in prompt.instructions if not one.is_known)
    marks = [followed(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    numbers: dict[str, Any] = {}
    for name in ("strict", "loose"):
        of_prompts = [own[name] for own in marks]
        known = [bool(mark) for own in of_prompts for mark in own if mark is not None]
        whole = [all(own) for own in of_prompts if None not in own]
        numbers |= {f"prompt_{name}": _share(whole), f"instruction_{name}": _share(known)}
        numbers |= {"num_prompts": len(whole), "num_instructions": len(known)}
    return {**numbers, "unknown": dict(sorted(unknown.items()))}
