"""Registering a checkpoint: every tensor goes into the block that its family says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockzoo.checkpoint import ModelFolder
from blockzoo.checkpoint_plan import match_tensors, plan_checkpoint
from blockzoo.contents import LAYOUT_FILE, FolderLayout, InBlock, InFile
from blockzoo.families import ChainPlan
from blockzoo.manifest import BlockManifest, ChainId, ChainManifest, Link, TensorRef
from blockzoo.names import parse_ref
from blockzoo.outline import Outline
from blockzoo.register_job import RegisterJob, RegisterResult, folder_layout, read_outline, with_tied
from blockzoo.registration import Registration
from blockzoo.upload import Upload, put_files, put_uploads


def register_checkpoint(job: RegisterJob, base_ref: str | None) -> RegisterResult:
    """Register a checkpoint, with differences to a base where they are smaller; see `register_folder`.

    Raises:
        CheckpointError: the checkpoint is refused.
    """
    folder = job.folder
    plan = plan_checkpoint(folder.config)
    matched = match_tensors(plan, folder.tensors)
    base = None if base_ref is None else read_outline(job.store, job.store.resolve(*parse_ref(base_ref)))
    files = job.read_files()
    uploads = _checkpoint_uploads(folder, plan, matched.sources, base)
    pieces = job.inspect(uploads)
    with job.registration() as registration:
        refs = put_uploads(registration, uploads, pieces, job.totals)
        blocks = _checkpoint_blocks(plan, matched.sources, refs)
        chain = _put_chain(registration, blocks, plan)
        layout = _checkpoint_layout(folder, plan, matched.sources, matched.ignored)
        extra = {place.filename: bytes(folder.read(name)) for name, place in matched.ignored.items()}
        stored = put_files(registration, {**files, **extra, LAYOUT_FILE: layout.to_bytes()}, job.totals)
        provenance = {**job.provenance(base), "architecture": _architecture(folder.config)}
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


def _checkpoint_blocks(
    plan: ChainPlan, sources: Mapping[tuple[int, str], str], refs: Mapping[str, TensorRef]
) -> list[BlockManifest]:
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


def _put_chain(registration: Registration, blocks: Sequence[BlockManifest], plan: ChainPlan) -> ChainId:
    links = tuple(Link(block) for block in registration.put_blocks(blocks))
    return registration.put_chain(ChainManifest(plan.family, links, plan.context_length, plan.vocab_size))


def _checkpoint_layout(
    folder: ModelFolder,
    plan: ChainPlan,
    sources: Mapping[tuple[int, str], str],
    ignored: Mapping[str, InFile],
) -> FolderLayout:
    tensors: dict[str, InBlock | InFile] = dict(ignored)
    for position, block in enumerate(plan.blocks):
        for name in block.tensors:
            tensors.setdefault(sources[position, name], InBlock(position, None, name))
    return folder_layout(folder, tensors)


def _architecture(config: Mapping[str, object]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""
