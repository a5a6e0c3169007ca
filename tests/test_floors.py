"""The plan of the house, read from the imports: files import lower floors only, and some names are known to one file only."""

import ast
from functools import lru_cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sso_jax"
ORDER = (
    ("runtime",),
    ("config",),
    ("data",),
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
    "httpx2": "preferences/endpoint.py",
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


@lru_cache
def imports(path: Path) -> list[str]:
    """Dotted names that a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_lower_floors_or_its_own_folder(path):
    part = part_of(path)
    for name in imports(path):
        if not name.startswith("sso_jax"):
            continue
        other = name.split(".")[1]
        own_folder = other == part and part != "preferences"
        lower = FLOORS[other] < FLOORS[part]
        same_floor_allowed = FLOORS[part] in (0, 1, 4) and FLOORS[other] == FLOORS[part]
        assert own_folder or lower or same_floor_allowed, f"{part} (floor {FLOORS[part]}) imports {name}"


def test_sampling_and_training_do_not_import_each_other():
    for path in FILES:
        other = {"sampling": "sso_jax.training", "training": "sso_jax.sampling"}.get(part_of(path))
        assert other is None or not any(name.startswith(other) for name in imports(path)), path


def test_no_preference_stage_imports_another():
    for path in (p for p in FILES if part_of(p) == "preferences"):
        assert not any(name.startswith("sso_jax.preferences.") for name in imports(path)), path


def test_floor_zero_knows_no_jax():
    for path in FILES:
        if FLOORS[part_of(path)] == 0:
            assert not any(name.split(".")[0] in ("jax", "flax", "optax") for name in imports(path)), path


def test_some_libraries_are_known_to_one_file():
    for path in FILES:
        for library, home in ONLY_IN.items():
            if any(name.split(".")[0] == library for name in imports(path)):
                assert str(path.relative_to(PACKAGE)) == home, f"{path} imports {library}"


def test_only_mesh_names_mesh_axes():
    for path in FILES:
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        if "fsdp" in strings:
            assert path.name == "mesh.py" or path.parent.name == "config", path


def test_only_hf_weights_knows_hugging_face_tensor_names():
    for path in FILES:
        if "self_attn" in path.read_text():
            assert path.name == "hf_weights.py"


def test_nothing_below_imports_the_toy():
    users = {part_of(path) for path in FILES for name in imports(path) if name.startswith("sso_jax.toy")}
    assert users <= {"toy", "environment", "iteration"}


def test_every_file_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
