"""Builds the package with the files of configs/ in it, and its extras; all else is in pyproject.toml.

The extras are here because setuptools refuses requirement files that name others (`-r requirements.txt`).
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

EXTRAS = {"cuda": "cuda", "tpu": "tpu", "dev": "test", "docs": "docs", "relevance": "relevance"}
"""Extras, and the ends of the names of their requirement files."""


def requirements(name: str) -> list[str]:
    """Returns the requirements of a file, without those of files that it names."""
    lines = Path(f"requirements-{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", "-"))]


class BuildWithConfigs(build_py):
    """Copies configs/ into the package, where `--config NAME` finds them once it is installed."""

    def run(self):
        """Builds the modules, then copies the configs; an editable install reads those of the checkout."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "sso_jax" / "configs"
        self.mkpath(str(target))
        for path in sorted(Path("configs").glob("*.yaml")):
            self.copy_file(str(path), str(target / path.name))


setup(
    cmdclass={"build_py": BuildWithConfigs},
    extras_require={extra: requirements(name) for extra, name in EXTRAS.items()},
)
