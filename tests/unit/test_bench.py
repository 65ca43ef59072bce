"""The page of the benchmark: made of a record alone, honest about what the record lacks."""

import copy
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from loadtest import plot
from loadtest.bench import page

DOCS = Path(__file__).parent.parent.parent / "docs"
TITLES = {
    "relayN-200": "8 on the way",
    "churn-50": "connect and leave",
    "idle": "idle connections",
    "open": "at fixed times",
}


def cell(peer: str, test: str, per_s: float, *, rate: int = 0, us: float = 2.0, p50: float = 40.0) -> dict[str, Any]:
    return {
        "test": test, "peer": peer, "round": 0, "rate": rate, "is_shared": False,
        "per_s": per_s, "sent_per_s": per_s, "us_per_unit": us, "server_cpu_pct": 80.0, "load_cpu_pct": 50.0,
        "kib_per_connection": 6.25 if test == "idle" else 0.0, "mib_before": 70.0,
        "connections": 1000, "connect_s": 0.5,
        "busy_s": 2.0, "stolen_s": 0.0, "faults": {},
        "latency_us": {"p50": p50, "p90": 2 * p50, "p99": 5 * p50, "p999": 9 * p50, "max": 20 * p50},
    }  # fmt: skip


def record() -> dict[str, Any]:
    """Two peers; the second cannot do 50,000 messages/s."""
    cells = []
    for peer, us in (("fastsig", 1.25), ("bun", 7.5)):
        cells += [
            cell(peer, "relayN-200", 1e6 / us, us=us),
            cell(peer, "churn-50", 7359.0, us=108.67),
            cell(peer, "idle", 0.0),
            cell(peer, "open", 1000.0, rate=1000),
        ]
    cells += [cell("fastsig", "open", 50_000.0, rate=50_000), cell("bun", "open", 31_000.0, rate=50_000, p50=90_000.0)]
    meta = {
        "kind": "full", "command": "make bench-full", "arguments": "--full", "note": "", "state": "complete",
        "missing": {"node": "npm is not installed"}, "peers": {"fastsig": "fastsig 1.2.3, 1 worker", "bun": "Bun 9.9"},
        "tests": {name: {"title": title, "load": f"--mode {name}"} for name, title in TITLES.items()},
        "setting": {"rounds": 1, "seconds": 3.0, "warmup_s": 1.0, "idle_connections": 1000},
        "machine": "a slide rule, 2 cores", "commit": "abc1234", "ended": "2026-11-23 10:00",
    }  # fmt: skip
    return {"meta": meta, "cells": cells}


def test_page_has_the_figures_of_the_record() -> None:
    text, charts = page.render(record())
    assert "| **fastsig** | 800.0 (1.25) | 7.4 (109) |" in text
    assert "| bun | 133.3 (7.50) | 7.4 (109) |" in text
    assert "| 1,000/s | 40 / 200 | 40 / 200 |" in text
    assert "| fastsig | 6.2 | 70.0 | 2,000 |" in text
    assert all(word in text for word in ("a slide rule", "abc1234", "fastsig 1.2.3, 1 worker", "Bun 9.9"))
    assert sorted(charts) == ["cpu.svg", "latency-p50.svg", "latency-p99.svg", "memory.svg"]
    assert sorted(re.findall(r"\(benchmarks/(.*?)\)", text)) == sorted(charts)


def test_page_of_a_whole_run_has_no_warning() -> None:
    assert "> " not in page.render(record())[0]


def test_server_that_did_not_keep_up_has_no_latency_there() -> None:
    text, charts = page.render(record())
    assert "| 50,000/s | 40 / 200 | – |" in text
    assert charts["latency-p50.svg"].count(plot.CROSS) == 1


def test_missing_server_is_named_with_its_reason() -> None:
    assert "Left out: node (npm is not installed)." in page.render(record())[0]


@pytest.mark.parametrize("state", ["interrupted", "running"])
def test_interrupted_run_is_reported_as_partial(state: str) -> None:
    partial = record()
    partial["meta"]["state"] = state
    partial["cells"] = partial["cells"][:1]
    text, charts = page.render(partial)
    assert "**Partial**: the run ended after 1 measurements" in text
    assert list(charts) == ["cpu.svg"]


def test_run_that_was_ended_before_its_first_cell_still_gives_a_page() -> None:
    empty = record()
    empty["cells"] = []
    text, charts = page.render(empty)
    assert "**Partial**" not in text
    assert not charts


def test_failed_cells_and_lost_messages_are_said_before_the_figures() -> None:
    faulty = record()
    faulty["cells"][0]["faults"] = {"lost": 3}
    faulty["cells"].append(
        {"test": "churn-50", "peer": "bun", "round": 0, "rate": 0, "is_shared": False, "failed": "did not serve"}
    )
    text, _ = page.render(faulty)
    head, _, _ = text.partition("## Throughput")
    assert "**fastsig in relayN-200: 3 lost**" in head
    assert "bun has no figure in churn-50: did not serve" in head


def test_rate_that_the_generator_bounded_is_marked() -> None:
    bounded = record()
    bounded["cells"][0]["load_cpu_pct"] = 97.0
    assert "| *800.0* (1.25) |" in page.render(bounded)[0]


def test_figures_of_rounds_are_medians() -> None:
    rounds = record()
    for number, per_s in ((1, 100.0), (2, 1e9)):
        rounds["cells"].append(cell("fastsig", "relayN-200", per_s, us=per_s) | {"round": number})
    assert "| **fastsig** | 800.0 (100) |" in page.render(rounds)[0]


def test_charts_are_drawings_with_titles_units_and_a_dark_scheme() -> None:
    for name, svg in page.render(record())[1].items():
        texts = [node.text or "" for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert len(texts[0]) > 20, name
        assert any(unit in text for unit in ("µs", " ms", "KiB") for text in texts), name
        assert {"fastsig", "bun"} <= set(texts), name
        assert "prefers-color-scheme:dark" in svg


def test_points_of_a_line_are_where_their_values_are() -> None:
    """Logarithmic: 1, 10 and 100 are as far apart from each other, and more is further up."""
    svg = plot.lines("t", "s", "x", "y", [plot.Line("a", [(1, 1), (10, 10), (100, 100)])])
    found = re.search(r'<polyline points="(.*?)"', svg)
    assert found
    (x1, y1), (x2, y2), (x3, y3) = (map(float, pair.split(",")) for pair in found[1].split())
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert x1 < x2 and y2 < y1


def test_bars_are_as_long_as_their_values() -> None:
    svg = plot.bars("t", "s", [plot.Bars("p", [("a", 10.0), ("b", 2.5), ("c", None)])])
    long, quarter = (float(width) for width in re.findall(r'width="([\d.]+)" height="15"', svg))
    assert quarter == pytest.approx(long / 4, abs=0.1)
    assert "no figure" in svg


def test_writing_replaces_charts_of_an_earlier_run(tmp_path: Path) -> None:
    written = page.write(record(), tmp_path)
    assert (tmp_path / "benchmarks" / "latency-p50.svg").exists()
    without = copy.deepcopy(record())
    without["cells"] = [one for one in without["cells"] if one["test"] != "open"]
    page.write(without, tmp_path)
    assert not (tmp_path / "benchmarks" / "latency-p50.svg").exists()
    assert "Latency against rate" not in written.read_text(encoding="utf-8")


def test_published_page_is_made_of_the_published_record() -> None:
    """Nobody edits docs/benchmarks.md: `python -m loadtest.bench.page docs/benchmarks/bench.json` writes it."""
    text, charts = page.render(json.loads((DOCS / "benchmarks" / "bench.json").read_text(encoding="utf-8")))
    assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == text
    there = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "benchmarks").glob("*.svg")}
    assert there == charts
