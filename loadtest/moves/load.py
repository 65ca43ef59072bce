"""Thousands of connections that join in-band while others talk; and on an idle server the time and the CPU of a move.

Everybody checks what it hears (`peers`). How many connections land on the worker that owns their room is the kernel's
choice: of W workers one in W, so about (W - 1) / W of all are to be moved.

The CPU of a move is a difference: the same visits, one after the other, to a server that moves and to one that does
not, in turns. So it is what a move costs beyond the remote join that it stands for.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

from loadtest.faults import Report, _descriptors_at_rest, _is_empty_again, _latency, _running
from loadtest.hostile.offender import Offender
from tests.e2e.conftest import Server, free_port
from tests.e2e.swarm import Swarm, percentile
from tests.unit.memory import CLOSE, frame

from .counts import cpu_ns, moves_of, read_moves, read_seconds, worker_pids
from .peers import Meeting

LEAST_SHARE: Final = 0.8  # of the (W - 1) / W: under load some offers are refused or taken back
P99_MS: Final = 10.0  # on an otherwise idle machine
WORDS: Final = (0, 12)  # said right behind the join, at least and at most
_NORMAL: Final = frame(CLOSE, (1000).to_bytes(2))


async def load(  # noqa: PLR0913 # sizes
    workers: int = 4, clients: int = 10_000, *, at_once: int = 1000, rate: float = 250.0, pairs: int = 40,
    talk_rate: float = 400.0, stay_s: tuple[float, float] = (1.0, 4.0), joins: int = 500, rounds: int = 7,
    visits: int = 400, p99_ms: float = P99_MS,
) -> Report:  # fmt: skip
    """`rate`: connections a second. `talk_rate`: messages a second of the pairs. `joins`: one by one, timed; `visits`
    to either server in each of `rounds` rounds for the CPU time."""
    report = Report("load", workers)
    await _crowd(report, Crowd(clients, at_once, rate, stay_s, pairs, talk_rate))
    await _one_by_one(report, joins, p99_ms)
    await _cpu(report, rounds, visits)
    return report


# ---- many, under load


@dataclass(frozen=True)
class Crowd:
    """How many come, at most at once, at which rate, and for how long; and how many pairs talk meanwhile, how much."""

    clients: int
    at_once: int
    rate_per_s: float
    stay_s: tuple[float, float]
    pairs: int
    talk_rate_per_s: float


async def _crowd(report: Report, crowd: Crowd) -> None:
    """Meetings come, and go, while the pairs talk."""
    ops_port = free_port()
    async with _running(report, "--ops.port", str(ops_port)) as server:
        before = await _descriptors_at_rest(server)
        pairs, swarm = Swarm(server.url), Swarm(server.url)
        await pairs.grow({f"talker-{number}": [f"pair-{number // 2}"] for number in range(2 * crowd.pairs)})
        moves, seconds = await moves_of(server), await asyncio.to_thread(read_seconds, ops_port)
        began = time.monotonic()
        async with pairs.loaded(crowd.talk_rate_per_s):
            came = await _come(swarm, crowd)
        took_s = time.monotonic() - began
        moves = await moves_of(server) - moves
        seconds = (await asyncio.to_thread(read_seconds, ops_port)).since(seconds)
        await pairs.compare_rosters()
        swarm.judge()
        report.take(pairs)
        report.take(swarm)
        await pairs.close()
        await _is_empty_again(report, server, before)
    wanted = LEAST_SHARE * came * (1 - 1 / report.workers)
    report.expect(moves.moved >= wanted, f"{moves.moved} of {came} connections were moved, {wanted:.0f} at the least")
    report.figures |= {
        "connections": came,
        "seconds": round(took_s, 1),
        "results": str(moves),
        "moved": moves.moved,
        "move p50, p99 ms under load": (seconds.quantile_ms(0.5), seconds.quantile_ms(0.99)),
        "pairs meanwhile": _latency([sample.took_s for sample in pairs.samples]),
        "load's own lag ms": round(1000 * pairs.lag_s, 1),
    }


async def _come(swarm: Swarm, crowd: Crowd) -> int:
    """Meetings of two to four, until so many connections came; how many it were."""
    chance = random.Random(8)
    began, came, here = time.monotonic(), 0, 0

    async def meet(meeting: Meeting) -> None:
        nonlocal here
        try:
            await meeting.hold(chance.uniform(*crowd.stay_s))
        finally:
            here -= len(meeting.peers)

    async with asyncio.TaskGroup() as group:
        while came < crowd.clients:
            if here >= crowd.at_once or came > (time.monotonic() - began) * crowd.rate_per_s:
                await asyncio.sleep(0.005)
                continue
            meeting = Meeting(swarm, f"room-{came}", chance.randint(2, 4), chance.randint(*WORDS))
            came += len(meeting.peers)
            here += len(meeting.peers)
            group.create_task(meet(meeting))
    return came


# ---- one by one, on a server that idles


async def _one_by_one(report: Report, joins: int, p99_ms: float) -> None:
    """From the client's side: a join is written, `joined` is read."""
    ops_port = free_port()
    async with _running(report, "--ops.port", str(ops_port)) as server:
        moved, stayed = await asyncio.to_thread(_time_joins, server, joins)
        seconds = await asyncio.to_thread(read_seconds, ops_port)
    report.expect(bool(moved) and bool(stayed), f"of {joins} joins {len(moved)} moved, {len(stayed)} did not")
    for name, samples in (("moved", moved), ("not moved", stayed)):
        report.figures[f"join to joined, {name}"] = {"joins": len(samples)} | _latency(samples)
    report.figures["move p50, p99 ms, idle"] = (seconds.quantile_ms(0.5), seconds.quantile_ms(0.99))
    for name, found in (("the client", _ms(moved)), ("the server", seconds.quantile_ms(0.99))):
        report.expect(found is not None and found <= p99_ms, f"p99 of moves by {name}: {found} ms, not {p99_ms}")


def _ms(samples: list[float]) -> float | None:
    """Their p99."""
    found = percentile(samples, 0.99)
    return None if found is None else round(1000 * found, 2)


def _time_joins(server: Server, joins: int) -> tuple[list[float], list[float]]:
    """Seconds of each, of those that were moved and of the others."""
    found: tuple[list[float], list[float]] = ([], [])
    before = read_moves(server).moved
    for number in range(joins):
        took_s = _visit(server.port, f"timed-{number}")
        now = read_moves(server).moved
        found[now == before].append(took_s)
        before = now
    return found


def _visit(port: int, name: str) -> float:
    """Come, join a room of one's own, leave it and go; how long the join took, in seconds."""
    with Offender(port) as visitor:
        began = time.perf_counter()
        visitor.say(type="join", room=name, sender=name)
        word, _ = visitor.hear()
        took_s = time.perf_counter() - began
        assert word == "joined", word
        visitor.say(type="leave", room=name)
        assert visitor.hear()[0] == "left"
        visitor.send(_NORMAL)
        assert visitor.hear()[0] == "close 1000"
    return took_s


# ---- the CPU


async def _cpu(report: Report, rounds: int, visits: int) -> None:
    """In turns, so that a machine which becomes slower is so for both; medians of all rounds."""
    async with AsyncExitStack() as stack:
        moving = await stack.enter_async_context(_running(report))
        staying = await stack.enter_async_context(_running(report, "--server.moves=false"))
        measure: Callable[[Server, str], float] = lambda server, name: _visits_us(server, name, visits)  # noqa: E731
        for server in (moving, staying):
            await asyncio.to_thread(measure, server, "warm-up")
        before = await moves_of(moving)
        found: list[tuple[float, float]] = []
        for number in range(rounds):
            with_moves = await asyncio.to_thread(measure, moving, f"round-{number}")
            found.append((with_moves, await asyncio.to_thread(measure, staying, f"round-{number}")))
        moved = (await moves_of(moving) - before).moved
        report.expect((await moves_of(staying)).moved == 0, "moved, although server.moves is false")
    share = moved / (rounds * visits)
    report.expect(moved > 0, "nothing moved while the CPU was measured")
    moves_us, stays_us = (statistics.median(column) for column in zip(*found, strict=True))
    report.figures["CPU of a visit, µs"] = f"{moves_us:.0f} with moves, {stays_us:.0f} without"
    if share:
        each = sorted((one - other) / share for one, other in found)
        spread = f"{each[0]:.0f} to {each[-1]:.0f}"
        report.figures["CPU of a move, µs"] = f"{statistics.median(each):.0f} ({spread} in {rounds} rounds)"


def _visits_us(server: Server, name: str, visits: int) -> float:
    """CPU time of all workers for one visit, µs."""
    pids = worker_pids(server)
    before = cpu_ns(pids)
    for number in range(visits):
        _visit(server.port, f"{name}-{number}")
    return (cpu_ns(pids) - before) / 1000 / visits
