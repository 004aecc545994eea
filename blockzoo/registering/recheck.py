"""Checking what somebody else wants to register: make the manifests once more, by the code that
registers folders here, from the pushed config, headers and blobs, and insist that they are the same.

Nobody has to enumerate what a hostile manifest could say: only one chain is right for the files. Bytes
of tensors are checked before, when they come in (digest, and no NaN).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from blockzoo.errors import CorruptionError, InvalidManifestError, NotFoundError
from blockzoo.families import CHUNK_ROWS
from blockzoo.folders.adapters.config import parse_adapter_config
from blockzoo.folders.adapters.plan import plan_adapter
from blockzoo.folders.checkpoint import FolderKind, check_shards
from blockzoo.folders.checkpoint_plan import match_tensors, plan_checkpoint
from blockzoo.folders.contents import LAYOUT_FILE, FolderLayout, InBlock, InFile
from blockzoo.folders.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    INDEX,
    TOKENIZER,
    check_kept_file,
    is_kept,
    parse_json_object,
)
from blockzoo.folders.safetensors_io import TensorEntry, parse_header
from blockzoo.folders.tokenizers.bounds import check_tokenizer
from blockzoo.folders.tokenizers.conversion import CONVERTED, converted_note, source_of
from blockzoo.manifest import BlockId, BlockManifest, ChainManifest, DType, FileRef, TensorRef, VariantRecord
from blockzoo.registering.adapter import (
    check_adaptable,
    inherited_files,
    put_adapter_chain,
    vocab_with,
)
from blockzoo.registering.beside import check_files_beside
from blockzoo.registering.checkpoint import architecture_of, checkpoint_layout, put_checkpoint_chain
from blockzoo.registering.checkpoint import checkpoint_blocks as make_blocks
from blockzoo.registering.job import noted, read_outline
from blockzoo.registering.recipe import adapter_layout
from blockzoo.store.writing import ManifestRecorder
from blockzoo.store.zoo_store import ZooStore


@dataclass(frozen=True, slots=True)
class Pushed:
    """A variant that is to be registered; its blobs are stored.

    Attributes:
        kind: "checkpoint" or "adapter".
        chain: its chain.
        blocks: every block that the chain names.
        files: its files.
        base: the registered variant that an adapter belongs to.
    """

    kind: str
    chain: ChainManifest
    blocks: Mapping[BlockId, BlockManifest]
    files: Mapping[str, FileRef]
    base: VariantRecord | None = None


def recheck(store: ZooStore, pushed: Pushed) -> dict[str, str]:
    """Check a pushed variant as registering its folder would.

    Returns:
        What its provenance says about the contents.

    Raises:
        UnsupportedArchitectureError, CheckpointError, AdapterError: as registering the folder would.
        InvalidManifestError: the manifests are not those that its files make.
    """
    layout = _read_layout(store, pushed)
    entries = _read_entries(store, pushed, layout)
    refs = _refs(pushed, layout, entries)
    recorder = ManifestRecorder()
    facts = {"num_bytes": str(sum(entry.num_bytes for entry in entries.values()))}
    if pushed.kind == FolderKind.CHECKPOINT:
        facts |= _remake_checkpoint(store, pushed, layout, entries, refs, recorder)
    else:
        facts |= _remake_adapter(store, pushed, layout, entries, refs, recorder)
    claimed = ManifestRecorder().put_chain(pushed.chain)
    if claimed not in recorder.chains:
        raise _invalid("the chain does not follow from its files", chain=claimed)
    return facts


def _remake_checkpoint(
    store: ZooStore,
    pushed: Pushed,
    layout: FolderLayout,
    entries: Mapping[str, TensorEntry],
    refs: Mapping[str, TensorRef],
    recorder: ManifestRecorder,
) -> dict[str, str]:
    config = parse_json_object(CONFIG, _read(store, pushed, CONFIG))
    plan = plan_checkpoint(config)
    matched = match_tensors(plan, entries)
    _require_equal("layout", layout.tensors, checkpoint_layout(plan, matched.sources, matched.ignored))
    own = {*layout.filenames, LAYOUT_FILE, *(place.filename for place in matched.ignored.values())}
    converted = _converted(pushed, layout)
    own |= converted
    _require_equal("files", set(pushed.files), own)
    _check_ignored(pushed, matched.ignored, entries)
    for position, block in enumerate(plan.blocks):
        for name, planned in block.tensors.items():
            source = matched.sources[position, name]
            _check_ref(store, source, entries[source], refs, planned.chunk_rows)
    put_checkpoint_chain(recorder, make_blocks(plan, matched.sources, refs), plan)
    names = {*layout.filenames, *converted}
    read = partial(_read, store, pushed)
    beside = check_files_beside(names, read, plan.vocab_size, plan.unread)
    return {
        "architecture": architecture_of(config),
        **beside,
        **noted((*plan.notes, *matched.notes, *_conversion_notes(layout, converted))),
    }


def _remake_adapter(
    store: ZooStore,
    pushed: Pushed,
    layout: FolderLayout,
    entries: Mapping[str, TensorEntry],
    refs: Mapping[str, TensorRef],
    recorder: ManifestRecorder,
) -> dict[str, str]:
    if pushed.base is None:
        raise _invalid("the push does not name the base of the adapter")
    base = read_outline(store, pushed.base)
    check_adaptable(pushed.base, base)
    config = parse_adapter_config(parse_json_object(ADAPTER_CONFIG, _read(store, pushed, ADAPTER_CONFIG)))
    plan = plan_adapter(config, entries, base, lambda a, b: refs.get(a) == refs.get(b))
    _require_equal("layout", layout.tensors, adapter_layout(plan))
    converted = _converted(pushed, layout)
    own = {*layout.filenames, *converted}
    inherited = inherited_files(pushed.base, own, partial(_read, store, pushed))
    kept = {place.filename for place in plan.ignored.values()}
    _require_equal("files", set(pushed.files), {*own, LAYOUT_FILE, *kept, *inherited})
    _check_ignored(pushed, plan.ignored, entries)
    for name, ref in inherited.items():
        _require_equal(f"file {name}", pushed.files[name], ref)
    for sources in plan.adapted.values():
        for source in sources.values():
            _check_ref(store, source, entries[source], refs, 0)
    for replaced in plan.replaced.values():
        for name, source in replaced.items():
            chunk_rows = CHUNK_ROWS if name in ("weight", "lm_head.weight") else 0
            _check_ref(store, source, entries[source], refs, chunk_rows)
    put_adapter_chain(recorder, base, plan, refs)
    vocab_size = vocab_with(plan, entries, base)
    beside = check_files_beside(own, partial(_read, store, pushed), vocab_size)
    notes = noted((*plan.notes, *_conversion_notes(layout, converted)))
    return {"base": base.ref, **beside, **notes}


def _converted(pushed: Pushed, layout: FolderLayout) -> set[str]:
    """The converted tokenizer, where the push may have one.

    transformers made it at the pusher's side, and not every server has transformers: the zoo takes it as it
    is, within the bounds of any tokenizer.
    """
    return {CONVERTED} & pushed.files.keys() if source_of(layout.filenames) is not None else set()


def _conversion_notes(layout: FolderLayout, converted: set[str]) -> list[str]:
    source = source_of(layout.filenames)
    return [converted_note(source)] if source is not None and converted else []


def _check_ignored(pushed: Pushed, ignored: Mapping[str, InFile], entries: Mapping[str, TensorEntry]) -> None:
    """Check the files of tensors that no block uses."""
    for name, place in ignored.items():
        if pushed.files[place.filename].size != entries[name].num_bytes:
            raise _invalid(f"the file of tensor {name[:200]!r} has the wrong size")


def _read_layout(store: ZooStore, pushed: Pushed) -> FolderLayout:
    """Read the layout and check the files beside the weights."""
    try:
        FolderKind(pushed.kind)
        layout = FolderLayout.from_bytes(_read(store, pushed, LAYOUT_FILE))
    except (CorruptionError, ValueError) as error:
        raise _invalid(str(error)) from error
    for name in layout.filenames:
        if not is_kept(name):
            raise _invalid(f"{name[:100]!r} is not a file that is kept with a variant", file=name[:100])
        check_kept_file(name, _read(store, pushed, name))
    for name in {TOKENIZER, CONVERTED} & pushed.files.keys():
        check_tokenizer(_read(store, pushed, name))
    for name in layout.shards:
        if "/" in name or (pushed.kind == FolderKind.ADAPTER and name != ADAPTER_WEIGHTS):
            raise _invalid(f"{name[:100]!r} is not the name of a weight file", file=name[:100])
    for name, ref in pushed.files.items():
        info = store.blobs.info(ref.blob)
        if (info.dtype, info.shape) != (DType.U8, (ref.size,)):
            raise _invalid(f"the blob of file {name[:100]!r} is not {ref.size} bytes", file=name[:100])
    return layout


def _read_entries(store: ZooStore, pushed: Pushed, layout: FolderLayout) -> dict[str, TensorEntry]:
    """Read the headers of the weight files."""
    shards = {file: parse_header(file, header.encode(), None) for file, header in layout.shards.items()}

    def is_equal(name: str) -> bool:
        """Bytes of a tensor are pushed once; the pusher's side compared them."""
        return len({(e[name].dtype, e[name].shape) for e in shards.values() if name in e}) == 1

    check_shards(shards, lambda: parse_json_object(INDEX, _read(store, pushed, INDEX)), is_equal)
    return {name: entry for entries in shards.values() for name, entry in entries.items()}


def _refs(pushed: Pushed, layout: FolderLayout, entries: Mapping[str, TensorEntry]) -> dict[str, TensorRef]:
    """Find where the pushed blocks keep each tensor that they keep."""
    refs = {}
    for name, place in layout.tensors.items():
        if name not in entries:
            raise _invalid(f"the layout names tensor {name[:200]!r}, which no header has", tensor=name[:200])
        if isinstance(place, InFile):
            continue
        try:
            refs[name] = pushed.blocks[_block_id(pushed.chain, place)].tensors[place.name]
        except (IndexError, KeyError):
            raise _invalid(f"no block has tensor {name[:200]!r}", tensor=name[:200]) from None
    return refs


def _block_id(chain: ChainManifest, place: InBlock) -> BlockId:
    if place.position < 0 or (place.applied or 0) < 0:
        raise IndexError
    link = chain.links[place.position]
    return link.base if place.applied is None else link.applied[place.applied]


def _check_ref(
    store: ZooStore, source: str, entry: TensorEntry, refs: Mapping[str, TensorRef], chunk_rows: int
) -> None:
    """Check that a tensor is stored with the type and shape that its header says, cut as it must be."""
    ref = refs.get(source)
    if ref is None:
        raise _invalid(f"no block has tensor {source[:200]!r}", tensor=source[:200])
    rows = chunk_rows if chunk_rows and entry.shape[0] > chunk_rows else 0
    wanted = (entry.dtype, entry.shape, rows)
    if (ref.dtype, ref.shape, ref.chunk_rows) != wanted:
        raise _invalid(f"tensor {source[:200]!r} is not stored as its header says", tensor=source[:200])
    for blob, shape in zip(ref.blobs, ref.chunk_shapes(), strict=True):
        info = store.blobs.info(blob)
        if (info.dtype, info.shape) != (ref.dtype, shape):
            raise _invalid(f"blob {blob} is not part of tensor {source[:200]!r}", blob=blob)


def _read(store: ZooStore, pushed: Pushed, name: str) -> bytes:
    if name not in pushed.files:
        raise _invalid(f"the file {name} is missing", file=name)
    try:
        return bytes(store.blobs.read(pushed.files[name].blob))
    except NotFoundError as error:
        raise _invalid(f"the file {name} is not stored", file=name) from error


def _require_equal(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise _invalid(f"the {what} do not follow from the config and the headers")


def _invalid(problem: str, **metadata: object) -> InvalidManifestError:
    return InvalidManifestError(
        f"the push is refused: {problem}",
        hint="Push with the `blockzoo` of this server's version; if it is that version already, report "
        "this as a bug.",
        **metadata,
    )
