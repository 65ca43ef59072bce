"""Connections that join in-band, over real sockets, with real processes: they move to the worker that owns their room.

Step by step, within one process: tests/unit/test_moves.py. Many at once: loadtest/moves.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection, connect

from fastsig import metrics, status

from .conftest import Server, children, until

WORKERS = 4
ROOMS = [f"room {number}" for number in range(24)]  # some for each worker, all but certainly
TO_OWNER = 'relays_total{route="to_owner"}'


@pytest.fixture
def many(serve: Callable[..., Server]) -> Server:
    return serve("--workers", str(WORKERS))


def counted(server: Server, name: str) -> int:
    return sum(worker.counters.get(name, 0) for worker in status.ask(server.runtime_dir, server.port).workers)


def moves(server: Server) -> dict[str, int]:
    """What came of the moves so far."""
    return {result: counted(server, f'moves_total{{result="{result}"}}') for result in metrics.MOVES}


async def comes_to_be(is_so: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(until, is_so, what)


@contextlib.asynccontextmanager
async def joined(server: Server, room: str, peer: str) -> AsyncIterator[ClientConnection]:
    async with connect(server.url, proxy=None, open_timeout=10) as websocket:
        await websocket.send(json.dumps({"type": "join", "room": room, "sender": peer}))
        assert json.loads(await websocket.recv())["type"] == "joined"
        yield websocket


async def pairs(stack: contextlib.AsyncExitStack, server: Server) -> list[tuple[ClientConnection, ClientConnection]]:
    """Two in each room, which have spoken with each other."""
    found = []
    for room in ROOMS:
        one = await stack.enter_async_context(joined(server, room, "one"))
        other = await stack.enter_async_context(joined(server, room, "other"))
        await one.recv()
        for sender, receiver, name in ((one, other, "other"), (other, one, "one")):
            await sender.send(json.dumps({"type": "offer", "room": room, "recipient": name}))
            assert json.loads(await receiver.recv())["type"] == "offer"
        found.append((one, other))
    return found


async def test_members_of_a_room_are_all_at_home_where_it_is(many: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        await pairs(stack, many)
        came = moves(many)
        assert 0 < came.pop("moved") < 2 * len(ROOMS)
        assert not any(came.values()), came
        assert counted(many, "members") == 2 * len(ROOMS)
        assert counted(many, "remote_members") == 0
        assert counted(many, TO_OWNER) == 0
    await comes_to_be(lambda: counted(many, "connections") == 0, "connections are left")
    assert counted(many, "handshakes_total") == counted(many, "disconnects_total") == 2 * len(ROOMS)


async def test_owner_that_is_stopped_costs_a_quarter_of_a_second_and_no_connection(many: Server) -> None:
    stopped = children(many.process.pid)[0]
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for _ in ROOMS:  # of those that the stopped one accepted it would be silent anyway
            client = await stack.enter_async_context(connect(many.url, proxy=None, open_timeout=10))
            await client.send('{"type":"ping"}')
            await client.recv()
            clients.append(client)
        os.kill(stopped, signal.SIGSTOP)
        try:
            for room, client in zip(ROOMS, clients, strict=True):
                await client.send(json.dumps({"type": "join", "room": room, "sender": "one"}))
            await comes_to_be(lambda: moves(many)["taken_back"] > 0, "nobody was taken back")
        finally:
            os.kill(stopped, signal.SIGCONT)
        for client in clients:
            assert json.loads(await client.recv())["type"] == "joined"
        assert counted(many, "members") == len(ROOMS)
        assert counted(many, "remote_members") == moves(many)["taken_back"]


async def test_death_of_a_worker_is_noticed_by_the_members_of_its_rooms_and_by_nobody_else(many: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        found = await pairs(stack, many)
        os.kill(children(many.process.pid)[0], signal.SIGKILL)
        dead = 0
        for room, (one, other) in zip(ROOMS, found, strict=True):
            with contextlib.suppress(Exception):
                await one.send(json.dumps({"type": "message", "room": room, "recipient": "other", "payload": 1}))
            try:
                assert json.loads(await asyncio.wait_for(other.recv(), 10))["payload"] == 1
            except Exception:  # noqa: BLE001 # websockets has several for a connection that is gone
                dead += 1
                await asyncio.wait_for(one.wait_closed(), 10)
                await asyncio.wait_for(other.wait_closed(), 10)
        assert 0 < dead < len(ROOMS)


async def test_switch_is_reloadable(serve: Callable[..., Server], tmp_path: Path) -> None:
    file = tmp_path / "fastsig.toml"
    file.write_text("[server]\nmoves = false\n", encoding="ascii")
    server = serve("--workers", "2", "--config", str(file))
    async with contextlib.AsyncExitStack() as stack:
        await pairs(stack, server)
    assert not any(moves(server).values())
    file.write_text("[server]\nmoves = true\n", encoding="ascii")
    server.process.send_signal(signal.SIGHUP)
    await asyncio.to_thread(server.wait_for, "reloaded")
    async with contextlib.AsyncExitStack() as stack:
        await pairs(stack, server)
    assert moves(server)["moved"] > 0


def test_client_that_resets_at_any_moment_leaves_nothing(many: Server) -> None:
    head = b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    head += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    before = None
    for number in range(200):
        join = json.dumps({"type": "join", "room": ROOMS[number % len(ROOMS)], "sender": "one"}).encode()
        with socket.create_connection(("127.0.0.1", many.port), 10) as end:
            end.sendall(head + bytes([0x81, 0x80 | len(join), 0, 0, 0, 0]) + join)
            if number % 4:
                end.recv(64)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        if number == 50:
            until(lambda: counted(many, "connections") == 0, "connections are left")
            before = descriptors(many)
    until(lambda: counted(many, "connections") == counted(many, "members") == 0, "connections are left")
    until(lambda: descriptors(many) == before, "descriptors are left")
    assert moves(many)["moved"] > 0


def descriptors(server: Server) -> list[int]:
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in children(server.process.pid)]  # noqa: PTH208
