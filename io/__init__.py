"""Data in: cohorts. Imports neither torch nor the models, and numpy and pandas at first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bags import Bags
    from .cohorts import Classes, Cohort, Split, Survival
    from .encoders import Encoder, load_encoder
    from .errors import CohortError
    from .loading import load_cohort

_HOME = {
    "Bags": "bags",
    "Classes": "cohorts",
    "Cohort": "cohorts",
    "CohortError": "errors",
    "Encoder": "encoders",
    "Split": "cohorts",
    "Survival": "cohorts",
    "load_cohort": "loading",
    "load_encoder": "encoders",
}

__all__ = [
    "Bags",
    "Classes",
    "Cohort",
    "CohortError",
    "Encoder",
    "Split",
    "Survival",
    "load_cohort",
    "load_encoder",
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
