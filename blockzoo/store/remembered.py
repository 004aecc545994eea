"""Manifests that this process has read or written: what a digest names never changes."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from blockzoo.manifest import BlockId, BlockManifest, ChainId, ChainManifest
from blockzoo.store.writing import Manifests

_D = TypeVar("_D", bound=str)
_M = TypeVar("_M")

_MAX_BLOCKS = 4096
"""Some 10 MB: the blocks of a large model, and those of the adapters that are registered on it."""
_MAX_CHAINS = 64


class Remembered:
    """See `Manifests`. Says what a manifest holds, and not whether it is still stored.

    May be used by several threads at once.

    Args:
        manifests: where to read what is not remembered; the owner of this, who lives as long.
    """

    def __init__(self, manifests: Manifests) -> None:
        # With a strong reference, the owner's files would stay open until a run of Python's cycle detector.
        self._manifests = weakref.ref(manifests)
        self._blocks: _Recent[BlockId, BlockManifest] = _Recent(_MAX_BLOCKS)
        self._chains: _Recent[ChainId, ChainManifest] = _Recent(_MAX_CHAINS)

    def get_chain(self, chain: ChainId) -> ChainManifest:
        """See `Manifests`."""
        return self._chains.get(chain, lambda: self._owner.get_chain(chain))

    def get_block(self, block: BlockId) -> BlockManifest:
        """See `Manifests`."""
        return self._blocks.get(block, lambda: self._owner.get_block(block))

    def add_block(self, block: BlockId, manifest: BlockManifest) -> None:
        """Remember what was just named."""
        self._blocks.put(block, manifest)

    def add_chain(self, chain: ChainId, manifest: ChainManifest) -> None:
        """Remember what was just named."""
        self._chains.put(chain, manifest)

    @property
    def _owner(self) -> Manifests:
        owner = self._manifests()
        assert owner is not None
        return owner


class _Recent(Generic[_D, _M]):
    """The values used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._values: OrderedDict[_D, _M] = OrderedDict()

    def get(self, digest: _D, read: Callable[[], _M]) -> _M:
        with self._lock:
            if digest in self._values:
                self._values.move_to_end(digest)
                return self._values[digest]
        value = read()
        self.put(digest, value)
        return value

    def put(self, digest: _D, value: _M) -> None:
        with self._lock:
            self._values[digest] = value
            self._values.move_to_end(digest)
            while len(self._values) > self._most:
                self._values.popitem(last=False)
