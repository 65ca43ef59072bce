"""What may come between any two steps of a move, and on whose side: one test for each that once went wrong."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import jwt
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fastsig import adoption, config
from fastsig._relay import Connection
from fastsig.bus_messages import Live
from fastsig.config import Auth
from fastsig.errors import CloseCode
from fastsig.hub import Request
from fastsig.passing import OFFERS
from fastsig.tracing import Tracer

from .issuing import SECRET
from .memory import CLOSE, TEXT, frame, frame_of
from .moving import Far, Home, Homes, homes, until

AUTH = Auth(keys=(f"secret:{SECRET}",), required=True)
GO_AWAY = b'{"type":"go-away"}'


@pytest.fixture
async def two() -> AsyncIterator[Homes]:
    async with homes() as made:
        yield made


@pytest.fixture(autouse=True)
def _closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also where a test fails nothing is left open."""
    ends: list[socket.socket] = []
    begin = Far.__init__

    def remember(far: Far, end: socket.socket) -> None:
        ends.append(end)
        begin(far, end)

    monkeypatch.setattr(Far, "__init__", remember)
    yield
    for end in ends:
        end.close()


def token(**claims: Any) -> str:
    now = time.time()
    return jwt.encode({"sub": "b", "iat": now, "exp": now + 3600} | claims, SECRET, "HS256")


async def joining(two: Homes, peer: str = "b", target: str = "/ws") -> Far:
    """Its descriptor is offered to a worker that has not heard of it yet."""
    two[1].deafen()
    there = await Far.connect(two[0], target)
    await there.say(type="join", room=two.room(1), sender=peer)
    await until(lambda: two[1].held)
    return there


def forget(home: Home) -> None:
    """What was held back is never heard."""
    for _, _, fds in home.held or ():
        for fd in fds:
            os.close(fd)
    home.held = None


async def fill(two: Homes) -> Callable[[], None]:
    """The way from the first to the second takes nothing more, until what this gives is called."""
    loop, link = asyncio.get_running_loop(), two.neighbour(1).link
    loop.remove_reader(link._end)
    word = b'{"type":"withdraw","request":0,"room":"%b","peer":"p"}' % (b"x" * 60000)
    while not two.neighbour(0).waiting_bytes:
        two.neighbour(0).say(word)
        two[0].relay()
    return lambda: loop.add_reader(link._end, link._receive)


async def accepted(two: Homes) -> Far:
    """The other worker has said that it would take it, which this one has not heard yet."""
    there = await joining(two)
    two[0].deafen()
    two[1].hear_one()
    await until(lambda: two[0].held)
    two[1].release()
    return there


async def test_one_that_is_told_something_in_the_turn_of_the_answer_stays(two: Homes) -> None:
    """A drain says `go-away` to all connections: their output is not empty until the end of the turn."""
    there = await accepted(two)
    (connection,) = two[0].connections()
    connection.send(GO_AWAY)
    two[0].release()
    assert "internal_errors_total" not in two[0].counted()
    assert (await there.hear())["type"] == "go-away"
    assert (await there.hear())["type"] == "joined"
    await until(lambda: not two[1].passing.stats()["offered"])
    there.close()


async def test_one_that_is_told_something_in_the_turn_in_which_the_way_is_lost_stays(two: Homes) -> None:
    fars = []
    two[1].deafen()
    for number in range(3):
        fars.append(await Far.connect(two[0]))
        await fars[-1].say(type="join", room=two.room(1), sender=f"p{number}")
    await until(lambda: two[0].passing.stats()["offers"] == 3)
    forget(two[1])
    two.neighbour(1).reset()
    for connection in two[0].connections():
        connection.send(GO_AWAY)
    two[0].on_lost(two.neighbour(0).link)  # as the mesh does, in that turn
    assert two[0].passing.stats()["offers"] == 0
    assert "internal_errors_total" not in two[0].counted()
    for far in fars:
        far.close()


async def test_one_whose_new_home_is_gone_before_it_is_told_is_taken_back(two: Homes) -> None:
    """Nothing can have touched it there: the answer came, and then the way ended, before the word that it is theirs."""
    there = await joining(two)
    two[1].hear_one()
    two[1].relay()  # the answer is on its way
    forget(two[1])
    two.neighbour(1).reset()  # at the bound, say: it holds no descriptor any more
    try:
        opcode, _ = await there.frame()
    except ConnectionResetError:
        opcode = 0
    assert opcode == TEXT, "served by nobody, and closed without a word"
    assert two[0].moves() == {"taken_back": 1}
    there.close()


async def test_connection_whose_close_comes_before_its_join_goes_on_is_no_member(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the kernel has is read as soon as there is a transport, a loop turn before the join is known there. A second
    join that waits is handled then; in a busy turn the rest is postponed; then the first one is made after all."""
    async with homes(auth=AUTH) as two:
        room = two.room(1)
        crowd = await Far.connect(two[1], f"/ws?token={token(sub='c')}")
        await crowd.join(two.room(1, 1), "c")
        (busy,) = two[1].connections()
        there = await Far.connect(two[0], f"/ws?token={token()}")
        data = frame_of(type="join", room=room) * 2 + frame_of(type="ping") * 3000
        go_on = await fill(two)
        await there.send(data)
        await until(lambda: two[0].counted().get("received_bytes_total") == len(data))
        made = adoption.Adopted.connection_made

        def read_at_once(adopted: adoption.Adopted, transport: Any) -> None:
            made(adopted, transport)
            # most of what may be done in one loop turn is done
            adoption.feed(busy.transport.get_protocol(), frame_of(type="ping") * 10600, busy)
            (connection,) = (found for found in two[1].connections() if found is not busy)
            adoption.feed(transport.get_protocol(), frame(CLOSE, b"\x03\xe8"), connection)

        monkeypatch.setattr(adoption.Adopted, "connection_made", read_at_once)
        go_on()
        heard = []
        while (found := await there.frame())[0] == TEXT:
            heard.append(found[1])
        joined = [text for text in heard if b'"pong"' not in text]
        there.close()
        crowd.close()
        await until(lambda: not two[1].relay.all_connections())
        assert two[1].relay.room_count == 0, "a member is left whose connection is gone"
        assert found == (CLOSE, b"\x03\xe8"), "it is probed, or replaced, by itself"
        assert len(joined) == 1


def trace(two: Homes) -> Any:
    """Both of them. Gives the names and results of the spans that have ended."""
    exporter = InMemorySpanExporter()
    for home in two.homes:
        home.hub.tracer = home.door.tracer = Tracer(config.build({}), home.place, SimpleSpanProcessor(exporter))
    return lambda: [
        (span.name, (span.attributes or {}).get("fastsig.result")) for span in exporter.get_finished_spans()
    ]


async def test_traced_one_that_closes_on_the_way_is_closed_as_it_asked(two: Homes) -> None:
    """What waits behind the join is handled before the tracer knows of the connection."""
    trace(two)
    there = await joining(two)
    await there.send(frame_of(type="join", room="other") + frame(CLOSE, b"\x03\xe8"))
    two[1].release()
    assert await there.close_code() == CloseCode.NORMAL
    assert "internal_errors_total" not in two[1].counted()
    there.close()


async def test_trace_of_one_whose_hand_over_cannot_be_said_is_not_of_one_that_moved(two: Homes) -> None:
    spans = trace(two)
    there = await accepted(two)
    go_on = await fill(two)
    two[0].release()
    go_on()
    assert (await there.hear())["type"] == "joined"
    assert two[0].moves() == {"taken_back": 1}
    assert [span for span in spans() if span[0] == "move"] == [("move", "taken_back")]
    there.close()


async def test_bug_of_the_adoption_costs_one_connection_and_leaves_nothing(
    two: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = await joining(two)

    def unpack(connection: Connection, live: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(two[1].hub, "unpack", unpack)
    two[1].release()
    await until(lambda: two[0].moves() == {"moved": 1})
    try:
        opcode, _ = await asyncio.wait_for(there.frame(), 2)
    except ConnectionResetError:
        opcode = 0
    assert opcode in (0, CLOSE)
    assert two[1].door.entrance.addresses.connections == 0
    there.close()


async def test_bug_of_an_offer_costs_one_connection(two: Homes, monkeypatch: pytest.MonkeyPatch) -> None:
    unread, calls = adoption.unread, []

    def fail_once(websocket: Any, place: int) -> bytes:
        calls.append(place)
        if len(calls) == 1:
            raise RuntimeError("a bug")
        return unread(websocket, place)

    monkeypatch.setattr(adoption, "unread", fail_once)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    fars = [await Far.connect(two[0]) for _ in range(3)]
    for far in fars:
        far.end.setblocking(True)
    for number, far in enumerate(fars):  # within one turn
        far.end.send(frame_of(type="join", room=two.room(1), sender=f"p{number}"))
        far.end.setblocking(False)
    await asyncio.sleep(0.3)
    assert two[0].passing.stats()["moves_waiting"] == 0, "those behind it wait for another join"
    for home in two.homes:
        home.ahead = 6.0
        home.hub.tick(home.clock())
    await fars[0].say(type="ping")
    heard = ""
    while heard != "pong":
        heard = (await asyncio.wait_for(fars[0].hear(), 2))["type"]
    for far in fars:
        far.close()


async def test_move_that_is_refused_is_not_a_limit_that_somebody_hit() -> None:
    """Nobody was refused anything: it is served where it is."""
    async with homes(connections_per_address=2) as two:
        there = [await Far.connect(two[1]), await Far.connect(two[1]), await Far.connect(two[0])]
        await there[2].join(two.room(1), "b")
        assert two[0].moves() == {"refused": 1}
        assert [name for name in two[1].counted() if name.startswith("limit_hits")] == []
        for far in there:
            far.close()


async def test_switched_off_those_that_wait_stay_too(two: Homes) -> None:
    two[1].deafen()
    fars = [await Far.connect(two[0]) for _ in range(OFFERS + 8)]
    for number, far in enumerate(fars):
        await far.say(type="join", room=two.room(1), sender=f"p{number}")
    await until(lambda: two[0].passing.stats()["moves_waiting"] == 8)
    two[0].passing.configure(may_move=False)
    two[1].release()
    for far in fars:
        assert (await far.hear())["type"] == "joined"
    assert two[0].moves()["moved"] <= OFFERS
    for far in fars:
        far.close()


async def test_queue_whose_way_is_full_is_not_packed_in_vain(two: Homes, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 3000 that wait, packing them every 5 ms is 95 % of a CPU (measured), just when the owner is too busy."""
    fars = [await Far.connect(two[0]) for _ in range(100)]
    go_on = await fill(two)
    packed: list[Request] = []
    pack = two[0].hub.pack

    def count(request: Request) -> Live | None:
        packed.append(request)
        return pack(request)

    monkeypatch.setattr(two[0].hub, "pack", count)
    for number, far in enumerate(fars):
        await far.say(type="join", room=two.room(1), sender=f"p{number}")
    await until(lambda: two[0].passing.stats()["moves_waiting"] == 100)
    await asyncio.sleep(0.2)
    vain = len(packed)
    go_on()
    for far in fars:
        assert (await far.hear())["type"] == "joined"
        far.close()
    assert vain < 200


async def test_limits_that_are_reloaded_on_the_way_hold_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last word and the first callback of its transport it is on no list."""
    async with homes(auth=AUTH, message_burst=100, messages_per_s=50) as two:
        there = await joining(two, target=f"/ws?token={token(fastsig={'limits': {'messages_per_s': 1}})}")
        two[1].hear_one()
        await until(lambda: two[1].held)
        two[1].release()
        two[1].limits = replace(two[1].limits, message_burst=5)
        two[1].configure_auth(AUTH)
        assert (await there.hear())["type"] == "joined"
        for _ in range(20):
            await there.say(type="ping")
        answers = [(await there.hear())["type"] for _ in range(20)]
        assert "error" in answers
        there.close()


async def test_one_that_comes_to_a_home_that_drains_is_told_to_go_and_waited_for(two: Homes) -> None:
    there = await joining(two)
    two[1].hear_one()
    await until(lambda: two[1].held)
    two[1].door.is_ready = False
    two[1].hub.rooms.is_draining = True
    late: list[Connection] = []
    two[1].passing.on_late = late.append
    two[1].hear_one()
    assert two[1].door.is_adopting
    assert (await there.hear())["code"] == "draining"
    assert (await there.hear())["payload"] == {"reason": "drain", "action": "reconnect", "delay_ms": [0, 0]}
    assert await there.close_code() == CloseCode.DRAIN
    assert len(late) == 1
    await until(lambda: not two[1].door.is_adopting)
    there.close()
