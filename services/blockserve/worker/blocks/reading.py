"""Reads a run of a chain from the zoo: manifests, base blocks ready to compute, adapters."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from blockkernels.backends import Backend
from blockserve.common.api.cluster import ChainSpan, Run
from blockserve.common.errors import SpanError
from blockserve.worker.blocks.chain import adapters_on, layer_positions, links_of
from blockserve.worker.limits import EngineConfig
from blockzoo import families
from blockzoo.compute.build import ExecutableBlock, build_block
from blockzoo.compute.changes import AdapterChanges, AdapterReader
from blockzoo.compute.stored import TORCH_DTYPES, computed_type
from blockzoo.errors import CorruptManifestError
from blockzoo.manifest import (
    BlockId,
    BlockManifest,
    ChainId,
    ChainManifest,
    TensorRef,
)

# Blobs are read-only views of files; the tensors made from them are only read.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


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
class OpenedRun:
    """A run of a chain as its manifests describe it.

    Attributes:
        span: which run.
        manifest: of the whole chain.
        blocks: manifests of the run's base blocks.
        dtype: type that the whole chain is computed in.
    """

    span: ChainSpan
    manifest: ChainManifest
    blocks: dict[BlockId, BlockManifest]
    dtype: torch.dtype

    def adapters(self) -> list[tuple[BlockId, BlockId]]:
        """Every adapter of the run with the base block it is applied on, once."""
        return adapters_on(links_of(self.manifest, self.span))


class BlockReader:
    """Reads blocks from a zoo in the type they are computed in. Any thread may use it."""

    def __init__(self, zoo: BlockSource, config: EngineConfig, backend: Backend) -> None:
        """Read from `zoo` what `backend` will compute, in the type that `config` names."""
        self._zoo = zoo
        self._config = config
        self._backend = backend

    def whole(self, chain_id: ChainId) -> Run:
        """All positions of a chain (ManifestNotFoundError, CorruptManifestError)."""
        return Run(0, len(self._zoo.chain(chain_id).links))

    def estimate_sizes(self, span: ChainSpan) -> dict[Hashable, int]:
        """Bytes of what a run of a chain needs, whether in memory or not, judged by its manifests.

        Raises:
            ManifestNotFoundError, CorruptManifestError: the zoo is damaged.
            SpanError: the chain has no such run.
        """
        run = self.open(span)
        dtype = run.dtype
        sizes: dict[Hashable, int] = {
            (base, dtype): _computed_bytes(block, dtype) for base, block in run.blocks.items()
        }
        for base, applied in run.adapters():
            sizes[(base, dtype), applied] = _computed_bytes(self.manifest(applied), dtype)
        return sizes

    def manifest(self, block: BlockId) -> BlockManifest:
        """The manifest of a block (ManifestNotFoundError, CorruptManifestError)."""
        return self._zoo.block(block)

    def open(self, span: ChainSpan) -> OpenedRun:
        """The manifests of a run of a chain.

        The whole chain is computed in one type, so each run of it has to ask the embedding.

        Raises:
            ManifestNotFoundError, CorruptManifestError: the zoo is damaged.
            SpanError: the chain has no such run.
        """
        manifest = self._zoo.chain(span.chain)
        if len(manifest.links) < 3:
            message = f"chain {span.chain} has {len(manifest.links)} links"
            raise CorruptManifestError(message, chain=span.chain)
        if span.run.end > len(manifest.links) or not layer_positions(manifest, span.run):
            raise SpanError(
                f"positions {span.run.first} to {span.run.end} of a chain of {len(manifest.links)} links",
                hint="A run lies within the chain and holds at least one layer.",
                chain=span.chain,
            )
        blocks = {link.base: self._zoo.block(link.base) for link in links_of(manifest, span)}
        embedding = manifest.links[0].base
        dtype = self._compute_dtype(blocks[embedding] if embedding in blocks else self._zoo.block(embedding))
        return OpenedRun(span, manifest, blocks, dtype)

    def _compute_dtype(self, embedding: BlockManifest) -> torch.dtype:
        if self._config.dtype != "auto":
            chosen: torch.dtype = getattr(torch, self._config.dtype)
            return chosen
        stored = TORCH_DTYPES.get(embedding.tensors["weight"].dtype, torch.float32)
        return self._backend.compute_dtype(stored)

    def build(self, manifest: BlockManifest, dtype: torch.dtype) -> ExecutableBlock:
        """Read, check and lay out a base block.

        Raises:
            CorruptBlobError, BlobNotFoundError: the zoo is damaged.
            InvalidConfigError: the block cannot be run by this version.
        """
        families.check_known(manifest.family)
        tensors = {
            name: self._read(ref, computed_type(name, ref, dtype)) for name, ref in manifest.tensors.items()
        }
        return build_block(manifest, tensors, self._backend, exact=self._config.deterministic)

    def read_adapter(
        self, manifest: BlockManifest, base: BlockManifest, dtype: torch.dtype
    ) -> AdapterChanges:
        """Read and check an adapter that goes on a base block; raises as `build`."""
        reader = AdapterReader(self._read, dtype, self._backend, exact=self._config.deterministic)
        return reader.changes(manifest, base)

    def _read(self, ref: TensorRef, dtype: torch.dtype) -> Tensor:
        """One tensor in memory of its own, or still in the file when a layout will copy it anyway."""
        chunks = [
            torch.frombuffer(data, dtype=TORCH_DTYPES[ref.dtype]).view(shape)
            for data, shape in zip(self._zoo.read_tensor(ref), ref.chunk_shapes(), strict=True)
        ]
        tensor = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        moved = tensor.to(self._backend.device, dtype)
        copied_later = len(ref.shape) == 2 and self._backend.copies_weights(dtype)
        return moved if moved is not tensor or len(chunks) > 1 or copied_later else moved.clone()


def _computed_bytes(manifest: BlockManifest, dtype: torch.dtype) -> int:
    """Bytes of a block's tensors in the type they are computed in."""
    return sum(
        ref.num_bytes // ref.dtype.itemsize * computed_type(name, ref, dtype).itemsize
        for name, ref in manifest.tensors.items()
    )
