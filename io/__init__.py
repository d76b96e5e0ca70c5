"""Data in: cohorts. Imports neither torch nor the models, and numpy and pandas at first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bags import Bags
    from .cohorts import Classes, Cohort, Split, Survival
    from .errors import CohortError
    from .loading import load_cohort
    from .masks import coverage, outlines, read_mask
    from .quality import write_report
    from .tissue import blur_mask, pen_mask, tissue_mask

_HOME = {
    "Bags": "bags",
    "Classes": "cohorts",
    "Cohort": "cohorts",
    "CohortError": "errors",
    "Split": "cohorts",
    "Survival": "cohorts",
    "load_cohort": "loading",
    "blur_mask": "tissue",
    "coverage": "masks",
    "outlines": "masks",
    "pen_mask": "tissue",
    "read_mask": "masks",
    "tissue_mask": "tissue",
    "write_report": "quality",
}

__all__ = [
    "Bags",
    "Classes",
    "Cohort",
    "CohortError",
    "Split",
    "Survival",
    "blur_mask",
    "coverage",
    "load_cohort",
    "outlines",
    "pen_mask",
    "read_mask",
    "tissue_mask",
    "write_report",
]


if not TYPE_CHECKING:  # so that type checkers know the names above and no others

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(import_module(f".{_HOME[name]}", __name__), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
