"""Rooms whose members are connected to several workers: the order and the promises of PROTOCOL §3 hold all the same."""

import json
from typing import Any

import pytest

from fastsig.errors import CloseCode

from .memory import CLOSE, TEXT, Client, Cluster, frame


@pytest.fixture
async def cluster() -> Cluster:
    return Cluster(3)


def say(cluster: Cluster, client: Client, **message: Any) -> None:
    client.feed_only(frame(TEXT, json.dumps(message)))
    cluster.run()


def join(cluster: Cluster, slot: int, peer: str, room: str, **payload: Any) -> Client:
    """A peer that is connected to the worker of `slot`; its `joined` is taken."""
    client = cluster[slot].connect()
    say(cluster, client, type="join", room=room, sender=peer, payload=payload)
    (joined,) = client.take()
    assert joined["type"] == "joined", joined
    return client


def types(client: Client) -> list[str]:
    return [message["type"] for message in client.take()]


def counted(cluster: Cluster, name: str) -> int:
    return sum(host.counted().get(name, 0) for host in cluster.hosts if host is not None)


def step_until(cluster: Cluster, holds: Any) -> None:
    for _ in range(100_000):
        if holds():
            return
        cluster.run(1)
    raise AssertionError("it never came to that")


# ---- join, roster, presence


async def test_roster_is_one_wherever_the_members_are(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a = join(cluster, 0, "a", room, meta={"x": 1})
    b = join(cluster, 1, "b", room)
    c = cluster[2].connect()
    say(cluster, c, type="join", room=room, sender="c", id="q")
    (joined,) = c.take()
    assert [(peer["sender"], peer["meta"]) for peer in joined["payload"]["peers"]] == [("a", {"x": 1}), ("b", None)]
    assert (joined["id"], joined["sender"], joined["room"]) == ("q", "c", room)
    news = [message for message in a.take() if message["type"] == "peer-joined"]
    assert [message["sender"] for message in news] == ["b", "c"]
    assert news[0]["payload"]["n"] < news[1]["payload"]["n"] == joined["payload"]["n"]
    assert types(b) == ["peer-joined"]


async def test_members_are_counted_at_home_and_rooms_at_their_owner(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    clients = [join(cluster, slot, f"p{slot}", room) for slot in (0, 1, 2)]
    assert [host.counted().get("members") for host in cluster.hosts if host] == [1, 1, 1]
    assert [host.counted().get("remote_members", 0) for host in cluster.hosts if host] == [1, 0, 1]
    assert [host.counted().get("rooms", 0) for host in cluster.hosts if host] == [0, 1, 0]
    for client in clients:
        client.vanish()
    cluster.run()
    for name in ("members", "remote_members", "rooms", "connections"):
        assert counted(cluster, name) == 0
    assert cluster[0].hub.neighbour(cluster[1].place.address).rooms_here == []
    assert cluster[1].hub.neighbour(cluster[0].place.address).guests_here == []


@pytest.mark.parametrize("reason", ["left", "lost", "closed"])
async def test_others_hear_why_a_guest_left(cluster: Cluster, reason: str) -> None:
    room = cluster.room(owner=1)
    a, b, c = (join(cluster, slot, name, room) for slot, name in ((0, "a"), (1, "b"), (2, "c")))
    b.take()
    if reason == "left":
        say(cluster, a, type="leave", room=room, id="x")
        assert a.take()[-1] == {"type": "left", "room": room, "payload": {"reason": "left"}, "id": "x"}
    elif reason == "lost":
        a.vanish()
    else:
        cluster[0].relay.all_connections()[0].send_close(CloseCode.DRAIN)
    cluster.run()
    for other in (b, c):
        (left,) = other.take()
        assert (left["type"], left["sender"], left["payload"]["reason"]) == ("peer-left", "a", reason)


async def test_update_of_a_guest_reaches_all_and_the_next_roster(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a, b = join(cluster, 0, "a", room), join(cluster, 1, "b", room)
    a.take()
    say(cluster, a, type="update", room=room, payload={"meta": [1e0]})
    (news,) = b.take()
    assert (news["type"], news["sender"], news["payload"]["meta"]) == ("peer-updated", "a", [1.0])
    assert a.take() == []
    c = cluster[2].connect()
    say(cluster, c, type="join", room=room, sender="c")
    assert c.take()[0]["payload"]["peers"][0]["meta"] == [1.0]


@pytest.mark.parametrize(("limit", "code"), [({"peers_per_room": 2}, "room_full"), ({"rooms": 1}, "limit_exceeded")])
async def test_limits_are_those_of_the_owner(limit: dict[str, int], code: str) -> None:
    cluster = Cluster(2, **limit)
    room = cluster.room(owner=1)
    join(cluster, 0, "a", room)
    if code == "room_full":
        join(cluster, 1, "b", room)
    c = cluster[0].connect()
    say(cluster, c, type="join", room=room if code == "room_full" else cluster.room(1, 1), sender="c", id="i")
    (error,) = c.take()
    assert (error["code"], error["id"]) == (code, "i")
    say(cluster, c, type="join", room=cluster.room(owner=0), sender="other name")  # nothing was fixed by the refusal
    assert types(c) == ["joined"]


async def test_max_peers_counts_from_the_one_who_makes_the_room(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    join(cluster, 0, "a", room, max_peers=2)
    join(cluster, 2, "b", room, max_peers=9)
    c = cluster[1].connect()
    say(cluster, c, type="join", room=room, sender="c")
    assert c.take_error() == "room_full"


async def test_taken_name_is_refused_and_its_holder_is_pinged_where_it_is(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a = join(cluster, 0, "a", room)
    a.take()
    thief = cluster[2].connect()
    say(cluster, thief, type="join", room=room, sender="a")
    (error,) = thief.take()
    assert (error["code"], error["after_ms"], error["retry"]) == ("id_taken", 6000, True)
    assert [opcode for opcode, _ in a.take_frames()] == [9]
    cluster.advance(6)
    assert a.take_close() == CloseCode.NO_PONG
    say(cluster, thief, type="join", room=room, sender="a")
    assert types(thief) == ["joined"]


# ---- relay


async def test_message_goes_to_each_recipient_and_is_written_by_the_owner(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    members = {name: join(cluster, slot, name, room) for slot, name in enumerate("abc")}
    for client in members.values():
        client.take()
    for sender, client in members.items():
        others = [name for name in members if name != sender]
        names = json.dumps({"room": room, "recipient": others})[1:-1]
        client.feed_only(frame(TEXT, '{"type":"offer",' + names + ',"payload":{"x": 1e999 },"id":"i\\u0041"}'))
        cluster.run()
        assert client.take() == []
        for name in others:
            ((_, text),) = members[name].take_frames()
            assert (
                text
                == (
                    f'{{"type":"offer","room":"{room}","sender":"{sender}","recipient":"{name}",'
                    '"payload":{"x": 1e999 },"id":"iA"}'
                ).encode()
            )


async def test_broadcast_goes_to_all_but_its_sender_one_frame_per_worker(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    members = [join(cluster, index % 3, f"p{index}", room) for index in range(9)]
    for client in members:
        client.take()
    before = counted(cluster, "bus_sent_bytes_total")
    payload = "x" * 1000
    say(cluster, members[0], type="message", room=room, payload=payload)
    assert counted(cluster, "bus_sent_bytes_total") - before < 3 * (1000 + 150)  # to the owner, to both homes
    assert members[0].take() == []
    for client in members[1:]:
        (message,) = client.take()
        assert (message["sender"], message["payload"]) == ("p0", payload)
    assert counted(cluster, 'sent_messages_total{type="message"}') == 8


async def test_what_crosses_counts_where_it_comes_out(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a, b = join(cluster, 0, "a", room), join(cluster, 2, "b", room)
    a.take()
    say(cluster, a, type="offer", room=room, recipient=["b", "x"], payload="x" * 100)
    (offer,) = b.take_frames()
    assert counted(cluster, 'sent_messages_total{type="offer"}') == 1
    assert counted(cluster, 'sent_message_bytes_total{type="offer"}') == len(offer[1])
    assert counted(cluster, 'sent_messages_total{type="error"}') == len(a.take_frames()) == 1


async def test_absent_recipients_are_named_to_a_guest(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a, b = join(cluster, 0, "a", room), join(cluster, 2, "b", room)
    a.take()
    say(cluster, a, type="offer", room=room, recipient=["x", "b", "a"], id="i")
    (error,) = a.take()
    assert (error["code"], error["recipients"], error["id"], error["room"]) == (
        "peer_unavailable",
        ["x", "a"],
        "i",
        room,
    )
    assert types(b) == ["offer"]


@pytest.mark.parametrize("recipient", [None, "b", ["b", "c", "x"]])
@pytest.mark.parametrize("home", [0, 1])
async def test_ack_counts_what_was_delivered_anywhere(cluster: Cluster, home: int, recipient: Any) -> None:
    room = cluster.room(owner=1)
    a = cluster[home].connect()
    a.say(type="hello", sender="a", payload={"caps": ["ack"]})
    say(cluster, a, type="join", room=room)
    for slot, name in ((0, "b"), (2, "c"), (1, "d")):
        join(cluster, slot, name, room)
    a.take()
    say(cluster, a, type="offer", room=room, recipient=recipient, id='"')
    acks = [message for message in a.take() if message["type"] == "ack"]
    delivered = {None: 3, "b": 1}.get(recipient if not isinstance(recipient, list) else "", 2)
    assert acks == [{"type": "ack", "payload": {"delivered": delivered, "queued": 0}, "id": '"'}]


async def test_home_that_is_silent_counts_nothing_and_the_ack_goes_out_after_two_seconds(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a = cluster[1].connect()
    a.say(type="hello", sender="a", payload={"caps": ["ack"]})
    say(cluster, a, type="join", room=room)
    join(cluster, 0, "b", room)
    join(cluster, 2, "c", room)
    a.take()
    a.feed_only(frame(TEXT, json.dumps({"type": "offer", "room": room, "id": "1"})))
    cluster[0].soon, kept = type(cluster[0].soon)(), cluster[0].soon  # its worker is stopped
    silent, cluster.hosts[0] = cluster.hosts[0], None
    cluster.advance(1.5)
    assert a.take() == []
    cluster.advance(1)
    assert a.take() == [{"type": "ack", "payload": {"delivered": 1, "queued": 0}, "id": "1"}]
    cluster.hosts[0] = silent
    cluster[0].soon.extend(kept)
    cluster.run()
    assert a.take() == []


async def test_home_that_is_lost_counts_nothing_and_the_ack_goes_out(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a = cluster[1].connect()
    a.say(type="hello", sender="a", payload={"caps": ["ack"]})
    say(cluster, a, type="join", room=room)
    join(cluster, 0, "b", room)
    a.take()
    a.feed_only(frame(TEXT, json.dumps({"type": "offer", "room": room, "id": "1"})))
    cluster.kill(0)
    cluster.run()
    acks = [message["payload"] for message in a.take() if message["type"] == "ack"]
    assert acks == [{"delivered": 0, "queued": 0}]


async def test_message_longer_than_a_packet_arrives_whole_and_in_order() -> None:
    cluster = Cluster(2, message_bytes=1 << 20, capacity=100_000)
    room = cluster.room(owner=1)
    a, b = join(cluster, 0, "a", room), join(cluster, 1, "b", room)
    a.take()
    for sender, receiver in ((a, b), (b, a)):
        for size in (1, 65_400, 65_536, 131_000, 500_000, 2):
            sender.feed_only(frame(TEXT, json.dumps({"type": "message", "room": room, "payload": "x" * size})))
        cluster.run()
        assert [len(message["payload"]) for message in receiver.take()] == [1, 65_400, 65_536, 131_000, 500_000, 2]


async def test_relays_are_refused_while_half_of_the_bound_waits_and_membership_passes() -> None:
    cluster = Cluster(2, message_bytes=1 << 20, capacity=200_000)
    room = cluster.room(owner=1)
    a, b, c = (join(cluster, slot, name, room) for slot, name in ((0, "a"), (1, "b"), (0, "c")))
    for client in (a, b, c):
        client.take()
    stopped, cluster.hosts[0] = cluster[0], None  # its worker reads nothing
    payload = "x" * 1_000_000
    for _ in range(10):
        say(cluster, b, type="message", room=room, payload=payload)
    (error,) = b.take()
    assert (error["code"], error["retry"], sorted(error["recipients"])) == ("backend_unavailable", True, ["a", "c"])
    say(cluster, b, type="offer", room=room, recipient=["a", "x"], id="i")
    assert [(error["code"], error["recipients"]) for error in b.take()] == [
        ("peer_unavailable", ["x"]), ("backend_unavailable", ["a"])]  # fmt: skip
    d = join(cluster, 1, "d", room)
    cluster.hosts[0] = stopped
    cluster.run()
    assert types(a) == types(c) == ["message"] * 9 + ["peer-joined"]
    say(cluster, d, type="offer", room=room, recipient="a")
    assert types(a) == ["offer"]


async def test_link_is_reset_at_its_bound_and_all_members_are_there_again_over_the_next() -> None:
    cluster = Cluster(2)
    room = cluster.room(owner=1)
    a, b = join(cluster, 0, "a", room), join(cluster, 1, "b", room)
    stopped, cluster.hosts[0] = cluster[0], None
    for _ in range(17_000):
        say(cluster, b, type="update", room=room, payload={"meta": "y" * 1000})
    assert counted(cluster, "links_reset_total") == 1
    assert types(b) == ["peer-left"]
    cluster.hosts[0] = stopped
    cluster.run()
    cluster.link(0, 1)
    cluster.run()
    a.take_bytes()
    assert types(b) == ["peer-joined"]
    say(cluster, b, type="offer", room=room, recipient="a")
    say(cluster, a, type="answer", room=room, recipient="b")
    assert (types(a), types(b)) == (["offer"], ["answer"])


# ---- what waits for a decision


async def test_messages_behind_a_join_wait_for_its_decision_and_keep_their_order(cluster: Cluster) -> None:
    rooms = [cluster.room(owner=1), cluster.room(owner=2), cluster.room(owner=0)]
    others = [join(cluster, 0, "b", room) for room in rooms]
    a = cluster[0].connect()
    for room in rooms:
        a.feed_only(frame(TEXT, json.dumps({"type": "join", "room": room, "sender": "a"})))
        a.feed_only(frame(TEXT, json.dumps({"type": "offer", "room": room, "recipient": "b"})))
        a.feed_only(frame(TEXT, json.dumps({"type": "ping", "id": room})))
    cluster.run()
    assert [message["type"] for message in a.take()] == ["joined", "pong"] * 3
    for other in others:
        assert types(other) == ["peer-joined", "offer"]


async def test_refused_join_lets_what_waits_behind_it_go_on(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    join(cluster, 0, "a", room)
    a = cluster[0].connect()
    for message in ({"type": "join", "sender": "a"}, {"type": "offer"}, {"type": "join", "sender": "c"}):
        a.feed_only(frame(TEXT, json.dumps({"room": room} | message)))
    cluster.run()
    messages = a.take()
    assert [message.get("code", message["type"]) for message in messages] == ["id_taken", "not_joined", "joined"]


async def test_waiting_connection_answers_pings_and_is_not_read_above_its_bound(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    stopped, cluster.hosts[1] = cluster[1], None
    a = cluster[0].connect()
    a.feed_only(frame(TEXT, json.dumps({"type": "join", "room": room, "sender": "a"})))
    a.feed(frame(9, b"hm"))
    assert a.take_frames() == [(10, b"hm")]
    for number in range(70):
        assert a.transport.is_paused == (number > 61)  # a message has 45 bytes more, and 8 before it
        say(cluster, a, type="message", room=room, payload="x" * 1000)
    assert a.take() == []
    cluster.hosts[1] = stopped
    cluster.run()
    assert not a.transport.is_paused
    assert types(a) == ["joined"]
    assert counted(cluster, 'relays_total{route="to_owner"}') == 70


async def test_join_undecided_for_five_seconds_is_refused_and_undone_when_it_comes(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    b = join(cluster, 1, "b", room)
    stopped, cluster.hosts[1] = cluster[1], None
    a = cluster[0].connect()
    a.feed_only(frame(TEXT, json.dumps({"type": "join", "room": room, "sender": "a", "id": "7"})))
    a.feed_only(frame(TEXT, json.dumps({"type": "ping", "id": "8"})))
    cluster.advance(4.5)
    assert a.take() == []
    cluster.advance(1)
    error, pong = a.take()
    assert (error["code"], error["retry"], error["room"], error["id"], pong["id"]) == (
        "backend_unavailable", True, room, "7", "8")  # fmt: skip
    cluster.hosts[1] = stopped
    cluster.run()
    assert [(message["type"], message["payload"].get("reason")) for message in b.take()] == [
        ("peer-joined", None), ("peer-left", "lost")]  # fmt: skip
    assert a.take() == []
    say(cluster, a, type="join", room=room, sender="a")
    assert types(a) == ["joined"]


async def test_withdrawn_join_is_not_decided_when_the_rooms_are_gathered(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    cluster[1].hub.rooms.gather([cluster[2].place.address])  # as a new life does, until it is told that all is there
    a, b = cluster[0].connect(), cluster[0].connect()
    for client, name in ((a, "a"), (b, "b")):
        say(cluster, client, type="join", room=room, sender=name)
        assert client.take() == []
    a.vanish()
    cluster.run()
    c = cluster[1].connect()
    say(cluster, c, type="join", room=room, sender="c")
    assert c.take() == []
    cluster[1].hub.rooms.end_gathering()
    cluster.run()
    assert types(b) == ["joined", "peer-joined"]
    assert [peer["sender"] for peer in c.take()[0]["payload"]["peers"]] == ["b"]


# ---- losses


async def test_loss_of_a_home_is_told_to_the_others(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    _, b, c = (join(cluster, slot, name, room) for slot, name in ((0, "a"), (1, "b"), (2, "c")))
    for client in (b, c):
        client.take()
    cluster.kill(0)
    cluster.run()
    for client in (b, c):
        (left,) = client.take()
        assert (left["type"], left["sender"], left["payload"]["reason"]) == ("peer-left", "a", "lost")
    assert cluster[1].hub.neighbour(cluster[2].place.address).guests_here != []


async def test_while_the_owner_is_away_its_rooms_answer_backend_unavailable(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a, b = join(cluster, 0, "a", room), join(cluster, 0, "b", room)
    a.take()
    cluster.kill(1)
    cluster.run()
    assert a.take() == b.take() == []
    say(cluster, a, type="offer", room=room, recipient=["b"], id="1")
    say(cluster, a, type="update", room=room, payload={"meta": 1}, id="2")
    say(cluster, a, type="message", room=room, id="3")
    errors = a.take()
    assert {error["code"] for error in errors} == {"backend_unavailable"}
    assert [(error["id"], error.get("recipients")) for error in errors] == [("1", ["b"]), ("2", None), ("3", None)]
    c = cluster[0].connect()
    say(cluster, c, type="join", room=room, sender="c")
    assert c.take_error() == "backend_unavailable"
    say(cluster, b, type="leave", room=room)
    assert types(b) == ["left"]


async def test_new_owner_takes_the_members_over_and_all_hear_the_difference(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a, dead, c = (join(cluster, slot, name, room, meta=name) for slot, name in ((0, "a"), (1, "dead"), (2, "c")))
    gone = join(cluster, 2, "gone", room)
    for client in (a, c, gone):
        client.take()
    cluster.kill(1)
    cluster.run()
    say(cluster, gone, type="leave", room=room)
    cluster.start(1)
    cluster.run()
    assert sorted((message["type"], message["sender"]) for message in a.take()) == [
        ("peer-left", "dead"), ("peer-left", "gone")]  # fmt: skip
    assert sorted((message["type"], message["sender"]) for message in c.take()) == [
        ("peer-left", "dead"), ("peer-left", "gone")]  # fmt: skip
    say(cluster, a, type="offer", room=room, recipient=["c", "dead"])
    assert types(c) == ["offer"]
    assert a.take_error() == "peer_unavailable"
    d = cluster[1].connect()
    say(cluster, d, type="join", room=room, sender="d")
    (joined,) = d.take()
    assert [(peer["sender"], peer["meta"]) for peer in joined["payload"]["peers"]] == [("a", "a"), ("c", "c")]
    assert joined["payload"]["n"] > max(peer["n"] for peer in joined["payload"]["peers"])
    del dead


async def test_members_announced_after_the_gathering_are_refused_and_closed_4006(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a, c = join(cluster, 0, "a", room), join(cluster, 2, "c", room)
    a.take()
    stopped, cluster.hosts[0] = cluster[0], None
    cluster.kill(1)
    cluster.hosts[0] = stopped
    owner = cluster.start(1)
    cluster.hosts[0] = None  # it is stopped: what is for it waits
    cluster.run()
    assert owner.hub.rooms.is_gathering
    assert c.take() == []
    owner.hub.rooms.end_gathering()
    cluster.run()
    assert [(message["type"], message["sender"]) for message in c.take()] == [("peer-left", "a")]
    cluster.hosts[0] = stopped
    cluster.run()
    assert a.take_frames()[-1] == (CLOSE, int(CloseCode.STATE_LOST).to_bytes(2, "big"))
    assert c.take() == []
    again = cluster[0].connect()
    say(cluster, again, type="join", room=room, sender="a")
    assert types(again) == ["joined"]


async def test_members_keep_their_place_over_a_reset_of_the_link(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a, b, c = (join(cluster, slot, name, room) for slot, name in ((0, "a"), (1, "b"), (2, "c")))
    for client in (a, b, c):
        client.take()
    cluster.relink(0, 1)
    cluster.run()
    assert a.take() == []
    for client in (b, c):
        assert [(message["type"], message["sender"]) for message in client.take()] == [
            ("peer-left", "a"), ("peer-joined", "a")]  # fmt: skip
    say(cluster, b, type="offer", room=room, recipient="a")
    assert types(a) == ["offer"]


async def test_name_that_was_taken_while_the_link_was_down_stays_with_its_new_holder(cluster: Cluster) -> None:
    room = cluster.room(owner=1)
    a, b = join(cluster, 0, "a", room), join(cluster, 1, "b", room)
    cluster.reset(0, 1)
    cluster.run()
    other = join(cluster, 1, "a", room)
    cluster.link(0, 1)
    cluster.run()
    assert a.take_frames()[-1] == (CLOSE, int(CloseCode.STATE_LOST).to_bytes(2, "big"))
    assert types(b) == ["peer-left", "peer-joined"]
    assert other.take() == []


@pytest.mark.parametrize("packet", [
    b"\0\0", b"\0\0\0\0\0", b"\0\xff\0\0\0\0", b"\0\x01\0\0\0\x63", b"\0\x05\0\0\0\x01abcd", b"\0\x03\0\0\0\0{}",
    b"\0\x15\0\0\0\x01" + b"\xff" * 20, b"\0\x0e\0\0\0\x04" + b"\xff" * 13, b"\0\x02\0\0\0\x05a",
    b"\0\x15\0\0\0\x01" + bytes(10) + b"\x40" + bytes(9),
])  # fmt: skip
async def test_packet_that_is_not_understood_resets_the_link_and_costs_no_more(cluster: Cluster, packet: bytes) -> None:
    room = cluster.room(owner=1)
    a, b = join(cluster, 0, "a", room), join(cluster, 1, "b", room)
    cluster[1].hub.neighbour(cluster[0].place.address).take(packet)
    cluster.run()
    assert counted(cluster, "links_reset_total") == 1
    cluster.link(0, 1)
    cluster.run()
    a.take()
    b.take()
    say(cluster, b, type="offer", room=room, recipient="a")
    assert types(a) == ["offer"]


# ---- what a review found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("what", ["message", "leave"])
async def test_nothing_of_a_newcomer_comes_before_the_roster_of_a_new_link(seed: int, what: str) -> None:
    cluster = Cluster(2, seed=seed, rooms_per_connection=0)
    rooms = [cluster.room(1, number) for number in range(200)]
    a = cluster[0].connect()
    for room in rooms:
        say(cluster, a, type="join", room=room, sender="a", payload={"meta": "x" * 1000})
    a.take_bytes()
    cluster.reset(0, 1)
    cluster.run()
    xs = {room: join(cluster, 1, "x", room) for room in rooms[:20]}
    cluster.link(0, 1)

    def has_a(room: str) -> bool:
        found = cluster[1].relay.find_room(room)
        return found is not None and found.find("a") is not None

    step_until(cluster, lambda: any(has_a(room) for room in xs))
    assert cluster[1].hub.neighbour(cluster[0].place.address).link is not None
    room = next(room for room in xs if has_a(room))
    if what == "leave":
        xs[room].feed_only(frame(TEXT, json.dumps({"type": "leave", "room": room})))
    else:
        xs[room].feed_only(frame(TEXT, json.dumps({"type": "message", "room": room})))
    cluster.run()
    heard = [message["type"] for message in a.take() if message["room"] == room]
    assert heard == (["peer-joined", "message" if what == "message" else "peer-left"]), heard


async def test_members_that_fill_more_than_the_bound_are_announced_over_a_new_link() -> None:
    cluster = Cluster(2, rooms_per_connection=0)
    rooms = [cluster.room(1, number) for number in range(300)]
    clients = [cluster[0].connect() for _ in range(60)]
    for number, client in enumerate(clients):
        for room in rooms:
            message = {"type": "join", "room": room, "sender": f"p{number}", "payload": {"meta": "x" * 1000}}
            client.feed_only(frame(TEXT, json.dumps(message)))
        cluster.run()
        for other in clients:
            other.take_bytes()  # 20 MB
    assert cluster[0].counted()["members"] == 60 * 300
    cluster.relink(0, 1)
    cluster.run()
    assert [host.counted().get("links_reset_total", 0) for host in (cluster[0], cluster[1])] == [0, 0]
    assert cluster[0].hub.neighbour(cluster[1].place.address).is_open


async def test_many_joins_at_once_into_one_room_do_not_reset_the_link() -> None:
    cluster = Cluster(2)
    room = cluster.room(1)
    for number in range(250):
        join(cluster, 1, f"p{number}", room, meta="x" * 1000).take_bytes()
    clients = [cluster[0].connect() for _ in range(80)]
    for number, client in enumerate(clients):
        client.feed_only(frame(TEXT, json.dumps({"type": "join", "room": room, "sender": f"q{number}"})))
    cluster.run()
    resets = [host.counted().get("links_reset_total", 0) for host in (cluster[0], cluster[1])]
    assert [client.take()[0]["type"] for client in clients] == ["joined"] * 80, resets


@pytest.mark.parametrize("home", [1, 0])
async def test_ack_and_error_of_a_message_before_a_leave_arrive(home: int) -> None:
    cluster = Cluster(2)
    room = cluster.room(1)
    a = cluster[home].connect()
    say(cluster, a, type="hello", sender="a", payload={"caps": ["ack"]})
    say(cluster, a, type="join", room=room)
    b = join(cluster, 1, "b", room)
    a.take()
    a.feed_only(frame(TEXT, json.dumps({"type": "offer", "room": room, "recipient": ["b", "x"], "id": "1"})))
    a.feed_only(frame(TEXT, json.dumps({"type": "leave", "room": room, "id": "2"})))
    cluster.run()
    cluster.advance(3)
    assert types(b) == ["offer", "peer-left"]
    assert sorted(types(a)) == ["ack", "error", "left"]


async def test_update_that_is_lost_with_the_owner_is_heard_later() -> None:
    cluster = Cluster(3)
    room = cluster.room(1)
    a, c = join(cluster, 0, "a", room, meta=1), join(cluster, 2, "c", room)
    a.take()
    a.feed_only(frame(TEXT, json.dumps({"type": "update", "room": room, "payload": {"meta": 2}})))
    cluster.kill(1)
    cluster.run()
    cluster.start(1)
    cluster.run()
    assert a.take() == []
    known = [message["payload"]["meta"] for message in c.take() if message["type"] == "peer-updated"]
    d = cluster[2].connect()
    say(cluster, d, type="join", room=room, sender="d")
    roster = {peer["sender"]: peer["meta"] for peer in d.take()[0]["payload"]["peers"]}
    assert (known or [1])[-1] == roster["a"], (known, roster)


async def test_own_name_is_free_after_a_join_that_was_given_up() -> None:
    cluster = Cluster(2)
    room = cluster.room(1)
    stopped, cluster.hosts[1] = cluster[1], None
    a = cluster[0].connect()
    say(cluster, a, type="join", room=room, sender="a")
    cluster.advance(5.5)
    assert a.take_error() == "backend_unavailable"
    say(cluster, a, type="join", room=room, sender="a")
    cluster.hosts[1] = stopped
    cluster.run()
    assert types(a) == ["joined"]


async def test_empty_messages_count_towards_the_waiting_bytes() -> None:
    cluster = Cluster(2)
    room = cluster.room(1)
    stopped, cluster.hosts[1] = cluster[1], None
    a = cluster[0].connect()
    say(cluster, a, type="join", room=room, sender="a")
    for _ in range(300):
        a.feed_only(frame(TEXT, b"") * 1000)
        if a.transport.is_paused:
            break
    cluster.hosts[1] = stopped
    assert a.transport.is_paused


async def test_tiny_messages_that_wait_cost_little_more_than_they_did_on_the_wire() -> None:
    cluster = Cluster(2)
    room = cluster.room(1)
    stopped, cluster.hosts[1] = cluster[1], None
    a = cluster[0].connect()
    say(cluster, a, type="join", room=room, sender="a")
    base = cluster[0].relay.stats()["input_buffer_bytes"]
    sent = frame(TEXT, "{}") * 10_000
    a.feed_only(sent)
    assert cluster[0].relay.stats()["input_buffer_bytes"] - base < 3 * len(sent)
    cluster.hosts[1] = stopped
    cluster.run()
    assert a.take_close() == 4509


async def test_idle_link_takes_what_many_peers_say_in_one_turn() -> None:
    cluster = Cluster(2, capacity=1 << 30)
    room = cluster.room(1)
    peers = [join(cluster, 0, f"p{number}", room) for number in range(200)]
    b = join(cluster, 1, "b", room)
    for peer in (*peers, b):
        peer.take_bytes()
    text = json.dumps({"type": "offer", "room": room, "recipient": "b", "payload": "x" * 60_000})
    for peer in peers:
        peer.feed_only(frame(TEXT, text))
    cluster.run()
    refused = [message["code"] for peer in peers for message in peer.take()]
    assert (refused, len(b.take_bytes()) > 200 * 60_000) == ([], True), len(refused)


async def test_every_name_of_a_congested_home_in_one_error_stays_small() -> None:
    cluster = Cluster(3, capacity=100_000)
    room = cluster.room(1)
    for number in range(500):
        join(cluster, 2, f"{'n' * 100}{number}", room)
    x = join(cluster, 0, "x", room)
    stopped, cluster.hosts[2] = cluster[2], None
    for _ in range(150):  # fill the way to the stopped worker
        say(cluster, x, type="message", room=room, payload="x" * 60_000)
    x.take_bytes()
    before = cluster[1].counted().get("bus_sent_bytes_total", 0)
    for _ in range(400):
        x.feed_only(frame(TEXT, json.dumps({"type": "message", "room": room})))
    cluster.run()
    sent = cluster[1].counted()["bus_sent_bytes_total"] - before
    resets = [host.counted().get("links_reset_total", 0) for host in cluster.hosts if host]
    cluster.hosts[2] = stopped
    assert cluster[0].hub.neighbour(cluster[1].place.address).link is not None, (resets, sent)
    assert sent < 1 << 20, sent


async def test_update_that_was_missed_while_the_way_to_the_owner_was_lost_is_heard_later() -> None:
    cluster = Cluster(3)
    room = cluster.room(1)
    a, c = join(cluster, 0, "a", room, meta=1), join(cluster, 2, "c", room)
    a.take()
    cluster.reset(1, 2)
    cluster.run()
    say(cluster, a, type="update", room=room, payload={"meta": 2})
    cluster.link(1, 2)
    cluster.run()
    assert [message["payload"]["meta"] for message in c.take() if message["type"] == "peer-updated"] == [2]


async def test_update_at_a_link_that_is_being_reset_is_refused_or_heard() -> None:
    cluster = Cluster(2)
    room = cluster.room(1)
    a, b = join(cluster, 0, "a", room, meta=1), join(cluster, 1, "b", room)
    a.take()
    cluster[0].hub.neighbour(cluster[1].place.address).reset()
    a.feed_only(frame(TEXT, json.dumps({"type": "update", "room": room, "payload": {"meta": 2}, "id": "u"})))
    a.feed_only(frame(TEXT, json.dumps({"type": "message", "room": room, "id": "m"})))
    cluster.run()
    b.take()
    assert [(message["code"], message["id"]) for message in a.take()] == [
        ("backend_unavailable", "u"), ("backend_unavailable", "m")]  # fmt: skip


@pytest.mark.parametrize("how", ["dies", "is stopped"])
async def test_ack_of_a_message_that_its_owner_never_handled_goes_out(cluster: Cluster, how: str) -> None:
    room = cluster.room(1)
    a = cluster[0].connect()
    say(cluster, a, type="hello", sender="a", payload={"caps": ["ack"]})
    say(cluster, a, type="join", room=room)
    a.take()
    stopped, cluster.hosts[1] = cluster[1], None
    say(cluster, a, type="message", room=room, id="1")
    if how == "dies":
        cluster.hosts[1] = stopped
        cluster.kill(1)
        cluster.run()
    else:
        cluster.advance(3)
        assert a.take() == []
        cluster.advance(1.5)
    assert a.take() == [{"type": "ack", "payload": {"delivered": 0, "queued": 0}, "id": "1"}]
    if how == "is stopped":
        cluster.hosts[1] = stopped
    cluster.run()
    assert a.take() == []


async def test_messages_to_other_rooms_behind_a_join_are_not_lost_by_a_normal_close() -> None:
    cluster = Cluster(2)
    here, away = cluster.room(0), cluster.room(1)
    a, b = join(cluster, 0, "a", here), join(cluster, 0, "b", here)
    a.take()
    b.take()
    for message in ({"type": "join", "room": away}, {"type": "message", "room": here}):
        a.feed_only(frame(TEXT, json.dumps(message)))
    a.feed_only(frame(CLOSE, (1000).to_bytes(2, "big")))
    cluster.run()
    assert types(b) == ["message", "peer-left"]


async def test_members_held_by_a_link_that_fell_while_gathering_are_taken_back_in_time() -> None:
    cluster = Cluster(3)
    room = cluster.room(1)
    a = join(cluster, 0, "a", room)
    cluster.kill(1)
    cluster.run()
    owner = cluster.start(1)
    stopped, cluster.hosts[2] = cluster[2], None  # so the gathering goes on
    cluster.run()
    cluster.relink(0, 1)
    cluster.run()
    still = owner.hub.rooms.is_gathering
    cluster.hosts[2] = stopped
    cluster.run()
    assert (still, owner.hub.rooms.is_gathering) == (True, False)
    assert a.take_frames() == []


async def test_link_that_falls_while_gathering_does_not_cost_the_members_of_a_living_home() -> None:
    cluster = Cluster(2)
    room = cluster.room(1)
    a = join(cluster, 0, "a", room)
    cluster.kill(1)
    cluster.run()
    cluster.start(1)
    step_until(cluster, lambda: cluster[0].hub.neighbour(cluster[1].place.address).link is not None)
    cluster.relink(0, 1)
    cluster.run()
    assert a.take_frames() == []
