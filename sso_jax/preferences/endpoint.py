"""Questions to an OpenAI-compatible server, as texts; answers are journaled, and every failure has its reason."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sso_jax.data.records import Answer, Question
from sso_jax.preferences.gathering import Asked, Gathering
from sso_jax.preferences.http_client import Failure, HttpClient
from sso_jax.runtime.hosts import stop_alone
from sso_jax.runtime.signals import Stopped

STOP_SECONDS = 0.5
"""How often a stop is looked for."""
JOURNAL_FILE = "endpoint.jsonl"
"""File of a folder to which answers are appended as they arrive."""


class Endpoint:
    """Client of an OpenAI-compatible server; its API key is read from the environment and kept in the client only."""

    def __init__(self, url: str, model: str | None = None, key_variable: str = "OPENAI_API_KEY", **options: Any):
        """Connects to the server and checks that it has the model.

        Args:
          url: base URL, such as http://localhost:8000/v1.
          model: name of the model; None uses the server's model if it lists exactly one.
          key_variable: environment variable that holds the API key.
          options: the others of `HttpClient`: time limit, retries, rate, concurrency.

        Raises:
          InputError: if the server does not answer, rejects the key, is not OpenAI-compatible, or lacks the model.
        """
        self._client = HttpClient(url, key_variable=key_variable, **options)
        self.model = self._client.find_model(model)

    def ask(
        self,
        questions: Sequence[Question],
        stage: str,
        max_tokens: int,
        temperature: float,
        journal: Path | None = None,
    ) -> list[Answer]:
        """Returns one answer per question, in the order of the questions.

        Args:
          questions: questions to ask.
          stage: title of the progress bar.
          max_tokens: maximum tokens of an answer.
          temperature: sampling temperature.
          journal: JSON Lines file to which answers are appended as they arrive. Questions that it already answers are
            not asked again.

        Returns:
          The answers; those of questions that failed permanently have the reason instead of a text.

        Raises:
          InputError: if the server rejects the key, or so many questions in a row fail that it must be unavailable.
            Earlier answers are in the journal.
          Stopped: between two answers, if a stop was requested.
        """
        asked = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature}
        requests = [_request(question, asked) for question in questions]
        client = self._client
        with closing(Gathering(client, "chat/completions", requests, _read_text, stage, journal)) as gathering:
            while not gathering.advance(STOP_SECONDS):
                if stop_alone():
                    done = f"{gathering.num_done} of {len(questions)}"
                    raise Stopped(f"a signal, after {done} answers of {client.url}")
        outcomes = [gathering.outcomes[i] for i in range(len(questions))]
        return [Answer(None if found.values is None else found.values["text"], found.lost) for found in outcomes]


def _request(question: Question, asked: dict[str, Any]) -> Asked:
    key = hashlib.sha256(json.dumps([question.id, question.text, asked]).encode()).hexdigest()[:24]
    return Asked(key, {**asked, "messages": [{"role": "user", "content": question.text}]}, {"id": question.id})


def _read_text(payload: Any, body: dict[str, Any]) -> dict[str, Any]:
    """Returns the text of an answer; raises `Failure` if there is none."""
    try:
        text = payload["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise Failure("no_text") from error
    if not isinstance(text, str) or not text.strip():
        raise Failure("no_text")
    return {"text": text}
