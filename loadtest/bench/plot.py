"""Two kinds of charts as SVG text: lines over logarithmic axes, and panels of bars. It knows nothing of servers.

Written out by hand rather than with a library, so that the same figures give the same bytes and a page can be compared
with what it was made of. A chart has a ground of its own and follows the reader's light or dark scheme; series differ
in colour and in the shape of their marks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 860.0
FONT: Final = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"
STYLE: Final = (
    f"text{{{FONT};font-size:12px;fill:#1f2328}}.title{{font-size:16px;font-weight:600}}.soft{{fill:#59636e}}"
    ".paper{fill:#ffffff}.grid{stroke:#d1d9e0;stroke-width:1}.axis{stroke:#59636e;stroke-width:1}"
    "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.soft{fill:#9198a1}.paper{fill:#0d1117}"
    ".grid{stroke:#2f363d}.axis{stroke:#9198a1}}"
)
COLOURS: Final = ("#2f81f7", "#d9730d", "#2a9d5c", "#cf4b4b", "#9467d6", "#a08a00", "#1798a6", "#d0569b", "#848d97")
MARKS: Final = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z", "M-3.5,-3.5h7v7h-7z", "M0,-4.5L4.5,3.5H-4.5z", "M0,-5L5,0L0,5L-5,0z",
    "M0,4.5L4.5,-3.5H-4.5z", "M-4.5,-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z",
)  # fmt: skip
CROSS: Final = "M-6,-6L6,6M6,-6L-6,6"


@dataclass(frozen=True)
class Series:
    """A line. `is_cut`: it ends where it does because its subject could not go on, not because nobody asked.

    `colour`: a number, so that a subject looks the same in all charts.
    """

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    is_cut: bool = False


@dataclass(frozen=True)
class Panel:
    """A block of bars: (name, value) from top to bottom; None where there is no figure."""

    title: str
    bars: Sequence[tuple[str, float | None]]


def short(value: float) -> str:
    """5000 → 5 k; three digits at most of what is small."""
    for size, suffix in ((1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def significant(value: float) -> str:
    """Two decimals below 10, one below 100."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start", more: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind} text-anchor="{anchor}"{more}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _document(height: float, title: str, subtitle: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>'
    )
    paper = f'<rect class="paper" width="{WIDTH:.0f}" height="{height:.0f}" rx="8"/>'
    titles = [_text(20, 30, title, "title"), _text(20, 50, subtitle, "soft")]
    return "\n".join([head, paper, *titles, *parts, "</svg>", ""])


@dataclass(frozen=True)
class _Axis:
    """Logarithmic: values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        """1, 2 and 5 of each decade; only 1 when these would be too many."""
        decades = math.log10(self.high / self.low)
        for decade in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            for step in (1, 2, 5) if decades < 4 else (1,):
                if self.low * 0.999 <= (value := step * 10.0**decade) <= self.high * 1.001:
                    yield value


def _around(values: Sequence[float]) -> tuple[float, float]:
    """The nearest 1, 2 or 5 of a decade below and above all values, which are more than 0."""
    steps = [step * 10.0**decade for decade in range(-3, 10) for step in (1, 2, 5)]
    low = max(step for step in steps if step <= min(values))
    return low, min(step for step in steps if step >= max(values) and step > low)


def lines(title: str, subtitle: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """A chart of lines over two logarithmic axes, its legend at the right. Values are more than 0.

    Raises:
        ValueError: there is not one point
    """
    points = [point for line in series for point in line.points]
    if not points:
        raise ValueError("a chart needs a point")
    height, left, right, top, bottom = 460.0, 78.0, WIDTH - 170.0, 72.0, 400.0
    x_axis = _Axis(*_around([x for x, _ in points]), left, right)
    y_axis = _Axis(*_around([y for _, y in points]), bottom, top)
    parts = []
    for x in x_axis.ticks():
        parts += [_line(x_axis.at(x), top, x_axis.at(x), bottom, "grid")]
        parts += [_text(x_axis.at(x), bottom + 18, short(x), anchor="middle")]
    for y in y_axis.ticks():
        parts += [_line(left, y_axis.at(y), right, y_axis.at(y), "grid")]
        parts += [_text(left - 8, y_axis.at(y) + 4, short(y), anchor="end")]
    parts += [_line(left, bottom, right, bottom, "axis"), _line(left, top, left, bottom, "axis")]
    parts += [_text((left + right) / 2, bottom + 42, x_label, "soft", "middle")]
    middle = (top + bottom) / 2
    parts += [_text(22, middle, y_label, "soft", "middle", f' transform="rotate(-90 22 {middle:.1f})"')]
    for number, line in enumerate(series):
        colour, mark = COLOURS[line.colour % len(COLOURS)], MARKS[line.colour % len(MARKS)]
        spots = [(x_axis.at(x), y_axis.at(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts += [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
        legend = (right + 24, top + 10 + 22 * number)
        for x, y in [*spots, legend]:
            parts += [f'<path d="{mark}" transform="translate({x:.1f} {y:.1f})" fill="{colour}"/>']
        if line.is_cut and spots:
            x, y = spots[-1]
            parts += [
                f'<path d="{CROSS}" transform="translate({x:.1f} {y:.1f})" stroke="{colour}" stroke-width="2.5"/>'
            ]
        parts += [_text(legend[0] + 14, legend[1] + 4, line.name)]
    return _document(height, title, subtitle, parts)


def bars(title: str, subtitle: str, panels: Sequence[Panel], columns: int = 2) -> str:
    """Panels of horizontal bars, each with a scale of its own that begins at 0 and its values written out."""
    label, gap, pitch, top = 118.0, 26.0, 21.0, 72.0
    width = (WIDTH - 40 - gap * (columns - 1)) / columns
    parts = []
    for first in range(0, len(panels), columns):
        row = panels[first : first + columns]
        for column, panel in enumerate(row):
            left = 20 + column * (width + gap)
            zero, full = left + label, width - label - 62
            most = max((value for _, value in panel.bars if value is not None), default=0.0) or 1.0
            parts += [_text(left, top + 14, panel.title, more=' font-weight="600"')]
            for number, (name, value) in enumerate(panel.bars):
                y = top + 26 + number * pitch
                parts += [_text(zero - 8, y + 12, name, anchor="end")]
                if value is None:
                    parts += [_text(zero + 4, y + 12, "no figure", "soft")]
                    continue
                length, colour = full * value / most, COLOURS[number % len(COLOURS)]
                parts += [
                    f'<rect x="{zero:.1f}" y="{y:.1f}" width="{length:.1f}" height="15" rx="2" fill="{colour}"/>',
                    _text(zero + length + 6, y + 12, significant(value)),
                ]
            parts += [_line(zero, top + 22, zero, top + 26 + len(panel.bars) * pitch, "axis")]
        top += 26 + pitch * max(len(panel.bars) for panel in row) + 22
    return _document(top, title, subtitle, parts)
