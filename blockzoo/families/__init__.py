"""Model families: how each architecture is cut into blocks. One file per family, no torch.

`blockzoo.compute` says how the blocks compute.
"""

from __future__ import annotations

from blockzoo.errors import InvalidConfigError, UnsupportedArchitectureError
from blockzoo.families.base import CHUNK_ROWS, ChainPlan, Family, PlannedBlock, PlannedTensor
from blockzoo.families.gemma2 import Gemma2Family
from blockzoo.families.gemma3 import Gemma3Family
from blockzoo.families.glm4 import Glm4Family
from blockzoo.families.granite import GraniteFamily
from blockzoo.families.llama import LlamaFamily
from blockzoo.families.mistral import MistralFamily
from blockzoo.families.olmo2 import Olmo2Family
from blockzoo.families.phi3 import Phi3Family
from blockzoo.families.qwen2 import Qwen2Family
from blockzoo.families.qwen3 import Qwen3Family
from blockzoo.families.smollm3 import SmolLM3Family

__all__ = [
    "CHUNK_ROWS",
    "ChainPlan",
    "Family",
    "PlannedBlock",
    "PlannedTensor",
    "check_known",
    "for_architecture",
    "for_model_type",
    "get",
    "has_model_type",
    "supported",
]

_FAMILIES: tuple[Family, ...] = (
    LlamaFamily(),
    MistralFamily(),
    Qwen2Family(),
    Qwen3Family(),
    Gemma2Family(),
    Gemma3Family(),
    Glm4Family(),
    GraniteFamily(),
    Olmo2Family(),
    Phi3Family(),
    SmolLM3Family(),
)
_BY_NAME = {family.name: family for family in _FAMILIES}
_BY_ARCHITECTURE = {name: family for family in _FAMILIES for name in family.architectures}


_BY_MODEL_TYPE = {family.model_type or family.name: family for family in _FAMILIES}


def supported() -> tuple[str, ...]:
    """Names of the architectures that can be registered."""
    return tuple(_BY_ARCHITECTURE)


def check_known(name: str) -> None:
    """Check that this version has the family that a block's manifest names.

    The config of a block of a later family may hold what this version would pass over.

    Raises:
        InvalidConfigError: it has not.
    """
    if name not in _BY_NAME:
        raise InvalidConfigError(
            f"blocks of the family {name!r} cannot be run by this version",
            hint="Upgrade blockzoo on this machine.",
            family=name,
        )


def get(name: str) -> Family:
    """Return the family that a manifest names.

    Raises:
        UnsupportedArchitectureError: this version does not know it.
    """
    if name not in _BY_NAME:
        raise UnsupportedArchitectureError(name, supported())
    return _BY_NAME[name]


def has_model_type(model_type: str) -> bool:
    """Tell whether a family reads this `model_type` of config.json."""
    return model_type in _BY_MODEL_TYPE


def for_model_type(model_type: str) -> Family:
    """Return the family that reads a `model_type` of config.json, for configs that name no architecture.

    Raises:
        UnsupportedArchitectureError: none does.
    """
    if model_type not in _BY_MODEL_TYPE:
        raise UnsupportedArchitectureError(model_type, supported())
    return _BY_MODEL_TYPE[model_type]


def for_architecture(architecture: str) -> Family:
    """Return the family that reads an `architectures` entry of config.json.

    Raises:
        UnsupportedArchitectureError: none does.
    """
    if architecture not in _BY_ARCHITECTURE:
        raise UnsupportedArchitectureError(architecture, supported())
    return _BY_ARCHITECTURE[architecture]
