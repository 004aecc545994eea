"""A plain forward pass over whole windows of text: no pages, no cache, no batching of variants. Needs torch.

It drives the same blocks as the engine, through the same `BlockContext`, and is simple enough to
be seen to be right.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockkernels.attention import attend
from blockkernels.backends import DeviceUnavailableError, backend_for
from blockkernels.lora import OutputShape, shaped_lora_reference
from blockkernels.rotary import RopeParameters, RotaryTable, RotaryTables, inverse_frequencies
from blockzoo import families
from blockzoo.compute.build import ExecutableBlock, build_block
from blockzoo.compute.changes import AdapterChanges, AdapterReader
from blockzoo.compute.ends import HeadBlock
from blockzoo.compute.stored import TORCH_DTYPES, computed_type
from blockzoo.errors import InvalidConfigError, InvalidInputError
from blockzoo.manifest import BlockId, Link, TensorRef
from blockzoo.zoo import Zoo

# Blobs are read-only views of files; the tensors made from them are only read.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


@dataclass(frozen=True, slots=True)
class LoadedLink:
    """A link in memory: its base block, and the adapters on it in order."""

    block: ExecutableBlock
    adapters: tuple[AdapterChanges, ...]


class LinkLoader:
    """Reads links from a zoo; what two links share is in memory once.

    Args:
        zoo: where to read.
        dtype: what to compute in.
        device: where.

    Raises:
        InvalidInputError: there are no kernels for the device here.
    """

    def __init__(self, zoo: Zoo, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._zoo = zoo
        try:
            self._backend = backend_for(device)
        except DeviceUnavailableError as error:
            raise InvalidInputError(str(error), hint="Use cpu, or cuda if the machine has a GPU.") from error
        self._blocks: dict[BlockId, ExecutableBlock] = {}
        self._adapters: dict[tuple[BlockId, BlockId], AdapterChanges] = {}
        self._reader = AdapterReader(self.tensor, dtype, self._backend)

    def load(self, links: Iterable[Link]) -> list[LoadedLink]:
        """Read links.

        Raises:
            CorruptBlobError, BlobNotFoundError, ManifestNotFoundError: the zoo is damaged.
            InvalidConfigError: this version cannot run a block.
        """
        return [LoadedLink(self._block(link.base), self.adapters(link)) for link in links]

    def adapters(self, link: Link) -> tuple[AdapterChanges, ...]:
        """Read the adapters of a link; raises as `load` does."""
        return tuple(self._adapter(block, link.base) for block in link.applied)

    def tensor(self, ref: TensorRef, dtype: torch.dtype | None = None) -> Tensor:
        """Read a tensor in a type, without one in the compute type."""
        if ref.dtype not in TORCH_DTYPES:
            raise InvalidConfigError(f"a weight has the type {ref.dtype}, which cannot be computed with")
        chunks = [
            torch.frombuffer(data, dtype=TORCH_DTYPES[ref.dtype]).view(shape)
            for data, shape in zip(self._zoo.read_tensor(ref), ref.chunk_shapes(), strict=True)
        ]
        tensor = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        return tensor.to(self.device, dtype or self.dtype)

    def _adapter(self, block: BlockId, base: BlockId) -> AdapterChanges:
        if (block, base) not in self._adapters:
            manifests = self._zoo.block(block), self._zoo.block(base)
            self._adapters[block, base] = self._reader.changes(*manifests)
        return self._adapters[block, base]

    def _block(self, block: BlockId) -> ExecutableBlock:
        if block not in self._blocks:
            manifest = self._zoo.block(block)
            families.check_known(manifest.family)
            tensors = {
                name: self.tensor(ref, computed_type(name, ref, self.dtype))
                for name, ref in manifest.tensors.items()
            }
            self._blocks[block] = build_block(manifest, tensors, self._backend)
        return self._blocks[block]


class Windows:
    """A batch of windows of equal length, as one flat batch of tokens; see `BlockContext`.

    Args:
        ids: token ids of each window.
        loader: says type and device.
    """

    def __init__(self, ids: Sequence[Sequence[int]], loader: LinkLoader) -> None:
        self.length = len(ids[0])
        self.token_ids = torch.tensor(ids, device=loader.device).flatten()  # [windows * length]
        self._positions = torch.arange(self.length, device=loader.device).repeat(len(ids))
        self._dtype = loader.dtype
        self._tables: dict[RopeParameters, tuple[Tensor, Tensor]] = {}
        self._adapters: tuple[AdapterChanges, ...] = ()

    def run(self, links: Iterable[LoadedLink], x: Tensor) -> Tensor:
        """Compute links one after the other, the head excluded.

        Shape: x [tokens] token ids before the embedding, [tokens, hidden] behind it; result [tokens, hidden].
        """
        for link in links:
            assert not isinstance(link.block, HeadBlock)
            self._adapters = link.adapters
            x = link.block(x, self)
        return x

    def logits(self, link: LoadedLink, hidden: Tensor) -> Tensor:
        """Shape: hidden [rows, hidden], result [rows, vocab] float32."""
        assert isinstance(link.block, HeadBlock)
        self._adapters = link.adapters
        return link.block(hidden, self).float()

    def rotary(self, rope: RopeParameters) -> tuple[Tensor, Tensor]:
        """See `BlockContext`; every window begins at position 0."""
        if rope in self._tables:
            return self._tables[rope]
        device, dtype = self._positions.device, rope.table_dtype(self._dtype)
        if rope.is_fixed:
            table = RotaryTable(inverse_frequencies(rope, device), dtype, rope.scale)
            self._tables[rope] = table.at(self._positions, self.length)
        else:
            cos, sin = RotaryTables(rope, dtype, device).run(0, self.length, self.length)
            self._tables[rope] = cos[self._positions], sin[self._positions]
        return self._tables[rope]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `BlockContext`; a token sees the tokens of its own window up to itself."""
        parts = zip(query.split(self.length), key.split(self.length), value.split(self.length), strict=True)
        seen = [attend(q, k, v, scale=scale, window=window, softcap=softcap) for q, k, v in parts]
        return torch.cat(seen)

    def adapt(self, module: str, x: Tensor, y: Tensor) -> None:
        """See `BlockContext`; every token has the same adapters."""
        for adapter in self._adapters:
            if adapter.head is not None:
                adapter.head(x, y)
            if module in adapter.linears:
                change = adapter.linears[module]
                shape = change.shape or OutputShape()
                y.copy_(shaped_lora_reference(y, x, change.down, change.up, change.scale, shape))

    def adapt_embedding(self, token_ids: Tensor, hidden: Tensor) -> None:
        """See `BlockContext`."""
        for adapter in self._adapters:
            if adapter.embedding is not None:
                adapter.embedding(token_ids, hidden)
