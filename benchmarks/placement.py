"""How long placement takes: a made-up zoo of many variants on many workers.

Twenty bases of 34 blocks, one of them larger than a worker; a fifth of the variants are LoRA (an adapter on
each of the 32 layers), the others are tuned (private layers at the top). Traffic follows Zipf's law.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

from harness import RUNS, Benchmark, Row, check

from blockserve.common.api.cluster import WorkerId
from blockserve.controller.placement.place import Placer
from blockserve.controller.placement.words import PlacementPlan, PlacementProblem, WorkerCapacity
from blockzoo.manifest import BlockId, ChainId, Link

WORKERS = (125, 250, 500, 1000)
BLOCKS_PER_WORKER, VARIANTS_PER_WORKER = 100, 10
BASES, LAYERS = 20, 32
MEGABYTE = 10**6
MEMORY = 80_000 * MEGABYTE
LAYER_BYTES = [(100, 200, 400, 800)[number % 4] * MEGABYTE for number in range(BASES - 1)] + [
    3_400 * MEGABYTE
]
"""Of each base; 32 layers of the last are more than a worker's memory."""
COMMAND = "python benchmarks/run.py --only placement"


def made_up(workers: int, seed: int = 0) -> PlacementProblem:
    """A zoo of 100 blocks and 10 variants a worker, and their traffic; nothing is placed yet."""
    chance = random.Random(seed)
    sizes: dict[BlockId, int] = {}

    def block(num_bytes: int) -> BlockId:
        name = BlockId(f"{len(sizes):064x}")
        sizes[name] = num_bytes
        return name

    bases = [
        [Link(block(2 * size if depth in (0, LAYERS + 1) else size)) for depth in range(LAYERS + 2)]
        for size in LAYER_BYTES
    ]
    chains = [tuple(base) for base in bases]
    adapters, tuned = 2 * workers, (VARIANTS_PER_WORKER - 2) * workers - BASES
    for number in range(adapters):
        base = number % BASES
        size = LAYER_BYTES[base] // 100
        chains.append(
            tuple(
                Link(link.base, (block(size),) if 0 < depth <= LAYERS else ())
                for depth, link in enumerate(bases[base])
            )
        )
    left = BLOCKS_PER_WORKER * workers - len(sizes)
    for number in range(tuned):
        base = number % BASES
        private = left // (tuned - number)
        left -= private
        top = [Link(block(LAYER_BYTES[base])) for _ in range(private)]
        chains.append((*bases[base][: LAYERS + 1 - private], *top, bases[base][-1]))
    ids = [ChainId(f"{number:064x}") for number in range(len(chains))]
    ranks = chance.sample(range(1, len(ids) + 1), len(ids))
    return PlacementProblem(
        chains=dict(zip(ids, chains, strict=True)),
        block_bytes=sizes,
        workers={WorkerId(f"w{n:04}"): WorkerCapacity(MEMORY, host=f"h{n // 8}") for n in range(workers)},
        traffic={chain: 1000 / rank for chain, rank in zip(ids, ranks, strict=True)},
    )


def run(say: Callable[[str], None]) -> list[Row]:
    """Times from scratch, after losses one after the other, and when nothing has changed."""
    rows = []
    for workers in WORKERS:
        problem = made_up(workers)
        scratch, loss, same = [], [], []
        notes = ""
        for number in range(RUNS):
            placer = Placer()
            seconds, plan = _timed(placer, problem)
            scratch.append(seconds)
            _check(problem, plan)
            placed = replace(problem, present=plan.workers)
            seconds, again = _timed(placer, placed)
            same.append(seconds)
            check(again.workers == plan.workers, "placing again changed the placement")
            check(again.report.moved_bytes == 0, "placing again moved bytes")
            lost = sorted(plan.workers, key=lambda worker: -len(plan.workers[worker]))[number]
            rest = {worker: one for worker, one in problem.workers.items() if worker != lost}
            seconds, after = _timed(placer, replace(placed, workers=rest))
            loss.append(seconds)
            _check(replace(problem, workers=rest), after)
            for worker in rest:
                check(set(plan.workers[worker]) <= set(after.workers[worker]), "a loss moved something else")
            notes = notes or (
                f"{len(problem.chains)} variants, {len(problem.block_bytes)} blocks, Zipf traffic; "
                f"{plan.report.mean_hops:.4f} hops a request, {plan.report.held_bytes / 1e12:.1f} TB placed "
                f"of {sum(problem.block_bytes.values()) / 1e12:.1f} TB distinct; the loss of a worker with "
                f"{len(plan.workers[lost])} runs moves {after.report.moved_bytes / 1e9:.0f} GB"
            )
            took = f"scratch {scratch[-1]:.2f} s, same {same[-1]:.3f} s, loss {loss[-1]:.3f} s"
            say(f"{workers} workers: {took}")
        for kind, what, samples in (
            ("scratch", "from nothing", scratch),
            ("loss", "after the loss of one of the five workers with the most runs", loss),
            ("same", "with nothing changed", same),
        ):
            case = f"placement on {workers} workers {what}: {notes}"
            rows.append(Row(f"placement-{kind}-{workers}", case, "s", COMMAND, samples, None, None))
    return rows


def _timed(placer: Placer, problem: PlacementProblem) -> tuple[float, PlacementPlan]:
    started = time.perf_counter()
    plan = placer.place(problem)
    return time.perf_counter() - started, plan


def _check(problem: PlacementProblem, plan: PlacementPlan) -> None:
    """Every chain is somewhere, and no worker holds more than it may."""
    check(not plan.report.left_out, f"{len(plan.report.left_out)} chains are nowhere")
    for worker, held in plan.workers.items():
        names = {
            (link.base, applied)
            for one in held
            for link in problem.chains[one.chain][one.run.first : one.run.end]
            for applied in (None, *link.applied)
        }
        total = sum(problem.block_bytes[applied or base] for base, applied in names)
        check(total <= problem.workers[worker].block_bytes, f"{worker} holds more than it may")


BENCHMARK = Benchmark(
    "placement",
    "desired placement of up to 10 000 variants of 100 000 blocks on 1000 workers",
    "10 s from scratch, 0.5 s after the loss of a worker",
    run,
)
