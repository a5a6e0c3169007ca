"""`python evaluate.py --model.path DIR --pairs.path FILE --out FILE`: preference pairs scored by a reward model."""

import sys

from sso_jax.command import run_command
from sso_jax.config import EvaluateConfig
from sso_jax.host_memory import use_huge_pages


def main(argv: list[str]) -> int:
    """Exit status of the evaluation."""
    description = "Scores preference pairs with a reward model: accuracy in all, by section and by domain."
    return run_command("evaluate.py", description, EvaluateConfig, "sso_jax.evaluation", argv)


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main(sys.argv[1:]))
