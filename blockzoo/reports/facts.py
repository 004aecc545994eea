"""What `ls` needs to know of a chain: a few numbers, and which blobs it uses.

A chain and its blocks never change, so neither do these facts: what was read once is kept, in memory and,
where the caller names a folder, in a file that the next process finds. Nothing in it can be out of date,
because the digest of the chain is the key; what changes (refs, what is stored how) is always read.
"""

from __future__ import annotations

import json
import sqlite3
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from blockzoo import layout
from blockzoo.digest import num_bytes
from blockzoo.errors import CorruptManifestError
from blockzoo.manifest import BlockId, BlockKind, ChainId, DType
from blockzoo.manifest_json import block_from_json
from blockzoo.store.blobs import TensorData
from blockzoo.store.zoo_store import ZooStore

FILE = "chains-1.sqlite"
"""The number is that of the layout: another version makes a file of its own."""
MAX_FILE_BYTES = 256 << 20
"""A file that has grown beyond is begun again; 300 adapters with 120 matrices each take 2 MB."""
LOCK_SECONDS = 0.2
CREATE = "CREATE TABLE IF NOT EXISTS chains (digest TEXT PRIMARY KEY, facts TEXT, blobs BLOB) WITHOUT ROWID"
SELECT = "SELECT facts, blobs FROM chains WHERE digest = ?"
READERS = 16
"""Manifests that are fetched at once from an object store."""

_BLOB = struct.Struct("<32sQQ")


@dataclass(frozen=True, slots=True)
class ChainFacts:
    """A chain in numbers.

    Attributes:
        family: model family.
        num_layers: decoder layers.
        num_bytes: of a checkpoint with the same computation, without files: base blocks, a tied matrix once.
        blobs: for each blob its digest (32 bytes), its decoded bytes and its stored bytes, packed by `_BLOB`;
            stored bytes are 0 where the blob may be stored as a difference and its object has to be asked.
    """

    family: str
    num_layers: int
    num_bytes: int
    blobs: bytes

    def each_blob(self) -> Iterator[tuple[bytes, int, int]]:
        """Digest, decoded bytes and stored bytes (0: ask) of each blob."""
        return _BLOB.iter_unpack(self.blobs)


@dataclass(frozen=True, slots=True)
class _BlockFacts:
    num_bytes: int
    tied_bytes: int
    blobs: bytes


class ChainReader:
    """Reads facts of chains, from memory, a kept file, or the manifests; any thread may ask.

    Args:
        store: the zoo.
        folder: where facts are kept between processes; None keeps them in memory only.
    """

    def __init__(self, store: ZooStore, folder: Path | None = None) -> None:
        self._store = store
        self._path = None if folder is None else folder / FILE
        self._known: dict[ChainId, ChainFacts] = {}
        self._lock = threading.Lock()

    def facts(self, chains: Iterable[ChainId]) -> Mapping[ChainId, ChainFacts]:
        """Facts of these chains.

        Raises:
            ManifestNotFoundError, CorruptManifestError: a manifest is missing or damaged.
        """
        with self._lock:
            return self._facts(list(dict.fromkeys(chains)))

    def _facts(self, wanted: list[ChainId]) -> dict[ChainId, ChainFacts]:
        if len(self._known) > 4 * len(wanted) + 1000:
            self._known = {chain: self._known[chain] for chain in wanted if chain in self._known}
        missing = [chain for chain in wanted if chain not in self._known]
        if missing:
            self._known |= self._load(missing)
            fresh = [chain for chain in missing if chain not in self._known]
            read = self._read_all(fresh)
            self._known |= read
            self._keep(read)
        return {chain: self._known[chain] for chain in wanted}

    def _read_all(self, chains: list[ChainId]) -> dict[ChainId, ChainFacts]:
        found = {chain: self._store.get_chain(chain) for chain in chains}
        links = [link for chain in found.values() for link in chain.links]
        todo = list({block for link in links for block in (link.base, *link.applied)})
        if self._store.storage.is_remote:
            with ThreadPoolExecutor(READERS, thread_name_prefix="blockzoo-facts") as pool:
                blocks = dict(zip(todo, pool.map(self._read_block, todo), strict=True))
        else:
            blocks = {block: self._read_block(block) for block in todo}
        facts = {}
        for digest, chain in found.items():
            bases = [blocks[link.base] for link in chain.links]
            used = dict.fromkeys(block for link in chain.links for block in (link.base, *link.applied))
            facts[digest] = ChainFacts(
                chain.family,
                len(chain.links) - 2,
                sum(block.num_bytes - block.tied_bytes for block in bases),
                b"".join(blocks[block].blobs for block in used),
            )
        return facts

    def _read_block(self, block: BlockId) -> _BlockFacts:
        data = self._store.read_manifest_bytes(layout.block_key(block), block)
        try:
            # Validating each field takes three times as long; whoever computes with a block validates it.
            return self._block_facts(json.loads(bytes(data)))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            block_from_json(self._store.read_manifest(layout.block_key(block), block))
            raise CorruptManifestError(f"block {block} cannot be read", digest=block) from error

    def _block_facts(self, fields: Any) -> _BlockFacts:
        is_adapter = fields["kind"] == BlockKind.ADAPTER
        total = 0
        blobs = bytearray()
        for tensor in fields["tensors"].values():
            dtype, shape, rows = tensor["dtype"], tuple(tensor["shape"]), tensor["chunk_rows"]
            for index, blob in enumerate(tensor["blobs"]):
                cut = (min(rows, shape[0] - index * rows), *shape[1:]) if rows else shape
                decoded, stored = self._sizes(dtype, cut)
                total += decoded
                blobs += _BLOB.pack(bytes.fromhex(blob), decoded, stored if is_adapter else 0)
        tied = 0
        if fields["config"].get("tied"):
            head = fields["tensors"]["lm_head.weight"]
            tied = num_bytes(DType(head["dtype"]), head["shape"])
        return _BlockFacts(total, tied, bytes(blobs))

    def _sizes(self, dtype: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Decoded bytes of a tensor, and bytes of its object where that is no difference."""
        return _raw_sizes(self._store.blobs.encode, dtype, shape)

    # The kept file. Whatever is wrong with it, facts are read from the zoo.

    def _load(self, chains: list[ChainId]) -> dict[ChainId, ChainFacts]:
        if self._path is None or not self._path.exists():
            return {}
        found: dict[ChainId, ChainFacts] = {}
        with suppress(sqlite3.Error, ValueError, TypeError), closing(self._connect(self._path)) as connection:
            for chain in chains:
                row = connection.execute(SELECT, (chain,)).fetchone()
                if row is not None:
                    family, layers, size = json.loads(row[0])
                    found[chain] = ChainFacts(str(family), int(layers), int(size), bytes(row[1]))
        return found

    def _keep(self, facts: Mapping[ChainId, ChainFacts]) -> None:
        if self._path is None or not facts:
            return
        with suppress(sqlite3.Error, OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size > MAX_FILE_BYTES:
                self._path.unlink()
            with closing(self._connect(self._path)) as connection, connection:
                connection.execute(CREATE)
                connection.executemany(
                    "INSERT OR REPLACE INTO chains VALUES (?, ?, ?)",
                    [
                        (chain, json.dumps([one.family, one.num_layers, one.num_bytes]), one.blobs)
                        for chain, one in facts.items()
                    ],
                )

    def _connect(self, path: Path) -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=LOCK_SECONDS)


@lru_cache(4096)
def _raw_sizes(encode: Any, dtype: str, shape: tuple[int, ...]) -> tuple[int, int]:
    size = num_bytes(DType(dtype), shape)
    return size, len(encode(TensorData(DType(dtype), shape, b""), None)[0]) + size
