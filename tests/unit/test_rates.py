"""What a connection may say and cause per second, and what becomes of one that goes on."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fastsig import logs

from .memory import BINARY, CLOSE, PING, PONG, TEXT, Client, Cluster, Host, frame, frame_of

HELD = {"room": "r", "recipient": "b"}


def host_with(**limits: Any) -> Host:
    return Host(**limits)


def pair(host: Host) -> tuple[Client, Client]:
    a, b = host.join("a"), host.join("b")
    a.take()
    return a, b


def heard(client: Client) -> tuple[list[dict[str, Any]], int | None]:
    """The messages since the last time, and the code that it was closed with."""
    frames = client.take_frames()
    messages = [json.loads(payload) for opcode, payload in frames if opcode == TEXT]
    codes = [int.from_bytes(payload[:2], "big") for opcode, payload in frames if opcode == CLOSE]
    return messages, codes[0] if codes else None


def errors(client: Client) -> list[dict[str, Any]]:
    return [message for message in heard(client)[0] if message["type"] == "error"]


def closed_with(client: Client) -> int | None:
    return heard(client)[1]


async def test_messages_beyond_the_burst_are_refused_with_the_time_to_wait() -> None:
    host = host_with(messages_per_s=10, message_burst=20)
    a, b = pair(host)
    for number in range(25):
        a.say(type="message", id=str(number), **HELD)
    refused = errors(a)
    assert len(b.take()) == 19  # the join was one
    assert [error["id"] for error in refused] == ["19", "20", "21", "22", "23", "24"]
    assert {error["code"] for error in refused} == {"rate_limited"}
    assert {error["room"] for error in refused} == {"r"}
    assert 0 < refused[0]["after_ms"] <= 101
    host.advance(refused[0]["after_ms"] / 1000)
    a.say(type="message", id="later", **HELD)
    assert [message["id"] for message in b.take()] == ["later"]
    assert host.counted()['limit_hits_total{limit="messages_per_s",mode="enforced"}'] == 6


async def test_long_run_is_the_rate() -> None:
    """One that says twice as much is refused 50 times in five seconds, which is not yet insisting."""
    host = host_with(messages_per_s=10, message_burst=20)
    a, b = pair(host)
    came = 0
    for _ in range(400):
        a.say(type="message", **HELD)
        host.advance(0.05)
        came += len([message for message in heard(b)[0] if message["type"] == "message"])
    assert 19 + 200 - 2 <= came <= 19 + 200 + 2
    assert closed_with(a) is None


async def test_one_that_insists_is_closed_and_the_others_hear_that_it_is_lost() -> None:
    host = host_with(messages_per_s=10, message_burst=20)
    a, b = pair(host)
    for _ in range(19 + 100):
        a.say(type="message", **HELD)
    assert closed_with(a) is None
    a.say(type="message", **HELD)
    assert closed_with(a) == 4005
    assert b.take()[-1]["payload"]["reason"] == "lost"
    a.vanish()
    assert host.counted()['disconnects_total{code="4005",reason="rate_limited"}'] == 1


async def test_messages_that_are_not_relayed_count_too_and_so_do_bad_ones() -> None:
    host = host_with(messages_per_s=10, message_burst=5, errors_per_5s=0)
    a = host.connect()
    for _ in range(3):
        a.say(type="ping")
    a.say("not json")
    a.say("not json")
    a.say(type="ping", id="sixth")
    assert errors(a)[-1] | {"after_ms": 0} == {
        "type": "error", "code": "rate_limited", "message": "Too much in too short a time.", "retry": False,
        "id": "sixth", "after_ms": 0,
    }  # fmt: skip


async def test_pings_are_answered_as_often_as_messages_and_a_flood_of_them_ends() -> None:
    host = host_with(messages_per_s=10, message_burst=20)
    a = host.connect()
    a.feed(b"".join(frame(PING, str(n)) for n in range(20 + 100)))
    assert [opcode for opcode, _ in a.take_frames()] == [PONG] * 20
    a.feed(frame(PING))
    assert closed_with(a) == 4005


async def test_bytes_beyond_four_seconds_worth_are_refused_also_where_messages_are_few() -> None:
    host = host_with(bytes_per_s=10_000)
    a, b = pair(host)
    for _ in range(5):
        a.say(type="message", payload="x" * 10_000, **HELD)
    assert len(b.take()) == 4
    (error,) = errors(a)
    assert error["code"] == "rate_limited"
    assert 900 < error["after_ms"] < 1200
    host.advance(error["after_ms"] / 1000)
    a.say(type="message", **HELD)
    assert len(b.take()) == 1


@pytest.mark.parametrize("opcode", [PONG, BINARY])
async def test_bytes_that_nothing_answers_end_the_connection_at_last(opcode: int) -> None:
    host = host_with(bytes_per_s=10_000, message_bytes=1024)
    a = host.connect()
    first = frame(TEXT, "x" * 100, fin=False) if opcode == BINARY else b""
    fragments = frame(0, b"x" * 8, fin=False) if opcode == BINARY else frame(PONG, b"x" * 100)
    a.feed(first + fragments * 60)
    assert closed_with(a) is None
    a.feed(fragments * 1200)
    assert closed_with(a) == (4005 if opcode == PONG else 1009)


@pytest.mark.parametrize("is_fragmented", [False, True])
async def test_message_as_long_as_allowed_passes_whatever_the_rate(*, is_fragmented: bool) -> None:
    host = host_with(bytes_per_s=1000, message_bytes=65536)
    a, b = pair(host)
    text = json.dumps({"type": "message", "payload": "x" * 60_000} | HELD)
    if is_fragmented:
        a.feed(frame(TEXT, text[:30_000], fin=False) + frame(0, text[30_000:]))
    else:
        a.say(text)
    assert len(b.take()) == 1
    assert closed_with(a) is None
    a.say(type="message", **HELD)
    assert errors(a)[0]["after_ms"] > 50_000


async def test_what_a_sender_causes_is_charged_per_delivery() -> None:
    host = host_with(fanout_bytes_per_s=100_000)
    a = host.join("a")
    for number in range(50):
        host.join(f"p{number}")
    for _ in range(3):
        a.say(type="message", room="r", payload="x" * 5000)  # 250 KB each: the second leaves it in debt
    (error,) = errors(a)
    assert error["code"] == "rate_limited"
    a.say(type="message", room="r", recipient="p1", payload="x")
    (error,) = errors(a)
    assert 0 < error["after_ms"] < 4000
    a.say(type="ping")  # causes nothing
    assert heard(a)[0][-1]["type"] == "pong"
    host.advance(error["after_ms"] / 1000)
    a.say(type="message", room="r", recipient="p1", payload="x")
    assert errors(a) == []


async def test_rosters_and_presence_are_charged_to_whose_joins_and_updates_cause_them() -> None:
    host = host_with(fanout_bytes_per_s=20_000, meta_bytes=4096)
    for number in range(40):
        host.join(f"p{number}", meta="x" * 1000)
    a = host.connect()
    a.say(type="join", room="r", sender="a", payload={"meta": "y" * 1000})  # 40 KB to it, 40 KB to the others
    assert a.take()[0]["type"] == "joined"
    a.say(type="update", room="r", payload={"meta": "z" * 1000})
    a.say(type="join", room="s")
    assert [error["code"] for error in errors(a)] == ["rate_limited", "rate_limited"]
    a.say(type="leave", room="r")  # whoever wants to go may
    assert a.take()[-1]["type"] == "left"


async def test_rates_are_kept_at_home_for_rooms_that_are_owned_elsewhere() -> None:
    cluster = Cluster(2, fanout_bytes_per_s=100_000)
    room = cluster.room(owner=1)
    a = cluster[0].connect()
    a.feed_only(frame_of(type="join", room=room, sender="a"))
    cluster.run()
    for number in range(50):
        other = cluster[number % 2].connect()
        other.feed_only(frame_of(type="join", room=room, sender=f"p{number}"))
        cluster.run()
    for _ in range(3):
        a.feed_only(frame_of(type="message", room=room, payload="x" * 5000))
    cluster.run()
    assert [error["code"] for error in errors(a)] == ["rate_limited"]


async def test_joins_have_a_rate_of_their_own() -> None:
    host = host_with(joins_per_s=2, rooms_per_connection=0)
    a = host.connect()
    for number in range(10):
        a.say(type="join", room=f"r{number}", id=str(number))
    heard = a.take()
    assert [message["type"] for message in heard] == ["joined"] * 8 + ["error"] * 2
    assert {message["code"] for message in heard[8:]} == {"rate_limited"}
    host.advance(heard[-1]["after_ms"] / 1000)
    a.say(type="join", room="later")
    assert a.take()[0]["type"] == "joined"


async def test_dry_run_counts_and_refuses_nothing() -> None:
    host = host_with(messages_per_s=10, message_burst=20, bytes_per_s=1000, joins_per_s=1, fanout_bytes_per_s=1000,
                     rooms_per_connection=2, rooms=3, peers_per_room=1, dry_run=True)  # fmt: skip
    a, b = pair(host)
    for number in range(10):
        a.say(type="join", room=f"r{number}")
    for _ in range(500):
        a.say(type="message", payload="x" * 1000, **HELD)
    a.feed(frame(PONG, b"x" * 125) * 10_000)
    assert errors(a) == []
    assert len(b.take()) == 500
    counted = {name: n for name, n in host.counted().items() if name.startswith("limit_hits_total{")}
    assert all('mode="dry_run"' in name and n > 0 for name, n in counted.items())
    assert {name.split('"')[1] for name in counted} == {
        "messages_per_s", "bytes_per_s", "fanout_bytes_per_s", "joins_per_s", "rooms_per_connection", "rooms",
        "peers_per_room",
    }  # fmt: skip


@pytest.mark.parametrize("dry_run", [False, True])
async def test_operator_reads_who_is_above_a_rate_and_whether_that_was_refused(*, dry_run: bool) -> None:
    log = io.StringIO()
    logs.configure("info", "json", stream=log)
    host = host_with(messages_per_s=10, message_burst=20, fanout_bytes_per_s=1000, joins_per_s=1, dry_run=dry_run)
    a, _ = pair(host)
    for number in range(5):
        a.say(type="join", room=f"r{number}")
        a.say(type="message", payload="x" * 5000, **HELD)
    for _ in range(10):
        a.say(type="message", room="r", recipient="nobody")
    a.feed(frame(PING) * 20)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(line["event"], line["limit"], line["enforced"], line["left_out"]) for line in lines] == [
        ("limit_hit", limit, not dry_run, 0) for limit in ("fanout_bytes_per_s", "joins_per_s", "messages_per_s")
    ]


@pytest.mark.parametrize("dry_run", [False, True])
async def test_crowd_that_talks_all_at_once_is_refused_within_a_turn_and_heard_in_the_next(*, dry_run: bool) -> None:
    """Also in a dry run: a worker that stands still would be killed."""
    host = host_with(dry_run=dry_run)
    crowd = [host.join(f"p{number}") for number in range(300)]
    couple = [host.join(name, room="couple") for name in "ab"]
    newcomer = host.connect()
    for client in crowd:
        client.take_bytes()
    couple[0].take_bytes()
    for _ in range(4):
        for client in crowd:
            client.feed_only(frame_of(type="message", room="r"))
    couple[0].feed_only(frame_of(type="message", room="couple"))
    newcomer.feed_only(frame_of(type="join", room="r", sender="late"))
    host.run()
    refused = [error for client in crowd for error in errors(client)]
    assert 0 < len(refused) < 1200 - 262144 // 300 + 1
    assert {(error["code"], error["after_ms"]) for error in refused} == {("rate_limited", 1000)}
    assert [message["type"] for message in couple[1].take()] == ["message"], "a small room is no crowd"
    assert errors(newcomer)[0]["code"] == "rate_limited"
    assert host.counted()['limit_hits_total{limit="turn",mode="enforced"}'] == len(refused) + 1
    crowd[0].say(type="message", room="r", id="again")
    assert crowd[1].take()[-1]["id"] == "again"


def pings(count: int) -> bytes:
    return b"".join(frame_of(type="ping", id=str(number)) for number in range(count))


async def test_what_a_turn_has_no_time_for_waits_and_a_couple_is_served_between() -> None:
    host = Host()
    flooders = [host.connect() for _ in range(10)]
    couple = [host.join(name, room="couple") for name in "ab"]
    couple[0].take_bytes()
    for client in flooders:
        client.feed_only(pings(3000))
    answered = [len(client.take()) for client in flooders]
    assert 3000 < sum(answered) < 20_000, "a turn of 25 ms handles so many"
    assert flooders[-1].transport.is_paused
    assert not couple[0].transport.is_paused
    couple[0].feed_only(frame_of(type="message", room="couple"))
    turns = 0
    while not (received := couple[1].take()):
        host.soon.popleft()()
        turns += 1
    assert turns <= 2
    assert [message["type"] for message in received] == ["message"]
    assert sum(answered) < 29_000, "the others wait yet"
    host.run()
    for client, count in zip(flooders, answered, strict=True):
        assert [message["id"] for message in client.take()] == [str(number) for number in range(count, 3000)]
        assert not client.transport.is_paused


async def test_close_behind_what_waits_comes_after_it_and_nothing_comes_after_the_close() -> None:
    host = Host()
    flooder, closer = host.connect(), host.join("closer")
    witness = host.join("witness")
    closer.take_bytes()
    flooder.feed_only(pings(15_000))
    said = frame_of(type="message", room="r", id="last words")
    closer.feed_only(said + frame(CLOSE, (1000).to_bytes(2, "big")) + said + frame(PING))
    host.run()
    assert closer.take_frames() == [(CLOSE, (1000).to_bytes(2, "big"))]
    heard_last = witness.take()
    assert [message["type"] for message in heard_last] == ["message", "peer-left"]
    assert heard_last[1]["payload"]["reason"] == "left"


async def test_one_that_is_lost_while_it_waits_is_forgotten() -> None:
    host = Host()
    flooder, gone, witness = host.connect(), host.join("gone"), host.join("witness")
    flooder.feed_only(pings(15_000))
    gone.feed_only(frame_of(type="message", room="r"))
    gone.transport.protocol.connection_lost(None)
    host.run()
    assert [message["type"] for message in witness.take()] == ["peer-left"]


async def test_floods_that_are_answered_by_nothing_are_read_a_turn_at_a_time() -> None:
    host = Host()
    client = host.connect()
    client.feed_only(frame(PONG) * 700_000)
    assert client.transport.is_paused
    host.run()
    assert not client.transport.is_paused


async def test_flood_that_is_postponed_is_insisting_all_the_same() -> None:
    host = Host(messages_per_s=10, message_burst=20)
    busy, flooder = host.connect(), host.join("flooder")
    with_no_limit = dict.fromkeys(("messages_per_s", "message_burst", "bytes_per_s", "fanout_bytes_per_s"), 0)
    next(one for one in host.relay.all_connections() if one.peer is None).allow(with_no_limit)
    busy.feed_only(pings(15_000))
    flooder.feed_only(pings(200))
    host.run()
    assert closed_with(flooder) == 4005


async def test_rosters_weigh_what_they_cost() -> None:
    """Joining a crowd takes longer than joining nobody: a turn does fewer of them."""
    handled = {}
    for size in (0, 200):
        host = Host()
        for number in range(size):
            host.join(f"p{number}")
        storm = host.connect()
        storm.feed_only((frame_of(type="join", room="r") + frame_of(type="leave", room="r")) * 5000)
        handled[size] = host.counted()["received_messages_total"] - size
        host.run()
        assert host.counted()["received_messages_total"] == 10_000 + size
    assert 0 < handled[200] < handled[0] / 5
    assert handled[0] < 5000


async def test_message_that_waited_for_a_decision_waits_for_its_turn() -> None:
    cluster = Cluster(2)
    home, room = cluster[0], cluster.room(1)
    peer = home.connect()
    peer.feed_only(frame_of(type="join", room=room, sender="a") + pings(15_000))
    cluster.run(3)
    cluster.run()
    ids = [message.get("id") for message in peer.take() if message["type"] == "pong"]
    assert ids == [str(number) for number in range(15_000)]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2000)), max_size=30),
    st.integers(1, 50),
    st.integers(1, 200),
)
@settings(max_examples=50, deadline=None)
async def test_nobody_gets_more_than_burst_and_rate(steps: list[tuple[int, int]], rate: int, burst: int) -> None:
    host = host_with(messages_per_s=rate, message_burst=burst)
    a, b = pair(host)
    began, passed = host.now, 1  # its join
    for count, wait_ms in steps:
        for _ in range(count):
            a.say(type="message", **HELD)
        passed += len(b.take())
        if closed_with(a) is not None:
            break
        host.advance(wait_ms / 1000)
        assert passed <= burst + rate * (host.now - began) + 1
