"""Choosing the workers of a request: the path with the least expected finish time. Pure, no I/O.

The seconds of a path are, over its spans: the backlog of the worker, the span's links in every decode pass
and for every prompt token that is not cached, and a hop to the next worker; and the way back of each sampled
token from the tail to the head when they differ. Which replica starts a span also costs a little by a hash of
worker and base block (`CostModel.meeting_share`), so that variants of one base meet. docs/placement.md has
the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from blockserve.common.api.cluster import Run, WorkerId
from blockserve.common.errors import NoPathError
from blockserve.router.paths.costs import Floats, RequestSize
from blockserve.router.paths.index import Candidates, PathIndex
from blockserve.router.paths.program import PathCosts, cheapest
from blockzoo.manifest import ChainId, Link


@dataclass(frozen=True, slots=True)
class PathSpan:
    """Links of a chain that one worker runs for a request."""

    worker: WorkerId
    run: Run


@dataclass(frozen=True, slots=True)
class Path:
    """Spans in order; together they cover the chain.

    Attributes:
        spans: no worker comes twice.
        seconds: the estimate that was minimised.
    """

    spans: tuple[PathSpan, ...]
    seconds: float


def assemble(
    index: PathIndex,
    chain: ChainId,
    links: Sequence[Link],
    size: RequestSize,
    exclude: Set[WorkerId] = frozenset(),
    *,
    idle: bool = False,
) -> Path:
    """The path with the least expected finish time.

    Args:
        index: the cluster as the router sees it. Tell `index.assigned` of the path if it is taken.
        chain: names the chain.
        links: of the chain.
        size: of the request.
        exclude: workers that must not be used, for example because they have just failed.
        idle: reckon as though no worker had anything else to do.

    Raises:
        NoPathError: the usable workers do not hold all positions, or only by visiting one twice.
    """
    candidates = index.candidates(chain, links)
    barred = [index.ids[number] in exclude for number in candidates.workers] if exclude else []
    held = candidates.held & ~np.array(barred, dtype=bool)[None, :] if barred else candidates.held
    if barred or not candidates.is_covered:
        _check_covered(chain, candidates, held)
    best: tuple[float, list[int]] | None = None
    for tokens, usable in _savings(index, candidates, held, size):
        found = cheapest(_costs(index, candidates, usable, size, size.prompt_tokens - tokens, idle=idle))
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    if best is None:
        raise NoPathError(
            "every position of the chain is held, but only a path that returns to a worker would cover it",
            hint="place neighbouring positions together, or a whole copy on one worker",
            chain=chain,
        )
    return Path(_spans(index, candidates, best[1]), best[0])


def _savings(
    index: PathIndex, candidates: Candidates, held: npt.NDArray[np.bool_], size: RequestSize
) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Leading prompt tokens that a path may save, most first, and who holds what and has so many of them."""
    if size.cached_tokens:
        cached = _cached(index, candidates, size)
        for tokens in sorted({*cached.tolist()} - {0}, reverse=True):
            usable = held & (cached >= tokens)[None, :]
            if usable.any(axis=1).all():
                yield tokens, usable
    yield 0, held


def _check_covered(chain: ChainId, candidates: Candidates, held: npt.NDArray[np.bool_]) -> None:
    missing = [
        Run(*pair)
        for pair, column in zip(pairwise(candidates.borders), held, strict=True)
        if not column.any()
    ]
    if missing:
        places = ", ".join(f"{run.first} to {run.end - 1}" for run in missing)
        raise NoPathError(
            f"no usable worker holds positions {places} of the chain",
            hint="try again when the controller has placed them, or start more workers",
            chain=chain,
            positions=places,
        )


def _cached(index: PathIndex, candidates: Candidates, size: RequestSize) -> npt.NDArray[np.int64]:
    """Prompt tokens that need not be computed at each candidate; the last one always is."""
    known = [size.cached_tokens.get(index.ids[number], 0) for number in candidates.workers]
    return np.clip(np.array(known, dtype=np.int64), 0, max(size.prompt_tokens - 1, 0))


def _costs(
    index: PathIndex,
    candidates: Candidates,
    held: npt.NDArray[np.bool_],
    size: RequestSize,
    prefill_tokens: int,
    *,
    idle: bool,
) -> PathCosts:
    model, costs, workers = index.model, index.costs, candidates.workers
    prefill = costs.prefill[workers]
    crowd, backlog = (np.zeros(len(workers)),) * 2 if idle else _busy(index, workers)
    step = costs.step[workers] * (1 + costs.crowding[workers] * crowd)
    link = size.output_tokens * step + prefill_tokens * prefill
    lengths = candidates.lengths
    bare = candidates.borders[-1] * (
        size.output_tokens * costs.typical_step + size.prompt_tokens * costs.typical_prefill
    )
    messages, rows = size.output_tokens + 1, size.output_tokens + prefill_tokens
    if len(lengths) == 1:  # nowhere to change workers
        hop = np.zeros((len(workers), len(workers)))
    else:
        pairs = np.ix_(workers, workers)
        hop = messages * index.latency[pairs] + rows * index.row[pairs]
    return PathCosts(
        start=backlog[None, :] + model.meeting_share * bare * candidates.liking,
        run=np.where(held, lengths[:, None] * link[None, :], np.inf),
        hop=hop,
        back=size.output_tokens * model.hop_seconds,
    )


def _busy(index: PathIndex, workers: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Requests at each of these workers, and seconds until what waits there is computed."""
    costs, assigned = index.costs, index.assigned
    crowd, backlog = costs.crowd[workers], costs.backlog[workers]
    if assigned.is_empty:
        return crowd, backlog
    ids = [index.ids[number] for number in workers]
    crowd = np.array([assigned.crowd(worker, known) for worker, known in zip(ids, crowd, strict=True)])
    tokens = np.array([assigned.link_tokens.get(worker, 0) for worker in ids], dtype=float)
    return crowd, backlog + costs.prefill[workers] * tokens


def _spans(index: PathIndex, candidates: Candidates, chosen: list[int]) -> tuple[PathSpan, ...]:
    spans: list[PathSpan] = []
    first = 0
    for number, worker in enumerate(chosen):
        if number + 1 == len(chosen) or chosen[number + 1] != worker:
            name = index.ids[candidates.workers[worker]]
            spans.append(PathSpan(name, Run(candidates.borders[first], candidates.borders[number + 1])))
            first = number + 1
    return tuple(spans)
