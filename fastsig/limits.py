"""Who takes more than a share: token buckets, the table of client addresses, and which of it may be logged.

A limit is told the time and says yes, or how long to wait; what is done about it is its caller's. All numbers are per
worker: nothing here is shared between processes. A rate or a count of 0 switches that limit off.

Must not know: sockets, HTTP, messages. `now` is monotonic seconds. Invariants: the table is bounded (`Addresses`), and
so is the memory of what was logged (`Complaints`); what one address does changes nothing for another, except through
the limits that are the worker's as a whole. The buckets of messages are in `_relay`, in C.
"""

from collections import OrderedDict
from collections.abc import Callable
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final, NamedTuple

from .config import Limits

ADDRESSES: Final = 65536  # in the table; more only where so many have connections
BURST_S: Final = 5.0  # a burst of connections is what a rate allows in so long
FORGET_S: Final = 2 * BURST_S  # after so long an address without connections is as good as new
FORGOTTEN_AT_ONCE: Final = 2048  # entries; 0.5 ms
ANSWERS_PER_S: Final = 20.0  # refusals to one address that are answered, where no rate says how many
WORKER_ANSWERS_PER_S: Final = 200.0  # the same for refusals by limits of the whole worker
FULL_S: Final = 5.0  # when connections are at their limit: to be tried again after that
COMPLAINT_S: Final = 1.0
COMPLAINTS: Final = 4096

_MAPPED: Final = bytes(10) + b"\xff\xff"  # of an IPv6 address that is an IPv4 one
_GRAIN_S: Final = 0.001


class Bucket:
    """Takes pass while the level is positive, and may leave it in debt; `rate` per second fills it, up to `burst`.

    So one take of any amount passes at first, and the long run is `rate` all the same.
    """

    __slots__ = ("at", "burst", "level", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self.level = burst
        self.at = now

    def take(self, now: float, amount: float = 1.0) -> float:
        """0.0: it passed. Else nothing was taken, and the level is positive again in so many seconds."""
        if not self.rate:
            return 0.0
        self.level = min(self.burst, self.level + self.rate * max(now - self.at, 0.0))
        self.at = now
        if self.level > 0.0:
            self.level -= amount
            return 0.0
        return _GRAIN_S - self.level / self.rate

    def configure(self, rate: float, burst: float) -> None:
        """New values; what it owes it still owes, a rate that was off begins full."""
        self.level = min(self.level, burst) if self.rate else burst
        self.rate = rate
        self.burst = burst


def address_key(text: str) -> str:
    """The address that limits count: an IPv4 address whole, of an IPv6 one its /64, which is what one customer has.

    An IPv4-mapped IPv6 address is the IPv4 one; a zone is no part of it. What is no address ("", a path) gives "". Two
    spellings of one address give the same.
    """
    text = text.partition("%")[0]
    try:
        if ":" not in text:
            return inet_ntop(AF_INET, inet_pton(AF_INET, text))
        packed = inet_pton(AF_INET6, text)
    except (OSError, ValueError):
        return ""
    if packed.startswith(_MAPPED):
        return inet_ntop(AF_INET, packed[12:])
    return inet_ntop(AF_INET6, packed[:8] + bytes(8)) + "/64"


class Refusal(NamedTuple):
    """`limit` is its name in `metrics.LIMITS`, `code` that of the error to answer with.

    `after_s`: not before that. `is_deep`: there were so many of them that an answer is too much.
    """

    limit: str
    code: str
    after_s: float
    is_deep: bool


class _Entry:
    """One address: what it took of its two buckets, for connections and for refusals that are answered, as of `at`.

    What it took, not what is left: so one that has taken nothing needs no visit when the limits change.
    """

    __slots__ = ("answered", "at", "connected", "connections")

    def __init__(self, now: float) -> None:
        self.connected = self.answered = 0.0
        self.at = now
        self.connections = 0


class Addresses:
    """The limits of connections, by address and for the worker: how many there are, and new ones per second.

    `hit(limit, key, is_enforced)` hears of each refusal, and with `limits.dry_run` of what is let pass instead. The key
    "" is who has no address: only the limits of the worker hold for it.

    The table has at most ADDRESSES entries. The address that connected longest ago is dropped for a new one, but never
    one that has connections; so there are more entries where more addresses than that are connected, as many as they
    are and a sixteenth of ADDRESSES for all others. A dropped address is as good as new: who has so many addresses is
    stopped by `limits.connects_per_s`, or not at all.

    What is refused is still to be answered, which costs something. Each address gets as many answers as it may open
    connections, burst and rate; beyond that its refusals are deep.
    """

    def __init__(self, limits: Limits, hit: Callable[[str, str, bool], None], now: float) -> None:
        self._hit = hit
        self._connections = 0
        self._live: dict[str, _Entry] = {}  # those that have connections
        self._idle: OrderedDict[str, _Entry] = OrderedDict()  # the others, in the order in which they were last seen
        self._all = Bucket(0.0, 0.0, now)
        self._answers = Bucket(WORKER_ANSWERS_PER_S, WORKER_ANSWERS_PER_S * BURST_S, now)
        self.configure(limits)

    def configure(self, limits: Limits) -> None:
        """New values hold from the next connection on; those that are open stay."""
        self._is_dry = limits.dry_run
        self._most = limits.connections
        self._most_each = limits.connections_per_address
        self._rate = float(limits.connects_per_s_per_address)
        self._answer_rate = self._rate or ANSWERS_PER_S
        self._all.configure(float(limits.connects_per_s), limits.connects_per_s * BURST_S)

    def __len__(self) -> int:
        """Addresses in the table."""
        return len(self._live) + len(self._idle)

    @property
    def connections(self) -> int:
        """Those that were opened and not closed."""
        return self._connections

    def connect(self, key: str, now: float) -> Refusal | None:
        """Somebody at this address has connected: is that too often? The worker's rate pays only for who may."""
        if key and self._rate:
            entry = self._touch(key, now)
            debt = entry.connected - self._rate * BURST_S
            if debt < 0.0:
                entry.connected += 1.0
            else:
                after_s = debt / self._rate + _GRAIN_S
                refusal = self._refuse(entry, key, "connects_per_s_per_address", "rate_limited", after_s)
                if refusal is not None:
                    return refusal
        wait_s = self._all.take(now)
        return self._refuse_all(key, "connects_per_s", wait_s, now) if wait_s else None

    def open(self, key: str, now: float) -> Refusal | None:
        """May it stay? Without a refusal it counts until `close`."""
        entry = self._touch(key, now) if key else None
        if entry is not None and 0 < self._most_each <= entry.connections:
            refusal = self._refuse(entry, key, "connections_per_address", "limit_exceeded", FULL_S)
            if refusal is not None:
                return refusal
        if 0 < self._most <= self._connections:
            refusal = self._refuse_all(key, "connections", FULL_S, now)
            if refusal is not None:
                return refusal
        self._connections += 1
        if entry is not None:
            entry.connections += 1
            if entry.connections == 1:
                self._live[key] = entry
                del self._idle[key]
        return None

    def has_room(self, key: str) -> bool:
        """Would `open` let it stay? Nobody is refused anything by the question."""
        entry = self._live.get(key)
        is_full = entry is not None and 0 < self._most_each <= entry.connections
        return self._is_dry or not (is_full or 0 < self._most <= self._connections)

    def close(self, key: str) -> None:
        """A connection that was opened has ended."""
        self._connections -= 1
        if not key:
            return
        entry = self._live[key]
        entry.connections -= 1
        if not entry.connections:
            del self._live[key]
            self._idle[key] = entry
            self._make_room()

    def tick(self, now: float) -> None:
        """Forget those who have not been seen for long; call a few times a second."""
        for _ in range(FORGOTTEN_AT_ONCE):
            key = next(iter(self._idle), None)
            if key is None or now - self._idle[key].at < FORGET_S:
                return
            del self._idle[key]

    def _touch(self, key: str, now: float) -> _Entry:
        """Its entry, buckets as of now."""
        entry = self._live.get(key)
        if entry is None:
            entry = self._idle.get(key)
            if entry is None:
                entry = self._idle[key] = _Entry(now)
                self._make_room()
                return entry
            self._idle.move_to_end(key)
        seconds = max(now - entry.at, 0.0)
        entry.connected = _drained(entry.connected, self._rate, seconds)
        entry.answered = _drained(entry.answered, self._answer_rate, seconds)
        entry.at = now
        return entry

    def _make_room(self) -> None:
        while len(self._idle) > max(ADDRESSES - len(self._live), ADDRESSES // 16):
            self._idle.popitem(last=False)

    def _refuse(self, entry: _Entry, key: str, limit: str, code: str, after_s: float) -> Refusal | None:
        self._hit(limit, key, not self._is_dry)
        if self._is_dry:
            return None
        is_deep = entry.answered >= self._answer_rate * BURST_S
        if not is_deep:
            entry.answered += 1.0
        return Refusal(limit, code, after_s, is_deep)

    def _refuse_all(self, key: str, limit: str, after_s: float, now: float) -> Refusal | None:
        self._hit(limit, key, not self._is_dry)
        if self._is_dry:
            return None
        return Refusal(limit, "limit_exceeded", after_s, self._answers.take(now) > 0.0)


def _drained(taken: float, rate: float, seconds: float) -> float:
    """What of it still counts. The burst may have shrunk: what is above the new one does not."""
    return max(min(taken, rate * BURST_S + 1.0) - rate * seconds, 0.0)


class Complaints:
    """Which hits of limits are logged: of each address and limit one in COMPLAINT_S.

    Of the COMPLAINTS that came last something is remembered; what an older one had left out is never said.
    """

    def __init__(self) -> None:
        self._said: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()  # when, and how many left out since

    def __len__(self) -> int:
        return len(self._said)

    def admit(self, address: str, limit: str, now: float) -> int | None:
        """How many lines were left out since the last one; None: so is this one."""
        said = self._said.get((address, limit))
        if said is not None and now - said[0] < COMPLAINT_S:
            self._said[address, limit] = (said[0], said[1] + 1)
            return None
        self._said[address, limit] = (now, 0)
        self._said.move_to_end((address, limit))
        if len(self._said) > COMPLAINTS:
            self._said.popitem(last=False)
        return 0 if said is None else said[1]
