"""Asks the webhook whether a peer may join, for a hub that does not wait.

`ask` returns at once. What the webhook had said before is told during the call; else the question is sent when there
is a place (`auth.webhook_concurrency`), and the decision told in a later turn of the loop. Every question is decided
within `auth.webhook_seconds` of being asked, by the webhook or for it: `webhook_fails_open` says how, if it was sent.

Invariants: a question that several ask at once is sent once. No more than `WAITING_PER_PLACE` per place wait for one,
what is above is refused at once, and so is what waits until it is late: also where the webhook fails open, or whoever
asks fast enough would be let in. Places are given to one address after the other, and too long a queue is cut where it
is longest: who asks a lot, from one address, waits for itself.
Must not know: connections, rooms, HTTP; `post` is given. Nothing of a question, or an answer, is logged.
Read `webhook` for what is said.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol
from urllib.parse import urlsplit

from . import logs, metrics, webhook
from .config import Auth
from .metrics import Histogram
from .webhook import Decision, Question

_log = logs.get("fastsig.asker")

WAITING_PER_PLACE: Final = 16
COMPLAIN_S: Final = 1.0
OK: Final = 200

_RESULTS: Final = metrics.indexes("webhook_requests_total")
_SECONDS: Final = metrics.histogram("webhook_seconds")
_REFUSAL: Final = Decision(is_allowed=False, code=webhook.UNAVAILABLE)
_PASS: Final = Decision(is_allowed=True)


class Post(Protocol):
    """`fetch.Fetcher.post`: the status and the body. Raises OSError with a reason for the log."""

    def __call__(
        self, url: str, body: bytes, headers: Mapping[str, str], most_bytes: int
    ) -> Awaitable[tuple[int, bytes]]: ...


class Asker:
    """One per worker. `count` and `observe` are the relay's; clocks: monotonic, and unix seconds.

    `group` says which addresses are one client's (IPv6 by /64).
    """

    def __init__(
        self,
        post: Post,
        count: Callable[[int], None],
        observe: Callable[[Histogram, float], None],
        *,
        group: Callable[[str], str] = str,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._post = post
        self._count = count
        self._observe = observe
        self._group = group
        self._clock = clock
        self._unix_clock = unix_clock
        self._loop = asyncio.get_running_loop()
        self._auth = Auth()
        self._meta_bytes = 0
        self._cache = webhook.Cache()
        self._flights: dict[bytes, Flight] = {}  # undecided, by the key of the question
        self._queue = Queue()  # those of them that have no place yet
        self._tasks: set[asyncio.Task[None]] = set()  # each has a place, to its very end
        self._complaints = _Complaints(self._loop)
        self._answered_at = -math.inf  # whatever the answer was
        self._is_closed = False

    def configure(self, auth: Auth, *, meta_bytes: int) -> None:
        """Holds for questions that are sent from now on. What was said before is forgotten.

        `meta_bytes` is `limits.meta_bytes`.
        """
        self._auth, self._meta_bytes = auth, meta_bytes
        self._cache = webhook.Cache()
        self._complaints.host = urlsplit(auth.webhook_url).hostname or ""
        self._fill()

    @property
    def is_wanted(self) -> bool:
        """Is there a webhook? Without one nothing is to be asked."""
        return bool(self._auth.webhook_url)

    def stats(self) -> dict[str, int]:
        """How long its tables are, by name."""
        return {
            "webhook_asked": len(self._tasks),
            "webhook_waiting": len(self._queue),
            "webhook_cached": len(self._cache),
        }

    def ask(self, question: Question, done: Callable[[Decision], None]) -> "Asking":
        """`done` is called once with the decision, maybe before this returns; not after `Asking.cancel` or `close`."""
        asking = Asking(done)
        key = question.key
        if (decision := self._cache.find(key, self._clock())) is not None:
            self._count(_RESULTS["cached"])
            asking.tell(decision)
        elif (flight := self._flights.get(key)) is not None:
            asking.board(flight)
        elif self._has_room(flight := Flight(key, self._group(question.address), question, self._cache, self._end)):
            asking.board(flight)
            flight.asked_at = self._clock()
            flight.timer = self._loop.call_later(self._auth.webhook_seconds, self._on_late, flight)
            self._flights[key] = flight
            self._queue.put(flight)
            self._fill()
            flight.has_waited = flight.task is None
        else:
            self._count(_RESULTS["failed"])
            self._complaints.add("too many questions wait", 1)
            asking.tell(_REFUSAL)
        return asking

    async def close(self) -> None:
        """Who waits hears nothing any more. Idempotent. Before the `Fetcher`'s."""
        self._is_closed = True
        for flight in list(self._flights.values()):
            self._end(flight)
        self._complaints.end()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _has_room(self, newcomer: "Flight") -> bool:
        """Whatever gets no room is refused; where the longest line has more than the newcomer's, its last is."""
        if self._is_closed:
            return False
        if len(self._queue) < WAITING_PER_PLACE * self._auth.webhook_concurrency:
            return True
        last = self._queue.last_of_longest(but=newcomer.lane)
        if last is None:
            return False
        self._complaints.add("too many questions wait", len(last.passengers))
        self._decide(last, _REFUSAL, "failed")
        return True

    def _fill(self) -> None:
        """Send what waits, as far as there are places."""
        while len(self._queue) and len(self._tasks) < self._auth.webhook_concurrency:
            flight = self._queue.take()
            flight.sent_at = self._clock()
            flight.task = self._loop.create_task(self._send(flight))
            self._tasks.add(flight.task)
            flight.task.add_done_callback(self._on_sent)

    def _on_sent(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._fill()
        if not task.cancelled():
            task.result()  # a bug of ours: the loop says it, the timer ends the flight

    def _on_late(self, flight: "Flight") -> None:
        what = "no answer" if flight.task is not None else "others were asked about before, and no answer came"
        if flight.task is not None:
            self._observe(_SECONDS, self._clock() - flight.sent_at)
        may_pass = self._may_pass(flight)
        self._fail(flight, "timeout", f"{what} within {self._auth.webhook_seconds:g} s", may_pass=may_pass)

    def _may_pass(self, flight: "Flight") -> bool:
        """Was there no answer to it because none is to be had? Of what has waited for a place that is so only where
        nothing else was answered in its time: else it is late by the length of a line, which may be the asker's own."""
        return flight.task is not None and (not flight.has_waited or self._answered_at < flight.asked_at)

    async def _send(self, flight: "Flight") -> None:
        auth = self._auth
        body = flight.question.body()
        headers = webhook.headers(auth.webhook_secret, body, self._unix_clock())
        try:
            status, answer = await self._post(auth.webhook_url, body, headers, webhook.ANSWER_BYTES)
            self._answered_at = self._clock()
            self._observe(_SECONDS, self._answered_at - flight.sent_at)
            if status != OK:
                raise OSError(f"it answered {status}")
            decision = webhook.read_answer(answer, meta_bytes=self._meta_bytes)
        except OSError as error:
            self._fail(flight, "timeout" if isinstance(error, TimeoutError) else "failed", str(error))
        except ValueError as error:
            self._fail(flight, "unusable", str(error))
        else:
            flight.cache.put(flight.key, decision, self._clock())
            self._decide(flight, decision, "allowed" if decision.is_allowed else "denied")

    def _fail(self, flight: "Flight", result: str, reason: str, *, may_pass: bool = True) -> None:
        self._complaints.add(reason, len(flight.passengers))
        self._decide(flight, _PASS if may_pass and self._auth.webhook_fails_open else _REFUSAL, result)

    def _decide(self, flight: "Flight", decision: Decision, result: str) -> None:
        """Each is told in a turn of its own: what one makes of it does not touch the others."""
        passengers, flight.passengers = flight.passengers, {}
        self._end(flight)
        for asking in passengers:
            self._count(_RESULTS[result])
            self._loop.call_soon(asking.tell, decision)

    def _end(self, flight: "Flight") -> None:
        """It is decided, or nobody asks any more."""
        flight.passengers = {}
        flight.timer.cancel()
        del self._flights[flight.key]
        if flight.task is None:
            self._queue.remove(flight)
        elif flight.task is not asyncio.current_task(self._loop):
            flight.task.cancel()


class Asking:
    """One who asks."""

    __slots__ = ("_done", "_flight")

    def __init__(self, done: Callable[[Decision], None]) -> None:
        self._done: Callable[[Decision], None] | None = done
        self._flight: Flight | None = None

    def cancel(self) -> None:
        """Hear nothing from now on. Idempotent, also after the decision."""
        flight, self._done, self._flight = self._flight, None, None
        if flight is not None:
            flight.leave(self)

    def board(self, flight: "Flight") -> None:
        self._flight = flight
        flight.passengers[self] = None

    def tell(self, decision: Decision) -> None:
        done, self._done, self._flight = self._done, None, None
        if done is not None:
            done(decision)


class Flight:
    """A question on its way, and who waits for its answer.

    `lane` is the group of its address, `cache` the one of the time when it was asked. `on_empty` is called when all who
    asked have gone.
    """

    __slots__ = (
        "_on_empty", "asked_at", "cache", "has_waited", "key", "lane", "passengers", "question", "sent_at", "task",
        "timer",
    )  # fmt: skip

    timer: asyncio.TimerHandle
    asked_at: float
    sent_at: float

    def __init__(
        self, key: bytes, lane: str, question: Question, cache: webhook.Cache, on_empty: Callable[["Flight"], None]
    ) -> None:
        self.key = key
        self.lane = lane
        self.question = question
        self.cache = cache
        self.passengers: dict[Asking, None] = {}  # in the order of their coming
        self.task: asyncio.Task[None] | None = None  # from when it has a place
        self.has_waited = False  # for a place
        self._on_empty = on_empty

    def leave(self, asking: Asking) -> None:
        """Nothing happens when the decision has been made, and is only not told yet."""
        if asking in self.passengers:
            del self.passengers[asking]
            if not self.passengers:
                self._on_empty(self)


class Queue:
    """Those who wait for a place: lines, by address, of which each gives its first in turn."""

    def __init__(self) -> None:
        self._lanes: dict[str, dict[bytes, Flight]] = {}  # none is empty; the one that is next comes first
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def put(self, flight: Flight) -> None:
        self._lanes.setdefault(flight.lane, {})[flight.key] = flight
        self._length += 1

    def take(self) -> Flight:
        name = next(iter(self._lanes))
        lane = self._lanes.pop(name)
        flight = lane.pop(next(iter(lane)))
        if lane:
            self._lanes[name] = lane
        self._length -= 1
        return flight

    def remove(self, flight: Flight) -> None:
        lane = self._lanes[flight.lane]
        del lane[flight.key]
        if not lane:
            del self._lanes[flight.lane]
        self._length -= 1

    def last_of_longest(self, but: str) -> Flight | None:
        """None when one more in the line `but` makes that as long as any, and so nothing fairer."""
        longest = max(self._lanes.values(), key=len, default={})
        if len(longest) <= len(self._lanes.get(but, ())) + 1:
            return None
        return next(reversed(longest.values()))


class _Complaints:
    """`webhook_failed`: the first at once, then one for all of a second."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.host = ""
        self._loop = loop
        self._reason = ""
        self._joins = 0  # since the last line
        self._quiet: asyncio.TimerHandle | None = None

    def add(self, reason: str, joins: int) -> None:
        self._reason = reason
        self._joins += joins
        if self._quiet is None:
            self._say()

    def end(self) -> None:
        if self._quiet is not None:
            self._quiet.cancel()
            self._say_rest()

    def _say(self) -> None:
        self._say_rest()
        self._quiet = self._loop.call_later(COMPLAIN_S, self._on_second)

    def _on_second(self) -> None:
        self._quiet = None
        if self._joins:
            self._say()

    def _say_rest(self) -> None:
        if self._joins:
            _log.warning("webhook_failed", host=self.host, reason=self._reason, joins=self._joins)
            self._joins = 0
