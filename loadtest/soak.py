"""Does anything grow? `make soak MINUTES=30`: a server with two workers, all kinds of users, one fault after the other.

Users, each of whom checks what it hears (`tests.e2e.swarm`): *callers* in rooms of two; *viewers* in big rooms, where a
presenter speaks; *reloaders*, who come, stay for a moment and go, by a close, without a word, or by a reset. Faults, in
turn (`FAULTS`): a worker is killed; connections are dropped, or reset; somebody stops reading while a lot is sent.

After each fault everybody returns, the load pauses, all rosters are compared, and a sample is taken *at rest*: the same
people in the same rooms, so that what differs is not the load. Between, samples are taken for the plot. What must not
grow is judged by the samples at rest (`judge`): the median of the last third against that of the first third, when two
turns of all faults are over (so three minutes are the least). What must be exact is compared every time: the gauges of
connections, members and rooms.

Slot 0 is never killed: a leak in a worker shows there. Slot 1 is, over and over: a leak in the supervisor or in the
links shows in the others. The server does not tell how many asyncio tasks it has; what a task would hold, connections,
descriptors and memory, is watched. Our own tasks are in the plot, so that a leak of ours is not taken for one of its.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import resource
import signal
import socket
import statistics
import struct
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from fastsig import status
from loadtest.faults import (
    QUIET_S,
    Report,
    _descriptors_at_rest,
    _is_empty_again,
    _is_replaced,
    _open_of,
    _running,
    _status,
    _until,
)
from loadtest.plot import Line, Panel, over_time
from tests.e2e.conftest import Server, free_port, is_running
from tests.e2e.swarm import Client, RefusedError, Swarm

ROOT: Final = Path(__file__).parent.parent
MIB: Final = 1 << 20
SAMPLE_S: Final = 2.0
STEP_S: Final = 0.01  # of the load
ROUND_S: Final = 10.0  # of load around each fault; the fault comes after a third of it
RETURN_S: Final = 20.0
LEAST_SAMPLES: Final = 6  # at rest, after the warm-up, for a verdict about growth
STAY_S: Final = (0.2, 3.0)  # of a reloader
TALK_S: Final = 0.1  # a killed worker is away for longer
SLOW: Final = 'disconnects_total{code="4003",reason="slow_reader"}'
FLOOD: Final = 200  # messages of FLOOD_BYTES: more than the kernel's buffers and `limits.output_bytes` together
FLOOD_BYTES: Final = 60000
STALLS: Final = 6  # at most, until one was on the slot that it is about: the kernel chooses
WARM_UP_TURNS: Final = 2  # of all faults, less than two minutes: what is made once, and kept, is there by then
UNHURT, KILLED = 0, 1  # slots


@dataclass(frozen=True)
class Tolerance:
    """How much more is not growth: the larger of the two."""

    least: float
    share: float = 0.0


MEMORY: Final = Tolerance(1 * MIB, 0.03)
DESCRIPTORS: Final = Tolerance(2)
TASKS: Final = Tolerance(3)
TABLES: Final = Tolerance(5, 0.1)  # entries; at rest somebody may have left a moment ago
IN_TABLES: Final = (
    "rooms", "acks_pending", "connections_to_flush", "joins_undecided", "departed", "calls_watched", "unsaid", "links",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment. `at_s`: since the soak began; `values`: by series, as `SERIES` names them."""

    at_s: float
    is_at_rest: bool
    values: dict[str, float]


@dataclass
class Soak:
    """One run: its server, its people, and what was seen."""

    report: Report
    server: Server
    swarm: Swarm
    began: float
    ops_port: int
    callers: list[Client] = field(default_factory=list)
    presenters: list[Client] = field(default_factory=list)
    viewers: list[Client] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)  # when (seconds since the begin), and which
    chance: random.Random = field(default_factory=lambda: random.Random(3))
    lives: int = 0  # of reloaders, so far
    unserved: int = 0  # of those: not let in, which is to be expected while a worker is dead


# ---- what must not grow


def ends(values: Sequence[float]) -> tuple[float, float]:
    """The medians of the first and of the last third: a single sample may meet what has nothing to do with a leak."""
    third = max(1, len(values) // 3)
    return statistics.median(values[:third]), statistics.median(values[-third:])


def has_grown(first: float, last: float, tolerance: Tolerance) -> bool:
    """Is it more than is tolerated?"""
    return last - first > max(tolerance.least, tolerance.share * first)


SERIES: Final[dict[str, Tolerance]] = {
    "memory supervisor": MEMORY,
    f"memory slot {UNHURT}": MEMORY,
    "descriptors supervisor": DESCRIPTORS,
    f"descriptors slot {UNHURT}": DESCRIPTORS,
    f"descriptors slot {KILLED}": DESCRIPTORS,
    "tasks supervisor": TASKS,
    f"tasks slot {UNHURT}": TASKS,
    f"tables slot {UNHURT}": TABLES,
    "client tasks": TASKS,
}


def judge(report: Report, samples: Iterable[Sample], warm_up: int) -> None:
    """Every series that must not grow, by the samples at rest behind the first `warm_up` of them."""
    rest = [sample.values for sample in samples if sample.is_at_rest][warm_up:]
    if len(rest) < LEAST_SAMPLES:
        report.failures.append(f"too short: {len(rest)} samples at rest after the warm-up, {LEAST_SAMPLES} are needed")
        return
    for name, tolerance in SERIES.items():
        values = [values[name] for values in rest if name in values]
        if len(values) < LEAST_SAMPLES:
            report.failures.append(f"{name} was seen only {len(values)} times at rest")
            continue
        first, last = ends(values)
        figure = f"{_shown(name, first)} → {_shown(name, last)}"
        report.figures[name] = figure
        report.expect(not has_grown(first, last, tolerance), f"{name} grows: {figure}")


def _shown(name: str, value: float) -> str:
    return f"{value / MIB:.2f} MiB" if name.startswith("memory") else f"{value:g}"


# ---- seeing


async def look(soak: Soak, *, is_at_rest: bool) -> Sample:
    """One sample, kept. Descriptors are counted without those of connections, which move between the workers."""
    seen = await _status(soak.server)
    values: dict[str, float] = {"client tasks": len(asyncio.all_tasks())}
    supervisor = status.read_process(soak.server.process.pid)
    if supervisor:
        values["memory supervisor"] = supervisor.memory_bytes
        values["descriptors supervisor"] = _open_of(soak.server.process.pid)
    for worker in seen.workers:
        if worker.pid is None or worker.process is None:
            continue
        with contextlib.suppress(OSError):  # it died since
            values[f"descriptors slot {worker.slot}"] = _open_of(worker.pid) - worker.counters["connections"]
            values[f"memory slot {worker.slot}"] = worker.process.memory_bytes
    for name in ("connections", "rooms", "members", "remote_members", "sent_messages_total", "errors_total"):
        values[name] = sum(worker.counters[name] for worker in seen.workers)
    values |= await asyncio.to_thread(_inside, soak.ops_port)
    sample = Sample(time.monotonic() - soak.began, is_at_rest, values)
    soak.samples.append(sample)
    return sample


def _inside(ops_port: int) -> dict[str, float]:
    """Tasks and table entries, as the processes themselves count them; of those that answer. Scrapes once, too."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError):  # too busy
        _get(ops_port, "/metrics")
        stats = json.loads(_get(ops_port, "/debug/stats"))
        found["tasks supervisor"] = stats["tasks"]
        for worker in stats["workers"]:
            if own := worker.get("stats"):
                found[f"tasks slot {worker['slot']}"] = own["tasks"]
                found[f"tables slot {worker['slot']}"] = sum(own[name] for name in IN_TABLES)
    return found


def _get(port: int, path: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        body: bytes = answer.read()
    return body


async def watch(soak: Soak) -> None:
    """For the plot, until cancelled."""
    while True:
        with contextlib.suppress(status.UnusableError):  # as it may be when a machine is too busy to answer in 3 s
            await look(soak, is_at_rest=False)
        await asyncio.sleep(SAMPLE_S)


# ---- people


def crowd(callers: int, viewers: int) -> dict[str, list[str]]:
    """Names, and the rooms that each is in: callers in pairs, viewers in two halls with a presenter each."""
    people = {f"caller-{number}": [f"call-{number // 2}"] for number in range(callers)}
    people |= {f"presenter-{hall}": [f"hall-{hall}"] for hall in range(2)}
    return people | {f"viewer-{number}": [f"hall-{number % 2}"] for number in range(viewers)}


async def talk(soak: Soak, rate: float) -> None:
    """So many messages a second until cancelled: mostly callers, at times a presenter to a whole hall, few viewers."""
    began, done = time.monotonic(), 0
    while True:
        due = int((time.monotonic() - began) * rate) - done
        for _ in range(min(due, int(rate))):
            draw = soak.chance.random()
            speakers = soak.callers if draw < 0.85 else soak.presenters if draw < 0.95 else soak.viewers
            client = soak.chance.choice(speakers)
            for room in list(client.rooms):
                if speakers is soak.presenters:
                    client.say_to_all(room)
                else:
                    client.say_something(room, soak.chance)
        done += due
        await asyncio.sleep(STEP_S)


async def reload(soak: Soak, until: float) -> None:
    """One reloader, life after life, until that time (monotonic seconds)."""
    while time.monotonic() < until:
        soak.lives += 1
        client = soak.swarm.client(f"reloader-{soak.lives}", [f"hall-{soak.lives % 2}"])
        try:
            await client.start()
            await asyncio.sleep(soak.chance.uniform(*STAY_S))
        except (OSError, RefusedError):
            soak.unserved += 1
            await asyncio.sleep(0.1)
        finally:
            await leave(client, soak.lives % 3)
            soak.swarm.clients.remove(client)


async def leave(client: Client, way: int) -> None:
    """By a close, without a word, or by a reset."""
    if way == 0:
        await client.close()
    elif way == 1:
        client.abort()
    else:
        cut(client, is_reset=True)
        client.abort()


def cut(client: Client, *, is_reset: bool) -> None:
    """Its connection ends, and it does not know why: FIN, or RST (what is unsent on either side is lost)."""
    transport = _transport(client)
    if transport is None:
        return
    if is_reset:
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


def _transport(client: Client) -> asyncio.Transport | None:
    wire = client._wire  # noqa: SLF001 # the fault is below what a client does by itself
    return wire._transport if wire else None  # noqa: SLF001


def forget(swarm: Swarm) -> None:
    """What checking has kept, and needs no more once all agree: a soak lasts longer than a test."""
    swarm.samples.clear()
    for client in swarm.clients:
        client.past.clear()
        client.drops.clear()
        for view in client.rooms.values():
            here = view.peers.items()
            view.left.clear()
            for kept in (view.streams, view.sent_to, view.acked_to):
                for gone in kept.keys() - here:
                    del kept[gone]


# ---- faults


async def kill(soak: Soak) -> None:
    """The worker of slot KILLED. Whoever stays goes on talking, so that rooms which lost messages are known.

    Once is not enough: what is said before the other worker has noticed is lost, and nobody is told.
    """
    victim = (await _status(soak.server)).workers[KILLED]
    assert victim.pid is not None
    pid, homed = victim.pid, victim.counters["connections"]
    ready = len(soak.server.events("worker_ready"))
    standing = {client: len(client.drops) for client in soak.swarm.clients}
    os.kill(pid, signal.SIGKILL)
    await _until(lambda: not is_running(pid), 1.0)
    await _until(lambda: sum(len(client.drops) > count for client, count in standing.items()) >= homed, 0.3)
    talking = asyncio.ensure_future(_talk_on(soak))
    soak.report.expect(await _is_replaced(soak.server, ready, 10.0), "a killed worker was not replaced within 10 s")
    talking.cancel()


async def _talk_on(soak: Soak) -> None:
    while True:
        for client in list(soak.swarm.clients):
            for room in list(client.rooms):
                client.say_to_all(room)
        await asyncio.sleep(TALK_S)


async def drop(soak: Soak, *, is_reset: bool = False) -> None:
    """One in five loses its connection."""
    standing = soak.callers + soak.presenters + soak.viewers
    for client in soak.chance.sample(standing, len(standing) // 5):
        cut(client, is_reset=is_reset)


async def reset(soak: Soak) -> None:
    """One in five resets its connection."""
    await drop(soak, is_reset=True)


async def stall(soak: Soak) -> None:
    """Somebody stops reading while another sends 12 MB: closed as a slow reader, and nobody else notices.

    Again until it was one of slot UNHURT, which grows once by what it then holds: in each turn, so not in the last.
    """
    for attempt in range(STALLS):
        if await _stall_once(soak, f"stalled-{len(soak.faults)}-{attempt}") == UNHURT:
            return


async def _stall_once(soak: Soak, room: str) -> int | None:
    """The slot on which the reader was closed."""
    with Swarm(soak.server.url) as pair:
        pair.tolerated |= {"peer_unavailable"}
        reader, sender = pair.client("reader", [room]), pair.client("sender", [room])
        await reader.start()
        await sender.start()
        transport = _transport(reader)
        assert transport is not None
        before = await _closed_as_slow(soak)
        transport.pause_reading()
        text = "x" * FLOOD_BYTES
        for number in range(FLOOD):
            sender.send(type="message", room=room, payload=text)
            if number % 20 == 19:
                with contextlib.suppress(OSError, TimeoutError):
                    await sender.ask(type="ping")  # so that it is the server that waits, not our own buffer
        deadline, now = time.monotonic() + QUIET_S, before
        while now == before and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            now = await _closed_as_slow(soak)
        soak.report.expect(now != before, "who did not read 12 MB was not closed as slow")
        pair.is_over = True
        soak.report.take(pair)
    return next((slot for slot, count in now.items() if count != before.get(slot)), None)


async def _closed_as_slow(soak: Soak) -> dict[int, int]:
    """How many so far, by slot."""
    seen = await _status(soak.server)
    return {worker.slot: worker.counters.get(SLOW, 0) for worker in seen.workers}


FAULTS: Final[tuple[Callable[[Soak], Awaitable[None]], ...]] = (kill, drop, reset, stall)


# ---- the whole


async def one_round(soak: Soak, fault: Callable[[Soak], Awaitable[None]], rate: float, reloaders: int) -> None:
    """Load, a fault in it, everybody back, all agreed, a sample at rest."""
    swarm = soak.swarm
    swarm.fault()
    talking = asyncio.ensure_future(talk(soak, rate))
    until = time.monotonic() + ROUND_S
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(reloaders):
                group.create_task(reload(soak, until))
            await asyncio.sleep(ROUND_S / 3)
            soak.faults.append((time.monotonic() - soak.began, fault.__name__))
            await fault(soak)
    finally:
        talking.cancel()
    is_back = await _until(lambda: all(client.rooms.keys() >= set(client.wanted) for client in swarm.clients), RETURN_S)
    soak.report.expect(is_back, f"{RETURN_S:.0f} s after a {fault.__name__} some are not in their rooms again")
    await swarm.compare_rosters()
    forget(swarm)
    wanted = {
        "connections": sum(client.is_connected for client in swarm.clients),
        "members": sum(len(client.rooms) for client in swarm.clients),
        "rooms": len({room for client in swarm.clients for room in client.rooms}),
    }
    deadline = time.monotonic() + QUIET_S
    while True:
        seen = await look(soak, is_at_rest=False)
        found = {name: int(seen.values[name]) for name in wanted}
        if found == wanted or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    soak.report.expect(found == wanted, f"after a {fault.__name__} the gauges say {found}, but it is {wanted}")
    await look(soak, is_at_rest=True)
    soak.report.take(swarm)


def progress(soak: Soak) -> str:
    """One line after each round."""
    last, fault = soak.samples[-1], soak.faults[-1][1]
    memory = ", ".join(f"{last.values.get(f'memory slot {slot}', 0) / MIB:.1f}" for slot in (UNHURT, KILLED))
    wrong = f", {len(soak.report.failures)} failures" if soak.report.failures else ""
    return f"  {last.at_s / 60:5.1f} min  {fault:5}  workers {memory} MiB, {last.values['members']:.0f} members{wrong}"


async def soak_for(
    minutes: float,
    *,
    workers: int = 2,
    callers: int = 80,
    viewers: int = 100,
    reloaders: int = 12,
    rate: float = 250.0,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Report, Soak]:
    """Rounds until the time is over, each fault at least once; then all leave, and nothing may be left behind.

    Whether something has grown meanwhile is for `judge`. `say`: gets a line after each round.
    """
    report = Report("soak", workers)
    ops_port = free_port()
    async with _running(report, "--ops.port", str(ops_port)) as server:
        before = await _descriptors_at_rest(server)
        soak = Soak(report, server, Swarm(server.url, returns=True), time.monotonic(), ops_port)
        people = crowd(callers, viewers)
        await soak.swarm.grow(people)
        for kind in ("caller", "presenter", "viewer"):
            setattr(soak, f"{kind}s", [client for client in soak.swarm.clients if client.name.startswith(kind)])
        watching = asyncio.ensure_future(watch(soak))
        rounds = 0
        while rounds < len(FAULTS) or time.monotonic() - soak.began < 60 * minutes:
            await one_round(soak, FAULTS[rounds % len(FAULTS)], rate, reloaders)
            rounds += 1
            say(progress(soak))
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        last = soak.samples[-1].values
        await soak.swarm.close()
        await _is_empty_again(report, server, before)
        report.take(soak.swarm)
        report.figures |= {
            "minutes": round(soak.samples[-1].at_s / 60, 1),
            "faults": rounds,
            "reloads": soak.lives,
            "not served": soak.unserved,
            "messages sent": int(last["sent_messages_total"]),
            "excused losses": soak.swarm.counts["excused"],
        }
    return report, soak


# ---- the plot


def picture(report: Report, soak: Soak) -> str:
    """SVG: what was watched over the minutes, with the faults as marks."""
    minutes = soak.samples[-1].at_s / 60

    def line(name: str, label: str, scale: float = 1.0) -> Line:
        points = [(sample.at_s / 60, sample.values[name] / scale) for sample in soak.samples if name in sample.values]
        return Line(label, points)

    delivered = [(sample.at_s, sample.values["sent_messages_total"]) for sample in soak.samples]
    rates = [
        (now / 60, max(0.0, (count - before) / (now - then)))
        for (then, before), (now, count) in itertools.pairwise(delivered)
        if now - then >= SAMPLE_S / 2
    ]
    panels = [
        Panel("Resident memory", "MiB", [
            line(f"memory slot {UNHURT}", "worker 0, never killed", MIB),
            line(f"memory slot {KILLED}", "worker 1, killed in turn", MIB),
            line("memory supervisor", "supervisor", MIB),
        ], is_zoomed=True),
        Panel("Descriptors besides connections", "open", [
            line(f"descriptors slot {UNHURT}", "worker 0"),
            line(f"descriptors slot {KILLED}", "worker 1"),
            line("descriptors supervisor", "supervisor"),
        ]),
        Panel("What the server counts", "now", [
            line("connections", "connections"), line("members", "members"), line("rooms", "rooms"),
            line(f"tables slot {UNHURT}", "in tables of worker 0"), line("client tasks", "tasks of the client"),
        ]),
        Panel("Messages delivered; peaks: all compare their rosters", "per second", [Line("both workers", rates)]),
    ]  # fmt: skip
    counted = Counter(name for _, name in soak.faults)
    people = f"{len(soak.callers)} callers, {len(soak.viewers)} viewers, {soak.lives} reloads; faults: " + ", ".join(
        f"{count} × {name}" for name, count in counted.items()
    )
    return over_time(
        f"Soak of {minutes:.1f} minutes, {report.workers} workers: {'FAILED' if report.failures else 'nothing grows'}",
        report.failures[0][:120] if report.failures else people,
        "minutes since the start",
        panels,
        marks=[at_s / 60 for at_s, name in soak.faults if name == "kill"],
        mark="worker 1 is killed",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run, print, write the plot and the samples; the exit code."""
    report, soak = uvloop.run(soak_for(arguments.minutes, say=lambda line: print(line, flush=True)))
    judge(report, soak.samples, warm_up=WARM_UP_TURNS * len(FAULTS))
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    (folder / "soak.svg").write_text(picture(report, soak), encoding="utf-8")
    seen: list[dict[str, Any]] = [vars(sample) for sample in soak.samples]
    (folder / "soak.json").write_text(json.dumps({"samples": seen, "faults": soak.faults}), encoding="utf-8")
    for name, value in report.figures.items():
        print(f"  {name}: {value}")
    for failure in report.failures[:20]:
        print(f"  FAILED: {failure[:1000]}")
    print(f"soak: {f'FAILED, {len(report.failures)} failures' if report.failures else 'good'}; see build/soak.svg")
    return bool(report.failures)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description="Load and faults for a long time: does anything grow?")
    _parser.add_argument("--minutes", type=float, default=30.0)
    _, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(16384, _hard) if _hard > 0 else 16384, _hard))
    sys.exit(main(_parser.parse_args()))
