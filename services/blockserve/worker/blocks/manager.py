"""Blocks in memory: each distinct block once, whoever uses it.

Loading has two halves. Reading, checking and laying out happens in loader
threads while the engine runs; attaching happens in the engine's thread between
two passes, because it changes the adapter banks that passes read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from blockkernels.backends import Backend
from blockkernels.lora import LoraBank, RowRange
from blockserve.common.api.cluster import ChainSpan
from blockserve.common.errors import ConfigurationError
from blockserve.worker.blocks.chain import (
    AdapterKey,
    BlockKey,
    LoadedChain,
    PreparedChain,
    growing_ropes,
    lane_of,
    layer_positions,
)
from blockserve.worker.blocks.reading import BlockReader
from blockserve.worker.kv.prefix import layer_digests
from blockserve.worker.limits import EngineConfig
from blockzoo.compute.build import ExecutableBlock
from blockzoo.compute.changes import AdapterChanges
from blockzoo.manifest import BlockId


@dataclass(slots=True)
class _Resident:
    """A base block in memory."""

    block: ExecutableBlock
    users: int = 0
    banks: dict[str, LoraBank] = field(default_factory=dict)


@dataclass(slots=True)
class _ResidentAdapter:
    """An adapter in the banks of one base block."""

    rows: dict[str, RowRange]
    changes: AdapterChanges
    num_bytes: int
    users: int = 0


class BlockManager:
    """Owns all blocks in memory.

    `prepare` runs in a loader thread, for one chain at a time; the rest belongs to the engine's thread.
    """

    def __init__(self, reader: BlockReader, config: EngineConfig, backend: Backend) -> None:
        """Make an empty manager that loads what `reader` reads, to be computed by `backend`."""
        self._reader = reader
        self._config = config
        self._backend = backend
        self._blocks: dict[BlockKey, _Resident] = {}
        self._adapters: dict[AdapterKey, _ResidentAdapter] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks in memory, as laid out."""
        bases = sum(resident.block.num_bytes for resident in self._blocks.values())
        return bases + sum(adapter.num_bytes for adapter in self._adapters.values())

    def chain_bytes(self, chain: LoadedChain) -> tuple[int, int]:
        """Bytes of a chain's blocks that no other loaded chain uses, and of all its blocks."""
        private = total = 0
        for key in chain.base_keys():
            resident = self._blocks[key]
            total += resident.block.num_bytes
            private += resident.block.num_bytes if resident.users == 1 else 0
        for adapter_key in chain.adapter_keys():
            adapter = self._adapters[adapter_key]
            total += adapter.num_bytes
            private += adapter.num_bytes if adapter.users == 1 else 0
        return private, total

    def sizes(self, chain: LoadedChain) -> dict[Hashable, int]:
        """Bytes of each of a loaded chain's blocks and adapters."""
        found: dict[Hashable, int] = {key: self._blocks[key].block.num_bytes for key in chain.base_keys()}
        return found | {key: self._adapters[key].num_bytes for key in chain.adapter_keys()}

    def actual_sizes(self, estimate: Mapping[Hashable, int]) -> dict[Hashable, int]:
        """An estimate with the true sizes of what is in memory already."""
        known: dict[Hashable, int] = {key: one.block.num_bytes for key, one in self._blocks.items()}
        known.update((key, one.num_bytes) for key, one in self._adapters.items())
        return {key: known.get(key, num_bytes) for key, num_bytes in estimate.items()}

    def bank(self, key: BlockKey, module: str) -> LoraBank:
        """The adapters on a module of a base block that has some."""
        return self._blocks[key].banks[module]

    def rows(self, key: BlockKey, adapter: BlockId) -> dict[str, RowRange]:
        """Where an adapter's rows are in the banks of a base block."""
        return self._adapters[key, adapter].rows

    def changes(self, key: BlockKey, adapter: BlockId) -> AdapterChanges:
        """What an adapter on a base block changes; matrices of its linear modules are in the banks only."""
        return self._adapters[key, adapter].changes

    def prepare(self, span: ChainSpan) -> PreparedChain:
        """Read, check and lay out what a run of a chain needs and is not in memory yet.

        Raises:
            CorruptBlobError, BlobNotFoundError, ManifestNotFoundError: the zoo is damaged.
            InvalidConfigError: a block cannot be run by this version.
            SpanError: the chain has no such run.
            ConfigurationError: deterministic results are asked for, and the dtype cannot have them here.
        """
        run = self._reader.open(span)
        blocks, dtype = run.blocks, run.dtype
        if self._config.deterministic:
            refuse_inexact(self._backend, dtype)
        bases = [base for base in blocks if (base, dtype) not in self._blocks]
        pairs = [pair for pair in run.adapters() if ((pair[0], dtype), pair[1]) not in self._adapters]
        adapters = {applied: self._reader.manifest(applied) for _, applied in pairs}
        with ThreadPoolExecutor(self._config.load_threads, thread_name_prefix="load") as pool:
            built = pool.map(lambda base: self._reader.build(blocks[base], dtype), bases)
            new_blocks = {(base, dtype): block for base, block in zip(bases, built, strict=True)}
            read = pool.map(
                lambda pair: self._reader.read_adapter(adapters[pair[1]], blocks[pair[0]], dtype), pairs
            )
            new_adapters = {
                ((base, dtype), name): part for (base, name), part in zip(pairs, read, strict=True)
            }
        _return_free_memory()
        return PreparedChain(span, run.manifest, dtype, new_blocks, new_adapters)

    def can_attach(self, prepared: PreparedChain) -> bool:
        """Whether every block that was in memory when the chain was prepared still is."""
        bases = {(link.base, prepared.dtype) for link in prepared.links()}
        applied = {((link.base, prepared.dtype), one) for link in prepared.links() for one in link.applied}
        return bases <= {*self._blocks, *prepared.new_blocks} and applied <= {
            *self._adapters,
            *prepared.new_adapters,
        }

    def attach(self, prepared: PreparedChain) -> LoadedChain:
        """Take a prepared chain's blocks and adapters into use."""
        dtype, manifest, run = prepared.dtype, prepared.manifest, prepared.span.run
        for key, block in prepared.new_blocks.items():
            self._blocks.setdefault(key, _Resident(block))
        blocks = tuple(self._blocks[link.base, dtype].block for link in prepared.links())
        digests = layer_digests(prepared.span.chain, manifest, self._config.prefix_sharing)
        layers = layer_positions(manifest, run)
        lane = lane_of(prepared.span.chain, run, len(manifest.links), blocks, dtype)
        chain = LoadedChain(
            prepared.span.chain,
            manifest,
            run,
            blocks,
            dtype,
            lane,
            digests[layers.start - 1 : layers.stop - 1],
            growing_ropes(blocks),
        )
        for key in set(chain.base_keys()):
            self._blocks[key].users += 1
        for adapter_key in set(chain.adapter_keys()):
            if adapter_key not in self._adapters:
                self._add_adapter(adapter_key, prepared.new_adapters[adapter_key])
            self._adapters[adapter_key].users += 1
        return chain

    def detach(self, chain: LoadedChain) -> None:
        """Drop what no other loaded chain uses."""
        for adapter_key in set(chain.adapter_keys()):
            adapter = self._adapters[adapter_key]
            adapter.users -= 1
            if adapter.users == 0:
                banks = self._blocks[adapter_key[0]].banks
                for module, rows in adapter.rows.items():
                    banks[module].remove(rows)
                    if not len(banks[module]):
                        del banks[module]
                del self._adapters[adapter_key]
                self._compact(adapter_key[0], adapter.rows)
        for key in set(chain.base_keys()):
            self._blocks[key].users -= 1
            if self._blocks[key].users == 0:
                del self._blocks[key]
        _return_free_memory()

    def _compact(self, base: BlockKey, modules: Iterable[str]) -> None:
        """Give back what adapters that have left held in the banks of these modules."""
        banks = self._blocks[base].banks
        for module in modules:
            moved = banks[module].compact() if module in banks else {}
            if moved:
                for (other, _), adapter in self._adapters.items():
                    if other == base and module in adapter.rows:
                        adapter.rows[module] = moved[adapter.rows[module]]

    def _add_adapter(self, key: AdapterKey, changes: AdapterChanges) -> None:
        resident = self._blocks[key[0]]
        rows: dict[str, RowRange] = {}
        num_bytes = changes.num_bytes
        for module, change in changes.linears.items():
            bank = resident.banks.get(module)
            if bank is None:
                out_features, in_features = resident.block.module_shapes[module]
                bank = LoraBank(in_features, out_features, change.down.dtype, change.down.device)
                resident.banks[module] = bank
            rows[module] = bank.add(change.down, change.up, change.scale)
            num_bytes += change.down.nbytes + change.up.nbytes
        self._adapters[key] = _ResidentAdapter(rows, changes.without_matrices(), num_bytes)


def refuse_inexact(backend: Backend, dtype: torch.dtype | None = None) -> None:
    """Raise ConfigurationError where a backend's results may depend on what they are computed with."""
    missing = backend.why_inexact(dtype)
    if missing is not None:
        raise ConfigurationError(f"deterministic results need {missing.need}", hint=missing.hint)


def _return_free_memory() -> None:
    """Give freed memory back to the system: laying out a model frees as much as it keeps.

    Only glibc has this call; elsewhere the allocator decides.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
