"""A command line in, an exit status out: what train.py and sample.py share."""

import importlib
import logging
import os
import sys

from sso_jax.config import parse
from sso_jax.errors import InputError


def run_command(program: str, description: str, config_class: type, module: str, argv: list[str]) -> int:
    """Parses `argv` into `config_class` and gives it to `module.run`.

    The module is loaded after parsing: --help and mistakes in a config answer without loading JAX.

    Returns:
      0 for done, 2 for input that cannot be used, which is one line on standard error.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is as it should be
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sso_jax").setLevel(logging.INFO)
    try:
        config = parse(config_class, argv, program, description)
        importlib.import_module(module).run(config)
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0
