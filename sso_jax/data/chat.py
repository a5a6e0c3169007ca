"""A query and a system message in, the token ids of the prompt out, by the tokenizer's own chat template."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jinja2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from sso_jax.runtime.errors import InputError

HIDING = "\ue000"
"""A private character; the new names of control tokens start with it."""
TEMPLATE_DATE = "26 Jul 2024"
"""Given to every template, so that those that print the date print the same one every day (Llama 3.1's own default)."""
FIXED_CLOCK = "{%- macro strftime_now(format) -%}" + TEMPLATE_DATE + "{%- endmacro -%}"
"""Heads the templates that ask transformers' clock, and answers in its place."""
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a template raises: its own errors, and those of the expressions in it."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template. Where it refuses system messages, they head the user turn."""

    tokenizer: PreTrainedTokenizerBase
    system_role: bool
    """Whether the template renders system messages."""

    def prompt_ids(self, query: str, system: str | None = None, history: tuple[dict[str, str], ...] = ()) -> list[int]:
        """Ids of the prompt up to where the response starts. Control tokens written in the texts stay characters.

        `history` holds the messages before the query; `system` takes the place of a system message there.

        Raises:
          InputError: for a history that the template does not render.
        """
        messages = [*history, {"role": "user", "content": query}]
        if messages[0]["role"] == "system" and (system is not None or not self.system_role):
            system = messages[0]["content"] if system is None else system
            messages = messages[1:]
        if system is not None and self.system_role:
            messages.insert(0, {"role": "system", "content": system})
        elif system is not None:
            messages[0] = {**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}
        try:
            return self._ids(messages)
        except TEMPLATE_ERRORS as error:
            turns = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"query {query[:60]!r}: the chat template refuses its turns ({turns}): {error}; give turns that "
                "alternate"
            ) from error

    def _ids(self, messages: list[dict]) -> list[int]:
        if any(control in message["content"] for message in messages for control in self._controls()):
            return self._guarded_ids(messages)
        return self.tokenizer(render(self.tokenizer, messages), add_special_tokens=False).input_ids

    def _controls(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted(
            {str(token) for token in added if token.special} | set(self.tokenizer.all_special_tokens),
            key=len,
            reverse=True,
        )

    def _guarded_ids(self, messages: list[dict]) -> list[int]:
        """Ids where the texts hold control tokens: the template's own are renamed, and a twin that knows the new names
        only encodes all.
        """
        controls = self._controls()
        texts = "".join(message["content"] for message in messages)
        mark = HIDING
        while mark in texts:
            mark += HIDING
        any_control = re.compile("|".join(map(re.escape, controls)))

        def rename(prefix: str) -> Callable[[re.Match], str]:
            return lambda found: _new_name(prefix, controls.index(found.group()))

        hidden = [
            {**message, "content": any_control.sub(rename(mark + "text"), message["content"])} for message in messages
        ]
        rendered = any_control.sub(rename(mark), render(self.tokenizer, hidden))
        shown = re.sub(re.escape(mark + "text") + "(\\d+)\ue001", lambda found: controls[int(found.group(1))], rendered)
        return _twin(self.tokenizer, tuple(controls), mark).encode(shown, add_special_tokens=False).ids


def _new_name(prefix: str, number: int) -> str:
    return f"{prefix}{number}\ue001"


@lru_cache(maxsize=4)
def _twin(tokenizer: PreTrainedTokenizerBase, controls: tuple[str, ...], prefix: str) -> Tokenizer:
    """The tokenizer with its control tokens under new names, all else the same: the old names are plain characters to
    it.
    """
    described = tokenizer.backend_tokenizer.to_str()
    for number, control in enumerate(controls):
        new = _new_name(prefix, number)
        described = described.replace(json.dumps(control, ensure_ascii=False), json.dumps(new, ensure_ascii=False))
    return Tokenizer.from_str(described)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> str:
    """Text of the messages with the head of the response, by the template in transformers' sandbox; dates are the fixed
    one.
    """
    template = tokenizer.get_chat_template()
    template = FIXED_CLOCK + template if "strftime_now" in template else template
    options = dict(tokenize=False, add_generation_prompt=True, chat_template=template, date_string=TEMPLATE_DATE)
    return tokenizer.apply_chat_template(messages, **options)


def make_chat(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """Chat of a tokenizer, found out by trying whether its template takes a system message.

    Raises:
      InputError: if the template does not render a user turn.
    """
    query, system = "the query", "the system message"
    user_turn = {"role": "user", "content": query}
    try:
        shown = render(tokenizer, [user_turn])
    except TEMPLATE_ERRORS as error:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} fails on a user turn ({error}); give the tokenizer another "
            "one"
        ) from error
    if query not in shown:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} leaves out the user turn; give the tokenizer another one"
        )
    try:
        takes_system = system in render(tokenizer, [{"role": "system", "content": system}, user_turn])
    except TEMPLATE_ERRORS:
        takes_system = False
    if not takes_system:
        log.warning(
            "%s: the chat template takes no system message; principles head the user turn", tokenizer.name_or_path
        )
    return Chat(tokenizer, takes_system)
