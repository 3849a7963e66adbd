"""Every public name has an entry of the API reference, and every path that CONTRIBUTING.md names is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "unilora_core": "unilora_core",
    "unilora_core.testing": "unilora_core/testing",
    "unilora_torch": "backends/unilora_torch",
    "unilora_jax": "backends/unilora_jax",
    "unilora_transformers": "integrations/unilora_transformers",
    "unilora_timm": "integrations/unilora_timm",
    "unilora_vllm": "integrations/unilora_vllm",
}


def public(text):
    """The names in `__all__`, read without an import."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError("no __all__")


def entries(text):
    """What mkdocstrings is asked for on a page."""
    return re.findall(r"^::: (\S+)$", text, flags=re.M)


def paths(text):
    """The paths that a page names between backquotes: those with a slash, and files; NAME is a user's own."""
    words = re.findall(r"`([\w./-]+)`", text) + re.findall(r"\]\(([\w./-]+)", text)
    return [word for word in words if "NAME" not in word and ("/" in word or re.search(r"\.(md|toml|py|yml)$", word))]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_entry(package):
    folder = ROOT / PACKAGES[package]
    names = public((folder / "__init__.py").read_text("utf-8"))
    page = (ROOT / "docs" / "reference" / f"{package}.md").read_text("utf-8")
    own = {name: f"{name}.{name}" for name in names if (folder / f"{name}.py").exists()}  # not the module of that name
    assert entries(page) == [f"{package}.{own.get(name, name)}" for name in names]


def test_every_library_has_a_page():
    libraries = {path.parent.name for path in ROOT.glob("*/unilora_*/py.typed")} - {"unilora_cli"}  # a command
    assert libraries | {"unilora_core", "unilora_core.testing"} == set(PACKAGES)
    assert {path.stem for path in (ROOT / "docs" / "reference").glob("*.md")} == set(PACKAGES)


def test_the_site_and_the_package_name_one_repository():
    said = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), flags=re.M)
    assert f"\nrepo_url: {said[1]}\n" in (ROOT / "mkdocs.yml").read_text("utf-8")


def test_paths_of_contributing_exist():
    found = paths((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert len(found) > 30
    assert [path for path in found if not (ROOT / path).exists()] == []


def test_planted_names_and_paths_are_found():
    assert public('__all__ = ["a", "b"]') == ["a", "b"]
    assert entries("::: x.y\n    options:\n::: z") == ["x.y", "z"]
    assert paths("`a/b.py`, `c.md`, `attach`, `tests/NAME`, [d](docs/e.md#f)") == ["a/b.py", "c.md", "docs/e.md"]
