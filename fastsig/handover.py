"""What is handed to workers: messages and descriptors, through `Outbox`; connections nobody else accepts, by `Deputy`.

Both keep what cannot be handed over at once, with a bound, and own its descriptors meanwhile: each is closed here when
it was sent, given up, or is left at the end. Both live on one asyncio loop, and trust it for nothing that a shortage of
the machine may swallow: who calls `flush` and `resume` again and again has it tried again.

Invariants: a worker hears its messages in the order of `send`, and of two configurations, or links to one slot, that
wait for it the newer only. A connection that a worker was handed is kept here until that worker has said whether it has
it, or has ended.
Must not know: which slots serve, what a message means, processes. Read `control` for the messages, `supervisor` next.
"""

import asyncio
import errno
import itertools
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Final

from . import control, logs
from .control import Channel, Hand, Link, Reload, ToWorker

_log = logs.get("fastsig.handover")

ACCEPTS: Final = 16  # in one turn, from one socket of a slot that does not serve
HANDED: Final = 8  # at most in one message, so that all who serve get some
IN_HAND: Final = 64  # connections that are accepted, and not with a worker yet
IN_HAND_S: Final = 5.0

_SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})  # pass


class Outbox:
    """What one worker is told, in order. Owns the descriptors of its messages: closed here once sent, or dropped.

    What its channel has no room for waits until there is; `flush` tries again where the kernel announces no room.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._waiting: deque[ToWorker] = deque()
        self._offered: dict[int, list[int]] = {}  # by serial: copies of what was handed over and is not confirmed yet
        self._is_watched = False

    def send(self, message: ToWorker) -> None:
        """Now or later. One that is gone needs nothing."""
        if not self._supersede(message):
            self._waiting.append(message)
        self.flush()

    def offer(self, hand: Hand) -> bool:
        """Now or not at all: then its descriptors are still the caller's. Else copies are kept until `take_back`."""
        held = sum(len(fds) for fds in self._offered.values())
        if self._waiting or held + len(hand.fds) > control.DESCRIPTORS:
            return False
        try:
            self._channel.send(hand)
        except OSError:
            return False
        self._offered[hand.serial] = hand.fds
        return True

    def take_back(self, serial: int) -> list[int]:
        """The copies of what was offered under this number, now the caller's; none when that was answered before.

        Once the worker has taken them they are to be closed soon: a peer hears of no close while a copy is open.
        """
        return self._offered.pop(serial, [])

    def take_back_all(self) -> list[int]:
        """To be used only when the worker has ended."""
        fds = [fd for offered in self._offered.values() for fd in offered]
        self._offered.clear()
        return fds

    def flush(self) -> None:
        is_full = False
        try:
            while self._waiting:
                self._channel.send(self._waiting[0])
                control.close_all(control.descriptors(self._waiting.popleft()))
        except BlockingIOError:
            is_full = True
        except OSError as error:
            if error.errno not in _SHORTAGES:
                self._drop()
        self._watch(is_full=is_full)

    def close(self) -> None:
        """Idempotent. Nothing that waits is ever sent to anybody else."""
        self._watch(is_full=False)
        self._drop()
        control.close_all(self.take_back_all())

    def _supersede(self, message: ToWorker) -> bool:
        """Only the newest configuration, and the newest link to a slot, are wanted.

        A link takes the place of the older one, so that as many follow `Boot` as it says.
        """
        for place, other in enumerate(self._waiting):
            if isinstance(message, Link) and isinstance(other, Link) and other.slot == message.slot:
                control.close_all(other.fds)
                self._waiting[place] = message
                return True
            if isinstance(message, Reload) and isinstance(other, Reload):
                del self._waiting[place]
                return False
        return False

    def _drop(self) -> None:
        for message in self._waiting:
            control.close_all(control.descriptors(message))
        self._waiting.clear()

    def _watch(self, *, is_full: bool) -> None:
        if is_full != self._is_watched:
            self._is_watched = is_full
            loop = asyncio.get_running_loop()
            if is_full:
                loop.add_writer(self._channel.fileno(), self.flush)
            else:
                loop.remove_writer(self._channel.fileno())


class Deputy:
    """Accepts from the sockets of slots that do not serve, and passes the connections to those that do.

    `give` hands descriptors to a worker, at once, or returns False: they stay here then, at most `IN_HAND` of them, and
    `resume`, to be called every `LOOK_S`, tries again. Who finds nobody within `IN_HAND_S` is closed.
    """

    def __init__(self, listeners: list[list[socket.socket]], give: Callable[[list[int]], bool]) -> None:
        self._listeners = listeners
        self._give = give
        self._watched: set[int] = set()
        self._in_hand: deque[tuple[int, float]] = deque()  # descriptor, and when it was accepted
        self._is_paused = False
        self._was_short = False  # said once, until a connection is accepted

    def watch(self, slots: Collection[int]) -> None:
        """Accept for these slots, and for no other."""
        wanted = set() if self._is_paused else set(slots)
        loop = asyncio.get_running_loop()
        for listener in self._sockets(self._watched - wanted):
            loop.remove_reader(listener.fileno())
        for listener in self._sockets(wanted - self._watched):
            listener.setblocking(False)  # the worker's copy has the same flag
            loop.add_reader(listener.fileno(), self._on_readable, listener)
        self._watched = wanted

    def resume(self, now: float) -> None:
        self._hand_on()
        late = [fd for fd, accepted_at in self._in_hand if now - accepted_at >= IN_HAND_S]
        if late:
            _log.warning("connections_dropped", connections=len(late))
            control.close_all(late)
            self._in_hand = deque(item for item in self._in_hand if item[0] not in late)
        self._is_paused = len(self._in_hand) >= IN_HAND

    def take(self, fds: Iterable[int]) -> None:
        """Connections that a worker which has ended may never have seen."""
        now = time.monotonic()
        self._in_hand.extend((fd, now) for fd in fds)
        self._hand_on()

    def close(self) -> None:
        """Idempotent; before the listening sockets are closed."""
        self.watch(())
        control.close_all(fd for fd, _ in self._in_hand)
        self._in_hand.clear()

    def _sockets(self, slots: Iterable[int]) -> list[socket.socket]:
        return [listener for slot in slots for listener in self._listeners[slot]]

    def _on_readable(self, listener: socket.socket) -> None:
        now = time.monotonic()
        for _ in range(min(ACCEPTS, IN_HAND - len(self._in_hand))):
            try:
                connection = listener.accept()[0]
            except BlockingIOError:
                break
            except ConnectionAbortedError:  # that one has gone again
                continue
            except OSError as error:  # a shortage, which would call us again at once, and again
                if not self._was_short:
                    _log.warning("cannot_accept", reason=str(error))
                self._was_short = True
                self._pause()
                break
            self._was_short = False
            self._in_hand.append((connection.detach(), now))
        self._hand_on()
        if len(self._in_hand) >= IN_HAND:
            self._pause()

    def _hand_on(self) -> None:
        while self._in_hand:
            batch = [fd for fd, _ in itertools.islice(self._in_hand, HANDED)]
            if not self._give(batch):
                break
            for _ in batch:
                self._in_hand.popleft()

    def _pause(self) -> None:
        self._is_paused = True
        self.watch(())
