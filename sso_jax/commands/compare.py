"""Command `python -m sso_jax.commands.compare RUN RUN ...`: runs side by side, as a table and a page of curves."""

import argparse
import sys
from pathlib import Path

from sso_jax.commands.report.comparison import comparison_page, comparison_table, read_runs
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import write_text


def main(argv: list[str] | None = None) -> int:
    """Prints the table of the runs and writes the page; returns the exit status, 2 for invalid input."""
    parser = argparse.ArgumentParser("python -m sso_jax.commands.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run.directory of a run with a finished round")
    parser.add_argument("--out", default="comparison.html", help="page to write; default: comparison.html")
    given = parser.parse_args(argv)
    out = Path(given.out)
    try:
        runs = read_runs(given.runs)
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise InputError(f"--out: {given.out!r} cannot be written; give an HTML file, in an existing folder")
        print(comparison_table(runs), flush=True)
        write_text(comparison_page(runs), out)
    except InputError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"compare: {error.filename or out}: {error.strerror or error}; fix that first", file=sys.stderr)
        return 1
    print(f"curves: {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
