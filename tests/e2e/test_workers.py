"""One server, several workers: the protocol between peers whose connections and rooms are on different ones.

A peer first joins a room of its own, which may bring it to any worker, then the room of the test: home and owner differ
in most cases. Each test is played in several rooms at once, and `_play` asserts by the counters of the server that
messages have crossed. All clients check what they hear besides (`swarm`); its checker is tested here too.
"""

import asyncio
import json
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fastsig import status
from tests.e2e.conftest import EVERY_COUNT, Server, until
from tests.e2e.swarm import Client, Message, RefusedError, Swarm

WORKERS = EVERY_COUNT
TO_OWNER = 'relays_total{route="to_owner"}'
ROOMS = 8  # of a test: that none of them crosses would be as likely as 2^-16 with two workers and two peers
META_BYTES = 1024
MESSAGE_BYTES = 65536

Play = Callable[..., Coroutine[Any, Any, None]]


def _sum(server: Server, counter: str) -> int:
    """Over all workers; 0 of a server with one, which need not have it."""
    workers = status.ask(server.runtime_dir, server.port).workers
    assert len(workers) == server.workers
    return sum(worker.counters.get(counter, 0) for worker in workers)


async def _enter(client: Client, room: str, **payload: Any) -> Message:
    """Connect, go wherever a room of one's own is, then join."""
    await client.connect()
    await client.join(f"own-{uuid.uuid4().hex}")
    return await client.join(room, **payload)


async def _play(server: Server, play: Play, *names: str, is_relayed: bool = True, wants_ack: bool = False) -> None:
    """`play(room, *clients)` in ROOMS rooms at once, of clients who have joined in this order and heard of each other.

    Afterwards all agree on the rosters, nothing went wrong, and with several workers, some of it crossed.
    """
    relayed = _sum(server, TO_OWNER)
    with Swarm(server.url, keeps=True, wants_ack=wants_ack) as swarm:

        async def one() -> None:
            room = f"room-{uuid.uuid4().hex}"
            clients = [swarm.client(f"{name}-{room[5:9]}") for name in names]
            for at, client in enumerate(clients):
                await _enter(client, room)
                for earlier in clients[:at]:
                    await earlier.hears("peer-joined", room=room, sender=client.name)
            for client in clients:
                client.heard.clear()
            await play(room, *clients)

        async with asyncio.TaskGroup() as group:
            for _ in range(ROOMS):
                group.create_task(one())
        await swarm.compare_rosters(5.0)
        swarm.assert_clean()
        if server.workers > 1:
            assert _sum(server, "remote_members") > 0, "every peer was at home where its rooms are"
            assert not is_relayed or _sum(server, TO_OWNER) > relayed, "no message has crossed"
        await swarm.close()
        swarm.assert_clean()


def _said(client: Client, type: str) -> list[Message]:
    return [message for message in client.heard if message["type"] == type]


# ---- who is there


async def test_newcomer_gets_the_roster_and_the_others_hear_of_it(server: Server) -> None:
    async def play(room: str, a: Client, b: Client) -> None:
        late = a.swarm.client(f"late{a.name}")
        joined = await _enter(late, room, meta={"é": [1, None]})
        n = joined["payload"]["n"]
        assert joined["sender"] == late.name
        assert joined["payload"]["peers"] == [
            {"sender": other.name, "n": other.rooms[room].n, "meta": None} for other in (a, b)
        ]
        assert a.rooms[room].n < b.rooms[room].n < n, "the newcomer, who offers, has the highest"
        for other in (a, b):
            heard = await other.hears("peer-joined", room=room)
            assert (heard["sender"], heard["payload"]) == (late.name, {"n": n, "meta": {"é": [1, None]}})

    await _play(server, play, "a", "b", is_relayed=False)


async def test_who_leaves_is_gone_at_once_and_may_come_back(server: Server) -> None:
    async def play(room: str, a: Client, b: Client, c: Client) -> None:
        old = b.rooms[room].n
        left = await b.leave(room)
        assert (left["type"], left["room"], left["payload"]) == ("left", room, {"reason": "left"})
        assert (await b.ask(type="message", room=room, payload=1))["code"] == "not_joined"
        joined = await b.join(room)
        assert joined["payload"]["n"] > c.rooms[room].n > old
        for other in (a, c):
            gone = await other.hears("peer-left", room=room)
            assert (gone["sender"], gone["payload"]) == (b.name, {"n": old, "reason": "left"})
            back = await other.hears("peer-joined", room=room)
            assert (back["sender"], back["payload"]["n"]) == (b.name, joined["payload"]["n"])

    await _play(server, play, "a", "b", "c", is_relayed=False)


async def test_message_to_one_who_left_is_refused(server: Server) -> None:
    async def play(room: str, a: Client, b: Client) -> None:
        await b.leave(room)
        await a.hears("peer-left", room=room, sender=b.name)
        error = await a.ask(type="offer", room=room, recipient=b.name, payload={})
        assert (error["code"], error["room"], error["recipients"]) == ("peer_unavailable", room, [b.name])

    await _play(server, play, "a", "b", is_relayed=False)


async def test_lost_connection_is_told_to_the_others(server: Server) -> None:
    async def play(room: str, a: Client, b: Client, c: Client) -> None:
        n = b.rooms[room].n
        b.abort()
        for other in (a, c):
            gone = await other.hears("peer-left", room=room)
            assert (gone["sender"], gone["payload"]) == (b.name, {"n": n, "reason": "lost"})

    await _play(server, play, "a", "b", "c", is_relayed=False)


async def test_those_who_vanish_while_they_join_leave_no_ghosts(server: Server) -> None:
    async def play(room: str, a: Client) -> None:
        for number in range(10):
            ghost = a.swarm.client(f"ghost{number}{a.name}")
            await ghost.connect()
            await ghost.join(f"own-{ghost.name}")
            ghost.send(type="join", room=room, sender=ghost.name)
            ghost.abort()
        late = a.swarm.client(f"late{a.name}")
        await _enter(late, room)
        await asyncio.to_thread(until, lambda: [*late.rooms[room].peers] == [a.name], "a ghost stays in the roster")

    await _play(server, play, "a", is_relayed=False)


async def test_update_reaches_the_others_and_later_rosters(server: Server) -> None:
    async def play(room: str, a: Client, b: Client) -> None:
        a.send(type="update", room=room, payload={"meta": {"muted": True}})
        heard = await b.hears("peer-updated", room=room)
        assert (heard["sender"], heard["payload"]) == (a.name, {"n": a.rooms[room].n, "meta": {"muted": True}})
        late = a.swarm.client(f"late{a.name}")
        roster = (await _enter(late, room))["payload"]["peers"]
        assert [(peer["sender"], peer["meta"]) for peer in roster] == [(a.name, {"muted": True}), (b.name, None)]

    await _play(server, play, "a", "b", is_relayed=False)


async def test_name_that_is_taken_stays_with_its_holder(server: Server) -> None:
    async def play(room: str, a: Client, b: Client) -> None:
        twin = Swarm(a.swarm.url).client(a.name)
        await twin.connect()
        await twin.join(f"own-{uuid.uuid4().hex}")
        error = await twin.ask(type="join", room=room, sender=a.name)
        assert (error["code"], error["retry"], error["room"]) == ("id_taken", True, room)
        assert 0 < error["after_ms"] <= 6000
        b.send(type="message", room=room, recipient=a.name, payload="still you?")
        assert (await a.hears("message", room=room))["payload"] == "still you?"
        await twin.close()
        assert not twin.swarm.violations

    await _play(server, play, "a", "b")


async def test_room_is_as_large_as_its_creator_wants(server: Server) -> None:
    async def play(anchor: str, a: Client) -> None:
        room = f"small-{anchor}"
        await a.join(room, max_peers=2)
        second, third = (a.swarm.client(f"{number}{a.name}") for number in (2, 3))
        await _enter(second, room, max_peers=9)
        with pytest.raises(RefusedError) as refused:
            await _enter(third, room)
        error = refused.value.args[0]
        assert (error["code"], error["retry"], error["room"]) == ("room_full", False, room)
        await second.leave(room)
        await a.hears("peer-left", room=room)
        assert [peer["sender"] for peer in (await third.join(room))["payload"]["peers"]] == [a.name]

    await _play(server, play, "a", is_relayed=False)


async def test_roster_larger_than_any_packet_arrives_whole(server: Server) -> None:
    """150 peers with 1 KiB of metadata each: more than 128 KiB in one `joined`."""
    room, meta = f"hall-{uuid.uuid4().hex}", "m" * (META_BYTES - 2)
    with Swarm(server.url) as swarm:
        crowd = [swarm.client(f"p{number}") for number in range(150)]
        async with asyncio.TaskGroup() as group:
            for client in crowd:
                group.create_task(_enter(client, room, meta=meta))
        late = swarm.client("late")
        roster = (await _enter(late, room))["payload"]["peers"]
        assert sorted(peer["sender"] for peer in roster) == sorted(client.name for client in crowd)
        assert {peer["meta"] for peer in roster} == {meta}
        await asyncio.to_thread(until, lambda: not _roster_differences(swarm, room), "some have not heard of all")
        swarm.assert_clean()
        await swarm.close()
        swarm.assert_clean()


def _roster_differences(swarm: Swarm, room: str) -> list[str]:
    everybody = {client.name for client in swarm.clients}
    return [client.name for client in swarm.clients if {client.name, *client.rooms[room].peers} != everybody]


# ---- who gets what


async def test_message_for_one_reaches_that_one_as_it_was_sent(server: Server) -> None:
    async def play(room: str, a: Client, b: Client, c: Client) -> None:
        payload: Message = {"sdp": 'v=0\r\n"\\ é 🦊 \u2028', "n": [1.5, -0, 1e300, None, True, {"": {}}]}
        a.send(type="offer", room=room, sender=a.name, recipient=b.name, payload=payload, id="é1")
        assert await b.hears("offer") == {
            "type": "offer", "room": room, "sender": a.name, "recipient": b.name, "payload": payload, "id": "é1",
        }  # fmt: skip
        b.send(type="x-without.anything", room=room, recipient=a.name)
        assert await a.hears("x-without.anything") == {
            "type": "x-without.anything", "room": room, "sender": b.name, "recipient": a.name,
        }  # fmt: skip
        a.send(type="message", room=room, payload="last")
        await c.hears("message", payload="last")
        assert not _said(c, "offer") and not _said(a, "offer") and not _said(a, "message")

    await _play(server, play, "a", "b", "c")


async def test_broadcast_reaches_all_others_and_is_not_echoed(server: Server) -> None:
    async def play(room: str, a: Client, b: Client, c: Client) -> None:
        a.send(type="message", room=room, payload={"text": "hé 🦊"}, id="m1")
        expected = {"type": "message", "room": room, "sender": a.name, "payload": {"text": "hé 🦊"}, "id": "m1"}
        assert await b.hears("message") == await c.hears("message") == expected
        b.send(type="message", room=room, payload="answer")
        assert await a.hears("message") == {
            "type": "message", "room": room, "sender": b.name, "payload": "answer",
        }  # fmt: skip

    await _play(server, play, "a", "b", "c")


async def test_list_of_recipients_reaches_those_named(server: Server) -> None:
    async def play(room: str, a: Client, b: Client, c: Client, d: Client) -> None:
        a.send(type="x-note", room=room, recipient=[b.name, c.name], payload=[1])
        for other in (b, c):
            heard = await other.hears("x-note")
            assert (heard["sender"], heard["recipient"], heard["payload"]) == (a.name, other.name, [1])
        a.send(type="x-end", room=room)
        await d.hears("x-end")
        assert not _said(d, "x-note")

    await _play(server, play, "a", "b", "c", "d")


async def test_absent_recipients_are_named_and_the_others_get_it(server: Server) -> None:
    async def play(room: str, a: Client, b: Client) -> None:
        error = await a.ask(type="offer", room=room, recipient=["ghost", b.name, a.name], payload={})
        assert (error["type"], error["code"], error["retry"]) == ("error", "peer_unavailable", False)
        assert (error["room"], sorted(error["recipients"])) == (room, sorted(["ghost", a.name]))
        assert (await b.hears("offer"))["recipient"] == b.name

    await _play(server, play, "a", "b")


@pytest.mark.parametrize("has_list", [False, True], ids=["broadcast", "list"])
async def test_longest_message_arrives_whole(server: Server, *, has_list: bool) -> None:
    async def play(room: str, a: Client, b: Client, c: Client) -> None:
        message = {"type": "message", "room": room} | ({"recipient": [b.name, c.name]} if has_list else {})
        envelope = len(json.dumps(message | {"payload": ""}, separators=(",", ":")))
        payload = "p" * (MESSAGE_BYTES - envelope)
        a.send(**message, payload=payload)
        for other in (b, c):
            assert (await other.hears("message"))["payload"] == payload

    await _play(server, play, "a", "b", "c")


async def test_acks_count_those_who_were_reached(server: Server) -> None:
    async def play(room: str, a: Client, b: Client, c: Client) -> None:
        async def delivered(**message: Any) -> int:
            ack = await a.ask(type="message", room=room, **message)
            assert ack["type"] == "ack" and ack["payload"]["queued"] == 0, ack
            count: int = ack["payload"]["delivered"]
            return count

        assert await delivered(recipient=b.name) == 1
        assert await delivered(recipient=[b.name, c.name]) == 2
        assert await delivered() == 2
        assert await delivered(payload={"large": "p" * 20_000}) == 2
        a.swarm.tolerated.add("peer_unavailable")
        a.send(type="x-list", room=room, recipient=["ghost", c.name], id="partly")
        assert (await a.hears("error", id="partly"))["recipients"] == ["ghost"]
        assert (await a.hears("ack", id="partly"))["payload"] == {"delivered": 1, "queued": 0}
        await c.leave(room)
        await a.hears("peer-left", room=room)
        assert await delivered() == 1
        await b.leave(room)
        await a.hears("peer-left", room=room)
        assert await delivered() == 0

    await _play(server, play, "a", "b", "c", wants_ack=True)


async def test_what_waits_behind_a_join_is_handled_in_order(server: Server) -> None:
    async def play(room: str, a: Client) -> None:
        hasty = a.swarm.client(f"hasty{a.name}")
        await hasty.connect()
        await hasty.join(f"own-{uuid.uuid4().hex}")
        joining = asyncio.ensure_future(hasty.join(room))
        await asyncio.sleep(0)  # it has been sent by then, and not been answered
        for number in range(20):
            hasty.send(type="message", room=room, payload=number)
        leaving = asyncio.ensure_future(hasty.leave(room))
        await joining
        await leaving
        await a.hears("peer-left", room=room, sender=hasty.name)
        kinds = [message["type"] for message in a.heard if message["room"] == room]
        assert kinds == ["peer-joined", *["message"] * 20]
        assert [message["payload"] for message in _said(a, "message")] == list(range(20))

    await _play(server, play, "a")


async def test_order_holds_over_directed_messages_lists_and_broadcasts(server: Server) -> None:
    """All at once in both directions; the clients check the numbers, `compare_rosters` the ends."""

    async def play(room: str, a: Client, b: Client, c: Client) -> None:
        for _ in range(30):
            for speaker, one, other in ((a, b, c), (b, c, a), (c, a, b)):
                speaker.say_to(room, one.name)
                speaker.say_to_all(room)
                speaker.say_to(room, one.name, other.name)
                speaker.say_to(room, other.name)
            await asyncio.sleep(0)

    await _play(server, play, "a", "b", "c")


async def test_sixteen_rooms_on_one_connection(server: Server) -> None:
    """Two peers in the same rooms, which they joined in opposite order; a seventeenth is one too many."""
    with Swarm(server.url, keeps=True) as swarm:
        rooms = [f"{number}-{uuid.uuid4().hex}" for number in range(16)]
        a, b = swarm.client("a"), swarm.client("b")
        relayed = _sum(server, TO_OWNER)
        for client, order in ((a, rooms), (b, rooms[::-1])):
            await client.connect()
            for room in order:
                await client.join(room)
        await swarm.compare_rosters(5.0)
        for at, room in enumerate(rooms):
            a.send(type="offer", room=room, recipient="b", payload=at)
            b.send(type="answer", room=room, recipient="a", payload=at)
        for at, room in enumerate(rooms):
            assert (await b.hears("offer", room=room))["payload"] == at
            assert (await a.hears("answer", room=room))["payload"] == at
        assert (await a.ask(type="join", room="one more"))["code"] == "too_many_rooms"
        await a.leave(rooms[5])
        await b.hears("peer-left", room=rooms[5], sender="a")
        assert (await a.join(rooms[5]))["payload"]["peers"][0]["sender"] == "b"
        if server.workers > 1:
            assert _sum(server, "remote_members") >= 2, "a connection was at home where all its sixteen rooms are"
            assert _sum(server, TO_OWNER) > relayed
        await swarm.compare_rosters(5.0)
        b.abort()
        for room in rooms:
            assert (await a.hears("peer-left", room=room, sender="b"))["payload"]["reason"] in {"left", "lost"}
        await swarm.close()
        swarm.assert_clean()


async def test_rooms_of_all_kinds_of_names(server: Server) -> None:
    with Swarm(server.url, keeps=True) as swarm:
        names = ["r", "R", "r ", "é", "e\u0301", "🦊" * 32, "x" * 128, "a/b?c=d#e%20", '"\\', "null", "0", "\u2028"]
        a, b = swarm.client('a"\\é'), swarm.client("🦊")
        for client in (a, b):
            await client.connect()
            for room in names:
                await client.join(room)
        for at, room in enumerate(names):
            assert [*a.rooms[room].peers] == [b.name] or await a.hears("peer-joined", room=room)
            a.send(type="message", room=room, recipient=b.name, payload=at)
        for at, room in enumerate(names):
            assert (await b.hears("message", room=room))["payload"] == at
        await swarm.compare_rosters(5.0)
        await swarm.close()
        swarm.assert_clean()


# ---- the checker itself

_ROSTER = {"n": 5, "peers": [{"sender": "b", "n": 3, "meta": None}]}
_JOINED = {"type": "joined", "room": "r", "sender": "a", "payload": _ROSTER, "id": "q1"}


def _relayed(at: int, *, sender: str = "b", n: int = 3, **payload: Any) -> Message:
    numbers = {"n": n, "at": at, "t": 0.0} | (payload or {"one": {"a": [5, at]}})
    recipient = {} if "all" in numbers else {"recipient": "a"}
    return {"type": "message", "room": "r", "sender": sender, "payload": numbers} | recipient


def _peer(type: str, sender: str, n: int) -> Message:
    return {"type": type, "room": "r", "sender": sender, "payload": {"n": n, "meta": None, "reason": "left"}}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([_relayed(1)], "a room that it has not joined"),
        ([_peer("peer-joined", "c", 6)], "a room that it has not joined"),
        ([_JOINED, _JOINED], "joined twice"),
        ([_JOINED | {"payload": {"n": 3, "peers": _ROSTER["peers"]}}], "not the highest"),
        ([_JOINED | {"payload": {"n": 5, "peers": [{"sender": "a", "n": 1, "meta": None}]}}], "with oneself"),
        ([_JOINED, _peer("peer-joined", "b", 6)], "is there already"),
        ([_JOINED, _peer("peer-joined", "c", 4)], "not above 5"),
        ([_JOINED, _peer("peer-left", "c", 4)], "leaves, but is not there"),
        ([_JOINED, _peer("peer-left", "b", 2)], "leaves, but is not there"),
        ([_JOINED, _peer("peer-left", "b", 3), _relayed(1)], "of one who is not there"),
        ([_JOINED, _peer("peer-updated", "c", 3)], "of one who is not there"),
        ([_JOINED, _relayed(1, sender="c")], "of one who is not there"),
        ([_JOINED, _relayed(1, n=2)], "of another life"),
        ([_JOINED, _relayed(1) | {"recipient": "z"}], "for another"),
        ([_JOINED, _relayed(1), _relayed(1)], "repeats or goes back"),
        ([_JOINED, _relayed(1, all=1), _relayed(2), _relayed(1)], "repeats or goes back"),
        ([_JOINED, _relayed(1), _relayed(3)], "lost: r: a hears from b message 3 after 1"),
        ([_JOINED, _relayed(2)], "lost: r: a hears from b message 2 after 0"),
        ([_JOINED, _relayed(1, all=1), _relayed(3, all=3)], "broadcast 3 after 1"),
        ([_JOINED, {"type": "left", "room": "r", "payload": {"reason": "left"}}, _relayed(1)], "or has left"),
        ([{"type": "error", "code": "internal", "message": "", "retry": True}], "nobody expects"),
        ([{"type": "error", "code": "backend_unavailable", "message": "", "retry": True}], "without a fault"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_checker_sees(messages: list[Message], says: str) -> None:
    swarm = Swarm("ws://nowhere/ws")
    client = swarm.client("a")
    for message in messages:
        client._asked["q1"] = asyncio.get_running_loop().create_future()
        client.receive(json.dumps(message).encode())
    swarm.judge()
    assert any(says in violation for violation in swarm.violations), swarm.violations


async def test_checker_has_nothing_against_what_is_right() -> None:
    swarm = Swarm("ws://nowhere/ws")
    client = swarm.client("a", ["r"])
    client._asked["q1"] = asyncio.get_running_loop().create_future()
    stranger = _relayed(4, one={"a": [4, 9]})  # sent to the membership before this one
    right = [_JOINED, _relayed(1), _relayed(2, all=7), _relayed(3, all=8), stranger, _relayed(5, one={"a": [5, 2]})]
    for message in [*right, _peer("peer-joined", "c", 6), _peer("peer-left", "b", 3)]:
        client.receive(json.dumps(message).encode())
    swarm.judge()
    assert not swarm.violations
    assert client.rooms["r"].peers == {"c": 6}


async def test_loss_is_excused_only_in_rooms_that_a_fault_has_touched() -> None:
    swarm = Swarm("ws://nowhere/ws")
    client = swarm.client("a")
    error = {"type": "error", "code": "backend_unavailable", "message": "", "retry": True, "room": "r"}
    swarm.fault()
    for room in ("r", "s"):
        client._asked["q1"] = asyncio.get_running_loop().create_future()
        for message in (_JOINED, _relayed(1), _relayed(3)):
            client.receive(json.dumps(message | {"room": room}).encode())
    client.receive(json.dumps(error).encode())
    swarm.judge()
    assert swarm.counts["excused"] == 1
    (violation,) = swarm.violations
    assert violation.startswith("lost: s: ")


async def test_rosters_that_differ_are_named(server: Server) -> None:
    with Swarm(server.url) as swarm:
        await swarm.grow({name: ["differ"] for name in "abc"})
        await swarm.compare_rosters(5.0)
        swarm.assert_clean()
        view = swarm.clients[0].rooms["differ"]
        kept, view.peers = view.peers, {"b": view.peers["b"], "ghost": 1}
        assert any("ghost" in text and "'c'" in text for text in swarm.differences())
        view.peers = kept
        view.sent_to["b", kept["b"]] = 5
        await swarm.compare_rosters(5.0)
        assert any("a sent 5 to b, 0 came" in text for text in swarm.violations), swarm.violations
        await swarm.close()
