"""Which workers probably have a prompt's beginning in their prefix caches, by what this router sent them.

A guess, used to prefer one path over another and never relied on: workers say themselves what they have.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from blockserve.common.api.cluster import PathStep, WorkerId
from blockserve.common.api.engine import EngineRequest

BLOCK_TOKENS = 64
"""Prompts are compared in blocks of this many tokens: a few pages."""


class PrefixLocality:
    """Remembers the most recent prompts, block by block, and where they ran."""

    def __init__(self, max_blocks: int = 65_536) -> None:
        """Remember at most so many blocks (about 200 bytes each)."""
        self._max_blocks = max_blocks
        self._workers: OrderedDict[bytes, frozenset[WorkerId]] = OrderedDict()

    def note(self, request: EngineRequest, path: Sequence[PathStep]) -> None:
        """A request ran along a path."""
        workers = frozenset(step.worker for step in path)
        for key in _blocks(request):
            self._workers[key] = workers
            self._workers.move_to_end(key)
        while len(self._workers) > self._max_blocks:
            self._workers.popitem(last=False)

    def cached_tokens(self, request: EngineRequest) -> dict[WorkerId, int]:
        """For each worker the leading prompt tokens that it probably has."""
        found: dict[WorkerId, int] = {}
        holders: frozenset[WorkerId] | None = None
        for number, key in enumerate(_blocks(request), 1):
            known = self._workers.get(key, frozenset())
            holders = known if holders is None else holders & known
            if not holders:
                break
            found.update(dict.fromkeys(holders, number * BLOCK_TOKENS))
        return found


def _blocks(request: EngineRequest) -> Iterator[bytes]:
    """A digest of chain, salt and tokens up to the end of each full block."""
    state = hashlib.blake2b(f"{request.chain}:{len(request.cache_salt)}:{request.cache_salt}".encode())
    for start in range(0, len(request.prompt) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        state.update(array("q", request.prompt[start : start + BLOCK_TOKENS]).tobytes())
        yield state.copy().digest()[:16]
