"""The wscat session of README.md, typed into the npm package wscat in two terminals and compared line for line.

The fenced blocks ```text wscat-1 hold what the first terminal shows, ```text wscat-2 the second. A line `> …` is typed,
every other line must appear as it is; only the numbers of `"n"` may differ. The command stands in the text.
"""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from tests.e2e.conftest import Server

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^```text wscat-(\d)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r'"n":\d+')
# What is typed, and the answer to wait for before anybody types again; what is not here has no answer of its own.
ANSWERS = {"join": "joined", "leave": "left", "hello": "welcome", "ping": "pong"}
COMMAND = "npx wscat -c ws://localhost:8080/ws"
CONNECTED = "Connected (press CTRL+C to quit)"  # wscat's first line, which the README leaves out
LINE_S = 10.0
COLUMNS = 1000  # nothing wraps

_CONTROL = re.compile(r"\x1b\[(\d*)(?:;\d+)*([A-Za-z])|\r\n|\n|\r|[^\x1b\r\n]+")


class Screen:
    """What a terminal shows of the few control sequences that readline and wscat use."""

    def __init__(self) -> None:
        self.lines = [""]
        self._column = 0

    def feed(self, text: str) -> None:
        for match in _CONTROL.finditer(text):
            number, command = match.group(1), match.group(2)
            if command:
                self._control(command, int(number or 0))
            elif "\n" in match.group():
                self.lines.append("")
                self._column = 0
            elif match.group() == "\r":
                self._column = 0
            else:
                line = self.lines[-1].ljust(self._column)
                end = self._column + len(match.group())
                self.lines[-1] = line[: self._column] + match.group() + line[end:]
                self._column = end

    def _control(self, command: str, number: int) -> None:
        if command == "G":
            self._column = max(number, 1) - 1
        elif command == "D":
            self._column = max(0, self._column - max(number, 1))
        elif command == "C":
            self._column += max(number, 1)
        elif command in "JK":
            self.lines[-1] = "" if number == 2 else self.lines[-1][: self._column]


class Terminal:
    """wscat in a pseudo terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=os.environ | {"TERM": "xterm"}, start_new_session=True
        )
        os.close(slave)
        self._screen = Screen()
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait_for(lambda _: self.is_connected)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO is how the end of a terminal looks
            while data := os.read(self._master, 65536):
                with self._changed:
                    self._screen.feed(data.decode())
                    self._changed.notify_all()

    @property
    def is_connected(self) -> bool:
        with self._changed:
            return CONNECTED in self._screen.lines

    def shown(self) -> list[str]:
        """The lines so far, without the prompt that waits."""
        with self._changed:
            lines = [line.rstrip() for line in self._screen.lines]
        return [line for line in lines if line not in ("", ">", CONNECTED)]

    def type(self, line: str) -> None:
        os.write(self._master, line.encode() + b"\r")

    def wait_for(self, condition: Callable[[list[str]], bool]) -> None:
        deadline = time.monotonic() + LINE_S
        while not condition(self.shown()):
            with self._changed:
                self._changed.wait(0.02)
            if time.monotonic() > deadline:
                pytest.fail("the terminal shows only:\n" + "\n".join(self.shown()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(LINE_S)
        os.close(self._master)


def _sessions(text: str) -> list[list[str]]:
    """What each of the terminals shows, the blocks of each in a row."""
    sessions: dict[str, list[str]] = {}
    for number, block in BLOCK.findall(text):
        sessions.setdefault(number, []).extend(line for line in block.splitlines() if line)
    assert set(sessions) == {"1", "2"}, "README.md has no blocks `text wscat-1` and `text wscat-2`"
    return [sessions["1"], sessions["2"]]


def _any_number(lines: list[str]) -> list[str]:
    return [NUMBER.sub('"n":0', line) for line in lines]


def _is_typed(line: str) -> bool:
    return line.startswith("> ")


class Side:
    """One terminal and how far into its part of the session it is."""

    def __init__(self, terminal: Terminal, lines: list[str]) -> None:
        self.terminal = terminal
        self.lines = lines
        self._done = 0

    @property
    def is_done(self) -> bool:
        return self._done == len(self.lines)

    def look(self) -> bool:
        """Count the lines that have arrived since; stops before one that is to be typed. Whether there was one."""
        before, shown = self._done, len(self.terminal.shown())
        while not self.is_done and not _is_typed(self.lines[self._done]) and self._done < shown:
            self._done += 1
        return self._done > before

    def type(self) -> bool:
        """Type the next line, if it is one to type, and wait for what the server answers. Whether it was."""
        if self.is_done or not _is_typed(self.lines[self._done]):
            return False
        typed = json.loads(self.lines[self._done].removeprefix("> "))
        self.terminal.type(self.lines[self._done].removeprefix("> "))
        self._done += 1
        if answer := ANSWERS.get(typed["type"]):
            start = f'< {{"type":"{answer}"'
            self._done = 1 + next(n for n in range(self._done, len(self.lines)) if self.lines[n].startswith(start))
        self.terminal.wait_for(lambda shown: len(shown) >= self._done)
        return True


def _drive(sides: list[Side]) -> None:
    """Type what the README types, in the order that its answers impose."""
    deadline = time.monotonic() + 2 * LINE_S
    while not all(side.is_done for side in sides):
        if any(side.type() for side in sides):
            continue
        if sum(side.look() for side in sides) == 0:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                pytest.fail("nothing more arrives:\n" + "\n\n".join("\n".join(side.terminal.shown()) for side in sides))


def test_screen_shows_what_a_terminal_shows() -> None:
    screen = Screen()
    screen.feed('> \x1b[3G{"a"\r\x1b[2K\x1b[3D\x1b[34m< one\x1b[39m\n\x1b[1G\x1b[0J> \x1b[3G')
    assert screen.lines == ["< one", "> "]


def test_wscat_session_of_the_readme(server: Server, node: Path) -> None:
    text = README.read_text(encoding="utf-8")
    assert f"`{COMMAND}`" in text
    command = [str(node / "node_modules" / ".bin" / "wscat"), "-c", server.url]
    with contextlib.ExitStack() as stack:
        sides = [Side(stack.enter_context(Terminal(command)), lines) for lines in _sessions(text)]
        _drive(sides)
        for side in sides:
            assert _any_number(side.terminal.shown()) == _any_number(side.lines)
