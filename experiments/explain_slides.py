"""The slides of named patients: heat maps, GeoJSON for QuPath, and their extreme patches."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._atomic import write_text
from ..io import Bags, extreme_patches, heat_map, heat_map_geojson
from ..io.store.format import KEY
from ..io.store.read_slide import SlideFeatures
from .explain import Explanation, ModalityExplanation

Floats = NDArray[np.float64]
# How many of the patches with the largest and smallest values are written as pictures.
PATCHES = 8


def file_name(patient: str) -> str:
    """Return a file name without suffix for a patient: the id, if that is a safe name.

    Else it is the id with other characters replaced, and 8 hex digits of the hash of the id, as the
    keys of feature stores.
    """
    if KEY.fullmatch(patient):
        return patient
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", patient).lstrip(".")[:80]
    digest = hashlib.sha256(patient.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{safe}-{digest[:8]}"


def write_slides(explanation: Explanation, out: Path) -> None:
    """Write slides/PATIENT/MODALITY/KEY/ for the slides of the named patients.

    Each folder has attention.png and contribution.png, patches.geojson with both values, and the
    folder `patches` with the patches of most and of least attention (of contribution, if there is
    no attention). Bags that are not from a feature store, or have no coordinates, have no slides.
    """
    for one in explanation.patients:
        if one.patient not in explanation.named:
            continue
        for name, of_modality in one.modalities.items():
            bags = explanation.cohort.modalities[name]
            slides = bags.slides(one.patient) if isinstance(bags, Bags) else []
            folder = out / "slides" / file_name(one.patient) / file_name(name)
            for slide, values in _values_of(slides, of_modality):
                title = explanation.explained.title
                _write_slide(slide, values, folder / slide.key, title)


def _values_of(
    slides: list[SlideFeatures], of_modality: ModalityExplanation
) -> Iterator[tuple[SlideFeatures, dict[str, Floats]]]:
    """Yield each slide with attention and contribution of its patches, NaN for corrupt ones."""
    start = 0
    parts = {"attention": of_modality.attention, "contribution": of_modality.tokens}
    for slide in slides:
        real = ~slide.corrupt
        end = start + int(real.sum())
        values = {}
        for name, of_tokens in parts.items():
            if of_tokens is not None:
                values[name] = np.full(len(slide), np.nan)
                values[name][real] = of_tokens[start:end]
        start = end
        if slide.attrs.get("coords") != "absent":
            yield slide, values


def _write_slide(
    slide: SlideFeatures, values: dict[str, Floats], folder: Path, explained: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    labels = {"attention": "attention", "contribution": f"contribution to {explained}"}
    title = str(slide.attrs.get("name", slide.key))
    for name, of_patches in values.items():
        heat_map(slide, of_patches, folder / f"{name}.png", label=labels[name], title=title)
    write_text(folder / "patches.geojson", json.dumps(heat_map_geojson(slide, values)))
    first = values.get("attention", values["contribution"])
    extreme_patches(slide, first, folder / "patches", count=PATCHES)
