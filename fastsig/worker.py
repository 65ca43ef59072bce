"""One worker: one process, one event loop, one relay. Executed by the supervisor as `python -m fastsig.worker FD`.

The only module that knows every part. FD is the control channel: its first message, `Boot`, brings configuration, slot
and the inherited listening sockets; its end means that the supervisor is gone: the worker drains and ends by itself.
`Pace` decides who goes when, and does nothing; `Worker` does it.

Invariant: a draining worker that is empty serves on (its health port, the rooms that it owns for others) until the
supervisor, which hears of all workers, says `Stop`.
"""

import asyncio
import contextlib
import gc
import math
import os
import random
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from urllib.parse import urlsplit

import uvloop

from . import logs, metrics, tls
from ._relay import Connection, Relay, Room
from .admission import first_message_s, rates
from .asker import Asker
from .auth import KeySets, Verifier
from .bus import Link
from .bus_mesh import Mesh
from .calls import Calls
from .config import Config
from .connection import RECEIVE_BYTES, Acceptor, Door, Edge
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
    Inspect,
    Inspected,
    Link as NewLink,
    Ready,
    Reload,
    Stop,
    Stopped,
    ToSupervisor,
    Unlinked,
)
from .entrance import Entrance
from .errors import CloseCode, ConfigError, ExitCode, InvariantError
from .fetch import Fetcher
from .hub import Hub
from .limits import address_key
from .passing import Passing
from .protocol import Departure, GoAway
from .routing import Address, Place

if TYPE_CHECKING:
    from .tracing import Tracer

_log = logs.get("fastsig.worker")

PING_S: Final = 25.0  # PROTOCOL §4
TICK_S: Final = 0.25
HEARTBEAT_S: Final = 0.5
GOODBYE_S: Final = 2.5  # a peer has 2 s to answer our close (PROTOCOL §3.5); then the wheel drops it
HURRY_S: Final = 0.25  # the same when the end is forced; the supervisor kills after `FORCED_STOP_S`
FLUSH_S: Final = 1.0  # a collector of traces that is gone holds up an end no longer
DRAIN_STEP_S: Final = 0.05  # closes that are due within one step go out together
GATHER_S: Final = 0.25  # a new worker waits so long for what others know of its rooms (ARCHITECTURE §1)
LINKS_S: Final = 5.0  # the links of a new worker may be late: they take descriptors of which there may be too few
COMPLAIN_S: Final = 10.0  # what cannot be received is said so often at most
HEAD_START: Final = 0.1  # of the drain: for so long before its close a client is asked to go by itself

LAG_WINDOW_S: Final = 10.0

_BUGS: Final = metrics.index("internal_errors_total")
_KEY_FETCHES: Final = metrics.indexes("key_fetches_total")
_LAG: Final = metrics.histogram("loop_lag_seconds")
_WORST_LAG: Final = metrics.index("worker_loop_lag_seconds")
_EXPIRES: Final = metrics.index("tls_certificate_expires_seconds")
_HOST: Final = ""  # the name of this node: there is one
_T = TypeVar("_T")


class Pace(Generic[_T]):
    """Who goes when, while a drain lasts. Pure: `now` is an argument, monotonic seconds.

    Everybody in random order, evenly spread from `now` on, each at a random moment of its own part of the time: no two
    workers, or hosts, send their clients elsewhere in step.
    """

    def __init__(self, everybody: Sequence[_T], seconds: float, now: float, chance: random.Random) -> None:
        order = list(everybody)
        chance.shuffle(order)
        self._began_at = now
        self._head_start_s = seconds * HEAD_START
        part_s = seconds / max(len(order), 1)
        self._departures = [(now + part_s * (place + chance.random()), one) for place, one in enumerate(order)]
        self._departures.reverse()  # the next one is the last

    def notices(self) -> Iterator[tuple[_T, tuple[int, int]]]:
        """For each the range of milliseconds from the start on in which it should go by itself, before its close."""
        for leaves_at, one in self._departures:
            within_s = leaves_at - self._began_at
            yield one, (int(1000 * max(0.0, within_s - self._head_start_s)), int(1000 * within_s))

    def due(self, now: float) -> list[_T]:
        """Those whose time has come since the last call."""
        due = []
        while self._departures and self._departures[-1][0] <= now:
            due.append(self._departures.pop()[1])
        return due


class Lag:
    """How late the loop is for its ticks. Pure: `now` is an argument, monotonic seconds."""

    def __init__(self, relay: Relay) -> None:
        self.due_at = math.inf  # of the next tick
        self._relay = relay
        self._worst: deque[tuple[float, float]] = deque()  # (when, seconds late): each is the worst since its time

    def note(self, now: float) -> None:
        """A tick begins: count how late it is, and show the worst of the last `LAG_WINDOW_S`."""
        late = max(0.0, now - self.due_at)
        if self.due_at < math.inf:
            self._relay.observe(_LAG, late)
        while self._worst and self._worst[-1][1] <= late:
            self._worst.pop()
        self._worst.append((now, late))
        while self._worst[0][0] < now - LAG_WINDOW_S:
            self._worst.popleft()
        self._relay.set(_WORST_LAG, int(self._worst[0][1] * metrics.NANO))


class Worker:
    """Wires the parts together and lives until it is told to stop, or the control channel ends."""

    def __init__(self, boot: Boot, channel: Channel) -> None:
        self._channel = channel
        self._loop = loop = asyncio.get_running_loop()
        limits = boot.config.limits
        counters = metrics.open_slab(boot.counters, boot.slot)
        self.relay = Relay(
            call_soon=loop.call_soon, clock=time.monotonic, counters=counters, ping_s=PING_S, **_for_relay(boot.config)
        )
        self._lag = Lag(self.relay)
        self._calls: Calls[Room] = Calls(self.relay)
        place = Place(Address(_HOST, boot.slot), boot.generation, boot.view)
        self.hub = Hub(self.relay, limits, place=place, auth=boot.config.auth)
        self._edge = Edge(loop)
        self.relay.bind(self.hub, self._edge)
        self._entrance = Entrance(self.relay, boot.config)
        self.door = Door(
            self.relay, path=boot.config.server.path, echo_path=boot.config.server.echo_path, entrance=self._entrance
        )
        self._fetcher = Fetcher()
        self._key_sets = KeySets(self._fetcher.get, self._on_keys)
        self._asker = Asker(self._fetcher.post, self.relay.count, self.relay.observe, group=address_key)
        self.hub.asker = self._asker
        self._verifier: Verifier | None = None
        self._set_rules(boot.config)
        self._refreshes: set[asyncio.Task[None]] = set()
        self._credentials = tls.Credentials(boot.config.server) if boot.config.server.tls_cert else None
        self.door.credentials = self._credentials
        self.door.admission = self.hub.admission
        self._passing = Passing(loop, self.relay, self.hub, self.door, may_move=boot.config.server.moves)
        self._passing.on_late = self._on_late
        self._tracer = _tracer(boot.config, place)
        self.hub.tracer = self.door.tracer = self._tracer
        self._mesh = Mesh(loop, self)
        self._unsaid: list[ToSupervisor] = []  # what the supervisor had no room for
        self._boot = boot
        self._config = boot.config
        self._acceptors: dict[socket.socket, Acceptor] = {}
        self._stop: asyncio.Future[Stop] = loop.create_future()
        self._hurry_until = math.inf  # a forced stop came: nobody is waited for any longer
        self._complained_at = -math.inf
        self._is_orphan = False  # the supervisor is gone
        self._leaving: list[Connection] = []  # those a drain waits for; those who are gone are dropped from its end

    async def run(self) -> ExitCode:
        """Serve until told to stop; then close whoever is left and wait for them, at most `GOODBYE_S`."""
        self._loop.set_exception_handler(self._on_loop_error)
        await self._join_mesh()  # first: a join that came before its links would find rooms that seem empty
        for fd in self._boot.listeners:
            listener = socket.socket(fileno=fd)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            acceptor = Acceptor(self._loop, listener, self.door.welcome, is_shared=self._boot.shares_listeners)
            self._acceptors[listener] = acceptor
        self._loop.add_reader(self._channel.fileno(), self._on_control)
        self._tick()
        self._beat()
        if self._credentials is not None:
            self._look_at_certificate(self._credentials)
        _freeze()
        self._channel.send(Ready(pid=os.getpid()))
        await self._close_all(await self._stop)
        await self._asker.close()
        await self._key_sets.close()
        await self._fetcher.close()
        await self._flush()
        return ExitCode.OK

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What no callback caught: ours to mend. The loop goes on."""
        self.relay.count(_BUGS)
        try:
            raise context.get("exception") or InvariantError(context["message"])
        except Exception:  # noqa: BLE001 # it was not caught where it should have been
            _log.exception("internal_error", part="loop", what=context["message"])

    async def _join_mesh(self) -> None:
        """The links that came with `Boot`: what the others announce over them comes before any join.

        Those that are not there after `LINKS_S` come as any new link does.
        """
        links: list[NewLink] = []
        until = time.monotonic() + LINKS_S
        for _ in range(self._boot.links):
            try:
                link = await self._next_message(until)
            except ControlError as error:
                self._on_refused(error)
                continue
            if link is NOTHING or link is None:
                break
            if not isinstance(link, NewLink):
                raise InvariantError(f"{link} where a link was announced")
            links.append(link)
        self.hub.rooms.gather(Address(_HOST, link.slot) for link in links)
        for link in links:
            self._link(link)
        self._loop.call_later(GATHER_S, self.hub.rooms.end_gathering)

    async def _next_message(self, until: float) -> object:
        """NOTHING when none comes in time, None when the supervisor is gone. Raises ControlError."""
        while (message := self._channel.receive()) is NOTHING and time.monotonic() < until:
            readable = asyncio.Event()
            self._loop.add_reader(self._channel.fileno(), readable.set)
            try:
                await asyncio.wait_for(readable.wait(), until - time.monotonic())
            except TimeoutError:
                continue
            finally:
                self._loop.remove_reader(self._channel.fileno())
        return message

    def _link(self, link: NewLink) -> None:
        self._mesh.add(Address(_HOST, link.slot), link.generation, link.serial, socket.socket(fileno=link.fds[0]))

    def _on_control(self) -> None:
        """All there is: once the supervisor is gone the loop may not call for the rest (see `bus_mesh`)."""
        while True:
            try:
                message = self._channel.receive()
            except ControlError as error:  # what comes behind it is not touched by that
                self._on_refused(error)
                continue
            if message is NOTHING:
                break
            self._handle(message)
            if message is None:
                break

    def _on_refused(self, error: ControlError) -> None:
        """There was no room for its descriptors: the supervisor finds another place for them, or tries again later."""
        match error.message:
            case NewLink(slot, _, serial):
                self._send(Unlinked(slot, serial))
            case Hand(serial):
                self._send(Handed(serial, is_taken=False))
        now = time.monotonic()
        if now - self._complained_at >= COMPLAIN_S:
            self._complained_at = now
            _log.warning("cannot_receive", reason=str(error))

    def _handle(self, message: object) -> None:
        match message:
            case None:
                self._on_orphaned()
            case NewLink() as link:
                self._link(link)
            case Hand(serial, fds):
                for fd in fds:
                    self.door.serve(fd)
                self._send(Handed(serial, is_taken=True))
            case Drain() as drain:
                self._begin_drain(drain)
            case Reload(config):
                self._configure(config)
            case Inspect():
                self._send(Inspected(self._stats()))
            case Stop() as stop:
                self._end(stop)

    def _stats(self) -> dict[str, int]:
        tables = {"calls_watched": len(self._calls), "tasks": len(asyncio.all_tasks()), "unsaid": len(self._unsaid)}
        return self.relay.stats() | self.hub.stats() | self._passing.stats() | self._asker.stats() | tables

    # ---- what the mesh calls

    def on_link(self, link: Link) -> None:
        """A new way to another worker."""
        self.hub.on_link(link)

    def on_packet(self, link: Link, packet: memoryview, fds: list[int]) -> None:
        """What the other has said."""
        self._passing.arrived = fds
        try:
            self.hub.on_packet(link, packet)
        finally:
            for fd in fds:  # nobody took them
                os.close(fd)

    def on_writable(self, link: Link) -> None:
        """The link takes packets again."""
        self.hub.on_writable(link)

    def on_lost(self, link: Link) -> None:
        """The way is gone, and perhaps the worker: the supervisor knows, and makes a new one."""
        self._send(Unlinked(link.address.slot, link.serial))
        try:
            self.hub.on_lost(link)
        finally:
            self._passing.on_lost(self.hub.neighbour(link.address))

    # ---- what the supervisor says

    def _configure(self, config: Config) -> None:
        """All at once: no message is handled under half of it."""
        try:
            self._set_rules(config)
        except ConfigError as error:  # the supervisor could read the files a moment ago
            _log.warning("reload_refused", reason=str(error))
            return
        self._config = config
        logs.configure(config.log.level, config.log.format, worker=self._boot.slot)
        self.relay.configure(**_for_relay(config))
        if self._credentials is not None:
            self._credentials.configure(config.server)
            self.relay.set(_EXPIRES, self._credentials.certificate.expires_at)
        self.door.configure(config)
        self._passing.configure(may_move=config.server.moves)
        if self._tracer is not None:
            self._tracer.configure(config)

    def _set_rules(self, config: Config) -> None:
        """Who may connect and join, and how much. Raises ConfigError for keys that cannot be read."""
        auth = config.auth
        verifier = Verifier(auth, self._key_sets) if auth.keys or auth.jwks_url else None
        self._verifier = verifier
        self.hub.configure(config.limits, auth, verifier, self._key_sets)
        self.hub.admission.hit_log.names_addresses = config.log.addresses
        self._asker.configure(auth, meta_bytes=config.limits.meta_bytes)

    def _refresh_keys(self) -> None:
        """Those of issuers that publish them: before the first token needs them, and now and then."""
        now = time.time()
        for source in [] if self._verifier is None else self._verifier.stale(now):
            task = self._loop.create_task(self._key_sets.refresh(source, now))
            self._refreshes.add(task)
            task.add_done_callback(self._refreshes.discard)

    def _on_keys(self, result: str, source: str, detail: str) -> None:
        self.relay.count(_KEY_FETCHES[result])
        if result != "fetched":
            _log.warning("keys_not_fetched", host=urlsplit(source).hostname or "", reason=detail)

    def _on_orphaned(self) -> None:
        seconds = self._config.server.drain_seconds
        _log.warning("supervisor_gone", drain_seconds=seconds)
        self._loop.remove_reader(self._channel.fileno())
        self._is_orphan = True
        for acceptor in self._acceptors.values():  # the port is free for whoever serves it next
            acceptor.close()
        if not self.hub.rooms.is_draining and seconds:
            self._begin_drain(Drain(seconds, seconds + OVERTIME_S))
        elif not self.hub.rooms.is_draining or not self._is_anybody_here():  # else `_drain_on` sees to the rest
            self._end(Stop())

    def _end(self, stop: Stop) -> None:
        if stop.is_forced:
            self._hurry_until = min(self._hurry_until, time.monotonic() + HURRY_S)
        if not self._stop.done():
            self._stop.set_result(stop)

    def _tick(self) -> None:
        now = time.monotonic()
        self._lag.note(now)
        self._lag.due_at = now + TICK_S
        self._loop.call_later(TICK_S, self._tick)  # first: time goes on, whatever the tick brings up
        self._edge.retry()
        self.relay.tick(now)
        self.hub.tick(now)
        self._refresh_keys()
        self._entrance.tick(now)
        self._calls.take(self.relay.take_seen())
        for room in self._calls.end(now):
            self.relay.end_watch(room)

    def _beat(self) -> None:
        self._loop.call_later(HEARTBEAT_S, self._beat)
        self._say_unsaid()
        self._close_ended()
        with contextlib.suppress(OSError):  # the next one says it again
            self._channel.send(Heartbeat(is_full=self._is_full()))

    def _look_at_certificate(self, credentials: tls.Credentials) -> None:
        self._loop.call_later(tls.POLL_S, self._look_at_certificate, credentials)
        credentials.poll()
        self.relay.set(_EXPIRES, credentials.certificate.expires_at)

    def _is_full(self) -> bool:
        """Has this process no descriptor left for another connection?"""
        if any(acceptor.is_resting for acceptor in self._acceptors.values()):
            return True
        try:
            os.close(os.dup(self._channel.fileno()))
        except OSError:
            return True
        return False

    def _send(self, message: ToSupervisor) -> None:
        self._unsaid.append(message)
        self._say_unsaid()

    def _say_unsaid(self) -> None:
        """In order. The supervisor may read nothing for a while; that it is gone is learned by `_on_control`."""
        try:
            while self._unsaid:
                self._channel.send(self._unsaid[0])
                del self._unsaid[0]
        except BlockingIOError:
            return
        except OSError:
            self._unsaid.clear()

    # ---- the end

    def _begin_drain(self, drain: Drain) -> None:
        """Once: who is told a time to go is not told another."""
        if self.hub.rooms.is_draining:
            return
        now = time.monotonic()
        self._shut_the_door()
        self._close_ended()
        pace = Pace(self._leaving, drain.seconds, now, random.SystemRandom())
        for connection, delay_ms in pace.notices():
            connection.send(GoAway(payload=Departure("drain", "reconnect", delay_ms)).encode())
        self._drain_on(pace, now + drain.deadline_s)

    def _close_ended(self) -> None:
        """When we said nothing for a while in a drain, the supervisor has shut our sockets down: nobody can accept."""
        for listener, acceptor in self._acceptors.items() if self.hub.rooms.is_draining else ():
            if listener.fileno() >= 0 and not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                acceptor.close()

    def _drain_on(self, pace: Pace[Connection], until: float) -> None:
        """Close who is due, and look again, until everybody is gone."""
        now = time.monotonic()
        for connection in pace.due(now):
            connection.send_close(CloseCode.DRAIN)
        if not self._is_anybody_here():
            self._on_empty()
        elif self._is_orphan and now >= until:
            self._end(Stop(is_forced=True))
        elif not self._stop.done():
            self._loop.call_later(DRAIN_STEP_S, self._drain_on, pace, until)

    def _on_empty(self) -> None:
        self._send(Stopped())
        if self._is_orphan:
            self._end(Stop())

    def _shut_the_door(self) -> None:
        """Requests are answered still, but nobody becomes a peer from here on: `_leaving` is complete."""
        self.door.is_ready = False
        self.hub.rooms.is_draining = True
        self._leaving = [connection for connection in self.relay.all_connections() if not connection.is_shaking]

    def _on_late(self, connection: Connection) -> None:
        self._leaving.append(connection)

    def _is_anybody_here(self) -> bool:
        """Of the peers; each is looked at until it is gone, then never again."""
        while self._leaving and self._leaving[-1].transport is None:
            self._leaving.pop()
        return bool(self._leaving) or self.door.is_adopting

    async def _close_all(self, stop: Stop) -> None:
        for acceptor in self._acceptors.values():
            acceptor.close()
        self._entrance.close()
        self._shut_the_door()
        self.hub.rooms.is_ending = True
        for connection in self._leaving:
            connection.send_close(CloseCode(stop.code))
        until = time.monotonic() + GOODBYE_S
        while self._is_anybody_here() and time.monotonic() < min(until, self._hurry_until):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # an event in the relay would be there for this moment alone

    async def _flush(self) -> None:
        """The last spans, as far as the collector takes them now."""
        if self._tracer is not None:
            until, flushing = time.monotonic() + FLUSH_S, self._tracer.flush()
            while flushing.is_alive() and time.monotonic() < min(until, self._hurry_until):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # a thread tells no loop when it ends


def _for_relay(config: Config) -> dict[str, Any]:
    """The arguments of `Relay.configure`."""
    limits = config.limits
    return {
        "message_bytes": limits.message_bytes,
        "output_bytes": limits.output_bytes,
        "handshake_s": limits.handshake_seconds,
        "first_message_s": first_message_s(config),
        "rates": rates(config),
        "is_dry_run": limits.dry_run,
        "watched_rooms": config.ops.watched_rooms,
        "trace_every": config.tracing.relay_sample if config.tracing.enabled else 0,
    }


def _tracer(config: Config, place: Place) -> "Tracer | None":
    if not config.tracing.enabled:
        return None
    from . import tracing  # noqa: PLC0415 # 0.1 s, and packages of an extra

    return tracing.start(config, place)


def _freeze() -> None:
    """What lives as long as the worker is not looked at again; full collections cost 12.6 ms at 9,000 connections."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 1_000_000)


def main(fd: int) -> ExitCode:
    """The process: exit code as in `errors.ExitCode`."""
    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in heard:
        signal.signal(number, signal.SIG_IGN)  # the supervisor hears them and tells us
    signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)  # it blocked them for us until here
    channel = Channel(socket.socket(fileno=fd))
    boot = channel.receive()  # sent before this process began
    if not isinstance(boot, Boot):
        return ExitCode.FAILED
    logs.configure(boot.config.log.level, boot.config.log.format, worker=boot.slot)
    try:
        code: ExitCode = uvloop.run(_serve(boot, channel))
    except Exception as reason:  # noqa: BLE001 (the main loop is one of the three places that catch broadly)
        if _is_environment(reason):
            _log.debug("worker_failed", reason=str(reason))
        else:
            _log.exception("internal_error")
        with contextlib.suppress(OSError):  # the supervisor may be gone
            channel.send(Failed(reason=f"{type(reason).__name__}: {reason}"))
        return ExitCode.FAILED
    return code


async def _serve(boot: Boot, channel: Channel) -> ExitCode:
    worker = Worker(boot, channel)
    try:
        return await worker.run()
    except Exception as reason:
        if not _is_environment(reason):
            worker.relay.count(_BUGS)
        raise


def _is_environment(reason: Exception) -> bool:
    """Not a bug: the supervisor says it in its one line."""
    return isinstance(reason, OSError | ConfigError)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
