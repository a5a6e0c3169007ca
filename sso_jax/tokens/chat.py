"""A query and a system message in, the token ids of the prompt out, by the tokenizer's own chat template."""

import logging
import re
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from sso_jax.errors import InputError
from sso_jax.tokens.tokenizer import encode_text

TEMPLATE_DATE = "26 Jul 2024"
"""Given to every template, so that those that print the date print the same one every day (Llama 3.1's own default)."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template. Where it refuses system messages, they head the user turn."""

    tokenizer: PreTrainedTokenizerBase
    system_role: bool
    """Whether the template renders system messages."""

    def prompt_ids(self, query: str, system: str | None = None) -> list[int]:
        """Ids of the prompt up to where the response starts. Control tokens written in the texts stay characters."""
        messages = [{"role": "user", "content": query}]
        if system is not None and self.system_role:
            messages.insert(0, {"role": "system", "content": system})
        elif system is not None:
            messages[0]["content"] = f"{system}\n\n{query}"
        if any(control in message["content"] for message in messages for control in self._controls()):
            return self._guarded_ids(messages)
        return self.tokenizer(self._render(messages), add_special_tokens=False).input_ids

    def _controls(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted({str(token) for token in added if token.special} | set(self.tokenizer.all_special_tokens), key=len, reverse=True)

    def _render(self, messages: list[dict]) -> str:
        return render(self.tokenizer, messages)

    def _guarded_ids(self, messages: list[dict]) -> list[int]:
        """As the tokenizer does it (cut at control tokens, encode what lies between), with the control tokens of the template only."""
        controls = self._controls()
        texts = "".join(message["content"] for message in messages)
        mark = "\ue000"
        while mark in texts:
            mark += "\ue000"
        any_control = re.compile("|".join(map(re.escape, controls)))
        hide = lambda found: f"{mark}{controls.index(found.group())}\ue001"  # noqa: E731
        hidden = [{**message, "content": any_control.sub(hide, message["content"])} for message in messages]
        ids: list[int] = []
        for part in re.split(f"({any_control.pattern})", self._render(hidden)):
            if part in controls:
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
            elif part:
                shown = re.sub(f"{mark}(\\d+)\ue001", lambda found: controls[int(found.group(1))], part)
                ids.extend(encode_text(self.tokenizer, shown))
        return ids


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> str:
    """Text of the messages with the head of the response, by the template in transformers' sandbox."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE)


def make_chat(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """Chat of a tokenizer, found out by trying whether its template takes a system message.

    Raises:
      InputError: if the template does not render a user turn.
    """
    query, system = "the query", "the system message"
    user_turn = {"role": "user", "content": query}
    try:
        if query not in render(tokenizer, [user_turn]):
            raise InputError(f"the chat template of {tokenizer.name_or_path} leaves out the user turn; give the tokenizer another one")
    except jinja2.TemplateError as error:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} fails on a user turn ({error}); give the tokenizer another one"
        ) from error
    try:
        takes_system = system in render(tokenizer, [{"role": "system", "content": system}, user_turn])
    except jinja2.TemplateError:
        takes_system = False
    if not takes_system:
        log.warning("%s: the chat template takes no system message; principles head the user turn", tokenizer.name_or_path)
    return Chat(tokenizer, takes_system)
