"""Answers with token ids: ends of turn as our own sampler's, and every answer that a request does not allow."""

import pytest

from sso_jax.preferences.completions import completion_body, read_completion
from sso_jax.preferences.http_client import Failure
from sso_jax.runtime.errors import InputError
from sso_jax.sampling.stage import Request

END, OTHER_END = 3, 9
REQUEST = Request([5, 6, 7], (2**32 - 1, 17))


def body(limit: int = 4, **more) -> dict:
    return {**completion_body(REQUEST, limit, (0.7, 0.8, None), (END, OTHER_END)), **more}


def answer(ids, finish: str = "length", **more) -> dict:
    return {"choices": [{"text": " a", "token_ids": ids, "finish_reason": finish, **more}]}


def test_the_request_has_the_settings_and_a_seed_of_its_key():
    found = body()
    assert found["prompt"] == [5, 6, 7] and found["max_tokens"] == 4 and found["stop_token_ids"] == [END, OTHER_END]
    assert (found["temperature"], found["top_p"], found["top_k"], found["seed"]) == (0.7, 0.8, -1, 2**31 - 1)
    assert found["return_token_ids"] is True and found["repetition_penalty"] == 1.0
    assert completion_body(REQUEST, 4, (0.7, 0.8, 20), (END,))["top_k"] == 20


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (answer([1, 2, 1, 2]), [1, 2, 1, 2]),
        (answer([1, END], "stop"), [1, END]),
        (answer([1, OTHER_END], "stop", stop_reason=OTHER_END), [1, OTHER_END]),
        (answer([1], "stop", stop_reason=None), [1, END]),
        (answer([1], "stop", matched_stop=OTHER_END), [1, OTHER_END]),
        (answer([], "stop"), [END]),
        (answer([1, 2, 1, END]), [1, 2, 1, END]),
        (answer([1, END], "stop", prompt_token_ids=[5, 6, 7]), [1, END]),
    ],
    ids=["cut", "ended", "other end", "end left away", "other end left away", "empty", "ended at the limit", "prompt"],
)
def test_responses_end_as_those_of_our_own_sampler(choice, expected):
    assert read_completion(choice, body(), "field") == {"ids": expected}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (answer(None, "stop"), r"field: .*text without token ids \(choices\[0\].token_ids is None\).*other ids"),
        (answer(["1"], "stop"), r"text without token ids \(choices\[0\].token_ids is \['1'\]\)"),
        (answer([1, 2]), r"cut a response after 2 tokens without an end of turn.*up to 4; raise its own limit"),
        (answer([1, 2, 1, 2, 1]), r"cut a response after 5 tokens"),
        (answer([1], "stop", stop_reason="\n\n"), r"ended a response at '\\n\\n', which is no end of turn"),
        (answer([1, END, 2, 2]), r"went on after an end of turn \(\[3, 9\]\), so that it does not take stop_token_ids"),
        (answer([1, END], "stop", prompt_token_ids=[0, 5, 6, 7]), r"answered a prompt of 4 tokens .* asked 3 tokens"),
    ],
)
def test_what_a_request_does_not_allow_is_refused(choice, message):
    with pytest.raises(InputError, match=message):
        read_completion(choice, body(), "field")


@pytest.mark.parametrize("payload", [None, [], {}, {"choices": []}, answer([1], "abort"), answer([1], None)])
def test_an_answer_without_a_finished_response_is_tried_again(payload):
    with pytest.raises(Failure) as failed:
        read_completion(payload, body(), "field")
    assert failed.value.passing


def test_log_probs_are_those_of_the_returned_tokens():
    asked = body(logprobs=1)
    choice = answer([1], "stop", logprobs={"token_logprobs": [-0.5]})
    assert read_completion(choice, asked, "field") == {"ids": [1, END], "log_probs": [-0.5]}
    for found in (None, {"token_logprobs": []}, {"token_logprobs": [None]}, {"tokens": ["a"]}):
        with pytest.raises(InputError, match=r"field: the server returns no log-probs of its 1 tokens"):
            read_completion(answer([1], "stop", logprobs=found), asked, "field")
