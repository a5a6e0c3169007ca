"""A server that a run starts as a process of its own, and that never outlives the run."""

import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from sso_jax.runtime import guarded_command

LAST_LINES = 12
"""Number of lines of a server's output that errors show."""
_TAIL_BYTES = 16384
_RAISED = re.compile(rb"(?:^|\] )[\w.]*(?:Error|Exception): ")
"""A line with the exception that ends a traceback, alone or behind a log's `[file:line] `."""


def free_port() -> int:
    """Returns a port of the loopback that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """A command that runs until `stop`, or until this process is gone, in whatever way that ends."""

    def __init__(self, argv: list[str], output: Path):
        """Starts the command; its output is appended to a file.

        Args:
          argv: program and arguments.
          output: file for what it prints.
        """
        output.parent.mkdir(parents=True, exist_ok=True)
        self.output = output
        self._start = os.path.getsize(output) if output.exists() else 0
        with open(output, "ab") as file:
            guard = [sys.executable, "-I", guarded_command.__file__, *argv]
            self._process = subprocess.Popen(
                guard, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def exit_status(self) -> int | None:
        """Returns the status that the command exited with; None while it runs."""
        return self._process.poll()

    def last_lines(self) -> str:
        """Returns the last lines that the command printed since it was started, indented.

        The first exception among what it printed goes before them if it is not one of them: servers such as vLLM end
        with lines of their shutdown, which come hundreds of lines after the cause.
        """
        with open(self.output, "rb") as file:
            file.seek(self._start)
            raised = next((line.strip() for line in file if _RAISED.search(line)), None)
            file.seek(0, 2)
            file.seek(max(self._start, file.tell() - _TAIL_BYTES))
            lines = file.read().strip().splitlines()[-LAST_LINES:]
        if raised is not None and raised not in map(bytes.strip, lines):
            lines = [raised, b"...", *lines]
        return "\n".join(f"    {line.decode('utf-8', errors='replace')}" for line in lines) or "    (nothing)"

    def stop(self) -> None:
        """Ends the command and what it has started, after at most `guarded_command.END_SECONDS`."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        self._process.wait()
