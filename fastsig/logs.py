"""What the server tells its operator: events with fields, one line each, on stderr.

A line has `ts` (UTC, RFC 3339), `level`, `event`, `logger`, then the fields: as text for people, as JSON for programs.
`EVENTS` is the whole vocabulary; `docs/logs.md` is made from it, and a test refuses a call with any other name.

Never logged: tokens, secrets, payloads (SDP, candidates). Never on the hot path: even a call that is filtered out costs
0.15 µs. Logging never raises, blocks or fails its caller: what cannot be shown is named, what cannot be written at once
is lost, counted, and said in `lines_lost` before the next line that can. Nor does it flood: of each event `FLOOD_LINES`
are written in a second, the rest is counted and said (`Flood`). Any thread may log.
Must not know: what any event means to the rest of the program.
"""

import contextlib
import errno
import json
import logging
import math
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import msgspec
import structlog

EVENTS: Final[dict[str, str]] = {
    # the life of the server
    "serving": "The server accepts connections at `urls`; all `workers` are ready.",
    "open_mode": "Whoever can reach `addresses` may join any room: no tokens are required, beyond loopback.",
    "address_skipped": "This machine cannot listen on `address`, for `reason`; the others are served.",
    "cannot_start": "The server ends with exit code 3 for `reason`.",
    "operations": "Metrics, health and more are served for operators at `urls`.",
    "operations_resting": "The operations port accepts nobody for a second, for `reason`, and then tries again.",
    "status_unavailable": "`fastsig status` cannot ask this server, for `reason`; all else works.",
    "reloaded": "SIGHUP came: `options` have new values now.",
    "needs_restart": "SIGHUP came, but `options` take their new values only at the next start.",
    "reload_refused": "SIGHUP came, but the configuration cannot be used, for `reason`: the old one holds.",
    "stopping": "A signal ends the server: connections are closed over `drain_seconds`; 0 is at once, with code 1001.",
    "drained": "Nobody is connected any more; the workers end.",
    "drain_late": "At the drain's deadline the workers of `slots` had not closed everybody; all end now.",
    "forced": "A second signal ends the server without waiting for its peers.",
    "stopped": "The server ends with exit code `code`.",
    "plain_http": "`options` name another machine by plain HTTP: whoever is on the way decides in its place who joins.",
    # workers
    "worker_started": "A process was started for `slot`; `generation` counts the starts of the slot.",
    "worker_ready": "The worker of `slot` accepts connections, `seconds` after its start.",
    "worker_died": "The worker of `slot` ended unasked, for `reason`; it is replaced in `retry_seconds`.",
    "worker_lost": "The worker of `slot` ended badly while the server was ending, for `reason`; nothing replaces it.",
    "worker_killed": "The worker of `slot` was told to end, has not done so in time, and is killed.",
    "worker_stuck": "The worker of `slot` has said nothing for `seconds`; the others are handed its new connections.",
    "worker_recovered": "The worker of `slot` was stuck, and says something again.",
    "worker_given_up": "The worker of `slot` said nothing, or was not ready, for `seconds`: it is killed and replaced.",
    "cannot_pin": "The worker of `slot` cannot be kept on `cpu`, for `reason`: it runs where the system puts it.",
    "cannot_link": "The workers of `slots` cannot be given a new link, for `reason`; this is tried until they can.",
    "cannot_accept": "Connections that no other worker accepts are not accepted here either, for `reason`: they wait.",
    "connections_dropped": "No worker took `connections` that were accepted for a slot that does not serve.",
    "worker_failed": "A worker ends because the machine refuses it something, for `reason`.",
    "worker_unknown_message": "The worker of `slot` said what nobody understands, and is killed: two versions at once?",
    "cannot_receive": "A worker has no room for what it was sent, for `reason`: it is sent elsewhere, or again.",
    "supervisor_gone": "The supervisor has ended: this worker drains over `drain_seconds` and ends too.",
    # a connection
    "descriptors_short": "Few of `limit` descriptors are left (ulimit -n): connections wait until a tenth is free.",
    "cannot_serve": "A connection was closed right after it was accepted, for `reason`.",
    "certificate_loaded": "New connections get the certificate with this `serial`, which `expires` then.",
    "certificate_unusable": "The TLS files were read again and cannot be used, for `reason`: the certificate with"
    " `serial` holds, and they are tried every 30 s.",
    "tls_failed": "TLS with a peer ended, for `reason`: in its handshake, if `is_handshake`. Said at debug level.",
    "cannot_watch": "Full sockets cannot be watched, for `reason`: they are tried four times a second until they can.",
    "cannot_move": "Connections that join in-band stay where they are (docs/moves.md), for `reason`.",
    # tokens
    "keys_not_fetched": "The keys of the issuer at `host` could not be had, for `reason`: those known serve on.",
    # the webhook
    "webhook_failed": "The webhook at `host` did not decide so many `joins`, the last for `reason`; once a second.",
    "limit_hit": "Somebody at `address` (empty: unknown, or log.addresses is off) ran into `limit`. Of each address and"
    " limit one line a second: `left_out` such hits before it were not logged. `enforced` is false where limits.dry_run"
    " let it pass.",
    "one_address": "The last `connections` all came from `address`, a private one. A proxy there must be named in"
    " server.trusted_proxies, and name its clients (docs/proxies.md): else they share the limits of one address.",
    "proxy_header_refused": "A trusted proxy began a connection with something that is no PROXY header, for `reason`;"
    " it was closed.",
    # traces
    "spans_lost": "So many `spans` were not taken by the collector, or found no room in the queue before it, since this"
    " was last said, for `reason`; once a minute at most.",
    # all
    "internal_error": "A bug in fastsig, with its traceback in `exception`. Please report it.",
    "lines_lost": "So many `lines` of this process's log were lost: whoever is to read them did not take them in time.",
    "lines_suppressed": "More than 20 lines of the event `of` came within a second: so many `lines` are not here.",
    "library_message": "A library said `message` through Python's logging; `logger` is its name.",
}
LEVELS: Final = {"trace": 5, "debug": 10, "info": 20, "warning": 30, "error": 40}

PIECE_BYTES: Final = 4096  # a pipe that has any room takes so many at once (PIPE_BUF)

FLOOD_LINES: Final = 20  # of one event at one level, in one process
FLOOD_S: Final = 1.0
TURN_S: Final = 1.0  # no longer does a thread wait for another's line

_DEPTH: Final = 4  # of lists in lists
_COLOURS: Final = {"trace": "2", "debug": "2", "info": "32", "warning": "33", "error": "31"}


class Logger(structlog.BoundLoggerBase):
    """Says events; `bind(slot=1)` makes one that adds fields to each. `event` is a word of EVENTS, never a sentence."""

    def trace(self, event: str, /, **fields: object) -> None:
        self._say("trace", event, fields)

    def debug(self, event: str, /, **fields: object) -> None:
        self._say("debug", event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        self._say("info", event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        self._say("warning", event, fields)

    def error(self, event: str, /, **fields: object) -> None:
        self._say("error", event, fields)

    def exception(self, event: str, /, **fields: object) -> None:
        """At level error, with the traceback of the exception that is being handled."""
        self._say("error", event, {"exc_info": True} | fields)

    def _say(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if LEVELS[level] >= _output.least:
            with _output.turn():
                self._say_now(level, event, fields)

    def _say_now(self, level: str, event: str, fields: dict[str, Any]) -> None:
        now = _output.clock()
        left_out = _output.flood.admit(level, event, now)
        if left_out is None:
            return
        for of_level, of_event, lines in _output.flood.take_ended(now):
            _log._write(of_level, "lines_suppressed", {"of": of_event, "lines": lines})  # noqa: SLF001 (one of us)
        if left_out:
            fields["suppressed"] = left_out
        self._write(level, event, fields)

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        (line,), _ = self._process_event(level, event, fields)
        _output.write(line)


def get(name: str) -> Logger:
    """The logger of a module. May be kept for ever: `configure` changes all of them, those made before it too."""
    return Logger(None, _PROCESSORS, {"logger": name})


def configure(level: str, format: str, *, stream: TextIO | None = None, **fields: object) -> None:
    """What this process logs and how; `fields` go on each of its lines. Python's own logging goes the same way.

    `level` is one of LEVELS; `format` is text, json or auto: text on a terminal, else JSON. May be called again.
    """
    output = stream or sys.stderr
    is_terminal = output is not None and output.isatty()
    _output.least = LEVELS[level]
    _output.stream = stream
    _output.is_json = format == "json" or (format == "auto" and not is_terminal)
    _output.is_coloured = is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    _output.fields = fields
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _Folded)] + [_Folded()]
    root.setLevel(_output.least)


def divert(name: str, hear: Callable[[str], None]) -> None:
    """What a library says through Python's logger of this name goes to `hear`, and no further. Any thread calls it."""
    logger = logging.getLogger(name)
    logger.handlers = [_Diverted(hear)]
    logger.propagate = False


def document() -> str:
    """`docs/logs.md`."""
    rows = (f"| `{name}` | {sentence} |\n" for name, sentence in EVENTS.items())
    return _PREAMBLE + "".join(rows)


class Flood:
    """Lets the first `FLOOD_LINES` of each (level, event) pass in each `FLOOD_S`, from the first of them on.

    Pure: `now` is monotonic seconds. As many entries as there are levels and events. For one thread at a time; what is
    called in the middle of a call (a finalizer that logs) finds it in order.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}  # since when, how many lines
        self._left_out: dict[tuple[str, str], int] = {}  # without those of which nothing is left out

    def admit(self, level: str, event: str, now: float) -> int | None:
        """How many lines before this one were left out and never said; None: so is this one."""
        since, lines = self._seen.get((level, event), (-math.inf, 0))
        if now - since >= FLOOD_S:
            since, lines = now, 0
        self._seen[level, event] = (since, lines + 1)
        if lines < FLOOD_LINES:
            return self._left_out.pop((level, event), 0)
        self._left_out[level, event] = self._left_out.get((level, event), 0) + 1
        return None

    def take_ended(self, now: float) -> list[tuple[str, str, int]]:
        """Level, event and lines left out of the floods that are over: no line of theirs has come since to say it."""
        ended = [key for key in list(self._left_out) if now - self._seen[key][0] >= FLOOD_S]
        return [(*key, lines) for key in ended if (lines := self._left_out.pop(key, 0))]


@dataclass(slots=True)
class _Output:
    """Where lines go, for the whole process. Before `configure`: warnings and worse, as text."""

    least: int = LEVELS["warning"]
    stream: TextIO | None = None  # None: whatever sys.stderr is at that time
    is_json: bool = False
    is_coloured: bool = False
    fields: dict[str, object] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    flood: Flood = field(default_factory=Flood)
    lost: int = 0  # lines since the last one that was written
    is_cut: bool = False  # the last one was, in its middle
    lock: threading.RLock = field(default_factory=threading.RLock)  # what is shown may itself log

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One thread after the other; at the end of the process one may have been stopped in the middle of its line."""
        is_ours = self.lock.acquire(timeout=TURN_S)
        try:
            yield
        finally:
            if is_ours:
                self.lock.release()

    def write(self, line: str) -> None:
        """One write per line, so that lines of several processes do not mix (up to 4 KiB in a pipe)."""
        if self.lost:
            lost, self.lost = self.lost, 0
            _log.error("lines_lost", lines=lost)  # comes back here, and counts itself when it is lost too
            if self.lost:
                self.lost = lost + 1
                return
        if not self._is_written(line):
            self.lost += 1

    def _is_written(self, line: str) -> bool:
        stream = self.stream or sys.stderr
        try:
            fd = stream.fileno()
        except (OSError, ValueError, AttributeError):  # memory, closed, never there
            fd = -1
        try:
            if fd >= 0:
                return self._is_sent(fd, line.encode(stream.encoding or "utf-8", "backslashreplace"))
            stream.write(line)
            stream.flush()
        except (OSError, ValueError, AttributeError):  # full, gone, closed, never there: nobody is left to tell
            return False
        return True

    def _is_sent(self, fd: int, line: bytes) -> bool:
        """As far as the reader takes it now. A line that is cut ends where the next one begins."""
        rest = memoryview(b"\n" * self.is_cut + line)
        length = len(rest)
        while rest and (count := _write_at_once(fd, rest)):
            rest = rest[count:]
        if len(rest) < length:
            self.is_cut = bool(rest)
        return not rest


def _write_at_once(fd: int, data: memoryview) -> int:
    """How many bytes were written without waiting for a reader; 0 for none. Raises OSError.

    O_NONBLOCK belongs to the open file: the shell, and whoever else writes there, would get it. So where a write cannot
    be told not to wait, the file is opened once more.
    """
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind):
        return os.write(fd, data)
    try:
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
            return os.pwritev(fd, [data], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    except OSError as error:  # before Linux 6.4
        if error.errno not in {errno.EOPNOTSUPP, errno.ESPIPE, errno.EINVAL}:
            raise
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # a socket, or another user's terminal
        own = -1
    try:
        if own >= 0:
            return os.write(own, data)
        return os.write(fd, data[:PIECE_BYTES]) if _takes(fd) else 0
    except BlockingIOError:
        return 0
    finally:
        if own >= 0:
            os.close(own)


def _takes(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(happened & select.POLLOUT for _, happened in poll.poll(0))


_output: Final = _Output()


class _Diverted(logging.Handler):
    def __init__(self, hear: Callable[[str], None]) -> None:
        super().__init__()
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        self._hear(_message(record))


class _Folded(logging.Handler):
    """Python's logging as events of ours."""

    def createLock(self) -> None:  # noqa: N802 (the logging module's name)
        """None: who has it would wait for `_Output.lock`, and who has that may log through here (a finalizer)."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        message = _message(record)
        level = "error"
        for name, least in reversed(LEVELS.items()):
            level = name
            if least <= record.levelno:
                break
        get(record.name)._say(level, "library_message", {"message": message, "exc_info": record.exc_info})  # noqa: SLF001


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 # arguments of strangers that do not fit their own format
        return str(record.msg)


def _add_context(logger: object, level: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """`ts level event logger`, then the fields of the process and of the call."""
    head = {
        "ts": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level,
        "event": event.pop("event"),
        "logger": event.pop("logger"),
    }
    return head | _output.fields | {name: value for name, value in event.items() if name not in head}


def _make_plain(logger: object, level: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {name: _plain(value) for name, value in event.items()}


def _render(logger: object, level: str, event: structlog.typing.EventDict) -> str:
    return (_encoder.encode(event).decode() if _output.is_json else _as_text(event)) + "\n"


_PROCESSORS: Final = (
    _add_context,
    structlog.processors.ExceptionRenderer(),  # exc_info → exception
    _make_plain,
    _render,
)
_encoder: Final = msgspec.json.Encoder()


def _plain(value: object, depth: int = _DEPTH) -> Any:
    """What any JSON encoder takes. Objects are shown by their repr, exceptions by their text; never raises."""
    try:
        return _plain_or_raise(value, depth)
    except Exception:  # noqa: BLE001 # a __repr__ of anybody's may raise anything, and a log line must not
        return f"<{type(value).__name__} that cannot be shown>"


def _plain_or_raise(value: object, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, float):
        return float(value)
    if depth and isinstance(value, Mapping):
        return {str(_plain(name, 0)): _plain(item, depth - 1) for name, item in value.items()}
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth - 1) for item in value]
    text = value if isinstance(value, str) else str(value) if isinstance(value, BaseException) else repr(value)
    return text.encode("utf-8", "backslashreplace").decode()


def _as_text(event: Mapping[str, Any]) -> str:
    """For people: what happened first, the fields as name=value, a traceback below."""
    level, colour = event["level"], _COLOURS[event["level"]]
    head = f"{level:<7} {event['event']}"
    if _output.is_coloured:
        head = f"\x1b[{colour}m{head}\x1b[0m"
    rest = [f"{name}={_quoted(event[name])}" for name in event if name not in _SHOWN]
    below = "".join(f"\n    {_printable(line)}" for line in str(event.get("exception") or "").splitlines())
    return " ".join([event["ts"], head, *rest]) + below


_SHOWN: Final = frozenset({"ts", "level", "event", "logger", "exception"})


def _quoted(value: object) -> str:
    """As it is where that is plain to read; quoted and escaped where it could pass for something else on the line."""
    if isinstance(value, list):
        return ",".join(_quoted(item) for item in value)
    text = value if isinstance(value, str) else json.dumps(value)
    is_bare = not isinstance(value, str) or (text != "" and not set(text) & set(' "='))
    if not text.isprintable():
        return json.dumps(text)
    return text if is_bare else json.dumps(text, ensure_ascii=False)


def _printable(line: str) -> str:
    return line if line.isprintable() else line.encode("unicode_escape").decode()


_log: Final = get(__name__)

_PREAMBLE: Final = """\
# Log events

This page is made from `fastsig/logs.py`: `python -m fastsig.logs > docs/logs.md`.

Everything goes to stderr, one event per line: text on a terminal, JSON elsewhere (`--log.format`), from `--log.level`
up. Each line has `ts` (UTC, RFC 3339), `level`, `event` and `logger`, and in workers `worker`, the slot; the text form
leaves `logger` out. The sentences below are not part of the line. Where it is about one connection, `connection` is its
slot, generation and number, as in `0.1.4711`. Tokens, payloads and secrets are never logged.

Of one event at one level a process writes 20 lines in a second. How many it left out is the field `suppressed` of the
next line of that event, or `lines_suppressed` before the next line of another.

| event | meaning |
|---|---|
"""

if __name__ == "__main__":
    sys.stdout.write(document())
