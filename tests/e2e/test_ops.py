"""The operations port of real servers: what it says while workers come, stick, die and drain."""

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from websockets.asyncio.client import connect

from fastsig import status
from fastsig.metrics import PREFIX
from tests.e2e.conftest import PYTHON, Server, free_port, is_running, run_with, until

Serve = Callable[..., Server]
END_S = 15.0
TOKEN = "correct-horse"


class Answer(NamedTuple):
    status: int
    body: str


class Port:
    """The operations port of a server."""

    def __init__(self, number: int, **headers: str) -> None:
        self.number = number
        self._headers = headers

    def get(self, path: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.number, timeout=END_S)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=self._headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.read().decode())

    def value(self, name: str, **labels: str) -> float:
        """Of one series."""
        (found,) = (
            sample.value
            for family in parse(self.get("/metrics").body)
            for sample in family.samples
            if sample.name == PREFIX + name and sample.labels == labels
        )
        return found

    def workers(self) -> list[dict[str, Any]]:
        stats: list[dict[str, Any]] = json.loads(self.get("/debug/stats").body)["workers"]
        return stats


def opened(serve: Serve, *args: str) -> tuple[Server, Port]:
    number = free_port()
    return serve("--ops.port", str(number), *args), Port(number)


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-m", "fastsig", "serve", "--port", "0", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


def _answers(port: Port) -> bool:
    with contextlib.suppress(OSError):
        return port.get("/livez").status == 200
    return False


# ---- a server that is well


def test_port_is_named_in_the_log_and_serves_all_its_paths(serve: Serve) -> None:
    server, port = opened(serve, "--workers", "2")
    assert server.wait_for("operations")["urls"] == [f"http://127.0.0.1:{port.number}"]
    assert port.get("/readyz") == (200, "OK\n")
    assert port.get("/livez?verbose").body.splitlines() == [
        "[+]supervisor ok", "[+]server serving", "[+]worker 0 ok", "[+]worker 1 ok", "live",
    ]  # fmt: skip
    assert "/metrics" in port.get("/").body


async def test_metrics_follow_what_happens(serve: Serve) -> None:
    server, port = opened(serve, "--workers", "2")
    async with connect(server.url, proxy=None) as a, connect(server.url, proxy=None) as b:
        for websocket in (a, b):
            await websocket.send('{"type":"join","room":"r"}')
            await websocket.recv()

        def seen() -> None:
            until(lambda: sum(port.value("members", worker=slot) for slot in "01") == 2, "no members are shown")
            assert sum(port.value("connections", worker=slot) for slot in "01") == 2
            assert port.value("rooms", size="2") == 1
            assert port.value("workers", state="serving") == 2 and port.value("ready") == 1

        await asyncio.to_thread(seen)


def test_processes_are_shown_as_the_kernel_sees_them(serve: Serve) -> None:
    server, port = opened(serve)
    (worker,) = port.workers()
    kernel = status.read_process(worker["pid"])
    assert kernel is not None
    resident = port.value("process_resident_memory_bytes", process="worker", worker="0")
    assert resident == pytest.approx(kernel.memory_bytes, rel=0.2)
    assert port.value("process_cpu_seconds_total", process="worker", worker="0") >= kernel.cpu_seconds
    descriptors = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
    assert port.value("process_open_fds", process="supervisor", worker="") == pytest.approx(descriptors, abs=3)
    assert port.value("process_max_fds", process="supervisor", worker="") >= 1024
    assert abs(port.value("start_time_seconds") - time.time()) < 60


def test_promtool_has_no_complaint(serve: Serve) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: apt-get install prometheus")
    _, port = opened(serve, "--workers", "2")
    page = port.get("/metrics").body
    run = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_stats_show_each_worker(serve: Serve) -> None:
    server, port = opened(serve, "--workers", "2")
    stats = json.loads(port.get("/debug/stats").body)
    assert (stats["pid"], stats["urls"]) == (server.process.pid, server.wait_for("serving")["urls"])
    assert stats["tasks"] < 20 and stats["usage"]["memory_bytes"] > 1 << 20
    assert [worker["slot"] for worker in stats["workers"]] == [0, 1]
    for worker in stats["workers"]:
        assert (worker["generation"], worker["state"]) == (1, "serving")
        assert is_running(worker["pid"]) and "error" not in worker
        assert worker["silent_seconds"] < 5 and worker["loop_lag_seconds"] < 5
        assert worker["usage"]["open_fds"] > 5 and worker["usage"]["memory_bytes"] > 1 << 20
        assert worker["stats"]["tasks"] >= 1 and len(worker["stats"]) > 3


# ---- a server that is not


def test_stuck_worker_is_named_and_the_server_stays_ready(serve: Serve) -> None:
    _, port = opened(serve, "--workers", "2")
    stuck = port.workers()[1]["pid"]
    os.kill(stuck, signal.SIGSTOP)
    try:
        until(lambda: "[-]worker 1 stuck" in port.get("/readyz?verbose").body, "nobody noticed")
        assert port.get("/readyz").status == port.get("/livez").status == 200
        assert port.value("workers", state="stuck") == port.value("workers", state="serving") == 1
        began = time.monotonic()
        well, ill = port.workers()
        assert time.monotonic() - began < END_S / 2
        assert "error" not in well and ill["error"] == "no answer within 1 s" and ill["silent_seconds"] > 1
    finally:
        os.kill(stuck, signal.SIGCONT)
    until(lambda: all("stats" in worker for worker in port.workers()), "it does not answer again")


def test_server_whose_only_worker_is_stuck_is_not_ready(serve: Serve) -> None:
    _, port = opened(serve)
    (worker,) = port.workers()
    os.kill(worker["pid"], signal.SIGSTOP)
    try:
        until(lambda: port.get("/readyz").status == 503, "nobody noticed")
        assert port.get("/livez").status == 200 and port.value("ready") == 0
    finally:
        os.kill(worker["pid"], signal.SIGCONT)
    until(lambda: port.get("/readyz").status == 200, "nobody noticed that it is well")


_SLOW = """
channel.send(Ready(1))
asked = 0
while not isinstance(message := channel.receive(), Stop):
    if isinstance(message, Inspect):
        asked += 1
        open("asked", "w").write(str(asked))
        while asked == 1 and not os.path.exists("go"): time.sleep(0.02)
        channel.send(Inspected({"asked": asked}))
"""


def test_worker_that_has_not_answered_is_not_asked_again(tmp_path: Path) -> None:
    """Or questions would heap up before one that is stuck."""
    number = free_port()
    process = run_with(tmp_path, _SLOW, options={"ops.port": number, "server.drain_seconds": 0.0})
    port = Port(number)
    try:
        until(lambda: _answers(port) and port.get("/readyz").status == 200, "it is never ready")
        threads = [threading.Thread(target=port.get, args=("/debug/stats",)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(END_S)
        assert port.workers()[0]["error"] == "no answer within 1 s"
        (tmp_path / "go").touch()
        until(lambda: port.workers()[0].get("stats") == {"asked": 2}, "it is not asked again")
    finally:
        process.terminate()
        process.communicate(timeout=END_S)


def test_dead_worker_is_replaced_and_counted(serve: Serve) -> None:
    server, port = opened(serve)
    (worker,) = port.workers()
    os.kill(worker["pid"], signal.SIGKILL)
    server.wait_for("worker_ready")
    assert port.value("worker_restarts_total", worker="0") == port.value("worker_deaths_total", worker="0") == 1
    assert port.workers()[0]["generation"] == 2


def test_worker_that_cannot_be_started_again_is_counted_as_dead_each_time(tmp_path: Path) -> None:
    """Its interpreter has gone, as in an upgrade that went wrong. The other serves on, and nothing else would tell."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{PYTHON}" "$@"\n', encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    number = free_port()
    process = run_with(
        tmp_path,
        "channel.send(Ready(1)); open(f'pid-{boot.slot}', 'w').write(str(os.getpid())); wait(Stop)",
        slots=2, prepare=f"sys.executable = {str(tmp_path / 'python')!r}",
        options={"ops.port": number, "server.drain_seconds": 0.0},
    )  # fmt: skip
    port = Port(number)
    try:
        until(lambda: len(list(tmp_path.glob("pid-*"))) == 2 and _answers(port), "they are never ready")
        (tmp_path / "python").unlink()
        os.kill(int((tmp_path / "pid-1").read_text(encoding="utf-8")), signal.SIGKILL)
        until(lambda: port.value("worker_deaths_total", worker="1") >= 3, "its starts that fail are not counted")
        assert port.value("worker_restarts_total", worker="1") == port.value("worker_deaths_total", worker="0") == 0
        assert port.value("workers", state="absent") == 1
    finally:
        process.terminate()
        process.communicate(timeout=END_S)


def test_bug_that_ends_a_worker_is_counted(tmp_path: Path) -> None:
    number = free_port()
    source = """        if boot.generation == 1:
            channel.send(Ready(1))
            sys.exit(1)
        import uvloop
        from fastsig import worker
        end.setblocking(False)
        worker._freeze = lambda: 1 / 0
        uvloop.run(worker._serve(boot, channel))
    """
    process = run_with(tmp_path, source, options={"ops.port": number, "server.drain_seconds": 0.0})
    port = Port(number)
    try:
        until(lambda: _answers(port) and port.value("internal_errors_total") >= 1, "it is not counted")
        assert port.value("worker_deaths_total", worker="0") >= 1
    finally:
        process.terminate()
        process.communicate(timeout=END_S)


def test_bug_in_a_callback_is_counted_and_ends_nothing(tmp_path: Path) -> None:
    number = free_port()
    source = """        import asyncio
        import uvloop
        from fastsig import worker
        end.setblocking(False)
        worker._freeze = lambda: asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        uvloop.run(worker._serve(boot, channel))
    """
    process = run_with(tmp_path, source, options={"ops.port": number, "server.drain_seconds": 0.0})
    port = Port(number)
    try:
        until(lambda: _answers(port) and port.value("internal_errors_total") == 1, "it is not counted")
        until(lambda: port.get("/readyz").status == 200, "the worker does not serve")
        assert port.value("worker_deaths_total", worker="0") == 0
    finally:
        process.terminate()
        _, said = process.communicate(timeout=END_S)
    assert said.count("internal_error") == 1 and "ZeroDivisionError" in said


def test_server_that_starts_is_live_and_not_ready(tmp_path: Path) -> None:
    number = free_port()
    waits = "time.sleep(0.1)\nwhile not os.path.exists('go'): time.sleep(0.02)\nchannel.send(Ready(1)); wait(Stop)"
    process = run_with(tmp_path, waits, options={"ops.port": number, "server.drain_seconds": 0.0})
    port = Port(number)

    try:
        until(lambda: _answers(port), "the port is not open while the worker starts")
        assert port.get("/readyz").status == 503
        assert "[-]worker 0 starting" in port.get("/readyz?verbose").body
        (tmp_path / "go").touch()
        until(lambda: port.get("/readyz").status == 200, "it is never ready")
    finally:
        process.terminate()
        process.communicate(timeout=END_S)


async def test_port_stays_open_through_a_drain(serve: Serve) -> None:
    server, port = opened(serve, "--server.drain-seconds", "2")
    async with connect(server.url, proxy=None) as websocket:
        server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(server.wait_for, "stopping")

        def drains() -> None:
            until(lambda: "[-]server draining" in port.get("/readyz?verbose").body, "it does not say so")
            assert (port.get("/livez").status, port.get("/readyz").status) == (200, 503)
            assert port.value("ready") == 0 and port.value("workers", state="draining") == 1

        await asyncio.to_thread(drains)
        await websocket.wait_closed()
    assert await asyncio.to_thread(server.process.wait, END_S) == 0
    with pytest.raises(ConnectionRefusedError):
        port.get("/livez")


def test_who_hangs_on_the_port_holds_up_no_stop(serve: Serve) -> None:
    server, port = opened(serve, "--server.drain-seconds", "0")
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", port.number), END_S))
            idle.sendall(b"GET /metrics HTT")
        assert port.get("/readyz").status == 200
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 5


# ---- options


def test_port_that_is_taken_is_one_line_and_exit_code_3() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        run = _run("--ops.port", str(number), "--log.format", "json")
    (line,) = run.stderr.splitlines()
    assert run.returncode == 3
    assert json.loads(line)["reason"] == (
        f"operations port: 127.0.0.1:{number} is in use by another process: end that, or choose another port by"
        " --ops.port (--ops.port 0 is none)"
    )


def test_port_beyond_loopback_needs_a_token() -> None:
    run = _run("--ops.host", "0.0.0.0", "--ops.port", str(free_port()))
    (line,) = run.stderr.splitlines()
    assert run.returncode == 2 and "ops.token" in line


def test_token_reloads_and_is_never_shown(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "fastsig.toml"
    file.write_text(f'[ops]\ntoken = "{TOKEN}"\n', encoding="utf-8")
    server, port = opened(serve, "--config", str(file), "--log.level", "debug")
    assert port.get("/metrics").status == 401 and port.get("/readyz").status == 200
    known = Port(port.number, Authorization=f"Bearer {TOKEN}")
    assert known.get("/metrics").status == 200
    file.write_text('[ops]\ntoken = "battery-staple"\n', encoding="utf-8")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("reloaded")
    assert known.get("/metrics").status == 401
    assert Port(port.number, Authorization="Bearer battery-staple").get("/metrics").status == 200
    assert not any(word in line for word in (TOKEN, "battery-staple") for line in server.stderr_lines())


def test_nobody_pays_for_the_port_who_has_none(serve: Serve) -> None:
    """Each library for it costs tens of MiB: neither a worker nor a supervisor without the port has loaded them."""
    server, port = opened(serve)
    (worker,) = port.workers()
    other = serve()
    assert _loaded(server.process.pid), "the test finds nothing anywhere"
    assert not _loaded(worker["pid"])
    assert not _loaded(other.process.pid)
    for command in (["--help"], ["config", "check"]):
        source = (
            f"import sys; from fastsig import cli; cli.main({command!r}); print(sorted(sys.modules), file=sys.stderr)"
        )
        run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
        assert "'aiohttp" not in run.stderr and "'prometheus_client" not in run.stderr


def _loaded(pid: int) -> bool:
    """Is aiohttp's compiled part mapped there?"""
    return "/aiohttp/" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
