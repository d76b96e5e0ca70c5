"""Reading and writing masks: exact shares, polygons, pictures, and files that are no mask."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from motet.io import coverage, outlines, read_mask
from motet.io.errors import StoreError
from motet.io.tiling.masks import coverage_reference
from PIL import Image

SIZE = (1000, 700)
RING = [[0, 0], [500, 0], [500, 700], [0, 700]]  # the left half


def made_mask(seed: int, height: int, width: int, share: float) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width)) < share


masks = st.builds(
    made_mask, st.integers(0, 99), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1)
)


@given(masks, st.floats(30, 900), st.integers(0, 99))
def test_coverage_is_that_of_a_literal_loop(mask: np.ndarray, footprint: float, seed: int) -> None:
    coords = np.random.default_rng(seed).integers(-400, 1200, (20, 2), dtype=np.int32)
    expected = coverage_reference(mask, coords, footprint, SIZE)
    np.testing.assert_allclose(
        coverage(mask, coords, footprint, SIZE), expected, atol=1e-11, rtol=0
    )


def test_coverage_of_a_million_patches_is_exact() -> None:
    mask = made_mask(0, 2048, 1500, 0.5)
    size, footprint = (75_000, 102_400), 128.0  # 2.56 cells
    x, y = np.meshgrid(np.arange(1000) * 75, np.arange(1000) * 102)
    coords = np.stack([x.ravel(), y.ravel()], 1).astype(np.int32)
    shares = coverage(mask, coords, footprint, size)
    few = np.random.default_rng(0).choice(len(coords), 30)
    for n in few:
        (i, j) = coords[n, 1] // 50, coords[n, 0] // 50
        part = mask[i : i + 5, j : j + 5]
        place = coords[n : n + 1] - [[j * 50, i * 50]]
        expected = coverage_reference(
            part, place, footprint, (50 * part.shape[1], 50 * part.shape[0])
        )
        assert abs(shares[n] - expected[0]) < 1e-11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.zeros((0, 3), bool)}, "mask: expected bool"),
        ({"mask": np.zeros((3, 3))}, "mask: expected bool .* got float64"),
        ({"coords": np.zeros((4, 3))}, "coords: expected"),
        ({"coords": np.full((4, 2), np.nan)}, "coords: expected finite"),
        ({"footprint_px": 0.0}, "footprint_px: expected a positive"),
        ({"size": (0, 4)}, "size: expected a positive"),
    ],
)
def test_coverage_refuses(change: dict, message: str) -> None:
    good = {"mask": np.ones((3, 3), bool), "coords": np.zeros((4, 2)), "footprint_px": 5.0}
    with pytest.raises(ValueError, match=message):
        coverage(**{**good, "size": SIZE, **change})


@given(masks, st.tuples(st.integers(12, 5000), st.integers(12, 5000)))
def test_outlines_are_read_as_the_same_mask(
    tmp_path_factory: pytest.TempPathFactory, mask: np.ndarray, size: tuple[int, int]
) -> None:
    collection = outlines(mask, size)
    path = tmp_path_factory.getbasetemp() / "outlines.geojson"
    path.write_text(json.dumps(collection))
    if not mask.any():
        with pytest.raises(StoreError, match="at least one Polygon"):
            read_mask(path, size, mask.shape)
        return
    assert np.array_equal(read_mask(path, size, mask.shape), mask)
    for feature in collection["features"]:
        outer, *holes = [np.array(ring) for ring in feature["geometry"]["coordinates"]]
        areas = [np.sum(r[:-1, 0] * r[1:, 1] - r[1:, 0] * r[:-1, 1]) / 2 for r in (outer, *holes)]
        assert areas[0] > 0
        assert all(area < 0 for area in areas[1:])
        assert (outer[0] == outer[-1]).all()


def test_outlines_keep_holes_and_what_lies_in_them() -> None:
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8], mask[2:7, 2:7], mask[4, 4] = True, False, True
    geometries = [
        feature["geometry"]["coordinates"] for feature in outlines(mask, (9, 9))["features"]
    ]
    assert [len(rings) for rings in geometries] == [2, 1]


@given(st.floats(50, 900), st.floats(50, 600), st.floats(20, 400), st.floats(20, 300),
       st.booleans())  # fmt: skip
def test_ellipses_are_filled_where_their_cells_centres_lie(
    tmp_path_factory: pytest.TempPathFactory, x: float, y: float, a: float, b: float, closed: bool
) -> None:
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=closed)
    ring = np.stack([x + a * np.cos(angle), y + b * np.sin(angle)], 1).tolist()
    path = tmp_path_factory.getbasetemp() / "ellipse.geojson"
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    mask = read_mask(path, SIZE, (70, 100))
    rows, columns = np.mgrid[5:700:10, 5:1000:10]
    radius = ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2
    assert mask[radius < 0.999].all()
    assert not mask[radius > 1].any()


def feature(geometry: object) -> dict:
    return {"type": "Feature", "geometry": geometry, "properties": {"name": "x"}}


HALF = {"type": "Polygon", "coordinates": [RING]}


@pytest.mark.parametrize(
    "content",
    [
        HALF,
        {"type": "Polygon", "coordinates": [[*RING, RING[0]]]},
        {"type": "Polygon", "coordinates": [[[*point, 7.0] for point in RING]]},
        {"type": "MultiPolygon", "coordinates": [[RING], []]},
        feature(HALF),
        {"type": "FeatureCollection", "features": [feature(HALF), feature(None)]},
        [feature(HALF), feature({"type": "Point", "coordinates": [900, 3]})],  # QuPath's list
        {"type": "GeometryCollection", "geometries": [HALF, HALF]},
    ],
)
def test_all_forms_of_geojson_are_read(tmp_path: Path, content: object) -> None:
    path = tmp_path / "mask.json"
    path.write_text(json.dumps(content))
    mask = read_mask(path, SIZE, (7, 10))
    assert mask[:, :5].all()
    assert not mask[:, 5:].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got an empty file"),
        ("{", "expected a mask in GeoJSON or PNG"),
        ("\xff\x00", "expected a mask in GeoJSON or PNG"),
        ("[" * 100_000, "expected a mask in GeoJSON or PNG"),
        ("[]", "at least one Polygon"),
        ("7", "expected GeoJSON, got 7"),
        ('{"type": "Polygon"}', "expected a list of coordinates in a Polygon, got None"),
        ('{"type": ["Polygon"]}', "expected GeoJSON"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', "or more corners"),
        ('{"type": "Polygon", "coordinates": [[[0, "a"], [1, 1], [3, 3]]]}', "or more corners"),
        ('{"type": "Polygon", "coordinates": [[[0], [1, 1], [3, 3]]]}', "or more corners"),
        ('{"type": "Polygon", "coordinates": [[1, 2, 3]]}', "or more corners"),
        ('{"type": "Polygon", "coordinates": [{"a": 1}]}', "or more corners"),
        ('{"type": "Polygon", "coordinates": [3]}', "or more corners"),
        ('{"type": "MultiPolygon", "coordinates": [3]}', "list of rings"),
        ('{"type": "Polygon", "coordinates": [[[0, NaN], [1, 1], [3, 3]]]}', "finite"),
        ('{"type": "Polygon", "coordinates": [[[0, 1e400], [1, 1], [3, 3]]]}', "finite"),
        ('{"type": "Polygon", "coordinates": [[[0, 1e99], [1, 1], [3, 3]]]}', "finite"),
        (f'{{"type": "Polygon", "coordinates": [[[0, {10**40}], [1, 1], [3, 3]]]}}', "corners"),
        ('{"type": "Polygon", "coordinates": [[[2000, 0], [3000, 0], [3000, 9]]]}',
         "slide of 1000 x 700, got x from 2000 to 3000"),
    ],
)  # fmt: skip
def test_what_is_no_mask_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mask.geojson"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=message) as caught:
        read_mask(path, SIZE, (7, 10))
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 400


def test_large_files_are_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60,000 corners are read; files and polygons beyond the limits are refused."""
    path = tmp_path / "mask.geojson"
    angle = np.linspace(0, 2 * np.pi, 60_000)
    ring = np.stack([500 + 300 * np.cos(angle), 350 + 300 * np.sin(angle)], 1).round(3)
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring.tolist()]}))
    mask = read_mask(path, SIZE, (700, 1000))
    assert abs(mask.sum() / (np.pi * 300**2) - 1) < 1e-3
    monkeypatch.setattr("motet.io.tiling.masks._MAX_CROSSINGS", 1000)
    with pytest.raises(StoreError, match="cross the thumbnail's rows at most 1,000 times"):
        read_mask(path, SIZE, (700, 1000))
    monkeypatch.setattr("motet.io.tiling.masks._MAX_BYTES", 1 << 20)
    assert path.stat().st_size > 1 << 20
    with pytest.raises(StoreError, match="at most 1 MiB, got .* simplify"):
        read_mask(path, SIZE, (700, 1000))


def test_many_polygons_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges rasterised in small portions give the same mask as all edges at once."""
    mask = made_mask(3, 40, 30, 0.6)
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps(outlines(mask, SIZE)))
    monkeypatch.setattr("motet.io.tiling.masks._CROSSINGS", 3)
    assert np.array_equal(read_mask(path, SIZE, mask.shape), mask)


def pictured(mode: str) -> Image.Image:
    """Return a mask of the left half as a picture of each mode."""
    left = np.zeros((140, 200), np.uint8)
    left[:, :100] = 1
    if mode == "I;16":
        return Image.fromarray(left.astype(np.uint16) * 300)
    if mode == "P":
        picture = Image.fromarray(left, "L").convert("P")
        picture.putdata(left.ravel().tolist())
        picture.putpalette([0, 0, 0, 200, 10, 10])
        return picture
    if mode == "RGBA":
        return Image.fromarray(np.stack([left * 0 + 9, left, left, left * 255], 2))
    if mode == "RGB":
        return Image.fromarray(np.stack([left * 0, left * 0, left * 40], 2))
    return Image.fromarray(left * 255).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pictures_of_all_kinds_are_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "mask.png"
    picture = pictured(mode)
    assert picture.mode == mode
    picture.save(path)
    mask = read_mask(path, SIZE, (70, 100))
    assert mask[:, :50].all()
    assert not mask[:, 50:].any()


@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 30))
def test_cells_half_covered_are_in(
    tmp_path_factory: pytest.TempPathFactory, seed: int, height: int, width: int
) -> None:
    pixels = made_mask(seed, 14, 20, 0.5)
    path = tmp_path_factory.getbasetemp() / "mask.png"
    Image.fromarray(pixels).save(path)
    fine = np.kron(pixels, np.ones((height, width)))  # each cell has 14 x 20 of its pixels
    shares = fine.reshape(height, 14, width, 20).mean((1, 3))
    assert np.array_equal(read_mask(path, (20, 14), (height, width)), shares >= 0.5)


def test_pictures_that_are_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.new("L", (200, 200), 255).save(path)
    with pytest.raises(StoreError, match="aspect ratio of the slide, 1000 x 700, got 200 x 200"):
        read_mask(path, SIZE, (70, 100))
    Image.new("L", (200, 140), 255).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:60])
    with pytest.raises(StoreError, match="a PNG, got one that cannot be read"):
        read_mask(path, SIZE, (70, 100))
    path.write_bytes(content[:16] + (10**6).to_bytes(4) + (7 * 10**5).to_bytes(4) + content[24:])
    with pytest.raises(StoreError, match="got 1000000 x 700000; scale it down"):
        read_mask(path, SIZE, (70, 100))
    with pytest.raises(OSError, match="none.png"):
        read_mask(tmp_path / "none.png", SIZE, (70, 100))
