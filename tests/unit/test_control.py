"""Two ends in one process: no worker, no loop."""

import array
import contextlib
import os
import socket
from collections.abc import Iterator

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
    Heartbeat,
    Message,
    Ready,
    Reload,
    Stop,
    Stopped,
)
from fastsig.errors import ConfigError, InvariantError

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
        Boot(Config(), slot=0, slots=1, generation=1, listeners=[5, 6], counters=7),
        Drain(seconds=20.0, deadline_s=25.0),
        Reload(build({"limits.rooms": 7, "log.level": "debug"})),
        Stop(is_forced=True),
        Stop(is_forced=False, code=4000),
        Ready(pid=7),
        Failed("no such file: käse"),
        Heartbeat(),
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
    ours.send(Boot(config, 1, 2, 3, [], 4))
    boot = theirs.receive()
    assert isinstance(boot, Boot) and boot.config == config


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


def test_descriptors_that_nobody_expects_are_not_kept(raw: tuple[socket.socket, Channel]) -> None:
    stranger, channel = raw
    reader, writer = os.pipe()
    try:
        extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer]))]
        stranger.sendmsg([b'{"type":"heartbeat"}'], extra)
        os.close(writer)
        assert channel.receive() == Heartbeat()
        assert os.read(reader, 1) == b"", "somebody holds the writing end still"
    finally:
        os.close(reader)


def test_no_end_is_inherited_by_accident() -> None:
    ours, theirs = control.pair()
    try:
        assert not os.get_inheritable(ours.fileno())
        assert not theirs.get_inheritable()
    finally:
        ours.close()
        theirs.close()
