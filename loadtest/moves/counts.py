"""What a server counts about its moves, how long they took, and the CPU time that its workers used."""

import asyncio
import time
import urllib.request
from dataclasses import astuple, dataclass
from typing import Final, Self

from prometheus_client.parser import text_string_to_metric_families

from fastsig import status
from tests.e2e.conftest import Server

RESULTS: Final = ("moved", "refused", "taken_back", "unfit")
_SCHEDULED: Final = 2  # CPUCLOCK_SCHED of the kernel: what all threads of a process have run, in ns


@dataclass(frozen=True)
class Moves:
    """By result, of all workers together. What is not counted at all is 0: that server moves nothing."""

    moved: int = 0
    refused: int = 0
    taken_back: int = 0
    unfit: int = 0

    def __sub__(self, other: Self) -> "Moves":
        return Moves(*(now - before for now, before in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in vars(self).items())


def read_moves(server: Server) -> Moves:
    """So far."""
    counters = [worker.counters for worker in status.ask(server.runtime_dir, server.port).workers]
    return Moves(**{name: sum(own.get(f'moves_total{{result="{name}"}}', 0) for own in counters) for name in RESULTS})


def read_gauge(server: Server, name: str) -> int:
    """Of all workers together."""
    return sum(worker.counters[name] for worker in status.ask(server.runtime_dir, server.port).workers)


def worker_pids(server: Server) -> list[int]:
    """Of those that run, by slot."""
    workers = status.ask(server.runtime_dir, server.port).workers
    return [worker.pid for worker in workers if worker.pid is not None]


def cpu_ns(pids: list[int]) -> int:
    """CPU time of these processes; /proc has it in steps of 10 ms only."""
    return sum(time.clock_gettime_ns(~pid << 3 | _SCHEDULED) for pid in pids)


# ---- how long moves took


class Seconds(dict[float, int]):
    """The histogram `fastsig_move_seconds`: how many took up to each bound, cumulative, as Prometheus has it."""

    def since(self, before: "Seconds") -> "Seconds":
        return Seconds({bound: count - before.get(bound, 0) for bound, count in self.items()})

    def quantile_ms(self, share: float) -> float | None:
        """As Prometheus does it: linear within a bucket. None when nothing was counted, inf above the last bound."""
        total = max(self.values(), default=0)
        lower, below = 0.0, 0
        for bound, count in sorted(self.items()):
            if total and count >= share * total:
                inside = (share * total - below) / (count - below) if count > below else 1.0
                return round(1000 * (lower + (bound - lower) * inside), 3)
            lower, below = bound, count
        return None


def read_seconds(ops_port: int) -> Seconds:
    """So far, over all workers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{ops_port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    families = [family for family in text_string_to_metric_families(text) if family.name == "fastsig_move_seconds"]
    samples = [sample for family in families for sample in family.samples if sample.name.endswith("_bucket")]
    return Seconds({float(sample.labels["le"]): int(sample.value) for sample in samples})


async def moves_of(server: Server) -> Moves:
    """`read_moves` beside a loop that runs."""
    return await asyncio.to_thread(read_moves, server)
