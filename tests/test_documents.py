"""Documents: tables are complete and as printed, links resolve, README.md is short and its example runs."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from benchmarks import topologies

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_README_BYTES = 8192
MAX_LINE = 120


def name_of(path):
    return str(path.relative_to(ROOT))


def tables_of(text):
    """Rows of cells of each run of lines that begin with a bar."""
    runs = re.findall(r"(?:^ *\|.*\n)+", text, flags=re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in run.splitlines()] for run in runs]


def without_code(text):
    """The text without fenced and indented code and without code spans."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = "\n".join("" if line.startswith("    ") else line for line in text.splitlines())
    return re.sub(r"`[^`]*`", "", text)


def links_of(text):
    """Targets of the relative links and images of a document."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [target for target in targets if "://" not in target and not target.startswith("mailto:")]


def anchors_of(text):
    """Anchors of the headings that a code host and MkDocs agree on."""
    outside_fences = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} +(.+?) *$", outside_fences, flags=re.MULTILINE)
    kept = [re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings]
    return {re.sub(r"\s", "-", title) for title in kept} & {re.sub(r"[-\s]+", "-", title).strip("-") for title in kept}


def hooks():
    """The module docs/hooks.py, which needs MkDocs only while it builds a site."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_table_has_a_head_and_rows_as_wide_as_it(path):
    for head, rule, *rows in tables_of(path.read_text()):
        assert all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in rule) and rows, head
        assert {len(row) for row in (rule, *rows)} == {len(head)}, head


def test_the_hardware_page_has_the_tables_of_the_kept_topologies():
    kept = json.loads((ROOT / "docs" / "topologies.json").read_text())
    printed = topologies.tables({tuple(row["cell"]): row for row in kept}).split("\n\n")
    assert len(printed) == 2 and all(table in (ROOT / "docs" / "hardware.md").read_text() for table in printed)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_relative_link_resolves(path):
    for target in links_of(path.read_text()):
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_relative_to(ROOT) and found.is_file(), target
        assert not anchor or anchor in anchors_of(found.read_text()), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_prose_is_wrapped(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > MAX_LINE and not line.startswith(("|", "    "))]
    assert not long, long


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = set(re.findall(r"[\w/]+\.md", navigation))
    pages = {str(path.relative_to(ROOT / "docs")) for path in DOCUMENTS if path.is_relative_to(ROOT / "docs")}
    assert listed == pages | set(hooks().ROOT_PAGES)


def test_readme_is_short_and_has_the_test_command():
    assert len(README.read_bytes()) <= MAX_README_BYTES
    section = README.read_text().split("\n## Tests\n")[1].split("\n## ")[0]
    command = re.search(r"^    (pip install .*)$", section, flags=re.MULTILINE)
    assert command and command[1].endswith("python -m pytest")


def test_the_library_example_of_readme_runs(capsys):
    """IPO, beta 0.1, h = 1 and -1: a pair's loss is (1/10 + 1/8 - 5)^2; W = sigmoid(0.66*12/10 + 0.34*15/8)."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "import sso_jax" in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= 8
    exec(block, {})
    loss, weight = map(float, re.findall(r"\[([\d.]+)\]", capsys.readouterr().out))
    assert weight == pytest.approx(0.80684, abs=1e-4)
    assert loss == pytest.approx((0.1 + 0.125 - 5.0) ** 2 * (1 + 0.1 * weight * 2), rel=1e-4)


def test_every_public_name_has_a_docstring(tmp_path):
    functions = 'def said():\n    """Said."""\n\ndef unsaid(): ...\n\n'
    methods = 'class Said:\n    """Said."""\n    def unsaid(self): ...\n    def _internal(self): ...\n'
    module = tmp_path / "package" / "module.py"
    module.parent.mkdir()
    module.write_text(functions + methods)
    assert hooks().undocumented(module.parent) == ["package/module.py:4 unsaid", "package/module.py:8 Said.unsaid"]
    assert hooks().undocumented(ROOT / "sso_jax") == []


def test_links_of_the_site():
    links = "[a](docs/results/index.md#x) [b](configs/tiny.yaml) [c](CHANGELOG.md)"
    assert hooks().site_links(links, README, "index.md") == "[a](results/index.md#x) b [c](changelog.md)"
    page = ROOT / "docs" / "results" / "index.md"
    rewritten = hooks().site_links("[a](../../README.md) [b](main.md)", page, "results/index.md")
    assert rewritten == "[a](../index.md) [b](main.md)"
