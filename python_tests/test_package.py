"""The whole package: imports, dependencies between folders, names, documentation, examples."""

import ast
import doctest
import inspect
import itertools
import re
import runpy
import shlex
import sys
import tomllib
from enum import EnumType
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import motet
import pytest
import torch
from motet.kernels.backends import on_triton

from .conftest import ROOT
from .processes import run_python

PARTS = ("fusion", "io", "kernels")
FOLDERS = ("cli", "experiments", *PARTS)
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(path for part in FOLDERS for path in (ROOT / part).rglob("*.py"))]
)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Those whose commands and cells test_notebooks.py runs.
NOTEBOOKS = [ROOT / "docs/getting-started.md", *sorted((ROOT / "docs/notebooks").glob("*.md"))]


@pytest.mark.parametrize("module", ["motet", "motet.io"])
def test_imports_without_torch(module: str) -> None:
    out = run_python(f"import {module}, sys; print('torch' in sys.modules, 'numpy' in sys.modules)")
    assert out.split() == ["False", "False"]


def test_import_loads_the_standard_library_alone() -> None:
    """`import motet` must take only some milliseconds."""
    code = "import sys; before = {*sys.modules}; import motet; print(*({*sys.modules} - before))"
    loaded = {name.split(".")[0] for name in run_python(code).split()}
    assert loaded - sys.stdlib_module_names == {"motet"}


def test_models_do_not_import_the_compiler_of_torch() -> None:
    code = """
import sys, torch, motet
model = motet.HEALNet({"omic": motet.Tabular(8)}, out_features=2)
model({"omic": torch.zeros(1, 8)})
print("torch._dynamo" in sys.modules)
"""
    assert run_python(code).strip() == "False"
    # Marked by hand for that reason, the function must be marked as torch does it.
    assert vars(on_triton) == vars(torch.compiler.assume_constant_result(lambda: None))


# Rules: which folder may import which, and how long files and functions may be


def module_of(path: Path) -> str:
    """Return the name of a module below motet: "io.store.read" of io/store/read.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES if path.name != "setup.py"}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports_of(name: str) -> dict[str, int]:
    """Return the modules that a module imports, in functions too, and the line of each."""
    path, imported = MODULES[name], {}
    package = name.split(".") if name else []
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                submodule = ".".join([*base, alias.name])
                if alias.name != "_C":  # which is compiled
                    known = submodule if submodule in MODULES else ".".join(base)
                    imported.setdefault(known, node.lineno)
    if name == "":  # the names that the root re-exports
        imported |= dict.fromkeys(motet._HOMES, 1)
    imported.pop(name, None)
    return imported


IMPORTS = {name: imports_of(name) for name in MODULES}


def part_of(name: str) -> str:
    """Return the folder whose rules a module follows; of io, the part of it."""
    parts = name.split(".")
    if parts[0] == "io" and len(parts) > 1 and (ROOT / "io" / parts[1]).is_dir():
        return f"io.{parts[1]}"
    return parts[0]


GROUND = {"_atomic", "_checks", "_error_floors"}
IO = {"io", "io.slides", "io.tiling", "io.encoders", "io.store", "io.cohorts", "io.heat_maps"}
ALLOWED = {
    "_atomic": set(),
    "_checks": set(),
    "_error_floors": set(),
    "kernels": {"kernels", *GROUND},
    "fusion": {"fusion", "kernels", *GROUND},
    "io": {*IO, *GROUND},  # its public module, and the code shared by its parts
    "io.slides": {"io.slides", "io", *GROUND},
    "io.encoders": {"io.encoders", "io", *GROUND},
    "io.store": {"io.store", "io", *GROUND},
    "io.tiling": {"io.tiling", "io.slides", "io.encoders", "io.store", "io", *GROUND},
    "io.cohorts": {"io.cohorts", "io.slides", "io.encoders", "io.store", "io", *GROUND},
    "io.heat_maps": {"io.heat_maps", "io.slides", "io.store", "io", *GROUND},
    "experiments": {"experiments", "fusion", "kernels", *IO, *GROUND},
    "cli": {"cli", "experiments", "fusion", "kernels", *IO, *GROUND},
    "__main__": {"cli"},
    "": {"fusion", "io", "kernels"},
}


def test_arrows_run_one_way() -> None:
    for name, imported in IMPORTS.items():
        for other, line in imported.items():
            assert part_of(other) in ALLOWED[part_of(name)], f"{MODULES[name]}:{line}: {other}"
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                named = [node.module or ""]
            for one in named:
                where = f"{MODULES[name]}:{getattr(node, 'lineno', 0)}"
                assert one.split(".")[0] != "motet", f"{where}: import relatively"
                assert one.split(".")[0] not in ("benchmarks", "python_tests"), where


def test_the_parts_of_io_import_nothing_from_its_face() -> None:
    """io/__init__.py imports its parts, so a part that imported it would close a circle."""
    for name, imported in IMPORTS.items():
        assert not ("io" in imported and name.startswith("io.")), MODULES[name]


def circles() -> list[list[str]]:
    """Return groups of modules that import each other, in functions too."""

    def reached(start: str) -> set[str]:
        seen, left = set(), [start]
        while left:
            for other in IMPORTS[left.pop()]:
                if other not in seen:
                    seen.add(other)
                    left.append(other)
        return seen

    below = {name: reached(name) for name in MODULES}
    cycles = {
        tuple(sorted(other for other in below[name] if name in below[other]))
        for name in MODULES
        if name in below[name]
    }
    return [list(group) for group in sorted(cycles)]


def test_no_module_imports_itself_through_others() -> None:
    assert circles() == []


def test_the_root_holds_the_package_and_the_ground_floor() -> None:
    for path in ROOT.glob("*.py"):
        assert path.stem in ("__init__", "__main__", "setup") or path.stem[0] == "_", path


def test_no_private_name_leaves_its_file() -> None:
    for name, tree in TREES.items():
        modules = {}  # names by which this file knows other modules of the package
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            for alias in node.names:
                shown = f"{MODULES[name]}:{node.lineno}: {alias.name}"
                known = alias.name in GROUND | {"_C"} or not alias.name.startswith("_")
                assert known, shown
                if any(m.split(".")[-1] == alias.name for m in IMPORTS[name]):
                    modules[alias.asname or alias.name] = shown
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                where = f"{MODULES[name]}:{node.lineno}: {node.value.id}.{node.attr}"
                assert not (private and node.value.id in modules), where


# At most two files may be longer, each with its reason.
LONG_FILES: dict[str, str] = {}


def test_files_are_short() -> None:
    long = {
        name: path for name, path in MODULES.items() if len(path.read_text().splitlines()) > 500
    }
    assert len(LONG_FILES) <= 2
    assert sorted(long) == sorted(LONG_FILES)


# Functions of over 60 lines, docstrings counted, and why they are not shorter.
TRITON = (
    "one program of a GPU: its values stay in registers, which calls would hide from the reader"
)
LONG_FUNCTIONS = {
    "io.tiling.tile_slides.tile_slides": "documents the arguments of `motet tile`",
    "kernels.plan.plan": "documents 14 arguments and what it weighs",
    "kernels.latent_attention.triton_kernels.attend_kernel": TRITON,
    "kernels.latent_attention.triton_kernels.dkv_kernel": TRITON,
    "kernels.latent_attention.triton_kernels.dq_kernel": TRITON,
    "kernels.lego_pass.triton_kernels.pass_kernel": TRITON,
    "kernels.lego_pass.triton_kernels.update_backward_kernel": TRITON,
}


def test_functions_are_short() -> None:
    count, long = 0, []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count += 1
                if (node.end_lineno or 0) - node.lineno + 1 > 60:
                    long.append(f"{name}.{node.name}")
    assert sorted(long) == sorted(LONG_FUNCTIONS)
    assert len(long) <= 0.01 * count


def test_signatures_of_experiments_are_short() -> None:
    for name, tree in TREES.items():
        if part_of(name) != "experiments":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs]
                arguments = [one for one in arguments if one.arg not in ("self", "cls")]
                arguments += [one for one in (a.vararg, a.kwarg) if one is not None]
                assert len(arguments) <= 6, f"{MODULES[name]}:{node.lineno}: {node.name}"


def test_tests_import_no_other_test() -> None:
    """Code shared by tests is in conftest.py or in a module named after its topic."""
    for path in sorted((ROOT / "python_tests").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
                modules = [node.module] if node.module else names
            for module in modules:
                where = f"{path}:{getattr(node, 'lineno', 0)}: {module}"
                assert not module.split(".")[-1].startswith("test_"), where


def test_what_is_imported_is_asked_for() -> None:
    """Every imported package is a declared dependency: an indirect one may disappear."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *itertools.chain.from_iterable(extras.values())]
    declared = {re.split(r"[>\[;]", each)[0].lower() for each in requirements}
    installed = packages_distributions()
    imported: set[str] = set()
    for path in (path for path in SOURCES if path.stem != "setup"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported.add(node.module.split(".")[0])
    for name in imported - sys.stdlib_module_names - {"motet"}:
        for distribution in installed[name]:
            # pydantic and pydantic_core are always of one release.
            assert distribution.lower().replace("_core", "") in declared, name


def test_csrc_knows_nothing_of_torch() -> None:
    sources = list((ROOT / "csrc").rglob("*.?pp"))
    assert len(sources) > 10
    for path in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path


def public_objects() -> dict[str, object]:
    objects = {name: getattr(motet, name) for name in motet.__all__ if name not in PARTS}
    for part in ("io", "kernels"):
        module = import_module(f"motet.{part}")
        objects |= {f"{part}.{name}": getattr(module, name) for name in module.__all__}
    return objects


def test_public_names_are_lazy_listed_and_resolved() -> None:
    assert set(motet.__all__) <= set(dir(motet))
    assert len(public_objects()) >= 25
    assert sorted(motet.__all__) == sorted({*motet._HOME, *PARTS})
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", motet.__version__)
    with pytest.raises(AttributeError, match="has no attribute 'Perceiver'"):
        _ = motet.Perceiver  # pyright: ignore[reportAttributeAccessIssue]


def test_every_public_name_is_documented() -> None:
    reference = (ROOT / "docs" / "api" / "index.md").read_text()
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    for name, thing in public_objects().items():
        text = inspect.getdoc(thing)
        assert text, name
        times = reference.count(f"`motet.{name}`")
        assert times == 1, f"docs/api/index.md lists motet.{name} {times} times"
        entries = re.findall(rf"^\.\. \w+:: motet\.{re.escape(name)}\b", pages, re.MULTILINE)
        assert len(entries) == 1, f"docs/api describes motet.{name} {len(entries)} times"
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
        doctests = finder.find(thing, name, globs={"motet": motet, "torch": torch})
        assert sum(len(test.examples) for test in doctests), f"{name} has no example"
        for test in doctests:
            torch.manual_seed(0)
            runner.run(test)
    assert runner.failures == 0


RUN = [path for path in DOCUMENTS if path not in NOTEBOOKS and "```python\n" in path.read_text()]


def test_most_documents_have_something_to_run() -> None:
    assert len(RUN) >= 20


@pytest.mark.parametrize("path", RUN, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of a document, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(block, path.name, "exec"), names)


def test_commands_in_documents_are_understood() -> None:
    from motet.cli import entry

    parser, seen = entry._parser(), 0
    for path in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL):
            for line in re.findall(r"^motet .*", block.replace("\\\n", " "), re.MULTILINE):
                words = shlex.split(re.sub(r"\$\w+", "0", line), comments=True)
                parser.parse_args(words[1:])  # exits where a word is not known
                seen += 1
    assert seen > 30


def test_documents_link_to_what_exists() -> None:
    rooms = [path for part in FOLDERS for path in (ROOT / part).rglob("README.md")]
    for path in [*DOCUMENTS, *rooms, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
            assert (path.parent / target).exists(), f"{path} links to {target}"
    for path in [*SOURCES, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "csrc").rglob("*.?pp")]:
        for page in re.findall(r"docs/[\w/-]+\.\w+", path.read_text()):
            assert (ROOT / page).exists(), f"{path} names {page}"


def test_figures_are_as_drawn() -> None:
    folder = ROOT / "docs" / "figures"
    figures = runpy.run_path(str(folder / "draw.py"))["FIGURES"]
    assert len(figures) >= 7
    for name, draw in figures.items():
        assert (folder / name).read_text() == draw().svg(), f"{name}: run docs/figures/draw.py"


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
