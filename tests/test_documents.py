"""Tables of the documents are whole, and those of README.md are what their command prints of the figures that are kept."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import topologies

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def tables_of(text):
    """Rows of cells of each run of lines that begin with a bar."""
    runs = re.findall(r"(?:^ *\|.*\n)+", text, flags=re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in run.splitlines()] for run in runs]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_table_has_a_head_and_rows_as_wide_as_it(path):
    for head, rule, *rows in tables_of(path.read_text()):
        assert all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in rule) and rows, head
        assert {len(row) for row in (rule, *rows)} == {len(head)}, head


def test_the_readme_has_the_tables_of_the_kept_topologies():
    kept = json.loads((ROOT / "docs" / "topologies.json").read_text())
    printed = topologies.tables({tuple(row["cell"]): row for row in kept}).split("\n\n")
    assert len(printed) == 2 and all(table in (ROOT / "README.md").read_text() for table in printed)
