"""Where everything is inside a zoo: the only module that spells keys."""

from __future__ import annotations

import re
from functools import lru_cache

from blockzoo.digest import is_digest

ZOO = "zoo.json"
BLOBS = "blobs"
BLOCKS = "blocks"
CHAINS = "chains"
REFS = "refs/variants"
EQUIVALENCE = "equivalence"
DECISIONS = "refs/equivalence"
WISHES = "refs/wishes"
LEASES = "leases"
CONDEMNED = "condemned"
PACKS = "packs"
PACK_CHANGES = "pack-changes"
"""Other bytes after each new pack, on storages where a listing is slow."""
_SUMMARY = ".summary"

_CACHED_KEYS = 4096
"""Keys whose reading is remembered, two hundred bytes each: each is read several times on its way."""

_NAMED = re.compile(
    rf"{BLOBS}/(?P<spread>[0-9a-f]{{2}})/(?P<blob>(?P=spread)[0-9a-f]{{62}})"
    rf"|(?:{BLOCKS}|{CHAINS}|{EQUIVALENCE})/(?P<manifest>[0-9a-f]{{64}})\.json"
)


def blob_key(digest: str) -> str:
    """Key of a blob; spread over 256 folders so that none grows huge."""
    return f"{BLOBS}/{digest[:2]}/{digest}"


def block_key(digest: str) -> str:
    """Key of a block manifest."""
    return f"{BLOCKS}/{digest}.json"


def chain_key(digest: str) -> str:
    """Key of a chain manifest."""
    return f"{CHAINS}/{digest}.json"


def pack_key(digest: str) -> str:
    """Key of a pack of small objects."""
    return f"{PACKS}/{digest}"


def summary_key(digest: str) -> str:
    """Key of a summary of what packs hold."""
    return f"{PACKS}/{digest}{_SUMMARY}"


def ref_key(name: str, version: int) -> str:
    """Key of one version of a variant."""
    return f"{REFS}/{name}/{version}"


def equivalence_key(digest: str) -> str:
    """Key of an equivalence record."""
    return f"{EQUIVALENCE}/{digest}.json"


def decision_key(digest: str, number: int) -> str:
    """Key of one decision about an equivalence record."""
    return f"{DECISIONS}/{digest}/{number}"


def wish_key(name: str, number: int) -> str:
    """Key of one change of what is wished about a variant's placement."""
    return f"{WISHES}/{name}/{number}"


@lru_cache(_CACHED_KEYS)
def digest_of(key: str) -> str | None:
    """Return the digest that a blob's, manifest's or record's key names, or None for a stray object."""
    found = _NAMED.fullmatch(key)
    return None if found is None else found["blob"] or found["manifest"]


def is_content(key: str) -> bool:
    """Tell whether a key is that of a blob or of the manifest of a block or chain."""
    return digest_of(key) is not None and not key.startswith(EQUIVALENCE)


def is_pack(key: str) -> bool:
    """Tell whether a key is that of a pack."""
    return is_digest(key.removeprefix(f"{PACKS}/")) and key.startswith(f"{PACKS}/")


def is_summary(key: str) -> bool:
    """Tell whether a key is that of a summary of packs."""
    return key.endswith(_SUMMARY) and is_pack(key.removesuffix(_SUMMARY))


def decision_of(key: str) -> tuple[str, int] | None:
    """Return record and number that a decision's key names, or None for a stray object."""
    digest, _, number = key.removeprefix(f"{DECISIONS}/").rpartition("/")
    # Nine digits: a decision above them would have no number after it.
    if not key.startswith(DECISIONS) or not is_digest(digest) or not _is_number(number) or len(number) > 9:
        return None
    return digest, int(number)


def wish_of(key: str) -> tuple[str, int] | None:
    """Return name and number that a wish's key names, or None for a stray object."""
    name, _, number = key.removeprefix(f"{WISHES}/").rpartition("/")
    if not key.startswith(f"{WISHES}/") or "/" in name or not name or not _is_number(number):
        return None
    return (name, int(number)) if len(number) <= 9 else None


def version_of(key: str) -> tuple[str, int] | None:
    """Return name and version that a ref's key names, or None for a stray object."""
    name, _, version = key.removeprefix(f"{REFS}/").rpartition("/")
    if not key.startswith(f"{REFS}/") or "/" in name or not name or not _is_number(version):
        return None
    return name, int(version)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and text[0] != "0"
