"""Several runs side by side: a table for the terminal, and a page with the table and curves of all runs."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml

from sso_jax.commands.report.figures import COLORS, Curve, Panel, figure_uri, panels_of_rounds, panels_of_updates
from sso_jax.commands.report.rounds import COLUMNS
from sso_jax.commands.report.tables import format_number
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.json_lines import read_json_lines

MOST_RUNS = len(COLORS)
NO_VALUE = "-"
PLACES = ("run.directory",)
"""Fields of the config that tell runs apart anyway."""


@dataclass(frozen=True)
class RunFiles:
    """What a run directory says about its run."""

    name: str
    summary: list[dict]
    metrics: list[dict]
    config: dict[str, Any]
    """Values by dotted name."""
    record: dict[str, Any]
    """`run.json`; empty if the run has none, because an earlier version wrote it."""


class ComparedRow(NamedTuple):
    """A line of the table: what it is, and its text for each run."""

    label: str
    cells: list[str]


def read_runs(folders: list[str]) -> list[RunFiles]:
    """Reads runs; those of equal folder names are called by their paths.

    Raises:
      InputError: for a folder that is no run, a run without a finished round, and too many or too few runs.
    """
    if not 1 <= len(folders) <= MOST_RUNS:
        raise InputError(f"RUN: {len(folders)} runs given; give 1 to {MOST_RUNS} run directories")
    seen = Counter(Path(folder).resolve().name for folder in folders)
    names = [Path(f).resolve().name for f in folders]
    return [_read(Path(f), n if seen[n] == 1 else str(Path(f))) for f, n in zip(folders, names, strict=True)]


def _read(folder: Path, name: str) -> RunFiles:
    config, summary = folder / "config.yaml", folder / "summary.json"
    if not config.is_file():
        raise InputError(f"{folder}: not a run (it has no config.yaml); give the run.directory of a run of train.py")
    if not summary.is_file():
        raise InputError(f"{folder}: no summary.json, because no round is finished; run its train.py command again")
    try:
        rows, record = _json(summary), folder / "run.json"
        fields = yaml.safe_load(config.read_text(encoding="utf-8"))
        metrics = folder / "metrics.jsonl"
        lines = read_json_lines(metrics) if metrics.is_file() else []
        return RunFiles(name, rows, lines, dict(_flat(fields)), _json(record) if record.is_file() else {})
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{folder}: damaged ({' '.join(str(error).split())[:120]}); resume the run") from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def compared_rows(runs: list[RunFiles]) -> list[ComparedRow]:
    """Returns the lines of the table: numbers of each run's last round, what it ran on, and differing config fields.

    Lines without a value in any run are left out.
    """
    rows = [ComparedRow(heading, [text(run.summary[-1]) for run in runs]) for heading, text in COLUMNS.items()]
    rows += [
        ComparedRow("loss of the last update", [_last(run, "loss") for run in runs]),
        ComparedRow("updates", [str(len(run.metrics) or NO_VALUE) for run in runs]),
        ComparedRow("hours", [format_number(run.record.get("hours"), 2) for run in runs]),
        ComparedRow("devices", [_of_sessions(run, _devices) for run in runs]),
        ComparedRow("commit", [_of_sessions(run, _commit) for run in runs]),
        ComparedRow("jax", [_of_sessions(run, lambda session: session["versions"]["jax"]) for run in runs]),
        ComparedRow("config hash", [run.record.get("config_hash", NO_VALUE) for run in runs]),
    ]
    return [row for row in rows if set(row.cells) != {NO_VALUE}] + _differing_fields(runs)


def _last(run: RunFiles, name: str) -> str:
    values = [row[name] for row in run.metrics if row.get(name) is not None]
    return format_number(values[-1] if values else None)


def _devices(session: dict) -> str:
    return f"{session['devices']['count']} {session['devices']['kind']}"


def _commit(session: dict) -> str:
    commit, plus, changes = (session["versions"]["commit"] or NO_VALUE).partition("+")
    return commit[:10] + plus + changes


def _of_sessions(run: RunFiles, text_of: Callable[[dict], str]) -> str:
    """Returns what the sessions of a run have, each once, in order."""
    return ", ".join(dict.fromkeys(text_of(session) for session in run.record.get("sessions", []))) or NO_VALUE


def _differing_fields(runs: list[RunFiles]) -> list[ComparedRow]:
    names = sorted({name for run in runs for name in run.config} - set(PLACES))
    rows = [ComparedRow(name, [json.dumps(run.config.get(name)) for run in runs]) for name in names]
    return [row for row in rows if len(set(row.cells)) > 1]


def compared_panels(runs: list[RunFiles]) -> list[Panel]:
    """Returns one panel for each curve of a report, with a curve for each run that has it."""
    found: dict[tuple[str, str], list[tuple[Panel, Curve]]] = {}
    for run in runs:
        for panel in [*panels_of_rounds(run.summary), *panels_of_updates(run.metrics)]:
            for curve in panel.curves:
                found.setdefault((panel.title, curve.name), []).append((panel, curve._replace(name=run.name)))
    alone = Counter(title for title, _ in found)
    panels = []
    for (title, name), own in found.items():
        ends = [end for panel, _ in own for end in panel.x_range]
        shown = title if alone[title] == 1 else f"{title}: {name}"
        panels.append(Panel(shown, own[0][0].x_label, (min(ends), max(ends)), [curve for _, curve in own]))
    return panels


def comparison_table(runs: list[RunFiles]) -> str:
    """Formats the table for the terminal: a column for each run."""
    table = [["", *(run.name for run in runs)], *([row.label, *row.cells] for row in compared_rows(runs))]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]

    def text(line: list[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *padded]).rstrip()

    return "\n".join(map(text, table))


def comparison_page(runs: list[RunFiles]) -> str:
    """Returns the self-contained page of the table and the curves."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files(__package__).joinpath("comparison.html.jinja").read_text(encoding="utf-8")
    charts = [(panel.title, figure_uri(panel)) for panel in compared_panels(runs)]
    return environment.from_string(template).render(
        names=[run.name for run in runs], rows=compared_rows(runs), charts=charts
    )
