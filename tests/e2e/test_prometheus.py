"""A real Prometheus scrapes a running server: the dashboard finds its metrics there, and alerts fire in time."""

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection, connect

from fastsig import status
from loadtest import panels
from tests.e2e.conftest import Server, free_port
from tests.e2e.prometheus import INSTANCE, MISSING, Prometheus, in_seconds, is_installed, scraping

Serve = Callable[..., Server]
FIRE_S = 25.0
LATE_S, ON_TIME_S = 0.45, 0.1  # in turns: too short to be stuck, and no timer is on time for long
SUCCESS = "job:fastsig_peer_connection_success:ratio_rate15m"


@pytest.fixture(autouse=True)
def _installed() -> None:
    if not is_installed():
        pytest.skip(MISSING)


@contextlib.asynccontextmanager
async def scraped(serve: Serve, folder: Path, *args: str) -> AsyncIterator[tuple[Server, Prometheus]]:
    port = free_port()
    server = await asyncio.to_thread(serve, "--ops.port", str(port), *args)
    with scraping(folder / "prometheus", f"127.0.0.1:{port}") as prometheus:
        yield server, prometheus


async def _report(peer: ClientConnection, outcome: str, count: int) -> None:
    """Each of another peer. All are counted when this returns: the answer to the ping comes after them."""
    payload = {"outcome": outcome, "ms": 250} if outcome == "connected" else {"outcome": outcome}
    for number in range(count):
        report = {"type": "report", "room": "r", "recipient": f"gone-{number}", "payload": payload}
        await peer.send(json.dumps(report))
    await peer.send('{"type":"ping","id":"last"}')
    answer = json.loads(await peer.recv())
    assert (answer["type"], answer.get("id")) == ("pong", "last")


def _pids(server: Server) -> dict[int, int]:
    found = status.ask(server.runtime_dir, server.port).workers
    return {worker.slot: worker.pid for worker in found if worker.pid}


@contextlib.contextmanager
def _stopping_again_and_again(pid: int) -> Iterator[None]:
    """Its loop turns, but late nearly every time."""
    is_over = threading.Event()

    def stop_and_go() -> None:
        while not is_over.wait(ON_TIME_S):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(LATE_S)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


async def test_alerts_fire_for_workers_that_die_stick_and_are_late_and_for_failing_calls(
    serve: Serve, tmp_path: Path
) -> None:
    """And nothing else does; a stop alone, which is one late timer, is no late loop."""
    async with scraped(serve, tmp_path, "--workers", "2") as (server, prometheus):
        assert prometheus.now("fastsig_ready")[0][1] == 1
        assert prometheus.now(SUCCESS) == [], "a share of nothing is not guessed"
        assert prometheus.firing() == {}
        pids = await asyncio.to_thread(_pids, server)
        async with connect(server.url, proxy=None) as peer:
            await peer.send('{"type":"join","room":"r"}')
            await peer.recv()
            await _report(peer, "connected", 10)
            await _report(peer, "failed", 30)
        os.kill(pids[1], signal.SIGKILL)
        fired: dict[str, dict[str, str]] = {}

        async def wait_for(*names: str) -> None:
            def have_fired(prometheus: Prometheus) -> bool:
                fired.update(prometheus.firing())
                return fired.keys() >= set(names)

            await asyncio.to_thread(prometheus.wait_for, have_fired, f"not all of {names} fired", FIRE_S)

        await wait_for("FastsigWorkerDying", "FastsigFailingCalls")
        ((_, share),) = prometheus.now(f"last_over_time({SUCCESS}[30s])")
        assert share == pytest.approx(0.25, abs=0.05)
        os.kill(pids[0], signal.SIGSTOP)
        try:
            await wait_for("FastsigWorkerMissing")
        finally:
            os.kill(pids[0], signal.SIGCONT)
        assert fired.keys() == {"FastsigWorkerDying", "FastsigFailingCalls", "FastsigWorkerMissing"}
        with _stopping_again_and_again(pids[0]):
            await wait_for("FastsigLoopLag")
        assert fired.keys() == {
            "FastsigWorkerDying", "FastsigFailingCalls", "FastsigWorkerMissing", "FastsigLoopLag"
        }  # fmt: skip
        assert (fired["FastsigWorkerDying"]["worker"], fired["FastsigWorkerDying"]["instance"]) == ("1", INSTANCE)
        assert (fired["FastsigLoopLag"]["worker"], fired["FastsigLoopLag"]["severity"]) == ("0", "warning")
        assert fired["FastsigFailingCalls"]["severity"] == fired["FastsigWorkerMissing"]["severity"] == "critical"
        assert fired["FastsigWorkerMissing"]["instance"] == INSTANCE


async def test_each_panel_asks_for_what_a_server_has_and_can_be_drawn(serve: Serve, tmp_path: Path) -> None:
    async with scraped(serve, tmp_path) as (_, prometheus):
        names, views, now = prometheus.names(), panels.views(), time.time()
        for view in views:
            for query in view.queries:
                assert panels.metrics_of(query.expression) <= names
        drawn = panels.pictures(prometheus, now - 10, now, now)
        assert drawn.keys() == {path.name for path in panels.IMAGES.glob("*.svg")}
        texts = {node.text or "" for svg in drawn.values() for node in ET.fromstring(svg).iter()}
        assert all(any(text.startswith(view.title) for text in texts) for view in views)


def test_rules_for_a_test_differ_in_time_only() -> None:
    assert in_seconds("rate(x[15m])\n for: 2m\n a: for 5m, y[1h] offset 1d") == (
        "rate(x[15s])\n for: 2s\n a: for 5m, y[1h] offset 1d"
    )
