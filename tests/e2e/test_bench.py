"""The benchmark can be believed: its load generator notices what goes wrong, and a run that is cut short says so.

`Faulty` is a small server that misbehaves on purpose, once in fifty messages.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.bench import peers
from tests.e2e.conftest import until

ROOT = Path(__file__).parent.parent.parent
EVERY = 50
MARK = "BENCH_RUN"  # a variable that what a run starts inherits
OPEN = ("--mode", "openloop", "--rate", "1000")
WINDOW = ("--mode", "relayN", "--window", "8")
FANOUT = ("--mode", "fanout", "--peers", "5")


class Faulty:
    """Relays as the protocol says, but for its one fault."""

    def __init__(self, fault: str) -> None:
        self._fault = fault
        self._rooms: dict[str, dict[str, asyncio.StreamWriter]] = {}
        self._count = 0
        self._held: dict[asyncio.StreamWriter, bytes] = {}

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await self._accept(reader, writer)
            while True:
                first, second = await reader.readexactly(2)
                assert second & 128, "frames of clients are masked"
                length = second & 127
                if length == 126:
                    length = int.from_bytes(await reader.readexactly(2), "big")
                mask, body = await reader.readexactly(4), await reader.readexactly(length)
                if first == 0x81:
                    self._receive(writer, bytes(byte ^ mask[at & 3] for at, byte in enumerate(body)))
        writer.close()

    @staticmethod
    async def _accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = b""
        while (line := await reader.readline()).strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"sec-websocket-key":
                key = value.strip()
        token = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        writer.write(b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
        writer.write(b"Sec-WebSocket-Accept: " + token + b"\r\n\r\n")

    def _receive(self, sender: asyncio.StreamWriter, data: bytes) -> None:
        message = json.loads(data)
        room = self._rooms.setdefault(message["room"], {})
        if message["type"] == "join":
            room[message["sender"]] = sender
            self._send(sender, b'{"type":"joined"}')
            return
        self._count += 1
        is_hit = self._count % EVERY == 0
        targets = [member for member in room.values() if member is not sender]
        if "recipient" in message:
            targets = [room[message["recipient"]]]
        if self._fault == "echo":
            targets.append(sender)
        for target in targets:
            self._relay(target, message, data, is_hit)

    def _relay(self, target: asyncio.StreamWriter, message: dict[str, Any], data: bytes, is_hit: bool) -> None:  # noqa: FBT001 # one caller
        if self._fault == "reencode":
            data = json.dumps(dict(reversed(message.items()))).encode()
        if not is_hit or self._fault in ("none", "echo", "reencode"):
            self._send(target, data)
            if held := self._held.pop(target, None):
                self._send(target, held)
        elif self._fault == "duplicate":
            self._send(target, data)
            self._send(target, data)
        elif self._fault == "corrupt":
            self._send(target, data.replace(b"candidate:", b"cXndidate:", 1))
        elif self._fault == "misroute":
            self._send(next(iter(next(iter(self._rooms.values())).values())), data)
        elif self._fault == "reorder":
            self._held[target] = data
        else:
            assert self._fault == "lose"

    @staticmethod
    def _send(target: asyncio.StreamWriter, data: bytes) -> None:
        size = len(data)
        head = bytes([0x81, size]) if size < 126 else bytes([0x81, 126]) + size.to_bytes(2, "big")
        target.write(head + data)


@pytest.fixture(scope="module")
def sigload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peers.compiled(peers.HERE / "sigload.c", tmp_path_factory.mktemp("sigload"))


async def load(program: Path, fault: str, *options: str) -> dict[str, Any]:
    """What sigload reports of a server with this fault."""
    server = await asyncio.start_server(Faulty(fault).handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    command = [
        str(program),
        "--port",
        str(port),
        "--rooms",
        "4",
        "--duration",
        "0.4",
        "--warmup",
        "0.1",
        "--drain",
        "0.4",
    ]
    process = await asyncio.create_subprocess_exec(*command, *options, stdout=subprocess.PIPE)
    try:
        said, _ = await asyncio.wait_for(process.communicate(), 30)
    finally:
        server.close()
    report: dict[str, Any] = json.loads(said.splitlines()[-1])
    assert (process.returncode == 0) == report["ok"]
    return report


FAULTLESS = {"lost": 0, "dup": 0, "reordered": 0, "misrouted": 0, "corrupt": 0, "errors": 0}


@pytest.mark.parametrize("options", [WINDOW, FANOUT, OPEN, ("--mode", "relay1", "--payload", "2500")])
async def test_server_without_faults_has_none(sigload: Path, options: tuple[str, ...]) -> None:
    report = await load(sigload, "none", *options)
    assert report["ok"] and report["delivered"] > 100 and report["reencoded"] == 0
    assert FAULTLESS.items() <= report.items()


async def test_message_that_was_written_anew_is_no_fault(sigload: Path) -> None:
    report = await load(sigload, "reencode", *WINDOW)
    assert report["ok"] and report["verbatim"] == 0 and report["reencoded"] > 100


@pytest.mark.parametrize(
    ("fault", "options", "noticed"),
    [
        ("lose", OPEN, "lost"),
        ("lose", FANOUT, "lost"),
        ("duplicate", OPEN, "dup"),
        ("duplicate", FANOUT, "dup"),
        ("reorder", WINDOW, "reordered"),
        ("misroute", OPEN, "misrouted"),
        ("echo", FANOUT, "misrouted"),
        ("corrupt", OPEN, "corrupt"),
    ],
)
async def test_fault_is_noticed_and_called_by_its_name(
    sigload: Path, fault: str, options: tuple[str, ...], noticed: str
) -> None:
    report = await load(sigload, fault, *options)
    assert report[noticed] > 3, report
    assert not report["ok"] or noticed == "reordered"
    others = {"lost", "dup", "reordered", "misrouted", "corrupt"} - {noticed}
    if fault in ("misroute", "corrupt", "reorder"):
        others.discard("lost")  # who should have had it never got it as it was, or the last one is still held
    assert not any(report[name] for name in others), report


# ---- the run


def run(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "loadtest.bench.run", "--out", str(out), "--seconds", "0.2", *options]


def test_run_leaves_figures_and_a_page(tmp_path: Path) -> None:
    command = run(tmp_path, "--peers", "fastsig", "--tests", "relayN-200,idle", "--connections", "20")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert record["meta"]["state"] == "complete"
    relay, idle = record["cells"]
    assert relay["per_s"] > 1000 and relay["us_per_unit"] > 0 and not relay["faults"]
    assert idle["connections"] == 20 and not idle["faults"]
    assert "quick run" in (tmp_path / "benchmarks.md").read_text(encoding="utf-8")


def started_by(mark: str) -> list[int]:
    """The processes that have this mark from who started them."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it went, or is not ours
            if f"{MARK}={mark}".encode() in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found


@pytest.fixture
def long_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = run(tmp_path, "--peers", "fastsig", "--tests", "relayN-200", "--rounds", "1000")
    marked = os.environ | {MARK: str(tmp_path)}
    command = ["env", "--default-signal=INT", *command]  # who runs the tests in the background has it ignored
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=marked) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_keeps_what_it_has_and_says_that_it_is_partial(
    tmp_path: Path, long_run: subprocess.Popen[str], number: signal.Signals
) -> None:
    assert long_run.stdout
    while not long_run.stdout.readline().startswith("[1]"):
        assert long_run.poll() is None
    assert long_run.pid in started_by(str(tmp_path))
    os.kill(long_run.pid, number)
    assert long_run.wait(20) == 130
    until(lambda: not started_by(str(tmp_path)), "the run left processes behind")
    record = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert record["meta"]["state"] == "interrupted"
    assert record["cells"][0]["per_s"] > 0
    assert "**Partial**" in (tmp_path / "benchmarks.md").read_text(encoding="utf-8")


def test_server_that_does_not_start_is_a_failed_cell_and_the_others_go_on(tmp_path: Path) -> None:
    command = run(tmp_path, "--peer", "broken=false {port}", "--peers", "broken,fastsig", "--tests", "relayN-200")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    cells = {cell["peer"]: cell for cell in json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["cells"]}
    assert "ended with 1 before it served" in cells["broken"]["failed"]
    assert cells["fastsig"]["per_s"] > 1000
