"""The edge with real sockets, in a loop in this process, under fake time: endings that are heard, and read buffers that
become small again while bytes keep coming. All of it without TLS, and with."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from fastsig import metrics
from fastsig._relay import Connection, Relay
from fastsig.config import Limits, Server
from fastsig.connection import Door, Edge
from fastsig.hub import Hub
from fastsig.tls import Credentials
from tests.e2e.conftest import certified, trusting
from tests.unit.memory import CLOSE, HEAD, PING, PONG, TEXT, frame

PING_S = 25.0
SMALL = 2048


class CountingEdge(Edge):
    """Counts how often picows began anew."""

    renewals = 0

    def renew(self, connection: Connection) -> None:
        super().renew(connection)
        self.renewals += 1


class Wire:
    """The client's end of a connection."""

    has_ended_well = True

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    async def start(self, reads_after_s: float = 0) -> None:
        """From here on bytes are what the server's connection says and hears."""

    def put(self, data: bytes) -> None:
        """All is with the kernel before the loop runs."""
        assert self.end.send(data) == len(data)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.end, data)

    async def receive(self) -> bytes:
        """What is there; nothing: the server has no more to say. Raises ConnectionResetError when it is cut off."""
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.end, 1 << 20), 10)


class TlsWire(Wire):
    """The same with TLS."""

    def __init__(self, end: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(end)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")
        self.has_ended_well = False  # close_notify came

    async def start(self, reads_after_s: float = 0) -> None:
        while True:
            try:
                self.object.do_handshake()
            except ssl.SSLWantReadError:
                await super().send(self._outgoing.read())
                await asyncio.sleep(reads_after_s)
                reads_after_s = 0
                self._incoming.write(await super().receive())
            else:
                await super().send(self._outgoing.read())
                return

    def _sealed(self, data: bytes) -> bytes:
        for at in range(0, len(data), 16384):
            self.object.write(data[at : at + 16384])
        return self._outgoing.read()

    def put(self, data: bytes) -> None:
        super().put(self._sealed(data))

    async def send(self, data: bytes) -> None:
        await super().send(self._sealed(data))

    async def receive(self) -> bytes:
        while True:
            try:
                data = self.object.read(1 << 20)
            except ssl.SSLWantReadError:
                more = await super().receive()
                if not more:
                    return b""
                self._incoming.write(more)
            else:
                self.has_ended_well = not data
                return data


class Node:
    """A worker's edge and relay, and one connection to its echo."""

    def __init__(
        self, credentials: Credentials | None = None, trust: ssl.SSLContext | None = None, send_bytes: int = 0
    ) -> None:
        loop = asyncio.get_running_loop()
        self.now = 1000.0
        limits = Limits()
        self.relay = Relay(
            call_soon=loop.call_soon, clock=lambda: self.now, counters=bytearray(metrics.SLAB_BYTES), ping_s=PING_S,
            message_bytes=limits.message_bytes, output_bytes=1 << 24, handshake_s=10.0, first_message_s=60.0,
        )  # fmt: skip
        self.hub = Hub(self.relay, limits)
        self.edge = CountingEdge(loop)
        self.relay.bind(self.hub, self.edge)
        self.door = Door(self.relay, path="/ws", echo_path="/echo")
        self.door.credentials = credentials
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)  # more than one read takes
            if send_bytes:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
            self.client = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
        self.client.setblocking(False)
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wire = Wire(self.client) if trust is None else TlsWire(self.client, trust)
        self.send = self.wire.send
        self.door.serve(accepted.detach())

    async def start(self) -> None:
        """The handshake."""
        await self.send(HEAD.format(target="/echo").encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += await self.wire.receive()
        assert answer.startswith(b"HTTP/1.1 101 ")

    async def expect(self, *frames: tuple[int, bytes]) -> None:
        """These frames come, and nothing else before or between."""
        wanted = b"".join(frame(opcode, payload, masked=False) for opcode, payload in frames)
        got = b""
        while len(got) < len(wanted):
            part = await self.wire.receive()
            assert part, "the connection ended"
            got += part
        assert got == wanted

    async def read_all(self) -> bytes:
        """What comes until the server has nothing more to say. Raises ConnectionResetError when it is cut off."""
        got = b""
        while part := await self.wire.receive():
            got += part
        assert self.wire.has_ended_well
        return got

    async def ping(self) -> None:
        """A ping period is over."""
        self.now += PING_S + 0.5
        self.relay.tick(self.now)
        await self.expect((PING, b""))

    async def pong(self, renewals: int) -> None:
        """A pong, alone in its read; so often has picows begun anew when it is read."""
        await self.send(frame(PONG))
        async with asyncio.timeout(10):
            while self.edge.renewals < renewals:  # noqa: ASYNC110 # an event in the edge would be there for this alone
                await asyncio.sleep(0.001)

    @property
    def buffer_bytes(self) -> int:
        """The room in picows' read buffer, which is empty."""
        (connection,) = self.relay.all_connections()
        protocol: Any = connection.transport.get_protocol()
        return len(protocol.get_buffer(-1))

    async def grow(self) -> None:
        """A large message, and a ping period without anything."""
        await self.send(frame(TEXT, b"x" * 60_000))
        await self.expect((TEXT, b"x" * 60_000))
        assert self.buffer_bytes > 60_000
        await self.ping()
        await self.send(frame(PONG) + frame(TEXT, b"read"))
        await self.expect((TEXT, b"read"))
        await self.ping()
        assert self.buffer_bytes > 60_000


@pytest.fixture(params=[False, True], ids=["plain", "TLS"])
async def stranger(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Node]:
    """A connection, nothing sent yet but what TLS needs."""
    if request.param:
        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        _, chain, _, key = certified(authority, tmp_path)
        node = Node(Credentials(Server(tls_cert=chain, tls_key=key)), trusting(authority))
    else:
        node = Node()
    await node.wire.start()
    yield node
    node.client.close()
    while node.relay.connections:  # noqa: ASYNC110 # the loop reads the end of it
        await asyncio.sleep(0.001)


@pytest.fixture
async def node(stranger: Node) -> Node:
    """A WebSocket to the echo."""
    await stranger.start()
    return stranger


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (frame(3, "{}"), 1002),
        (frame(TEXT, b"\xff"), 1007),
        (frame(TEXT, b"x" * 65537), 1009),
        (frame(CLOSE, b"\x03\xe8") + b"x", 1000),
    ],
)
async def test_peer_that_talks_on_behind_its_end_hears_all_that_was_said_before(
    node: Node, last: bytes, code: int
) -> None:
    """Closing a socket with unread bytes resets the connection, and the reset overtakes what the peer has not read."""
    await node.send(frame(TEXT, "before") + last)
    for _ in range(20):
        await node.send(b"x" * 65536)
    assert await node.read_all() == b"".join((
        frame(TEXT, "before", masked=False), frame(CLOSE, code.to_bytes(2, "big"), masked=False),
    ))  # fmt: skip


async def test_client_that_goes_on_sending_behind_a_refused_request_reads_the_whole_refusal(stranger: Node) -> None:
    await stranger.send(b"POST /ws HTTP/1.1\r\nHost: x\r\nContent-Length: 1310720\r\n\r\n")
    for _ in range(20):
        await stranger.send(b"x" * 65536)
    head, _, body = (await stranger.read_all()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"Content-Length: %d\r\n" % len(body) in head
    assert body.startswith(b'{"type":"error"')


async def test_buffer_is_small_again_two_ping_periods_after_a_large_message(node: Node) -> None:
    assert node.buffer_bytes <= SMALL
    for round_ in range(1, 6):
        await node.grow()
        await node.pong(round_)
        await node.send(frame(TEXT, str(round_)))
        await node.expect((TEXT, str(round_).encode()))
        assert node.edge.renewals == round_
        assert node.buffer_bytes <= SMALL


async def test_memory_of_buffers_that_were_given_up_goes_back_to_the_system(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed = asyncio.Event()
    monkeypatch.setattr("fastsig.connection.TRIM_S", 0.0)
    monkeypatch.setattr("fastsig.connection.trim", trimmed.set)
    for round_ in (1, 2):
        await node.grow()
        assert not trimmed.is_set()
        await node.pong(round_)
        await asyncio.wait_for(trimmed.wait(), 10)
        trimmed.clear()


async def test_buffer_in_use_is_kept(node: Node) -> None:
    for _ in range(4):
        await node.send(frame(TEXT, b"x" * 30_000))
        await node.expect((TEXT, b"x" * 30_000))
        await node.ping()
        await node.send(frame(PONG))
    await node.send(frame(TEXT, b""))
    await node.expect((TEXT, b""))
    assert node.edge.renewals == 0


async def test_what_is_behind_the_pong_in_the_same_read_is_not_lost(node: Node) -> None:
    await node.grow()
    whole = frame(TEXT, b"y" * 500)
    await node.send(frame(PONG) + whole[:100])
    await node.send(whole[100:])
    await node.expect((TEXT, b"y" * 500))
    assert node.edge.renewals == 0
    await node.pong(1)  # nobody asked for it: any will do
    await node.send(frame(TEXT, b"z"))
    await node.expect((TEXT, b"z"))
    assert node.edge.renewals == 1


async def test_bytes_that_wait_in_the_kernel_are_read_into_the_new_buffer(node: Node) -> None:
    """A read that ends with the pong fills the old buffer to its last byte, so uvloop goes on reading at once, within
    the same callback of libuv."""
    await node.grow()
    size = node.buffer_bytes
    large = [(b"x" * 32_000), b"y" * 32_000, b"z" * (size - 2 * 32_008 - 8 - 6)]
    small = [f"message {i}".encode() for i in range(3000)]
    full = b"".join(frame(TEXT, text) for text in large) + frame(PONG)
    assert len(full) == size
    data = full + b"".join(frame(TEXT, text) for text in small)
    node.wire.put(data)
    await node.expect(*((TEXT, text) for text in large + small))
    assert node.edge.renewals == 1


def _long_chain(authority: trustme.CA, folder: Path) -> Credentials:
    """More than the kernel takes of one who does not read: on loopback that is a whole segment, some 64 KiB."""
    _, chain, _, key = certified(authority, folder)
    Path(chain).write_bytes(Path(chain).read_bytes() + 190 * authority.cert_pem.bytes())
    return Credentials(Server(tls_cert=chain, tls_key=key))


async def test_handshake_of_tls_that_the_kernel_takes_piece_by_piece_is_whole(tmp_path: Path) -> None:
    """A chain of certificates that is longer than what the socket holds, for a client that begins to read late."""
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    node = Node(_long_chain(authority, tmp_path), trusting(authority), send_bytes=4096)
    node.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    starting = asyncio.create_task(node.wire.start(reads_after_s=0.2))
    refused = 0
    while not starting.done():
        for connection in node.relay.all_connections():
            refused = max(refused, len(connection.transport._unsent))
        await asyncio.sleep(0.001)
    assert refused, "the kernel took all of it"
    await node.start()
    await node.send(frame(TEXT, b"x" * 60_000))
    await node.expect((TEXT, b"x" * 60_000))
    node.client.close()
    while node.relay.connections:  # noqa: ASYNC110 # the loop reads the end of it
        await asyncio.sleep(0.001)
