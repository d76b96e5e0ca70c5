"""Run code in another process. Apart from conftest, so that benchmarks can import it."""

import subprocess
import sys


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh process, away from the checkout; return what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
