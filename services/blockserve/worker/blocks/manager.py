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
from blockserve.common.api.cluster import ChainSpan, Run
from blockserve.common.errors import ConfigurationError, SpanError
from blockserve.worker.kv.pool import KvShape
from blockserve.worker.kv.prefix import LayerDigest, layer_digests
from blockserve.worker.limits import EngineConfig
from blockzoo.compute.build import ExecutableBlock, build_block
from blockzoo.compute.decoder import LayerBlock
from blockzoo.compute.ends import EmbeddingBlock, HeadBlock
from blockzoo.errors import CorruptManifestError, InvalidConfigError
from blockzoo.manifest import (
    BlockId,
    BlockKind,
    BlockManifest,
    ChainId,
    ChainManifest,
    DType,
    JsonValue,
    Link,
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
    """What requests must have in common to be computed in one batch.

    Attributes:
        hidden_size: columns of the hidden states.
        kv_shape: of all layers.
        first: position of the chain at which they begin.
    """

    hidden_size: int
    kv_shape: KvShape
    first: int = 0


@dataclass(slots=True, eq=False)
class LoadedChain:
    """A chain, or a run of its links, whose blocks are in memory.

    Attributes:
        id, manifest: the whole chain.
        run: the positions that are here; all of them where one process serves the chain.
        blocks: base blocks of the run in order, ready to compute.
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
    run: Run
    blocks: tuple[ExecutableBlock, ...]
    dtype: torch.dtype
    lane: Lane
    layer_digests: tuple[LayerDigest, ...] = ()
    num_requests: int = 0
    draining: bool = False
    pinned: bool = False
    last_used: int = 0

    @property
    def span(self) -> ChainSpan:
        """What names it among the loaded ones."""
        return ChainSpan(self.id, self.run)

    @property
    def is_head(self) -> bool:
        """Whether it begins with the embedding."""
        return self.run.first == 0

    @property
    def is_tail(self) -> bool:
        """Whether it ends with the head."""
        return self.run.end == len(self.manifest.links)

    @property
    def is_whole(self) -> bool:
        """Whether every position is here."""
        return self.is_head and self.is_tail

    @property
    def num_layers(self) -> int:
        """Layers of the run; they store keys and values."""
        return len(_layer_positions(self.manifest, self.run))

    @property
    def first_layer(self) -> int:
        """Position of the first layer of the run."""
        return _layer_positions(self.manifest, self.run).start

    def block_at(self, position: int) -> ExecutableBlock:
        """The base block at a position of the chain."""
        return self.blocks[position - self.run.first]

    def links(self) -> tuple[Link, ...]:
        """The links of the run."""
        return self.manifest.links[self.run.first : self.run.end]

    def base_keys(self) -> list[BlockKey]:
        """Keys of the base blocks, in order."""
        return [(link.base, self.dtype) for link in self.links()]

    def adapter_keys(self) -> list[AdapterKey]:
        """Every adapter of the run with the base block it is applied on."""
        return [((link.base, self.dtype), applied) for link in self.links() for applied in link.applied]


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
    """A run of a chain whose blocks were read and laid out, waiting to be attached between two passes."""

    span: ChainSpan
    manifest: ChainManifest
    dtype: torch.dtype
    new_blocks: dict[BlockKey, ExecutableBlock]
    new_adapters: dict[AdapterKey, AdapterTensors]

    def links(self) -> tuple[Link, ...]:
        """The links of the run."""
        return self.manifest.links[self.span.run.first : self.span.run.end]


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

    def whole(self, chain_id: ChainId) -> Run:
        """All positions of a chain (ManifestNotFoundError, CorruptManifestError)."""
        return Run(0, len(self._zoo.chain(chain_id).links))

    def estimate_sizes(self, span: ChainSpan) -> dict[Hashable, int]:
        """Bytes of what a run of a chain needs, whether in memory or not, judged by its manifests.

        Raises:
            ManifestNotFoundError, CorruptManifestError: the zoo is damaged.
            SpanError: the chain has no such run.
        """
        manifest, blocks, dtype = self._open(span)
        sizes: dict[Hashable, int] = {
            (base, dtype): _computed_bytes(block, dtype) for base, block in blocks.items()
        }
        for base, applied in _adapters(_links(manifest, span)):
            sizes[(base, dtype), applied] = _computed_bytes(self._zoo.block(applied), dtype)
        return sizes

    def bank(self, key: BlockKey, module: str) -> LoraBank:
        """The adapters on a module of a base block that has some."""
        return self._blocks[key].banks[module]

    def rows(self, key: BlockKey, adapter: BlockId) -> dict[str, RowRange]:
        """Where an adapter's rows are in the banks of a base block."""
        return self._adapters[key, adapter].rows

    def prepare(self, span: ChainSpan) -> PreparedChain:
        """Read, check and lay out what a run of a chain needs and is not in memory yet.

        Raises:
            CorruptBlobError, BlobNotFoundError, ManifestNotFoundError: the zoo is damaged.
            InvalidConfigError: a block cannot be run by this version.
            SpanError: the chain has no such run.
            ConfigurationError: deterministic results are asked for, and the dtype cannot have them here.
        """
        manifest, blocks, dtype = self._open(span)
        if self._config.deterministic and not can_pack(dtype, self._device):
            raise ConfigurationError(
                f"deterministic results need packed matrix products, which {dtype} has not on this machine",
                hint="Set dtype to float32, or serve without deterministic.",
            )
        bases = [base for base in blocks if (base, dtype) not in self._blocks]
        wanted = _adapters(_links(manifest, span))
        pairs = [pair for pair in wanted if ((pair[0], dtype), pair[1]) not in self._adapters]
        adapters = {applied: self._zoo.block(applied) for _, applied in pairs}
        with ThreadPoolExecutor(self._config.load_threads, thread_name_prefix="load") as pool:
            built = pool.map(lambda base: self._build(blocks[base], dtype), bases)
            new_blocks = {(base, dtype): block for base, block in zip(bases, built, strict=True)}
            read = pool.map(lambda pair: self._read_adapter(adapters[pair[1]], dtype), pairs)
            new_adapters = {
                ((base, dtype), name): part for (base, name), part in zip(pairs, read, strict=True)
            }
        _return_free_memory()
        return PreparedChain(span, manifest, dtype, new_blocks, new_adapters)

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
        layers = _layer_positions(manifest, run)
        lane = _lane(prepared.span.chain, run, len(manifest.links), blocks, dtype)
        chain = LoadedChain(
            prepared.span.chain,
            manifest,
            run,
            blocks,
            dtype,
            lane,
            digests[layers.start - 1 : layers.stop - 1],
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

    def _open(self, span: ChainSpan) -> tuple[ChainManifest, dict[BlockId, BlockManifest], torch.dtype]:
        """A chain's manifest, its base blocks' manifests within the run, and the type it is computed in.

        The whole chain is computed in one type, so each run of it has to ask the embedding.
        """
        manifest = self._zoo.chain(span.chain)
        if len(manifest.links) < 3:
            message = f"chain {span.chain} has {len(manifest.links)} links"
            raise CorruptManifestError(message, chain=span.chain)
        if span.run.end > len(manifest.links) or not _layer_positions(manifest, span.run):
            raise SpanError(
                f"positions {span.run.first} to {span.run.end} of a chain of {len(manifest.links)} links",
                hint="A run lies within the chain and holds at least one layer.",
                chain=span.chain,
            )
        blocks = {link.base: self._zoo.block(link.base) for link in _links(manifest, span)}
        embedding = manifest.links[0].base
        dtype = self._compute_dtype(blocks[embedding] if embedding in blocks else self._zoo.block(embedding))
        return manifest, blocks, dtype

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


def _links(manifest: ChainManifest, span: ChainSpan) -> tuple[Link, ...]:
    """The links of a run of the chain."""
    return manifest.links[span.run.first : span.run.end]


def _layer_positions(manifest: ChainManifest, run: Run) -> range:
    """The positions of a run that are neither the embedding nor the head."""
    return range(max(run.first, 1), min(run.end, len(manifest.links) - 1))


def _adapters(links: Iterable[Link]) -> list[tuple[BlockId, BlockId]]:
    """Every adapter with the base block it goes on, once."""
    return list(dict.fromkeys((link.base, applied) for link in links for applied in link.applied))


def _computed_bytes(manifest: BlockManifest, dtype: torch.dtype) -> int:
    """Bytes of a block's tensors in the type they are computed in."""
    elements = sum(ref.num_bytes // ref.dtype.itemsize for ref in manifest.tensors.values())
    return elements * dtype.itemsize


def _lane(
    chain: ChainId, run: Run, num_links: int, blocks: Sequence[ExecutableBlock], dtype: torch.dtype
) -> Lane:
    begins, ends = run.first == 0, run.end == num_links
    if (begins and not isinstance(blocks[0], EmbeddingBlock)) or (
        ends and not isinstance(blocks[-1], HeadBlock)
    ):
        raise CorruptManifestError(f"chain {chain} does not lead from an embedding to a head", chain=chain)
    shapes = set()
    for layer in blocks[int(begins) : len(blocks) - int(ends)]:
        if not isinstance(layer, LayerBlock):
            raise CorruptManifestError(f"chain {chain} has something else than layers inside", chain=chain)
        shapes.add(KvShape(layer.num_kv_heads, layer.head_dim, dtype))
    if len(shapes) != 1 or len({block.hidden_size for block in blocks}) != 1:
        raise CorruptManifestError(f"chain {chain} joins blocks of different shapes", chain=chain)
    return Lane(blocks[0].hidden_size, shapes.pop(), run.first)


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
