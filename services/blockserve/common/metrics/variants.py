"""What is registered, and what of it is in memory."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from blockserve.common.api.engine import EngineReport
from blockserve.common.metrics import catalogue
from blockserve.common.metrics.engine import family
from blockserve.common.metrics.labels import OTHER, BoundedLabels
from blockzoo.errors import BlockzooError
from blockzoo.manifest import VariantRecord

log = logging.getLogger(__name__)

LISTING_SECONDS = 30.0
"""How old a list of the zoo's variants may be: reading it costs a file or an object for each."""


class VariantCollector(Collector):
    """Compares the zoo's list with the loaded chains. Runs in the thread that answers the scrape."""

    def __init__(
        self,
        list_variants: Callable[[], Sequence[VariantRecord]],
        report: Callable[[], EngineReport],
        labels: BoundedLabels,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a collector.

        Args:
            list_variants: the zoo's current versions; blocking.
            report: the engine's.
            labels: the same as those of the variants' requests.
            clock: seconds.
        """
        self._list_variants = list_variants
        self._report = report
        self._labels = labels
        self._clock = clock
        self._lock = threading.Lock()
        self._listed: tuple[float, Sequence[VariantRecord]] | None = None

    def collect(self) -> Iterable[Family]:
        """All families about variants; none while the zoo cannot be read."""
        records = self._records()
        if records is None:
            return
        chains = {chain.chain for chain in self._report().chains}
        loaded = [record.name for record in records if record.chain in chains]
        yield family(catalogue.REGISTERED, {(): len(records)})
        yield family(catalogue.LOADED, {(): len(loaded)})
        by_label: dict[tuple[str, ...], float] = {}
        for name in loaded:
            label = self._labels.of(name)
            by_label[label,] = 1 if label != OTHER else by_label.get((label,), 0) + 1
        yield family(catalogue.VARIANT_LOADED, by_label)

    def describe(self) -> Iterable[Family]:
        """Nothing: registering does not read the zoo."""
        return ()

    def _records(self) -> Sequence[VariantRecord] | None:
        with self._lock:
            now = self._clock()
            if self._listed is None or now - self._listed[0] >= LISTING_SECONDS:
                try:
                    self._listed = now, self._list_variants()
                except BlockzooError as error:
                    log.warning("the zoo's variants cannot be counted: %s", error)
                    self._listed = None
            return None if self._listed is None else self._listed[1]
