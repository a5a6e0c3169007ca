"""`python sample.py --model.path DIR --queries.path FILE --out FILE [--steered true]`: answers or steered triples of a policy."""

import logging
import os
import sys

from sso_jax.config import SampleConfig, parse
from sso_jax.errors import InputError


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 for input that cannot be used (one line on standard error)."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is as it should be
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sso_jax").setLevel(logging.INFO)
    try:
        config = parse(SampleConfig, argv, "sample.py", "Samples from a policy: plain answers, or triples under good and bad principles.")
        from sso_jax import answers  # after parsing: --help and mistakes in a config answer without loading JAX

        answers.run(config)
    except InputError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
