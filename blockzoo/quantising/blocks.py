"""Quantised blocks of a chain, and how far their outputs are from the originals'. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blockkernels.linear import can_quantise, dequantise_int8, quantise_int8
from blockzoo import families
from blockzoo.compute.stored import TORCH_DTYPES
from blockzoo.errors import InvalidInputError
from blockzoo.evaluation.forward import LinkLoader
from blockzoo.evaluation.measure import Divergence, measure
from blockzoo.evaluation.tokens import windows
from blockzoo.manifest import (
    INT8,
    INT8_SCALE,
    QUANTISED_FROM,
    BlockId,
    BlockKind,
    BlockManifest,
    ChainManifest,
    DType,
    TensorRef,
    VariantRecord,
)
from blockzoo.progress import Progress
from blockzoo.registering.upload import Totals, Upload, inspect_uploads, put_uploads
from blockzoo.store.writing import Writer
from blockzoo.zoo import Zoo

WINDOW_TOKENS = 512
"""Tokens of a window of held-out text, or the model's context where that is shorter."""

KINDS = (BlockKind.LAYER, BlockKind.HEAD)
"""Blocks that are quantised."""


@dataclass(frozen=True, slots=True)
class QuantisedBlock:
    """A quantised block: its id, its manifest, and the relative error of its weights."""

    block: BlockId
    manifest: BlockManifest
    error: float


class Quantiser:
    """Makes quantised blocks, one at a time, so that memory holds one of them."""

    def __init__(self, zoo: Zoo, registration: Writer, totals: Totals, progress: Progress) -> None:
        self._loader = LinkLoader(zoo, torch.float32, torch.device("cpu"))
        self._registration = registration
        self._totals = totals
        self._progress = progress

    def blocks(self, wanted: Mapping[BlockId, BlockManifest]) -> dict[BlockId, QuantisedBlock]:
        """Return the quantised block of each, stored."""
        self._progress.start("quantising blocks", len(wanted))
        made = {}
        try:
            for block, manifest in wanted.items():
                made[block] = self._block(manifest)
                self._progress.advance(1)
        finally:
            self._progress.finish()
        return made

    def _block(self, manifest: BlockManifest) -> QuantisedBlock:
        uploads: dict[str, Upload] = {}
        modules = dict(_weights(manifest))
        difference = norm = 0.0
        for module, ref in modules.items():
            weight = self._loader.tensor(ref)
            quantised = quantise_int8(weight)
            uploads[f"{module}.{INT8}"] = _upload(DType.I8, quantised.values, ref.chunk_rows)
            uploads[f"{module}.{INT8_SCALE}"] = _upload(DType.F32, quantised.scales, ref.chunk_rows)
            difference += float((dequantise_int8(quantised) - weight).square().sum())
            norm += float(weight.square().sum())
        pieces = inspect_uploads(uploads, lambda _: None, workers=1)
        refs = put_uploads(self._registration, uploads, pieces, self._totals)
        kept = {
            name: ref for name, ref in manifest.tensors.items() if name.removesuffix(".weight") not in modules
        }
        config = {key: value for key, value in manifest.config.items() if key != "tied"}
        result = replace(manifest, config=config, tensors={**kept, **refs})
        error = (difference / norm) ** 0.5 if norm else 0.0
        return QuantisedBlock(self._registration.put_blocks([result])[0], result, error)


def check_quantisable(record: VariantRecord, blocks: Mapping[BlockId, BlockManifest]) -> None:
    """Raise InvalidInputError where a variant is quantised already or has a module that cannot be."""
    for manifest in blocks.values():
        families.check_known(manifest.family)
        if manifest.is_quantised:
            raise InvalidInputError(
                f"{record.name}@{record.version} is quantised already",
                hint=f"Quantise {record.provenance.get(QUANTISED_FROM, 'what it was made from')}.",
            )
        for module, weight in _weights(manifest):
            if not can_quantise(weight.shape[1]) or weight.dtype not in TORCH_DTYPES:
                raise InvalidInputError(
                    f"{module} of {record.name} has {weight.shape[1]} inputs; int8 needs a multiple of 64",
                    module=module,
                )


def _weights(manifest: BlockManifest) -> Iterator[tuple[str, TensorRef]]:
    """The linear modules of a block, and their weights."""
    if manifest.kind in KINDS:
        for name, ref in manifest.tensors.items():
            if name.endswith(".weight") and len(ref.shape) == 2:
                yield name.removesuffix(".weight"), ref


def with_blocks(chain: ChainManifest, made: Mapping[BlockId, QuantisedBlock]) -> ChainManifest:
    """Return a chain with quantised blocks in the place of those they were made from."""
    links = (replace(link, base=made[link.base].block) if link.base in made else link for link in chain.links)
    return replace(chain, links=tuple(links))


def measured(
    zoo: Zoo, chain: ChainManifest, quantised: ChainManifest, ids: list[int], progress: Progress
) -> Divergence:
    """Compare the outputs of both chains, both computed in float32."""
    loader = LinkLoader(zoo, torch.float32, torch.device("cpu"))
    texts = windows(ids, min(WINDOW_TOKENS, chain.context_length))
    progress.start("comparing windows of text", len(texts))
    done = 0

    def advance(num_tokens: int) -> None:
        nonlocal done
        before, done = done // len(texts[0]), done + num_tokens
        progress.advance(done // len(texts[0]) - before)

    try:
        original, changed = loader.load(chain.links), loader.load(quantised.links)
        return measure(loader, original, changed, 1, texts, advance)
    finally:
        progress.finish()


def _upload(dtype: DType, tensor: Tensor, chunk_rows: int) -> Upload:
    data: memoryview = tensor.contiguous().numpy().data.cast("B")
    return Upload(dtype, tuple(tensor.shape), data, chunk_rows)
