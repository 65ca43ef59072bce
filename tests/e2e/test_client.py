"""The client with real servers, and with one that says what a real one says rarely (`Script`), on both event loops."""

import asyncio
import contextlib
import functools
import inspect
import itertools
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trustme
import uvloop
from websockets.asyncio.server import ServerConnection, serve as listen
from websockets.datastructures import Headers
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request, Response

import fastsig
from fastsig import client as fastsig_client
from tests.e2e.conftest import Server, children

WORKERS = (1, 4)
ROOT = Path(__file__).parents[2]
WAIT_S = 15.0
QUICK: Any = {"backoff": (0.02, 0.2)}
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

Serve = Callable[..., Server]
Test = Callable[..., Coroutine[Any, Any, None]]
T = TypeVar("T")


def on_both_loops(test: Test) -> Callable[..., None]:
    """A test run by asyncio's own loop, and by uvloop."""

    @functools.wraps(test)
    def run(*args: Any, loop: str, **kwargs: Any) -> None:
        async def in_time() -> None:
            async with asyncio.timeout(3 * WAIT_S):
                await test(*args, **kwargs)

        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(in_time())

    signature = inspect.signature(test)
    added = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY, annotation=str)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    both: Callable[..., None] = pytest.mark.parametrize("loop", list(LOOPS))(run)
    return both


async def until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


async def next_of(room: fastsig.Room, kind: type[T]) -> T:
    """The next event of this kind, whatever comes before it."""
    async with asyncio.timeout(WAIT_S):
        async for event in room:
            if isinstance(event, kind):
                return event
    raise AssertionError(f"the room ended before {kind}")


# ---- with a real server


@on_both_loops
async def test_two_meet_talk_update_and_part(server: Server, room: str) -> None:
    async with fastsig.connect(server.url, room, id="a", meta={"name": "é"}) as a:
        assert (a.id, dict(a.peers)) == ("a", {})
        async with fastsig.connect(server.url, room, id="b") as b:
            assert dict(b.peers) == {"a": fastsig.Peer(a.n, {"name": "é"})}
            assert b.n > a.n, "the newcomer offers"
            assert await next_of(a, fastsig.PeerJoined) == fastsig.PeerJoined("b", b.n, None)
            await b.send("a", "offer", {"sdp": "v=0"}, id="1")
            assert await anext(a) == fastsig.Message("offer", "b", {"sdp": "v=0"}, "a", "1")
            await a.send(["b"], "answer")
            assert await anext(b) == fastsig.Message("answer", "a", None, "b")
            await a.broadcast("x-note", [1.5, None])
            assert await anext(b) == fastsig.Message("x-note", "a", [1.5, None])
            await a.update({"name": "new"})
            assert await anext(b) == fastsig.PeerUpdated("a", a.n, {"name": "new"})
            assert b.peers["a"].meta == {"name": "new"}
            await b.send("nobody", "offer", id="2")
            refused = await next_of(b, fastsig.Refused)
            assert (refused.code, refused.id, refused.recipients) == ("peer_unavailable", "2", ("nobody",))
            await b.report("a", "connected", ms=12.5, local="host", remote="relay", protocol="tcp")
            await b.report("b", "failed")
            refused = await next_of(b, fastsig.Refused)
            assert (refused.code, refused.recipients) == ("peer_unavailable", ("b",)), "of the good one nothing is said"
        assert await anext(a) == fastsig.PeerLeft("b", b.n, "left")
        assert not a.peers
    assert [event async for event in a] == []
    with pytest.raises(fastsig.ClosedError) as left:
        await a.send("b", "offer")
    assert (left.value.code, left.value.close_code) == ("left", None)


@on_both_loops
async def test_acknowledged_messages_say_how_many_got_them_and_raise_when_refused(server: Server, room: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        a, b, _ = [
            await stack.enter_async_context(fastsig.connect(server.url, room, id=name, ack=True)) for name in "abc"
        ]
        await until(lambda: len(a.peers) == 2, "no roster")
        assert await a.broadcast("x-note", 1) == 2
        assert await asyncio.gather(*(a.send("b", "x-note", number) for number in range(20))) == [1] * 20
        with pytest.raises(fastsig.RefusedError) as refused:
            await a.send(["b", "nobody"], "offer", {})
        assert (refused.value.code, refused.value.recipients) == ("peer_unavailable", ("nobody",))
        heard = [await next_of(b, fastsig.Message) for _ in range(22)]
        assert [message.payload for message in heard] == [1, *range(20), {}]


@on_both_loops
async def test_connection_is_at_the_owner_of_its_room(server: Server) -> None:
    from fastsig import status  # noqa: PLC0415 (of the server)

    async with contextlib.AsyncExitStack() as stack:
        for number in range(8):
            await stack.enter_async_context(fastsig.connect(server.url, f"own-{number}"))
        workers = status.ask(server.runtime_dir, server.port).workers
        assert sum(worker.counters["remote_members"] for worker in workers) == 0


@pytest.mark.parametrize("workers", ["1", "4"])
@on_both_loops
async def test_death_of_workers_is_survived_and_everybody_is_in_the_room_again(serve: Serve, workers: str) -> None:
    server = serve("--workers", workers)
    rooms = [f"room-{number}" for number in range(6)]
    async with contextlib.AsyncExitStack() as stack:
        pairs = []
        for name in rooms:
            a = await stack.enter_async_context(fastsig.connect(server.url, name, meta=name, **QUICK))
            b = await stack.enter_async_context(fastsig.connect(server.url, name, id="b", **QUICK))
            await until(lambda a=a: bool(a.peers), "not together")  # type: ignore[misc]
            pairs.append((a, b, a.id, a.n, b.n))
        for pid in children(server.process.pid):
            os.kill(pid, signal.SIGKILL)
        for name, (a, b, a_id, a_n, b_n) in zip(rooms, pairs, strict=True):
            back = [await next_of(a, fastsig.Rejoined), await next_of(b, fastsig.Rejoined)]
            assert (a.id, b.id) == (a_id, "b")
            assert back[0].n > a_n and back[1].n > b_n
            assert back[0].gone == {"b": fastsig.Peer(b_n)}, "whoever is in it again is another member"
            await until(lambda a=a, b=b: bool(a.peers and b.peers), "not together again")  # type: ignore[misc]
            assert b.peers[a_id] == fastsig.Peer(a.n, name)
            await b.send(a_id, "offer", 1)
            assert await next_of(a, fastsig.Message) == fastsig.Message("offer", "b", 1, a_id)


@on_both_loops
async def test_drained_server_is_left_in_time_for_the_one_that_comes_after(serve: Serve) -> None:
    first = serve("--server.drain-seconds", "0.5")
    port = first.port
    async with (
        fastsig.connect(first.url, "r", id="a", **QUICK) as a,
        fastsig.connect(first.url, "r", id="b", **QUICK) as b,
    ):
        first.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(first.process.wait, WAIT_S) == 0
        sending = asyncio.ensure_future(a.broadcast("x-note", "written while nobody serves"))
        await asyncio.to_thread(serve, "--port", str(port))
        await next_of(a, fastsig.Rejoined)
        await next_of(b, fastsig.Rejoined)
        assert await sending is None
        await until(lambda: bool(a.peers and b.peers), "not together again")
        await a.send("b", "offer", 2)
        assert (await next_of(b, fastsig.Message)).sender == "a"


@on_both_loops
async def test_taken_id_is_told_when_the_time_to_enter_is_over(server: Server, room: str) -> None:
    async with fastsig.connect(server.url, room, id="a") as a:
        with pytest.raises(fastsig.RefusedError) as refused:
            async with fastsig.connect(server.url, room, id="a", open_timeout_s=0.3):
                pass
        assert (refused.value.code, refused.value.retry) == ("id_taken", True)
        async with fastsig.connect(server.url, room, id="b"):
            assert (await next_of(a, fastsig.PeerJoined)).peer == "b"


@on_both_loops
async def test_wrong_use_is_an_exception_with_the_code_of_the_catalogue(server: Server, room: str) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"token": "none"}, "unauthorized"),
        ({"id": "\n"}, "bad_message"),
        ({"meta": "x" * 2000}, "too_large"),
    )
    for wrong, code in cases:
        for ack in (False, True):
            with pytest.raises(fastsig.RefusedError) as refused:
                async with fastsig.connect(server.url, room, ack=ack, **wrong):
                    pass
            assert (refused.value.code, refused.value.retry) == (code, False)
    with pytest.raises(fastsig.UnreachableError) as unreachable:
        async with fastsig.connect(server.url + "/none", room):
            pass
    assert unreachable.value.code == "not_found"
    async with fastsig.connect(server.url, room) as twice:
        with pytest.raises(RuntimeError, match="entered once"):
            await twice.__aenter__()


@on_both_loops
async def test_message_above_the_limit_ends_the_membership(server: Server, room: str) -> None:
    async with fastsig.connect(server.url, room) as a:
        await a.broadcast("x-note", "x" * 100_000)
        for _ in range(2):
            with pytest.raises(fastsig.ClosedError) as ended:
                await anext(a)
            assert (ended.value.code, ended.value.close_code) == ("message_too_big", 1009)
        with pytest.raises(fastsig.ClosedError):
            await a.broadcast("x-note")


@on_both_loops
async def test_reader_that_is_late_holds_few_events_and_loses_none(server: Server, room: str) -> None:
    count, text = 150, "x" * 5000  # less in all than `limits.bytes_per_s` lets pass at once
    async with (
        fastsig.connect(server.url, room, id="late", max_events=4) as late,
        fastsig.connect(server.url, room, ack=True) as b,
    ):
        for number in range(count):
            await b.send("late", "x-note", [number, text])
        await until(lambda: not late._has_space.is_set(), "reading goes on")
        most = len(late._events)
        assert most < count / 2
        await b.send("late", "x-note", [count, text])
        assert len(late._events) <= most
        heard = [await next_of(late, fastsig.Message) for _ in range(count + 1)]
        assert [message.payload[0] for message in heard] == list(range(count + 1))


@on_both_loops
async def test_reader_that_is_late_leaves_without_delay(server: Server, room: str) -> None:
    async with fastsig.connect(server.url, room) as b:
        async with fastsig.connect(server.url, room, max_events=2) as late:
            await b.broadcast("x-note")
            await b.broadcast("x-note")
            await until(lambda: not late._has_space.is_set(), "reading goes on")
            began = time.monotonic()
        assert time.monotonic() - began < fastsig_client.CLOSE_S / 2
        assert len([event async for event in late]) == 2
        assert (await next_of(b, fastsig.PeerLeft)).reason == "left"


@on_both_loops
async def test_cancelled_user_leaves_the_room(server: Server, room: str) -> None:
    entered = asyncio.Event()

    async def use() -> None:
        async with fastsig.connect(server.url, room, id="short") as short:
            entered.set()
            async for _ in short:
                pass

    async with fastsig.connect(server.url, room) as a:
        task = asyncio.ensure_future(use())
        await entered.wait()
        task.cancel()
        assert (await next_of(a, fastsig.PeerLeft)).reason == "left"
        with pytest.raises(asyncio.CancelledError):
            await task


@on_both_loops
async def test_request_that_the_server_refuses_raises_its_code(server: Server, room: str) -> None:
    """Of somebody without a token: there is none to refresh, and nothing is granted."""
    async with fastsig.connect(server.url, room) as a:
        for asking, code in ((a.refresh("secret"), "bad_message"), (a.kick("b"), "forbidden")):
            with pytest.raises(fastsig.RefusedError) as refused:
                await asking
            assert refused.value.code == code
        async with fastsig.connect(server.url, room, id="b"):
            assert (await anext(a)) == fastsig.PeerJoined("b", a.peers["b"].n), "a refusal is no event besides"


# ---- by TLS


class Tls:
    """A proxy that ends TLS before a server, as one does in front of a deployment."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._writers: list[asyncio.StreamWriter] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.sni_callback = self._count
        self.hellos = 0  # how many clients began a handshake
        self.url = ""

    def _count(self, *_: Any) -> None:
        self.hellos += 1

    @contextlib.asynccontextmanager
    async def serving(self, certificate: trustme.LeafCert) -> AsyncIterator["Tls"]:
        self.show(certificate)
        async with await asyncio.start_server(self._handle, "127.0.0.1", 0, ssl=self._context) as proxy:
            self.url = f"wss://127.0.0.1:{proxy.sockets[0].getsockname()[1]}/ws"
            yield self
            await until(lambda: all(writer.is_closing() for writer in self._writers), "connections are left")

    def show(self, certificate: trustme.LeafCert) -> None:
        """From the next handshake on."""
        certificate.configure_cert(self._context)

    def drop(self) -> None:
        """All connections, without a word."""
        for writer in self._writers:
            writer.transport.abort()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, before = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writers += (writer, before)
        await asyncio.gather(self._forward(reader, before), self._forward(behind, writer))

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """What a client brings that trusts this authority and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


@on_both_loops
async def test_room_is_entered_by_tls_and_again_after_a_loss(
    server: Server, room: str, authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    text = "é" * 20_000  # more than one record of TLS
    async with Tls(server).serving(authority.issue_cert("127.0.0.1")) as proxy, contextlib.AsyncExitStack() as stack:
        a, b = [
            await stack.enter_async_context(fastsig.connect(proxy.url, room, id=name, ssl=trusting, ack=True, **QUICK))
            for name in "ab"
        ]
        assert await b.send("a", "offer", text) == 1
        assert (await next_of(a, fastsig.Message)).payload == text
        proxy.drop()
        for peer in (a, b):
            await next_of(peer, fastsig.Rejoined)
        await until(lambda: bool(a.peers and b.peers), "not together again")
        assert await a.send("b", "answer", text) == 1
        assert (await next_of(b, fastsig.Message)).payload == text


@pytest.mark.parametrize("wrong", ["authority", "host"])
@on_both_loops
async def test_certificate_that_is_not_valid_is_refused_and_not_tried_again(
    wrong: str, server: Server, authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    certificate = trustme.CA().issue_cert("127.0.0.1") if wrong == "authority" else authority.issue_cert("example.org")
    async with Tls(server).serving(certificate) as proxy:
        with pytest.raises(fastsig.UnreachableError) as refused:
            async with fastsig.connect(proxy.url, "r", ssl=trusting, **QUICK):
                pass
        assert (refused.value.code, refused.value.retry) == ("unreachable", False)
        assert isinstance(refused.value.__cause__, ssl.SSLCertVerificationError)
        assert proxy.hellos == 1


@on_both_loops
async def test_certificate_that_is_not_valid_any_more_ends_the_membership(
    server: Server, room: str, authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    async with (
        Tls(server).serving(authority.issue_cert("127.0.0.1")) as proxy,
        fastsig.connect(proxy.url, room, ssl=trusting, **QUICK) as a,
    ):
        proxy.show(trustme.CA().issue_cert("127.0.0.1"))
        proxy.drop()
        with pytest.raises(fastsig.UnreachableError):
            await anext(a)
        assert proxy.hellos == 2


@on_both_loops
async def test_server_without_tls_is_tried_until_the_time_to_enter_is_over(trusting: ssl.SSLContext) -> None:
    """It may be one that is just being set up."""
    tries = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tries.append(await reader.read(1))
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as plain:
        url = f"wss://127.0.0.1:{plain.sockets[0].getsockname()[1]}/ws"
        with pytest.raises(fastsig.UnreachableError) as refused:
            async with fastsig.connect(url, "r", ssl=trusting, open_timeout_s=0.5, **QUICK):
                pass
    assert (refused.value.code, refused.value.retry) == ("unreachable", True)
    assert isinstance(refused.value.__cause__, ssl.SSLError) and len(tries) > 1


# ---- with a scripted server

Say = Callable[["Script", ServerConnection, dict[str, Any]], Awaitable[None]]


class Script:
    """A server that answers each join, or the request before it, by the next of its lines; by the last for ever."""

    def __init__(self, *lines: Say | Response) -> None:
        self._lines = itertools.chain(lines, itertools.repeat(lines[-1]))
        self._line: Say | Response = lines[0]
        self.joins: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.heard: list[dict[str, Any]] = []
        self.codes: list[int | None] = []
        self.url = ""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Script"]:
        async with listen(
            self._handle, "127.0.0.1", 0, process_request=self._process, compression=None, close_timeout=0.2
        ) as server:
            self.url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/ws"
            yield self

    def _process(self, connection: ServerConnection, request: Request) -> Response | None:
        self.times.append(time.monotonic())
        self._line = next(self._lines)
        return self._line if isinstance(self._line, Response) else None

    async def _handle(self, connection: ServerConnection) -> None:
        line = self._line
        assert not isinstance(line, Response)
        with contextlib.suppress(Exception):
            join = json.loads(await connection.recv())
            self.joins.append(join)
            await line(self, connection, join)
            async for text in connection:
                self.heard.append(json.loads(text))
        await connection.wait_closed()
        self.codes.append(connection.close_code)


async def _say(connection: ServerConnection, **message: Any) -> None:
    await connection.send(json.dumps(message))


async def welcome(script: Script, connection: ServerConnection, join: dict[str, Any], **peers: int) -> None:
    roster = [{"sender": name, "n": n, "meta": None} for name, n in peers.items()]
    payload = {"n": 100 + len(script.joins), "peers": roster}
    await _say(connection, type="joined", room="r", sender=join.get("sender", "made"), payload=payload)


async def grant(connection: ServerConnection, *caps: str) -> None:
    limits = {"message_bytes": 1, "messages_per_s": 1, "rooms": 1}
    payload = {"caps": caps, "limits": limits, "version": "1", "server_time": 1.5}
    await _say(connection, type="welcome", sender="made", payload=payload)


def roster(**peers: int) -> Say:
    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await welcome(script, connection, join, **peers)

    return say


def end(code: int | None, **peers: int) -> Say:
    """Welcome, then the end; None: without a close."""

    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await welcome(script, connection, join, **peers)
        if code is None:
            connection.transport.abort()
        else:
            await connection.close(code)

    return say


def refuse(code: str, **fields: Any) -> Say:
    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await _say(connection, **({"type": "error", "code": code, "message": "No.", "retry": False} | fields))

    return say


def go_away(action: str, least_ms: int, most_ms: int) -> Say:
    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await welcome(script, connection, join)
        payload = {"reason": "drain", "action": action, "delay_ms": [least_ms, most_ms]}
        await _say(connection, type="go-away", payload=payload)

    return say


def http(status: HTTPStatus, body: bytes = b"", **headers: str) -> Response:
    lines = {name.replace("_", "-"): value for name, value in headers.items()} | {"Content-Length": str(len(body))}
    return Response(status.value, status.phrase, Headers(lines), body)


@pytest.mark.parametrize("code", [1001, 1011, 1012, 1013, 4000, 4001, 4003, 4005, 4006, 4499, None])
@on_both_loops
async def test_passing_close_is_followed_by_a_new_membership(code: int | None) -> None:
    async with (
        Script(end(code, b=1, c=2, d=3), roster(b=1, c=9, e=10)).serving() as script,
        fastsig.connect(script.url, "r", meta={"m": 1}, **QUICK) as room,
    ):
        assert (room.id, room.n) == ("made", 101)
        back = await anext(room)
        now = {"b": fastsig.Peer(1), "c": fastsig.Peer(9), "e": fastsig.Peer(10)}
        assert back == fastsig.Rejoined(102, now, {"c": fastsig.Peer(2), "d": fastsig.Peer(3)})
        assert dict(room.peers) == now
        assert script.joins[0] == {"type": "join", "room": "r", "payload": {"meta": {"m": 1}}}
        assert script.joins[1] == script.joins[0] | {"sender": "made"}, "it is the same peer"


@pytest.mark.parametrize("code", [1000, 1003, 1008, 4004, 4500, 4503, 4507, 4509, 4999])
@on_both_loops
async def test_final_close_is_an_exception_after_the_last_event(code: int) -> None:
    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await welcome(script, connection, join)
        await _say(connection, type="x-last", room="r", sender="b")
        await connection.close(code)

    async with (
        Script(say).serving() as script,
        fastsig.connect(script.url, "r", **QUICK) as room,
    ):
        assert await anext(room) == fastsig.Message("x-last", "b")
        with pytest.raises(fastsig.ClosedError) as ended:
            await anext(room)
        assert ended.value.close_code == code
        with pytest.raises(fastsig.ClosedError):
            await room.update(None)
    assert len(script.joins) == 1


@on_both_loops
async def test_go_away_is_followed_by_a_return_within_its_time() -> None:
    async with (
        Script(go_away("reconnect", 200, 400), roster()).serving() as script,
        fastsig.connect(script.url, "r", backoff=(60, 60)) as room,
    ):
        await next_of(room, fastsig.Rejoined)
        assert 0.2 <= script.times[1] - script.times[0] < 2.0, "the time is the server's, no back-off comes on top"
        await until(lambda: script.codes == [1001], "leaving would be 1000")


@on_both_loops
async def test_server_that_closes_before_the_time_it_gave_is_not_asked_earlier() -> None:
    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await go_away("resume", 300, 400)(script, connection, join)
        await connection.close(4000)

    async with Script(say, roster()).serving() as script, fastsig.connect(script.url, "r", **QUICK) as room:
        await next_of(room, fastsig.Rejoined)
        assert script.times[1] - script.times[0] >= 0.3


@on_both_loops
async def test_go_away_for_good_ends_the_membership() -> None:
    async with Script(go_away("stop", 0, 0)).serving() as script, fastsig.connect(script.url, "r", **QUICK) as room:
        with pytest.raises(fastsig.ClosedError) as ended:
            await anext(room)
        assert ended.value.code == "go_away"
        await until(lambda: script.codes == [1000], "the connection stays")


@on_both_loops
async def test_join_is_tried_again_where_the_refusal_passes_and_not_before_its_time() -> None:
    lines = (
        refuse("backend_unavailable", retry=True),
        refuse("draining", retry=True),
        refuse("id_taken", retry=True, after_ms=150),
        http(HTTPStatus.SERVICE_UNAVAILABLE, b'{"type":"error","code":"draining"}'),
        http(HTTPStatus.TOO_MANY_REQUESTS, Retry_After="1"),
        end(4002),
        roster(),
    )
    async with Script(*lines).serving() as script, fastsig.connect(script.url, "r", id="a", **QUICK) as room:
        assert room.id == "a"
        await next_of(room, fastsig.Rejoined)
        gaps = [later - earlier for earlier, later in itertools.pairwise(script.times)]
        assert len(gaps) == 6 and gaps[2] >= 0.15 and gaps[4] >= 1.0


@on_both_loops
async def test_final_refusal_of_a_later_join_comes_out_of_the_iteration() -> None:
    async with (
        Script(end(None), refuse("room_full")).serving() as script,
        fastsig.connect(script.url, "r", **QUICK) as room,
    ):
        with pytest.raises(fastsig.RefusedError) as refused:
            await next_of(room, fastsig.Rejoined)
        assert refused.value.code == "room_full"


@on_both_loops
async def test_request_that_is_refused_for_good_is_not_repeated() -> None:
    body = b'{"type":"error","code":"unauthorized","message":"No.","retry":false}'
    async with Script(http(HTTPStatus.UNAUTHORIZED, body)).serving() as script:
        with pytest.raises(fastsig.UnreachableError) as refused:
            async with fastsig.connect(script.url, "r", **QUICK):
                pass
        assert (refused.value.code, len(script.times)) == ("unauthorized", 1)


@on_both_loops
async def test_where_nobody_listens_or_nobody_answers_entering_ends_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}/ws"
        with pytest.raises(fastsig.UnreachableError) as timed_out:
            async with fastsig.connect(url, "r", open_timeout_s=0.2):
                pass
        assert timed_out.value.code == "timed_out"
    with pytest.raises(fastsig.UnreachableError) as nobody:
        async with fastsig.connect(url, "r", open_timeout_s=0.2, **QUICK):
            pass
    assert nobody.value.code == "unreachable" and isinstance(nobody.value.__cause__, OSError)


@on_both_loops
async def test_each_connection_brings_a_new_token_and_none_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(1)
    tokens = iter(["secret-1", "secret-2", "secret-3"])

    async def token() -> str:
        return next(tokens)

    async with (
        Script(end(4004), refuse("token_expired"), roster()).serving() as script,
        fastsig.connect(script.url + "?x=secret-0", "r", token=token, **QUICK) as room,
    ):
        await next_of(room, fastsig.Rejoined)
        await room.broadcast("x-note", "secret-4")
        await until(lambda: bool(script.heard), "not sent")
        assert [join["payload"]["token"] for join in script.joins] == ["secret-1", "secret-2", "secret-3"]
    ours = [record for record in caplog.records if not record.name.startswith("websockets")]
    assert {record.name for record in ours} >= {"fastsig.client"}
    assert not [record for record in ours if "secret" in record.getMessage()]
    assert logging.getLogger("fastsig.client.transport").level == logging.ERROR


@on_both_loops
async def test_token_function_that_fails_is_the_cause_of_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def token() -> str:
        raise LookupError("nobody is logged in")

    with pytest.raises(fastsig.ClientError) as ended:
        async with fastsig.connect("ws://127.0.0.1:1/ws", "r", token=token):
            pass
    assert isinstance(ended.value.__cause__, LookupError)
    assert "LookupError" in caplog.text and "logged in" not in caplog.text, "it may hold the token"


@on_both_loops
async def test_fragments_are_one_message_and_nonsense_costs_the_connection() -> None:
    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await welcome(script, connection, join)
        await connection.send(["""{"type":"x-é","sen""", """der":"b","payl""", """oad":"ü"}"""])
        await connection.send("{nonsense")

    async with Script(say, roster()).serving() as script, fastsig.connect(script.url, "r", **QUICK) as room:
        assert await anext(room) == fastsig.Message("x-é", "b", "ü")
        assert isinstance(await anext(room), fastsig.Rejoined)


@on_both_loops
async def test_silent_server_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastsig_client, "SILENCE_S", 0.1)
    monkeypatch.setattr(fastsig_client, "ANSWER_S", 0.1)

    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await welcome(script, connection, join)
        connection.transport.pause_reading()

    async with Script(say, roster()).serving() as script, fastsig.connect(script.url, "r", **QUICK) as room:
        await next_of(room, fastsig.Rejoined)


@on_both_loops
async def test_message_that_was_not_acknowledged_when_the_connection_was_lost_says_so() -> None:
    async def say(script: Script, connection: ServerConnection, hello: dict[str, Any]) -> None:
        assert hello["payload"]["caps"] == ["ack"]
        await grant(connection, "ack")
        await welcome(script, connection, json.loads(await connection.recv()))
        if len(script.joins) == 1:
            script.heard.append(json.loads(await connection.recv()))
            connection.transport.abort()
        else:
            script.heard.append(json.loads(await connection.recv()))
            await _say(connection, type="ack", id=script.heard[-1]["id"], payload={"delivered": 1, "queued": 0})

    async with Script(say).serving() as script, fastsig.connect(script.url, "r", ack=True, **QUICK) as room:
        with pytest.raises(fastsig.DisconnectedError) as lost:
            await room.send("b", "offer", 1)
        assert (lost.value.code, lost.value.retry) == ("disconnected", True)
        assert await room.send("b", "offer", 2) == 1, "it waits for the next connection"
        assert [message["payload"] for message in script.heard] == [1, 2]


@on_both_loops
async def test_server_that_grants_no_acks_is_not_used_with_them() -> None:
    async def say(script: Script, connection: ServerConnection, hello: dict[str, Any]) -> None:
        await grant(connection)

    async with Script(say).serving() as script:
        with pytest.raises(fastsig.ClientError, match="no_acks"):
            async with fastsig.connect(script.url, "r", ack=True):
                pass


@on_both_loops
async def test_messages_of_many_tasks_keep_the_order_of_their_calls_over_a_lost_connection() -> None:
    asked, may_join = asyncio.Event(), asyncio.Event()

    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        asked.set()
        await may_join.wait()
        await welcome(script, connection, join)

    async with Script(end(None), say).serving() as script, fastsig.connect(script.url, "r", **QUICK) as room:
        await asked.wait()
        calls = [asyncio.ensure_future(room.broadcast("x-note", number)) for number in range(50)]
        await until(room._turn.locked, "nobody waits")
        assert not script.heard
        may_join.set()
        await asyncio.gather(*calls)
        await until(lambda: len(script.heard) == 50, "not all came")
        assert [message["payload"] for message in script.heard] == list(range(50))


@on_both_loops
async def test_sender_that_never_rests_is_not_caught_in_a_connection_that_ends() -> None:
    codes = (4000, None, 1012, 4001) * 5
    async with (
        Script(*(end(code) for code in codes), roster()).serving() as script,
        fastsig.connect(script.url, "r", backoff=(0.0, 0.0)) as room,
    ):
        while len(script.joins) <= len(codes):
            await room.broadcast("x-note")
            await asyncio.sleep(0)
        await room.broadcast("x-last")
        await until(lambda: [message["type"] for message in script.heard[-1:]] == ["x-last"], "the last is lost")


@on_both_loops
async def test_reader_that_takes_nothing_does_not_come_back_again_and_again() -> None:
    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await welcome(script, connection, join)
        for _ in range(3):
            await _say(connection, type="x-note", room="r", sender="b")
        await connection.close(4003)

    async with (
        Script(say).serving() as script,
        fastsig.connect(script.url, "r", max_events=2, backoff=(0.0, 0.0)) as room,
    ):
        await until(lambda: not room._has_space.is_set(), "reading goes on")
        await asyncio.sleep(0.2)  # in which it would have come back many times
        assert len(script.joins) == 1 and len(room._events) <= 3
        assert [type(await anext(room)) for _ in range(4)][3] is fastsig.Rejoined
        assert len(script.joins) >= 2


@on_both_loops
async def test_message_of_after_our_close_waits_for_the_next_connection() -> None:
    """The server takes its time to close in its turn."""

    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await go_away("reconnect", 100, 100)(script, connection, join)
        connection.transport.pause_reading()
        await until(lambda: rooms[0]._link is not None, "it does not come")
        link = rooms[0]._link
        assert link is not None
        transport = link._transport
        assert transport is not None
        await until(lambda: transport.is_close_frame_sent, "it does not go")
        sending.append(asyncio.ensure_future(rooms[0].broadcast("x-note", 1)))
        connection.transport.resume_reading()

    rooms: list[fastsig.Room] = []
    sending: list[asyncio.Future[Any]] = []
    async with Script(say, roster()).serving() as script:
        rooms.append(fastsig.connect(script.url, "r", **QUICK))
        async with rooms[0] as room:
            await next_of(room, fastsig.Rejoined)
            assert await sending[0] is None
            await until(lambda: [message["payload"] for message in script.heard] == [1], "it is lost")


def _frame(opcode: Opcode, data: bytes) -> bytes:
    return Frame(opcode, data).serialize(mask=False)


CLOSE = _frame(Opcode.CLOSE, Close(4000, "").serialize())


@on_both_loops
async def test_answer_to_what_came_with_a_close_goes_by_the_next_connection() -> None:
    """A close frame in the segment of the message: TCP is still there when the message is answered."""

    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await welcome(script, connection, join)
        connection.transport.write(_frame(Opcode.TEXT, b'{"type":"x-question","room":"r","sender":"b"}') + CLOSE)

    async with Script(say, roster()).serving() as script, fastsig.connect(script.url, "r", **QUICK) as room:
        assert await anext(room) == fastsig.Message("x-question", "b")
        await room.broadcast("x-answer")
        await until(lambda: [message["type"] for message in script.heard] == ["x-answer"], "it is lost")
        assert len(script.joins) == 2


@on_both_loops
async def test_loss_is_noticed_at_the_close_frame_not_when_tcp_ends() -> None:
    """The server reads no more of what is still to be sent: TCP would stay for many minutes."""

    async def say(script: Script, connection: ServerConnection, hello: dict[str, Any]) -> None:
        await grant(connection, "ack")
        await welcome(script, connection, json.loads(await connection.recv()))
        if len(script.joins) == 1:
            connection.transport.pause_reading()
            await is_stuck.wait()
            connection.transport.write(CLOSE)

    is_stuck = asyncio.Event()
    async with Script(say).serving() as script, fastsig.connect(script.url, "r", ack=True, **QUICK) as room:
        link = room._link
        assert link is not None
        sending = asyncio.ensure_future(room.broadcast("x-note", "x" * 16_000_000))
        await until(lambda: not link.writable.is_set(), "everything is sent")
        is_stuck.set()
        with pytest.raises(fastsig.DisconnectedError):
            await sending
        assert not link.ended.done(), "noticed by the end of TCP"
        await next_of(room, fastsig.Rejoined)


async def _answer_requests(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
    """`refresh` and `kick`; what is about "nobody" is refused, and at "lost" the connection breaks."""
    await welcome(script, connection, join)
    async for text in connection:
        script.heard.append(asked := json.loads(text))
        about = asked.get("recipient") or asked["payload"]["token"]
        if about == "lost":
            connection.transport.abort()
        elif about == "nobody":
            code = "peer_unavailable" if asked["type"] == "kick" else "unauthorized"
            await _say(connection, type="error", code=code, message="No.", retry=False, id=asked["id"])
        elif asked["type"] == "kick":
            await _say(connection, type="kicked", room="r", recipient=about, id=asked["id"])
        else:
            await _say(connection, type="refreshed", id=asked["id"], payload={"expires_in": 300})


@on_both_loops
async def test_refreshed_token_is_good_for_later_connections_and_a_refused_one_is_not() -> None:
    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await _say(connection, type="token-expiring", payload={"in": 60})
        await _answer_requests(script, connection, join)

    async with Script(say).serving() as script, fastsig.connect(script.url, "r", token="first", **QUICK) as room:
        assert await anext(room) == fastsig.TokenExpiring(60)
        assert await room.refresh("second") == 300
        assert script.heard == [{"type": "refresh", "id": "~1", "payload": {"token": "second"}}]
        with pytest.raises(fastsig.RefusedError) as refused:
            await room.refresh("nobody")
        assert refused.value.code == "unauthorized"
        with pytest.raises(fastsig.DisconnectedError):
            await room.refresh("lost")
        await next_of(room, fastsig.Rejoined)
        assert [join["payload"]["token"] for join in script.joins] == ["first", "lost"], "it may have been taken"
        with pytest.raises(fastsig.RefusedError):
            await room.refresh("nobody")
        assert await room.refresh("last") == 300


@on_both_loops
async def test_token_function_is_asked_also_after_a_refresh() -> None:
    async def token() -> str:
        return "made"

    async with (
        Script(_answer_requests).serving() as script,
        fastsig.connect(script.url, "r", token=token, **QUICK) as room,
    ):
        await room.refresh("second")
        with pytest.raises(fastsig.DisconnectedError):
            await room.kick("lost")
        await next_of(room, fastsig.Rejoined)
        assert [join["payload"]["token"] for join in script.joins] == ["made", "made"]


@on_both_loops
async def test_token_function_is_asked_when_the_token_ends_soon_until_a_new_one_is_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await welcome(script, connection, join)
        await _say(connection, type="token-expiring", payload={"in": 0.02})
        for code in ("backend_unavailable", None, "unauthorized"):
            script.heard.append(asked := json.loads(await connection.recv()))
            if code is not None:
                retry = code == "backend_unavailable"
                await _say(connection, type="error", code=code, message="No.", retry=retry, id=asked["id"])
                continue
            await _say(connection, type="refreshed", id=asked["id"], payload={"expires_in": 300})
            await _say(connection, type="token-expiring", payload={"in": 0.02})
        await connection.close(4004)

    tokens = iter(["secret-1", None, "secret-2", "secret-3", "secret-4", "secret-5"])

    async def token() -> str:
        made = next(tokens)
        if made is None:
            raise LookupError("secret-0")
        return made

    async with (
        Script(say, roster()).serving() as script,
        fastsig.connect(script.url, "r", token=token, **QUICK) as room,
    ):
        assert isinstance(await anext(room), fastsig.Rejoined), "it is dealt with, and no event"
        assert [asked["payload"]["token"] for asked in script.heard] == ["secret-2", "secret-3", "secret-4"]
        assert [join["payload"]["token"] for join in script.joins] == ["secret-1", "secret-5"]
    assert "backend_unavailable" in caplog.text and "LookupError" in caplog.text and "secret" not in caplog.text


@on_both_loops
async def test_whoever_is_taken_out_of_the_room_is_out_also_where_no_close_follows() -> None:
    """A refreshed token that does not grant the room leaves the connection open (PROTOCOL §3.4, Expiry)."""

    async def say(script: Script, connection: ServerConnection, join: dict[str, Any]) -> None:
        await welcome(script, connection, join)
        await _say(connection, type="left", room="r", payload={"reason": "kicked"})

    async with Script(say).serving() as script, fastsig.connect(script.url, "r", **QUICK) as room:
        with pytest.raises(fastsig.ClosedError) as ended:
            await anext(room)
        assert (ended.value.code, ended.value.close_code) == ("kicked", 4503)
        await until(lambda: script.codes == [1000], "the connection stays")


@on_both_loops
async def test_peer_is_kicked_or_there_is_an_exception() -> None:
    async with Script(_answer_requests).serving() as script, fastsig.connect(script.url, "r", **QUICK) as room:
        await room.kick("b")
        await room.kick("c", 600)
        with pytest.raises(fastsig.RefusedError) as refused:
            await room.kick("nobody")
        assert refused.value.code == "peer_unavailable"
        assert script.heard[:2] == [
            {"type": "kick", "room": "r", "recipient": "b", "id": "~1"},
            {"type": "kick", "room": "r", "recipient": "c", "id": "~2", "payload": {"seconds": 600}},
        ]


# ---- what the pages show


def test_example_of_the_page_runs(server: Server, room: str) -> None:
    """docs/client.md's first block, for two peers: the second leaves when the first has answered."""
    page = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    match = re.search(r"```python run\n(.*?)```", page, re.DOTALL)
    assert match is not None
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", match[1], server.url, room, name], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for name in ("first", "second")
    ]
    said = [program.communicate(timeout=WAIT_S)[0].split("\n") for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    assert sorted(line for lines in said for line in lines if "said" in line) == [
        "first: second said {'text': 'hello'}",
        "second: first said {'text': 'hello'}",
    ]


def test_example_program_lets_two_talk(server: Server, room: str) -> None:
    program = [sys.executable, str(ROOT / "examples" / "chat.py"), server.url, room]
    with subprocess.Popen([*program, "ann"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ann:
        assert ann.stdin is not None and ann.stdout is not None
        assert ann.stdout.readline() == "here: nobody else\n"
        bob = subprocess.run([*program, "bob"], input="hello é\n", capture_output=True, text=True, check=True)
        assert bob.stdout == "here: ann\n"
        assert [ann.stdout.readline() for _ in range(3)] == ["bob is here\n", "bob: hello é\n", "bob is gone (left)\n"]
        ann.stdin.close()
        assert ann.wait(WAIT_S) == 0
