"""Behind proxies, over real sockets: whose address counts. HAProxy and nginx are those of Debian, where installed."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import trustme

from tests.unit.memory import HEAD

from .conftest import Server, certified, children, free_port, trusting, until
from .test_limits import ONE, TWO, counted, visit
from .visitor import Visitor

Serve = Callable[..., Server]
PROXY: Final = "127.0.0.1"  # whoever connects to 127.0.0.1 and asks for nothing else has that too
STRANGER: Final = "127.0.0.9"
MISSING: Final = "no nginx and HAProxy: apt-get install --no-install-recommends nginx-light haproxy"
TRUSTING: Final = ("--server.trusted-proxies", PROXY, "--limits.connections-per-address", "2")
READING: Final = (*TRUSTING, "--server.proxy-protocol")
REQUEST: Final = HEAD.format(target="/ws").encode()
V2_HEAD: Final = b"\r\n\r\n\0\r\nQUIT\n\x21\x11"
LOCAL: Final = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"
TLVS: Final = b"\x03\0\x04abcd\x05\0\x02id"


def v1(client: str) -> bytes:
    return f"PROXY TCP4 {client} 127.0.0.1 4711 80\r\n".encode()


def v2(client: str) -> bytes:
    addresses = socket.inet_aton(client) + socket.inet_aton("127.0.0.1") + b"\x12\x34\0\x50"
    return V2_HEAD + len(addresses + TLVS).to_bytes(2, "big") + addresses + TLVS


# ---- what we read ourselves


@pytest.mark.parametrize("header", [v1, v2])
def test_client_is_whom_the_header_names_however_the_bytes_come(serve: Serve, header: Callable[[str], bytes]) -> None:
    server = serve(*READING)
    with contextlib.ExitStack() as stack:

        def through(client: str, *, in_pieces: bool) -> int:
            visitor = stack.enter_context(Visitor(server.port, PROXY))
            return visitor.send(header(client) + REQUEST, in_pieces=in_pieces).status()

        assert [through(ONE, in_pieces=in_pieces) for in_pieces in (False, True, False)] == [101, 101, 503]
        assert [through(TWO, in_pieces=in_pieces) for in_pieces in (True, False, True)] == [101, 101, 503]
    assert server.wait_for("limit_hit")["address"] == ONE
    until(lambda: counted(server, "tracked_addresses") == 2, "another address has been counted")


def test_only_proxies_begin_with_a_header_and_they_always_do(serve: Serve) -> None:
    server = serve(*READING)
    with Visitor(server.port, STRANGER) as direct:
        assert direct.send(REQUEST).status() == 101
        direct.ping()
    for header in (v1(ONE), v2(ONE)):
        with Visitor(server.port, STRANGER) as liar:
            assert liar.send(header + REQUEST).status() == 400
    with Visitor(server.port, PROXY) as mute:
        assert mute.send(REQUEST).is_cut_off()
    with Visitor(server.port, PROXY) as itself:
        assert itself.send(b"PROXY UNKNOWN\r\nGET /livez HTTP/1.1\r\nHost: x\r\n\r\n").status() == 200
    until(lambda: counted(server, 'handshakes_total{result="bad_request"}') == 3, "they are not counted")


def test_proxy_that_names_nobody_is_counted_itself_but_for_health(serve: Serve) -> None:
    """Whatever its clients write in their requests; and it is told that the server is well, however many they are."""
    server = serve(*READING, "--limits.connects-per-s-per-address", "1")
    with contextlib.ExitStack() as stack:
        found = []
        for number, header in enumerate((b"PROXY UNKNOWN\r\n", LOCAL, b"PROXY UNKNOWN\r\n", LOCAL)):
            visitor = stack.enter_context(Visitor(server.port, PROXY))
            liar = REQUEST.replace(b"Host", b"X-Forwarded-For: 203.0.113.%d\r\nHost" % number)
            found.append(visitor.send(header + liar).status())
        assert found == [101, 101, 503, 503]
        for _ in range(30):
            with Visitor(server.port, PROXY) as check:
                assert check.send(LOCAL + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").status() == 200
    assert server.wait_for("limit_hit")["address"] == PROXY


def test_tls_follows_behind_the_header(serve: Serve, tmp_path: Path) -> None:
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    server = serve(*READING, *certified(authority, tmp_path))
    client = trusting(authority)
    with contextlib.ExitStack() as stack:

        def through(name: str, *, in_pieces: bool) -> int:
            """Header and ClientHello are one segment, or each byte is one."""
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = client.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
            visitor = stack.enter_context(Visitor(server.port, PROXY))
            visitor.send(v2(name) + _first_flight(tls, outgoing), in_pieces=in_pieces)
            while True:
                incoming.write(visitor.socket.recv(65536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                    break
            tls.write(REQUEST)
            visitor.send(outgoing.read())
            while True:
                incoming.write(visitor.socket.recv(65536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    return int(tls.read(4096).split(b" ")[1])

        assert [through(ONE, in_pieces=in_pieces) for in_pieces in (False, True, False)] == [101, 101, 503]
        assert through(TWO, in_pieces=False) == 101
        assert server.wait_for("limit_hit")["address"] == ONE


def _first_flight(tls: ssl.SSLObject, outgoing: ssl.MemoryBIO) -> bytes:
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def test_headers_that_never_end_are_closed_in_time_and_at_the_end(serve: Serve) -> None:
    server = serve(*READING, "--limits.handshake-seconds", "1")
    (worker,) = children(server.process.pid)
    descriptors = len(os.listdir(f"/proc/{worker}/fd"))  # noqa: PTH208 # counted, not read
    with contextlib.ExitStack() as stack:
        halves = [stack.enter_context(Visitor(server.port, PROXY)).send(v2(ONE)[:20]) for _ in range(50)]
        assert all(half.is_cut_off() for half in halves)
    until(lambda: counted(server, 'handshakes_total{result="timeout"}') == 50, "they are not counted")
    until(lambda: len(os.listdir(f"/proc/{worker}/fd")) == descriptors, "descriptors are left")  # noqa: PTH208
    with Visitor(server.port, PROXY).send(v1(ONE)[:9]) as last:
        assert server.stop() == 0
        assert last.is_cut_off()


def test_address_that_a_header_named_goes_with_a_connection_that_is_passed_on(serve: Serve) -> None:
    server = serve(*READING, "--workers", "2")
    with contextlib.ExitStack() as stack:
        for number in range(30):
            visitor = stack.enter_context(Visitor(server.port, PROXY))
            visitor.send(v1(f"192.0.2.{number}")).ask(f"/ws?room=r{number}")
            assert visitor.status() == 101
        assert counted(server, 'handshakes_total{result="passed"}') > 2
        until(lambda: counted(server, "tracked_addresses") >= 30, "who was passed on has another address")
    until(lambda: counted(server, "connections") == 0, "they have not ended")


def test_client_is_the_last_in_the_chain_who_is_no_proxy(serve: Serve) -> None:
    server = serve("--server.trusted-proxies", f"{PROXY} 10.0.0.0/8", "--limits.connections-per-address", "1")
    with contextlib.ExitStack() as stack:

        def through(chain: str, source: str = PROXY) -> int:
            return stack.enter_context(Visitor(server.port, source)).ask(X_Forwarded_For=chain).status()

        assert through("192.0.2.1") == 101
        assert through("192.0.2.2, 192.0.2.1") == 503
        assert through("192.0.2.1, 192.0.2.2, 10.1.1.1") == 101
        assert through("192.0.2.2:4711, 10.1.1.1:80") == 503
        assert through("192.0.2.3, unknown") == 101, "the proxy itself"
        assert through("192.0.2.4", STRANGER) == 101, "itself, whatever it says"
        assert through("192.0.2.5", STRANGER) == 503
        hit = {"192.0.2.1", "192.0.2.2", STRANGER}
        until(lambda: {event["address"] for event in server.events("limit_hit")} == hit, "others hit the limit")


# ---- HAProxy and nginx


@contextlib.contextmanager
def running(folder: Path, port: int, *command: str) -> Iterator[int]:
    """A proxy that listens on `port` when this begins."""
    with (folder / "proxy.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(lambda: process.poll() is not None or _listens(port), "the proxy does not listen")
        assert process.poll() is None, (folder / "proxy.log").read_text(encoding="utf-8")
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


@contextlib.contextmanager
def haproxy(folder: Path, to: int, *, mode: str, server_options: str = "") -> Iterator[int]:
    """`mode`: the lines that say how it speaks for its clients."""
    port = free_port()
    lines = (
        "defaults", " timeout connect 5s", " timeout client 60s", " timeout server 60s", " timeout tunnel 60s",
        f"listen in\n bind 127.0.0.1:{port}", mode, f" server fastsig 127.0.0.1:{to} {server_options}",
    )  # fmt: skip
    file = folder / f"haproxy-{port}.cfg"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with running(folder, port, _found("haproxy"), "-db", "-f", str(file)):
        yield port


@contextlib.contextmanager
def nginx(folder: Path, to: int) -> Iterator[int]:
    port = free_port()
    file = folder / f"nginx-{port}.conf"
    text = f"""
        daemon off; master_process off; pid {folder}/nginx-{port}.pid; error_log {folder}/proxy.log;
        events {{ }}
        http {{
            access_log off;
            client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
            uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
            server {{
                listen 127.0.0.1:{port};
                location / {{
                    proxy_pass http://127.0.0.1:{to};
                    proxy_http_version 1.1;
                    proxy_set_header Host $host;
                    proxy_set_header Upgrade $http_upgrade;
                    proxy_set_header Connection "upgrade";
                    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                }}
            }}
        }}"""
    file.write_text(text, encoding="utf-8")
    with running(folder, port, _found("nginx"), "-p", str(folder), "-e", str(folder / "proxy.log"), "-c", str(file)):
        yield port


def _found(program: str) -> str:
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return found or pytest.skip(MISSING)


def right_address_is_limited(server: Server, port: int) -> None:
    """Through what listens on `port`: the third connection of one client is refused, and nobody else's."""
    with contextlib.ExitStack() as stack:
        visitors = []
        for source, expected in ((ONE, 101), (ONE, 101), (ONE, 503), (TWO, 101)):
            visitors.append(stack.enter_context(Visitor(port, source)).ask(X_Forwarded_For=TWO))  # which it makes up
            assert visitors[-1].status() == expected
        for visitor in (*visitors[:2], visitors[3]):
            visitor.ping()
        visitors[0].socket.close()
        until(lambda: visit(port, ONE) == 101, "the place is not given back")
        assert visit(port, TWO, "/livez") == 200
    until(lambda: {event["address"] for event in server.events("limit_hit")} == {ONE}, "another hit the limit")
    until(lambda: counted(server, "connections") == 0, "they have not ended")


def test_behind_haproxy_with_the_proxy_protocol(serve: Serve, tmp_path: Path) -> None:
    for options in ("send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options unique-id,crc32c"):
        server = serve(*READING)
        with haproxy(tmp_path, server.port, mode=" mode tcp", server_options=options) as port:
            right_address_is_limited(server, port)


def test_behind_haproxy_that_checks_health_and_forwards(serve: Serve, tmp_path: Path) -> None:
    check = " option httpchk\n http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host x\n"
    mode = f" mode http\n option forwardfor\n{check} default-server check inter 50ms"
    server = serve(*TRUSTING)
    with haproxy(tmp_path, server.port, mode=mode) as port:
        until(lambda: visit(port, ONE) == 101, "it is not healthy")
        right_address_is_limited(server, port)


def test_behind_nginx(serve: Serve, tmp_path: Path) -> None:
    server = serve(*TRUSTING)
    with nginx(tmp_path, server.port) as port:
        right_address_is_limited(server, port)


def test_behind_nginx_behind_haproxy_and_the_other_way_round(serve: Serve, tmp_path: Path) -> None:
    server = serve(*READING)
    with (
        haproxy(tmp_path, server.port, mode=" mode tcp", server_options="send-proxy-v2") as inner,
        nginx(tmp_path, inner) as outer,
    ):
        right_address_is_limited(server, outer)
    server = serve(*TRUSTING)
    forwarding = " mode http\n option forwardfor"
    with nginx(tmp_path, server.port) as inner, haproxy(tmp_path, inner, mode=forwarding) as outer:
        right_address_is_limited(server, outer)


def test_proxy_that_nobody_has_listed_is_an_address_like_any_other(serve: Serve, tmp_path: Path) -> None:
    server = serve("--limits.connections-per-address", "2")
    with nginx(tmp_path, server.port) as port, contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(Visitor(port, source)) for source in (ONE, TWO, STRANGER)]
        assert [visitor.ask().status() for visitor in visitors] == [101, 101, 503]
        assert server.wait_for("limit_hit")["address"] == PROXY
