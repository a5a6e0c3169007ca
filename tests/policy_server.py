"""Serves completions of a policy's folder in vLLM's protocol, with this project's own sampler inside.

    python tests/policy_server.py FOLDER PORT [--die_once FILE]

With `--die_once` it exits in the middle of its work, unless the file exists, which it then creates. The variable
`POLICY_SERVER_DELAY` has it wait so many seconds before each answer.
"""

import argparse
import dataclasses
import os
import threading
import time
from pathlib import Path

from xla_flags import QUICKLY

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = QUICKLY  # one device, as a server of its own

from openai_server import serve

import sso_jax
from sso_jax.config import SampleConfig, SamplingConfig
from sso_jax.recipes.stages.served_sampling import response_log_probs
from sso_jax.sampling.sampler import Request
from sso_jax.sampling.sampling_params import make_sampling_params
from sso_jax.training.scoring import Scorable

DIES_AFTER = 30
"""Completions of `--die_once`: the check's and a few more."""


class Completions:
    """Answers the bodies of completions with choices, by the policy of a folder."""

    def __init__(self, folder: Path | str):
        self.policy = sso_jax.read_policy(folder, SampleConfig(sampling=SamplingConfig(batch_size=8)))
        self.lock = threading.Lock()

    def __call__(self, body: dict) -> dict:
        engine, params = self.policy.engine, self.policy.params
        top_k = None if body["top_k"] == -1 else body["top_k"]
        strategy = make_sampling_params(body["temperature"], body["top_p"], top_k)
        sampler = dataclasses.replace(engine.sampler, strategy=strategy, stop_ids=tuple(body["stop_token_ids"]))
        request = Request(body["prompt"], (body["seed"], 0))
        with self.lock:
            (ids,) = sampler.sample(params, [request], "completion", body["max_tokens"]).responses
            item = Scorable({"plain": body["prompt"]}, {"response": ids})
            log_probs = response_log_probs(engine, params, [item])[0] if "logprobs" in body else None
        return {
            "index": 0,
            "text": "",
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "logprobs": None if log_probs is None else {"token_logprobs": log_probs},
            "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
            "stop_reason": None,
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("port", type=int)
    parser.add_argument("--die_once", type=Path)
    given = parser.parse_args()
    completions, done = Completions(given.folder), []
    delay = float(os.environ.get("POLICY_SERVER_DELAY", "0"))

    def complete(body: dict) -> dict:
        if given.die_once is not None and not given.die_once.exists() and len(done) >= DIES_AFTER:
            print("out of luck", flush=True)
            given.die_once.touch()
            os._exit(9)
        time.sleep(delay)
        done.append(body)
        return completions(body)

    with serve(complete=complete, port=given.port):
        print(f"serving {given.folder} as process {os.getpid()}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
