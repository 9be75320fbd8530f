"""Small SVG charts for the report: lines with bands, intervals. Colours come from the page's style sheet."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

POINTS = 200    # of a curve, at most
SERIES = 6      # lines in a chart, at most: as many as there are colours
WIDTH = 420
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Series(NamedTuple):
    """A line; `low` and `high` make its band. What is not finite is a gap."""

    label: str
    x: Sequence
    y: Sequence
    low: Sequence | None = None
    high: Sequence | None = None


class Row(NamedTuple):
    """A line of an interval plot: a value, its interval (a bound that is not finite runs off the plot), single values."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    dots: Sequence = ()


def text(value) -> str:
    """Escaped for a page. Control characters, also those that turn the direction of the text around, become a mark."""
    value = _CONTROL.sub("\ufffd", str(value))
    return escape(value.encode("utf-8", "replace").decode(), quote=True)


def figure(value) -> str:
    """A number as it is read: four digits, a true minus sign, a dash for none."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return str(value)
    value = float(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-3:
        mantissa, _, power = f"{value:.3g}".partition("e")
        if power:
            return f"{mantissa}e{int(power)}".replace("-", "−")
        out = mantissa
    else:
        out = f"{value:,.0f}" if size >= 1e4 or value == int(value) else f"{value:,.1f}" if size >= 100 else f"{value:.4g}"
    return out.replace("-", "−")


def numbers(values) -> np.ndarray:
    """As floats; what is none, or no number, is NaN. Clipped, so that a span of them is finite."""
    def one(v):
        return float(v) if isinstance(v, (int, float, np.number)) and not isinstance(v, bool) else math.nan
    out = np.array([one(v) for v in (values if values is not None else ())], float)
    out[np.isinf(out)] = math.nan
    return np.clip(out, -1e150, 1e150)


def thin(n: int, most: int = POINTS) -> np.ndarray:
    """At most `most` of n indices, evenly spaced, both ends among them."""
    return np.arange(n) if n <= most else np.unique(np.linspace(0, n - 1, most).round().astype(int))


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    raw = (high - low) / most
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(int(math.floor(high / step + 1e-9)) - first + 1)]


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e9 and (size > 1e3 or abs(value) >= 1e4):
            return f"{value / size:.4g}{unit}".replace("-", "−")
    return figure(round(value, 12))


def _span(arrays, pad=0.05) -> tuple[float, float]:
    found = np.concatenate([a[np.isfinite(a)] for a in arrays]) if arrays else np.array([])
    if not found.size:
        return 0.0, 1.0
    low, high = float(found.min()), float(found.max())
    gap = (high - low) * pad or abs(high) * 0.1 or 1.0
    return low - gap, high + gap


class _Scale:
    def __init__(self, low, high, start, end):
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value):
        share = (value - self.low) / (self.high - self.low)
        return np.round(self.start + share * (self.end - self.start), 1)


def _stretches(fine: np.ndarray) -> list[np.ndarray]:
    where = np.flatnonzero(fine)
    return [s for s in np.split(where, np.flatnonzero(np.diff(where) > 1) + 1) if s.size]


def _points(x, y) -> str:
    return " ".join(f"{a:g},{b:g}" for a, b in zip(x, y))


def _clip(words: str, most: int) -> str:
    return words if len(words) <= most else words[:most - 1] + "…"


def lines(series: list[Series], title: str, x_name: str, y_name: str, y_range=None, references: dict | None = None,
          height: int = 242) -> str:
    """Curves over x with their bands; `references` are vertical lines {label: x}. A legend follows the drawing."""
    left, right, top, bottom = 48, WIDTH - 10, 26, height - 36
    kept = []
    for s in series[:SERIES]:
        x, y = numbers(s.x), numbers(s.y)
        low, high = numbers(s.low), numbers(s.high)
        n = min(len(x), len(y))
        banded = len(low) >= n and len(high) >= n
        at = thin(n)
        kept.append((s.label, x[at], y[at], low[at] if banded else None, high[at] if banded else None))
    x_axis = _Scale(*_span([k[1] for k in kept] + [numbers((references or {}).values())], 0.02), left, right)
    spans = [k[2] for k in kept] + [b for k in kept for b in k[3:] if b is not None]
    y_axis = _Scale(*(y_range or _span(spans)), bottom, top)
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(title)}">']
    for t in ticks(y_axis.low, y_axis.high, 4):
        y = y_axis(t)
        out.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:g}" y2="{y:g}"/>'
                   f'<text class="end" x="{left - 5}" y="{y + 4:g}">{_short(t)}</text>')
    for t in ticks(x_axis.low, x_axis.high, 5):
        out.append(f'<text class="mid" x="{x_axis(t):g}" y="{bottom + 15}">{_short(t)}</text>')
    out.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
               f'<text class="end" x="{right}" y="{height - 4}">{text(x_name)}</text>'
               f'<text x="2" y="11">{text(_clip(y_name, 60))}</text>')
    for label, value in (references or {}).items():
        x = x_axis(value)
        beside = x - 4 if x > WIDTH / 2 else x + 11
        out.append(f'<line class="reference" x1="{x:g}" x2="{x:g}" y1="{top}" y2="{bottom}"><title>{text(label)} '
                   f'{figure(value)}</title></line>'
                   f'<text transform="translate({beside:g} {bottom - 4}) rotate(-90)">{text(_clip(label, 18))}</text>')
    for i, (_, x, _y, low, high) in enumerate(kept):
        if low is not None:
            for s in _stretches(np.isfinite(x) & np.isfinite(low) & np.isfinite(high)):
                edge = _points(np.r_[x_axis(x[s]), x_axis(x[s][::-1])],
                               np.clip(np.r_[y_axis(high[s]), y_axis(low[s][::-1])], top, bottom))
                out.append(f'<polygon class="band f{i}" points="{edge}"/>')
    for i, (label, x, y, _, _) in enumerate(kept):
        for s in _stretches(np.isfinite(x) & np.isfinite(y)):
            if s.size == 1:
                out.append(f'<circle class="f{i}" cx="{x_axis(x[s][0]):g}" cy="{y_axis(y[s][0]):g}" r="2.5"/>')
            else:
                out.append(f'<polyline class="line c{i}" points="{_points(x_axis(x[s]), y_axis(y[s]))}">'
                           f'<title>{text(label)}</title></polyline>')
    out.append("</svg>")
    items = "".join(f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><line class="line c{i}" x1="0" x2="26" y1="5" y2="5"/>'
                    f"</svg>{text(k[0])}</li>" for i, k in enumerate(kept))
    return "".join(out) + f'<ul class="legend">{items}</ul>'


def intervals(rows: list[Row], title: str, x_name: str, zero=False, margin: float | None = None, better: str = "") -> str:
    """One row an interval. `margin` is a dashed line; the side where the claim holds (`better`: right, left) is tinted."""
    left, right, top, step = 12, WIDTH - 12, 20 if margin is not None else 8, 36
    bottom = top + step * len(rows)
    marks = ([0.0] if zero else []) + ([margin] if margin is not None else [])
    axis = _Scale(*_span([numbers([r.value, r.low, r.high, *r.dots]) for r in rows] + [numbers(marks)], 0.07), left, right)
    out = [f'<svg viewBox="0 0 {WIDTH} {bottom + 34}" role="img" aria-label="{text(title)}">']
    if margin is not None:
        x = axis(margin)
        tint = (x, right) if better == "right" else (left, x)
        side = "end" if better == "left" else ""
        out.append(f'<rect class="beyond" x="{tint[0]:g}" y="{top}" width="{max(tint[1] - tint[0], 0):g}" '
                   f'height="{bottom - top}"/>')
        end = x > WIDTH * 0.7 or (side and x > 90)
        out.append(f'<text class="{"end" if end else ""}" x="{x + (-2 if end else 2):g}" y="{top - 6}">'
                   f'margin {text(figure(margin))}</text>')
    for t in ticks(axis.low, axis.high, 5):
        x = axis(t)
        out.append(f'<line class="grid" x1="{x:g}" x2="{x:g}" y1="{bottom}" y2="{bottom + 4}"/>'
                   f'<text class="mid" x="{x:g}" y="{bottom + 16}">{_short(t)}</text>')
    out.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
               f'<text class="end" x="{right}" y="{bottom + 31}">{text(x_name)}</text>')
    if zero:
        out.append(f'<line class="zero" x1="{axis(0.0):g}" x2="{axis(0.0):g}" y1="{top}" y2="{bottom}"/>')
    if margin is not None:
        out.append(f'<line class="margin" x1="{axis(margin):g}" x2="{axis(margin):g}" y1="{top - 3}" y2="{bottom}"/>')
    for i, row in enumerate(rows):
        color, y = i % SERIES, top + step * i + 25
        value, low, high = numbers([row.value, row.low, row.high])
        out.append(f'<text class="label" x="{left}" y="{y - 11}">{text(_clip(row.label, 62))}<title>{text(row.label)}'
                   "</title></text>")
        for dot in numbers(row.dots):
            if np.isfinite(dot):
                out.append(f'<circle class="dot c{color}" cx="{axis(dot):g}" cy="{y}" r="3"/>')
        if row.low is not None and row.high is not None:
            a = axis(low) if np.isfinite(low) else left
            b = axis(high) if np.isfinite(high) else right
            out.append(f'<line class="ci c{color}" x1="{a:g}" x2="{b:g}" y1="{y}" y2="{y}"/>')
            for end, sign, fine in ((a, 1, np.isfinite(low)), (b, -1, np.isfinite(high))):
                tail = end + 5 * sign
                shape = f"M{end:g} {y - 4}V{y + 4}" if fine else f"M{tail:g} {y - 4}L{end:g} {y}L{tail:g} {y + 4}"
                out.append(f'<path class="line ci c{color}" d="{shape}"/>')
        if np.isfinite(value):
            out.append(f'<path class="f{color}" d="M{axis(value):g} {y - 5}l5 5l-5 5l-5 -5z"><title>{text(figure(row.value))}'
                       "</title></path>")
    return "".join(out) + "</svg>"
