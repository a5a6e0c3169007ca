"""`python sample.py --model.path DIR --queries.path FILE --out FILE [--steered true]`: answers or steered triples of a
policy.
"""

import sys

from sso_jax.commands.cli import run_command
from sso_jax.config import SampleConfig
from sso_jax.runtime.host_memory import use_huge_pages


def main(argv: list[str]) -> int:
    """Exit status of the sampling."""
    description = "Samples from a policy: plain answers, or triples under good and bad principles."
    return run_command("sample.py", description, SampleConfig, "sso_jax.commands.sample", argv)


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main(sys.argv[1:]))
