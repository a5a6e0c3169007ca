"""Command `sso-check FOLDER`: whether a Hugging Face folder is read, written and computed here as elsewhere.

Prints family, parameters and what is not supported; converts the weights there and back in memory and compares bytes;
where PyTorch is installed continues prompts greedily with both and compares log-probs; shows which tokens are trained.
"""

import argparse
import logging
import sys
from pathlib import Path

from sso_jax.commands.folder_check import compare_bytes, describe_model, read_prompts, show_exchange, stored_type
from sso_jax.commands.torch_route import compare_routes, describe_routes, has_torch
from sso_jax.config import ModelConfig, SampleConfig, SamplingConfig
from sso_jax.models.export import find_policy
from sso_jax.models.hf_config import read_architecture
from sso_jax.models.hf_folder import fetch
from sso_jax.models.hf_weights import open_weights
from sso_jax.models.transformer import Transformer
from sso_jax.recipes.engine import build_engine, load_params
from sso_jax.runtime.errors import InputError

PROGRAM = "sso-check"
GOOD, DIFFERS, INVALID = 0, 1, 2


def main(argv: list[str] | None = None) -> int:
    """Prints what is found; returns the exit status: 0 good, 1 differs or not supported, 2 for no such folder."""
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__.split("\n\n")[1].replace("\n", " "))
    parser.add_argument("folder", metavar="FOLDER", help="Hugging Face folder, hub id or run directory")
    parser.add_argument("--prompts", type=int, default=20, help="prompts to continue, 0 for none; default: 20")
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of a continuation; default: 32")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        prompts = read_prompts()
        if not 0 <= given.prompts <= len(prompts):
            raise InputError(f"--prompts: {given.prompts} is out of range; give 0 to {len(prompts)}")
        if given.tokens < 1:
            raise InputError(f"--tokens: {given.tokens} is out of range; give 1 or more")
        folder = fetch(find_policy(given.folder), "FOLDER")
    except InputError as error:
        return _fail(f"{PROGRAM}: {error}", INVALID)
    try:
        good = _check(folder, prompts[: given.prompts], given.tokens)
    except InputError as error:
        return _fail(f"{PROGRAM}: not supported: {error}", DIFFERS)
    except OSError as error:
        return _fail(f"{PROGRAM}: {error.filename or folder}: {error.strerror or error}; fix that first", DIFFERS)
    _say("good" if good else "DIFFERS: do not train from this folder before the difference is understood")
    return GOOD if good else DIFFERS


def _check(folder: Path, prompts: list[str], num_tokens: int) -> bool:
    """Prints what is found out about a folder; returns whether all of it is as it should be."""
    model = Transformer(read_architecture(folder))
    source, ignored = open_weights(folder, model)
    _say(f"folder: {folder}", *describe_model(model, source))
    for reason, names in ignored.items():
        if names:
            _say(f"ignored: {len(names)} tensors that {reason}, the first is {names[0]}")
    engine = build_engine(
        folder,
        SampleConfig(
            model=ModelConfig(param_dtype=stored_type(source), compute_dtype="float32"),
            sampling=SamplingConfig(temperature=0.0, batch_size=max(1, len(prompts)), max_new_tokens=num_tokens),
        ),
    )
    params = load_params(folder, engine)
    difference = compare_bytes(params, engine.model, source)
    _say(difference.describe(), *show_exchange(engine.chat))
    if not prompts or not has_torch():
        why = "asked for none" if not prompts else "PyTorch is not installed; pip install torch to compare with it"
        _say(f"greedy continuations: none ({why})")
        return not difference.names
    rows = compare_routes(folder, engine, params, prompts, num_tokens)
    _say(*describe_routes(rows))
    return not difference.names and not any(row.differs for row in rows)


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def _fail(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
