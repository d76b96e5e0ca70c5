"""The package as a whole: imports, arrows, names, documentation, examples that run."""

import ast
import doctest
import inspect
import re
import subprocess
import sys
from enum import EnumType
from importlib import import_module
from pathlib import Path

import motet
import pytest
import torch

from .conftest import ROOT

PARTS = ("fusion", "io", "kernels")
SOURCES = [*ROOT.glob("*.py"), *(path for part in PARTS for path in (ROOT / part).glob("*.py"))]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    ).stdout


@pytest.mark.parametrize("module", ["motet", "motet.io"])
def test_imports_without_torch(module: str) -> None:
    out = python(f"import {module}, sys; print('torch' in sys.modules, 'numpy' in sys.modules)")
    assert out.split() == ["False", "False"]


def test_imports_in_under_100_ms() -> None:
    """The quickest of five, so that a busy machine does not decide."""

    def once() -> float:
        code = "import time; t = time.perf_counter(); import motet; print(time.perf_counter() - t)"
        return float(python(code))

    assert min(once() for _ in range(5)) < 0.1


def test_arrows_run_one_way() -> None:
    allowed = {
        "kernels": {"kernels", "_checks"},
        "fusion": {"fusion", "kernels", "_atomic", "_checks"},
        "io": {"io", "_atomic", "_checks"},
        "": {"", *PARTS},
    }
    for path in SOURCES:
        here = path.parent.name if path.parent != ROOT else ""
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = [*(alias.name for alias in node.names), getattr(node, "module", None) or ""]
                assert not any("benchmarks" in name.split(".") for name in named), path
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("motet") for alias in node.names), path
            if not isinstance(node, ast.ImportFrom):
                continue
            assert not (node.module or "").startswith("motet"), f"{path}: import relatively"
            if node.level == 0:
                continue
            outside = node.level - (1 if here else 0)
            target = (node.module or "").split(".")[0] if outside else here
            if not here:
                target = target if target in PARTS else ""
            assert target in allowed[here], f"{path}:{node.lineno} imports {target}"


def test_csrc_knows_nothing_of_torch() -> None:
    for path in (ROOT / "csrc").iterdir():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path


def public_objects() -> dict[str, object]:
    found = {name: getattr(motet, name) for name in motet.__all__ if name not in PARTS}
    for part in ("io", "kernels"):
        module = import_module(f"motet.{part}")
        found |= {f"{part}.{name}": getattr(module, name) for name in module.__all__}
    return found


def test_public_names_are_lazy_listed_and_resolved() -> None:
    assert set(motet.__all__) <= set(dir(motet))
    assert len(public_objects()) >= 25
    assert sorted(motet.__all__) == sorted({*motet._HOME, *PARTS})
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", motet.__version__)
    with pytest.raises(AttributeError, match="has no attribute 'Perceiver'"):
        _ = motet.Perceiver  # pyright: ignore[reportAttributeAccessIssue]


def test_every_public_name_is_documented() -> None:
    reference = (ROOT / "docs" / "api.md").read_text()
    for name, thing in public_objects().items():
        text = inspect.getdoc(thing)
        assert text, name
        assert f"`motet.{name}`" in reference, f"docs/api.md does not list motet.{name}"
        if name == "cross_entropy" or name.endswith("Output"):  # torch's own; tuples
            continue
        if isinstance(thing, EnumType):
            continue
        signature = inspect.signature(thing)
        parameters = [p for p in signature.parameters if p not in ("self", "logits", "model")]
        if parameters:
            assert "Args:" in text, name
            for parameter in parameters:
                assert re.search(rf"\b{parameter}\b", text), f"{name}: {parameter}"


def test_docstring_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finder, runner = doctest.DocTestFinder(recurse=True), doctest.DocTestRunner()
    for name, thing in public_objects().items():
        if name == "cross_entropy" or name.endswith("Output"):
            continue
        found = finder.find(thing, name, globs={"motet": motet, "torch": torch})
        assert sum(len(test.examples) for test in found), f"{name} has no example"
        for test in found:
            torch.manual_seed(0)
            runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of a document, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, path.name, "exec"), names)
    assert blocks or path.name in ("api.md", "results.md")


def test_documents_link_to_what_exists() -> None:
    for path in [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_commands_in_the_readme_are_targets() -> None:
    text, makefile = ((ROOT / name).read_text() for name in ("README.md", "Makefile"))
    commands = set(re.findall(r"^make (\w+)", text, re.MULTILINE))
    assert {"demo", "test"} <= commands
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


def test_the_module_is_built_where_it_can_be() -> None:
    import shutil

    from motet.kernels import native

    if shutil.which("c++"):
        assert native.native() is not None, f"{native.status()}; run pip install -v to see why"
