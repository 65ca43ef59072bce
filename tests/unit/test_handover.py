"""What is kept and handed on, over real channels and sockets of this process; processes are in tests/e2e."""

import asyncio
import dataclasses
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from fastsig import control
from fastsig.config import Config
from fastsig.control import NOTHING, Channel, Drain, Hand, Link, Message, Reload
from fastsig.handover import IN_HAND, IN_HAND_S, Deputy, Outbox

# ---- what a worker is told


@pytest.fixture
def told() -> Iterator[tuple[Outbox, Channel]]:
    """What the supervisor sends by, and the worker's end of that channel."""
    ours, theirs = control.pair()
    worker = Channel(theirs)
    outbox = Outbox(ours)
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


def _fill(outbox: Outbox) -> int:
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


def test_copy_of_a_descriptor_is_closed_once_it_is_sent(told: tuple[Outbox, Channel]) -> None:
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


async def test_message_that_must_wait_is_sent_in_order_as_soon_as_there_is_room(told: tuple[Outbox, Channel]) -> None:
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


async def test_link_that_waits_gives_way_to_a_newer_one_and_is_closed(told: tuple[Outbox, Channel]) -> None:
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


async def test_what_waits_for_one_that_is_gone_is_closed(told: tuple[Outbox, Channel]) -> None:
    outbox, worker = told
    _fill(outbox)
    reader, writer = _pipe_end()
    outbox.send(Link(1, 1, 1, [writer]))
    was_closed = _is_closed(reader)
    worker.close()
    outbox.flush()
    assert (was_closed, _is_closed(reader)) == (False, True)
    os.close(reader)


async def test_what_waits_is_closed_with_the_outbox(told: tuple[Outbox, Channel]) -> None:
    outbox, _ = told
    _fill(outbox)
    reader, writer = _pipe_end()
    outbox.send(Link(1, 1, 1, [writer]))
    outbox.close()
    assert _is_closed(reader)
    os.close(reader)


def test_copy_of_what_was_offered_is_kept_until_it_is_taken_back(told: tuple[Outbox, Channel]) -> None:
    outbox, worker = told
    reader, writer = _pipe_end()
    assert outbox.offer(Hand(7, [writer]))
    (hand,) = _all_of(worker)
    control.close_all(control.descriptors(hand))
    assert not _is_closed(reader)
    assert (outbox.take_back(8), outbox.take_back(7), outbox.take_back(7)) == ([], [writer], [])
    control.close_all([reader, writer])


def test_what_was_offered_to_one_that_ended_can_be_taken_back(told: tuple[Outbox, Channel]) -> None:
    outbox, worker = told
    pipes = [_pipe_end() for _ in range(2)]
    for serial, (_, writer) in enumerate(pipes):
        assert outbox.offer(Hand(serial, [writer]))
    worker.close()
    back = outbox.take_back_all()
    outbox.close()
    assert back == [writer for _, writer in pipes] and not any(_is_closed(reader) for reader, _ in pipes)
    control.close_all(fd for pipe in pipes for fd in pipe)


def test_worker_is_offered_no_more_than_it_may_leave_unanswered(told: tuple[Outbox, Channel]) -> None:
    outbox, _ = told
    pipes = [os.pipe() for _ in range(control.DESCRIPTORS // 2)]
    assert outbox.offer(Hand(1, [fd for pair in pipes for fd in pair]))
    reader, writer = _pipe_end()
    assert not outbox.offer(Hand(2, [writer]))
    control.close_all(outbox.take_back(1))
    assert outbox.offer(Hand(2, [writer]))
    outbox.close()
    os.close(reader)


async def test_offer_that_is_not_taken_leaves_its_descriptors_alone(told: tuple[Outbox, Channel]) -> None:
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
    deputy: Deputy
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
        made = Stage(Deputy([[listener]], recipient), recipient, listener.getsockname(), [])
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
