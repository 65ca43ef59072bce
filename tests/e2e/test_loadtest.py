"""The load test itself: it reports what its users do, and it fails when the server does (`make loadtest`, shorter)."""

import asyncio
import base64
import contextlib
import csv
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve as serve_websocket
from websockets.exceptions import ConnectionClosed

from loadtest.run import LOCUSTFILE

from .conftest import Server, until

ROOT = Path(__file__).parent.parent.parent
SECONDS = 6
END_S = 30.0  # for Locust to start, to stop and to write its report
BRISK = (
    *("--hold", "1", "--think", "0.2", "--stay", "2", "--ping-every", "1", "--viewer-rate", "1"),
    *("--storm-every", "2", "--storm-spread", "0.5"),
)
ROWS = {
    "caller": {"connect", "time to joined", "offer to answer", "relay delay", "ping", "left"},
    "viewer": {"connect", "time to joined", "fan-out delay", "ping", "left"},
    "reloader": {"connect", "time to joined", "ping"},
    "engine": {"lag"},
}  # fmt: skip

pytestmark = pytest.mark.timeout(90)


class Outcome(NamedTuple):
    """Of one run: Locust's exit code, what it logged, and its tables of results and of errors, row by row."""

    code: int
    log: str
    rows: dict[tuple[str, str], dict[str, str]]
    errors: dict[str, int]

    def results(self, kind: str, name: str) -> int:
        return int(self.rows[kind, name]["Request Count"])

    def percentile(self, kind: str, name: str, which: str) -> float:
        return float(self.rows[kind, name][which])


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _run(url: str, folder: Path, *options: str, users: int = 60, seconds: float = SECONDS) -> Outcome:
    """Locust as `make loadtest` runs it. In a folder of its own: it must find its modules from anywhere."""
    done = subprocess.run(
        [
            sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless", "--only-summary",
            "--host", url, "--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds}s",
            "--csv", "result", "--html", "report.html", *options,
        ],
        cwd=folder, capture_output=True, text=True, check=False, timeout=seconds + END_S,
    )  # fmt: skip
    stats = [row for row in _rows(folder / "result_stats.csv") if row["Name"] != "Aggregated"]
    failures: dict[str, int] = {}
    for row in _rows(folder / "result_failures.csv"):
        failures[row["Error"]] = failures.get(row["Error"], 0) + int(row["Occurrences"])
    return Outcome(done.returncode, done.stderr, {(row["Type"], row["Name"]): row for row in stats}, failures)


def _drawn(folder: Path) -> str:
    """The text of the picture that we add to Locust's report."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == 1
    return base64.b64decode(pictures[0]).decode()


@contextlib.asynccontextmanager
async def _forgetful(server: Server, is_kept: Callable[[dict[str, Any]], bool]) -> AsyncIterator[str]:
    """The URL of a proxy before that server, which forgets what is not kept of what the server says."""

    async def forward(source: ClientConnection, sink: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for text in source:
                if is_kept(json.loads(text)):
                    await sink.send(text)
        await sink.close()

    async def handle(client: ServerConnection) -> None:
        assert client.request is not None
        at = f"ws://127.0.0.1:{server.port}{client.request.path}"
        async with connect(at, proxy=None, compression=None) as behind:
            forwarding = asyncio.ensure_future(forward(behind, client))
            with contextlib.suppress(ConnectionClosed):
                async for text in client:
                    await behind.send(text)
        await forwarding

    async with serve_websocket(handle, "127.0.0.1", 0, compression=None) as proxy:
        yield f"ws://127.0.0.1:{next(iter(proxy.sockets)).getsockname()[1]}/ws"


def test_all_kinds_of_users_are_in_the_tables_without_errors(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve("--workers", "2")
    outcome = _run(server.url, tmp_path, *BRISK)
    assert outcome.code == 0, outcome.log
    assert not outcome.errors
    seen: dict[str, set[str]] = {}
    for kind, name in outcome.rows:
        seen.setdefault(kind, set()).add(name)
    assert seen == ROWS
    assert outcome.results("caller", "offer to answer") > 10, "calls follow each other"
    assert outcome.results("reloader", "time to joined") >= 2 * 6, "every reloader has been through a storm"
    assert outcome.results("viewer", "fan-out delay") > 10 * SECONDS, "eighteen viewers, of whom each says something"
    assert 0 <= outcome.percentile("caller", "offer to answer", "50%") < 150, "the partner's thinking is not in it"
    assert outcome.log.count(": 0 errors in ") == 2 and "messages/s in one process" in outcome.log
    assert "offer to answer" in (tmp_path / "report.html").read_text(encoding="utf-8")
    picture = _drawn(tmp_path)
    assert picture.count("<polyline") == 3 + 4 * 2, "joins of three kinds, two shares of each other delay, no errors"
    assert re.search(r"95 % joined within \d+ ms and had their answer within \d+ ms; no errors", picture)


def test_server_that_refuses_fails_the_run(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Rooms of the load test have fifty seats, those of the server three."""
    server = serve("--limits.peers-per-room", "3")
    outcome = _run(server.url, tmp_path, *BRISK)
    assert outcome.code == 1, outcome.log
    assert set(outcome.errors) == {"room_full"}
    assert int(outcome.rows["viewer", "time to joined"]["Failure Count"]) > 0
    assert int(outcome.rows["caller", "time to joined"]["Failure Count"]) == 0, "two find room"
    assert outcome.log.count("more than 0.100 %") == 1, "the joins are too many, the messages are fine"
    picture = _drawn(tmp_path)
    assert ">room_full: " in picture, "a line of its own"
    assert re.search(r"; \d+ errors", picture)


def test_share_of_errors_that_is_allowed_is_an_option(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve("--limits.peers-per-room", "3")
    outcome = _run(server.url, tmp_path, *BRISK, "--max-error-ratio", "1", seconds=3)
    assert outcome.code == 0, outcome.log
    assert outcome.errors


def test_connections_that_the_server_closes_are_errors_with_their_code(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    """Most offers are longer than 1 KiB."""
    server = serve("--limits.message-bytes", "1024", "--limits.meta-bytes", "512")
    outcome = _run(server.url, tmp_path, *BRISK, "--viewers", "0", "--reloaders", "0", seconds=3)
    assert outcome.code == 1, outcome.log
    assert "closed 1009" in outcome.errors


def test_no_server_at_all_fails_the_run(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    url = server.url
    server.stop()
    outcome = _run(url, tmp_path, seconds=3)
    assert outcome.code == 1, outcome.log
    assert outcome.errors and all("ConnectionRefusedError" in error for error in outcome.errors)


def test_processes_add_up(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve("--workers", "2")
    outcome = _run(server.url, tmp_path, *BRISK, "--processes", "2")
    assert outcome.code == 0, outcome.log
    assert "in 2 workers" in outcome.log and not outcome.errors
    assert outcome.results("caller", "offer to answer") > 10
    assert ">callers: " in _drawn(tmp_path), "the master has what its workers saw"


async def test_message_that_does_not_come_is_lost(serve: Callable[..., Server], tmp_path: Path) -> None:
    """One in five of what peers say is forgotten on its way: directed messages by their count, copies one by one."""
    server = serve()
    heard = 0

    def is_kept(message: dict[str, Any]) -> bool:
        nonlocal heard
        heard += message["type"] == "message"
        return bool(message["type"] != "message" or heard % 5)

    async with _forgetful(server, is_kept) as url:
        options = [*BRISK, "--stay", "60", "--hold", "5", "--message-rate", "5", "--patience", "1.5"]
        outcome = await asyncio.to_thread(_run, url, tmp_path, *options, "--reloaders", "0", users=30)
    assert outcome.code == 1, outcome.log
    assert set(outcome.errors) == {"lost"}
    for kind, name in (("caller", "relay delay"), ("viewer", "fan-out delay")):
        row = outcome.rows[kind, name]
        assert 0.05 < int(row["Failure Count"]) / int(row["Request Count"]) < 0.35, row


@pytest.mark.parametrize(("answer", "row"), [("answer", "offer to answer"), ("pong", "ping")])
async def test_answer_that_does_not_come_is_a_timeout(
    answer: str, row: str, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve()
    async with _forgetful(server, lambda message: bool(message["type"] != answer)) as url:
        options = [*BRISK, "--hold", "10", "--patience", "1", "--viewers", "0", "--reloaders", "0"]
        outcome = await asyncio.to_thread(_run, url, tmp_path, *options, users=20, seconds=4)
    assert outcome.code == 1, outcome.log
    assert int(outcome.rows["caller", row]["Failure Count"]) > 0
    assert "timeout" in outcome.errors


def test_run_that_a_signal_ends_is_judged_by_what_it_has(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless", "--host", server.url,
            "--users", "20", "--spawn-rate", "20", "--csv", "result", *BRISK,
        ],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        table = tmp_path / "result_stats.csv"
        until(lambda: table.exists() and "offer to answer" in table.read_text(encoding="utf-8"), "no call was made")
        process.terminate()
        _, log = process.communicate(timeout=END_S)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert "nothing was heard" not in log and ", 0 messages sent" not in log
