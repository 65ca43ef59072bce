"""For all tests: asyncio tests run on uvloop, and what is skipped is never overlooked.

Where CI is set (`.ci/run`) a skip is a failure that gives its reason: there, everything must run. Elsewhere the skipped
tests are named in the very last line.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping

import pytest
import uvloop

from fastsig import logs

IS_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
_skipped: dict[str, list[str]] = {}  # reason -> names


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """How this process logs is put back after each test: the log's settings are those of the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    before = {name: getattr(logs._output, name) for name in logs._Output.__slots__}
    logs._output.flood = logs.Flood()
    yield
    root.handlers, root.level = handlers, level
    for name, value in before.items():
        setattr(logs._output, name, value)


def _account(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    where = report.longrepr
    reason = str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")
    if IS_CI:
        report.outcome = "failed"
        report.longrepr = f"skipped, where everything must run (CI is set): {reason}"
    else:
        _skipped.setdefault(reason, []).append(report.nodeid.rpartition("/")[2])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _account(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _account(report)
    return report


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if _skipped:
        notes = (f"{', '.join(names)} ({reason})" for reason, names in _skipped.items())
        sys.stdout.write(f"skipped: {'; '.join(notes)}\n")
