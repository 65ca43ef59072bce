"""SIGHUP: what a running server takes of a new configuration, and what it makes of one that is unusable."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.e2e.conftest import Server, children, until

Serve = Callable[..., Server]
END_S = 15.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fastsig.toml"
    path.write_text("[limits]\npeers_per_room = 1\n", encoding="utf-8")
    return path


def _reload(server: Server, *events: str) -> list[dict[str, Any]]:
    """Send SIGHUP; what was said about it, which is exactly these events."""

    def said() -> list[dict[str, Any]]:
        return [event for event in server.events() if event["event"] not in {"worker_stuck", "worker_recovered"}]

    before = len(said())
    server.process.send_signal(signal.SIGHUP)
    until(lambda: len(said()) >= before + len(events), f"not said: {events}")
    found = said()[before:]
    assert [event["event"] for event in found] == list(events)
    return found


def _join(websocket: ClientConnection, peer: str, room: str = "r") -> str:
    """`joined`, or the code of the error."""
    websocket.send(json.dumps({"type": "join", "room": room, "sender": peer}))
    answer = json.loads(websocket.recv(END_S))
    while answer["type"] not in ("joined", "error"):
        answer = json.loads(websocket.recv(END_S))
    return str(answer.get("code") or answer["type"])


def _second(server: Server) -> str:
    """What a second peer of the room `r` is answered now; it does not stay."""
    with connect(server.url, proxy=None) as websocket:
        return _join(websocket, "second")


def test_new_limits_hold_for_peers_that_are_there(serve: Serve, file: Path) -> None:
    server = serve("--config", str(file))
    with connect(server.url, proxy=None) as first:
        assert _join(first, "first") == "joined"
        assert _second(server) == "room_full"
        file.write_text("[limits]\npeers_per_room = 2\nrooms_per_connection = 1\n", encoding="utf-8")
        (event,) = _reload(server, "reloaded")
        assert event["options"] == ["limits.rooms_per_connection", "limits.peers_per_room"]
        until(lambda: _second(server) == "joined", "the new limit does not hold")
        assert _join(first, "first", "other") == "too_many_rooms"
        first.send('{"type":"ping"}')


def test_worker_that_is_started_later_has_the_new_limits(serve: Serve, file: Path) -> None:
    server = serve("--config", str(file))
    file.write_text("[limits]\npeers_per_room = 2\n", encoding="utf-8")
    _reload(server, "reloaded")
    (worker,) = children(server.process.pid)
    os.kill(worker, signal.SIGKILL)
    server.wait_for("worker_ready")
    with connect(server.url, proxy=None) as first:
        assert _join(first, "first") == "joined"
        assert _second(server) == "joined"


def test_level_of_the_log_reloads_everywhere(serve: Serve, file: Path) -> None:
    server = serve("--config", str(file))
    assert not server.events("worker_started")
    file.write_text("[log]\nlevel = 'debug'\n", encoding="utf-8")
    _reload(server, "reloaded")
    (worker,) = children(server.process.pid)
    os.kill(worker, signal.SIGKILL)
    server.wait_for("worker_started")


def test_time_of_the_drain_reloads(serve: Serve, file: Path) -> None:
    server = serve("--config", str(file), env={"FASTSIG_LIMITS_PEERS_PER_ROOM": "5"})
    file.write_text("[server]\ndrain_seconds = 0.2\n", encoding="utf-8")
    (event,) = _reload(server, "reloaded")
    assert event["options"] == ["server.drain_seconds"], "and the environment wins over the file still"
    with connect(server.url, proxy=None) as websocket:
        assert _join(websocket, "first") == "joined"
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert json.loads(websocket.recv(END_S))["type"] == "go-away"
        with pytest.raises(Exception, match="4000"):
            websocket.recv(END_S)
        assert server.process.wait(END_S) == 0
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("[limits]\npeers_per_room = -1\nmeta_bytes = 2\n", "limits.peers_per_room = -1"),
        ("[limits]\npeers_per_room = 'two'\n", "limits.peers_per_room"),
        ("[limits]\npeers_pre_room = 2\n", "did you mean peers_per_room"),
        ("[limits\n", "not a TOML file"),
        ("x = " + "[" * 5000, "not a TOML file"),
        ("[server]\norigins = [" + "'https://example.org'," * 6000 + "]", "expected at most"),
        (None, "No such file"),
    ],
)
def test_unusable_file_is_refused_whole_in_one_line(serve: Serve, file: Path, content: str | None, names: str) -> None:
    server = serve("--config", str(file))
    if content is None:
        file.unlink()
    else:
        file.write_text(content, encoding="utf-8")
    (event,) = _reload(server, "reload_refused")
    assert names in event["reason"] and len(event["reason"]) < 300
    with connect(server.url, proxy=None) as first:
        assert _join(first, "first") == "joined"
        assert _second(server) == "room_full"
    file.write_text("[limits]\npeers_per_room = 2\n", encoding="utf-8")
    (event,) = _reload(server, "reloaded")
    assert event["options"] == ["limits.peers_per_room"]


def test_what_does_not_reload_is_named_and_the_rest_is_taken(serve: Serve, file: Path) -> None:
    server = serve("--config", str(file))
    file.write_text(
        "[limits]\npeers_per_room = 3\n[server]\npath = '/other'\nbacklog = 7\nport = 1\n[log]\nformat = 'json'\n",
        encoding="utf-8",
    )
    warning, info = _reload(server, "needs_restart", "reloaded")
    assert warning["level"] == "warning"
    assert warning["options"] == ["server.path", "server.backlog", "log.format"], "--port is a flag, so it stays"
    assert info["options"] == ["limits.peers_per_room"]
    with connect(server.url, proxy=None) as first:
        assert _join(first, "first") == "joined"


def test_without_a_file_nothing_changes(serve: Serve) -> None:
    server = serve()
    (event,) = _reload(server, "reloaded")
    assert event["options"] == []


def test_file_that_was_a_pipe_is_not_taken_for_an_empty_one(serve: Serve, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    pipe.write_text("[limits]\npeers_per_room = 1\n", encoding="utf-8")
    server = serve("--config", str(pipe))
    pipe.unlink()
    os.mkfifo(pipe)
    (event,) = _reload(server, "reload_refused")
    assert event["reason"] == f"{pipe}: cannot be read again: it is no regular file"


def test_file_that_cannot_even_be_looked_at_is_refused(serve: Serve, file: Path) -> None:
    server = serve("--config", str(file))
    file.unlink()
    file.symlink_to("x" * 300)  # a name that is too long for any file: stat fails, and not by "no such file"
    (event,) = _reload(server, "reload_refused")
    assert "too long" in event["reason"]
    assert _second(server) == "joined"


def test_what_a_stopped_worker_has_no_room_for_reaches_it_later(serve: Serve, file: Path) -> None:
    """Its control channel fills up; the newest configuration and the end of the server still arrive."""
    origins = f"[server]\norigins = {[f'https://{number}.example.org' for number in range(3000)]}\n"  # 90 KB each time
    server = serve("--config", str(file), "--server.drain-seconds", "1")
    (worker,) = children(server.process.pid)
    os.kill(worker, signal.SIGSTOP)
    for peers in range(2, 8):
        file.write_text(f"{origins}[limits]\npeers_per_room = {peers}\n", encoding="utf-8")
        _reload(server, "reloaded")
    file.write_text("[limits]\npeers_per_room = 1\n", encoding="utf-8")
    _reload(server, "reloaded")
    os.kill(worker, signal.SIGCONT)
    with connect(server.url, proxy=None) as first:
        assert _join(first, "first") == "joined"
        until(lambda: _second(server) == "room_full", "the newest limit does not hold")
    assert server.stop() == 0


def test_hangup_in_a_drain_is_refused(serve: Serve, file: Path) -> None:
    server = serve("--config", str(file), "--server.drain-seconds", "86400")
    with connect(server.url, proxy=None) as websocket:
        assert _join(websocket, "first") == "joined"
        server.process.send_signal(signal.SIGTERM)
        assert json.loads(websocket.recv(END_S))["type"] == "go-away"
        (event,) = _reload(server, "reload_refused")
        assert event["reason"] == "the server is ending"
    assert server.process.wait(END_S) == 0


def test_many_hangups_at_once_are_harmless(serve: Serve, file: Path) -> None:
    server = serve("--config", str(file))
    for number in range(2, 30):
        file.write_text(f"[limits]\npeers_per_room = {number}\n", encoding="utf-8")
        server.process.send_signal(signal.SIGHUP)
    until(lambda: any(event["options"] for event in server.events("reloaded")), "never reloaded")
    assert server.stop() == 0
    assert not server.events("internal_error")
