"""What is counted, over peers in memory; and the map that the numbers are in."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastsig import metrics
from fastsig._relay import Relay
from fastsig.errors import InvariantError
from fastsig.metrics import INDEX, METRICS, SLAB_BYTES, Counters

from .memory import CLOSE, PING, PONG, TEXT, Host, frame

RELAY = Path(metrics.__file__).with_name("_relay.pyx")


@pytest.fixture
async def host() -> Host:
    return Host()


# ---- the table


def test_relay_has_the_same_words_in_the_same_order() -> None:
    (block,) = re.findall(
        r"^cdef enum:  # what the worker counts.*\n((?:    .*\n)+)", RELAY.read_text(encoding="utf-8"), re.MULTILINE
    )
    words = [line.split("#")[0].strip().lower() for line in block.splitlines()]
    assert words == [*INDEX, "words"]


def test_names_follow_one_rule() -> None:
    assert len(INDEX) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")


# ---- what is counted


async def test_nothing_is_counted_before_somebody_comes(host: Host) -> None:
    host.accept()
    assert host.counted() == {}


async def test_connections_rooms_and_members_come_and_go(host: Host) -> None:
    a, b = host.join("a"), host.join("b")
    b.say(type="join", room="other")
    gauges = {"connections": 2, "rooms": 2, "members": 3}
    assert gauges.items() <= host.counted().items()
    b.say(type="leave", room="other")
    a.vanish()
    assert {"connections": 1, "rooms": 1, "members": 1}.items() <= host.counted().items()
    b.feed(frame(CLOSE, b"\x03\xe8"))
    assert host.counted().keys().isdisjoint({"rooms", "members"})
    host.advance(3)
    assert "connections" not in host.counted()
    assert host.counted()["connections_total"] == 2


async def test_connection_counts_until_its_close_is_over(host: Host) -> None:
    host.join("a").feed(frame(CLOSE, b"\x03\xe8") + frame(PING))
    assert host.counted()["connections"] == 1
    host.advance(3)
    assert "connections" not in host.counted()


async def test_messages_count_by_kind_and_deliveries_by_recipient(host: Host) -> None:
    a, _b, _c = host.join("a"), host.join("b"), host.join("c")
    joins = 3
    a.say(type="offer", room="r", recipient="b")
    a.say(type="message", room="r")
    a.say(type="x-chat", room="r", recipient=["b", "c", "nobody"])
    a.say(type="answer", room="elsewhere")
    a.say(type="ping")
    a.say("{")
    found = host.counted()
    assert found["relayed_messages_received_total"] == 4
    assert found["other_messages_received_total"] == joins + 2
    assert found["messages_delivered_total"] == 1 + 2 + 2
    assert found["errors_sent_total"] == 3, "an absent recipient, a room not joined, no JSON"


async def test_presence_is_no_delivery(host: Host) -> None:
    host.join("a")
    host.join("b").vanish()
    assert "messages_delivered_total" not in host.counted()


async def test_bytes_are_those_on_the_wire(host: Host) -> None:
    client = host.connect()
    opened = host.counted()["sent_bytes_total"]
    assert "received_bytes_total" not in host.counted()
    received = [frame(TEXT, json.dumps({"type": "ping", "id": "x" * size})) for size in (1, 60, 64)]
    received += [frame(PING, b"p"), frame(TEXT, '{"type":', fin=False), frame(0, '"ping"}'), frame(TEXT, "x" * 65536)]
    for data in received:
        client.feed(data)
    assert host.counted()["received_bytes_total"] == len(b"".join(received))
    assert host.counted()["sent_bytes_total"] == opened + len(client.take_bytes())


async def test_refused_handshakes_count_and_health_does_not(host: Host) -> None:
    for target in ("/ws", "/nowhere", "/health/live", "/ws?room=%ff"):
        host.accept().feed(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert host.counted()["handshakes_refused_total"] == 3
    assert "connections_total" not in host.counted()


async def test_slow_reader_counts_once() -> None:
    host = Host(output_bytes=1000)
    a, b = host.join("a"), host.join("b")
    b.transport.accepts = 0
    for _ in range(3):
        a.say(type="message", room="r", payload="x" * 1000)
        host.advance(1)
    assert host.counted()["slow_readers_closed_total"] == 1


async def test_unanswered_pings_count_once() -> None:
    host = Host(ping_s=25.0)
    host.join("a")
    host.advance(24)
    assert "unanswered_pings_closed_total" not in host.counted()
    host.advance(80)
    assert host.counted()["unanswered_pings_closed_total"] == 1
    assert "slow_readers_closed_total" not in host.counted()


async def test_peer_that_answers_pings_is_not_counted(host: Host) -> None:
    a = host.join("a")
    for _ in range(20):
        host.advance(10)
        a.feed(frame(PONG))
    assert "unanswered_pings_closed_total" not in host.counted()


async def test_relay_refuses_a_buffer_that_it_cannot_count_in() -> None:
    def make(buffer: bytearray | memoryview) -> None:
        Relay(call_soon=print, clock=lambda: 0.0, counters=buffer, message_bytes=1, output_bytes=1, handshake_s=1,
              first_message_s=1, ping_s=1)  # fmt: skip

    make(bytearray(8 * len(METRICS)))
    with pytest.raises(InvariantError):
        make(bytearray(8 * len(METRICS) - 1))
    with pytest.raises(InvariantError):
        make(memoryview(bytearray(8 * len(METRICS) + 8))[1:])
    with pytest.raises(BufferError):
        make(memoryview(bytes(SLAB_BYTES)))  # type: ignore[arg-type, unused-ignore]


async def test_relay_refuses_a_counter_that_there_is_not(host: Host) -> None:
    with pytest.raises(InvariantError):
        host.relay.count(len(METRICS))


async def test_relay_keeps_its_buffer(host: Host) -> None:
    with pytest.raises(BufferError):
        host.slab.clear()


# ---- the map


@pytest.fixture
def counters() -> Iterator[Counters]:
    made = Counters(3)
    yield made
    made.close()


def _worker(counters: Counters, slot: int) -> memoryview:
    return memoryview(metrics.open_slab(os.dup(counters.fd), slot)).cast("Q")


def test_slots_count_beside_each_other(counters: Counters) -> None:
    for slot in range(3):
        words = _worker(counters, slot)
        for index in range(len(METRICS)):
            words[index] = (1 << 64) - 1 - 100 * slot - index
    for slot in range(3):
        expected = [(1 << 64) - 1 - 100 * slot - index for index in range(len(METRICS))]
        assert counters.read(slot) == dict(zip(INDEX, expected, strict=True))


def test_counters_outlive_a_worker_and_gauges_do_not(counters: Counters) -> None:
    for slot in range(3):
        _worker(counters, slot)[: len(METRICS)] = memoryview(bytearray(b"\1" * 8 * len(METRICS))).cast("Q")
    counters.zero_gauges(1)
    counters.add(1, "restarts_total")
    left = counters.read(1)
    for metric in METRICS:
        one = 0x0101010101010101 + (metric.name == "restarts_total")
        assert left[metric.name] == (0 if metric.kind == "gauge" else one)
    assert set(counters.read(0).values()) == set(counters.read(2).values()) == {0x0101010101010101}


def test_map_is_closed_once_and_leaves_the_workers_theirs() -> None:
    counters = Counters(1)
    words = _worker(counters, 0)
    counters.close()
    counters.close()
    words[0] += 1
    assert words[0] == 1
