"""What does a scrape cost? `python -m loadtest.scrape`: time and size, of a full map and of a real server over HTTP.

First 8 slabs of a `Counters` map are filled with the numbers of a large server (50,000 connections, 10,000 rooms) and
rendered; then a real server of 8 workers is scraped while it idles.
"""

import os
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from fastsig.exposition import Exposition
from fastsig.health import Health, Slot
from fastsig.metrics import FIRST, IN_MAP, NANO, SLAB_BYTES, WORD_BYTES, Counters, Family, open_slab
from fastsig.overview import Usage
from tests.e2e.conftest import Server, free_port

SLOTS = 8
ROUNDS = 101
CONNECTIONS = 50_000
ROOMS = 10_000
_KNOWN = {"connections": CONNECTIONS, "members": CONNECTIONS, "rooms": ROOMS}  # of all slots and series together


class Subject:
    """A server that is made up."""

    started_at = time.time()

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def words(self) -> list[list[int]]:
        return [self._counters.words(slot) for slot in range(SLOTS)]

    def health(self) -> Health:
        return Health(0.0, "serving", [Slot("serving")] * SLOTS)

    def usage(self) -> Iterator[tuple[tuple[str, str], Usage]]:
        yield ("supervisor", ""), Usage(123.45, 67 << 20, 89, 1 << 20)
        for slot in range(SLOTS):
            yield ("worker", str(slot)), Usage(12345.67, 890 << 20, CONNECTIONS // SLOTS, 1 << 20)


def fill(counters: Counters, slot: int, chance: random.Random) -> None:
    """All words of one slot: numbers as long as those of a server that is busy for a week."""
    slab = memoryview(open_slab(os.dup(counters.fd), slot)).cast("Q")
    assert len(slab) == SLAB_BYTES // WORD_BYTES
    for family in IN_MAP:
        for word in range(FIRST[family.name], FIRST[family.name] + family.words):
            slab[word] = _number(family, chance)


def _number(family: Family, chance: random.Random) -> int:
    if family.name in _KNOWN:
        return _KNOWN[family.name] // SLOTS // len(family.series)
    if family.kind == "gauge":
        return chance.randrange(1000 * family.scale)
    return chance.randrange(10**6 * NANO if family.kind == "histogram" else 10**10)


def measure(once: Callable[[], bytes], what: str) -> None:
    """Prints the median and the worst time of many, and the size."""
    times, page = [], b""
    for _ in range(ROUNDS):
        began = time.perf_counter()
        page = once()
        times.append(1000 * (time.perf_counter() - began))
    median, worst = statistics.median(times), max(times)
    lines = page.count(b"\n")
    print(f"{what}: {median:.1f} ms (median of {ROUNDS}; worst {worst:.1f}), {len(page) / 1024:.0f} KiB, {lines} lines")


def main() -> None:
    counters = Counters(SLOTS)
    for slot in range(SLOTS):
        fill(counters, slot, random.Random(slot))
    exposition = Exposition(Subject(counters))
    for accept, what in (("", "text"), ("application/openmetrics-text", "OpenMetrics")):
        measure(lambda accept=accept: exposition.render(accept)[0], f"rendered, {SLOTS} slabs, {what}")  # type: ignore[misc]
    counters.close()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        server = Server("--workers", str(SLOTS), "--ops.port", str(port), cwd=Path(folder))
        try:
            server.wait_for("serving")
            for path in ("metrics", "readyz", "debug/stats"):
                url = f"http://127.0.0.1:{port}/{path}"
                measure(lambda url=url: _get(url), f"/{path} over HTTP, {SLOTS} workers that idle")  # type: ignore[misc]
        finally:
            server.stop()


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        page: bytes = answer.read()
    return page


if __name__ == "__main__":
    main()
