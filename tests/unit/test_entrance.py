"""The entrance: who is charged for a connection, what a refusal looks like, origins, PROXY headers on real sockets."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from fastsig import logs
from fastsig._relay import Connection
from fastsig.config import Config, Limits, Log, Server, split_origin
from fastsig.connection import Handshake
from fastsig.entrance import SAME_ADDRESS, Entrance, Guest, Origins
from fastsig.errors import HttpError
from fastsig.proxies import V2_BYTES

from .memory import CLOSE, HEAD, TEXT, Client, Host, parse_frames

WS = HEAD.format(target="/ws")
HERE, THERE = ("192.0.2.1", 1), ("192.0.2.2", 1)
PROXY = ("10.0.0.1", 1)
PROXIES = Server(trusted_proxies=("10.0.0.0/8", "::1/128"))
PATHS = ("/health/live", "/health/ready", "/livez", "/readyz")


_asked: list[Client] = []  # nothing else holds them: they would vanish at the whim of the garbage collector


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    _asked.clear()


def ask(host: Host, peername: object = HERE, *headers: str, head: str = WS) -> tuple[int, dict[str, Any], str, Client]:
    """The status of the answer, its JSON if that is what it is, and its head."""
    client = host.accept(peername=peername)
    _asked.append(client)
    client.feed(head.replace("\r\n\r\n", "".join(f"\r\n{line}" for line in headers) + "\r\n\r\n").encode())
    answer, _, body = client.take_bytes().partition(b"\r\n\r\n")
    text = answer.decode()
    return int(text.split(" ")[1]), json.loads(body) if body.startswith(b"{") else {}, text.lower(), client


def statuses(host: Host, count: int, peername: object = HERE, *headers: str) -> list[int]:
    return [ask(host, peername, *headers)[0] for _ in range(count)]


# ---- limits


async def test_address_that_connects_too_often_is_told_when_to_try_again() -> None:
    host = Host(connects_per_s_per_address=1)
    assert statuses(host, 5) == [101] * 5
    status, error, head, client = ask(host)
    assert (status, error["code"], error["retry"]) == (429, "rate_limited", True)
    assert 0 < error["after_ms"] <= 1000
    assert "retry-after: 1\r\n" in head + "\r\n"
    assert client.is_shut()
    assert statuses(host, 5, THERE) == [101] * 5
    host.now += 2
    assert statuses(host, 3) == [101, 101, 429]
    assert host.counted()['limit_hits_total{limit="connects_per_s_per_address",mode="enforced"}'] == 2
    assert host.counted()['handshakes_total{result="rate_limited"}'] == 2


async def test_limits_of_the_worker_are_the_servers_own_fault() -> None:
    host = Host(connects_per_s=1)
    assert statuses(host, 5) == [101] * 5
    status, error, head, _ = ask(host, THERE)
    assert (status, error["code"], error["retry"]) == (503, "limit_exceeded", True)
    assert "retry-after: 1" in head
    host = Host(connections=2)
    assert statuses(host, 3) == [101, 101, 503]
    assert host.counted()['limit_hits_total{limit="connections",mode="enforced"}'] == 1


@pytest.mark.parametrize("path", PATHS)
async def test_health_is_answered_whatever_the_limits_say(path: str) -> None:
    host = Host(connects_per_s_per_address=1, connections_per_address=1, connects_per_s=1, connections=1)
    assert statuses(host, 20).count(101) == 1
    assert ask(host, head=f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200


@pytest.mark.parametrize("path", ["/", "/ws", "/livez/", "/echo"])
async def test_every_other_request_counts(path: str) -> None:
    host = Host(connects_per_s_per_address=1)
    assert 429 not in [ask(host, head=f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")[0] for _ in range(5)]
    assert ask(host, head=f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 429


def close_all(host: Host, _: Client) -> None:
    for connection in host.relay.all_connections():
        connection.send_close(4000)


ENDS: dict[str, Callable[[Host, Client], None]] = {
    "the peer vanishes": lambda _, client: client.vanish(),
    "the peer closes": lambda _, client: client.feed(b"\x88\x80\0\0\0\0"),
    "it is closed": close_all,
    "nothing is joined in time": lambda host, _: host.advance(70),
}


@pytest.mark.parametrize("end", ENDS)
async def test_place_of_a_connection_is_free_again_once(end: str) -> None:
    host = Host(connections_per_address=1, connections=1)
    status, _, _, client = ask(host)
    assert (status, ask(host)[0], host.door.entrance.addresses.connections) == (101, 503, 1)
    ENDS[end](host, client)
    host.advance(3)
    if not client.is_gone():
        client.vanish()
    assert host.door.entrance.addresses.connections == 0
    assert statuses(host, 2) == [101, 503]


async def test_place_is_taken_from_the_acceptance_on_and_free_after_a_handshake_that_fails() -> None:
    host = Host(connections_per_address=2)
    half_open = host.accept(peername=HERE)
    assert ask(host, head="GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 404
    assert statuses(host, 1) == [503]
    host.advance(15)
    assert half_open.is_gone()
    assert host.door.entrance.addresses.connections == 0


async def test_refused_take_no_place() -> None:
    host = Host(connections_per_address=2)
    assert statuses(host, 50) == [101, 101, *([503] * 48)]
    assert host.door.entrance.addresses.connections == 2


def pass_on(host: Host) -> list[Handshake]:
    """Every handshake that names a room waits for another worker, in this list."""
    waiting: list[Handshake] = []

    def offer(handshake: Handshake, *_: object) -> bool:
        waiting.append(handshake)
        return True

    host.door.pass_on = offer
    return waiting


async def test_refused_who_say_nothing_are_gone_in_a_second() -> None:
    """They count nowhere: at ten seconds each there would be as many as can connect in that time."""
    host = Host(connections_per_address=2)
    silent = [host.accept(peername=HERE) for _ in range(50)]
    host.advance(2)
    assert [client.is_gone() for client in silent] == [False] * 2 + [True] * 48
    host.advance(10)
    assert all(client.is_gone() for client in silent)


async def test_connection_that_another_worker_takes_over_gives_its_place_up_here() -> None:
    host = Host(connections_per_address=1)
    waiting = pass_on(host)
    client = host.accept(peername=HERE)
    client.feed(HEAD.format(target="/ws?room=r").encode())
    (handshake,) = waiting
    assert (handshake.address, host.door.entrance.addresses.connections) == ("192.0.2.1", 1)
    handshake.let_go()
    host.run()
    assert host.door.entrance.addresses.connections == 0
    host.door.pass_on = None
    assert statuses(host, 2) == [101, 503]


async def test_connection_that_was_passed_is_counted_but_not_charged_for_coming() -> None:
    entrance = Host(connections_per_address=2, connects_per_s_per_address=1).door.entrance
    guests = [entrance.take_over("192.0.2.1") for _ in range(20)]
    assert [guest.refusal is None for guest in guests] == [True, True, *([False] * 18)]
    for guest in guests:
        guest.end()
        guest.end()
    assert entrance.addresses.connections == 0
    assert entrance.take_over("").refusal is None


async def test_connection_that_nobody_took_is_not_charged_twice() -> None:
    host = Host(connects_per_s_per_address=1, server=PROXIES)
    waiting = pass_on(host)
    head = HEAD.format(target="/ws?room=r").replace("\r\n\r\n", "\r\nX-Forwarded-For: 203.0.113.1\r\n\r\n").encode()
    clients = [host.accept(peername=PROXY) for _ in range(5)]
    for client in clients:
        client.feed(head)
    for handshake in waiting:
        handshake.serve()
    host.run()
    assert all(client.take_bytes().startswith(b"HTTP/1.1 101 ") for client in clients)
    assert {connection.address for connection in host.relay.all_connections()} == {"203.0.113.1"}


async def test_limits_reload() -> None:
    host = Host(connections_per_address=1)
    assert statuses(host, 2) == [101, 503]
    host.door.configure(Config(limits=Limits(connections_per_address=3)))
    assert statuses(host, 3) == [101, 101, 503]


async def test_dry_run_refuses_nobody_and_says_so() -> None:
    host = Host(connections_per_address=1, connects_per_s_per_address=1, dry_run=True)
    assert statuses(host, 20) == [101] * 20
    assert host.counted()['limit_hits_total{limit="connects_per_s_per_address",mode="dry_run"}'] == 15
    assert host.counted()['limit_hits_total{limit="connections_per_address",mode="dry_run"}'] == 19


async def test_addresses_are_a_gauge_and_forgotten() -> None:
    host = Host()
    for number in range(10):
        ask(host, (f"192.0.2.{number}", 1))[3].vanish()
    ask(host, ("2001:db8::1", 1, 0, 0))
    ask(host, ("2001:db8::2", 1, 0, 0))
    host.door.entrance.tick(host.now)
    assert host.counted()["tracked_addresses"] == 11
    host.door.entrance.tick(host.now + 60)
    assert host.counted()["tracked_addresses"] == 1


# ---- what is logged


def said(capsys: pytest.CaptureFixture[str], event: str) -> list[dict[str, Any]]:
    return [line for text in capsys.readouterr().err.splitlines() if (line := json.loads(text))["event"] == event]


@pytest.mark.parametrize("names", [True, False])
async def test_hits_are_logged_once_a_second_and_name_the_address_if_wanted(
    capsys: pytest.CaptureFixture[str], *, names: bool
) -> None:
    logs.configure("info", "json")
    host = Host(connects_per_s_per_address=1)
    host.door.configure(Config(limits=host.limits, log=Log(addresses=names)))
    statuses(host, 10)
    host.now += 1.5
    statuses(host, 3)
    lines = said(capsys, "limit_hit")
    assert [(line["limit"], line["left_out"]) for line in lines] == [
        ("connects_per_s_per_address", 0), ("connects_per_s_per_address", 4),
    ]  # fmt: skip
    assert {line["address"] for line in lines} == {"192.0.2.1" if names else ""}
    assert all(line["enforced"] is True for line in lines)


@pytest.mark.parametrize(
    ("address", "server", "warns"),
    [
        ("127.0.0.1", Server(), True),
        ("10.0.0.1", Server(), True),
        ("100.64.0.1", Server(), True),  # of a carrier, or the pods of some clouds
        ("::1", Server(), True),
        ("8.8.8.8", Server(), False),
        ("10.0.0.1", PROXIES, True),  # it is trusted, and says nothing about its clients
        ("", Server(), False),
    ],
)
async def test_one_private_address_alone_is_suspected_to_be_a_proxy_once(
    capsys: pytest.CaptureFixture[str], address: str, server: Server, *, warns: bool
) -> None:
    logs.configure("info", "json")
    host = Host(server=server)
    peername = (address, 1) if address else ""
    for _ in range(2 * SAME_ADDRESS + 1):
        guest = host.door.entrance.meet(peername)
        host.door.entrance.admit(guest, _NoHeaders())
        guest.end()
    lines = said(capsys, "one_address")
    assert [(line["address"], line["connections"]) for line in lines] == [(address, SAME_ADDRESS)] * warns


async def test_another_address_in_between_is_no_proxy(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    entrance = Host().door.entrance
    for number in range(5 * SAME_ADDRESS):
        entrance.meet(("10.0.0.1" if number % (SAME_ADDRESS - 1) else "10.0.0.2", 1)).end()
    assert not said(capsys, "one_address")


class _NoHeaders:
    headers: dict[str, list[str]] = {}  # noqa: RUF012 # never written

    def one(self, name: str) -> str | None:
        return None


# ---- who is charged


async def test_clients_of_a_trusted_proxy_have_limits_of_their_own() -> None:
    host = Host(connects_per_s_per_address=1, connections_per_address=0, server=PROXIES)
    assert statuses(host, 6, PROXY, "X-Forwarded-For: 203.0.113.1") == [101] * 5 + [429]
    assert statuses(host, 6, PROXY, "X-Forwarded-For: 203.0.113.1, 203.0.113.2") == [101] * 5 + [429]
    assert statuses(host, 1, PROXY, "X-Forwarded-For: 203.0.113.2", "X-Forwarded-For: 203.0.113.1") == [429]
    assert statuses(host, 1, PROXY, "X-Forwarded-For: 203.0.113.3, 10.1.2.3") == [101]
    addresses = {connection.address for connection in host.relay.all_connections()}
    assert addresses - {""} == {"203.0.113.1", "203.0.113.2", "203.0.113.3"}


async def test_what_others_say_of_their_clients_means_nothing() -> None:
    host = Host(connects_per_s_per_address=1, server=PROXIES)
    found = [ask(host, HERE, f"X-Forwarded-For: 203.0.113.{number}")[0] for number in range(6)]
    assert found == [101] * 5 + [429]


async def test_connections_through_a_proxy_are_counted_by_the_address_of_their_client() -> None:
    host = Host(connections_per_address=1, server=PROXIES)
    first = ask(host, PROXY, "X-Forwarded-For: 203.0.113.1")[3]
    assert statuses(host, 1, PROXY, "X-Forwarded-For: 203.0.113.1") == [503]
    assert statuses(host, 1, PROXY, "X-Forwarded-For: 203.0.113.2") == [101]
    first.vanish()
    assert statuses(host, 1, PROXY, "X-Forwarded-For: 203.0.113.1") == [101]


async def test_proxy_that_names_nobody_is_counted_itself() -> None:
    host = Host(connects_per_s_per_address=1, server=PROXIES)
    assert statuses(host, 6, PROXY) == [101] * 5 + [429]


async def test_proxy_may_ask_for_health_as_often_as_it_likes() -> None:
    host = Host(connects_per_s_per_address=1, connections_per_address=1, server=PROXIES)
    for path in PATHS * 10:
        assert ask(host, PROXY, head=f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200


async def test_address_of_a_dual_listener_is_plain() -> None:
    host = Host()
    ask(host, ("::ffff:192.0.2.7", 1, 0, 0))
    assert [connection.address for connection in host.relay.all_connections()] == ["192.0.2.7"]


# ---- origins


@pytest.mark.parametrize(
    ("patterns", "origin", "is_allowed"),
    [
        ((), "https://any.example", True),
        ((), "rubbish", True),
        (("*",), "null", True),
        (("https://a.example",), "https://a.example", True),
        (("https://a.example",), "HTTPS://A.EXAMPLE", True),
        (("HTTPS://A.Example:443",), "https://a.example", True),
        (("https://a.example",), "https://a.example:443", True),
        (("http://a.example",), "http://a.example:80", True),
        (("https://a.example:8443",), "https://a.example:8443", True),
        (("https://a.example:8443",), "https://a.example", False),
        (("https://a.example",), "https://a.example:8443", False),
        (("https://a.example",), "http://a.example", False),
        (("https://a.example",), "https://b.a.example", False),
        (("https://a.example",), "https://a.example.evil", False),
        (("https://a.example",), "https://evil-a.example", False),
        (("https://a.example",), "https://a.example/", False),
        (("https://a.example",), "https://a.example@evil", False),
        (("https://a.example",), "https://a.example https://evil", False),
        (("https://a.example",), "", False),
        (("https://a.example",), "null", False),
        (("https://a.example",), "NULL", False),
        (("https://a.example", "null"), "null", True),
        (("null",), "https://a.example", False),
        (("https://*.example.org",), "https://a.example.org", True),
        (("https://*.example.org",), "https://a.b.c.example.org", True),
        (("https://*.example.org",), "https://A.EXAMPLE.ORG:443", True),
        (("https://*.example.org",), "https://example.org", False),
        (("https://*.example.org",), "https://.example.org", False),
        (("https://*.example.org",), "https://evilexample.org", False),
        (("https://*.example.org",), "https://a.example.org.evil", False),
        (("https://*.example.org",), "http://a.example.org", False),
        (("https://*.example.org",), "https://a.example.org:8443", False),
        (("https://*.example.org",), "https://*.example.org", False),
        (("https://*.example.org:8443",), "https://a.example.org:8443", True),
        (("capacitor://localhost",), "capacitor://localhost", True),
        (("http://[::1]:3000",), "http://[::1]:3000", True),
        (("https://a.example",), "https://\xe1.example", False),
    ],
)
def test_origin_is_allowed_as_listed(patterns: tuple[str, ...], origin: str, *, is_allowed: bool) -> None:
    assert all(pattern in {"*", "null"} or split_origin(pattern) for pattern in patterns)
    assert Origins(patterns).allow(origin) is is_allowed


LISTED = Server(origins=("https://app.example.org",))


async def test_page_of_a_strange_origin_is_told_and_closed() -> None:
    host = Host(server=LISTED)
    client = host.accept(peername=HERE)
    strange = "Origin: https://evil.example\r\nSec-WebSocket-Protocol: fastsig.v1.json\r\nHost"
    client.feed(WS.replace("Host", strange).encode())
    answer, _, frames = client.take_bytes().partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert b"Sec-WebSocket-Protocol: fastsig.v1.json" in answer
    (text, close) = parse_frames(frames)
    error = json.loads(text[1])
    assert (text[0], error["type"], error["code"], error["retry"]) == (TEXT, "error", "forbidden", False)
    assert close == (CLOSE, (4508).to_bytes(2, "big"))
    assert client.is_shut()
    client.feed(b"x" * 10_000)  # read and thrown away, frames too
    assert client.take_bytes() == b""
    host.advance(2.5)
    assert client.is_gone()
    counted = host.counted()
    assert counted['handshakes_total{result="forbidden"}'] == counted["handshakes_total"] == 1
    assert "connections" not in counted and "disconnects_total" not in counted
    assert host.relay.connections == 0


async def test_page_is_refused_with_an_answer_where_browsers_are_not_told() -> None:
    host = Host(server=Server(origins=("https://app.example.org",), tell_browsers=False))
    status, error, _, client = ask(host, HERE, "Origin: https://evil.example")
    assert (status, error["code"]) == (403, "forbidden")
    assert client.is_shut()


async def test_page_of_a_listed_origin_and_whoever_is_no_page_may_connect() -> None:
    host = Host(server=LISTED)
    assert ask(host, HERE, "Origin: https://APP.example.org:443")[0] == 101
    assert ask(host)[0] == 101
    assert ask(host, HERE, "Origin: https://app.example.org", "Origin: https://evil.example")[0] == 400
    assert host.counted()['handshakes_total{result="accepted"}'] == 2


async def test_request_that_is_no_upgrade_is_answered_as_before() -> None:
    host = Host(server=LISTED)
    assert ask(host, HERE, "Origin: https://evil.example", head="GET /ws HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 400
    assert ask(host, HERE, "Origin: https://evil.example", head="GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200


async def test_page_from_an_address_with_too_many_connections_is_told_not_to_come_back() -> None:
    host = Host(connections_per_address=1)
    ask(host)
    client = host.accept(peername=HERE)
    client.feed(WS.replace("Host", "Origin: https://a.example\r\nHost").encode())
    answer, _, frames = client.take_bytes().partition(b"\r\n\r\n")
    (text, close) = parse_frames(frames)
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert json.loads(text[1]).items() >= {"code": "limit_exceeded", "retry": False}.items()
    assert "after_ms" not in json.loads(text[1]), "the close says: stop"
    assert close == (CLOSE, (4505).to_bytes(2, "big"))
    assert host.door.entrance.addresses.connections == 1
    assert ask(host, HERE, "Origin: https://a.example", head="GET /ws HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 503


async def test_page_that_connects_too_often_gets_an_answer_so_that_it_comes_back_later() -> None:
    host = Host(connects_per_s_per_address=1)
    assert statuses(host, 6, HERE, "Origin: https://a.example") == [101] * 5 + [429]


# ---- PROXY headers, on real sockets


class Door:
    """What the entrance gives on, and what it counts. Whatever is open in the end is closed."""

    def __init__(self, limits: dict[str, Any]) -> None:
        self.host = Host(**limits)
        server = Server(trusted_proxies=("10.0.0.1", "10.9.0.0/16"), proxy_protocol=True)
        config = Config(server=server, limits=self.host.limits)
        self.entrance = Entrance(self.host.relay, config, clock=lambda: self.host.now)
        self.served: list[tuple[socket.socket, Guest]] = []
        self._far: list[socket.socket] = []

    def connect(self, data: bytes = b"") -> socket.socket:
        """The far end of a connection from the proxy, which had sent this before it was accepted."""
        near, far = socket.socketpair()
        self._far.append(far)
        far.sendall(data)
        guest = self.entrance.meet(PROXY)
        assert self.entrance.expects_header(guest)
        self.entrance.read_header(near, guest, lambda end, guest: self.served.append((end, guest)))
        return far

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not is_so():  # noqa: ASYNC110 # an event in the entrance would be there for this alone
                await asyncio.sleep(0.001)

    async def ended(self) -> None:
        await self.until(lambda: "handshakes_total" in self.host.counted())

    def close(self) -> None:
        self.entrance.close()
        for end in [*(end for end, _ in self.served), *self._far]:
            end.close()


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., Door]]:
    with contextlib.ExitStack() as stack:

        def door(**limits: Any) -> Door:
            made = Door(limits)
            stack.callback(made.close)
            return made

        yield door


V1 = b"PROXY TCP4 203.0.113.1 198.51.100.1 4660 80\r\n"
V2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes([203, 0, 113, 1, 198, 51, 100, 1, 1, 2, 3, 4])


@pytest.mark.parametrize("header", [V1, V2])
async def test_header_is_taken_and_not_a_byte_more(make: Callable[..., Door], header: bytes) -> None:
    door = make()
    door.connect().send(header + b"GET /")
    slow = door.connect()
    for byte in header[:-1]:
        slow.send(bytes([byte]))
        await asyncio.sleep(0)
    await door.until(lambda: len(door.served) == 1)
    slow.send(header[-1:] + b"GET /")
    await door.until(lambda: len(door.served) == 2)
    named = (b"GET /", "203.0.113.1", False)
    assert [(end.recv(100), guest.address, guest.is_proxied) for end, guest in door.served] == [named] * 2
    assert door.entrance.addresses.connections == 2
    for _, guest in door.served:
        guest.end()
    assert door.entrance.addresses.connections == 0


async def test_header_that_is_there_at_once_is_read_at_once(make: Callable[..., Door]) -> None:
    door = make()
    door.connect(V1)
    assert [guest.address for _, guest in door.served] == ["203.0.113.1"]


class _Forwarded(_NoHeaders):
    headers: dict[str, list[str]] = {"x-forwarded-for": ["203.0.113.9"]}  # noqa: RUF012 # never written


@pytest.mark.parametrize(
    ("header", "address"),
    [
        (b"PROXY UNKNOWN\r\n", "10.0.0.1"),
        (V2[:12] + b"\x20\0\0\0", "10.0.0.1"),  # LOCAL
        (V2[:12] + b"\x21\0\0\0", "10.0.0.1"),  # of no family
        (V1.replace(b"203.0.113.1", b"10.9.8.7"), "203.0.113.9"),  # another trusted proxy
    ],
)
async def test_client_of_a_proxy_that_names_nobody_cannot_name_itself(
    make: Callable[..., Door], header: bytes, address: str
) -> None:
    """What a proxy of TCP passes on, the client wrote. A proxy that it names is one of HTTP, and says who is there."""
    door = make(connections_per_address=1)
    for _ in range(2):
        door.connect(header)
    (_, first), (_, second) = door.served
    door.entrance.admit(first, _Forwarded())
    assert first.address == address
    with pytest.raises(HttpError, match="as many connections"):
        door.entrance.admit(second, _Forwarded())


async def test_half_a_header_keeps_nobody_awake_and_ends_in_time(make: Callable[..., Door]) -> None:
    door = make(handshake_seconds=0.3)
    half = door.connect(V1[:20])
    began, used = time.monotonic(), time.process_time()
    await door.ended()
    assert time.process_time() - used < 0.5 * (time.monotonic() - began), "the loop spins"
    assert half.recv(1) == b""
    assert door.host.counted() == {"handshakes_total": 1, 'handshakes_total{result="timeout"}': 1}
    assert not door.served


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (b"GET /ws HTTP/1.1\r\n", "bad_request"),
        (b"\x16\x03\x01", "bad_request"),
        (V2[:12] + b"\x21\x11\xff\xff", "bad_request"),
        (b"PROXY UNKNOWN " + b"x" * V2_BYTES, "bad_request"),
        (b"", "gone"),
        (V2[:-1], "gone"),
    ],
)
async def test_whoever_begins_with_something_else_is_closed(
    make: Callable[..., Door], data: bytes, result: str
) -> None:
    door = make()
    far = door.connect(data)
    with contextlib.suppress(OSError):  # it is closed already
        far.shutdown(socket.SHUT_WR)
    await door.ended()
    assert door.host.counted()[f'handshakes_total{{result="{result}"}}'] == 1
    with contextlib.suppress(ConnectionResetError):
        assert far.recv(1) == b""
    assert not door.served


async def test_headers_that_are_awaited_end_with_the_worker(make: Callable[..., Door]) -> None:
    door = make()
    ends = [door.connect() for _ in range(5)]
    door.entrance.close()
    assert [end.recv(1) for end in ends] == [b""] * 5


async def test_header_of_an_address_that_connects_too_often_is_charged_to_it(make: Callable[..., Door]) -> None:
    door = make(connects_per_s_per_address=1)
    for _ in range(12):
        door.connect(V1)
    refusals = [guest.refusal for _, guest in door.served]
    assert [refusal.is_deep if refusal else None for refusal in refusals] == [None] * 5 + [False] * 5 + [True] * 2


def test_lease_ends_once_however_a_connection_ends() -> None:
    class Lease:
        ended = 0

        def end(self) -> None:
            self.ended += 1

    for way in ("lost", "let_go"):
        lease = Lease()
        connection = Connection(Host().relay)
        connection.lease = lease
        getattr(connection, way)()
        connection.lost()
        assert (lease.ended, connection.lease, connection.address) == (1, None, "")
