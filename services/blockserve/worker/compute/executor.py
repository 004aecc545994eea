"""Runs one pass: every ready segment once, in depth order, over all requests at it.

A pass groups its chunks into lanes (requests whose hidden states have the same
shape), orders them by their path through the segments, and walks the segments
from the embedding to the head. At each segment the base blocks run once for all
requests there, whatever their variants; adapters are added for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from blockkernels.attention import BatchAttention
from blockkernels.backends import Backend, FusedLayer, FusedLayers
from blockkernels.rotary import RopeParameters, RotaryTable, RotaryTables, inverse_frequencies
from blockserve.worker.blocks.chain import LoadedChain
from blockserve.worker.blocks.manager import BlockManager, refuse_inexact
from blockserve.worker.blocks.segments import Segment, SegmentId, SegmentMap
from blockserve.worker.compute.adapters import AdapterPlans, ChainRun, merge_runs
from blockserve.worker.compute.counters import SegmentCounters
from blockserve.worker.compute.lane_batch import LaneBatch, table_of
from blockserve.worker.kv.pool import KvPool, KvShape
from blockserve.worker.requests.running import Chunk, ChunkHidden, ChunkLogits, ChunkResult
from blockzoo.compute.decoder import LayerBlock
from blockzoo.compute.ends import EmbeddingBlock, HeadBlock
from blockzoo.manifest import ChainId


class Executor:
    """Computes passes. Only the engine's thread uses it.

    Attributes:
        backend: computes.
        plans: what adapters add to a batch.
        counters: of each segment.
    """

    def __init__(
        self,
        blocks: BlockManager,
        pools: dict[KvShape, KvPool],
        backend: Backend,
        *,
        deterministic: bool = False,
    ) -> None:
        """Compute with the given blocks and pages.

        Raises:
            ConfigurationError: `deterministic`, and the backend cannot compute so here.
        """
        if deterministic:
            refuse_inexact(backend)
        self.backend = backend
        self._pools = pools
        self._segments = SegmentMap()
        self._rotary_tables: dict[tuple[RopeParameters, torch.dtype], RotaryTable | RotaryTables] = {}
        self.plans = AdapterPlans(blocks, backend, deterministic)
        self._in_one_call: dict[tuple[SegmentId, int, int | None], FusedLayers | None] = {}
        self._scratch = backend.scratch(0)
        self.counters: dict[SegmentId, SegmentCounters] = {}

    @property
    def segments(self) -> SegmentMap:
        """The segments of the loaded chains."""
        return self._segments

    def use_segments(self, segments: SegmentMap) -> None:
        """Chains came or went: go on with new segments."""
        self._segments = segments
        self.plans.clear()
        self._in_one_call.clear()
        known = self.counters
        self.counters = {
            segment.id: known.get(segment.id, SegmentCounters([0] * len(segment.blocks)))
            for segment in segments.ordered
        }

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], before: Callable[[], None] | None = None) -> list[ChunkResult]:
        """Compute the chunks' keys and values, and the logits of those that need any.

        Of chunks whose chain goes on elsewhere, the hidden states that leave the run instead.
        `before` is called when everything is prepared.
        """
        results: list[ChunkResult] = []
        by_lane: dict[object, list[Chunk]] = {}
        for chunk in chunks:
            by_lane.setdefault(chunk.running.chain.lane, []).append(chunk)
        batches: list[LaneBatch] = []
        for members in by_lane.values():
            members.sort(key=self._path_order)
            pool = self._pools[members[0].running.chain.lane.kv_shape]
            batches.append(LaneBatch(members, pool, self.backend.device))
        if before is not None:
            before()
        for batch in batches:
            results.extend(self._run_lane(batch))
        return results

    def _path_order(self, chunk: Chunk) -> tuple[tuple[int, ...], ChainId, int]:
        chain = chunk.running.chain.span
        return self._segments.paths[chain], chain.chain, chunk.running.order

    def _run_lane(self, batch: LaneBatch) -> Iterable[ChunkResult]:
        visits: dict[int, list[int]] = {}
        for place, chunk in enumerate(batch.chunks):
            for index in self._segments.paths[chunk.running.chain.span]:
                visits.setdefault(index, []).append(place)
        results: list[ChunkResult] = []
        for index in sorted(visits):
            results.extend(self._run_segment(self._segments.ordered[index], batch, visits[index]))
        for place, chunk in enumerate(batch.chunks):
            if not chunk.running.chain.is_tail:
                results.append(ChunkHidden(chunk, batch.at(batch.rows([place]))))
        return results

    def _run_segment(self, segment: Segment, batch: LaneBatch, places: Sequence[int]) -> list[ChunkLogits]:
        """Run one segment over the chunks at `places` of the lane."""
        chunks = [batch.chunks[place] for place in places]
        counters = self.counters[segment.id]
        rows = batch.rows(places)
        context = _SegmentContext(self, batch, places, rows)
        hidden = batch.at(rows) if segment.first else None  # the embedding makes its own
        chain = chunks[0].running.chain
        offset = 0
        while offset < len(segment.blocks):
            position = segment.first + offset
            block = chain.block_at(position)
            context.move_to(position)
            if isinstance(block, HeadBlock):
                return self._run_head(block, context, _present(hidden), chunks, counters, offset)
            if offset == 0:
                counters.record([(chunk.running.chain, chunk.num_tokens) for chunk in chunks])
            layers = self._layers_from(segment, offset, chain)
            if layers is not None and (plain := context.count_plain(len(layers))) < len(layers):
                layers = self._layers_from(segment, offset, chain, plain)
            count = 1 if layers is None else len(layers)
            for place in range(offset, offset + count):
                counters.block_calls[place] += 1
            if isinstance(block, EmbeddingBlock):
                hidden = block(batch.token_ids[rows], context)
            elif layers is None:
                hidden = block(_present(hidden), context)
            else:
                assert isinstance(block, LayerBlock)
                context.run_layers(layers, block.rope, _present(hidden))
            offset += count
        batch.put(rows, _present(hidden))
        return []

    def _layers_from(
        self, segment: Segment, offset: int, chain: LoadedChain, most: int | None = None
    ) -> FusedLayers | None:
        """The segment's layers from there on that one call can compute, `most` of them."""
        key = (segment.id, offset, most)
        if key not in self._in_one_call:
            kernels: list[FusedLayer] = []
            alike = None
            for position in range(segment.first + offset, segment.first + len(segment.blocks))[:most]:
                block = chain.block_at(position)
                if not isinstance(block, LayerBlock) or block.kernel is None:
                    break
                alike = alike or (block.rope, block.kernel.sizes)
                if (block.rope, block.kernel.sizes) != alike:
                    break
                kernels.append(block.kernel)
            self._in_one_call[key] = self.backend.join_layers(kernels) if kernels else None
        return self._in_one_call[key]

    def _run_head(
        self,
        block: HeadBlock,
        context: _SegmentContext,
        hidden: Tensor,
        chunks: Sequence[Chunk],
        counters: SegmentCounters,
        offset: int,
    ) -> list[ChunkLogits]:
        """Logits of the rows needed: the last of each chunk that samples, or all for prompt logits."""
        wanted: list[tuple[Chunk, int]] = []
        picked: list[int] = []
        row = 0
        for chunk in chunks:
            if chunk.running.wants_prompt_logits and chunk.start < len(chunk.running.request.prompt):
                picked.extend(range(row, row + chunk.num_tokens))
                wanted.append((chunk, chunk.num_tokens))
            elif chunk.samples:
                picked.append(row + chunk.num_tokens - 1)
                wanted.append((chunk, 1))
            row += chunk.num_tokens
        if not wanted:
            return []
        if len(picked) < row:
            hidden = hidden[torch.tensor(picked, device=hidden.device)]
        runs = [(chunk.running.chain, count) for chunk, count in wanted]
        context.narrow_to(runs)
        if offset == 0:
            counters.record(runs)
        counters.block_calls[offset] += 1
        logits = block(hidden, context).float()
        parts = logits.split([count for _, count in wanted])
        return [ChunkLogits(chunk, part) for (chunk, _), part in zip(wanted, parts, strict=True)]

    def rotary_table(self, rope: RopeParameters, dtype: torch.dtype) -> RotaryTable | RotaryTables:
        """Angles of all positions of a rotary embedding, computed once."""
        key = (rope, rope.table_dtype(dtype))
        if key not in self._rotary_tables:
            device = self.backend.device
            self._rotary_tables[key] = (
                RotaryTable(inverse_frequencies(rope, device), key[1], rope.scale)
                if rope.is_fixed
                else RotaryTables(rope, key[1], device)
            )
        return self._rotary_tables[key]

    def scratch(self, num_bytes: int) -> Tensor:
        """Memory for one call of a kernel; kept, because fresh memory costs a page fault for each page."""
        if self._scratch.numel() < num_bytes:
            self._scratch = self.backend.scratch(num_bytes)
        return self._scratch


def _present(hidden: Tensor | None) -> Tensor:
    """The hidden states, which only the embedding may lack."""
    assert hidden is not None
    return hidden


class _SegmentContext:
    """What the blocks of one segment ask about the batch; see `blockzoo.compute.decoder.BlockContext`."""

    def __init__(
        self, executor: Executor, batch: LaneBatch, places: Sequence[int], rows: slice | Tensor
    ) -> None:
        self._executor = executor
        self._backend = executor.backend
        self._batch = batch
        self._chunks = [batch.chunks[place] for place in places]
        self._rows = rows
        self._runs = merge_runs([(chunk.running.chain, chunk.num_tokens) for chunk in self._chunks])
        self._tables: dict[RopeParameters, tuple[Tensor, Tensor]] = {}
        self._position = 0
        self._plan = executor.plans.of(self._runs)
        self._attention: BatchAttention | None = None

    def move_to(self, position: int) -> None:
        """Stand at a block of the chain."""
        self._position = position

    def narrow_to(self, runs: Iterable[ChainRun]) -> None:
        """Go on with fewer rows of each chunk, at the same block."""
        self._plan = self._executor.plans.of(merge_runs(runs))

    def rotary(self, rope: RopeParameters) -> tuple[Tensor, Tensor]:
        """Cosine and sine for the rows, computed once a pass for each set of parameters."""
        if rope not in self._tables:
            whole = self._batch.tables.get(rope)
            if whole is None:
                table = self._executor.rotary_table(rope, self._batch.hidden.dtype)
                whole = self._batch.tables[rope] = self._batch.angles(table)
            rows = self._rows
            self._tables[rope] = whole if self._batch.is_all(rows) else (whole[0][rows], whole[1][rows])
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
        """Store the new keys and values and attend."""
        layer = self._position - self._batch.first_layer
        pages = self._in_pages()
        return pages(query, key, value, layer=layer, scale=scale, window=window, softcap=softcap)

    def run_layers(self, layers: FusedLayers, rope: RopeParameters | None, hidden: Tensor) -> None:
        """Compute the layers from here on in one call, the result in place of `hidden`."""
        cos, sin = (None, None) if rope is None else self.rotary(rope)
        layers(
            hidden,
            cos,
            sin,
            attention=self._in_pages(),
            number=self._position - self._batch.first_layer,
            adapters=self._plan.of_layers(self._position, len(layers)),
            scratch=self._executor.scratch(layers.scratch_bytes(hidden.shape[0])),
        )

    def _in_pages(self) -> BatchAttention:
        """The attention of the chunks, for all layers of the segment."""
        if self._attention is None:
            pool, chunks = self._batch.pool, self._chunks
            self._attention = self._executor.backend.attention(
                pool.keys,
                pool.values,
                pool.page_tokens,
                [table_of(chunk).index for chunk in chunks],
                [chunk.end for chunk in chunks],
                [chunk.num_tokens for chunk in chunks],
            )
        return self._attention

    def adapt(self, module: str, x: Tensor, y: Tensor) -> None:
        """Do what the batch's adapters do at a module."""
        plan = self._plan.at(self._position)
        for tokens, changes in plan.ends:
            if changes.head is not None:
                changes.head(x[tokens], y[tokens])
        planned = plan.modules.get(module)
        if planned is None:
            return
        if planned.plain is not None:
            self._backend.add_lora(y, x, planned.bank, planned.plain)
        if planned.shaped is not None:
            self._backend.add_shaped_lora(y, x, planned.bank, *planned.shaped)

    def adapt_embedding(self, token_ids: Tensor, hidden: Tensor) -> None:
        """Change the rows of the embedding as the batch's adapters do."""
        for tokens, changes in self._plan.at(self._position).ends:
            if changes.embedding is not None:
                changes.embedding(token_ids[tokens], hidden[tokens])

    def count_plain(self, num_layers: int) -> int:
        """How many of the next layers can be computed in one call, as far as adapters go."""
        return self._plan.count_plain(self._position, num_layers)
