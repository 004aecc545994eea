"""Making a quantised copy of a variant: new blocks for its layers and its head, everything else shared."""

from __future__ import annotations

import datetime
import importlib.metadata
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockkernels.linear import can_quantise, quantise_int8
from blockzoo import families
from blockzoo.compute.stored import INT8, INT8_SCALE, TORCH_DTYPES
from blockzoo.errors import InvalidInputError
from blockzoo.folders.contents import LAYOUT_FILE
from blockzoo.json_report import JsonReport
from blockzoo.manifest import (
    BlockId,
    BlockKind,
    BlockManifest,
    ChainManifest,
    DType,
    TensorRef,
    VariantRecord,
)
from blockzoo.names import check_name
from blockzoo.progress import NoProgress, Progress
from blockzoo.registering.upload import Totals, Upload, inspect_uploads, put_uploads
from blockzoo.store.writing import Writer
from blockzoo.zoo import Zoo

FORMATS = ("int8",)
"""What can be made. int8: weights and activations, rotated by Hadamard matrices within blocks of 64 inputs."""

QUANTISED, QUANTISED_FROM = "quantised", "quantised_from"
"""Keys of a quantised variant's provenance: its format, and the variant it was made from."""

_QUANTISED_KINDS = (BlockKind.LAYER, BlockKind.HEAD)


@dataclass(frozen=True, slots=True)
class QuantiseResult(JsonReport):
    """What was made.

    Attributes:
        record: the version that is current now.
        source: NAME@VERSION that it was made from.
        unchanged: the current version was the same already.
        num_bytes: bytes of the base blocks that were quantised, before.
        new_bytes: bytes of the quantised ones.
        stored_bytes: of these, bytes that the zoo did not have.
        seconds: time it took.
    """

    record: VariantRecord
    source: str
    unchanged: bool
    num_bytes: int
    new_bytes: int
    stored_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the result for `--json`, without the record's files."""
        values = {
            field: getattr(self, field)
            for field in ("source", "unchanged", "num_bytes", "new_bytes", "stored_bytes", "seconds")
        }
        return {
            "name": self.record.name,
            "version": self.record.version,
            "chain": self.record.chain,
            **values,
        }


def quantise(
    zoo: Zoo, ref: str, *, name: str | None = None, fmt: str = "int8", progress: Progress | None = None
) -> QuantiseResult:
    """Make a variant whose layers and head are quantised.

    Embedding, norms, biases and adapters stay as they are and shared. Equal blocks give equal quantised
    blocks, so variants that share blocks share the quantised ones too.

    Args:
        zoo: where the variant is.
        ref: NAME or NAME@VERSION.
        name: of the new variant; NAME-FORMAT when None.
        fmt: one of `FORMATS`.
        progress: told of the bytes that were quantised.

    Raises:
        VariantNotFoundError, InvalidNameError: of `ref` and `name`.
        InvalidInputError: the format is unknown, or the variant cannot be quantised.
        BlobNotFoundError, CorruptBlobError: the zoo is damaged.
        StorageError, ConflictError: nothing was committed.
    """
    if fmt not in FORMATS:
        raise InvalidInputError(f"{fmt[:80]!r} is no known format", hint=f"Use {', '.join(FORMATS)}.")
    began = time.monotonic()
    record = zoo.resolve(ref)
    target = check_name(name or f"{record.name}-{fmt}")
    if target == record.name:
        raise InvalidInputError(
            f"{target} would take the place of the variant that it is made from",
            hint="Give another --name; the original stays.",
        )
    chain = zoo.chain(record.chain)
    blocks = {link.base: zoo.block(link.base) for link in chain.links}
    check_quantisable(record, blocks)
    totals = Totals()
    wanted = {block: manifest for block, manifest in blocks.items() if manifest.kind in _QUANTISED_KINDS}
    with zoo.store.registration(f"quantise {ref}") as registration:
        registration.rely_on_variant(record)
        made = _Quantiser(zoo, registration, totals, progress or NoProgress()).blocks(wanted)
        done = registration.commit_unless_same(
            target,
            registration.put_chain(
                _with_blocks(chain, {block: made_id for block, (made_id, _) in made.items()})
            ),
            kind=record.kind,
            files={name: file for name, file in record.files.items() if name != LAYOUT_FILE},
            provenance=_provenance(record, fmt),
        )
    return QuantiseResult(
        record=done.record,
        source=f"{record.name}@{record.version}",
        unchanged=done.unchanged,
        num_bytes=sum(manifest.num_bytes for manifest in wanted.values()),
        new_bytes=sum(manifest.num_bytes for _, manifest in made.values()),
        stored_bytes=totals.stored_bytes,
        seconds=time.monotonic() - began,
    )


def check_quantisable(record: VariantRecord, blocks: Mapping[BlockId, BlockManifest]) -> None:
    """Raise InvalidInputError where a variant is quantised already or has a module that cannot be."""
    for manifest in blocks.values():
        families.check_known(manifest.family)
        if any(name.endswith(f".{INT8}") for name in manifest.tensors):
            raise InvalidInputError(
                f"{record.name}@{record.version} is quantised already",
                hint=f"Quantise {record.provenance.get(QUANTISED_FROM, 'the variant that it was made from')}.",
            )
        for module, weight in _weights(manifest):
            if not can_quantise(weight.shape[1]) or weight.dtype not in TORCH_DTYPES:
                raise InvalidInputError(
                    f"{module} of {record.name} has {weight.shape[1]} inputs; int8 needs a multiple of 64",
                    module=module,
                )


def _weights(manifest: BlockManifest) -> Iterator[tuple[str, TensorRef]]:
    """The linear modules of a block, and their weights."""
    if manifest.kind in _QUANTISED_KINDS:
        for name, ref in manifest.tensors.items():
            if name.endswith(".weight") and len(ref.shape) == 2:
                yield name.removesuffix(".weight"), ref


class _Quantiser:
    """Makes quantised blocks, one at a time, so that memory holds one of them."""

    def __init__(self, zoo: Zoo, registration: Writer, totals: Totals, progress: Progress) -> None:
        self._zoo = zoo
        self._registration = registration
        self._totals = totals
        self._progress = progress

    def blocks(self, wanted: Mapping[BlockId, BlockManifest]) -> dict[BlockId, tuple[BlockId, BlockManifest]]:
        """Return the quantised block of each, stored."""
        self._progress.start("quantising", sum(manifest.num_bytes for manifest in wanted.values()))
        made = {}
        try:
            for block, manifest in wanted.items():
                quantised = self._block(manifest)
                made[block] = self._registration.put_blocks([quantised])[0], quantised
                self._progress.advance(manifest.num_bytes)
        finally:
            self._progress.finish()
        return made

    def _block(self, manifest: BlockManifest) -> BlockManifest:
        modules = dict(_weights(manifest))
        uploads: dict[str, Upload] = {}
        for module, ref in modules.items():
            weight = quantise_int8(self._read(ref))
            chunk_rows = ref.chunk_rows
            uploads[f"{module}.{INT8}"] = _upload(DType.I8, weight.values, chunk_rows)
            uploads[f"{module}.{INT8_SCALE}"] = _upload(DType.F32, weight.scales, chunk_rows)
        pieces = inspect_uploads(uploads, lambda _: None, workers=1)
        refs = put_uploads(self._registration, uploads, pieces, self._totals)
        kept = {
            name: ref for name, ref in manifest.tensors.items() if name.removesuffix(".weight") not in modules
        }
        config = {key: value for key, value in manifest.config.items() if key != "tied"}
        return replace(manifest, config=config, tensors={**kept, **refs})

    def _read(self, ref: TensorRef) -> Tensor:
        chunks = [
            torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[ref.dtype]).view(shape)
            for data, shape in zip(self._zoo.read_tensor(ref), ref.chunk_shapes(), strict=True)
        ]
        return torch.cat(chunks)


def _upload(dtype: DType, tensor: Tensor, chunk_rows: int) -> Upload:
    data = memoryview(tensor.contiguous().numpy()).cast("B")
    return Upload(dtype, tuple(tensor.shape), data, chunk_rows)


def _with_blocks(chain: ChainManifest, made: Mapping[BlockId, BlockId]) -> ChainManifest:
    links = tuple(replace(link, base=made.get(link.base, link.base)) for link in chain.links)
    return replace(chain, links=links)


def _provenance(record: VariantRecord, fmt: str) -> dict[str, str]:
    source = f"{record.name}@{record.version}"
    return {
        "source": f"{source}, quantised to {fmt}",
        QUANTISED: fmt,
        QUANTISED_FROM: source,
        "registered_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "registered_by": f"blockzoo {importlib.metadata.version('blockzoo')}",
    }
