"""Config sections for sampling responses and filtering pairs: sampling, filter."""

import shlex
from dataclasses import dataclass
from typing import Literal, Optional

from sso_jax.config.machine import MeshConfig
from sso_jax.config.values import require, require_address, require_variable
from sso_jax.runtime.errors import InputError


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled."""

    temperature: float = 0.7
    """Divisor of the logits; 0 is greedy."""
    top_p: float = 0.8
    """Keep the smallest set of most likely tokens with at least this probability mass; 1 keeps all."""
    top_k: Optional[int] = None
    """Keep at most this many of the most likely tokens; null keeps all."""
    max_new_tokens: int = 2048
    """Maximum tokens of a response, end of turn included."""
    batch_size: int = 64
    """Responses sampled at the same time: a response that ends makes room for the next."""
    mesh: Optional[MeshConfig] = None
    """Separate mesh to sample on, at the cost of a second copy of the weights while sampling. If its `data` is the
    number of hosts, each host decodes on its own."""
    layers: Literal["auto", "scanned", "unrolled"] = "auto"
    """How decoding runs the layers: `unrolled` is faster per token, but its compile time grows with depth, and it needs
    a second copy of the weights; `auto` is `scanned` on TPUs and in stages of few tokens."""
    policies: int = 1
    """Number of policies that y+ and y- are sampled from: the present one and those of the latest earlier rounds (TSO's
    model matrix)."""
    anchor_rejected: bool = False
    """Sample y- from the policy that the run started from (anchored rejection), so that the contrast does not shrink
    from round to round; y+ and y_o are as without it."""
    rejected_path: Optional[str] = None
    """Control (delta learning): folder, run directory or hub id of another model, such as a smaller one of the same
    family, that samples y- in place of the policy; it needs the policy's tokenizer."""
    rejected_context: Literal["negative", "plain"] = "negative"
    """Prompt from which the model of sampling.rejected_path samples y-: x-, or x, which leaves the contrast to the
    models."""
    source: Literal["policy", "endpoint"] = "policy"
    """What samples y+, y- and y_o: the `policy` on the run's own devices, or an `endpoint`, an OpenAI-compatible server
    of the same policy that returns token ids (vLLM, SGLang)."""
    server_command: Optional[str] = None
    """Command that starts the server of source `endpoint`, such as `vllm serve {policy} --port {port}`: a program with
    its arguments, without a shell; `{policy}` becomes the policy's folder, `{port}` a free port of 127.0.0.1."""
    server_url: Optional[str] = None
    """Base URL of a running server for source `endpoint`, such as http://localhost:8000/v1, in place of a command; you
    load each round's policy into it."""
    server_model: Optional[str] = None
    """Name of the policy on the server; null uses the server's model if it lists exactly one."""
    server_key_variable: Optional[str] = None
    """Environment variable with the server's API key, if it needs one."""
    server_start_seconds: float = 1800.0
    """Maximum time for a started server to become healthy."""
    server_answer_seconds: float = 600.0
    """Maximum time to wait for a whole response of the server."""
    server_tolerance: float = 0.05
    """Maximum mean difference, in nats a token, between the server's log-probs of its responses and our own, above
    which it serves other weights."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "sampling.temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "a mass in (0, 1]")
        require(self.top_k is None or self.top_k >= 1, "sampling.top_k", self.top_k, "1 or more, or null")
        require(self.max_new_tokens >= 1, "sampling.max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "1 or more")
        require(self.policies >= 1, "sampling.policies", self.policies, "1 (the present one) or more")
        if self.anchor_rejected and self.rejected_path is not None:
            raise InputError(
                f"sampling.rejected_path: {self.rejected_path!r} besides sampling.anchor_rejected true; each says what "
                "y- is sampled from, remove one"
            )
        if self.rejected_context != "negative" and self.rejected_path is None:
            raise InputError(
                f"sampling.rejected_context: {self.rejected_context!r} is for another model's y-; give "
                "sampling.rejected_path, or remove it"
            )
        self._check_server()

    def _check_server(self) -> None:
        for name in ("server_start_seconds", "server_answer_seconds", "server_tolerance"):
            require(getattr(self, name) > 0, f"sampling.{name}", getattr(self, name), "a number above 0")
        of_server = ("server_command", "server_url", "server_model", "server_key_variable")
        given = {name: value for name in of_server if (value := getattr(self, name)) is not None}
        if self.source == "policy":
            for name, value in given.items():
                raise InputError(
                    f"sampling.{name}: {value!r} is for a server; set sampling.source to endpoint, or remove it"
                )
            return
        if len({"server_command", "server_url"} & given.keys()) != 1:
            raise InputError(
                f"sampling.source: 'endpoint' with sampling.server_command {self.server_command!r} and "
                f"sampling.server_url {self.server_url!r}; give one of them: the command that starts the server, or "
                "the address of a running one"
            )
        for name in ("policies", "anchor_rejected", "rejected_path"):
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise InputError(
                    f"sampling.{name}: {value!r} with sampling.source 'endpoint', whose server has the round's policy "
                    "alone; remove one of them"
                )
        require_address("sampling.server_url", self.server_url, "sampling.server_key_variable")
        require_variable("sampling.server_key_variable", self.server_key_variable)
        if self.server_command is not None:
            server_argv(self.server_command, "", 0)


def server_argv(command: str, policy: str, port: int) -> list[str]:
    """Returns the words of `sampling.server_command` with the folder of the policy and the port filled in.

    `serve {policy} --port {port}` becomes `["serve", "/runs/policy", "--port", "8001"]`.

    Raises:
      InputError: if the command has an open quote, or lacks `{policy}` or `{port}`.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(
            f"sampling.server_command: {command!r} cannot be split into words ({error}); close its quotes"
        ) from error
    for name, meaning in (("{policy}", "the folder of the policy to serve"), ("{port}", "the port to listen on")):
        if not any(name in word for word in words[1:]):
            raise InputError(
                f"sampling.server_command: {command!r} lacks {name}; write it where the server's arguments have "
                f"{meaning}"
            )
    return [word.replace("{policy}", policy).replace("{port}", str(port)) for word in words]


@dataclass(frozen=True)
class FilterConfig:
    """Which scored pairs are kept for training."""

    enabled: bool = False
    """Keep only pairs that pass the log-probability filter."""
    min_score_gap: Optional[float] = None
    """Keep only pairs whose chosen response scores at least this much higher than the rejected one, by the scores of
    the file or of the reward model."""
    reward_path: Optional[str] = None
    """Folder of a reward model that scores the pairs; without min_score_gap, pairs whose rejected response it prefers
    are dropped."""
    reward_share: float = 1.0
    """Share of the remaining pairs to keep: those with the largest lead of the chosen response."""

    def __post_init__(self) -> None:
        require(0 < self.reward_share <= 1, "filter.reward_share", self.reward_share, "a share in (0, 1]")
        if self.reward_share < 1 and self.reward_path is None:
            raise InputError(
                f"filter.reward_share: {self.reward_share} needs a reward model; give filter.reward_path, or omit "
                "filter.reward_share"
            )
