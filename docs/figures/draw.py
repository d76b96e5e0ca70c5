"""Draw the figures of docs/concepts: `python docs/figures/draw.py`. A test compares the files."""

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
FILL = {  # kind of a box: its fill and its border
    "data": ("#e3effb", "#2b6cb0"),
    "step": ("#f1f1f4", "#6b7280"),
    "latents": ("#fdebd3", "#c05621"),
    "result": ("#def3e4", "#2f855a"),
    "test": ("#c05621", "#9c4221"),
    "validation": ("#f6c890", "#c05621"),
}
Point = tuple[float, float]


class Figure:
    """Boxes and arrows on white, as SVG. Points are (x, y) in pixels from the top left."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, text: str, kind: str = "step") -> None:
        """Draw a box with its text in the middle."""
        fill, border = FILL[kind]
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" '
            f'stroke="{border}" stroke-width="1.3"/>'
        )
        self.text(x + w / 2, y + h / 2, text)

    def group(self, x: float, y: float, w: float, h: float, title: str) -> None:
        """Draw a dashed frame, its title above it on the left."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="none" '
            'stroke="#9aa1ab" stroke-width="1.2" stroke-dasharray="5 4"/>'
        )
        self.text(x + 4, y - 10, title, anchor="start", colour="#4a5058", size=13)

    def text(
        self, x: float, y: float, text: str, *,
        anchor: str = "middle", colour: str = "#16181d", size: int = 14, bold: bool = False,
    ) -> None:  # fmt: skip
        """Write lines of text, centred at the height y."""
        lines = text.split("\n")
        weight = ' font-weight="600"' if bold else ""
        for i, line in enumerate(lines):
            height = y + (i - (len(lines) - 1) / 2) * (size + 4) + 0.35 * size
            self.parts.append(
                f'<text x="{x:g}" y="{height:g}" text-anchor="{anchor}" font-size="{size}"'
                f'{weight} fill="{colour}">{escape(line)}</text>'
            )

    def arrow(
        self, *points: Point, label: str = "", at: Point = (0, 0), dashed: bool = False
    ) -> None:
        """Draw an arrow through the points, and a label at a point."""
        path = " L ".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path d="M {path}" fill="none" stroke="#4a5058" stroke-width="1.5"{dash} '
            'marker-end="url(#head)"/>'
        )
        if label:
            self.text(*at, label, colour="#4a5058", size=13)

    def svg(self) -> str:
        """Return the file."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" '
            'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n'
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="#4a5058"/>'
            "</marker></defs>\n"
            f'<rect width="{self.width}" height="{self.height}" rx="10" fill="#ffffff"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def overview() -> Figure:
    """The way from files to predictions."""
    f = Figure(800, 290)
    f.box(20, 40, 120, 44, "slides", "data")
    f.box(190, 40, 120, 44, "motet tile")
    f.box(360, 40, 130, 44, "feature store", "data")
    f.box(20, 130, 120, 44, "tables", "data")
    f.box(190, 130, 120, 44, "cohort.yaml", "data")
    f.box(360, 130, 130, 44, "cohort", "data")
    f.box(540, 130, 110, 44, "motet train")
    f.box(540, 220, 110, 44, "motet merge\nmotet fuse")
    f.box(700, 130, 80, 44, "run\nfolder", "result")
    f.box(190, 220, 120, 44, "motet predict")
    f.box(20, 220, 120, 44, "risks of new\npatients", "result")
    f.box(360, 220, 130, 44, "motet evaluate")
    f.arrow((140, 62), (190, 62))
    f.arrow((310, 62), (360, 62))
    f.arrow((425, 84), (425, 130))
    f.arrow((140, 152), (190, 152))
    f.arrow((310, 152), (360, 152))
    f.arrow((490, 152), (540, 152))
    f.arrow((650, 152), (700, 152))
    f.arrow((715, 174), (715, 232), (650, 232))
    f.arrow((650, 252), (755, 252), (755, 174))
    f.arrow((735, 174), (735, 280), (425, 280), (425, 264))
    f.arrow((425, 280), (250, 280), (250, 264))
    f.arrow((190, 242), (140, 242))
    return f


def healnet() -> Figure:
    """One fusion layer of HEALNet."""
    f = Figure(800, 300)
    f.box(20, 120, 90, 60, "latents S₀\n[C, D]", "latents")
    f.group(140, 50, 500, 150, "fusion layer, repeated L times")
    for x, name, tokens in (
        (160, "genes", "genes\none row"),
        (400, "slide", "slide\nbag of patches"),
    ):
        f.box(x, 125, 100, 50, f"attention\nto {name}")
        f.box(x + 120, 125, 100, 50, "feed-\nforward")
        f.arrow((x + 100, 150), (x + 120, 150))
        f.box(x - 10, 230, 120, 50, tokens, "data")
        f.arrow((x + 50, 230), (x + 50, 175), label="keys, values", at=(x + 100, 213))
        f.arrow((x - 10, 150), (x - 10, 90), (x + 230, 90), (x + 230, 150), dashed=True)
        f.text(x + 110, 76, f"patient without {name}: skip", colour="#4a5058", size=13)
    f.arrow((110, 150), (160, 150))
    f.arrow((380, 150), (400, 150))
    f.arrow((620, 150), (665, 150))
    f.box(665, 115, 115, 70, "head: mean,\nLayerNorm,\nlinear")
    f.arrow((722, 185), (722, 230))
    f.box(665, 230, 115, 50, "logits\n[B, outputs]", "result")
    f.text(65, 196, "give the queries", colour="#4a5058", size=13)
    return f


def legoblock() -> Figure:
    """A LegoBlock: the loop between the latents and their spectrum."""
    f = Figure(800, 290)
    f.box(20, 40, 100, 50, "input x", "data")
    f.box(160, 40, 130, 50, "encoder g\n(any module)")
    f.box(330, 40, 110, 50, "tokens h", "data")
    f.arrow((120, 65), (160, 65))
    f.arrow((290, 65), (330, 65))
    f.box(20, 170, 100, 50, "latents L\n[C, D]", "latents")
    f.box(160, 170, 80, 50, "F")
    f.group(140, 140, 490, 135, "one pass, repeated depth times")
    f.box(290, 155, 80, 36, "Re Z", "latents")
    f.box(290, 220, 80, 36, "Im Z", "latents")
    f.box(400, 150, 130, 46, "ψ: attention,\nfeed-forward")
    f.box(560, 186, 55, 40, "F⁻¹")
    f.arrow((120, 195), (160, 195))
    f.arrow((240, 190), (290, 173))
    f.arrow((240, 200), (290, 238))
    f.arrow((370, 173), (400, 173))
    f.arrow((440, 65), (465, 65), (465, 150))
    f.text(520, 108, "keys, values", colour="#4a5058", size=13)
    f.arrow((530, 173), (560, 196))
    f.arrow((370, 238), (530, 238), (560, 216))
    f.arrow((587, 226), (587, 268), (200, 268), (200, 220))
    f.arrow((530, 165), (665, 120))
    f.text(600, 118, "last pass", colour="#4a5058", size=13)
    f.box(665, 85, 115, 50, "head on the\nmean of Re Z")
    f.arrow((722, 135), (722, 180))
    f.box(665, 180, 115, 44, "logits", "result")
    return f


def legomerge() -> Figure:
    """LegoMerge of two blocks, and a patient who misses one."""
    f = Figure(800, 250)
    for y, name, number in ((40, "genes", "₁"), (140, "slide", "₂")):
        f.box(20, y, 90, 50, name, "data")
        f.box(150, y, 120, 50, f"LegoBlock\nof {name}")
        f.box(310, y, 110, 50, f"spectrum Z{number}", "latents")
        f.arrow((110, y + 25), (150, y + 25))
        f.arrow((270, y + 25), (310, y + 25))
    f.box(470, 80, 170, 70, "harmonic mean of\nmagnitudes, mean\nof phases")
    f.arrow((420, 65), (470, 100))
    f.arrow((420, 165), (470, 130))
    f.box(680, 90, 100, 50, "merged\nhead")
    f.arrow((640, 115), (680, 115), label="Re Z", at=(659, 102))
    f.arrow((730, 140), (730, 180))
    f.box(680, 180, 100, 44, "logits", "result")
    f.text(
        555,
        184,
        "A patient without a modality:\nthat block has weight 0,\nthe other weights sum to 1",
        colour="#4a5058",
        size=13,
    )
    f.text(730, 66, "SLERP of the\nblocks’ heads", colour="#4a5058", size=13)
    return f


def legofuse() -> Figure:
    """The two orders in which LegoFuse runs the layers of two blocks."""
    f = Figure(800, 230)
    f.text(20, 60, "stack", anchor="start", bold=True)
    f.text(20, 165, "weave", anchor="start", bold=True)
    f.box(85, 35, 90, 50, "latents\nof genes", "latents")
    f.box(215, 35, 180, 50, "genes: layers 1 and 2")
    f.box(455, 35, 180, 50, "slide: layers 1 and 2")
    f.box(690, 35, 90, 50, "merged\nhead", "result")
    f.arrow((175, 60), (215, 60))
    f.arrow((395, 60), (455, 60), label="Re Z", at=(424, 47))
    f.arrow((635, 60), (690, 60))
    f.box(85, 140, 90, 50, "latents", "latents")
    for i, text in enumerate(
        ("genes:\nlayer 1", "slide:\nlayer 1", "genes:\nlayer 2", "slide:\nlayer 2")
    ):
        x = 215 + 110 * i
        f.box(x, 140, 90, 50, text)
        f.arrow((x - (40 if i == 0 else 20), 165), (x, 165))
    f.arrow((635, 165), (690, 165))
    f.box(690, 140, 90, 50, "merged\nhead", "result")
    return f


def store() -> Figure:
    """From a slide to a feature store and on to a cohort."""
    f = Figure(800, 270)
    names = (
        "slide\n.svs .tiff .ndpi …",
        "tissue mask\non a thumbnail",
        "patches\nat one resolution",
        "encoder:\none row each",
    )
    for i, name in enumerate(names):
        f.box(20 + 190 * i, 30, 150, 56, name, "data" if i == 0 else "step")
        if i:
            f.arrow((190 * i - 20, 58), (20 + 190 * i, 58))
    f.group(20, 135, 560, 115, "feature store: one folder")
    f.box(
        40,
        150,
        245,
        84,
        "slides/<key>.zarr\ncoords, tissue, flags [N]\nfeatures/<encoder> [N, D]",
        "data",
    )
    f.box(310, 150, 122, 84, "failed/\n<key>.json\nand the reason", "data")
    f.box(457, 150, 105, 84, "run.json\nwhat was\nasked for", "data")
    f.arrow((665, 86), (665, 114), (262, 114), (262, 150))
    f.arrow((580, 192), (630, 192))
    f.box(630, 160, 150, 64, "cohort:\na bag per patient", "result")
    return f


def out_of_fold() -> Figure:
    """Five splits, each patient tested once."""
    f = Figure(800, 260)
    left, width = 130, 86
    for row in range(5):
        y = 30 + 34 * row
        f.text(20, y + 13, f"split {row + 1}", anchor="start")
        for part in range(5):
            kind = "test" if part == row else "validation" if part == (row + 1) % 5 else "step"
            f.box(left + part * (width + 4), y, width, 26, "", kind)
    f.text(left + 225, 212, "patients", colour="#4a5058", size=13)
    for i, (kind, text) in enumerate(
        (("step", "training"), ("validation", "validation"), ("test", "test"))
    ):
        f.box(left + 135 * i, 228, 18, 18, "", kind)
        f.text(left + 26 + 135 * i, 237, text, anchor="start", size=13)
    f.box(640, 40, 140, 62, "predictions of all\ntest parts", "latents")
    f.box(640, 136, 140, 62, "pairs within a\ntest part, pooled", "result")
    f.arrow((585, 71), (640, 71))
    f.arrow((710, 102), (710, 136))
    return f


FIGURES = {
    "overview.svg": overview,
    "healnet.svg": healnet,
    "legoblock.svg": legoblock,
    "legomerge.svg": legomerge,
    "legofuse.svg": legofuse,
    "store.svg": store,
    "out-of-fold.svg": out_of_fold,
}


def main() -> None:
    """Write all figures."""
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
