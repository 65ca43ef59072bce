"""Lines over time, as SVG: a few panels below each other with one time axis. What the soak needs, and no more.

A panel begins at zero, unless it says that it is about small changes of something large. Colours are those of
Okabe and Ito, told apart by nearly everybody; each line is labelled at its end too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 960
LEFT, RIGHT, TOP = 70, 210, 78  # margins; on the right are the labels
HEIGHT, GAP = 150, 46  # of a panel, and below it
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")
LABEL_STEP: Final = 16
TEXT_MOST: Final = 125  # letters, below the title


@dataclass(frozen=True)
class Line:
    """One series: what it is called, and (x, y) in order of x."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Lines with one y axis, which has this unit, and begins at zero or is `zoomed` to what there is."""

    title: str
    unit: str
    lines: Sequence[Line]
    is_zoomed: bool = False


def ticks(most: float, about: int = 4, least: float = 0.0) -> list[float]:
    """Round numbers, from the last that is not above `least` to the first that is not below `most`."""
    if most <= least:
        most = least + 1.0
    rough = (most - least) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * (1 - 1e-9))
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


def svg(title: str, subtitle: str, x_title: str, panels: Sequence[Panel], marks: Sequence[float], mark: str) -> str:
    """The whole picture. `marks`: vertical lines at these x; `mark`: what they are."""
    end = max((x for panel in panels for line in panel.lines for x, _ in line.points), default=1.0)
    height = TOP + len(panels) * (HEIGHT + GAP) + 14
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(LEFT, 24, title, size=16, weight="bold"),
        _text(LEFT, 44, subtitle[:TEXT_MOST], colour="#444"),
    ]
    for number, panel in enumerate(panels):
        out += _panel(panel, TOP + number * (HEIGHT + GAP), end, marks, mark if number == 0 else "")
    out += [_text(LEFT + _plot_width() / 2, height - 12, x_title, anchor="middle"), "</svg>"]
    return "\n".join(out) + "\n"


def _plot_width() -> int:
    return WIDTH - LEFT - RIGHT


def _panel(panel: Panel, top: float, end: float, marks: Sequence[float], mark: str) -> list[str]:
    values = [y for line in panel.lines for _, y in line.points] or [1.0]
    y_ticks = ticks(max(values), least=min(values) if panel.is_zoomed else 0.0)
    x_ticks = [x for x in ticks(end, 8) if x <= end]
    bottom, right = top + HEIGHT, LEFT + _plot_width()

    def at_x(x: float) -> float:
        return LEFT + _plot_width() * x / end

    def at_y(y: float) -> float:
        return bottom - HEIGHT * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    out = [_text(LEFT, top - 8, f"{panel.title} ({panel.unit})", weight="bold")]
    for y in y_ticks:
        out.append(_rule(LEFT, at_y(y), right, at_y(y), "#ddd"))
        out.append(_text(LEFT - 8, at_y(y) + 4, f"{y:,g}", anchor="end"))
    for x in x_ticks:
        out.append(_rule(at_x(x), bottom, at_x(x), bottom + 4, "#444"))
        out.append(_text(at_x(x), bottom + 17, f"{x:g}", anchor="middle"))
    out += [_rule(at_x(x), top, at_x(x), bottom, "#999", dash="2 3") for x in marks]
    if mark and marks:
        out.append(_text(right, top - 8, f"dotted: {mark}", anchor="end", colour="#666"))
    labels = []
    for number, line in enumerate(panel.lines):
        if not line.points:
            continue
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line.points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        labels.append((at_y(line.points[-1][1]), line, colour))
    lowest = -math.inf
    for y, line, colour in sorted(labels, key=lambda label: label[0]):
        lowest = max(y + 4, lowest + LABEL_STEP)
        out.append(_text(right + 8, lowest, f"{line.label}: {line.points[-1][1]:,.4g}", colour=colour))
    return out


def _rule(x: float, y: float, to_x: float, to_y: float, colour: str, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}"{dashed}/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 12,
    weight: str = "normal",
    colour: str = "black",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
