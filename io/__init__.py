"""Data in: cohorts, slides, feature stores. Imports neither torch nor the models.

Numpy, pandas and all other packages are imported at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bags import Bags
    from .cohorts import Classes, Cohort, Split, Survival
    from .encoders import Encoder, load_encoder
    from .errors import CohortError, SlideError, StoreError
    from .foreign import import_features
    from .loading import load_cohort
    from .masks import coverage, outlines, read_mask
    from .quality import write_report
    from .slides import Slide, open_slide
    from .store import FLAGS, FeatureStore
    from .tiling import tile_slides
    from .tissue import blur_mask, pen_mask, tissue_mask

_HOME = {
    "Bags": "bags",
    "Classes": "cohorts",
    "Cohort": "cohorts",
    "CohortError": "errors",
    "Encoder": "encoders",
    "FLAGS": "store",
    "FeatureStore": "store",
    "Slide": "slides",
    "SlideError": "errors",
    "Split": "cohorts",
    "StoreError": "errors",
    "Survival": "cohorts",
    "blur_mask": "tissue",
    "coverage": "masks",
    "import_features": "foreign",
    "load_cohort": "loading",
    "load_encoder": "encoders",
    "open_slide": "slides",
    "outlines": "masks",
    "pen_mask": "tissue",
    "read_mask": "masks",
    "tile_slides": "tiling",
    "tissue_mask": "tissue",
    "write_report": "quality",
}

__all__ = [
    "FLAGS",
    "Bags",
    "Classes",
    "Cohort",
    "CohortError",
    "Encoder",
    "FeatureStore",
    "Slide",
    "SlideError",
    "Split",
    "StoreError",
    "Survival",
    "blur_mask",
    "coverage",
    "import_features",
    "load_cohort",
    "load_encoder",
    "open_slide",
    "outlines",
    "pen_mask",
    "read_mask",
    "tile_slides",
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
