"""The tokens that one pass computes of requests whose hidden states have the same shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from blockkernels.rotary import RopeParameters, RotaryTable, RotaryTables
from blockserve.worker.kv.pool import KvPool, KvTable
from blockserve.worker.requests.running import Chunk


class LaneBatch:
    """The tokens of all requests of one lane in one pass, in path order.

    What not every pass needs is made when it is first asked for: a decode step of a few layers takes not much
    longer than making all of it.

    Attributes:
        chunks: in row order.
        offsets: first row of each chunk, and the number of rows.
        hidden: hidden states between segments, [tokens, hidden]; at first what came from elsewhere.
        end: one past the largest position.
        first_layer: position of the chains' first layer that is here.
        tables: cosine and sine of all rows for each set of rotary parameters that was asked for.
    """

    def __init__(self, chunks: Sequence[Chunk], pool: KvPool, device: torch.device) -> None:
        """Take the chunks of a lane, all of them admitted, with the pool that their pages are in."""
        self.chunks = chunks
        self.pool = pool
        self.offsets = list(accumulate((chunk.num_tokens for chunk in chunks), initial=0))
        self.end = max(chunk.end for chunk in chunks)
        self.first_layer = chunks[0].running.chain.first_layer
        self.tables: dict[RopeParameters, tuple[Tensor, Tensor]] = {}
        self._device = device
        self.hidden = self._incoming()

    @cached_property
    def token_ids(self) -> Tensor:
        """int64 [tokens]."""
        ids = [token for chunk in self.chunks for token in chunk.running.tokens(chunk.start, chunk.end)]
        return torch.tensor(ids, device=self._device)

    def angles(self, table: RotaryTable | RotaryTables) -> tuple[Tensor, Tensor]:
        """Cosine and sine of all rows, each [tokens, 1, rotary_dim / 2]."""
        if isinstance(table, RotaryTables):
            runs = [table.run(chunk.start, chunk.end, chunk.running.together) for chunk in self.chunks]
            return torch.cat([cos for cos, _ in runs]), torch.cat([sin for _, sin in runs])
        if len(self.chunks) == 1:
            return table.run(self.chunks[0].start, self.end)
        positions = [position for chunk in self.chunks for position in range(chunk.start, chunk.end)]
        return table.at(torch.tensor(positions, device=self._device), self.end)

    def rows(self, places: Sequence[int]) -> slice | Tensor:
        """Rows of the chunks at `places`: a range when they are neighbours, as path order makes them."""
        if places[-1] - places[0] == len(places) - 1:
            return slice(self.offsets[places[0]], self.offsets[places[-1] + 1])
        rows = [row for place in places for row in range(self.offsets[place], self.offsets[place + 1])]
        return torch.tensor(rows, device=self._device)

    def is_all(self, rows: slice | Tensor) -> bool:
        """Whether `rows` are all rows."""
        return isinstance(rows, slice) and rows.stop - rows.start == self.offsets[-1]

    def at(self, rows: slice | Tensor) -> Tensor:
        """Hidden states of some rows; a view where they are neighbours."""
        return self.hidden if self.is_all(rows) else self.hidden[rows]

    def put(self, rows: slice | Tensor, hidden: Tensor) -> None:
        """Leave hidden states for the next segment."""
        if self.is_all(rows):
            self.hidden = hidden
        else:
            self.hidden[rows] = hidden

    def _incoming(self) -> Tensor:
        """Room for all hidden states, with a copy of those that came from elsewhere."""
        came = [chunk.hidden for chunk in self.chunks if chunk.hidden is not None]
        if len(came) == len(self.chunks):
            return torch.cat(came).to(self._device) if len(came) > 1 else came[0].to(self._device, copy=True)
        lane = self.chunks[0].running.chain.lane
        size = (self.offsets[-1], lane.hidden_size)
        hidden = torch.empty(size, dtype=lane.kv_shape.dtype, device=self._device)
        for chunk, row in zip(self.chunks, self.offsets, strict=False):
            if chunk.hidden is not None:
                hidden[row : row + chunk.num_tokens] = chunk.hidden
        return hidden


def table_of(chunk: Chunk) -> KvTable:
    """The pages of a chunk's request, which an admitted request has."""
    table = chunk.running.kv
    assert table is not None
    return table
