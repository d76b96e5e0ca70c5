"""The folders of kernels/: each has the name and the files of its operator."""

import ast
import itertools
import json
import tomllib

import pytest

from .conftest import ROOT
from .processes import run_python

KERNELS = ROOT / "kernels"
OPERATORS = sorted(path.parent.name for path in KERNELS.glob("*/operator.py"))
ORDERS = {
    "the function first": (
        "from motet.kernels import slerp as f",
        "import motet.kernels.slerp.cpu",
    ),
    "a file first": ("import motet.kernels.slerp.cpu", "from motet.kernels import slerp as f"),
    "through motet": ("import motet", "f = motet.kernels.slerp"),
    "launchers first": ("import motet.kernels.slerp.triton", "f = motet.kernels.slerp"),
    "another operator first": (
        "from motet.kernels.absorbed_attention.reference import absorbed_attention_reference",
        "from motet.kernels import slerp as f",
    ),
}


CHECK = """
import importlib, motet.kernels, sys, types
for name in motet.kernels.__all__:
    assert not isinstance(getattr(motet.kernels, name), types.ModuleType), name
from motet.kernels.slerp import reference
assert f is motet.kernels.slerp is sys.modules["motet.kernels.slerp.operator"].slerp
assert importlib.import_module("motet.kernels.slerp").reference is reference
"""
# A fork for each order, so that torch is imported once.
IN_FORKS = """
import json, os, sys, torch
for order, code in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        exec(code, {})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""


def test_an_operator_is_the_function_in_any_order_of_imports() -> None:
    programs = {name: "\n".join((*order, CHECK)) for name, order in ORDERS.items()}
    run_python(IN_FORKS, json.dumps(programs))


def test_a_launcher_imports_triton_itself() -> None:
    """The module triton.py of an operator does not hide the library triton."""
    pytest.importorskip("triton")
    code = "from motet.kernels.slerp import triton_kernels as k; print(k.triton.__name__, k.tl)"
    assert run_python(code).startswith("triton <module 'triton.language'")


def test_operators_have_the_same_files() -> None:
    assert len(OPERATORS) == 10
    for name in OPERATORS:
        files = {path.name for path in (KERNELS / name).glob("*.py")}
        assert {"__init__.py", "operator.py"} <= files, name
        assert files & {"cpu.py", "reference.py"}, name  # reference.py alone if it is fast enough
        assert ("triton.py" in files) == ("triton_kernels.py" in files), name


def test_only_tritons_language_is_not_type_checked() -> None:
    """Only *_kernels.py are not type-checked, and they hold only functions of triton.jit."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["basedpyright"]["exclude"] == ["kernels/**/*_kernels.py"]
    for path in KERNELS.rglob("*.py"):
        functions = [x for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef)]
        marks = itertools.chain.from_iterable(x.decorator_list for x in functions)
        compiled = [mark for mark in marks if ast.unparse(mark).startswith("triton.jit")]
        expected = len(functions) if path.name.endswith("_kernels.py") else 0
        assert len(compiled) == expected, path


def test_kernels_name_parameters_that_they_have() -> None:
    """Triton ignores another name in `do_not_specialize`, and compiles anew for every number."""
    named = 0
    for path in KERNELS.rglob("*_kernels.py"):
        for node in ast.parse(path.read_text()).body:
            for decorator in getattr(node, "decorator_list", []):
                for keyword in getattr(decorator, "keywords", []):
                    names = set(ast.literal_eval(keyword.value))
                    assert names <= {argument.arg for argument in node.args.args}, (path, names)
                    named += 1
    assert named > 20
