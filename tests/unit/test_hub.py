"""What each rare message does, over peers in memory."""

import json
import math
from typing import Any

import pytest

from fastsig import metrics
from fastsig._relay import Connection
from fastsig.config import Limits
from fastsig.errors import CloseCode
from fastsig.hub import Hub
from fastsig.routing import Address, Place

from .memory import CLOSE, PING, PONG, Client, Cluster, Host, frame

META_1K = "x" * 1022  # 1024 bytes of JSON with its quotes


@pytest.fixture
async def host() -> Host:
    return Host()


# ---- join, leave, presence


async def test_session_of_the_protocol_page(host: Host) -> None:
    one, two = host.connect(), host.connect()
    one.say('{"type":"join","room":"test-room","sender":"client1"}')
    (joined,) = one.take()
    n = joined["payload"].pop("n")
    assert joined == {"type": "joined", "room": "test-room", "sender": "client1", "payload": {"peers": []}}
    two.say('{"type":"join","room":"test-room","sender":"client2"}')
    (joined,) = two.take()
    assert joined["payload"]["peers"] == [{"sender": "client1", "n": n, "meta": None}]
    assert joined["payload"]["n"] > n
    assert one.take() == [{
        "type": "peer-joined", "room": "test-room", "sender": "client2",
        "payload": {"n": joined["payload"]["n"], "meta": None},
    }]  # fmt: skip


async def test_roster_is_in_the_order_of_joining_and_ordinals_hold_the_generation(host: Host) -> None:
    for name in "abcd":
        host.join(name)
    room = host.relay.find_room("r")
    assert room is not None
    b = room.find("b")
    assert b is not None
    b.connection.lost()
    e = host.connect()
    e.say(type="join", room="r", sender="e")
    (joined,) = e.take()
    ordinals = [peer["n"] for peer in joined["payload"]["peers"]]
    assert [peer["sender"] for peer in joined["payload"]["peers"]] == ["a", "c", "d"]
    assert ordinals == sorted(ordinals)
    assert all(1 << 32 < n < 1 << 33 for n in [*ordinals, joined["payload"]["n"]])


async def test_metadata_travels_as_the_same_bytes(host: Host) -> None:
    a = host.join("a")
    b = host.connect()
    b.say('{"type":"join","room":"r","sender":"b","payload":{"meta": {"x": 1e999, "y" :[ ]} ,"other":1}}')
    assert b'"meta":{"x": 1e999, "y" :[ ]}}' in a.take_bytes()
    b.take()
    c = host.connect()
    c.say(type="join", room="r", sender="c")
    assert b'"meta":{"x": 1e999, "y" :[ ]}}' in c.take_bytes()


async def test_trace_of_the_join_reaches_the_others(host: Host) -> None:
    a = host.join("a")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    host.join("b", trace=trace)
    assert a.take()[0]["payload"]["trace"] == trace


async def test_request_id_comes_back_in_the_reply(host: Host) -> None:
    a = host.connect()
    for kind, reply in [
        ("hello", "welcome"),
        ("join", "joined"),
        ("ping", "pong"),
        ("leave", "left"),
        ("leave", "error"),
    ]:
        a.say(type=kind, room="r", id=f"q-{kind}")
        (message,) = a.take()
        assert (message["type"], message["id"]) == (reply, f"q-{kind}")


async def test_leaving_is_answered_and_told(host: Host) -> None:
    a, b = host.join("a"), host.join("b")
    (news,) = a.take()
    b.say(type="leave", room="r")
    assert b.take() == [{"type": "left", "room": "r", "payload": {"reason": "left"}}]
    payload = {"n": news["payload"]["n"], "reason": "left"}
    assert a.take() == [{"type": "peer-left", "room": "r", "sender": "b", "payload": payload}]
    b.say(type="leave", room="r")
    assert b.take_error() == "not_joined"


async def test_lost_peer_leaves_all_its_rooms_and_empty_rooms_are_gone(host: Host) -> None:
    a = host.join("a", room="one")
    b = host.join("b", room="one")
    b.say(type="join", room="two")
    b.take()
    a.take()
    assert host.relay.room_count == 2
    b.vanish()
    assert a.take()[0]["payload"]["reason"] == "lost"
    assert host.relay.room_count == 1


async def test_update_reaches_the_others_and_later_rosters(host: Host) -> None:
    a, b = host.join("a"), host.join("b", meta={"v": 1})
    a.take()
    b.say(type="update", room="r", payload={"meta": {"v": 2}})
    (news,) = a.take()
    assert (news["type"], news["sender"], news["payload"]["meta"]) == ("peer-updated", "b", {"v": 2})
    assert b.take() == []
    c = host.connect()
    c.say(type="join", room="r", sender="c")
    assert c.take()[0]["payload"]["peers"][1]["meta"] == {"v": 2}


async def test_ping_returns_payload_and_id(host: Host) -> None:
    a = host.connect()
    a.say('{"type":"ping","payload":{"t": 1.0},"id":"7"}')
    assert a.take_bytes()[2:] == b'{"type":"pong","payload":{"t": 1.0},"id":"7"}'
    a.say(type="ping", payload="x" * 123)
    assert a.take()[0]["type"] == "pong"
    a.say(type="ping", payload="x" * 124)
    assert a.take_error() == "too_large"


# ---- identity


async def test_peer_without_a_sender_gets_an_id_from_the_server(host: Host) -> None:
    a = host.connect()
    a.say(type="join", room="r")
    assert a.take()[0]["sender"] == "made-1"
    a.say(type="join", room="s", sender="other")
    assert a.take_error() == "identity_mismatch"
    a.say(type="join", room="s", sender="made-1")
    assert a.take()[0]["type"] == "joined"


async def test_made_ids_are_128_random_bits(host: Host) -> None:
    hub = Hub(host.relay, host.limits)
    made = {hub.admission.peer(Connection(host.relay), None, None) for _ in range(100)}
    assert len(made) == 100
    assert all(len(peer) == 22 and peer.isascii() and peer.isprintable() for peer in made)


async def test_hello_fixes_the_identity_and_comes_once_and_first() -> None:
    host = Host(messages_per_s=50, message_burst=200)
    a = host.connect()
    a.say(type="hello", sender="a", payload={"caps": ["ack", "session", "seq", "x"], "client": "test/1"})
    (welcome,) = a.take()
    assert welcome["sender"] == "a"
    assert welcome["payload"]["caps"] == ["ack"]
    assert welcome["payload"]["limits"] == {"message_bytes": 65536, "messages_per_s": 50, "rooms": 16}
    assert welcome["payload"]["server_time"] == 1e9
    a.say(type="hello", sender="a")
    assert a.take_error() == "bad_message"
    a.say(type="join", room="r", sender="b")
    assert a.take_error() == "identity_mismatch"
    joined = host.join("j")
    joined.say(type="hello")
    assert joined.take_error() == "bad_message"


async def test_refused_join_fixes_no_identity(host: Host) -> None:
    host.join("a")
    b = host.connect()
    b.say(type="join", room="r", sender="a")
    assert b.take_error() == "id_taken"
    b.say(type="join", room="r", sender="b")
    assert b.take()[0]["sender"] == "b"


async def test_token_that_nobody_can_check_is_unauthorized(host: Host) -> None:
    a = host.connect()
    a.say(type="hello", payload={"token": "x"})
    assert a.take_error() == "unauthorized"
    a.say(type="join", room="r", payload={"token": "x"})
    assert a.take_error() == "unauthorized"
    assert host.relay.room_count == 0


async def test_taken_id_is_probed_at_most_once_in_thirty_seconds_and_a_dead_holder_is_closed(host: Host) -> None:
    holder, rival = host.join("a"), host.connect()

    def rejected() -> None:
        rival.say(type="join", room="r", sender="a")
        (error,) = rival.take()
        assert (error["code"], error["retry"], error["after_ms"]) == ("id_taken", True, 6000)

    rejected()
    rejected()
    assert holder.take_frames() == [(PING, b"")]
    holder.feed(frame(PONG))
    host.advance(6)
    rejected()
    assert holder.take_frames() == []
    host.advance(25)
    holder.take_bytes()
    rival.take_bytes()
    rejected()
    host.advance(5.5)
    assert holder.take_close() == 4002
    rival.take_bytes()
    rival.say(type="join", room="r", sender="a")
    assert rival.take()[0]["type"] == "joined"


# ---- limits and refusals


async def test_rooms_per_connection_peers_per_room_and_rooms_are_limited() -> None:
    host = Host(rooms_per_connection=2, peers_per_room=2, rooms=3)
    a = host.join("a", room="1")
    a.say(type="join", room="2")
    assert a.take()[0]["type"] == "joined"
    a.say(type="join", room="3")
    assert a.take_error() == "too_many_rooms"
    host.join("b", room="1")
    c = host.connect()
    c.say(type="join", room="1", sender="c")
    assert c.take_error() == "room_full"
    host.join("d", room="3")
    c.say(type="join", room="4", sender="c")
    assert c.take_error() == "limit_exceeded"


async def test_max_peers_counts_only_from_the_one_who_makes_the_room(host: Host) -> None:
    host.join("a", max_peers=2)
    host.join("b", max_peers=9)
    c = host.connect()
    c.say(type="join", room="r", sender="c")
    assert c.take_error() == "room_full"


async def test_joining_twice_is_already_joined(host: Host) -> None:
    a = host.join("a")
    a.say(type="join", room="r")
    assert a.take_error() == "already_joined"


async def test_no_joins_while_draining(host: Host) -> None:
    a = host.connect()
    host.hub.rooms.is_draining = True
    a.say(type="join", room="r")
    (error,) = a.take()
    assert (error["code"], error["retry"]) == ("draining", True)


async def test_close_of_a_drain_is_told_to_those_who_stay(host: Host) -> None:
    one, two = host.join("a"), host.join("b")
    one.take()
    host.hub.rooms.is_draining = True
    room = host.relay.find_room("r")
    assert room is not None
    b = room.find("b")
    assert b is not None
    b.connection.send_close(CloseCode.DRAIN)
    host.run()
    assert two.take_close() == 4000
    (left,) = one.take()
    assert (left["type"], left["sender"], left["payload"]["reason"]) == ("peer-left", "b", "closed")


async def test_end_of_all_is_told_to_nobody(host: Host) -> None:
    clients = [host.join("a"), host.join("b")]
    for client in clients:
        client.take()
    host.hub.rooms.is_draining = host.hub.rooms.is_ending = True
    for connection in host.relay.all_connections():
        connection.send_close(CloseCode.GOING_AWAY)
    host.run()
    assert [len(frames := client.take_frames()) and frames[0][0] for client in clients] == [CLOSE, CLOSE]


REFUSED = {
    "not JSON": ("{", "bad_json"),
    "two values": ("{}{}", "bad_json"),
    "a list": ("[]", "bad_message"),
    "no type": ("{}", "bad_message"),
    "type twice": ('{"type":"ping","type":"ping"}', "bad_message"),
    "type of the server": ('{"type":"joined"}', "unknown_type"),
    "type of a later issue": ('{"type":"resume","payload":{}}', "unknown_type"),
    "join without a room": ('{"type":"join"}', "bad_message"),
    "join with a list as payload": ('{"type":"join","room":"r","payload":[]}', "bad_message"),
    "join with a bad trace": ('{"type":"join","room":"r","payload":{"trace":"x"}}', "bad_message"),
    "join with no places": ('{"type":"join","room":"r","payload":{"max_peers":0}}', "bad_message"),
    "join with long metadata": (
        json.dumps({"type": "join", "room": "r", "payload": {"meta": META_1K + "x"}}),
        "too_large",
    ),
    "room too long": (json.dumps({"type": "join", "room": "r" * 129}), "too_large"),
    "empty room": ('{"type":"join","room":""}', "bad_message"),
    "control character in a room": ('{"type":"join","room":"a\\u0085b"}', "bad_message"),
    "leave without joining": ('{"type":"leave","room":"r"}', "not_joined"),
    "update without joining": ('{"type":"update","room":"r","payload":{"meta":1}}', "not_joined"),
    "caps of the wrong type": ('{"type":"hello","payload":{"caps":"ack"}}', "bad_message"),
    "long client name": (json.dumps({"type": "hello", "payload": {"client": "x" * 65}}), "too_large"),
    "33 recipients": (
        json.dumps({"type": "offer", "room": "r", "recipient": [str(i) for i in range(33)]}),
        "too_large",
    ),
    "no recipients": ('{"type":"offer","room":"r","recipient":[]}', "bad_message"),
    "a recipient twice": ('{"type":"offer","room":"r","recipient":["a","\\u0061"]}', "bad_message"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_refused_message_gets_one_error_and_has_no_effect(host: Host, what: str) -> None:
    text, code = REFUSED[what]
    a = host.connect()
    a.say(text)
    assert a.take_error() == code
    assert host.relay.room_count == 0
    a.say(type="join", room="r", sender="a")
    assert a.take()[0]["sender"] == "a", "the connection goes on, without an identity from the refused message"


async def test_update_without_metadata_is_bad_and_null_is_a_value(host: Host) -> None:
    a, b = host.join("a"), host.join("b", meta=1)
    a.take()
    b.say(type="update", room="r", payload={})
    assert b.take_error() == "bad_message"
    b.say(type="update", room="r", payload={"meta": None})
    assert a.take()[0]["payload"]["meta"] is None


async def test_metadata_of_exactly_the_limit_passes(host: Host) -> None:
    host.join("a", meta=META_1K)


async def test_error_echoes_only_what_was_valid(host: Host) -> None:
    a = host.connect()
    a.say('{"type":7,"room":"r","id":"q"}')
    (error,) = a.take()
    assert (error["code"], error["retry"], error["room"], error["id"]) == ("bad_message", False, "r", "q")
    a.say('{"type":"join","room":7,"id":""}')
    (error,) = a.take()
    assert "room" not in error
    assert "id" not in error


async def test_more_than_twenty_counted_errors_in_five_seconds_close_4509(host: Host) -> None:
    a, b = host.join("a"), host.join("b")
    a.take()

    def insist(times: int, text: str) -> None:
        for _ in range(times):
            b.say(text)

    insist(100, '{"type":"leave","room":"elsewhere"}')  # never counted
    insist(20, "nonsense")
    host.advance(5.5)
    insist(20, "nonsense")
    assert all(opcode == 1 for opcode, _ in b.take_frames())
    insist(1, "nonsense")
    assert b.take_close() == 4509
    assert [m["type"] for m in a.take()] == ["peer-left"]


async def test_every_client_message_of_this_version_is_handled(host: Host) -> None:
    """The list of PROTOCOL §3.1 less what its issues bring later."""
    client: Client = host.join("a")
    relayed = ("offer", "answer", "ice-candidate", "message", "x-y")
    for kind in ("hello", "join", "leave", *relayed, "update", "ping", "report"):
        client.say(type=kind, room="r")
        assert all(message.get("code") != "unknown_type" for message in client.take()), kind


# ---- reports


def _reported(host: Host) -> dict[str, int]:
    """What is counted of reports, by series."""
    return {name: count for name, count in host.counted().items() if name.startswith("peer_connection") and "{" in name}


def _setups(host: Host) -> dict[float, int]:
    """How many reported that it took them up to so many seconds."""
    bounds = (*metrics.histogram("peer_connection_setup_seconds").bounds, math.inf)
    return {bound: n for bound, n in zip(bounds, host.observed("peer_connection_setup_seconds"), strict=True) if n}


async def test_report_of_a_connection_counts_and_is_neither_answered_nor_relayed(host: Host) -> None:
    a, b = host.join("a"), host.join("b")
    a.take()
    payload = {"outcome": "connected", "ms": 740, "local": "srflx", "remote": "relay", "protocol": "udp", "other": []}
    a.say(type="report", room="r", sender="a", recipient="b", payload=payload, id="q")
    assert (a.take(), b.take()) == ([], [])
    assert _reported(host) == {
        'peer_connection_reports_total{outcome="connected"}': 1,
        'peer_connection_paths_total{local="srflx",remote="relay",protocol="udp"}': 1,
    }
    assert _setups(host) == {0.75: 1}


@pytest.mark.parametrize("outcome", ["failed", "disconnected", "closed"])
async def test_only_a_connection_has_a_path_and_a_time(host: Host, outcome: str) -> None:
    a = host.join("a")
    a.say(type="report", room="r", recipient="b", payload={"outcome": outcome, "ms": 9, "local": "host"})
    assert a.take() == []
    assert (_reported(host), _setups(host)) == ({f'peer_connection_reports_total{{outcome="{outcome}"}}': 1}, {})


@pytest.mark.parametrize("rest", [{}, {"ms": None, "local": None, "remote": None, "protocol": None}])
async def test_what_a_report_does_not_say_is_unknown(host: Host, rest: dict[str, None]) -> None:
    a = host.join("a")
    a.say(type="report", room="r", recipient=["gone"], payload={"outcome": "connected"} | rest)
    assert a.take() == []
    assert _reported(host) == {
        'peer_connection_reports_total{outcome="connected"}': 1,
        'peer_connection_paths_total{local="unknown",remote="unknown",protocol="unknown"}': 1,
    }
    assert _setups(host) == {}


@pytest.mark.parametrize(("ms", "seconds"), [(0, 0.05), (50.0, 0.05), (50.5, 0.1), (3_600_000, math.inf)])
async def test_milliseconds_of_a_report_may_have_a_fraction_and_be_an_hour(
    host: Host, ms: float, seconds: float
) -> None:
    a = host.join("a")
    a.say(type="report", room="r", recipient="b", payload={"outcome": "connected", "ms": ms})
    assert (a.take(), _setups(host)) == ([], {seconds: 1})


BAD_REPORTS: dict[str, Any] = {
    "no payload": None, "a list": [], "no outcome": {"ms": 1}, "another outcome": {"outcome": "fine"},
    "a negative time": {"outcome": "connected", "ms": -1}, "more than an hour": {"outcome": "connected", "ms": 3600001},
    "a time in words": {"outcome": "connected", "ms": "1"}, "a time that is true": {"outcome": "connected", "ms": True},
    "another candidate": {"outcome": "connected", "local": "unknown"},
    "another protocol": {"outcome": "failed", "protocol": "tls"},
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_REPORTS)
async def test_report_that_says_anything_else_is_bad_and_counts_nothing(host: Host, what: str) -> None:
    a = host.join("a")
    a.say(type="report", room="r", recipient="b", payload=BAD_REPORTS[what], id="q")
    (error,) = a.take()
    assert (error["code"], error["room"], error["id"]) == ("bad_message", "r", "q")
    assert (_reported(host), _setups(host)) == ({}, {})


async def test_report_needs_a_room_of_the_senders_and_one_recipient_that_it_is_not(host: Host) -> None:
    a = host.join("a")
    failed = {"outcome": "failed"}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"recipient": "b"}, "bad_message"),
        ({"recipient": "b", "room": "elsewhere"}, "not_joined"),
        ({"room": "r"}, "bad_message"),
        ({"room": "r", "recipient": ["b", "c"]}, "bad_message"),
        ({"room": "r", "recipient": "b", "sender": "c"}, "identity_mismatch"),
    ]
    for fields, code in refused:
        a.say(type="report", payload=failed, **fields)
        assert a.take_error() == code, fields
    a.say(type="report", room="r", recipient="a", payload=failed)
    (error,) = a.take()
    assert (error["code"], error["recipients"]) == ("peer_unavailable", ["a"])
    assert _reported(host) == {}


async def test_report_of_a_room_that_another_worker_owns_counts_where_it_was_made() -> None:
    cluster = Cluster(2)
    room = cluster.room(owner=0)
    a = cluster[1].connect()
    a.say(type="join", room=room, sender="a")
    cluster.run()
    a.take()
    a.say(type="report", room=room, recipient="b", payload={"outcome": "failed"})
    cluster.run()
    assert a.take() == []
    assert [len(_reported(cluster[slot])) for slot in (0, 1)] == [0, 1]


async def test_same_report_of_the_same_peer_counts_once_in_30_s(host: Host) -> None:
    a = host.join("a")
    a.say(type="join", room="other")
    a.take()

    def say(outcome: str, room: str = "r", recipient: str = "b") -> None:
        a.say(type="report", room=room, recipient=recipient, payload={"outcome": outcome, "ms": 1})

    for _ in range(3):
        say("failed")
        say("connected")
    assert host.counted()["peer_connection_reports_total"] == 2
    assert host.counted()["peer_connection_paths_total"] == sum(_setups(host).values()) == 1
    say("failed", recipient="c")
    say("failed", room="other")
    host.advance(29.5)
    say("failed")
    assert host.counted()["peer_connection_reports_total"] == 4
    host.advance(0.5)
    say("failed")
    assert host.counted()["peer_connection_reports_total"] == 5
    assert a.take_frames() == [(9, b"")], "a ping, and no answer"


async def test_what_one_connection_can_report_is_bounded(host: Host) -> None:
    """Reports are believed, so one peer must not look like a thousand."""
    a, b = host.join("a"), host.join("b")
    for number in range(1000):
        a.say(type="report", room="r", recipient=f"nobody-{number}", payload={"outcome": "failed"})
    assert host.counted()["peer_connection_reports_total"] == 64
    (connection,) = (one for one in host.relay.all_connections() if one.peer == "a")
    assert len(connection.context.reports) == 64
    b.say(type="report", room="r", recipient="a", payload={"outcome": "failed"})
    assert host.counted()["peer_connection_reports_total"] == 65
    host.advance(30)
    a.say(type="report", room="r", recipient="b", payload={"outcome": "failed"})
    assert host.counted()["peer_connection_reports_total"] == 66
    assert len(connection.context.reports) == 1


async def test_reports_and_errors_of_a_connection_are_kept_apart(host: Host) -> None:
    a = host.join("a")
    a.take()
    for _ in range(host.limits.errors_per_5s):
        a.say(type="report", room="r", recipient="b", payload={"outcome": "failed"})
        a.say("{")
        assert a.take_error() == "bad_json"
    assert host.counted()["peer_connection_reports_total"] == 1
    a.say("{")
    assert a.take_close() == 4509


# ---- bugs


async def test_bug_is_logged_with_the_connection_that_met_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host(place=Place(Address("", 3), 7))
    host.join("a")
    b = host.join("b")
    b.take()
    monkeypatch.setitem(host.hub._handlers, "ping", lambda connection, message: 1 / 0)
    b.say(type="ping", payload="a secret")
    assert b.take_close() == 1011
    said = capsys.readouterr().err
    assert "internal_error connection=3.7.2 peer=b" in said and "ZeroDivisionError" in said
    assert "a secret" not in said
    assert host.counted()["internal_errors_total"] == 1
    assert "errors_total" not in host.counted(), "nothing was answered with an error"


async def test_bug_of_nobody_counts_too(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        host.hub.report_bug(None)
    assert "internal_error" in capsys.readouterr().err
    assert host.counted()["internal_errors_total"] == 1


# ---- other limits while it runs


async def test_new_limits_hold_for_those_who_are_there(host: Host) -> None:
    one = host.join("a")
    host.hub.configure(Limits(peers_per_room=1, rooms_per_connection=1, meta_bytes=8))
    two = host.connect()
    two.say(type="join", room="r", sender="b")
    assert two.take_error() == "room_full"
    one.say(type="join", room="other")
    assert one.take_error() == "too_many_rooms"
    one.say(type="update", room="r", payload={"meta": "x" * 7})
    assert one.take_error() == "too_large"
    one.say(type="leave", room="r")
    assert one.take()[0]["type"] == "left"


@pytest.mark.parametrize(("before", "now"), [(2, 4), (4, 2), (0, 3), (3, 0)])
async def test_new_limit_of_errors_counts_those_that_were_made(before: int, now: int) -> None:
    host = Host(errors_per_5s=before)
    client = host.connect()
    made = 0
    while made < min(before or 2, now or 2):
        client.say("{")
        client.take_error()
        made += 1
    host.hub.configure(Limits(errors_per_5s=now))
    while made < (now or 50):
        client.say("{")
        client.take_error()
        made += 1
    client.say("{")
    if now and before:
        assert client.take_close() == 4509
    elif not now:
        assert client.take_error() == "bad_json"


async def test_relay_takes_new_limits(host: Host) -> None:
    early = host.connect()
    host.relay.configure(message_bytes=1024, output_bytes=1 << 20, handshake_s=1.0, first_message_s=2.0)
    late, mute = host.connect(), host.accept()
    host.advance(1.5)
    assert mute.is_gone() and not late.is_shut()
    host.advance(1.0)
    assert late.take_close() == 4007
    early.feed(frame(1, "x" * 600, fin=False) + frame(0, "x" * 600))
    assert early.take_close() == 1009
