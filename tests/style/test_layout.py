"""Form: file sizes, docstrings, exports, the reading order and its budgets."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "hv").rglob("*.py"))
ALL_FILES = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "guests").rglob("*.[chS]")),
             *sorted((ROOT / "hv").rglob("*.[chS]"))]
LINES = 400


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LINES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_are_and_what_they_export(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    if path.name == "__init__.py" and path.parent.name != "hv":
        assert len(tree.body) == 1, "a package's __init__ holds only its docstring"
        return
    for node in tree.body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public:
            assert ast.get_docstring(node) or node.name == "_Nothing", f"{path.name}: {node.name} has no docstring"
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    exported = getattr(importlib.import_module(name), "__all__", None)
    if exported is not None:
        assert len(set(exported)) == len(exported)
        for item in exported:
            assert hasattr(importlib.import_module(name), item), f"{name} exports {item}, which is not there"


def test_the_reading_order_names_real_files_within_their_budgets():
    text = (ROOT / "docs/reading-order.md").read_text()
    rows = re.findall(r"`(hv/[\w/]+\.py)`.*?(\d+) lines", text)
    assert len(rows) >= 10
    for name, budget in rows:
        assert len((ROOT / name).read_text().splitlines()) <= int(budget), f"{name} outgrew its {budget} lines"


def test_every_dependency_has_its_reason():
    text = (ROOT / "docs/dependencies.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    listed = project.split("dependencies = [")[1].split("]")[0] + project.split("dev = [")[1].split("]")[0]
    for name in re.findall(r'"([a-z0-9-]+)>=', listed):
        assert name in text, f"docs/dependencies.md does not give a reason for {name}"


def test_links_in_the_documents_lead_somewhere():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_tests_that_modules_name_exist():
    for path in sorted((ROOT / "hv").rglob("*.py")):
        for name in re.findall(r"tests/[\w/]+\.py", path.read_text()):
            assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} names {name}"
