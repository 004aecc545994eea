"""Writes docs/metrics.md from the catalogue of metrics; `--check` fails when the file is out of date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blockserve.common.metrics.catalogue import CATALOGUE, Metric
from blockserve.worker.batch_sizes import BOUNDS

TARGET = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
HEAD = """# Metrics

<!-- Made by scripts/metrics_docs.py from blockserve.common.metrics.catalogue: change that, then run the script. -->

`blockzoo serve` answers Prometheus at `http://127.0.0.1:7451/metrics`
([`metrics_listen`](configuration.md#metrics_listen), `off` for none). Everything is per process.

```yaml
scrape_configs:
  - job_name: blockzoo
    static_configs: [{targets: ["127.0.0.1:7451"]}]
```
"""
VLLM = """
## As vLLM names them

Types, units, label names and bucket borders are vLLM's, so dashboards and scalers made for it work. `model_name` is
the variant's name without its version. The three gauges are about the engine, which all variants share: they
have one series each, with the label that
[`metrics_model_name`](configuration.md#metrics_model_name) sets. vLLM's label `engine` is not there: a process
has one engine.
"""
OWN = """
## Our own

`segment` is a run of base blocks that the same loaded chains pass through. Segments are computed anew whenever
a chain comes or goes: one that is split ends, and its parts begin at zero.
"""
FOOT = """
Beside these stand `process_*`: memory, processor time, open files and start of the process.

## Labels cannot grow without bound

The first [`metrics_max_labels`](configuration.md#metrics_max_labels) variants that are used have series of their
own, the others share the label `other`; segments alike, and a segment that ends makes room. Names that callers make up never become labels: a
call counts for a variant once the variant is found. Reasons of errors are those of
`blockzoo.errors` and `blockserve.common.errors`.

## What to watch

| question | expression |
|---|---|
| Does it keep up? | `vllm:num_requests_waiting`, and `rate(blockzoo_requests_refused_total{reason="QUEUE_FULL"}[5m])` |
| Do tenants share batches? | `rate(blockzoo_segment_mixed_calls_total[5m]) / rate(blockzoo_segment_forward_calls_total[5m])` |
| How large are batches? | `rate(blockzoo_segment_batch_sequences_sum[5m]) / rate(blockzoo_segment_batch_sequences_count[5m])` |
| Time to the first token, 95th percentile | `histogram_quantile(0.95, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket[5m])))` |
| Is it stuck? | `blockzoo_engine_seconds_since_progress > 60 and vllm:num_requests_waiting > 0`; health says NOT_SERVING too |
"""


def render() -> str:
    """The whole page."""
    vllm = [metric for metric in CATALOGUE if metric.name.startswith("vllm:")]
    own = [metric for metric in CATALOGUE if metric not in vllm]
    sizes = ", ".join(map(str, BOUNDS))
    return "\n".join(
        [
            HEAD + VLLM,
            *_table(vllm),
            "",
            "Buckets, seconds:",
            "",
            *(f"- `{metric.name}`: {_borders(metric)}" for metric in vllm if metric.buckets),
            OWN,
            *_table(own),
            "",
            f"Buckets of the batch sizes: {sizes}.",
            FOOT,
        ]
    )


def _table(metrics: list[Metric]) -> list[str]:
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '-'} | {metric.meaning} |"
        for metric in metrics
    ]
    return ["| name | type | labels | meaning |", "|---|---|---|---|", *rows]


def _borders(metric: Metric) -> str:
    return ", ".join(f"{border:g}" for border in metric.buckets)


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        TARGET.write_text(render(), encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == render():
        return 0
    print(f"{TARGET.name} is out of date: run scripts/metrics_docs.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
