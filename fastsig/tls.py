"""TLS that ends in the worker: the certificate with its key, and the records between a socket and a connection.

`Credentials` holds the context that the next connection gets, and makes a new one when the files change: a context is
never changed, so half of a change is never served. `TlsTransport` stands between the loop's transport and a protocol.

The loop's own TLS would keep what the kernel refused where the relay cannot count it, knows no half-closed connection,
and has a time-out of its own. Measured (docs/tls.md): against uvloop's, memory per connection is a fifth less, CPU per
message a tenth more at 200 bytes and a quarter less at 2,500; aiofastnet's saves a tenth to a fifth of the CPU, takes
two thirds more memory, and reads the innards of `ssl`.

Invariants: what `send` was given is with the kernel, or counted by whoever gave it. Nothing that the peer makes OpenSSL
say by itself grows without bound. The descriptor belongs to the transport below, and is not used once that is closed.
Must not know: HTTP, WebSocket, the relay. Read `connection` next, whose `Door` decides who gets TLS.
"""

import asyncio
import contextlib
import datetime as dt
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from . import logs
from .config import Server
from .errors import ConfigError

POLL_S: Final = 30.0  # how often it is looked whether the files have changed
# Of ciphertext that goes in, and of plain text that goes out, at once: OpenSSL's buffers grow to that, and stay.
SLICE: Final = 8192
# Of ciphertext without a byte of plain text in it: a record has 16 KiB, and to have OpenSSL change its keys, or look at
# nothing, costs 10 µs for each 27 bytes that no limit of messages sees.
IDLE_BYTES: Final = 65536
ANSWERS_BYTES: Final = 65536  # what OpenSSL says by itself (a new key, an alert) to one who does not read
RETRY_S: Final = 0.05
_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_INPUT: Final = memoryview(bytearray(65536))  # of all connections: each read is taken out of it before the next

_log = logs.get("fastsig.tls")


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the files say. `serial` in hexadecimal, `expires_at` in unix seconds."""

    context: ssl.SSLContext
    serial: str
    expires_at: int


def load(server: Server) -> Certificate:
    """Read `tls_cert` and `tls_key`. Raises ConfigError: which file, why, and the cure."""
    chain, key = _read("server.tls_cert", server.tls_cert), _read("server.tls_key", server.tls_key)
    serial, expires_at = _facts(server.tls_cert, chain)
    if b"PRIVATE KEY-----" not in key:
        raise _refusal("server.tls_key", server.tls_key, "there is no private key in PEM in it")
    return Certificate(_context(server), serial, expires_at)


def check(server: Server) -> None:
    """Raises ConfigError as `load` does; without TLS there is nothing to check."""
    if server.tls_cert:
        load(server)


def _context(server: Server) -> ssl.SSLContext:
    """Ciphers are the library's: for TLS 1.2 those with forward secrecy and authenticated encryption come first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[server.tls_min_version]
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(server.tls_cert, server.tls_key, password=lambda: b"")  # else OpenSSL asks a terminal
    except (OSError, ValueError) as error:  # SSLError is the former
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            cure = f"it is not the key of {server.tls_cert}: give both of one certificate"
        else:
            cure = f"give the key without a passphrase, and the certificate first in its file ({_short(error)})"
        raise _refusal("server.tls_key", server.tls_key, cure) from None
    return context


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _refusal(key, path, f"it cannot be read: {error.strerror}") from None


def _facts(path: str, chain: bytes) -> tuple[str, int]:
    """Serial number and end of the first certificate."""
    from cryptography import x509  # noqa: PLC0415 # 60 ms, only with TLS

    try:
        first = x509.load_pem_x509_certificate(chain)
        expires: dt.datetime = first.not_valid_after_utc
    except ValueError:
        raise _refusal("server.tls_cert", path, "there is no certificate in PEM in it") from None
    return f"{first.serial_number:x}", int(expires.timestamp())


def _refusal(key: str, path: str, reason: str) -> ConfigError:
    return ConfigError(f"{key} = {path}: {reason}")


def _short(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error)


class Credentials:
    """The certificate that new connections get, as the files have it. Raises ConfigError when they have none."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._seen = self._state()
        self._complaint = ""
        self.certificate = load(server)
        self._tell()

    def configure(self, server: Server) -> None:
        """Read the files again, or others. Those that cannot be used change nothing, and are tried again by `poll`."""
        self._server = server
        self._seen = None
        self.poll()

    def poll(self) -> None:
        """Read the files again if they have changed, by a symbolic link on the way to them too."""
        state = self._state()  # first: what changes while they are read is seen the next time
        if state == self._seen:
            return
        try:
            certificate = load(self._server)
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                _log.warning("certificate_unusable", reason=str(error), serial=self.certificate.serial)
            return
        self._seen, self._complaint, self.certificate = state, "", certificate
        self._tell()

    def _tell(self) -> None:
        expires = dt.datetime.fromtimestamp(self.certificate.expires_at, dt.UTC)
        _log.info("certificate_loaded", serial=self.certificate.serial, expires=expires.isoformat())

    def _state(self) -> object:
        try:
            return [_state_of(path) for path in (self._server.tls_cert, self._server.tls_key)]
        except OSError as error:
            return str(error)


def _state_of(path: str) -> tuple[object, ...]:
    real = os.path.realpath(path)
    found = os.stat(real)  # noqa: PTH116 # beside realpath, which pathlib has only as one that makes objects
    return real, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


class TlsTransport(asyncio.BufferedProtocol):
    """Server-side TLS over a transport of the loop, and the transport of `protocol`, as far as that needs one.

    `protocol` hears of the connection at once, so that one deadline counts for TLS and what follows. It may be
    replaced at any time. `on_failure` is called when a handshake of TLS that began came to nothing.
    """

    __slots__ = (
        "_context", "_fd", "_get_buffer", "_idle", "_incoming", "_is_over", "_is_paused", "_is_shaken", "_object",
        "_on_failure", "_outgoing", "_protocol", "_taken", "_transport", "_unsent",
    )  # fmt: skip

    def __init__(self, context: ssl.SSLContext, protocol: Any, on_failure: Callable[[], None]) -> None:
        self._context = context
        self._on_failure = on_failure
        self._protocol: Any
        self._get_buffer: Any
        self._object: Any = None  # ssl.SSLObject: from the first byte on, so that who says nothing costs nothing
        self._unsent = b""  # ciphertext that the kernel refused
        self._idle = 0  # bytes of ciphertext that have come since the last one of plain text was delivered
        self._taken = 0  # bytes of plain text that are encrypted and not yet with the kernel
        self._is_shaken = self._is_over = self._is_paused = False
        self.set_protocol(protocol)

    # ---- what the loop's transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._fd: int = transport.get_extra_info("socket").fileno()
        self._protocol.connection_made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _INPUT

    def buffer_updated(self, nbytes: int) -> None:
        for at in range(0, nbytes, SLICE):
            if self._is_over:  # nobody wants to know what is in it
                return
            if self._object is None:
                self._begin()
            self._idle += self._incoming.write(_INPUT[at : min(at + SLICE, nbytes)])
            self._take()

    def eof_received(self) -> None:
        """The transport closes itself. What WebSocket said is whole or not, with close_notify as without it."""
        self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        has_failed = self._object is not None and not self._is_shaken
        protocol = self._protocol
        self._is_over = True
        self._fd = -1
        self._object = self._protocol = self._get_buffer = None
        if has_failed:
            self._on_failure()
        protocol.connection_lost(exc)

    # ---- what the connection calls

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._context if name == "sslcontext" else self._transport.get_extra_info(name, default)

    def get_protocol(self) -> Any:
        return self._protocol

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol
        self._get_buffer = getattr(protocol, "get_buffer", None)

    def send(self, data: bytes) -> int:
        """Encrypt at most a record's worth, and give it to the kernel: how many bytes, all of which it took.

        As with SSL_write: after BlockingIOError the same bytes must be first in the next call. Raises OSError when the
        connection is broken.
        """
        if not self._taken:
            try:
                self._taken = self._object.write(data)
            except ssl.SSLError as error:
                raise ConnectionAbortedError(_short(error)) from error
        self._push()
        taken, self._taken = self._taken, 0
        return taken

    def pause_reading(self) -> None:
        self._is_paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Later: whoever calls this is not ready to be called."""
        self._is_paused = False
        self._transport.resume_reading()
        asyncio.get_running_loop().call_soon(self._take)

    def write_eof(self) -> None:
        """close_notify, then FIN. What still comes is read, so that no RST eats what was sent, and thrown away."""
        self._finish()
        self._transport.write_eof()

    def abort(self) -> None:
        """Close now, with close_notify if there is room for it."""
        self._finish()
        self._fd = -1
        self._transport.abort()

    # ---- records

    def _begin(self) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = self._context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    def _take(self) -> None:
        """Whatever has come in whole, unless the protocol wants nothing now."""
        if self._object is None:
            return
        try:
            if not self._is_shaken:
                self._object.do_handshake()
                self._is_shaken = True
            while not (self._is_over or self._is_paused) and (self._incoming.pending or self._object.pending()):
                self._deliver()
        except ssl.SSLWantReadError:  # all that has come is looked at
            if self._idle > IDLE_BYTES:
                self._fail("it says nothing")
        except ssl.SSLError as error:
            self._fail(_short(error))
        self._answer()

    def _deliver(self) -> None:
        if self._get_buffer is None:
            data = self._object.read(SLICE)
            count = len(data)
            if count:
                self._idle = 0
                self._protocol.data_received(data)
        else:
            room = self._get_buffer(-1)
            count = self._object.read(len(room), room)
            del room  # picows may give its buffer up in there
            if count:
                self._idle = 0
                self._protocol.buffer_updated(count)
        if not count:  # close_notify: as if it were FIN
            self._protocol.eof_received()
            self._finish()
            self._transport.close()

    def _push(self) -> None:
        """Give the kernel all that is encrypted. Raises BlockingIOError, to be called again, and OSError."""
        while data := self._unsent or self._outgoing.read():
            self._unsent = data
            self._unsent = data[os.write(self._fd, data) :]

    def _answer(self) -> None:
        """Send what OpenSSL says by itself: its part of the handshake, tickets, alerts, answers to a new key."""
        if self._is_over or not (self._unsent or self._outgoing.pending):
            return
        try:
            self._push()
        except BlockingIOError:
            if len(self._unsent) + self._outgoing.pending > ANSWERS_BYTES:
                self._fail("it takes no answers")
            elif not self._is_shaken:  # the kernel takes 16 KiB at the least: a certificate chain is hardly so long
                asyncio.get_running_loop().call_later(RETRY_S, self._answer)
        except OSError as error:
            self._fail(_short(error))

    def _fail(self, reason: str) -> None:
        """The peer, or the way to it, is broken. It is told by an alert, if that can be sent."""
        _log.debug("tls_failed", reason=reason, is_handshake=not self._is_shaken)
        with contextlib.suppress(OSError):
            self._push()
        self._is_over = True
        self._transport.abort()

    def _finish(self) -> None:
        """Our close_notify, once: nothing is read or sent behind it."""
        if self._is_over:
            return
        self._is_over = True
        if self._is_shaken:
            with contextlib.suppress(ssl.SSLError):  # always: that of the peer is not here yet, or data is
                self._object.unwrap()
            with contextlib.suppress(OSError):
                self._push()
