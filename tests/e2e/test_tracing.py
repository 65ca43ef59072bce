"""Real servers export real spans to a collector on loopback: the trace of a call, and what a dead collector costs."""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from websockets.asyncio.client import connect

from .conftest import PYTHON, Server, until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PAGES = ("b7ad6b7169203331", "00f067aa0ba902b7")  # the spans of the two pages
END_S = 15.0
DEAD_S = 4.0  # a stop with a dead collector is over in this; alone it takes well under a second


class Span(NamedTuple):
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    worker: int
    service: str


class Collector:
    """Takes OTLP over HTTP, as the OpenTelemetry Collector does."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._changed = threading.Condition()
        self.may_answer = threading.Event()
        self.may_answer.set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
                collector.add(body)
                collector.may_answer.wait(END_S)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a server is told of this collector; it exports ten times a second."""
        return {
            "FASTSIG_TRACING_ENABLED": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    def add(self, body: bytes) -> None:
        found = []
        for batch in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = _attributes(batch.resource.attributes)
            for span in (span for scope in batch.scope_spans for span in scope.spans):
                ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                own = _attributes(span.attributes)
                found.append(Span(span.name, *ids, own, resource["fastsig.worker"], resource["service.name"]))
        with self._changed:
            self._spans += found
            self._changed.notify_all()

    def spans(self, name: str | None = None) -> list[Span]:
        with self._changed:
            return [span for span in self._spans if name in (None, span.name)]

    def wait_for(self, name: str, count: int) -> list[Span]:
        """So many spans of this name."""
        until(lambda: len(self.spans(name)) >= count, f"no {count} spans {name!r} came: {self.spans()}")
        return self.spans(name)

    def close(self) -> None:
        self.may_answer.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def traceparent(page: int, flags: str = "00") -> str:
    return f"00-{TRACE_ID}-{PAGES[page]}-{flags}"


async def join(server: Server, room: str, page: int | None = None, query: str = "", flags: str = "00") -> None:
    """Come, join, leave."""
    headers = {} if page is None else {"traceparent": traceparent(page, flags)}
    async with connect(server.url + query, proxy=None, additional_headers=headers) as websocket:
        await websocket.send(json.dumps({"type": "join", "room": room}))
        assert json.loads(await websocket.recv())["type"] == "joined"


# ---- a call


def pair() -> Any:
    """The class of examples/aiortc_pair.py, one side of a call."""
    path = Path(__file__).parents[2] / "examples" / "aiortc_pair.py"
    spec = importlib.util.spec_from_file_location("aiortc_pair", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Pair


def traced_side(websocket: Any, room: str, page: int, heard: list[str]) -> Any:
    """A side whose join names the trace; `heard` gets the traces of those who joined after it."""

    class Side(pair()):  # type: ignore[misc] # a class that is loaded at run time
        async def _send(self, kind: str, payload: dict[str, Any] | None = None) -> None:
            if kind == "join":
                join = {"type": "join", "room": room, "payload": {"trace": traceparent(page)}}
                await websocket.send(json.dumps(join))
            else:
                await super()._send(kind, payload)

        async def _messages(self) -> AsyncGenerator[dict[str, Any]]:
            async with contextlib.aclosing(super()._messages()) as messages:
                async for message in messages:
                    if message["type"] == "peer-joined":
                        heard.append(message["payload"]["trace"])
                    yield message

    return Side(websocket, room)


async def call(server: Server, room: str, query: str) -> list[str]:
    """Two aiortc peers, each from a span of one trace, exchange bytes; the traces that whoever was first heard of."""
    heard: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        sockets = [
            await stack.enter_async_context(
                connect(server.url + query, proxy=None, additional_headers={"traceparent": traceparent(page)})
            )
            for page in (0, 1)
        ]
        sides = [traced_side(websocket, room, page, heard) for page, websocket in enumerate(sockets)]
        async with asyncio.timeout(30):
            await asyncio.gather(*(side.run() for side in sides))
    return heard


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("query", ["", "?room="])
async def test_call_is_one_trace_from_page_to_page(
    serve: Callable[..., Server], collector: Collector, room: str, workers: int, query: str
) -> None:
    server = serve("--workers", str(workers), env=collector.environment)
    heard = await call(server, room, query and query + room)
    assert heard in ([traceparent(0)], [traceparent(1)]), "whoever was there first heard of the other's trace"
    assert server.stop() == 0
    handshakes, joins, spans = collector.spans("handshake"), collector.spans("join"), collector.spans()
    assert {span.trace_id for span in spans} == {TRACE_ID}
    assert {span.name for span in spans} <= {"handshake", "join", "pass", "move", "adopt"}, "nothing was refused"
    from_pages = [span for span in joins if span.parent_id in PAGES]
    assert sorted(span.parent_id for span in from_pages) == sorted(PAGES)
    assert {span.attributes["fastsig.connection"] for span in handshakes} == {
        span.attributes["fastsig.connection"] for span in from_pages
    }
    assert sorted(span.attributes["fastsig.result"] for span in joins if span not in from_pages) == [
        "joined" for span in from_pages if span.attributes["fastsig.result"] == "moved"
    ]
    passes = {span.span_id: span.parent_id for span in spans if span.name == "pass"}
    assert sorted(passes.get(span.parent_id, span.parent_id) for span in handshakes) == sorted(PAGES)
    assert {span.service for span in spans} == {"fastsig"}


async def test_passed_connection_is_followed_from_worker_to_worker(
    serve: Callable[..., Server], collector: Collector, room: str
) -> None:
    """Half of them are accepted by the worker that owns the room; with no page each trace begins in the server.

    On a busy machine the owner may be asked in vain: then the connection is served where it was accepted.
    """
    server = serve("--workers", "2", env=collector.environment)
    for _ in range(16):
        await join(server, room, query=f"?room={room}")
    assert server.stop() == 0
    joins = {span.trace_id: span for span in collector.spans("join")}
    passes = {span.span_id: span for span in collector.spans("pass")}
    assert len(joins) == 16, "one trace each"
    assert "passed" in {span.attributes["fastsig.result"] for span in passes.values()}
    for span in collector.spans("handshake"):
        assert joins.pop(span.trace_id).parent_id == span.span_id
        if span.parent_id:
            before = passes.pop(span.parent_id)
            assert before.trace_id == span.trace_id
            assert (before.attributes["fastsig.result"] == "passed") == (before.worker != span.worker)
    assert not joins and not passes


async def test_connection_that_moves_is_followed_from_worker_to_worker(
    serve: Callable[..., Server], collector: Collector, room: str
) -> None:
    """Half of them are accepted by the worker that owns the room; with no page each trace begins in the server.

    On a busy machine the owner may be asked in vain: then the join goes on where it was read.
    """
    server = serve("--workers", "2", env=collector.environment)
    for _ in range(16):
        await join(server, room)
    assert server.stop() == 0
    spans = {span.span_id: span for span in collector.spans()}
    joined = [span for span in collector.spans("join") if span.attributes["fastsig.result"] == "joined"]
    assert len({span.trace_id for span in joined}) == len(joined) == 16, "one trace each"
    moves = {span.parent_id: span for span in collector.spans("move")}
    for span in collector.spans("adopt"):
        asked, move = spans[span.parent_id], moves[span.parent_id]
        assert (asked.name, spans[asked.parent_id].name) == ("join", "handshake")
        assert move.attributes["fastsig.result"] == asked.attributes["fastsig.result"] == "moved"
        assert move.worker == asked.worker != span.worker
    ends = [(spans[span.parent_id].name, spans[span.parent_id].worker == span.worker) for span in joined]
    assert set(ends) <= {("handshake", True), ("adopt", True)}
    assert ends.count(("adopt", True)) == len(collector.spans("adopt")) > 0


async def test_relays_are_sampled_when_that_is_asked_for(
    serve: Callable[..., Server], collector: Collector, room: str
) -> None:
    server = serve("--tracing.relay-sample", "5", env=collector.environment)
    async with connect(server.url, proxy=None) as one, connect(server.url, proxy=None) as other:
        for websocket in (one, other):
            await websocket.send(json.dumps({"type": "join", "room": room}))
            await websocket.recv()
        await one.recv()
        for _ in range(20):
            await one.send(json.dumps({"type": "offer", "room": room, "payload": {"sdp": "v=0"}}))
            await other.recv()
    relays = await asyncio.to_thread(collector.wait_for, "relay", 4)
    assert len(relays) == 4
    assert {span.attributes["fastsig.type"] for span in relays} == {"offer"}


async def test_proxy_is_trusted_from_a_reload_on(
    serve: Callable[..., Server], collector: Collector, room: str, tmp_path: Path
) -> None:
    file = tmp_path / "fastsig.toml"
    file.write_text("", encoding="utf-8")
    variables = {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    server = serve("--config", str(file), env=collector.environment | variables)
    await join(server, room, page=0, flags="01")
    file.write_text('[server]\ntrusted_proxies = ["127.0.0.0/8"]\n', encoding="utf-8")
    server.process.send_signal(signal.SIGHUP)
    reloaded = await asyncio.to_thread(server.wait_for, "reloaded")
    assert reloaded["options"] == ["server.trusted_proxies"]
    async with asyncio.timeout(15):
        while not collector.spans("join"):  # the worker hears of it a moment later
            await join(server, room, page=1, flags="01")
    await join(server, room, page=0, flags="00")
    assert server.stop() == 0
    assert {span.parent_id for span in collector.spans("handshake")} == {PAGES[1]}


# ---- a collector that is not there


async def test_last_spans_are_exported_at_the_end(
    serve: Callable[..., Server], collector: Collector, room: str
) -> None:
    server = serve("--server.drain-seconds", "0", env=collector.environment | {"OTEL_BSP_SCHEDULE_DELAY": "3600000"})
    await join(server, room)
    assert collector.spans() == []
    assert server.stop() == 0
    assert {span.name for span in collector.spans()} == {"handshake", "join"}


@pytest.mark.parametrize("way", ["refuses", "silent"])
async def test_collector_that_is_dead_holds_up_neither_peers_nor_the_end(
    serve: Callable[..., Server], collector: Collector, room: str, way: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:  # connects, and never answers
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}" if way == "silent" else "http://127.0.0.1:1"
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
        server = serve("--server.drain-seconds", "0", env=collector.environment | variables)
        for _ in range(20):
            await join(server, room, page=0)
        lost = await asyncio.to_thread(server.wait_for, "spans_lost")
        assert lost["spans"] > 0 and lost["reason"], lost
        for _ in range(20):
            await join(server, room, page=0)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < DEAD_S
    assert len(server.events("spans_lost")) == 1, "once a minute"
    assert not server.events("library_message"), "the exporter says nothing of its own"
    assert collector.spans() == []


async def test_span_that_finds_no_room_is_counted_as_lost(
    serve: Callable[..., Server], collector: Collector, room: str
) -> None:
    """The collector is slow, and takes all that it is given in the end."""
    sizes = {"OTEL_BSP_MAX_QUEUE_SIZE": "8", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8"}
    server = serve("--server.drain-seconds", "0", env=collector.environment | sizes)
    collector.may_answer.clear()
    for _ in range(20):
        await join(server, room)
    collector.may_answer.set()
    lost = await asyncio.to_thread(server.wait_for, "spans_lost")
    assert "OTEL_BSP_MAX_QUEUE_SIZE" in lost["reason"]
    assert server.stop() == 0
    assert lost["spans"] + len(collector.spans()) == 20 * len(("handshake", "join"))


def test_without_the_extra_the_start_is_refused_with_the_cure(tmp_path: Path) -> None:
    """The packages are hidden from the process, as if they were not installed."""
    program = (
        "import importlib.metadata as metadata, sys\n"
        "def gone(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.distribution = gone\n"
        "from fastsig.cli import main\n"
        "sys.exit(main(['serve', '--server.port', '0', '--tracing.enabled']))"
    )
    refused = subprocess.run(
        [PYTHON, "-c", program],
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "pip install 'fastsig[otel]'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_variable_that_the_sdk_cannot_use_ends_the_start_in_one_line(tmp_path: Path) -> None:
    refused = subprocess.run(
        [PYTHON, "-m", "fastsig", "serve", "--port", "0", "--workers", "1", "--tracing.enabled"],
        env=os.environ | {"OTEL_BSP_MAX_QUEUE_SIZE": "0", "FASTSIG_SERVER_RUNTIME_DIR": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert refused.returncode == 3
    (line,) = [line for line in refused.stderr.splitlines() if "cannot_start" in line]
    assert "OTEL_" in line
    assert "Traceback" not in refused.stderr
