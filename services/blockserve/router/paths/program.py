"""The dynamic program behind `blockserve.router.paths.assemble`: the candidate for each interval of a chain.

It goes over the intervals between borders and knows only the worker it is at, so it might come back to one it
has left, which a request must not. Only then it runs again and remembers whether it has visited that worker
(decremental state space relaxation: Righini and Salani, 2008), until no worker comes twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from blockserve.router.paths.costs import Floats

_MOST_REMEMBERED = 8
_MANY, _FEW = 48, 12
"""Of more than `_MANY` candidates the `_FEW` cheapest for each interval are looked at."""


@dataclass(frozen=True, slots=True)
class PathCosts:
    """Seconds of one request; infinite is what cannot be.

    Attributes:
        start: a span that begins at an interval, [intervals, workers].
        run: an interval; infinite where it is not held, [intervals, workers].
        hop: from a span to the next, [from, to].
        back: every sampled token's way from the tail to the head, when they differ.
    """

    start: Floats
    run: Floats
    hop: Floats
    back: float


def cheapest(costs: PathCosts) -> tuple[float, list[int]] | None:
    """The least seconds and each interval's candidate, or None when a worker would have to come twice.

    Of many candidates only the most promising are looked at, unless there is no path with them.
    """
    if costs.run.shape[1] > _MANY:
        few = _promising(costs)
        pairs = np.ix_(few, few)
        found = _cheapest(PathCosts(costs.start[:, few], costs.run[:, few], costs.hop[pairs], costs.back))
        if found is not None:
            return found[0], [int(few[worker]) for worker in found[1]]
    return _cheapest(costs)


def _promising(costs: PathCosts) -> npt.NDArray[np.int64]:
    """The cheapest for all, and for each interval, hops left aside; ascending."""
    alone = costs.start[0] + costs.run.sum(axis=0)
    rows = np.concatenate([alone[None, :], costs.start + costs.run])
    return np.unique(np.argsort(rows, axis=1, kind="stable")[:, :_FEW])


def _cheapest(costs: PathCosts) -> tuple[float, list[int]] | None:
    alone = costs.start[0] + costs.run.sum(axis=0)
    single = int(alone.argmin())
    best = (float(alone[single]), [single] * len(costs.run)) if alone[single] < np.inf else None
    if len(costs.run) == 1:
        return best  # nowhere to change workers
    remembered: list[int] = []
    run = costs.run
    while True:
        seconds, chosen = _program(costs.start, run, costs.hop, remembered)
        if seconds == np.inf:
            return best
        again = _comes_twice(chosen)
        if again is None:
            spread = len(set(chosen)) > 1
            seconds += costs.back if spread else 0.0
            return (seconds, chosen) if best is None or seconds < best[0] else best
        if len(remembered) < _MOST_REMEMBERED:
            remembered.append(again)
        else:  # Beyond this the best path is given up for a good one: the worker serves none of its spans.
            run = run.copy()
            run[:, again] = np.inf


def _program(start: Floats, run: Floats, hop: Floats, remembered: list[int]) -> tuple[float, list[int]]:
    """The cheapest candidate for each interval when only `remembered` candidates must not come twice.

    State: the candidate of the last interval, and a bit for each remembered one that was visited.
    """
    intervals, workers = run.shape
    masks = 1 << len(remembered)
    bit = {worker: 1 << number for number, worker in enumerate(remembered)}
    plain = np.ones(workers, dtype=bool)
    plain[remembered] = False
    seconds = np.full((masks, workers), np.inf)
    seconds[0, plain] = (start[0] + run[0])[plain]
    for worker, own in bit.items():
        seconds[own, worker] = start[0, worker] + run[0, worker]
    came_from: list[npt.NDArray[np.int64]] = []
    every = np.arange(workers)
    for interval in range(1, intervals):
        after = seconds.copy()  # those who stay
        origin = np.arange(masks * workers).reshape(masks, workers)
        for mask in range(masks):
            if not np.isfinite(seconds[mask]).any():
                continue
            through = seconds[mask][:, None] + hop  # [from, to]
            through[every, every] = np.inf
            sources = through.argmin(axis=0)
            entering = through[sources, every] + start[interval]
            better = plain & (entering < after[mask])
            after[mask, better] = entering[better]
            origin[mask, better] = mask * workers + sources[better]
            for worker, own in bit.items():
                if not mask & own and entering[worker] < after[mask | own, worker]:
                    after[mask | own, worker] = entering[worker]
                    origin[mask | own, worker] = mask * workers + sources[worker]
        seconds = after + run[interval][None, :]
        came_from.append(origin)
    state = int(seconds.argmin())
    total = float(seconds.flat[state])
    chosen = [state % workers]
    for origin in reversed(came_from):
        state = int(origin.flat[state])
        chosen.append(state % workers)
    return total, chosen[::-1]


def _comes_twice(chosen: list[int]) -> int | None:
    left: set[int] = set()
    for before, worker in pairwise(chosen):
        if worker != before:
            left.add(before)
            if worker in left:
                return worker
    return None
