"""`python evaluate.py --model.path DIR --pairs.path FILE --out FILE`: preference pairs scored by a reward model."""

import sys

from sso_jax.commands.cli import run_command
from sso_jax.config import EvaluateConfig
from sso_jax.runtime.host_memory import use_huge_pages


def main(argv: list[str]) -> int:
    """Exit status of the evaluation."""
    description = "Scores preference pairs with a reward model: accuracy in all, by section and by domain."
    return run_command("evaluate.py", description, EvaluateConfig, "sso_jax.commands.evaluate", argv)


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main(sys.argv[1:]))
