"""Lines of the log, and that the page about them is true."""

import ast
import contextlib
import errno
import io
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

import pytest
from hypothesis import given, settings, strategies as st

from fastsig import logs

ROOT = Path(__file__).parent.parent.parent
SERVER = sorted(
    {*(ROOT / "fastsig").glob("*.py")} - {ROOT / "fastsig" / "client.py"}
)  # that one lives in other programs
METHODS = {*logs.LEVELS, "exception"}
RESERVED = {"ts", "level", "event", "logger", "exc_info", "exception"}
SECRET = {"token", "tokens", "secret", "password", "authorization", "payload", "sdp", "candidate", "key", "keys", "jwt"}


class Stream(io.StringIO):
    is_terminal = False

    def isatty(self) -> bool:
        return self.is_terminal

    def line(self) -> dict[str, Any]:
        (line,) = self.getvalue().splitlines()
        return json.loads(line)  # type: ignore[no-any-return]


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Where the log goes."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Stream()


def test_json_line_begins_with_the_four_common_keys(stream: Stream) -> None:
    logs.configure("info", "json", stream=stream)
    logs.get("fastsig.test").info("serving", port=8080, urls=["ws://localhost/ws"])
    line = stream.line()
    assert list(line) == ["ts", "level", "event", "logger", "port", "urls"]
    assert (line["level"], line["event"], line["logger"]) == ("info", "serving", "fastsig.test")
    assert (line["port"], line["urls"]) == (8080, ["ws://localhost/ws"])


def test_time_is_utc_in_rfc_3339(stream: Stream) -> None:
    logs.configure("info", "json", stream=stream)
    logs.get("fastsig.test").info("serving")
    ts = stream.line()["ts"]
    assert ts.endswith("Z")
    assert datetime.fromisoformat(ts).utcoffset() == timedelta(0)


@pytest.mark.parametrize(("level", "least"), logs.LEVELS.items())
def test_level_hides_what_is_below(stream: Stream, level: str, least: int) -> None:
    logs.configure(level, "json", stream=stream)
    log = logs.get("fastsig.test")
    for name in logs.LEVELS:
        getattr(log, name)("serving")
    shown = [json.loads(line)["level"] for line in stream.getvalue().splitlines()]
    assert shown == [name for name, number in logs.LEVELS.items() if number >= least]


def test_logger_that_was_made_before_follows_the_configuration(stream: Stream) -> None:
    log = logs.get("fastsig.test").bind(slot=1)
    logs.configure("info", "json", stream=stream)
    log.info("serving")
    assert stream.line()["slot"] == 1


def test_fields_of_the_process_are_on_each_line(stream: Stream) -> None:
    logs.configure("info", "json", stream=stream, worker=3)
    logs.get("fastsig.test").info("serving", port=1)
    assert stream.line()["worker"] == 3


@pytest.mark.parametrize(("is_terminal", "is_json"), [(True, False), (False, True)])
def test_auto_is_text_on_a_terminal_and_json_elsewhere(stream: Stream, *, is_terminal: bool, is_json: bool) -> None:
    stream.is_terminal = is_terminal
    logs.configure("info", "auto", stream=stream)
    logs.get("fastsig.test").info("serving")
    assert stream.getvalue().startswith("{") is is_json


def test_text_is_one_line_for_people(stream: Stream) -> None:
    logs.configure("info", "text", stream=stream)
    logs.get("fastsig.test").warning("cannot_start", reason="the port is taken", port=80, urls=["a", "b"], path="")
    _, _, rest = stream.getvalue().partition(" ")
    assert rest == 'warning cannot_start reason="the port is taken" port=80 urls=a,b path=""\n'


def test_colours_are_for_terminals_that_want_them(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logs.get("fastsig.test")
    logs.configure("info", "text", stream=stream)
    log.info("serving")
    assert "\x1b" not in stream.getvalue()
    stream.is_terminal = True
    logs.configure("info", "text", stream=stream)
    log.info("serving")
    assert "\x1b" in stream.getvalue()
    stream.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    logs.configure("info", "text", stream=stream)
    log.info("serving")
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r2026-01-01T00:00:00Z info serving", "\x1b[2J", "\u202eabc", "a\u2028b", "\x9b31m"]
)
@pytest.mark.parametrize("style", ["text", "json"])
def test_value_cannot_make_a_line_of_its_own(stream: Stream, style: str, text: str) -> None:
    logs.configure("info", style, stream=stream)
    logs.get("fastsig.test").info("serving", peer=text, peers=[text], room={text: text})
    output = stream.getvalue()
    if style == "text":
        assert output.count("\n") == 1
        assert output.removesuffix("\n").isprintable()
    else:
        assert output.count("\n") == 1
        assert json.loads(output)["peer"] == text


@pytest.mark.parametrize("text", ["a=b", 'a"b', "a b", "null"])
def test_text_value_that_could_mislead_is_quoted(stream: Stream, text: str) -> None:
    logs.configure("info", "text", stream=stream)
    logs.get("fastsig.test").info("serving", peer=text)
    shown = stream.getvalue().partition("peer=")[2].strip()
    assert shown in {text, json.dumps(text)}
    assert (shown == text) == (text == "null")


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def _endless() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


ODD = [
    Unshowable(), _endless(), object(), b"\xff", "\ud800", 10**40, 10**5000, -(10**40), float("nan"), float("inf"), 1j,
    {(1, 2): {3}}, {Unshowable(): Unshowable()}, range(3), ValueError("x"), int, Ellipsis, [[[[[[[["deep"]]]]]]]],
]  # fmt: skip


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("style", ["text", "json"])
def test_no_value_makes_a_log_call_fail(stream: Stream, style: str, value: object) -> None:
    logs.configure("info", style, stream=stream)
    logs.get("fastsig.test").info("serving", value=value, values=[value])
    assert "serving" in stream.getvalue()
    if style == "json":
        assert "value" in stream.line()


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.sets(st.integers()),
    max_leaves=8,
)


@settings(max_examples=50)
@given(value=_values)
def test_any_value_is_plain_when_written(value: object) -> None:
    assert json.loads(logs._encoder.encode(logs._plain(value))) is not Ellipsis
    assert logs._quoted(logs._plain(value)).isprintable()


def test_object_is_shown_by_its_repr_and_never_by_its_fields(stream: Stream) -> None:
    """A configuration hides its secrets in its repr; its fields have them."""
    from fastsig.config import build  # noqa: PLC0415

    logs.configure("info", "json", stream=stream)
    logs.get("fastsig.test").info("serving", config=build({"auth.keys": ("hush",)}))
    assert "hush" not in stream.getvalue()


@pytest.mark.parametrize("style", ["text", "json"])
def test_exception_comes_with_its_traceback(stream: Stream, style: str) -> None:
    logs.configure("info", style, stream=stream)
    try:
        raise ValueError("odd\x1b[2J")
    except ValueError:
        logs.get("fastsig.test").exception("internal_error", part="x")
    output = stream.getvalue()
    assert "Traceback" in output and "ValueError: odd" in output
    assert "\x1b" not in output
    if style == "json":
        assert stream.line()["level"] == "error"


def test_exception_outside_of_a_handler_is_a_plain_error(stream: Stream) -> None:
    logs.configure("info", "json", stream=stream)
    logs.get("fastsig.test").exception("internal_error")
    assert stream.line()["event"] == "internal_error"


def test_logging_of_libraries_is_folded_in(stream: Stream) -> None:
    logs.configure("info", "json", stream=stream)
    logging.getLogger("asyncio").warning("slow callback %s", "x")
    line = stream.line()
    assert (line["event"], line["logger"], line["level"]) == ("library_message", "asyncio", "warning")
    assert line["message"] == "slow callback x"


@pytest.mark.parametrize(("number", "level"), [(5, "trace"), (20, "info"), (25, "info"), (50, "error")])
def test_level_of_a_library_is_the_next_lower_of_ours(stream: Stream, number: int, level: str) -> None:
    logs.configure("trace", "json", stream=stream)
    logging.getLogger("asyncio").log(number, "x")
    assert stream.line()["level"] == level


def test_library_message_that_does_not_fit_its_arguments_is_shown_anyway(stream: Stream) -> None:
    logs.configure("info", "json", stream=stream)
    logs._Folded().emit(logging.LogRecord("asyncio", logging.ERROR, __file__, 1, "%d left", ("none",), None))
    assert stream.line()["message"] == "%d left"


def test_library_that_is_diverted_is_heard_elsewhere_only(stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    logs.configure("info", "json", stream=stream)
    heard: list[str] = []
    logs.divert("fastsig.test.noisy", heard.append)
    logging.getLogger("fastsig.test.noisy").error("no %s", "answer")
    assert heard == ["no answer"]
    assert not stream.getvalue() and not caplog.records


def test_configuring_again_does_not_double_lines_of_libraries(stream: Stream) -> None:
    for _ in range(3):
        logs.configure("info", "json", stream=stream)
    logging.getLogger("asyncio").error("x")
    assert stream.line()["message"] == "x"


class Broken(Stream):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_log_that_nobody_reads_fails_nobody(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    logs.configure("info", "json", stream=Broken())
    logs.get("fastsig.test").info("serving")
    monkeypatch.setattr("sys.stderr", None)
    logs.configure("info", "auto")
    logs.get("fastsig.test").info("serving")


@pytest.fixture(params=["pipe", "socket", "terminal"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, TextIO]]:
    """What a reader reads from, and the stream that ends there."""
    if request.param == "pipe":
        reader, writer = os.pipe()
    elif request.param == "socket":
        reader, writer = (end.detach() for end in socket.socketpair())
    else:
        reader, writer = os.openpty()
        tty.setraw(writer)
    os.set_blocking(reader, False)
    with os.fdopen(writer, "w", encoding="utf-8") as log:
        yield reader, log
    os.close(reader)


def _read(reader: int) -> str:
    data = b""
    with contextlib.suppress(BlockingIOError):
        while more := os.read(reader, 1 << 16):
            data += more
    return data.decode()


@pytest.mark.parametrize("has_nowait", [True, False], ids=["new kernel", "old kernel"])
@pytest.mark.parametrize("length", [100, 3000, 10_000, 300_000])
def test_log_that_nobody_reads_loses_lines_and_says_how_many(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, ends: tuple[int, TextIO], length: int, *, has_nowait: bool
) -> None:
    """Written from a thread: a call that blocks fails this test, and hangs nothing."""
    if not has_nowait:
        monkeypatch.setattr(os, "pwritev", _old_kernel)
    reader, log = ends
    monkeypatch.setattr(logs._output, "clock", itertools.count().__next__)  # a line in a second is no flood
    logs.configure("info", "json", stream=log)
    said = max(20, 1_000_000 // length)
    assert _is_done(lambda: _say(said, "x" * length))
    heard = _read(reader)
    logs.get("fastsig.test").info("stopped")
    heard += _read(reader)
    whole = [json.loads(line) for line in heard.splitlines() if line.endswith("}")]
    reports = [line for line in whole if line["event"] == "lines_lost"]  # a terminal takes more after a moment
    assert whole[-2:] == [reports[-1], whole[-1]] and whole[-1]["event"] == "stopped"
    assert sum(report["lines"] for report in reports) + len(whole) - len(reports) - 1 == said
    assert sum(not line.endswith("}") for line in heard.splitlines()) <= len(reports), "no more are cut than are said"


def _say(count: int, text: str) -> None:
    for _ in range(count):
        logs.get("fastsig.test").info("serving", text=text)


def _old_kernel(*_: object) -> int:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def _is_done(call: Callable[[], object]) -> bool:
    """Does it return in time?"""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


def test_log_in_a_file_is_written_behind_what_is_there(stream: Stream, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n", encoding="utf-8")
    with path.open("a", encoding="utf-8") as log:
        logs.configure("info", "text", stream=log)
        for _ in range(2):
            logs.get("fastsig.test").info("serving", name="é")
    first, *others = path.read_text(encoding="utf-8").splitlines()
    assert first == "before" and len(others) == 2 and all("name=é" in line for line in others)
    assert logs._output.lost == 0


# ---- floods


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logs._output, "clock", clock)
    logs.configure("info", "json", stream=stream)
    return clock


def _lines(stream: Stream) -> list[dict[str, Any]]:
    """What was written since the last time."""
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    stream.seek(0)
    stream.truncate()
    return found


def test_of_a_flood_the_first_lines_of_each_second_are_written(stream: Stream, clock: Clock) -> None:
    log = logs.get("fastsig.test")
    for tenth in range(30):
        for _ in range(10):
            log.error("internal_error")
        clock.now = 1000.0 + (tenth + 1) / 10
    lines = _lines(stream)
    assert len(lines) == 3 * logs.FLOOD_LINES
    assert [line["suppressed"] for line in lines if "suppressed" in line] == [80, 80]
    assert [index for index, line in enumerate(lines) if "suppressed" in line] == [20, 40]


def test_flood_of_one_event_hides_no_other_and_no_other_level(stream: Stream, clock: Clock) -> None:
    log = logs.get("fastsig.test")
    for _ in range(100):
        log.warning("cannot_accept")
    _lines(stream)
    log.error("cannot_accept")
    log.warning("cannot_watch")
    assert [(line["level"], line["event"]) for line in _lines(stream)] == [
        ("error", "cannot_accept"), ("warning", "cannot_watch"),
    ]  # fmt: skip


def test_another_event_says_what_a_flood_that_is_over_left_out(stream: Stream, clock: Clock) -> None:
    log = logs.get("fastsig.test")
    for _ in range(25):
        log.warning("cannot_accept")
    _lines(stream)
    log.info("serving")
    assert [line["event"] for line in _lines(stream)] == ["serving"], "it may go on yet"
    clock.now += logs.FLOOD_S
    log.info("serving")
    told, line = _lines(stream)
    assert (told["level"], told["event"], told["of"], told["lines"]) == (
        "warning",
        "lines_suppressed",
        "cannot_accept",
        5,
    )
    assert line["event"] == "serving"
    log.info("serving")
    log.warning("cannot_accept")
    assert [line.get("suppressed") for line in _lines(stream)] == [None, None], "it is said once"


def test_lines_below_the_level_are_no_flood(stream: Stream, clock: Clock) -> None:
    log = logs.get("fastsig.test")
    for _ in range(100):
        log.debug("cannot_serve")
    logs.configure("debug", "json", stream=stream)
    log.debug("cannot_serve")
    assert "suppressed" not in stream.line()


def test_libraries_are_held_to_the_same(stream: Stream, clock: Clock) -> None:
    for number in range(100):
        logging.getLogger(f"library.{number}").warning("x")
    assert len(_lines(stream)) == logs.FLOOD_LINES


def test_line_that_is_left_out_is_not_made(stream: Stream, clock: Clock) -> None:
    shown = 0

    class Costly:
        def __repr__(self) -> str:
            nonlocal shown
            shown += 1
            return "costly"

    for _ in range(100):
        logs.get("fastsig.test").info("serving", value=Costly())
    assert shown == logs.FLOOD_LINES


# ---- threads


def test_threads_that_log_at_once_neither_fail_nor_lose_a_line(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is there, or counted; with one thread's iteration over another's changes a call raised."""
    monkeypatch.setattr(logs, "FLOOD_S", 0.0005)
    monkeypatch.setattr(logs, "FLOOD_LINES", 2)
    logs.configure("info", "json", stream=stream)
    failures: list[Exception] = []
    names, each = sorted(set(logs.EVENTS) - {"lines_suppressed"}), 2000

    def log_all(say: Callable[..., None]) -> None:
        try:
            for number in range(each):
                say(names[number // 5 % len(names)], number=number)
        except Exception as failure:  # noqa: BLE001 (any is one too many)
            failures.append(failure)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        log = logs.get("fastsig.test")
        threads = [threading.Thread(target=log_all, args=(say,)) for say in (log.warning, log.error)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    finally:
        sys.setswitchinterval(before)
    assert not failures
    time.sleep(2 * logs.FLOOD_S)
    logs.get("fastsig.other").info("stopped")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    written = sum("number" in line for line in lines)
    told = sum(line.get("suppressed", 0) + line.get("lines", 0) for line in lines)
    assert written + told == 2 * each


def test_thread_that_was_stopped_in_the_middle_of_its_line_holds_up_no_other(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "TURN_S", 0.05)
    logs.configure("info", "json", stream=stream)
    over = threading.Event()
    stopped = threading.Thread(target=_hold, args=(over, is_held := threading.Event()))
    stopped.start()
    assert is_held.wait(20)
    try:
        assert _is_done(lambda: logs.get("fastsig.test").info("serving"))
        assert stream.line()["event"] == "serving"
    finally:
        over.set()
        stopped.join()


def _hold(over: threading.Event, is_held: threading.Event) -> None:
    with logs._output.turn():
        is_held.set()
        over.wait(20)


class Talkative:
    """Logs while it is shown, through Python's logging, as finalizers of asyncio do."""

    def __repr__(self) -> str:
        logging.getLogger("asyncio").error("never retrieved")
        return "talkative"


def test_line_in_the_middle_of_a_line_waits_for_nobody(stream: Stream) -> None:
    logs.configure("info", "json", stream=stream)
    assert _is_done(lambda: logs.get("fastsig.test").info("serving", value=Talkative()))
    assert [line["event"] for line in _lines(stream)] == ["library_message", "serving"]


# ---- the vocabulary


def _calls() -> list[tuple[str, ast.Call]]:
    """Each call of a logger in the package, and where it is."""
    found = []
    for path in SERVER:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if node.func.attr in METHODS and name in {"log", "_log"}:
                found.append((f"{path.name}:{node.lineno}", node))
    return found


def _event(call: ast.Call) -> object:
    return call.args[0].value if len(call.args) == 1 and isinstance(call.args[0], ast.Constant) else None


def test_there_are_calls_to_check() -> None:
    assert {where.partition(":")[0] for where, _ in _calls()} >= {"supervisor.py", "worker.py", "connection.py"}


def test_only_known_events_are_logged() -> None:
    assert not [where for where, call in _calls() if _event(call) not in logs.EVENTS]


def test_every_known_event_is_logged_somewhere() -> None:
    of_its_own = {"library_message", "lines_suppressed"}  # `logs` says these by another way
    assert set(logs.EVENTS) - of_its_own == {_event(call) for _, call in _calls()}


def test_fields_of_events_are_named_and_neither_reserved_nor_secret() -> None:
    wrong = [
        (where, keyword.arg) for where, call in _calls() for keyword in call.keywords
        if keyword.arg is None or keyword.arg in RESERVED | SECRET
    ]  # fmt: skip
    assert not wrong


def test_nobody_logs_past_this_module() -> None:
    for path in SERVER:
        if path.name != "logs.py":
            text = path.read_text(encoding="utf-8")
            assert "getLogger" not in text and "structlog" not in text, path.name


def test_page_about_the_log_is_up_to_date() -> None:
    page = ROOT / "docs" / "logs.md"
    assert page.read_text(encoding="utf-8") == logs.document(), "python -m fastsig.logs > docs/logs.md"
