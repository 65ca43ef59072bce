"""One native thread with one uvloop beside the greenlets of Locust: where the connections of the load test live.

Locust patches the process with gevent, and a greenlet with a pure Python WebSocket for every connection saturates long
before the server does. So Locust keeps what it is good at (counts of users, tables, charts, master and workers), and
its greenlets are parked; all that moves is on this loop. This module knows no gevent, no Locust and nothing of what
users do: the function that starts a thread is given to it.

What crosses the threads: calls in, by `post`; batches of `Result` out, by `take`, ten times a second. Everything else
is touched by the loop's thread only. Read `users` next.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import uvloop

BATCH_S: Final = 0.1
END_S: Final = 2.0  # for the closing handshakes at the end

StartThread = Callable[[Callable[[], None], tuple[()]], Any]


class Result(NamedTuple):
    """A row of Locust's tables gets one more value: `ms`, or `error`, which is a code of the catalogue or our own word.

    `kind` is the kind of user, `name` what was measured, `size` bytes of the message that ended it.
    """

    kind: str
    name: str
    ms: float | None
    size: int = 0
    error: str | None = None


class Engine:
    """The thread, its loop, and what it counts. `sent` and `received` are messages, `connections` those open now."""

    def __init__(self) -> None:
        self.loop: Final = uvloop.new_event_loop()
        self.sent = 0
        self.received = 0
        self.connections = 0
        self.most_connections = 0
        self.has_ended = False
        self._results: list[Result] = []
        self._batches: Final[deque[list[Result]]] = deque()
        self._tasks: Final[set[asyncio.Task[None]]] = set()

    def start(self, start_thread: StartThread) -> None:
        """`start_thread` must start a thread of the system, under gevent too."""
        start_thread(self._main, ())

    def post(self, call: Callable[..., Any], *args: Any) -> None:
        """Run it on the loop; from any thread."""
        self.loop.call_soon_threadsafe(call, *args)

    def take(self) -> list[Result]:
        """What was measured since the last call; from the one thread that reports it."""
        results = []
        while self._batches:
            results += self._batches.popleft()
        return results

    def end(self) -> None:
        """End the thread; `has_ended` becomes true once the last batch can be taken, at most END_S from now."""
        self.post(self._end, time.monotonic() + END_S)

    # ---- on the loop's thread

    def record(self, result: Result) -> None:
        self._results.append(result)

    def spawn(self, task: Any) -> None:
        """Run a coroutine; the loop itself keeps only weak references to tasks."""
        kept = self.loop.create_task(task)
        self._tasks.add(kept)
        kept.add_done_callback(self._tasks.discard)

    def opened(self, by: int) -> None:
        """A connection more, or (-1) one less."""
        self.connections += by
        self.most_connections = max(self.most_connections, self.connections)

    def _main(self) -> None:
        self._hand_over(time.monotonic())
        try:
            self.loop.run_forever()
        finally:
            self._batches.append(self._results)
            self.has_ended = True

    def _hand_over(self, due: float) -> None:
        """The batch so far, and how late the loop is: what it adds to every figure (ms)."""
        now = time.monotonic()
        self.record(Result("engine", "lag", max(0.0, now - due) * 1000))
        self._batches.append(self._results)
        self._results = []
        self.loop.call_later(BATCH_S, self._hand_over, now + BATCH_S)

    def _end(self, until: float) -> None:
        if (self.connections or self._tasks) and time.monotonic() < until:
            self.loop.call_later(0.02, self._end, until)
        else:
            self.loop.stop()
