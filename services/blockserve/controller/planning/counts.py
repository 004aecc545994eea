"""What a leader has decided so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from blockserve.common.api.cluster import Placement


@dataclass(slots=True)
class PlanningCounts:
    """Counts of one controller since it started; those of earlier leaders are not in them.

    Attributes:
        seconds: the last placement took to plan; 0 before the first.
        placements: written.
        loads: runs that these gave to a worker anew.
        unloads: runs that these took from a worker that lives.
        moved_bytes: of blocks that workers have to load for these.
        refused_writes: that another leader had overtaken.
    """

    seconds: float = 0.0
    placements: int = 0
    loads: int = 0
    unloads: int = 0
    moved_bytes: int = 0
    refused_writes: int = 0

    def note_placed(self, before: Placement, after: Placement, moved_bytes: int) -> None:
        """A placement was written in the place of another."""
        self.placements += 1
        self.moved_bytes += moved_bytes
        for worker, assigned in after.workers.items():
            wanted = {(one.chain, one.run) for one in assigned}
            had = {(one.chain, one.run) for one in before.workers.get(worker, ())}
            self.loads += len(wanted - had)
            self.unloads += len(had - wanted)
