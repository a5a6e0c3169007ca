"""The plan of the house, read from the source: files import lower floors only, some names are known to one file,
functions stay small.
"""

import ast
import importlib
from functools import lru_cache
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sso_jax"
ORDER = (
    ("runtime",),
    ("config", "data"),
    ("models",),
    ("sampling", "training"),
    ("preferences",),
    ("toy",),
    ("recipes",),
    ("commands",),
)
"""Folders from the ground up; those of one floor do not import each other."""
FLOORS = {folder: floor for floor, folders in enumerate(ORDER) for folder in folders}
ONLY_IN = {
    "orbax": "training/checkpoints.py",
    "tensorboardX": "training/metrics.py",
    "matplotlib": "commands/report/figures.py",
    "httpx2": "preferences/http_client.py",
}
WITHOUT_JAX = ("config", "data")
MOST_PARAMETERS, MOST_LINES, LONGEST_LINE = 8, 60, 120
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)
ALL_CODE = sorted(
    [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.py")]
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@lru_cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@lru_cache
def imports(path: Path) -> list[str]:
    """Dotted names that a file imports, wherever in the file."""
    names = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_module_is_loose_at_the_root():
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FLOORS)
    assert len(ORDER) <= 8


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_lower_floors_or_its_own_folder(path):
    folder = folder_of(path)
    for name in imports(path):
        if name.startswith("sso_jax."):
            other = name.split(".")[1]
            assert other == folder or FLOORS[other] < FLOORS[folder], f"{folder} imports {name}"


def test_files_do_not_import_each_other_in_circles():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        names = imports(path)
        graph[module] = {other for other in modules if any(f"{name}.".startswith(f"{other}.") for name in names)} - {
            module
        }
    TopologicalSorter(graph).prepare()


def test_config_and_data_know_no_jax():
    for path in FILES:
        if folder_of(path) in WITHOUT_JAX:
            assert not any(name.split(".")[0] in ("jax", "flax", "optax") for name in imports(path)), path


def test_the_whole_config_is_known_to_config_recipes_and_commands():
    for path in FILES:
        if folder_of(path) not in ("config", "recipes", "commands"):
            known = {name.rsplit(".", 1)[1] for name in imports(path) if name.startswith("sso_jax.config")}
            assert not known & {"Config", "SampleConfig", "EvaluateConfig"}, path


def test_benchmarks_import_what_is_there():
    """The type checker does not read them, and most are not run by a test."""
    absent = []
    for path in (ROOT / "benchmarks").rglob("*.py"):
        if path.name == "earlier.py":  # imports an old checkout's modules
            continue
        for name in imports(path):
            module, _, attribute = name.rpartition(".")
            if module.split(".")[0] in ("sso_jax", "benchmarks") and not _is_there(module, attribute):
                absent.append(f"{name_of(path)}: {name}")
    assert not absent


def _is_there(module: str, attribute: str) -> bool:
    return hasattr(importlib.import_module(module), attribute) or find_spec(f"{module}.{attribute}") is not None


def test_some_libraries_are_known_to_one_file():
    for path in FILES:
        for library, home in ONLY_IN.items():
            if any(name.split(".")[0] == library for name in imports(path)):
                assert str(path.relative_to(PACKAGE)) == home, f"{path} imports {library}"


def test_only_mesh_names_mesh_axes():
    for path in FILES:
        strings = {node.value for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant)}
        if "fsdp" in strings:
            assert path.name == "mesh.py" or path.parent.name == "config", path


def test_only_hf_tensors_knows_hugging_face_tensor_names():
    for path in FILES:
        if "self_attn" in path.read_text():
            assert path.name == "hf_tensors.py"


def test_nothing_that_trains_imports_the_judge():
    """The toy's judge measures: recipes/environment.py asks it, and nothing else does."""
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for name in imports(path)
        if name.startswith("sso_jax.toy.judge")
    }
    assert users <= {"recipes/environment.py", "toy/judge.py"}


def test_every_file_says_what_it_is():
    for path in FILES:
        assert path.name == "__init__.py" or ast.get_docstring(tree_of(path)), path


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_are_small(path):
    for function in functions(path):
        given = function.args
        parameters = [a for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]
        lines = function.end_lineno - function.lineno + 1
        assert len(parameters) <= MOST_PARAMETERS, f"{function.name} has {len(parameters)} parameters"
        assert lines <= MOST_LINES, f"{function.name} has {lines} lines"


@pytest.mark.parametrize("path", ALL_CODE, ids=name_of)
def test_lines_are_short(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        assert len(line) <= LONGEST_LINE, f"{path}, line {number} has {len(line)} characters"


@pytest.mark.parametrize("path", ALL_CODE, ids=name_of)
def test_no_lambda_has_a_name(path):
    for node in ast.walk(tree_of(path)):
        value = getattr(node, "value", None)
        named = isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Lambda)
        assert not named, f"{path}, line {node.lineno}"
