"""no-slower: this tree over an earlier commit of this repository, both measured in turns in one run.

Both are started as processes from their own source, on the same zoo, with the same options and the same
installed packages. One client, this tree's, sends both the same requests over gRPC, so the difference between
the two samples of a round is what the commits between changed. Rounds alternate which build goes first, and a
build that uses processor time while the other is measured turns the run red.

python benchmarks/no_slower.py                    # all cases, over the commit that this work began with
python benchmarks/no_slower.py --base v0.1.0      # over another commit
python benchmarks/no_slower.py --only hop         # one case, may be repeated; the result goes to .cache
python benchmarks/no_slower.py --base HEAD        # over itself: how far apart two equal builds are
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from builds import open_builds
from harness import Row
from no_slower_sides import (
    WARM_UP,
    Builds,
    Side,
    Sides,
    open_hop,
    open_lora,
    open_router,
    open_single,
)
from peers.turns import turn_of
from program import Bar, Program, Say, Scale, scale_of, scale_parser

TITLE = "this tree over an earlier commit, both in turns"
BASE = "5755d0d"
"""The commit that this work began with."""
ROUNDS = 2
"""Rounds for each of `Scale.runs`: this tree goes first in one, the base in the other."""


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the result.

    Attributes:
        bar: its id and what the ratio to the base has to reach.
        unit: of the samples.
        open: starts the processes of both builds, and ends them.
    """

    bar: Bar
    unit: str
    open: Callable[[Builds, Scale, Say], AbstractAsyncContextManager[Sides]]


CASES = (
    Case(Bar("single-8", 0.97, per_round=True), "tokens/s", open_single),
    Case(Bar("lora8-32", 0.97, per_round=True), "tokens/s", open_lora),
    Case(Bar("hop", 1.03, at_most=True, per_round=True), "s", open_hop),
    Case(Bar("router-rps", 0.97, per_round=True), "requests/s", open_router),
)


async def measure(revision: str, cases: Sequence[Case], scale: Scale, say: Say) -> list[Row]:
    """A row for each case: this tree, and the commit as its peer."""
    with open_builds(revision) as builds:
        return [await _compare(case, builds, scale, say) for case in cases]


async def _compare(case: Case, builds: Builds, scale: Scale, say: Say) -> Row:
    name, base = case.bar.row, builds[1]
    say(f"{name}: starting this tree and {base.commit[:10]}")
    async with case.open(builds, scale, say) as sides:
        rounds = scale.runs if scale.quick else ROUNDS * scale.runs
        samples = await in_rounds(sides.ours, sides.base, rounds, lambda text: say(f"{name}, {text}"))
        found = sides.same()
    return Row(
        id=name,
        case=f"{sides.text}; {found}",
        unit=case.unit,
        command=f"python benchmarks/no_slower.py --base {base.commit}",
        ours=[ours for ours, _ in samples],
        peer=[base for _, base in samples],
        peer_name=f"blockzoo {base.commit}",
    )


async def in_rounds(ours: Side, base: Side, rounds: int, say: Say) -> list[tuple[float, float]]:
    """Samples of both builds, round by round; which one goes first alternates.

    Raises:
        CheckFailedError: one of the two was busy while the other was measured.
    """
    for side in (ours, base):
        await side.turn(WARM_UP)
    samples = []
    for number in range(rounds):
        order = (ours, base) if number % 2 == 0 else (base, ours)
        taken = {}
        for side, other in (order, order[::-1]):
            with turn_of(side, [other]):
                taken[side] = await side.turn(number)
        samples.append((taken[ours], taken[base]))
        mine, theirs = samples[-1]
        say(f"round {number + 1}/{rounds}: {mine:.4g}, base {theirs:.4g}, ratio {mine / theirs:.3f}")
    return samples


def program(revision: str, cases: Sequence[Case] = CASES) -> Program:
    """The benchmark over a commit."""
    bars = [case.bar for case in cases]
    return Program("no-slower", TITLE, partial(measure, revision, cases), bars)


def main() -> int:
    """Exit status 1 when a check is red."""
    parser = scale_parser(TITLE)
    names = [case.bar.row for case in CASES]
    parser.add_argument("--base", default=BASE, metavar="COMMIT", help=f"measure it too (default {BASE})")
    parser.add_argument("--only", action="append", choices=names, help="measure this case; may be repeated")
    options = parser.parse_args()
    cases = [case for case in CASES if case.bar.row in (options.only or names)]
    scale = replace(scale_of(options), complete=len(cases) == len(CASES))
    return program(options.base, cases).report(scale)


if __name__ == "__main__":
    sys.exit(main())
