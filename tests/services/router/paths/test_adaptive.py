"""Approved equivalents: taken when they pay, never without a word, given up when they are revoked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest

from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.errors import ResumeError
from blockserve.router.paths.adaptive import AdaptiveAssembly, AdaptiveConfig
from blockzoo.equivalence import Approvals, Substitute
from blockzoo.equivalence.records import Positions, RecordId
from blockzoo.errors import ManifestNotFoundError
from blockzoo.manifest import ChainId

EXACT, OTHER, THIRD, SPLICED = map(ChainId, ("exact", "other", "third", "spliced"))
REF = "tuned@1"


def substitute(chain: ChainId = OTHER, result: ChainId | None = None) -> Substitute:
    return Substitute(
        chain, Positions(2, 4), RecordId(f"record of {chain}"), 0.01, 0.99, result or chain, frozenset({REF})
    )


class FakeApprovals(Approvals):
    """What is approved, set by the test; counts refreshes."""

    def __init__(self, *approved: Substitute) -> None:
        self.approved = approved
        self.after_refresh = approved
        self.refreshes = 0

    def refresh(self) -> None:
        self.refreshes += 1
        self.approved = self.after_refresh

    def substitutes(
        self, chain: ChainId, variant: str | None = None
    ) -> Mapping[Positions, tuple[Substitute, ...]]:
        fitting = tuple(one for one in self.approved if variant in one.variants)
        return {Positions(2, 4): fitting} if chain == EXACT and fitting else {}


class FakeEstimator:
    """Seconds by chain; None for a chain without a path, nothing for one that is not in the zoo."""

    def __init__(self, *, unloaded: float = 0.01, **seconds: float | None) -> None:
        self.seconds = seconds
        self.unloaded = unloaded
        self.spliced: list[tuple[ChainId, ChainId, ChainId, int]] = []

    async def prepare(self, chain: ChainId) -> None:
        if chain not in self.seconds:
            raise ManifestNotFoundError(f"no chain {chain}")

    async def prepare_spliced(
        self, chain: ChainId, original: ChainId, substitute: ChainId, shift: int
    ) -> None:
        await self.prepare(chain)
        self.spliced.append((chain, original, substitute, shift))

    def estimate(self, request: EngineRequest, *, idle: bool = False) -> float | None:
        seconds = self.seconds[request.chain]
        return self.unloaded if idle and seconds is not None else seconds


def choose(
    approvals: FakeApprovals, estimator: FakeEstimator, *, variant: str = REF, **config: object
) -> Substitute | None:
    request = EngineRequest("r", EXACT, (1,), SamplingParams(), 10)
    settings = AdaptiveConfig(refresh_seconds=0, **config)  # type: ignore[arg-type]
    return asyncio.run(AdaptiveAssembly(approvals, estimator, settings).choose(request, variant))


@pytest.mark.parametrize(
    ("exact", "other", "is_taken"),
    [
        (None, 5.0, True),
        (10.0, 1.0, True),
        (1.4, 1.0, False),
        (0.2, 0.11, False),
        (1.0, None, False),
        (None, None, False),
    ],
)
def test_it_is_taken_when_absent_or_much_slower(
    exact: float | None, other: float | None, is_taken: bool
) -> None:
    chosen = choose(FakeApprovals(substitute()), FakeEstimator(exact=exact, other=other))
    assert (chosen is not None) == is_taken


def test_a_faster_one_is_not_taken_while_nobody_queues_at_the_variants_own() -> None:
    slow_but_idle = FakeEstimator(exact=10.0, other=1.0, unloaded=9.0)
    assert choose(FakeApprovals(substitute()), slow_but_idle) is None
    assert choose(FakeApprovals(substitute()), FakeEstimator(exact=10.0, other=1.0, unloaded=6.0)) is not None


def test_the_fastest_of_several_is_taken() -> None:
    chosen = choose(
        FakeApprovals(substitute(), substitute(THIRD)), FakeEstimator(exact=9.0, other=2.0, third=1.0)
    )
    assert chosen is not None
    assert chosen.result == THIRD


def test_only_for_variants_that_the_approval_names_and_while_it_is_enabled() -> None:
    estimator = FakeEstimator(exact=9.0, other=1.0)
    assert choose(FakeApprovals(substitute()), estimator, variant="stranger@1") is None
    assert choose(FakeApprovals(substitute()), estimator, enabled=False) is None


def test_a_spliced_chain_is_run_while_the_zoo_has_it() -> None:
    spliced = substitute(OTHER, SPLICED)
    estimator = FakeEstimator(exact=9.0, spliced=1.0)
    assert choose(FakeApprovals(spliced), estimator) == spliced
    assert estimator.spliced == [(SPLICED, EXACT, OTHER, 0)]
    moved = replace(spliced, positions=Positions(5, 7))
    assert choose(FakeApprovals(moved), estimator) == moved
    assert estimator.spliced[-1] == (SPLICED, EXACT, OTHER, 3)
    assert choose(FakeApprovals(spliced), FakeEstimator(exact=9.0, other=1.0)) is None
    assert choose(FakeApprovals(substitute()), FakeEstimator(exact=9.0)) is None


def test_what_is_asked_for_is_told_when_something_else_runs() -> None:
    told: list[ChainId] = []
    for exact in (9.0, 1.0):
        assembly = AdaptiveAssembly(
            FakeApprovals(substitute()),
            FakeEstimator(exact=exact, other=1.0),
            AdaptiveConfig(),
            on_substituted=told.append,
        )
        asyncio.run(assembly.choose(EngineRequest("r", EXACT, (1,), SamplingParams(), 10), REF))
    assert told == [EXACT]


def test_a_revocation_counts_from_the_next_choice_on() -> None:
    approvals = FakeApprovals(substitute())
    approvals.after_refresh = ()
    assert choose(approvals, FakeEstimator(exact=9.0, other=1.0)) is None
    assert approvals.refreshes == 1


def test_an_answer_is_resumed_on_what_it_began_with() -> None:
    request = EngineRequest("r", EXACT, (1,), SamplingParams(), 10)
    approvals = FakeApprovals(substitute())
    assembly = AdaptiveAssembly(approvals, FakeEstimator(other=1.0), AdaptiveConfig(refresh_seconds=0))
    assert asyncio.run(assembly.resume(request, REF, OTHER)).result == OTHER
    approvals.after_refresh = ()
    with pytest.raises(ResumeError):
        asyncio.run(
            AdaptiveAssembly(approvals, FakeEstimator(), AdaptiveConfig(refresh_seconds=0)).resume(
                request, REF, OTHER
            )
        )
