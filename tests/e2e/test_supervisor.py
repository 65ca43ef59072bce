"""What the supervisor promises about processes and ports. How a server ends is in `test_serve`."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

from fastsig import supervisor
from fastsig.errors import StartError
from tests.e2e.conftest import PYTHON, Server, children, run_with, until

Serve = Callable[..., Server]
END_S = 15.0


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (names are all that is wanted)


def _kill_worker(server: Server) -> None:
    """And wait for its successor."""
    ready = len(server.events("worker_ready"))
    (pid,) = children(server.process.pid)
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(server.events("worker_ready")) > ready, "no successor")


async def _says_pong(url: str) -> bool:
    async with asyncio.timeout(END_S), connect(url, proxy=None) as websocket:
        await websocket.send('{"type":"ping"}')
        return '"pong"' in str(await websocket.recv())


# ---- workers


async def test_killed_worker_is_replaced_and_the_port_serves_again(serve: Serve) -> None:
    server = serve()
    began = time.monotonic()
    await asyncio.to_thread(_kill_worker, server)
    assert time.monotonic() - began < 2
    assert await _says_pong(server.url)
    (death,) = server.events("worker_died")
    assert "SIGKILL" in death["reason"]


def test_worker_that_ends_by_a_signal_without_a_name_is_replaced(serve: Serve) -> None:
    server = serve()
    (pid,) = children(server.process.pid)
    os.kill(pid, 40)
    until(lambda: bool(server.events("worker_ready")), "no successor")
    (death,) = server.events("worker_died")
    assert "signal 40" in death["reason"]


async def test_connection_made_while_no_worker_runs_is_served_by_the_next(serve: Serve) -> None:
    server = serve()
    (pid,) = children(server.process.pid)
    os.kill(pid, signal.SIGKILL)
    assert await _says_pong(server.url)


def test_members_that_join_after_a_restart_are_newer_than_all_before(serve: Serve) -> None:
    """`n` has the generation in it, so it grows over the death of a worker."""

    async def ordinal() -> int:
        async with connect(server.url, proxy=None) as websocket:
            await websocket.send('{"type":"join","room":"r"}')
            found = re.search(r'"n":(\d+)', str(await websocket.recv()))
            assert found
            return int(found[1])

    server = serve()
    before = asyncio.run(ordinal())
    _kill_worker(server)
    assert asyncio.run(ordinal()) > before


def test_deaths_leave_neither_zombie_nor_descriptor(serve: Serve) -> None:
    server = serve()
    before = _descriptors(server.process.pid)
    for _ in range(3):
        _kill_worker(server)
    assert len(children(server.process.pid)) == 1
    assert _descriptors(server.process.pid) == before


def test_worker_has_only_the_descriptors_that_it_needs(serve: Serve) -> None:
    """Standard ones, listeners, its end of the control channel, and what its loop made: none of the supervisor's."""
    server = serve()
    (first,) = children(server.process.pid)
    held = _descriptors(first)
    _kill_worker(server)
    (second,) = children(server.process.pid)
    assert _descriptors(second) == held


def test_worker_is_out_of_reach_of_the_terminal(serve: Serve) -> None:
    server = serve()
    (worker,) = children(server.process.pid)
    assert os.getsid(worker) == worker != os.getsid(server.process.pid)


def test_worker_that_does_not_stop_is_killed_when_forced(serve: Serve) -> None:
    server = serve()
    (worker,) = children(server.process.pid)
    os.kill(worker, signal.SIGSTOP)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("stopping")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(END_S) == 1
    until(lambda: bool(server.events("worker_killed")), "it was not said that the worker was killed")


# ---- other workers than ours


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("sys.exit(7)", "code 7"),
        ("channel.send(Failed('no such thing'))", "no such thing"),
        ("signal.raise_signal(signal.SIGKILL)", "SIGKILL"),
    ],
)
def test_worker_that_cannot_start_ends_the_launch_with_3_and_one_line(tmp_path: Path, source: str, reason: str) -> None:
    process = run_with(tmp_path, source)
    _, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 3
    (line,) = stderr.splitlines()
    assert '"cannot_start"' in line and reason in line


def test_worker_that_ends_badly_when_told_to_stop_spoils_the_exit_code(tmp_path: Path) -> None:
    process = run_with(tmp_path, "channel.send(Ready(1)); channel.receive(); sys.exit(4)")
    assert process.stderr is not None
    assert '"serving"' in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=END_S)
    assert process.returncode == 1


def test_worker_that_talks_nonsense_is_replaced(tmp_path: Path) -> None:
    process = run_with(
        tmp_path,
        """
        channel.send(Ready(1))
        if boot.generation == 1:
            end.send(b"nonsense")
        wait(Drain); channel.send(Stopped()); wait(Stop)
        """,
    )
    assert process.stderr is not None
    events: list[str] = []
    while not events or "worker_ready" not in events[-1]:
        events.append(process.stderr.readline())
        assert events[-1], events
    assert [event for event in events if "worker_unknown_message" in event]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=END_S)
    assert process.returncode == 0


def test_stop_during_the_start_is_clean(tmp_path: Path) -> None:
    process = run_with(
        tmp_path,
        """
        sys.stderr.write("booting\\n")
        wait(Drain); channel.send(Stopped()); wait(Stop)
        """,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "booting\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=END_S)
    assert process.returncode == 0


def test_modules_in_the_current_folder_are_not_ours(serve: Serve, tmp_path: Path) -> None:
    """`serve` runs in tmp_path. A stray file there must not become part of the server."""
    program = "import sys; from fastsig import config, supervisor; print(supervisor._command('fastsig.worker', 3))"
    found = subprocess.run([PYTHON, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "'-P'" in found.stdout


# ---- addresses


@contextlib.contextmanager
def _listening(host: str, port: int = 0) -> Iterator[list[tuple[str, int]]]:
    """Names and ports that `supervisor.listen` takes for one slot."""
    rows = supervisor.listen(host, port, 1, 16)
    try:
        yield [listener.getsockname()[:2] for listener in rows[0]]
    finally:
        supervisor._close(rows)


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("localhost", {"127.0.0.1", "::1"}),
        ("127.0.0.1", {"127.0.0.1"}),
        ("0.0.0.0", {"0.0.0.0"}),
        ("*", {"0.0.0.0", "::"}),
        ("::", {"0.0.0.0", "::"}),
        ("::1", {"::1"}),
        ("[::1]", {"::1"}),
    ],
)
def test_host_means_what_its_user_expects(host: str, addresses: set[str]) -> None:
    if not _has_ipv6():
        addresses = {address for address in addresses if ":" not in address}
        if not addresses:
            with pytest.raises(StartError, match="no address of this machine"):
                supervisor.listen(host, 0, 1, 16)
            return
    with _listening(host) as bound:
        assert {name for name, _ in bound} == addresses
        assert len({port for _, port in bound}) == 1, "all families have the same port"


def test_slots_share_the_port() -> None:
    rows = supervisor.listen("127.0.0.1", 0, 3, 16)
    try:
        assert len(rows) == 3
        assert len({listener.getsockname() for row in rows for listener in row}) == 1
    finally:
        supervisor._close(rows)


@pytest.mark.parametrize("other", ["0.0.0.0", "127.0.0.1"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "*", "0.0.0.0"])
def test_port_that_another_listener_of_ours_would_share_is_refused(host: str, other: str) -> None:
    with _listening(other) as [(_, port)], pytest.raises(StartError, match=f"{port} is in use.*--port"):
        supervisor.listen(host, port, 1, 16)


def test_refusal_leaves_nothing_open() -> None:
    before = _descriptors(os.getpid())
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StartError):
        supervisor.listen("*", taken.getsockname()[1], 2, 16)
    assert _descriptors(os.getpid()) == before


def test_port_whose_last_connection_has_just_ended_is_free() -> None:
    with _listening("127.0.0.1") as [(name, port)]:
        client = socket.create_connection((name, port))
    client.close()
    with _listening("127.0.0.1", port) as [(_, again)]:
        assert again == port


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 300, "256.1.1.1", "192.0.2.1", "a..b"])
def test_host_that_is_not_here_is_refused_in_one_line(host: str) -> None:
    with pytest.raises(StartError, match="--host") as refused:
        supervisor.listen(host, 0, 1, 16)
    assert len(str(refused.value).splitlines()) == 1


def test_machine_without_ipv6_serves_ipv4(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = socket.socket

    def without_ipv6(family: int, *rest: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return real(family, *rest)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    with _listening("localhost") as bound:
        assert [name for name, _ in bound] == ["127.0.0.1"]
    assert "address_skipped address=::1" in capsys.readouterr().err


def test_port_of_the_administrator_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", forbidden)
    with pytest.raises(StartError, match=r"127\.0\.0\.1:80 is not permitted.*--port"):
        supervisor.listen("127.0.0.1", 80, 1, 16)


@pytest.mark.parametrize(("host", "is_open"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_server_that_anybody_may_use_says_so(serve: Serve, host: str, *, is_open: bool) -> None:
    server = serve("--host", host)
    assert server.stop() == 0
    assert bool(server.events("open_mode")) is is_open
