"""Workers that die in the midst of moves: a connection is served or closed, never both, and nobody hangs.

A debug build kills itself at the points of `fastsig.faults`, by chance. Pairs come all the time, join in-band, speak
right behind the join, talk, and send `ping` messages all the while. Of each connection: its join and each ping are
answered once, within SERVED_S, unless it has ended; what comes of others comes in order and never twice (`peers`); no
frame is garbage. A gap between messages is excused where a worker died while the two met, and nowhere else.

A slot whose worker died within ten seconds of its start waits longer and longer (`fleet`): so several servers stand
side by side, each of which loses a worker every few seconds. At the end, when all have gone, every worker has as many
descriptors as in the beginning, and every gauge is 0.
"""

import asyncio
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loadtest.faults import (
    FAULT,
    QUIET_S,
    Report,
    _descriptors_at_rest,
    _is_empty_again,
    _running,
    _status,
    _until,
)
from tests.e2e.conftest import Server
from tests.e2e.swarm import RefusedError, Swarm

from .peers import Meeting, Peer

ROOT: Final = Path(__file__).parent.parent.parent
FOLDER: Final = ROOT / "build" / "moves"
MOVER: Final = ("offer-unsaid", "offer-said", "accept-heard", "confirm-said", "let-go")
ADOPTER: Final = ("offer-heard", "accept-said", "confirm-heard", "adopted", "joined")
SERVED_S: Final = 15.0
STAY_S: Final = (0.3, 1.5)
TURN_S: Final = 0.15
WORDS: Final = 6  # said right behind a join
BEFORE_S: Final = 2.0  # for so long a death may be felt: until its slot has links again
AFTER_S: Final = 0.5  # a death is seen a moment later than its silence
NO_DEATH_S: Final = 30.0
LIMIT_S: Final = 400.0


def build() -> Path:
    """A debug build in a folder of its own; what PYTHONPATH has to be."""
    library = FOLDER / "lib"
    shutil.rmtree(library, ignore_errors=True)
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(FOLDER), "--build-lib", str(library)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"FASTSIG_DEBUG": "1"}, check=True, stdout=subprocess.DEVNULL)
    return library


@dataclass
class Scene:
    """One server, its visitors, and the deaths of its workers: when they were seen, monotonic seconds."""

    server: Server
    swarm: Swarm
    before: dict[str, int]
    deaths: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)  # of connections: how they ended
    visits: int = 0

    def faults(self) -> list[str]:
        """The points at which workers died, in order."""
        return [line.removeprefix(FAULT) for line in self.server.stderr_lines() if line.startswith(FAULT)]


async def kill(
    workers: int = 4, deaths: int = 200, *, servers: int = 3, rate: float = 40.0, chance: float = 0.0012,
    library: Path | None = None,
) -> Report:  # fmt: skip
    """So many deaths on all servers together. `rate`: connections a second to each; `chance`: of a death at a point."""
    report = Report("kill", workers)
    library = library or await asyncio.to_thread(build)
    env = {"PYTHONPATH": str(library), "FASTSIG_FAULTS": str(chance)}
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        scenes = []
        for _ in range(servers):
            server = await stack.enter_async_context(_running(report, env=env))
            swarm = Swarm(server.url)
            swarm.fault()
            swarm.is_over = True  # whoever is closed was closed by a death, or else `_judge` says so
            swarm.tolerated |= {"not_joined", "peer_unavailable"}
            scenes.append(Scene(server, swarm, await _descriptors_at_rest(server)))
        await _until_all_died(report, scenes, deaths, rate)
        for scene in scenes:
            await _is_as_before(report, scene)
    report.expect(time.monotonic() - began < LIMIT_S, f"it took longer than {LIMIT_S:.0f} s")
    _sum_up(report, scenes, deaths)
    return report


async def _until_all_died(report: Report, scenes: list[Scene], deaths: int, rate: float) -> None:
    """Visitors come until then; who is there then is served to the end."""
    began = time.monotonic()
    tasks: set[asyncio.Task[None]] = set()
    number = 0
    while (died := _see(scenes)) < deaths:
        waited_s = time.monotonic() - began
        if waited_s > LIMIT_S or (waited_s > NO_DEATH_S and not died):
            report.failures.append(f"{died} deaths, not {deaths}, within {waited_s:.0f} s")
            break
        if 2 * number < waited_s * rate:
            for place, scene in enumerate(scenes):
                task = asyncio.ensure_future(_meet(scene, f"room-{place}-{number}"))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    report.figures["seconds"] = round(time.monotonic() - began, 1)


def _see(scenes: list[Scene]) -> int:
    """How many have died so far. Called every few milliseconds: that is how well it is known when."""
    for scene in scenes:
        scene.deaths += [time.monotonic()] * (len(scene.faults()) - len(scene.deaths))
    return sum(len(scene.deaths) for scene in scenes)


# ---- one pair


async def _meet(scene: Scene, room: str) -> None:
    """Two come at once; what they heard of each other is judged when both have gone."""
    meeting = Meeting(scene.swarm, room, 2, WORDS)
    began = time.monotonic()
    chance = random.Random(room)
    stay_s = chance.uniform(*STAY_S)
    await asyncio.gather(*(_visit(scene, peer, stay_s, chance) for peer in meeting.peers.values()))
    await asyncio.sleep(AFTER_S)
    ended = time.monotonic()
    is_excused = any(began - BEFORE_S <= at <= ended for at in scene.deaths)
    lost = [loss for loss in scene.swarm.losses if loss.room == room]
    scene.swarm.losses = [loss for loss in scene.swarm.losses if loss.room != room]
    for loss in lost:
        if is_excused:
            scene.swarm.counts["excused"] += 1
        else:
            scene.swarm.violation(f"lost, and no worker died: {loss.detail}")
    scene.ends["in rooms without a death"] += 0 if is_excused else len(meeting.peers)


async def _visit(scene: Scene, peer: Peer, stay_s: float, chance: random.Random) -> None:
    """Come, speak, and go when everything is answered; or be closed meanwhile."""
    swarm = scene.swarm
    scene.visits += 1
    try:
        await peer.connect()
    except TimeoutError:
        swarm.violation(f"{peer.name}: no answer to its handshake")
        return
    except (OSError, RefusedError):
        scene.ends["not let in"] += 1
        return
    asked = peer.enter([], WORDS)
    until = time.monotonic() + stay_s
    while peer.is_connected and time.monotonic() < until:
        peer.ping()
        peer.tell_somebody(chance)
        await asyncio.sleep(TURN_S * chance.uniform(0.5, 1.5))
    if not await _until(lambda: peer.is_answered or not peer.is_connected, SERVED_S):
        unanswered = [mark for mark, count in peer.pings.items() if not count]
        swarm.violation(f"{peer.name} is stuck: join answered {peer.has_answer}, unanswered {unanswered[:5]}")
    if not peer.is_connected:
        scene.ends[f"closed, {peer.close_code or ('reset' if peer.was_reset else 'no close frame')}"] += 1
        since = until - stay_s - BEFORE_S
        if not await _until(lambda: any(at >= since for at in scene.deaths), AFTER_S):
            swarm.violation(f"{peer.name} was closed ({peer.close_code}), and no worker died")
        return
    answer = asked.result() if peer.has_answer else {}
    scene.ends[str(answer.get("code", answer.get("type", "unanswered")))] += 1
    if answer.get("type") != "joined" and answer.get("code") != "backend_unavailable":
        swarm.violation(f"{peer.name}: its join was answered {answer}")
    peer.tell_all()  # whoever is there hears it, and knows by it what should have come
    await peer.close()


# ---- the end


async def _is_as_before(report: Report, scene: Scene) -> None:
    async def are_all_back() -> bool:
        return all(worker.pid is not None for worker in (await _status(scene.server)).workers)

    report.expect(await _until_so(are_all_back, QUIET_S), "some workers do not come back")
    await _is_empty_again(report, scene.server, scene.before)
    report.take(scene.swarm)


async def _until_so(is_so: Callable[[], Awaitable[bool]], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not await is_so():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True


def _sum_up(report: Report, scenes: list[Scene], deaths: int) -> None:
    points = Counter(point for scene in scenes for point in scene.faults())
    ends: Counter[str] = Counter()
    for scene in scenes:
        ends.update(scene.ends)
        ends["excused losses"] += scene.swarm.counts["excused"]
    report.figures |= {
        "visits": sum(scene.visits for scene in scenes),
        "deaths": sum(points.values()),
        "of movers at": {point: points[point] for point in MOVER},
        "of adopters at": {point: points[point] for point in ADOPTER},
        "ends": dict(sorted(ends.items())),
    }
    if deaths >= 100:  # fewer may miss one by chance
        missed = [point for point in MOVER + ADOPTER if not points[point]]
        report.expect(not missed, f"nobody died at {missed}")
    report.expect(set(points) <= set(MOVER + ADOPTER), f"unknown points: {dict(points)}")
