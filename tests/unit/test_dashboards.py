"""The dashboard, the rules and their runbook: each query is one, and asks for metrics and labels that there are."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from promql_parser import AggregateExpr, Call, Expr, MatrixSelector, VectorSelector

from fastsig.metrics import BY_NAME, FAMILIES, PREFIX, Family
from loadtest import panels

ROOT = Path(__file__).parent.parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "rules.yml").read_text(encoding="utf-8"))
RUNBOOK = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
RUNBOOK_URL = "https://example.org/fastsig/blob/main/docs/monitoring.md#"
DASHBOARD = json.loads(panels.DASHBOARD.read_text(encoding="utf-8"))
ANY_TARGET = {"job", "instance"}  # Prometheus' own labels of what it scraped
NOT_SHOWN: dict[str, str] = {}  # families that are on no panel, and why
RATES = {"rate", "increase", "irate"}

ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
RECORDED = {rule["record"]: rule for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
ANNOTATIONS = [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
QUERIES = (
    [(f"{view.row}: {view.title}", query.expression) for view in panels.views() for query in view.queries]
    + [("annotation", expression) for expression in ANNOTATIONS]
    + [(name, rule["expr"]) for name, rule in (ALERTS | RECORDED).items()]
)
EACH_QUERY = pytest.mark.parametrize("expression", [text for _, text in QUERIES], ids=[where for where, _ in QUERIES])


def _parse(expression: str) -> Expr:
    return promql_parser.parse(panels.filled(expression, window="5m", span="3h"))


def _children(node: Expr) -> Iterator[Expr]:
    """What it is made of; a matrix selector is left whole."""
    for name in ("expr", "param", "lhs", "rhs"):
        if isinstance(child := getattr(node, name, None), Expr):
            yield child
    if isinstance(node, Call):
        yield from node.args


def _all(node: Expr) -> Iterator[Expr]:
    yield node
    for child in _children(node):
        yield from _all(child)


def _selectors(node: Expr) -> Iterator[tuple[VectorSelector, bool]]:
    """Each, and whether it has a range."""
    for each in _all(node):
        if isinstance(each, MatrixSelector):
            yield each.vector_selector, True
        elif isinstance(each, VectorSelector):
            yield each, False


def _family(name: str) -> tuple[Family, str]:
    """Of a metric as Prometheus has it: its family, and which of a histogram's series."""
    short = name.removeprefix(PREFIX)
    if short in BY_NAME:
        assert BY_NAME[short].kind != "histogram", f"{name} has only _bucket, _sum and _count"
        return BY_NAME[short], ""
    base, _, part = short.rpartition("_")
    assert part in {"bucket", "sum", "count"} and base in BY_NAME, f"there is no metric {name}"
    assert BY_NAME[base].kind == "histogram", f"{name}: {base} is no histogram"
    return BY_NAME[base], part


def _labels(selector: VectorSelector) -> set[str]:
    """All that its series have."""
    name = selector.name
    assert name, "a query names its metric"
    if name == "up":
        return ANY_TARGET
    if name == "ALERTS":
        return {"alertname", "alertstate", "severity", "worker", "process", *ANY_TARGET}
    if name in RECORDED:
        return {"job"}
    family, part = _family(name)
    own = {*family.labels, *({"worker"} if family.is_by_worker else set()), *({"le"} if part == "bucket" else set())}
    return own | ANY_TARGET


# ---- queries


@EACH_QUERY
def test_query_asks_for_metrics_and_labels_that_there_are(expression: str) -> None:
    for selector, has_range in _selectors(_parse(expression)):
        labels = _labels(selector)
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels, f"{selector.name} has no label {matcher.name}"
        if (selector.name or "").startswith(PREFIX) and selector.name not in RECORDED:
            family, part = _family(selector.name or "")
            assert not has_range or family.kind != "gauge" or "avg_over_time" in expression
            _check_values(family, selector)
            assert has_range or family.kind == "gauge", f"{family.name}{part} only grows: what is meant is its rate"


def _check_values(family: Family, selector: VectorSelector) -> None:
    """Each value that a label is compared with is one that it can have."""
    for matcher in selector.matchers.matchers:
        if matcher.name in family.labels and family.series:
            place = family.labels.index(matcher.name)
            known = {values[place] for values in family.series}
            asked = set(matcher.value.split("|"))
            assert asked <= known, f"{family.name}: {matcher.name} is never {asked - known}"


@EACH_QUERY
def test_query_groups_by_labels_that_there_are(expression: str) -> None:
    for node in _all(_parse(expression)):
        if isinstance(node, AggregateExpr) and node.modifier is not None:
            there = set().union(*(_labels(selector) for selector, _ in _selectors(node)))
            assert set(node.modifier.labels) <= there


@EACH_QUERY
def test_query_takes_rates_of_counters_and_quantiles_of_buckets(expression: str) -> None:
    for node in _all(_parse(expression)):
        if isinstance(node, Call) and node.func.name in RATES:
            assert isinstance(node.args[0], MatrixSelector)
            family, _ = _family(node.args[0].vector_selector.name or "")
            assert family.kind in {"counter", "histogram"}, f"a gauge has no rate: {family.name}"
        if isinstance(node, Call) and node.func.name == "histogram_quantile":
            names = {selector.name or "" for selector, _ in _selectors(node)}
            assert all(_family(name)[1] == "bucket" for name in names)


def test_every_metric_is_on_the_dashboard_or_has_a_reason() -> None:
    selectors = (selector for view in panels.views() for query in view.queries
                 for selector, _ in _selectors(_parse(query.expression)))  # fmt: skip
    shown = {_family(name)[0].name for selector in selectors if (name := selector.name or "").startswith(PREFIX)}
    assert shown | NOT_SHOWN.keys() == {family.name for family in FAMILIES}
    assert not shown & NOT_SHOWN.keys()


# ---- the dashboard


def _panels() -> list[dict[str, Any]]:
    """Rows too."""
    return [each for panel in DASHBOARD["panels"] for each in (panel, *panel.get("panels", ()))]


def test_dashboard_has_variables_and_an_address_that_stays() -> None:
    assert DASHBOARD["uid"] == "fastsig"
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "job", "instance"]


def test_panels_are_drawn_from_the_chosen_source_and_say_what_to_do() -> None:
    ids = [panel["id"] for panel in _panels()]
    assert len(ids) == len(set(ids))
    for panel in _panels():
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
            assert len(panel["description"]) > 30, panel["title"]
            assert panels.scaled(panel["fieldConfig"]["defaults"]["unit"], 1)


def test_panels_have_their_places() -> None:
    """Nothing over the edge, nothing on top of another; the page that is open at first fits a screen or so."""
    for group in ([panel for panel in DASHBOARD["panels"] if panel["type"] != "row"],
                  *(row["panels"] for row in DASHBOARD["panels"] if row["type"] == "row")):  # fmt: skip
        places = [(panel["title"], *(panel["gridPos"][key] for key in "xywh")) for panel in group]
        assert all(x + width <= 24 for _, x, _, width, _ in places)
        for (_, x, y, width, height), (title, x2, y2, width2, height2) in itertools.combinations(places, 2):
            assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y, title
    assert max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in DASHBOARD["panels"]) <= 36


def test_legends_name_labels_that_the_query_gives() -> None:
    for view in panels.views():
        for query in view.queries:
            there = set().union(*(_labels(selector) for selector, _ in _selectors(_parse(query.expression))))
            for node in _all(_parse(query.expression)):
                if isinstance(node, AggregateExpr):
                    there &= set(node.modifier.labels) if node.modifier else set()
            assert set(re.findall(r"{{(\w+)}}", query.legend)) <= there, view.title


def test_rates_are_over_the_interval_that_grafana_chooses() -> None:
    for view in panels.views():
        for query in view.queries:
            assert set(re.findall(r"\[(.*?)\]", query.expression)) <= {"$__rate_interval", "$__range"}, view.title


# ---- rules


@pytest.mark.parametrize("name", ALERTS)
def test_alert_says_what_it_is_and_where_the_cure_stands(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    url, _, heading = rule["annotations"]["runbook_url"].partition("#")
    assert (url + "#", heading) == (RUNBOOK_URL, name.lower())
    assert re.search(rf"^#+ {name}$", RUNBOOK, re.MULTILINE)


def test_runbook_has_no_section_for_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"^#+ (Fastsig\w+)$", RUNBOOK, re.MULTILINE)) == ALERTS.keys()


def test_each_alert_is_tested_to_fire_and_not_to_fire() -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for name in ALERTS:
        outcomes = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name}
        assert outcomes == {True, False}, name


# ---- as Prometheus' own tool sees it


@pytest.fixture
def promtool() -> Callable[..., str]:
    """Run it in deploy/prometheus; what it said, when it found nothing wrong."""
    if not shutil.which("promtool"):
        pytest.skip("no promtool: apt-get install --no-install-recommends prometheus")

    def run(*args: str) -> str:
        done = subprocess.run(["promtool", *args], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_rules_are_rules_for_prometheus(promtool: Callable[..., str]) -> None:
    assert f"SUCCESS: {len(ALERTS) + len(RECORDED)} rules found" in promtool(
        "check", "rules", "--lint=all", "rules.yml"
    )


def test_alerts_fire_when_they_should(promtool: Callable[..., str]) -> None:
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml")


def test_example_configuration_is_one(promtool: Callable[..., str]) -> None:
    assert "1 rule files found" in promtool("check", "config", "prometheus.yml")
