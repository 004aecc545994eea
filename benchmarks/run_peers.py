"""Compare with peers and write `benchmarks/results/*.json`, one file a case, and the figures in docs.

python benchmarks/run_peers.py                    # all cases, about 20 minutes on two cores
python benchmarks/run_peers.py --only lora8-32    # one; may be repeated
python benchmarks/run_peers.py --quick            # does everything work? results go to .cache/bench/results
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

import figures
from environments import OPENMP_RUNTIMES
from harness import CACHE, RESULTS, RUNS, CheckFailedError, summarize, write
from peers import flat, lora, mixed, one_variant
from peers.tables import Case, Table
from peers.turns import Options

TABLES: tuple[Table[Any], ...] = (one_variant.TABLE, lora.TABLE, flat.TABLE, mixed.TABLE)


def main() -> int:
    """Exit status 1 when a correctness check failed."""
    cases = [case.id for table in TABLES for case in table.cases]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=cases, help="run this case; may be repeated")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"runs of each side (default {RUNS})")
    parser.add_argument("--quick", action="store_true", help="one run of few tokens, to see that it works")
    parser.add_argument(
        "--vllm-openmp",
        choices=OPENMP_RUNTIMES,
        default="intel",
        help="vLLM's OpenMP runtime (default intel)",
    )
    args = parser.parse_args()
    runs = 1 if args.quick else args.runs
    # Fewer runs than the committed results promise are for whoever tries something.
    folder = RESULTS if runs >= RUNS else CACHE / "bench" / "results"
    options = Options(runs, args.quick, lambda text: print(f"  {text}", flush=True), args.vllm_openmp)
    failed = sum(_measure(table, args.only or cases, options, folder) for table in TABLES)
    if folder == RESULTS:
        figures.write_all()
    return 1 if failed else 0


def _measure(table: Table[Any], chosen: list[str], options: Options, folder: Path) -> int:
    """Run the chosen cases of a table on the same processes; how many were red."""
    cases = [case for case in table.cases if case.id in chosen]
    if not cases:
        return 0
    print(f"{table.id}: starting {', '.join(case.id for case in cases)}", flush=True)
    try:
        with table.open(options, [case.id for case in cases]) as engines:
            return sum(not _run(case, engines, options, folder) for case in cases)
    except CheckFailedError as error:
        print(f"  RED: {error}; nothing is reported", flush=True)
        return len(cases)


def _run(case: Case[Any], engines: Any, options: Options, folder: Path) -> bool:
    """Run one case and write its result; False when a check was red."""
    print(f"{case.id}: {case.title}; bar: {case.bar}", flush=True)
    started = time.monotonic()
    try:
        rows = case.run(engines, options)
    except CheckFailedError as error:
        print(f"  RED: {error}; nothing is reported", flush=True)
        return False
    path = write(case.id, rows, folder)
    for row in rows:
        print(f"  {summarize(row)}")
    print(f"  {path.parent.name}/{path.name} written after {time.monotonic() - started:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
