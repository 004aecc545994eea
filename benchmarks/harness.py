"""What the benchmarks share: samples, interleaved runs, result files.

A result file holds raw samples only; medians and ratios are computed from them by whoever reads them, as
`summarize` does. A benchmark checks its own correctness first and raises `CheckFailedError`: no file is
written then and no ratio printed.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / ".cache"
RUNS = 5


class CheckFailedError(Exception):
    """What was measured does not compute the right thing, so its speed or size means nothing."""


@dataclass(frozen=True, slots=True)
class Row:
    """One case of a benchmark.

    Attributes:
        id: stable identifier of the case.
        case: what was done, in words.
        unit: of every sample.
        command: how to repeat it.
        ours: raw samples, in the order they were taken.
        peer: raw samples of what it is compared with, taken between ours; None without a peer.
        peer_name: what the peer is.
    """

    id: str
    case: str
    unit: str
    command: str
    ours: list[float]
    peer: list[float] | None
    peer_name: str | None

    def __post_init__(self) -> None:
        """Refuse a row that cannot be read."""
        if not self.ours or (self.peer is not None and not self.peer):
            raise ValueError(f"{self.id}: a row needs samples")
        if (self.peer is None) != (self.peer_name is None):
            raise ValueError(f"{self.id}: peer and peer_name go together")

    @property
    def ratio(self) -> float | None:
        """Median of ours over the peer's median."""
        return median(self.ours) / median(self.peer) if self.peer else None

    @property
    def round_ratio(self) -> float | None:
        """Median of the ratios of each round, for samples that were taken side by side.

        What slows the machine down for a while slows both samples of a round, and cancels.
        """
        if not self.peer:
            return None
        return median(mine / theirs for mine, theirs in zip(self.ours, self.peer, strict=True))


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One bar.

    Attributes:
        id: its id in `make bench` and the name of its result file.
        title: what is measured.
        bar: what the result should be, in words.
        run: measures; told where to say what it is doing.
    """

    id: str
    title: str
    bar: str
    run: Callable[[Callable[[str], None]], list[Row]]


def check(holds: bool, what: str) -> None:
    """Raise unless a correctness check holds.

    Raises:
        CheckFailedError: it does not.
    """
    if not holds:
        raise CheckFailedError(what)


def interleave(
    *measures: Callable[[], float], runs: int = RUNS, say: Callable[[str], None] = lambda _: None
) -> list[list[float]]:
    """Take samples in turns (a b a b ...), so that what drifts on the machine drifts for all.

    Returns:
        One list of `runs` samples for each measure.
    """
    samples: list[list[float]] = [[] for _ in measures]
    for number in range(runs):
        for measure, taken in zip(measures, samples, strict=True):
            taken.append(measure())
        say(f"run {number + 1}/{runs}: " + ", ".join(f"{taken[-1]:.4g}" for taken in samples))
    return samples


def result(benchmark: str, rows: Sequence[Row]) -> dict[str, Any]:
    """A result as it is written."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "commit": commit(),
        "rows": [asdict(row) for row in rows],
    }


def write(benchmark: str, rows: Sequence[Row], folder: Path = RESULTS) -> Path:
    """Write a result file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result(benchmark, rows), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def read_rows(path: Path) -> list[Row]:
    """The rows of a result file."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` percent of the samples lie, interpolated between neighbours.

    The 50th is the median.
    """
    ordered = sorted(samples)
    place = (len(ordered) - 1) * share / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(row: Row) -> str:
    """A row in one line: medians, the tail where there are samples for it, and the ratio to a peer."""
    text = f"{row.id}: {_middle_and_tail(row.ours)} {row.unit} (median of {len(row.ours)})"
    if row.peer is not None:
        text += f"; {row.peer_name}: {_middle_and_tail(row.peer)}; ratio {row.ratio:.3f}"
    return text


def _middle_and_tail(samples: Sequence[float]) -> str:
    """The median; with twenty samples or more the 95th and 99th percentile too."""
    text = f"{median(samples):.4g}"
    if len(samples) < 20:
        return text
    return text + f" (p95 {percentile(samples, 95):.4g}, p99 {percentile(samples, 99):.4g})"


def machine() -> str:
    """The machine in words: processor, cores, memory, system, load."""
    names = _processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    bf16 = "avx512_bf16" if has_bf16() else "no avx512_bf16"
    return (
        f"{names.get('model name', platform.machine())}, {os.cpu_count()} cores, {bf16}, {memory:.0f} GB, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"load before {os.getloadavg()[0]:.1f}"
    )


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16; others take several times as long for it."""
    return "avx512_bf16" in _processor().get("flags", "").split()


def _processor() -> dict[str, str]:
    """What /proc/cpuinfo says of the last core."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in fields}


def commit() -> str:
    """The commit that was measured, with `-dirty` when files differ from it; results may."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
