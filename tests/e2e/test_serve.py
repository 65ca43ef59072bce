"""The process: how it starts, what it says, how it ends."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.e2e.conftest import PYTHON, Server, children, is_running, until

Serve = Callable[..., Server]
END_S = 10.0


async def _close_code(websocket: ClientConnection) -> int | None:
    try:
        async with asyncio.timeout(END_S):
            while True:
                await websocket.recv()
    except ConnectionClosed as end:
        return end.rcvd.code if end.rcvd else None


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PYTHON, "-m", "fastsig", *args], capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_without_a_drain_closes_everybody_with_1001(serve: Serve, number: signal.Signals) -> None:
    server = serve("--server.drain-seconds", "0")
    async with connect(server.url, proxy=None) as websocket:
        server.process.send_signal(number)
        assert await _close_code(websocket) == 1001
        assert await asyncio.to_thread(server.stop, number) == 0


def test_second_signal_does_not_wait_for_a_client_that_never_closes(serve: Serve) -> None:
    server = serve("--server.drain-seconds", "0")
    request = (
        "GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), END_S) as raw:
        raw.sendall(request.encode())
        assert raw.recv(12) == b"HTTP/1.1 101"
        server.process.send_signal(signal.SIGTERM)
        while b"\x88\x02\x03\xe9" not in raw.recv(4096):  # close 1001
            pass
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(END_S)
        assert time.monotonic() - began < 1.5, "it waited for the client"


def test_port_in_use_ends_with_3_and_one_line(server: Server) -> None:
    run = _run("serve", "--host", "127.0.0.1", "--port", str(server.port))
    assert run.returncode == 3
    assert len(run.stderr.splitlines()) == 1
    assert str(server.port) in run.stderr


def test_unknown_option_ends_with_2() -> None:
    run = _run("serve", "--prot", "80")
    assert run.returncode == 2
    assert "Traceback" not in run.stderr


def test_log_is_json_lines_where_there_is_no_terminal(serve: Serve) -> None:
    server = serve()
    server.stop()
    lines = server.stderr_lines()
    assert lines
    for line in lines:
        assert {"ts", "level", "event"} <= set(json.loads(line)), line


def test_worker_ends_when_the_supervisor_is_killed(serve: Serve) -> None:
    server = serve()
    workers = children(server.process.pid)
    assert workers
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(END_S)
    until(lambda: not any(is_running(pid) for pid in workers), "a worker outlives its supervisor")


@pytest.mark.parametrize("option", ["", "--ready"])
def test_health_command_asks_the_server(server: Server, option: str) -> None:
    assert _run("health", *option.split(), "--url", f"http://127.0.0.1:{server.port}").returncode == 0


def test_health_command_fails_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert _run("health", "--url", f"http://127.0.0.1:{port}").returncode == 1
