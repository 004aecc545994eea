"""Comparing two variants link by link."""

from __future__ import annotations

from collections.abc import Mapping

from blockzoo.digest import num_bytes
from blockzoo.folders.contents import OWN_PREFIX
from blockzoo.manifest import BlobId, BlockManifest, Link, TensorRef, VariantRecord
from blockzoo.reports.values import DiffReport, LinkDiff, TensorDiff
from blockzoo.store.writing import Manifests


def compare(manifests: Manifests, a: VariantRecord, b: VariantRecord) -> DiffReport:
    """Return what differs between two variants.

    Layers are compared at equal depth, heads with each other.
    """
    links_a, links_b = manifests.get_chain(a.chain).links, manifests.get_chain(b.chain).links
    depths = range(max(len(links_a), len(links_b)) - 1)
    body = [_link(manifests, depth, _body(links_a, depth), _body(links_b, depth)) for depth in depths]
    links = (*body, _link(manifests, len(depths), links_a[-1], links_b[-1]))
    counts = {status: sum(link.status == status for link in links) for status in ("equal", "adapters")}
    return DiffReport(
        a=f"{a.name}@{a.version}",
        b=f"{b.name}@{b.version}",
        links=links,
        files=_files(a, b),
        equal=counts["equal"],
        adapters=counts["adapters"],
        different=len(links) - sum(counts.values()),
        changed_bytes=sum(tensor.changed_bytes for link in links for tensor in link.tensors),
    )


def _body(links: tuple[Link, ...], depth: int) -> Link | None:
    return links[depth] if depth < len(links) - 1 else None


def _link(manifests: Manifests, position: int, a: Link | None, b: Link | None) -> LinkDiff:
    block_a = manifests.get_block(a.base) if a else None
    block_b = manifests.get_block(b.base) if b else None
    block = block_b or block_a
    assert block is not None
    return LinkDiff(
        position=position,
        kind=block.kind,
        status=_status(a, b),
        tensors=() if a and b and a.base == b.base else tuple(_tensors(block_a, block_b)),
        applied_bytes_a=_applied_bytes(manifests, a),
        applied_bytes_b=_applied_bytes(manifests, b),
    )


def _status(a: Link | None, b: Link | None) -> str:
    if a is None:
        return "only in B"
    if b is None:
        return "only in A"
    if a.base != b.base:
        return "different"
    return "equal" if a.applied == b.applied else "adapters"


def _tensors(a: BlockManifest | None, b: BlockManifest | None) -> list[TensorDiff]:
    mine: Mapping[str, TensorRef] = a.tensors if a else {}
    theirs: Mapping[str, TensorRef] = b.tensors if b else {}
    diffs = []
    for name in dict.fromkeys([*mine, *theirs]):
        old, new = mine.get(name), theirs.get(name)
        if old == new:
            continue
        known = set(old.blobs) if old else set()
        changed = sum(size for blob, size in _chunk_sizes(new) if blob not in known) if new else 0
        diffs.append(TensorDiff(name, old.num_bytes if old else 0, new.num_bytes if new else 0, changed))
    return diffs


def _chunk_sizes(tensor: TensorRef) -> list[tuple[BlobId, int]]:
    shapes = tensor.chunk_shapes()
    return [(blob, num_bytes(tensor.dtype, shape)) for blob, shape in zip(tensor.blobs, shapes, strict=True)]


def _applied_bytes(manifests: Manifests, link: Link | None) -> int:
    return sum(manifests.get_block(block).num_bytes for block in link.applied) if link else 0


def _files(a: VariantRecord, b: VariantRecord) -> tuple[str, ...]:
    names = sorted({*a.files, *b.files})
    return tuple(
        name for name in names if not name.startswith(OWN_PREFIX) and a.files.get(name) != b.files.get(name)
    )
