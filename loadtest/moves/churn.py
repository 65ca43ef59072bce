"""Does anything grow with the number of moves, and does a connection that was moved hold more than one that was not?

Visitors connect, join a room of their own in-band, leave it and close, many at once. After each batch all have gone,
and the server is looked at *at rest*: resident memory, descriptors and tables of every worker. What grows with moves
shows as a slope of the second half; an object of 48 bytes that each move leaves behind is 47 KiB per 1,000 moves.

Then a server with idle connections that were all moved, and another with as many that named their room in the URL.
"""

import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from loadtest.faults import QUIET_S, Report, _descriptors_at_rest, _is_empty_again, _open_of, _running, _until
from loadtest.hostile.offender import Offender
from loadtest.hostile.scene import resident
from tests.e2e.conftest import Server, free_port
from tests.e2e.swarm import Client, RefusedError, Swarm
from tests.unit.memory import HEAD

from .counts import moves_of, read_gauge, read_moves, worker_pids

KIB: Final = 1024
SLOPE_KIB: Final = 16.0  # per 1,000 moves, of all workers together: less than any object
RATIO: Final = 1.1
BATCHES: Final = 24  # of the whole churn
LEAST_SAMPLES: Final = 6
TABLE: Final = 5  # entries: somebody may have left a moment ago
FILL: Final = 1000  # connections that use up what a worker has free, before memory is compared
SETTLE_S: Final = 1.0  # for the collector, which works when nothing else does
PER_ROOM: Final = 2


@dataclass(frozen=True)
class Sample:
    """At rest. Each by slot: `memory` in bytes, `tables` by name."""

    moves: int
    memory: tuple[int, ...]
    descriptors: tuple[int, ...]
    tables: tuple[dict[str, int], ...]


async def churn(
    workers: int = 4, moves: int = 20_000, *, at_once: int = 32, idle: int = 2000, slope_kib: float = SLOPE_KIB
) -> Report:
    """Until so many were moved. `idle`: connections for the memory of one; 0: that is left out."""
    report = Report("churn", workers)
    samples = await _come_and_go(report, moves, at_once)
    judge(report, samples, slope_kib)
    if idle:
        await _compare(report, idle)
    return report


# ---- many who come and go


async def _come_and_go(report: Report, moves: int, at_once: int) -> list[Sample]:
    ops_port = free_port()
    samples: list[Sample] = []
    async with _running(report, "--ops.port", str(ops_port)) as server:
        before = await _descriptors_at_rest(server)
        swarm = Swarm(server.url)
        began, visits, moved = time.monotonic(), 0, 0
        batch = -(-moves * 4 // 3 // BATCHES)
        while moved < moves:
            await _batch(swarm, at_once, range(visits, visits + batch))
            visits += batch
            report.expect(await _until(lambda: not read_gauge(server, "connections"), QUIET_S), "somebody stays")
            now = (await moves_of(server)).moved
            if now - moved < batch / 4 or swarm.violations:
                report.failures.append(f"of {batch} visits {now - moved} were moved")
                break
            moved = now
            await asyncio.sleep(SETTLE_S)
            samples.append(await asyncio.to_thread(_look, server, ops_port, moved))
        report.figures |= {
            "visits": visits,
            "results": str(await moves_of(server)),
            "seconds": round(time.monotonic() - began, 1),
        }
        report.take(swarm)
        await _is_empty_again(report, server, before)
    return samples


async def _batch(swarm: Swarm, at_once: int, numbers: range) -> None:
    waiting = iter(numbers)

    async def visit_some() -> None:
        for number in waiting:
            await _visit(Client(swarm, f"visitor-{number}"), f"churn-{number}")

    await asyncio.gather(*(visit_some() for _ in range(at_once)))


async def _visit(client: Client, room: str) -> None:
    try:
        await client.connect()
        await client.join(room)
        await client.leave(room)
        await client.close()
    except (OSError, RefusedError) as reason:
        client.swarm.violation(f"{client.name}: {reason!r}")


def _look(server: Server, ops_port: int, moves: int) -> Sample:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{ops_port}/debug/stats", timeout=5) as answer:
        stats: dict[str, Any] = json.loads(answer.read())
    pids = worker_pids(server)
    tables = tuple(
        {name: count for name, count in worker["stats"].items() if not name.endswith("_bytes")}
        for worker in stats["workers"]
    )
    return Sample(moves, tuple(map(resident, pids)), tuple(map(_open_of, pids)), tables)


# ---- what grows


class Line(NamedTuple):
    """Least squares: `slope` is the rise of y per unit of x."""

    slope: float
    start: float


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - middle_x) ** 2 for x in xs)
    slope = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True)) / spread
    return Line(slope, middle_y - slope * middle_x)


def judge(report: Report, samples: Sequence[Sample], slope_kib: float) -> None:
    """The second half of the samples: the first fills what is made once, and kept."""
    half = samples[len(samples) // 2 :]
    if len(half) < LEAST_SAMPLES:
        report.failures.append(f"{len(half)} samples in the second half, {LEAST_SAMPLES} are needed")
        return
    thousands = [sample.moves / 1000 for sample in half]
    slopes = [
        fit(thousands, [sample.memory[slot] / KIB for sample in half]).slope for slot in range(len(half[0].memory))
    ]
    report.figures |= {
        "moves": half[-1].moves,
        "KiB per 1,000 moves, by worker": [round(slope, 1) for slope in slopes],
        "KiB per 1,000 moves, all": round(sum(slopes), 1),
        "MiB by worker": [round(memory / KIB**2, 1) for memory in half[-1].memory],
        "descriptors": f"{half[0].descriptors} → {half[-1].descriptors}",
    }
    report.expect(sum(slopes) <= slope_kib, f"memory grows by {sum(slopes):.1f} KiB per 1,000 moves")
    report.expect(half[0].descriptors == half[-1].descriptors, "descriptors are not as many as they were")
    for slot, (first, last) in enumerate(zip(half[0].tables, half[-1].tables, strict=True)):
        grown = {name: f"{first.get(name, 0)} → {n}" for name, n in last.items() if n > first.get(name, 0) + TABLE}
        report.expect(not grown, f"tables of slot {slot} grow: {grown}")


# ---- what one holds


async def _compare(report: Report, idle: int) -> None:
    """Resident memory of all workers for one idle connection; the rest of both servers is the same."""
    held = {}
    for name in ("moved", "at home"):
        async with _running(report) as server:
            before = await _descriptors_at_rest(server)
            held[name] = await asyncio.to_thread(_memory_of_one, server, idle, is_moved=name == "moved")
            await _is_empty_again(report, server, before)
    report.figures |= {f"KiB of an idle connection, {name}": round(each / KIB, 2) for name, each in held.items()}
    ratio = held["moved"] / held["at home"]
    report.figures["ratio"] = round(ratio, 3)
    report.expect(ratio <= RATIO, f"a moved connection holds {ratio:.2f} × what one at home does")


def _memory_of_one(server: Server, idle: int, *, is_moved: bool) -> float:
    """Bytes."""
    with ExitStack() as stack:
        _open(server, FILL, stack, "fill", is_moved=is_moved)
        _at_rest(server, FILL)
        before = sum(map(resident, worker_pids(server)))
        _open(server, idle, stack, "idle", is_moved=is_moved)
        _at_rest(server, FILL + idle)
        return (sum(map(resident, worker_pids(server))) - before) / idle


def _open(server: Server, count: int, stack: ExitStack, name: str, *, is_moved: bool) -> None:
    """So many connections, in rooms of PER_ROOM. `is_moved`: of those that join in-band only such that were moved."""
    moved = read_moves(server).moved
    for number in range(count):
        room = f"{name}-{number // PER_ROOM}"
        if not is_moved:
            _join(stack.enter_context(Offender(server.port, is_shaken=False)), room, number, f"/ws?room={room}")
            continue
        for _ in range(100):  # the kernel chooses where a connection lands: one in four is at home there
            one = Offender(server.port, is_shaken=False)
            _join(one, room, number, "/ws")
            is_one_more = (now := read_moves(server).moved) > moved
            moved = now
            if is_one_more:
                stack.enter_context(one)
                break
            one.say(type="leave", room=room)
            one.hear_until(lambda word, _: word == "left")
            one.socket.close()
        else:
            raise AssertionError("nothing is moved")


def _join(one: Offender, room: str, number: int, target: str) -> None:
    one.send(HEAD.format(target=target).encode())
    head = one.read_head()
    assert head.startswith(b"HTTP/1.1 101 "), head
    one.join(room, f"member-{number}")


def _at_rest(server: Server, connections: int) -> None:
    """All who went have gone, and garbage is collected."""
    deadline = time.monotonic() + QUIET_S
    while (now := read_gauge(server, "connections")) != connections:
        assert time.monotonic() < deadline, f"{now} connections, not {connections}"
        time.sleep(0.05)
    time.sleep(SETTLE_S)
