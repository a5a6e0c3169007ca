"""`python train.py --config configs/NAME.yaml [--section.field VALUE ...]`: one whole run, or what is left of it."""

import sys

from sso_jax.commands.cli import run_command
from sso_jax.config import Config
from sso_jax.runtime.host_memory import use_huge_pages


def main(argv: list[str]) -> int:
    """Exit status of the run."""
    return run_command(
        "train.py", "Self-steering optimization: sample, pair, train, repeat.", Config, "sso_jax.commands.train", argv
    )


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main(sys.argv[1:]))
