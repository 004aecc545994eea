"""Times the sampler: `python -m blockkernels.sampling.bench`.

The baseline sorts every row, filters as transformers' warpers do and calls `torch.multinomial`.
A speed-up is printed only after the kernel's tokens were found equal to the reference's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from blockkernels.sampling import SamplingBatch, sample, sample_reference

Settings = tuple[float, int, float, float]

CASES: dict[str, Settings] = {
    "temperature": (0.8, 0, 1.0, 0.0),
    "top-k 50": (0.8, 50, 1.0, 0.0),
    "top-p 0.9": (0.8, 0, 0.9, 0.0),
    "min-p 0.05": (0.8, 0, 1.0, 0.05),
    "all filters": (0.8, 50, 0.95, 0.05),
}


def make_batch(rows: int, settings: Settings) -> SamplingBatch:
    """A batch whose rows differ in their seed only."""
    temperature, top_k, top_p, min_p = settings
    return SamplingBatch(
        temperature=[temperature] * rows,
        top_k=[top_k] * rows,
        top_p=[top_p] * rows,
        min_p=[min_p] * rows,
        seed=list(range(rows)),
        choice=[0] * rows,
        position=[0] * rows,
    )


def sort_and_draw(logits: Tensor, settings: Settings) -> Tensor:
    """The baseline: every filter on fully sorted rows, one setting for the whole batch."""
    temperature, top_k, top_p, min_p = settings
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    ascending, ids = logits.sort(dim=-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[:, -1] = False
    logits = logits.masked_fill(removed.scatter(1, ids, removed), -torch.inf)
    share = logits.softmax(-1)
    share = share.masked_fill(share < min_p * share.amax(-1, keepdim=True), 0)
    return torch.multinomial(share, 1)[:, 0]


def is_correct(logits: Tensor, batch: SamplingBatch) -> bool:
    """Whether kernel and reference draw the same tokens from two of the rows."""
    expected = sample_reference(logits[:2].cpu(), make_batch(2, _settings(batch)))
    return torch.equal(sample(logits, batch)[:2].cpu(), expected)


def _settings(batch: SamplingBatch) -> Settings:
    return batch.temperature[0], batch.top_k[0], batch.top_p[0], batch.min_p[0]


def milliseconds(call: Callable[[], Tensor], repeats: int) -> float:
    """Median wall time of a call."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return 1000 * statistics.median(samples)


def main() -> int:
    """Print one line per case; the exit status is 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(args.rows, args.vocab, generator=generator)).to(args.device)
    failed = False
    for case, settings in CASES.items():
        batch = make_batch(args.rows, settings)
        if not is_correct(logits, batch):
            print(f"{case:12} WRONG: differs from the reference, no timing")  # noqa: T201
            failed = True
            continue
        ours = milliseconds(partial(sample, logits, batch), args.repeats)
        base = milliseconds(partial(sort_and_draw, logits, settings), args.repeats)
        print(f"{case:12} {ours:8.2f} ms   sort and draw {base:8.2f} ms   {base / ours:5.1f}x")  # noqa: T201
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
