"""Connections that move to the owner of their room, between two workers of this process: each step of it, and what may
come in between. Whole servers: tests/e2e/test_moves.py."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import jwt
import pytest

from fastsig import metrics
from fastsig.config import Auth, Server
from fastsig.errors import CloseCode
from fastsig.passing import OFFERS
from fastsig.webhook import Decision

from .issuing import SECRET
from .memory import CLOSE, PING, PONG, TEXT, frame, frame_of
from .moving import Far, Homes, homes, until

MOVED = {"moved": 1}


@pytest.fixture
async def two() -> AsyncIterator[Homes]:
    async with homes() as made:
        yield made


def gone_from(two: Homes, slot: int = 0) -> bool:
    return not two[slot].relay.all_connections()


async def test_connection_goes_to_the_owner_of_the_first_room_that_it_joins(two: Homes) -> None:
    room = two.room(1)
    here = await Far.connect(two[1])
    await here.join(room, "a")
    there = await Far.connect(two[0])
    joined = await there.join(room, "b")
    assert [peer["sender"] for peer in joined["payload"]["peers"]] == ["a"]
    assert (await here.hear())["type"] == "peer-joined"
    await there.say(type="offer", room=room, recipient="a", payload=1, id="i")
    assert (await here.hear())["payload"] == 1
    await here.say(type="answer", room=room, recipient="b", payload=2)
    assert (await there.hear())["payload"] == 2
    assert two[0].moves() == MOVED
    assert two[1].moves() == {}
    assert gone_from(two)
    counted = [home.counted() for home in two.homes]
    assert [found.get("connections", 0) for found in counted] == [0, 2]
    assert [found.get("members", 0) for found in counted] == [0, 2]
    assert "remote_members" not in counted[0]
    assert [found.get("handshakes_total", 0) for found in counted] == [1, 1]
    there.close()
    assert (await here.hear())["type"] == "peer-left"
    await until(lambda: two[1].counted()["connections"] == 1)
    counted = [home.counted() for home in two.homes]
    assert [found.get("disconnects_total", 0) for found in counted] == [0, 1]
    here.close()


async def test_what_is_pipelined_behind_the_join_goes_along_in_order(two: Homes) -> None:
    room = two.room(1)
    here = await Far.connect(two[1])
    await here.join(room, "a")
    there = await Far.connect(two[0])
    rest = frame_of(type="message", room=room, payload="the last")
    said = [frame_of(type="message", room=room, payload=number) for number in range(50)]
    hello = frame_of(type="hello", sender="b", payload={"caps": ["ack"]})
    join = frame_of(type="join", room=room, id="j")
    pings = frame(PING, b"1") + b"".join(said[:25]) + frame(PING, b"2") + b"".join(said[25:])
    await there.send(hello + join + pings + rest[:-7])
    assert (await there.hear())["type"] == "welcome"
    assert [await there.frame() for _ in range(2)] == [(PONG, b"1"), (PONG, b"2")]
    assert (await there.hear())["id"] == "j"
    assert (await here.hear())["sender"] == "b"
    assert [(await here.hear())["payload"] for _ in range(50)] == list(range(50))
    assert two[0].moves() == MOVED
    await there.send(rest[-7:] + frame_of(type="message", room=room, id="k"))
    assert (await here.hear())["payload"] == "the last"
    assert (await there.hear()) == {"type": "ack", "payload": {"delivered": 1, "queued": 0}, "id": "k"}
    here.close()
    there.close()


@pytest.mark.parametrize("held", [1, 2, 7, 30, 100])
async def test_beginning_of_a_frame_goes_along(two: Homes, held: int) -> None:
    room = two.room(1)
    there = await Far.connect(two[0])
    ping = frame_of(type="ping", id="p", payload="x" * 100)
    await there.send(frame_of(type="join", room=room, sender="b") + ping[:held])
    assert (await there.hear())["type"] == "joined"
    assert two[0].moves() == MOVED
    for byte in ping[held:]:
        await there.send(bytes([byte]))
    assert (await there.hear())["id"] == "p"
    there.close()


async def test_what_comes_while_the_webhook_decides_goes_along(two: Homes) -> None:
    decided: list[Any] = []

    class Asker:
        is_wanted = True

        def ask(self, question: Any, done: Any) -> Any:
            decided.append(done)
            return self

        def cancel(self) -> None:
            pass

    two[0].hub.asker = Asker()
    room = two.room(1)
    there = await Far.connect(two[0])
    pings = [frame_of(type="ping", id=str(number)) for number in range(40)]
    await there.say(type="join", room=room, sender="b")
    await until(lambda: decided)
    await there.send(b"".join(pings[:20]))
    await there.send(frame(PING, b"now") + pings[20][:9])
    assert await there.frame() == (PONG, b"now")
    await there.send(pings[20][9:17])
    connection = two[0].connections()[0]
    await asyncio.sleep(0.01)  # a beginning of a frame shows nowhere
    decided[0](Decision(is_allowed=True, meta=b'{"by":"webhook"}', limits={"rooms_per_connection": 1}))
    assert (await there.hear())["type"] == "joined"
    assert not connection.is_open
    await there.send(pings[20][17:] + b"".join(pings[21:]))
    assert [(await there.hear())["id"] for _ in range(40)] == [str(number) for number in range(40)]
    assert two[0].moves() == MOVED
    await there.say(type="join", room=two.room(1, 1))
    assert (await there.hear())["code"] == "too_many_rooms"
    await there.say(type="update", room=room, payload={"meta": 1})
    assert (await there.hear())["code"] == "forbidden"
    there.close()


# ---- who stays


async def test_one_in_the_midst_of_a_fragmented_message_stays(two: Homes) -> None:
    room = two.room(1)
    there = await Far.connect(two[0])
    ping = b'{"type":"ping","id":"p"}'
    await there.send(frame_of(type="join", room=room, sender="b") + frame(TEXT, ping[:5], fin=False))
    assert (await there.hear())["type"] == "joined"
    await there.send(frame(0, ping[5:]))
    assert (await there.hear())["id"] == "p"
    assert two[0].moves() == {"unfit": 1}
    assert len(two[0].connections()) == 1
    there.close()


async def test_one_that_said_more_than_goes_into_a_packet_stays_and_loses_nothing(two: Homes) -> None:
    room = two.room(1)
    here = await Far.connect(two[1])
    await here.join(room, "a")
    there = await Far.connect(two[0])
    said = [frame_of(type="message", room=room, payload=[number, "x" * 8000]) for number in range(16)]
    await there.send(frame_of(type="join", room=room, sender="b") + b"".join(said))
    assert (await here.hear())["type"] == "peer-joined"
    assert [(await here.hear())["payload"][0] for _ in range(16)] == list(range(16))
    assert sum(two[0].moves().values()) == 1
    here.close()
    there.close()


async def test_one_that_does_not_read_stays(two: Homes) -> None:
    room = two.room(1)
    there = await Far.connect(two[0])
    (connection,) = two[0].connections()
    while not connection.waiting_bytes:
        connection.send(b'{"type":"pong"}' * 4096)
        await asyncio.sleep(0.001)  # it is given to the kernel
    await there.say(type="join", room=room, sender="b")
    await until(lambda: two[0].moves() == {"unfit": 1})
    while (message := await there.frame())[1][:16] != b'{"type":"joined"':
        assert message[0] == TEXT
    there.close()


async def test_second_room_is_joined_from_where_it_is(two: Homes) -> None:
    mine, other = two.room(0), two.room(1)
    there = await Far.connect(two[0])
    await there.join(mine, "b")
    await there.join(other, "b")
    await there.say(type="leave", room=mine)
    assert (await there.hear())["type"] == "left"
    await there.say(type="leave", room=other)
    assert (await there.hear())["type"] == "left"
    await there.join(other, "b")
    assert two[0].moves() == {}
    assert two[0].counted()["remote_members"] == 1
    there.close()


async def test_moved_once_it_stays_there(two: Homes) -> None:
    there = await Far.connect(two[0])
    await there.join(two.room(1), "b")
    await there.say(type="leave", room=two.room(1))
    assert (await there.hear())["type"] == "left"
    await there.join(two.room(0), "b")
    assert two[1].moves() == {}
    assert two[1].counted()["remote_members"] == 1
    there.close()


async def test_passed_by_its_url_it_is_not_moved(two: Homes) -> None:
    there = await Far.connect(two[0], f"/ws?room={two.room(1).replace(' ', '%20')}")
    await until(lambda: len(two[1].connections()) == 1)
    await there.join(two.room(0), "b")
    assert two[1].moves() == {}
    there.close()


async def test_switched_off_nothing_moves() -> None:
    async with homes(server=Server(moves=False)) as two:
        there = await Far.connect(two[0])
        await there.join(two.room(1), "b")
        assert two[0].moves() == {}
        assert len(two[0].connections()) == 1
        two[0].passing.configure(may_move=True)
        other = await Far.connect(two[0])
        await other.join(two.room(1), "c")
        assert two[0].moves() == MOVED
        there.close()
        other.close()


# ---- the hand-over, word by word


async def joining(two: Homes, peer: str = "b") -> Far:
    """Its descriptor is offered to a worker that has not heard of it yet."""
    two[1].deafen()
    there = await Far.connect(two[0])
    await there.say(type="join", room=two.room(1), sender=peer)
    await until(lambda: two[1].held)
    return there


async def test_owner_that_is_full_or_drains_leaves_it_where_it_is(two: Homes) -> None:
    two[1].door.is_ready = False
    there = await Far.connect(two[0])
    await there.join(two.room(1), "b")
    assert two[0].moves() == {"refused": 1}
    assert len(two[0].connections()) == 1
    assert two[0].counted()["remote_members"] == 1
    there.close()


async def test_owner_that_has_as_many_of_its_address_as_allowed_leaves_it_where_it_is() -> None:
    async with homes(connections_per_address=2) as two:
        there = [await Far.connect(two[1]), await Far.connect(two[1]), await Far.connect(two[0])]
        await there[2].join(two.room(1), "b")
        assert two[0].moves() == {"refused": 1}
        there[0].close()
        await until(lambda: len(two[1].connections()) == 1)
        other = await Far.connect(two[0])
        await other.join(two.room(1), "c")
        assert two[0].moves() == {"refused": 1, "moved": 1}
        third = await Far.connect(two[0])  # the place of the one that moved is free
        await third.say(type="ping")
        assert (await third.hear())["type"] == "pong"
        for far in (*there, other, third):
            far.close()


async def test_owner_that_is_silent_is_not_waited_for_and_touches_nothing_later(two: Homes) -> None:
    there = await joining(two)
    await there.send(frame_of(type="ping", id="p") + frame(PING, b"x"))
    await until(lambda: two[0].moves() == {"taken_back": 1})
    two[1].release()
    assert (await there.frame()) == (PONG, b"x")
    assert (await there.hear())["type"] == "joined"
    assert (await there.hear())["id"] == "p"
    assert len(two[0].connections()) == 1
    await until(lambda: not two[1].passing.stats()["offered"])
    assert gone_from(two, 1)
    other = await Far.connect(two[0])  # it has answered: it is asked again
    await other.join(two.room(1), "c")
    assert two[0].moves() == {"taken_back": 1, "moved": 1}
    there.close()
    other.close()


@pytest.mark.parametrize("steps", [0, 1])
async def test_way_that_is_lost_before_the_hand_over_leaves_it_where_it_is(two: Homes, steps: int) -> None:
    there = await joining(two)
    two[0].deafen()
    for _ in range(steps):
        two[1].hear_one()
        await until(lambda: two[0].held)
    two[0].held = None  # what is on its way is lost
    two.neighbour(0).reset()
    await until(lambda: two.neighbour(1).link is None)
    error = await there.hear()
    assert (error["code"], error["retry"]) == ("backend_unavailable", True)
    assert two[0].moves() == {"taken_back": 1}
    assert gone_from(two, 1)
    await two.link()
    await there.join(two.room(1), "b")
    assert len(two[0].connections()) == 1
    there.close()


async def test_way_that_is_lost_behind_the_hand_over_changes_nothing(two: Homes) -> None:
    there = await joining(two)
    two[1].hear_one()
    await until(lambda: two[0].moves() == MOVED)
    await until(lambda: len(two[1].held or ()) == 1)
    two.neighbour(0).reset()  # what it said is still read there
    await until(lambda: two.neighbour(1).link is None)
    assert (await there.hear())["type"] == "joined"
    assert len(two[1].connections()) == 1
    there.close()


@pytest.mark.parametrize("end", ["reset", "half", "close", "more"])
async def test_client_that_goes_on_the_way_is_gone(two: Homes, end: str) -> None:
    there = await joining(two)
    if end == "reset":
        there.end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        there.close()
    elif end == "half":
        there.end.shutdown(socket.SHUT_WR)
    else:
        await there.send(frame(CLOSE, b"\x03\xe8") if end == "close" else frame(TEXT, b"{"))
    two[1].release()
    if end == "more":
        assert (await there.hear())["type"] == "joined"
        assert (await there.hear())["code"] == "bad_json"
        there.close()
    await until(lambda: gone_from(two) and gone_from(two, 1))
    assert two[0].moves() == MOVED
    assert [home.counted().get("connections", 0) for home in two.homes] == [0, 0]
    if end != "more":
        there.close()


async def test_connection_that_we_close_on_the_way_is_not_handed_over(two: Homes) -> None:
    there = await joining(two)
    (connection,) = two[0].connections()
    connection.send_close(CloseCode.UNAUTHORIZED, "kicked")
    assert await there.close_code() == CloseCode.UNAUTHORIZED
    two[1].release()
    there.close()
    await until(lambda: gone_from(two) and gone_from(two, 1))
    assert two[0].moves() == {}


async def test_more_than_are_offered_at_once_wait_and_move(two: Homes) -> None:
    two[1].deafen()
    fars = [await Far.connect(two[0]) for _ in range(3 * OFFERS)]
    for number, far in enumerate(fars):
        await far.say(type="join", room=two.room(1, number % 8), sender=f"p{number}")
    await until(lambda: two[0].passing.stats()["offers"] == OFFERS)
    assert two[0].passing.stats()["moves_waiting"] > 0
    two[1].release()
    for far in fars:
        assert (await far.hear())["type"] == "joined"
    assert two[0].moves() == {"moved": 3 * OFFERS}
    for far in fars:
        far.close()


# ---- what goes along


def token(**claims: Any) -> str:
    now = time.time()
    return jwt.encode({"sub": "b", "iat": now, "exp": now + 3600} | claims, SECRET, "HS256")


AUTH = Auth(keys=(f"secret:{SECRET}",), required=True)


@pytest.fixture
async def guarded() -> AsyncIterator[Homes]:
    async with homes(auth=AUTH, errors_per_5s=3, joins_per_s=1) as made:
        yield made


async def test_token_goes_along(guarded: Homes) -> None:
    room = guarded.room(1)
    shown = token(fastsig={"rooms": [room], "can": ["join", "create", "relay"], "limits": {"messages_per_s": 7}})
    there = await Far.connect(guarded[0], f"/ws?token={shown}")
    await there.say(type="hello")
    assert (await there.hear())["payload"]["limits"]["messages_per_s"] == 7
    await there.say(type="join", room=room)
    assert (await there.hear())["sender"] == "b"
    assert guarded[0].moves() == MOVED
    await there.say(type="message", room=room)
    assert (await there.hear())["code"] == "forbidden"
    await there.say(type="join", room=guarded.room(1, 1))
    assert (await there.hear())["code"] == "forbidden"
    await there.say(type="hello")
    assert (await there.hear())["code"] == "bad_message"
    await there.say(type="refresh", payload={"token": token(sub="c")})
    assert (await there.hear())["code"] == "identity_mismatch"
    assert await there.close_code() == CloseCode.TOO_MANY_ERRORS
    there.close()


async def test_token_of_the_join_goes_along(guarded: Homes) -> None:
    there = await Far.connect(guarded[0])
    await there.join(guarded.room(1), "b", token=token())
    assert guarded[0].moves() == MOVED
    await there.say(type="refresh", payload={"token": token(exp=time.time() + 60)})
    assert (await there.hear())["type"] == "refreshed"
    there.close()


async def test_errors_and_joins_that_were_made_count_on(guarded: Homes) -> None:
    there = await Far.connect(guarded[0], f"/ws?token={token()}")
    for _ in range(3):
        await there.send(frame(TEXT, b"{"))
        assert (await there.hear())["code"] == "bad_json"
    await there.join(guarded.room(1), "b")
    assert guarded[0].moves() == MOVED
    for number in range(4):  # a level above 0 lets one pass
        await there.join(guarded.room(1, 1 + number), "b")
    await there.say(type="join", room=guarded.room(1, 5))
    assert (await there.hear())["code"] == "rate_limited"
    await there.send(frame(TEXT, b"{"))
    assert (await there.hear())["code"] == "bad_json"
    assert await there.close_code() == CloseCode.TOO_MANY_ERRORS
    there.close()


async def test_token_that_was_revoked_on_the_way_ends_it(guarded: Homes) -> None:
    guarded[1].deafen()
    there = await Far.connect(guarded[0], f"/ws?token={token()}")
    await there.say(type="join", room=guarded.room(1))
    await until(lambda: guarded[1].held)
    guarded[1].configure_auth(replace(AUTH, revoked=("b",)))
    guarded[1].release()
    assert await there.close_code() == CloseCode.UNAUTHORIZED
    there.close()


async def test_rates_that_were_used_are_used() -> None:
    async with homes(messages_per_s=1, message_burst=10) as made:
        there = await Far.connect(made[0])
        for number in range(6):
            await there.say(type="ping", id=str(number))
            assert (await there.hear())["id"] == str(number)
        await there.join(made.room(1), "b")
        assert made[0].moves() == MOVED
        for number in range(5):
            await there.say(type="ping", id=str(number))
        answers = [await there.hear() for _ in range(5)]
        assert [answer["type"] for answer in answers[:3]] == ["pong"] * 3
        assert answers[4]["code"] == "rate_limited"
        there.close()


async def test_times_and_missed_pings_go_along(two: Homes) -> None:
    there = await Far.connect(two[0])
    two[0].ahead = two[1].ahead = 26.0
    two[0].relay.tick(two[0].clock())
    assert await there.frame() == (PING, b"")
    await there.send(frame(PONG))
    await there.join(two.room(1), "b")
    two[1].ahead = 53.0
    two[1].relay.tick(two[1].clock())
    assert await there.frame() == (PING, b"")
    there.close()
    await until(lambda: gone_from(two, 1))
    first, bounds, _ = metrics.histogram("connection_duration_seconds")
    words = memoryview(two[1].slab).cast("Q")
    assert words[first + bounds.index(60.0)] == 1
