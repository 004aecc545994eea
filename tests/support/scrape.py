"""Reading a metrics endpoint as Prometheus does."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families


class Scraped:
    """One scrape, parsed by Prometheus' own rules."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.families = {family.name for family in families}
        self.samples = [sample for family in families for sample in family.samples]

    def by(self, name: str, label: str) -> dict[str, float]:
        """Values of a metric by one of its labels, added up over the others (and never over buckets)."""
        found: Counter[str] = Counter()
        for sample in self.samples:
            if sample.name == name:
                found[sample.labels[label]] += sample.value
        return dict(found)

    def one(self, name: str) -> float:
        """The value of a metric with one series."""
        (value,) = [sample.value for sample in self.samples if sample.name == name]
        return value


async def scrape(address: str | None) -> Scraped:
    """Read an endpoint, without holding up the event loop."""
    assert address is not None

    def read() -> str:
        with urlopen(f"http://{address}/metrics", timeout=30) as response:
            return response.read().decode()

    return Scraped(await asyncio.to_thread(read))


async def scrape_logged(log: str) -> Scraped:
    """Read the endpoint that a process has named in its log, the last time it started."""
    return await scrape(re.findall(r"metrics address=http://(\S+)/metrics", log)[-1])
