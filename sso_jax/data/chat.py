"""Renders queries and system messages with the tokenizer's chat template and tokenizes them into prompts."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from sso_jax.data.conversations import Messages
from sso_jax.data.thoughts import open_thought
from sso_jax.data.tokenizer import encode_text
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.json_lines import with_shared

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
SWITCHES = ("enable_thinking", "thinking")
"""Names of the variable by which templates switch thinking."""
ANSWER = "the answer"
"""Stands for an answer when a template is tested."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template. If it does not support system messages, they are prepended to the user turn."""

    tokenizer: PreTrainedTokenizerBase
    system_role: bool
    """Whether the template renders system messages."""
    switch: bool | None = None
    """Value of the template's switch for thinking; None leaves its default."""
    removed: str = ""
    """End of the template's header of a response, a thought's opening, that prompts are without."""
    opening: str = ""
    """The thought's opening with which prompts end, if thinking is on."""
    thought_tokens: int = 0
    """Tokens to allow for a thought before an answer; 0 if none is to be expected."""

    def prompt_ids(self, query: str, system: str | None = None, history: Messages = ()) -> list[int]:
        """Returns the token ids of the prompt up to the start of the response.

        Control tokens that occur in the texts are encoded as plain characters.

        Args:
          query: the last user turn.
          system: a principle; it follows the system message in `history` if there is one, after a blank line.
          history: messages before the query.

        Raises:
          InputError: for turns that the template does not accept.
        """
        messages = self._arranged([*history, {"role": "user", "content": query}], system)
        try:
            return self._ids(messages)
        except TEMPLATE_ERRORS as error:
            turns = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"query {query[:60]!r}: the chat template does not accept its turns ({turns}): {error}; give turns "
                "that alternate"
            ) from error

    def refusal(self, roles: tuple[str, ...]) -> str | None:
        """Returns why the template refuses turns of these roles, None if it accepts them."""
        return _refusal(self, roles)

    def render(self, messages: list[dict[str, str]]) -> str:
        """Renders messages and the response's header, without the opening of a thought unless thinking is on."""
        return render(self.tokenizer, messages, self.switch).removesuffix(self.removed)

    def _arranged(self, messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
        """Returns the messages with a principle, in the form that the template supports."""
        if messages[0]["role"] == "system" and (system is not None or not self.system_role):
            own = messages.pop(0)["content"]
            system = own if system is None else f"{own}\n\n{system}"
        if system is not None and self.system_role:
            return [{"role": "system", "content": system}, *messages]
        if system is not None:
            first, *rest = messages
            return [{**first, "content": f"{system}\n\n{first['content']}"}, *rest]
        return messages

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        if any(control in message["content"] for message in messages for control in self._controls):
            return self._guarded_ids(messages)
        ids: list[int] = self.tokenizer(self.render(messages), add_special_tokens=False).input_ids
        return with_shared(ids)

    @cached_property
    def _controls(self) -> list[str]:
        """Control tokens of the tokenizer, the longest first; read once, because some tokenizers have hundreds."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)

    def _guarded_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokenizes messages whose texts contain control tokens.

        The control tokens of the template are renamed, and a copy of the tokenizer that knows only the new names
        encodes the result, so that the ones in the texts are plain characters to it.
        """
        controls = self._controls
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
        rendered = any_control.sub(rename(mark), self.render(hidden))
        shown = re.sub(re.escape(mark + "text") + "(\\d+)\ue001", lambda found: controls[int(found.group(1))], rendered)
        return _twin(self.tokenizer, tuple(controls), mark).encode(shown, add_special_tokens=False).ids


def _new_name(prefix: str, number: int) -> str:
    return f"{prefix}{number}\ue001"


@lru_cache(maxsize=1024)
def _refusal(chat: Chat, roles: tuple[str, ...]) -> str | None:
    messages = [{"role": role, "content": f"text {number}"} for number, role in enumerate(roles)]
    try:
        chat.render(chat._arranged(messages, None))
    except TEMPLATE_ERRORS as error:
        return f"the chat template does not accept the turns {', '.join(roles)}: {error}"
    return None


@lru_cache(maxsize=4)
def _twin(tokenizer: PreTrainedTokenizerBase, controls: tuple[str, ...], prefix: str) -> Tokenizer:
    """Copies the tokenizer with its control tokens renamed; the old names are plain characters to the copy."""
    described = tokenizer.backend_tokenizer.to_str()
    for number, control in enumerate(controls):
        new = _new_name(prefix, number)
        described = described.replace(json.dumps(control, ensure_ascii=False), json.dumps(new, ensure_ascii=False))
    return Tokenizer.from_str(described)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    switch: bool | None = None,
    header: bool = True,
) -> str:
    """Renders messages by the chat template, in transformers' sandbox, with a fixed date.

    Args:
      tokenizer: tokenizer with the template.
      messages: the messages.
      switch: value of the template's switch for thinking; None leaves its default.
      header: whether the header of a response follows.
    """
    template = tokenizer.get_chat_template()
    template = FIXED_CLOCK + template if "strftime_now" in template else template
    variables: dict[str, Any] = {} if switch is None else dict.fromkeys(SWITCHES, switch)
    rendered = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=header,
        chat_template=template,
        date_string=TEMPLATE_DATE,
        **variables,
    )
    assert isinstance(rendered, str)  # because of tokenize=False
    return rendered


def make_chat(tokenizer: PreTrainedTokenizerBase, thinking: str = "auto", thought_tokens: int = 1024) -> Chat:
    """Creates the `Chat` of a tokenizer, after testing what its template supports.

    Args:
      tokenizer: tokenizer with the template.
      thinking: `on`, `off`, or `auto` for the template's default.
      thought_tokens: tokens to allow for a thought, where thinking is on.

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
    thoughts = _thinking_of(tokenizer, user_turn, thinking)
    return Chat(tokenizer, takes_system, *thoughts[:3], thought_tokens=thought_tokens if thoughts.thinks else 0)


class _Thoughts(NamedTuple):
    """How a template treats thoughts: fields of `Chat`, and whether a thought is to be expected before an answer."""

    switch: bool | None
    removed: str
    opening: str
    thinks: bool


def _thinking_of(tokenizer: PreTrainedTokenizerBase, user_turn: dict[str, str], thinking: str) -> _Thoughts:
    """Finds out how the template treats thoughts.

    A header may end with the opening of a thought (DeepSeek-R1's distills), in which a plain answer would be part of
    the thought. The opening is left out of prompts, unless thinking is on.
    """
    on, off = (render(tokenizer, [user_turn], switch) for switch in (True, False))
    switch = {"auto": None, "on": True, "off": False}[thinking] if on != off else None
    header = render(tokenizer, [user_turn], switch)
    opening = open_thought(header)
    if thinking != "auto" and on == off and not opening:
        log.warning(
            "chat.thinking: %r has no effect, as the chat template of %s has no switch for thinking",
            *(thinking, tokenizer.name_or_path),
        )
    thinks = thinking == "on" or (thinking == "auto" and (bool(opening) or header != off))
    kept = opening if thinking == "on" else ""
    return _Thoughts(switch, "" if kept else opening, kept, thinks)


@lru_cache(maxsize=8)
def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token with which the chat template ends an assistant's turn.

    It is the control token right after the answer in a rendered exchange, such as `<|im_end|>`, and the tokenizer's
    eos_token if the template writes none there. A base model's eos_token often is another (`<|endoftext|>`).
    """
    try:
        rendered = render(
            tokenizer,
            [{"role": "user", "content": "the query"}, {"role": "assistant", "content": ANSWER}],
            header=False,
        )
    except TEMPLATE_ERRORS:
        return int(tokenizer.eos_token_id)
    rest = rendered.rpartition(ANSWER)[2].lstrip()
    controls = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = sorted((name for name in controls if rest.startswith(name)), key=len)
    return controls[ends[-1]] if ends else int(tokenizer.eos_token_id)


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a response that is given as a text, with its end of turn."""
    return [*encode_text(tokenizer, text), end_of_turn(tokenizer)]


def stop_ids(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> tuple[int, ...]:
    """Returns the tokens that end a response: the template's end of turn, the eos_token, and the model's own.

    The model's are those of generation_config.json, or of config.json if there is no such file or it names none.

    Raises:
      InputError: if the files cannot be read, or name an invalid token.
    """
    listed = _eos_ids(Path(folder) / "generation_config.json", tokenizer)
    listed = listed or _eos_ids(Path(folder) / "config.json", tokenizer)
    return tuple(dict.fromkeys([end_of_turn(tokenizer), int(tokenizer.eos_token_id), *listed]))


def _eos_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); fetch the file again, or delete it") from error
    listed = given.get("eos_token_id") if isinstance(given, dict) else None
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    strange = [token for token in listed if not isinstance(token, int) or not 0 <= token < len(tokenizer)]
    if strange:
        raise InputError(
            f"{path}: eos_token_id {strange[0]!r} is not one of the {len(tokenizer)} tokens; fetch the file again, or "
            "delete it"
        )
    return listed
