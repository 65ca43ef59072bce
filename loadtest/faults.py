"""What breaks, and what may be noticed of it: `make faults` runs all of it, ARGS="kill --workers 2 --rounds 5" a part.

Each scenario starts a server of its own, puts a swarm of checking clients on it (`tests.e2e.swarm`), breaks something,
and reports figures, and failures in sentences. `tests/e2e/test_faults.py` runs the same scenarios, shorter.

Nothing is known here of where the server places connections and rooms. A connection was homed on the worker that died
if it dropped; a room was touched if one of its members was told `backend_unavailable`. Everything else must not have
noticed. Waiting is for conditions, with bounds; the only fixed times are those that belong to the scenario.
"""

import argparse
import asyncio
import contextlib
import inspect
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import uvloop

from fastsig import status
from fastsig.control import OVERTIME_S
from fastsig.metrics import IN_MAP
from tests.e2e.conftest import PYTHON, Server, children, is_running
from tests.e2e.swarm import Client, RefusedError, Swarm, percentile

AROUND_S: Final = 5.0  # the time around a fault whose latency is judged: half before it, half after
NOTICE_S: Final = 1.0  # for the others to hear `peer-left`, for a new connection to be served
GUESTS_EVERY_S: Final = 0.05
QUIET_S: Final = 10.0  # for the server to be as empty as it was
STUCK_S: Final = 10.0  # ARCHITECTURE §2: a worker that is stuck for so long is replaced
LATE: Final = {"watched_rooms", "worker_loop_lag_seconds", "tracked_addresses"}  # they show what was a while ago
GAUGES: Final = [family.name for family in IN_MAP if family.kind == "gauge" and family.name not in LATE]
FREE: Final = {
    f"FASTSIG_LIMITS_{name}": "0"
    for name in (
        "MESSAGES_PER_S", "MESSAGE_BURST", "BYTES_PER_S", "FANOUT_BYTES_PER_S", "JOINS_PER_S",
        "CONNECTIONS_PER_ADDRESS", "CONNECTS_PER_S_PER_ADDRESS", "CONNECTS_PER_S",
    )
}  # fmt: skip
FAULT: Final = "fastsig: fault at "  # what a worker of a debug build says before it kills itself, if it was asked to
DRAIN: Final = {"FASTSIG_SERVER_DRAIN_SECONDS": "2"}  # unless a scenario says otherwise: its end is short if it fails


@dataclass
class Report:
    """What a scenario found. `rounds`: the figures of each; failures in sentences: none is what is wanted."""

    scenario: str
    workers: int
    figures: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def expect(self, is_so: bool, otherwise: str) -> None:  # noqa: FBT001 # reads as an assertion
        if not is_so:
            self.failures.append(otherwise)

    def take(self, swarm: Swarm) -> None:
        """The violations that its clients saw."""
        self.failures += swarm.violations
        swarm.violations.clear()


# ---- the server


@contextlib.asynccontextmanager
async def _running(
    report: Report, *args: str, env: Mapping[str, str] = MappingProxyType({}), prefix: Sequence[str] = ()
) -> AsyncIterator[Server]:
    """A server without rate limits. At the end it is stopped, if it still runs, and nothing of it may be left."""
    with tempfile.TemporaryDirectory(prefix="fastsig-faults-") as folder:
        options = {**FREE, **DRAIN, **env}
        server = Server("--workers", str(report.workers), *args, env=options, cwd=Path(folder), prefix=prefix)
        try:
            await asyncio.to_thread(server.wait_for, "serving")
            yield server
        finally:
            if server.process.poll() is None:
                await asyncio.to_thread(server.stop, signal.SIGINT)
            await _nothing_left(report, server)
            _look_at_log(report, server)


async def _until(is_so: Callable[[], bool], within_s: float) -> bool:
    """Whether it came to be so in time."""
    deadline = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def _relatives(server: Server) -> list[int]:
    """The processes that run for this server, also those whose parent has gone: they share its folder's name."""
    mark = f"FASTSIG_SERVER_RUNTIME_DIR={server.runtime_dir}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return [pid for pid in found if is_running(pid)]


async def _nothing_left(report: Report, server: Server) -> None:
    report.expect(await _until(lambda: not _relatives(server), QUIET_S), "processes are left behind")
    for pid in _relatives(server):
        os.kill(pid, signal.SIGKILL)


def _look_at_log(report: Report, server: Server) -> None:
    for event in server.events("internal_error"):
        report.failures.append(f"a bug is logged: {str(event)[:1000]}")
    noise = [line for line in server.stderr_lines() if not line.startswith(("{", FAULT))]
    report.expect(not noise, f"lines on stderr that are no events: {noise[:3]}")


async def _status(server: Server) -> status.Status:
    return await asyncio.to_thread(status.ask, server.runtime_dir, server.port)


async def _is_replaced(server: Server, ready: int, within_s: float) -> bool:
    """Whether one more worker than `ready` has come to accept connections."""
    return await _until(lambda: len(server.events("worker_ready")) > ready, within_s)


def _descriptors(server: Server) -> dict[str, int]:
    """How many are open, in the supervisor and in each worker."""
    workers = status.ask(server.runtime_dir, server.port).workers
    pids = {"supervisor": server.process.pid} | {f"slot {worker.slot}": worker.pid for worker in workers if worker.pid}
    return {name: _open_of(pid) for name, pid in pids.items()}


async def _descriptors_at_rest(server: Server) -> dict[str, int]:
    """When the workers have all their links: the server says that it serves a moment earlier."""
    seen = [_descriptors(server)]
    while len(seen) < 4 or len({str(counts) for counts in seen[-4:]}) > 1:
        await asyncio.sleep(0.1)
        seen.append(_descriptors(server))
    return seen[-1]


def _open_of(pid: int) -> int:
    """Without /dev/null, which the loop opens at its first connection and keeps."""
    open_now = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            open_now += str(entry.readlink()) != "/dev/null"
    return open_now


async def _is_empty_again(report: Report, server: Server, before: dict[str, int]) -> None:
    """All have gone: every gauge is 0, every worker has as many descriptors as at its start."""

    def gauges() -> dict[str, int]:
        workers = status.ask(server.runtime_dir, server.port).workers
        return {name: sum(worker.counters[name] for worker in workers) for name in GAUGES}

    is_zero = await _until(lambda: not any(gauges().values()), QUIET_S)
    report.expect(is_zero, f"gauges are not 0 after all have left: {gauges()}")
    is_same = await _until(lambda: _descriptors(server) == before, QUIET_S)
    report.expect(is_same, f"descriptors: {before} at first, {_descriptors(server)} after all have left")


def _crossing(clients: int, rooms: int, each: int) -> dict[str, list[str]]:
    """Names of clients, and for each the rooms it is in: at random, the same every time."""
    chance = random.Random(7)
    names = [f"room-{number}" for number in range(rooms)]
    return {f"c{number}": chance.sample(names, each) for number in range(clients)}


def _latency(samples: Sequence[float]) -> dict[str, float | None]:
    """p50, p99 and maximum, in milliseconds."""
    shares = {"p50_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}
    found = {name: percentile(samples, share) for name, share in shares.items()}
    return {name: None if value is None else round(1000 * value, 2) for name, value in found.items()}


# ---- new connections while something is broken


@dataclass
class Guests:
    """Clients that come one after the other, connect, ping, join a room of their own, and go."""

    url: str
    slowest_s: float = 0.0  # from the first packet to the pong
    joins: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    served: int = 0

    async def come(self, until: float) -> None:
        """One every `GUESTS_EVERY_S` until that time (monotonic seconds); ends when the last has gone."""
        swarm = Swarm(self.url)
        swarm.fault()
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < until:
                group.create_task(self._visit(swarm.client(f"guest-{time.monotonic_ns()}")))
                await asyncio.sleep(GUESTS_EVERY_S)
        self.failures += swarm.violations

    async def _visit(self, guest: Client) -> None:
        began = time.monotonic()
        try:
            await guest.connect()
            await guest.ask(type="ping")
            self.served += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            answer = await guest.ask(type="join", room=guest.name, sender=guest.name)
            self.joins[str(answer.get("code", answer["type"]))] += 1
            await guest.close()
        except (OSError, RefusedError) as reason:
            self.failures.append(f"a guest was not served after {time.monotonic() - began:.2f} s: {reason!r}")

    def judge(self, report: Report, slowest_s: float) -> None:
        report.failures += self.failures
        report.expect(self.slowest_s <= slowest_s, f"a new connection was served after {self.slowest_s:.2f} s")
        strange = set(self.joins) - {"joined", "backend_unavailable"}
        report.expect(not strange, f"joins meanwhile were answered {strange}")
        report.expect(self.joins["joined"] > 0, "no join meanwhile succeeded")


# ---- a worker is killed


async def kill(
    workers: int = 4,
    rounds: int = 20,
    *,
    clients: int = 200,
    rooms: int = 60,
    rate: float = 300.0,
    p99_ms: float = 50.0,
) -> Report:
    """kill -9 of one worker after the other, under load.

    Those homed elsewhere lose nothing in rooms owned elsewhere, hear `peer-left` within a second, and wait for nothing;
    new connections are served within a second; afterwards everybody agrees, and at the end nothing is left.
    """
    report = Report("kill", workers)
    async with _running(report) as server:
        before = await _descriptors_at_rest(server)
        swarm = Swarm(server.url, returns=True)
        await swarm.grow(_crossing(clients, rooms, 2))
        await swarm.compare_rosters()
        slots = len((await _status(server)).workers)
        report.expect(slots == workers, f"{slots} workers run, not {workers}")
        for number in range(rounds):
            report.rounds.append(await _kill_once(report, server, swarm, number % slots, rate))
            report.take(swarm)
        await swarm.close()
        await _is_empty_again(report, server, before)
        restarts = sum(worker.counters["worker_restarts_total"] for worker in (await _status(server)).workers)
        report.expect(restarts == rounds, f"{restarts} restarts after {rounds} kills")
        report.take(swarm)
        report.figures["excused_losses"] = swarm.counts["excused"]
    p99s = [this["p99_ms"] for this in report.rounds if this["p99_ms"] is not None]
    report.expect(bool(p99s) or workers == 1, "no message passed between those who were not touched")
    if p99s:
        report.figures["median_p99_ms"] = statistics.median(p99s)
        report.expect(statistics.median(p99s) <= p99_ms, f"median of p99 is {statistics.median(p99s)} ms")
    return report


async def _kill_once(report: Report, server: Server, swarm: Swarm, slot: int, rate: float) -> dict[str, Any]:
    swarm.samples.clear()
    swarm.lag_s = 0.0
    async with swarm.loaded(rate):
        await asyncio.sleep(AROUND_S / 2)
        victim = (await _status(server)).workers[slot]
        assert victim.pid is not None
        homed = victim.counters["connections"]
        had = {client: (len(client.drops), dict(client.rooms)) for client in swarm.clients}
        ready = len(server.events("worker_ready"))
        swarm.fault()
        killed_at = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        assert await _until(lambda: not is_running(victim.pid or 0), NOTICE_S)
        guests = Guests(swarm.url)
        visits = asyncio.ensure_future(guests.come(killed_at + 1.5))

        def dropped() -> set[Client]:
            return {client for client, (drops, _) in had.items() if len(client.drops) > drops}

        is_known = await _until(lambda: len(dropped()) >= homed, NOTICE_S)
        report.expect(is_known, f"{homed} connections were homed on slot {slot}, {len(dropped())} dropped")
        speakers = {room: client for client in had.keys() - dropped() for room in client.rooms}
        for room, client in speakers.items():  # so that every touched room is known to be one
            client.say_to_all(room)
        await asyncio.sleep(max(0.0, killed_at + AROUND_S / 2 - time.monotonic()))
        await visits
    is_back = await _until(lambda: all(client.rooms.keys() >= set(client.wanted) for client in swarm.clients), 20.0)
    report.expect(is_back, "after 20 s some are not in their rooms again")
    back_s = time.monotonic() - killed_at
    report.expect(await _is_replaced(server, ready, 10.0), f"slot {slot} was not replaced within 10 s")
    await swarm.compare_rosters()
    gone = dropped()
    report.expect(len(gone) == homed, f"{len(gone)} connections dropped, {homed} were homed on slot {slot}")
    guests.judge(report, NOTICE_S)
    untouched, touched = _farewells(
        report, swarm, gone, {client: rooms for client, (_, rooms) in had.items()}, killed_at
    )
    names = {client.name for client in gone}
    samples = [
        sample.took_s
        for sample in swarm.samples
        if abs(sample.sent_at - killed_at) <= AROUND_S / 2
        and sample.room not in swarm.refused
        and not {sample.sender, sample.recipient} & names
    ]
    return _latency(samples) | {
        "slot": slot,
        "dropped": len(gone),
        "touched_rooms": len(swarm.refused),
        "messages": len(samples),
        "peer_left_s": untouched,
        "peer_left_touched_s": touched,
        "slowest_guest_s": round(guests.slowest_s, 3),
        "guests_joined": guests.joins["joined"],
        "guests_refused": guests.joins["backend_unavailable"],
        "all_back_s": round(back_s, 2),
        "load_lag_ms": round(1000 * swarm.lag_s, 1),
    }


def _farewells(
    report: Report, swarm: Swarm, gone: set[Client], had: dict[Client, dict[str, Any]], since: float
) -> tuple[float | None, float | None]:
    """When the last of those who stayed heard `peer-left`, in untouched and in touched rooms; seconds after `since`."""
    slowest: dict[bool, float] = {}
    for client, rooms in had.items():
        for room, view in rooms.items():
            if client in gone:
                continue
            lost = {(other.name, had[other][room].n) for other in gone if room in had[other]}
            for key in lost:
                at, reason = view.left.get(key, (0.0, "nothing"))
                is_touched = room in swarm.refused
                report.expect(reason == "lost", f"{room}: {client.name} heard {reason} of {key}, whose worker died")
                report.expect(
                    is_touched or at - since <= NOTICE_S, f"{room}: {client.name} heard it after {at - since:.2f} s"
                )
                slowest[is_touched] = max(slowest.get(is_touched, 0.0), at - since)
    return (
        round(slowest[False], 3) if False in slowest else None,
        round(slowest[True], 3) if True in slowest else None,
    )


async def kills(workers: int = 4, rounds: int = 100) -> Report:
    """Many kills in a row, without clients: the supervisor is afterwards as large as it was."""
    report = Report("kills", workers)
    async with _running(report) as server:
        slots = len((await _status(server)).workers)
        report.expect(slots == workers, f"{slots} workers run, not {workers}")
        before = await _descriptors_at_rest(server)
        memory: list[int] = []
        began = time.monotonic()
        for number in range(rounds):
            worker = (await _status(server)).workers[number % slots]
            assert worker.pid is not None
            ready = len(server.events("worker_ready"))
            os.kill(worker.pid, signal.SIGKILL)
            report.expect(
                await _is_replaced(server, ready, 15.0),
                f"kill {number}: slot {worker.slot} was not replaced within 15 s",
            )
            process = status.read_process(server.process.pid)
            assert process is not None
            memory.append(process.memory_bytes)
        await _is_empty_again(report, server, before)
        fifth = max(1, rounds // 5)  # the first ones fill what is made once
        grown = memory[-1] - memory[min(fifth, len(memory) - 1)]
        report.figures = {
            "kills": rounds,
            "seconds": round(time.monotonic() - began, 1),
            "supervisor_mib": [round(memory[0] / 2**20, 1), round(memory[-1] / 2**20, 1)],
            "grown_kib": grown // 1024,
        }
        report.expect(grown <= 1 << 20, f"the supervisor has grown by {grown} bytes since kill {fifth}")
    return report


# ---- a worker is stopped


async def stop(
    workers: int = 4,
    rounds: int = 2,
    *,
    seconds: Sequence[float] = (3.0, 15.0),
    clients: int = 120,
    rate: float = 200.0,
) -> Report:
    """SIGSTOP of a worker, for less and for more than what counts as stuck (then it is replaced).

    The others go on meanwhile, new connections are served, and afterwards everybody agrees.
    """
    report = Report("stop", workers)
    async with _running(report) as server:
        before = await _descriptors_at_rest(server)
        swarm = Swarm(server.url, returns=True)
        await swarm.grow(_crossing(clients, clients // 4, 2))
        await swarm.compare_rosters()
        slots = len((await _status(server)).workers)
        report.expect(slots == workers, f"{slots} workers run, not {workers}")
        for number in range(rounds):
            length_s = seconds[number % len(seconds)]
            report.rounds.append(await _stop_once(report, server, swarm, number % slots, length_s, rate))
            report.take(swarm)
        await swarm.close()
        await _is_empty_again(report, server, before)
        report.take(swarm)
    return report


async def _stop_once(
    report: Report, server: Server, swarm: Swarm, slot: int, length_s: float, rate: float
) -> dict[str, Any]:
    swarm.samples.clear()
    swarm.lag_s = 0.0
    victim = (await _status(server)).workers[slot]
    assert victim.pid is not None
    ready = len(server.events("worker_ready"))
    drops = {client: len(client.drops) for client in swarm.clients}
    async with swarm.loaded(rate):
        swarm.fault()
        began = time.monotonic()
        os.kill(victim.pid, signal.SIGSTOP)
        try:
            awake = await _those_who_answer(swarm.clients, NOTICE_S)
            guests = Guests(swarm.url)
            visits = asyncio.ensure_future(guests.come(began + min(length_s, 4.0)))
            if length_s > STUCK_S:
                is_replaced = await _is_replaced(server, ready, STUCK_S + 3)
                report.expect(is_replaced or report.workers == 1, f"slot {slot} was not replaced")
                _excuse_silent_rooms(report, swarm, began + NOTICE_S, began + STUCK_S - 1)
            await asyncio.sleep(max(0.0, began + length_s - time.monotonic()))
        finally:
            if victim.pid in children(server.process.pid):
                os.kill(victim.pid, signal.SIGCONT)
        await visits
    is_back = await _until(lambda: all(client.rooms.keys() >= set(client.wanted) for client in swarm.clients), 20.0)
    report.expect(is_back, "after 20 s some are not in their rooms again")
    await swarm.compare_rosters()
    dropped = [client for client, count in drops.items() if len(client.drops) > count]
    asleep = [client for client in swarm.clients if client not in awake]
    if length_s < STUCK_S:
        report.expect(not dropped, f"{len(dropped)} connections dropped in a pause of {length_s} s")
    elif report.workers > 1:
        report.expect(set(dropped) <= set(asleep), "connections of workers that were not stopped dropped")
    if report.workers > 1:
        guests.judge(report, 2.5)  # stuck is who says nothing for a second; only then others take what waits
        report.expect(len(asleep) == victim.counters["connections"], f"{len(asleep)} clients sleep with slot {slot}")
    names = {client.name for client in awake}
    slow = _rooms_that_waited(swarm, names, began, length_s)
    samples = [
        sample.took_s
        for sample in swarm.samples
        if {sample.sender, sample.recipient} <= names
        and began <= sample.sent_at <= began + length_s
        and sample.room not in slow | swarm.refused.keys()
    ]
    report.expect(bool(samples) or report.workers == 1, "nothing passed between those who were not stopped")
    return _latency(samples) | {
        "slot": slot,
        "seconds": length_s,
        "asleep": len(asleep),
        "dropped": len(dropped),
        "rooms_that_waited": len(slow | swarm.refused.keys()),
        "messages": len(samples),
        "slowest_guest_s": round(guests.slowest_s, 3),
        "excused_losses": swarm.counts["excused"],
    }


async def _those_who_answer(clients: Sequence[Client], within_s: float) -> list[Client]:
    """Those whose worker runs."""

    async def answers(client: Client) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await client.ask(type="ping")
        except (OSError, TimeoutError):
            return False
        return True

    found = await asyncio.gather(*(answers(client) for client in clients))
    return [client for client, is_awake in zip(clients, found, strict=True) if is_awake]


def _excuse_silent_rooms(report: Report, swarm: Swarm, start: float, end: float) -> None:
    """What its owner had not read when it was killed is lost, and a member hears of that only if it speaks in the
    moment in which there is no owner. Rooms in which nothing of those seconds ever came had the one that slept."""
    heard = {sample.room for sample in swarm.samples if start <= sample.sent_at <= end}
    rooms = {room for client in swarm.clients for room in client.wanted}
    report.expect(bool(heard), "nothing came in any room while one worker slept")
    swarm.refused |= dict.fromkeys(rooms - heard, time.monotonic())


def _rooms_that_waited(swarm: Swarm, awake: set[str], began: float, length_s: float) -> set[str]:
    """Those whose owner was the one that slept: between others too, messages came only when it woke."""
    half = min(length_s / 2, 2.0)
    return {
        sample.room
        for sample in swarm.samples
        if {sample.sender, sample.recipient} <= awake
        and began <= sample.sent_at <= began + length_s - half
        and sample.took_s > half
    }


# ---- the end, the wanted one and the others


async def drain(
    workers: int = 4, rounds: int = 1, *, clients: int = 2000, seconds: float = 5.0, rate: float = 500.0
) -> Report:
    """TERM with many connections, under load.

    Everybody hears `go-away`, then is closed 4000 or 1001 without a reset; the server ends with 0 in time. Nothing is
    lost before a close: what came to each recipient from each sender has no gap, and it reaches at least to the last
    message whose `ack` told the sender that it was delivered.
    """
    report = Report("drain", workers)
    for _ in range(rounds):
        async with _running(report, "--server.drain-seconds", str(seconds)) as server:
            swarm = await _crowd(server, clients, rate)
            async with swarm.loaded(rate):
                began = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
                took_s, code = await _end(server, began, seconds + OVERTIME_S + 3)
            figures = await _judge_drain(report, swarm, began)
            report.expect(code == 0, f"the exit code is {code}")
            report.expect(took_s <= seconds + OVERTIME_S, f"the end took {took_s:.2f} s")
            report.rounds.append({"seconds": round(took_s, 2), "exit": code} | figures)
    return report


async def orphans(
    workers: int = 4, rounds: int = 1, *, clients: int = 400, seconds: float = 2.0, rate: float = 200.0
) -> Report:
    """kill -9 of the supervisor: the workers drain by themselves and end; peers see an ordinary drain."""
    report = Report("orphans", workers)
    for _ in range(rounds):
        async with _running(report, "--server.drain-seconds", str(seconds)) as server:
            swarm = await _crowd(server, clients, rate)
            pids = children(server.process.pid)
            report.expect(len(pids) == workers, f"{len(pids)} workers run, not {workers}")
            async with swarm.loaded(rate):
                began = time.monotonic()
                server.process.kill()
                is_over = await _have_ended(pids, seconds + OVERTIME_S + 3)
            report.expect(is_over, "workers outlive their supervisor")
            took_s = time.monotonic() - began
            report.rounds.append({"seconds": round(took_s, 2)} | await _judge_drain(report, swarm, began))
            server.process.wait()
    return report


async def _crowd(server: Server, clients: int, rate: float) -> Swarm:
    """Clients that want acks, each in two rooms of ten or so, all of them agreed."""
    swarm = Swarm(server.url, wants_ack=True)
    await swarm.grow(_crossing(clients, max(2, clients // 5), 2))
    async with swarm.loaded(rate):
        await _until(lambda: len(swarm.samples) >= rate, 5.0)
    await swarm.compare_rosters()
    swarm.expected_closes |= {4000, 1001}
    return swarm


async def _are_warned(swarm: Swarm, within_s: float) -> bool:
    return await _until(lambda: all(client.go_away_at for client in swarm.clients), within_s)


async def _are_gone(swarm: Swarm, within_s: float) -> bool:
    return await _until(lambda: not any(client.is_connected for client in swarm.clients), within_s)


async def _have_ended(pids: Sequence[int], within_s: float) -> bool:
    return await _until(lambda: not any(is_running(pid) for pid in pids), within_s)


async def _end(server: Server, began: float, within_s: float) -> tuple[float, int | None]:
    """How long it took from `began`, and the exit code; None when it did not come."""
    is_over = await _until(lambda: server.process.poll() is not None, within_s)
    return time.monotonic() - began, server.process.returncode if is_over else None


async def _judge_drain(report: Report, swarm: Swarm, began: float) -> dict[str, Any]:
    """Every client has seen what a drain promises."""
    is_over = await _are_gone(swarm, 3.0)
    report.expect(is_over, "connections outlive the server")
    swarm.judge()
    report.take(swarm)
    codes = Counter(str(client.close_code) for client in swarm.clients)
    report.expect(set(codes) <= {"4000", "1001"}, f"close codes {dict(codes)}")
    resets = sum(client.was_reset for client in swarm.clients)
    report.expect(not resets, f"{resets} connections were reset")
    unwarned = [client.name for client in swarm.clients if not began <= client.go_away_at <= client.closed_at]
    report.expect(not unwarned, f"{len(unwarned)} were closed without a go-away before, as {unwarned[:3]}")
    lost, acked = _acked_and_lost(swarm)
    report.failures += lost[:20]
    closes = sorted(client.closed_at - began for client in swarm.clients)
    return {
        "closes": dict(codes),
        "resets": resets,
        "first_close_s": round(closes[0], 2),
        "last_close_s": round(closes[-1], 2),
        "messages": len(swarm.samples),
        "acked": acked,
        "acked_and_lost": len(lost),
    } | _latency([sample.took_s for sample in swarm.samples if sample.sent_at >= began])


def _acked_and_lost(swarm: Swarm) -> tuple[list[str], int]:
    """Streams in which the server says that it delivered more than came; and of how many messages it says so at all."""
    views = {
        (client.name, view.room, view.n): view
        for client in swarm.clients
        for view in [*client.past, *client.rooms.values()]
    }
    lost, acked = [], 0
    for (name, room, n), view in views.items():
        for (peer, peer_n), count in view.acked_to.items():
            stream = views[peer, room, peer_n].streams.get((name, n))
            came = stream.one if stream else 0
            acked += count
            if came < count:
                lost.append(f"{room}: {name} was told that {count} messages reached {peer}, but {came} came")
    return lost, acked


async def start(workers: int = 4, rounds: int = 20) -> Report:
    """TERM at random moments of the first second: the end is clean, whatever there was by then."""
    report = Report("start", workers)
    chance = random.Random()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="fastsig-faults-") as folder:
            server = Server("--workers", str(workers), "--log.level", "debug", cwd=Path(folder))
            after_s = chance.uniform(0, 1)
            await asyncio.sleep(after_s)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            took_s, code = await _end(server, began, 15.0)
            said = [event["event"] for event in server.events()]
            # before Python runs our first line the signal ends the process as it would any other
            is_clean = code == 0 or (code == -signal.SIGTERM and not said)
            report.expect(is_clean, f"TERM after {after_s:.3f} s: exit code {code} after {said}")
            report.expect(took_s < 5, f"TERM after {after_s:.3f} s: the end took {took_s:.2f} s")
            await _nothing_left(report, server)
            _look_at_log(report, server)
            last = said[-1] if said else None
            report.rounds.append({"after_s": round(after_s, 3), "took_s": round(took_s, 3), "exit": code, "last": last})
            if code is None:
                server.process.kill()
            server.process.wait()
    return report


async def force(workers: int = 4, rounds: int = 1, *, clients: int = 100) -> Report:
    """TERM in a drain that would last a day: all are closed 1001, and the server ends at once."""
    report = Report("force", workers)
    for _ in range(rounds):
        async with _running(report, "--server.drain-seconds", "86400") as server:
            swarm = await _crowd(server, clients, 100.0)
            server.process.send_signal(signal.SIGTERM)
            report.expect(await _are_warned(swarm, QUIET_S), "some heard no go-away")
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            took_s, code = await _end(server, began, 10.0)
            report.expect((code, took_s < 3) == (0, True), f"exit code {code} after {took_s:.2f} s")
            await _are_gone(swarm, 3.0)
            codes = Counter(str(client.close_code) for client in swarm.clients)
            report.expect(set(codes) <= {"1001", "4000"} and codes["1001"] > 0, f"close codes {dict(codes)}")
            report.take(swarm)
            report.rounds.append({"took_s": round(took_s, 2), "closes": dict(codes)})
    return report


# ---- a machine that refuses something


async def refused(workers: int = 4, rounds: int = 1) -> Report:
    """A bound port is exit 3 and one line; a runtime folder that cannot be used is one line, and all else works."""
    report = Report("refused", workers)
    for _ in range(rounds):
        with socket.create_server(("127.0.0.1", 0)) as taken, tempfile.TemporaryDirectory() as folder:
            arguments = [
                "serve",
                "--host",
                "127.0.0.1",
                "--port",
                str(taken.getsockname()[1]),
                "--workers",
                str(workers),
            ]
            run = await asyncio.to_thread(
                subprocess.run, [PYTHON, "-m", "fastsig", *arguments], cwd=folder, capture_output=True, text=True,
                timeout=20, check=False,
            )  # fmt: skip
            lines = run.stderr.splitlines()
            report.expect(run.returncode == 3 and len(lines) == 1, f"a bound port: exit {run.returncode}, {lines}")
            report.rounds.append({"case": "bound port", "exit": run.returncode, "line": lines[0] if lines else None})
        for case in ("a file", "open to others", "unreadable"):
            report.rounds.append(await _with_bad_folder(report, case))
    return report


async def _with_bad_folder(report: Report, case: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fastsig-faults-") as name:
        folder = Path(name) / "run"
        if case == "a file":
            folder.touch()
        else:
            folder.mkdir()
            folder.chmod(0o755 if case == "open to others" else 0)
        async with _running(report, "--server.runtime-dir", str(folder)) as server:
            swarm = Swarm(server.url)
            await swarm.grow({"a": ["r"], "b": ["r"]})
            await swarm.compare_rosters()
            await swarm.close()
            report.take(swarm)
        said = server.events("status_unavailable")
        is_usable = case == "unreadable" and os.geteuid() == 0  # nothing is unreadable to root
        report.expect(len(said) == (0 if is_usable else 1), f"a runtime folder that is {case}: {said}")
        return {"case": f"runtime folder: {case}", "exit": server.process.returncode, "said": len(said)}


async def descriptors(workers: int = 2, rounds: int = 1, *, clients: int = 1500, most: int = 1024) -> Report:
    """`ulimit -n 1024`, and more connections than that: who is in is served, nothing spins, one line says it.

    When some go, others get in.
    """
    report = Report("descriptors", workers)
    for _ in range(rounds):
        async with _running(report, prefix=("sh", "-c", f'ulimit -n {most}; exec "$@"', "sh")) as server:
            swarm = Swarm(server.url)
            everybody = [swarm.client(f"c{number}", [f"room-{number // 10}"]) for number in range(clients)]
            inside, outside = await _enter(everybody)
            room_for = workers * most
            report.expect(len(inside) >= min(clients, 0.8 * room_for), f"{len(inside)} of {clients} were served")
            awake = await _those_who_answer(inside, 2.0)
            report.expect(len(awake) == len(inside), f"{len(inside) - len(awake)} of those inside are not served")
            busy = await _cpu_share(server, 2.0)
            report.expect(busy < 0.3, f"the server uses {busy:.2f} cores to do nothing")
            said = Counter(event["event"] for event in server.events() if event["level"] in {"warning", "error"})
            report.expect(sum(said.values()) <= 10 * workers, f"it says too much: {dict(said)}")
            if outside:
                report.expect(
                    bool(said) and "library_message" not in said, f"no clear line about the limit: {dict(said)}"
                )
            half = len(inside) // 2
            await asyncio.gather(*(client.close() for client in inside[:half]))
            report.expect(
                await _can_enter(server), "after half of them have left, a new connection is not served within 5 s"
            )
            swarm.is_over = True
            report.take(swarm)
            for client in everybody:
                client.abort()
            report.rounds.append(
                {"inside": len(inside), "outside": len(outside), "cores": round(busy, 3), "said": said}
            )
    return report


async def _enter(everybody: list[Client]) -> tuple[list[Client], list[Client]]:
    """Who got in, and who waits still when nobody new got in for two seconds."""
    inside: list[Client] = []

    async def enter(client: Client) -> None:
        with contextlib.suppress(OSError, RefusedError):
            await client.start()
            inside.append(client)

    tasks: set[asyncio.Task[None]] = set()
    for client in everybody:
        tasks.add(asyncio.ensure_future(enter(client)))
        if len(tasks) >= 50:
            done, tasks = await asyncio.wait(tasks, timeout=2.0, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
    await asyncio.wait(tasks, timeout=2.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    entered = set(inside)
    return inside, [client for client in everybody if client not in entered]


async def _can_enter(server: Server) -> bool:
    swarm = Swarm(server.url)
    guest = swarm.client("late", ["late"])
    try:
        async with asyncio.timeout(5):
            await guest.start()
            await guest.close()
    except (OSError, TimeoutError, RefusedError):
        return False
    return not swarm.violations


async def _cpu_share(server: Server, seconds: float) -> float:
    """How many cores the supervisor and its workers use, over that time."""

    def used() -> float:
        processes = [status.read_process(pid) for pid in (server.process.pid, *children(server.process.pid))]
        return sum(process.cpu_seconds for process in processes if process)

    before, began = used(), time.monotonic()
    await asyncio.sleep(seconds)
    return (used() - before) / (time.monotonic() - began)


# ---- nothing breaks


async def crossing(
    workers: int = 4, rounds: int = 1, *, clients: int = 200, rooms: int = 50, each: int = 5, rate: float = 500.0,
    seconds: float = 10.0,
) -> Report:  # fmt: skip
    """Every connection in several rooms, under load: order holds per room, sender and recipient; nothing is lost."""
    report = Report("crossing", workers)
    async with _running(report) as server:
        before = await _descriptors_at_rest(server)
        swarm = Swarm(server.url)
        await swarm.grow(_crossing(clients, rooms, each))
        for _ in range(rounds):
            swarm.samples.clear()
            began, busy = time.monotonic(), time.process_time()
            async with swarm.loaded(rate):
                await asyncio.sleep(seconds)
            busy = (time.process_time() - busy) / (time.monotonic() - began)
            samples = [sample.took_s for sample in swarm.samples]
            delivered = len(samples)
            await swarm.compare_rosters()
            report.take(swarm)
            report.expect(delivered >= rate * seconds * 0.9, f"{delivered} messages came of {rate * seconds:.0f} sent")
            report.rounds.append({"messages": delivered, "client_cores": round(busy, 2)} | _latency(samples))
        counters = [worker.counters for worker in (await _status(server)).workers]
        report.expect(len(counters) == workers, f"{len(counters)} workers run, not {workers}")
        report.figures = {
            name: [worker[name] for worker in counters]
            for name in ("connections", "members", "remote_members", "relays_total")
            if name in counters[0]
        }
        await swarm.close()
        await _is_empty_again(report, server, before)
        report.take(swarm)
    return report


SCENARIOS: Final[dict[str, Callable[..., Coroutine[Any, Any, Report]]]] = {
    scenario.__name__: scenario
    for scenario in (crossing, kill, kills, stop, drain, orphans, start, force, refused, descriptors)
}


def _print(report: Report) -> None:
    print(f"\n{report.scenario}, {report.workers} workers: {'FAILED' if report.failures else 'good'}")
    if report.rounds:
        names = list(report.rounds[0])
        rows = [names, *([str(this.get(name)) for name in names] for this in report.rounds)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
        for row in rows:
            print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for name, value in report.figures.items():
        print(f"  {name}: {value}")
    for failure in report.failures[:20]:
        print(f"  FAILED: {failure}")
    if len(report.failures) > 20:
        print(f"  and {len(report.failures) - 20} more")


async def main(arguments: argparse.Namespace) -> int:
    """Run what is asked for; the number of scenarios that failed."""
    failed = 0
    for name in arguments.scenarios or SCENARIOS:
        given = {"workers": arguments.workers, "rounds": arguments.rounds, "clients": arguments.clients}
        known = inspect.signature(SCENARIOS[name]).parameters
        report = await SCENARIOS[name](**{key: value for key, value in given.items() if value and key in known})
        failed += bool(report.failures)
        if arguments.json:
            print(json.dumps(vars(report)), flush=True)
        else:
            _print(report)
    return failed


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description="Break a server in known ways, and see what its clients notice.")
    _parser.add_argument("scenarios", nargs="*", choices=[*SCENARIOS, []], help="all of them, unless some are named")
    _parser.add_argument("--workers", type=int, help="4, but 2 where descriptors are scarce")
    _parser.add_argument("--rounds", type=int, help="each scenario has a number of its own")
    _parser.add_argument("--clients", type=int, help="likewise")
    _parser.add_argument("--json", action="store_true", help="one object a line instead of tables")
    _, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(16384, _hard) if _hard > 0 else 16384, _hard))
    sys.exit(min(1, uvloop.run(main(_parser.parse_args()))))
