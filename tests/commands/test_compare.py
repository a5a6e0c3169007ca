"""Runs side by side: numbers of the last round, what differs in their configs, curves of each run, bad input."""

import copy
import json
import re

import pytest
from report_runs import HOSTILE, NO_JUDGE, ROUND, START, Page, make_run, triple

from sso_jax.commands import compare
from sso_jax.commands.report.comparison import compared_panels, compared_rows, comparison_page, read_runs


def sessions(*kinds: str) -> dict:
    one = {"versions": {"jax": "0.10.2", "commit": "0123456789abcdef+changes"}, "hours": 0.25}
    own = [{**one, "devices": {"kind": kind, "count": 2}} for kind in kinds]
    return {"config_hash": "cafe", "hours": 0.25 * len(own), "sessions": own}


@pytest.fixture
def runs(tmp_path):
    """Two runs: of one round with a record, and of two rounds without."""
    first = make_run(tmp_path / "first", [START, ROUND], [triple(1)], updates=3)
    (first / "run.json").write_text(json.dumps(sessions("TPU v5e", "TPU v6e")))
    better = {**copy.deepcopy(ROUND), "iteration": 2, "policy_quality": 0.75}
    second = make_run(tmp_path / "second", [START, ROUND, better], [triple(1)], updates=5, recipe="generator")
    return [str(first), str(second)]


def test_the_table_has_the_last_round_of_each_run_and_the_fields_that_differ(runs):
    rows = {row.label: row.cells for row in compared_rows(read_runs(runs))}
    assert rows["iteration"] == ["1", "2"] and rows["policy quality"] == ["0.568", "0.750"]
    assert rows["updates"] == ["3", "5"] and rows["hours"] == ["0.50", "-"]
    assert rows["devices"] == ["2 TPU v5e, 2 TPU v6e", "-"] and rows["commit"] == ["0123456789+changes", "-"]
    assert rows["recipe"] == ['"online"', '"generator"'] and "run.directory" not in rows and "run.note" not in rows
    assert "held-out loss" not in rows  # no run has it


def test_every_curve_of_the_reports_is_drawn_for_each_run_that_has_it(runs):
    panels = {panel.title: panel for panel in compared_panels(read_runs(runs))}
    quality = panels["Policy quality, unsteered, held out"]
    assert [curve.name for curve in quality.curves] == ["first", "second"] and quality.x_range == (0, 2)
    assert quality.curves[1].ys == [0.4321, 0.5678, 0.75] and quality.curves[0].xs == [0, 1]
    assert panels["Loss: L+"].x_range == (0, 4) and panels["Loss: L+"].curves[0].ys == [0.5] * 3


def test_the_command_prints_the_table_and_writes_one_page(runs, tmp_path, capsys):
    assert compare.main([*runs, "--out", str(tmp_path / "out.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["first", "second"]
    assert re.split(r"\s{2,}", next(line for line in lines if line.startswith("policy quality"))) == [
        "policy quality",
        "0.568",
        "0.750",
    ]
    page = Page((tmp_path / "out.html").read_text())
    assert "0.750" in page.text and page.scripts == []
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert images and all(image.startswith("data:image/svg+xml") for image in images)


def test_text_of_a_run_is_text_on_the_page(tmp_path):
    one, two = (make_run(tmp_path / name, [START], [], updates=0) for name in ("one", "two"))
    (two / "config.yaml").write_text("run:\n  note: " + json.dumps(f"{HOSTILE} too"))
    page = Page(comparison_page(read_runs([str(one), str(two)])))
    assert page.scripts == [] and "alert('x')" in page.text


def test_runs_of_one_name_are_called_by_their_paths(tmp_path):
    folders = [str(make_run(tmp_path / name / "run", [START], [], updates=0)) for name in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == folders


def test_a_run_without_a_judge_has_no_line_of_quality(tmp_path):
    run = make_run(tmp_path / "run", [{**START, **NO_JUDGE}, {**ROUND, **NO_JUDGE}], [], updates=1)
    labels = [row.label for row in compared_rows(read_runs([str(run)]))]
    assert "policy quality" not in labels and "pairs / queries" in labels


def refusal(capsys, *argv: str) -> str:
    assert compare.main(list(argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_input_is_one_line_with_the_remedy(runs, tmp_path, capsys):
    folder = tmp_path / "nothing"
    folder.mkdir()
    assert refusal(capsys, *runs, str(folder)) == (
        f"compare: {folder}: not a run (it has no config.yaml); give the run.directory of a run of train.py"
    )
    (folder / "config.yaml").write_text("recipe: online")
    assert refusal(capsys, str(folder)) == (
        f"compare: {folder}: no summary.json, because no round is finished; run its train.py command again"
    )
    (folder / "summary.json").write_text("[{")
    assert "damaged" in refusal(capsys, str(folder)) and not (tmp_path / "comparison.html").exists()
    assert "give 1 to 10 run directories" in refusal(capsys, *runs[:1] * 11)
    assert "--out: " in refusal(capsys, *runs, "--out", str(tmp_path / "missing" / "out.html"))
