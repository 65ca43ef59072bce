"""Who goes when in a drain, with a clock and chance of our own; what workers do as processes is in tests/e2e."""

import ast
import inspect
import random

import pytest
from hypothesis import given, strategies as st

from fastsig.worker import HEAD_START, Pace

NOW = 1000.0


def _pace(count: int, seconds: float = 20.0, seed: int = 1) -> Pace[int]:
    return Pace(range(count), seconds, NOW, random.Random(seed))


def _gone_by_step(pace: Pace[int], seconds: float, step_s: float) -> list[list[int]]:
    steps = round(seconds / step_s)
    return [pace.due(NOW + step_s * step) for step in range(1, steps + 1)]


@given(count=st.integers(0, 50), seconds=st.floats(1e-3, 86400), seed=st.integers(0, 99))
def test_everybody_goes_exactly_once_and_within_the_time(count: int, seconds: float, seed: int) -> None:
    pace = _pace(count, seconds, seed)
    gone = [one for step in range(4) for one in pace.due(NOW + seconds * step / 3)]
    gone += pace.due(NOW + seconds * (1 + 1e-9))  # floats
    assert sorted(gone) == list(range(count))
    assert pace.due(NOW + 10 * seconds) == []


def test_nobody_goes_before_the_start() -> None:
    assert _pace(100).due(NOW) == []


def test_closes_are_spread_evenly() -> None:
    steps = _gone_by_step(_pace(1000), 20.0, 1.0)
    assert all(49 <= len(gone) <= 51 for gone in steps), [len(gone) for gone in steps]


def test_order_is_random() -> None:
    assert _pace(50, seed=1).due(NOW + 20) != _pace(50, seed=2).due(NOW + 20)
    assert _pace(50).due(NOW + 20) != list(range(50))


def test_the_only_one_does_not_go_at_the_same_moment_each_time() -> None:
    ends = {next(_pace(1, seed=seed).notices())[1][1] for seed in range(10)}
    assert len(ends) == 10 and max(ends) <= 20000


@pytest.mark.parametrize(("count", "seconds"), [(1, 20.0), (7, 0.01), (100, 3600.0)])
def test_notice_names_the_time_just_before_the_close(count: int, seconds: float) -> None:
    pace = _pace(count, seconds)
    notices = sorted(pace.notices(), key=lambda notice: notice[1][1])
    assert {one for one, _ in notices} == set(range(count))
    for one, (least_ms, most_ms) in notices:
        assert 0 <= least_ms <= most_ms <= 1000 * seconds
        assert most_ms - least_ms <= 1000 * seconds * HEAD_START + 1
        assert one not in pace.due(NOW + (most_ms - 1) / 1000)


def test_clients_that_follow_the_notice_are_spread_evenly_too() -> None:
    chance = random.Random(1)
    goes_s = [chance.uniform(*delay_ms) / 1000 for _, delay_ms in _pace(1000).notices()]
    most = max(sum(second <= at < second + 1 for at in goes_s) for second in range(20))
    assert most <= 100, "no second of twenty has more than twice its share of a thousand"


@pytest.mark.parametrize("seconds", [1e-6, 0.001, 86400.0])
def test_nobody_is_there(seconds: float) -> None:
    pace = _pace(0, seconds)
    assert pace.due(NOW + seconds) == []
    assert list(pace.notices()) == []


def test_pace_reads_no_clock_and_does_no_io() -> None:
    names = {node.id for node in ast.walk(ast.parse(inspect.getsource(Pace))) if isinstance(node, ast.Name)}
    assert not names & {"time", "asyncio", "socket", "_log"}
