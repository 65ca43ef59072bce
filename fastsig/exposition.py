"""What Prometheus reads: the registry of `metrics`, filled from the shared map and from what is known only when asked.

A custom collector of prometheus_client: the library writes the text, in the format that the client asks for; nothing is
counted here. Every family of the registry is there at every scrape, with all of its series, also those that are 0.

Invariant: each slab is read once per scrape, so the buckets of a histogram never contradict its count.
Must not know: processes, HTTP. Imports prometheus_client, so it is imported late and by the supervisor alone.
"""

import importlib.metadata
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Final, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from . import __version__
from .health import Health
from .metrics import BY_NAME, FIRST, IN_MAP, PREFIX, Family


class Usage(Protocol):
    """What a process uses."""

    @property
    def cpu_seconds(self) -> float: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def open_fds(self) -> int: ...
    @property
    def max_fds(self) -> float: ...


class Subject(Protocol):
    """The server, as it is asked at a scrape."""

    @property
    def started_at(self) -> float: ...  # unix seconds

    def words(self) -> list[list[int]]: ...  # of the map, by slot
    def health(self) -> Health: ...
    def usage(self) -> Iterable[tuple[tuple[str, str], Usage]]: ...  # by the values of `process` and `worker`


_AnyFamily = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
_KINDS: Final[dict[str, Callable[..., Any]]] = {
    "counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily,
}  # fmt: skip
_OF_PROCESSES: Final = {
    "process_cpu_seconds_total": "cpu_seconds",
    "process_resident_memory_bytes": "memory_bytes",
    "process_open_fds": "open_fds",
    "process_max_fds": "max_fds",
}
_VERSION: Final = re.compile(r".+; version=[0-9]\.[0-9]\.[0-9](;.*)?")


class Exposition(Collector):
    """Renders a `Subject`. 8 slots take some milliseconds."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._registry = CollectorRegistry()
        self._registry.register(self)
        libraries = (importlib.metadata.version(name) for name in ("picows", "uvloop"))
        self._build = (__version__, platform.python_version(), *libraries)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type, for a client with this Accept header."""
        encoder, content_type = _encoder(accept)
        return encoder(self._registry), content_type

    def describe(self) -> Iterable[Metric]:
        """Asked at registration, for clashes of names: there are none, and nothing is read for it."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families, in the order of the registry."""
        slabs = self._subject.words()
        totals = [sum(column) for column in zip(*slabs, strict=True)]
        for family in IN_MAP:
            if family.is_by_worker:
                yield _metric(family, [((str(slot),), words) for slot, words in enumerate(slabs)])
            else:
                yield _metric(family, [((), totals)])
        yield from self._found_out()

    def _found_out(self) -> Iterator[Metric]:
        """The families whose source is the scrape itself."""
        health = self._subject.health()
        states = Counter(slot.state for slot in health.slots)
        yield _known("workers", ((series, states[series[0]]) for series in BY_NAME["workers"].series))  # type: ignore[index]
        yield _known("ready", [((), health.is_ready)])
        yield _known("start_time_seconds", [((), self._subject.started_at)])
        usage = list(self._subject.usage())
        for name, field in _OF_PROCESSES.items():
            yield _known(name, ((labels, getattr(used, field)) for labels, used in usage))
        yield _known("build_info", [(self._build, 1)])


def _encoder(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """Text for whoever asks for a version that is none: 0.26 compares it as it is, or repeats it to the client."""
    try:
        encoder, content_type = choose_encoder(accept)
    except (TypeError, ValueError):
        return choose_encoder("")
    return (encoder, content_type) if _VERSION.fullmatch(content_type) else choose_encoder("")


def _known(name: str, samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
    """A family without buckets, from its values by labels."""
    family = BY_NAME[name]
    metric: CounterMetricFamily | GaugeMetricFamily = _KINDS[family.kind](
        PREFIX + name, family.help, labels=family.labels
    )
    for labels, value in samples:
        metric.add_metric(labels, value)
    return metric


def _metric(family: Family, slabs: Iterable[tuple[tuple[str, ...], Sequence[int]]]) -> Metric:
    """A family of the map. `slabs`: the words of one worker, or of all together, and the labels that this adds."""
    labels = [*family.labels, *(["worker"] if family.is_by_worker else [])]
    metric: _AnyFamily = _KINDS[family.kind](PREFIX + family.name, family.help, labels=labels)
    for worker, words in slabs:
        at = FIRST[family.name]
        for series in family.series:
            own = words[at : at + family.words_each]
            at += family.words_each
            if isinstance(metric, HistogramMetricFamily):
                metric.add_metric([*series, *worker], _buckets(family, own), own[-1] / family.scale)
            else:
                metric.add_metric([*series, *worker], own[0] / family.scale if family.scale != 1 else own[0])
    return metric


def _buckets(family: Family, words: Sequence[int]) -> list[tuple[str, int]]:
    """Cumulative, as Prometheus has them. `words`: one count per bound, one above the last, and the sum."""
    return list(zip([*map(floatToGoString, family.bounds), "+Inf"], accumulate(words[:-1]), strict=True))
