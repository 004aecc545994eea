"""A cluster of processes on this machine, started together, kept running and ended in order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import ExitStack

from blockserve.common.errors import LocalClusterError
from blockserve.local import record
from blockserve.local.ending import end_leftovers
from blockserve.local.identity import identify
from blockserve.local.keeper import LOOK_SECONDS, Keeper, Observer
from blockserve.local.layout import Layout
from blockserve.local.plan import ClusterPlan, ProcessSpec
from blockserve.local.processes import Launcher, Running
from blockserve.local.record import ClusterRecord

GRACE_SECONDS = 5.0
"""Beyond its drain, for a process to close what it has open."""


class LocalCluster:
    """The processes of a plan; `blockserve.common.process.run.serve` runs it like any server.

    Attributes:
        address: of the router; "" until everything has started.
    """

    def __init__(
        self,
        plan: ClusterPlan,
        layout: Layout,
        observer: Observer,
        *,
        drain_seconds: float,
        launch: Callable[[ProcessSpec], Running] | None = None,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            plan: what to run.
            layout: where; prepared.
            observer: is told what happens.
            drain_seconds: how long processes may let requests go on when they are ended.
            launch: starts a process; None starts real ones.
            look_seconds: how often processes are looked at.
        """
        self.plan = plan
        self.address = ""
        self._layout = layout
        self._patience = drain_seconds + GRACE_SECONDS
        start = launch or Launcher(layout)
        self._keepers = {
            spec.name: Keeper(spec, start, observer, self._write, look_seconds=look_seconds)
            for group in plan.stop_order
            for spec in group
        }
        self._lock = ExitStack()

    async def start(self) -> None:
        """Start everything: the state server, then all others at once.

        Raises:
            LocalClusterError: a cluster runs in this folder, or a process does not start.
            StateStoreError: there is no program for the state server, or it does not answer.
        """
        if not self._lock.enter_context(self._layout.locked()):
            self._lock.close()
            raise already_running(self._layout)
        try:
            await asyncio.to_thread(end_leftovers, self._layout)
            await self._keepers[self.plan.state.name].start()
            await self._start_others()
        except BaseException:
            self._patience = 0.0
            await self.stop()
            raise
        self.address = self._keepers[self.plan.router.name].address
        self._write()

    async def _start_others(self) -> None:
        specs = (self.plan.controller, self.plan.router, *self.plan.workers)
        starts = [asyncio.create_task(self._keepers[spec.name].start()) for spec in specs]
        try:
            await asyncio.gather(*starts)
        finally:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)

    async def stop(self) -> None:
        """End everything in order: the router lets answers end, then workers, controller, state server."""
        for keeper in self._keepers.values():
            await keeper.release()
        for group in self.plan.stop_order:
            await asyncio.gather(*(self._keepers[spec.name].end(self._patience) for spec in group))
        self._layout.record.unlink(missing_ok=True)
        self._lock.close()

    def remove_own_socket(self) -> None:
        """Nothing to do: what is left behind in a hurry is removed by the next start, or by `down`."""

    def _write(self) -> None:
        """Write down what runs now."""
        owner = identify(os.getpid())
        assert owner is not None
        processes = [keeper.process for keeper in self._keepers.values()]
        known = tuple(process for process in processes if process is not None)
        seconds = self._patience * len(self.plan.stop_order)
        fresh = ClusterRecord(owner, self.plan.zoo, self.address, known, seconds)
        record.write(self._layout.record, fresh)


def already_running(layout: Layout) -> LocalClusterError:
    """What a second cluster in one folder is told."""
    known = record.read(layout.record)
    what = "it is about to start or to end" if known is None else known.describe()
    return LocalClusterError(
        f"a cluster runs in {layout.folder}: {what}",
        hint="`blockzoo down` ends it; --dir names another folder for a second one.",
    )
