"""Writes `report.html`, a self-contained page with the curves, dropped rows and triples of a run."""

import json
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import jinja2
import yaml

from sso_jax.commands.report.dropped import dropped_by_reason
from sso_jax.commands.report.figures import Panel, figure_uri, panels_of_rounds, panels_of_updates
from sso_jax.commands.report.labels import LEADS, legend, response_labels, terms_of_triples
from sso_jax.commands.report.rounds import headlines, round_table
from sso_jax.commands.report.tables import judged_lines
from sso_jax.commands.report.triples import page_rows, script_json
from sso_jax.runtime.files import write_text
from sso_jax.runtime.json_lines import read_json_lines

SUMMARY_FILE, REPORT_FILE = "summary.json", "report.html"
"""Files of a run's directory: the summary of its rounds, and the page."""


class Chart(NamedTuple):
    """A figure of the page: title, names of its curves, and the image as a data URI."""

    title: str
    names: list[str]
    image: str


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _charts(panels: list[Panel]) -> list[Chart]:
    return [Chart(panel.title, [curve.name for curve in panel.curves], figure_uri(panel)) for panel in panels]


def write_report(directory: Path) -> None:
    """Writes `report.html` from the run's config, summary, metrics, pairs and dropped rows."""
    config = (directory / "config.yaml").read_text(encoding="utf-8")
    recipe = (yaml.safe_load(config) or {}).get("recipe", "online")
    summary = json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))
    metrics_path = directory / "metrics.jsonl"
    metrics = read_json_lines(metrics_path) if metrics_path.is_file() else []
    charts = {"Over iterations": panels_of_rounds(summary), "Over updates": panels_of_updates(metrics)}
    headings, rows = round_table(summary)
    head = headlines(summary, metrics)
    triples = page_rows(directory, [row["iteration"] for row in summary if row["iteration"]])
    curves = {curve.name for panels in charts.values() for panel in panels for curve in panel.curves}
    terms = legend({*headings, *curves, *terms_of_triples(triples, recipe)})
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(_resource("report.html.jinja")).render(
        name=directory.name,
        config=config,
        lead=LEADS.get(recipe, f"Recipe {recipe}."),
        summary=summary,
        headlines=head,
        headings=headings,
        rows=rows,
        charts={title: _charts(panels) for title, panels in charts.items() if panels},
        judged=[(row["iteration"], judged_lines(row)) for row in summary],
        dropped=dropped_by_reason(directory, summary),
        terms=terms,
        num_triples=len(triples),
        data=script_json({"labels": response_labels(recipe), "terms": terms, "triples": triples}),
        script=_resource("report.js"),
    )
    write_text(html, directory / REPORT_FILE)
