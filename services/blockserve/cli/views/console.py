"""A console of rich that shows what is printed on it and obeys nothing in it."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from blockserve.cli.views.plain import UNSAFE, visible


class SafeConsole(Console):
    """See `blockserve.cli.views.plain`."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See `rich.console.Console`; rich's own control sequences are segments of their own."""
        for segment in super().render(renderable, options):
            if segment.control or not UNSAFE.search(segment.text):
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)
