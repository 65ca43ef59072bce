"""Three kinds of charts as SVG text: lines over logarithmic axes, panels of bars, panels of lines over time.

The benchmark's page, the soak and the dashboard's pictures are made of them. It knows nothing of servers. Written out
by hand rather than with a library, so that the same figures give the same bytes and a page can be compared with what it
was made of. A chart has a ground of its own and follows the reader's light or dark scheme.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
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
    "M0,4.5L4.5,-3.5H-4.5z", "M-4.5,-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z", "M-4,-4L4,4V-4L-4,4z", "M-5,-1.5h10v3h-10z",
    "M-1.5,-5h3v10h-3z",
)  # fmt: skip
CROSS: Final = "M-6,-6L6,6M6,-6L-6,6"


@dataclass(frozen=True)
class Line:
    """(x, y) in order of x. `is_cut`: it ends where it does because its subject could not go on, not because nobody
    asked.

    `colour`: a number, so that a subject looks the same in all charts; without it lines take turns.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int | None = None
    is_cut: bool = False


@dataclass(frozen=True)
class Bars:
    """A block of bars: (name, value) from top to bottom; None where there is no figure."""

    title: str
    bars: Sequence[tuple[str, float | None]]


@dataclass(frozen=True)
class Panel:
    """Lines with one y axis, which has this unit, and begins at zero or is `zoomed` to what there is.

    `absent`: what to say where there is no line.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    is_zoomed: bool = False
    absent: str = "no data"


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


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str, more: str = "") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{more}/>'


def _document(width: float, height: float, title: str, subtitle: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>'
    )
    paper = f'<rect class="paper" width="{width:.0f}" height="{height:.0f}" rx="8"/>'
    titles = [_text(20, 30, title, "title"), _text(20, 50, subtitle, "soft")]
    return "\n".join([head, paper, *titles, *parts, "</svg>", ""])


# ---- lines over logarithmic axes


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


def lines(title: str, subtitle: str, x_label: str, y_label: str, drawn: Sequence[Line]) -> str:
    """A chart of lines over two logarithmic axes, its legend at the right. Values are more than 0.

    Raises:
        ValueError: there is not one point
    """
    points = [point for line in drawn for point in line.points]
    if not points:
        raise ValueError("a chart needs a point")
    height, left, right, top, bottom = 460.0, 78.0, WIDTH - 170.0, 72.0, 400.0
    x_axis = _Axis(*_around([x for x, _ in points]), left, right)
    y_axis = _Axis(*_around([y for _, y in points]), bottom, top)
    parts = []
    for x in x_axis.ticks():
        parts += [_rule(x_axis.at(x), top, x_axis.at(x), bottom, "grid")]
        parts += [_text(x_axis.at(x), bottom + 18, short(x), anchor="middle")]
    for y in y_axis.ticks():
        parts += [_rule(left, y_axis.at(y), right, y_axis.at(y), "grid")]
        parts += [_text(left - 8, y_axis.at(y) + 4, short(y), anchor="end")]
    parts += [_rule(left, bottom, right, bottom, "axis"), _rule(left, top, left, bottom, "axis")]
    parts += [_text((left + right) / 2, bottom + 42, x_label, "soft", "middle")]
    middle = (top + bottom) / 2
    parts += [_text(22, middle, y_label, "soft", "middle", f' transform="rotate(-90 22 {middle:.1f})"')]
    for number, line in enumerate(drawn):
        place = number if line.colour is None else line.colour
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
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
    return _document(WIDTH, height, title, subtitle, parts)


# ---- bars


def bars(title: str, subtitle: str, blocks: Sequence[Bars], columns: int = 2) -> str:
    """Blocks of horizontal bars, each with a scale of its own that begins at 0 and its values written out."""
    label, gap, pitch, top = 118.0, 26.0, 21.0, 72.0
    width = (WIDTH - 40 - gap * (columns - 1)) / columns
    parts = []
    for first in range(0, len(blocks), columns):
        row = blocks[first : first + columns]
        for column, block in enumerate(row):
            left = 20 + column * (width + gap)
            zero, full = left + label, width - label - 62
            most = max((value for _, value in block.bars if value is not None), default=0.0) or 1.0
            parts += [_text(left, top + 14, block.title, more=' font-weight="600"')]
            for number, (name, value) in enumerate(block.bars):
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
            parts += [_rule(zero, top + 22, zero, top + 26 + len(block.bars) * pitch, "axis")]
        top += 26 + pitch * max(len(block.bars) for block in row) + 22
    return _document(WIDTH, top, title, subtitle, parts)


# ---- lines over time

_TOP: Final = 92.0
_HEIGHT, _BELOW = 150.0, 54.0  # of a panel, and from its axis to the next one
_LEFT: Final = 64.0  # of a panel: the numbers of its y axis
_LEGEND: Final = 190.0
GAP: Final = 4.0  # times the usual distance of two points
_PITCH: Final = 17.0  # of what is written one below the other


@dataclass(frozen=True)
class _Frame:
    """Where a panel's lines are drawn, in pixels; `end` is the last x, 0 the first."""

    left: float
    right: float
    top: float
    bottom: float
    end: float

    def at(self, x: float) -> float:
        return self.left + (self.right - self.left) * x / self.end


def ticks(most: float, about: int = 4, least: float = 0.0) -> list[float]:
    """Round numbers, from the last that is not above `least` to the first that is not below `most`."""
    if most <= least:
        most = least + 1.0
    rough = (most - least) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * (1 - 1e-9))
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


def over_time(
    title: str,
    subtitle: str,
    x_label: str,
    panels: Sequence[Panel],
    *,
    marks: Sequence[float] = (),
    mark: str = "",
    columns: int = 1,
) -> str:
    """Panels with one time axis, which begins at 0. A line's name and last value stand beside its panel.

    `marks`: vertical lines at these x; `mark`: what they are.
    """
    end = max((x for panel in panels for line in panel.lines for x, _ in line.points), default=0.0) or 1.0
    each = WIDTH if columns == 1 else 0.72 * WIDTH
    rows = -(-len(panels) // columns)
    height = _TOP + rows * (_HEIGHT + _BELOW) + 6
    parts = []
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left, top = column * each + _LEFT, _TOP + row * (_HEIGHT + _BELOW)
        frame = _Frame(left, (column + 1) * each - _LEGEND, top, top + _HEIGHT, end)
        parts += _axes(panel, frame, marks) + _drawn(panel, frame)
    if marks:
        parts += [_text(columns * each - 20, height - 12, f"dotted: {mark}", "soft", "end")]
    parts += [_text(columns * each / 2, height - 12, x_label, "soft", "middle")]
    return _document(columns * each, height, title, subtitle, parts)


def _y_ticks(panel: Panel) -> list[float]:
    values = [y for line in panel.lines for _, y in line.points] or [1.0]
    return ticks(max(values), least=min(values) if panel.is_zoomed else min(0.0, *values, 0.0))


def _at_y(panel: Panel, frame: _Frame, y: float) -> float:
    low, *_, high = _y_ticks(panel)
    return frame.bottom - (frame.bottom - frame.top) * (y - low) / (high - low)


def _axes(panel: Panel, frame: _Frame, marks: Sequence[float]) -> list[str]:
    parts = [_text(frame.left, frame.top - 10, f"{panel.title} ({panel.unit})", more=' font-weight="600"')]
    for y in _y_ticks(panel):
        height = _at_y(panel, frame, y)
        parts += [_rule(frame.left, height, frame.right, height, "grid")]
        parts += [_text(frame.left - 8, height + 4, f"{y:,g}", anchor="end")]
    for x in ticks(frame.end, 6):
        if x <= frame.end:
            parts += [_rule(frame.at(x), frame.bottom, frame.at(x), frame.bottom + 4, "axis")]
            parts += [_text(frame.at(x), frame.bottom + 17, f"{x:g}", anchor="middle")]
    return parts + [
        _rule(frame.at(x), frame.top, frame.at(x), frame.bottom, "axis", ' stroke-dasharray="2 3"') for x in marks
    ]


def _pieces(points: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """Broken where nothing was seen for much longer than usual."""
    steps = [now - before for (before, _), (now, _) in pairwise(points)]
    usual = statistics.median(steps) if steps else 0.0
    piece = [points[0]]
    for step, point in zip(steps, points[1:], strict=True):
        if step > GAP * usual:
            yield piece
            piece = []
        piece.append(point)
    yield piece


def _drawn(panel: Panel, frame: _Frame) -> list[str]:
    """The lines, and beside them what each is, as near to its end as the others let it."""
    parts, labels = [], []
    for number, line in enumerate(panel.lines):
        if line.points:
            colour = COLOURS[(number if line.colour is None else line.colour) % len(COLOURS)]
            for piece in _pieces(line.points):
                path = " ".join(f"{frame.at(x):.1f},{_at_y(panel, frame, y):.1f}" for x, y in piece)
                style = 'stroke-width="1.5" stroke-linecap="round"'  # a lone point is a dot
                parts += [f'<polyline points="{path}" fill="none" stroke="{colour}" {style}/>']
            labels += [(_at_y(panel, frame, line.points[-1][1]) + 4, line, colour)]
    if not labels:
        middle = ((frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2)
        return [_text(*middle, panel.absent, "soft", "middle")]
    labels.sort(key=lambda label: label[0])
    lowest = -math.inf
    room = [frame.bottom + 8 - _PITCH * (len(labels) - 1 - place) for place in range(len(labels))]
    for (y, line, colour), limit in zip(labels, room, strict=True):
        lowest = max(min(y, limit), lowest + _PITCH)
        words = f"{line.name}: {line.points[-1][1]:,.4g}"
        parts += [_text(frame.right + 8, lowest, words, more=f' style="fill:{colour}"')]
    return parts
