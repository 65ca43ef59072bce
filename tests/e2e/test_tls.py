"""TLS that ends in the workers: versions, handshakes that come to nothing, and new certificates under load."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from websockets.asyncio.client import connect

from fastsig import status
from fastsig.tls import IDLE_BYTES
from tests.e2e.conftest import PYTHON, Server, certified, trusting, until
from tests.unit.memory import CLOSE, HEAD, TEXT, frame

Serve = Callable[..., Server]
HELLO_BYTES = 64  # of a ClientHello that never goes on
UPDATE_BYTES = 27  # of a record with a KeyUpdate


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.fixture
def trust(authority: trustme.CA) -> ssl.SSLContext:
    return trusting(authority)


@pytest.fixture
def options(authority: trustme.CA, tmp_path: Path) -> tuple[str, ...]:
    return certified(authority, tmp_path)


@pytest.fixture(scope="module")
def shared(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that speaks TLS, and gives little time for a handshake."""
    folder = tmp_path_factory.mktemp("tls")
    more = ("--workers", "2", "--limits.handshake-seconds", "1", "--log.level", "info")
    server = Server(*certified(authority, folder), *more, cwd=folder, trust=trusting(authority))
    try:
        server.wait_for("serving")
        yield server
    finally:
        assert server.stop() == 0
    assert not server.events("internal_error")


def _counted(server: Server) -> Counter[str]:
    """The counters of all workers together."""
    total: Counter[str] = Counter()
    for worker in status.ask(server.runtime_dir, server.port).workers:
        total.update(worker.counters)
    return total


def _failures(server: Server) -> int:
    return _counted(server)["tls_handshake_failures_total"]


def _hello(trust: ssl.SSLContext) -> bytes:
    """What a client begins with."""
    outgoing = ssl.MemoryBIO()
    client = trust.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def _serial(server: Server) -> str:
    """Of the certificate that a new connection is shown."""
    with server.dial(5) as end:
        assert isinstance(end, ssl.SSLSocket)
        shown = end.getpeercert(binary_form=True)
    assert shown is not None
    return f"{x509.load_der_x509_certificate(shown).serial_number:x}"


# ---- handshakes


def _limit(trust: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    """Speak this version and no other, whatever OpenSSL thinks of it."""
    trust.set_ciphers("DEFAULT:@SECLEVEL=0")
    trust.minimum_version = trust.maximum_version = version


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_modern_versions_are_spoken_without_compression(
    shared: Server, trust: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, version: ssl.TLSVersion
) -> None:
    _limit(trust, version)
    trust.set_alpn_protocols(["h2", "http/1.1"])
    monkeypatch.setattr(shared, "trust", trust)
    with shared.dial(5) as end:
        assert isinstance(end, ssl.SSLSocket)
        assert (end.selected_alpn_protocol(), end.compression()) == ("http/1.1", None)


@pytest.mark.parametrize(("least", "spoken"), [("1.2", "TLSv1_1"), ("1.3", "TLSv1_2")])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
def test_versions_below_the_least_are_refused(
    serve: Serve, options: tuple[str, ...], trust: ssl.SSLContext, least: str, spoken: str
) -> None:
    server = serve(*options, "--server.tls-min-version", least, trust=trust)
    _limit(trust, ssl.TLSVersion[spoken])
    with pytest.raises(ssl.SSLError, match="ALERT"):
        server.dial(5)
    until(lambda: _failures(server) == 1, "not counted")


def test_half_open_handshakes_end_in_time_and_disturb_nobody(shared: Server, trust: ssl.SSLContext) -> None:
    lines, before = shared.stderr_lines(), _counted(shared)
    hello = _hello(trust)
    ends = [socket.create_connection(("127.0.0.1", shared.port), 10) for _ in range(300)]
    for end in ends[:100]:
        end.sendall(hello[:HELLO_BYTES])
    for end in ends[100:200]:
        end.sendall(hello)  # and no answer to what it is answered
    with shared.dial(5) as client, client.makefile("rb") as stream:
        client.sendall(HEAD.format(target="/ws").encode())
        assert stream.readline().startswith(b"HTTP/1.1 101 ")
        while stream.readline() != b"\r\n":
            pass
        for end in ends:
            while end.recv(65536):
                pass
            end.close()
        client.sendall(frame(TEXT, '{"type":"ping"}'))
        assert b"pong" in stream.read(15)
    found = _counted(shared) - before
    assert found["tls_handshake_failures_total"] == 200, "those that said nothing began nothing"
    assert found['handshakes_total{result="timeout"}'] == 300
    assert shared.stderr_lines() == lines, "nothing of this is logged"


def test_reset_in_the_midst_of_a_handshake_is_counted(shared: Server, trust: ssl.SSLContext) -> None:
    before = _failures(shared)
    for size in (1, HELLO_BYTES, None):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", shared.port), 10) as end:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.sendall(_hello(trust)[:size])
                time.sleep(0.001)  # else the reset may overtake the connection in the queue
    until(lambda: _failures(shared) == before + 60, "not all are counted")


@pytest.mark.parametrize(
    "said", [b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 100, b"\x16\x03\x01\xff\xff"]
)
def test_what_is_no_tls_is_hung_up_on(shared: Server, said: bytes) -> None:
    before = _failures(shared)
    with socket.create_connection(("127.0.0.1", shared.port), 10) as end, end.makefile("rb") as stream:
        end.sendall(said)
        end.shutdown(socket.SHUT_WR)
        assert not stream.read().startswith(b"HTTP")
    until(lambda: _failures(shared) == before + 1, "not counted")


class _Keys:
    """What a client of TLS 1.3 sends from its first record of data on (RFC 8446 §5.2, §7.2): also what none would."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._sealed = 0

    def seal(self, kind: int, data: bytes) -> bytes:
        head = b"\x17\x03\x03" + (len(data) + 17).to_bytes(2, "big")
        nonce = int.from_bytes(self._expand("iv", 12), "big") ^ self._sealed
        self._sealed += 1
        return head + AESGCM(self._expand("key", 32)).encrypt(nonce.to_bytes(12, "big"), data + bytes([kind]), head)

    def update(self) -> bytes:
        """A new key, which the server need not answer."""
        said = self.seal(22, b"\x18\0\0\x01\0")
        self._secret, self._sealed = self._expand("traffic upd", 48), 0
        return said

    def _expand(self, label: str, size: int) -> bytes:
        name = b"tls13 " + label.encode()
        info = size.to_bytes(2, "big") + bytes([len(name)]) + name + b"\0"
        return HKDFExpand(SHA384(), size, info).derive(self._secret)


def test_records_without_a_byte_to_read_end_the_connection(
    serve: Serve, options: tuple[str, ...], trust: ssl.SSLContext, tmp_path: Path
) -> None:
    """No limit of messages sees them, and each makes the server compute (200,000 key updates took 2 s)."""
    server = serve(*options, trust=trust)
    trust.keylog_filename = str(tmp_path / "keys")
    with server.dial(5) as tls:
        assert isinstance(tls, ssl.SSLSocket)
        assert tls.cipher() == ("TLS_AES_256_GCM_SHA384", "TLSv1.3", 256)
        (line,) = [line for line in (tmp_path / "keys").read_text().splitlines() if "CLIENT_TRAFFIC_SECRET_0" in line]
        keys = _Keys(bytes.fromhex(line.split()[2]))
        request = HEAD.format(target="/ws").encode()
        with socket.socket(fileno=os.dup(tls.fileno())) as raw:
            raw.settimeout(5)

            def idle(size: int) -> bytes:
                return b"".join(keys.update() for _ in range(size // UPDATE_BYTES))

            for part in (request[:9], request[9:]):  # each byte of it is something
                raw.sendall(idle(IDLE_BYTES - 2000) + keys.seal(23, part))
            assert tls.recv(12) == b"HTTP/1.1 101"
            with contextlib.suppress(ConnectionError):
                raw.sendall(idle(2 * IDLE_BYTES))
            with contextlib.suppress(ConnectionError):
                while raw.recv(65536):
                    pass
    until(lambda: _counted(server)["connections"] == 0, "it is still there")
    assert not server.events("internal_error")


def test_tls_where_none_is_spoken_is_refused_at_once(server: Server, trust: ssl.SSLContext) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 5) as end:
        end.sendall(_hello(trust)[:HELLO_BYTES])
        head, _, body = end.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["code"] == "bad_request"


def test_close_is_followed_by_close_notify(serve: Serve, options: tuple[str, ...], trust: ssl.SSLContext) -> None:
    server = serve(*options, "--server.drain-seconds", "0", trust=trust)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trust.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with socket.create_connection(("127.0.0.1", server.port), 10) as end:

        def on(step: Callable[[], Any]) -> Any:
            while True:
                try:
                    result = step()
                except ssl.SSLWantReadError:
                    end.sendall(outgoing.read())
                    more = end.recv(65536)
                    assert more, "the end came without close_notify"
                    incoming.write(more)
                else:
                    end.sendall(outgoing.read())
                    return result

        on(client.do_handshake)
        client.write(HEAD.format(target="/ws").encode())
        assert on(lambda: client.read(1000)).startswith(b"HTTP/1.1 101 ")
        server.process.terminate()
        assert on(lambda: client.read(1000)) == frame(CLOSE, (1001).to_bytes(2, "big"), masked=False)
        assert on(lambda: client.read(1000)) == b""
        assert end.recv(100) == b""


def test_tls_begins_behind_the_header_of_a_proxy(serve: Serve, options: tuple[str, ...], trust: ssl.SSLContext) -> None:
    server = serve(*options, "--server.proxy-protocol", "--server.trusted-proxies", "127.0.0.1", trust=trust)
    with socket.create_connection(("127.0.0.1", server.port), 5) as end:
        end.sendall(b"PROXY TCP4 192.0.2.1 127.0.0.1 4711 443\r\n")
        with trust.wrap_socket(end, server_hostname="127.0.0.1") as client:
            client.sendall(HEAD.format(target="/ws").encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 101 ")


def test_room_in_the_url_passes_nothing(shared: Server) -> None:
    for number in range(10):
        with shared.dial(5) as end:
            end.sendall(HEAD.format(target=f"/ws?room={number}").encode())
            assert end.recv(1000).startswith(b"HTTP/1.1 101 ")
    assert _counted(shared)['handshakes_total{result="passed"}'] == 0


def test_start_with_unusable_files_is_refused_in_one_line(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "key.pem").unlink()
    command = [PYTHON, "-m", "fastsig", "serve", "--port", "0", "--ops.port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    complaint = f"server.tls_key = {tmp_path / 'key.pem'}: it cannot be read: No such file or directory"
    assert (done.returncode, done.stderr) == (2, f"fastsig: {complaint}\n")


def test_health_asks_by_tls(shared: Server, tmp_path: Path) -> None:
    def run(*args: str) -> tuple[int, str]:
        command = [PYTHON, "-m", "fastsig", "health", *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        return done.returncode, done.stdout + done.stderr

    tls = ("--server.tls-cert", "not read", "--server.tls-key", "not read")
    assert run("--port", str(shared.port), *tls) == (0, "alive\n")
    code, said = run("--url", f"https://127.0.0.1:{shared.port}")
    assert code == 1 and "certificate" in said.lower(), "a URL is believed when its certificate is"


# ---- new certificates


def _swap(authority: trustme.CA, tmp_path: Path, name: str) -> str:
    """As Kubernetes does it: `current` is another folder from one moment to the next. The serial number."""
    folder = tmp_path / name
    folder.mkdir()
    certified(authority, folder)
    temporary = tmp_path / "temporary"
    temporary.symlink_to(folder)
    temporary.rename(tmp_path / "current")
    return f"{x509.load_pem_x509_certificate((folder / 'chain.pem').read_bytes()).serial_number:x}"


def _linked(tmp_path: Path) -> tuple[str, ...]:
    current = tmp_path / "current"
    return "--server.tls-cert", str(current / "chain.pem"), "--server.tls-key", str(current / "key.pem")


def test_hangup_takes_the_new_certificate_and_keeps_what_it_has_of_a_bad_one(
    serve: Serve, authority: trustme.CA, trust: ssl.SSLContext, tmp_path: Path
) -> None:
    first = _swap(authority, tmp_path, "first")
    server = serve(*_linked(tmp_path), trust=trust)
    assert _serial(server) == first
    with server.dial(5) as old:
        second = _swap(authority, tmp_path, "second")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: _serial(server) == second, "the old certificate is still shown")
        old.sendall(HEAD.format(target="/ws").encode())
        assert old.recv(1000).startswith(b"HTTP/1.1 101 "), "who is there stays"
    _swap(authority, tmp_path, "third")
    (tmp_path / "third" / "key.pem").write_bytes((tmp_path / "second" / "key.pem").read_bytes())
    for _ in range(2):
        done = len(server.events("reloaded"))
        server.process.send_signal(signal.SIGHUP)
        until(lambda done=done: len(server.events("reloaded")) > done, "not reloaded")  # type: ignore[misc]
    until(lambda: bool(server.events("certificate_unusable")), "not said")
    assert _serial(server) == second
    assert len(server.events("certificate_unusable")) == 1
    assert [event["serial"] for event in server.events("certificate_loaded")] == [first, second]
    assert _counted(server)["tls_certificate_expires_seconds"] > 0


def _both_have(server: Server, serial: str) -> bool:
    return len([event for event in server.events("certificate_loaded") if event["serial"] == serial]) == 2


def test_reload_that_names_unusable_files_or_ends_tls_changes_nothing(
    serve: Serve, options: tuple[str, ...], trust: ssl.SSLContext, tmp_path: Path
) -> None:
    file = tmp_path / "fastsig.toml"
    cert, key = options[1::2]
    file.write_text(f'[server]\ntls_cert = "{cert}"\ntls_key = "{key}"\n', encoding="utf-8")
    server = serve("--config", str(file), trust=trust)
    serial = _serial(server)
    file.write_text(f'[server]\ntls_cert = "{cert}"\ntls_key = "{cert}"\n[limits]\nrooms = 1\n', encoding="utf-8")
    server.process.send_signal(signal.SIGHUP)
    assert "server.tls_key" in server.wait_for("reload_refused")["reason"]
    file.write_text("", encoding="utf-8")
    server.process.send_signal(signal.SIGHUP)
    assert server.wait_for("needs_restart")["options"] == ["server.tls_cert", "server.tls_key"]
    assert server.wait_for("reloaded")["options"] == []
    assert _serial(server) == serial


async def test_certificates_change_under_load_and_nobody_is_lost(
    serve: Serve, authority: trustme.CA, trust: ssl.SSLContext, tmp_path: Path
) -> None:
    _swap(authority, tmp_path, "0")
    server = serve(*_linked(tmp_path), "--workers", "2", trust=trust)
    rooms, rounds = 20, 8
    is_over = False

    async def pair(number: int) -> int:
        """Two peers that play ball; how often."""
        played = 0
        async with connect(server.url, ssl=trust, proxy=None) as a, connect(server.url, ssl=trust, proxy=None) as b:
            for end, name in ((a, "a"), (b, "b")):
                await end.send(json.dumps({"type": "join", "room": str(number), "sender": name}))
                assert json.loads(await end.recv())["type"] == "joined"
            assert json.loads(await a.recv())["type"] == "peer-joined"
            while not is_over:
                for one, other, to in ((a, b, "b"), (b, a, "a")):
                    ball = {"type": "message", "room": str(number), "recipient": to, "payload": played}
                    await one.send(json.dumps(ball))
                    assert json.loads(await asyncio.wait_for(other.recv(), 10))["payload"] == played
                    played += 1
                await asyncio.sleep(0.01)
        return played

    async with asyncio.TaskGroup() as group:
        pairs = [group.create_task(pair(number)) for number in range(rooms)]
        for number in range(1, rounds + 1):
            serial = _swap(authority, tmp_path, str(number))
            server.process.send_signal(signal.SIGHUP)
            await asyncio.to_thread(until, partial(_both_have, server, serial), "not loaded")
            assert await asyncio.to_thread(_serial, server) == serial
        is_over = True
    assert min(task.result() for task in pairs) > 2 * rounds
    assert _failures(server) == 0
