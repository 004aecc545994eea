"""Registering an adapter: the base's chain with adapter blocks on its links.

Whole tensors that an adapter brings replace the base's in private blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np

from blockzoo import families
from blockzoo.errors import AdapterError, UnsupportedAdapterError
from blockzoo.folders.adapters.config import AdapterConfig, parse_adapter_config
from blockzoo.folders.adapters.plan import AdapterPlan, LoraPair
from blockzoo.folders.chat_templates import has_templates, is_template_file
from blockzoo.folders.checkpoint import FolderKind, ModelFolder
from blockzoo.folders.contents import LAYOUT_FILE, OWN_PREFIX
from blockzoo.folders.files import TOKENIZER, TOKENIZER_CONFIG, parse_json_object
from blockzoo.folders.outline import Outline
from blockzoo.folders.safetensors_io import TensorEntry
from blockzoo.folders.tokenizers.conversion import CONVERTED, VOCABULARIES
from blockzoo.manifest import (
    QUANTISED_FROM,
    BlockId,
    BlockKind,
    BlockManifest,
    ChainId,
    FileRef,
    JsonValue,
    Link,
    TensorRef,
    VariantRecord,
)
from blockzoo.names import near_names, parse_ref
from blockzoo.registering.beside import check_files_beside
from blockzoo.registering.job import (
    RegisterJob,
    RegisterResult,
    noted,
    read_outline,
    with_tied,
)
from blockzoo.registering.recipe import find_recipe
from blockzoo.registering.upload import Upload, put_files, put_uploads
from blockzoo.store.writing import ManifestWriter, WritableZoo

_NOT_INHERITED = ("model.safetensors.index.json", "README.md", "LICENSE", "LICENSE.txt", "NOTICE")
"""Files of a base that say something about its own folder, not about how to serve it."""

_TOKENIZER_FILES = (
    TOKENIZER,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files of a tokenizer; a tokenizer.json holds what the others do."""


def register_adapter(job: RegisterJob, base_ref: str | None) -> RegisterResult:
    """Register an adapter on a variant; see `register_folder`.

    Raises:
        AdapterError: the adapter is refused, or it is not known what it belongs to.
    """
    folder = job.folder
    config = parse_adapter_config(folder.config)
    record = job.store.resolve(*parse_ref(base_ref or _recorded_base(job.store, config)))
    base = read_outline(job.store, record)
    check_adaptable(record, base)
    recipe = find_recipe(config, folder, base, lambda a, b: _same_bytes(folder, a, b))
    plan = recipe.plan
    files = job.read_files()
    converted, notes = job.convert_tokenizer(files)
    files |= converted
    facts = check_files_beside(files, files.__getitem__, vocab_with(plan, folder.tensors, base))
    uploads = _adapter_uploads(folder, plan, base)
    pieces = job.inspect(uploads)
    with job.registration() as registration:
        registration.rely_on_variant(record)
        refs = put_uploads(registration, uploads, pieces, job.totals)
        chain = put_adapter_chain(registration, base, plan, refs)
        extra = {place.filename: bytes(folder.read(name)) for name, place in plan.ignored.items()}
        own = put_files(registration, {**files, **extra, LAYOUT_FILE: recipe.layout(folder)}, job.totals)
        return job.finish(
            registration,
            chain,
            {**inherited_files(record, files, files.__getitem__), **own},
            {**job.provenance(base), **facts, **noted((*plan.notes, *notes))},
            tuple(plan.ignored),
        )


def inherited_files(
    base: VariantRecord, own: Collection[str], read: Callable[[str], bytes]
) -> dict[str, FileRef]:
    """Return the files that an adapter takes over from its base.

    What is spread over several files is replaced as a whole, as the base's part could win otherwise: an
    adapter with a chat template takes over no template file, and one with a tokenizer.json no other file of
    a tokenizer but tokenizer_config.json.

    Args:
        base: the base.
        own: names of the adapter's own kept files.
        read: gives the contents of one of them.
    """
    config = parse_json_object(TOKENIZER_CONFIG, read(TOKENIZER_CONFIG)) if TOKENIZER_CONFIG in own else {}
    own = frozenset(own)
    own_templates = has_templates(own, config)

    def is_taken(name: str) -> bool:
        if name == CONVERTED:
            return own.isdisjoint((CONVERTED, TOKENIZER, *VOCABULARIES))
        if name in own or name in _NOT_INHERITED or name.startswith(OWN_PREFIX):
            return False
        if name in _TOKENIZER_FILES:
            return TOKENIZER not in own
        return not (own_templates and (is_template_file(name) or name == "chat_template.json"))

    return {name: ref for name, ref in base.files.items() if is_taken(name)}


def vocab_with(plan: AdapterPlan, entries: Mapping[str, TensorEntry], base: Outline) -> int:
    """Return the rows of the head with an adapter, which may bring a larger one."""
    source = plan.replaced.get(base.head, {}).get("lm_head.weight")
    return base.chain.vocab_size if source is None else entries[source].shape[0]


def check_adaptable(record: VariantRecord, base: Outline) -> None:
    """Raise UnsupportedAdapterError when a variant cannot be the base of an adapter."""
    if record.kind == FolderKind.ADAPTER or base.has_adapters:
        raise not_adaptable(base.ref)
    if any(block.is_quantised for block in base.blocks):
        raise UnsupportedAdapterError(
            f"{base.ref} is quantised; adapters are registered on what it was made from",
            hint=f"Register it on {record.provenance.get(QUANTISED_FROM, 'that')}, then quantise the "
            "adapter with `blockzoo quantize`.",
            base=base.ref,
        )


def not_adaptable(ref: str) -> UnsupportedAdapterError:
    """Return the error for a variant that cannot be the base of an adapter."""
    return UnsupportedAdapterError(
        f"{ref} has an adapter itself; adapters on adapters are not supported",
        hint="Give the checkpoint that the adapter was trained on with --base.",
        base=ref,
    )


def _adapter_uploads(folder: ModelFolder, plan: AdapterPlan, base: Outline) -> dict[str, Upload]:
    entries = folder.tensors
    uploads = {}
    for sources in plan.adapted.values():
        for source in sources.values():
            uploads[source] = Upload(entries[source].dtype, entries[source].shape, folder.read(source))
    for position, replaced in plan.replaced.items():
        for name, source in replaced.items():
            chunk_rows = families.CHUNK_ROWS if name in ("weight", "lm_head.weight") else 0
            at_base = base.blocks[position].tensors[name]
            entry = entries[source]
            uploads[source] = Upload(entry.dtype, entry.shape, folder.read(source), chunk_rows, at_base)
    return uploads


def _base_blocks(base: Outline, plan: AdapterPlan, refs: Mapping[str, TensorRef]) -> list[BlockManifest]:
    """Return the base blocks of the new chain, in order; most are the base's own."""
    blocks = [
        _with_replaced(block, plan.replaced.get(position, {}), refs)
        for position, block in enumerate(base.blocks)
    ]
    if base.head in plan.replaced:
        blocks[-1] = with_tied(blocks[-1], blocks[0])
    return blocks


def put_adapter_chain(
    registration: ManifestWriter, base: Outline, plan: AdapterPlan, refs: Mapping[str, TensorRef]
) -> ChainId:
    """Write the manifests of a base's chain with an adapter on it."""
    blocks = _base_blocks(base, plan, refs)
    adapters = {
        position: _adapter_block(
            base, position, plan, {name: refs[source] for name, source in sources.items()}
        )
        for position, sources in plan.adapted.items()
    }
    ids = iter(
        registration.put_blocks([*(blocks[position] for position in plan.replaced), *adapters.values()])
    )
    bases: list[BlockId] = [link.base for link in base.chain.links]
    for position in plan.replaced:
        bases[position] = next(ids)
    applied = {position: (next(ids),) for position in adapters}
    links = tuple(Link(block, applied.get(position, ())) for position, block in enumerate(bases))
    vocab_size = blocks[-1].tensors["lm_head.weight"].shape[0]
    return registration.put_chain(replace(base.chain, links=links, vocab_size=vocab_size))


def _with_replaced(
    block: BlockManifest, replaced: Mapping[str, str], refs: Mapping[str, TensorRef]
) -> BlockManifest:
    """Return the block with some tensors of the adapter's own; row counts follow the matrices."""
    if not replaced:
        return block
    tensors = {**block.tensors, **{name: refs[source] for name, source in replaced.items()}}
    config = dict(block.config)
    if "vocab_size" in config:
        matrix = tensors["weight"] if block.kind == BlockKind.EMBEDDING else tensors["lm_head.weight"]
        config["vocab_size"] = matrix.shape[0]
    return replace(block, config=config, tensors=tensors)


def _adapter_block(
    base: Outline, position: int, plan: AdapterPlan, tensors: Mapping[str, TensorRef]
) -> BlockManifest:
    """Return what an adapter adds at one position.

    Modules with nothing but LoRA stand under "modules". With anything else they all stand under "changes",
    which programs that know only LoRA refuse.
    """
    pairs, rows = plan.pairs.get(position, ()), plan.rows.get(position)
    changes = {pair.module: _change(pair) for pair in pairs}
    if rows is not None:
        changes.setdefault(rows.module, {})["tokens"] = list(rows.tokens)
    modules: dict[str, JsonValue] = {**changes}
    key = "modules" if rows is None and all(pair.is_plain for pair in pairs) else "changes"
    target = {0: "embedding", base.head: "head"}.get(position, "layer")
    return BlockManifest(BlockKind.ADAPTER, base.chain.family, {"target": target, key: modules}, tensors)


def _change(pair: LoraPair) -> dict[str, JsonValue]:
    change: dict[str, JsonValue] = {"rank": pair.rank, "scale": repr(pair.scale)}
    if pair.source_bias is not None:
        change["bias"] = True
    if pair.source_magnitude is not None:
        change["magnitude"] = True
    return change


def _same_bytes(folder: ModelFolder, a: str, b: str) -> bool:
    return np.array_equal(np.frombuffer(folder.read(a), np.uint8), np.frombuffer(folder.read(b), np.uint8))


def _recorded_base(store: WritableZoo, config: AdapterConfig) -> str:
    """Return the variant that has the name PEFT recorded, whole or its last part."""
    recorded = config.base_model.rstrip("/")
    names = store.names()
    for candidate in (recorded, recorded.rpartition("/")[2]):
        if candidate in names:
            return candidate
    near = near_names(recorded.rpartition("/")[2], names) or sorted(names)[:5]
    known = f" Registered: {', '.join(near)}." if near else " Register the base first."
    raise AdapterError(
        f"no variant matches the base that the adapter was trained on ({recorded[:200]!r})",
        hint=f"Give the base with --base NAME.{known}",
        base_model=recorded[:200],
    )
