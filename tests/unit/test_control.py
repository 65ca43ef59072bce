"""Two ends in one process: no worker, no loop."""

import array
import contextlib
import fcntl
import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from fastsig import control
from fastsig.config import Config, build
from fastsig.control import (
    NOTHING,
    Boot,
    Channel,
    ControlError,
    Drain,
    Failed,
    Hand,
    Handed,
    Heartbeat,
    Inspect,
    Inspected,
    Link,
    Message,
    Ready,
    Reload,
    Stop,
    Stopped,
    Unlinked,
)
from fastsig.errors import ConfigError, InvariantError
from fastsig.routing import View

VIEW = View(1, bytes(range(16)), {"": (0, 1)})
Pair = tuple[Channel, Channel]


@pytest.fixture
def ends() -> Iterator[Pair]:
    """The supervisor's end and the worker's."""
    ours, theirs = control.pair()
    other = Channel(theirs)
    yield ours, other
    ours.close()
    other.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """An end that can say anything, and the channel that hears it."""
    stranger, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(theirs)
    yield stranger, channel
    stranger.close()
    channel.close()


@pytest.mark.parametrize(
    "message",
    [
        Boot(Config(), slot=0, slots=1, generation=1, listeners=[5, 6], counters=7, view=VIEW),
        Boot(Config(), 0, 2, 1, [5], 7, VIEW, links=1, shares_listeners=True),
        Link(slot=1, generation=2, serial=3),
        Hand(1),
        Unlinked(slot=1, serial=3),
        Drain(seconds=20.0, deadline_s=25.0),
        Reload(build({"limits.rooms": 7, "log.level": "debug"})),
        Inspect(),
        Stop(is_forced=True),
        Stop(is_forced=False, code=4000),
        Ready(pid=7),
        Failed("no such file: käse"),
        Heartbeat(),
        Heartbeat(is_full=True),
        Handed(serial=3, is_taken=False),
        Inspected({"rooms": 2}),
        Stopped(),
    ],
)
def test_message_arrives_as_it_was_sent(ends: Pair, message: Message) -> None:
    ours, theirs = ends
    ours.send(message)
    assert theirs.receive() == message


def test_configuration_survives_the_way_to_the_worker(ends: Pair) -> None:
    ours, theirs = ends
    config = build({"server.port": 0, "server.workers": 4, "auth.keys": ("k1", "k2"), "limits.handshake_seconds": 0.5})
    ours.send(Boot(config, 1, 2, 3, [], 4, VIEW))
    boot = theirs.receive()
    assert isinstance(boot, Boot) and boot.config == config
    assert boot.view.owner("r") == VIEW.owner("r")


def test_messages_keep_their_order(ends: Pair) -> None:
    ours, theirs = ends
    for pid in range(50):
        ours.send(Ready(pid))
    assert [theirs.receive() for _ in range(50)] == [Ready(pid) for pid in range(50)]


def test_receive_without_a_message_says_so_at_once(ends: Pair) -> None:
    assert ends[0].receive() is NOTHING


def test_end_comes_after_all_that_was_said(ends: Pair) -> None:
    ours, theirs = ends
    theirs.send(Failed("no memory"))
    theirs.close()
    assert ours.receive() == Failed("no memory")
    assert ours.receive() is None
    assert ours.receive() is None


def test_last_words_are_heard_from_one_that_did_not_listen(ends: Pair) -> None:
    """A worker that dies with an unread Stop resets the channel; what it had sent comes after that."""
    ours, theirs = ends
    theirs.send(Failed("no memory"))
    ours.send(Stop(is_forced=False))
    theirs.close()
    assert ours.receive() == Failed("no memory")
    assert ours.receive() is None


def test_send_to_one_that_is_gone_fails(ends: Pair) -> None:
    ours, theirs = ends
    theirs.close()
    with pytest.raises(BrokenPipeError):
        ours.send(Stop(is_forced=False))


def test_send_to_one_that_does_not_read_fails_and_does_not_wait(ends: Pair) -> None:
    ours, theirs = ends
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 100_000:
            ours.send(Ready(sent))
            sent += 1
    with pytest.raises(BlockingIOError):
        ours.send(Heartbeat())
    assert [theirs.receive() for _ in range(sent)] == [Ready(number) for number in range(sent)]
    ours.send(Heartbeat())  # there is room again


@pytest.mark.parametrize(
    "packet",
    [b"{", b"null", b"\xff", b"{}", b'{"type":"dance"}', b'{"type":"ready"}', b'{"type":"ready","pid":"seven"}'],
)
def test_packet_that_is_no_message_is_refused(raw: tuple[socket.socket, Channel], packet: bytes) -> None:
    stranger, channel = raw
    stranger.send(packet)
    with pytest.raises(ControlError):
        channel.receive()


def test_message_after_a_refused_packet_is_understood(raw: tuple[socket.socket, Channel]) -> None:
    stranger, channel = raw
    stranger.send(b"x" * (control.PACKET_BYTES + 1))
    stranger.send(b'{"type":"heartbeat"}')
    with pytest.raises(ControlError):
        channel.receive()
    assert channel.receive() == Heartbeat()


def test_longest_packet_fits_into_the_socket(ends: Pair) -> None:
    ours, theirs = ends
    message = Failed("x" * (control.PACKET_BYTES - 100))
    ours.send(message)
    assert theirs.receive() == message


def test_message_that_is_too_long_is_not_sent(ends: Pair) -> None:
    ours, theirs = ends
    with pytest.raises(InvariantError):
        ours.send(Failed("x" * control.PACKET_BYTES))
    assert theirs.receive() is NOTHING


def test_configuration_that_fits_no_packet_is_refused_in_time() -> None:
    long = build({"server.origins": ("https://example.org",) * 6000})
    with pytest.raises(ConfigError, match=r"1\d{5} bytes long in JSON, expected at most"):
        control.check(long)
    control.check(build({"server.origins": ("https://example.org",) * 5000}))


# ---- descriptors


def _held() -> set[int]:
    """The descriptors of this process; the one that lists them is not among them."""
    names = os.listdir("/proc/self/fd")  # noqa: PTH208 (names are all that is wanted)
    return {int(name) for name in names if _is_open(int(name))}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Whatever a test does here, it leaves no descriptor open; and the other fixtures are gone when this looks."""
    before = _held()
    yield
    assert _held() == before


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Reading and writing end."""
    reader, writer = os.pipe()
    yield reader, writer
    control.close_all([reader, writer])


def _say(stranger: socket.socket, packet: bytes, fds: list[int]) -> None:
    stranger.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def _receive_fds(channel: Channel) -> list[int]:
    message = channel.receive()
    assert isinstance(message, Link | Hand)
    return message.fds


def test_descriptors_arrive_open_and_under_numbers_of_the_receiver(ends: Pair, pipe: tuple[int, int]) -> None:
    ours, theirs = ends
    reader, writer = pipe
    ours.send(Link(slot=3, generation=4, serial=5, fds=[writer]))
    link = theirs.receive()
    assert isinstance(link, Link) and (link.slot, link.generation, link.serial) == (3, 4, 5)
    (arrived,) = link.fds
    assert arrived != writer
    os.write(arrived, b"here")
    assert os.read(reader, 4) == b"here"
    os.close(arrived)


def test_order_of_descriptors_is_kept(ends: Pair, pipe: tuple[int, int]) -> None:
    ours, theirs = ends
    ours.send(Hand(1, [*pipe]))
    reader, writer = _receive_fds(theirs)
    os.write(writer, b"x")
    assert os.read(reader, 1) == b"x"
    control.close_all([reader, writer])


def test_descriptors_that_arrive_are_not_inherited(ends: Pair, pipe: tuple[int, int]) -> None:
    ours, theirs = ends
    os.set_inheritable(pipe[0], True)
    ours.send(Hand(1, [pipe[0]]))
    (arrived,) = _receive_fds(theirs)
    assert fcntl.fcntl(arrived, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(arrived)


def test_sender_keeps_its_copies(ends: Pair, pipe: tuple[int, int]) -> None:
    ours, theirs = ends
    message = Hand(1, [pipe[1]])
    ours.send(message)
    assert message.fds == [pipe[1]]
    control.close_all(_receive_fds(theirs))
    os.write(pipe[1], b"x")
    assert os.read(pipe[0], 1) == b"x"


def test_numbers_of_the_sender_do_not_travel(raw: tuple[socket.socket, Channel], pipe: tuple[int, int]) -> None:
    stranger, channel = raw
    channel.send(Hand(1, [pipe[0]]))
    assert stranger.recv(1000) == b'{"type":"hand","serial":1,"fds":[-1]}'


def test_as_many_descriptors_as_allowed_pass_and_one_more_does_not(ends: Pair, pipe: tuple[int, int]) -> None:
    ours, theirs = ends
    ours.send(Hand(1, [pipe[0]] * control.DESCRIPTORS))
    arrived = _receive_fds(theirs)
    assert len(arrived) == control.DESCRIPTORS
    control.close_all(arrived)
    with pytest.raises(InvariantError):
        ours.send(Hand(1, [pipe[0]] * (control.DESCRIPTORS + 1)))
    assert theirs.receive() is NOTHING


@pytest.mark.parametrize(
    ("packet", "count"),
    [
        (b'{"type":"hand","serial":1,"fds":[]}', 1),
        (b'{"type":"hand"}', 2),
        (b'{"type":"hand","serial":1,"fds":[-1]}', 2),
        (b'{"type":"hand","serial":1,"fds":[-1,-1,-1]}', 2),
        (b'{"type":"hand","serial":1,"fds":[0]}', 0),
        (b'{"type":"link","slot":1,"generation":1,"serial":1,"fds":[-1]}', 0),
        (b'{"type":"hand","serial":1,"fds":["', 2),
        (b'{"type":"dance"}', 1),
    ],
)
def test_packet_with_other_descriptors_than_announced_is_refused_and_they_are_closed(
    raw: tuple[socket.socket, Channel], pipe: tuple[int, int], packet: bytes, count: int
) -> None:
    stranger, channel = raw
    _say(stranger, packet, [pipe[1]] * count) if count else stranger.send(packet)
    os.close(pipe[1])
    with pytest.raises(ControlError):
        channel.receive()
    assert os.read(pipe[0], 1) == b"", "somebody holds the writing end still"


def test_more_descriptors_than_a_packet_may_bring_are_cut_refused_and_closed(
    raw: tuple[socket.socket, Channel], pipe: tuple[int, int]
) -> None:
    stranger, channel = raw
    for announced in (control.DESCRIPTORS, control.DESCRIPTORS + 1):
        _say(
            stranger,
            b'{"type":"hand","serial":1,"fds":[%s]}' % b",".join([b"-1"] * announced),
            [pipe[0]] * (announced + 1),
        )
        with pytest.raises(ControlError, match="cut"):
            channel.receive()
    stranger.send(b'{"type":"heartbeat"}')
    assert channel.receive() == Heartbeat()


def test_process_without_room_for_descriptors_is_told_and_keeps_none(ends: Pair, pipe: tuple[int, int]) -> None:
    ours, theirs = ends
    ours.send(Hand(1, [pipe[0]] * 8))
    before, (soft, hard) = _held(), resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(1000) if number not in before]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[4], hard))
    try:
        with pytest.raises(ControlError, match="8 descriptors announced") as caught:
            theirs.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.message == Hand(1, [-1] * 8), "who sent it can be told"
    assert _held() == before


def test_descriptors_that_nobody_expects_are_not_kept(
    raw: tuple[socket.socket, Channel], pipe: tuple[int, int]
) -> None:
    stranger, channel = raw
    _say(stranger, b'{"type":"heartbeat"}', [pipe[1]])
    os.close(pipe[1])
    assert channel.receive() == Heartbeat()
    assert os.read(pipe[0], 1) == b"", "somebody holds the writing end still"


def test_descriptors_in_a_channel_that_is_closed_unread_are_closed_too(pipe: tuple[int, int]) -> None:
    ours, theirs = control.pair()
    ours.send(Hand(1, [pipe[1]]))
    os.close(pipe[1])
    theirs.close()
    ours.close()
    assert os.read(pipe[0], 1) == b""


def test_link_has_two_ends_that_do_not_block_and_are_not_inherited() -> None:
    fds = control.link()
    one, two = (socket.socket(fileno=fd) for fd in fds)
    with one, two:
        assert one.type == two.type == socket.SOCK_SEQPACKET
        assert not os.get_blocking(fds[0]) and not os.get_blocking(fds[1])
        assert not one.get_inheritable() and not two.get_inheritable()
        usual: Any = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with usual[0], usual[1]:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                least = usual[0].getsockopt(socket.SOL_SOCKET, option)
                assert min(end.getsockopt(socket.SOL_SOCKET, option) for end in (one, two)) > least
        one.send(b"packet")
        assert two.recv(100) == b"packet"


def test_no_end_is_inherited_by_accident() -> None:
    ours, theirs = control.pair()
    try:
        assert not os.get_inheritable(ours.fileno())
        assert not theirs.get_inheritable()
    finally:
        ours.close()
        theirs.close()
