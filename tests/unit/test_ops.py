"""The operations port over real sockets, before a server that is made up: who may ask, what it bears."""

import asyncio
import contextlib
import json
import random
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import pytest

from fastsig import logs, ops
from fastsig.config import HEALTH_PATHS, Ops
from fastsig.health import Health, Slot
from fastsig.ops import CLIENTS, PATHS, SILENT, Operations

from .test_exposition import OPENMETRICS, Subject as Counted

END_S = 15.0
TOKEN = "correct-horse"
KNOWN = {"Authorization": f"Bearer {TOKEN}"}
PRIVATE = ("/", "/metrics", "/debug/stats", *(f"{path}?verbose" for path in HEALTH_PATHS), "/nothing")


class Subject(Counted):
    """As healthy as a test makes it. `stats` waits until it may answer."""

    def __init__(self) -> None:
        super().__init__(2)
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.known = Health(0.0, "serving", self.slots)

    def health(self) -> Health:
        return self.known

    async def stats(self) -> bytes:
        await self.may_answer.wait()
        return b'{"workers":[]}'


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


class Port:
    """An open port, and a client that speaks plainly."""

    def __init__(self, operations: Operations, subject: Subject, listener: socket.socket) -> None:
        self.operations = operations
        self.subject = subject
        self.listener = listener
        self.address = listener.getsockname()

    async def get(self, path: str, host: str = "127.0.0.1", method: str = "GET", **headers: str) -> Answer:
        lines = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host else [])]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return parsed(await self.say("\r\n".join([*lines, "", ""]).encode()))

    async def say(self, data: bytes) -> bytes:
        """What comes back, to the end of the connection."""
        received = b""
        async with asyncio.timeout(END_S):
            reader, writer = await asyncio.open_connection(*self.address)
            writer.write(data)
            with contextlib.suppress(ConnectionResetError):
                received = await reader.read()
            writer.close()
        return received


def parsed(data: bytes) -> Answer:
    head, _, body = data.decode().partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert int(headers["content-length"]) == len(body.encode()) or not body
    return Answer(int(first.split()[1]), headers, body)


Open = Callable[..., Awaitable[Port]]


@pytest.fixture
async def open_port() -> AsyncIterator[Open]:
    async with contextlib.AsyncExitStack() as stack:

        async def start(host: str = "127.0.0.1", token: str = "") -> Port:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            subject = Subject()
            operations = Operations(subject, Ops(host, 1, token))
            operations.open([listener])
            stack.push_async_callback(operations.close)
            return Port(operations, subject, listener)

        yield start


@pytest.fixture
async def port(open_port: Open) -> Port:
    return await open_port()


@pytest.fixture
async def guarded(open_port: Open) -> Port:
    return await open_port(token=TOKEN)


async def until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + END_S
    while not is_so():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


# ---- what it answers


async def test_index_names_all_paths_and_they_answer(port: Port) -> None:
    body = (await port.get("/")).body
    for path in PATHS:
        assert f"{path}  " in body
        assert (await port.get(path)).status == 200


async def test_metrics_are_text_or_openmetrics(port: Port) -> None:
    text = await port.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=")
    assert "\nfastsig_ready 1.0\n" in text.body
    other = await port.get("/metrics", Accept=OPENMETRICS)
    assert other.headers["content-type"].startswith("application/openmetrics-text")
    assert other.body.endswith("# EOF\n")


async def test_stats_are_json(port: Port) -> None:
    answer = await port.get("/debug/stats")
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body) == {"workers": []}


@pytest.mark.parametrize(
    ("health", "live", "ready"),
    [
        (Health(0.0, "serving", [Slot("serving"), Slot("absent")]), 200, 200),
        (Health(0.0, "starting", [Slot("starting", 1.0)]), 200, 503),
        (Health(0.0, "draining", [Slot("draining")]), 200, 503),
        (Health(9.0, "serving", [Slot("serving")]), 503, 200),
        (Health(0.0, "serving", [Slot("stuck", 41.0)]), 503, 503),
    ],
)
async def test_health_is_a_status(port: Port, health: Health, live: int, ready: int) -> None:
    port.subject.known = health
    for path, status in zip(HEALTH_PATHS, (live, ready) * 2, strict=True):
        short, verbose = await port.get(path), await port.get(f"{path}?verbose")
        assert (short.status, short.body) == (status, "OK\n" if status == 200 else "not OK\n")
        verdict = ("" if status == 200 else "not ") + ("live" if path in HEALTH_PATHS[::2] else "ready")
        assert verbose.status == status
        assert verbose.body.splitlines() == [*health.lines(), verdict]


async def test_head_is_answered_without_a_body(port: Port) -> None:
    for path in (*PATHS, "/"):
        answer = await port.get(path, method="HEAD")
        assert (answer.status, answer.body) == (200, "") and int(answer.headers["content-length"]) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_other_methods_are_refused(port: Port, method: str) -> None:
    for path in (*PATHS, "/"):
        answer = await port.get(path, method=method)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_unknown_path_is_not_repeated(port: Port) -> None:
    answer = await port.get("/who-knows?what=this")
    assert (answer.status, answer.body) == (404, "Not Found\n")


async def test_answers_are_not_kept_or_guessed_at(port: Port) -> None:
    for path in ("/metrics", "/nothing", "/livez"):
        headers = (await port.get(path)).headers
        assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
        assert headers["connection"] == "close" and headers["server"] == "fastsig"


# ---- who may ask


async def test_without_the_token_only_plain_health_is_answered(guarded: Port) -> None:
    for path in HEALTH_PATHS:
        assert (await guarded.get(path)).status == 200
    for path in PRIVATE:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": TOKEN},
            {"Authorization": f"Bearer {TOKEN[:-1]}"},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": "Bearer Ã¼\x80"},
        ):
            answer = await guarded.get(path, **headers)
            assert answer.status == 401 and answer.headers["www-authenticate"].startswith("Bearer")
            assert TOKEN not in answer.body


async def test_token_opens_all_under_any_name(guarded: Port) -> None:
    for host in ("127.0.0.1", "metrics.example:9600"):
        for path in PRIVATE:
            answer = await guarded.get(path, host, **KNOWN)
            assert answer.status == (404 if path == "/nothing" else 200)
    assert (await guarded.get("/metrics", Authorization=f"bearer {TOKEN}")).status == 200


async def test_token_changes_while_it_is_open(guarded: Port) -> None:
    guarded.operations.configure(Ops("127.0.0.1", 1, "other"))
    assert (await guarded.get("/metrics", **KNOWN)).status == 401
    assert (await guarded.get("/metrics", Authorization="Bearer other")).status == 200


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:9600", "[::1]:9600", "[::1]", "localhost", "LocalHost:1", "10.0.0.7", "ops.local:9600"],
)
async def test_names_of_this_machine_are_answered(open_port: Open, host: str) -> None:
    port = await open_port(host="Ops.local")
    for path in PRIVATE:
        assert (await port.get(path, host)).status in (200, 404)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:9600", "localhost.evil.example", "127.0.0.1.evil.example", "localhost@evil.example",
     "[::1].evil.example", "[::1]evil:1", "[evil", "127.0.0.1:1.evil", "localhost:evil", "::1", "0x7f.1",
     "127.0.0.1, evil", ""],
)  # fmt: skip
async def test_other_names_are_refused_but_for_plain_health(port: Port, host: str) -> None:
    """DNS rebinding: a page of that name would have its visitor's browser ask, and could read the answer."""
    for path in PRIVATE:
        answer = await port.get(path, host)
        assert answer.status in (400, 421) and "evil" not in answer.body  # 400: no such Host can be
    if host:
        assert (await port.get("/readyz", host)).status in (200, 400)


async def test_two_names_are_no_name(port: Port) -> None:
    answer = await port.say(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n")
    assert parsed(answer).status in (400, 421)


# ---- what it bears


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense-of-mine\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03nonsense-of-mine\r\n\r\n",
        b"GET / nonsense-of-mine\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nnonsense-of-mine\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: nonsense-of-mine\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nnonsense-of-mine\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"nonsense-of-mine" * 1000 + b"\r\n\r\n",
        b"GET /" + b"nonsense-of-mine" * 1000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"nonsense: of-mine\r\n" * 1000 + b"\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999999\r\n\r\n" + b"nonsense-of-mine" * 60000,
        b"GET //nonsense-of-mine\xff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET http://[nonsense-of-mine HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ],
)
async def test_nonsense_is_refused_and_neither_repeated_nor_logged(
    port: Port, data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.configure("debug", "json")
    answer = await port.say(data)
    assert b"nonsense" not in answer
    assert not answer or parsed(answer).status in (200, 400, 404, 405)
    assert (await port.get("/livez")).status == 200
    assert capfd.readouterr().err == ""


async def test_client_that_goes_in_the_middle_of_its_request_is_not_logged(
    port: Port, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.configure("debug", "json")
    for path in (*PATHS, "/"):
        for _ in range(5):
            _, writer = await asyncio.open_connection(*port.address)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\n\r\n".encode())
            writer.transport.abort()
    await until(lambda: not port.operations._clients, "they are kept")
    assert (await port.get("/livez")).status == 200
    assert capfd.readouterr().err == ""


_LINES = (
    b"Authorization: Bearer \xe9\x80", b"Authorization:", b"Transfer-Encoding: chunked", b"Content-Length: 5",
    b"Content-Encoding: gzip", b"Connection: upgrade\r\nUpgrade: websocket", b"Expect: 100-continue", b"Expect: \xff",
    b"Accept: application/openmetrics-text; version=x\xff", b"Accept: ;;;,,,", b"Cookie: a=b;;\x01", b"Host: \xff", b"",
)  # fmt: skip
_TARGETS = (
    b"/metrics",
    b"/livez?%zz=%ff&&&=",
    b"*",
    b"//x",
    b"/%2e%2e/",
    b"http://h:99999/metrics",
    b"http://[x/",
    b"\x00",
)


async def test_no_mixture_of_headers_is_logged_or_stays(port: Port, capfd: pytest.CaptureFixture[str]) -> None:
    """Half of those who send it go without waiting for the answer; the last are cut off by the end of the port."""
    logs.configure("debug", "json")
    chance = random.Random(1)
    for number in range(500):
        lines = [b"GET " + chance.choice(_TARGETS) + b" HTTP/1.1", b"Host: 127.0.0.1"]
        lines += chance.choices(_LINES, k=chance.randrange(5))
        _, writer = await asyncio.open_connection(*port.address)
        writer.write(b"\r\n".join([*lines, b"", b"5\r\nhello\r\n0\r\n\r\n"]))
        if number % 2:
            writer.transport.abort()
        else:
            await asyncio.sleep(0)
            writer.close()
    await port.operations.close()
    assert capfd.readouterr().err == ""


async def test_two_requests_on_one_connection_get_one_answer(port: Port) -> None:
    answer = await port.say(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 2)
    assert answer.count(b"HTTP/1.1 200") == 1


async def test_oldest_of_too_many_that_say_nothing_makes_room(port: Port) -> None:
    connections = [await asyncio.open_connection(*port.address) for _ in range(SILENT + 20)]
    assert (await port.get("/livez")).status == 200
    for reader, _ in connections[:20]:
        assert await asyncio.wait_for(reader.read(), END_S) == b""
    assert len(port.operations._clients) <= SILENT
    for _, writer in connections:
        writer.close()


async def test_oldest_of_too_many_that_wait_for_an_answer_makes_room(port: Port) -> None:
    port.subject.may_answer.clear()
    waiting = [asyncio.create_task(port.get("/debug/stats")) for _ in range(CLIENTS)]
    await until(lambda: _heard(port) == CLIENTS, "they are not served")
    one_more = asyncio.create_task(port.get("/debug/stats"))
    await asyncio.wait(waiting, timeout=END_S, return_when=asyncio.FIRST_COMPLETED)
    assert sum(task.done() for task in waiting) == 1 and _heard(port) == CLIENTS
    port.subject.may_answer.set()
    answers = await asyncio.gather(one_more, *waiting, return_exceptions=True)
    assert sum(isinstance(answer, Answer) and answer.status == 200 for answer in answers) == CLIENTS
    assert answers[0].status == 200  # type: ignore[union-attr]


async def test_flood_of_connections_that_say_nothing_cuts_off_no_request(port: Port) -> None:
    """One waits for its answer through all of it; one is some milliseconds away, and comes behind many of the flood."""
    port.subject.may_answer.clear()
    waiting = asyncio.create_task(port.get("/debug/stats"))
    await until(lambda: _heard(port) == 1, "it is not served")
    flood = [await asyncio.open_connection(*port.address) for _ in range(2 * SILENT)]
    reader, writer = await asyncio.open_connection(*port.address)
    flood += [await asyncio.open_connection(*port.address) for _ in range(SILENT - 1)]
    await until(lambda: len(port.operations._clients) == SILENT + 1, "they are not there, or not cut off")
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert parsed(await asyncio.wait_for(reader.read(), END_S)).status == 200
    port.subject.may_answer.set()
    assert (await waiting).status == 200
    for _, end in [*flood, (reader, writer)]:
        end.close()


def _heard(port: Port) -> int:
    """How many wait for an answer."""
    return sum(client.is_heard for client in port.operations._clients)


async def test_who_says_nothing_is_cut_off(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CLIENT_S", 0.2)
    assert await port.say(b"GET /metrics HTT") == b""
    await until(lambda: not port.operations._clients, "it is kept")


async def test_who_reads_nothing_is_cut_off(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CLIENT_S", 0.2)
    port.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what is accepted has it too
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(port.address)
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await until(lambda: bool(port.operations._clients), "it is not served")
        await until(lambda: not port.operations._clients, "it is kept")


async def test_silent_worker_holds_up_nobody_else(port: Port) -> None:
    port.subject.may_answer.clear()
    waiting = asyncio.create_task(port.get("/debug/stats"))
    await until(lambda: len(port.operations._clients) == 1, "it is not served")
    assert (await port.get("/metrics")).status == 200
    port.subject.may_answer.set()
    assert (await waiting).status == 200


async def test_answer_that_nobody_waits_for_is_given_up(port: Port) -> None:
    port.subject.may_answer.clear()
    before = len(asyncio.all_tasks())
    for _ in range(3 * CLIENTS):
        _, writer = await asyncio.open_connection(*port.address)
        writer.write(b"GET /debug/stats HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        writer.transport.abort()
    await until(lambda: len(asyncio.all_tasks()) <= before, "somebody still waits")


async def test_close_cuts_off_who_waits_and_may_come_twice(port: Port) -> None:
    port.subject.may_answer.clear()
    waiting = asyncio.create_task(port.say(b"GET /debug/stats HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"))
    await until(lambda: len(port.operations._clients) == 1, "it is not served")
    await port.operations.close()
    await port.operations.close()
    assert await waiting == b""
    assert not port.operations._clients


async def test_shortage_of_descriptors_is_waited_out(
    port: Port, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", "json")
    monkeypatch.setattr(ops, "REST_S", 0.05)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        client.settimeout(END_S)
        with socket.socket() as next_one:
            lowest = next_one.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            client.connect(port.address)
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            await until(lambda: port.operations._was_short, "nothing is noticed")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert '"operations_resting"' in capfd.readouterr().err
        answer = await asyncio.to_thread(client.recv, 100)
        assert answer.startswith(b"HTTP/1.1 200")


async def test_bug_is_said_here_and_not_there(
    port: Port, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Health:
        raise RuntimeError("a bug with details")

    logs.configure("info", "json")
    monkeypatch.setattr(port.subject, "health", fail)
    answer = await port.get("/livez")
    assert (answer.status, answer.body) == (500, "Internal Server Error\n")
    (line,) = capfd.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "internal_error" and "a bug with details" in json.loads(line)["exception"]
