"""The supervisor: opens the listening sockets, executes the workers, replaces those that die, ends them all.

`Supervisor` does and decides little: `fleet` says who is started, silent, or to be linked anew. `listeners` opens the
sockets, `processes` has the workers, `handover` what they are given; `overview` knows how all of that is, for those who
ask. What happens (a signal, a message, a death) is only queued where it is noticed, and handled one by one by
`Supervisor.run`.

Invariants: the listening sockets stay open here while the server lives, so what a dead worker had not accepted waits
for its successor, or is handed to the others. All links between workers are made here, and none stays open here.
No worker is told to end before all are empty, or the drain's deadline has come: the rooms of one may need another.
A worker's silence counts only while we listened: when this process itself was stopped or starved, nobody is killed.
No deadline is missed before all that was said until then is handled.
Must not know: what a worker does; it is executed, never imported. Read `control` for what the two say to each other.
"""

import asyncio
import contextlib
import itertools
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import uvloop

from . import __version__, config as options, control, cpus, listeners, logs, systemd, tls
from .config import Config
from .control import (
    OVERTIME_S,
    Boot,
    ControlError,
    Drain,
    Failed,
    Hand,
    Handed,
    Heartbeat,
    Inspected,
    Link,
    Message,
    Ready,
    Reload,
    Stop,
    Stopped,
    Unlinked,
)
from .errors import ConfigError, ExitCode, StartError
from .fleet import LOOK_S, Fleet, Links, Start
from .handover import Deputy, Outbox
from .metrics import Counters
from .overview import Overview
from .processes import HEARD, Said, Worker, check_descriptors, ending, execute, raise_descriptor_limit
from .routing import KEY_BYTES, View
from .status import Service, UnusableError, folder

if TYPE_CHECKING:
    from .ops import Operations

_log = logs.get("fastsig.supervisor")

STOP_S: Final = 10.0  # a worker that is told to end and has not ended after this is killed
FORCED_STOP_S: Final = 1.0
WORKER: Final = "fastsig.worker"


def run(config: Config, *, reload: Callable[[], Config] | None = None, worker: str = WORKER) -> ExitCode:
    """Serve until a signal ends it; the exit code. Blocks. `worker` is the module that is executed.

    `reload` gives the configuration as it is to be after SIGHUP, or raises ConfigError. Raises that too.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)  # what comes before `Supervisor.run` can handle it waits until then
    control.check(config)
    _check_extra(config)
    tls.check(config.server)
    logs.configure(config.log.level, config.log.format)
    slots: list[list[socket.socket]] = []
    operators: list[socket.socket] = []
    try:
        slots, are_ours = _sockets(config)
        if config.ops.port:
            operators = listeners.listen_for_operators(config.ops.host, config.ops.port)
        raise_descriptor_limit()
        check_descriptors(len(slots))
        made = _made(config, slots, reload or (lambda: config), worker, are_ours=are_ours)
        return uvloop.run(made.run(operators))
    except StartError as error:
        _log.error("cannot_start", reason=str(error))
        return ExitCode.START
    except Exception:  # noqa: BLE001 # the process's main loop
        _log.exception("internal_error")
        return ExitCode.FAILED
    finally:
        listeners.close_all([*slots, operators])


def _made(
    config: Config, slots: list[list[socket.socket]], reload: Callable[[], Config], worker: str, *, are_ours: bool
) -> "Supervisor":
    try:
        return Supervisor(config, slots, reload, worker, are_ours=are_ours)
    except OSError as error:
        raise StartError(f"this machine has no room for the counters: {error}") from error


def _check_extra(config: Config) -> None:
    """Raises ConfigError. The packages are looked for, not imported: only workers need them."""
    if config.tracing.enabled:
        from importlib import metadata  # noqa: PLC0415 # 30 ms

        try:
            metadata.distribution("opentelemetry-exporter-otlp-proto-http")  # which needs the SDK
        except metadata.PackageNotFoundError:
            raise ConfigError("tracing.enabled = true: install what it needs: pip install 'fastsig[otel]'") from None


def slot_count(config: Config) -> int:
    """How many workers share the port."""
    return cpus.count() if config.server.workers == "auto" else config.server.workers


def _sockets(config: Config) -> tuple[list[list[socket.socket]], bool]:
    """For each slot, and whether they were made here; those of systemd are the same for all. Raises StartError."""
    count = slot_count(config)
    taken = systemd.listeners(os.environ, os.getpid())
    if taken:
        return [taken] * count, False
    return listeners.listen(config.server.host, config.server.port, count, config.server.backlog), True


_Event = signal.Signals | Said | None  # None: a time has come


class Supervisor:
    """Executes what `Fleet` decides, on one asyncio loop."""

    def __init__(
        self,
        config: Config,
        slots: list[list[socket.socket]],
        reload: Callable[[], Config],
        worker: str,
        *,
        are_ours: bool,
    ) -> None:
        self._config = config
        self._reload = reload
        self._listeners = slots
        self._are_ours = are_ours  # else systemd has them too, and gives them to our successor
        self._are_shared = not are_ours and len(slots) > 1  # the same for every slot: others accept where one does not
        self._module = worker
        self._fleet = Fleet(len(slots))
        self._links = Links()
        self._workers: dict[int, Worker] = {}
        self._view = View(1, secrets.token_bytes(KEY_BYTES), {"": tuple(range(len(slots)))})
        self._hands = itertools.count(1)
        self._deputy = Deputy(slots, self._give)
        self._turn = 0  # who was handed connections last
        self._cpus = cpus.usable()
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._notifier = systemd.Notifier(os.environ, os.getpid())
        self._code = ExitCode.OK
        self._look_at = 0.0
        self._drain_until: float | None = None  # while all workers drain
        self._kill_at: float | None = None  # when all have been told to end
        self._is_hangup_queued = False
        self._counters = Counters(len(slots))
        self._bound = [listener.getsockname() for listener in slots[0]]
        self._port: int | None = next((bound[1] for bound in self._bound if isinstance(bound, tuple)), None)
        self._overview = Overview(self._fleet, self._workers, self._counters, len(slots), self._urls())
        self._operations: Operations | None = None

    async def run(self, operators: list[socket.socket]) -> ExitCode:
        """Until the last worker has ended. Raises StartError when the first launch fails.

        `operators`: the listening sockets of the operations port, none for none. It is open to the end.
        """
        self._listen_to_signals()
        service = await self._open_service()
        self._keep_alive()
        try:
            while not self._events.empty():  # an early signal: nothing is started then
                self._handle(self._events.get_nowait())
            self._start_due()
            self._open_operations(operators)
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
            if self._operations is not None:
                await self._operations.close()
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
        self._overview.turned_at = now
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
        for one, other in self._links.due(now):
            self._link(one, other)

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

    def _link(self, one: int, other: int) -> None:
        """Give two workers a new link, now or as soon as the machine lets us."""
        try:
            ends = control.link()
        except OSError as error:
            if self._links.on_shortage(one, other):
                _log.warning("cannot_link", slots=[one, other], reason=str(error))
            return
        serial = self._links.next_serial()
        self._links.on_made(one, other, serial, time.monotonic())
        for to, end, of in ((one, ends[0], other), (other, ends[1], one)):
            self._workers[to].outbox.send(Link(of, self._workers[of].generation, serial, [end]))

    def _handle_unlinked(self, worker: Worker, slot: int, serial: int) -> None:
        if self._links.on_unlinked(worker.slot, slot, serial, time.monotonic()):
            self._link(*sorted((worker.slot, slot)))

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
                    self._counters.add(start.slot, "worker_restarts_total")
                worker.watch(self._events.put_nowait, self._handle_heartbeat)
                worker.log.debug("worker_started", generation=start.generation)

    def _start(self, start: Start) -> Worker:
        """Execute one worker. When the machine has no room for it: raises OSError and leaves nothing open."""
        sockets = [listener.fileno() for listener in self._listeners[start.slot]]
        channel, theirs = control.pair()
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(channel.close)
            outbox = Outbox(channel)
            undo.callback(outbox.close)
            counters = self._counters.fd
            others = list(self._workers.values())
            channel.send(
                Boot(
                    self._config,
                    start.slot,
                    len(self._listeners),
                    start.generation,
                    sockets,
                    counters,
                    self._view,
                    links=len(others),
                    shares_listeners=self._are_shared,
                )
            )
            links = [self._link_to_new(start, other, outbox, undo) for other in others]
            process = execute(self._module, theirs.fileno(), [theirs.fileno(), counters, *sockets])
            undo.callback(process.wait)
            undo.callback(process.kill)
            pidfd = os.pidfd_open(process.pid)
            undo.pop_all()
        log = _log.bind(slot=start.slot, pid=process.pid)
        worker = Worker(start.slot, start.generation, process, channel, outbox, pidfd, log)
        for other, link in zip(others, links, strict=True):
            self._links.on_made(start.slot, other.slot, link.serial, time.monotonic())
            other.outbox.send(link)
        self._pin(worker)
        return worker

    def _link_to_new(self, start: Start, other: Worker, outbox: Outbox, undo: contextlib.ExitStack) -> Link:
        """Put one end into the new worker's channel; returns what the other worker is to be sent once there is one."""
        ours, theirs = control.link()
        undo.callback(control.close_all, [theirs])
        serial = self._links.next_serial()
        outbox.send(Link(other.slot, other.generation, serial, [ours]))
        return Link(start.slot, start.generation, serial, [theirs])

    def _pin(self, worker: Worker) -> None:
        if self._config.server.pin_workers:
            cpu = self._cpus[worker.slot % len(self._cpus)]
            try:
                os.sched_setaffinity(worker.process.pid, {cpu})
            except OSError as error:  # taken away since the start; or it has ended, which we hear of soon
                worker.log.warning("cannot_pin", cpu=cpu, reason=str(error))

    # Who asks how it is

    def _open_operations(self, operators: list[socket.socket]) -> None:
        if not operators or self._fleet.is_over:
            return
        from .ops import Operations  # noqa: PLC0415 # 0.15 s, while the workers start, and 13 MiB

        self._operations = Operations(self._overview, self._config.ops)
        self._operations.open(operators)
        _log.info("operations", urls=[f"http://{listeners.name(end.getsockname())}" for end in operators])

    async def _open_service(self) -> Service:
        directory = folder(self._config.server.runtime_dir)
        service = Service(directory, self._port or self._config.server.port, self._overview.status)
        try:
            await service.open()
        except UnusableError as error:
            _log.warning("status_unavailable", reason=str(error))
        return service

    def _urls(self) -> list[str]:
        server = self._config.server
        return [listeners.url(bound, server.path, is_tls=bool(server.tls_cert)) for bound in self._bound]

    # Messages and ends

    def _handle_message(self, worker: Worker, message: Message | ControlError) -> None:
        now = time.monotonic()
        match message:
            case Ready():
                self._handle_ready(worker, now)
            case Failed(reason):
                worker.reason = f"worker {worker.slot} failed: {reason}"
            case Handed(serial, is_taken):
                self._handle_handed(worker, serial, is_taken=is_taken)
            case Stopped():
                self._fleet.on_empty(worker.slot)
            case Unlinked(slot, serial):
                self._handle_unlinked(worker, slot, serial)
            case Inspected(stats):
                worker.on_inspected(stats)
            case _:  # a worker that cannot be understood cannot be told to stop either
                if not isinstance(message, ControlError):
                    control.close_all(control.descriptors(message))
                worker.log.error("worker_unknown_message", reason=str(message))
                worker.process.kill()

    def _handle_heartbeat(self, worker: Worker, heartbeat: Heartbeat) -> None:
        self._fleet.on_full(worker.slot, is_full=heartbeat.is_full)
        if self._fleet.on_heartbeat(worker.slot):
            worker.log.info("worker_recovered")

    def _handle_ready(self, worker: Worker, now: float) -> None:
        had_served = self._fleet.has_served
        seconds = self._fleet.on_ready(worker.slot, now)
        if had_served:
            worker.log.info("worker_ready", seconds=round(seconds, 3))
        elif self._fleet.has_served:
            self._announce()

    def _handle_handed(self, worker: Worker, serial: int, *, is_taken: bool) -> None:
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
        self._notifier.send("READY=1", f"STATUS=Serving {' '.join(listeners.name(bound) for bound in self._bound)}")
        exposed = [listeners.name(bound) for bound in self._bound if not listeners.is_loopback(bound)]
        if exposed and not self._config.auth.required:
            _log.warning("open_mode", addresses=exposed)
        self._warn_of_plain_http()

    def _warn_of_plain_http(self) -> None:
        if plain := options.plain_urls(self._config.auth):
            _log.warning("plain_http", options=plain)

    def _handle_end(self, worker: Worker) -> None:
        del self._workers[worker.slot]
        self._links.on_death(worker.slot)
        unseen = worker.outbox.take_back_all()
        status = worker.close()
        self._counters.bury(worker.slot)
        reason = worker.reason or f"worker {worker.slot} ended with {ending(status)}"
        if not self._fleet.is_stopping:
            self._replace(worker.slot, reason, worker.log)
            self._deputy.take(unseen)
            return
        control.close_all(unseen)
        self._fleet.on_death(worker.slot, reason, time.monotonic())
        if not self._are_shared:
            listeners.close_all([self._listeners[worker.slot]])  # nobody accepts there any more
        if status != 0 and self._fleet.failure is None:
            self._code = ExitCode.FAILED
            worker.log.error("worker_lost", reason=reason)

    def _replace(self, slot: int, reason: str, log: logs.Logger) -> None:
        self._counters.add(slot, "worker_deaths_total")
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
        elif self._fleet.has_served:
            self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            self._take_reload()
            self._notifier.send("READY=1")
        else:
            self._take_reload()

    def _take_reload(self) -> None:
        try:
            reload = options.reload(self._config, self._reload())
            control.check(reload.config)
            if any(key.startswith("server.tls_") for key in reload.changed):  # else workers keep what they have
                tls.check(reload.config.server)
        except ConfigError as error:
            _log.error("reload_refused", reason=str(error))
            return
        except Exception:  # noqa: BLE001 # whatever it is, the old configuration serves as well as before
            _log.exception("internal_error")
            return
        self._config = reload.config
        logs.configure(self._config.log.level, self._config.log.format)
        if self._operations is not None:
            self._operations.configure(self._config.ops)
        for worker in self._workers.values():
            worker.outbox.send(Reload(self._config))
        if reload.needs_restart:
            _log.warning("needs_restart", options=reload.needs_restart)
        _log.info("reloaded", options=reload.changed)
        self._warn_of_plain_http()

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
            listeners.close_all([self._listeners[slot]])

    def _end_late(self) -> None:
        """A worker is stuck: one that turns closes everybody in time."""
        _log.error("drain_late", slots=[slot for slot in self._workers if not self._fleet.is_drained(slot)])
        self._code = ExitCode.FAILED
        self._stop(is_forced=True)

    def _stop(self, *, is_forced: bool) -> None:
        """Tell all to end, now."""
        self._fleet.stop()
        self._links.stop()
        self._drain_until = None
        kill_at = time.monotonic() + (FORCED_STOP_S if is_forced else STOP_S)
        self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)  # impatience never adds time
        for worker in self._workers.values():
            worker.outbox.send(Stop(is_forced=is_forced))
        self._deputy.close()
        listeners.close_all(self._listeners)  # the workers' copies follow: then the port refuses, nobody waits

    def _kill_all(self) -> None:
        self._kill_at = None
        for worker in self._workers.values():
            worker.log.error("worker_killed")
            worker.process.kill()
