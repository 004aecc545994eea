"""Proving that one has the bytes of a blob, without sending them.

The key is drawn by the server for each push, so a proof seen elsewhere proves nothing here, and a digest
alone (BLAKE3 without a key) does not help to compute it.
"""

from __future__ import annotations

from blake3 import blake3

from blockzoo.digest import Buffer, as_bytes
from blockzoo.manifest import BlobId

NONCE_BYTES = 32
"""The length of a BLAKE3 key."""


def possession_mac(nonce: bytes, blob: BlobId, data: Buffer) -> bytes:
    """BLAKE3 keyed with the nonce over the 32 bytes of the digest and the tensor's bytes."""
    hasher = blake3(bytes.fromhex(blob), key=nonce, max_threads=blake3.AUTO)
    return hasher.update(as_bytes(data)).digest()
