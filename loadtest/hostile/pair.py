"""Two healthy peers in a process of their own, which throw a message to each other all the time.

`Pair` starts the process, `python -m loadtest.hostile.pair PORT`, and asks it. A message goes every `EVERY_S`, less
often than the limits of one connection allow, or as soon as the one before it is back: of a stall all is seen but
`EVERY_S` at most. Whatever is not the expected message ends the process, which fails the run.
"""

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from .offender import Offender

EVERY_S: Final = 0.025
WORST_S: Final = 5.0  # no reply may take longer than this, on any machine
ROOM: Final = "healthy"
ROOT: Final = Path(__file__).parent.parent.parent


class Trips(NamedTuple):
    """Round trips since the last time somebody asked: A to B and back, two relays."""

    number: int
    median_ms: float
    p99_ms: float
    worst_ms: float


class Pair:
    """As the driver sees it."""

    def __init__(self, port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.hostile.pair", str(port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask()

    def ask(self) -> Trips:
        """The trips since the last call. A pair that has ended could not talk: that is a failure."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the healthy pair lost a message, or its connection"
        return Trips(**json.loads(line))

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=WORST_S)


def _throw(here: Offender, there: Offender, number: int) -> None:
    """There and back. Raises AssertionError, TimeoutError."""
    for sender, receiver, name in ((here, there, "there"), (there, here, "here")):
        sender.say(type="message", room=ROOM, recipient=name, payload=number)
        word, message = receiver.hear()
        assert (word, message.get("payload")) == ("relayed", number), (word, message)


def _trips(here: Offender, there: Offender) -> Iterator[float]:
    """Each in seconds."""
    for number in range(sys.maxsize):
        began = time.monotonic()
        _throw(here, there, number)
        took_s = time.monotonic() - began
        yield took_s
        time.sleep(max(0.0, EVERY_S - took_s))


def main(port: int) -> None:
    """Until the standard input ends."""
    with Offender(port) as here, Offender(port) as there:
        for peer, name in ((here, "here"), (there, "there")):
            peer.socket.settimeout(WORST_S)
            peer.join(ROOM, name)
        here.hear_until(lambda word, _: word == "peer-joined")
        samples = []
        for trip_s in _trips(here, there):
            samples.append(1000 * trip_s)
            if select.select([sys.stdin], [], [], 0)[0]:
                if not sys.stdin.readline():
                    return
                samples.sort()
                median, p99, worst = (round(samples[int((len(samples) - 1) * share)], 2) for share in (0.5, 0.99, 1))
                trips = Trips(len(samples), median, p99, worst)
                print(json.dumps(trips._asdict()), flush=True)
                samples.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]))
