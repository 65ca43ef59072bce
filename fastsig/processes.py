"""Worker processes as the supervisor has them: what they cost, how one is executed, heard, and found to have ended.

`execute` starts the program of a worker; `Worker` is one that runs, with our ends of all that leads to it. What it says
and its end are only noticed here, and passed on to the callables of `Worker.watch`: its last words before its end.

Invariants: a worker's end of its control channel is open in that worker alone, so each side sees the other's end. A
process that has ended is waited for once, by `Worker.close`, which leaves neither zombie nor descriptor.
Must not know: why a worker is started, killed or replaced, nor what it does. Read `supervisor` next.
"""

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from . import logs, systemd
from .control import NOTHING, Channel, ControlError, Heartbeat, Inspect, Message
from .errors import StartError
from .handover import Outbox

HEARD: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # by the supervisor alone
READ: Final = 64  # messages of one worker before a deadline is looked at: what it had said until then, as a rule
MOST_DESCRIPTORS: Final = 1 << 20  # the kernel's own limit as a rule; a table of more costs memory
SPARE_DESCRIPTORS: Final = 128  # those in hand, and whatever else comes up while the server runs


@dataclass(slots=True, eq=False)
class Worker:
    """A running process and our ends of it."""

    slot: int
    generation: int
    process: subprocess.Popen[bytes]
    channel: Channel
    outbox: Outbox
    pidfd: int  # readable when the process has ended
    log: logs.Logger  # with its slot and number bound
    _on_event: Callable[["Said"], None] = field(init=False)
    _on_heartbeat: Callable[["Worker", Heartbeat], None] = field(init=False)
    _has_ended: bool = False  # and that is queued
    _inspection: "asyncio.Future[dict[str, int]] | None" = None  # it was asked, and has not answered yet
    reason: str | None = None  # for which it says that it cannot start, or is killed

    def watch(self, on_event: Callable[["Said"], None], on_heartbeat: Callable[["Worker", Heartbeat], None]) -> None:
        """From now on pass on what it says, and its end. `on_event` only queues.

        A heartbeat is not to be queued: what is handled first is not its silence.
        """
        self._on_event = on_event
        self._on_heartbeat = on_heartbeat
        loop = asyncio.get_running_loop()
        loop.add_reader(self.channel.fileno(), self._on_readable)
        loop.add_reader(self.pidfd, self._on_end)

    def read(self) -> None:
        """Pass on what it has said until now, which the loop may not have called for yet; and its end likewise."""
        if self._has_ended:
            return
        if os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            self._on_end()
            return
        for _ in range(READ):  # it may say more all the time
            if not self._on_readable():
                break

    def inspect(self) -> "asyncio.Future[dict[str, int]]":
        """Its tables and buffers, when it says so; cancelled when it ends before. Not to be cancelled: others wait too.

        It is asked again only once it has answered: before one that is stuck nothing heaps up.
        """
        if self._inspection is None:
            self._inspection = asyncio.get_running_loop().create_future()
            self.outbox.send(Inspect())
        return self._inspection

    def on_inspected(self, stats: dict[str, int]) -> None:
        """It has answered."""
        if self._inspection is not None:
            self._inspection.set_result(stats)
            self._inspection = None

    def _on_readable(self) -> bool:
        """Pass on one message. False when there is none, now or ever."""
        try:
            message = self.channel.receive()
        except ControlError as error:
            self._on_event((self, error))
            return True
        if message is None:  # the process is about to end
            asyncio.get_running_loop().remove_reader(self.channel.fileno())
            return False
        if message is NOTHING:
            return False
        if isinstance(message, Heartbeat):
            self._on_heartbeat(self, message)
        else:
            self._on_event((self, message))
        return True

    def _on_end(self) -> None:
        self._has_ended = True
        self._unwatch()
        while self._on_readable():  # its last words come before its end
            pass
        self._on_event((self, None))

    def _unwatch(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.channel.fileno())
        loop.remove_reader(self.pidfd)

    def close(self) -> int:
        """After its end: leave neither zombie nor descriptor. Returns its exit status, negative for a signal."""
        self._unwatch()
        status = self.process.wait()
        if self._inspection is not None:
            self._inspection.cancel()
        self.outbox.close()
        self.channel.close()
        os.close(self.pidfd)
        return status


# What a worker said, or what is wrong with that; None for its end.
Said = tuple[Worker, Message | ControlError | None]


def execute(module: str, channel: int, inherited: Sequence[int]) -> subprocess.Popen[bytes]:
    """`python -m module channel`, with these descriptors. Raises OSError.

    With the signals blocked that a new process would die of; it ignores them, and then unblocks them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    try:
        return subprocess.Popen(  # noqa: S603 # our own interpreter and module
            _command(module, channel),
            stdin=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name not in systemd.VARIABLES},
            pass_fds=inherited,
            start_new_session=True,  # a terminal's ^C is for the supervisor alone
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)


def _command(module: str, fd: int) -> list[str]:
    """`-m` would look for modules in the current folder first: -P, unless that is where we were found ourselves."""
    is_checkout = Path().samefile(Path(__file__).parent.parent)
    return [sys.executable, *([] if is_checkout else ["-P"]), "-m", module, str(fd)]


def ending(status: int) -> str:
    """What `Worker.close` returned, in words."""
    return f"signal {_signal_name(-status)}" if status < 0 else f"code {status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last has no name
        return str(number)


def raise_descriptor_limit() -> None:
    """As far as an unprivileged process may, for us and for the workers: the usual 1,024 is there for `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_descriptors(slots: int) -> None:
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
