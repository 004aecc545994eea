"""zoo.json: which programs can read a zoo, and which can write it.

Should it be damaged or missing, what is stored shows the format: `told_by` says which one, and `body` makes
the file again.
"""

from __future__ import annotations

import importlib.metadata
import re

from blockzoo import layout
from blockzoo.canonical import canonical_json, digest_json, parse_json
from blockzoo.errors import CorruptManifestError, InvalidInputError
from blockzoo.manifest import JsonValue
from blockzoo.storage.base import Storage
from blockzoo.store.packs import read_index

FORMAT = 2
"""The zoo format this version begins new zoos with, and the newest it understands.

2 keeps small objects in packs (`blockzoo.store.packs`). A zoo of format 1 stays one, so that programs of
blockzoo 0.1 beside this one go on reading it; a backup of it into a new place is of format 2.
"""

FIRST_FORMAT = 1
"""The format of blockzoo 0.1: one object, one file."""


def body(number: int = FORMAT) -> bytes:
    """Return zoo.json of a zoo of this format."""
    fields: dict[str, JsonValue] = {
        "format": number,
        "min_reader": number,
        "min_writer": number,
        "created_by": f"blockzoo {importlib.metadata.version('blockzoo')}",
    }
    return canonical_json(fields if number == FIRST_FORMAT else {**fields, "digest": digest_json(fields)})


def read(stored: bytes, url: str) -> tuple[int, int]:
    """Return the formats that a program must know to read and to write the zoo.

    Raises:
        CorruptManifestError: the file does not say.
    """
    try:
        fields = parse_json(stored)
    except InvalidInputError as error:
        raise unreadable(url) from error
    if isinstance(fields, dict):
        min_reader, min_writer = fields.get("min_reader"), fields.get("min_writer")
        # A newer zoo than is known is believed only where the file is whole.
        is_known = isinstance(min_reader, int) and min_reader <= FORMAT
        if (
            isinstance(min_reader, int)
            and isinstance(min_writer, int)
            and (is_known or "digest" not in fields or is_whole(stored))
        ):
            return min_reader, min_writer
    raise unreadable(url)


def is_whole(stored: bytes) -> bool:
    """Tell whether zoo.json is as it was written.

    Zoos of blockzoo 0.1 have no digest in it: there only the form of the fields tells.
    """
    try:
        fields = parse_json(stored)
    except InvalidInputError:
        return False
    if not isinstance(fields, dict) or canonical_json(fields) != stored:
        return False
    digest = fields.pop("digest", None)
    if digest is not None:
        return digest == digest_json(fields)
    made = fields.pop("created_by", None)
    return (
        fields == dict.fromkeys(("format", "min_reader", "min_writer"), FIRST_FORMAT)
        and isinstance(made, str)
        and re.fullmatch(r"blockzoo [0-9]+\.[0-9]+[0-9a-z.+]*", made) is not None
    )


def told_by(storage: Storage) -> int | None:
    """Return the format that the contents of a zoo show beyond doubt; None where they do not.

    Packs are of format 2. Manifests of chains on their own and no pack at all are what format 1 writes.
    """
    packs = [info.key for info in storage.list(layout.PACKS) if layout.is_pack(info.key)]
    for key in packs:
        try:
            read_index(storage, key)
        except CorruptManifestError:
            continue
        return FORMAT
    has_chains = any(layout.digest_of(info.key) for info in storage.list(layout.CHAINS))
    return FIRST_FORMAT if has_chains and not packs else None


def unreadable(url: str, state: str = "damaged") -> CorruptManifestError:
    """Return the error for a zoo whose zoo.json is damaged or missing."""
    return CorruptManifestError(
        f"{url}/{layout.ZOO} is {state}",
        hint="`blockzoo verify --repair BACKUP` writes it again, as the packs or files of the zoo show its "
        "format; for that, any zoo will do as BACKUP.",
        key=layout.ZOO,
    )
