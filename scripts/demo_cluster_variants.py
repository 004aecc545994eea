"""The variants of the cluster demo: base, tuned checkpoint, and committed adapters at several strengths.

An adapter at another strength is another variant: its scale is part of its blocks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from demo_variants import DEMO, Variant, base_name, demo_variants

STRENGTHS = {"soft": 0.5, "bold": 1.5}
EXTRA = ("bierce", "faint", 0.25)


def cluster_variants(model: Path, folder: Path) -> list[Variant]:
    """Twelve variants, base first; adapters of other strengths are written to `folder`."""
    found = demo_variants(model)
    adapters = [one for one in found if one.folder.parent == DEMO / "adapters"]
    for one in adapters:
        found += [_at(one, word, scale, folder) for word, scale in STRENGTHS.items()]
    found.append(_at(adapters[0], "faint", 0.25, folder))
    return found


def extra_variant(model: Path, folder: Path) -> Variant:
    """The one that is registered while the others answer."""
    name, word, scale = EXTRA
    return _at(Variant(name, DEMO / "adapters" / name, base_name(model), name), word, scale, folder)


def _at(variant: Variant, word: str, scale: float, folder: Path) -> Variant:
    """An adapter with its strength scaled."""
    target = folder / f"{variant.name}-{word}"
    shutil.copytree(variant.folder, target)
    config = json.loads((target / "adapter_config.json").read_text())
    config["lora_alpha"] = config["lora_alpha"] * scale
    (target / "adapter_config.json").write_text(json.dumps(config))
    about = f"{variant.name} at {scale} of its strength"
    return Variant(f"{variant.name}-{word}", target, variant.base, about)
