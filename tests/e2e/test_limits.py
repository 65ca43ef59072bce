"""Limits per address and worker, over real sockets: what they refuse, and that every place is given back."""

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fastsig import status

from .conftest import Server, until
from .visitor import Visitor

Serve = Callable[..., Server]
ONE, TWO = "127.0.0.2", "127.0.0.3"


def counted(server: Server, name: str) -> int:
    return sum(worker.counters.get(name, 0) for worker in status.ask(server.runtime_dir, server.port).workers)


def hits(server: Server, limit: str, mode: str = "enforced") -> int:
    return counted(server, f'limit_hits_total{{limit="{limit}",mode="{mode}"}}')


def visit(port: int, source: str = ONE, target: str = "/ws") -> int:
    """The status that one visitor gets who leaves at once; 0: it is cut off."""
    try:
        with Visitor(port, source) as visitor:
            return visitor.ask(target).status()
    except ConnectionResetError:  # so soon that it was not connected
        return 0


def test_address_that_connects_too_often_is_told_then_cut_off_and_others_are_served(serve: Serve) -> None:
    server = serve("--limits.connects-per-s-per-address", "2")
    statuses = [visit(server.port) for _ in range(25)]
    assert statuses.count(101) in {10, 11}, "the burst; one more where this takes long"
    assert statuses.index(429) >= 10
    assert statuses.count(429) in {10, 11}, "as many are told"
    assert statuses[-1] == 0, "and more are not"
    assert visit(server.port, TWO) == 101
    with Visitor(server.port, TWO) as healthy:
        healthy.ask().answer()
        until(lambda: visit(server.port) == 101, "it is never served again")
        healthy.ping()
    (line, *_) = server.events("limit_hit")
    assert (line["limit"], line["address"], line["left_out"]) == ("connects_per_s_per_address", ONE, 0)
    assert hits(server, "connects_per_s_per_address") >= 14
    assert counted(server, "tracked_addresses") == 2


def test_refusal_says_when_to_come_back_and_health_is_answered(serve: Serve) -> None:
    server = serve("--limits.connects-per-s-per-address", "1")
    while visit(server.port) == 101:
        pass
    with Visitor(server.port, ONE) as visitor:
        code, headers = visitor.ask().answer()
        assert (code, headers["retry-after"], headers["connection"]) == (429, "1", "close")
        error = visitor.error()
        assert (error["type"], error["code"], error["retry"]) == ("error", "rate_limited", True)
        assert 0 < error["after_ms"] <= 1000
    for path in ("/livez", "/readyz", "/health/live"):
        assert visit(server.port, target=path) == 200


def test_rate_of_the_worker_is_everybodys(serve: Serve) -> None:
    server = serve("--limits.connects-per-s", "1")
    statuses = [visit(server.port, f"127.0.1.{number}") for number in range(1, 9)]
    assert statuses[:5] == [101] * 5
    assert 503 in statuses
    assert hits(server, "connects_per_s") == statuses.count(503)


ENDS: dict[str, Callable[[Visitor], object]] = {
    "closed": lambda visitor: visitor.send(b"\x88\x80\0\0\0\0").socket.recv(100),
    "left": lambda visitor: visitor.socket.close(),
    "reset": Visitor.reset,
}


@pytest.mark.parametrize("limit", ["connections", "connections-per-address"])
def test_places_of_connections_are_given_back_however_they_end(serve: Serve, limit: str) -> None:
    server = serve(f"--limits.{limit}", "4", "--limits.handshake-seconds", "1")
    for end in ENDS.values():
        with contextlib.ExitStack() as stack:
            visitors = [stack.enter_context(Visitor(server.port, ONE)).ask() for _ in range(4)]
            assert [visitor.status() for visitor in visitors] == [101] * 4
            with Visitor(server.port, ONE) as refused:
                code, headers = refused.ask().answer()
                assert (code, headers["retry-after"], refused.error()["code"]) == (503, "5", "limit_exceeded")
            assert visit(server.port, TWO) == (503 if limit == "connections" else 101)
            for visitor in visitors:
                end(visitor)
            until(lambda: counted(server, "connections") == 0, "they have not ended")
    with contextlib.ExitStack() as stack:  # half a request each, then nothing
        for _ in range(4):
            stack.enter_context(Visitor(server.port, ONE)).send(b"GET /ws HTTP/1.1\r\n")
        until(lambda: visit(server.port) == 503, "they do not count")
        until(lambda: visit(server.port) == 101, "they count for ever")
    assert hits(server, limit.replace("-", "_")) > 0


def test_place_of_a_connection_that_is_passed_on_is_given_up_where_it_was_accepted(serve: Serve) -> None:
    server = serve("--workers", "2", "--limits.connections-per-address", "5")
    rooms = [f"/ws?room=r{number}" for number in range(8)]
    assert [visit(server.port, target=room) for room in rooms * 8] == [101] * 64
    assert counted(server, 'handshakes_total{result="passed"}') > 5
    with contextlib.ExitStack() as stack:  # those who stay count at the worker that owns the room, and only there
        statuses = [stack.enter_context(Visitor(server.port, ONE)).ask(rooms[0]).status() for _ in range(7)]
        assert statuses[:5] == [101] * 5
        assert 503 in statuses[5:] or counted(server, "connections") == 7, "some may be served where they came in"
    until(lambda: counted(server, "connections") == 0, "they have not ended")
    assert [visit(server.port, target=room) for room in rooms] == [101] * 8


def test_limits_reload_for_those_who_come_next(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("[limits]\nconnections = 1\n", encoding="utf-8")
    server = serve("--config", str(file))
    with Visitor(server.port, ONE) as first:
        assert first.ask().status() == 101
        assert visit(server.port) == 503
        file.write_text("[limits]\nconnections = 2\n", encoding="utf-8")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: visit(server.port) == 101, "the new limit does not hold")
        file.write_text("[limits]\nconnections = 1\ndry_run = true\n", encoding="utf-8")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: hits(server, "connections", "dry_run") > 0 or visit(server.port) < 0, "no dry run")
        assert visit(server.port) == 101
        first.ping()


def test_addresses_are_in_no_line_of_the_log_where_that_is_switched_off(serve: Serve) -> None:
    server = serve("--limits.connections", "1", "--log.level", "debug", env={"FASTSIG_LOG_ADDRESSES": "false"})
    with Visitor(server.port, ONE) as first:
        assert first.ask().status() == 101
        assert visit(server.port) == 503
    assert server.wait_for("limit_hit")["address"] == ""
    assert not any(ONE in line for line in server.stderr_lines())


def test_strange_page_reads_why_it_may_not_connect(serve: Serve) -> None:
    server = serve("--server.origins", "https://app.example.org")
    with Visitor(server.port, ONE) as page:
        assert page.ask(Origin="https://evil.example").status() == 101
        told = page.rest()
    assert b'"code":"forbidden"' in told
    assert told.endswith(b"\x88\x02" + (4508).to_bytes(2, "big"))
    with Visitor(server.port, ONE) as page:
        assert page.ask(Origin="https://app.example.org").status() == 101
        page.ping()
    assert counted(server, 'handshakes_total{result="forbidden"}') == 1
