"""Starting fast: what can go on side by side does, and a timeline says where the time went.

Three things take long and need each other late: importing torch (for the engine), reading and parsing the
variants' small files and tokenizers, and starting the child process for chat templates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from blockserve.common.api.engine import Engine
from blockserve.embedded.settings import ALL
from blockserve.router.intake.catalog import VariantCatalog, ZooReader
from blockzoo.errors import BlockzooError
from blockzoo.store.objects import ignore_damage

if TYPE_CHECKING:
    from blockserve.worker.limits import EngineConfig

log = logging.getLogger(__name__)


class RunnableEngine(Engine, Protocol):
    """An engine that the server starts and stops."""

    def start(self) -> None:
        """Begin running passes."""
        ...

    def stop(self) -> None:
        """End; blocks until the current pass is over."""
        ...

    async def failed(self) -> BlockzooError:
        """Wait until the engine ends by a fault, and say by which."""
        ...


def open_zoo(url: str) -> ZooReader:
    """The zoo at `url` (ZooNotFoundError)."""
    from blockzoo.zoo import Zoo

    return Zoo.open(url)


def make_engine(zoo: ZooReader, config: EngineConfig) -> RunnableEngine:
    """The real engine over the real zoo."""
    from blockserve.worker.engine.engine import BlockEngine
    from blockzoo.zoo import Zoo

    assert isinstance(zoo, Zoo)
    return BlockEngine(zoo, config)


def import_engine() -> None:
    """Import what `make_engine` needs; torch takes more than a second."""
    import blockserve.worker.engine.engine  # noqa: F401


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the server gets what it composes; tests put their own here.

    Attributes:
        open_zoo: URL to zoo. Runs in a thread.
        make_engine: zoo and settings to engine. Runs in a thread.
        import_engine: brings in early what `make_engine` imports. Runs in a thread of its own.
    """

    open_zoo: Callable[[str], ZooReader] = open_zoo
    make_engine: Callable[[ZooReader, EngineConfig], RunnableEngine] = make_engine
    import_engine: Callable[[], None] = import_engine


class Timeline:
    """When each stage of the start began and ended, in seconds since the process started."""

    def __init__(self, process_age: float) -> None:
        """`process_age`: seconds the process has lived so far."""
        self._zero = time.monotonic() - process_age
        self.stages: list[tuple[str, float, float]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; stages may overlap and come from several threads."""
        began = time.monotonic() - self._zero
        try:
            yield
        finally:
            self.stages.append((name, began, time.monotonic() - self._zero))

    def __str__(self) -> str:
        """`interpreter=0.00-0.35 torch=0.35-1.90 …`, in order of their beginning."""
        ordered = sorted(self.stages, key=lambda stage: stage[1])
        return " ".join(f"{name}={began:.2f}-{ended:.2f}" for name, began, ended in ordered)


def process_age() -> float:
    """Seconds since the kernel started this process; 0 where it cannot be told."""
    try:
        with open("/proc/self/stat", encoding="ascii") as stat:  # noqa: PTH123 - not a file
            ticks = float(stat.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="ascii") as uptime:  # noqa: PTH123 - not a file
            now = float(uptime.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    import os

    return max(0.0, now - ticks / os.sysconf("SC_CLK_TCK"))


def names_to_preload(catalog_zoo: ZooReader, wanted: Sequence[str]) -> list[str]:
    """What `preload` means for this zoo."""
    named = [ref for ref in dict.fromkeys(wanted) if ref != ALL]
    if ALL not in wanted:
        return named
    return [*named, *sorted({record.name for record in catalog_zoo.variants(ignore_damage)} - set(named))]


def parse_ahead(catalog: VariantCatalog, refs: Sequence[str]) -> None:
    """Read small files and tokenizers of variants while torch is being imported.

    A variant that cannot be read is logged; its requests will be told, and others are not disturbed.
    """
    for ref in refs:
        try:
            catalog.tokenizer_blocking(catalog.get_blocking(ref))
        except BlockzooError as error:
            log.warning("variant cannot be served yet variant=%s reason=%s: %s", ref, error.reason, error)
