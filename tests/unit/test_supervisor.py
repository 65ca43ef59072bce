"""`Fleet` with a clock of our own, and the parts that hold descriptors; processes and ports are in tests/e2e."""

import ast
import asyncio
import dataclasses
import inspect
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator

import pytest
from hypothesis import given, strategies as st

from fastsig import control, cpus, supervisor
from fastsig.config import Config, build
from fastsig.control import NOTHING, Channel, Drain, Hand, Link, Message, Reload
from fastsig.supervisor import (
    FIRST_RETRY_S,
    IN_HAND,
    IN_HAND_S,
    LONGEST_RETRY_S,
    LOOK_S,
    REPLACE_S,
    SETTLED_S,
    START_S,
    STUCK_S,
    Fleet,
    Silence,
    Start,
    _Deputy,
    _Outbox,
)

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


def test_workers_are_as_many_as_asked_for_or_one_per_usable_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "count", lambda: 7)
    assert supervisor.slot_count(Config()) == 7
    assert supervisor.slot_count(build({"server.workers": 3})) == 3


# ---- what a worker is told


@pytest.fixture
def told() -> Iterator[tuple[_Outbox, Channel]]:
    """What the supervisor sends by, and the worker's end of that channel."""
    ours, theirs = control.pair()
    worker = Channel(theirs)
    outbox = _Outbox(ours)
    yield outbox, worker
    outbox.close()
    ours.close()
    worker.close()


def _pipe_end() -> tuple[int, int]:
    """What sees when the last copy of the other, which is given away, is closed."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    return reader, writer


def _is_closed(reader: int) -> bool:
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False


def _fill(outbox: _Outbox) -> int:
    """Until the channel has no room; how many messages it took."""
    count = 0
    while outbox.offer(Hand(count)):
        count += 1
    return count


def _all_of(worker: Channel) -> list[Message]:
    found = []
    while (message := worker.receive()) is not NOTHING:
        assert message is not None
        found.append(message)
    return found


def test_copy_of_a_descriptor_is_closed_once_it_is_sent(told: tuple[_Outbox, Channel]) -> None:
    outbox, worker = told
    reader, writer = _pipe_end()
    outbox.send(Link(1, 1, 1, [writer]))
    assert not _is_closed(reader), "it is on its way"
    (link,) = _all_of(worker)
    assert isinstance(link, Link)
    assert not _is_closed(reader)
    control.close_all(link.fds)
    assert _is_closed(reader)
    os.close(reader)


async def test_message_that_must_wait_is_sent_in_order_as_soon_as_there_is_room(told: tuple[_Outbox, Channel]) -> None:
    outbox, worker = told
    count = _fill(outbox)
    reader, writer = _pipe_end()
    outbox.send(Link(1, 1, 1, [writer]))
    outbox.send(Drain(1.0, 2.0))
    assert not outbox.offer(Hand(1)), "nothing overtakes what waits"
    heard = _all_of(worker)
    async with asyncio.timeout(10):
        while len(heard) < count + 2:
            await asyncio.sleep(0)
            heard += _all_of(worker)
    link, drain = heard[-2:]
    assert isinstance(link, Link) and drain == Drain(1.0, 2.0)
    control.close_all(link.fds)
    assert _is_closed(reader)
    os.close(reader)


async def test_link_that_waits_gives_way_to_a_newer_one_and_is_closed(told: tuple[_Outbox, Channel]) -> None:
    outbox, worker = told
    count = _fill(outbox)
    pipes = [_pipe_end() for _ in range(3)]
    outbox.send(Link(1, 1, 1, [pipes[0][1]]))
    outbox.send(Link(2, 1, 2, [pipes[1][1]]))
    outbox.send(Reload(Config()))
    outbox.send(Link(1, 2, 3, [pipes[2][1]]))
    assert [_is_closed(reader) for reader, _ in pipes] == [True, False, False]
    _all_of(worker)
    outbox.flush()
    heard = _all_of(worker)
    assert count and [getattr(message, "serial", 0) for message in heard] == [3, 2, 0]
    control.close_all(fd for message in heard for fd in control.descriptors(message))
    assert all(_is_closed(reader) for reader, _ in pipes)
    control.close_all(reader for reader, _ in pipes)


async def test_what_waits_for_one_that_is_gone_is_closed(told: tuple[_Outbox, Channel]) -> None:
    outbox, worker = told
    _fill(outbox)
    reader, writer = _pipe_end()
    outbox.send(Link(1, 1, 1, [writer]))
    was_closed = _is_closed(reader)
    worker.close()
    outbox.flush()
    assert (was_closed, _is_closed(reader)) == (False, True)
    os.close(reader)


async def test_what_waits_is_closed_with_the_outbox(told: tuple[_Outbox, Channel]) -> None:
    outbox, _ = told
    _fill(outbox)
    reader, writer = _pipe_end()
    outbox.send(Link(1, 1, 1, [writer]))
    outbox.close()
    assert _is_closed(reader)
    os.close(reader)


def test_copy_of_what_was_offered_is_kept_until_it_is_taken_back(told: tuple[_Outbox, Channel]) -> None:
    outbox, worker = told
    reader, writer = _pipe_end()
    assert outbox.offer(Hand(7, [writer]))
    (hand,) = _all_of(worker)
    control.close_all(control.descriptors(hand))
    assert not _is_closed(reader)
    assert (outbox.take_back(8), outbox.take_back(7), outbox.take_back(7)) == ([], [writer], [])
    control.close_all([reader, writer])


def test_what_was_offered_to_one_that_ended_can_be_taken_back(told: tuple[_Outbox, Channel]) -> None:
    outbox, worker = told
    pipes = [_pipe_end() for _ in range(2)]
    for serial, (_, writer) in enumerate(pipes):
        assert outbox.offer(Hand(serial, [writer]))
    worker.close()
    back = outbox.take_back_all()
    outbox.close()
    assert back == [writer for _, writer in pipes] and not any(_is_closed(reader) for reader, _ in pipes)
    control.close_all(fd for pipe in pipes for fd in pipe)


def test_worker_is_offered_no_more_than_it_may_leave_unanswered(told: tuple[_Outbox, Channel]) -> None:
    outbox, _ = told
    pipes = [os.pipe() for _ in range(control.DESCRIPTORS // 2)]
    assert outbox.offer(Hand(1, [fd for pair in pipes for fd in pair]))
    reader, writer = _pipe_end()
    assert not outbox.offer(Hand(2, [writer]))
    control.close_all(outbox.take_back(1))
    assert outbox.offer(Hand(2, [writer]))
    outbox.close()
    os.close(reader)


async def test_offer_that_is_not_taken_leaves_its_descriptors_alone(told: tuple[_Outbox, Channel]) -> None:
    outbox, worker = told
    _fill(outbox)
    reader, writer = _pipe_end()
    assert not outbox.offer(Hand(1, [writer]))
    worker.close()
    assert not outbox.offer(Hand(1, [writer]))
    assert not _is_closed(reader)
    control.close_all([reader, writer])


# ---- who accepts for those that do not


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 (what is waited for is not ours)
            await asyncio.sleep(0.001)


class Recipient:
    """Takes connections while `takes` is so."""

    def __init__(self) -> None:
        self.takes = True
        self.given: list[int] = []

    def __call__(self, fds: list[int]) -> bool:
        if self.takes:
            self.given += fds
        return self.takes

    async def has(self, count: int) -> None:
        await _until(lambda: len(self.given) >= count)


@dataclasses.dataclass
class Stage:
    deputy: _Deputy
    recipient: Recipient
    address: tuple[str, int]
    clients: list[socket.socket]

    def connect(self, count: int) -> None:
        self.clients += [socket.create_connection(self.address) for _ in range(count)]


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    """One slot with one socket; all is closed afterwards, and nothing else is left open."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names are all that is wanted)
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        recipient = Recipient()
        made = Stage(_Deputy([[listener]], recipient), recipient, listener.getsockname(), [])
        yield made
        made.deputy.close()
    for client in made.clients:
        client.close()
    control.close_all(recipient.given)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


async def test_deputy_accepts_for_a_slot_as_long_as_it_should(stage: Stage) -> None:
    stage.connect(1)
    await asyncio.sleep(0)
    assert not stage.recipient.given
    stage.deputy.watch([0])
    await stage.recipient.has(1)
    stage.deputy.watch([])
    stage.connect(1)
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert len(stage.recipient.given) == 1
    stage.deputy.watch([0])
    await stage.recipient.has(2)


async def test_connections_that_nobody_takes_are_kept_in_order_and_bounded(stage: Stage) -> None:
    stage.recipient.takes = False
    stage.connect(IN_HAND + 20)
    stage.deputy.watch([0])
    await _until(lambda: len(stage.deputy._in_hand) == IN_HAND)
    kept = [fd for fd, _ in stage.deputy._in_hand]
    stage.deputy.resume(time.monotonic())
    stage.deputy.watch([0])
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert len(stage.deputy._in_hand) == IN_HAND
    stage.recipient.takes = True
    stage.deputy.resume(time.monotonic())
    assert stage.recipient.given == kept
    stage.deputy.watch([0])
    await stage.recipient.has(IN_HAND + 20)


async def test_connections_that_nobody_takes_in_time_are_closed(stage: Stage) -> None:
    stage.recipient.takes = False
    stage.connect(3)
    stage.deputy.watch([0])
    await _until(lambda: len(stage.deputy._in_hand) == 3)
    stage.deputy.resume(time.monotonic() + IN_HAND_S - 1)
    assert len(stage.deputy._in_hand) == 3
    stage.deputy.resume(time.monotonic() + IN_HAND_S)
    assert not stage.deputy._in_hand
    for client in stage.clients:
        client.settimeout(10)
        assert client.recv(1) == b""


async def test_shortage_of_descriptors_pauses_the_deputy_and_loses_nobody(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.connect(5)
    calls = 0

    def accept(listener: socket.socket) -> tuple[socket.socket, object]:
        nonlocal calls
        calls += 1
        raise OSError(24, "Too many open files")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "accept", accept)
        stage.deputy.watch([0])
        for _ in range(50):
            await asyncio.sleep(0.001)
            stage.deputy.watch([0])
        assert calls == 1, "it would spin"
        stage.deputy.resume(time.monotonic())
        stage.deputy.watch([0])
        await _until(lambda: calls == 2)
    stage.deputy.resume(time.monotonic())
    stage.deputy.watch([0])
    await stage.recipient.has(5)
    assert capsys.readouterr().err.count("cannot_accept") == 1


# ---- addresses


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
