"""The supervisor: opens the listening sockets, executes the workers, replaces those that die, ends them all.

`Fleet` decides and does nothing; `Supervisor` does and decides nothing; `listen` is the address book. What happens (a
signal, a message, a death) is only queued where it is noticed, and handled one by one by `Supervisor.run`.

Invariants: the listening sockets stay open here while the server lives, so what a dead worker had not accepted waits for
its successor. A worker's end of its control channel is open nowhere but in that worker: each side sees the other's end.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from . import __version__, control, logs
from .config import Config
from .control import Boot, Channel, ControlError, Failed, Heartbeat, Ready, Stop, Stopped
from .errors import ExitCode, StartError

_log = logs.get("fastsig.supervisor")

SETTLED_S: Final = 10.0  # a worker that lived this long did not die of its start (ARCHITECTURE §2)
FIRST_RETRY_S: Final = 0.1
LONGEST_RETRY_S: Final = 5.0
STOP_S: Final = 10.0  # the hard deadline of a stop
FORCED_STOP_S: Final = 0.5
WORKER: Final = "fastsig.worker"


def run(config: Config, *, worker: str = WORKER) -> int:
    """Serve until a signal ends it; the exit code. Blocks. `worker` is the module that is executed."""
    logs.configure(config.log.level, config.log.format)
    try:
        with contextlib.ExitStack() as stack:
            slots = listen(config, slot_count(config))
            for listener in (listener for slot in slots for listener in slot):
                stack.callback(listener.close)
            return uvloop.run(Supervisor(config, slots, worker).run())
    except StartError as error:
        _log.error("cannot_start", reason=str(error))
        return ExitCode.START


def slot_count(config: Config) -> int:
    """How many workers share the port. One, whatever `server.workers` says, until rooms can be shared among several."""
    return 1


# ---- decisions


@dataclass(frozen=True, slots=True)
class Start:
    """An order: start this slot now, under this generation."""

    slot: int
    generation: int


@dataclass(slots=True)
class _Slot:
    generation: int = 0
    started_at: float = 0.0
    due_at: float | None = 0.0  # when to start it; None while a worker runs
    retry_s: float = FIRST_RETRY_S
    has_been_ready: bool = False  # in any generation
    is_ready: bool = False
    heard_at: float = 0.0


class Fleet:
    """When is which slot started? Pure: no I/O, every `now` is an argument (monotonic seconds).

    A slot is due at first, and again after each death: at once when its worker had lived `SETTLED_S`, else after a delay
    that doubles with each such death in a row. A slot that dies in its very first launch before it was ready will not do
    better the next time: that ends the launch (`failure`), instead of a loop.
    """

    def __init__(self, slots: int) -> None:
        self._slots = [_Slot() for _ in range(slots)]
        self._failed: dict[int, str] = {}
        self.is_stopping = False
        self.failure: str | None = None

    @property
    def is_empty(self) -> bool:
        """No worker runs."""
        return all(slot.due_at is not None for slot in self._slots)

    @property
    def is_ready(self) -> bool:
        """Every slot has a worker that accepts connections."""
        return all(slot.is_ready for slot in self._slots)

    def starts(self, now: float) -> list[Start]:
        """What is due. Each Start is given once, and counts as a running worker until `on_death`."""
        if self.is_stopping:
            return []
        starts = []
        for number, slot in enumerate(self._slots):
            if slot.due_at is not None and slot.due_at <= now:
                slot.generation += 1
                slot.started_at = slot.heard_at = now
                slot.due_at = None
                starts.append(Start(number, slot.generation))
        return starts

    def wake_at(self) -> float | None:
        """When `starts` will have something; None when nothing is planned."""
        return None if self.is_stopping else min((s.due_at for s in self._slots if s.due_at is not None), default=None)

    def on_ready(self, slot: int, now: float) -> float:
        """The worker of `slot` accepts connections. Returns how long it took."""
        this = self._slots[slot]
        this.is_ready = this.has_been_ready = True
        this.heard_at = now
        return now - this.started_at

    def on_failed(self, slot: int, reason: str) -> None:
        """The worker of `slot` says why it is about to die."""
        self._failed[slot] = reason

    def on_heartbeat(self, slot: int, now: float) -> None:
        self._slots[slot].heard_at = now

    def heard_at(self, slot: int) -> float:
        """When the worker of `slot` was last heard of, its start included."""
        return self._slots[slot].heard_at

    def on_death(self, slot: int, status: str, now: float) -> float | None:
        """The worker of `slot` has ended. Returns the delay until it is replaced; None when it is not."""
        this = self._slots[slot]
        reason = self._failed.pop(slot, f"worker {slot} ended with {status} before it was ready")
        this.is_ready = False
        this.due_at = now
        if self.is_stopping:
            return None
        if not this.has_been_ready and this.generation == 1:
            self.failure = self.failure or reason
            self.is_stopping = True
            return None
        delay_s = 0.0
        if now - this.started_at < SETTLED_S:
            delay_s = this.retry_s
            this.retry_s = min(2 * this.retry_s, LONGEST_RETRY_S)
        else:
            this.retry_s = FIRST_RETRY_S
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

    def __post_init__(self) -> None:
        self.log = _log.bind(slot=self.slot, pid=self.process.pid)

    def send(self, message: control.ToWorker) -> None:
        """A worker that is gone, or that reads nothing, is dealt with by its death and by deadlines."""
        with contextlib.suppress(OSError):
            self.channel.send(message)

    def close(self) -> str:
        """After its end: leave neither zombie nor descriptor. Returns its exit status in words."""
        status = self.process.wait()
        self.channel.close()
        os.close(self.pidfd)
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"code {status}"


class Supervisor:
    """Executes what `Fleet` decides, on one asyncio loop."""

    def __init__(self, config: Config, listeners: Sequence[Sequence[socket.socket]], worker: str = WORKER) -> None:
        self._config = config
        self._listeners = listeners
        self._module = worker
        self._fleet = Fleet(len(listeners))
        self._workers: dict[int, _Worker] = {}
        self._events: asyncio.Queue[signal.Signals | _Said | _Ended] = asyncio.Queue()
        self._code = ExitCode.OK
        self._kill_at: float | None = None
        self._is_forced = False
        self._has_served = False

    async def run(self) -> ExitCode:
        """Until the last worker has ended. Raises StartError when the first launch fails."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._events.put_nowait, number)
        try:
            while not (self._fleet.is_stopping and self._fleet.is_empty):
                self._start_due()
                await self._handle_next()
        finally:  # a bug of ours leaves no worker behind
            for worker in self._workers.values():
                worker.process.kill()
        if self._fleet.failure is not None:
            raise StartError(self._fleet.failure)
        _log.info("stopped", code=int(self._code))
        return self._code

    # Starting

    def _start_due(self) -> None:
        for start in self._fleet.starts(time.monotonic()):
            try:
                self._start(start)
            except OSError as error:
                self._on_death(start.slot, f"no process ({error})")

    def _start(self, start: Start) -> None:
        """Execute one worker. Raises OSError, with nothing left open, when the machine has no room for it."""
        listeners = [listener.fileno() for listener in self._listeners[start.slot]]
        channel, theirs = control.pair()
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(channel.close)
            channel.send(Boot(self._config, start.slot, len(self._listeners), start.generation, listeners))
            process = subprocess.Popen(  # noqa: S603 # our own interpreter and module
                _command(self._module, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *listeners),
                start_new_session=True,  # ^C on a terminal is ours alone to hear
            )
            undo.callback(process.wait)
            undo.callback(process.kill)
            worker = _Worker(start.slot, process, channel, os.pidfd_open(process.pid))
            undo.pop_all()
        self._workers[start.slot] = worker
        loop = asyncio.get_running_loop()
        loop.add_reader(channel.fileno(), self._on_readable, worker)
        loop.add_reader(worker.pidfd, self._on_end, worker)
        worker.log.debug("worker_started", generation=start.generation)

    # Noticing: no more than put what happened into the queue

    def _on_readable(self, worker: _Worker) -> None:
        try:
            message = worker.channel.receive()
        except ControlError as error:
            message = error
        if message is None:  # its process ends, or has ended
            asyncio.get_running_loop().remove_reader(worker.channel.fileno())
        elif message is not control.NOTHING:
            self._events.put_nowait(_Said(worker, message))

    def _on_end(self, worker: _Worker) -> None:
        loop = asyncio.get_running_loop()
        while loop.remove_reader(worker.pidfd)
