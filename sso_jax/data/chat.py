"""Renders queries and system messages with the tokenizer's chat template and tokenizes them into prompts."""

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
"""A private-use character; temporary names of control tokens start with it."""
TEMPLATE_DATE = "26 Jul 2024"
"""Passed to every template, so that those that print a date always print the same one (Llama 3.1's own default)."""
FIXED_CLOCK = "{%- macro strftime_now(format) -%}" + TEMPLATE_DATE + "{%- endmacro -%}"
"""Prepended to templates that call transformers' clock, which it replaces."""
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""Exceptions that rendering a template can raise: Jinja's own, and those of the expressions in it."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template. If it does not support system messages, they are prepended to the user turn."""

    tokenizer: PreTrainedTokenizerBase
    system_role: bool
    """Whether the template renders system messages."""

    def prompt_ids(self, query: str, system: str | None = None, history: tuple[dict[str, str], ...] = ()) -> list[int]:
        """Returns the token ids of the prompt up to the start of the response.

        Control tokens that occur in the texts are encoded as plain characters.

        Args:
          query: the last user turn.
          system: system message; replaces one in `history`.
          history: messages before the query.

        Raises:
          InputError: for turns that the template does not accept.
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
                f"query {query[:60]!r}: the chat template does not accept its turns ({turns}): {error}; give turns "
                "that alternate"
            ) from error

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        if any(control in message["content"] for message in messages for control in self._controls()):
            return self._guarded_ids(messages)
        ids: list[int] = self.tokenizer(render(self.tokenizer, messages), add_special_tokens=False).input_ids
        return ids

    def _controls(self) -> list[str]:
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)

    def _guarded_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokenizes messages whose texts contain control tokens.

        The control tokens of the template are renamed, and a copy of the tokenizer that knows only the new names
        encodes the result, so that the ones in the texts are plain characters to it.
        """
        controls = self._controls()
        texts = "".join(message["content"] for message in messages)
        mark = HIDING
        while mark in texts:
            mark += HIDING
        any_control = re.compile("|".join(map(re.escape, controls)))

        def rename(prefix: str) -> Callable[[re.Match[str]], str]:
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
    """Copies the tokenizer with its control tokens renamed; the old names are plain characters to the copy."""
    described = tokenizer.backend_tokenizer.to_str()
    for number, control in enumerate(controls):
        new = _new_name(prefix, number)
        described = described.replace(json.dumps(control, ensure_ascii=False), json.dumps(new, ensure_ascii=False))
    return Tokenizer.from_str(described)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Renders messages and the response's header by the chat template, in transformers' sandbox, with a fixed date."""
    template = tokenizer.get_chat_template()
    template = FIXED_CLOCK + template if "strftime_now" in template else template
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, chat_template=template, date_string=TEMPLATE_DATE
    )
    assert isinstance(rendered, str)  # because of tokenize=False
    return rendered


def make_chat(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """Creates the `Chat` of a tokenizer, after testing whether its template supports system messages.

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
            "template"
        ) from error
    if query not in shown:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} leaves out the user turn; give the tokenizer another "
            "template"
        )
    try:
        takes_system = system in render(tokenizer, [{"role": "system", "content": system}, user_turn])
    except TEMPLATE_ERRORS:
        takes_system = False
    if not takes_system:
        log.warning(
            "%s: the chat template does not support system messages; principles are prepended to the user turn",
            tokenizer.name_or_path,
        )
    return Chat(tokenizer, takes_system)
