"""A zoo of content-addressed model blocks, as a library.

    from blockzoo import Zoo

    zoo = Zoo.open("my-zoo", create=True)
    zoo.register("SmolLM2-135M-Instruct", name="smollm2")
    zoo.register("my-lora", name="support-bot", base="smollm2")
    print(zoo.du().sharing_factor)

Only `blockzoo.compute`, which the engine imports, and `blockzoo.evaluation` need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockzoo.errors import BlockzooError
from blockzoo.progress import NoProgress, Progress

if TYPE_CHECKING:
    from blockzoo.zoo import Zoo

__all__ = ["BlockzooError", "NoProgress", "Progress", "Zoo"]


def __getattr__(name: str) -> object:
    """Import `Zoo` when it is first asked for: clients need the errors only, and numpy takes its time."""
    if name == "Zoo":
        from blockzoo.extras import named_extras

        with named_extras():
            from blockzoo.zoo import Zoo

        return Zoo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
