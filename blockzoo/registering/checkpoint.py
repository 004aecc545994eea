"""Registering a checkpoint: every tensor goes into the block that its family says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockzoo.families import ChainPlan
from blockzoo.folders.checkpoint import ModelFolder
from blockzoo.folders.checkpoint_plan import match_tensors, plan_checkpoint
from blockzoo.folders.contents import LAYOUT_FILE, InBlock, InFile
from blockzoo.folders.outline import Outline
from blockzoo.manifest import BlockManifest, ChainId, ChainManifest, Link, TensorRef
from blockzoo.names import parse_ref
from blockzoo.registering.beside import check_files_beside
from blockzoo.registering.job import (
    RegisterJob,
    RegisterResult,
    folder_layout,
    noted,
    read_outline,
    with_tied,
)
from blockzoo.registering.upload import Upload, put_files, put_uploads
from blockzoo.store.writing import ManifestWriter


def register_checkpoint(job: RegisterJob, base_ref: str | None) -> RegisterResult:
    """Register a checkpoint, with differences to a base where they are smaller; see `register_folder`.

    Raises:
        CheckpointError: the checkpoint is refused.
    """
    folder = job.folder
    plan = plan_checkpoint(folder.config)
    matched = match_tensors(plan, folder.tensors)
    record = None if base_ref is None else job.store.resolve(*parse_ref(base_ref))
    base = None if record is None else read_outline(job.store, record)
    files = job.read_files()
    converted, notes = job.convert_tokenizer(files)
    beside = {**files, **converted}
    facts = check_files_beside(beside, beside.__getitem__, plan.vocab_size, plan.unread)
    uploads = _checkpoint_uploads(folder, plan, matched.sources, base)
    pieces = job.inspect(uploads)
    with job.registration() as registration:
        if record is not None:
            registration.rely_on_variant(record)
        refs = put_uploads(registration, uploads, pieces, job.totals)
        blocks = checkpoint_blocks(plan, matched.sources, refs)
        chain = put_checkpoint_chain(registration, blocks, plan)
        layout = folder_layout(folder, checkpoint_layout(plan, matched.sources, matched.ignored))
        extra = {place.filename: bytes(folder.read(name)) for name, place in matched.ignored.items()}
        own = {**beside, **extra, LAYOUT_FILE: layout.to_bytes()}
        stored = put_files(registration, own, job.totals)
        provenance = {**job.provenance(base), "architecture": architecture_of(folder.config), **facts}
        provenance |= noted((*plan.notes, *matched.notes, *notes))
        return job.finish(registration, chain, stored, provenance, tuple(matched.ignored))


def _checkpoint_uploads(
    folder: ModelFolder, plan: ChainPlan, sources: Mapping[tuple[int, str], str], base: Outline | None
) -> dict[str, Upload]:
    """Return each tensor that blocks use, once, by its name in the folder."""
    entries = folder.tensors
    uploads: dict[str, Upload] = {}
    for position, block in enumerate(plan.blocks):
        for name, planned in block.tensors.items():
            source = sources[position, name]
            if source not in uploads:
                at_base = base.tensors.get(planned.source) if base is not None else None
                entry = entries[source]
                uploads[source] = Upload(
                    entry.dtype,
                    entry.shape,
                    folder.read(source),
                    planned.chunk_rows,
                    at_base.ref if at_base else None,
                )
    return uploads


def checkpoint_blocks(
    plan: ChainPlan, sources: Mapping[tuple[int, str], str], refs: Mapping[str, TensorRef]
) -> list[BlockManifest]:
    """Return the blocks of a checkpoint's chain, given where its tensors are stored."""
    blocks = [
        BlockManifest(
            kind=block.kind,
            family=plan.family,
            config=block.config,
            tensors={name: refs[sources[position, name]] for name in block.tensors},
        )
        for position, block in enumerate(plan.blocks)
    ]
    blocks[-1] = with_tied(blocks[-1], blocks[0])
    return blocks


def put_checkpoint_chain(
    registration: ManifestWriter, blocks: Sequence[BlockManifest], plan: ChainPlan
) -> ChainId:
    """Write the manifests of a checkpoint's chain."""
    links = tuple(Link(block) for block in registration.put_blocks(blocks))
    return registration.put_chain(ChainManifest(plan.family, links, plan.context_length, plan.vocab_size))


def checkpoint_layout(
    plan: ChainPlan, sources: Mapping[tuple[int, str], str], ignored: Mapping[str, InFile]
) -> dict[str, InBlock | InFile]:
    """Return where each tensor of the folder is kept."""
    tensors: dict[str, InBlock | InFile] = dict(ignored)
    for position, block in enumerate(plan.blocks):
        for name in block.tensors:
            tensors.setdefault(sources[position, name], InBlock(position, None, name))
    return tensors


def architecture_of(config: Mapping[str, object]) -> str:
    """Return the first architecture that config.json names, or an empty string."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""
