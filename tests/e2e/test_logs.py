"""The log of a real server: what never stands in it, and who hears of another level."""

import base64
import contextlib
import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import jwt
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from fastsig import status
from tests.e2e.conftest import Server, until

SECRET = "hush4711"
KEY = f"{SECRET}-{'k' * 32}"
TOKENS = {
    name: jwt.encode({"sub": name, "exp": int(time.time()) + 3600}, KEY, algorithm="HS256", headers={"kid": SECRET})
    for name in "ab"
}
BAD_TOKEN = f"{TOKENS['a']}{SECRET}"
ADDRESS = "198.51.100.77"
CANDIDATE = f"candidate:1 1 udp 2130706431 {ADDRESS} 50000 typ host ufrag {SECRET}"
OF_THE_MACHINE = {"worker_stuck", "drain_late"}  # what is only too busy
SDP = f"v=0\r\no=- 1 2 IN IP4 {ADDRESS}\r\na=ice-pwd:{SECRET}\r\na={CANDIDATE}\r\n"


def _say(websocket: ClientConnection, type: str, **fields: Any) -> None:
    websocket.send(json.dumps({"type": type} | fields))


def _answer(websocket: ClientConnection) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(websocket.recv(10))
    return answer


def _close_code(websocket: ClientConnection) -> int | None:
    with contextlib.suppress(ConnectionClosed):
        while True:
            websocket.recv(10)
    return websocket.close_code


def _talk(url: str) -> None:
    """A call, and all that can be refused, with secrets in every place that has one."""
    header: Any = {"additional_headers": {"Authorization": f"Bearer {TOKENS['a']}"}}
    with (
        connect(f"{url}?room=r", proxy=None, **header) as a,
        connect(f"{url}?token={TOKENS['b']}", proxy=None) as b,
    ):
        for websocket, name in ((a, "a"), (b, "b")):
            _say(websocket, "join", room="r", sender=name, payload={"meta": {"password": SECRET}})
            assert _answer(websocket)["type"] == "joined"
        assert _answer(a)["type"] == "peer-joined"
        for kind, payload in (("offer", {"sdp": SDP}), ("ice-candidate", {"candidate": CANDIDATE}), ("x-y", SECRET)):
            _say(a, kind, room="r", recipient="b", payload=payload)
            assert _answer(b)["type"] == kind
        for bad in (
            {"type": "hello", "payload": {"token": SECRET}}, {"type": SECRET, "payload": SDP},
            {"type": "join", "room": "s", "payload": {"token": BAD_TOKEN}},
            {"type": "update", "room": "r", "payload": {"meta": SECRET * 1000}},
            {"type": "report", "room": "r", "recipient": "b", "payload": {"outcome": SECRET}},
            {"type": "offer", "room": SECRET, "payload": SDP}, {"type": "offer", "room": "r", "recipient": SECRET},
        ):  # fmt: skip
            a.send(json.dumps(bad))
            assert _answer(a)["type"] == "error"
        a.send(f'{{"type":"offer","payload":{SECRET}')
        assert _answer(a)["code"] == "bad_json"
        with contextlib.suppress(ConnectionClosed):  # the close may come before the last of them is sent
            for _ in range(40):
                a.send(SDP)
        assert _close_code(a) == 4509
        b.send(SECRET.encode())
        assert _close_code(b) == 1003


def _knock(port: int, path: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Cookie": SECRET, "X-Y": ADDRESS})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return refusal.code


def test_at_info_nothing_of_what_peers_say_is_in_the_log(tmp_path: Path) -> None:
    server = Server(
        "--workers", "2", "--log.level", "info", "--server.drain-seconds", "0.2",
        env={"FASTSIG_AUTH_KEYS": f"kid={SECRET},secret:{KEY}"}, cwd=tmp_path,
    )  # fmt: skip
    try:
        _talk(server.url)
        assert (_knock(server.port, f"/{SECRET}"), _knock(server.port, f"/ws?token={SECRET}")) == (404, 400)
        for token in (SECRET, BAD_TOKEN):
            with pytest.raises(InvalidStatus), connect(f"{server.url}?token={token}", proxy=None):
                pass
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("reloaded")
    finally:
        assert server.stop() == 0
    said = "\n".join(server.stderr_lines())
    for secret in (
        SECRET,
        ADDRESS,
        "candidate",
        *TOKENS.values(),
        "ice-pwd",
        base64.b64encode(SECRET.encode()).decode(),
    ):
        assert secret not in said
    warnings = {event["event"] for event in server.events() if event["level"] in ("warning", "error")}
    assert warnings <= OF_THE_MACHINE, said


def test_level_reloads_in_workers_too(tmp_path: Path) -> None:
    """One that says `supervisor_gone`, a warning, was told of the level: it was started with another."""
    file = tmp_path / "fastsig.toml"
    file.write_text("[log]\nlevel = 'error'\n[server]\ndrain_seconds = 0\n", encoding="utf-8")
    server = Server("--config", str(file), cwd=tmp_path)
    try:
        until(lambda: bool(list(server.runtime_dir.glob("*.sock"))), "there is no socket to ask")
        (path,) = server.runtime_dir.glob("*.sock")
        until(lambda: _has_worker(server.runtime_dir, int(path.stem)), "there is no worker")
        file.write_text("[log]\nlevel = 'info'\n[server]\ndrain_seconds = 0\n", encoding="utf-8")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("reloaded")
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        until(lambda: bool(server.events("supervisor_gone")), "the worker has the old level")
        assert server.events("supervisor_gone")[0]["worker"] == 0
    finally:
        server.stop(signal.SIGKILL)


def _has_worker(folder: Path, port: int) -> bool:
    return status.ask(folder, port).workers[0].process is not None
