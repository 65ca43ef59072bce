"""The soak: what it calls growth, what it draws; and one short turn of all its faults against a real server."""

import xml.etree.ElementTree as ET
from collections import Counter

import pytest

from loadtest import soak
from loadtest.faults import Report
from loadtest.plot import Line, Panel, over_time, ticks
from loadtest.soak import MIB, SERIES, Sample


def seen(slope: float, of: str = "memory slot 0", count: int = 20) -> list[Sample]:
    """Samples at rest, in which one series grows by so much each time, around noise; and others, which do not count."""
    samples = []
    for number in range(count):
        values = dict.fromkeys(SERIES, 10.0) | {name: 40.0 * MIB for name in SERIES if name.startswith("memory")}
        values[of] += slope * number + (-1) ** number * 0.1 * slope
        samples.append(Sample(float(number), True, values))
        samples.append(Sample(number + 0.5, False, dict.fromkeys(SERIES, 1e12 * number)))
    return samples


def failures(samples: list[Sample], warm_up: int = 4) -> list[str]:
    report = Report("soak", 2)
    soak.judge(report, samples, warm_up)
    return report.failures


def test_what_stays_as_it_is_is_good() -> None:
    assert failures(seen(0)) == []


def test_memory_that_grows_is_named_with_its_size() -> None:
    (failure,) = failures(seen(0.25 * MIB))
    assert failure.startswith("memory slot 0 grows: 41.52 MiB → 44.23 MiB")


def test_a_quarter_of_a_mebibyte_in_all_is_no_growth() -> None:
    assert failures(seen(0.25 * MIB / 20)) == []


@pytest.mark.parametrize("series", [name for name in SERIES if not name.startswith("memory")])
def test_every_other_series_fails_when_it_grows_by_one_each_time(series: str) -> None:
    (failure,) = failures(seen(1.0, of=series))
    assert failure.startswith(f"{series} grows: ")


def test_one_odd_sample_is_no_growth() -> None:
    samples = seen(0)
    samples[-2].values["memory slot 0"] *= 3
    assert failures(samples) == []


def test_growth_in_the_warm_up_is_forgiven() -> None:
    samples = seen(0)
    for number in range(4):
        samples[2 * number].values["memory slot 0"] -= (4 - number) * 5 * MIB
    assert failures(samples, warm_up=4) == []


def test_too_few_samples_are_a_failure_and_no_verdict() -> None:
    assert failures(seen(0, count=9)) == ["too short: 5 samples at rest after the warm-up, 6 are needed"]


def test_series_that_was_not_seen_is_a_failure() -> None:
    samples = seen(0)
    for sample in samples:
        del sample.values["client tasks"]
    assert failures(samples) == ["client tasks was seen only 0 times at rest"]


def test_axis_is_of_round_numbers_up_to_the_first_above_all() -> None:
    assert ticks(43.7) == [0, 20, 40, 60]
    assert ticks(0.9, 2) == [0, 0.5, 1]
    assert ticks(0) == pytest.approx([0, 0.5, 1])


def test_axis_of_small_changes_begins_below_the_least() -> None:
    assert ticks(39.2, least=35.7) == [35, 36, 37, 38, 39, 40]


def test_picture_has_titles_units_and_a_label_for_each_line() -> None:
    panels = [Panel("Memory", "MiB", [Line("a <b>", [(0, 1), (9, 2)]), Line("empty", [])]), Panel("Other", "n", [])]
    root = ET.fromstring(over_time("Title & more", "what it is", "minutes", panels, marks=[4.5], mark="a kill"))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"Title & more", "what it is", "minutes", "Memory (MiB)", "Other (n)", "dotted: a kill", "no data"} <= set(
        texts
    )
    assert "a <b>: 2" in texts and not any(text and text.startswith("empty") for text in texts)
    assert sum(element.tag.endswith("polyline") for element in root.iter()) == 1


@pytest.mark.timeout(180)
async def test_one_turn_of_all_faults_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "ROUND_S", 3.0)
    lines: list[str] = []
    report, this = await soak.soak_for(0, callers=20, viewers=20, reloaders=4, rate=100, say=lines.append)
    assert not report.failures, "\n".join(report.failures[:20])
    assert Counter(name for _, name in this.faults) == {"kill": 1, "drop": 1, "reset": 1, "stall": 1}
    assert [line.split()[2] for line in lines] == [name for _, name in this.faults]
    rest = [sample for sample in this.samples if sample.is_at_rest]
    assert len(rest) == 4
    assert all(SERIES.keys() <= sample.values.keys() for sample in rest)
    assert {(sample.values["connections"], sample.values["members"]) for sample in rest} == {(42.0, 42.0)}
    assert this.lives > 4 and report.figures["messages sent"] > 200
    assert "worker 1 is killed" in soak.picture(report, this)
