"""How a server empties itself: what peers are told and when, what is still answered, who may end when."""

import asyncio
import contextlib
import http.client
import itertools
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as sync_connect

from tests.e2e.conftest import EVERY_COUNT, NO_RATES, Server, children, is_running, run_with, until

Serve = Callable[..., Server]
END_S = 15.0
LONG = ("--server.drain-seconds", "86400")  # nobody is closed within a test, but for very bad luck


class Peer:
    """A peer, and all that it heard until it was closed."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket
        self.heard: list[dict[str, Any]] = []
        self.closed_at = 0.0
        self.code: int | None = None
        self._task = asyncio.ensure_future(self._listen())

    async def _listen(self) -> None:
        try:
            async for text in self.websocket:
                self.heard.append(json.loads(text))
        except ConnectionClosed:
            pass
        self.closed_at = time.monotonic()
        self.code = self.websocket.close_code

    async def say(self, **message: Any) -> None:
        await self.websocket.send(json.dumps(message))

    async def hears(self, type: str) -> dict[str, Any]:
        """The first message of this type, waiting for it."""
        async with asyncio.timeout(END_S):
            while not (found := self.all_of(type)):
                assert not self._task.done(), f"closed with {self.code} before {type}, after {self.heard}"
                await asyncio.sleep(0.005)
        return found[0]

    def all_of(self, type: str) -> list[dict[str, Any]]:
        return [message for message in self.heard if message["type"] == type]

    async def is_closed(self) -> int | None:
        """The close code, waiting for it; 1006 when there was none."""
        async with asyncio.timeout(END_S):
            await self._task
        return self.code


@contextlib.asynccontextmanager
async def _peers(
    server: Server, count: int, *, room: str = "r", caps: tuple[str, ...] = ()
) -> AsyncIterator[list[Peer]]:
    """`count` members of one room: p0, p1, …"""
    async with contextlib.AsyncExitStack() as stack:
        peers = []
        for number in range(count):
            peer = Peer(await stack.enter_async_context(connect(server.url, proxy=None)))
            if caps:
                await peer.say(type="hello", sender=f"p{number}", payload={"caps": caps})
            await peer.say(type="join", room=room, sender=f"p{number}")
            await peer.hears("joined")
            peers.append(peer)
        yield peers


def _get(server: Server, path: str) -> tuple[int, str | None]:
    """Status and Retry-After."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=END_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.headers["Retry-After"]


async def _ended(server: Server) -> int:
    code: int = await asyncio.to_thread(server.process.wait, END_S)
    return code


# ---- what peers see


async def test_peers_are_warned_then_closed_with_4000_one_after_the_other(serve: Serve) -> None:
    seconds, count = 1.5, 30
    server = serve("--server.drain-seconds", str(seconds))
    async with _peers(server, count) as peers:
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert [await peer.is_closed() for peer in peers] == [4000] * count
        assert await _ended(server) == 0
        for peer in peers:
            (notice,) = peer.all_of("go-away")
            payload = notice["payload"]
            assert (payload["reason"], payload["action"]) == ("drain", "reconnect")
            least_ms, most_ms = payload["delay_ms"]
            assert 0 <= least_ms <= most_ms <= 1000 * seconds
            assert 1000 * (peer.closed_at - began) >= most_ms - 1, "it was closed before its time"
        closes = sorted(peer.closed_at - began for peer in peers)
        assert closes[count // 2] - closes[0] > seconds / 4 and closes[-1] - closes[0] > seconds / 2, closes
        assert [peer.closed_at for peer in peers] != sorted(peer.closed_at for peer in peers), "in order of arrival"
    assert [event["drain_seconds"] for event in server.events("stopping")] == [seconds]
    assert len(server.events("drained")) == 1


async def test_those_who_stay_longer_hear_who_is_gone_and_go_on_talking(serve: Serve) -> None:
    server = serve("--server.drain-seconds", "1.5")
    async with _peers(server, 12) as peers:
        server.process.send_signal(signal.SIGTERM)
        for peer in peers:
            await peer.is_closed()
        assert sorted(len(peer.all_of("peer-left")) for peer in peers) == list(range(12)), "one after the other"
        assert {message["payload"]["reason"] for peer in peers for message in peer.all_of("peer-left")} == {"closed"}


@pytest.mark.parametrize("workers", EVERY_COUNT)
async def test_what_was_acknowledged_in_a_drain_has_arrived(serve: Serve, workers: int) -> None:
    """Each sender counts what the server says it delivered; each recipient what came before its close."""
    server = serve(*NO_RATES, "--server.drain-seconds", "1", "--workers", str(workers))
    pairs = 10
    async with _peers(server, 2 * pairs, caps=("ack",)) as peers:

        async def talk(sender: int, recipient: str) -> None:
            with contextlib.suppress(ConnectionClosed):
                for number in itertools.count():
                    message = {"recipient": recipient, "id": str(number), "payload": number}
                    await peers[sender].say(type="message", room="r", **message)
                    if number % 20 == 0:
                        await asyncio.sleep(0.001)

        talks = [asyncio.ensure_future(talk(at, f"p{at + pairs}")) for at in range(pairs)]
        await peers[0].hears("ack")
        server.process.send_signal(signal.SIGTERM)
        assert {await peer.is_closed() for peer in peers} == {4000}
        await asyncio.gather(*talks)
        for at in range(pairs):
            came = [message["payload"] for message in peers[at + pairs].all_of("message")]
            assert came == list(range(len(came))), "a gap, or out of order"
            acks = sum(ack["payload"]["delivered"] for ack in peers[at].all_of("ack"))
            assert acks <= len(came), "what was acknowledged is lost"
    assert server.stop() == 0


async def test_draining_server_answers_but_takes_nobody(serve: Serve) -> None:
    server = serve(*LONG)
    async with _peers(server, 2) as (one, two):
        assert _get(server, "/health/ready") == (200, None)
        server.process.send_signal(signal.SIGTERM)
        await one.hears("go-away")
        await two.hears("go-away")
        assert _get(server, "/health/ready") == (503, "5")
        assert _get(server, "/health/live") == (200, None)
        with pytest.raises(InvalidStatus) as refused:
            await connect(server.url, proxy=None)
        assert refused.value.response.status_code == 503
        assert refused.value.response.headers["Retry-After"] == "5"
        await one.say(type="join", room="other", id="j")
        error = await one.hears("error")
        assert (error["code"], error["retry"], error["id"]) == ("draining", True, "j")
        await one.say(type="offer", room="r", recipient="p1", payload={"sdp": "x"})
        assert (await two.hears("offer"))["sender"] == "p0"
        await two.say(type="leave", room="r")
        await two.hears("left")
        assert (await one.hears("peer-left"))["payload"]["reason"] == "left"
        server.process.send_signal(signal.SIGTERM)


async def test_those_who_go_by_themselves_end_the_drain_early(serve: Serve) -> None:
    server = serve(*LONG)
    began = time.monotonic()
    async with _peers(server, 3) as peers:
        server.process.send_signal(signal.SIGTERM)
        for peer in peers:
            await peer.hears("go-away")
            peer.websocket.transport.abort() if peer is peers[0] else await peer.websocket.close()
    assert await _ended(server) == 0
    assert time.monotonic() - began < 10


async def test_peer_that_never_answers_the_close_is_not_waited_for_long(serve: Serve) -> None:
    server = serve("--server.drain-seconds", "0.5")
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert await _ended(server) == 0
    assert time.monotonic() - began < 0.5 + 2 + 2, "PROTOCOL §3.5: two seconds from the close"
    assert (await reader.read()).endswith(b"\x88\x02\x0f\xa0"), "4000, and no RST"
    writer.close()


@pytest.mark.parametrize("has_client", [False, True])
async def test_with_no_peer_the_end_is_immediate(serve: Serve, *, has_client: bool) -> None:
    """A connection that has not sent its request is no peer."""
    server = serve()
    writer = (await asyncio.open_connection("127.0.0.1", server.port))[1] if has_client else None
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert await _ended(server) == 0
    assert time.monotonic() - began < 1.5
    if writer:
        writer.close()


# ---- signals and deaths meanwhile


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal_closes_all_at_once_with_1001(serve: Serve, number: signal.Signals) -> None:
    server = serve(*LONG)
    async with _peers(server, 5) as peers:
        server.process.send_signal(number)
        for peer in peers:
            await peer.hears("go-away")
        began = time.monotonic()
        server.process.send_signal(number)
        assert {await peer.is_closed() for peer in peers} == {1001}
        assert await _ended(server) == 0
        assert time.monotonic() - began < 2
        assert not any(peer.all_of("peer-left") for peer in peers), "all go at once: nobody is told about the others"
    assert len(server.events("forced")) == 1


async def test_two_signals_at_once_end_the_server(serve: Serve) -> None:
    server = serve(*LONG)
    async with _peers(server, 2) as peers:
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)
        assert {await peer.is_closed() for peer in peers} <= {1001, 4000}
        assert await _ended(server) == 0


async def test_workers_whose_supervisor_is_killed_drain_by_themselves(serve: Serve) -> None:
    server = serve("--server.drain-seconds", "1")
    workers = children(server.process.pid)
    async with _peers(server, 5) as peers:
        began = time.monotonic()
        server.process.kill()
        for peer in peers:
            await peer.hears("go-away")
        assert {await peer.is_closed() for peer in peers} == {4000}
        assert time.monotonic() - began < 3
    until(lambda: not any(is_running(pid) for pid in workers), "a worker outlives its supervisor")


def test_port_of_a_killed_supervisor_can_be_served_again_while_its_workers_drain(serve: Serve) -> None:
    server = serve("--workers", "2", "--log.format", "json", "--server.drain-seconds", "60")
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            client = stack.enter_context(sync_connect(server.url, proxy=None))
        workers = children(server.process.pid)
        server.process.kill()
        server.process.wait()
        until(lambda: len(server.events("supervisor_gone")) == 2, "the workers have not noticed")
        serve("--workers", "2", "--port", str(server.port), "--server.drain-seconds", "0")
        client.ping().wait(END_S)
        assert any(is_running(pid) for pid in workers)


async def test_supervisor_that_is_killed_in_a_drain_changes_nothing_for_peers(serve: Serve) -> None:
    server = serve("--server.drain-seconds", "1.5")
    workers = children(server.process.pid)
    async with _peers(server, 5) as peers:
        server.process.send_signal(signal.SIGTERM)
        for peer in peers:
            await peer.hears("go-away")
        server.process.kill()
        assert {await peer.is_closed() for peer in peers} == {4000}
        assert {len(peer.all_of("go-away")) for peer in peers} == {1}
    until(lambda: not any(is_running(pid) for pid in workers), "a worker outlives its supervisor")


async def test_worker_that_is_killed_in_a_drain_is_not_replaced(serve: Serve) -> None:
    server = serve(*LONG)
    (worker,) = children(server.process.pid)
    async with _peers(server, 2) as peers:
        server.process.send_signal(signal.SIGTERM)
        for peer in peers:
            await peer.hears("go-away")
        os.kill(worker, signal.SIGKILL)
        assert await _ended(server) == 1
    assert server.stop() == 1
    (lost,) = server.events("worker_lost")
    assert "SIGKILL" in lost["reason"]
    assert not server.events("worker_ready") and not server.events("worker_died")


def test_signal_before_the_server_is_ready_ends_it_cleanly(tmp_path: Path) -> None:
    server = Server("--log.level", "debug", cwd=tmp_path)
    server.wait_for("worker_started")
    assert server.stop() == 0
    assert not server.events("internal_error")


# ---- several workers (others than ours)


def test_no_worker_ends_before_all_are_empty(tmp_path: Path) -> None:
    """Slot 0 is empty at once, slot 1 when it is told to be; whoever is told to end says when."""
    process = run_with(
        tmp_path,
        """
        channel.send(Ready(1))
        wait(Drain)
        if boot.slot == 1:
            sys.stderr.write("draining\\n")
            while not os.path.exists("empty"): time.sleep(0.01)
            sys.stderr.write("empty\\n")
        channel.send(Stopped())
        wait(Stop)
        sys.stderr.write("told to end\\n")
        """,
        slots=2,
    )
    assert process.stderr is not None
    assert '"serving"' in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    said = [process.stderr.readline() for _ in range(2)]
    assert '"stopping"' in said[0] and said[1] == "draining\n"
    (tmp_path / "empty").touch()
    _, rest = process.communicate(timeout=END_S)
    lines = [line for line in rest.splitlines() if not line.startswith("{")]
    assert lines == ["empty", "told to end", "told to end"]
    assert process.returncode == 0


def test_worker_that_dies_does_not_hold_up_the_drain_of_the_others(tmp_path: Path) -> None:
    process = run_with(
        tmp_path,
        """
        channel.send(Ready(1))
        wait(Drain)
        if boot.slot == 1:
            sys.exit(9)
        channel.send(Stopped())
        wait(Stop)
        """,
        slots=2,
    )
    assert process.stderr is not None
    assert '"serving"' in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=END_S)
    assert process.returncode == 1
    assert len([line for line in rest.splitlines() if "worker_lost" in line and "code 9" in line]) == 1


async def test_worker_that_was_stopped_at_the_beginning_of_a_drain_keeps_nobody_waiting(serve: Serve) -> None:
    server = serve("--workers", "2", "--host", "127.0.0.1", "--log.format", "json", *LONG)
    async with _peers(server, 6) as peers:
        stopped = children(server.process.pid)[0]
        os.kill(stopped, signal.SIGSTOP)
        await asyncio.to_thread(server.wait_for, "worker_stuck")
        server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(server.wait_for, "stopping")
        for _ in range(20):
            assert (await asyncio.to_thread(_get, server, "/health/ready"))[0] == 503
        os.kill(stopped, signal.SIGCONT)
        for peer in peers:
            await peer.hears("go-away")
        assert not server.events("worker_died")
    assert await _ended(server) == 0
    assert len(server.events("cannot_accept")) <= 1, "its sockets are closed, not tried again and again"


def test_drain_that_ended_while_the_supervisor_was_stopped_is_not_late(tmp_path: Path) -> None:
    """The worker stops the supervisor before it says that it is empty."""
    process = run_with(
        tmp_path,
        """
        channel.send(Ready(1))
        wait(Drain)
        parent = os.getppid()
        os.kill(parent, signal.SIGSTOP)
        while open(f"/proc/{parent}/stat").read().rpartition(")")[2].split()[0] != "T": time.sleep(0.001)
        channel.send(Stopped())
        time.sleep(0.2 + 0.2 + 0.3)  # past the deadline
        os.kill(parent, signal.SIGCONT)
        wait(Stop)
        """,
        prepare="supervisor.OVERTIME_S = 0.2",
        options={"server.drain_seconds": 0.2},
    )
    assert process.stderr is not None
    assert '"serving"' in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=END_S)
    assert (process.returncode, "drain_late" in rest) == (0, False)


@pytest.mark.parametrize(("ends", "says"), [(True, "drain_late"), (False, "worker_killed")])
def test_worker_that_is_never_empty_is_ended_at_the_deadline(tmp_path: Path, *, ends: bool, says: str) -> None:
    process = run_with(
        tmp_path,
        f"""
        channel.send(Ready(1))
        wait(Drain)
        wait(Stop if {ends} else Ready)
        """,
        prepare="supervisor.OVERTIME_S = 0.2",
        options={"server.drain_seconds": 0.2},
    )
    assert process.stderr is not None
    assert '"serving"' in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=END_S)
    assert process.returncode == 1
    assert says in rest and '"slots":[0]' in rest
