"""The supervisor: opens the listening sockets, executes the workers, replaces those that die, ends them all.

`Fleet` decides and does nothing; `Supervisor` does and decides nothing; `listen` is the address book. What happens (a
signal, a message, a death) is only queued where it is noticed, and handled one by one by `Supervisor.run`.

Invariants: the listening sockets stay open here while the server lives, so what a dead worker had not accepted waits
for its successor. A worker's end of its control channel is open in that worker alone: each side sees the other's end.
No worker is told to end before all are empty, or the drain's deadline has come: the rooms of one may need another.
Must not know: what a worker does; it is executed, never imported. Read `control` for what the two say to each other.
"""

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from . import __version__, config as options, control, logs, systemd
from .config import Config
from .control import (
    NOTHING,
    OVERTIME_S,
    Boot,
    Channel,
    ControlError,
    Drain,
    Failed,
    Heartbeat,
    Message,
    Ready,
    Reload,
    Stop,
    Stopped,
    ToWorker,
)
from .errors import ConfigError, ExitCode, StartError
from .metrics import Counters
from .status import Service, Status, UnusableError, WorkerStatus, folder, read_process

_log = logs.get("fastsig.supervisor")

SETTLED_S: Final = 10.0  # a worker that lived this long did not die of its start (ARCHITECTURE §2)
FIRST_RETRY_S: Final = 0.1
LONGEST_RETRY_S: Final = 5.0
STOP_S: Final = 10.0  # a worker that is told to end and has not ended after this is killed
FORCED_STOP_S: Final = 1.0
PORT_TRIES: Final = 16
WORKER: Final = "fastsig.worker"


def run(config: Config, *, reload: Callable[[], Config] | None = None, worker: str = WORKER) -> ExitCode:
    """Serve until a signal ends it; the exit code. Blocks. `worker` is the module that is executed.

    `reload` gives the configuration as it is to be after SIGHUP, or raises ConfigError. Raises that too.
    """
    control.check(config)
    logs.configure(config.log.level, config.log.format)
    slots: list[list[socket.socket]] = []
    try:
        slots = _listeners(config)
        return uvloop.run(_made(config, slots, reload or (lambda: config), worker).run())
    except StartError as error:
        _log.error("cannot_start", reason=str(error))
        return ExitCode.START
    except Exception:  # noqa: BLE001 # the process's main loop
        _log.exception("internal_error")
        return ExitCode.FAILED
    finally:
        _close(slots)


def _made(config: Config, slots: list[list[socket.socket]], reload: Callable[[], Config], worker: str) -> "Supervisor":
    try:
        return Supervisor(config, slots, reload, worker)
    except OSError as error:
        raise StartError(f"this machine has no room for the counters: {error}") from error


def slot_count(config: Config) -> int:
    """How many workers share the port. One, whatever `server.workers` says, until rooms can be shared among several."""
    return 1


def _listeners(config: Config) -> list[list[socket.socket]]:
    """For each slot. Those that systemd opened are shared by all; else each slot has its own. Raises StartError."""
    count = slot_count(config)
    taken = systemd.listeners(os.environ, os.getpid())
    return [taken] * count if taken else listen(config.server.host, config.server.port, count, config.server.backlog)


# ---- decisions


@dataclass(frozen=True, slots=True)
class Start:
    """An order: start this slot now, under this generation."""

    slot: int
    generation: int


@dataclass(slots=True)
class _Slot:
    generation: int = 0
    due_at: float | None = 0.0  # when to start it; None while a worker runs
    started_at: float = 0.0
    heard_at: float = 0.0
    retry_s: float = FIRST_RETRY_S  # the delay after the next death that comes too soon
    is_ready: bool = False
    is_launched: bool = False  # has been ready in some generation
    is_empty: bool = False  # drained: nobody is connected to its worker any more


class Fleet:
    """When is which slot started? Pure: no I/O; every `now` is an argument, in monotonic seconds.

    A slot is due at first, and again after each death: at once when its worker had lived `SETTLED_S`, else after a
    delay that doubles with each such death in a row. A slot that dies in its very first launch before it was ready will
    not do better the next time: that ends everything (`failure`), instead of a loop.
    """

    def __init__(self, slots: int) -> None:
        self._slots = [_Slot() for _ in range(slots)]
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
        """What is due. Each Start is given once, and counts as a running worker until `on_death`."""
        starts = []
        for number, slot in enumerate(self._slots):
            if not self.is_stopping and slot.due_at is not None and slot.due_at <= now:
                slot.generation += 1
                slot.started_at = slot.heard_at = now
                slot.due_at = None
                slot.is_empty = False
                starts.append(Start(number, slot.generation))
        return starts

    def wake_at(self) -> float | None:
        """When `starts` will have something next; None when nothing is planned."""
        planned = [slot.due_at for slot in self._slots if slot.due_at is not None]
        return None if self.is_stopping else min(planned, default=None)

    def on_ready(self, slot: int, now: float) -> float:
        """The worker of `slot` accepts connections. Returns how many seconds after its start."""
        this = self._slots[slot]
        this.is_ready = this.is_launched = True
        this.heard_at = now
        return now - this.started_at

    def on_heartbeat(self, slot: int, now: float) -> None:
        self._slots[slot].heard_at = now

    def generation(self, slot: int) -> int:
        """How often `slot` was started."""
        return self._slots[slot].generation

    def on_empty(self, slot: int) -> None:
        """The worker of `slot` has drained."""
        self._slots[slot].is_empty = True

    def is_drained(self, slot: int) -> bool:
        return self._slots[slot].is_empty

    def heard_at(self, slot: int) -> float:
        """When the worker of `slot` was last heard of; its start counts."""
        return self._slots[slot].heard_at

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


@dataclass(slots=True, eq=False)
class _Worker:
    """A running process and our ends of it."""

    slot: int
    process: subprocess.Popen[bytes]
    channel: Channel
    pidfd: int  # readable when the process has ended
    log: logs.Logger = field(init=False)
    reason: str | None = None  # for which it says that it cannot start
    waiting: list[ToWorker] = field(default_factory=list)  # what its channel had no room for

    def __post_init__(self) -> None:
        self.log = _log.bind(slot=self.slot, pid=self.process.pid)

    def send(self, message: ToWorker) -> None:
        """In order. What its channel has no room for waits for its next heartbeat; one that is gone needs nothing."""
        if isinstance(message, Reload):
            self.waiting = [other for other in self.waiting if not isinstance(other, Reload)]  # the newest is enough
        self.waiting.append(message)
        self.send_waiting()

    def send_waiting(self) -> None:
        try:
            while self.waiting:
                self.channel.send(self.waiting[0])
                del self.waiting[0]
        except BlockingIOError:
            return
        except OSError:
            self.waiting.clear()

    def watch(self, events: asyncio.Queue["_Event"]) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self.channel.fileno(), self._on_readable, events)
        loop.add_reader(self.pidfd, self._on_end, events)

    def _on_readable(self, events: asyncio.Queue["_Event"]) -> bool:
        """Queue one message. False when there is none, now or ever."""
        try:
            message = self.channel.receive()
        except ControlError as error:
            events.put_nowait((self, error))
            return True
        if message is None:  # the process is about to end
            asyncio.get_running_loop().remove_reader(self.channel.fileno())
        elif message is not NOTHING:
            events.put_nowait((self, message))
            return True
        return False

    def _on_end(self, events: asyncio.Queue["_Event"]) -> None:
        self._unwatch()
        while self._on_readable(events):  # its last words come before its end
            pass
        events.put_nowait((self, None))

    def _unwatch(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.channel.fileno())
        loop.remove_reader(self.pidfd)

    def close(self) -> int:
        """After its end: leave neither zombie nor descriptor. Returns its exit status, negative for a signal."""
        self._unwatch()
        status = self.process.wait()
        self.channel.close()
        os.close(self.pidfd)
        return status


# A signal; what a worker said, or what is wrong with it, or None for its end; None when a time has come.
_Event = signal.Signals | tuple[_Worker, Message | ControlError | None] | None


class Supervisor:
    """Executes what `Fleet` decides, on one asyncio loop."""

    def __init__(
        self, config: Config, listeners: list[list[socket.socket]], reload: Callable[[], Config], worker: str
    ) -> None:
        self._config = config
        self._reload = reload
        self._listeners = listeners
        self._module = worker
        self._fleet = Fleet(len(listeners))
        self._workers: dict[int, _Worker] = {}
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._notifier = systemd.Notifier(os.environ, os.getpid())
        self._code = ExitCode.OK
        self._drain_until: float | None = None  # while all workers drain
        self._kill_at: float | None = None  # when all have been told to end
        self._has_served = False
        self._counters = Counters(len(listeners))
        self._bound = [listener.getsockname() for listener in listeners[0]]
        self._port: int | None = next((bound[1] for bound in self._bound if isinstance(bound, tuple)), None)
        self._started_at = time.time()

    async def run(self) -> ExitCode:
        """Until the last worker has ended. Raises StartError when the first launch fails."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._events.put_nowait, number)
        service = await self._open_service()
        self._keep_alive()
        try:
            while not self._fleet.is_over:
                self._start_due()
                self._handle(await self._next_event())
        finally:  # empty, but for a bug: then no worker is left behind
            for worker in self._workers.values():
                worker.process.kill()
                worker.close()
            service.close()
            self._counters.close()
            self._notifier.close()
        if self._fleet.failure is not None:
            raise StartError(self._fleet.failure)
        _log.info("stopped", code=int(self._code))
        return self._code

    def _keep_alive(self) -> None:
        """While this loop turns, systemd hears of it."""
        if self._notifier.watchdog_s:
            self._notifier.send("WATCHDOG=1")
            asyncio.get_running_loop().call_later(self._notifier.watchdog_s, self._keep_alive)

    async def _next_event(self) -> _Event:
        times = [at for at in (self._fleet.wake_at(), self._drain_until, self._kill_at) if at is not None]
        if not times:
            return await self._events.get()
        timer = asyncio.get_running_loop().call_later(min(times) - time.monotonic(), self._events.put_nowait, None)
        try:
            return await self._events.get()
        finally:
            timer.cancel()

    def _handle(self, event: _Event) -> None:
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill_all()
        if self._drain_until is not None and time.monotonic() >= self._drain_until:
            self._end_late()
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

    # Start

    def _start_due(self) -> None:
        for start in self._fleet.starts(time.monotonic()):
            try:
                worker = self._start(start)
            except (OSError, ControlError) as error:
                self._replace(start.slot, f"worker {start.slot} cannot be started: {error}", _log.bind(slot=start.slot))
            else:
                self._workers[start.slot] = worker
                if start.generation > 1:
                    self._counters.add(start.slot, "restarts_total")
                worker.watch(self._events)
                worker.log.debug("worker_started", generation=start.generation)

    def _start(self, start: Start) -> _Worker:
        """Execute one worker. When the machine has no room for it: raises OSError and leaves nothing open."""
        listeners = [listener.fileno() for listener in self._listeners[start.slot]]
        channel, theirs = control.pair()
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(channel.close)
            counters = self._counters.fd
            channel.send(Boot(self._config, start.slot, len(self._listeners), start.generation, listeners, counters))
            process = subprocess.Popen(  # noqa: S603 # our own interpreter and module
                _command(self._module, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name not in systemd.VARIABLES},
                pass_fds=(theirs.fileno(), counters, *listeners),
                start_new_session=True,  # a terminal's ^C is for the supervisor alone
            )
            undo.callback(process.wait)
            undo.callback(process.kill)
            worker = _Worker(start.slot, process, channel, os.pidfd_open(process.pid))
            undo.pop_all()
        return worker

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
            case Heartbeat():
                self._fleet.on_heartbeat(worker.slot, now)
                worker.send_waiting()
            case Ready():
                self._handle_ready(worker, self._fleet.on_ready(worker.slot, now))
            case Failed(reason):
                worker.reason = f"worker {worker.slot} failed: {reason}"
            case Stopped():
                self._fleet.on_empty(worker.slot)
            case _:  # a worker that cannot be understood cannot be told to stop either
                worker.log.error("worker_unknown_message", reason=str(message))
                worker.process.kill()

    def _handle_ready(self, worker: _Worker, seconds: float) -> None:
        if self._has_served:
            worker.log.info("worker_ready", seconds=round(seconds, 3))
        elif self._fleet.is_ready and not self._fleet.is_stopping:
            self._has_served = True
            self._announce()

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
        status = worker.close()
        self._counters.zero_gauges(worker.slot)
        words = f"signal {_signal_name(-status)}" if status < 0 else f"code {status}"
        reason = worker.reason or f"worker {worker.slot} ended with {words}"
        if not self._fleet.is_stopping:
            self._replace(worker.slot, reason, worker.log)
            return
        self._fleet.on_death(worker.slot, reason, time.monotonic())
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
            worker.send(Reload(self._config))
        if reload.needs_restart:
            _log.warning("needs_restart", options=reload.needs_restart)
        _log.info("reloaded", options=reload.changed)

    def _drain(self, seconds: float) -> None:
        self._fleet.stop()
        self._drain_until = time.monotonic() + seconds + OVERTIME_S
        for worker in self._workers.values():
            worker.send(Drain(seconds, seconds + OVERTIME_S))

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
            worker.send(Stop(is_forced=is_forced))
        _close(self._listeners)  # the workers' copies follow: then new connections are refused, not left waiting

    def _kill_all(self) -> None:
        self._kill_at = None
        for worker in self._workers.values():
            worker.log.error("worker_killed")
            worker.process.kill()


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
