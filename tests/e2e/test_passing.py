"""Connections that name a room in their URL, over real sockets: the worker that owns the room serves them."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection, connect

from fastsig import status

from .conftest import Server, children, until

WORKERS = 4
PASSED = 'handshakes_total{result="passed"}'
TO_OWNER = 'relays_total{route="to_owner"}'
ROOMS = [f"room {number}" for number in range(24)]  # some for each worker, all but certainly
HEAD = (
    "GET /ws?room={room} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
PING = bytes([0x81, 0x80 | 15, 0, 0, 0, 0]) + b'{"type":"ping"}'  # masked with zeros


@pytest.fixture
def many(serve: Callable[..., Server]) -> Server:
    return serve("--workers", str(WORKERS), "--limits.handshake-seconds", "2")


def counted(server: Server, name: str) -> int:
    return sum(worker.counters.get(name, 0) for worker in status.ask(server.runtime_dir, server.port).workers)


async def until_counted(server: Server, **wanted: int) -> None:
    def is_so() -> bool:
        return all(counted(server, name) == count for name, count in wanted.items())

    await asyncio.to_thread(until, is_so, f"it never came to {wanted}")


@contextlib.asynccontextmanager
async def joined(server: Server, room: str, peer: str) -> AsyncIterator[ClientConnection]:
    url = f"{server.url}?room={room.replace(' ', '%20')}"
    async with connect(url, proxy=None, open_timeout=10) as websocket:
        await websocket.send(json.dumps({"type": "join", "room": room, "sender": peer}))
        assert json.loads(await websocket.recv())["type"] == "joined"
        yield websocket


def head(room: str) -> bytes:
    return HEAD.format(room=room.replace(" ", "%20")).encode()


def answer(connection: socket.socket, end: bytes) -> bytes:
    """What comes, up to and with `end`."""
    received = b""
    while end not in received:
        data = connection.recv(4096)
        assert data, received
        received += data
    return received


async def test_members_of_a_room_that_they_name_are_all_at_home_there(many: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for room in ROOMS:
            one = await stack.enter_async_context(joined(many, room, "one"))
            other = await stack.enter_async_context(joined(many, room, "other"))
            await one.recv()
            await other.send(json.dumps({"type": "offer", "room": room, "recipient": "one"}))
            assert json.loads(await one.recv())["type"] == "offer"
        await until_counted(many, members=2 * len(ROOMS))
        # On a busy machine an owner may be asked in vain for longer than it is waited for, also at the join.
        taken_back = counted(many, 'moves_total{result="taken_back"}')
        assert counted(many, "remote_members") == taken_back
        assert taken_back or not counted(many, TO_OWNER)
        assert 0 < counted(many, PASSED) < 2 * len(ROOMS)
    await until_counted(many, connections=0, members=0, rooms=0)


def test_what_comes_byte_by_byte_or_behind_the_head_gets_there_too(many: Server) -> None:
    for room in ROOMS:
        with socket.create_connection(("127.0.0.1", many.port), 10) as slow:
            slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in head(room):
                slow.send(bytes([byte]))
            slow.send(PING)
            assert answer(slow, b'"pong"').startswith(b"HTTP/1.1 101 ")
        with socket.create_connection(("127.0.0.1", many.port), 10) as hasty:
            hasty.sendall(head(room) + PING + PING)
            received = answer(hasty, b'"pong"')
            while received.count(b'"pong"') < 2:
                received += hasty.recv(4096)
            assert received.count(b"HTTP/1.1 101 ") == 1
    assert counted(many, PASSED) > 0


def test_head_that_never_ends_costs_nothing_and_ends_at_the_handshake_timeout(many: Server) -> None:
    began = time.monotonic()
    dribbling = []
    for room in ROOMS:
        connection = socket.create_connection(("127.0.0.1", many.port), 10)
        connection.send(head(room)[:-2])
        dribbling.append(connection)
    before = {pid: _cpu_s(pid) for pid in children(many.process.pid)}
    for connection in dribbling:
        with connection:
            assert connection.recv(1) == b""
    assert time.monotonic() - began < 8
    assert sum(_cpu_s(pid) - spent for pid, spent in before.items()) < 0.5
    assert counted(many, PASSED) == 0


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_owner_that_is_stopped_is_not_waited_for_and_touches_nothing_later(many: Server) -> None:
    stopped = children(many.process.pid)[0]
    connections = []
    os.kill(stopped, signal.SIGSTOP)
    try:
        for room in ROOMS:
            connections.append(socket.create_connection(("127.0.0.1", many.port), 10))
            connections[-1].sendall(head(room) + PING)
        answers = [answer(connection, b'"pong"') for connection in connections]
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert all(received.count(b"HTTP/1.1 101 ") == 1 for received in answers)
    for connection in connections:
        connection.sendall(PING)
        received = answer(connection, b'"pong"')
        assert received.count(b"HTTP/1.1 ") == 0, "a second worker has answered"
        connection.close()


async def test_nothing_is_left_of_connections_that_were_passed(many: Server) -> None:
    async def visit(number: int) -> None:
        async with joined(many, ROOMS[number % len(ROOMS)], f"p{number}"):
            pass

    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in children(many.process.pid)]  # noqa: PTH208

    await asyncio.gather(*(visit(number) for number in range(100)))
    await until_counted(many, connections=0)
    before = descriptors()
    for _ in range(5):
        await asyncio.gather(*(visit(number) for number in range(100)))
    await until_counted(many, connections=0)
    await asyncio.to_thread(until, lambda: descriptors() == before, "descriptors are left")


async def test_health_is_answered_by_whoever_accepts(many: Server) -> None:
    for room in ROOMS:
        _, writer = pair = await asyncio.open_connection("127.0.0.1", many.port)
        writer.write(f"GET /livez?room={room.replace(' ', '%20')} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await pair[0].readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()
    assert counted(many, PASSED) == 0
