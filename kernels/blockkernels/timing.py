"""How the operations' benches measure: interleaved, with a check before any figure.

Every ``bench.py`` builds a list of `Case` and calls `main`. A case whose check
fails prints no time, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """Two ways of computing the same thing.

    Attributes:
        name: what is computed, with its sizes.
        ours: the operation as the engine calls it.
        peer: the alternative.
        peer_name: what the alternative is.
        is_correct: whether ours agrees with the reference.
    """

    name: str
    ours: Call
    peer: Call
    peer_name: str
    is_correct: Callable[[], bool]


def milliseconds(call: Call) -> float:
    """Wall time of one call, the device's work included."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Whether the largest difference is within `tolerance` of the largest value."""
    return bool((got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max())


def main(title: str, make_cases: Callable[[], Sequence[Case]]) -> int:
    """Time the cases, print a line each, write raw samples with ``--out``; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--repeats", type=int, default=15, help="interleaved runs of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="file for the raw samples, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    failed = False
    for case in make_cases():
        if not case.is_correct():
            print(f"{case.name:34} WRONG: differs from the reference, no timing")  # noqa: T201
            failed = True
            continue
        ours, peer = _interleave(case, args.repeats)
        ratio = statistics.median(peer) / statistics.median(ours)
        print(  # noqa: T201
            f"{case.name:34} {statistics.median(ours):8.3f} ms   {case.peer_name:28} "
            f"{statistics.median(peer):8.3f} ms   {ratio:5.2f}x"
        )
        rows.append(
            {
                "id": title,
                "case": case.name,
                "unit": "ms",
                "command": f"threads={args.threads}",
                "ours": ours,
                "peer": peer,
                "peer_name": case.peer_name,
            }
        )
    if args.out is not None and not failed:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(failed)


def _interleave(case: Case, repeats: int) -> tuple[list[float], list[float]]:
    for call in (case.ours, case.peer):
        call()  # the first call makes plans and takes memory
    ours: list[float] = []
    peer: list[float] = []
    for _ in range(repeats):
        ours.append(milliseconds(case.ours))
        peer.append(milliseconds(case.peer))
    return ours, peer
