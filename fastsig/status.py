"""Asking a running server how it is: a Unix socket in a folder of the user's own, named after the public port.

One request line, one answer line, both JSON: `{"command":"status"}` gives `{"status":{…}}`, anything else
`{"error":"…"}`; then the connection ends. The supervisor answers (`Service`), `fastsig status` asks (`ask`) and shows
(`table`). Who may ask is decided by the file system: the folder is 0700, the socket 0600, of one owner.

Invariants: nobody who connects holds up the server: requests, their number and the time for each are bounded, and an
answer is made in one go. A server whose folder cannot be used goes on without this; a socket that answers is never
taken away from the server behind it.
Must not know: what a worker does. The numbers come from `metrics` and the supervisor, the rest from /proc.
"""

import asyncio
import contextlib
import math
import os
import resource
import socket
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

REQUEST_BYTES: Final = 4096
ANSWER_BYTES: Final = 1 << 25  # 1,024 slots in which every series counts need half of it
CLIENTS: Final = 16  # at once; more are turned away
CLIENT_S: Final = 2.0  # for a client to ask and to read
ASK_S: Final = 3.0
CPU_SAMPLE_S: Final = 0.5  # between two looks at how much CPU time was used

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class UnusableError(Exception):
    """The socket cannot be had; the text says why."""


class Process(Struct, frozen=True):
    """What the kernel says about a process. `started_at`: unix seconds; memory is what is resident, shared or not."""

    started_at: float
    cpu_seconds: float
    memory_bytes: int


class WorkerStatus(Struct, frozen=True):
    """One slot. While no worker runs there, `pid` and `process` are null. `counters`: a `metrics.summary`."""

    slot: int
    generation: int
    pid: int | None
    process: Process | None
    counters: dict[str, int]
    cpu_percent: float | None = None  # of one core; filled in by who asks twice


class Status(Struct, frozen=True):
    """A server. `started_at`: unix seconds."""

    version: str
    pid: int
    urls: list[str]
    started_at: float
    workers: list[WorkerStatus]


class Request(Struct, frozen=True):
    command: str


class Answer(Struct, frozen=True, omit_defaults=True):
    """One of the two."""

    status: Status | None = None
    error: str | None = None


_REQUEST: Final = msgspec.json.Decoder(Request)
_ANSWER: Final = msgspec.json.Decoder(Answer)


# ---- where


def folder(configured: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the sockets of this user's servers are: `server.runtime_dir`, or what it is by default."""
    if configured:
        return Path(configured)
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if Path(runtime).is_absolute():  # the specification: all others are to be ignored
        return Path(runtime) / "fastsig"
    return Path(tempfile.gettempdir()) / f"fastsig-{os.geteuid()}"


def socket_path(directory: Path, port: int) -> Path:
    """The socket of the server that listens on `port`."""
    return directory / f"{port}.sock"


def check_folder(directory: Path) -> None:
    """Is it one that nobody else can put anything into? Raises UnusableError or OSError."""
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UnusableError(f"{directory} is not a folder")
    if found.st_uid != os.geteuid():
        raise UnusableError(f"{directory} belongs to another user (uid {found.st_uid})")
    if found.st_mode & 0o077:
        raise UnusableError(f"{directory} is open to others (mode {stat.S_IMODE(found.st_mode):04o}): chmod 700 it")


# ---- the server's side


class Service:
    """Answers on the socket while it is open. `report` makes the answer, at once and without I/O that waits."""

    def __init__(self, directory: Path, port: int, report: Callable[[], Status]) -> None:
        self.path = socket_path(directory, port)
        self._report = report
        self._clients = 0
        self._server: asyncio.Server | None = None
        self._inode = 0

    async def open(self) -> None:
        """Raises UnusableError, and has then left nothing behind but perhaps the folder."""
        try:
            with contextlib.suppress(FileExistsError):
                self.path.parent.mkdir(0o700)
            check_folder(self.path.parent)
            self._make_way()
            listener = self._listen()
        except (OSError, ValueError) as error:  # ValueError: no path is like this one
            raise UnusableError(f"{str(self.path)!r}: {getattr(error, 'strerror', None) or error}") from error
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=REQUEST_BYTES)

    def close(self) -> None:
        """Idempotent. The file goes, unless it is another server's by now."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        with contextlib.suppress(OSError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()

    def _make_way(self) -> None:
        """Remove the socket that a server left behind which was killed."""
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise UnusableError(f"{self.path} is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink()
                return
            except BlockingIOError:  # somebody is there, and busy
                pass
        raise UnusableError(f"{self.path} is in use by another server")

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        try:
            os.fchmod(listener.fileno(), 0o600)  # before `bind`: the file is never anything else
            listener.bind(str(self.path))
            listener.listen(CLIENTS)
            listener.setblocking(False)
            self._inode = self.path.lstat().st_ino
        except BaseException:
            listener.close()
            raise
        return listener

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            if self._clients <= CLIENTS:
                async with asyncio.timeout(CLIENT_S):
                    answer = self._answer(await reader.readline())
                    writer.transport.set_write_buffer_limits(0)  # so that `drain` waits for the last byte
                    writer.write(msgspec.json.encode(answer) + b"\n")
                    await writer.drain()
        except (OSError, ValueError, TimeoutError, asyncio.CancelledError):
            pass  # gone, a line that is too long, too slow; or the server ends
        finally:
            self._clients -= 1
            writer.transport.abort()

    def _answer(self, line: bytes) -> Answer:
        try:
            request = _REQUEST.decode(line)
        except msgspec.DecodeError:
            return Answer(error="not a request")
        if request.command == "status":
            return Answer(status=self._report())
        return Answer(error="unknown command")


# ---- what the kernel knows


def read_process(pid: int, proc: Path = Path("/proc")) -> Process | None:
    """None when it has gone."""
    try:
        stat_text = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        statm_text = (proc / str(pid) / "statm").read_text(encoding="ascii")
    except OSError:
        return None
    return parse_process(stat_text, statm_text, time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))


def parse_process(stat_text: str, statm_text: str, booted_at: float) -> Process:
    """From the text of /proc/PID/stat (proc(5): fields 14, 15, 22) and statm (field 2)."""
    fields = stat_text.rpartition(")")[2].split()  # the name before may hold spaces and parentheses; field 3 is first
    return Process(
        started_at=round(booted_at + int(fields[19]) / _TICKS_PER_S, 2),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
        memory_bytes=int(statm_text.split()[1]) * _PAGE_BYTES,
    )


class Descriptors(NamedTuple):
    """How many a process has open, and how many it may have."""

    open: int
    most: float


def read_descriptors(pid: int) -> Descriptors | None:
    """None when it has gone, or belongs to another user."""
    held = f"/proc/{pid}/fd"
    try:
        count = os.stat(held).st_size or len(os.listdir(held))  # noqa: PTH116, PTH208 # Linux 6.2 counts them itself
        most = resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
    except OSError:
        return None
    return Descriptors(count, math.inf if most == resource.RLIM_INFINITY else most)


# ---- the asking side


def ask(directory: Path, port: int) -> Status:
    """What the server says. Raises UnusableError: there is none, or it does not answer as it should."""
    path = socket_path(directory, port)
    try:
        _check_owner(directory)
        text = _exchange(path, b'{"command":"status"}\n')
        if not text:
            raise UnusableError(f"{path}: the server hung up: too many ask at once")
        answer = _ANSWER.decode(text)
    except FileNotFoundError:
        raise UnusableError(f"no server on port {port} ({path} does not exist){_others(directory)}") from None
    except ConnectionRefusedError:
        raise UnusableError(f"no server on port {port} ({path} was left behind){_others(directory)}") from None
    except TimeoutError:
        raise UnusableError(f"{path}: no answer within {ASK_S:.0f} s") from None
    except OSError as error:
        raise UnusableError(f"{path}: {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise UnusableError(f"{path}: not an answer: is the server of another version?") from error
    if answer.status is None:
        raise UnusableError(f"{path}: the server answered: {answer.error}")
    return answer.status


def ask_twice(directory: Path, port: int) -> Status:
    """As `ask`, and how much CPU each worker uses in between."""
    before = ask(directory, port)
    began = time.monotonic()
    time.sleep(CPU_SAMPLE_S)
    after = ask(directory, port)
    return with_cpu(before, after, time.monotonic() - began)


def with_cpu(before: Status, after: Status, seconds: float) -> Status:
    """`after`, with `cpu_percent` wherever the same process was there `seconds` ago."""
    used = {worker.pid: worker.process.cpu_seconds for worker in before.workers if worker.process is not None}
    workers = [
        worker
        if worker.process is None or worker.pid not in used
        else msgspec.structs.replace(
            worker, cpu_percent=round(100 * (worker.process.cpu_seconds - used[worker.pid]) / seconds, 1)
        )
        for worker in after.workers
    ]
    return msgspec.structs.replace(after, workers=workers)


def _check_owner(directory: Path) -> None:
    """Root may look at anybody's server; others would not know to whom they speak."""
    if os.geteuid() != 0:
        check_folder(directory)


def _exchange(path: Path, request: bytes) -> bytes:
    """One line there, one back. The time is for all of it."""
    deadline = time.monotonic() + ASK_S
    answer = bytearray()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ASK_S)
        connection.connect(str(path))
        connection.sendall(request)
        while not answer.endswith(b"\n") and len(answer) <= ANSWER_BYTES:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            if not (data := connection.recv(65536)):
                break
            answer += data
    return bytes(answer)


def _others(directory: Path) -> str:
    """A hint for those who gave another port, or none."""
    ports = sorted(int(path.stem) for path in directory.glob("*.sock") if path.stem.isdecimal())
    return f"; there are sockets of {', '.join(map(str, ports))}: give --port" if ports else ""


# ---- for people


_COLUMNS: Final = {
    "connections": "connections", "rooms": "rooms", "members": "members", "remote": "remote_members",
    "received": "received_messages_total", "sent": "sent_messages_total", "away": 'relays_total{route="to_owner"}',
    "passed": 'handshakes_total{result="passed"}', "errors": "errors_total", "restarts": "worker_restarts_total",
}  # fmt: skip
_BYTES: Final = {"MiB in": "received_bytes_total", "MiB out": "sent_bytes_total"}


def table(status: Status, now: float) -> str:
    """What `fastsig status` prints. `now`: unix seconds."""
    head = ["slot", "pid", "generation", "up since", *_COLUMNS, *_BYTES, "CPU %", "RSS MiB"]
    rows = [head, *(_row(worker) for worker in status.workers)]
    if len(status.workers) > 1:
        rows.append(["all", "", "", "", *_counted(_sum(worker.counters for worker in status.workers)), "", ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    first = f"fastsig {status.version}, pid {status.pid}, up {duration(now - status.started_at)}: "
    return "\n".join([first + " ".join(status.urls), *lines]) + "\n"


def _row(worker: WorkerStatus) -> list[str]:
    process = worker.process
    return [
        str(worker.slot),
        "-" if worker.pid is None else str(worker.pid),
        str(worker.generation),
        "-" if process is None else f"{datetime.fromtimestamp(process.started_at):%Y-%m-%d %H:%M:%S}",  # noqa: DTZ006 (local time)
        *_counted(worker.counters),
        "-" if worker.cpu_percent is None else f"{worker.cpu_percent:.1f}",
        "-" if process is None else _mebibytes(process.memory_bytes),
    ]


def _sum(all_counters: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counters in all_counters:
        total.update(counters)
    return total


def _counted(counters: dict[str, int]) -> list[str]:
    """A server of another version may not have all."""
    counts = [_count(counters, name) for name in _COLUMNS.values()]
    return counts + [_mebibytes(counters[name]) if name in counters else "-" for name in _BYTES.values()]


def _count(counters: dict[str, int], name: str) -> str:
    """A series that is 0 is left out of a `metrics.summary`."""
    return str(counters.get(name, 0 if name.partition("{")[0] in counters else "-"))


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.1f}"


def duration(seconds: float) -> str:
    """The two largest units: `3 d 4 h`, `2 min 5 s`."""
    left = max(int(seconds), 0)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        parts.append((count, unit))
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{count} {unit}" for count, unit in parts[:2])
