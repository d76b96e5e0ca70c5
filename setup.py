"""Map the repository root to the package `motet`, and build its C++ modules, `_C`, with CMake.

All other facts about the project are in pyproject.toml. The C++ does not use torch. If it cannot be
built, for example without a compiler, the package is installed without it and computes with torch
and numpy instead. MOTET_REQUIRE_NATIVE=1 makes a failed build an error.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class CMakeBuild(build_ext):
    def run(self) -> None:
        try:
            super().run()
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("MOTET_REQUIRE_NATIVE"):
                raise
            print(
                f"motet: its C++ was not built ({error}). The package works without it, "
                "more slowly; with a C++20 compiler installed, repeat pip install with "
                "--force-reinstall --no-deps --no-cache-dir.",
                file=sys.stderr,
            )

    def build_extensions(self) -> None:
        """Build all modules in one run of CMake, which installs each into its package."""
        import pybind11  # pyright: ignore[reportMissingImports], needed for the build alone

        paths = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
        (target,) = {path.resolve().parent.parent for path in paths}
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as build:
            configure = [
                *("cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja"),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ]
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build], check=True)
            subprocess.run(["cmake", "--install", build, "--prefix", str(target)], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


class BuildPy(build_py):
    def find_package_modules(self, package: str, package_dir: str):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "setup"]


def packages(*folders: str) -> list[str]:
    """Return the names of all packages in these folders, at any depth."""
    paths = (path.parent for folder in folders for path in (ROOT / folder).rglob("__init__.py"))
    return sorted(".".join(("motet", *path.relative_to(ROOT).parts)) for path in paths)


setup(
    packages=["motet", *packages("cli", "experiments", "fusion", "io", "kernels")],
    package_dir={"motet": "."},
    ext_modules=[Extension(f"motet.{part}._C", sources=[]) for part in ("kernels", "io")],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
