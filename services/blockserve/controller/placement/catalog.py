"""Chains as numbers: what placement reads of them over and over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockserve.common.api.cluster import Run
from blockzoo.manifest import BlockId, ChainId, Link

_Name = tuple[BlockId, BlockId | None]
"""A base block, or what is applied on it."""


@dataclass(frozen=True, slots=True)
class CatalogChain:
    """A chain whose blocks are numbers.

    An adapter has a number for each base that it is on, because a worker prepares it for the base.

    Attributes:
        blocks: of all links in order, a link's base first.
        offsets: where each link begins in `blocks`, and the end, [links + 1].
        repeats: whether a block occurs more than once.
    """

    id: ChainId
    blocks: list[int]
    offsets: list[int]
    repeats: bool

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def whole(self) -> Run:
        """All of it."""
        return Run(0, len(self))

    def blocks_of(self, run: Run) -> list[int]:
        """The blocks of a run, each once."""
        blocks = self.blocks[self.offsets[run.first] : self.offsets[run.end]]
        return list(dict.fromkeys(blocks)) if self.repeats else blocks

    def may_cut(self, place: int) -> bool:
        """Whether a run may end and another begin here: the embedding alone, or the head alone, is no run."""
        return place in (0, len(self)) or 1 < place < len(self) - 1


class Catalog:
    """Every chain and block that is to be placed.

    Attributes:
        chains: by id.
        sizes: bytes of each block, [blocks].
        row: in the table of holders, for blocks that more than one chain uses; -1 for others, [blocks].
        shared: how many rows there are.
    """

    def __init__(self, chains: Mapping[ChainId, Sequence[Link]], block_bytes: Mapping[BlockId, int]) -> None:
        self._chains, self._block_bytes = dict(chains), block_bytes
        numbers: dict[_Name, int] = {}
        self.chains = {chain: _numbered(chain, chains[chain], numbers) for chain in sorted(chains)}
        self.size_of = [block_bytes[applied or base] for base, applied in numbers]
        self.sizes = np.array(self.size_of, dtype=np.float64)
        users = np.zeros(len(numbers), dtype=np.int64)
        for chain in self.chains.values():
            users[chain.blocks_of(chain.whole)] += 1
        self.row = np.where(users > 1, np.cumsum(users > 1) - 1, -1)
        self.row_of: list[int] = self.row.tolist()
        self.shared = int((users > 1).sum())

    def is_of(self, chains: Mapping[ChainId, Sequence[Link]], block_bytes: Mapping[BlockId, int]) -> bool:
        """Whether it was made from these."""
        return (
            chains.keys() == self._chains.keys()
            and all(
                self._chains[chain] is links or self._chains[chain] == links
                for chain, links in chains.items()
            )
            and (block_bytes is self._block_bytes or block_bytes == self._block_bytes)
        )

    def parts(self, chain: CatalogChain, run: Run) -> tuple[npt.NDArray[np.int64], list[int]]:
        """The blocks of a run that other chains use too, and its own."""
        shared: list[int] = []
        own: list[int] = []
        for block in chain.blocks_of(run):
            (own if self.row_of[block] < 0 else shared).append(block)
        return np.array(shared, dtype=np.int64), own


def _numbered(chain: ChainId, links: Sequence[Link], numbers: dict[_Name, int]) -> CatalogChain:
    blocks, offsets = [], [0]
    for link in links:
        blocks.append(numbers.setdefault((link.base, None), len(numbers)))
        blocks += [numbers.setdefault((link.base, block), len(numbers)) for block in link.applied]
        offsets.append(len(blocks))
    return CatalogChain(chain, blocks, offsets, repeats=len(set(blocks)) < len(blocks))
