"""A command line in, an exit status out: what train.py and sample.py share."""

import importlib
import logging
import os
import sys

from sso_jax.config import parse
from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.host_memory import keep_few_arenas
from sso_jax.runtime.signals import EXIT_STATUS, Stopped, stop_at_safe_points


def run_command(program: str, description: str, config_class: type, module: str, argv: list[str]) -> int:
    """Parses `argv` into `config_class` and gives it to `module.run`.

    The module is loaded after parsing: --help and mistakes in a config answer without loading JAX.

    Returns: 0 for done, 75 for stopped on request; with one line on standard error 2 for input that cannot be used, and
      1 for a run that cannot go on.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is as it should be
    keep_few_arenas()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sso_jax").setLevel(logging.INFO)
    try:
        config = parse(config_class, argv, program, description)
        with stop_at_safe_points():
            importlib.import_module(module).run(config)
    except InputError as error:
        return _say(program, str(error), 2)
    except Stopped as stop:
        return _say(program, f"stopped by {stop}; what is done is saved, run the same command again", EXIT_STATUS)
    except RunError as error:
        return _say(program, str(error), 1)
    except OSError as error:
        place = error.filename or "a file"
        return _say(program, f"{place}: {error.strerror or error}; mend that, then run the same command again", 1)
    return 0


def _say(program: str, line: str, status: int) -> int:
    print(f"{program}: {line}", file=sys.stderr)
    return status
