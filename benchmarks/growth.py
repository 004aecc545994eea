"""How times grow with a size: lines over both axes in powers of ten, and the same as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median

Series = Mapping[str, Mapping[int, Sequence[float]]]
"""Samples in seconds, by size, by name of the line."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 340, 60, 130, 40, 40
STYLE = """
text{font:13px system-ui,sans-serif;fill:#24292f}.small{font-size:11px;fill:#57606a}
.line0{stroke:#0969da}.line1{stroke:#bc4c00}.line2{stroke:#8250df}polyline{fill:none;stroke-width:2}
.grid{stroke:#d0d7de}.sample{fill:#24292f;fill-opacity:.55}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.grid{stroke:#3d444d}
.line0{stroke:#4493f8}.line1{stroke:#f0883e}.line2{stroke:#ab7df8}.sample{fill:#e6edf3;fill-opacity:.6}}
""".strip()


def svg(title: str, axis: str, series: Series) -> str:
    """A line through the medians of each series, every sample a dot."""
    sizes = sorted({size for line in series.values() for size in line})
    seconds = [one for line in series.values() for samples in line.values() for one in samples]
    low, high = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(size: int) -> float:
        return LEFT + across * math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0])

    def y(second: float) -> float:
        return TOP + down * (high - math.log10(second)) / (high - low)

    parts = [_text(0, 16, title)]
    for power in range(low, high + 1):
        line = y(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + across}" y1="{line:.1f}" y2="{line:.1f}"/>')
        parts.append(_text(8, line + 4, f"{10.0**power:g} s", "small"))
    parts += [_text(x(size) - 12, HEIGHT - BOTTOM + 18, str(size), "small") for size in sizes]
    parts.append(_text(LEFT, HEIGHT - 4, axis, "small"))
    for number, (name, line_of) in enumerate(series.items()):
        points = [(x(size), y(median(line_of[size]))) for size in sorted(line_of)]
        joined = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
        parts.append(f'<polyline class="line{number}" points="{joined}"/>')
        parts.append(_text(points[-1][0] + 8, points[-1][1] + 4, name, "small"))
        for size, samples in line_of.items():
            parts += [
                f'<circle class="sample" cx="{x(size):.1f}" cy="{y(sample):.1f}" r="2"/>'
                for sample in samples
            ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>\n'
        f"{body}\n</svg>\n"
    )


def table(axis: str, series: Series) -> str:
    """Median and least of each series by size, in seconds, as Markdown."""
    sizes = sorted({size for line in series.values() for size in line})
    lines = [f"| {axis} | {' | '.join(series)} |", "|---|" + "---|" * len(series)]
    for size in sizes:
        cells = [f"{median(line[size]):.3g} ({min(line[size]):.3g})" for line in series.values()]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
