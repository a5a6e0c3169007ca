"""Requests for completions of token ids, and what a server's answers to them must have.

The protocol is that of the OpenAI API's completions, with the fields that vLLM and SGLang share: the prompt as token
ids, `return_token_ids`, `top_k`, `stop_token_ids`. An answer's choice has `token_ids`, `finish_reason` (`stop` or
`length`), `prompt_token_ids`, with `logprobs` those of its tokens, and the token that ended it as `stop_reason` (vLLM)
or `matched_stop` (SGLang).
"""

from collections.abc import Sequence
from typing import Any

from sso_jax.preferences.http_client import Failure
from sso_jax.runtime.errors import InputError
from sso_jax.sampling.stage import Request

PATH = "completions"
"""Path below the base URL."""
NEUTRAL = {"n": 1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Settings that change nothing, in place of those that a server takes from the policy's generation_config.json."""


def completion_body(
    request: Request, limit: int, settings: tuple[float, float, int | None], stop_ids: Sequence[int]
) -> dict[str, Any]:
    """Returns the JSON of a request, without the name of the model on the server.

    The seed is the first word of the request's random key without its last bit: 31 bits, which every server takes.

    Args:
      request: prompt and random key.
      limit: maximum tokens of the response.
      settings: temperature, top_p, and top_k or None.
      stop_ids: tokens that end a response.
    """
    temperature, top_p, top_k = settings
    return {
        "prompt": request.prompt_ids,
        "max_tokens": limit,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": -1 if top_k is None else top_k,
        "seed": request.key[0] >> 1,
        "stop_token_ids": list(stop_ids),
        "return_token_ids": True,
        **NEUTRAL,
    }


def read_completion(payload: Any, body: dict[str, Any], field: str) -> dict[str, Any]:
    """Returns the response of an answer: `ids` with the end of turn if it was reached, and `log_probs` if asked for.

    A server that leaves the end of turn away gets it appended, so that responses end as those of our own sampler.

    Args:
      payload: JSON of the server.
      body: JSON of the request.
      field: config field of the server, for messages.

    Raises:
      Failure: if there is no finished response.
      InputError: if the server returns no token ids, or a response that the request does not allow.
    """
    try:
        choice = payload["choices"][0]
        finish = choice["finish_reason"]
    except (KeyError, IndexError, TypeError) as error:
        raise Failure("no_response") from error
    if finish not in ("stop", "length"):
        raise Failure("aborted", detail=f"finish_reason {finish!r}")
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise InputError(
            f"{field}: the server returns text without token ids (choices[0].token_ids is {ids!r:.60}), and a text "
            "that is tokenized again can have other ids than were sampled; give a server that takes return_token_ids, "
            "such as a recent vLLM or SGLang"
        )
    asked = choice.get("prompt_token_ids")
    if asked is not None and asked != body["prompt"]:
        raise InputError(
            f"{field}: the server answered a prompt of {len(asked)} tokens that begins with {asked[:5]}, and was asked "
            f"{len(body['prompt'])} tokens that begin with {body['prompt'][:5]}; start it without what changes "
            "prompts, such as a completion template"
        )
    log_probs = _log_probs(choice, len(ids), field) if "logprobs" in body else {}
    return {"ids": _ended(ids, choice, body, field), **log_probs}


def _ended(ids: list[int], choice: dict[str, Any], body: dict[str, Any], field: str) -> list[int]:
    """Returns the ids with the end of turn that the server may have left away; refuses other ends."""
    stops, limit = body["stop_token_ids"], body["max_tokens"]
    ended = bool(ids) and ids[-1] in stops
    if choice["finish_reason"] == "stop" and not ended:
        reason = choice.get("stop_reason", choice.get("matched_stop"))
        last = stops[0] if reason is None else reason
        if last not in stops:
            raise InputError(
                f"{field}: the server ended a response at {last!r}, which is no end of turn of the policy ({stops}); "
                "start it without stop texts of its own"
            )
        ids, ended = [*ids, last], True
    if len(ids) > limit or (len(ids) < limit and not ended):
        raise InputError(
            f"{field}: the server cut a response after {len(ids)} tokens without an end of turn, and was asked for up "
            f"to {limit}; raise its own limit of prompt plus response (vLLM: --max-model-len; SGLang: --context-length)"
        )
    if any(token in stops for token in ids[:-1]):
        raise InputError(
            f"{field}: the server went on after an end of turn ({stops}), so that it does not take stop_token_ids; "
            "give a server that does"
        )
    return ids


def _log_probs(choice: dict[str, Any], num_tokens: int, field: str) -> dict[str, list[float]]:
    """Returns the log-probs of a response's tokens."""
    found = (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(found, list) or len(found) != num_tokens or not all(isinstance(x, int | float) for x in found):
        raise InputError(
            f"{field}: the server returns no log-probs of its {num_tokens} tokens (choices[0].logprobs.token_logprobs "
            f"is {found!r:.60}), by which its weights are checked; give a server that takes logprobs"
        )
    return {"log_probs": [float(x) for x in found]}
