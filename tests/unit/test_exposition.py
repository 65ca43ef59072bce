"""What Prometheus reads, by the parsers of its own client library; promtool judges it in tests/e2e."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from fastsig import metrics
from fastsig.exposition import Exposition
from fastsig.health import Health, Slot
from fastsig.metrics import FAMILIES, FIRST, IN_MAP, NANO, PREFIX, WORDS, histogram, index
from fastsig.overview import Usage

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.7,text/plain;version=0.0.4;q=0.3"


class Subject:
    """A server of so many workers that never did anything, but for what a test puts into `slabs`."""

    started_at = 1234.5

    def __init__(self, slots: int) -> None:
        self.slabs = [[0] * WORDS for _ in range(slots)]
        self.slots = [Slot("serving") for _ in range(slots)]

    def words(self) -> list[list[int]]:
        return self.slabs

    def health(self) -> Health:
        return Health(0.0, "serving", self.slots)

    def usage(self) -> Iterator[tuple[tuple[str, str], Usage]]:
        yield ("supervisor", ""), Usage(1.5, 1 << 20, 30, 1024)
        for slot in range(len(self.slabs)):
            yield ("worker", str(slot)), Usage(0.25, 2 << 20, 40, math.inf)


@pytest.fixture
def subject() -> Subject:
    return Subject(2)


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(subject: Subject) -> Samples:
    page, _ = Exposition(subject).render("")
    return {
        (sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())): sample.value
        for family in parse(page.decode())
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_every_family_and_series_is_there_before_anything_happened(subject: Subject) -> None:
    page, content_type = Exposition(subject).render("")
    assert content_type.startswith("text/plain; version=")
    found = {family.name: family for family in parse(page.decode())}
    for family in FAMILIES:
        shown = found[PREFIX + (family.name.removesuffix("_total") if family.kind == "counter" else family.name)]
        assert (shown.type, shown.documentation) == (family.kind, family.help)
        if family.source == "map":
            slabs = len(subject.slabs) if family.is_by_worker else 1
            each = len(family.bounds) + 3 if family.kind == "histogram" else 1
            assert len(shown.samples) == slabs * len(family.series) * each
    assert len(found) == len(FAMILIES)


def test_workers_are_added_up(subject: Subject) -> None:
    for slab, count in zip(subject.slabs, (3, 4), strict=True):
        slab[index("relays_total", "local")] = count
        slab[index("disconnects_total", "1006", "lost")] = 10 * count
    samples = scrape(subject)
    assert value(samples, "relays_total", route="local") == 7
    assert value(samples, "relays_total", route="to_owner") == 0
    assert value(samples, "disconnects_total", code="1006", reason="lost") == 70


def test_what_is_by_worker_is_not_added_up(subject: Subject) -> None:
    for slab, count in zip(subject.slabs, (3, 4), strict=True):
        slab[index("connections")] = count
        slab[index("worker_loop_lag_seconds")] = count * NANO // 2
    samples = scrape(subject)
    assert [value(samples, "connections", worker=slot) for slot in "01"] == [3, 4]
    assert [value(samples, "worker_loop_lag_seconds", worker=slot) for slot in "01"] == [1.5, 2.0]


def test_histogram_is_cumulative_and_its_sum_in_units(subject: Subject) -> None:
    at = histogram("offer_answer_seconds")
    counts = [number % 3 for number in range(len(at.bounds) + 1)]
    for slab in subject.slabs:
        slab[at.first : at.first + len(counts)] = counts
        slab[at.first + len(counts)] = 5 * NANO
    samples = scrape(subject)
    sizes = [*(str(bound) for bound in at.bounds), "+Inf"]
    shown = [value(samples, "offer_answer_seconds_bucket", le=size) for size in sizes]
    assert shown == [2 * sum(counts[: place + 1]) for place in range(len(counts))]
    assert value(samples, "offer_answer_seconds_count") == 2 * sum(counts)
    assert value(samples, "offer_answer_seconds_sum") == 10


def test_histogram_of_plain_numbers_has_a_plain_sum(subject: Subject) -> None:
    at = histogram("candidates_per_pair")
    subject.slabs[0][at.first + len(at.bounds)] = 1
    subject.slabs[0][at.first + len(at.bounds) + 1] = 65
    samples = scrape(subject)
    assert value(samples, "candidates_per_pair_sum") == 65
    assert value(samples, "candidates_per_pair_bucket", le="64.0") == 0
    assert value(samples, "candidates_per_pair_bucket", le="+Inf") == 1


def test_words_of_a_family_are_shown_as_that_family(subject: Subject) -> None:
    before = scrape(subject)
    for family in IN_MAP:
        for word in range(FIRST[family.name], FIRST[family.name] + family.words):
            subject.slabs[1][word] += family.scale
        after = scrape(subject)
        changed = {name for (name, labels), was in before.items() if after[name, labels] != was}
        suffixes = ("_bucket", "_count", "_sum") if family.kind == "histogram" else ("",)
        assert changed == {family.name + suffix for suffix in suffixes}
        before = after


def test_what_is_found_out_at_the_scrape(subject: Subject) -> None:
    subject.slots = [Slot("stuck", 2.0), Slot("serving")]
    samples = scrape(subject)
    assert value(samples, "workers", state="stuck") == value(samples, "workers", state="serving") == 1
    assert value(samples, "workers", state="absent") == 0
    assert value(samples, "ready") == 1
    assert value(samples, "start_time_seconds") == 1234.5
    assert value(samples, "process_cpu_seconds_total", process="supervisor", worker="") == 1.5
    assert value(samples, "process_resident_memory_bytes", process="worker", worker="1") == 2 << 20
    assert value(samples, "process_max_fds", process="worker", worker="0") == math.inf
    (build,) = (labels for name, labels in samples if name == "build_info")
    assert {label for label, _ in build} == {"version", "python", "picows", "uvloop"}
    assert all(version for _, version in build)
    subject.slots = [Slot("absent"), Slot("absent")]
    assert value(scrape(subject), "ready") == 0


def test_openmetrics_is_given_to_who_asks_for_it(subject: Subject) -> None:
    page, content_type = Exposition(subject).render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0")
    assert page.endswith(b"# EOF\n")
    assert len(list(parse_openmetrics(page.decode()))) == len(FAMILIES)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "accept",
    [*(f"application/openmetrics-text; version={what}" for what in ("x", "1.0.0-x", "2.nonsense", "2.\udcff", "٢")),
     ";;;,,,", "*/*", "x" * 4000, "\udcff"],
)  # fmt: skip
def test_who_asks_for_nonsense_gets_text(subject: Subject, accept: str) -> None:
    _, content_type = Exposition(subject).render(accept)
    assert content_type.startswith("text/plain; version=")


def test_page_in_docs_is_the_one_that_the_registry_makes() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == metrics.document(), "python -m fastsig.metrics > docs/metrics.md"


def test_page_in_docs_names_every_series() -> None:
    page = metrics.document()
    for family in FAMILIES:
        assert f"| `{PREFIX}{family.name}` |" in page and family.help in page
        shown = [" ".join(values) for values in family.series if len(values) > 1]
        for value in {value for values in family.series for value in values}:
            assert f"`{value}`" in page or any(value in pair.split() and f"`{pair}`" in page for pair in shown)
    assert all(line.count("|") in {4, 5} for line in page.splitlines() if line.startswith("|"))


def test_largest_numbers_are_shown(subject: Subject) -> None:
    subject.slabs = [[(1 << 64) - 1] * WORDS for _ in subject.slabs]
    assert value(scrape(subject), "received_bytes_total") == 2.0**65
