"""Making a quantised copy of a variant: new blocks for its layers and its head, everything else shared."""

from __future__ import annotations

import datetime
import importlib.metadata
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockkernels.linear import can_quantise, dequantise_int8, quantise_int8
from blockzoo import families
from blockzoo.compute.stored import INT8, INT8_SCALE, TORCH_DTYPES
from blockzoo.errors import InvalidInputError
from blockzoo.evaluation.forward import LinkLoader
from blockzoo.evaluation.measure import Divergence, measure
from blockzoo.evaluation.tokens import tokens_of, windows
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
"""What can be made. int8: weights and activations, both rotated within blocks of 64 inputs."""

QUANTISED, QUANTISED_FROM = "quantised", "quantised_from"
"""Keys of a quantised variant's provenance: its format, and the variant it was made from."""
QUALITY = "quality"
"""Key for what was measured on held-out text; absent where nothing was."""

WINDOW_TOKENS = 512
"""Tokens of a window of held-out text, or the model's context where that is shorter."""

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
        errors: relative error of the weights of each quantised block, by position in the chain.
        quality: what was measured on held-out text, or None.
        seconds: time it took.
    """

    record: VariantRecord
    source: str
    unchanged: bool
    num_bytes: int
    new_bytes: int
    stored_bytes: int
    errors: Mapping[int, float]
    quality: Divergence | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the result for `--json`, without the record's files."""
        values = {
            field: getattr(self, field)
            for field in ("source", "unchanged", "num_bytes", "new_bytes", "stored_bytes", "seconds")
        }
        quality = None if self.quality is None else asdict(self.quality)
        record = self.record
        return {
            "name": record.name,
            "version": record.version,
            "chain": record.chain,
            **values,
            "errors": dict(self.errors),
            "quality": quality,
        }


def quantise(
    zoo: Zoo,
    ref: str,
    *,
    name: str | None = None,
    fmt: str = "int8",
    text: str | None = None,
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> QuantiseResult:
    """Make a variant whose layers and head are quantised.

    Embedding, norms, biases and adapters stay as they are and shared. Equal blocks give equal quantised
    blocks, so variants that share blocks share the quantised ones too.

    Args:
        zoo: where the variant is.
        ref: NAME or NAME@VERSION.
        name: of the new variant; NAME-FORMAT when None.
        fmt: one of `FORMATS`.
        text: held-out text to measure the loss of quality on; see `blockzoo.evaluation`. What was found
            becomes part of the variant.
        max_tokens: most tokens of it.
        progress: told of the blocks that were quantised, then of the windows of text that were compared.

    Raises:
        VariantNotFoundError, InvalidNameError: of `ref` and `name`.
        InvalidInputError: the format is unknown, or the variant cannot be quantised.
        EvaluationError: the text is too short, or the quantised variant computes NaN.
        MissingPackageError: there is a text and `tokenizers` is not installed.
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
    ids = None if text is None else tokens_of(zoo, record, text, chain.vocab_size)[1][:max_tokens]
    totals, reporter = Totals(), progress or NoProgress()
    wanted = {block: manifest for block, manifest in blocks.items() if manifest.kind in _QUANTISED_KINDS}
    with zoo.store.registration(f"quantise {ref}") as registration:
        registration.rely_on_variant(record)
        made = _Quantiser(zoo, registration, totals, reporter).blocks(wanted)
        quantised = _with_blocks(chain, made)
        found = registration.put_chain(quantised)
        quality = None
        if ids is not None:
            registration.flush()
            quality = _measured(zoo, chain, quantised, ids, reporter)
        errors = {at: made[link.base].error for at, link in enumerate(chain.links) if link.base in made}
        done = registration.commit_unless_same(
            target,
            found,
            kind=record.kind,
            files={name: file for name, file in record.files.items() if name != LAYOUT_FILE},
            provenance=_provenance(record, fmt, errors, quality),
        )
    return QuantiseResult(
        record=done.record,
        source=f"{record.name}@{record.version}",
        unchanged=done.unchanged,
        num_bytes=sum(manifest.num_bytes for manifest in wanted.values()),
        new_bytes=sum(one.manifest.num_bytes for one in made.values()),
        stored_bytes=totals.stored_bytes,
        errors=errors,
        quality=quality,
        seconds=time.monotonic() - began,
    )


def _measured(
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


def check_quantisable(record: VariantRecord, blocks: Mapping[BlockId, BlockManifest]) -> None:
    """Raise InvalidInputError where a variant is quantised already or has a module that cannot be."""
    for manifest in blocks.values():
        families.check_known(manifest.family)
        if any(name.endswith(f".{INT8}") for name in manifest.tensors):
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
    if manifest.kind in _QUANTISED_KINDS:
        for name, ref in manifest.tensors.items():
            if name.endswith(".weight") and len(ref.shape) == 2:
                yield name.removesuffix(".weight"), ref


@dataclass(frozen=True, slots=True)
class _Made:
    """A quantised block: its id, its manifest, and the relative error of its weights."""

    block: BlockId
    manifest: BlockManifest
    error: float


class _Quantiser:
    """Makes quantised blocks, one at a time, so that memory holds one of them."""

    def __init__(self, zoo: Zoo, registration: Writer, totals: Totals, progress: Progress) -> None:
        self._zoo = zoo
        self._registration = registration
        self._totals = totals
        self._progress = progress

    def blocks(self, wanted: Mapping[BlockId, BlockManifest]) -> dict[BlockId, _Made]:
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

    def _block(self, manifest: BlockManifest) -> _Made:
        uploads: dict[str, Upload] = {}
        modules = dict(_weights(manifest))
        difference = norm = 0.0
        for module, ref in modules.items():
            weight = self._read(ref)
            quantised = quantise_int8(weight)
            uploads[f"{module}.{INT8}"] = _upload(DType.I8, quantised.values, ref.chunk_rows)
            uploads[f"{module}.{INT8_SCALE}"] = _upload(DType.F32, quantised.scales, ref.chunk_rows)
            difference += float((dequantise_int8(quantised) - weight.float()).square().sum())
            norm += float(weight.float().square().sum())
        pieces = inspect_uploads(uploads, lambda _: None, workers=1)
        refs = put_uploads(self._registration, uploads, pieces, self._totals)
        kept = {
            name: ref for name, ref in manifest.tensors.items() if name.removesuffix(".weight") not in modules
        }
        config = {key: value for key, value in manifest.config.items() if key != "tied"}
        result = replace(manifest, config=config, tensors={**kept, **refs})
        error = (difference / norm) ** 0.5 if norm else 0.0
        return _Made(self._registration.put_blocks([result])[0], result, error)

    def _read(self, ref: TensorRef) -> Tensor:
        chunks = [
            torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[ref.dtype]).view(shape)
            for data, shape in zip(self._zoo.read_tensor(ref), ref.chunk_shapes(), strict=True)
        ]
        return torch.cat(chunks)


def _upload(dtype: DType, tensor: Tensor, chunk_rows: int) -> Upload:
    data: memoryview = tensor.contiguous().numpy().data.cast("B")
    return Upload(dtype, tuple(tensor.shape), data, chunk_rows)


def _with_blocks(chain: ChainManifest, made: Mapping[BlockId, _Made]) -> ChainManifest:
    links = (replace(link, base=made[link.base].block) if link.base in made else link for link in chain.links)
    return replace(chain, links=tuple(links))


def _provenance(
    record: VariantRecord, fmt: str, errors: Mapping[int, float], quality: Divergence | None
) -> dict[str, str]:
    source = f"{record.name}@{record.version}"
    facts = {
        "source": f"{source}, quantised to {fmt}",
        QUANTISED: fmt,
        QUANTISED_FROM: source,
        "quantised_errors": " ".join(f"{at}:{error:.3g}" for at, error in errors.items()),
        "registered_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "registered_by": f"blockzoo {importlib.metadata.version('blockzoo')}",
    }
    return facts if quality is None else {**facts, QUALITY: describe(quality)}


def describe(quality: Divergence) -> str:
    """Return what was measured, in one line."""
    before, after = quality.perplexities
    return (
        f"perplexity {after:.4g}, before {before:.4g} ({after / before - 1:+.2%}); mean KL "
        f"{quality.mean_kl:.3g}; same most likely token at {quality.top1_agreement:.1%} of "
        f"{quality.num_tokens} tokens"
    )
