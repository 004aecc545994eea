"""Run the benchmarks and write `benchmarks/results/*.json`.

python benchmarks/run.py                  # all
python benchmarks/run.py --only start     # one; may be repeated
python benchmarks/run.py --show           # print what the committed results say
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from harness import RESULTS, Benchmark, CheckFailedError, read_rows, summarize, write

MODULES = {
    "one-pass": "one_pass",
    "delta-rest": "delta_rest",
    "deterministic": "deterministic",
    "memory": "memory",
    "paths": "paths",
    "placement": "placement",
    "placement-gap": "placement_gap",
    "register": "register",
    "ls-300": "ls",
    "register-300": "register_all",
    "start": "start",
    "client-import": "client_import",
    "hop": "hop",
    "split-2": "split",
    "shared-trunk": "shared_trunk",
    "failover-gap": "failover_gap",
    "router-rps": "router_rps",
    "kv-choice": "kv_choice",
    "adapt-p95": "adapt_p95",
    "many-variants": "many_variants",
    "text-flood": "text_flood",
    "logprobs-tax": "logprobs_tax",
    "busy-threads": "busy_threads",
    "sick-worker": "sick_worker",
    "quantised": "quantised",
}


def main() -> int:
    """Exit status 1 when a correctness check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=MODULES, help="run this one; may be repeated")
    parser.add_argument("--show", action="store_true", help="print the results there are")
    args = parser.parse_args()
    if args.show:
        for path in sorted(RESULTS.glob("*.json")):
            print(*(summarize(row) for row in read_rows(path)), sep="\n")
        return 0
    failed = 0
    for name in args.only or MODULES:
        benchmark: Benchmark = import_module(MODULES[name]).BENCHMARK
        print(f"{name}: {benchmark.title}; bar: {benchmark.bar}", flush=True)
        started = time.monotonic()
        try:
            rows = benchmark.run(lambda text: print(f"  {text}", flush=True))
        except CheckFailedError as error:
            print(f"  RED: {error}; nothing is reported", flush=True)
            failed += 1
            continue
        path = write(name, rows)
        for row in rows:
            print(f"  {summarize(row)}")
        print(f"  benchmarks/results/{path.name} ", end="")
        print(f"written after {time.monotonic() - started:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
