"""A server of the policy: started by the user's command or already running, waited for, and stopped."""

import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from sso_jax.config import SamplingConfig
from sso_jax.config.sampling import server_argv
from sso_jax.preferences.http_client import ClientFields, HttpClient
from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.guarded_command import NOT_STARTED
from sso_jax.runtime.hosts import on_first_process
from sso_jax.runtime.server_process import ServerProcess, free_port

OUTPUT_FILE = "server.log"
"""File of a round's folder for what the server prints."""
POLL_SECONDS = 0.5
"""How often a server that starts is asked whether it is healthy."""
log = logging.getLogger(__name__)


def server_field(config: SamplingConfig) -> str:
    """Returns the name of the field that says which server samples."""
    return "sampling.server_url" if config.server_command is None else "sampling.server_command"


def make_client(config: SamplingConfig, url: str, retries: int) -> HttpClient:
    """Returns a client of the server that sends as many requests at once as our own sampler has slots.

    Args:
      config: section `sampling`.
      url: base URL of the server.
      retries: retries of a request after a transient failure.
    """
    fields = ClientFields(
        server_field(config),
        "sampling.server_model",
        "sampling.server_key_variable",
        "sampling.server_answer_seconds",
    )
    return HttpClient(
        url,
        fields,
        config.server_key_variable,
        config.server_answer_seconds,
        retries,
        concurrency=config.batch_size,
    )


def check_server(config: SamplingConfig) -> None:
    """Raises `InputError` if `sampling.server_command` names no program, or a running server lacks the model.

    Nothing is started. All processes of a run must call it; the first one looks.
    """

    def look() -> None:
        if config.server_command is not None:
            program = server_argv(config.server_command, "", 0)[0]
            if shutil.which(program) is None:
                raise InputError(
                    f"sampling.server_command: no program {program!r} to start; install it, or give its whole path"
                )
        elif config.server_url is not None:
            client = make_client(config, config.server_url, 0)
            try:
                client.find_model(config.server_model)
            finally:
                client.close()

    on_first_process(look)


@dataclass
class PolicyServer:
    """The server of one policy; the first process of a run has it."""

    config: SamplingConfig
    """Section `sampling`."""
    retries: int
    """Retries of a request after a transient failure."""
    folder: Path
    """Folder of the policy to serve."""
    output: Path
    """File for what a started server prints."""
    client: HttpClient | None = None
    model: str = ""
    """Name of the policy on the server."""
    _process: ServerProcess | None = field(default=None, init=False)
    _started: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Starts the command, if the server does not run already."""
        self._started, url = time.monotonic(), self.config.server_url
        if self.config.server_command is not None:
            port = free_port()
            argv = server_argv(self.config.server_command, str(self.folder), port)
            url = f"http://127.0.0.1:{port}/v1"
            log.info("starting %s; it prints to %s", " ".join(argv), self.output)
            self._process = ServerProcess(argv, self.output)
        assert url is not None  # `SamplingConfig` requires one of both
        self.client = make_client(self.config, url, self.retries)

    def connection(self) -> HttpClient:
        """Returns the client of a server that has been started."""
        assert self.client is not None
        return self.client

    def wait(self, seconds: float) -> float | None:
        """Waits for so many seconds at most; returns None once the server is healthy, else the seconds since the start.

        Raises:
          InputError: if the command cannot be started, or exits, or the server is not healthy in time.
        """
        client = self.connection()
        deadline = time.monotonic() + seconds
        while not client.is_healthy():
            self._refuse_exit()
            waited = time.monotonic() - self._started
            if waited > self.config.server_start_seconds:
                printed = "" if self._process is None else f"; its last lines:\n{self._process.last_lines()}"
                raise InputError(
                    f"sampling.server_start_seconds: {client.url} was not healthy after {waited:.0f} s; raise it, "
                    f"or see what keeps the server{printed}"
                )
            if time.monotonic() > deadline:
                return waited
            time.sleep(POLL_SECONDS)
        self.model = client.find_model(self.config.server_model)
        return None

    def require_running(self, num_kept: int) -> None:
        """Raises `RunError` if the server that this run has started is gone; `num_kept` responses are kept."""
        if self._process is not None and self._process.exit_status() is not None:
            raise RunError(
                f"sampling.server_command: the server exited with status {self._process.exit_status()} while it "
                f"sampled; {num_kept} responses are kept, run the same command again to resume from there; its last "
                f"lines (all of them are in {self.output}):\n{self._process.last_lines()}"
            )

    def _refuse_exit(self) -> None:
        """Raises `InputError` if the command has ended before the server was healthy."""
        if self._process is None or (status := self._process.exit_status()) is None:
            return
        command, said = self.config.server_command, self._process.last_lines()
        if status == NOT_STARTED:
            raise InputError(f"sampling.server_command: {command!r} cannot be started:\n{said}")
        raise InputError(
            f"sampling.server_command: {command!r} exited with status {status} before it was healthy; mend it by what "
            f"it printed at last (all of it is in {self.output}):\n{said}"
        )

    def stop(self) -> None:
        """Ends the server if this run has started it, and closes the connections."""
        if self._process is not None:
            self._process.stop()
        if self.client is not None:
            self.client.close()
