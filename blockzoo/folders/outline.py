"""A stored chain seen as the model it came from: modules and tensors by their checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from blockzoo import families
from blockzoo.manifest import BlockManifest, ChainId, ChainManifest, TensorRef
from blockzoo.store.writing import Manifests

EMBEDDING_MODULE = "model.embed_tokens"
HEAD_MODULE = "lm_head"


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of a chain's base blocks.

    Attributes:
        position: link in the chain, 0 for the embedding.
        name: tensor name inside the block.
        ref: where its bytes are.
    """

    position: int
    name: str
    ref: TensorRef


@dataclass(frozen=True)
class Outline:
    """The base blocks of a chain.

    Attributes:
        ref: NAME@VERSION, for messages.
        chain: the manifest.
        blocks: manifests of the base blocks, in order.
    """

    ref: str
    chain: ChainManifest
    blocks: tuple[BlockManifest, ...]

    @classmethod
    def read(cls, manifests: Manifests, ref: str, chain_id: ChainId) -> Outline:
        """Read the manifests of a chain."""
        chain = manifests.get_chain(chain_id)
        return cls(ref, chain, tuple(manifests.get_block(link.base) for link in chain.links))

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.blocks) - 2

    @property
    def head(self) -> int:
        """Position of the head."""
        return len(self.blocks) - 1

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are the same matrix."""
        return bool(self.blocks[-1].config.get("tied"))

    @property
    def has_adapters(self) -> bool:
        """Whether anything is applied on a base block."""
        return any(link.applied for link in self.chain.links)

    @cached_property
    def tensors(self) -> Mapping[str, Place]:
        """Checkpoint name -> place, for every tensor of every base block."""
        family = families.get(self.chain.family)
        return {
            family.source_name(position, self.num_layers, name): Place(position, name, ref)
            for position, block in enumerate(self.blocks)
            for name, ref in block.tensors.items()
        }

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that own a tensor, in chain order."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.tensors))

    @cached_property
    def linears(self) -> Mapping[str, Place]:
        """Path of each linear module -> its matrix, [out, in]."""
        return {
            name.removesuffix(".weight"): place
            for name, place in self.tensors.items()
            if name.endswith(".weight") and len(place.ref.shape) == 2 and place.position
        }
