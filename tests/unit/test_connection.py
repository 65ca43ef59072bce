"""The HTTP edge: what a request head is, and what it opens. No sockets."""

import json
import os
from typing import Any, cast

import pytest

from fastsig.adoption import picows_log
from fastsig.connection import HEAD_BYTES, Edge, accept_key, read_head
from fastsig.errors import HttpError

from .memory import HEAD, PING, PONG, TEXT, Client, Host, frame, parse_frames

HERE = ("127.0.0.1", 1)

FIREFOX = (
    b"GET /ws HTTP/1.1\r\nHost: localhost:8080\r\n"
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\nAccept: */*\r\n"
    b"Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br, zstd\r\nSec-WebSocket-Version: 13\r\n"
    b"Origin: http://localhost:8080\r\nSec-WebSocket-Extensions: permessage-deflate\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nConnection: keep-alive, Upgrade\r\nSec-Fetch-Dest: empty\r\n"
    b"Sec-Fetch-Mode: websocket\r\nSec-Fetch-Site: same-origin\r\nPragma: no-cache\r\nCache-Control: no-cache\r\n"
    b"Upgrade: websocket\r\n\r\n"
)


@pytest.fixture
async def host() -> Host:
    return Host()


def ask(host: Host, data: bytes) -> tuple[int, str, dict[str, str], Client]:
    client = host.accept()
    client.feed(data)
    head, _, body = client.take_bytes().decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(status.split(" ")[1]), body, headers, client


async def test_firefox_is_welcome(host: Host) -> None:
    status, _, headers, _ = ask(host, FIREFOX)
    assert status == 101
    assert headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 §1.3
    assert "sec-websocket-extensions" not in headers


async def test_head_in_single_bytes_and_frames_pipelined_behind_it(host: Host) -> None:
    client = host.accept()
    join = frame(TEXT, json.dumps({"type": "join", "room": "r", "sender": "a"}))
    head = HEAD.format(target="/ws?room=r%20%C3%BC").encode()
    for byte in head[:-3]:
        client.feed(bytes([byte]))
    client.feed(head[-3:] + join + frame(TEXT, '{"type":"ping"}') + frame(TEXT, '{"type":"ping"')[:-3])
    answer, _, frames = client.take_bytes().partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert frames.count(b'"type":"joined"') == frames.count(b'"type":"pong"') == 1


@pytest.mark.parametrize("target", ["/ws", "/echo"])
async def test_frames_pipelined_behind_the_head_arrive_however_the_bytes_are_split(host: Host, target: str) -> None:
    data = HEAD.format(target=target).encode() + frame(TEXT, '{"type":"ping"}') + frame(PING, b"?")
    answers = set()
    for cut in range(1, len(data)):
        client = host.accept(peername=HERE)
        client.feed(data[:cut])
        client.feed(data[cut:])
        answers.add(client.take_bytes().partition(b"\r\n\r\n")[2])
        client.vanish()
    (answer,) = answers
    assert [opcode for opcode, _ in parse_frames(answer)] == [TEXT, PONG]


async def test_many_messages_pipelined_behind_the_head_are_all_handled(host: Host) -> None:
    other = host.join("other")
    client = host.accept()
    messages = frame(TEXT, json.dumps({"type": "join", "room": "r", "sender": "a"})) + b"".join(
        frame(TEXT, json.dumps({"type": "message", "room": "r", "id": str(i), "payload": "x" * 1000}))
        for i in range(100)
    )
    client.feed(HEAD.format(target="/ws").encode() + messages)
    assert [m.get("id") for m in other.take()] == [None, *map(str, range(100))]


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/livez", "/readyz"])
async def test_health_is_answered_on_the_public_port(host: Host, path: str) -> None:
    status, body, headers, client = ask(host, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (status, body, headers["connection"]) == (200, "OK\n", "close")
    assert client.is_shut()
    host.door.is_ready = False
    status, _, _, _ = ask(host, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert status == (503 if "ready" in path else 200)


SECRET = "sup3rsecret"


def _head(old: str, new: str) -> str:
    return HEAD.format(target="/ws").replace(old, new)


REFUSED = {
    "another path": (f"GET /{SECRET} HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "another method": (f"POST /ws?{SECRET} HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "head as a method": ("HEAD /health/live HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "plain get": (f"GET /ws?{SECRET} HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "HTTP/1.0": ("GET /ws HTTP/1.0\r\nHost: x\r\n\r\n", 400),
    "no version": ("GET /ws\r\nHost: x\r\n\r\n", 400),
    "HTTP/2 preface": ("PRI * HTTP/2.0\r\n\r\n", 400),
    "no host": ("GET /ws HTTP/1.1\r\n\r\n", 400),
    "two hosts": ("GET /ws HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    "HTTP/0.9": ("GET /ws\r\n\r\n", 400),
    "HTTP/1.2": ("GET /ws HTTP/1.2\r\nHost: x\r\n\r\n", 400),
    "lower case version": ("GET /ws http/1.1\r\nHost: x\r\n\r\n", 400),
    "lower case method": ("get /ws HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "two spaces": ("GET  /ws HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "tabs": ("GET\t/ws\tHTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "asterisk": ("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "connect": ("CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "method not ASCII": ("GÉT /ws HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "NUL in the target": (f"GET /ws?\0{SECRET} HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "NUL in a name": (f"GET /ws HTTP/1.1\r\nHost: x\r\nA\0{SECRET}: y\r\n\r\n", 400),
    "nothing but an end": ("\r\n\r\n", 400),
    "a TLS hello": ("\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", 400),
    "bare carriage return": (f"GET /ws HTTP/1.1\r\nHost: x\rA: {SECRET}\r\n\r\n", 400),
    "name not ASCII": (f"GET /ws HTTP/1.1\r\nHost: x\r\nÀ{SECRET}: y\r\n\r\n", 400),
    "name empty": (f"GET /ws HTTP/1.1\r\nHost: x\r\n: {SECRET}\r\n\r\n", 400),
    "length empty": ("GET /ws HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n", 400),
    "length with a sign": ("GET /ws HTTP/1.1\r\nHost: x\r\nContent-Length: +0\r\n\r\n", 400),
    "length as a list": ("GET /ws HTTP/1.1\r\nHost: x\r\nContent-Length: 0, 0\r\n\r\n", 400),
    "length and chunked": ("GET /ws HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nTransfer-Encoding: x\r\n\r\n", 400),
    "body announced": ("GET /ws HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n", 400),
    "two lengths": ("GET /ws HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n", 400),
    "chunked": ("GET /ws HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "white space before a colon": (f"GET /ws HTTP/1.1\r\nHost: x\r\n{SECRET} : y\r\n\r\n", 400),
    "folded header": (f"GET /ws HTTP/1.1\r\nHost: x\r\n {SECRET}\r\n\r\n", 400),
    "line without a colon": (f"GET /ws HTTP/1.1\r\nHost: x\r\n{SECRET}\r\n\r\n", 400),
    "control character": (f"GET /ws HTTP/1.1\r\nHost: x\r\nA: {SECRET}\0\r\n\r\n", 400),
    "bare line feed": (f"GET /ws HTTP/1.1\r\nHost: x\nA: {SECRET}\r\n\r\n", 400),
    "target not ASCII": ("GET /wsü HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "absolute target": ("GET http://x/ws HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "too many headers": ("GET /ws HTTP/1.1\r\nHost: x\r\n" + "A: b\r\n" * 200 + "\r\n", 400),
    "head too long": ("GET /ws HTTP/1.1\r\nHost: x\r\nA: " + SECRET * 2000, 400),
    "room not UTF-8": (HEAD.format(target="/ws?room=%ff"), 400),
    "no key": (_head("dGhlIHNhbXBsZSBub25jZQ==", ""), 400),
    "short key": (_head("dGhlIHNhbXBsZSBub25jZQ==", "AAAA"), 400),
    "two keys": (_head("Upgrade: w", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nUpgrade: w"), 400),
    "key not ASCII": (_head("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jé=="), 400),
    "key not base64": (_head("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhb*BsZSBub25jZQ=="), 400),
    "long key": (_head("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZWFi"), 400),
    "two versions": (_head("Upgrade: w", "Sec-WebSocket-Version: 13\r\nUpgrade: w"), 400),
    "versions as a list": (_head("Version: 13", "Version: 13, 8"), 400),
    "upgrade not ASCII": (_head("Upgrade: websocket", f"Upgrade: wébsocket{SECRET}"), 400),
    "connection not ASCII": (_head("Connection: Upgrade", f"Connection: Üpgrade{SECRET}"), 400),
    "subprotocol not ASCII": (_head("Upgrade: w", f"Sec-WebSocket-Protocol: é{SECRET}\r\nUpgrade: w"), 400),
    "echo from who knows where": (HEAD.format(target=f"/echo?{SECRET}"), 403),
    "version 8": (_head("Version: 13", "Version: 8"), 400),
    "version not ASCII": (_head("Version: 13", "Version: é"), 400),
    "no upgrade": (_head("Upgrade: websocket", f"Upgrade: {SECRET}"), 400),
    "connection without upgrade": (_head("Connection: Upgrade", "Connection: keep-alive"), 400),
    "unknown subprotocol": (_head("Upgrade: w", f"Sec-WebSocket-Protocol: {SECRET}\r\nUpgrade: w"), 400),
    "token alone": (_head("Upgrade: w", f"Sec-WebSocket-Protocol: bearer.{SECRET}\r\nUpgrade: w"), 400),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
async def test_refusal_is_one_json_error_that_echoes_nothing(host: Host, what: str) -> None:
    text, expected = REFUSED[what]
    status, body, headers, client = ask(host, text.encode())
    error = json.loads(body)
    assert status == expected
    assert error["type"] == "error"
    assert set(error) == {"type", "code", "message", "retry"}
    assert headers["connection"] == "close"
    assert int(headers["content-length"]) == len(body)
    assert SECRET not in body + str(headers)
    assert ("allow" in headers) == (status == 405)
    assert client.is_shut()
    client.feed(b"x" * 100_000)  # read and thrown away
    assert client.take_bytes() == b""
    host.advance(2.5)
    assert client.is_gone()
    assert host.relay.connections == 0


SECOND = HEAD.format(target="/ws").encode() + frame(TEXT, '{"type":"ping"}')


@pytest.mark.parametrize(
    "first",
    [
        b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /ws HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(SECOND),
        b"POST /ws HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /ws HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_nothing_behind_an_answer_is_answered(host: Host, first: bytes) -> None:
    for parts in ([first + SECOND], [first, SECOND], [first[:-1], first[-1:] + SECOND]):
        client = host.accept()
        for part in parts:
            client.feed(part)
        assert client.take_bytes().count(b"HTTP/1.1 ") == 1
        assert client.is_shut()
    assert host.counted().get("connections", 0) == 0


async def test_second_request_behind_an_upgrade_is_a_broken_frame(host: Host) -> None:
    client = host.accept()
    client.feed(HEAD.format(target="/ws").encode() * 2)
    answer, _, frames = client.take_bytes().partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert parse_frames(frames) == [(8, b"\x03\xea")]


async def test_head_that_dribbles_or_stops_anywhere_is_dropped_after_ten_seconds(host: Host) -> None:
    head = HEAD.format(target="/ws").encode()
    clients = [host.accept() for _ in range(0, len(head), 7)]
    for client, end in zip(clients, range(0, len(head), 7), strict=True):
        client.feed(head[:end])
    dribbling = host.accept()
    for byte in head[:42]:
        host.advance(0.25)
        dribbling.feed(bytes([byte]))
    assert all(client.is_gone() and client.take_bytes() == b"" for client in [*clients, dribbling])
    assert host.relay.connections == 0


@pytest.mark.parametrize("name", ["Origin", "User-Agent", "Cookie", "Authorization", "X-Any"])
async def test_values_beyond_ascii_in_headers_that_mean_nothing_here_are_no_reason_to_refuse(
    host: Host, name: str
) -> None:
    head = HEAD.format(target="/ws").encode().replace(b"Upgrade: w", name.encode() + b": \xff\xfe\x80\r\nUpgrade: w")
    assert ask(host, head)[0] == 101


@pytest.mark.parametrize(
    ("peername", "header", "expected"),
    [
        (("127.0.0.1", 1), "", 101),
        (("127.8.9.1", 1), "", 101),
        (("::1", 1, 0, 0), "", 101),
        (("::ffff:127.0.0.1", 1, 0, 0), "", 101),
        (("192.0.2.1", 1), "", 403),
        (("::ffff:192.0.2.1", 1, 0, 0), "", 403),
        (("fe80::1%lo", 1, 0, 1), "", 403),
        ("", "", 403),
        (None, "", 403),
        (("127.0.0.1", 1), "X-Forwarded-For: 127.0.0.1", 403),
        (("127.0.0.1", 1), "x-forwarded-proto: https", 403),
        (("::1", 1, 0, 0), "Forwarded: for=127.0.0.1", 403),
        (("127.0.0.1", 1), "X-Real-IP:", 403),
        (("127.0.0.1", 1), "Via: 1.1 somebody", 403),
    ],
)
async def test_echo_is_for_this_machine_alone(host: Host, peername: object, header: str, expected: int) -> None:
    client = host.accept(peername=peername)
    client.feed(HEAD.format(target="/echo").replace("Host", f"{header}\r\nHost" if header else "Host").encode())
    assert client.take_bytes().startswith(b"HTTP/1.1 %d " % expected)


async def test_without_an_echo_path_there_is_none(host: Host) -> None:
    host.door.echo_path = ""
    client = host.accept(peername=HERE)
    client.feed(HEAD.format(target="/echo").encode())
    assert client.take_bytes().startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("offer", ["fastsig.v1.json", "other, fastsig.v1.json"])
async def test_subprotocol_is_chosen_when_it_is_offered(host: Host, offer: str) -> None:
    head = HEAD.format(target="/ws").replace("Upgrade: w", f"Sec-WebSocket-Protocol: {offer}\r\nUpgrade: w")
    status, _, headers, _ = ask(host, head.encode())
    assert (status, headers["sec-websocket-protocol"]) == (101, "fastsig.v1.json")


async def test_no_upgrades_while_draining(host: Host) -> None:
    host.door.is_ready = False
    status, _, headers, _ = ask(host, HEAD.format(target="/ws").encode())
    assert (status, headers["retry-after"]) == (503, "5")


async def test_peer_that_goes_away_in_the_handshake_leaves_nothing(host: Host) -> None:
    client = host.accept()
    client.feed(b"GET / HT")
    client.vanish()
    assert host.relay.connections == 0


def test_header_names_are_case_insensitive_and_lists_may_span_lines() -> None:
    head = read_head(
        b"GET /ws HTTP/1.1\r\nhOsT:x\r\nConnection: keep-alive\r\nCONNECTION:\tUPGRADE ,\r\nupgrade: WebSocket"
    )
    assert head.tokens("connection") == ["keep-alive", "UPGRADE"]
    assert head.one("host") == "x"
    with pytest.raises(HttpError, match="version 13"):
        accept_key(head)


def test_longest_head_that_is_read_is_the_documented_one() -> None:
    assert HEAD_BYTES == 16384


class Blocked:
    """A connection whose socket is full, as far as the edge looks at one."""

    def __init__(self, fd: int) -> None:
        self.transport = self
        self.tries = 0
        self._fd = fd

    def get_extra_info(self, name: str) -> "Blocked":
        return self

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> None:
        self.tries += 1


class Watcher:
    """The part of a loop that the edge uses."""

    def __init__(self) -> None:
        self.watched: set[int] = set()
        self.is_full = False

    def add_writer(self, fd: int, callback: object) -> None:
        if self.is_full:
            raise OSError(28, "no room for another watch")
        self.watched.add(fd)

    def remove_writer(self, fd: int) -> None:
        self.watched.remove(fd)


@pytest.mark.parametrize("what", ["no descriptor", "no watch"])
def test_socket_that_cannot_be_watched_is_tried_by_the_clock(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptor(fd: int) -> int:
        raise OSError(24, "too many open files")

    watcher, connection = Watcher(), Blocked(0)
    edge: Any = Edge(cast(Any, watcher))
    with monkeypatch.context() as patch:
        if what == "no descriptor":
            patch.setattr("os.dup", no_descriptor)
        watcher.is_full = True
        edge.block(connection)
    edge.retry()
    edge.retry()
    assert connection.tries == 2
    edge.unblock(connection)
    edge.retry()
    assert connection.tries == 2
    watcher.is_full = False
    edge.block(connection)
    (fd,) = watcher.watched
    assert fd != 0, "the transport's own descriptor is not watched"
    edge.retry()
    assert connection.tries == 2
    edge.unblock(connection)
    assert not watcher.watched
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# ---- bugs


async def test_bug_in_a_request_is_answered_with_503_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host()
    monkeypatch.setattr(host.door, "answer", lambda *_: 1 / 0)
    client = host.accept()
    client.feed(HEAD.format(target="/ws").encode())
    assert client.take_bytes().startswith(b"HTTP/1.1 503 ") and client.is_shut()
    assert "ZeroDivisionError" in capsys.readouterr().err
    counted = host.counted()
    assert counted["internal_errors_total"] == counted['handshakes_total{result="internal"}'] == 1


async def test_bug_that_picows_met_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    host = Host()
    said = picows_log(host.relay)
    said.exception("a bug in %s", "picows")
    said.warning("a peer's mistake")
    assert "part=picows" in capsys.readouterr().err
    assert host.counted() == {"internal_errors_total": 1}
