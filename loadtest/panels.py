"""The dashboard without Grafana: its queries, asked of a real Prometheus that scrapes a server under load, as pictures.

`make panels` starts a server with two workers, people who call each other, hold meetings and do what they should not,
and a Prometheus; after SECONDS it writes docs/img/panels, one picture for each row of deploy/grafana/fastsig.json. Two
thirds through, worker 1 is killed: a dashboard must show that. To be looked at, not compared: the numbers differ every
time.

`views` is what the dashboard asks for, also for its tests. The people are plain WebSocket clients, so that this shows
what a stranger's clients look like.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from fastsig import status
from loadtest.plot import Line, Panel, over_time
from tests.e2e.conftest import Server, free_port
from tests.e2e.prometheus import Prometheus, scraping

ROOT: Final = Path(__file__).parent.parent
DASHBOARD: Final = ROOT / "deploy" / "grafana" / "fastsig.json"
IMAGES: Final = ROOT / "docs" / "img" / "panels"
FIRST_PAGE: Final = "First page"
STEP_S: Final = 2.0
WINDOW_S: Final = 10  # $__rate_interval
MOST_LINES: Final = 8  # that a panel of a picture can name
MIB: Final = 1 << 20


# ---- what the dashboard asks for


@dataclass(frozen=True)
class Query:
    """`legend`: a series' name, with {{label}} for the value of a label."""

    expression: str
    legend: str

    def name(self, labels: dict[str, str]) -> str:
        return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), self.legend).strip()


@dataclass(frozen=True)
class View:
    """One panel. `has_gaps_for_zero`: its query drops what is 0."""

    row: str
    title: str
    unit: str
    queries: Sequence[Query]
    has_gaps_for_zero: bool


def views() -> list[View]:
    """All panels, from the first page down."""
    found = []
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        row, inner = (panel["title"], panel["panels"]) if panel["type"] == "row" else (FIRST_PAGE, [panel])
        found += [_view(row, each) for each in inner]
    return found


def _view(row: str, panel: dict[str, Any]) -> View:
    queries = [Query(target["expr"], target["legendFormat"]) for target in panel["targets"]]
    has_gaps = any(query.expression.endswith("> 0") for query in queries)
    return View(row, panel["title"], panel["fieldConfig"]["defaults"]["unit"], queries, has_gaps)


def filled(expression: str, *, window: str, span: str) -> str:
    """As Grafana sends it: its variables replaced. `window`: of a rate; `span`: all that is shown."""
    values = {"__rate_interval": window, "__range": span, "job": ".*", "instance": ".*"}
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expression)


def metrics_of(expression: str) -> set[str]:
    """The names of ours that stand in it."""
    return set(re.findall(r"\bfastsig_\w+", expression))


# ---- people


class Person:
    """One peer in one room, on a connection of its own. `names_room`: in the URL, to be served by the room's owner."""

    def __init__(self, url: str, room: str, *, names_room: bool) -> None:
        self.room = room
        self.name = ""
        self._connecting = connect(f"{url}?room={room}" if names_room else url, proxy=None, max_queue=None)
        self._connection: ClientConnection | None = None
        self._heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._connection = await self._connecting
        self._reader = asyncio.create_task(self._read(self._connection))
        try:
            await self.say("join")
            self.name = (await self.hear("joined"))["sender"]
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._connection is not None
        await self._connection.close()
        if self._reader is not None:
            await self._reader

    async def _read(self, connection: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for text in connection:
                self._heard.put_nowait(json.loads(text))

    async def say(self, kind: str, recipient: str | None = None, payload: Any = None) -> None:
        assert self._connection is not None
        message = {"type": kind, "room": self.room, "recipient": recipient, "payload": payload}
        await self._connection.send(json.dumps({name: value for name, value in message.items() if value is not None}))

    async def hear(self, kind: str, timeout_s: float = 5.0) -> dict[str, Any]:
        """The next message of this type; others are skipped. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while (message := await self._heard.get())["type"] != kind:
                pass
        return message

    async def break_off(self) -> None:
        """Without a word, as when the network goes."""
        assert self._connection is not None
        self._connection.transport.abort()


class Town:
    """Everybody, until cancelled. What a dead worker does to them is no failure: they come back."""

    def __init__(self, url: str, port: int) -> None:
        self.url = url
        self.port = port
        self._chance = random.Random(1)
        self._numbers = itertools.count()

    async def live(self) -> None:
        async with asyncio.TaskGroup() as everybody:
            for _ in range(25):
                everybody.create_task(self._over_and_over(self._call))
            for _ in range(3):
                everybody.create_task(self._over_and_over(self._meeting))
            everybody.create_task(self._over_and_over(self._mischief))
            everybody.create_task(self._over_and_over(self._flood))

    async def _over_and_over(self, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(self._chance.uniform(0, 3))
            # AttributeError: asyncio's, where a transport is aborted that was lost while output waited for its close
            with contextlib.suppress(OSError, TimeoutError, ConnectionClosed, InvalidHandshake, AttributeError):
                await act()

    def _person(self, room: str) -> Person:
        return Person(self.url, room, names_room=self._chance.random() < 0.6)

    def _candidate(self) -> tuple[str, str]:
        """Its type, and the line."""
        kind = self._chance.choices(("host", "srflx", "relay"), (5, 3, 2))[0]
        return kind, f"candidate:1 1 udp 2122260223 192.0.2.{self._chance.randrange(1, 255)} 46154 typ {kind}"

    async def _call(self) -> None:
        """Two meet: offer, answer, candidates, reports, and after a while they hang up."""
        room = f"call-{next(self._numbers)}"
        async with self._person(room) as callee, self._person(room) as caller:
            sdp = "v=0\r\n" + "a=rtpmap:111 opus/48000/2\r\n" * self._chance.randrange(40, 120)
            await caller.say("offer", callee.name, {"sdp": sdp})
            await callee.hear("offer")
            await asyncio.sleep(self._chance.expovariate(3))
            if self._chance.random() > 0.12:  # else nobody picks up
                await callee.say("answer", caller.name, {"sdp": sdp[: len(sdp) // 2]})
                await self._connect(callee, caller)
            await asyncio.sleep(self._chance.uniform(3, 12))
            if self._chance.random() < 0.1:
                await caller.break_off()

    async def _connect(self, callee: Person, caller: Person) -> None:
        ends = ((callee, caller), (caller, callee))
        used = {}
        for person, other in ends:
            found = [self._candidate() for _ in range(self._chance.randrange(2, 9))]
            used[person] = found[-1][0]
            for _, line in found:
                await person.say("ice-candidate", other.name, {"candidate": line})
        took_ms, is_good = round(self._chance.lognormvariate(6.3, 0.5)), self._chance.random() > 0.07
        for person, other in ends:
            path = {"ms": took_ms, "local": used[person], "remote": used[other], "protocol": "udp"} if is_good else {}
            await person.say("report", other.name, {"outcome": "connected" if is_good else "failed"} | path)

    async def _meeting(self) -> None:
        """Somebody speaks to many."""
        room = f"meeting-{next(self._numbers)}"
        async with contextlib.AsyncExitStack() as stack:
            people = [await stack.enter_async_context(self._person(room)) for _ in range(self._chance.randrange(4, 14))]
            for _ in range(120):
                await people[0].say("message", payload={"text": "x" * self._chance.randrange(20, 400)})
                await asyncio.sleep(0.2)

    async def _mischief(self) -> None:
        """Somebody asks for what is not there, and does what is not allowed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /nothing HTTP/1.1\r\nHost: here\r\n\r\n")
        await reader.read()
        writer.close()
        async with self._person(f"odd-{next(self._numbers)}") as person:
            await person.say("offer", "nobody", {})
            await person.say("unheard-of")
            await asyncio.sleep(1)

    async def _flood(self) -> None:
        """Somebody is sent much, and does not read for a while."""
        room = f"flood-{next(self._numbers)}"
        async with self._person(room) as sender, connect(self.url, proxy=None, max_queue=1) as deaf:
            await deaf.send(json.dumps({"type": "join", "room": room, "sender": "deaf"}))
            await sender.hear("peer-joined")
            for _ in range(180):
                await sender.say("message", "deaf", "x" * 60_000)
            await asyncio.sleep(3)
            deaf.transport.abort()
        await asyncio.sleep(20)


# ---- pictures


def scaled(unit: str, most: float) -> tuple[str, float]:
    """The unit to write, and by what to multiply, where `most` is the largest value in Grafana's `unit`."""
    per_s = "/s" if unit == "binBps" else ""
    match unit:
        case "s" if most < 0.001:
            return "µs", 1e6
        case "s" if most < 1:
            return "ms", 1e3
        case "bytes" | "binBps":
            size = next((size for size in ((MIB, "MiB"), (1024, "KiB")) if most >= size[0]), (1, "B"))
            return size[1] + per_s, 1 / size[0]
    known = {
        "s": ("s", 1), "percentunit": ("%", 100), "short": ("number", 1), "mps": ("messages/s", 1),
        "eps": ("events/s", 1), "reqps": ("requests/s", 1), "d": ("days", 1),
    }  # fmt: skip
    return known[unit]


def drawn(view: View, prometheus: Prometheus, start: float, end: float) -> Panel:
    """One panel of a picture, in seconds since `start`."""
    lines: list[Line] = []
    for query in view.queries:
        expression = filled(query.expression, window=f"{WINDOW_S}s", span=f"{end - start:.0f}s")
        for labels, values in prometheus.during(expression, start, end, STEP_S):
            points = {round(at - start, 3): value for at, value in values if not math.isnan(value)}
            if view.has_gaps_for_zero:
                points = dict.fromkeys(_steps(end - start), 0.0) | points
            lines.append(Line(query.name(labels) or view.title.lower(), sorted(points.items())))
    lines.sort(key=lambda line: -max((y for _, y in line.points), default=0.0))
    most = max((y for line in lines for _, y in line.points), default=0.0)
    label, factor = scaled(view.unit, most)
    title = view.title if len(lines) <= MOST_LINES else f"{view.title}: the {MOST_LINES} largest of {len(lines)}"
    shown = [Line(line.name, [(x, y * factor) for x, y in line.points]) for line in lines[:MOST_LINES]]
    return Panel(title, label, shown, absent="nothing to show")


def _steps(seconds: float) -> Iterator[float]:
    return (STEP_S * number for number in range(int(seconds / STEP_S) + 1))


def pictures(prometheus: Prometheus, start: float, end: float, killed_at: float) -> dict[str, str]:
    """File name → SVG, for each row."""
    made = {}
    for row, found in itertools.groupby(views(), key=lambda view: view.row):
        shown = [drawn(view, prometheus, start, end) for view in found]
        subtitle = "one server, two workers, some hundred peers on one small machine"
        made[re.sub(r"\W+", "-", row.lower()) + ".svg"] = over_time(
            row, subtitle, "seconds", shown, marks=[killed_at - start], mark="worker 1 is killed", columns=2
        )
    return made


async def run(seconds: float) -> dict[str, str]:
    """Serve, load, scrape, and ask."""
    with tempfile.TemporaryDirectory(prefix="fastsig-panels-") as name:
        ops_port = free_port()
        server = Server("--workers", "2", "--ops.port", str(ops_port), cwd=Path(name))
        try:
            port = server.port
            with scraping(Path(name) / "prometheus", f"127.0.0.1:{ops_port}") as prometheus:
                start = time.time()
                town = asyncio.create_task(Town(server.url, port).live())
                await asyncio.sleep(seconds * 2 / 3)
                workers = await asyncio.to_thread(status.ask, server.runtime_dir, port)
                os.kill(workers.workers[1].pid or 0, signal.SIGKILL)
                killed_at = time.time()
                await asyncio.sleep(seconds / 3)
                made = await asyncio.to_thread(pictures, prometheus, start, time.time(), killed_at)
                town.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await town
                return made
        finally:
            server.stop()


def main() -> None:
    """Write docs/img/panels."""
    parser = argparse.ArgumentParser(description="The dashboard's queries, plotted from a real Prometheus.")
    parser.add_argument("--seconds", type=float, default=90.0)
    made = asyncio.run(run(parser.parse_args().seconds))
    IMAGES.mkdir(exist_ok=True)
    for name, text in made.items():
        (IMAGES / name).write_text(text, encoding="utf-8")
        print(f"docs/img/panels/{name}: {len(text) // 1024} KiB")


if __name__ == "__main__":
    main()
