"""The words of the code: names that were banned stay out, and one name stands for one thing."""

import ast
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from .conftest import ROOT

# Each meant several things, or nothing that a reader could guess (docs/glossary.md has the words
# that replaced them).
BANNED = {
    "asking", "asks", "found", "gathered", "gold", "own", "roof", "rung", "said", "told", "whole",
}  # fmt: skip
BANNED_CLASSES = {"Batch", "How", "Literal", "Waves"}
OUTSIDE = ("benchmarks", "python_tests")
FOLDERS = ("benchmarks", "cli", "experiments", "fusion", "io", "kernels", "python_tests")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if ".cache" not in path.parts
)


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of whatever a file defines or binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_banned_name_is_bound(folder: str) -> None:
    banned = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] == folder
        for line, name in names_in(ast.parse(path.read_text()))
        if name.strip("_") in BANNED or name in BANNED_CLASSES
    ]
    assert not banned, "\n".join(banned)


def test_names_in_cpp_are_not_banned_either() -> None:
    for path in (ROOT / "csrc").rglob("*.?pp"):
        code = re.sub(r"//[^\n]*|\"[^\"\n]*\"", "", path.read_text())
        assert not BANNED & set(re.findall(r"\w+", code)), path


def test_a_class_has_its_name_alone() -> None:
    """Two classes of one name are two things that a reader takes for one."""
    package = [path for path in SOURCES if path.relative_to(ROOT).parts[0] not in OUTSIDE]
    names = Counter(
        node.name
        for path in package
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]


def test_every_term_of_the_glossary_is_used() -> None:
    """A term that no other page and no docstring uses explains nothing."""
    glossary = ROOT / "docs" / "glossary.md"
    terms = re.findall(r"^\| ([^|(]+?) (?:\(.+?\) )?\| ", glossary.read_text(), re.MULTILINE)
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path != glossary]
    text = " ".join(path.read_text() for path in [*SOURCES, *pages]).lower()
    terms = [term for term in terms if term != "term"]
    assert len(terms) > 60
    assert not [term for term in terms if term.split(",")[0].lower() not in text]


def test_what_readmes_name_is_there() -> None:
    """Names in backticks, of the folders' READMEs, that look like Python's are the code's."""
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    names = {name for tree in trees for _, name in names_in(tree)}
    names |= {
        node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }
    names |= {path.stem for path in [*SOURCES, *ROOT.glob("*.py")]}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("README.md"):
            text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
            for name in re.findall(
                r"`((?:\w+\.)*_?[a-z]\w*_\w+|(?:\w+\.)*[A-Z]\w+)(?:\(\))?`", text
            ):
                assert name.split(".")[-1] in names, f"{path.relative_to(ROOT)}: {name}"
