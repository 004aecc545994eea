"""From a block's manifest and tensors to a block that computes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from blockkernels.backends import Backend
from blockzoo.compute.decoder import LayerBlock
from blockzoo.compute.ends import EmbeddingBlock, HeadBlock
from blockzoo.errors import InvalidConfigError
from blockzoo.manifest import BlockKind, BlockManifest

ExecutableBlock = EmbeddingBlock | LayerBlock | HeadBlock
"""A base block in memory, ready to compute."""


def build_block(
    manifest: BlockManifest, tensors: Mapping[str, Tensor], backend: Backend, *, exact: bool = False
) -> ExecutableBlock:
    """Make a base block executable; matrices are laid out for the device.

    Args:
        manifest: says kind and config.
        tensors: the block's tensors by name, in the types of `blockzoo.compute.stored.computed_type`, on the
            backend's device.
        backend: computes the block.
        exact: a token's result must not depend, in any bit, on the tokens computed with it. Callers that
            ask for this have checked `Backend.why_inexact`.

    Raises:
        InvalidConfigError: the kind is not executable, or config and tensors do not fit.
    """
    try:
        if manifest.kind == BlockKind.EMBEDDING:
            return EmbeddingBlock(manifest.config, tensors)
        if manifest.kind == BlockKind.LAYER:
            return LayerBlock(manifest.config, tensors, backend, exact=exact)
        if manifest.kind == BlockKind.HEAD:
            return HeadBlock(manifest.config, tensors, backend, exact=exact)
    except KeyError as error:
        raise InvalidConfigError(f"{manifest.kind} block lacks {error}", family=manifest.family) from error
    raise InvalidConfigError(
        f"blocks of kind {manifest.kind!r} cannot be run by this version",
        hint="Upgrade blockzoo on this machine.",
        kind=manifest.kind,
    )
