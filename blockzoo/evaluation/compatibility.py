"""Whether one run of links can stand in for another at all, by manifests alone."""

from __future__ import annotations

from blockzoo.errors import IncompatibleBlocksError
from blockzoo.evaluation.selection import Pair
from blockzoo.manifest import BlockKind, BlockManifest
from blockzoo.zoo import Zoo

_LAYER_FIELDS = {
    "hidden_size": "hidden size",
    "num_kv_heads": "number of key and value heads",
    "head_dim": "width of a head",
    "rope": "rotary positions",
}
_FIELDS = {
    BlockKind.EMBEDDING.value: {"hidden_size": "hidden size", "vocab_size": "vocabulary"},
    BlockKind.LAYER.value: _LAYER_FIELDS,
    BlockKind.HEAD.value: {"hidden_size": "hidden size", "vocab_size": "vocabulary"},
}
"""Config fields that must be equal. What lies inside a block (feed-forward width, query heads) may differ."""


def check_compatible(zoo: Zoo, pair: Pair) -> None:
    """Raise unless B's run takes and gives what A's run does, and keeps keys and values of the same shape.

    Raises:
        IncompatibleBlocksError: it says at which position and in what they differ.
        ManifestNotFoundError, CorruptManifestError: the zoo is damaged.
    """
    a, b = pair.chain_a, pair.chain_b
    if a.family != b.family:
        raise _incompatible(pair, f"the families differ ({a.family} and {b.family})")
    if a.vocab_size != b.vocab_size:
        raise _incompatible(pair, f"the vocabularies differ ({a.vocab_size} and {b.vocab_size} rows)")
    for offset, (mine, theirs) in enumerate(zip(pair.original.links, pair.substitute.links, strict=True)):
        problem = _difference(zoo.block(mine.base), zoo.block(theirs.base))
        if problem:
            position = pair.original.positions.first + offset
            raise _incompatible(pair, f"at position {position} {problem}")


def _difference(a: BlockManifest, b: BlockManifest) -> str:
    if a.kind != b.kind:
        return f"one has a block of kind {a.kind}, the other one of kind {b.kind}"
    for field, words in _FIELDS.get(a.kind, {}).items():
        if a.config.get(field) != b.config.get(field):
            return f"the {words} differs ({a.config.get(field)} and {b.config.get(field)})"
    return ""


def _incompatible(pair: Pair, problem: str) -> IncompatibleBlocksError:
    return IncompatibleBlocksError(
        f"{pair.substitute} cannot stand in for {pair.original}: {problem}",
        hint="Compare blocks of models of the same architecture and size, for example fine-tunes of one "
        "base.",
        a=pair.original,
        b=pair.substitute,
    )
