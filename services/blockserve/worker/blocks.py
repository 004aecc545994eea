"""Blocks in memory: each distinct block once, whoever uses it.

Loading has two halves. Reading, checking and laying out happens in loader
threads while the engine runs; attaching happens in the engine's thread between
two passes, because it changes the adapter banks that passes read.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from blockkernels.linear import can_pack
from blockkernels.lora import LoraBank, RowRange
from blockserve.common.errors import ConfigurationError
from blockserve.worker.config import EngineConfig
from blockserve.worker.kv import KvShape
from blockserve.worker.prefix import LayerDigest, layer_digests
from blockzoo.errors import CorruptManifestError, InvalidConfigError
from blockzoo.families.compute import EmbeddingBlock, ExecutableBlock, HeadBlock, LayerBlock, build_block
from blockzoo.manifest import (
    BlockId,
    BlockKind,
    BlockManifest,
    ChainId,
    ChainManifest,
    DType,
    JsonValue,
    TensorRef,
)

# Blobs are read-only views of files; the tensors made from them are only read.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)

_TORCH_DTYPES = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
}

BlockKey = tuple[BlockId, torch.dtype]
"""A base block at a compute type."""
AdapterKey = tuple[BlockKey, BlockId]
"""An adapter on a base block."""


class BlockSource(Protocol):
    """Where blocks come from: a `blockzoo.zoo.Zoo`, or part of one."""

    def chain(self, chain_id: ChainId) -> ChainManifest:
        """The manifest of a chain."""
        ...

    def block(self, block_id: BlockId) -> BlockManifest:
        """The manifest of a block."""
        ...

    def read_tensor(self, ref: TensorRef) -> Sequence[memoryview]:
        """A tensor's bytes, one buffer for each of its chunks, checked against their digests."""
        ...


@dataclass(frozen=True, slots=True)
class Lane:
    """What requests must have in common to be computed in one batch."""

    hidden_size: int
    kv_shape: KvShape


@dataclass(slots=True, eq=False)
class LoadedChain:
    """A chain whose blocks are in memory.

    Attributes:
        id, manifest: the chain.
        blocks: base blocks in order, ready to compute.
        dtype: compute type of all its blocks.
        lane: which requests it can share a batch with.
        layer_digests: what keys its pages in the prefix cache; empty when that is off.
        num_requests: requests that use it now.
        draining: unload as soon as the last request ends.
        pinned: never unloaded to make room for another chain.
        last_used: number of its last use among all uses of chains.
    """

    id: ChainId
    manifest: ChainManifest
    blocks: tuple[ExecutableBlock, ...]
    dtype: torch.dtype
    lane: Lane
    layer_digests: tuple[LayerDigest, ...] = ()
    num_requests: int = 0
    draining: bool = False
    pinned: bool = False
    last_used: int = 0

    @property
    def num_layers(self) -> int:
        """Layers that store keys and values."""
        return len(self.blocks) - 2

    def base_keys(self) -> list[BlockKey]:
        """Keys of the base blocks, in order."""
        return [(link.base, self.dtype) for link in self.manifest.links]

    def adapter_keys(self) -> list[AdapterKey]:
        """Every adapter of the chain with the base block it is applied on."""
        return [
            ((link.base, self.dtype), applied) for link in self.manifest.links for applied in link.applied
        ]


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
    num_bytes: int
    users: int = 0


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    """An adapter read from the zoo, not yet in the banks: module -> (A [rank, in], B [out, rank], scale)."""

    modules: dict[str, tuple[Tensor, Tensor, float]]


@dataclass(frozen=True, slots=True)
class PreparedChain:
    """A chain whose blocks were read and laid out, waiting to be attached between two passes."""

    id: ChainId
    manifest: ChainManifest
    dtype: torch.dtype
    new_blocks: dict[BlockKey, ExecutableBlock]
    new_adapters: dict[AdapterKey, AdapterTensors]


class BlockManager:
    """Owns all blocks in memory.

    `prepare` runs in a loader thread, for one chain at a time; the rest belongs to the engine's thread.
    """

    def __init__(self, zoo: BlockSource, config: EngineConfig) -> None:
        """Make an empty manager that loads from `zoo`."""
        self._zoo = zoo
        self._config = config
        self._device = torch.device(config.device)
        self._blocks: dict[BlockKey, _Resident] = {}
        self._adapters: dict[AdapterKey, _ResidentAdapter] = {}
        self._manifests: dict[BlockId, BlockManifest] = {}

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

    def estimate_sizes(self, chain_id: ChainId) -> dict[Hashable, int]:
        """Bytes of what a chain needs, whether in memory or not, judged by its manifests.

        Raises:
            ManifestNotFoundError, CorruptManifestError: the zoo is damaged.
        """
        manifest, blocks, dtype = self._open(chain_id)
        sizes: dict[Hashable, int] = {
            (base, dtype): _computed_bytes(block, dtype) for base, block in blocks.items()
        }
        for base, applied in _adapters(manifest):
            sizes[(base, dtype), applied] = _computed_bytes(self._zoo.block(applied), dtype)
        return sizes

    def bank(self, key: BlockKey, module: str) -> LoraBank:
        """The adapters on a module of a base block that has some."""
        return self._blocks[key].banks[module]

    def rows(self, key: BlockKey, adapter: BlockId) -> dict[str, RowRange]:
        """Where an adapter's rows are in the banks of a base block."""
        return self._adapters[key, adapter].rows

    def prepare(self, chain_id: ChainId) -> PreparedChain:
        """Read, check and lay out what a chain needs and is not in memory yet.

        Raises:
            CorruptBlobError, BlobNotFoundError, ManifestNotFoundError: the zoo is damaged.
            InvalidConfigError: a block cannot be run by this version.
            ConfigurationError: deterministic results are asked for, and the dtype cannot have them here.
        """
        manifest, blocks, dtype = self._open(chain_id)
        if self._config.deterministic and not can_pack(dtype, self._device):
            raise ConfigurationError(
                f"deterministic results need packed matrix products, which {dtype} has not on this machine",
                hint="Set dtype to float32, or serve without deterministic.",
            )
        bases = [base for base in blocks if (base, dtype) not in self._blocks]
        pairs = [pair for pair in _adapters(manifest) if ((pair[0], dtype), pair[1]) not in self._adapters]
        adapters = {applied: self._zoo.block(applied) for _, applied in pairs}
        with ThreadPoolExecutor(self._config.load_threads, thread_name_prefix="load") as pool:
            built = pool.map(lambda base: self._build(blocks[base], dtype), bases)
            new_blocks = {(base, dtype): block for base, block in zip(bases, built, strict=True)}
            read = pool.map(lambda pair: self._read_adapter(adapters[pair[1]], dtype), pairs)
            new_adapters = {
                ((base, dtype), name): part for (base, name), part in zip(pairs, read, strict=True)
            }
        _return_free_memory()
        return PreparedChain(chain_id, manifest, dtype, new_blocks, new_adapters)

    def can_attach(self, prepared: PreparedChain) -> bool:
        """Whether every block that was in memory when the chain was prepared still is."""
        bases = {(link.base, prepared.dtype) for link in prepared.manifest.links}
        applied = {
            ((link.base, prepared.dtype), one) for link in prepared.manifest.links for one in link.applied
        }
        return bases <= {*self._blocks, *prepared.new_blocks} and applied <= {
            *self._adapters,
            *prepared.new_adapters,
        }

    def attach(self, prepared: PreparedChain) -> LoadedChain:
        """Take a prepared chain's blocks and adapters into use."""
        dtype = prepared.dtype
        for key, block in prepared.new_blocks.items():
            self._blocks.setdefault(key, _Resident(block))
        blocks = tuple(self._blocks[link.base, dtype].block for link in prepared.manifest.links)
        digests = layer_digests(prepared.id, prepared.manifest, self._config.prefix_sharing)
        lane = _lane(prepared.id, blocks, dtype)
        chain = LoadedChain(prepared.id, prepared.manifest, blocks, dtype, lane, digests)
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

    def _open(self, chain_id: ChainId) -> tuple[ChainManifest, dict[BlockId, BlockManifest], torch.dtype]:
        """A chain's manifest, its base blocks' manifests, and the type it is computed in."""
        manifest = self._zoo.chain(chain_id)
        if len(manifest.links) < 3:
            raise CorruptManifestError(f"chain {chain_id} has {len(manifest.links)} links", chain=chain_id)
        blocks = {link.base: self._zoo.block(link.base) for link in manifest.links}
        return manifest, blocks, self._compute_dtype(blocks[manifest.links[0].base])

    def _compute_dtype(self, embedding: BlockManifest) -> torch.dtype:
        if self._config.dtype != "auto":
            chosen: torch.dtype = getattr(torch, self._config.dtype)
            return chosen
        dtype = _TORCH_DTYPES.get(embedding.tensors["weight"].dtype, torch.float32)
        if dtype == torch.float64 or (dtype == torch.float16 and self._device.type == "cpu"):
            return torch.float32
        return dtype

    def _build(self, manifest: BlockManifest, dtype: torch.dtype) -> ExecutableBlock:
        tensors = {name: self._read(ref, dtype) for name, ref in manifest.tensors.items()}
        return build_block(manifest, tensors, exact=self._config.deterministic)

    def _read_adapter(self, manifest: BlockManifest, dtype: torch.dtype) -> AdapterTensors:
        modules = manifest.config.get("modules")
        if manifest.kind != BlockKind.ADAPTER or not isinstance(modules, dict):
            raise InvalidConfigError(
                f"block of kind {manifest.kind!r} cannot be applied on a base block by this version",
                hint="Upgrade blockzoo on this machine.",
                kind=manifest.kind,
            )
        return AdapterTensors(
            {
                module: (
                    self._read(manifest.tensors[f"{module}.lora_A"], dtype),
                    self._read(manifest.tensors[f"{module}.lora_B"], dtype),
                    _scale(module, settings),
                )
                for module, settings in modules.items()
            }
        )

    def _read(self, ref: TensorRef, dtype: torch.dtype) -> Tensor:
        """One tensor in memory of its own, or still in the file when a layout will copy it anyway."""
        chunks = [
            torch.frombuffer(data, dtype=_TORCH_DTYPES[ref.dtype]).view(shape)
            for data, shape in zip(self._zoo.read_tensor(ref), ref.chunk_shapes(), strict=True)
        ]
        tensor = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        if tensor.dtype != dtype or self._device.type != "cpu":
            return tensor.to(self._device, dtype)
        copied_later = len(ref.shape) == 2 and can_pack(dtype, self._device)
        return tensor if len(chunks) > 1 or copied_later else tensor.clone()

    def _add_adapter(self, key: AdapterKey, tensors: AdapterTensors) -> None:
        resident = self._blocks[key[0]]
        rows: dict[str, RowRange] = {}
        num_bytes = 0
        for module, (down, up, scale) in tensors.modules.items():
            bank = resident.banks.get(module)
            if bank is None:
                out_features, in_features = resident.block.module_shapes[module]
                bank = LoraBank(in_features, out_features, down.dtype, down.device)
                resident.banks[module] = bank
            rows[module] = bank.add(down, up, scale)
            num_bytes += down.nbytes + up.nbytes
        self._adapters[key] = _ResidentAdapter(rows, num_bytes)


def _adapters(manifest: ChainManifest) -> list[tuple[BlockId, BlockId]]:
    """Every adapter with the base block it goes on, once."""
    return list(dict.fromkeys((link.base, applied) for link in manifest.links for applied in link.applied))


def _computed_bytes(manifest: BlockManifest, dtype: torch.dtype) -> int:
    """Bytes of a block's tensors in the type they are computed in."""
    elements = sum(ref.num_bytes // ref.dtype.itemsize for ref in manifest.tensors.values())
    return elements * dtype.itemsize


def _lane(chain: ChainId, blocks: Sequence[ExecutableBlock], dtype: torch.dtype) -> Lane:
    first, layers, last = blocks[0], blocks[1:-1], blocks[-1]
    if not isinstance(first, EmbeddingBlock) or not isinstance(last, HeadBlock):
        raise CorruptManifestError(f"chain {chain} does not lead from an embedding to a head", chain=chain)
    shapes = set()
    for layer in layers:
        if not isinstance(layer, LayerBlock):
            raise CorruptManifestError(f"chain {chain} has something else than layers inside", chain=chain)
        shapes.add(KvShape(layer.num_kv_heads, layer.head_dim, dtype))
    if len(shapes) != 1 or len({block.hidden_size for block in blocks}) != 1:
        raise CorruptManifestError(f"chain {chain} joins blocks of different shapes", chain=chain)
    return Lane(first.hidden_size, shapes.pop())


def _scale(module: str, settings: JsonValue) -> float:
    if not isinstance(settings, dict):
        raise InvalidConfigError(f"adapter settings of {module} are {settings!r}", module=module)
    return float(str(settings["scale"]))


def _return_free_memory() -> None:
    """Give freed memory back to the system: laying out a model frees as much as it keeps.

    Only glibc has this call; elsewhere the allocator decides.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
