"""What one peer can cost the others and the server: memory, latency, the process. Real sockets."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
import websockets

from tests.unit.memory import CLOSE, HEAD, PING, PONG, TEXT, frame

from .conftest import EVERY_COUNT, NO_RATES, TLS, Server, certified, free_port, trusting

MIB = 1 << 20


def worker_of(server: Server) -> int:
    """The pid of the only worker."""
    server.wait_for("serving")
    pid = server.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def memory_of(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def connect(server: Server, *, receive_bytes: int = 0) -> socket.socket:
    client = socket.socket()
    if receive_bytes:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(10)
    client.connect(("127.0.0.1", server.port))
    if server.trust is not None:
        client = server.trust.wrap_socket(client, server_hostname="127.0.0.1")
    client.sendall(HEAD.format(target="/ws").encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += client.recv(4096)
    assert answer.startswith(b"HTTP/1.1 101 ")
    return client


def send_until_refused(client: socket.socket, data: bytes, most: int) -> int:
    """Send until the connection ends or so many bytes are gone; how many went."""
    sent = 0
    try:
        while sent < most:
            sent += client.send(data)
    except OSError:
        pass
    return sent


@pytest.mark.parametrize("bad", [frame(3, "{}"), frame(TEXT, b"", masked=False), b"\x81\xff" + b"\xff" * 8])
def test_flood_behind_a_bad_frame_pins_no_memory(serve: Callable[..., Server], bad: bytes) -> None:
    server = serve(*NO_RATES)
    pid = worker_of(server)
    with connect(server, receive_bytes=4096) as client:
        client.settimeout(0.5)
        base = peak = memory_of(pid)
        send_until_refused(client, frame(PING, b"x" * 125) * 500, 8 * MIB)  # its pongs fill what the kernel takes
        client.settimeout(5)
        client.sendall(bad)
        deadline = time.monotonic() + 10
        while send_until_refused(client, b"x" * 65536, MIB) >= MIB and time.monotonic() < deadline:
            peak = max(peak, memory_of(pid))
    assert peak - base < 16 * MIB


def test_burst_of_small_frames_leaves_little_behind(serve: Callable[..., Server]) -> None:
    server = serve(*NO_RATES)
    pid = worker_of(server)
    clients = [connect(server) for _ in range(20)]
    base = memory_of(pid)
    for client in clients:
        send_until_refused(client, frame(PONG, b"x" * 100) * 1000, 6 * MIB)
        client.sendall(frame(TEXT, '{"type":"ping"}'))
        assert client.recv(100)
    kept = memory_of(pid) - base
    for client in clients:
        client.close()
    assert kept < len(clients) * 400_000


@pytest.mark.parametrize("workers", [*EVERY_COUNT, TLS])
async def test_slow_reader_is_closed_4003_and_nobody_waits_for_it(
    serve: Callable[..., Server], tmp_path: Path, workers: int | str
) -> None:
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    if workers == TLS:
        server = serve(*NO_RATES, *certified(authority, tmp_path), trust=trusting(authority))
    else:
        server = serve(*NO_RATES, "--workers", str(workers))
    slow = connect(server)
    slow.sendall(frame(TEXT, '{"type":"join","room":"r","sender":"slow"}'))
    assert b'"joined"' in await asyncio.to_thread(slow.recv, 4096)
    options: dict[str, Any] = {"ssl": server.trust, "proxy": None}
    async with (
        websockets.connect(server.url, **options) as reader,
        websockets.connect(server.url, **options) as speaker,
    ):
        for client, name in ((reader, "reader"), (speaker, "speaker")):
            await client.send(json.dumps({"type": "join", "room": "r", "sender": name}))
            assert json.loads(await client.recv())["type"] == "joined"
        assert json.loads(await reader.recv())["sender"] == "speaker"
        text = json.dumps({"type": "message", "room": "r", "payload": "x" * 60000})
        delays = []
        async with asyncio.timeout(20):
            while True:
                start = time.monotonic()
                await speaker.send(text)
                message = json.loads(await reader.recv())
                delays.append(time.monotonic() - start)
                if message["type"] == "peer-left":
                    break
        assert message["sender"] == "slow"
        assert message["payload"]["reason"] == "lost"
        assert sorted(delays)[len(delays) // 2] < 0.1
    with slow, slow.makefile("rb") as stream:
        data = await asyncio.to_thread(stream.read)
    assert data.endswith(b"\x88\x02" + (4003).to_bytes(2, "big"))


@pytest.mark.parametrize("signals", [1, 2])
def test_server_ends_cleanly_with_clients_that_never_answer(serve: Callable[..., Server], signals: int) -> None:
    server = serve("--server.drain-seconds", "0" if signals == 1 else "60")
    clients = [connect(server) for _ in range(40)]
    for client in clients:
        client.sendall(frame(TEXT, '{"type":"join","room":"r"}'))
        assert client.recv(10)
    for _ in range(signals - 1):
        server.process.terminate()
        server.wait_for("stopping")
    assert server.stop() == 0
    ends = [read_all(client) for client in clients]
    for client in clients:
        client.close()
    assert all(frame(CLOSE, b"\x03\xe9", masked=False) in end for end in ends)
    assert not [line for line in server.stderr_lines() if "Traceback" in line or "Fatal" in line]


def test_process_ends_cleanly_with_connections_alive() -> None:
    """The interpreter's last collection takes live connections apart; they leave the wheel without its help."""
    code = """
import asyncio, gc
from tests.unit.memory import Host
async def main():
    global host, peers
    host = Host()
    peers = [host.join(f"p{i}", room=f"r{i % 7}") for i in range(60)]
    gc.collect()
asyncio.run(main())
"""
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def read_all(client: socket.socket) -> bytes:
    data = b""
    try:
        while part := client.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


async def test_no_page_of_the_operators_and_no_log_names_rooms_or_peers(serve: Callable[..., Server]) -> None:
    server = serve("--ops.port", str(port := free_port()))
    async with websockets.connect(server.url) as client, aiohttp.ClientSession() as session:
        await client.send(json.dumps({"type": "join", "room": "room-of-a-peer", "sender": "name-of-a-peer"}))
        assert json.loads(await client.recv())["type"] == "joined"
        pages = []
        for path in ("/", "/metrics", "/debug/stats", "/health/ready?verbose", "/rooms", "/peers"):
            async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
                pages.append(await answer.text())
    pages += server.stderr_lines()
    assert "fastsig_connections" in pages[1]
    assert not [page for page in pages if "of-a-peer" in page]
