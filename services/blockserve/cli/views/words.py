"""One name for one thing: how the screens call the parts of a chain."""

from __future__ import annotations

from collections.abc import Iterable


def describe_run(first: int, num_blocks: int, last: int) -> str:
    """Consecutive positions of a chain, layers numbered as in the checkpoint: embedding, layers 0-21, head.

    Args:
        first: position of the first block; 0 is the embedding.
        num_blocks: how many there are.
        last: position of the chain's head.
    """
    end = first + num_blocks - 1
    parts = ["embedding"] if first == 0 else []
    low, high = max(first, 1), min(end, last - 1)
    if low <= high:
        parts.append(f"layer {low - 1}" if low == high else f"layers {low - 1}-{high - 1}")
    if end >= last > 0:
        parts.append("head")
    return ", ".join(parts)


def describe_cover(runs: Iterable[tuple[int, int]], last: int) -> str:
    """What runs (first position, number of blocks) hold between them, overlaps once; "-" for nothing."""
    joined: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if joined and first <= sum(joined[-1]):
            begin, known = joined[-1]
            joined[-1] = begin, max(known, first + count - begin)
        else:
            joined.append((first, count))
    return ", ".join(describe_run(first, count, last) for first, count in joined) or "-"


def last_position(runs: Iterable[tuple[int, int]]) -> int:
    """Position of the head, as far as runs tell: whoever holds a chain holds its end as well."""
    return max((first + count - 1 for first, count in runs), default=0)
