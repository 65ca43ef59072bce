"""What is counted, over peers in memory; and the map that the numbers are in."""

import json
import os
import re
from collections.abc import Iterator

import pytest

from fastsig import metrics
from fastsig._relay import Relay
from fastsig.errors import CloseCode, InvariantError
from fastsig.metrics import BY_NAME, FAMILIES, FIRST, IN_MAP, SLAB_BYTES, WORDS, Counters

from .memory import CLOSE, PING, PONG, TEXT, Host, frame


@pytest.fixture
async def host() -> Host:
    return Host()


# ---- the table


def test_names_follow_prometheus_rules() -> None:
    assert len(BY_NAME) == len(FAMILIES)
    for family in FAMILIES:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", family.name)
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert family.kind != "histogram" or family.bounds == tuple(sorted(family.bounds))
        assert not {"le", "quantile", "worker"} & set(family.labels) or family.source == "scrape"
        assert family.help.endswith(".")


def test_each_series_has_words_of_its_own() -> None:
    taken = [place for family in IN_MAP for place in range(FIRST[family.name], FIRST[family.name] + family.words)]
    assert taken == list(range(WORDS))


def test_every_way_to_end_has_a_word() -> None:
    words = {metrics.disconnect(code, is_by_client=False) for code in CloseCode if code != CloseCode.NORMAL}
    assert len(words) == len(CloseCode) - 1
    by_client = {metrics.disconnect(code, is_by_client=True) for code in (0, 1000, 1001, 3000, 4999)}
    assert len(by_client) == len(metrics.ENDS_BY_CLIENT)
    assert not words & by_client


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
    assert host.counted()['handshakes_total{result="accepted"}'] == 2
    assert host.counted()["disconnects_total"] == 2


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
    received = {"offer": 1, "message": 1, "x-*": 1, "answer": 1, "ping": 1, "other": 1, "join": joins}
    assert _by_label(found, "received_messages_total") == received
    sent = {"joined": 3, "peer-joined": 3, "offer": 1, "message": 2, "x-*": 2, "error": 3, "pong": 1}
    assert _by_label(found, "sent_messages_total") == sent
    assert _by_label(found, "errors_total") == {"peer_unavailable": 1, "not_joined": 1, "bad_json": 1}
    assert _by_label(found, "relays_total") == {"local": 3}


async def test_bytes_by_type_are_those_of_the_text(host: Host) -> None:
    a, b = host.join("a"), host.join("b")
    b.take()
    host.slab[:] = bytes(len(host.slab))
    offer = {"type": "offer", "room": "r", "recipient": "b"}
    texts = [json.dumps(offer | {"payload": "x" * size}) for size in (1, 35000)]
    for text in texts:
        a.say(text)
    assert _by_label(host.counted(), "received_message_bytes_total") == {"offer": sum(map(len, texts))}
    came = sum(len(json.dumps(message, separators=(",", ":"))) for message in b.take())
    assert _by_label(host.counted(), "sent_message_bytes_total") == {"offer": came}


@pytest.mark.parametrize(("members", "size"), [(1, "1"), (2, "2"), (3, "3-4"), (4, "3-4"), (5, "5-8"), (17, "17-32")])
async def test_rooms_count_by_their_size(host: Host, members: int, size: str) -> None:
    peers = [host.join(f"peer-{number}") for number in range(members)]
    assert _by_label(host.counted(), "rooms") == {size: 1}
    for peer in peers:
        peer.vanish()
    assert "rooms" not in host.counted()


def _by_label(counted: dict[str, int], family: str) -> dict[str, int]:
    """The series of a family with one label, by its value."""
    found = {name: count for name, count in counted.items() if name.startswith(f"{family}{{")}
    return {name.split('"')[1]: count for name, count in found.items()}


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


async def test_handshakes_count_by_what_became_of_them_and_health_does_not(host: Host) -> None:
    for target in ("/ws", "/nowhere", "/health/live", "/ws?room=%ff"):
        host.accept().feed(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    host.accept().vanish()
    slow, fast = host.accept(), host.connect()  # kept: nothing else holds a connection in memory
    slow.feed(b"GET ")
    host.advance(11)
    assert fast.take() == []
    results = {"bad_request": 2, "not_found": 1, "gone": 1, "timeout": 1, "accepted": 1}
    assert _by_label(host.counted(), "handshakes_total") == results


async def test_one_that_another_worker_serves_is_not_counted_as_gone(host: Host) -> None:
    client = host.accept()
    client.transport.protocol.let_go()
    host.run()
    assert host.counted() == {"handshakes_total": 1, 'handshakes_total{result="passed"}': 1}


@pytest.mark.parametrize(
    ("payload", "code"),
    [(b"", "1005"), (b"\x03\xe8", "1000"), (b"\x03\xe9", "1001"), (b"\x0f\xa0", "other"), (b"\x03\xea", "other")],
)
async def test_ends_of_the_client_count_by_its_code(host: Host, payload: bytes, code: str) -> None:
    host.join("a").feed(frame(CLOSE, payload))
    host.advance(3)
    assert f'disconnects_total{{code="{code}",reason="client"}}' in host.counted()
    assert host.counted()["disconnects_total"] == 1


async def test_ends_of_ours_count_by_the_first_reason(host: Host) -> None:
    host.join("a").vanish()
    host.join("b").feed(frame(TEXT, b"\xff"))
    host.join("c").feed(frame(CLOSE, b"\x03\xed"))
    host.advance(3)
    ends = {name for name in host.counted() if name.startswith("disconnects_total{")}
    assert ends == {
        'disconnects_total{code="1006",reason="lost"}',
        'disconnects_total{code="1007",reason="invalid_text"}',
        'disconnects_total{code="1002",reason="protocol_error"}',
    }


async def test_lives_are_observed_when_they_end(host: Host) -> None:
    client = host.join("a")
    host.advance(20)
    client.feed(frame(PONG))
    assert sum(host.observed("connection_duration_seconds")) == 0
    client.vanish()
    assert host.observed("connection_duration_seconds") == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0], "above 15 s, up to 60"


async def test_slow_reader_counts_once_and_its_output_while_it_waits() -> None:
    host = Host(output_bytes=1000)
    a, b = host.join("a"), host.join("b")
    b.transport.accepts = 0
    for _ in range(3):
        a.say(type="message", room="r", payload="x" * 1000)
        assert host.counted()["blocked_connections"] == 1
        assert host.counted()["waiting_output_bytes"] > 1000
        host.advance(1)
    host.advance(3)
    assert host.counted()['disconnects_total{code="4003",reason="slow_reader"}'] == 1
    assert host.counted().keys().isdisjoint({"blocked_connections", "waiting_output_bytes"})


async def test_output_that_goes_after_all_waits_no_longer() -> None:
    host = Host(output_bytes=100_000)
    a, b = host.join("a"), host.join("b")
    b.transport.accepts = 0
    a.say(type="message", room="r", payload="x" * 1000)
    b.transport.accepts = 1 << 30
    (blocked,) = host.edge.blocked
    blocked.writable()
    host.run()
    assert host.counted().keys().isdisjoint({"blocked_connections", "waiting_output_bytes"})


async def test_unanswered_pings_count_once() -> None:
    no_pong = 'disconnects_total{code="4002",reason="no_pong"}'
    host = Host(ping_s=25.0)
    host.join("a")
    host.advance(24)
    assert no_pong not in host.counted()
    host.advance(80)
    assert host.counted()[no_pong] == 1


async def test_peer_that_answers_pings_is_not_counted(host: Host) -> None:
    a = host.join("a")
    for _ in range(20):
        host.advance(10)
        a.feed(frame(PONG))
    assert "disconnects_total" not in host.counted()


async def test_one_relay_in_64_is_timed(host: Host) -> None:
    a, b = host.join("a"), host.join("b")
    for _ in range(200):
        a.say(type="message", room="r", recipient="b")
    assert sum(host.observed("relay_seconds")) == 200 // 64
    assert len(b.take()) == 200


@pytest.mark.parametrize("every", [1, 7, 64, 100])
async def test_one_in_so_many_is_traced_however_many_share_a_turn(host: Host, every: int) -> None:
    traced: list[tuple[str, int, float, float]] = []
    host.hub.relayed = lambda *span: traced.append(span)  # type: ignore[method-assign]
    host.relay.bind(host.hub, host.edge)
    host.relay.configure(
        message_bytes=65536, output_bytes=1 << 20, handshake_s=10.0, first_message_s=60.0, trace_every=every
    )
    a, b = host.join("a"), host.join("b")
    text = json.dumps({"type": "x-note", "room": "r", "recipient": "b"})
    for _ in range(100):
        a.feed_only(frame(TEXT, text) * 20)
        host.run()
    assert len(b.take()) == 2000
    assert len(traced) == 2000 // every
    assert set(traced) == {("x-note", len(text), host.now, host.now)}
    assert sum(host.observed("relay_seconds")) == 2000 // 64


async def test_message_for_nobody_is_timed_too(host: Host) -> None:
    a = host.join("a")
    for _ in range(64):
        a.say(type="message", room="r")
    assert sum(host.observed("relay_seconds")) == 1


# ---- rooms that are watched


async def test_room_is_watched_from_an_offer_on(host: Host) -> None:
    host.watch_rooms(1)
    a, b = host.join("a"), host.join("b")
    a.say(type="ice-candidate", room="r", recipient="b", payload="early")
    a.say(type="offer", room="r", recipient="b", payload={"sdp": "x" * 20000})
    b.say(type="answer", room="r")
    b.say(type="message", room="r", payload="not of a call")
    host.join("c", "other").say(type="offer", room="other")
    seen = host.relay.take_seen()
    (room,) = {entry[0] for entry in seen}
    one, other = (member.n for member in room.members)
    assert [(entry[1], entry[2], entry[3], entry[5]) for entry in seen] == [
        (one, other, "offer", host.now), (other, 0, "answer", host.now)
    ]  # fmt: skip
    assert (len(seen[0][4]), seen[1][4]) == (16384, b"")
    assert host.relay.take_seen() == []
    host.relay.end_watch(room)
    host.join("e", "another")
    host.join("d", "another").say(type="offer", room="another")
    assert len(host.relay.take_seen()) == 1, "its place is free again"


async def test_watched_room_is_spent_by_its_65th_message(host: Host) -> None:
    host.watch_rooms(1)
    a, b = host.join("a"), host.join("b")
    for _ in range(64):
        a.say(type="offer", room="r", recipient="b")
    seen = host.relay.take_seen()
    assert (len(seen), seen[0][0].is_spent) == (64, False)
    b.say(type="message", room="r")
    assert not seen[0][0].is_spent, "which is of no call"
    for _ in range(2):
        b.say(type="answer", room="r", recipient="a")
        assert (host.relay.take_seen(), seen[0][0].is_spent) == ([], True)
    host.relay.end_watch(seen[0][0])
    a.say(type="offer", room="r", recipient="b")
    assert len(host.relay.take_seen()) == 1


async def test_what_waits_to_be_looked_at_is_bounded(host: Host) -> None:
    host.watch_rooms(100)
    for number in range(100):
        a, _b = host.join("a", f"room {number}"), host.join("b", f"room {number}")
        for _ in range(64):
            a.say(type="offer", room=f"room {number}", recipient="b", payload="x" * 16384)
    seen = host.relay.take_seen()
    assert sum(len(entry[4]) for entry in seen) < 4 * 2**20 + 101 * 16384
    assert not seen[0][0].is_spent, "all of its 64 are there"
    assert seen[-1][0].is_spent
    watched = {entry[0] for entry in seen}
    assert host.relay.stats()["rooms_watched"] == len(watched), "who was not handed out has no place to give back"
    for room in watched:
        host.relay.end_watch(room)
    assert host.relay.stats()["rooms_watched"] == 0


async def test_nothing_is_watched_when_that_is_off(host: Host) -> None:
    host.join("a").say(type="offer", room="r")
    assert host.relay.take_seen() == []


# ---- the buffer


async def test_relay_refuses_a_buffer_that_it_cannot_count_in() -> None:
    def make(buffer: bytearray | memoryview) -> None:
        Relay(call_soon=print, clock=lambda: 0.0, counters=buffer, message_bytes=1, output_bytes=1, handshake_s=1,
              first_message_s=1, ping_s=1)  # fmt: skip

    make(bytearray(8 * WORDS))
    with pytest.raises(InvariantError):
        make(bytearray(8 * WORDS - 1))
    with pytest.raises(InvariantError):
        make(memoryview(bytearray(8 * WORDS + 8))[1:])
    with pytest.raises(BufferError):
        make(memoryview(bytes(SLAB_BYTES)))  # type: ignore[arg-type, unused-ignore]


async def test_relay_refuses_a_counter_that_there_is_not(host: Host) -> None:
    with pytest.raises(InvariantError):
        host.relay.count(WORDS)


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
        for index in range(WORDS):
            words[index] = (1 << 64) - 1 - 1000 * slot - index
    for slot in range(3):
        assert counters.words(slot) == [(1 << 64) - 1 - 1000 * slot - index for index in range(WORDS)]


def test_counters_outlive_a_worker_and_gauges_do_not(counters: Counters) -> None:
    for slot in range(3):
        _worker(counters, slot)[:WORDS] = memoryview(bytearray(b"\1" + bytes(7)) * WORDS).cast("Q")
    counters.bury(1)
    counters.add(1, "worker_restarts_total")
    counters.add(1, "worker_deaths_total")
    left = counters.words(1)
    for family in IN_MAP:
        own = left[FIRST[family.name] : FIRST[family.name] + family.words]
        if family.name == "disconnects_total":
            died = metrics.ENDS.index(metrics.WORKER_DIED)
            assert own.pop(died) == 2, "its one connection"
        one = 1 + (family.name in {"worker_restarts_total", "worker_deaths_total"})
        assert set(own) == {0 if family.kind == "gauge" else one}
    assert set(counters.words(0)) == set(counters.words(2)) == {1}


def test_summary_has_totals_and_the_series_that_are_not_zero(counters: Counters) -> None:
    words = _worker(counters, 0)
    words[metrics.index("errors_total", "bad_json")] = 2
    words[metrics.index("errors_total", "not_joined")] = 3
    found = counters.read(0)
    assert {name: count for name, count in found.items() if count} == {
        "errors_total": 5, 'errors_total{code="bad_json"}': 2, 'errors_total{code="not_joined"}': 3,
    }  # fmt: skip
    assert found.keys() >= {family.name for family in IN_MAP if family.kind != "histogram"}


def test_map_is_closed_once_and_leaves_the_workers_theirs() -> None:
    counters = Counters(1)
    words = _worker(counters, 0)
    counters.close()
    counters.close()
    words[0] += 1
    assert words[0] == 1
