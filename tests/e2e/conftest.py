"""Real server processes: `serve(...)` starts one, `server` is one that tests may share.

No fixed sleeps: conditions with deadlines. Only processes that were started here are ended here.

A server has one worker, no operations port, and no limits per address, unless the test says otherwise. A module whose
`WORKERS` is EVERY_COUNT has its tests that take `server` run with each of these numbers of workers; with TLS among
them, also with two that speak TLS: `Server.dial` and `Server.trust` are for clients that are to work with both.

FASTSIG_PYTHON names another interpreter to run the server with: `make wheel` tests the installed wheel in this way.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trustme

from .issuer import Issuer, Webhook

START_S = 15.0
STOP_S = 10.0
TLS = "TLS"
EVERY_COUNT = (1, 2, 4)  # of workers: alone, the least that share rooms, more than the machine may have cores
PYTHON = os.environ.get("FASTSIG_PYTHON", sys.executable)
NODE = Path(__file__).parent / "node"
ONE_ADDRESS = {  # all clients of the tests have it
    "FASTSIG_LIMITS_CONNECTIONS_PER_ADDRESS": "0",
    "FASTSIG_LIMITS_CONNECTS_PER_S_PER_ADDRESS": "0",
}
NO_RATES = (  # for tests that say more than one peer may
    "--limits.messages-per-s", "0", "--limits.bytes-per-s", "0", "--limits.fanout-bytes-per-s", "0",
    "--limits.joins-per-s", "0",
)  # fmt: skip


def until(is_so: Callable[[], bool], what: str) -> None:
    """Wait for a condition; `what` went wrong when it does not come."""
    deadline = time.monotonic() + START_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def free_port() -> int:
    """One of loopback that nobody has, for options where 0 means none."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def children(pid: int) -> list[int]:
    """The processes that a process has started: a supervisor's workers."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def is_running(pid: int) -> bool:
    """A zombie is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter: it went between opening and reading
        return False
    return state != "Z"


def run_with(
    folder: Path, source: str, *, slots: int = 1, prepare: str = "", options: dict[str, Any] | None = None
) -> subprocess.Popen[str]:
    """A supervisor whose workers are this program; it finds `channel`, its first message `boot`, and `wait(kind)`.

    `prepare` is run in the supervisor's process before it starts.
    """
    head = """\
        import os, signal, socket, sys, time
        from fastsig.control import Channel, Drain, Failed, Hand, Handed, Heartbeat, Inspect, Inspected, Link, Ready
        from fastsig.control import Reload, Stop, Stopped, Unlinked
        end = socket.socket(fileno=int(sys.argv[1]))
        channel = Channel(end)
        boot = channel.receive()
        end.setblocking(True)
        def wait(kind):
            while not isinstance(message := channel.receive(), kind): pass
            return message
    """
    (folder / "odd_worker.py").write_text(textwrap.dedent(head) + textwrap.dedent(source), encoding="utf-8")
    values = {"server.port": 0, "ops.port": 0} | (options or {})
    program = (
        "import sys; from fastsig import config, fleet, supervisor\n"
        f"supervisor.slot_count = lambda config: {slots}; {prepare}\n"
        f"sys.exit(supervisor.run(config.build({values!r}), worker='odd_worker'))"
    )
    return subprocess.Popen(
        [PYTHON, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"},
        stderr=subprocess.PIPE,
        text=True,
    )


class Server:
    """One server: where it listens, what it logs, and its end. `prefix`: a command that runs the one behind it.

    `trust`: what its clients trust, if it speaks TLS.
    """

    def __init__(
        self,
        *args: str,
        env: dict[str, str] | None = None,
        cwd: Path,
        prefix: Sequence[str] = (),
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self.trust = trust
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTSIG_")}
        self.runtime_dir = cwd / "run"
        self.workers = int(args[args.index("--workers") + 1]) if "--workers" in args else 1
        self.process = subprocess.Popen(
            [*prefix, PYTHON, "-m", "fastsig", "serve", *args],
            env=clean
            | ONE_ADDRESS
            | {
                "FASTSIG_SERVER_PORT": "0",
                "FASTSIG_SERVER_WORKERS": "1",
                "FASTSIG_OPS_PORT": "0",
                "FASTSIG_SERVER_RUNTIME_DIR": str(cwd / "run"),
            }
            | (env or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()

    def stderr_lines(self) -> list[str]:
        with self._changed:
            return list(self._lines)

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The log so far, as objects; all of it or one kind of event."""
        found = [json.loads(line) for line in self.stderr_lines() if line.startswith("{")]
        return [event for event in found if name in (None, event.get("event"))]

    def wait_for(self, name: str, timeout_s: float = START_S) -> dict[str, Any]:
        """The first event of this name, waiting for it."""
        deadline = time.monotonic() + timeout_s
        while not (found := self.events(name)):
            with self._changed:
                self._changed.wait(0.05)
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = "\n".join(self.stderr_lines())
                pytest.fail(f"no event {name!r}; the server {self.process.poll()=} said:\n{log}")
        return found[0]

    @property
    def port(self) -> int:
        return int(self.wait_for("serving")["port"])

    @property
    def url(self) -> str:
        return f"{'wss' if self.trust else 'ws'}://127.0.0.1:{self.port}/ws"

    def dial(self, timeout_s: float) -> socket.socket:
        """A connection to it, with TLS if it speaks that."""
        end = socket.create_connection(("127.0.0.1", self.port), timeout_s)
        return self.trust.wrap_socket(end, server_hostname="127.0.0.1") if self.trust else end

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it; the exit code. After the deadline: by force, which is a failure of its own."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        self._reader.join(STOP_S)
        return code


@pytest.fixture(scope="session", autouse=True)
def _many_files() -> None:
    """Five hundred sockets on either side need more than the usual 1,024 descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server with these arguments; it listens when this returns."""
    with contextlib.ExitStack() as stack:

        def start(*args: str, env: dict[str, str] | None = None, trust: ssl.SSLContext | None = None) -> Server:
            server = Server(*args, env=env, cwd=tmp_path, trust=trust)
            stack.callback(server.stop)
            server.wait_for("serving")
            return server

        yield start


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    """A webhook that allows everything until it is told otherwise."""
    with Webhook() as one:
        yield one


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """An issuer of tokens with one key."""
    with Issuer() as one:
        yield one


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    counts = getattr(metafunc.module, "WORKERS", (1,))
    if "server" in metafunc.fixturenames and counts != (1,):
        ids = [count if count == TLS else f"{count} workers" if count > 1 else "1 worker" for count in counts]
        metafunc.parametrize("server", counts, indirect=True, ids=ids, scope="session")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with no options, for tests that need nothing else. Rooms are their own by the fixture `room`."""
    folder = tmp_path_factory.mktemp("server")
    count = getattr(request, "param", 1)
    if count == TLS:
        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        shared = Server("--workers", "2", *certified(authority, folder), cwd=folder, trust=trusting(authority))
    else:
        shared = Server("--workers", str(count), cwd=folder)
    try:
        shared.wait_for("serving")
        yield shared
        assert shared.process.poll() is None, "the shared server did not live to the end"
    finally:
        assert shared.stop() == 0


def certified(authority: trustme.CA, folder: Path, name: str = "127.0.0.1") -> tuple[str, ...]:
    """Options of a server that speaks TLS, with a certificate for `name` in two files of this folder."""
    certificate = authority.issue_cert(name)
    chain, key = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(key)
    return "--server.tls-cert", str(chain), "--server.tls-key", str(key)


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """What a client brings that trusts this authority and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


@pytest.fixture
def room() -> str:
    return f"room-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def node() -> Path:
    """The folder with the node clients."""
    if not shutil.which("node") or not (NODE / "node_modules" / "ws").is_dir():
        pytest.skip("no node clients: apt-get install nodejs npm, then make test")
    return NODE
