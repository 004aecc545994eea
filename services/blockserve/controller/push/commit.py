"""The end of a push: its manifests checked and stored, its version made visible."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Set
from dataclasses import dataclass

from blockserve.common.errors import UnknownBlobError
from blockzoo import families
from blockzoo.canonical import canonical_json, digest_bytes, parse_json
from blockzoo.errors import CorruptManifestError, InvalidInputError, InvalidManifestError
from blockzoo.manifest import (
    BlobId,
    BlockId,
    BlockManifest,
    ChainManifest,
    FileRef,
    JsonValue,
    VariantRecord,
)
from blockzoo.manifest_json import block_from_json, chain_from_json
from blockzoo.names import check_unreserved
from blockzoo.registering.recheck import Pushed, recheck
from blockzoo.store.registration import Registration
from blockzoo.store.writing import Committed, blobs_of
from blockzoo.store.zoo_store import ZooStore

MAX_PROVENANCE = 32
"""Facts about where a variant comes from."""
MAX_FACT_CHARS = 4096
MAX_FILES = 4096


@dataclass(frozen=True, slots=True)
class Wish:
    """What a push wants to register.

    Attributes:
        name: variant name.
        kind: "checkpoint" or "adapter".
        chain: canonical JSON of the chain manifest.
        blocks: canonical JSON of blocks.
        files: files by name.
        provenance: where it comes from; "base" names the variant it builds on.
    """

    name: str
    kind: str
    chain: bytes
    blocks: tuple[bytes, ...]
    files: Mapping[str, FileRef]
    provenance: Mapping[str, str]


def commit_wish(
    store: ZooStore,
    registration: Registration,
    wish: Wish,
    blobs: Set[BlobId],
    blocks: Set[BlockId],
    bases: Mapping[str, VariantRecord],
) -> Committed:
    """Register what a push wants; a wish that equals the current version changes nothing.

    Args:
        store: the zoo.
        registration: the push's, which leases all it named.
        wish: what to register.
        blobs: blobs that the push may name.
        blocks: blocks of the zoo that the push may name.
        bases: variants that it relies on, by name@version.

    Raises:
        UnknownBlobError: a manifest names something else.
        InvalidManifestError: a manifest cannot be read, or is not what the files make.
        BlockzooError: see `blockzoo.registering.recheck.recheck` and `Registration.commit`.
    """
    check_unreserved(wish.name)
    _check_sizes(wish)
    chain = _read_chain(wish.chain)
    families.get(chain.family)
    pushed = {BlockId(digest_bytes(body)): _read_block(body) for body in wish.blocks}
    _check_named(chain, pushed, wish.files, blobs, blocks)
    used = {block for link in chain.links for block in (link.base, *link.applied)}
    known = {block: store.get_block(block) for block in used - pushed.keys()}
    base = bases.get(wish.provenance.get("base", ""))
    facts = recheck(store, Pushed(wish.kind, chain, {**known, **pushed}, wish.files, base))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    registration.put_blocks([pushed[block] for block in used & pushed.keys()])
    return registration.commit_unless_same(
        wish.name,
        registration.put_chain(chain),
        kind=wish.kind,
        files=wish.files,
        provenance={**wish.provenance, **facts, "registered_at": now},
    )


def unknown_blob(digest: str) -> UnknownBlobError:
    """The error for a digest that a push names without right; the same whether or not the zoo has it."""
    return UnknownBlobError(
        f"the push names {digest}, which it has neither sent nor proved to have",
        hint="Send the blob, or prove it, before the manifest that names it.",
        digest=digest,
    )


def _check_sizes(wish: Wish) -> None:
    facts = wish.provenance
    longest = max((len(text) for fact in facts.items() for text in fact), default=0)
    if len(facts) > MAX_PROVENANCE or longest > MAX_FACT_CHARS:
        raise InvalidInputError(
            f"the provenance may have {MAX_PROVENANCE} facts of {MAX_FACT_CHARS} characters"
        )
    if len(wish.files) > MAX_FILES:
        raise InvalidInputError(f"a variant may have {MAX_FILES} files")


def _check_named(
    chain: ChainManifest,
    pushed: Mapping[BlockId, BlockManifest],
    files: Mapping[str, FileRef],
    blobs: Set[BlobId],
    blocks: Set[BlockId],
) -> None:
    for link in chain.links:
        for block in (link.base, *link.applied):
            if block not in pushed and block not in blocks:
                raise unknown_blob(block)
    named = {blob for block in pushed.values() for blob in blobs_of(block)}
    for blob in sorted(named | {ref.blob for ref in files.values()}):
        if blob not in blobs:
            raise unknown_blob(blob)


def _read_chain(body: bytes) -> ChainManifest:
    try:
        return chain_from_json(_canonical(body))
    except CorruptManifestError as error:
        raise InvalidManifestError(str(error)) from error


def _read_block(body: bytes) -> BlockManifest:
    try:
        return block_from_json(_canonical(body))
    except CorruptManifestError as error:
        raise InvalidManifestError(str(error)) from error


def _canonical(body: bytes) -> JsonValue:
    try:
        value = parse_json(body)
        same = canonical_json(value) == body
    except InvalidInputError as error:
        raise InvalidManifestError(f"a manifest cannot be read: {error}") from error
    if not same:
        raise InvalidManifestError("a manifest is not spelled as canonical JSON")
    return value
