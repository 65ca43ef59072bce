"""Callers, viewers and reloaders for Locust: `make loadtest`, or `locust -f loadtest/locustfile.py -H ws://HOST/ws`.

One Locust user is one connection. Its greenlet is parked and stands only for the count: Locust starts, stops and
distributes it, also over processes and machines; what it does happens on the native thread of `engine`, in `users`.
The results come back in batches and go through `environment.events.request`, so that tables, charts, CSV files and
other people's listeners have them. The options are in README.md beside this file.

The exit code is 1 when more than `--max-error-ratio` of the messages between peers, or of all else, are errors, or when
nothing was heard at all.
"""

import gc
import logging
import os
import random
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, ClassVar, Final

import gevent
from gevent import monkey
from gevent.event import Event
from locust import User, constant, events, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

sys.path.insert(0, str(Path(__file__).parent.parent))  # `locust` itself knows only this file's folder

from loadtest.engine import BATCH_S, END_S, Engine
from loadtest.history import EVERY_S, History
from loadtest.users import KINDS, Plan, Scene

DEFAULTS: Final = Plan(url="")
LATE_MS: Final = 50  # of lag, for one in a hundred moments: more, and it is worth a warning
_log: Final = logging.getLogger("fastsig.loadtest")


class LoadError(Exception):
    """What a failed result shows in Locust's table of errors: a code of the catalogue, or our own word."""

    def __repr__(self) -> str:
        return str(self)  # it is what Locust shows


class Load:
    """The engine of this process, and what all processes counted: sent, received, and the most connections of each."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.scene: Scene | None = None
        self.began = 0.0
        self.totals: dict[str, tuple[int, int, int, float]] = {}
        self.history: History | None = None  # of the latest test; none in a worker of Locust

    def start(self, environment: Environment) -> Scene:
        """The scene of this test; the first user of a process starts it."""
        if self.scene is None:
            self.engine = Engine()
            self.scene = Scene(self.engine, _plan(environment), f"{os.getpid()}-{os.urandom(3).hex()}", random.Random())
            self.engine.start(monkey.get_original("_thread", "start_new_thread"))
            self.began = time.monotonic()
            gevent.spawn(self._poll, environment, self.engine)
        return self.scene

    def _poll(self, environment: Environment, engine: Engine) -> None:
        while not engine.has_ended:
            gevent.sleep(BATCH_S)
            report(environment, engine)

    def count(self) -> tuple[int, int, int, float]:
        """Sent, received, the most connections at a time, seconds."""
        if self.engine is None:
            return 0, 0, 0, 0.0
        return self.engine.sent, self.engine.received, self.engine.most_connections, time.monotonic() - self.began

    def end(self, environment: Environment) -> None:
        """When all users have stopped: what they still have to say is waited for, for a moment."""
        engine = self.engine
        if engine is None:
            return
        self.totals["this process"] = self.count()
        engine.end()
        with gevent.Timeout(END_S + 1.0, exception=False):
            while not engine.has_ended:
                gevent.sleep(0.02)
        report(environment, engine)
        self.engine = self.scene = None

    def watch(self, environment: Environment) -> None:
        """Keep the history of this test, until it ends."""
        history = self.history = History()
        while not history.has_ended:
            history.look(environment.stats)
            gevent.sleep(EVERY_S)


_load: Final = Load()


def report(environment: Environment, engine: Engine) -> None:
    """One batch, into Locust's tables."""
    fire = environment.events.request.fire
    for kind, name, ms, size, error in engine.take():
        fire(
            request_type=kind, name=name, response_time=ms, response_length=size, context={},
            exception=LoadError(error) if error else None,
        )  # fmt: skip


class Connection(User):
    """A parked greenlet that stands for one connection. One task, which lasts until Locust stops the user."""

    abstract = True
    wait_time = constant(0)
    kind: ClassVar[str]

    def on_start(self) -> None:
        scene = _load.start(self.environment)
        self._is_over = Event()
        self._peer = KINDS[self.kind](scene)
        scene.engine.post(self._peer.start)

    @task
    def stay(self) -> None:
        self._is_over.wait()

    def stop(self, force: bool = False) -> bool:  # noqa: FBT001, FBT002 # the signature is Locust's
        self._is_over.set()
        return bool(super().stop(force))

    def on_stop(self) -> None:
        self._peer.engine.post(self._peer.stop)


class CallerUser(Connection):
    """See `users.Caller`."""

    kind = "caller"


class ViewerUser(Connection):
    """See `users.Viewer`."""

    kind = "viewer"


class ReloaderUser(Connection):
    """See `users.Reloader`."""

    kind = "reloader"


USERS: Final[dict[str, type[Connection]]] = {"callers": CallerUser, "viewers": ViewerUser, "reloaders": ReloaderUser}


@events.init_command_line_parser.add_listener
def _options(parser: ArgumentParser, **_: Any) -> None:
    group = parser.add_argument_group("fastsig users")
    add = group.add_argument
    add("--callers", type=int, default=60, help="weight of callers")
    add("--viewers", type=int, default=30, help="weight of viewers")
    add("--reloaders", type=int, default=10, help="weight of reloaders")
    add("--message-rate", type=float, default=DEFAULTS.message_rate, help="messages/s of a caller in a call")
    add("--candidates", type=int, default=DEFAULTS.candidates, help="mean number of candidates a caller trickles")
    add("--hold", type=float, default=DEFAULTS.hold_s, help="median length of a call, s")
    add("--think", type=float, default=DEFAULTS.think_s, help="mean pause of callers and viewers before they return, s")
    add("--room-size", type=int, default=DEFAULTS.room_size, help="seats in the rooms of viewers and of reloaders")
    add("--viewer-rate", type=float, default=DEFAULTS.viewer_rate, help="broadcasts/s of a viewer")
    add("--stay", type=float, default=DEFAULTS.stay_s, help="median stay of a viewer, s")
    add("--storm-every", type=float, default=DEFAULTS.storm_every_s, help="time between reconnect storms, s; 0: none")
    add("--storm-spread", type=float, default=DEFAULTS.storm_spread_s, help="time in which reloaders are back, s")
    add("--ping-every", type=float, default=DEFAULTS.ping_every_s, help="mean time between pings of a user, s; 0: none")
    add("--patience", type=float, default=DEFAULTS.patience_s, help="an answer or a copy that takes longer is lost, s")
    add("--hide-rooms", action="store_true", help="leave ?room= out of the URL, as clients that do not know of it")
    add("--max-error-ratio", type=float, default=0.001, help="share of errors above which the exit code is 1")


def _plan(environment: Environment) -> Plan:
    options = environment.parsed_options
    if options is None or not environment.host:
        raise ValueError("where is the server? give --host ws://HOST:PORT/ws")
    return Plan(
        url=environment.host, hide_rooms=options.hide_rooms, message_rate=options.message_rate,
        candidates=options.candidates, hold_s=options.hold, think_s=options.think, room_size=options.room_size,
        viewer_rate=options.viewer_rate, stay_s=options.stay, storm_every_s=options.storm_every,
        storm_spread_s=options.storm_spread, ping_every_s=options.ping_every, patience_s=options.patience,
    )  # fmt: skip


@events.init.add_listener
def _weights(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    if options is None:
        return
    for option, user in USERS.items():
        user.weight = getattr(options, option)
    environment.user_classes = [user for user in USERS.values() if user.weight > 0]
    if not environment.user_classes:
        raise SystemExit("one of --callers, --viewers, --reloaders must be above 0")


@events.init.add_listener
def _delays(environment: Environment, **_: Any) -> None:
    """The page /delays of the web interface, which is drawn anew every few seconds."""
    web = environment.web_ui
    if web is None or web.app is None:
        return

    @web.app.route("/delays")
    @web.auth_required_if_enabled
    def delays() -> str:
        section = _load.history.page(environment.stats) if _load.history else "<p>No test has begun.</p>"
        return f'<!DOCTYPE html><meta http-equiv="refresh" content="{EVERY_S:g}"><title>Delays</title>{section}'


@events.test_start.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    _load.totals.clear()
    # A full collection goes through all of Locust and stops the loop for up to 0.2 s, which the rows would show.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    if not isinstance(environment.runner, WorkerRunner):
        gevent.spawn(_load.watch, environment)


@events.test_stop.add_listener
def _stop(environment: Environment, **_: Any) -> None:
    _load.end(environment)
    if _load.history is not None:
        _load.history.end(environment.stats)


@events.report_to_master.add_listener
def _tell_master(client_id: str, data: dict[str, Any]) -> None:
    data["fastsig"] = _load.totals.get("this process") or _load.count()


@events.worker_report.add_listener
def _hear_worker(client_id: str, data: dict[str, Any]) -> None:
    if any(data.get("fastsig", ())):
        _load.totals[client_id] = tuple(data["fastsig"])


@events.quitting.add_listener
def _judge(environment: Environment, **_: Any) -> None:
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        environment.process_exit_code = 0  # the master judges
        return
    if _load.engine is not None:  # a signal: Locust judges before it stops its users
        report(environment, _load.engine)
        _load.totals["this process"] = _load.count()
    totals = _load.totals.values()
    sent, received, most = (sum(total[i] for total in totals) for i in range(3))
    seconds = max((total[3] for total in totals), default=0.0) or 1.0
    _log.info(
        "%d connections at most, %d messages sent, %d received in %.1f s: %.0f + %.0f messages/s in %s",
        most, sent, received, seconds, sent / seconds, received / seconds,
        f"{len(totals)} workers" if isinstance(runner, MasterRunner) else "one process",
    )  # fmt: skip
    lag = environment.stats.entries.get(("lag", "engine"))
    if lag is not None and lag.get_response_time_percentile(0.99) > LATE_MS:
        _log.warning("the load test itself was late (row engine, lag): its figures are not the server's")
    most_errors = environment.parsed_options.max_error_ratio if environment.parsed_options else 0.0
    is_good = True
    for what, (errors, results) in _verdicts(environment).items():
        ratio = errors / results if results else 0.0
        is_good = is_good and ratio <= most_errors
        _log.log(
            logging.INFO if ratio <= most_errors else logging.ERROR, "%s: %d errors in %d, %.3f %%, %s %.3f %%",
            what, errors, results, 100 * ratio, "at most" if ratio <= most_errors else "more than", 100 * most_errors,
        )  # fmt: skip
    if not received:
        _log.error("nothing was heard from the server")
    environment.process_exit_code = 0 if is_good and received else 1


@events.quitting.add_listener
def _draw(environment: Environment, **_: Any) -> None:
    """Locust has written its report already."""
    path = environment.parsed_options.html_file if environment.parsed_options else None
    if path and _load.history is not None:
        _load.history.add_to(Path(path), environment.stats)


def _verdicts(environment: Environment) -> dict[str, tuple[int, int]]:
    """Errors and results, of messages and of the rest: copies are so many that no refused join would show beside them.

    Lag is a result of ours, not of the server's.
    """
    found = {"messages between peers": (0, 0), "connections and answers": (0, 0)}
    for (name, kind), entry in environment.stats.entries.items():
        if kind != "engine":
            what = "messages between peers" if name.endswith("delay") else "connections and answers"
            errors, results = found[what]
            found[what] = errors + entry.num_failures, results + entry.num_requests
    return found
