"""Read data: cohorts, slides, feature stores. Imports neither torch nor the models.

Numpy, pandas and all other packages are imported at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cohorts.bags import Bags
    from .cohorts.cohort import Classes, Cohort, Split, Survival
    from .cohorts.load_cohort import load_cohort
    from .encoders.base import Encoder
    from .encoders.load_encoder import load_encoder
    from .errors import CohortError, SlideError, StoreError
    from .heat_maps.extreme_patches import extreme_patches
    from .heat_maps.geojson import heat_map_geojson
    from .heat_maps.heat_map import heat_map
    from .slides.open_slide import open_slide
    from .slides.slide import Slide
    from .store.foreign import import_features
    from .store.format import FLAGS
    from .store.read import FeatureStore
    from .tiling.encode_patches import encode_patches
    from .tiling.ink import pen_mask
    from .tiling.masks import coverage, outlines, read_mask
    from .tiling.report.write_report import write_report
    from .tiling.tile_slides import tile_slides
    from .tiling.tissue import blur_mask, tissue_mask

_HOME = {
    "Bags": "cohorts.bags",
    "Classes": "cohorts.cohort",
    "Cohort": "cohorts.cohort",
    "CohortError": "errors",
    "Encoder": "encoders.base",
    "FLAGS": "store.format",
    "FeatureStore": "store.read",
    "Slide": "slides.slide",
    "SlideError": "errors",
    "Split": "cohorts.cohort",
    "StoreError": "errors",
    "Survival": "cohorts.cohort",
    "blur_mask": "tiling.tissue",
    "coverage": "tiling.masks",
    "encode_patches": "tiling.encode_patches",
    "extreme_patches": "heat_maps.extreme_patches",
    "heat_map": "heat_maps.heat_map",
    "heat_map_geojson": "heat_maps.geojson",
    "import_features": "store.foreign",
    "load_cohort": "cohorts.load_cohort",
    "load_encoder": "encoders.load_encoder",
    "open_slide": "slides.open_slide",
    "outlines": "tiling.masks",
    "pen_mask": "tiling.ink",
    "read_mask": "tiling.masks",
    "tile_slides": "tiling.tile_slides",
    "tissue_mask": "tiling.tissue",
    "write_report": "tiling.report.write_report",
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
    "encode_patches",
    "extreme_patches",
    "heat_map",
    "heat_map_geojson",
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


if not TYPE_CHECKING:  # hidden from type checkers, which would else accept any name

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(import_module(f".{_HOME[name]}", __name__), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
