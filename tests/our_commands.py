"""Command lines of documents and deployment files, read by the parsers of our own commands."""

import importlib

from toys import COMPILED

from sso_jax.commands import cli
from sso_jax.config import parse

COMMANDS = {
    name: command
    for command, installed in ((cli.TRAIN, "sso-train"), (cli.SAMPLE, "sso-sample"), (cli.EVALUATE, "sso-evaluate"))
    for name in (command.program, installed)
}
"""Commands by the names of their programs, in the repository and installed."""
SHORT_TOY = {
    "toy.fact_updates": 8,
    "toy.style_updates": 0,
    "toy.width": 32,
    "toy.num_layers": 1,
    "run.iterations": 1,
    "queries.per_iteration": 12,
    "sampling.max_new_tokens": 12,
    "train.batch_size": 4,
    "logging.tensorboard": "false",
    "run.compilation_cache": COMPILED,
}
"""Fields of configs/tiny.yaml for a run of a few updates, to see that an installation works."""


def parsed(argv: list[str]):
    """The config of a command line such as `python train.py --config configs/tiny.yaml` or `sso-train ...`."""
    python = "python" in argv[0].rpartition("/")[2]
    name, *rest = argv[1:] if python else argv
    command = COMMANDS[name]
    config_class = getattr(importlib.import_module("sso_jax.config"), command.config_class)
    return parse(config_class, rest, command.program, "")
