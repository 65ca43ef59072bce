"""Real clients against a real server: Python websockets, node ws, raw sockets, a browser's handshake."""

import asyncio
import http.client
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.e2e.conftest import EVERY_COUNT, TLS, Server

ANSWER_S = 5.0
MESSAGE_BYTES = 65536
WORKERS = (*EVERY_COUNT, TLS)

Message = dict[str, Any]


class Peer:
    """One WebSocket of the library `websockets` that speaks JSON."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket

    async def send(self, **message: Any) -> None:
        await self.websocket.send(json.dumps(message))

    async def receive_text(self) -> str:
        text = await asyncio.wait_for(self.websocket.recv(), ANSWER_S)
        assert isinstance(text, str)
        return text

    async def receive(self) -> Message:
        message: Message = json.loads(await self.receive_text())
        return message

    async def ask(self, **message: Any) -> Message:
        await self.send(**message)
        return await self.receive()

    async def join(self, room: str, sender: str, **payload: Any) -> Message:
        """Join, and the roster that comes back."""
        joined = await self.ask(type="join", room=room, sender=sender, **({"payload": payload} if payload else {}))
        assert (joined["type"], joined["room"], joined["sender"]) == ("joined", room, sender)
        roster: Message = joined["payload"]
        return roster

    async def hears_nothing(self) -> None:
        """Nothing has been sent to this peer before the answer to what it asks now."""
        assert await self.ask(type="ping", id="quiet") == {"type": "pong", "id": "quiet"}

    async def close_code(self) -> int:
        """Read to the end; the code that the server closed with (1006: none)."""
        try:
            async with asyncio.timeout(ANSWER_S):
                while True:
                    await self.websocket.recv()
        except ConnectionClosed as end:
            return end.rcvd.code if end.rcvd else 1006


@asynccontextmanager
async def peer(server: Server, **options: Any) -> AsyncIterator[Peer]:
    async with connect(server.url, proxy=None, ssl=server.trust, **options) as websocket:
        yield Peer(websocket)


@asynccontextmanager
async def peers_in(server: Server, room: str, *names: str) -> AsyncIterator[list[Peer]]:
    """Peers that have joined one after the other and have heard of each other."""
    async with AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(peer(server)) for _ in names]
        for at, name in enumerate(names):
            await peers[at].join(room, name)
            for earlier in peers[:at]:
                assert (await earlier.receive())["type"] == "peer-joined"
        yield peers


def _masked(opcode: int, payload: bytes, *, is_final: bool = True) -> bytes:
    """A frame as a client writes it (RFC 6455 §5.2), with the mask 0, so that it can be read in a dump."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + size.to_bytes(2, "big")
    return bytes([(0x80 if is_final else 0) | opcode]) + length + bytes(4) + payload


def _read_frame(stream: socket.SocketIO) -> tuple[int, bytes]:
    """One unfragmented, unmasked frame: opcode and payload."""

    def exactly(n: int) -> bytes:
        data = b""
        while len(data) < n:
            more = stream.read(n - len(data))
            assert more, "the server ended the connection inside a frame"
            data += more
        return data

    first, size = exactly(2)
    assert first & 0xF0 == 0x80, "final, no reserved bits"
    assert size < 0x80, "a server does not mask"
    if size >= 126:
        size = int.from_bytes(exactly(2 if size == 126 else 8), "big")
    return first & 0x0F, exactly(size)


# ---- the session of PROTOCOL §5


async def test_session_of_the_protocol_reads_as_it_is_printed_there(server: Server, room: str) -> None:
    async with peer(server) as one, peer(server) as two:
        await one.websocket.send(f'{{"type":"join","room":"{room}","sender":"client1"}}')
        joined = await one.receive_text()
        assert re.fullmatch(
            rf'{{"type":"joined","room":"{room}","sender":"client1","payload":{{"n":\d+,"peers":\[\]}}}}', joined
        )
        roster = await two.join(room, "client2")
        n = json.loads(joined)["payload"]["n"]
        assert roster["peers"] == [{"sender": "client1", "n": n, "meta": None}]
        assert roster["n"] > n, "the newcomer, who offers, has the higher n"
        assert await one.receive_text() == (
            f'{{"type":"peer-joined","room":"{room}","sender":"client2","payload":{{"n":{roster["n"]},"meta":null}}}}'
        )
        await two.websocket.send(
            f'{{"type":"offer","room":"{room}","sender":"client2","recipient":"client1",'
            '"payload":{"sdp":"example SDP data"}}'
        )
        assert await one.receive_text() == (
            f'{{"type":"offer","room":"{room}","sender":"client2","recipient":"client1",'
            '"payload":{"sdp":"example SDP data"}}'
        )


def test_session_with_the_node_client(server: Server, node: Path) -> None:
    run = subprocess.run(
        ["node", str(node / "session.js"), server.url],
        env=os.environ | {"NODE_TLS_REJECT_UNAUTHORIZED": "0", "NODE_NO_WARNINGS": "1"},
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    opened, *lines = map(json.loads, run.stdout.splitlines())
    assert opened == {"name": "client1", "protocol": "fastsig.v1.json", "extensions": ""}
    heard = [(line["name"], line["message"]["type"], line["isBinary"]) for line in lines]
    assert [line for line in heard if line[0] == "client1"] == [
        ("client1", "joined", False),
        ("client1", "peer-joined", False),
        ("client1", "offer", False),
        ("client1", "peer-left", False),
    ]
    assert ("client2", "joined", False) in heard
    offer = next(line["message"] for line in lines if line["message"]["type"] == "offer")
    assert (offer["sender"], offer["recipient"]) == ("client2", "client1")
    assert offer["payload"] == {"sdp": "example SDP data"}


# ---- who gets what


async def test_broadcast_reaches_all_others_and_is_not_echoed(server: Server, room: str) -> None:
    async with peers_in(server, room, "a", "b", "c") as (a, b, c):
        await a.send(type="message", room=room, payload={"text": "hé 🦊"}, id="m1")
        expected = {"type": "message", "room": room, "sender": "a", "payload": {"text": "hé 🦊"}, "id": "m1"}
        assert await b.receive() == expected
        assert await c.receive() == expected
        await a.hears_nothing()


async def test_list_of_recipients_reaches_those_named(server: Server, room: str) -> None:
    async with peers_in(server, room, "a", "b", "c", "d") as (a, b, c, d):
        await a.send(type="x-note", room=room, recipient=["b", "c"], payload=[1, 2.50, "three"])
        for other, name in ((b, "b"), (c, "c")):
            assert await other.receive() == {
                "type": "x-note",
                "room": room,
                "sender": "a",
                "recipient": name,
                "payload": [1, 2.5, "three"],
            }
        await d.hears_nothing()
        await a.hears_nothing()


async def test_absent_recipient_is_named_at_once_and_the_others_get_it(server: Server, room: str) -> None:
    async with peers_in(server, room, "a", "b") as (a, b):
        error = await a.ask(type="offer", room=room, recipient=["ghost", "b", "a"], payload={}, id="o1")
        assert error == {
            "type": "error",
            "code": "peer_unavailable",
            "message": error["message"],
            "retry": False,
            "id": "o1",
            "room": room,
            "recipients": ["ghost", "a"],
        }
        assert (await b.receive())["type"] == "offer"


async def test_message_before_the_join_is_refused(server: Server, room: str) -> None:
    async with peer(server) as one:
        error = await one.ask(type="message", room=room, sender="a", payload=1)
        assert (error["type"], error["code"], error["room"]) == ("error", "not_joined", room)


async def test_peer_that_left_is_gone_for_the_others(server: Server, room: str) -> None:
    async with peers_in(server, room, "a", "b") as (a, b):
        assert await b.ask(type="leave", room=room, id="l1") == {
            "type": "left",
            "room": room,
            "payload": {"reason": "left"},
            "id": "l1",
        }
        left = await a.receive()
        assert (left["type"], left["sender"], left["payload"]["reason"]) == ("peer-left", "b", "left")
        assert (await a.ask(type="message", room=room, recipient="b", payload=1))["code"] == "peer_unavailable"


async def test_lost_connection_is_told_to_the_others(server: Server, room: str) -> None:
    async with peers_in(server, room, "a", "b") as (a, b):
        b.websocket.transport.abort()
        left = await a.receive()
        assert (left["type"], left["sender"], left["payload"]["reason"]) == ("peer-left", "b", "lost")


async def test_ping_is_answered_with_its_id_and_payload(server: Server) -> None:
    async with peer(server) as one:
        pong = await one.ask(type="ping", id="p1", payload={"t": 1.5})
        assert pong == {"type": "pong", "id": "p1", "payload": {"t": 1.5}}


async def test_ping_frame_is_answered_with_its_payload(server: Server) -> None:
    async with peer(server) as one:
        await asyncio.wait_for(await one.websocket.ping(b"are you there"), ANSWER_S)


async def test_update_reaches_the_others_and_later_rosters(server: Server, room: str) -> None:
    async with peers_in(server, room, "a", "b") as (a, b), peer(server) as late:
        await a.send(type="update", room=room, payload={"meta": {"muted": True}})
        updated = await b.receive()
        assert (updated["type"], updated["sender"], updated["payload"]["meta"]) == (
            "peer-updated",
            "a",
            {"muted": True},
        )
        roster = await late.join(room, "late")
        assert [(other["sender"], other["meta"]) for other in roster["peers"]] == [("a", {"muted": True}), ("b", None)]


async def test_hello_grants_acks_and_says_the_limits(server: Server, room: str) -> None:
    async with peers_in(server, room, "a") as (a,), peer(server) as b:
        welcome = await b.ask(type="hello", sender="b", payload={"caps": ["ack", "seq"], "client": "test/1"})
        assert welcome["type"] == "welcome"
        payload = welcome["payload"]
        assert payload["caps"] == ["ack"]
        assert set(payload) == {"caps", "limits", "version", "server_time"}
        assert payload["limits"] == {"message_bytes": MESSAGE_BYTES, "messages_per_s": 50, "rooms": 16}
        assert abs(payload["server_time"] - time.time()) < 60
        await b.join(room, "b")
        assert (await a.receive())["type"] == "peer-joined"
        ack = await b.ask(type="message", room=room, payload="hi", id="m1")
        assert ack == {"type": "ack", "id": "m1", "payload": {"delivered": 1, "queued": 0}}
        assert (await a.receive())["payload"] == "hi"
        await b.send(type="message", room=room, payload="no id, no ack")
        await b.hears_nothing()


async def test_unknown_type_is_an_error_and_not_the_end(server: Server, room: str) -> None:
    async with peer(server) as one:
        assert (await one.ask(type="teleport", room=room))["code"] == "unknown_type"
        await one.websocket.send("{not json")
        assert (await one.receive())["code"] == "bad_json"
        await one.hears_nothing()


async def test_fragmented_message_is_one_message(server: Server, room: str) -> None:
    async with peers_in(server, room, "a", "b") as (a, b):
        text = json.dumps({"type": "message", "room": room, "payload": "é" * 500}, ensure_ascii=False)
        encoded = text.encode()
        middle = encoded.index("é".encode()) + 1  # in the middle of a character
        await a.websocket.send([encoded[:9], encoded[9:middle], b"", encoded[middle:]], text=True)
        assert (await b.receive())["payload"] == "é" * 500


# ---- what ends a connection


async def test_binary_frame_is_closed_1003(server: Server) -> None:
    async with peer(server) as one:
        await one.websocket.send(b'{"type":"ping"}')
        assert await one.close_code() == 1003


@pytest.mark.parametrize("text", [b'{"type":"\xff"}', b'{"type":"x-\xed\xa0\x80"}', b'{"a":"\xc3'])
async def test_invalid_utf8_is_closed_1007(server: Server, text: bytes) -> None:
    async with peer(server) as one:
        await one.websocket.send(text, text=True)
        assert await one.close_code() == 1007


async def test_message_at_the_limit_passes_and_above_it_is_closed_1009(server: Server, room: str) -> None:
    async with peers_in(server, room, "a", "b") as (a, b):
        frame = f'{{"type":"message","room":"{room}","payload":"%s"}}'
        padding = "p" * (MESSAGE_BYTES - len(frame) + 2)
        await a.websocket.send(frame % padding)
        assert (await b.receive())["payload"] == padding
        await a.websocket.send(frame % (padding + "p"))
        assert await a.close_code() == 1009
        assert (await b.receive())["payload"]["reason"] == "lost"


async def test_fragments_that_add_up_to_too_much_are_closed_1009(server: Server) -> None:
    async with peer(server) as one:
        with suppress(ConnectionClosed):  # whether the close is seen before the last fragment is sent is a race
            await one.websocket.send([b" " * 40_000] * 1000, text=True)
        assert await one.close_code() == 1009


async def test_clean_close_is_answered_in_kind(server: Server) -> None:
    async with peer(server) as one:
        await one.websocket.close(1000)
        assert one.websocket.close_code == 1000


async def test_localhost_is_both_address_families(serve: Callable[..., Server]) -> None:
    server = serve("--host", "localhost")
    for host in ("127.0.0.1", "[::1]"):
        async with connect(f"ws://{host}:{server.port}/ws", proxy=None) as websocket:
            await Peer(websocket).hears_nothing()


# ---- handshakes

FIREFOX = (
    "GET /ws HTTP/1.1\r\n"
    "Host: {host}\r\n"
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n"
    "Accept: */*\r\n"
    "Accept-Language: en-US,en;q=0.5\r\n"
    "Accept-Encoding: gzip, deflate, br, zstd\r\n"
    "Sec-WebSocket-Version: 13\r\n"
    "Origin: http://{host}\r\n"
    "Sec-WebSocket-Protocol: fastsig.v1.json\r\n"
    "Sec-WebSocket-Extensions: permessage-deflate\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"  # RFC 6455 §1.3
    "Connection: keep-alive, Upgrade\r\n"
    "Sec-Fetch-Dest: empty\r\n"
    "Sec-Fetch-Mode: websocket\r\n"
    "Sec-Fetch-Site: same-origin\r\n"
    "Pragma: no-cache\r\n"
    "Cache-Control: no-cache\r\n"
    "Upgrade: websocket\r\n"
    "\r\n"
)


def _read_head(stream: socket.SocketIO) -> tuple[str, dict[str, str]]:
    """The status line and the headers of an answer, byte by byte: what follows is not touched."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = stream.read(1)
        assert byte, f"the connection ended after {head!r}"
        head += byte
    status, *lines = head.decode("ascii").split("\r\n")[:-2]
    return status, {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("piece", [10_000, 7], ids=["at once", "in pieces"])
def test_handshake_of_firefox(server: Server, room: str, piece: int) -> None:
    request = FIREFOX.format(host=f"127.0.0.1:{server.port}").encode("ascii")
    with server.dial(ANSWER_S) as raw, raw.makefile("rb", 0) as stream:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(request), piece):
            raw.sendall(request[at : at + piece])
        status, headers = _read_head(stream)
        assert status == "HTTP/1.1 101 Switching Protocols"
        assert headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert headers["sec-websocket-protocol"] == "fastsig.v1.json"
        assert headers["upgrade"].lower() == "websocket"
        assert headers["connection"].lower() == "upgrade"
        assert "sec-websocket-extensions" not in headers
        raw.sendall(_masked(1, json.dumps({"type": "join", "room": room, "sender": "fox"}).encode()))
        opcode, payload = _read_frame(stream)
        assert (opcode, json.loads(payload)["type"]) == (1, "joined")
        raw.sendall(_masked(8, (1000).to_bytes(2, "big")))
        assert _read_frame(stream) == (8, (1000).to_bytes(2, "big"))
        assert stream.read(1) == b"", "the server ends the connection after the close"


def test_first_message_may_come_with_the_handshake(server: Server, room: str) -> None:
    request = FIREFOX.format(host=f"127.0.0.1:{server.port}").encode("ascii")
    join = _masked(1, json.dumps({"type": "join", "room": room, "sender": "fox"}).encode())
    with server.dial(ANSWER_S) as raw, raw.makefile("rb", 0) as stream:
        raw.sendall(request + join)
        assert _read_head(stream)[0].startswith("HTTP/1.1 101 ")
        assert json.loads(_read_frame(stream)[1])["type"] == "joined"


def test_half_a_message_and_a_lost_client_leave_nobody_behind(server: Server, room: str) -> None:
    request = FIREFOX.format(host=f"127.0.0.1:{server.port}").encode("ascii")
    join = json.dumps({"type": "join", "room": room, "sender": "fox"}).encode()
    with server.dial(ANSWER_S) as raw:
        raw.sendall(request + _masked(1, join) + _masked(1, b'{"type":"mess', is_final=False))
    with server.dial(ANSWER_S) as raw, raw.makefile("rb", 0) as stream:
        raw.sendall(request)
        assert _read_head(stream)[0].startswith("HTTP/1.1 101 ")
        deadline = time.monotonic() + ANSWER_S
        answer: Message = {}
        while answer.get("type") != "joined" and time.monotonic() < deadline:
            raw.sendall(_masked(1, join))
            answer = json.loads(_read_frame(stream)[1])
        assert answer["payload"]["peers"] == []


@pytest.mark.parametrize("offered", [["chat"], ["bearer.abc"], ["fastsig.v2.json", "chat"]])
async def test_only_unknown_subprotocols_are_refused_before_the_upgrade(server: Server, offered: list[str]) -> None:
    with pytest.raises(InvalidStatus) as refusal:
        async with peer(server, subprotocols=offered):
            pass
    assert refusal.value.response.status_code == 400


async def test_known_subprotocol_is_chosen_and_compression_is_not(server: Server) -> None:
    async with peer(server, subprotocols=["chat", "fastsig.v1.json"], compression="deflate") as one:
        assert one.websocket.subprotocol == "fastsig.v1.json"
        assert one.websocket.protocol.extensions == []


# ---- plain HTTP on the public port


def _request(server: Server, method: str, path: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.sock = server.dial(ANSWER_S)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/livez", "/readyz"])
def test_health_is_answered_on_the_public_port(server: Server, path: str) -> None:
    assert _request(server, "GET", path)[0] == 200


@pytest.mark.parametrize("path", ["/", "/health", "/health/live/", "/wsx", "/metrics"])
def test_other_path_is_404_with_one_json_error(server: Server, path: str) -> None:
    status, headers, body = _request(server, "GET", path)
    assert status == 404
    assert headers["content-type"].startswith("application/json")
    error = json.loads(body)
    assert error["type"] == "error"
    assert isinstance(error["code"], str)
    assert error["retry"] is False


@pytest.mark.parametrize("path", ["/ws", "/health/live"])
def test_other_method_is_405_and_the_right_one_is_named(server: Server, path: str) -> None:
    status, headers, body = _request(server, "DELETE", path)
    assert status == 405
    assert "GET" in headers["allow"]
    assert json.loads(body)["type"] == "error"


def test_websocket_path_without_an_upgrade_is_400(server: Server) -> None:
    assert _request(server, "GET", "/ws")[0] == 400


# ---- crowds

FREE = ("--limits.connects-per-s-per-address", "0", "--limits.connects-per-s", "0")


async def _crowd(stack: AsyncExitStack, server: Server, size: int) -> list[Peer]:
    """Many connections, opened fifty at a time."""

    async def one() -> Peer:
        # nothing is compressed and nothing kept alive: what is measured is the server
        options: dict[str, Any] = {"compression": None, "ping_interval": None, "max_queue": None}
        return Peer(await connect(server.url, proxy=None, **options))

    peers: list[Peer] = []
    while len(peers) < size:
        peers += await asyncio.gather(*(one() for _ in range(min(50, size - len(peers)))))
    for member in peers:
        stack.push_async_callback(member.websocket.close)
    return peers


async def _all_answer(crowd: Iterable[Peer]) -> None:
    """Nobody was closed: every connection still answers a ping frame."""
    async with asyncio.timeout(ANSWER_S):
        for pong in [await member.websocket.ping() for member in crowd]:
            await pong


@pytest.mark.parametrize("workers", EVERY_COUNT)
async def test_three_hundred_senders_close_nobody(serve: Callable[..., Server], workers: int) -> None:
    """300 senders × 16 messages of 2.5 KB to one peer that reads: all arrive, each sender's in order."""
    senders, each, payload = 300, 16, "p" * 2500
    server = serve(*FREE, "--workers", str(workers))
    async with AsyncExitStack() as stack:
        reader, *crowd = await _crowd(stack, server, senders + 1)
        await reader.join("fan-in", "reader")

        async def send(number: int, sender: Peer) -> None:
            assert (await sender.ask(type="join", room="fan-in", sender=f"s{number}"))["type"] == "joined"
            for at in range(each):
                await sender.send(type="message", room="fan-in", recipient="reader", payload=[at, payload])

        began = time.monotonic()
        async with asyncio.timeout(40), asyncio.TaskGroup() as group:
            for number, sender in enumerate(crowd):
                group.create_task(send(number, sender))
            seen: dict[str, list[int]] = {}
            while sum(map(len, seen.values())) < senders * each:
                message = json.loads(await reader.websocket.recv())
                if message["type"] == "message":
                    seen.setdefault(message["sender"], []).append(message["payload"][0])
        took = time.monotonic() - began
        assert set(map(tuple, seen.values())) == {tuple(range(each))}
        assert len(seen) == senders
        await _all_answer([reader, *crowd])
        print(f"fan-in: {senders * each} messages of 2.5 KB to one peer in {took:.2f} s, nobody closed")


@pytest.mark.parametrize("workers", [1, 4])
async def test_room_of_512_joined_at_once(serve: Callable[..., Server], workers: int) -> None:
    """All with 1 KiB of metadata: everybody gets in, hears of everybody, and nobody is closed."""
    size = 512
    server = serve(*FREE, "--workers", str(workers))
    meta = "m" * 1022  # with its quotes 1,024 bytes
    async with AsyncExitStack() as stack:
        crowd = await _crowd(stack, server, size)
        rosters: list[int] = []

        async def join(number: int, member: Peer) -> None:
            await member.send(type="join", room="hall", sender=f"p{number}", payload={"meta": meta})
            joined: Message = json.loads(await member.websocket.recv())
            assert joined["type"] == "joined"
            known = len(joined["payload"]["peers"])
            rosters.append(known)
            for _ in range(size - 1 - known):
                assert '"type":"peer-joined"' in str(await member.websocket.recv())[:30]

        began = time.monotonic()
        async with asyncio.timeout(50), asyncio.TaskGroup() as group:
            for number, member in enumerate(crowd):
                group.create_task(join(number, member))
        took = time.monotonic() - began
        assert sorted(rosters) == list(range(size))
        await _all_answer(crowd)
        full = await _crowd(stack, server, 1)
        assert (await full[0].ask(type="join", room="hall", sender="too many"))["code"] == "room_full"
        print(
            f"room: {size} peers with 1 KiB of metadata joined and heard of each other in {took:.2f} s, nobody closed"
        )
