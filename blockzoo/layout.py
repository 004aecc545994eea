"""Where everything is inside a zoo: the only module that spells keys."""

from __future__ import annotations

from blockzoo.digest import is_digest

ZOO = "zoo.json"
BLOBS = "blobs"
BLOCKS = "blocks"
CHAINS = "chains"
REFS = "refs/variants"
LEASES = "leases"
CONDEMNED = "condemned"


def blob_key(digest: str) -> str:
    """Key of a blob; spread over 256 folders so that none grows huge."""
    return f"{BLOBS}/{digest[:2]}/{digest}"


def block_key(digest: str) -> str:
    """Key of a block manifest."""
    return f"{BLOCKS}/{digest}.json"


def chain_key(digest: str) -> str:
    """Key of a chain manifest."""
    return f"{CHAINS}/{digest}.json"


def ref_key(name: str, version: int) -> str:
    """Key of one version of a variant."""
    return f"{REFS}/{name}/{version}"


def digest_of(key: str) -> str | None:
    """Return the digest that a blob's or manifest's key names, or None for a stray object."""
    last = key.rpartition("/")[2].removesuffix(".json")
    if is_digest(last) and key in (blob_key(last), block_key(last), chain_key(last)):
        return last
    return None


def version_of(key: str) -> tuple[str, int] | None:
    """Return name and version that a ref's key names, or None for a stray object."""
    name, _, version = key.removeprefix(f"{REFS}/").rpartition("/")
    if "/" in name or not name or not version.isascii() or not version.isdigit() or version[0] == "0":
        return None
    return name, int(version)
