"""The contract of `bus`, for both implementations: the twin on the loop's `call_soon`, the mesh on real socket pairs.

Behind it what only sockets do: processes that are killed, descriptors that do not fit, a kernel short of memory.
"""

import asyncio
import errno
import fcntl
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastsig.bus import PACKET_BYTES, PACKET_DESCRIPTORS, PACKETS_PER_TURN, InProcess, Link
from fastsig.bus_mesh import RETRY_S, Mesh
from fastsig.errors import InvariantError, StartError
from fastsig.routing import Address

Event = tuple[str, int] | tuple[str, int, bytes]


class Worker:
    """A receiver that notes what it is told, as (what, serial of the link, packet); then does what the test wants."""

    def __init__(self, slot: int, generation: int = 1) -> None:
        self.address = Address("here", slot)
        self.generation = generation
        self.events: list[Event] = []
        self.links: list[Link] = []
        self.fds: list[int] = []
        self.backlog: deque[bytes] = deque()  # goes to the last link as it takes it
        self.then: dict[str, Callable[[Link], object]] = {}

    @property
    def link(self) -> Link:
        return self.links[-1]

    @property
    def packets(self) -> list[bytes]:
        return [event[2] for event in self.events if len(event) == 3]

    def count(self, what: str) -> int:
        return sum(event[0] == what for event in self.events)

    def push(self) -> None:
        while self.backlog and self.link.send(self.backlog[0]):
            self.backlog.popleft()

    def close_fds(self) -> None:
        while self.fds:
            os.close(self.fds.pop())

    def on_link(self, link: Link) -> None:
        self.links.append(link)
        self._note(link, ("link", link.serial))

    def on_packet(self, link: Link, packet: memoryview, fds: list[int]) -> None:
        self.fds += fds
        self._note(link, ("packet", link.serial, bytes(packet)))

    def on_writable(self, link: Link) -> None:
        self._note(link, ("writable", link.serial))
        self.push()

    def on_lost(self, link: Link) -> None:
        self._note(link, ("lost", link.serial))

    def _note(self, link: Link, event: Event) -> None:
        self.events.append(event)
        if event[0] in self.then:
            self.then[event[0]](link)


class Twins:
    def __init__(self) -> None:
        self._bus = InProcess(asyncio.get_running_loop().call_soon)

    def connect(self, a: Worker, b: Worker) -> None:
        self._bus.connect((a.address, a.generation, a), (b.address, b.generation, b))

    def close(self) -> None:
        pass


class Meshes:
    def __init__(self) -> None:
        self._meshes: dict[Worker, Mesh] = {}
        self._serial = 0

    def mesh(self, worker: Worker) -> Mesh:
        if worker not in self._meshes:
            self._meshes[worker] = Mesh(asyncio.get_running_loop(), worker)
        return self._meshes[worker]

    def connect(self, a: Worker, b: Worker) -> None:
        self._serial += 1
        for (worker, other), end in zip(((a, b), (b, a)), pair(), strict=True):
            self.mesh(worker).add(other.address, other.generation, self._serial, end)

    def raw(self, worker: Worker, end_type: type[socket.socket] = socket.socket) -> socket.socket:
        """The other end of a link of `worker` to slot 9, as a socket that can say anything."""
        self._serial += 1
        ours, theirs = pair()
        self.mesh(worker).add(Address("here", 9), 1, self._serial, end_type(fileno=ours.detach()))
        return theirs

    def close(self) -> None:
        for mesh in self._meshes.values():
            mesh.close()


Bus = Twins | Meshes


@pytest.fixture(params=[Twins, Meshes])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    made: Bus = request.param()
    yield made
    made.close()


@pytest.fixture
async def meshes() -> AsyncIterator[Meshes]:
    made = Meshes()
    yield made
    made.close()


class Pipe:
    """Its writing end goes places; when all copies are closed the reading end knows."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def close_writer(self) -> None:
        os.close(self.writer)
        self.writer = -1

    def is_at_end(self) -> bool:
        """Is there no writer left? (And nothing to read.)"""
        return bool(select.select([self.reader], [], [], 0)[0]) and os.read(self.reader, 1) == b""


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    os.close(made.reader)
    if made.writer >= 0:
        made.close_writer()


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


async def turns(count: int = 50) -> None:
    """Let the loop turn: what the kernel has ready is dealt with in the next turn, so 50 are enough for anything."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await turns(1)


async def connected(bus: Bus) -> tuple[Worker, Worker]:
    a, b = Worker(0, generation=7), Worker(1, generation=8)
    bus.connect(a, b)
    await until(lambda: len(a.links) == len(b.links) == 1)
    return a, b


async def raw_link(meshes: Meshes, end_type: type[socket.socket] = socket.socket) -> tuple[Worker, socket.socket]:
    worker = Worker(0)
    theirs = meshes.raw(worker, end_type)
    await until(lambda: bool(worker.links))
    return worker, theirs


def fill(worker: Worker, size: int = 8192) -> int:
    """Send until it is refused; how many packets were taken. Each begins with its number."""
    sent = 0
    while worker.link.send(sent.to_bytes(4, "big") * (size // 4)):
        sent += 1
    return sent


def numbers(count: int, what: bytes = b"packet %d") -> list[bytes]:
    return [what % number for number in range(count)]


def say_and_close(link: Link) -> None:
    assert link.send(b"last words")
    link.close()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_link_names_the_other_worker(bus: Bus) -> None:
    a, b = await connected(bus)
    assert (a.link.address, a.link.generation, a.link.is_local) == (b.address, 8, True)
    assert (b.link.address, b.link.generation, b.link.is_local) == (a.address, 7, True)
    assert "here:1 generation 8" in repr(a.link)


async def test_packets_arrive_whole_and_in_order_up_to_the_longest(bus: Bus) -> None:
    a, b = await connected(bus)
    dice = random.Random(3)
    sizes = [1, 2, 3, 199, 4096, 65535, 65536, PACKET_BYTES - 1, PACKET_BYTES] + [dice.randrange(1, 9000)] * 40
    dice.shuffle(sizes)
    packets = [dice.randbytes(size) for size in sizes]
    a.backlog += packets
    a.push()
    await until(lambda: len(b.packets) == len(packets))
    assert b.packets == packets
    assert not a.packets


@pytest.mark.parametrize(
    ("packet", "fds"), [(b"", ()), (bytes(PACKET_BYTES + 1), ()), (b"x", [0] * (PACKET_DESCRIPTORS + 1))]
)
async def test_packet_that_no_link_takes_is_a_bug(bus: Bus, packet: bytes, fds: Sequence[int]) -> None:
    a, b = await connected(bus)
    with pytest.raises(InvariantError):
        a.link.send(packet, fds)
    assert a.link.send(b"goes on")
    await until(lambda: b.packets == [b"goes on"])


async def test_receiver_is_never_called_from_within_a_call_of_its_own(bus: Bus) -> None:
    a, b = await connected(bus)
    a.events.clear()
    b.events.clear()
    fill(a)
    bus.connect(a, Worker(2))
    a.link.close()
    assert a.link.send(b"too late")
    assert not a.events and not b.events


async def test_full_link_refuses_all_and_says_once_when_it_takes_more(bus: Bus) -> None:
    a, b = await connected(bus)
    sent = fill(a)
    assert sent > 1
    assert not a.link.send(b"x"), "after a refusal nothing overtakes what was refused"
    await until(lambda: len(b.packets) == sent)
    await turns()
    assert a.count("writable") == 1
    a.backlog.append(b"refused")
    a.push()
    assert not a.backlog
    await until(lambda: b.packets[sent:] == [b"refused"])
    await turns()
    assert a.count("writable") == 1
    fill(a)
    await until(lambda: a.count("writable") == 2)


async def test_nobody_is_blocked_when_both_directions_are_full(bus: Bus) -> None:
    a, b = await connected(bus)
    for worker in (a, b):
        worker.backlog += [number.to_bytes(4, "big") * 5000 for number in range(100)]
        worker.push()
        assert worker.backlog, "this is about links that are full"
    sent = list(a.backlog)[-1]
    await until(lambda: len(a.packets) == len(b.packets) == 100)
    expected = [number.to_bytes(4, "big") * 5000 for number in range(100)]
    assert a.packets == b.packets == expected and sent == expected[-1]


async def test_reading_goes_on_while_writing_is_refused(bus: Bus) -> None:
    a, b = await connected(bus)
    b.then["packet"] = lambda link: fill(b)  # whatever b reads, its own way out is full
    a.backlog += numbers(300)
    a.push()
    await until(lambda: len(b.packets) == 300)
    assert b.packets == numbers(300)


async def test_busy_link_leaves_others_their_turn(bus: Bus) -> None:
    a, b, hub = Worker(0), Worker(1), Worker(2)
    bus.connect(a, hub)
    bus.connect(b, hub)
    await until(lambda: len(hub.links) == 2)
    for number in range(100):
        assert a.link.send(b"many %d" % number)
    assert b.link.send(b"one")
    await until(lambda: len(hub.packets) == 101)
    assert hub.packets.index(b"one") <= PACKETS_PER_TURN


async def test_what_was_sent_before_a_close_arrives_and_then_the_loss(bus: Bus) -> None:
    a, b = await connected(bus)
    for packet in numbers(100):
        assert a.link.send(packet)
    assert b.link.send(b"never read")
    a.link.close()
    await until(lambda: b.count("lost") == 1 and a.count("lost") == 1)
    assert b.packets == numbers(100)
    assert b.events[-1] == ("lost", b.link.serial)
    assert a.events == [("link", a.link.serial), ("lost", a.link.serial)], "nothing comes out of a closed link"


async def test_loss_is_told_once_whoever_closes(bus: Bus) -> None:
    a, b = await connected(bus)
    for worker in (a, b):
        worker.then["lost"] = Link.close
        worker.link.close()
        worker.link.close()
    await until(lambda: bool(a.count("lost") and b.count("lost")))
    a.link.close()
    await turns()
    assert a.count("lost") == b.count("lost") == 1


async def test_link_closed_while_it_delivers_delivers_no_more(bus: Bus) -> None:
    a, b = await connected(bus)
    b.then["packet"] = lambda link: link.close() if len(b.packets) == 3 else None
    for packet in numbers(10):
        assert a.link.send(packet)
    await until(lambda: bool(a.count("lost") and b.count("lost")))
    await turns()
    assert b.packets == numbers(3)
    assert b.events[-1] == ("lost", b.link.serial) and b.count("lost") == 1


async def test_link_closed_when_it_is_announced_is_lost(bus: Bus) -> None:
    a, b = Worker(0), Worker(1)
    a.then["link"] = lambda link: link.close()
    bus.connect(a, b)
    await until(lambda: bool(a.count("lost") and b.count("lost")))
    assert [what for what, *_ in a.events] == [what for what, *_ in b.events] == ["link", "lost"]


async def test_link_is_used_at_once_when_it_is_announced(bus: Bus) -> None:
    a, b = Worker(0), Worker(1)
    a.then["link"] = b.then["link"] = lambda link: link.send(b"hello")
    bus.connect(a, b)
    await until(lambda: a.packets == b.packets == [b"hello"])


async def test_packet_over_a_lost_link_is_dropped(bus: Bus) -> None:
    a, b = await connected(bus)
    taken: list[bool] = []
    a.then["lost"] = lambda link: taken.append(link.send(b"into the void"))
    b.link.close()
    assert a.link.send(b"the other end is gone"), "also before the loss was told"
    assert b.link.send(b"closed")
    await until(lambda: bool(a.count("lost") and b.count("lost")))
    assert taken == [True] and a.link.send(b"into the void")
    await turns()
    assert not a.packets and not b.packets


async def test_refusing_link_that_is_lost_takes_and_drops_everything(bus: Bus) -> None:
    a, b = await connected(bus)
    fill(a)
    b.link.close()
    await until(lambda: bool(a.count("lost")))
    assert a.link.send(b"x")
    await turns()
    assert a.events[-1] == ("lost", a.link.serial) and a.count("writable") <= 1


async def test_newer_link_waits_for_the_end_of_the_older(bus: Bus) -> None:
    a, b = await connected(bus)
    first = a.link.serial
    sent = fill(a)
    bus.connect(a, b)
    await until(lambda: len(b.packets) == sent)
    await turns()
    assert len(a.links) == len(b.links) == 1, "the older one lives"
    more = fill(a)
    a.link.close()
    await until(lambda: len(a.links) == len(b.links) == 2)
    told = [event[:2] for event in b.events]
    second = b.link.serial
    assert second > first
    assert told == [("link", first)] + [("packet", first)] * (sent + more) + [("lost", first), ("link", second)]
    assert a.link.send(b"over the newer")
    await until(lambda: b.events[-1] == ("packet", second, b"over the newer"))


async def test_of_several_newer_links_the_last_counts(bus: Bus) -> None:
    a, b = await connected(bus)
    first = a.link.serial
    for _ in range(3):
        bus.connect(a, b)
    await turns()
    a.link.close()
    await until(lambda: len(a.links) == len(b.links) == 2)
    await turns()
    for worker in (a, b):
        assert worker.events == [("link", first), ("lost", first), ("link", first + 3)]
    assert a.link.send(b"x")
    await until(lambda: b.packets == [b"x"])


async def test_newer_link_whose_other_end_is_gone_is_announced_and_lost(bus: Bus) -> None:
    a, b = await connected(bus)
    successor = Worker(1, generation=9)
    successor.then["link"] = say_and_close
    first = a.link.serial
    bus.connect(a, successor)
    await until(lambda: bool(successor.count("lost")))
    assert len(a.links) == 1
    b.link.close()
    await until(lambda: a.count("lost") == 2)
    second = a.link.serial
    assert a.links[1].generation == 9
    assert a.events == [
        ("link", first), ("lost", first), ("link", second), ("packet", second, b"last words"), ("lost", second)
    ]  # fmt: skip


async def test_link_made_while_another_is_lost_follows_it(bus: Bus) -> None:
    a, b = await connected(bus)
    a.then["lost"] = lambda link: bus.connect(a, Worker(1, generation=9)) if len(a.links) == 1 else None
    b.link.close()
    await until(lambda: len(a.links) == 2)
    assert [what for what, *_ in a.events] == ["link", "lost", "link"]


async def test_descriptors_arrive_usable_and_close_on_exec(bus: Bus, pipe: Pipe) -> None:
    a, b = await connected(bus)
    before = open_fds()
    assert a.link.send(b"none before")
    assert a.link.send(b"one", [pipe.writer])
    pipe.close_writer()  # the caller's, at once
    await until(lambda: len(b.packets) == 2)
    (fd,) = b.fds
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.write(fd, b"through")
    os.close(fd)
    assert os.read(pipe.reader, 100) == b"through"
    assert pipe.is_at_end()
    assert open_fds() == before - 1


async def test_as_many_descriptors_as_a_packet_has_arrive(bus: Bus, pipe: Pipe) -> None:
    a, b = await connected(bus)
    assert a.link.send(b"many", [pipe.writer] * PACKET_DESCRIPTORS)
    await until(lambda: b.packets == [b"many"])
    assert len(set(b.fds)) == PACKET_DESCRIPTORS
    for fd in b.fds:
        os.close(fd)
    pipe.close_writer()
    assert pipe.is_at_end()


@pytest.mark.parametrize("closer", [0, 1])
async def test_descriptors_that_nobody_takes_are_closed(bus: Bus, pipe: Pipe, closer: int) -> None:
    workers = await connected(bus)
    a, b = workers
    b.then["packet"] = lambda link: b.close_fds()
    for _ in range(10):
        assert a.link.send(b"x", [pipe.writer])
    while a.link.send(bytes(8192)):
        pass
    assert not a.link.send(b"refused", [pipe.writer])
    pipe.close_writer()
    workers[closer].link.close()
    await until(lambda: bool(a.count("lost") and b.count("lost")))
    assert pipe.is_at_end()


async def test_descriptor_that_is_not_open_is_refused_and_the_packet_not_sent(bus: Bus, pipe: Pipe) -> None:
    a, b = await connected(bus)
    before = open_fds()
    with pytest.raises(OSError, match="Bad file descriptor"):
        a.link.send(b"x", [pipe.writer, 999_999_999])
    assert open_fds() == before
    assert a.link.send(b"next")
    await until(lambda: b.packets == [b"next"])


async def test_packet_is_borrowed_for_one_call(bus: Bus) -> None:
    a, b = await connected(bus)
    kept: list[memoryview] = []
    receive = b.on_packet

    def on_packet(link: Link, packet: memoryview, fds: list[int]) -> None:
        kept.append(packet)
        receive(link, packet, fds)

    b.on_packet = on_packet  # type: ignore[method-assign]  # that is the test
    assert a.link.send(b"x")
    await until(lambda: b.packets == [b"x"])
    with pytest.raises(ValueError, match="released"):
        bytes(kept[0])


async def test_links_outlive_a_receiver_that_raises(bus: Bus) -> None:
    raised: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    a, b = Worker(0), Worker(1)
    for what in ("link", "packet", "lost", "writable"):
        a.then[what] = b.then[what] = lambda link: 1 // 0
    bus.connect(a, b)
    await until(lambda: len(a.links) == len(b.links) == 1)
    sent = fill(a, size=800)
    await until(lambda: len(b.packets) == sent and a.count("writable") == 1)
    for packet in numbers(40):
        assert a.link.send(packet)
    bus.connect(a, b)
    a.link.close()
    await until(lambda: len(a.links) == len(b.links) == 2)
    assert b.packets[sent:] == numbers(40)
    assert a.count("lost") == b.count("lost") == 1
    await turns()
    assert len(raised) == len(a.events) + len(b.events)
    assert all(isinstance(context["exception"], ZeroDivisionError) for context in raised)


async def test_no_descriptor_is_left_behind(bus: Bus) -> None:
    before = open_fds()
    for _ in range(20):
        a, b = await connected(bus)
        bus.connect(a, b)
        bus.connect(a, b)
        fill(a)
        b.link.close()
        await until(lambda: len(a.links) == 2)  # noqa: B023 - awaited in the same round
        a.link.close()
        await until(lambda: a.count("lost") == b.count("lost") == 2)  # noqa: B023 - likewise
    assert open_fds() == before


# The twin alone.


async def test_severed_twins_hear_what_was_said_before() -> None:
    twins, a, b = InProcess(asyncio.get_running_loop().call_soon), Worker(0), Worker(1)
    links = twins.connect((a.address, 1, a), (b.address, 1, b))
    await until(lambda: len(a.links) == len(b.links) == 1)
    assert (a.link, b.link) == links
    for worker in (a, b):
        for packet in numbers(20):
            assert worker.link.send(packet)
    twins.sever(links)
    assert a.link.send(b"too late")
    await until(lambda: bool(a.count("lost") and b.count("lost")))
    for worker in (a, b):
        assert worker.packets == numbers(20) and worker.events[-1][0] == "lost" and worker.count("lost") == 1


def test_twin_does_nothing_by_itself() -> None:
    queue: deque[Callable[[], None]] = deque()
    twins, a, b = InProcess(lambda function, *args: queue.append(lambda: function(*args))), Worker(0), Worker(1)
    twins.connect((a.address, 1, a), (b.address, 1, b), capacity=100)
    assert not a.links
    while queue:
        queue.popleft()()
    assert a.link.send(bytes(1000)), "one packet always fits"
    assert not a.link.send(b"x")
    assert len(queue) == 1 and not b.packets
    queue.popleft()()
    assert b.packets == [bytes(1000)] and not a.count("writable")
    queue.popleft()()
    assert a.count("writable") == 1


def test_twin_that_was_not_announced_is_not_used() -> None:
    twins, a, b = InProcess(lambda function, *args: None), Worker(0), Worker(1)
    link, other = twins.connect((a.address, 1, a), (b.address, 1, b))
    with pytest.raises(InvariantError):
        link.send(b"x")
    with pytest.raises(InvariantError):
        other.close()


# The mesh alone: what sockets do.

CHILD = """
import socket, sys, time
end = socket.socket(fileno=int(sys.argv[1]))
for number in range(100):
    end.send(b"packet %d" % number)
print("sent", flush=True)
time.sleep(60)
"""


def child_that_sends_and_is_killed(end: socket.socket) -> None:
    """It never reads. Returns when it is dead; nothing was read here in between."""
    with (
        end,
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(end.fileno())], pass_fds=[end.fileno()], stdout=subprocess.PIPE
        ) as child,
    ):
        assert child.stdout is not None and child.stdout.readline() == b"sent\n"
        end.close()
        child.kill()
        assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("way", ["read", "sent to", "filled", "read unharmed"])
async def test_what_a_killed_process_had_sent_still_arrives(meshes: Meshes, way: str) -> None:
    """It dies with packets unread: a reset. Whether reading or sending finds that out makes no difference."""
    a, theirs = await raw_link(meshes)
    if way != "read unharmed":
        assert a.link.send(b"never read")
    if way == "filled":
        fill(a)
    child_that_sends_and_is_killed(theirs)
    if way == "sent to":
        assert a.link.send(b"dropped") and a.link.send(b"dropped too")
    await until(lambda: bool(a.count("lost")))
    await turns()
    assert a.packets == numbers(100)
    assert a.events[-1] == ("lost", a.link.serial) and a.count("lost") == 1
    assert a.link.send(b"dropped")


async def test_reset_that_sending_finds_out_in_the_same_turn_as_the_loop(meshes: Meshes) -> None:
    """The loop has seen EPOLLERR, and another reader of that turn sends first: recv has no error left to report."""
    a, theirs = await raw_link(meshes)
    ours, signaller = pair()
    asyncio.get_running_loop().add_reader(ours, lambda: ours.recv(9) and a.link.send(b"takes the error away"))
    assert a.link.send(b"never read")
    await turns(3)  # both are watched by now, so that the signal comes before the reset
    signaller.send(b"now")
    child_that_sends_and_is_killed(theirs)
    await until(lambda: bool(a.count("lost")))
    assert a.packets == numbers(100)
    asyncio.get_running_loop().remove_reader(ours)
    ours.close()
    signaller.close()


async def test_receiver_that_raises_still_hears_all_of_a_killed_process(meshes: Meshes) -> None:
    raised: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    a, theirs = await raw_link(meshes)
    a.then["packet"] = lambda link: 1 // 0
    assert a.link.send(b"never read")
    child_that_sends_and_is_killed(theirs)
    await until(lambda: bool(a.count("lost")))
    assert a.packets == numbers(100) and len(raised) == 100


@pytest.mark.parametrize("size", [1, 200, 8192, 65536, PACKET_BYTES])
async def test_socket_that_is_reported_writable_takes_the_longest_packet(meshes: Meshes, size: int) -> None:
    """Else the loop would spin: reported, refused, reported. And it is reported before the other has read it all."""
    a, theirs = await raw_link(meshes)
    with theirs:
        sent = 0
        while a.link.send(bytes(size)):
            sent += 1
        reads = 0
        while not a.count("writable"):
            assert reads < sent, "never told"
            theirs.recv(PACKET_BYTES)
            reads += 1
            assert not a.link.send(b"x"), "it could be taken now, ahead of what was refused"
            await turns(3)
        print(f"{size} bytes: {sent} fit, writable after {reads} were read")
        assert a.link.send(bytes(PACKET_BYTES))


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS])
async def test_what_the_kernel_is_short_of_now_is_tried_again(meshes: Meshes, number: int) -> None:
    class Short(socket.socket):
        attempts = 0

        def send(self, data: Any, flags: int = 0, /) -> int:
            self.__class__.attempts += 1
            if self.attempts <= 3:
                raise OSError(number, os.strerror(number))
            return super().send(data, flags)

    a, theirs = await raw_link(meshes, Short)
    with theirs:
        a.backlog += [b"first", b"second"]
        a.push()
        assert len(a.backlog) == 2
        await until(lambda: not a.backlog)
        assert a.count("writable") == 3
        assert [theirs.recv(100), theirs.recv(100)] == [b"first", b"second"]


async def test_closed_link_forgets_what_it_wanted_to_try_again(meshes: Meshes) -> None:
    class Short(socket.socket):
        def send(self, data: Any, flags: int = 0, /) -> int:
            raise OSError(errno.ENOBUFS, "no")

    raised: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    a, theirs = await raw_link(meshes, Short)
    with theirs:
        assert not a.link.send(b"x")
        a.link.close()
        await asyncio.sleep(5 * RETRY_S)
    assert not raised
    assert [what for what, *_ in a.events] == ["link", "lost"]


async def test_more_descriptors_than_a_packet_has_are_none(meshes: Meshes, pipe: Pipe) -> None:
    a, theirs = await raw_link(meshes)
    before = open_fds()
    with theirs:
        rights = array("i", [pipe.writer] * (PACKET_DESCRIPTORS + 10))
        theirs.sendmsg([b"too many"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        await until(lambda: a.packets == [b"too many"])
        assert not a.fds and open_fds() == before


async def test_process_without_room_for_all_descriptors_gets_none(meshes: Meshes, pipe: Pipe) -> None:
    a, theirs = await raw_link(meshes)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_fds()
    with theirs:
        rights = array("i", [pipe.writer] * 8)
        theirs.sendmsg([b"eight"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        theirs.send(b"next")
        lowest_free = os.dup(pipe.reader)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 3, limits[1]))
        try:
            await until(lambda: len(a.packets) == 2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert a.packets == [b"eight", b"next"] and not a.fds
        assert open_fds() == before


async def test_packet_longer_than_any_resets_the_link(meshes: Meshes, pipe: Pipe) -> None:
    a, theirs = await raw_link(meshes)
    before = open_fds()
    with theirs:
        rights = array("i", [pipe.writer])
        theirs.sendmsg([bytes(PACKET_BYTES + 1)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        theirs.send(b"never read")
        await until(lambda: bool(a.count("lost")))
        assert not a.packets
        assert open_fds() == before - 1, "that of the link"
        with pytest.raises(ConnectionResetError):  # it had something unread
            theirs.send(b"x")


async def test_closed_link_ends_though_a_copy_of_its_socket_is_held(meshes: Meshes) -> None:
    a = Worker(0)
    ours, theirs = pair()
    with ours.dup(), theirs:
        meshes.mesh(a).add(Address("here", 9), 1, 1, ours)
        await until(lambda: bool(a.links))
        a.link.close()
        assert theirs.recv(1) == b""


async def test_send_buffers_that_are_too_small_are_made_larger(meshes: Meshes) -> None:
    a, (ours, theirs) = Worker(0), pair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    with theirs:
        meshes.mesh(a).add(Address("here", 9), 1, 1, ours)
        await until(lambda: bool(a.links))
        assert a.link.send(bytes(PACKET_BYTES))
        assert len(theirs.recv(PACKET_BYTES)) == PACKET_BYTES


async def test_send_buffers_that_stay_too_small_are_refused(meshes: Meshes) -> None:
    class Small(socket.socket):
        def getsockopt(self, *args: Any) -> Any:
            return 8192

    ours, theirs = pair()
    end = Small(fileno=ours.detach())
    with theirs:
        with pytest.raises(StartError, match=r"8192 bytes, expected 131104: raise net\.core\.wmem_max"):
            meshes.mesh(Worker(0)).add(Address("here", 9), 1, 1, end)
        assert end.fileno() == -1


async def test_end_is_made_non_blocking_and_close_on_exec(meshes: Meshes) -> None:
    ours, theirs = pair()
    ours.set_inheritable(True)
    with theirs:
        meshes.mesh(Worker(0)).add(Address("here", 9), 1, 1, ours)
        assert not ours.get_inheritable() and not ours.getblocking()


async def test_closed_mesh_calls_nobody_and_leaves_nothing(meshes: Meshes) -> None:
    before = open_fds()
    a, b, c, d = (Worker(slot) for slot in range(4))
    for other in (b, c, d):
        meshes.connect(a, other)
    await until(lambda: len(a.links) == 3)
    fill(a)
    for packet in numbers(5):
        assert b.link.send(packet)
    c.link.close()
    meshes.connect(a, b)  # waits
    meshes.connect(a, Worker(5))  # not announced yet
    a.links[0].close()  # not told yet
    told = len(a.events)
    meshes.mesh(a).close()
    meshes.mesh(a).close()
    await until(lambda: bool(b.count("lost") and c.count("lost") and d.count("lost")))
    await turns()
    assert len(a.events) == told
    ours, theirs = pair()
    with theirs:
        meshes.mesh(a).add(Address("here", 9), 1, 99, ours)
        assert theirs.recv(1) == b""
    await turns()
    assert len(a.events) == told
    meshes.close()
    assert open_fds() == before


@pytest.mark.parametrize("what", ["link", "packet", "writable", "lost"])
async def test_mesh_is_closed_from_within_any_call(meshes: Meshes, what: str) -> None:
    raised: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    a, theirs = Worker(0), meshes.raw(Worker(8))
    theirs.close()
    ours, theirs = pair()
    a.then[what] = lambda link: meshes.mesh(a).close()
    with theirs:
        meshes.mesh(a).add(Address("here", 9), 1, 1, ours)
        theirs.setblocking(False)
        await until(lambda: bool(a.links))
        if what == "writable":
            sent = fill(a)
            for _ in range(sent):
                theirs.recv(PACKET_BYTES)
        if what == "packet":
            theirs.send(b"x"), theirs.send(b"y")
        if what == "lost":
            theirs.shutdown(socket.SHUT_RDWR)
        await until(lambda: bool(a.count(what)))
        await turns()
    assert a.count(what) == 1 and a.events[-1][0] == what
    assert ours.fileno() == -1 and not raised
