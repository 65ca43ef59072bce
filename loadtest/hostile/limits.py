"""What limits are for: each offence on a server of its own, whose options have that limit bite, from another address.

The healthy pair has 127.0.0.1, the offender `OFFENDER`: limits per address tell the two apart as they would elsewhere.
"""

import errno
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.e2e.conftest import Server
from tests.unit.memory import HEAD

from .pair import Trips
from .scene import MIB, Scene, cpu_s, until

OFFENDER: Final = "127.0.0.2"
ALONE_S: Final = 3.0  # the pair, before
FLOOD_S: Final = 3.0
FLOOD_PER_S: Final = 10_000
CONNECTIONS: Final = 1000  # limits.connections_per_address
BEYOND: Final = 500
STEP_S: Final = 0.0005
SAMPLE_S: Final = 0.05
_REQUEST: Final = HEAD.format(target="/ws").encode()
_RESET: Final = struct.pack("ii", 1, 0)


@dataclass
class Use:
    """What the worker has: resident bytes and descriptors, in the order in which they were looked at."""

    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def look(self, scene: Scene) -> None:
        self.memory.append(scene.memory())
        self.descriptors.append(scene.descriptors())


@dataclass(frozen=True)
class Held:
    """An offence, and what it cost: `use` begins before it, ends after it, and has the most it was in between."""

    offence: str
    gets: str
    alone: Trips
    beside: Trips
    use: Use
    took_s: float

    def row(self) -> str:
        memory = [self.use.memory[0], max(self.use.memory), self.use.memory[-1]]
        descriptors = [self.use.descriptors[0], max(self.use.descriptors), self.use.descriptors[-1]]
        return (
            f"| {self.offence} | {self.gets} | {self.alone.p99_ms:.1f} | {self.beside.p99_ms:.1f}"
            f" | {self.beside.worst_ms:.1f} | {' / '.join(f'{bytes_ / MIB:.1f}' for bytes_ in memory)}"
            f" | {' / '.join(map(str, descriptors))} | {self.took_s:.1f} |\n"
        )


COLUMNS: Final = """\
| offence | what the offender gets | p99 ms alone | beside | worst | RSS MiB before / most / after | descriptors | s |
|---|---|---:|---:|---:|---:|---:|---:|
"""


def commit(name: str, offence: Callable[[Scene], str], options: tuple[str, ...], alone_s: float = ALONE_S) -> Held:
    """One offence. Raises AssertionError where the offender got something else than it should."""
    with tempfile.TemporaryDirectory(prefix="fastsig-hostile-") as folder, ExitStack() as stack:
        server = Server(*options, cwd=Path(folder))
        stack.callback(server.stop)
        scene = Scene(server, is_long=True)
        stack.callback(scene.pair.close)
        time.sleep(alone_s)
        alone = scene.pair.ask()
        use = Use()
        use.look(scene)
        began = time.monotonic()
        with _looking(scene, use):
            gets = offence(scene)
        took_s = time.monotonic() - began
        beside = scene.pair.ask()
        scene.at_rest()
        use.look(scene)
    assert not [line for line in server.stderr_lines() if "internal_error" in line or "Traceback" in line]
    return Held(name, gets, alone, beside, use, took_s)


@contextmanager
def _looking(scene: Scene, use: Use) -> Iterator[None]:
    """Look at the worker all the time meanwhile."""
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(SAMPLE_S):
            use.look(scene)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _connect(scene: Scene) -> socket.socket | None:
    """From the offender's address; None when it is cut off before it is connected."""
    try:
        return socket.create_connection(("127.0.0.1", scene.port), 20, (OFFENDER, 0))
    except ConnectionResetError:
        return None


def _status(end: socket.socket | None) -> int:
    """Of the answer to a request for a WebSocket; 0: cut off. Takes no more than the head of it."""
    if end is None:
        return 0
    try:
        end.sendall(_REQUEST)
        answer = end.recv(4096)
    except (ConnectionResetError, BrokenPipeError):
        return 0
    return int(answer.split(b" ", 2)[1]) if answer else 0


def too_many_connections(scene: Scene) -> str:
    """One address holds all it may, and asks for more."""
    with ExitStack() as stack:
        statuses = []
        for _ in range(CONNECTIONS + BEYOND):
            end = _connect(scene)
            if end is not None:
                stack.enter_context(end)
            statuses.append(_status(end))
        assert statuses[:CONNECTIONS] == [101] * CONNECTIONS, "a place was refused that was free"
        assert 101 not in statuses[CONNECTIONS:], "more got in than may"
        told, cut_off = statuses.count(503), statuses.count(0)
        assert told + cut_off == BEYOND, statuses
        with socket.create_connection(("127.0.0.1", scene.port), 20, ("127.0.0.3", 0)) as other:
            assert _status(other) == 101, "another address is refused"
    return f"{CONNECTIONS:,} served; of {BEYOND} more {told} × 503 `limit_exceeded`, {cut_off} × RST; another served"


def connect_and_reset(scene: Scene) -> str:
    """Connections as fast as the clock says, each ended by RST at once."""
    worker = scene.worker
    used, began, count = cpu_s([worker]), time.monotonic(), 0
    while (passed := time.monotonic() - began) < FLOOD_S:
        for _ in range(max(0, int(passed * FLOOD_PER_S) - count)):
            _touch(scene.port)
            count += 1
        time.sleep(STEP_S)  # it is to take no more of this machine than it must: elsewhere it has its own
    per_s = count / FLOOD_S
    cpu = cpu_s([worker]) - used
    assert per_s > 0.5 * FLOOD_PER_S, f"only {per_s:.0f} connects/s: this machine is too slow, or too busy"
    hits = scene.counter('limit_hits_total{limit="connects_per_s_per_address",mode="enforced"}')
    until(lambda: scene.counter("connections") == 2, "somebody is left")
    refused = f"{hits:,} refused, nearly all by RST" if hits else "all accepted"
    return f"{per_s:,.0f}/s made; {refused}; {1e6 * cpu / count:.0f} µs of the worker's CPU each, the pair's in it"


def _touch(port: int) -> None:
    end = socket.socket()
    try:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.bind((OFFENDER, 0))
        end.connect(("127.0.0.1", port))
    except OSError as error:
        if error.errno not in {errno.ECONNRESET, errno.EADDRINUSE, errno.EADDRNOTAVAIL}:
            raise
    finally:
        end.close()


OFFENCES: Final[dict[str, tuple[Callable[[Scene], str], tuple[str, ...]]]] = {
    "one address beyond `connections_per_address`": (
        too_many_connections, ("--limits.connections-per-address", str(CONNECTIONS)),
    ),
    "10,000 connects/s with immediate RST": (connect_and_reset, ("--limits.connects-per-s-per-address", "20")),
    "the same without the limit, for comparison": (connect_and_reset, ()),
}  # fmt: skip
