"""Figures and tables in docs from the committed results: `python benchmarks/figures.py`.

Nothing is typed by hand: docs/benchmarks.md holds markers, and between them goes what the result files say.
The figures are plain SVG whose colours follow the reader's light or dark scheme.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

import growth
from harness import RESULTS, ROOT, Row, percentile, read_rows

DOCS = ROOT / "docs"
PAGE = DOCS / "benchmarks.md"
BEGIN, END = "<!-- made by benchmarks/figures.py -->", "<!-- end -->"
PLACEMENT_LINES = {"scratch": "from nothing", "loss": "after a loss", "same": "nothing changed"}
WIDTH, LABEL, BAR, GAP, TOP = 720, 150, 16, 14, 34

STYLE = """
text{font:13px system-ui,sans-serif;fill:#24292f}.small{font-size:11px;fill:#57606a}
.ours{fill:#0969da}.peer{fill:#afb8c1}.sample{fill:#24292f;fill-opacity:.55}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}
.ours{fill:#4493f8}.peer{fill:#59636e}.sample{fill:#e6edf3;fill-opacity:.6}}
""".strip()


@dataclass(frozen=True, slots=True)
class Figure:
    """Rows that are drawn together.

    Attributes:
        id: name of the SVG under docs/figures.
        title: above it.
        rows: (result file, row id) pairs; those without a result are left out.
    """

    id: str
    title: str
    rows: Sequence[tuple[str, str]]


def _same(*cases: str) -> list[tuple[str, str]]:
    return [(case, case) for case in cases]


FIGURES = (
    Figure(
        "one-variant",
        "One variant: output tokens per second (more is better)",
        _same("single-1", "single-8", "single-32"),
    ),
    Figure(
        "lora", "LoRA: output tokens per second (more is better)", _same("lora8-8", "lora8-32", "lora-tax")
    ),
    Figure(
        "prefix",
        "A prompt whose first 512 tokens are known: seconds to first token (less is better)",
        [("prefix", "prefix"), ("prefix", "prefix-vllm"), ("prefix", "prefix-first")],
    ),
    Figure("flat", "256 variants against 8: output tokens per second (more is better)", _same("flat-n")),
    Figure(
        "mixed", "Kinds mixed in one batch: output tokens per second (more is better)", _same("mixed-kinds")
    ),
)


def write_all(results: Path = RESULTS, docs: Path = DOCS) -> list[Path]:
    """Write every figure that has results, and the tables of docs/benchmarks.md; what was written."""
    written = []
    tables = []
    for figure in FIGURES:
        rows = _rows(figure, results)
        if not rows:
            continue
        path = docs / "figures" / f"{figure.id}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(svg(figure.title, rows), encoding="utf-8")
        written.append(path)
        tables.append(f"![{figure.title}](figures/{figure.id}.svg)\n\n{table(_all_rows(figure, results))}")
    page = docs / PAGE.name
    _fill(page, "\n\n".join(tables) or "No results are committed yet.")
    return [*written, page, *_growth(results, docs)]


def _fill(page: Path, body: str) -> None:
    """Put a text between a page's markers."""
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def _growth(results: Path, docs: Path) -> list[Path]:
    """The figure and the table of docs/placement.md."""
    rows, page = _read(results, "placement"), docs / "placement.md"
    if not rows or not page.exists():
        return []
    series: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        _, kind, workers = row.id.split("-")
        series.setdefault(PLACEMENT_LINES[kind], {})[int(workers)] = row.ours
    title, axis = "Seconds to place 10 variants and 100 blocks a worker", "workers"
    path = docs / "figures" / "placement.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(growth.svg(title, axis, series), encoding="utf-8")
    last = rows[-1].case.partition(": ")[2]
    _fill(page, f"![{title}](figures/placement.svg)\n\n{growth.table(axis, series)}\n\nThe largest: {last}.")
    return [path, page]


def _rows(figure: Figure, results: Path) -> list[Row]:
    found = {
        (file, row.id): row for file in {file for file, _ in figure.rows} for row in _read(results, file)
    }
    return [found[key] for key in figure.rows if key in found]


def _all_rows(figure: Figure, results: Path) -> list[Row]:
    """What the table beside a figure shows: latencies too."""
    files = dict.fromkeys(file for file, _ in figure.rows)
    return [row for file in files for row in _read(results, file)]


def _read(results: Path, file: str) -> list[Row]:
    path = results / f"{file}.json"
    return read_rows(path) if path.exists() else []


def svg(title: str, rows: Sequence[Row]) -> str:
    """Horizontal bars: the median of ours and of the peer, with every sample as a dot."""
    most = max(max((*row.ours, *(row.peer or ()))) for row in rows)
    scale = (WIDTH - LABEL - 90) / most
    parts = []
    y = TOP
    for row in rows:
        parts.append(_text(0, y + BAR - 3, row.id))
        for name, samples, kind in (("blockzoo", row.ours, "ours"), (row.peer_name, row.peer, "peer")):
            if samples is None:
                continue
            width = median(samples) * scale
            parts.append(
                f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"/>'
            )
            parts += [
                f'<circle class="sample" cx="{LABEL + sample * scale:.1f}" cy="{y + BAR / 2}" r="2"/>'
                for sample in samples
            ]
            end = LABEL + max(width, max(samples) * scale) + 8
            parts.append(_text(end, y + BAR - 4, f"{median(samples):.3g}", "small"))
            parts.append(_text(LABEL, y + BAR + 11, str(name), "small"))
            y += BAR + GAP
        y += GAP
    body = "\n".join([_text(0, 16, title), *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        f'role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y}">{escape(text)}</text>'


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table: median, p95 and p99 of both, and the ratio of the medians."""
    lines = [
        "| id | unit | ours p50 / p95 / p99 | peer p50 / p95 / p99 | ratio | peer |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs = "" if row.peer is None else _percentiles(row.peer, row.unit)
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        name = row.peer_name or ""
        lines.append(
            f"| {row.id} | {row.unit} | {_percentiles(row.ours, row.unit)} | {theirs} | {ratio} | {name} |"
        )
    cases = [
        f"- `{row.id}`: {row.case}."
        for row in rows
        if row.id == row.id.removesuffix("-transformers") and (row.unit == "tokens/s" or row.id == "prefix")
    ]
    return "\n".join([*lines, "", *cases])


def _percentiles(samples: Sequence[float], unit: str) -> str:
    """Percentiles of times; of anything else the median alone says it."""
    shares = (50, 95, 99) if unit == "s" else (50,)
    return " / ".join(f"{percentile(samples, share):.4g}" for share in shares)


if __name__ == "__main__":
    for one in write_all():
        print(one.relative_to(ROOT))
