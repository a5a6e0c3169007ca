"""An endpoint that fails, stalls, rate-limits and returns nonsense: every question ends answered or counted, and none
is asked twice.
"""

import json
import os
import signal
import socket
import threading
import time

import pytest
from openai_server import Misbehave, serve

from sso_jax.data.records import Answer, Question
from sso_jax.preferences import http_client
from sso_jax.preferences.endpoint import Endpoint
from sso_jax.preferences.http_client import retry_after_seconds
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.server_process import free_port
from sso_jax.runtime.signals import Stopped, stop_at_safe_points


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short waits between tries, no key and no proxy from the machine."""
    monkeypatch.setattr(http_client, "FIRST_WAIT_SECONDS", 0.01)
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def questions(count: int) -> list[Question]:
    return [Question(f"q{i}", f"question {i}") for i in range(count)]


def shout(text: str) -> str:
    return text.upper()


def test_answers_come_in_the_order_of_the_questions_with_the_settings_asked_for():
    with serve(shout) as server:
        answers = Endpoint(server.url(), concurrency=3).ask(questions(9), "stage", max_tokens=7, temperature=0.5)
    assert answers == [Answer(f"QUESTION {i}") for i in range(9)]
    assert all((body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 7, 0.5) for body in server.bodies)


def test_what_may_pass_is_tried_again_until_each_question_is_answered():
    """In turn: 500, a stall, 429 with Retry-After, a hang-up, a body that is no JSON, one without choices, an empty
    text.
    """
    troubles = [
        Misbehave.status(500),
        Misbehave.stall(0.6),
        Misbehave.status(429, Retry_After="0.2"),
        Misbehave.hang_up,
        Misbehave.body("<html>busy</html>"),
        Misbehave.body('{"choices": []}'),
        Misbehave.body(json.dumps({"choices": [{"message": {"content": " "}}]})),
    ]

    def plan(text: str, tries: int):
        number = int(text.split()[1])
        return troubles[(number + tries - 1) % len(troubles)] if tries <= 2 else None

    with serve(shout, plan) as server:
        answers = Endpoint(server.url(), timeout_seconds=0.3, retries=2, concurrency=4).ask(
            questions(14), "stage", 7, 0.0
        )
    assert answers == [Answer(f"QUESTION {i}") for i in range(14)]
    assert all(count == 3 for count in server.asked.values()) and len(server.asked) == 14


def test_what_does_not_pass_is_counted_by_reason_and_the_others_are_answered():
    troubles = {
        "question 1": Misbehave.status(400),
        "question 3": Misbehave.status(503),
        "question 5": Misbehave.stall(2.0),
        "question 7": Misbehave.status(429, Retry_After="0"),
        "question 9": Misbehave.body("[]"),
    }
    with serve(shout, lambda text, tries: troubles.get(text)) as server:
        answers = Endpoint(server.url(), timeout_seconds=1.0, retries=1).ask(questions(12), "stage", 7, 0.0)
    lost = {i: answer.lost for i, answer in enumerate(answers) if answer.text is None}
    assert lost == {1: "refused", 3: "server_error", 5: "timeout", 7: "rate_limited", 9: "no_text"}
    assert server.asked["question 1"] == 1 and all(server.asked[f"question {i}"] == 2 for i in (3, 5, 7, 9))


def test_a_server_that_takes_no_question_at_all_stops_the_work():
    with (
        serve(shout, lambda text, tries: Misbehave.status(400)) as server,
        pytest.raises(InputError, match=r"8 questions in a row \(refused\)"),
    ):
        Endpoint(server.url(), concurrency=2).ask(questions(40), "stage", 7, 0.0)


def test_everybody_waits_as_long_as_a_rate_limit_asks():
    with serve(
        shout,
        lambda text, tries: Misbehave.status(429, Retry_After="0.7") if text.endswith(" 0") and tries == 1 else None,
    ) as server:
        endpoint = Endpoint(server.url(), concurrency=1)
        assert all(answer.text for answer in endpoint.ask(questions(3), "stage", 7, 0.0))
    assert server.moments[1] - server.moments[0] >= 0.69


def test_a_rate_limit_of_ones_own_spaces_the_requests():
    with serve(shout) as server:
        Endpoint(server.url(), requests_per_minute=600, concurrency=8).ask(questions(5), "stage", 7, 0.0)
    moments = sorted(server.moments)
    assert moments[-1] - moments[0] >= 0.38  # four gaps of a tenth of a second


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, None), ("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("soon", None), ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0)],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header, expected):
    assert retry_after_seconds(header, now=60.0) == expected


def test_an_interrupted_stage_asks_only_for_what_is_missing(tmp_path):
    journal = tmp_path / "endpoint.jsonl"

    def broken(text, tries):
        return Misbehave.status(503) if int(text.split()[1]) >= 4 else None

    with (
        serve(shout, broken) as server,
        pytest.raises(InputError, match=r"failed \d+ questions in a row \(server_error\).*kept"),
    ):
        Endpoint(server.url(), retries=0, concurrency=1).ask(questions(30), "stage", 7, 0.0, journal)
    with open(journal, "a", encoding="utf-8") as file:
        file.write('\n{"key": "cut sho')  # killed while writing
    with serve(shout) as server:
        assert [a.text for a in Endpoint(server.url()).ask(questions(30), "stage", 7, 0.0, journal)] == [
            f"QUESTION {i}" for i in range(30)
        ]
        assert set(server.asked) == {f"question {i}" for i in range(4, 30)}
        Endpoint(server.url()).ask(questions(30), "stage", 7, 0.0, journal)
        assert sum(server.asked.values()) == 26
        Endpoint(server.url()).ask(questions(2), "stage", 8, 0.0, journal)  # other settings are other questions
        assert sum(server.asked.values()) == 28


def test_a_text_with_unicode_line_separators_survives_the_journal(tmp_path):
    journal = tmp_path / "endpoint.jsonl"
    with serve(lambda text: "a\u2028b\u0085c\nd") as server:
        for _ in range(2):
            assert Endpoint(server.url()).ask(questions(1), "stage", 7, 0.0, journal) == [Answer("a\u2028b\u0085c\nd")]
        assert sum(server.asked.values()) == 1


def test_a_server_that_is_down_slow_or_something_else_is_told_in_one_line():
    with pytest.raises(InputError, match=r"^endpoint.url: .* cannot be reached .*start the server"):
        Endpoint(f"http://127.0.0.1:{free_port()}/v1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(InputError, match=r"^endpoint.url: .* timed out; .*raise endpoint.timeout_seconds"):
            Endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", timeout_seconds=0.2)
        assert time.monotonic() - start < 5
    with serve(shout) as server, pytest.raises(InputError, match=r"^endpoint.url: .*404 and lists no models.*/v1"):
        Endpoint(server.url() + "/elsewhere")


def test_the_model_is_the_one_named_or_the_only_one():
    with serve(shout, models=("big-7b", "small-1b")) as server:
        assert Endpoint(server.url(), "small-1b").model == "small-1b"
        with pytest.raises(InputError, match=r"^endpoint.model: 'small-1' is not a model.*small-1b"):
            Endpoint(server.url(), "small-1")
        with pytest.raises(InputError, match=r"^endpoint.model: None is not a model.*big-7b"):
            Endpoint(server.url())


def test_the_key_comes_from_the_environment_and_is_written_nowhere(monkeypatch, tmp_path, caplog):
    journal = tmp_path / "endpoint.jsonl"
    with serve(shout, key="sk-hidden-7") as server:
        with pytest.raises(InputError, match=r"^endpoint.key_variable: .*401.*OPENAI_API_KEY") as refused:
            Endpoint(server.url())
        monkeypatch.setenv("MY_KEY", "sk-hidden-7\n")
        with caplog.at_level("DEBUG"):
            endpoint = Endpoint(server.url(), key_variable="MY_KEY")
            assert endpoint.ask(questions(1), "stage", 7, 0.0, journal)[0].text == "QUESTION 0"
    assert "sk-hidden-7" not in journal.read_text() + caplog.text + str(refused.value) + repr(vars(endpoint))


def test_a_stop_is_seen_while_the_server_is_silent_and_answers_so_far_are_kept(tmp_path):
    """One answer comes; the other question would be waited for far longer than a stop may take."""
    plan = {"question 1": Misbehave.stall(3)}
    journal = tmp_path / "endpoint.jsonl"
    with serve(shout, lambda text, tries: plan.get(text)) as server, stop_at_safe_points():
        endpoint = Endpoint(server.url(), timeout_seconds=60)
        threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGTERM)).start()
        start = time.monotonic()
        with pytest.raises(Stopped, match="after 1 of 2 answers"):
            endpoint.ask(questions(2), "stage", 9, 0.0, journal)
        assert time.monotonic() - start < 2.5
    assert "QUESTION 0" in journal.read_text()
