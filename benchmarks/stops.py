"""Times how long a run on a real model takes to stop after SIGTERM, in each of its stages.

    python -m benchmarks.stops --model FOLDER --queries FILE

One iteration of recipe `online` is started, stopped in its first stage, resumed, stopped in the next one, and so on; in
each stage the signal comes some seconds after the stage has begun. A stopped run ends with status 75.
"""

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = {
    "evaluation of the start": r"iteration 0: held-out answers: +\d+%",
    "features": r"iteration 1: features: +\d+%",
    "responses": r"iteration 1: responses: +\d+%",
    "reference log-probs": r"iteration 1: reference log-probs: +\d+%",
    "first update": r"iteration 1: updates: +0%",
    "second update": r"iteration 1: updates: .*\| [1-9]\d*/",
    "evaluation: answers": r"iteration 1: held-out answers: +\d+%",
    "evaluation: first policy's log-probs": r"iteration 1: held-out answers: first policy's log-probs: +\d+%",
    "evaluation: steerability": r"iteration 1: held-out answers: steerability: +\d+%",
}
"""Stage -> what its progress bar looks like in the log of a start."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--queries", required=True, help="file of queries")
    parser.add_argument("--after", type=float, default=2.0, help="seconds into each stage (default: %(default)s)")
    parser.add_argument("more", nargs="*", help="further arguments of train.py")
    options = parser.parse_args()
    sizes = "--queries.per_iteration 32 --sampling.max_new_tokens 128 --sampling.batch_size 16 --train.batch_size 8"
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        command = [sys.executable, "train.py", "--model.path", options.model, "--queries.path", options.queries]
        command += ["--run.directory", str(directory), "--run.iterations", "1", "--train.max_tokens", "1024"]
        command += ["--evaluation.path", options.queries, "--evaluation.max_queries", "32"]
        command += [*sizes.split(), *options.more]
        print("| stage | seconds until exit | status |\n|---|---|---|", flush=True)
        for stage, begun in STAGES.items():
            seconds, status = stopped(command, re.compile(begun), options.after)
            print(f"| {stage} | {seconds:.1f} | {status} |", flush=True)
    return 0


def stopped(command: list[str], begun: re.Pattern, after: float) -> tuple[float, int]:
    """Runs the command until `after` seconds behind a text of its log; returns seconds to exit, and status."""
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)

        def text() -> str:
            return Path(log.name).read_text(encoding="utf-8", errors="replace")

        while not begun.search(text()) and process.poll() is None:
            time.sleep(0.2)
        time.sleep(after)
        if process.poll() is not None:
            raise SystemExit(f"the run ended before its signal: {text()[-2000:]}")
        start = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        status = process.wait()
        return time.perf_counter() - start, status


if __name__ == "__main__":
    raise SystemExit(main())
