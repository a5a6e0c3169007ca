"""examples/sso_jax.ipynb: a valid notebook whose commands are ours, whose toy part runs, and whose choice of an
environment agrees with pip's resolver.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from our_commands import parsed
from xla_flags import QUICKLY

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "examples" / "sso_jax.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TOY_ENDS = next(i for i, cell in enumerate(CODE) if "configs/laptop.yaml" in cell)
LISTS = os.environ.get("SSO_IMAGE_CONSTRAINTS")
"""Lists of packages of notebook images (`pip freeze`), with a colon between them; Colab publishes its own."""


def as_python(cell: str) -> str:
    """A cell with its shell lines as calls of `shell`, whose text IPython would format like an f-string."""
    return re.sub(r"^( *)!(.*)$", r"\1shell(f'''\2''')", cell, flags=re.MULTILINE)


def lines_of_pip(path: str) -> dict[str, str]:
    pinned = [line.split("==") for line in Path(path).read_text().splitlines() if re.fullmatch(r"[\w.-]+==\S+", line)]
    return dict(pinned)


@pytest.mark.quick
def test_the_notebook_has_the_form_and_no_outputs():
    nbformat.validate(NOTEBOOK)
    assert NOTEBOOK.nbformat == 4 and NOTEBOOK.cells[0].source.startswith("# ")
    assert all(not cell.outputs and cell.execution_count is None for cell in NOTEBOOK.cells if cell.cell_type == "code")
    for cell in CODE:
        ast.parse(as_python(cell))


@pytest.mark.quick
def test_every_command_is_ours(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line for cell in CODE for line in re.findall(r"^!(.*)$", cell, re.MULTILINE)]
    texts = {name: text for cell in CODE for name, text in re.findall(r'^(\w+) = "(.*)"$', cell, re.MULTILINE)}
    directories = []
    for line in lines:
        words = shlex.split(line.format(**{**texts, "python": "python"}))
        config = parsed(words)
        directories.append(config.run.directory if "train.py" in words else config.model.path)
    assert directories == ["runs/tiny", "runs/tiny", "runs/smollm2", "runs/smollm2"]


def test_the_toy_part_runs(tmp_path, monkeypatch, capfd):
    """The cells up to the toy's answers, in a copy of the files that they need, with a few updates only."""
    for name in ("train.py", "sample.py", "configs", "sso_jax", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for name, value in {"SSO_FAST_EXAMPLES": "1", "MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XLA_FLAGS", QUICKLY)

    def shell(line: str) -> None:
        subprocess.run(shlex.split(line), check=True)

    names = {"shell": shell}
    for cell in CODE[:TOY_ENDS]:
        exec(compile(as_python(cell), str(PATH), "exec"), names)
    assert len(names["rounds"]) == 4 and len(names["triples"]) >= 1
    assert "original" in capfd.readouterr().out and (tmp_path / "runs" / "tiny" / "report.html").is_file()


def functions() -> dict:
    names: dict = {"Path": Path}
    cell = next(cell for cell in CODE if "def chosen_python" in cell)
    exec(compile(cell.partition("\nimage = ")[0], str(PATH), "exec"), names)
    return names


@pytest.mark.quick
@pytest.mark.parametrize("image, own", [({}, True), ({"jax": "0.7.2"}, True), ({"jax": "0.10.2"}, False)])
def test_the_jax_of_the_image_stays_where_it_will_do(image, own, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (functions()["chosen_python"](image) == "env/bin/python") == own
    assert functions()["kept"]({"jax": "1", "jaxlib": "2", "jaxtyping": "3", "numpy": "4"}) == "jax==1\njaxlib==2\n"


@pytest.mark.quick
@pytest.mark.skipif(LISTS is None, reason="SSO_IMAGE_CONSTRAINTS names no list of an image's packages")
@pytest.mark.parametrize("path", (LISTS or "").split(":"))
def test_the_choice_is_that_of_the_resolver(path, tmp_path, monkeypatch):
    """Kept jax: the requirements resolve beside its pins. Own environment: they do not, and resolve without them."""
    monkeypatch.chdir(ROOT)
    image, choice = lines_of_pip(path), functions()
    (tmp_path / "kept.txt").write_text(choice["kept"](image))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "-q",
        "-r",
        "requirements.txt",
    ]
    beside = subprocess.run([*command, "-c", str(tmp_path / "kept.txt")], text=True, capture_output=True)
    keeps = choice["chosen_python"](image) == sys.executable
    assert (beside.returncode == 0) == keeps, beside.stderr[-2000:]
    if not keeps:
        assert "jax" in beside.stderr
        alone = subprocess.run([*command, "jax[cuda12]"], text=True, capture_output=True)
        assert alone.returncode == 0, alone.stderr[-2000:]


@pytest.mark.quick
def test_the_notebook_asks_for_a_gpu_where_it_can():
    assert json.loads(PATH.read_text())["metadata"]["accelerator"] == "GPU"
