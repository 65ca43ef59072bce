"""A server that is started as systemd starts it: a notification socket, and sockets that are open already."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from websockets.asyncio.client import connect, unix_connect
from websockets.exceptions import InvalidStatus

from fastsig.systemd import Notifier
from tests.e2e.conftest import PYTHON, Server, children, until

Serve = Callable[..., Server]
Launch = Callable[..., subprocess.Popen[str]]
END_S = 15.0
DEPLOY = Path(__file__).parents[2] / "deploy" / "systemd"


# ---- what it is told


class Manager:
    """The service manager's end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self._socket.settimeout(END_S)

    def hears(self, *, but: str = "WATCHDOG=1") -> list[str]:
        """The lines of the next message that is another than `but`."""
        while True:
            lines = self._socket.recv(4096).decode().splitlines()
            if lines != [but]:
                return lines

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@fastsig-test-{os.getpid()}-{time.monotonic_ns()}"
    with contextlib.closing(Manager(name)) as made:
        yield made


def test_manager_hears_of_start_reload_and_stop(serve: Serve, manager: Manager) -> None:
    server = serve(env={"NOTIFY_SOCKET": manager.name})
    ready, status = manager.hears()
    assert ready == "READY=1"
    assert re.fullmatch(r"STATUS=Serving 127\.0\.0\.1:\d+( \[::1\]:\d+)?", status)
    before_us = time.monotonic_ns() // 1000
    server.process.send_signal(signal.SIGHUP)
    reloading, at = manager.hears()
    assert reloading == "RELOADING=1"
    assert before_us <= int(at.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert manager.hears() == ["READY=1"]
    server.process.send_signal(signal.SIGTERM)
    assert manager.hears() == ["STOPPING=1", "STATUS=Draining", "EXTEND_TIMEOUT_USEC=35000000"]
    assert server.stop() == 0


def test_watchdog_is_kept_quiet(serve: Serve, tmp_path: Path) -> None:
    with contextlib.closing(Manager(str(tmp_path / "notify"))) as manager:
        began = time.monotonic()
        serve(env={"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "200000"})
        for _ in range(5):
            assert manager.hears(but="")  # others among them
        for _ in range(3):
            while manager.hears(but="") != ["WATCHDOG=1"]:
                pass
        assert time.monotonic() - began < 10


def test_manager_that_is_gone_costs_nothing(serve: Serve, tmp_path: Path) -> None:
    server = serve(env={"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "100000"})
    assert server.stop() == 0


def test_manager_that_reads_nothing_does_not_stop_us(tmp_path: Path) -> None:
    with contextlib.closing(Manager(str(tmp_path / "notify"))) as manager:
        notifier = Notifier({"NOTIFY_SOCKET": manager.name}, 1)
        began = time.monotonic()
        for _ in range(20):
            notifier.send("STATUS=" + "x" * 60_000)
        notifier.close()
        assert time.monotonic() - began < 6
        assert manager.hears()[0].startswith("STATUS=x")


# ---- what it is given


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start `fastsig serve` with this socket as descriptor 3, as systemd does."""
    with contextlib.ExitStack() as stack:

        def start(given: int, *, count: str = "1", code: str = "", workers: int = 1) -> subprocess.Popen[str]:
            program = (
                f"import os, sys; os.dup2({given}, 3, inheritable=True); {code or 'pass'}\n"
                f"os.environ |= {{'LISTEN_FDS': {count!r}, 'LISTEN_PID': str(os.getpid()), 'LISTEN_FDNAMES': 'x'}}\n"
                f"line = '-m fastsig serve --workers {workers} --ops.port 0'.split()\n"
                "line += '--port 1 --host 192.0.2.1'.split()  # two that do not count\n"
                "os.execv(sys.executable, [sys.executable, *line])"
            )
            process = subprocess.Popen(
                [PYTHON, "-c", program], pass_fds=[given], cwd=tmp_path, stderr=subprocess.PIPE, text=True
            )
            assert process.stderr is not None
            stack.callback(process.stderr.close)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield start


def _serving(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stderr is not None
    event: dict[str, object] = json.loads(process.stderr.readline())
    assert event["event"] == "serving", event
    return event


def _stop(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=END_S)
    assert process.returncode == 0, rest
    return rest


async def _says_pong(url: str) -> None:
    async with asyncio.timeout(END_S), connect(url, proxy=None) as websocket:
        await websocket.send('{"type":"ping"}')
        assert '"pong"' in str(await websocket.recv())


async def test_socket_that_is_given_is_served_and_stays_open(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = launch(listener.fileno())
        event = await asyncio.to_thread(_serving, process)
        assert (event["urls"], event["port"]) == ([f"ws://127.0.0.1:{port}/ws"], port)
        await _says_pong(f"ws://127.0.0.1:{port}/ws")
        (worker,) = children(process.pid)
        environ = await asyncio.to_thread(Path(f"/proc/{worker}/environ").read_bytes)
        assert b"PATH=" in environ and b"LISTEN_" not in environ
        os.kill(worker, signal.SIGKILL)
        await _says_pong(f"ws://127.0.0.1:{port}/ws")
        await asyncio.to_thread(_stop, process)
        with socket.create_connection(("127.0.0.1", port), END_S):
            pass  # it waits for the next start, as it should


async def test_socket_that_is_given_is_shared_by_all_workers(launch: Launch) -> None:
    """The end of one, for good or while the others drain, closes it to nobody."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}/ws"
        process = launch(listener.fileno(), workers=3)
        event = await asyncio.to_thread(_serving, process)
        assert (event["workers"], event["urls"]) == (3, [url])
        workers = children(process.pid)
        for worker in workers[:2]:
            os.kill(worker, signal.SIGSTOP)
        os.kill(workers[2], signal.SIGKILL)
        await _says_pong(url)  # of its successor: nobody else can
        assert set(workers[:2]) < set(children(process.pid))
        async with asyncio.timeout(END_S), connect(url, proxy=None) as one:
            await one.send('{"type":"hello"}')  # a room could belong to one that is stopped
            assert '"welcome"' in str(await one.recv())
            process.send_signal(signal.SIGTERM)
            assert '"go-away"' in str(await one.recv())
            os.kill(workers[0], signal.SIGKILL)
            await asyncio.to_thread(until, lambda: workers[0] not in children(process.pid), "it is not buried")
            with pytest.raises(InvalidStatus):  # 503: it is accepted, and answered, still
                await connect(url, proxy=None)
            os.kill(workers[1], signal.SIGCONT)
        _, stderr = await asyncio.to_thread(process.communicate, timeout=END_S)
        assert process.returncode == 1, "a worker was lost"
        assert '"worker_lost"' in stderr and '"internal_error"' not in stderr


async def test_unix_socket_that_is_given_is_served_and_not_removed(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        process = launch(listener.fileno())
        event = await asyncio.to_thread(_serving, process)
        assert (event["urls"], event["port"]) == ([f"unix:{path}"], None)
        async with asyncio.timeout(END_S), unix_connect(str(path), "ws://localhost/ws") as one:
            await one.send('{"type":"join","room":"r","sender":"a"}')
            assert '"joined"' in str(await one.recv())
            process.send_signal(signal.SIGTERM)
            assert '"go-away"' in str(await one.recv())
        assert "open_mode" not in await asyncio.to_thread(lambda: process.communicate(timeout=END_S)[1])
        assert process.returncode == 0
        assert path.is_socket()


def test_abstract_socket_is_named_by_an_at(launch: Launch) -> None:
    name = f"fastsig-test-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        process = launch(listener.fileno())
        assert _serving(process)["urls"] == [f"unix:@{name}"]
        _stop(process)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "descriptor 3, given by LISTEN_FDS, is no stream socket"),
        ("socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)", "is no stream socket"),
        ("socket.socket(socket.AF_INET)", "does not listen"),
        ("socket.socketpair()[0]", "does not listen"),
        ("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "is neither an internet nor a Unix socket"),
        ("open('/dev/null')", "is no socket"),
    ],
)
def test_descriptor_that_is_no_listening_socket_is_refused_in_one_line(launch: Launch, kind: str, says: str) -> None:
    process = launch(2, code=f"import socket; made = {kind}; os.dup2(made.fileno(), 3, inheritable=True)")
    _, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 3
    (line,) = stderr.splitlines()
    assert '"cannot_start"' in line and says in line


def test_more_descriptors_than_there_are_are_refused(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = launch(listener.fileno(), count="900")
        _, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 3
    (line,) = stderr.splitlines()
    assert "given by LISTEN_FDS, is no socket" in line


# ---- what is deployed


@pytest.mark.parametrize("unit", ["fastsig.service", "fastsig.socket"])
def test_units_say_what_the_server_relies_on(unit: str) -> None:
    lines = (DEPLOY / unit).read_text(encoding="utf-8").splitlines()
    needed = {
        "fastsig.service": ["Type=notify", "KillMode=mixed", "ExecReload=/bin/kill -HUP $MAINPID"],
        "fastsig.socket": ["ListenStream=127.0.0.1:8080", "ListenStream=[::1]:8080"],
    }
    assert not set(needed[unit]) - set(lines)
