"""MkDocs hooks: pages from the root's Markdown files, links out of docs/, and a docstring for every public name."""

import ast
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "sso_jax"
ROOT_PAGES = {
    "index.md": ROOT / "README.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
}
"""Pages of the site that are files at the root, by their place in the site."""
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def undocumented(package: Path) -> list[str]:
    """Public functions, classes and methods of the package that have no docstring, as `module.py:line name`."""
    found: list[str] = []

    def visit(body: list[ast.stmt], prefix: str, place: str) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                found.append(f"{place}:{node.lineno} {prefix}{node.name}")
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.", place)

    for path in sorted(package.rglob("*.py")):
        visit(ast.parse(path.read_text(encoding="utf-8")).body, "", str(path.relative_to(package.parent)))
    return found


def site_links(markdown: str, source: Path, page: str) -> str:
    """The text with its relative links as the site has them.

    Args:
      markdown: text of a page.
      source: file that the text comes from; its links are relative to it.
      page: the page's place in the site, such as `results/index.md`.

    Returns:
      The text; a link to a file that is no page of the site, such as a config, is replaced by its text.
    """
    pages = {path: place for place, path in ROOT_PAGES.items()}

    def site_link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match.group(0)
        file = (source.parent / path).resolve()
        if file not in pages and not file.is_relative_to(DOCS):
            return text
        place = posixpath.relpath(pages.get(file) or file.relative_to(DOCS).as_posix(), posixpath.dirname(page) or ".")
        return f"[{text}]({place}{'#' if anchor else ''}{anchor})"

    return LINK.sub(site_link, markdown)


def on_pre_build(config) -> None:
    """Fails the build if a public name of the package has no docstring."""
    from mkdocs.exceptions import PluginError

    missing = undocumented(PACKAGE)
    if missing:
        raise PluginError("public names without a docstring:\n  " + "\n  ".join(missing))


def on_files(files, config):
    """Adds the pages that are made from the files at the root."""
    from mkdocs.structure.files import File

    for place, path in ROOT_PAGES.items():
        files.append(File.generated(config, place, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Rewrites the links of a page for the site."""
    place = page.file.src_uri
    return site_links(markdown, ROOT_PAGES.get(place, DOCS / place), place)
