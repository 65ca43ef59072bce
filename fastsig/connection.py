"""The edge: from an accepted socket to a WebSocket that the relay reads and writes, and from its last frame to its end.

A connection begins as `Handshake`, which reads one HTTP request head and answers it: health, a refusal, or 101. Then
picows takes over (`adoption`): it sees no byte that a stranger wrote before the first frame, and one strict parser
(`read_head`) decides what a request is. `Edge` is what the relay asks of sockets.

Must not know: rooms, messages, processes. RFC 9112 §3, §5 and RFC 6455 §4.2 are the rules. Error bodies echo nothing.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import ipaddress
import math
import os
import re
import resource
import select
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Protocol
from urllib.parse import unquote_to_bytes

import msgspec

from . import logs, metrics
from ._relay import Connection, Relay, trim
from .adoption import Adopted, feed, new_websocket
from .auth import Grant, KeysWanted
from .config import Config
from .entrance import Entrance, Guest, reset
from .errors import FIRST_FINAL, CloseCode, HttpError, ProtocolError
from .protocol import SUBPROTOCOL
from .tls import Credentials, TlsTransport

_log = logs.get("fastsig.connection")

HEAD_BYTES: Final = 16384
HEADERS: Final = 128
# What the kernel keeps unread per connection, set on listening sockets. It bounds what one read loop takes, and so what
# picows' buffer grows to (until `Edge.renew`): 2.3 MiB per connection after a burst with the kernel's default, 0.1 so.
RECEIVE_BYTES: Final = 65536
ACCEPTS_PER_TURN: Final = 32
SPARE_DESCRIPTORS: Final = 64  # for links, full sockets that are watched, connections that are passed on
REST_S: Final = 0.1
# From the first read buffer that is given up to when the system gets the memory of all back: 0.1 ms per MiB, and what
# it got back is not looked at again.
TRIM_S: Final = 10.0
DISCARDED_AT_ONCE: Final = 65536  # of what comes behind a close; then it rests for ...
DISCARD_AGAIN_S: Final = 0.05
REFUSED_S: Final = 1.0  # for the request of one that is refused: it counts nowhere, and has a descriptor

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
# Each is one pass without a choice to go back to: no head makes them slow.
_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE: Final = re.compile(rb"(%b) (/[!-~]*) HTTP/(\d\.\d)" % _TOKEN)
# An empty or odd name is also how white space before the colon and folded lines show (RFC 9112 §5.1, §5.2).
_HEADER: Final = re.compile(rb"(%b):([^\x00-\x08\x0a-\x1f\x7f]*)" % _TOKEN)
_RESULTS: Final = metrics.indexes("handshakes_total")
_BUGS: Final = metrics.index("internal_errors_total")
_TLS_FAILURES: Final = metrics.index("tls_handshake_failures_total")
_CLIENT_HELLO: Final = b"\x16"  # begins TLS (RFC 8446 §5.1), and never a request
_BEARER: Final = "bearer."
_TEXT: Final = 1
_CLOSE: Final = 8
_TO_BE_TRIED_AGAIN: Final = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_LIVE: Final = frozenset({"/health/live", "/livez"})
_READY: Final = frozenset({"/health/ready", "/readyz"})
_FORWARDED: Final = frozenset({"forwarded", "via", "x-real-ip"})  # and whatever begins with x-forwarded


@dataclass(frozen=True, slots=True)
class Head:
    """One request head. Header names are lower case, values as sent (latin-1), repeated headers in order."""

    method: str
    path: str
    query: str
    headers: dict[str, list[str]]

    def one(self, name: str) -> str | None:
        """The value of a header that may stand once. Raises HttpError 400 when it is repeated."""
        values = self.headers.get(name, ())
        if len(values) > 1:
            raise _bad_request(f"The header {name} may be given once.")
        return values[0] if values else None

    def tokens(self, name: str) -> list[str]:
        """The members of a comma-separated list header, over all its lines, as written."""
        return [
            part.strip(" \t") for value in self.headers.get(name, ()) for part in value.split(",") if part.strip(" \t")
        ]


def _bad_request(sentence: str, *, headers: str = "") -> HttpError:
    return HttpError("bad_request", sentence, headers=headers)


def read_head(data: bytes) -> Head:
    """Parse the bytes before the empty line. Raises HttpError."""
    lines = data.split(b"\r\n")
    if len(lines) - 1 > HEADERS:
        raise _bad_request("There are too many headers.")
    method, path, query = _request_line(lines[0])
    headers: dict[str, list[str]] = {}
    for line in lines[1:]:
        parts = _HEADER.fullmatch(line)
        if parts is None:
            raise _bad_request("A header line is malformed.")
        headers.setdefault(parts[1].decode("ascii").lower(), []).append(parts[2].strip(b" \t").decode("latin-1"))
    head = Head(method, path, query, headers)
    length = head.one("content-length")
    if "transfer-encoding" in headers or (length is not None and (not length or length.strip("0"))):
        raise _bad_request("A request here has no body.")
    if len(headers.get("host", ())) != 1:
        raise _bad_request("The header host must be given once.")
    return head


def _request_line(line: bytes) -> tuple[str, str, str]:
    """Method, path, query."""
    parts = _REQUEST_LINE.fullmatch(line)
    if parts is None:
        raise _bad_request("The request line is malformed.")
    if parts[3] != b"1.1":
        raise _bad_request("Only HTTP/1.1 is spoken here.")
    path, _, query = parts[2].decode("ascii").partition("?")
    return parts[1].decode("ascii"), path, query


def accept_key(head: Head) -> tuple[str, str | None]:
    """The Sec-WebSocket-Accept value and the chosen subprotocol (RFC 6455 §4.2.2). Raises HttpError."""
    if "websocket" not in (token.lower() for token in head.tokens("upgrade")):
        raise _bad_request("This is a WebSocket endpoint: the header upgrade must say websocket.")
    if "upgrade" not in (token.lower() for token in head.tokens("connection")):
        raise _bad_request("The header connection must contain upgrade.")
    if head.one("sec-websocket-version") != "13":
        raise _bad_request("Only version 13 of WebSocket is spoken here.", headers="Sec-WebSocket-Version: 13\r\n")
    key = head.one("sec-websocket-key") or ""
    try:
        is_valid = len(base64.b64decode(key.encode("ascii"), validate=True)) == 16
    except (UnicodeEncodeError, binascii.Error):
        is_valid = False
    if not is_valid:
        raise _bad_request("The header sec-websocket-key must be 16 bytes in base64.")
    digest = hashlib.sha1(key.encode("ascii") + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode("ascii"), _subprotocol(head)


def _subprotocol(head: Head) -> str | None:
    offered = head.tokens("sec-websocket-protocol")
    if not offered:
        return None
    if SUBPROTOCOL not in offered:
        raise _bad_request(f"Offer the subprotocol {SUBPROTOCOL}, or none.")
    return SUBPROTOCOL


def room_in(query: str) -> str | None:
    """The first `room` of the query: percent-encoded UTF-8 (PROTOCOL §2); it joins nothing. Raises HttpError."""
    return _parameter(query, "room")


def token_in(head: Head) -> str | None:
    """The token that a request brings, of several the one to be preferred (PROTOCOL §2). Raises HttpError."""
    for offered in head.tokens("sec-websocket-protocol"):
        if offered.startswith(_BEARER):
            return offered.removeprefix(_BEARER)
    scheme, _, credentials = (head.one("authorization") or "").partition(" ")
    if scheme.lower() == "bearer":  # another one is between the client and a proxy
        return credentials.strip(" ")
    return _parameter(head.query, "token")


def _parameter(query: str, wanted: str) -> str | None:
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        if name == wanted:
            try:
                return unquote_to_bytes(value).decode("utf-8")
            except UnicodeDecodeError:
                raise _bad_request(f"The {wanted} in the query is not UTF-8.") from None
    return None


def http_response(status: int, body: bytes, *, headers: str = "", content_type: str = "application/json") -> bytes:
    """A whole answer after which the connection ends."""
    phrase = HTTPStatus(status).phrase
    return (
        f"HTTP/1.1 {status} {phrase}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"Cache-Control: no-store\r\nConnection: close\r\n{headers}\r\n"
    ).encode("ascii") + body


def switching(head: Head) -> bytes:
    """The answer 101. Raises HttpError where that is no proper upgrade."""
    accept, subprotocol = accept_key(head)
    chosen = f"Sec-WebSocket-Protocol: {subprotocol}\r\n" if subprotocol else ""
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n{chosen}\r\n"
    ).encode("ascii")


def _error_body(refusal: HttpError, *, is_final: bool = False) -> bytes:
    """One JSON error object. `is_final`: what follows it says that nothing is to be tried again."""
    may_retry = refusal.status in _TO_BE_TRIED_AGAIN and not is_final
    fields = {"type": "error", "code": refusal.code, "message": refusal.sentence, "retry": may_retry}
    if refusal.after_ms is not None and may_retry:
        fields["after_ms"] = refusal.after_ms
    return msgspec.json.encode(fields)


def _server_frame(opcode: int, payload: bytes) -> bytes:
    """One whole frame of less than 64 KiB."""
    size = len(payload)
    length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
    return bytes([0x80 | opcode]) + length + payload


class _Request(Protocol):
    """One handshake as `tracing` sees it."""

    def read(self, traceparents: Sequence[str], peername: Any) -> None: ...
    def passing(self) -> str: ...
    def passed(self, result: str) -> None: ...
    def end(self, connection: Connection, result: str) -> None: ...


class _Tracer(Protocol):
    def begin(self, trace: str | None) -> _Request: ...


class _Admission(Protocol):
    """`admission.Admission`."""

    def check(self, token: str) -> Grant: ...
    def when_fetched(self, source: str, then: Callable[[], None]) -> Callable[[], None]: ...
    def adopt(self, connection: Connection, grant: Grant) -> bool: ...


def _as_http(code: str) -> HttpError:
    """A token was refused."""
    if code == "backend_unavailable":
        return HttpError(code, "The keys that check tokens cannot be had now.", headers="Retry-After: 5\r\n")
    challenge = 'WWW-Authenticate: Bearer error="invalid_token"\r\n'
    if code == "token_expired":
        return HttpError(code, "The token has expired.", headers=challenge, close_code=CloseCode.TOKEN_EXPIRED)
    return HttpError("unauthorized", "The token is not valid.", headers=challenge, close_code=CloseCode.UNAUTHORIZED)


def is_local(head: Head, peername: object) -> bool:
    """Did somebody on this machine send it, as far as one can see? What a proxy here passes on mostly says so."""
    if any(name in _FORWARDED or name.startswith("x-forwarded") for name in head.headers):
        return False
    if not isinstance(peername, tuple):
        return False
    address = ipaddress.ip_address(peername[0].partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


class Door:
    """What a request may open: the path of the WebSocket, the one that echoes, health. One per worker.

    `pass_on(handshake, room, received)`: is another worker asked to serve this connection, because it owns the room?
    Then either `Handshake.let_go` or `Handshake.serve` follows. `tracer`: hears of handshakes, where traces are wanted.
    `entrance`: limits, proxies and origins; without one those of the default configuration. `credentials`: for TLS;
    such a connection is passed to nobody, since its keys are in this process.
    """

    def __init__(
        self,
        relay: Relay,
        *,
        path: str,
        echo_path: str = "",
        pass_on: "Callable[[Handshake, str, bytes], bool] | None" = None,
        entrance: Entrance | None = None,
    ) -> None:
        self.relay = relay
        self.path = path
        self.echo_path = echo_path
        self.pass_on = pass_on
        self.entrance = entrance or Entrance(relay, Config())
        self.tracer: _Tracer | None = None
        self.admission: _Admission | None = None
        self.credentials: Credentials | None = None
        self.is_ready = True
        self._beginning: dict[asyncio.Task[Any], tuple[socket.socket, Guest]] = {}
        self._adopting: set[asyncio.Task[Any]] = set()  # of them

    def configure(self, config: Config) -> None:
        """What reloads."""
        self.entrance.configure(config)

    def serve(self, fd: int) -> None:
        """Serve a connection that another process has accepted; takes the descriptor over. Call within the loop."""
        end = socket.socket(fileno=fd)
        try:
            peername = end.getpeername()
        except OSError:  # it is gone already, as will be seen
            peername = None
        self.welcome(end, peername)

    def welcome(self, end: socket.socket, peername: object) -> None:
        """Serve a connection that was accepted from there, if limits let it in; takes the socket over."""
        guest = self.entrance.meet(peername)
        if self.entrance.expects_header(guest):
            self.entrance.read_header(end, guest, self._receive)
        else:
            self._receive(end, guest)

    def _receive(self, end: socket.socket, guest: Guest) -> None:
        """Who it is, is known as far as the address goes."""
        if guest.refusal is not None and guest.refusal.is_deep:
            reset(end)
        else:
            self._begin(end.detach(), guest, partial(self._handshake, guest))

    def _handshake(self, guest: Guest) -> asyncio.BaseProtocol:
        """One that begins here."""
        if self.credentials is None:
            return Handshake(self, guest=guest, pass_on=self.pass_on)
        return TlsTransport(self.credentials.certificate.context, Handshake(self, guest=guest), self._on_tls_failure)

    def take_over(self, fd: int, received: bytes, address: str, *, trace: str | None = None) -> None:
        """Serve what another worker passed on, after it had read so much; takes the descriptor over.

        `address`: the client's; `trace`: the traceparent of what that worker did. It is passed to nobody else.
        """
        guest = self.entrance.take_over(address)
        self._begin(fd, guest, lambda: Handshake(self, received, guest=guest, is_passed=True, trace=trace))

    def adopt(self, fd: int, guest: Guest, adopted: Adopted) -> None:
        """Serve a connection that another worker has served; takes the descriptor over. It ends where that fails."""
        task = self._begin(fd, guest, lambda: adopted)
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)

    @property
    def is_adopting(self) -> bool:
        """Is one on its way that is not among the connections yet?"""
        return bool(self._adopting)

    def _begin(self, fd: int, guest: Guest, protocol: Callable[[], asyncio.BaseProtocol]) -> "asyncio.Task[Any]":
        loop = asyncio.get_running_loop()
        end = socket.socket(fileno=fd)
        end.setblocking(False)
        task = loop.create_task(loop.connect_accepted_socket(protocol, end))
        self._beginning[task] = (end, guest)
        task.add_done_callback(self._on_begun)
        return task

    def _on_begun(self, task: "asyncio.Task[Any]") -> None:
        end, guest = self._beginning.pop(task)
        if task.cancelled() or task.exception() is not None:  # no memory or descriptor for it: nobody else to blame
            end.close()
            guest.end()
            _log.debug("cannot_serve", reason=str(task.cancelled() or task.exception()))

    def _on_tls_failure(self) -> None:
        self.relay.count(_TLS_FAILURES)

    def is_for_echo(self, head: Head) -> bool:
        """Does it ask for the path that echoes?"""
        return head.path == self.echo_path  # "" is no request's

    def answer(self, head: Head, peername: object, guest: Guest) -> tuple[bytes, str | None]:
        """The answer to a request, 101 (then frames follow) or whole; and for which room. Raises HttpError.

        Health is answered whatever limits say of the one who asks.
        """
        is_about_health = head.path in _LIVE or head.path in _READY
        if not is_about_health:
            self.entrance.admit(guest, head)
        if head.method != "GET":
            raise HttpError("method_not_allowed", "Only GET is answered here.", headers="Allow: GET\r\n")
        if head.path in _LIVE:
            return http_response(200, b"OK\n", content_type="text/plain"), None
        if head.path in _READY:
            if not self.is_ready:
                raise HttpError("draining", "The server is going away.", headers="Retry-After: 5\r\n")
            return http_response(200, b"OK\n", content_type="text/plain"), None
        is_for_echo = self.is_for_echo(head)
        if is_for_echo and not is_local(head, peername):
            raise HttpError("forbidden", "This is for tests on the server's own machine.")
        if not is_for_echo and head.path != self.path:
            raise HttpError("not_found", "There is nothing here.")
        room = None if is_for_echo else room_in(head.query)
        answer = switching(head)
        if not self.is_ready:
            raise HttpError("draining", "The server is going away.", headers="Retry-After: 5\r\n")
        self.entrance.check_origin(head)
        return answer, room

    def check_token(self, head: Head) -> Grant | None:
        """What the token of the request grants, if it brings one. Raises HttpError, KeysWanted."""
        token = None if self.admission is None or self.is_for_echo(head) else token_in(head)
        if token is None or self.admission is None:
            return None
        try:
            return self.admission.check(token)
        except ProtocolError as refusal:
            raise _as_http(refusal.entry.code) from refusal

    def tell(self, head: Head, refusal: HttpError) -> bytes | None:
        """All that a browser, which cannot read the answer to its handshake, gets in place of a refusal: 101, the
        error as a message, and the close. None: the refusal it is."""
        if not (refusal.close_code and self.entrance.tells_browsers and head.headers.get("origin")):
            return None
        try:
            answer = switching(head)
        except HttpError:
            return None
        code = refusal.close_code.to_bytes(2, "big")
        error = _error_body(refusal, is_final=refusal.close_code >= FIRST_FINAL)
        return answer + _server_frame(_TEXT, error) + _server_frame(_CLOSE, code)


class Handshake(asyncio.Protocol):
    """Reads one request head. Its time-out is the connection's first deadline in the wheel, soon for who is refused.

    `received`: what another worker had read from the connection already. `guest`: who it is, as far as that is known.
    `pass_on`: see `Door`; `is_passed`: another worker did that, so this one does not; `trace`: `Door.take_over`.
    """

    __slots__ = ("_connection", "_door", "_guest", "_is_passed", "_pass_on", "_received", "_request", "_transport")

    def __init__(
        self,
        door: Door,
        received: bytes = b"",
        *,
        guest: Guest | None = None,
        pass_on: "Callable[[Handshake, str, bytes], bool] | None" = None,
        is_passed: bool = False,
        trace: str | None = None,
    ) -> None:
        self._guest = guest or Guest("")
        self._is_passed = is_passed
        self._door = door
        self._received = received
        self._pass_on = pass_on
        self._request = None if door.tracer is None else door.tracer.begin(trace)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._connection = Connection(self._door.relay)
        self._connection.lease = self._guest
        self._connection.attach(transport, math.inf if self._guest.refusal is None else REFUSED_S)
        if self._received:
            self.data_received(b"")

    def data_received(self, data: bytes) -> None:
        """Every byte of a head that dribbles in costs a copy of what is there: at most HEAD_BYTES."""
        if not self._connection.is_shaking:
            return
        self._received = received = self._received + data
        end = received.find(b"\r\n\r\n", 0, HEAD_BYTES + 4)
        speaks_tls = received[:1] == _CLIENT_HELLO
        if end < 0 and len(received) < HEAD_BYTES and not speaks_tls:
            return
        head = None
        try:
            if speaks_tls:
                raise _bad_request("TLS is not spoken here: use http:// or ws://.")
            if end < 0:
                raise _bad_request("The request head is too long.")
            head = read_head(received[:end])
            peername = self._transport.get_extra_info("peername")
            if self._request is not None:
                self._request.read(head.headers.get("traceparent", ()), peername)
            answer, room = self._door.answer(head, peername, self._guest)
            if room is not None and self._pass_on is not None and self._pass_on(self, room, received):
                self._transport.pause_reading()  # not a byte more: whoever serves it gets what was read
                return
            grant = self._door.check_token(head)
        except KeysWanted as wanted:
            self._wait_for_keys(wanted.source)
        except HttpError as refusal:
            self._refuse(refusal, head)
        except Exception:  # noqa: BLE001 (the acceptor is one of the three places that catch broadly)
            _log.exception("internal_error")
            self._door.relay.count(_BUGS)
            self._refuse(
                HttpError("internal", "The server failed to handle this request.", headers="Retry-After: 5\r\n")
            )
        else:
            if answer.startswith(b"HTTP/1.1 101"):
                self._upgrade(answer, received[end + 4 :], grant, is_for_echo=self._door.is_for_echo(head))
            else:
                self._connection.send_last(answer)

    def _wait_for_keys(self, source: str) -> None:
        """Of each issuer once; the time-out of the handshake goes on."""
        assert self._door.admission is not None  # it wants them
        self._transport.pause_reading()
        self._door.admission.when_fetched(source, self._resume)

    def _resume(self) -> None:
        if self._connection.is_shaking:
            self._pass_on = None
            self._transport.resume_reading()
            self.data_received(b"")

    def fileno(self) -> int:
        """The socket's. It stays the transport's."""
        fd: int = self._transport.get_extra_info("socket").fileno()
        return fd

    @property
    def address(self) -> str:
        """The client's, as far as it is known."""
        return self._guest.address

    @property
    def is_waiting(self) -> bool:
        """Is the connection still there to be passed on, or served?"""
        return self._connection.is_shaking

    def trace(self) -> str | None:
        """The traceparent for the other worker to go on with, where there is one."""
        return None if self._request is None else self._request.passing()

    def end_offer(self, result: str) -> None:
        """Another worker was asked, and this came of it."""
        if self._request is not None:
            self._request.passed(result)

    def let_go(self) -> None:
        """It is another process's connection now: close this descriptor of it."""
        self._door.relay.count(_RESULTS["passed"])
        self.end_offer("passed")
        self._connection.let_go()
        self._transport.abort()

    def serve(self) -> None:
        """It is ours after all. The other process may hold its copy a while yet, one that is stopped."""
        self._connection.is_copied = True
        self._resume()

    def _refuse(self, refusal: HttpError, head: Head | None = None) -> None:
        self._door.relay.count(_RESULTS[refusal.code])
        told = None if head is None else self._door.tell(head, refusal)
        self._connection.send_last(told or http_response(refusal.status, _error_body(refusal), headers=refusal.headers))
        if self._request is not None:
            self._request.end(self._connection, refusal.code)

    def _upgrade(self, answer: bytes, tail: bytes, grant: Grant | None, *, is_for_echo: bool) -> None:
        """The hand-over to picows. What came pipelined behind the head are frames already."""
        connection = self._connection
        connection.address = self._guest.address
        websocket = new_websocket(connection)
        connection.send_raw(answer)
        connection.open()
        if self._is_passed:
            connection.may_move = False
        if is_for_echo:
            connection.echo()
        if grant is not None and self._door.admission is not None:
            self._door.admission.adopt(connection, grant)
        self._transport.set_protocol(websocket)
        self._received = b""
        if self._request is not None:
            self._request.end(connection, "accepted")
        if tail:
            feed(websocket, tail, connection)

    def eof_received(self) -> None:
        """The peer is done before it began: the transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.lost()


def descriptor_limits() -> tuple[int, int]:
    """How many this process may have, and the number from which on one is not for another connection."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        most = sys.maxsize
    return most, most - min(SPARE_DESCRIPTORS, most // 16)


class Acceptor:
    """Accepts from one listening socket, which it takes over. `welcome(end, peername)` gets each connection,
    close-on-exec.

    It stops shortly before this process has no descriptor left, and goes on when some are closed: a loop that cannot
    accept what is waiting burns a core. A server of the loop would do that; it also costs a third more CPU per
    connection. `is_shared`: other processes accept from the socket too, and one of them is to wake per connection.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        welcome: Callable[[socket.socket, object], None],
        *,
        is_shared: bool = False,
    ) -> None:
        listener.setblocking(False)
        self._loop = loop
        self._listener = listener
        self._welcome = welcome
        self._most, self._ceiling = descriptor_limits()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._sleeper = _Sleeper(listener.fileno(), self._wake) if is_shared else None
        self._watch()

    @property
    def is_resting(self) -> bool:
        """Descriptors are short: what waits is left to others."""
        return self._timer is not None

    def _watch(self) -> None:
        if self._sleeper is None:
            self._loop.add_reader(self._listener.fileno(), self._on_readable)
        else:
            self._sleeper.sleep()

    def _wake(self) -> None:
        """Called in the sleeper's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._on_woken)

    def _on_woken(self) -> None:
        if not self._is_closed:
            self._on_readable()
            if self._timer is None:
                self._watch()

    def _on_readable(self) -> None:
        try:
            for _ in range(ACCEPTS_PER_TURN):
                end, peername = self._listener.accept()
                fd = end.fileno()
                self._welcome(end, peername)
                if fd >= self._ceiling:  # the lowest that is free is given: so many are open
                    _log.warning("descriptors_short", limit=self._most)
                    self._rest()
                    return
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            _log.warning("cannot_accept", reason=str(error))
            self._rest()

    def _rest(self) -> None:
        if self._sleeper is None:
            self._loop.remove_reader(self._listener.fileno())
        self._timer = self._loop.call_later(REST_S, self._look)

    def _look(self) -> None:
        """Is there room again? A tenth of it, so that it is not said of each connection that goes."""
        try:
            fd = os.dup(self._listener.fileno())
            os.close(fd)
        except OSError:
            fd = self._most
        if fd < self._ceiling - self._most // 10:
            self._timer = None
            self._watch()
        else:
            self._timer = self._loop.call_later(REST_S, self._look)

    def close(self) -> None:
        """Idempotent. Others that have the listening socket go on."""
        if not self._is_closed:
            self._is_closed = True
            if self._timer is not None:
                self._timer.cancel()
            if self._sleeper is None:
                self._loop.remove_reader(self._listener.fileno())
            else:
                self._sleeper.close()
            self._listener.close()


class _Sleeper:
    """Wakes for connections of a shared listening socket: of all processes that sleep so, the kernel wakes one.

    EPOLLEXCLUSIVE counts only those who sleep in the very epoll that watches the socket; a loop that watches this epoll
    is not one (measured: with 8 workers each connection woke all 8). So a thread sleeps. `wake` is called in it, once
    for each `sleep`.
    """

    def __init__(self, fd: int, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll.register(self._end, select.EPOLLIN)
        self._may_sleep = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sleep(self) -> None:
        """Until there is a connection."""
        self._may_sleep.release()

    def _run(self) -> None:
        while True:
            self._may_sleep.acquire()
            if any(fd == self._end for fd, _ in self._epoll.poll()):
                return
            self._wake()

    def close(self) -> None:
        """Waits for the end of the thread."""
        os.eventfd_write(self._end, 1)
        self._may_sleep.release()
        self._thread.join()
        self._epoll.close()
        os.close(self._end)


class Discard(asyncio.Protocol):
    """Our last frame is out: what still comes is thrown away, so that no RST eats that frame (PROTOCOL §3.5).

    Slowly, where it is much: the loop reads 8 MiB in one turn from a peer that floods.
    """

    __slots__ = ("_call_later", "_connection")

    def __init__(self, connection: Connection, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self._connection = connection
        self._call_later = call_later

    def data_received(self, data: bytes) -> None:
        """Nothing comes of it."""
        transport = self._connection.transport
        if len(data) >= DISCARDED_AT_ONCE and transport is not None:
            transport.pause_reading()
            self._call_later(DISCARD_AGAIN_S, self._go_on)

    def _go_on(self) -> None:
        transport = self._connection.transport
        if transport is not None and not transport.is_closing():
            transport.resume_reading()

    def eof_received(self) -> None:
        """The transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.lost()


class Edge:
    """What the relay asks of sockets. The descriptor of a transport is only written to and shut, never closed here."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # A duplicate descriptor each, since uvloop watches no transport's own; -1 where there was none to be had.
        self._watched: dict[Connection, int] = {}
        self._unwatched = 0
        self._is_trimming = False

    def block(self, connection: Connection) -> None:
        """Call `connection.writable()` whenever its socket takes bytes, until `unblock`."""
        fd = -1
        try:
            fd = os.dup(connection.transport.get_extra_info("socket").fileno())
            self._loop.add_writer(fd, connection.writable)
        except OSError as reason:  # out of descriptors or memory: `retry` looks after it
            if fd >= 0:
                os.close(fd)
            fd = -1
            if not self._unwatched:
                _log.warning("cannot_watch", reason=str(reason))
            self._unwatched += 1
        self._watched[connection] = fd

    def unblock(self, connection: Connection) -> None:
        """Stop watching."""
        fd = self._watched.pop(connection)
        if fd < 0:
            self._unwatched -= 1
        else:
            self._loop.remove_writer(fd)
            os.close(fd)

    def retry(self) -> None:
        """Try those that nobody watches; call a few times a second."""
        if self._unwatched:
            for connection in [connection for connection, fd in self._watched.items() if fd < 0]:
                connection.writable()

    def pause(self, connection: Connection) -> None:
        """Read nothing more from it, until `resume`. Its end is not seen meanwhile."""
        connection.transport.pause_reading()

    def resume(self, connection: Connection) -> None:
        """Read again."""
        connection.transport.resume_reading()

    def discard(self, connection: Connection) -> None:
        """Throw away what still comes from that peer."""
        connection.transport.set_protocol(Discard(connection, self._loop.call_later))

    def renew(self, connection: Connection) -> None:
        """Let picows begin anew. It may be in the midst of a read: the old protocol gets nothing more, and the loop
        holds it until it returns."""
        connection.transport.set_protocol(new_websocket(connection))
        if not self._is_trimming:
            self._is_trimming = True
            self._loop.call_later(TRIM_S, self._trim)

    def _trim(self) -> None:
        self._is_trimming = False
        trim()

    def linger(self, connection: Connection) -> None:
        """The last byte is with the kernel: say so (FIN) and wait for the peer's; the wheel ends it in 2 s."""
        connection.transport.write_eof()

    def drop(self, transport: Any) -> None:
        """Close now. Nothing of ours waits: the relay dropped or sent it."""
        transport.abort()
