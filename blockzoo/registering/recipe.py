"""What adapters of one training recipe have in common: worked out for the first, and used for the others.

The hundreds of adapters of a fleet mostly come from one script. Their files then have equal headers, so all
that depends on names, types and shapes is equal too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from blockzoo.folders.adapters.config import AdapterConfig
from blockzoo.folders.adapters.plan import AdapterPlan, plan_adapter
from blockzoo.folders.checkpoint import ModelFolder
from blockzoo.folders.contents import InBlock, InFile
from blockzoo.folders.outline import Outline
from blockzoo.folders.safetensors_io import TensorEntry
from blockzoo.registering.job import folder_layout


@dataclass(frozen=True)
class Recipe:
    """How adapters of equal config and header are registered on one base.

    Attributes:
        config: without the name of the base, which says nothing about the plan.
        entries: the tensors; of equal headers one object.
        base: what they are registered on.
        plan: what they change.
    """

    config: AdapterConfig
    entries: Mapping[str, TensorEntry]
    base: Outline
    plan: AdapterPlan
    _layouts: dict[tuple[str, ...], bytes] = field(default_factory=dict)

    def layout(self, folder: ModelFolder) -> bytes:
        """Return the contents of the layout file of one of these adapters."""
        # With the path of the one weight file, names say all that differs between folders.
        key = (*(shard.path.name for shard in folder.shards), *folder.files)
        found = self._layouts.get(key)
        if found is None:
            found = folder_layout(folder, adapter_layout(self.plan)).to_bytes()
            self._layouts.clear()
            self._layouts[key] = found
        return found

    def fits(self, config: AdapterConfig, entries: Mapping[str, TensorEntry], base: Outline) -> bool:
        """Tell whether an adapter is one of these."""
        return self.entries is entries and self.base is base and self.config == config


def find_recipe(
    config: AdapterConfig, folder: ModelFolder, base: Outline, equal: Callable[[str, str], bool]
) -> Recipe:
    """Return how to register an adapter, which is how the last one was if it had the same config and header.

    Raises what `plan_adapter` raises.
    """
    global _last
    config = replace(config, base_model="")
    with _LOCK:
        last = _last
    if last is not None and last.fits(config, folder.tensors, base):
        return last
    recipe = Recipe(config, folder.tensors, base, plan_adapter(config, folder.tensors, base, equal))
    # Anything else may depend on the bytes of the tensors.
    if not (recipe.plan.replaced or recipe.plan.rows or recipe.plan.ignored):
        with _LOCK:
            _last = recipe
    return recipe


def adapter_layout(plan: AdapterPlan) -> dict[str, InBlock | InFile]:
    """Return where each tensor of the adapter's folder is kept."""
    tensors: dict[str, InBlock | InFile] = dict(plan.ignored)
    for position, sources in plan.adapted.items():
        for name, source in sources.items():
            tensors.setdefault(source, InBlock(position, 0, name))
    for position, replaced in plan.replaced.items():
        for name, source in replaced.items():
            tensors.setdefault(source, InBlock(position, None, name))
    return tensors


_LOCK = threading.Lock()
_last: Recipe | None = None
