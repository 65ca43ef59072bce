"""Who stands at the door: a connection's address, whether limits let it in, and whether its page may connect.

`Entrance` meets each connection when it is accepted, charges its address, and gives a `Guest` to keep with it. Whoever
comes through a trusted proxy is named by that: in a PROXY header before anything else (`HeaderReader`), or in the
request's X-Forwarded-For; only then is its address charged.

Must not know: how a request is read or answered, rooms, messages. Invariant: what a guest counts for is given back
exactly once, by `Guest.end`, whatever became of its connection. Read `connection` next, where the `Door` asks.
"""

import asyncio
import contextlib
import math
import socket
import struct
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Final, Protocol

from . import logs, metrics
from ._relay import Relay
from .admission import HitLog
from .config import Config, split_origin
from .errors import CloseCode, HttpError
from .limits import Addresses, Refusal, address_key
from .proxies import V2_BYTES, Header, Trusted, client_address, parse, plain_address

_log = logs.get("fastsig.entrance")

SAME_ADDRESS: Final = 1000  # connections, all from one private address: is that a proxy?

_HITS: Final = {
    (limit, is_enforced): metrics.index("limit_hits_total", limit, "enforced" if is_enforced else "dry_run")
    for limit in metrics.LIMITS
    for is_enforced in (True, False)
}
_TRACKED: Final = metrics.index("tracked_addresses")
_TIMEOUT: Final = metrics.index("handshakes_total", "timeout")
_GONE: Final = metrics.index("handshakes_total", "gone")
_MALFORMED: Final = metrics.index("handshakes_total", "bad_request")
_RESET: Final = struct.pack("ii", 1, 0)  # of SO_LINGER: closing throws away what waits, and says RST
_SENTENCES: Final = {
    "connects_per_s_per_address": "Too many connections are made from your address.",
    "connections_per_address": "There are as many connections from your address as allowed.",
    "connects_per_s": "The server is busy with new connections.",
    "connections": "The server has as many connections as allowed.",
}


class Guest:
    """One connection as limits see it. `address`: where it comes from, "" where that is unknown.

    `refusal`: what its request is to be answered with. `is_proxied`: a trusted proxy is at `address`, and nothing is
    charged before its request; `is_named`: the request may say whom it speaks for.
    """

    __slots__ = ("_addresses", "_key", "address", "is_named", "is_proxied", "refusal")

    def __init__(self, address: str) -> None:
        self.address = address
        self.is_proxied = False
        self.is_named = True
        self.refusal: Refusal | None = None
        self._key = ""
        self._addresses: Addresses | None = None  # those that count it

    def charge(self, addresses: Addresses, now: float, *, is_new: bool) -> None:
        """Count it, or not, with a refusal. `is_new`: another worker has not met it before."""
        self._key = address_key(self.address)
        if is_new:
            self.refusal = addresses.connect(self._key, now)
        if self.refusal is None:
            self.refusal = addresses.open(self._key, now)
            if self.refusal is None:
                self._addresses = addresses

    def end(self) -> None:
        """The connection is gone, or another worker's."""
        if self._addresses is not None:
            self._addresses.close(self._key)
            self._addresses = None


class _Head(Protocol):
    @property
    def headers(self) -> dict[str, list[str]]: ...
    def one(self, name: str) -> str | None: ...


class Entrance:
    """The limits, proxies and origins of one worker. `clock`: monotonic seconds."""

    def __init__(self, relay: Relay, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._relay = relay
        self._clock = clock
        self._hit_log = HitLog(clock)
        self._last = ""  # the address of the latest connection
        self._same = 0  # how many before it had that too, without a break
        self._readers: set[HeaderReader] = set()
        self.addresses = Addresses(config.limits, self.hit, clock())
        self.configure(config)

    def configure(self, config: Config) -> None:
        """New values hold from the next connection on."""
        self.addresses.configure(config.limits)
        self.proxies = Trusted(config.server.trusted_proxies)
        self.origins = Origins(config.server.origins)
        self.tells_browsers = config.server.tell_browsers
        self._hit_log.names_addresses = config.log.addresses
        self._reads_headers = config.server.proxy_protocol
        self._header_s = config.limits.handshake_seconds
        self._has_warned = False

    def tick(self, now: float) -> None:
        """Call a few times a second."""
        self.addresses.tick(now)
        self._relay.set(_TRACKED, len(self.addresses))

    def hit(self, limit: str, address: str, is_enforced: bool) -> None:  # noqa: FBT001 # a callback's signature
        """Somebody there ran into this limit: count it, and say so now and then."""
        self._relay.count(_HITS[limit, is_enforced])
        self._hit_log.write(limit, address, is_enforced=is_enforced)

    # ---- a connection, from its acceptance on

    def meet(self, peername: object) -> Guest:
        """Somebody was accepted. What socket names it: of IP a tuple that begins with the address."""
        guest = Guest(plain_address(peername[0]) if isinstance(peername, tuple) else "")
        self._introduce(guest)
        return guest

    def expects_header(self, guest: Guest) -> bool:
        """Does it begin with a PROXY header? Then `read_header` comes before all else."""
        return guest.is_proxied and self._reads_headers

    def read_header(self, end: socket.socket, guest: Guest, done: Callable[[socket.socket, Guest], None]) -> None:
        """`done` is called when the guest is known; when it never is, `end` is closed. Call within the loop."""

        def on_end(reader: HeaderReader, header: Header | None) -> None:
            self._readers.discard(reader)
            if header is None:
                self._relay.count(reader.failed_by)
                return
            if header.address is None:  # of a TCP proxy, whose clients write their requests themselves
                guest.is_named = False
            else:
                guest.address = header.address
            self._introduce(guest)
            done(end, guest)

        end.setblocking(False)
        reader = HeaderReader(end, self._header_s, on_end)
        self._readers.add(reader)
        reader.start()

    def close(self) -> None:
        """No more PROXY headers are awaited."""
        for reader in list(self._readers):
            reader.close()

    def has_room_for(self, address: str) -> bool:
        """Would a connection of this client be let in that another worker hands over?"""
        return self.addresses.has_room(address_key(address))

    def take_over(self, address: str) -> Guest:
        """Another worker has met it, charged its rate and passed it on."""
        guest = Guest(address)
        guest.charge(self.addresses, self._clock(), is_new=False)
        return guest

    def admit(self, guest: Guest, head: _Head) -> None:
        """It asks for something. Raises HttpError where a limit is against that."""
        if guest.is_proxied:
            guest.is_proxied = False
            if guest.is_named:
                guest.address = client_address(guest.address, head.headers.get("x-forwarded-for", ()), self.proxies)
            self._charge(guest)
        if guest.refusal is not None:
            raise _as_error(guest.refusal)

    def check_origin(self, head: _Head) -> None:
        """Raises HttpError where the page of a browser may not connect."""
        origin = head.one("origin")
        if origin is not None and not self.origins.allow(origin):
            raise HttpError("forbidden", "Pages of this origin may not connect.", close_code=CloseCode.ORIGIN)

    def _introduce(self, guest: Guest) -> None:
        guest.is_proxied = self.proxies.has(guest.address)
        if not guest.is_proxied:
            self._charge(guest)

    def _charge(self, guest: Guest) -> None:
        guest.charge(self.addresses, self._clock(), is_new=True)
        if guest.address == self._last:
            self._same += 1
            if self._same == SAME_ADDRESS:
                self._suspect(guest.address)
        else:
            self._last, self._same = guest.address, 1

    def _suspect(self, address: str) -> None:
        """Once; and again after a reload that has not helped."""
        self._same = 0
        if address and not self._has_warned and not ip_address(address).is_global:
            self._has_warned = True
            shown = address if self._hit_log.names_addresses else ""
            _log.warning("one_address", address=shown, connections=SAME_ADDRESS)


def _as_error(refusal: Refusal) -> HttpError:
    return HttpError(
        refusal.code,
        _SENTENCES[refusal.limit],
        headers=f"Retry-After: {math.ceil(refusal.after_s)}\r\n",
        after_ms=math.ceil(1000 * refusal.after_s),
        close_code=CloseCode.TOO_MANY_CONNECTIONS if refusal.limit == "connections_per_address" else 0,
    )


def reset(end: socket.socket) -> None:
    """Close at once, with RST: nothing of it is left in the kernel."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()


class HeaderReader:
    """Reads the PROXY header of one connection from its raw socket, and not a byte more: TLS may follow.

    What is peeked at and is not the whole header yet belongs to it, and is taken: so no unread byte keeps the loop
    awake. `on_end(self, header)` is called once; without a header, in `seconds` (0: any time will do), the socket is
    closed before, and `failed_by` is the word of `handshakes_total` for that.
    """

    def __init__(
        self, end: socket.socket, seconds: float, on_end: "Callable[[HeaderReader, Header | None], None]"
    ) -> None:
        self.failed_by = _GONE
        self._end = end
        self._seconds = seconds
        self._on_end = on_end
        self._taken = b""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """The header may be there already."""
        self._loop.add_reader(self._end.fileno(), self._on_readable)
        if self._seconds:
            self._timer = self._loop.call_later(self._seconds, self._give_up, _TIMEOUT)
        self._on_readable()

    def close(self) -> None:
        """Nobody waits for it any more."""
        self._give_up(_GONE)

    def _on_readable(self) -> None:
        try:
            seen = self._end.recv(V2_BYTES - len(self._taken), socket.MSG_PEEK)
            header = parse(self._taken + seen)
            size = len(self._taken) + len(seen) if header is None else header.size
            self._taken += self._end.recv(size - len(self._taken)) if seen else b""
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            seen = b""
        except ValueError as reason:
            _log.debug("proxy_header_refused", reason=str(reason))
            self._give_up(_MALFORMED)
            return
        if not seen:
            self._give_up(_GONE)
        elif header is not None:
            self._stop()
            self._on_end(self, header)

    def _give_up(self, word: int) -> None:
        self.failed_by = word
        self._stop()
        self._end.close()
        self._on_end(self, None)

    def _stop(self) -> None:
        self._loop.remove_reader(self._end.fileno())
        if self._timer is not None:
            self._timer.cancel()


class Origins:
    """Which pages may connect, as `server.origins` says: exact ones, `https://*.example.org`, `null`, `*`; () is all.

    A wildcard stands for one or more labels of the host. Scheme and host are compared without case, and a port that is
    the scheme's own need not be there.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._lets_all = not patterns or "*" in patterns
        self._lets_null = "null" in patterns
        known = [found for pattern in patterns if (found := split_origin(pattern)) is not None]
        self._exact = {found for found in known if not found[1].startswith("*.")}
        self._below = [(scheme, host[1:], port) for scheme, host, port in known if host.startswith("*.")]

    def allow(self, origin: str) -> bool:
        """`origin`: the value of the header."""
        if self._lets_all:
            return True
        if origin == "null":
            return self._lets_null
        found = split_origin(origin)
        if found is None or "*" in found[1]:
            return False
        scheme, host, port = found
        return found in self._exact or any(
            (scheme, port) == (of, at) and host.endswith(tail) and len(host) > len(tail) for of, tail, at in self._below
        )
