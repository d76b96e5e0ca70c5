"""The values of a slide's patches as GeoJSON, for QuPath."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..store.read_slide import SlideFeatures
from .geometry import check_values, geometry_of


def heat_map_geojson(slide: SlideFeatures, measurements: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Return the patches of a slide as GeoJSON: one square each, in level-0 px, with its values.

    QuPath opens the file as tiles with these measurements (Measure, Show measurement maps). Patches
    without any value are left out.

    Args:
        slide: a slide of a `FeatureStore`.
        measurements: name to values [N], one per patch, NaN for patches without a value.

    Returns:
        A FeatureCollection for `json.dump`.

    Raises:
        ValueError: no measurement, or values of another length, infinite, or all NaN.
        StoreError: a slide without patches or coordinates.

    Example:
        >>> import numpy as np
        >>> np.savez("a.npz", features=np.eye(2, 8), coords=[[0, 0], [512, 0]])
        >>> slide = motet.io.import_features("a.npz", "cohort", encoder="mine")["a"]
        >>> patches = motet.io.heat_map_geojson(slide, {"attention": [0.2, 0.8]})
        >>> patches["features"][1]["properties"]["measurements"]
        {'attention': 0.8}
    """
    if not measurements:
        raise ValueError("measurements: expected at least one name with values, got none")
    values = {
        name: check_values(slide, of_name, f"measurements[{name!r}]").tolist()
        for name, of_name in measurements.items()
    }
    place = geometry_of(slide)
    features = []
    low, high = place.corners.tolist(), (place.corners + place.footprint).tolist()
    for row, ((left, top), (right, bottom)) in enumerate(zip(low, high, strict=True)):
        known = {name: of_name[row] for name, of_name in values.items()}
        known = {name: value for name, value in known.items() if not np.isnan(value)}
        if not known:
            continue
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "tile", "measurements": known},
            }
        )
    return {"type": "FeatureCollection", "features": features}
