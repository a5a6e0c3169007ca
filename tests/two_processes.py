"""Real processes of a run that are joined, for the tests."""

import os
import subprocess
import sys
from pathlib import Path

from xla_flags import QUICKLY

ROOT = Path(__file__).resolve().parents[1]


def start_process(arguments: list[str], port: int, number: int, log: Path) -> subprocess.Popen:
    """Starts train.py as one of two joined processes, with four faked devices; its output goes to `log`."""
    hosts = [
        "--hosts.coordinator",
        f"127.0.0.1:{port}",
        "--hosts.num_processes",
        "2",
        "--hosts.process_id",
        str(number),
    ]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{QUICKLY} --xla_force_host_platform_device_count=4",
    }
    with open(log, "w") as file:
        command = [sys.executable, "train.py", *arguments, *hosts]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
