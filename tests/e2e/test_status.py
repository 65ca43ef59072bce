"""`fastsig status`: the command, the socket that it asks, and those who ask it badly."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from fastsig import metrics, status
from fastsig.status import UnusableError
from tests.e2e.conftest import PYTHON, Server

Serve = Callable[..., Server]
END_S = 15.0
ACCEPTED = 'handshakes_total{result="accepted"}'
MESSAGES = 'sent_messages_total{type="message"}'
REQUEST = b'{"command":"status"}\n'


def _until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + END_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTSIG_")}
    command = [PYTHON, "-m", "fastsig", "status", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, env=clean)


def _command(server: Server, *args: str) -> subprocess.CompletedProcess[str]:
    return _run("--port", str(server.port), "--server.runtime-dir", str(server.runtime_dir), *args)


def _ask(server: Server) -> status.WorkerStatus:
    (worker,) = status.ask(server.runtime_dir, server.port).workers
    return worker


@contextlib.contextmanager
def _raw(server: Server) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(END_S)
        connection.connect(str(status.socket_path(server.runtime_dir, server.port)))
        yield connection


def _say(server: Server, data: bytes) -> Any:
    """What comes back, up to the end; None for nothing."""
    with _raw(server) as connection:
        received = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(data)
            while more := connection.recv(65536):
                received += more
    return json.loads(received) if received else None


# ---- the command


async def test_table_shows_the_workers(serve: Serve) -> None:
    server = serve()
    async with connect(server.url, proxy=None) as a, connect(server.url, proxy=None) as b:
        for websocket in (a, b):
            await websocket.send('{"type":"join","room":"r"}')
            await websocket.recv()
        await a.recv()
        for _ in range(3):
            await b.send('{"type":"message","room":"r"}')
            await a.recv()
        await b.send("{")
        await b.recv()
        run = await asyncio.to_thread(_command, server)
    assert (run.returncode, run.stderr) == (0, "")
    first, head, row = run.stdout.splitlines()
    assert first.startswith("fastsig ") and f"pid {server.process.pid}, up " in first and server.url in first
    names = re.split(r"\s{2,}", head.strip().replace("up since", "day  time"))
    cells = dict(zip(names, row.split(), strict=True))
    expected = {
        "slot": "0",
        "generation": "1",
        "connections": "2",
        "rooms": "1",
        "members": "2",
        "received": "6",
        "sent": "7",
    }
    assert expected.items() <= cells.items() and cells["errors"] == "1"
    assert 5 < float(cells["RSS MiB"]) < 500 and 0 <= float(cells["CPU %"]) <= 150


def test_json_has_every_counter(server: Server) -> None:
    run = _command(server, "--json")
    found = json.loads(run.stdout)
    assert run.returncode == 0 and run.stdout.count("\n") == 1
    (worker,) = found["workers"]
    assert worker["counters"].keys() >= {family.name for family in metrics.IN_MAP if family.kind != "histogram"}
    assert worker["cpu_percent"] is not None and found["pid"] == server.process.pid


def test_no_server_is_one_line_and_exit_code_1(serve: Serve, tmp_path: Path) -> None:
    run = _run("--server.runtime-dir", str(tmp_path / "none"), "--port", "1")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("fastsig: no server on port 1 ") and run.stderr.count("\n") == 1
    server = serve()
    run = _run("--server.runtime-dir", str(server.runtime_dir), "--port", "1")
    assert run.returncode == 1 and f"there are sockets of {server.port}: give --port" in run.stderr


def test_port_that_is_not_known_is_asked_for() -> None:
    run = _run("--port", "0")
    assert run.returncode == 2 and "give --port" in run.stderr


# ---- what the numbers survive


def test_counters_go_on_over_a_restart_and_gauges_begin_anew(serve: Serve) -> None:
    async def meet() -> None:
        async with connect(server.url, proxy=None) as a, connect(server.url, proxy=None) as b:
            for websocket in (a, b):
                await websocket.send('{"type":"join","room":"r"}')
                await websocket.recv()
            await b.send('{"type":"message","room":"r"}')
            await a.recv()
            await a.recv()
            before = await asyncio.to_thread(_ask, server)
            assert before.pid is not None
            assert (before.counters["connections"], before.counters["members"]) == (2, 2)
            os.kill(before.pid, signal.SIGKILL)
            await asyncio.to_thread(_until, lambda: bool(server.events("worker_ready")), "no successor")

    server = serve()
    asyncio.run(meet())
    after = _ask(server)
    assert after.generation == 2
    assert [after.counters[name] for name in ("connections", "rooms", "members")] == [0, 0, 0]
    kept = (ACCEPTED, MESSAGES, "worker_restarts_total")
    assert [after.counters[name] for name in kept] == [2, 1, 1]
    asyncio.run(_join(server))
    assert _ask(server).counters[ACCEPTED] == 3


async def _join(server: Server) -> None:
    async with connect(server.url, proxy=None) as websocket:
        await websocket.send('{"type":"join","room":"r"}')
        await websocket.recv()


def test_slot_without_a_worker_is_shown(serve: Serve) -> None:
    """Its gauges are 0 at once, not only when the next worker starts."""
    server = serve()
    for _ in range(4):  # the fourth is not replaced before 0.4 s have passed
        worker = _ask(server)
        while worker.pid is None:
            worker = _ask(server)
        os.kill(worker.pid, signal.SIGKILL)
        _until(lambda pid=worker.pid: _ask(server).pid != pid, "it lives")  # type: ignore[misc]
    gone = _ask(server)
    assert gone.pid is None and gone.process is None and gone.generation == 4


# ---- where the socket is


def test_socket_and_folder_are_the_users_own_and_the_socket_goes_with_the_server(serve: Serve) -> None:
    server = serve()
    path = status.socket_path(server.runtime_dir, server.port)
    assert stat.S_IMODE(path.parent.lstat().st_mode) == 0o700
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert server.stop() == 0
    assert not path.exists()


def test_two_servers_live_side_by_side(serve: Serve) -> None:
    one, two = serve(), serve()
    assert one.runtime_dir == two.runtime_dir
    for server in (one, two):
        assert status.ask(server.runtime_dir, server.port).pid == server.process.pid


def test_socket_of_a_server_that_was_killed_is_replaced(serve: Serve, tmp_path: Path) -> None:
    first = serve()
    port = first.port
    first.process.kill()
    first.process.wait()
    assert status.socket_path(first.runtime_dir, port).exists()
    with pytest.raises(UnusableError, match="left behind"):
        status.ask(first.runtime_dir, port)
    path = status.socket_path(tmp_path / "run", port)
    deadline = time.monotonic() + END_S
    while True:  # the workers of the first one may hold the port for a moment
        second = Server("--port", str(port), cwd=tmp_path)
        try:
            second.wait_for("serving", END_S)
        except pytest.fail.Exception:
            assert time.monotonic() < deadline
            continue
        break
    try:
        assert path.exists() and status.ask(second.runtime_dir, port).pid == second.process.pid
    finally:
        assert second.stop() == 0


def _open_to_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)


def _anothers(folder: Path) -> None:
    folder.mkdir(0o700)
    os.chown(folder, 12345, 12345)


UNUSABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "open to others": (_open_to_others, "chmod 700"),
    "a file": (Path.touch, "not a folder"),
    "a link": (lambda folder: folder.symlink_to("/tmp"), "not a folder"),
    "a link to nothing": (lambda folder: folder.symlink_to("/no/such"), "not a folder"),
    "another's": (_anothers, "another user"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_folder_that_cannot_be_used_costs_one_warning(serve: Serve, tmp_path: Path, what: str) -> None:
    make, says = UNUSABLE[what]
    if what == "another's" and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    make(tmp_path / "run")
    _goes_on_without(serve(), says)


def test_folder_that_cannot_be_made_or_named_costs_one_warning(serve: Serve, tmp_path: Path) -> None:
    _goes_on_without(serve("--server.runtime-dir", str(tmp_path / "no" / "such")), "No such file")
    _goes_on_without(serve("--server.runtime-dir", str(tmp_path / ("x" * 150))), "too long")
    _goes_on_without(
        serve(env={"FASTSIG_SERVER_RUNTIME_DIR": "", "FASTSIG_CONFIG_BODY": '[server]\nruntime_dir = "a\\u0000b"'}),
        "null byte",
    )


def test_client_that_still_asks_when_the_server_ends_is_no_event(serve: Serve) -> None:
    server = serve()
    with _raw(server) as connection:
        connection.sendall(b"{")
        assert server.stop() == 0
    assert server.events()[-1]["event"] == "stopped"
    assert not server.events("library_message")


def _goes_on_without(server: Server, says: str) -> None:
    asyncio.run(_join(server))
    assert server.stop() == 0
    warnings = [event for event in server.events() if event["level"] == "warning"]
    assert [event["event"] for event in warnings] == ["status_unavailable"]
    assert says in warnings[0]["reason"]


def test_socket_that_answers_is_not_taken_away(serve: Serve, tmp_path: Path) -> None:
    """The same port on another address is another server."""
    first = serve("--host", "127.0.0.1")
    second = serve("--host", "127.0.0.2", "--port", str(first.port))
    _goes_on_without(second, "in use by another server")
    assert status.ask(first.runtime_dir, first.port).pid == first.process.pid


# ---- those who ask badly


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\n", "not a request"),
        (b"status\n", "not a request"),
        (b"[]\n", "not a request"),
        (b'{"command":1}\n', "not a request"),
        (b'{"command":"stop"}\n', "unknown command"),
    ],
)
def test_request_that_is_none_is_told_so(server: Server, data: bytes, error: str) -> None:
    assert _say(server, data) == {"error": error}


def test_line_without_an_end_is_cut_off(server: Server) -> None:
    assert _say(server, b"x" * (1 << 20)) is None


def test_one_answer_and_the_connection_ends(server: Server) -> None:
    with _raw(server) as connection:
        connection.sendall(REQUEST)
        lines = connection.makefile("rb").readlines()
    assert len(lines) == 1 and json.loads(lines[0]).keys() == {"status"}


def test_those_who_say_nothing_are_let_go_and_hold_up_nobody(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(_raw(server)) for _ in range(status.CLIENTS - 4)]
        began = time.monotonic()
        for _ in range(4):
            _ask(server)
        assert time.monotonic() - began < 1
        for connection in idle:
            assert connection.recv(1) == b""
        assert time.monotonic() - began < 2 * status.CLIENT_S


def test_too_many_at_once_are_turned_away_and_later_served(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(_raw(server)) for _ in range(status.CLIENTS)]
        with pytest.raises(UnusableError):
            _ask(server)
        assert asyncio.run(_join(server)) is None, "peers do not notice"
        del idle
    deadline = time.monotonic() + END_S
    while True:
        with contextlib.suppress(UnusableError):
            _ask(server)
            break
        assert time.monotonic() < deadline


def test_many_questions_leave_no_descriptor(serve: Serve) -> None:
    server = serve()

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{server.process.pid}/fd"))  # noqa: PTH208 (names are all that is wanted)

    before = descriptors()
    for _ in range(50):
        _ask(server)
        with _raw(server) as connection:
            connection.sendall(b"{")
    _until(lambda: descriptors() == before, "some are left")


def test_answer_that_is_none_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "7.sock"))
        listener.listen()

        def once(answer: bytes) -> str:
            def serve() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises(UnusableError) as caught:
                status.ask(folder, 7)
            thread.join()
            return str(caught.value)

        assert "not an answer" in once(b"hello\n")
        assert "not an answer" in once(b'{"status":{}}\n')
        assert "no such thing" in once(b'{"error":"no such thing"}\n')
        assert "hung up" in once(b"")
