"""What breaks, and what may be noticed of it: the scenarios of `loadtest/faults.py`, short enough for every run.

The figures that they are held to are those of a busy machine; `make faults` has the long versions, and the strict ones.
"""

from collections.abc import Coroutine
from typing import Any

import pytest

from loadtest import faults
from loadtest.faults import Report

MANY = 4  # workers of the server that is broken: enough that most connections and rooms are not concerned

pytestmark = pytest.mark.timeout(120)


async def _good(scenario: Coroutine[Any, Any, Report]) -> Report:
    report = await scenario
    assert not report.failures, "\n".join(report.failures[:20])
    return report


@pytest.mark.parametrize("moves", ["true", "false"])
async def test_kill_of_a_worker_is_noticed_by_its_own_peers_only(moves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own are the members of its rooms where they have moved to them, else those who are connected to it."""
    monkeypatch.setitem(faults.FREE, "FASTSIG_SERVER_MOVES", moves)
    report = await _good(faults.kill(MANY, 3, clients=100, rooms=40, rate=200, p99_ms=250))
    assert {this["slot"] for this in report.rounds} == {0, 1, 2}
    assert sum(this["dropped"] for this in report.rounds) > 0


async def test_worker_that_is_stopped_for_three_seconds_goes_on_and_nobody_is_lost() -> None:
    report = await _good(faults.stop(MANY, 1, seconds=[3.0], clients=60, rate=100))
    assert report.rounds[0]["asleep"] > 0


async def test_workers_whose_supervisor_is_killed_drain_and_end() -> None:
    report = await _good(faults.orphans(MANY, 1, clients=100, seconds=1.0, rate=100))
    assert report.rounds[0]["closes"] == {"4000": 100}


async def test_drain_of_many_under_load_loses_nothing() -> None:
    report = await _good(faults.drain(MANY, 1, clients=500, seconds=2.0, rate=300))
    assert report.rounds[0]["acked"] > 100 and report.rounds[0]["closes"]["4000"] == 500


async def test_signal_at_any_moment_of_the_start_ends_it_cleanly() -> None:
    report = await _good(faults.start(MANY, 5))
    assert len(report.rounds) == 5


async def test_second_signal_ends_a_drain_at_once() -> None:
    await _good(faults.force(MANY, 1, clients=40))


async def test_what_the_machine_refuses_at_the_start_is_said_in_one_line() -> None:
    report = await _good(faults.refused(2))
    assert len(report.rounds) == 4


@pytest.mark.parametrize("clients", [350, 900], ids=["room for all", "room for some"])
async def test_few_descriptors_limit_who_gets_in_and_nothing_else(clients: int) -> None:
    """Two workers with 256 each: the fewer all get in, wherever their rooms are; of the more most do not."""
    report = await _good(faults.descriptors(2, clients=clients, most=256))
    assert (report.rounds[0]["outside"] > 0) == (clients == 900)


async def test_many_in_several_rooms_hear_everything_in_order() -> None:
    report = await _good(faults.crossing(MANY, 1, seconds=3.0, rate=300))
    assert report.rounds[0]["messages"] > 1000
