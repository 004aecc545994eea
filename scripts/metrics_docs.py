"""Write the tables of docs/metrics.md from the catalogue of metrics."""

from __future__ import annotations

import sys
from pathlib import Path

from blockserve.common.metrics.catalogue import CATALOGUE, Metric
from blockserve.common.metrics.cluster_catalogue import CONTROLLER, PATH_BOUNDS, ROUTER, WORKER
from blockserve.worker.compute.counters import BOUNDS

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
MARK = "<!-- what follows is made by `make docs` -->"


def render() -> str:
    """What stands below the mark."""
    vllm = [metric for metric in CATALOGUE if metric.name.startswith("vllm:")]
    own = [metric for metric in CATALOGUE if metric not in vllm]
    return "\n".join(
        [
            "",
            "### As vLLM names them",
            "",
            *_table(vllm),
            "",
            "Buckets, seconds:",
            "",
            *(f"- `{metric.name}`: {_borders(metric.buckets)}" for metric in vllm if metric.buckets),
            "",
            "### Our own",
            "",
            *_table(own),
            "",
            f"Buckets of the batch sizes: {_borders(BOUNDS)}.",
            "",
            "### Of the processes of a cluster",
            "",
            *_cluster_table(),
            "",
            f"Buckets of path lengths: {_borders(PATH_BOUNDS)}.",
        ]
    )


def _cluster_table() -> list[str]:
    processes = {"router": ROUTER, "worker": WORKER, "controller": CONTROLLER}
    rows = [
        f"| `{metric.name}` | {', '.join(name for name, shown in processes.items() if metric in shown)} "
        f"| {metric.kind} | {', '.join(metric.labels) or '-'} | {metric.meaning} |"
        for metric in dict.fromkeys((*ROUTER, *WORKER, *CONTROLLER))
    ]
    return ["| name | of | type | labels | meaning |", "|---|---|---|---|---|", *rows]


def _table(metrics: list[Metric]) -> list[str]:
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '-'} | {metric.meaning} |"
        for metric in metrics
    ]
    return ["| name | type | labels | meaning |", "|---|---|---|---|", *rows]


def _borders(borders: tuple[float, ...]) -> str:
    return ", ".join(f"{border:g}" for border in borders)


def main() -> int:
    """Replace what stands after the mark."""
    written, mark, _ = DOCUMENT.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        print(f"{DOCUMENT} lacks the line {MARK}", file=sys.stderr)
        return 1
    DOCUMENT.write_text(f"{written}{MARK}\n{render()}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
