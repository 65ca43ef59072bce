"""An input of a fuzzer, read as a script: every sequence of bytes is one, and a small change of it is a small change.

What a script does is the target's (`frames`, `mesh`). Read past its end, it is zeros and nothing.
Here is also what both targets need: the errors that fastsig would have logged, and a loop that picows can ask for.
"""

import asyncio
import sys
import traceback
from typing import Any

from fastsig.logs import Logger


class Finding(AssertionError):  # noqa: N818 (what fuzzers call it)
    """What must not be."""


class Script:
    """Bytes that are taken from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    @property
    def may_cost(self) -> bool:
        """One in sixteen may do what costs as much as all else in hundreds of them."""
        return len(self._data) % 16 == 0

    def byte(self) -> int:
        """The next, 0 behind the end."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def take(self, count: int) -> bytes:
        """So many, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def text(self) -> bytes:
        """Some bytes, with their number before them."""
        return self.take(self.byte())

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))


class Bugs:
    """While entered: what reaches one of the three places that catch broadly, and would have become a line
    `internal_error`."""

    def __init__(self) -> None:
        self.found: list[BaseException] = []
        self._log = Logger.exception

    def __enter__(self) -> None:
        self.found.clear()
        setattr(Logger, "exception", self._note)  # noqa: B010 (mypy minds the plain way)

    def __exit__(self, *_: object) -> None:
        setattr(Logger, "exception", self._log)  # noqa: B010 (likewise)

    def _note(self, *_: Any, **__: Any) -> None:
        error = sys.exception()
        self.found.append(error if error is not None else AssertionError("an error without an exception was logged"))

    def check(self) -> None:
        """Raises when there is any."""
        if self.found:
            traceback.print_exception(self.found[0])
            raise Finding("an exception reached report_bug") from self.found[0]


class Loop:
    """The running loop that picows asks for. It never runs: the hosts have their own queue of calls."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._loop = asyncio.new_event_loop()
        asyncio._set_running_loop(self._loop)

    def forget(self) -> None:
        """Drop what picows wants to be done some milliseconds later: it would hold whole connections."""
        asyncio._set_running_loop(None)
        self._loop.close()
        self._begin()
