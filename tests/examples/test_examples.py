"""The notebooks of examples/: valid in jupytext's percent format, and each runs from its first cell to its last."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from xla_flags import QUICKLY

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.quick
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_an_example_is_a_notebook_of_text_and_code(path):
    cells = jupytext.read(path).cells
    assert {"markdown", "code"} == {cell.cell_type for cell in cells} and len(cells) >= 8
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_an_example_runs(path, tmp_path):
    variables = {
        **os.environ,
        "SSO_FAST_EXAMPLES": "1",
        "MPLBACKEND": "Agg",
        "XLA_FLAGS": QUICKLY,
        "TMPDIR": str(tmp_path),
    }
    ran = subprocess.run(
        [sys.executable, str(path)],
        cwd=ROOT,
        env={**variables, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    if path.name == "new_loss.py":  # ln 2 and 1, where policy and reference are the same
        assert "{'dpo': 0.6931, 'squared_hinge': 1.0}" in ran.stdout
