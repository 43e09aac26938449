"""Plots as inline SVG without a library: lines on two logarithmic axes, and stacked bars. Colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

_ids = count()


@dataclass(frozen=True)
class Line:
    """One curve: its label, its points (both coordinates positive), and the number of its colour."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int


def log_log(title: str, x_label: str, y_label: str, lines: Sequence[Line], width: int = 460, height: int = 300) -> str:
    """Curves on logarithmic axes, ticks at powers of ten (and at 2 and 5 where there are few).

    Raises
    ------
    ValueError
        There is no point, or one that is not positive.
    """
    points = [point for line in lines for point in line.points]
    if not points or min(min(point) for point in points) <= 0:
        raise ValueError(f"lines: expected positive points, got {points[:4]}")
    left, right, top, bottom = 62, 14, 12 + 20 * len(lines), 46
    x_low, x_high = _bounds([x for x, _ in points], 1.15)
    y_low, y_high = _bounds([y for _, y in points], 1.4)

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / x_low) / math.log(x_high / x_low)
        up = math.log(y / y_low) / math.log(y_high / y_low)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    parts = []
    for value in _ticks(x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{short(value)}</text>')
    for value in _ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for i, line in enumerate(lines):
        placed = [place(*point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="line c{line.colour}" points="{path}"/>')
        for (x, y), point in zip(placed, line.points, strict=True):
            marker = _marker(x, y, line.colour)
            parts.append(f"<g>{marker}<title>{escape(line.label)}: {short(point[0])}, {short(point[1])}</title></g>")
        y = 18 + 20 * i
        parts.append(f'<line class="line c{line.colour}" x1="{left}" x2="{left + 22}" y1="{y - 4}" y2="{y - 4}"/>')
        parts.append(_marker(left + 11, y - 4, line.colour))
        parts.append(f'<text x="{left + 30}" y="{y}">{escape(line.label)}</text>')
    across = (left + width - right) / 2
    parts.append(f'<text class="label" x="{across}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (top + height - bottom) / 2
    turned = f'transform="translate(14 {middle:.0f}) rotate(-90)"'
    parts.append(f'<text class="label" {turned} text-anchor="middle">{escape(y_label)}</text>')
    return _svg(title, width, height, parts)


def stacked_bars(
    title: str, unit: str, bars: Mapping[str, Mapping[str, float]], colours: Mapping[str, int], width: int = 640
) -> str:
    """Horizontal bars from zero, each the sum of its named parts, with the sum behind it; `legend` names the parts."""
    left, right, row, top = 64, 84, 30, 4
    height = top + row * len(bars) + 34
    longest = max(sum(bar.values()) for bar in bars.values()) or 1.0
    scale = (width - left - right) / longest
    parts = []
    for value in _round_steps(longest):
        x = left + value * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - 26}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle">{short(value)}</text>')
    for i, (label, bar) in enumerate(bars.items()):
        y = top + row * i + 4
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
        x = float(left)
        for name, value in bar.items():
            length = value * scale
            parts.append(
                f'<g><rect class="part c{colours[name]}" x="{x:.1f}" y="{y}" width="{max(length, 0.3):.1f}" '
                f'height="{row - 9}"/>'
                f"<title>{escape(label)}, {escape(name)}: {short(value)} {escape(unit)}</title></g>"
            )
            x += length
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{short(sum(bar.values()))} {escape(unit)}</text>')
    return _svg(title, width, height, parts)


def legend(colours: Mapping[str, int]) -> str:
    """A list of names with their colours, as HTML: it wraps where a page is narrow."""
    entries = "".join(
        f'<li><svg viewBox="0 0 12 12" aria-hidden="true"><rect class="part c{colour}" width="12" height="12"/></svg>'
        f"{escape(name)}</li>"
        for name, colour in colours.items()
    )
    return f'<ul class="legend">{entries}</ul>'


def short(value: float) -> str:
    """A number for a tick: 1.5, 20, 3k, 100k, 1M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    name = f"plot{next(_ids)}"
    inner = "\n".join(parts)
    # An image to a screen reader, which reads its title; the numbers stand in the tables.
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}" style="max-width:{width}px">'
        f'<title id="{name}">{escape(title)}</title>\n<g aria-hidden="true">\n{inner}\n</g></svg>'
    )


def _marker(x: float, y: float, colour: int) -> str:
    """A disc for the first colour, a square for others: legible without colour."""
    if colour == 1:
        return f'<circle class="part c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    return f'<rect class="part c{colour}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'


def _bounds(values: Sequence[float], margin: float) -> tuple[float, float]:
    return min(values) / margin, max(values) * margin


def _ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        found = [step * 10.0**power for power in decades for step in steps if low <= step * 10.0**power <= high]
        if len(found) >= 3:
            break
    return found


def _round_steps(longest: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(longest))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if longest / s <= 8)
    return [i * step for i in range(int(longest / step) + 1)]
