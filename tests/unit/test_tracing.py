"""Spans of a worker in memory: what each step leaves, whose trace it is in, and who decides that it is recorded."""

import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from fastsig import config, tracing
from fastsig.errors import ConfigError
from fastsig.logs import FLOOD_LINES, FLOOD_S
from fastsig.protocol import read_traceparent
from fastsig.routing import Address, Place, View
from fastsig.tracing import Tracer

from .memory import HEAD, TEXT, Client, Cluster, Host, frame, frame_of
from .moving import Far, Home, Homes, homes, until

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID = 0xB7AD6B7169203331
RECORDED = f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"
NOT_RECORDED = f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-00"
OTHER_ID = 0x4BF92F3577B34DA6A3CE929D0E0E4736
KEYED = View(1, b"0123456789abcdef", {"": (0,)})


class Spans:
    """Those of one worker; `take` gives what ended since the last time, by name where one is asked for."""

    def __init__(self, worker: Host | Home, clock: Callable[[], float], **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        settings = config.build({key.replace("_", ".", 1): value for key, value in options.items()})
        self.tracer = Tracer(settings, worker.place, SimpleSpanProcessor(self._exporter), clock)
        worker.hub.tracer = worker.door.tracer = self.tracer

    def take(self, name: str | None = None) -> list[ReadableSpan]:
        spans = self._exporter.get_finished_spans()
        self._exporter.clear()
        return [span for span in spans if name in (None, span.name)]


class Traced(Spans):
    """A host with a tracer."""

    def __init__(self, host: Host, **options: Any) -> None:
        super().__init__(host, lambda: host.now, **options)
        self.host = host

    def connect(self, *headers: str, target: str = "/ws") -> Client:
        """A WebSocket whose request has these header lines, too."""
        client = self.host.accept()
        lines = "".join(f"{header}\r\n" for header in headers)
        client.feed(f"{HEAD.format(target=target)[:-2]}{lines}\r\n".encode())
        assert client.take_bytes().startswith(b"HTTP/1.1 101 ")
        return client


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the machine's."""
    for name in ("OTEL_SDK_DISABLED", "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def make() -> Callable[..., Traced]:
    def make(place: Place = Place(), **options: Any) -> Traced:  # noqa: B008 (it is immutable)
        return Traced(Host(place=place), **options)

    return make


@pytest.fixture
async def traced(make: Callable[..., Traced]) -> Traced:
    return make()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """Those of ours, without the prefix."""
    found = dict(span.attributes or {})
    assert all(name.startswith("fastsig.") for name in found), found
    return {name.removeprefix("fastsig."): value for name, value in found.items()}


def parent_id(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    found: int = span.context.span_id
    return found


def trace_id(span: ReadableSpan) -> int:
    assert span.context is not None
    found: int = span.context.trace_id
    return found


# ---- traceparent


@pytest.mark.parametrize("text", [RECORDED, NOT_RECORDED, "01" + RECORDED[2:], "cc" + RECORDED[2:] + "-what-else"])
def test_traceparent_of_this_and_later_versions_is_read(text: str) -> None:
    read = read_traceparent(text)
    assert read is not None
    assert (read.trace_id, read.span_id, read.is_sampled) == (TRACE_ID, SPAN_ID, "-01" in text)


@pytest.mark.parametrize(("flags", "is_sampled"), [("00", False), ("01", True), ("02", False), ("ff", True)])
def test_only_the_last_bit_of_the_flags_says_that_it_is_recorded(flags: str, is_sampled: bool) -> None:  # noqa: FBT001
    read = read_traceparent(RECORDED[:-2] + flags)
    assert read is not None
    assert read.is_sampled is is_sampled


BAD_TRACEPARENTS = {
    "nothing": "",
    "version ff": "ff" + RECORDED[2:],
    "trace id of zeros": f"00-{'0' * 32}-{SPAN_ID:016x}-01",
    "span id of zeros": f"00-{TRACE_ID:032x}-{'0' * 16}-01",
    "capitals": RECORDED.upper(),
    "too short": RECORDED[:-1],
    "more behind version 00": RECORDED + "-00",
    "more without a dash": "01" + RECORDED[2:] + "00",
    "very much more": "01" + RECORDED[2:] + "-" + "x" * 73,
    "a line end": RECORDED + "\n",
    "other digits": RECORDED.replace("0", "٠"),
}


@pytest.mark.parametrize("text", BAD_TRACEPARENTS.values(), ids=BAD_TRACEPARENTS)
async def test_bad_traceparent_begins_a_trace_of_our_own_in_a_header_and_is_bad_in_a_join(
    traced: Traced, text: str
) -> None:
    assert read_traceparent(text) is None
    client = traced.connect() if "\n" in text or "٠" in text else traced.connect(f"traceparent: {text}")
    (handshake,) = traced.take()
    assert handshake.parent is None
    client.say(type="join", room="r", payload={"trace": text})
    assert client.take_error() == "bad_message"


# ---- whose trace it is


async def test_handshake_is_a_server_span_of_the_requests_trace_from_accept_to_101(traced: Traced) -> None:
    traced.connect(f"Traceparent:   {RECORDED}")
    (span,) = traced.take()
    assert (span.name, span.kind, trace_id(span), parent_id(span)) == ("handshake", SpanKind.SERVER, TRACE_ID, SPAN_ID)
    assert attributes(span) == {"result": "accepted", "connection": "0.1.1"}
    assert span.status.status_code is StatusCode.UNSET
    assert span.start_time is not None and span.end_time is not None and span.start_time < span.end_time
    assert dict(span.resource.attributes)["fastsig.worker"] == 0


async def test_two_traceparents_are_none(traced: Traced) -> None:
    traced.connect(f"traceparent: {RECORDED}", f"traceparent: {RECORDED}")
    (span,) = traced.take()
    assert span.parent is None


async def test_tracestate_is_not_kept(traced: Traced) -> None:
    traced.connect(f"traceparent: {RECORDED}", "tracestate: vendor=secret")
    (span,) = traced.take()
    assert span.context is not None and not span.context.trace_state


async def test_request_that_is_refused_says_with_what(traced: Traced) -> None:
    client = traced.host.accept()
    client.feed(f"GET /elsewhere HTTP/1.1\r\nHost: x\r\ntraceparent: {RECORDED}\r\n\r\n".encode())
    (span,) = traced.take()
    assert (trace_id(span), attributes(span)) == (TRACE_ID, {"result": "not_found"})
    assert span.status.status_code is StatusCode.ERROR


async def test_health_and_connections_that_say_nothing_leave_no_span(traced: Traced) -> None:
    traced.host.accept().feed(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    traced.host.accept().vanish()
    traced.host.accept()
    traced.host.advance(30)
    assert traced.take() == []


async def test_join_belongs_to_the_trace_it_names_and_points_to_its_handshake(traced: Traced) -> None:
    client = traced.connect()
    (handshake,) = traced.take()
    client.say(type="join", room="r", sender="secret-peer", payload={"trace": RECORDED, "meta": "secret"})
    (join,) = traced.take()
    assert (join.name, trace_id(join), parent_id(join)) == ("join", TRACE_ID, SPAN_ID)
    assert attributes(join) == {"connection": "0.1.1", "result": "joined"}
    assert [link.context.span_id for link in join.links] == [span_id(handshake)]


async def test_join_without_a_trace_belongs_to_the_connections(traced: Traced) -> None:
    client = traced.connect(f"traceparent: {RECORDED}")
    (handshake,) = traced.take()
    client.say(type="join", room="r")
    (join,) = traced.take()
    assert (trace_id(join), parent_id(join), join.links) == (TRACE_ID, span_id(handshake), ())


async def test_refused_join_ends_with_its_code_and_is_no_second_error(traced: Traced) -> None:
    traced.host.join("a")
    client = traced.connect()
    traced.take()
    client.say(type="join", room="r", sender="a", payload={"trace": RECORDED})
    (join,) = traced.take()
    assert (join.name, attributes(join)["result"], join.status.status_code) == ("join", "id_taken", StatusCode.ERROR)


async def test_error_is_told_in_the_trace_of_the_last_join_that_named_one(traced: Traced) -> None:
    client = traced.connect()
    (handshake,) = traced.take()
    client.say(type="offer", room="r", recipient="b")
    (before,) = traced.take()
    assert (before.name, parent_id(before)) == ("error", span_id(handshake))
    assert attributes(before) == {"connection": "0.1.1", "code": "not_joined"}
    client.say(type="join", room="r", payload={"trace": RECORDED})
    (join,) = traced.take()
    client.say(type="offer", room="r", recipient="b")
    (after,) = traced.take()
    assert (trace_id(after), parent_id(after), attributes(after)["code"]) == (
        TRACE_ID, span_id(join), "peer_unavailable",
    )  # fmt: skip


async def test_of_a_flood_of_errors_with_one_code_the_first_of_each_second_are_recorded(traced: Traced) -> None:
    client = traced.connect()
    traced.take()
    for _ in range(3 * FLOOD_LINES):
        client.say(type="offer", room="r", recipient="b")
    client.say(type="leave")
    found = [attributes(span) for span in traced.take()]
    assert found == [*[{"connection": "0.1.1", "code": "not_joined"}] * FLOOD_LINES,
                     {"connection": "0.1.1", "code": "bad_message"}]  # fmt: skip
    traced.host.advance(FLOOD_S)
    client.say(type="offer", room="r", recipient="b")
    (span,) = traced.take()
    assert attributes(span) == {"connection": "0.1.1", "code": "not_joined", "suppressed": 2 * FLOOD_LINES}


async def test_join_that_meets_a_bug_ends_with_it(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    client = traced.connect()
    traced.take()
    monkeypatch.setattr(traced.host.hub.rooms, "check", fail)
    client.say(type="join", room="r")
    (join,) = traced.take()
    assert (join.name, attributes(join)["result"], join.status.status_code) == ("join", "internal", StatusCode.ERROR)


async def test_relay_shows_type_and_size_and_names_no_type_of_the_peers(traced: Traced) -> None:
    for kind, shown in (("offer", "offer"), ("x-secret", "x-*")):
        traced.tracer.relayed(kind, 321, 10.0, 10.5)
        (span,) = traced.take()
        assert (span.name, attributes(span), span.parent) == ("relay", {"type": shown, "bytes": 321}, None)
        assert span.start_time is not None and span.end_time is not None
        assert span.end_time - span.start_time == pytest.approx(5e8, abs=1e3)


async def test_one_relay_in_n_is_traced(traced: Traced) -> None:
    a, b = traced.host.join("a"), traced.host.join("b")
    a.take()
    traced.host.relay.configure(
        message_bytes=65536, output_bytes=1 << 20, handshake_s=10, first_message_s=60, trace_every=3
    )
    traced.take()
    for _ in range(12):
        a.say(type="offer", room="r", recipient="b", payload={"sdp": "secret"})
    assert len(b.take()) == 12
    spans = traced.take()
    assert [span.name for span in spans] == ["relay"] * 4
    traced.host.relay.configure(
        message_bytes=65536, output_bytes=1 << 20, handshake_s=10, first_message_s=60, trace_every=0
    )
    a.say(type="offer", room="r", recipient="b")
    assert traced.take() == []


async def test_no_name_of_a_peer_or_room_and_nothing_it_says_is_in_any_span(traced: Traced) -> None:
    traced.host.accept().feed(HEAD.format(target="/ws?room=secret&token=secret").encode())  # refused
    client = traced.connect("X-Secret: secret", target="/ws?room=secret")
    client.say(type="join", room="secret", sender="secret", payload={"meta": "secret"})
    client.say(type="offer", room="secret", recipient="secret", payload="secret")
    client.say(type="secret", room="secret", id="secret")
    client.say(type="join", room="secret", payload={"token": "secret"})
    spans = traced.take()
    assert [span.name for span in spans] == ["handshake", "handshake", "join", "error", "error", "join"]
    assert not [span for span in spans if "secret" in json.dumps(json.loads(span.to_json()))]


# ---- joins that another worker decides


async def test_join_that_another_worker_decides_is_one_span_at_home() -> None:
    cluster = Cluster(2)
    home, owner = Traced(cluster[0]), Traced(cluster[1])
    client = home.connect()
    home.take()
    client.feed_only(frame_of(type="join", room=cluster.room(owner=1), payload={"trace": RECORDED}))
    assert home.take() == [], "it is not decided yet"
    cluster.run()
    (join,) = home.take()
    assert (trace_id(join), attributes(join)["result"]) == (TRACE_ID, "joined")
    assert owner.take() == []


async def test_join_whose_peer_goes_before_it_is_decided_is_withdrawn() -> None:
    cluster = Cluster(2)
    home = Traced(cluster[0])
    client = home.connect()
    home.take()
    client.feed_only(frame_of(type="join", room=cluster.room(owner=1)))
    client.transport.protocol.connection_lost(None)
    cluster.run()
    (join,) = home.take()
    assert attributes(join)["result"] == "withdrawn"


async def test_join_whose_decision_meets_a_bug_ends_with_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    cluster = Cluster(2)
    home = Traced(cluster[0])
    client = home.connect()
    home.take()
    client.feed_only(frame_of(type="join", room=cluster.room(owner=1)))
    monkeypatch.setattr(home.host.hub, "_settle", fail)
    cluster.run()
    assert home.take() == []
    client.transport.protocol.connection_lost(None)
    (join,) = home.take()
    assert attributes(join)["result"] == "withdrawn"


async def test_join_that_is_never_decided_ends_with_its_error() -> None:
    cluster = Cluster(2)
    home = Traced(cluster[0])
    client = home.connect()
    home.take()
    client.feed_only(frame_of(type="join", room=cluster.room(owner=1)))
    cluster.kill(1)
    cluster.run()
    (join,) = home.take()
    assert attributes(join)["result"] == "backend_unavailable"


# ---- passing


async def test_passed_connection_goes_on_in_the_same_trace(make: Callable[..., Traced]) -> None:
    here, there = make(), make(Place(Address("", 1)))
    request = here.tracer.begin(None)
    request.read([RECORDED], ("192.0.2.1", 1))
    trace = request.passing()
    request.passed("passed")
    (passed,) = here.take()
    assert (passed.name, parent_id(passed), attributes(passed)) == ("pass", SPAN_ID, {"result": "passed"})
    assert trace == f"00-{TRACE_ID:032x}-{span_id(passed):016x}-01"
    request = there.tracer.begin(trace)
    request.read([f"00-{OTHER_ID:032x}-{SPAN_ID:016x}-01"], ("192.0.2.1", 1))
    client = there.connect()
    there.take()
    request.end(client.transport.protocol, "refused")
    (handshake,) = there.take()
    assert (trace_id(handshake), parent_id(handshake)) == (TRACE_ID, span_id(passed))


async def test_connection_that_nobody_took_is_served_in_the_trace_of_the_asking(traced: Traced) -> None:
    handed: list[Any] = []

    def pass_on(handshake: Any, room: str, received: bytes) -> bool:
        handed.append(handshake)
        return True

    traced.host.door.pass_on = pass_on
    client = traced.host.accept()
    client.feed(HEAD.format(target="/ws?room=r").replace("\r\n\r\n", f"\r\ntraceparent: {RECORDED}\r\n\r\n").encode())
    (handshake,) = handed
    handshake.end_offer("silent")
    handshake.serve()
    passed, served = traced.take()
    assert (attributes(passed), parent_id(passed)) == ({"result": "silent"}, SPAN_ID)
    assert (attributes(served)["result"], parent_id(served)) == ("accepted", span_id(passed))


# ---- moves


@pytest.fixture
async def two() -> AsyncIterator[Homes]:
    async with homes() as made:
        yield made


def traced_home(home: Home) -> Spans:
    return Spans(home, home.clock)


async def test_move_is_followed_from_the_join_at_one_worker_to_the_join_at_the_other(two: Homes) -> None:
    mover, adopter = traced_home(two[0]), traced_home(two[1])
    far = await Far.connect(two[0])
    await far.join(two.room(1), "a", trace=RECORDED)
    await far.say(type="offer", room="elsewhere", recipient="b")
    assert (await far.hear())["code"] == "not_joined"
    handshake, moved, asked = mover.take()
    adopted, joined, error = adopter.take()
    assert [span.name for span in (asked, moved, adopted, joined, error)] == ["join", "move", "adopt", "join", "error"]
    assert {trace_id(span) for span in (asked, moved, adopted, joined, error)} == {TRACE_ID}
    assert [parent_id(span) for span in (asked, moved, adopted, joined, error)] == [
        SPAN_ID, span_id(asked), span_id(asked), span_id(adopted), span_id(adopted)
    ]  # fmt: skip
    before, after = attributes(handshake)["connection"], attributes(adopted)["connection"]
    assert (before[:4], after[:4]) == ("0.1.", "1.2."), "slot and generation of the worker that has it"
    assert [attributes(span) for span in (asked, moved)] == [{"connection": before, "result": "moved"}] * 2
    assert [attributes(span) for span in (adopted, joined, error)] == [
        {"connection": after} | told for told in ({}, {"result": "joined"}, {"code": "not_joined"})
    ]
    assert [span.kind for span in (moved, adopted, joined)] == [SpanKind.INTERNAL, SpanKind.INTERNAL, SpanKind.SERVER]
    assert not [span for span in (asked, moved, adopted, joined) if span.status.status_code is StatusCode.ERROR]
    assert asked.start_time is not None and moved.start_time is not None and moved.end_time is not None
    assert asked.start_time <= moved.start_time < moved.end_time
    far.close()


async def test_move_of_a_join_without_a_trace_belongs_to_the_connections(two: Homes) -> None:
    mover, adopter = traced_home(two[0]), traced_home(two[1])
    far = await Far.connect(two[0])
    await far.join(two.room(1), "a")
    spans = mover.take() + adopter.take()
    assert [span.name for span in spans] == ["handshake", "move", "join", "adopt", "join"]
    assert len({trace_id(span) for span in spans}) == 1
    far.close()


@pytest.mark.parametrize("result", ["refused", "taken_back", "unfit"])
async def test_connection_that_does_not_move_says_why_and_its_join_goes_on(two: Homes, result: str) -> None:
    mover, adopter = traced_home(two[0]), traced_home(two[1])
    rest = b""
    match result:
        case "refused":
            two[1].door.is_ready = False
        case "taken_back":
            two[1].deafen()
        case "unfit":
            rest = frame(TEXT, '{"type":', fin=False)
    far = await Far.connect(two[0])
    await far.send(frame_of(type="join", room=two.room(1), sender="a", payload={"trace": RECORDED}) + rest)
    await until(lambda: two[0].moves() == {result: 1})
    two[1].release()
    assert (await far.hear())["type"] == "joined"
    _, stayed, joined = mover.take()
    assert [attributes(span)["result"] for span in (stayed, joined)] == [result, "joined"]
    assert (stayed.name, parent_id(stayed), parent_id(joined)) == ("move", span_id(joined), SPAN_ID)
    assert stayed.status.status_code is StatusCode.UNSET
    assert adopter.take() == []
    far.close()


async def test_whether_a_moved_connection_is_recorded_was_decided_before(
    two: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    mover = traced_home(two[0])
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_on")
    adopter = traced_home(two[1])
    far = await Far.connect(two[0])
    await far.join(two.room(1), "a", trace=RECORDED)
    assert mover.take() == []
    assert adopter.take() == []
    far.close()


# ---- who decides that it is recorded


async def test_flag_of_a_stranger_counts_neither_way(
    make: Callable[..., Traced], monkeypatch: pytest.MonkeyPatch
) -> None:
    for sampler, is_recorded in (("parentbased_always_off", False), ("parentbased_always_on", True)):
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
        for trace in (RECORDED, NOT_RECORDED):
            traced = make()
            client = traced.connect(f"traceparent: {trace}")
            client.say(type="join", room="r", payload={"trace": trace})
            assert bool(traced.take()) is is_recorded, (sampler, trace)


@pytest.mark.parametrize("peer", ["10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1", "fe80::1%eth0"])
async def test_flag_of_a_trusted_proxy_counts_in_the_header_only(
    make: Callable[..., Traced], monkeypatch: pytest.MonkeyPatch, peer: str
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    traced = make(server_trusted_proxies=("10.0.0.0/8", "2001:db8::1", "fe80::/10"))
    assert handshakes_from(traced, (peer, 1234), RECORDED) == [TRACE_ID]
    assert handshakes_from(traced, (peer, 1234), NOT_RECORDED) == []
    assert handshakes_from(traced, ("192.0.2.1", 1234), RECORDED) == []
    assert handshakes_from(traced, "", RECORDED) == [], "who comes over a Unix socket is not listed"
    client = traced.connect()
    client.say(type="join", room="r", payload={"trace": RECORDED})
    assert traced.take() == []


async def test_join_in_the_trace_of_its_connection_is_recorded_as_that_is(
    make: Callable[..., Traced], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    traced = make(server_trusted_proxies=("10.0.0.0/8",))
    client = Client(traced.host)
    client.transport.get_extra_info = lambda name, default=None: ("10.0.0.1", 1)  # type: ignore[method-assign]
    client.feed(HEAD.format(target="/ws").replace("\r\n\r\n", f"\r\ntraceparent: {RECORDED}\r\n\r\n").encode())
    client.say(type="join", room="r", payload={"trace": NOT_RECORDED})
    client.say(type="join", room="other", payload={"trace": f"00-{OTHER_ID:032x}-{SPAN_ID:016x}-01"})
    assert [(span.name, trace_id(span)) for span in traced.take()] == [("handshake", TRACE_ID), ("join", TRACE_ID)]


async def test_trusted_proxies_reload(make: Callable[..., Traced], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    traced = make()
    assert handshakes_from(traced, ("10.0.0.1", 1), RECORDED) == []
    traced.tracer.configure(config.build({"server.trusted_proxies": ("10.0.0.1",)}))
    assert handshakes_from(traced, ("10.0.0.1", 1), RECORDED) == [TRACE_ID]


@pytest.mark.parametrize("sampler", ["parentbased_traceidratio", "traceidratio"])
async def test_share_of_strangers_is_ours_and_the_same_in_all_workers(
    make: Callable[..., Traced], monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    first, second = make(Place(view=KEYED)), make(Place(Address("", 1), view=KEYED))
    asked = range(1, 2001)  # each of these a ratio of ids would take, whatever it is
    recorded = [handshakes_from(first, None, f"00-{number:032x}-{SPAN_ID:016x}-01") for number in asked]
    assert 400 < sum(map(len, recorded)) < 600
    assert recorded == [handshakes_from(second, None, f"00-{number:032x}-{SPAN_ID:016x}-00") for number in asked]


def handshakes_from(traced: Traced, peername: Any, trace: str) -> list[int]:
    """The traces of the spans that a request with this header leaves, when it comes from there."""
    request = traced.tracer.begin(None)
    request.read([trace], peername)
    request.passed("passed")
    return [trace_id(span) for span in traced.take()]


# ---- the SDK


def test_nothing_of_the_sdk_is_imported_where_no_traces_are_wanted() -> None:
    program = "import sys, fastsig.worker, fastsig.supervisor; print('opentelemetry' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


async def test_service_is_called_fastsig_unless_the_environment_says_otherwise(
    make: Callable[..., Traced], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, wanted in (("", "fastsig"), ("calls", "calls")):
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
        traced = make()
        traced.connect()
        (span,) = traced.take()
        assert span.resource.attributes["service.name"] == wanted


def test_sdk_that_is_disabled_makes_no_tracer_and_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "TRUE")
    before = threading.active_count()
    assert tracing.start(config.build({}), Place()) is None
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_BSP_MAX_QUEUE_SIZE", "0"), ("OTEL_BSP_MAX_QUEUE_SIZE", "many")],
)
def test_variable_that_the_sdk_cannot_use_is_the_operators_to_mend(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="OTEL_"):
        tracing.start(config.build({}), Place())
