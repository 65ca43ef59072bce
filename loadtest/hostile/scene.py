"""A server with one worker, the healthy pair on it, and what was found while somebody offended.

An offence is a function of a `Scene` that says in words what the offender got; it raises AssertionError when that is
not what PROTOCOL says. `Scene.commit` does one and adds what the pair measured meanwhile, and the worker's memory.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastsig import status
from tests.e2e.conftest import Server, children

from .offender import Offender
from .pair import Pair, Trips

MIB: Final = 1 << 20
PAGE: Final = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Finding:
    """`rose_mib`: the worker's resident memory at the end, less that at the beginning."""

    offence: str
    gets: str
    trips: Trips
    rose_mib: float
    took_s: float


class Scene:
    """`is_long`: as the issue has it; else a part of it, for every run of the tests."""

    def __init__(self, server: Server, *, is_long: bool) -> None:
        self.server = server
        self.port = server.port
        self.is_long = is_long
        self.pair = Pair(server.port)
        self._alone = self.descriptors()

    @property
    def worker(self) -> int:
        """The pid of the only worker."""
        (pid,) = children(self.server.process.pid)
        return pid

    def memory(self) -> int:
        """Resident bytes of the worker."""
        return resident(self.worker)

    def counter(self, name: str) -> int:
        """A series of `metrics.summary`; 0 where nothing was counted yet."""
        (worker,) = status.ask(self.server.runtime_dir, self.port).workers
        return worker.counters.get(name, 0)

    def closed_with(self, code: int) -> int:
        """How many connections the server has closed with that code so far. One that reads nothing cannot say it."""
        (worker,) = status.ask(self.server.runtime_dir, self.port).workers
        series = (value for name, value in worker.counters.items() if f'code="{code}"' in name)
        return sum(series)

    def count(self, long: int, short: int) -> int:
        return long if self.is_long else short

    def commit(self, name: str, offence: "Callable[[Scene], str]", *, least_s: float = 0.0) -> Finding:
        """Again and again for at least so long, so that the pair has a chance to notice."""
        self.pair.ask()
        memory, began = self.memory(), time.monotonic()
        gets = offence(self)
        while time.monotonic() < began + least_s:
            gets = offence(self)
        took_s = time.monotonic() - began
        return Finding(name, gets, self.pair.ask(), (self.memory() - memory) / MIB, took_s)

    @contextmanager
    def crowd(self, count: int, *, room: str | None = None, receive_bytes: int = 0) -> Iterator[list[Offender]]:
        """So many connections, at rest; each in a room of its own, or all in one that is named."""
        crowd: list[Offender] = []
        try:
            for number in range(count):
                crowd.append(Offender(self.port, receive_bytes=receive_bytes))
                crowd[-1].join(room or f"own-{number}", f"crowd-{number}")
            yield crowd
        finally:
            for one in crowd:
                one.socket.close()
            self.at_rest()

    def at_rest(self) -> None:
        """Wait until the worker has seen that everybody but the pair is gone."""
        until(lambda: self.descriptors() <= self._alone, "connections are left open")

    def descriptors(self) -> int:
        """How many the worker has open."""
        return len(list(Path(f"/proc/{self.worker}/fd").iterdir()))


def until(is_so: Callable[[], bool], otherwise: str, within_s: float = 20.0) -> float:
    """Wait for a condition; how long it took. Raises AssertionError."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() < began + within_s, otherwise
        time.sleep(0.01)
    return time.monotonic() - began


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE


def cpu_s(pids: list[int]) -> float:
    """CPU time that these processes have used."""
    stats = (Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split() for pid in pids)
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / TICKS_PER_S
