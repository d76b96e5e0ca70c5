"""Read the metadata of a TIFF: its vendor, its resolution, its focal planes."""

from __future__ import annotations

import re
from html import unescape
from math import nan
from typing import Any

from .levels import Mpp, checked_mpp

MAX_OME = 4_000_000  # characters of OME metadata that are searched for images


def name_of(value: Any) -> str:
    """Return the name of a tag's value, for example of a compression."""
    return str(getattr(value, "name", value))


def vendor_of(tiff: Any, base: Any, description: str) -> tuple[str, bool]:
    """Return the vendor by OpenSlide's name, and True if only OpenSlide reads its format."""
    if tiff.is_ndpi:
        return "hamamatsu", True
    if tiff.is_scn:
        return "leica", True
    if tiff.is_bif:
        return "ventana", True
    software = str(base.tags.valueof(305, ""))
    if software.startswith("MedScan") and "OverlapsXY" in description:
        return "trestle", True
    if tiff.is_svs or description.startswith("Aperio"):
        return "aperio", False
    if tiff.is_philips:
        return "philips", False
    return ("ome", False) if tiff.is_ome else ("generic-tiff", False)


def ome_images(description: str, file_name: str) -> list[tuple[int, str, str]]:
    """Return the images of OME metadata: the number of the first page, the name, the element.

    If the metadata describe several files, only those in the file of this name are returned.
    """
    parts = re.split(r"<(?=(?:\w{1,20}:)?Image\b)", description[:MAX_OME])[1:]
    files = [set(re.findall(r'\bFileName="([^"]{1,300})"', part)) for part in parts]
    images: dict[int, tuple[int, str, str]] = {}
    for number, (part, names) in enumerate(zip(parts, files, strict=True)):
        if len(set().union(*files)) > 1 and file_name not in map(unescape, names):
            continue
        name = re.search(r'^[^>]{0,500}?\bName="([^"]{0,200})"', part)
        data = re.search(r"<(?:\w{1,20}:)?TiffData\b([^>]{0,500})>", part)
        page = re.search(r'\bIFD="(\d{1,6})"', data.group(1)) if data else None
        first = int(page.group(1)) if page else 0 if data else number
        images.setdefault(first, (first, unescape(name.group(1)) if name else "", part))
    return list(images.values())


def planes_of(text: str, samples: int) -> int:
    """Return the number of pages of an OME image: of channels, focal planes or times, or 1."""
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]{0,4000}>", text[:100_000])
    if not pixels:
        return 1
    sizes = {k: int(v) for k, v in re.findall(r'Size([CZT])="(\d{1,6})"', pixels.group())}
    channels = sizes.get("C", samples)
    images = 1 if channels in (1, samples) else channels
    return max(images, sizes.get("Z", 1), sizes.get("T", 1))


def are_rgb(text: str) -> bool:
    """Return True if an OME image has three channels without names, or named red, green, blue."""
    sizes = {k: int(v) for k, v in re.findall(r'\bSize([CZT])="(\d{1,6})"', text[:100_000])}
    if (sizes.get("C"), sizes.get("Z", 1), sizes.get("T", 1)) != (3, 1, 1):
        return False
    channels = re.findall(r"<(?:\w{1,20}:)?Channel\b([^>]{0,2000})>", text[:100_000])
    names = [re.search(r'\bName="([^"]{0,100})"', channel) for channel in channels]
    given = [name[1].strip().lower() for name in names if name]
    given = [
        name for name in given if not re.fullmatch(r"(channel|ch|c)?[ _:#-]{0,3}\d{0,3}", name)
    ]
    return given in ([], ["red", "green", "blue"], ["r", "g", "b"])


_UM = {"": 1.0, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_NUMBER = r"([0-9.,eE+-]{1,30})"


def mpp_of(base: Any, description: str, vendor: str) -> Mpp | None:
    """Return micrometres per px along x and y, from the vendor's metadata or the resolution tags.

    The tags are used only with a physical unit and from 0.05 to 20 um per px: many programs write
    72, 96 or 300 dpi (353 to 85 um per px) without a measurement.
    """
    text = description[:100_000]
    if vendor == "aperio":
        value = re.search(rf"\|\s*MPP\s*=\s*{_NUMBER}", text)
        return _axes(value[1], value[1]) if value else None
    if vendor == "philips":
        spacing = re.search(rf"DICOM_PIXEL_SPACING[^>]*>[^0-9]*{_NUMBER}[^0-9]+{_NUMBER}", text)
        # DICOM has the distance of rows first, which is that along y.
        return _axes(spacing[2], spacing[1], 1e3) if spacing else None
    if vendor == "ome" or "<Pixels" in text or ":Pixels" in text:
        sizes = []
        for axis in "XY":
            size = re.search(rf'PhysicalSize{axis}="{_NUMBER}"', text)
            unit = re.search(rf'PhysicalSize{axis}Unit="([^"]{{1,8}})"', text)
            factor = _UM.get(unit.group(1) if unit else "", 0.0)
            if size:
                sizes.append(_number(size.group(1)) * factor)
        if len(sizes) == 2 and (mpp := checked_mpp(sizes[0], sizes[1])):
            return mpp
    unit = {2: 25400.0, 3: 1e4}.get(base.tags.valueof(296, 2))
    axes = []
    for tag in (282, 283):
        value = base.tags.valueof(tag)
        if not isinstance(value, tuple) or len(value) != 2 or 0 in value or unit is None:
            return None
        axes.append(unit * value[1] / value[0])
    return checked_mpp(axes[0], axes[1]) if all(0.05 <= axis <= 20 for axis in axes) else None


def _axes(x: str, y: str, factor: float = 1.0) -> Mpp | None:
    return checked_mpp(factor * _number(x), factor * _number(y))


def _number(text: str) -> float:
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return nan


def properties_of(base: Any, description: str) -> dict[str, str]:
    """Return the compression, the software, and the properties in Aperio's description."""
    properties = {"tiff.Compression": name_of(base.compression)}
    if software := str(base.tags.valueof(305, "")).strip("\0 "):
        properties["tiff.Software"] = software[:200]
    if description.startswith("Aperio"):
        for pair in description[:20_000].split("|")[1:]:
            key, equals, value = pair.partition("=")
            if equals:
                properties[f"aperio.{key.strip()[:50]}"] = value.strip()[:200]
    return properties
