"""Writes `report.html`, a self-contained page with the curves and triples of a run."""

import json
from importlib import resources
from pathlib import Path

import jinja2

from sso_jax.commands.report.figures import figure_uri, panels_of_rounds, panels_of_updates
from sso_jax.commands.report.tables import format_number, judged_lines
from sso_jax.commands.report.triples import page_rows, script_json
from sso_jax.runtime.files import write_text
from sso_jax.runtime.json_lines import read_json_lines


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def write_report(directory: Path) -> None:
    """Writes `report.html` from the run's summary, metrics and pairs."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    metrics_path = directory / "metrics.jsonl"
    metrics = read_json_lines(metrics_path) if metrics_path.is_file() else []
    figures = []
    rounds, updates = panels_of_rounds(summary), panels_of_updates(metrics)
    if rounds:
        figures.append(("Over iterations", figure_uri(rounds, columns=3)))
    if updates:
        figures.append(("Over updates", figure_uri(updates, columns=3)))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = format_number
    template = environment.from_string(_resource("report.html.jinja"))
    html = template.render(
        name=directory.name,
        config=(directory / "config.yaml").read_text(encoding="utf-8"),
        summary=summary,
        figures=figures,
        judged=[(row["iteration"], judged_lines(row)) for row in summary],
        triples=script_json(page_rows(directory, [row["iteration"] for row in summary if row["iteration"]])),
        script=_resource("report.js"),
    )
    write_text(html, directory / "report.html")
