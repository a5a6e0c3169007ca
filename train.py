"""`python train.py --config configs/NAME.yaml [--section.field VALUE ...]`: one whole run, or what is left of it."""

import logging
import os
import sys

from sso_jax.config import Config, parse
from sso_jax.errors import InputError


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 for input that cannot be used (one line on standard error)."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is as it should be
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sso_jax").setLevel(logging.INFO)
    try:
        config = parse(Config, argv, "train.py", "Self-steering optimization: sample, pair, train, repeat.")
        from sso_jax import iteration  # after parsing: --help and mistakes in a config answer without loading JAX

        iteration.run(config)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
