"""How far greedy placement is from the best: small random cases beside every placement there is.

Chains of six positions, three workers with little memory; a placement may cut a chain once. From nothing, and
after one of the workers is lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product

from harness import Benchmark, Row, check

from blockserve.common.api.cluster import Assignment, Run, WorkerId
from blockserve.controller.placement.place import place
from blockserve.controller.placement.words import (
    PlacementConfig,
    PlacementPlan,
    PlacementProblem,
    WorkerCapacity,
)
from blockzoo.manifest import BlockId, ChainId, Link

CASES, POSITIONS = 1500, 6
CONFIG = PlacementConfig(most_replicas=1, overload=float("inf"))
Placed = Mapping[WorkerId, tuple[Assignment, ...]]


def made_up(chance: random.Random) -> PlacementProblem:
    """One to three variants of two bases, on one to three workers."""
    chains: dict[ChainId, tuple[Link, ...]] = {}
    for number in range(chance.randint(1, 3)):
        base, private, lora = chance.choice("ab"), chance.randrange(5), chance.random() < 0.3
        links = []
        for depth in range(POSITIONS):
            own = f".tuned{private}" if POSITIONS - 1 - private <= depth < POSITIONS - 1 else ""
            applied = (BlockId(f"lora{number}.{depth}"),) if lora and 0 < depth < POSITIONS - 1 else ()
            links.append(Link(BlockId(f"{base}{depth}{own}"), applied))
        chains[ChainId(f"c{number}")] = tuple(links)
    blocks = sorted(
        {block for links in chains.values() for one in links for block in (one.base, *one.applied)}
    )
    return PlacementProblem(
        chains,
        {block: chance.randint(1, 6) for block in blocks},
        {WorkerId(f"w{n}"): WorkerCapacity(chance.randint(10, 60)) for n in range(chance.randint(1, 3))},
        {chain: chance.choice([0.1, 1.0, 10.0]) for chain in chains},
    )


def every_placement(problem: PlacementProblem) -> Iterator[tuple[float, int]]:
    """Hops a request and bytes moved of each placement with one copy of each chain."""
    workers = sorted(problem.workers)
    whole = [[(worker, Run(0, POSITIONS))] for worker in workers]
    cut = [
        [(first, Run(0, place)), (second, Run(place, POSITIONS))]
        for first, second in product(workers, repeat=2)
        if first != second
        for place in range(2, POSITIONS - 1)
    ]
    total = sum(problem.traffic.values())
    for chosen in product([*whole, *cut], repeat=len(problem.chains)):
        held: dict[WorkerId, list[Assignment]] = {worker: [] for worker in workers}
        for chain, parts in zip(problem.chains, chosen, strict=True):
            for worker, run in parts:
                held[worker].append(Assignment(chain, run))
        placed = {worker: tuple(ones) for worker, ones in held.items()}
        if all(_bytes(problem, placed[worker]) <= problem.workers[worker].block_bytes for worker in workers):
            hops = sum(
                problem.traffic[chain] / total * (len(parts) - 1)
                for chain, parts in zip(problem.chains, chosen, strict=True)
            )
            yield hops, sum(_bytes(problem, placed[one], problem.present.get(one, ())) for one in workers)


def _bytes(
    problem: PlacementProblem, held: tuple[Assignment, ...], before: tuple[Assignment, ...] = ()
) -> int:
    def names(ones: tuple[Assignment, ...]) -> set[tuple[BlockId, BlockId | None]]:
        return {
            (link.base, applied)
            for one in ones
            for link in problem.chains[one.chain][one.run.first : one.run.end]
            for applied in (None, *link.applied)
        }

    return sum(problem.block_bytes[applied or base] for base, applied in names(held) - names(before))


def run(say: Callable[[str], None]) -> list[Row]:
    """The gaps of all cases."""
    chance = random.Random(1)
    gaps: dict[str, list[tuple[float, float]]] = {"scratch": [], "loss": []}
    left_out = {"scratch": 0, "loss": 0}
    for _ in range(CASES):
        problem = made_up(chance)
        plan = place(problem, CONFIG)
        _compare(problem, plan, "scratch", gaps, left_out)
        if len(problem.workers) > 1:
            lost = chance.choice(sorted(problem.workers))
            rest = {worker: one for worker, one in problem.workers.items() if worker != lost}
            present: Placed = {worker: plan.workers[worker] for worker in rest}
            after = replace(problem, workers=rest, present=present)
            _compare(after, place(after, CONFIG), "loss", gaps, left_out)
    say(f"compared: {', '.join(f'{len(found)} {kind}' for kind, found in gaps.items())}")
    rows = []
    for kind, found in gaps.items():
        what = "from nothing" if kind == "scratch" else "after a loss"
        fewest = sum(gap <= 1e-9 for gap, _ in found) / len(found)
        missed = left_out[kind] / (len(found) + left_out[kind])
        case = (
            f"{len(found)} small cases {what}; {fewest:.1%} have the fewest hops; of all cases that fit "
            f"{missed:.1%} were left out"
        )
        for name, unit, samples in (
            ("hops", "1 + hops a request over the fewest", [1 + gap for gap, _ in found]),
            ("bytes", "bytes moved over the least with no more hops", [ratio for _, ratio in found]),
        ):
            command = "python benchmarks/run.py --only placement-gap"
            rows.append(Row(f"gap-{name}-{kind}", case, unit, command, samples, None, None))
    return rows


def _compare(
    problem: PlacementProblem,
    plan: PlacementPlan,
    kind: str,
    gaps: dict[str, list[tuple[float, float]]],
    left_out: dict[str, int],
) -> None:
    found = list(every_placement(problem))
    if not found:
        return
    if plan.report.left_out:
        left_out[kind] += 1
        return
    others = [moved for hops, moved in found if hops <= plan.report.mean_hops + 1e-9]
    least = min(others, default=plan.report.moved_bytes)
    check(least > 0 or plan.report.moved_bytes == 0, "bytes moved where none had to")
    ratio = plan.report.moved_bytes / least if least else 1.0
    gaps[kind].append((round(plan.report.mean_hops - min(hops for hops, _ in found), 6), round(ratio, 4)))


BENCHMARK = Benchmark(
    "placement-gap",
    "greedy placement over the best one on small cases",
    "at most one hop a request and twice the bytes",
    run,
)
