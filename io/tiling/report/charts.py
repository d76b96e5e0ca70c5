"""The charts of the report, as SVG inside of the page. The style sheet gives them their colours."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from .facts import FLAGS

_WIDTH, _HEIGHT = 300, 172
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 12, 42, 38
_MOST_BINS = 20


def histogram(title: str, values: Sequence[float], label: str, top: float | None = None) -> str:
    """Return a histogram of one value per slide, from 0 to `top`.

    Args:
        title: its title.
        values: finite numbers from 0.
        label: of the x axis, with the unit.
        top: end of the x axis; None for the largest value.
    """
    if not values:
        return _figure(title, 0, "slides", _text(_WIDTH / 2, 100, "not known", "middle"))
    step, bins = _bins(max(values) if top is None else top, values)
    counts = [0] * bins
    for value in values:
        counts[min(int(value / step + 1e-9), bins - 1)] += 1
    parts = _axes(step * bins, max(counts), label)
    width = (_WIDTH - _LEFT - _RIGHT) / bins
    scale = (_HEIGHT - _TOP - _BOTTOM) / max(counts)
    for i, count in enumerate(counts):
        if count:
            x, height = _LEFT + i * width, count * scale
            parts.append(
                f'<rect class="bar" x="{x + 0.5:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" '
                f'width="{width - 1:.1f}" height="{height:.1f}"><title>{i * step:g} to '
                f"{(i + 1) * step:g}: {_slides(count)}</title></rect>"
            )
    return _figure(title, len(values), "slides", "".join(parts))


def flag_chart(counts: Mapping[str, int], kept: int) -> str:
    """Return bars of the patches with each flag, as counts and as shares of the kept patches."""
    parts, most = [], max([*counts.values(), 1])
    for i, name in enumerate(FLAGS):
        y, count = _TOP + 4 + i * 30, counts.get(name, 0)
        length = (_WIDTH - 62 - 106) * count / most
        text = f"{count:,}" + (f" ({percent(count / kept)})" if kept else "")
        parts += [
            _text(56, y + 14, name, "end"),
            f'<rect class="{name}" x="62" y="{y}" width="{length:.1f}" height="18"/>',
            _text(62 + length + 6, y + 14, text, "start"),
        ]
    return _figure("Patches with a flag", kept, "kept patches", "".join(parts))


def percent(share: float) -> str:
    """Return a share as a percentage that is not rounded to 0 or 100 unless it is that."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{min(share * 100, 99.9) if share < 1 else 100:.3g} %"


def _bins(top: float, values: Sequence[float]) -> tuple[float, int]:
    """Return width and number of the bins from 0 to `top`; widths are 1, 2 or 5 times 10^k."""
    top = top or 1.0
    least = top / _MOST_BINS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= least * (1 - 1e-9))
    if all(isinstance(value, int) for value in values):
        step = max(1, round(step))
    return step, max(1, math.ceil(top / step - 1e-9))


def _axes(end: float, most: int, label: str) -> list[str]:
    """Return both axes with their ticks and labels."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<path class="axis" d="M{_LEFT} {_TOP - 4}V{bottom}H{right}"/>',
        _text(_LEFT - 5, bottom + 4, "0", "end"),
        _text(_LEFT - 5, _TOP + 8, f"{most:,}", "end"),
        _text(_LEFT, _TOP - 10, "slides", "middle", "muted"),
        _text((_LEFT + right) / 2, _HEIGHT - 6, label, "middle", "muted"),
    ]
    power = 10.0 ** math.floor(math.log10(end / 2))
    step = next(s * power for s in (5, 2, 1) if end / (s * power) >= 2)
    for i in range(math.floor(end / step + 1e-9) + 1):
        x = _LEFT + (right - _LEFT) * i * step / end
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(_text(x, bottom + 16, _tick(i * step), "middle"))
    return parts


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.6g}"


def _slides(count: int) -> str:
    return f"{count:,} slide{'s'[: count != 1]}"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    css = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}>{html.escape(text)}</text>'


def _figure(title: str, n: int, unit: str, content: str) -> str:
    """Return a chart with its title, and the number of things that it shows."""
    title = html.escape(title)
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">'
        f'<text class="title" x="0" y="15">{title}</text>'
        f'<text class="muted" x="{_WIDTH}" y="15" text-anchor="end">n = {n:,} {unit}</text>'
        f"{content}</svg></figure>\n"
    )
