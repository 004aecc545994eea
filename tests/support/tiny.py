"""A tiny zoo and a small engine configuration for tests of the engine."""

from dataclasses import dataclass
from pathlib import Path

from blockserve.worker.limits import EngineConfig
from blockzoo.manifest import ChainId
from blockzoo.zoo import Zoo

SMALL = EngineConfig(
    dtype="float32", num_threads=1, max_tokens_per_pass=64, kv_cache_bytes=8 << 20, kv_page_tokens=8
)
"""Pages and prompt chunks small enough that short tests cross their borders."""


@dataclass(frozen=True)
class TinyZoo:
    """Variants in a zoo; chains by short name."""

    zoo: Zoo
    folder: Path
    chains: dict[str, ChainId]
