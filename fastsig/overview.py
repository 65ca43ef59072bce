"""What the supervisor knows about its server, for those who ask: `fastsig status`, and the operations port.

It has no knowledge of its own: it reads what `fleet` decided, the shared map, and /proc; only `stats` asks the workers,
over the control channel, and waits for none that is silent.
Must not know: who asks, HTTP, how a worker is started. Read `supervisor` next, which makes one and keeps it true.
"""

import asyncio
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from . import __version__
from .fleet import Fleet
from .health import Health, Phase, State
from .metrics import NANO, Counters, index
from .processes import Worker
from .status import Descriptors, Process, Status, WorkerStatus, read_descriptors, read_process

ASK_S: Final = 1.0  # for a worker to say how it is


class Usage(Struct, frozen=True):
    """`exposition.Usage`."""

    cpu_seconds: float
    memory_bytes: int
    open_fds: int
    max_fds: float


class WorkerStats(Struct, frozen=True, omit_defaults=True):
    """One slot in /debug/stats. `silent_seconds`: for so long its worker said nothing, or was not ready.

    `stats`: what the worker says itself, `control.Inspected`; `error`: why it says nothing.
    """

    slot: int
    generation: int
    state: State
    silent_seconds: float
    loop_lag_seconds: float  # the worst of the last ten seconds
    pid: int | None = None
    usage: Usage | None = None
    stats: dict[str, int] | None = None
    error: str | None = None


class Stats(Struct, frozen=True):
    """All of /debug/stats. `tasks`, `usage`: of the supervisor. `started_at`: unix seconds."""

    version: str
    pid: int
    urls: Sequence[str]
    started_at: float
    usage: Usage | None
    tasks: int
    workers: list[WorkerStats]


class Overview:
    """The server as it is when asked. `turned_at`: when the supervisor's loop turned last, in monotonic seconds."""

    def __init__(
        self, fleet: Fleet, workers: Mapping[int, Worker], counters: Counters, slots: int, urls: Sequence[str]
    ) -> None:
        self.started_at: Final = time.time()
        self.turned_at = time.monotonic()
        self._fleet = fleet
        self._workers = workers
        self._counters = counters
        self._slots = range(slots)
        self._urls = urls

    def status(self) -> Status:
        """For `fastsig status`."""
        workers = [self._status_of(slot) for slot in self._slots]
        return Status(__version__, os.getpid(), list(self._urls), self.started_at, workers)

    def _status_of(self, slot: int) -> WorkerStatus:
        worker = self._workers.get(slot)
        pid = None if worker is None else worker.process.pid
        process = None if pid is None else read_process(pid)
        return WorkerStatus(slot, self._fleet.generation(slot), pid, process, self._counters.read(slot))

    def health(self) -> Health:
        phase: Phase = "serving" if self._fleet.has_served else "starting"
        if self._fleet.is_stopping:
            phase = "draining"
        return Health(time.monotonic() - self.turned_at, phase, [self._fleet.health(slot) for slot in self._slots])

    def words(self) -> list[list[int]]:
        """Of the shared map, by slot."""
        return [self._counters.words(slot) for slot in self._slots]

    def usage(self) -> Iterator[tuple[tuple[str, str], Usage]]:
        """Of each process that runs, by what it is: ("supervisor", ""), ("worker", "0"), …"""
        if (own := _usage(os.getpid())) is not None:
            yield ("supervisor", ""), own
        for slot, worker in sorted(self._workers.items()):
            if (used := _usage(worker.process.pid)) is not None:
                yield ("worker", str(slot)), used

    async def stats(self) -> bytes:
        """JSON of a `Stats`. Takes `ASK_S` when a worker is silent."""
        asked = {worker: worker.inspect() for worker in self._workers.values()}
        if asked:
            await asyncio.wait(asked.values(), timeout=ASK_S)
        workers = [self._stats_of(slot, asked) for slot in self._slots]
        tasks = len(asyncio.all_tasks())
        pid = os.getpid()
        return msgspec.json.encode(Stats(__version__, pid, self._urls, self.started_at, _usage(pid), tasks, workers))

    def _stats_of(self, slot: int, asked: "Mapping[Worker, asyncio.Future[dict[str, int]]]") -> WorkerStats:
        health = self._fleet.health(slot)
        lag_s = self._counters.words(slot)[_LAG] / NANO
        stats = WorkerStats(slot, self._fleet.generation(slot), health.state, round(health.silent_s, 3), lag_s)
        worker = self._workers.get(slot)
        if worker is None:
            return stats
        answer = asked.get(worker)
        has_answered = answer is not None and answer.done() and not answer.cancelled()
        return msgspec.structs.replace(
            stats,
            pid=worker.process.pid,
            usage=_usage(worker.process.pid),
            stats=answer.result() if answer is not None and has_answered else None,
            error=None if has_answered else f"no answer within {ASK_S:.0f} s",
        )


_LAG: Final = index("worker_loop_lag_seconds")


def _usage(pid: int) -> Usage | None:
    """None when it has gone."""
    process: Process | None = read_process(pid)
    held: Descriptors | None = read_descriptors(pid)
    if process is None or held is None:
        return None
    return Usage(process.cpu_seconds, process.memory_bytes, held.open, held.most)
