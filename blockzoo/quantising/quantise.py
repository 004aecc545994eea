"""Making a quantised copy of a variant: new blocks for its layers and its head, everything else shared."""

from __future__ import annotations

import datetime
import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from blockzoo.errors import InvalidInputError, MissingPackageError
from blockzoo.evaluation.tokens import tokens_of
from blockzoo.folders.contents import LAYOUT_FILE
from blockzoo.json_report import JsonReport
from blockzoo.manifest import QUANTISED_FROM, VariantRecord
from blockzoo.names import check_name
from blockzoo.progress import NoProgress, Progress
from blockzoo.registering.upload import Totals
from blockzoo.zoo import Zoo

if TYPE_CHECKING:
    from blockzoo.evaluation.measure import Divergence

FORMATS = ("int8",)
"""What can be made. int8: weights and activations, both rotated within blocks of 64 inputs."""

QUANTISED = "quantised"
"""Key of a quantised variant's provenance: its format."""
QUALITY = "quality"
"""Key for what was measured on held-out text; absent where nothing was."""


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
        MissingPackageError: torch is not installed, or there is a text and `tokenizers` is not installed.
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
    manifests = {link.base: zoo.block(link.base) for link in chain.links}
    blocks = _blocks()
    blocks.check_quantisable(record, manifests)
    ids = None if text is None else tokens_of(zoo, record, text, chain.vocab_size)[1][:max_tokens]
    totals, reporter = Totals(), progress or NoProgress()
    wanted = {block: manifest for block, manifest in manifests.items() if manifest.kind in blocks.KINDS}
    with zoo.store.registration(f"quantise {ref}") as registration:
        registration.rely_on_variant(record)
        made = blocks.Quantiser(zoo, registration, totals, reporter).blocks(wanted)
        quantised = blocks.with_blocks(chain, made)
        found = registration.put_chain(quantised)
        quality = None
        if ids is not None:
            registration.flush()
            quality = blocks.measured(zoo, chain, quantised, ids, reporter)
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


def _blocks() -> ModuleType:
    try:
        import torch  # noqa: F401 - what the module needs
    except ImportError as error:
        raise MissingPackageError(
            "quantising needs torch, which is not installed here",
            hint="Install blockzoo[worker,router] on this machine.",
        ) from error
    from blockzoo.quantising import blocks

    return blocks


def _provenance(
    record: VariantRecord, fmt: str, errors: Mapping[int, float], quality: Divergence | None
) -> dict[str, str]:
    source = f"{record.name}@{record.version}"
    base = record.provenance.get("base")
    facts = {
        **({} if base is None else {"base": base}),
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
