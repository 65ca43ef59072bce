"""`Fleet` and `Links` with a clock of our own."""

import ast
from collections.abc import Collection
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from fastsig import fleet as module
from fastsig.fleet import (
    FIRST_RETRY_S,
    LONGEST_RETRY_S,
    LOOK_S,
    REPLACE_S,
    SETTLED_S,
    START_S,
    STUCK_S,
    Fleet,
    Links,
    Silence,
    Start,
)
from fastsig.health import Slot

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


def test_no_more_than_some_workers_start_at_once() -> None:
    fleet = Fleet(5, at_once=2)
    assert fleet.starts(NOW) == [Start(0, 1), Start(1, 1)]
    assert (fleet.starts(NOW), fleet.wake_at()) == ([], None), "nothing is due before one of them is ready"
    fleet.on_ready(0, NOW + 1)
    assert fleet.wake_at() is not None
    assert fleet.starts(NOW + 1) == [Start(2, 1)]
    fleet.on_ready(1, NOW + 2)
    fleet.on_ready(2, NOW + 2)
    assert fleet.starts(NOW + 2) == [Start(3, 1), Start(4, 1)]


def test_worker_that_dies_while_it_starts_makes_room_for_another() -> None:
    fleet = Fleet(3, at_once=1)
    for slot in range(3):
        assert fleet.starts(NOW) == [Start(slot, 1)]
        fleet.on_ready(slot, NOW)
    for slot in range(3):
        fleet.on_death(slot, "code 1", NOW + SETTLED_S)
    assert fleet.starts(NOW + SETTLED_S) == [Start(0, 2)]
    fleet.on_death(0, "code 1", NOW + SETTLED_S)
    assert fleet.starts(NOW + SETTLED_S) == [Start(1, 2)]


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


# ---- silence


def _listen(fleet: Fleet, seconds: float, now: float, *, beating: Collection[int] = ()) -> tuple[list[Silence], float]:
    """Look as often as one should, for so long; the slots `beating` are heard before each look. What was found."""
    findings = []
    for _ in range(round(seconds / LOOK_S)):
        for slot in beating:
            fleet.on_heartbeat(slot)
        now += LOOK_S
        findings += fleet.look(now)
    return findings, now


def _found(findings: list[Silence]) -> list[tuple[int, float, bool]]:
    return [(silence.slot, round(silence.seconds, 3), silence.is_over) for silence in findings]


def test_worker_that_beats_is_never_silent() -> None:
    fleet = _serving(2)
    fleet.look(NOW)
    assert _listen(fleet, 60, NOW, beating=[0, 1])[0] == []


def test_worker_that_is_silent_is_found_once_and_given_up_once() -> None:
    fleet = _serving(2)
    fleet.look(NOW)
    findings, _ = _listen(fleet, 60, NOW, beating=[0])
    assert _found(findings) == [(1, STUCK_S, False), (1, REPLACE_S, True)]


def test_worker_that_recovers_is_found_again_the_next_time() -> None:
    fleet = _serving(2)
    fleet.look(NOW)
    first, now = _listen(fleet, 5, NOW, beating=[0])
    assert fleet.on_heartbeat(1), "it had been stuck"
    assert not fleet.on_heartbeat(1), "and is not any more"
    second, _ = _listen(fleet, 5, now, beating=[0])
    assert _found(first) == _found(second) == [(1, STUCK_S, False)]


def test_heartbeat_of_one_that_is_given_up_changes_nothing() -> None:
    fleet = _serving(2)
    fleet.look(NOW)
    _, now = _listen(fleet, REPLACE_S, NOW, beating=[0])
    assert not fleet.on_heartbeat(1)
    assert fleet.accepting() == [0]
    assert _listen(fleet, 60, now, beating=[0])[0] == []


def test_worker_that_never_becomes_ready_is_given_up_though_it_beats() -> None:
    fleet = _serving(2)
    fleet.on_death(1, "code 1", NOW + SETTLED_S)
    fleet.starts(NOW + SETTLED_S)
    fleet.look(NOW + SETTLED_S)
    findings, _ = _listen(fleet, 60, NOW + SETTLED_S, beating=[0, 1])
    assert _found(findings) == [(1, START_S, True)]


def test_successor_starts_with_no_silence() -> None:
    fleet = _serving(2)
    fleet.look(NOW)
    _, now = _listen(fleet, REPLACE_S, NOW, beating=[0])
    assert fleet.on_death(1, "killed", now) == 0.0
    assert fleet.starts(now) == [Start(1, 2)]
    fleet.on_ready(1, now)
    assert fleet.accepting() == [0, 1]
    assert _listen(fleet, 60, now, beating=[0, 1])[0] == []


def test_nobody_is_given_up_while_stopping() -> None:
    fleet = _serving(2)
    fleet.look(NOW)
    fleet.stop()
    assert _listen(fleet, 60, NOW)[0] == []


@pytest.mark.parametrize("away_s", [1.0, 15.0, 86400.0])
def test_time_in_which_we_did_not_listen_is_nobodys_silence(away_s: float) -> None:
    """We were stopped: the first look after it comes before what was said in the meantime is read."""
    fleet = _serving(2)
    fleet.look(NOW)
    _, now = _listen(fleet, STUCK_S - 2 * LOOK_S, NOW)
    assert fleet.look(now + away_s) == []
    assert fleet.accepting() == [0, 1]


def test_worker_that_was_silent_before_we_were_stopped_is_found_after_it() -> None:
    fleet = _serving(2)
    fleet.look(NOW)
    _, now = _listen(fleet, REPLACE_S - 1, NOW, beating=[0])
    findings, now = _listen(fleet, 0.75, now + 900, beating=[0])
    assert findings == []
    assert _found(_listen(fleet, 1, now, beating=[0])[0]) == [(1, REPLACE_S, True)]


# ---- what those who ask are told


def _states(fleet: Fleet, slots: int) -> list[str]:
    return [fleet.health(slot).state for slot in range(slots)]


def test_state_of_a_slot_follows_its_worker() -> None:
    fleet = Fleet(2)
    assert _states(fleet, 2) == ["absent", "absent"]
    fleet.starts(NOW)
    assert _states(fleet, 2) == ["starting", "starting"]
    fleet.on_ready(0, NOW)
    fleet.on_ready(1, NOW)
    assert _states(fleet, 2) == ["serving", "serving"]
    fleet.on_full(0, is_full=True)
    assert [fleet.health(slot).accepts for slot in range(2)] == [False, True]
    fleet.on_death(0, "code 1", NOW)
    assert fleet.health(0) == Slot("absent")
    fleet.stop()
    assert _states(fleet, 2) == ["absent", "draining"]


def test_silent_worker_is_stuck_until_it_says_something_or_ends() -> None:
    fleet = _serving(2)
    fleet.look(NOW)
    _, now = _listen(fleet, 5, NOW, beating=[0])
    assert _states(fleet, 2) == ["serving", "stuck"]
    assert fleet.health(1).silent_s == pytest.approx(5, abs=LOOK_S)
    fleet.on_heartbeat(1)
    assert fleet.health(1) == Slot("serving")
    _, now = _listen(fleet, REPLACE_S, now, beating=[0])
    fleet.on_heartbeat(1)
    assert fleet.health(1).state == "stuck", "it is killed already"


# ---- whose connections others take


def test_slots_that_serve_are_not_deserted() -> None:
    fleet = _serving(3)
    assert (fleet.accepting(), fleet.deserted()) == ([0, 1, 2], [])


def test_full_slot_takes_nothing_and_others_take_what_is_its_own() -> None:
    fleet = _serving(2)
    fleet.look(NOW)
    fleet.on_full(1, is_full=True)
    findings, _ = _listen(fleet, 60, NOW, beating=[0, 1])
    assert (fleet.accepting(), fleet.deserted(), findings) == ([0], [1], []), "full is not stuck"
    fleet.on_full(0, is_full=True)
    assert (fleet.accepting(), fleet.deserted()) == ([], []), "where nobody has room all wait in their own queues"
    fleet.on_full(1, is_full=False)
    assert (fleet.accepting(), fleet.deserted()) == ([1], [0])


def test_successor_of_a_full_worker_has_room() -> None:
    fleet = _serving(2)
    fleet.on_full(1, is_full=True)
    fleet.on_death(1, "code 1", NOW + SETTLED_S)
    fleet.starts(NOW + SETTLED_S)
    fleet.on_ready(1, NOW + SETTLED_S)
    assert fleet.accepting() == [0, 1]


def test_slots_that_nobody_accepts_from_are_the_dead_and_the_stuck() -> None:
    fleet = _serving(5)
    fleet.look(NOW)
    fleet.on_full(4, is_full=True)
    _listen(fleet, STUCK_S, NOW, beating=[0, 2, 3, 4])
    fleet.on_death(2, "code 1", NOW + 1)
    fleet.on_death(3, "code 1", NOW + 1)
    fleet.starts(NOW + 1 + FIRST_RETRY_S)
    fleet.on_death(2, "code 1", NOW + 2)
    assert fleet.unserved() == [1, 2], "that of slot 3 will be ready soon, that of slot 4 accepts when somebody goes"


def test_slot_is_deserted_from_its_death_until_its_successor_is_ready() -> None:
    fleet = _serving(3)
    fleet.on_death(1, "code 1", NOW + 1)
    dead = fleet.deserted()
    fleet.starts(NOW + 2)
    starting = fleet.deserted()
    fleet.on_ready(1, NOW + 3)
    assert (dead, starting, fleet.deserted()) == ([1], [1], [])
    assert fleet.accepting() == [0, 1, 2]


def test_stuck_slot_is_deserted_until_it_is_heard_again() -> None:
    fleet = _serving(2)
    fleet.look(NOW)
    _, now = _listen(fleet, STUCK_S - LOOK_S, NOW, beating=[0])
    assert fleet.deserted() == []
    _listen(fleet, LOOK_S, now, beating=[0])
    assert (fleet.accepting(), fleet.deserted()) == ([0], [1])
    fleet.on_heartbeat(1)
    assert (fleet.accepting(), fleet.deserted()) == ([0, 1], [])


def test_nothing_is_taken_over_before_all_were_ready_once() -> None:
    fleet = Fleet(2)
    fleet.starts(NOW)
    fleet.on_ready(0, NOW + 1)
    assert (fleet.accepting(), fleet.deserted()) == ([0], [])


def test_nothing_is_taken_over_when_nobody_else_serves() -> None:
    fleet = _serving(2)
    fleet.on_death(0, "code 1", NOW + 1)
    fleet.on_death(1, "code 1", NOW + 1)
    assert fleet.deserted() == []
    assert not _serving(1).deserted()


def test_nothing_is_taken_over_while_stopping() -> None:
    fleet = _serving(2)
    fleet.on_death(0, "code 1", NOW + 1)
    was_deserted = fleet.deserted()
    fleet.stop()
    assert (was_deserted, fleet.deserted()) == ([0], [])


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


def test_launch_that_ends_before_all_were_ready_has_not_served() -> None:
    fleet = Fleet(2)
    fleet.starts(NOW)
    fleet.on_ready(0, NOW)
    fleet.stop()
    fleet.on_ready(1, NOW)
    assert (fleet.is_ready, fleet.has_served) == (True, False)
    assert _serving(2).has_served


# ---- links


def _linked() -> tuple[Links, int]:
    """Slots 1 and 2 have a link that was made at NOW; its number."""
    links = Links()
    serial = links.next_serial()
    links.on_made(2, 1, serial, NOW)
    return links, serial


def test_later_link_has_the_higher_number() -> None:
    links = Links()
    serials = [links.next_serial() for _ in range(3)]
    assert serials == sorted(set(serials))


def test_link_that_held_for_long_is_replaced_at_once_for_whoever_asks_first() -> None:
    links, serial = _linked()
    later = NOW + LONGEST_RETRY_S
    assert links.on_unlinked(2, 1, serial, later)
    links.on_made(1, 2, links.next_serial(), later)
    assert not links.on_unlinked(1, 2, serial, later), "the other end has the number of the one before"
    assert links.due(later + 60) == []


def test_link_that_broke_at_once_is_replaced_a_while_later_and_once() -> None:
    links, serial = _linked()
    assert not links.on_unlinked(1, 2, serial, NOW)
    assert not links.on_unlinked(2, 1, serial, NOW + 60), "it is due, whoever asks again"
    assert links.due(NOW + LOOK_S / 2) == []
    assert links.due(NOW + LOOK_S) == [(1, 2)]
    links.on_made(1, 2, links.next_serial(), NOW + LOOK_S)
    assert links.due(NOW + 60) == []


def test_links_that_break_again_and_again_are_replaced_ever_later_up_to_a_limit() -> None:
    links, serial = _linked()
    now, delays = NOW, []
    for _ in range(8):
        assert not links.on_unlinked(1, 2, serial, now)
        step = next(step for step in range(100) if links.due(now + step * LOOK_S))
        delays.append(step * LOOK_S)
        now += step * LOOK_S
        serial = links.next_serial()
        links.on_made(1, 2, serial, now)
    assert delays == [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert links.on_unlinked(1, 2, serial, now + LONGEST_RETRY_S), "this one held"
    links.on_made(1, 2, serial + 1, now + LONGEST_RETRY_S)
    assert not links.on_unlinked(1, 2, serial + 1, now + LONGEST_RETRY_S)
    assert links.due(now + LONGEST_RETRY_S + 2 * LOOK_S) == [(1, 2)], "so the next one waits briefly again"


def test_link_that_the_machine_has_no_room_for_is_due_until_it_is_made_and_is_news_once() -> None:
    links, serial = _linked()
    assert links.on_unlinked(1, 2, serial, NOW + 60)
    assert [links.on_shortage(1, 2), links.on_shortage(2, 1)] == [True, False]
    assert links.due(NOW + 60) == [(1, 2)]
    links.on_made(1, 2, links.next_serial(), NOW + 61)
    assert links.due(NOW + 120) == []
    assert links.on_shortage(1, 2), "another one"


def test_links_of_a_dead_worker_are_forgotten_and_no_others() -> None:
    links = Links()
    serials = {ends: links.next_serial() for ends in [(0, 1), (0, 2), (1, 2)]}
    for ends, serial in serials.items():
        links.on_made(*ends, serial, NOW)
        links.on_unlinked(*ends, serial, NOW)
    links.on_death(0)
    assert links.due(NOW + 60) == [(1, 2)]
    assert not links.on_unlinked(1, 0, serials[0, 1], NOW + 60), "the successor brings its own"


def test_no_link_is_replaced_at_the_end() -> None:
    links, serial = _linked()
    links.on_unlinked(1, 2, serial, NOW)
    links.stop()
    assert links.due(NOW + 60) == []
    assert not links.on_unlinked(1, 2, serial, NOW + 60)


def test_fleet_reads_no_clock_and_does_no_io() -> None:
    """Whoever imports nothing but these can do neither."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found == {"dataclasses", "health", "itertools", "typing"}
