"""The command line: parses arguments, runs a command, and turns errors into one line and an exit status."""

import importlib
import logging
import os
import sys

from sso_jax.config import Config, EvaluateConfig, SampleConfig, parse
from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.signals import EXIT_STATUS, Stopped, stop_at_safe_points


def train(argv: list[str] | None = None) -> int:
    """Runs train.py or `sso-train`; returns its exit status.

    Args:
      argv: arguments; None takes those of the process.
    """
    description = "Self-steering optimization: sample, pair, train, repeat."
    return run_command("train.py", description, Config, "sso_jax.commands.train", argv)


def sample(argv: list[str] | None = None) -> int:
    """Runs sample.py or `sso-sample`; see `train`."""
    description = "Samples from a policy: plain answers, or triples under good and bad principles."
    return run_command("sample.py", description, SampleConfig, "sso_jax.commands.sample", argv)


def evaluate(argv: list[str] | None = None) -> int:
    """Runs evaluate.py or `sso-evaluate`; see `train`."""
    description = "Scores preference pairs with a reward model: accuracy overall, by section and by domain."
    return run_command("evaluate.py", description, EvaluateConfig, "sso_jax.commands.evaluate", argv)


def run_command(program: str, description: str, config_class: type, module: str, argv: list[str] | None = None) -> int:
    """Parses arguments into `config_class` and passes the config to `module.run`.

    The module is imported after parsing, so that --help and mistakes in a config answer without loading JAX.

    Returns:
      0 if the command finished and 75 if it stopped on request; with one line on standard error, 2 for invalid input
        and 1 for a run that cannot continue.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # no warning about the missing PyTorch
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sso_jax").setLevel(logging.INFO)
    try:
        config = parse(config_class, sys.argv[1:] if argv is None else argv, program, description)
        with stop_at_safe_points():
            importlib.import_module(module).run(config)
    except InputError as error:
        return _fail(program, str(error), 2)
    except Stopped as stop:
        return _fail(program, f"stopped by {stop}; all progress is saved, run the same command again", EXIT_STATUS)
    except RunError as error:
        return _fail(program, str(error), 1)
    except OSError as error:
        place = error.filename or "a file"
        reason = error.strerror or error
        return _fail(program, f"{place}: {reason}; fix that, then run the same command again", 1)
    return 0


def _fail(program: str, line: str, status: int) -> int:
    print(f"{program}: {line}", file=sys.stderr)
    return status
