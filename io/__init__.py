"""Data in: cohorts and slides.

Imports neither torch nor the models, and numpy, pandas and the readers of slides at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bags import Bags
    from .cohorts import Classes, Cohort, Split, Survival
    from .errors import CohortError, SlideError
    from .loading import load_cohort
    from .slides import Slide, open_slide

_HOME = {
    "Bags": "bags",
    "Classes": "cohorts",
    "Cohort": "cohorts",
    "CohortError": "errors",
    "Slide": "slides",
    "SlideError": "errors",
    "Split": "cohorts",
    "Survival": "cohorts",
    "load_cohort": "loading",
    "open_slide": "slides",
}

__all__ = [
    "Bags",
    "Classes",
    "Cohort",
    "CohortError",
    "Slide",
    "SlideError",
    "Split",
    "Survival",
    "load_cohort",
    "open_slide",
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
