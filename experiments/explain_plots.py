"""Bars of contributions as SVG: of a cohort, and of one patient."""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from ..io.page import one_line
from .calibration_plot import BLUE
from .explain import Explanation, PatientExplanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERMILLION = "#D55E00"  # of Okabe and Ito's colours
TOP = 20  # features in a picture
LONGEST = 44  # characters of a label
# In inches: width of a picture, height of a bar, space above and below each panel.
WIDTH, BAR, ABOVE, BELOW, LEFT = 8.0, 0.24, 0.35, 0.6, 3.4
HEADER = 0.35


class Bars(NamedTuple):
    """One panel.

    Args:
        title: above it.
        labels: one per bar, from the top.
        values: lengths.
        errors: [2, n], lengths of the intervals below and above; None for none.
        axis: what the horizontal axis shows, with its unit.
    """

    title: str
    labels: Sequence[str]
    values: Sequence[float]
    errors: Any
    axis: str

    @property
    def height(self) -> float:
        """Height in inches."""
        return ABOVE + BELOW + BAR * max(len(self.labels), 1)


def draw_cohort(explanation: Explanation, table: pd.DataFrame) -> str:
    """Return an SVG: which modalities and features matter over all patients.

    Args:
        explanation: of the patients.
        table: of `explain_files.cohort_table`.
    """
    several, panels = len(explanation.features) > 1, []
    for level, title in (("modality", "modalities"), ("feature", "features")):
        rows = table[table["level"] == level].head(TOP)
        if rows.empty:
            continue
        total = int((table["level"] == level).sum())
        shown = f"{len(rows)} of {total:,} {title}" if total > len(rows) else title
        labels = [
            _shorten(
                row["modality"] if level == "modality"
                else f"{row['modality']}: {row['feature']}" if several else row["feature"],
                f" (n = {row['patients']:,})",
            )
            for row in rows.to_dict("records")
        ]  # fmt: skip
        mean, low, high = (rows[name].to_numpy(float) for name in ("mean", "low", "high"))
        errors = np.nan_to_num(np.maximum([mean - low, high - mean], 0))
        axis = f"mean |contribution| to {explanation.explained.title}, 95 % interval"
        panels.append(Bars(shown, labels, mean.tolist(), errors, axis))
    config = explanation.run.config
    title = f"{config['model']} on {explanation.cohort.name}, n = {len(explanation.evaluated):,}"
    return _draw(title, panels)


def draw_patient(explanation: Explanation, patient: PatientExplanation, rows: pd.DataFrame) -> str:
    """Return an SVG with the contributions of the modalities and of the top features.

    Args:
        explanation: of all patients.
        patient: the patient.
        rows: of `explain_files.feature_rows`.
    """
    several = len(explanation.features) > 1
    names = list(explanation.features)
    values = [
        patient.modalities[name].total if name in patient.modalities else 0.0 for name in names
    ]
    labels = [_shorten(name, "" if name in patient.modalities else " (missing)") for name in names]
    axis = f"contribution to {explanation.explained.title}"
    panels = [Bars("modalities", labels, values, None, axis)]
    if len(rows):
        rows = rows.reset_index(drop=True)
        order = rows["contribution"].abs().sort_values(ascending=False, kind="stable").index
        top = rows.loc[order[:TOP]]
        labels = [
            _shorten(
                f"{row['modality']}: {row['feature']}" if several else row["feature"],
                f" = {row['value'] or 'missing'}",
            )
            for row in top.to_dict("records")
        ]
        shown = f"{len(top)} of {len(rows):,} features" if len(rows) > len(top) else "features"
        panels.append(Bars(shown, labels, top["contribution"].tolist(), None, axis))
    folds = f"{patient.folds} fold{'s'[: patient.folds != 1]}"
    note = "; the models were trained on the patient" if patient.trained else ""
    figure = f"{explanation.explained.title}: {patient.output:.2f}"
    title = f"patient {_shorten(patient.patient, '')}, {figure} ({folds}{note}; n = 1)"
    return _draw(title, panels)


def _draw(title: str, panels: Sequence[Bars]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    height = HEADER + sum(panel.height for panel in panels)
    # Names are shown as they are, not as mathematics. Without `hashsalt` and a date, equal
    # explanations have equal pictures.
    settings: Any = {"svg.hashsalt": "motet", "font.size": 9, "text.parse_math": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure = Figure(figsize=(WIDTH, height))
        figure.text(
            0.02, 1 - 0.12 / height, _shorten(title, "", 110), va="top", fontsize=9, weight="bold"
        )
        top = height - HEADER
        for panel in panels:
            _draw_panel(_add_axes(figure, panel, top, height), panel)
            top -= panel.height
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _add_axes(figure: "Figure", panel: Bars, top: float, height: float) -> "Axes":
    bottom = top - panel.height + BELOW
    across = (WIDTH - LEFT - 0.2) / WIDTH
    return figure.add_axes(
        (LEFT / WIDTH, bottom / height, across, (panel.height - ABOVE - BELOW) / height)
    )


def _draw_panel(axes: "Axes", panel: Bars) -> None:
    """Draw horizontal bars: orange ones raise what is explained, blue ones lower it."""
    places = np.arange(len(panel.labels))
    signed = panel.errors is None
    colours = [VERMILLION if signed and value > 0 else BLUE for value in panel.values]
    axes.barh(places, panel.values, color=colours, height=0.7)
    if panel.errors is not None:
        axes.errorbar(
            panel.values, places, xerr=panel.errors, fmt="none", ecolor="0.25", capsize=2, lw=1
        )
    note = "orange raises, blue lowers" if signed else ""
    axes.set_title(f"{panel.title}{f' ({note})' if note else ''}", fontsize=9, loc="left")
    axes.set_yticks(places, panel.labels)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel(_shorten(panel.axis, "", 90))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _shorten(text: object, end: str, longest: int = LONGEST) -> str:
    """Return a text in one line, cut to a length; `end` is kept."""
    words, end = one_line(text), " ".join(end.split()) if end.isspace() else end
    room = longest - len(end)
    return (words if len(words) <= room else f"{words[: max(room, 8) - 1]}…") + end
