"""What does a scrape cost? `python -m loadtest.scrape`: time and size, of a full map and of a real server over HTTP;
with `--latency` instead: how late messages are while somebody scrapes every second, and while nobody does.

First 8 slabs of a `Counters` map are filled with the numbers of a large server (50,000 connections, 10,000 rooms) and
rendered; then a real server of 8 workers is scraped while it idles.
"""

import contextlib
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from fastsig.exposition import Exposition
from fastsig.health import Health, Slot
from fastsig.metrics import FIRST, IN_MAP, NANO, SLAB_BYTES, WORD_BYTES, Counters, Family, open_slab
from fastsig.overview import Usage
from loadtest.bench.peers import sigload
from loadtest.bench.run import open_loop
from loadtest.faults import FREE
from tests.e2e.conftest import Server, free_port

SLOTS = 8
ROUNDS = 101
LATENCY_ROUNDS = 9
RATE = 20_000  # messages/s
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


def latency() -> None:
    """Prints p50 and p99 of messages at fixed times, medians of rounds that alternate; server and load on a core each.

    The supervisor, which answers the scrapes, shares the worker's core: that is the worst place for it.
    """
    cores = sorted(os.sched_getaffinity(0))
    seen: dict[str, list[tuple[float, float]]] = {"nobody scrapes": [], "a scrape every second": []}
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        pinned = ("taskset", "--cpu-list", str(cores[0]))
        server = Server("--ops.port", str(port), env=FREE, cwd=Path(folder), prefix=pinned)
        try:
            server.wait_for("serving")
            for _ in range(LATENCY_ROUNDS):
                for what, found in seen.items():
                    with _scraped(port) if what.startswith("a ") else contextlib.nullcontext():
                        found.append(_late(server.port, cores[-1]))
        finally:
            server.stop()
    for what, found in seen.items():
        halves, lates = zip(*found, strict=True)
        spread = f"{min(lates):.0f} to {max(lates):.0f}"
        print(
            f"{what}: p50 {statistics.median(halves):.1f} µs, p99 {statistics.median(lates):.0f} µs"
            f" (medians of {len(found)}; p99 {spread}) at {RATE:,}/s"
        )


@contextlib.contextmanager
def _scraped(port: int) -> Iterator[None]:
    """Every second, meanwhile."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(1.0):
            _get(f"http://127.0.0.1:{port}/metrics")

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _late(port: int, core: int) -> tuple[float, float]:
    """p50 and p99 in µs, of one round."""
    load = shlex.split(open_loop(RATE).load)
    command = [str(sigload()), "--port", str(port), "--pin", str(core), "--duration", "5", "--warmup", "1", *load]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    (report,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"mode"')]
    return report["lat_us"]["p50"], report["lat_us"]["p99"]


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        page: bytes = answer.read()
    return page


if __name__ == "__main__":
    if sys.argv[1:] == ["--latency"]:
        latency()
    else:
        main()
