"""Deaths on purpose, where two workers hand a connection over: in debug builds, for tests that kill them there.

FASTSIG_FAULTS="POINT=CHANCE,..." or "CHANCE", for every point, from 0 to 1: a worker that gets to a point kills itself
there with that chance, having said so on stderr. Any other build does not read it.
"""

import os
import random
import signal
from typing import Final

from ._relay import IS_DEBUG


def _read(text: str) -> dict[str, float]:
    """By point; "": of all others."""
    parts = [part.rpartition("=") for part in text.split(",") if part]
    return {point: float(chance) for point, _, chance in parts}


_CHANCES: Final = _read(os.environ.get("FASTSIG_FAULTS", "")) if IS_DEBUG else {}


def point(name: str) -> None:
    """Perhaps the end of this process."""
    if _CHANCES and random.random() < _CHANCES.get(name, _CHANCES.get("", 0.0)):  # noqa: S311 # no secret
        os.write(2, f"fastsig: fault at {name}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
