"""The supervisor: opens the listening sockets, executes the workers, replaces those that die, ends them all.

`Fleet` decides and does nothing; `Supervisor` does and decides nothing; `_Deputy` accepts where a slot does not, and
`listen` is the address book. What happens (a signal, a message, a death) is only queued where it is noticed, and
handled one by one by `Supervisor.run`.

Invariants: the listening sockets stay open here while the server lives, so what a dead worker had not accepted waits
for its successor, or is handed to the others. A worker's end of its control channel, or of a link, is open in that
worker alone: each side sees the other's end. Between two workers the newest link holds; all of them were made here.
No worker is told to end before all are empty, or the drain's deadline has come: the rooms of one may need another.
A worker's silence counts only while we listened: when this process itself was stopped or starved, nobody is killed.
No deadline is missed before all that was said until then is handled. A connection that a worker was handed is kept here
until that worker has said whether it has it.
Must not know: what a worker does; it is executed, never imported. Read `control` for what the two say to each other.
"""

import asyncio
import contextlib
import errno
import ipaddress
import itertools
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from . import __version__, config as options, control, cpus, logs, systemd
from .config import Config
from .control import (
    NOTHING,
    OVERTIME_S,
    Boot,
    Channel,
    ControlError,
    Drain,
    Failed,
    Hand,
    Handed,
    Heartbeat,
    Link,
    Message,
    Ready,
    Reload,
    Stop,
    Stopped,
    ToWorker,
    Unlinked,
)
from .errors import ConfigError, ExitCode, StartError
from .metrics import Counters
from .routing import KEY_BYTES, View
from .status import Service, Status, UnusableError, WorkerStatus, folder, read_process

_log = logs.get("fastsig.supervisor")

SETTLED_S: Final = 10.0  # a worker that lived this long did not die of its start (ARCHITECTURE §2)
FIRST_RETRY_S: Final = 0.1
LONGEST_RETRY_S: Final = 5.0
STOP_S: Final = 10.0  # a worker that is told to end and has not ended after this is killed
FORCED_STOP_S: Final = 1.0
LOOK_S: Final = 0.125  # how often it is looked who is silent, and what was put off is tried again
STUCK_S: Final = 1.0  # a worker that is silent for so long does not accept
REPLACE_S: Final = 10.0  # and after this it is killed
STARTING: Final = 8  # workers that start at once: each has a link to all others unread, which the kernel counts
START_S: Final = 30.0  # a worker that is not ready after this is killed
READ: Final = 64  # messages of one worker before a deadline is looked at: what it had said until then, as a rule
ACCEPTS: Final = 16  # in one turn, from one socket of a slot that does not serve
HANDED: Final = 8  # at most in one message, so that all who serve get some
IN_HAND: Final = 64  # connections that are accepted, and not with a worker yet
IN_HAND_S: Final = 5.0
MOST_DESCRIPTORS: Final = 1 << 20  # the kernel's own limit as a rule; a table of more costs memory
SPARE_DESCRIPTORS: Final = 128  # those in hand, and whatever else comes up while the server runs
PORT_TRIES: Final = 16
WORKER: Final = "fastsig.worker"
HEARD: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(config: Config, *, reload: Callable[[], Config] | None = None, worker: str = WORKER) -> ExitCode:
    """Serve until a signal ends it; the exit code. Blocks. `worker` is the module that is executed.

    `reload` gives the configuration as it is to be after SIGHUP, or raises ConfigError. Raises that too.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)  # what comes before `Supervisor.run` can handle it waits until then
    control.check(config)
    logs.configure(config.log.level, config.log.format)
    slots: list[list[socket.socket]] = []
    try:
        slots, are_ours = _listeners(config)
        _raise_descriptor_limit()
        _check_descriptors(len(slots))
        made = _made(config, slots, reload or (lambda: config), worker, are_ours=are_ours)
        return uvloop.run(made.run())
    except StartError as error:
        _log.error("cannot_start", reason=str(error))
        return ExitCode.START
    except Exception:  # noqa: BLE001 # the process's main loop
        _log.exception("internal_error")
        return ExitCode.FAILED
    finally:
        _close(slots)


def _made(
    config: Config, slots: list[list[socket.socket]], reload: Callable[[], Config], worker: str, *, are_ours: bool
) -> "Supervisor":
    try:
        return Supervisor(config, slots, reload, worker, are_ours=are_ours)
    except OSError as error:
        raise StartError(f"this machine has no room for the counters: {error}") from error


def slot_count(config: Config) -> int:
    """How many workers share the port."""
    return cpus.count() if config.server.workers == "auto" else config.server.workers


def _listeners(config: Config) -> tuple[list[list[socket.socket]], bool]:
    """For each slot, and whether they were made here; those of systemd are the same for all. Raises StartError."""
    count = slot_count(config)
    taken = systemd.listeners(os.environ, os.getpid())
    if taken:
        return [taken] * count, False
    return listen(config.server.host, config.server.port, count, config.server.backlog), True


def _raise_descriptor_limit() -> None:
    """As far as an unprivileged process may, for us and for the workers: the usual 1,024 is there for `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_descriptors(slots: int) -> None:
    """Raises StartError when this process may not open what so many workers take: better now than one by one."""
    held = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 # names are all that is wanted
    for_each = 2  # its channel and its pidfd
    links = 2 * (slots - 1)  # of the last one to start, until they are sent
    needed, most = held + for_each * slots + links + SPARE_DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most != resource.RLIM_INFINITY and needed > most:
        raise StartError(
            f"{slots} workers need {needed} descriptors here, and this process may have {most}:"
            " raise that by ulimit -n (LimitNOFILE= of systemd), or start fewer by --workers"
        )


# ---- decisions


@dataclass(frozen=True, slots=True)
class Start:
    """An order: start this slot now, under this generation."""

    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class Silence:
    """A finding: the worker of this slot has said nothing, or was not ready, for `seconds`. Is it to be killed?"""

    slot: int
    seconds: float
    is_over: bool


@dataclass(slots=True)
class _Slot:
    generation: int = 0
    due_at: float | None = 0.0  # when to start it; None while a worker runs
    started_at: float = 0.0
    silent_s: float = 0.0  # of the time that we listened: since its last heartbeat, or its start while it is not ready
    retry_s: float = field(default_factory=lambda: FIRST_RETRY_S)  # the delay after the next death that comes too soon
    is_ready: bool = False
    is_launched: bool = False  # has been ready in some generation
    is_empty: bool = False  # drained: nobody is connected to its worker any more
    is_stuck: bool = False  # its silence was found
    is_full: bool = False  # its worker has no room for more connections
    is_given_up: bool = False  # it is killed, and about to end

    @property
    def is_serving(self) -> bool:
        return self.is_ready and not self.is_given_up and self.silent_s < STUCK_S

    @property
    def accepts(self) -> bool:
        return self.is_serving and not self.is_full


class Fleet:
    """When is which slot started, and which does not serve? Pure: no I/O; `now` is an argument, in monotonic seconds.

    A slot is due at first, and again after each death: at once when its worker had lived `SETTLED_S`, else after a
    delay that doubles with each such death in a row. A slot that dies in its very first launch before it was ready will
    not do better the next time: that ends everything (`failure`), instead of a loop.

    Silence is summed up by `look`, which is to be called every `LOOK_S`, with all that was said until then passed on to
    `on_heartbeat` in between. A look that comes late adds no more than one in time: whoever calls it was not listening.
    """

    def __init__(self, slots: int, at_once: int = STARTING) -> None:
        self._slots = [_Slot() for _ in range(slots)]
        self._at_once = at_once
        self._looked_at: float | None = None
        self._has_served = False  # all were ready once
        self.is_stopping = False
        self.failure: str | None = None

    @property
    def is_over(self) -> bool:
        """No worker runs and none will be started."""
        return self.is_stopping and all(slot.due_at is not None for slot in self._slots)

    @property
    def is_empty(self) -> bool:
        """While stopping: nobody is connected to any worker that runs."""
        return self.is_stopping and all(slot.is_empty or slot.due_at is not None for slot in self._slots)

    @property
    def is_ready(self) -> bool:
        """Every slot has a worker that accepts connections."""
        return all(slot.is_ready for slot in self._slots)

    def starts(self, now: float) -> list[Start]:
        """What is due. Each Start is given once, and counts as a running worker until `on_death`.

        While so many of them are not ready yet, the others wait: look again after `on_ready` and `on_death`.
        """
        starts: list[Start] = []
        free = self._free_starts
        for number, slot in enumerate(self._slots):
            if not self.is_stopping and slot.due_at is not None and slot.due_at <= now and len(starts) < free:
                slot.generation += 1
                slot.started_at = now
                slot.silent_s = 0.0
                slot.due_at = None
                slot.is_empty = slot.is_stuck = slot.is_full = slot.is_given_up = False
                starts.append(Start(number, slot.generation))
        return starts

    def wake_at(self) -> float | None:
        """When `starts` will have something next; None when nothing is planned, or what is waits for others."""
        planned = [slot.due_at for slot in self._slots if slot.due_at is not None]
        return None if self.is_stopping or self._free_starts <= 0 else min(planned, default=None)

    @property
    def _free_starts(self) -> int:
        return self._at_once - sum(slot.due_at is None and not slot.is_ready for slot in self._slots)

    def on_ready(self, slot: int, now: float) -> float:
        """The worker of `slot` accepts connections. Returns how many seconds after its start."""
        this = self._slots[slot]
        this.is_ready = this.is_launched = True
        this.silent_s = 0.0
        self._has_served = self._has_served or self.is_ready
        return now - this.started_at

    def on_full(self, slot: int, *, is_full: bool) -> None:
        """The worker of `slot` has no room for more connections; or has it again."""
        self._slots[slot].is_full = is_full

    def on_heartbeat(self, slot: int) -> bool:
        """Returns whether the worker of `slot` had been found stuck. One that is not ready is not excused by it."""
        this = self._slots[slot]
        was_stuck = this.is_stuck and not this.is_given_up
        if this.is_ready and not this.is_given_up:
            this.silent_s = 0.0
            this.is_stuck = False
        return was_stuck

    def look(self, now: float) -> list[Silence]:
        """Who is silent since the last look for longer than it may be; of each silence at most two findings."""
        listened_s = 0.0 if self._looked_at is None else min(now - self._looked_at, LOOK_S)
        self._looked_at = now
        findings = []
        for number, slot in enumerate(self._slots):
            if slot.due_at is not None:
                continue
            slot.silent_s += listened_s
            if self.is_stopping or slot.is_given_up:  # an end has its own deadlines
                continue
            slot.is_given_up = slot.silent_s >= (REPLACE_S if slot.is_ready else START_S)
            if slot.is_given_up or (slot.is_ready and slot.silent_s >= STUCK_S and not slot.is_stuck):
                slot.is_stuck = True
                findings.append(Silence(number, slot.silent_s, slot.is_given_up))
        return findings

    def accepting(self) -> list[int]:
        """The slots whose workers take connections."""
        return [number for number, slot in enumerate(self._slots) if slot.accepts]

    def deserted(self) -> list[int]:
        """The slots whose connections others should take: their worker is dead, not ready yet, stuck, or full.

        None before all were ready once, none while stopping, and none when there is nobody else.
        """
        if self.is_stopping or not self._has_served or not self.accepting():
            return []
        return [number for number, slot in enumerate(self._slots) if not slot.accepts]

    def unserved(self) -> list[int]:
        """The slots that nobody accepts from, nor will if nothing is started any more: without a worker, or stuck."""
        return [
            number
            for number, slot in enumerate(self._slots)
            if slot.due_at is not None or slot.is_given_up or (slot.is_ready and not slot.is_serving)
        ]

    def generation(self, slot: int) -> int:
        """How often `slot` was started."""
        return self._slots[slot].generation

    def on_empty(self, slot: int) -> None:
        """The worker of `slot` has drained."""
        self._slots[slot].is_empty = True

    def is_drained(self, slot: int) -> bool:
        return self._slots[slot].is_empty

    def on_death(self, slot: int, reason: str, now: float) -> float | None:
        """The worker of `slot` has ended. Returns the seconds until it is replaced, or None when it is not."""
        this = self._slots[slot]
        this.is_ready = False
        this.due_at = now
        if not self.is_stopping and not this.is_launched and this.generation == 1:
            self.failure = reason
            self.stop()
        if self.is_stopping:
            return None
        if now - this.started_at >= SETTLED_S:
            this.retry_s = FIRST_RETRY_S
            return 0.0
        delay_s = this.retry_s
        this.retry_s = min(2 * delay_s, LONGEST_RETRY_S)
        this.due_at = now + delay_s
        return delay_s

    def stop(self) -> None:
        """Nothing is started any more."""
        self.is_stopping = True


# ---- processes

# They pass.
_SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})


class _Outbox:
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


@dataclass(slots=True, eq=False)
class _Worker:
    """A running process and our ends of it."""

    slot: int
    generation: int
    process: subprocess.Popen[bytes]
    channel: Channel
    outbox: _Outbox
    pidfd: int  # readable when the process has ended
    log: logs.Logger = field(init=False)
    _events: asyncio.Queue["_Event"] = field(init=False)
    _on_heartbeat: Callable[["_Worker", Heartbeat], None] = field(init=False)
    _has_ended: bool = False  # and that is queued
    reason: str | None = None  # for which it says that it cannot start, or is killed

    def __post_init__(self) -> None:
        self.log = _log.bind(slot=self.slot, pid=self.process.pid)

    def watch(self, events: asyncio.Queue["_Event"], on_heartbeat: Callable[["_Worker", Heartbeat], None]) -> None:
        """Queue what it says, and its end; a heartbeat is not queued: what is handled first is not its silence."""
        self._events = events
        self._on_heartbeat = on_heartbeat
        loop = asyncio.get_running_loop()
        loop.add_reader(self.channel.fileno(), self._on_readable)
        loop.add_reader(self.pidfd, self._on_end)

    def read(self) -> None:
        """Queue what it has said until now, which the loop may not have called for yet; and its end likewise."""
        if self._has_ended:
            return
        if os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            self._on_end()
            return
        for _ in range(READ):  # it may say more all the time
            if not self._on_readable():
                break

    def _on_readable(self) -> bool:
        """Queue one message. False when there is none, now or ever."""
        try:
            message = self.channel.receive()
        except ControlError as error:
            self._events.put_nowait((self, error))
            return True
        if message is None:  # the process is about to end
            asyncio.get_running_loop().remove_reader(self.channel.fileno())
            return False
        if message is NOTHING:
            return False
        if isinstance(message, Heartbeat):
            self._on_heartbeat(self, message)
        else:
            self._events.put_nowait((self, message))
        return True

    def _on_end(self) -> None:
        self._has_ended = True
        self._unwatch()
        while self._on_readable():  # its last words come before its end
            pass
        self._events.put_nowait((self, None))

    def _unwatch(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.channel.fileno())
        loop.remove_reader(self.pidfd)

    def close(self) -> int:
        """After its end: leave neither zombie nor descriptor. Returns its exit status, negative for a signal."""
        self._unwatch()
        status = self.process.wait()
        self.outbox.close()
        self.channel.close()
        os.close(self.pidfd)
        return status


class _Deputy:
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


@dataclass(slots=True)
class _Made:
    """A link between two workers: when it was made, and how long after that it is replaced at the earliest."""

    serial: int
    made_at: float
    retry_s: float = LOOK_S


# A signal; what a worker said, or what is wrong with it, or None for its end; None when a time has come.
_Event = signal.Signals | tuple[_Worker, Message | ControlError | None] | None


class Supervisor:
    """Executes what `Fleet` decides, on one asyncio loop."""

    def __init__(
        self,
        config: Config,
        listeners: list[list[socket.socket]],
        reload: Callable[[], Config],
        worker: str,
        *,
        are_ours: bool,
    ) -> None:
        self._config = config
        self._reload = reload
        self._listeners = listeners
        self._are_ours = are_ours  # else systemd has them too, and gives them to our successor
        self._are_shared = (
            not are_ours and len(listeners) > 1
        )  # the listeners are the same for every slot: others accept where one does not
        self._module = worker
        self._fleet = Fleet(len(listeners))
        self._workers: dict[int, _Worker] = {}
        self._view = View(1, secrets.token_bytes(KEY_BYTES), {"": tuple(range(len(listeners)))})
        self._links: dict[tuple[int, int], _Made] = {}  # the newest, by the two slots, lower first
        self._serials = itertools.count(1)
        self._hands = itertools.count(1)
        self._unlinked: dict[tuple[int, int], float] = {}  # those that are to be given a new one, and when
        self._deputy = _Deputy(listeners, self._give)
        self._turn = 0  # who was handed connections last
        self._cpus = cpus.usable()
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._notifier = systemd.Notifier(os.environ, os.getpid())
        self._code = ExitCode.OK
        self._look_at = 0.0
        self._drain_until: float | None = None  # while all workers drain
        self._kill_at: float | None = None  # when all have been told to end
        self._has_served = False
        self._is_hangup_queued = False
        self._counters = Counters(len(listeners))
        self._bound = [listener.getsockname() for listener in listeners[0]]
        self._port: int | None = next((bound[1] for bound in self._bound if isinstance(bound, tuple)), None)
        self._started_at = time.time()

    async def run(self) -> ExitCode:
        """Until the last worker has ended. Raises StartError when the first launch fails."""
        self._listen_to_signals()
        service = await self._open_service()
        self._keep_alive()
        try:
            while not self._events.empty():  # an early signal: nothing is started then
                self._handle(self._events.get_nowait())
            while not self._fleet.is_over:
                self._start_due()
                self._handle(await self._next_event())
                self._keep_time()
        finally:  # no worker is left, but for a bug: then none is left behind
            signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)  # what comes now changes nothing, nor the exit code
            for worker in self._workers.values():
                worker.process.kill()
                worker.close()
            self._deputy.close()
            service.close()
            self._counters.close()
            self._notifier.close()
        if self._fleet.failure is not None:
            raise StartError(self._fleet.failure)
        _log.info("stopped", code=int(self._code))
        return self._code

    def _listen_to_signals(self) -> None:
        """Those that have come already, which `run` of this module blocked, are the first events."""
        for number in HEARD:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        while early := signal.sigtimedwait(HEARD, 0):
            self._on_signal(signal.Signals(early.si_signo))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)

    def _on_signal(self, number: signal.Signals) -> None:
        """Several hangups that nobody has handled yet ask for the same."""
        if number != signal.SIGHUP or not self._is_hangup_queued:
            self._is_hangup_queued = self._is_hangup_queued or number == signal.SIGHUP
            self._events.put_nowait(number)

    def _keep_alive(self) -> None:
        """While this loop turns, systemd hears of it."""
        if self._notifier.watchdog_s:
            self._notifier.send("WATCHDOG=1")
            asyncio.get_running_loop().call_later(self._notifier.watchdog_s, self._keep_alive)

    async def _next_event(self) -> _Event:
        start_at = self._fleet.wake_at()
        wake_at = self._next_deadline() if start_at is None else min(self._next_deadline(), start_at)
        timer = asyncio.get_running_loop().call_later(wake_at - time.monotonic(), self._events.put_nowait, None)
        try:
            return await self._events.get()
        finally:
            timer.cancel()

    def _next_deadline(self) -> float:
        return min(at for at in (self._look_at, self._drain_until, self._kill_at) if at is not None)

    def _keep_time(self) -> None:
        """What is due, unless that is answered by what was said until now: this process may have been stopped."""
        if time.monotonic() < self._next_deadline():
            return
        for worker in self._workers.values():
            worker.read()
        for _ in range(self._events.qsize()):
            self._handle(self._events.get_nowait())
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_all()
        if self._drain_until is not None and time.monotonic() >= self._drain_until:
            self._end_late()
        if time.monotonic() >= self._look_at:
            self._look(time.monotonic())
        self._update_deputy()

    def _handle(self, event: _Event) -> None:
        if isinstance(event, signal.Signals):
            self._handle_signal(event)
        elif event is not None:
            worker, message = event
            if message is None:
                self._handle_end(worker)
            else:
                self._handle_message(worker, message)
        if self._drain_until is not None and self._fleet.is_empty:
            _log.info("drained")
            self._stop(is_forced=False)
        self._update_deputy()

    def _update_deputy(self) -> None:
        self._deputy.watch(() if self._are_shared else self._fleet.deserted())

    # Silence, and what was put off

    def _look(self, now: float) -> None:
        self._look_at = now + LOOK_S
        for silence in self._fleet.look(now):
            worker = self._workers[silence.slot]
            seconds = round(silence.seconds, 1)
            if silence.is_over:
                worker.log.error("worker_given_up", seconds=seconds)
                worker.reason = f"worker {worker.slot} was silent, or not ready, for {seconds} s and was killed"
                worker.process.kill()
            else:
                worker.log.warning("worker_stuck", seconds=seconds)
        for worker in self._workers.values():
            worker.outbox.flush()  # a shortage may have passed
        self._deputy.resume(now)
        if self._drain_until is not None:
            self._close_unserved()
        for ends in [ends for ends, due_at in sorted(self._unlinked.items()) if due_at <= now]:
            self._link(*ends)

    def _give(self, fds: list[int]) -> bool:
        """Hand connections to a worker that accepts, each time to the next one, and has room in its channel."""
        slots = self._fleet.accepting()
        for _ in slots:
            self._turn += 1
            worker = self._workers[slots[self._turn % len(slots)]]
            if worker.outbox.offer(Hand(next(self._hands), fds)):
                return True
        return False

    # Links

    def _link(self, lower: int, higher: int) -> None:
        """Give two workers a new link, now or as soon as the machine lets us; a dead one's successor brings its own."""
        one, other = self._workers.get(lower), self._workers.get(higher)
        if one is None or other is None or self._kill_at is not None:
            self._unlinked.pop((lower, higher), None)
            return
        try:
            ends = control.link()
        except OSError as error:
            if self._unlinked.get((lower, higher)) != 0.0:
                _log.warning("cannot_link", slots=[lower, higher], reason=str(error))
            self._unlinked[lower, higher] = 0.0  # with each look
            return
        self._unlinked.pop((lower, higher), None)
        serial, now = next(self._serials), time.monotonic()
        older = self._links.get((lower, higher))
        retry_s = LOOK_S if older is None else min(2 * older.retry_s, LONGEST_RETRY_S)
        self._links[lower, higher] = _Made(serial, now, retry_s)
        one.outbox.send(Link(higher, other.generation, serial, [ends[0]]))
        other.outbox.send(Link(lower, one.generation, serial, [ends[1]]))

    def _handle_unlinked(self, worker: _Worker, slot: int, serial: int) -> None:
        """Both ends ask: the first to do so has the number of the newest link, the second has that of an older one.

        One that had only just been made is replaced a while later: two that ask all the time, or one that has no room
        for a link, are no load.
        """
        ends = _in_order(worker.slot, slot)
        newest = self._links.get(ends)
        if newest is None or newest.serial != serial or ends in self._unlinked:
            return
        now = time.monotonic()
        if now - newest.made_at >= LONGEST_RETRY_S:  # it did not break of what broke those before it
            newest.retry_s = LOOK_S
        due_at = newest.made_at + newest.retry_s
        if now < due_at:
            self._unlinked[ends] = due_at
        else:
            self._link(*ends)

    # Start

    def _start_due(self) -> None:
        for start in self._fleet.starts(time.monotonic()):
            if self._fleet.is_stopping:  # the one before could not be started, which ended the launch
                self._fleet.on_death(start.slot, "not started", time.monotonic())
                continue
            try:
                worker = self._start(start)
            except (OSError, ControlError) as error:
                self._replace(start.slot, f"worker {start.slot} cannot be started: {error}", _log.bind(slot=start.slot))
            else:
                self._workers[start.slot] = worker
                if start.generation > 1:
                    self._counters.add(start.slot, "restarts_total")
                worker.watch(self._events, self._handle_heartbeat)
                worker.log.debug("worker_started", generation=start.generation)

    def _start(self, start: Start) -> _Worker:
        """Execute one worker. When the machine has no room for it: raises OSError and leaves nothing open."""
        listeners = [listener.fileno() for listener in self._listeners[start.slot]]
        channel, theirs = control.pair()
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(channel.close)
            outbox = _Outbox(channel)
            undo.callback(outbox.close)
            counters = self._counters.fd
            others = list(self._workers.values())
            channel.send(
                Boot(
                    self._config,
                    start.slot,
                    len(self._listeners),
                    start.generation,
                    listeners,
                    counters,
                    self._view,
                    links=len(others),
                    shares_listeners=self._are_shared,
                )
            )
            links = [self._link_to_new(start, other, outbox, undo) for other in others]
            process = self._execute(theirs.fileno(), [theirs.fileno(), counters, *listeners])
            undo.callback(process.wait)
            undo.callback(process.kill)
            pidfd = os.pidfd_open(process.pid)
            undo.pop_all()
        worker = _Worker(start.slot, start.generation, process, channel, outbox, pidfd)
        for other, link in zip(others, links, strict=True):
            self._links[_in_order(start.slot, other.slot)] = _Made(link.serial, time.monotonic())
            other.outbox.send(link)
        self._pin(worker)
        return worker

    def _execute(self, channel: int, inherited: Sequence[int]) -> subprocess.Popen[bytes]:
        """With the signals blocked that a new process would die of; it ignores them, and then unblocks them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        try:
            return subprocess.Popen(  # noqa: S603 # our own interpreter and module
                _command(self._module, channel),
                stdin=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name not in systemd.VARIABLES},
                pass_fds=inherited,
                start_new_session=True,  # a terminal's ^C is for the supervisor alone
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)

    def _link_to_new(self, start: Start, other: _Worker, outbox: _Outbox, undo: contextlib.ExitStack) -> Link:
        """Put one end into the new worker's channel; returns what the other worker is to be sent once there is one."""
        ours, theirs = control.link()
        undo.callback(control.close_all, [theirs])
        serial = next(self._serials)
        outbox.send(Link(other.slot, other.generation, serial, [ours]))
        return Link(start.slot, start.generation, serial, [theirs])

    def _pin(self, worker: _Worker) -> None:
        if self._config.server.pin_workers:
            cpu = self._cpus[worker.slot % len(self._cpus)]
            try:
                os.sched_setaffinity(worker.process.pid, {cpu})
            except OSError as error:  # taken away since the start; or it has ended, which we hear of soon
                worker.log.warning("cannot_pin", cpu=cpu, reason=str(error))

    # Status

    async def _open_service(self) -> Service:
        service = Service(folder(self._config.server.runtime_dir), self._port or self._config.server.port, self._report)
        try:
            await service.open()
        except UnusableError as error:
            _log.warning("status_unavailable", reason=str(error))
        return service

    def _report(self) -> Status:
        workers = [self._report_slot(slot) for slot in range(len(self._listeners))]
        return Status(__version__, os.getpid(), self._urls(), self._started_at, workers)

    def _report_slot(self, slot: int) -> WorkerStatus:
        worker = self._workers.get(slot)
        pid = None if worker is None else worker.process.pid
        process = None if pid is None else read_process(pid)
        return WorkerStatus(slot, self._fleet.generation(slot), pid, process, self._counters.read(slot))

    def _urls(self) -> list[str]:
        return [_url(bound, self._config.server.path) for bound in self._bound]

    # Messages and ends

    def _handle_message(self, worker: _Worker, message: Message | ControlError) -> None:
        now = time.monotonic()
        match message:
            case Ready():
                self._handle_ready(worker, self._fleet.on_ready(worker.slot, now))
            case Failed(reason):
                worker.reason = f"worker {worker.slot} failed: {reason}"
            case Handed(serial, is_taken):
                self._handle_handed(worker, serial, is_taken=is_taken)
            case Stopped():
                self._fleet.on_empty(worker.slot)
            case Unlinked(slot, serial):
                self._handle_unlinked(worker, slot, serial)
            case _:  # a worker that cannot be understood cannot be told to stop either
                if not isinstance(message, ControlError):
                    control.close_all(control.descriptors(message))
                worker.log.error("worker_unknown_message", reason=str(message))
                worker.process.kill()

    def _handle_heartbeat(self, worker: _Worker, heartbeat: Heartbeat) -> None:
        self._fleet.on_full(worker.slot, is_full=heartbeat.is_full)
        if self._fleet.on_heartbeat(worker.slot):
            worker.log.info("worker_recovered")

    def _handle_ready(self, worker: _Worker, seconds: float) -> None:
        if self._has_served:
            worker.log.info("worker_ready", seconds=round(seconds, 3))
        elif self._fleet.is_ready and not self._fleet.is_stopping:
            self._has_served = True
            self._announce()

    def _handle_handed(self, worker: _Worker, serial: int, *, is_taken: bool) -> None:
        fds = worker.outbox.take_back(serial)
        if is_taken or self._fleet.is_stopping:
            control.close_all(fds)
        else:
            self._fleet.on_full(worker.slot, is_full=True)
            self._deputy.take(fds)

    def _announce(self) -> None:
        _log.info(
            "serving",
            version=__version__,
            pid=os.getpid(),
            urls=self._urls(),
            port=self._port,
            workers=len(self._listeners),
        )
        self._notifier.send("READY=1", f"STATUS=Serving {' '.join(_name(bound) for bound in self._bound)}")
        exposed = [_name(bound) for bound in self._bound if not _is_loopback(bound)]
        if exposed and not self._config.auth.required:
            _log.warning("open_mode", addresses=exposed)

    def _handle_end(self, worker: _Worker) -> None:
        del self._workers[worker.slot]
        self._links = {slots: newest for slots, newest in self._links.items() if worker.slot not in slots}
        self._unlinked = {slots: due_at for slots, due_at in self._unlinked.items() if worker.slot not in slots}
        unseen = worker.outbox.take_back_all()
        status = worker.close()
        self._counters.zero_gauges(worker.slot)
        words = f"signal {_signal_name(-status)}" if status < 0 else f"code {status}"
        reason = worker.reason or f"worker {worker.slot} ended with {words}"
        if not self._fleet.is_stopping:
            self._replace(worker.slot, reason, worker.log)
            self._deputy.take(unseen)
            return
        control.close_all(unseen)
        self._fleet.on_death(worker.slot, reason, time.monotonic())
        if not self._are_shared:
            _close([self._listeners[worker.slot]])  # nobody accepts there any more
        if status != 0 and self._fleet.failure is None:
            self._code = ExitCode.FAILED
            worker.log.error("worker_lost", reason=reason)

    def _replace(self, slot: int, reason: str, log: logs.Logger) -> None:
        retry_s = self._fleet.on_death(slot, reason, time.monotonic())
        if retry_s is not None:
            log.error("worker_died", reason=reason, retry_seconds=retry_s)
        elif self._fleet.failure is not None:
            self._stop(is_forced=True)

    # Signals

    def _handle_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self._is_hangup_queued = False
            self._handle_hangup()
        elif not self._fleet.is_stopping:
            seconds = self._config.server.drain_seconds
            _log.info("stopping", signal=number.name, workers=len(self._workers), drain_seconds=seconds)
            time_us = int(1e6 * (seconds + OVERTIME_S + STOP_S))
            self._notifier.send("STOPPING=1", "STATUS=Draining", f"EXTEND_TIMEOUT_USEC={time_us}")
            if seconds:
                self._drain(seconds)
            else:
                self._stop(is_forced=False)
        else:
            _log.warning("forced", signal=number.name)
            self._stop(is_forced=True)

    def _handle_hangup(self) -> None:
        if self._fleet.is_stopping:
            _log.warning("reload_refused", reason="the server is ending")
        elif self._has_served:
            self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            self._take_reload()
            self._notifier.send("READY=1")
        else:
            self._take_reload()

    def _take_reload(self) -> None:
        try:
            reload = options.reload(self._config, self._reload())
            control.check(reload.config)
        except ConfigError as error:
            _log.error("reload_refused", reason=str(error))
            return
        except Exception:  # noqa: BLE001 # whatever it is, the old configuration serves as well as before
            _log.exception("internal_error")
            return
        self._config = reload.config
        logs.configure(self._config.log.level, self._config.log.format)
        for worker in self._workers.values():
            worker.outbox.send(Reload(self._config))
        if reload.needs_restart:
            _log.warning("needs_restart", options=reload.needs_restart)
        _log.info("reloaded", options=reload.changed)

    def _drain(self, seconds: float) -> None:
        self._fleet.stop()
        self._drain_until = time.monotonic() + seconds + OVERTIME_S
        self._close_unserved()
        for worker in self._workers.values():
            worker.outbox.send(Drain(seconds, seconds + OVERTIME_S))

    def _close_unserved(self) -> None:
        """Nobody takes over in a drain: better refused than waiting for its end.

        A stuck worker has copies of its sockets, so they are shut down. Those of systemd live longer than we do.
        """
        self._deputy.watch(())
        for slot in () if self._are_shared else self._fleet.unserved():
            for listener in self._listeners[slot] if self._are_ours else ():
                with contextlib.suppress(OSError):  # it is closed already
                    listener.shutdown(socket.SHUT_RDWR)
            _close([self._listeners[slot]])

    def _end_late(self) -> None:
        """A worker is stuck: one that turns closes everybody in time."""
        _log.error("drain_late", slots=[slot for slot in self._workers if not self._fleet.is_drained(slot)])
        self._code = ExitCode.FAILED
        self._stop(is_forced=True)

    def _stop(self, *, is_forced: bool) -> None:
        """Tell all to end, now."""
        self._fleet.stop()
        self._drain_until = None
        kill_at = time.monotonic() + (FORCED_STOP_S if is_forced else STOP_S)
        self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)  # impatience never adds time
        for worker in self._workers.values():
            worker.outbox.send(Stop(is_forced=is_forced))
        self._deputy.close()
        _close(self._listeners)  # the workers' copies follow: then new connections are refused, not left waiting

    def _kill_all(self) -> None:
        self._kill_at = None
        for worker in self._workers.values():
            worker.log.error("worker_killed")
            worker.process.kill()


def _in_order(one: int, other: int) -> tuple[int, int]:
    return (one, other) if one < other else (other, one)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last has no name
        return str(number)


def _command(module: str, fd: int) -> list[str]:
    """`-m` would look for modules in the current folder first: -P, unless that is where we were found ourselves."""
    is_checkout = Path().samefile(Path(__file__).parent.parent)
    return [sys.executable, *([] if is_checkout else ["-P"]), "-m", module, str(fd)]


# ---- addresses

_Address = tuple[socket.AddressFamily, tuple[Any, ...]]  # what `bind` takes; the port is filled in later

_BOTH: Final = ((socket.AF_INET, ("0.0.0.0", 0)), (socket.AF_INET6, ("::", 0)))  # noqa: S104 # asked for by name
_LOOPBACK: Final = ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0)))
_KNOWN: Final[dict[str, Sequence[_Address]]] = {"*": _BOTH, "": _BOTH, "::": _BOTH, "localhost": _LOOPBACK}


def listen(host: str, port: int, slots: int, backlog: int) -> list[list[socket.socket]]:
    """One socket per slot and address of `host`, listening, all on the same port; port 0 is any that is free on all.

    Raises StartError when another process serves the port already (SO_REUSEPORT alone would let it be shared in
    silence), or when this machine or user cannot listen there. Addresses that it does not have are left out, unless
    none remains.
    """
    addresses, skipped = _usable(_resolve(host))
    for attempt in range(PORT_TRIES):
        try:
            rows = _listen(addresses, port, slots, backlog)
        except _InUseError:
            if port != 0 or attempt == PORT_TRIES - 1:
                raise
        else:
            break
    for address, error in skipped:
        _log.warning("address_skipped", address=str(address[1][0]), reason=error.strerror)
    return rows


class _InUseError(StartError):
    pass


def _resolve(host: str) -> Sequence[_Address]:
    host = host.removeprefix("[").removesuffix("]")
    if host in _KNOWN:
        return _KNOWN[host]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name in DNS looks like this
        raise StartError(f"unknown host {host!r}: give a name or an address of this machine by --host") from error
    return list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))


def _usable(addresses: Iterable[_Address]) -> tuple[list[_Address], list[tuple[_Address, OSError]]]:
    usable, skipped = [], []
    for address in addresses:
        try:
            _bound(address, 0).close()
        except OSError as error:
            if error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                skipped.append((address, error))
                continue
        usable.append(address)
    if not usable:
        names = " and ".join(str(address[1][0]) for address, _ in skipped)
        raise StartError(f"{names} is no address of this machine: give one that is by --host, or 0.0.0.0 for all")
    return usable, skipped


def _listen(addresses: list[_Address], port: int, slots: int, backlog: int) -> list[list[socket.socket]]:
    rows: list[list[socket.socket]] = [[] for _ in range(slots)]
    try:
        for address in addresses:
            if port != 0:
                _probe(address, port)
            for row in rows:
                row.append(_open(address, port, backlog))
                port = row[0].getsockname()[1]
    except BaseException:
        _close(rows)
        raise
    return rows


def _probe(address: _Address, port: int) -> None:
    """Without SO_REUSEPORT nobody else may listen there; with SO_REUSEADDR those who have just left do not count."""
    _open(address, port, None).close()


def _open(address: _Address, port: int, backlog: int | None) -> socket.socket:
    """A socket of ours that listens; without backlog one that could. Raises StartError."""
    try:
        bound = _bound(address, port, may_share=backlog is not None)
        if backlog is not None:
            bound.listen(backlog)
    except OSError as error:
        raise _refusal(_name((address[1][0], port)), error) from error
    return bound


def _bound(address: _Address, port: int, *, may_share: bool = False) -> socket.socket:
    family, (host, _, *scope) = address
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if may_share:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port, *scope))
    except BaseException:
        bound.close()
        raise
    return bound


def _refusal(name: str, error: OSError) -> StartError:
    if error.errno == errno.EADDRINUSE:
        return _InUseError(f"{name} is in use by another process: end that, or choose another port by --port")
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return StartError(f"cannot listen on {name}: {error.strerror}: raise that by ulimit -n, or set fewer --workers")
    if error.errno in {errno.EACCES, errno.EPERM}:
        return StartError(f"{name} is not permitted to this user: choose a port from 1024 up by --port")
    return StartError(f"cannot listen on {name}: {error.strerror}: choose another address by --host")


def _close(rows: Iterable[Iterable[socket.socket]]) -> None:
    for row in rows:
        for listener in row:
            listener.close()


def _url(sockaddr: Any, path: str) -> str:
    return f"ws://{_name(sockaddr)}{path}" if isinstance(sockaddr, tuple) else _name(sockaddr)


def _name(sockaddr: Any) -> str:
    """Of an internet address `host:port`; a Unix socket has its path, or its name after an @."""
    if not isinstance(sockaddr, tuple):
        return f"unix:{_path(sockaddr)}"
    host = f"[{sockaddr[0]}]" if ":" in str(sockaddr[0]) else sockaddr[0]
    return f"{host}:{sockaddr[1]}"


def _path(sockaddr: str | bytes) -> str:
    return f"@{sockaddr[1:].decode(errors='replace')}" if isinstance(sockaddr, bytes) else sockaddr


def _is_loopback(sockaddr: Any) -> bool:
    return not isinstance(sockaddr, tuple) or ipaddress.ip_address(str(sockaddr[0]).partition("%")[0]).is_loopback
