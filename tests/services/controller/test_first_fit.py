"""The plain placement: whole where it fits, shared, balanced, and at rest where nothing has changed."""

from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.common.cluster import Placement, Run, WorkerId
from blockserve.controller.first_fit import WantedChain, WorkerRoom, first_fit
from blockzoo.manifest import BlockId, ChainId, Link


def chain(name: str, blocks: str, traffic: float = 1.0, applied: str = "", **more: object) -> WantedChain:
    links = tuple(Link(BlockId(block), tuple(BlockId(one) for one in applied)) for block in blocks)
    return WantedChain(ChainId(name), links, traffic, **more)  # type: ignore[arg-type]


def sizes(*chains: WantedChain) -> dict[BlockId, int]:
    return {block: 10 for one in chains for link in one.links for block in (link.base, *link.applied)}


def rooms(*num_bytes: int) -> list[WorkerRoom]:
    return [WorkerRoom(WorkerId(f"w{number}"), limit) for number, limit in enumerate(num_bytes)]


def held(placement: Placement) -> dict[str, list[tuple[str, Run]]]:
    return {
        worker: [(one.chain, one.run) for one in assigned] for worker, assigned in placement.workers.items()
    }


WHOLE = Run(0, 5)


def test_variants_meet_where_their_trunk_is() -> None:
    chains = [chain("a", "eabch"), chain("b", "eabch", applied="x")]
    placement, left = first_fit(chains, sizes(*chains), rooms(1000), Placement())
    assert held(placement) == {"w0": [("a", WHOLE), ("b", WHOLE)]}
    assert left == ()


def test_traffic_is_spread_and_replicas_lie_apart() -> None:
    chains = [chain(f"v{number}", "eabch", applied=str(number)) for number in range(4)]
    placement, _ = first_fit(chains, sizes(*chains), rooms(0, 0), Placement())
    assert sorted(len(runs) for runs in held(placement).values()) == [2, 2]
    twice = [WantedChain(one.id, one.links, one.traffic, replicas=2) for one in chains]
    placement, _ = first_fit(twice, sizes(*chains), rooms(0, 0, 0), Placement())
    for one in chains:
        assert sum((one.id, WHOLE) in runs for runs in held(placement).values()) == 2


def test_what_fits_nowhere_is_cut_and_what_fits_not_at_all_is_told() -> None:
    one, other = chain("a", "eabch", 2.0), chain("b", "EABCH", 1.0)
    placement, left = first_fit([one, other], sizes(one, other), rooms(30, 30), Placement())
    assert held(placement) == {"w0": [("a", Run(0, 3))], "w1": [("a", Run(3, 5))]}
    assert left == ("b",)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["eabch", "eabxh", "eabcdh", "EABCH"]), st.sampled_from(["", "p", "q"])),
        min_size=1,
        max_size=6,
    ),
    st.lists(st.integers(10, 120), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_memory_is_respected_chains_are_covered_and_nothing_moves_twice(
    wanted: list[tuple[str, str]], limits: list[int], replicas: int
) -> None:
    chains = [
        chain(f"c{number}", blocks, 1.0 + number, applied, replicas=replicas)
        for number, (blocks, applied) in enumerate(wanted)
    ]
    known = sizes(*chains)
    placement, left = first_fit(chains, known, rooms(*limits), Placement())
    by_id = {one.id: one for one in chains}
    for (worker, assigned), limit in zip(sorted(placement.workers.items()), limits, strict=True):
        blocks: set[tuple[BlockId, BlockId | None]] = set()
        for one in assigned:
            for link in by_id[one.chain].links[one.run.first : one.run.end]:
                blocks |= {(link.base, None), *((link.base, applied) for applied in link.applied)}
            assert any(
                1 <= place < len(by_id[one.chain].links) - 1 for place in range(one.run.first, one.run.end)
            )
        assert sum(known[name[1] or name[0]] for name in blocks) <= limit, worker
    for one in chains:
        runs = [
            assigned.run
            for assignments in placement.workers.values()
            for assigned in assignments
            if assigned.chain == one.id
        ]
        covered = {place for run in runs for place in range(run.first, run.end)}
        assert covered == (set() if one.id in left else set(range(len(one.links))))
    again, _ = first_fit(chains, known, rooms(*limits), placement)
    assert again.workers == placement.workers
