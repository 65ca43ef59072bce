"""`Fleet` with a clock of our own; what the supervisor does with processes and sockets is in tests/e2e."""

import ast
import inspect

import pytest
from hypothesis import given, strategies as st

from fastsig import supervisor
from fastsig.config import Config
from fastsig.supervisor import FIRST_RETRY_S, LONGEST_RETRY_S, SETTLED_S, Fleet, Start

NOW = 1000.0


def _serving(slots: int = 1) -> Fleet:
    """A fleet that was launched at NOW and is ready."""
    fleet = Fleet(slots)
    for start in fleet.starts(NOW):
        fleet.on_ready(start.slot, NOW)
    return fleet


def test_every_slot_is_started_once_at_first() -> None:
    fleet = Fleet(3)
    assert fleet.starts(NOW) == [Start(0, 1), Start(1, 1), Start(2, 1)]
    assert fleet.starts(NOW + 60) == []
    assert fleet.wake_at() is None


def test_fleet_is_ready_when_all_its_workers_are() -> None:
    fleet = Fleet(2)
    fleet.starts(NOW)
    assert fleet.on_ready(0, NOW + 0.5) == 0.5
    assert not fleet.is_ready
    fleet.on_ready(1, NOW + 0.7)
    assert fleet.is_ready


def test_fleet_is_not_ready_while_a_worker_is_replaced() -> None:
    fleet = _serving(2)
    fleet.on_death(1, "code 1", NOW + 60)
    assert not fleet.is_ready


def test_worker_that_had_settled_is_replaced_at_once() -> None:
    fleet = _serving()
    assert fleet.on_death(0, "signal SIGKILL", NOW + SETTLED_S) == 0.0
    assert fleet.starts(NOW + SETTLED_S) == [Start(0, 2)]


def test_worker_that_died_of_its_start_is_replaced_after_a_delay() -> None:
    fleet = _serving()
    died_at = NOW + SETTLED_S - 0.01
    assert fleet.on_death(0, "code 1", died_at) == FIRST_RETRY_S
    assert fleet.wake_at() == died_at + FIRST_RETRY_S
    assert fleet.starts(died_at + FIRST_RETRY_S / 2) == []
    assert fleet.starts(died_at + FIRST_RETRY_S) == [Start(0, 2)]


def _die_again_and_again(fleet: Fleet, times: int, now: float) -> tuple[list[float], float]:
    delays = []
    for _ in range(times):
        delay_s = fleet.on_death(0, "code 1", now)
        assert delay_s is not None
        delays.append(delay_s)
        now = fleet.wake_at() or now
        assert len(fleet.starts(now)) == 1
    return delays, now


def test_delay_doubles_up_to_a_limit() -> None:
    delays, _ = _die_again_and_again(_serving(), 9, NOW)
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]


def test_delay_starts_anew_after_a_worker_that_settled() -> None:
    fleet = _serving()
    _, now = _die_again_and_again(fleet, 4, NOW)
    assert fleet.on_death(0, "code 1", now + SETTLED_S) == 0.0
    fleet.starts(now + SETTLED_S)
    assert fleet.on_death(0, "code 1", now + SETTLED_S) == FIRST_RETRY_S


def test_death_of_one_slot_leaves_the_others_alone() -> None:
    fleet = _serving(3)
    fleet.on_death(1, "code 1", NOW + 60)
    assert fleet.starts(NOW + 60) == [Start(1, 2)]


def test_slot_that_cannot_boot_at_the_first_launch_ends_the_launch() -> None:
    fleet = Fleet(2)
    fleet.starts(NOW)
    fleet.on_ready(0, NOW)
    assert fleet.on_death(1, "no memory", NOW + 1) is None
    assert fleet.failure == "no memory"
    assert fleet.is_stopping
    was_over = fleet.is_over
    assert fleet.on_death(0, "code 0", NOW + 2) is None
    assert (was_over, fleet.is_over) == (False, True), "the other worker ran still"
    assert fleet.failure == "no memory"


def test_slot_that_has_served_once_is_tried_for_ever() -> None:
    fleet = _serving()
    _die_again_and_again(fleet, 20, NOW)
    assert fleet.failure is None


def test_nothing_is_started_while_stopping() -> None:
    fleet = _serving(2)
    fleet.on_death(0, "code 1", NOW + 1)
    fleet.stop()
    assert fleet.starts(NOW + 60) == []
    assert fleet.wake_at() is None
    was_over = fleet.is_over
    fleet.on_death(1, "code 0", NOW + 2)
    assert (was_over, fleet.is_over) == (False, True)


def test_fleet_is_empty_when_every_worker_that_runs_says_so() -> None:
    fleet = _serving(3)
    fleet.on_empty(0)
    fleet.on_empty(1)
    fleet.on_empty(2)
    assert not fleet.is_empty, "nobody asked"
    fleet.on_death(0, "code 1", NOW + 60)
    fleet.on_death(1, "code 1", NOW + 60)
    fleet.starts(NOW + 60)
    fleet.stop()
    fleet.on_empty(0)
    was_empty = fleet.is_empty
    fleet.on_death(1, "signal SIGKILL", NOW + 61)
    assert (was_empty, fleet.is_empty) == (False, True), "first the new worker of slot 1 had not said so"
    assert not fleet.is_over


def test_stop_before_the_first_launch_is_over_at_once() -> None:
    fleet = Fleet(2)
    fleet.stop()
    assert fleet.is_over


def test_stop_during_the_first_launch_is_no_failure() -> None:
    fleet = Fleet(1)
    fleet.starts(NOW)
    fleet.stop()
    fleet.on_death(0, "code 0", NOW + 1)
    assert fleet.is_over
    assert fleet.failure is None


def test_worker_was_heard_of_at_its_start_and_its_last_heartbeat() -> None:
    fleet = Fleet(1)
    fleet.starts(NOW)
    assert fleet.heard_at(0) == NOW
    fleet.on_ready(0, NOW + 1)
    fleet.on_heartbeat(0, NOW + 1.5)
    assert fleet.heard_at(0) == NOW + 1.5


@given(deaths=st.lists(st.tuples(st.integers(0, 3), st.floats(0, 30)), max_size=60))
def test_generations_of_a_slot_grow_by_one_and_no_slot_waits_longer_than_the_limit(
    deaths: list[tuple[int, float]],
) -> None:
    fleet = _serving(4)
    generations = [1, 1, 1, 1]
    running = {0, 1, 2, 3}
    now = NOW
    for slot, later_s in deaths:
        now += later_s
        for start in fleet.starts(now):
            generations[start.slot] += 1
            assert start.generation == generations[start.slot]
            running.add(start.slot)
        if slot in running:
            running.remove(slot)
            delay_s = fleet.on_death(slot, "code 1", now)
            assert delay_s is not None and 0 <= delay_s <= LONGEST_RETRY_S
    fleet.starts(now + LONGEST_RETRY_S)
    assert fleet.wake_at() is None, "every slot runs again"


def test_there_is_one_worker_for_now() -> None:
    assert supervisor.slot_count(Config()) == 1


@pytest.mark.parametrize(
    ("address", "is_loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("fe80::1%lo", False)],
)
def test_open_mode_is_judged_by_the_address(address: str, *, is_loopback: bool) -> None:
    assert supervisor._is_loopback((address, 8080)) is is_loopback


def test_address_of_ipv6_is_named_in_brackets() -> None:
    assert supervisor._name(("::1", 8080, 0, 0)) == "[::1]:8080"
    assert supervisor._name(("127.0.0.1", 8080)) == "127.0.0.1:8080"


def test_fleet_reads_no_clock_and_does_no_io() -> None:
    names = {node.id for node in ast.walk(ast.parse(inspect.getsource(Fleet))) if isinstance(node, ast.Name)}
    assert not names & {"time", "os", "socket", "subprocess", "asyncio", "_log"}
