"""Fewer threads while other programs use the cores, at once; more again once cores were free for a while."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from blockserve.common.process.cores import CoreTimes
from blockserve.worker.engine.crew import FORGET_SECONDS, LOOK_SECONDS, RAISE_SECONDS, Crew


@dataclass
class Machine:
    """Cores with programs on them; time goes by in `work`."""

    cores: int = 2
    now: float = 100.0
    busy: float = 50.0
    own: float = 10.0
    running: int = 0
    knows: bool = True
    reads: int = 0

    def read(self) -> CoreTimes | None:
        self.reads += 1
        return CoreTimes(self.cores, self.busy, self.own, self.running) if self.knows else None

    def crew(self, most: int | None = None) -> Crew:
        return Crew(most or self.cores, read=self.read, clock=lambda: self.now)

    def work(self, crew: Crew, seconds: float, *, own: float, others: float) -> int:
        """Compute for a while, asking before each pass; own and others in cores."""
        for _ in range(round(seconds / 0.05)):
            crew.size()
            self.now += 0.05
            self.own += own * 0.05
            self.busy += (own + others) * 0.05
        return crew.size()


def test_a_quiet_machine_is_used_whole() -> None:
    machine = Machine(4)
    assert machine.work(machine.crew(), 3, own=3.9, others=0.05) == 4
    assert machine.reads < 3 / LOOK_SECONDS + 2


@pytest.mark.parametrize(
    ("cores", "own", "others", "size"),
    [(2, 1.33, 0.67, 1), (2, 0.67, 1.33, 1), (2, 1.9, 0.1, 2), (8, 6, 2, 6), (8, 4, 4, 4), (4, 0.5, 3.5, 1)],
)
def test_as_many_threads_as_others_leave_cores(cores: int, own: float, others: float, size: int) -> None:
    machine = Machine(cores)
    assert machine.work(machine.crew(), 1, own=own, others=others) == size


def test_others_that_run_when_work_comes_are_seen_before_the_first_pass() -> None:
    machine = Machine(2, running=2)
    assert machine.crew().size() == 1
    machine = Machine(4, running=1)
    assert machine.crew().size() == 3


def test_a_thread_that_runs_for_an_instant_is_no_reason() -> None:
    machine = Machine(2)
    seen = iter([3, 0])

    def read() -> CoreTimes:
        return CoreTimes(2, 50.0, 10.0, next(seen))

    assert Crew(2, read=read, clock=lambda: machine.now).size() == 2


def test_more_threads_only_after_cores_were_free_for_a_while() -> None:
    machine = Machine(2)
    crew = machine.crew()
    assert machine.work(crew, 1, own=1, others=1) == 1
    assert machine.work(crew, RAISE_SECONDS * 0.8, own=1, others=0) == 1
    assert machine.work(crew, 0.5, own=1, others=1) == 1
    assert machine.work(crew, RAISE_SECONDS * 0.8, own=1, others=0) == 1
    assert machine.work(crew, RAISE_SECONDS, own=1, others=0) == 2


def test_after_a_rest_only_the_present_counts() -> None:
    machine = Machine(2)
    crew = machine.crew()
    assert machine.work(crew, 1, own=1, others=1) == 1
    machine.now += FORGET_SECONDS + 1
    machine.busy += 2 * FORGET_SECONDS
    assert crew.size() == 2


def test_without_counters_or_cores_to_spare_nothing_changes() -> None:
    machine = Machine(2, knows=False, running=2)
    assert machine.work(machine.crew(), 1, own=1, others=1) == 2
    alone = Machine(2)
    assert alone.work(alone.crew(1), 1, own=1, others=1) == 1
    assert alone.reads == 0


def test_the_log_says_so_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(2)
    crew = machine.crew()
    with caplog.at_level(logging.INFO):
        for _ in range(4):
            machine.work(crew, 1, own=1, others=1)
            machine.work(crew, 2 * RAISE_SECONDS, own=1, others=0)
    assert caplog.records[0].getMessage().startswith("computing with 1 of 2 threads: other programs")
    assert len(caplog.records) == 1
