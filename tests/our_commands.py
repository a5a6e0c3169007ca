"""Command lines of documents and deployment files, read by the parsers of our own commands."""

import importlib

from sso_jax.commands import cli
from sso_jax.config import parse

COMMANDS = {
    name: command
    for command, installed in ((cli.TRAIN, "sso-train"), (cli.SAMPLE, "sso-sample"), (cli.EVALUATE, "sso-evaluate"))
    for name in (command.program, installed)
}


def parsed(argv: list[str]):
    """The config of a command line such as `python train.py --config configs/tiny.yaml` or `sso-train ...`."""
    python = "python" in argv[0].rpartition("/")[2]
    name, *rest = argv[1:] if python else argv
    command = COMMANDS[name]
    config_class = getattr(importlib.import_module("sso_jax.config"), command.config_class)
    return parse(config_class, rest, command.program, "")
