"""`make hostile`: every offence against a running server, and what the healthy pair beside it measured.

Prints a table and writes it into docs/hostile.md, with the machine and the command. Exit code 1 when an offender got
anything else than it should, when something pinned more memory than it may, or when the pair waited too long.
ARGS="--only ping" does those whose name has that in it, and writes nothing.
"""

import argparse
import contextlib
import datetime as dt
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from fastsig import __version__
from tests.e2e.conftest import NO_RATES, Server

from . import limits, memory, rates
from .connections import allow_descriptors
from .offences import MEMORY, OFFENCES, REPEATED_S
from .scene import Finding, Scene

WORST_MS: Final = 250.0
OFF_MS: Final = 1000.0
PAGE: Final = Path(__file__).parent.parent.parent / "docs" / "hostile.md"
_HEAD: Final = """\
# Hostile input, measured

This page is made by `make hostile` (`loadtest/hostile/`): real sockets over loopback, against a server with one worker
and the default options, but for the limits per address (all come from one) and those of rate: so each other control is
seen by itself. Two healthy peers on the same worker throw a message to each other every 25 ms meanwhile; "worst" is
their longest round trip, two relays, while the offence lasted. "RSS" is by how much the worker's resident memory was
higher afterwards, "s" how long it took; what is over sooner is done again for a second.

fastsig {version}, Python {python}, {machine}, {cpus} CPUs, {date}.

"""
_COLUMNS: Final = """\
| offence | what the offender gets | trips | median ms | worst ms | RSS MiB | s |
|---|---|---:|---:|---:|---:|---:|
"""
_ONE_BY_ONE: Final = f"""\
## One after the other

The worst has to stay below {WORST_MS:.0f} ms.

"""
_CROWDS: Final = f"""\

## Crowds: what a connection pins

Each on a server of its own, by {memory.CROWD} offenders, as fast as they can; so the pair's figures are those of a
crowd that floods. What N bytes of one of them pin may be 4 N + 128 KiB, and `limits.output_bytes` (1 MiB) beyond,
for output that it does not read.

"""


_LIMITS: Final = f"""\

## Limits: one address against the others

Each on a server of its own, from another address than the pair's. "Alone" is the pair's 99th percentile in the
{limits.ALONE_S:.0f} s before, "beside" that while the offence lasts.

"""
_RATES: Final = f"""\

## Limits: what one connection may do, and a crowd

Each on a server of its own with the default rates, but for the rows that say "rates off". A worker does 25 ms of work
for its peers in one turn of its loop, and then reads no more from who speaks; half of each turn is for those who said
nothing until then. So a crowd takes the worker's CPU, but not more of the others' time than the worst here. With rates
on that has to stay below {WORST_MS:.0f} ms, with rates off below {OFF_MS:.0f} ms, and the worker is never replaced.

"""


def row(finding: Finding) -> str:
    trips = finding.trips
    return (
        f"| {finding.offence} | {finding.gets} | {trips.number} | {trips.median_ms:.1f} | {trips.worst_ms:.1f}"
        f" | {finding.rose_mib:+.1f} | {finding.took_s:.1f} |\n"
    )


@contextlib.contextmanager
def _scene(failures: list[str]) -> Iterator[Scene]:
    """A server of its own; what it complains about is a failure."""
    with tempfile.TemporaryDirectory(prefix="fastsig-hostile-") as folder:
        server = Server(*NO_RATES, cwd=Path(folder))
        try:
            scene = Scene(server, is_long=True)
            yield scene
            scene.pair.close()
        finally:
            code = server.stop()
    failures += [line for line in server.stderr_lines() if "internal_error" in line or "Traceback" in line]
    if code:
        failures.append(f"the server ended with {code}")


def _commit(scene: Scene, name: str, offence: Callable[[Scene], str], worst_ms: float, failures: list[str]) -> str:
    """Its row, which is printed too; none if it failed."""
    try:
        finding = scene.commit(name, offence, least_s=REPEATED_S if name in OFFENCES else 0.0)
    except AssertionError as reason:
        failures.append(f"{name}: {reason}")
        return ""
    if finding.trips.worst_ms >= worst_ms:
        failures.append(f"{name}: the pair waited {finding.trips.worst_ms:.0f} ms")
    print(row(finding), end="", flush=True)
    return row(finding)


def _hold(offences: dict[str, tuple[Callable[[Scene], str], tuple[str, ...]]], only: str, failures: list[str]) -> str:
    """A table of offences that limits are for."""
    table = limits.COLUMNS
    for name, (offence, options) in offences.items():
        if only not in name:
            continue
        try:
            held = limits.commit(name, offence, options)
        except AssertionError as reason:
            failures.append(f"{name}: {reason}")
            continue
        if held.beside.worst_ms >= (OFF_MS if options == NO_RATES else WORST_MS):
            failures.append(f"{name}: the pair waited {held.beside.worst_ms:.0f} ms")
        print(held.row(), end="", flush=True)
        table += held.row()
    return table


def run(only: str) -> tuple[str, list[str]]:
    """The two tables, and what is wrong in sentences."""
    failures: list[str] = []
    page = _ONE_BY_ONE + _COLUMNS
    with _scene(failures) as scene:
        for name, offence in OFFENCES.items():
            if only in name:
                page += _commit(scene, name, offence, WORST_MS, failures)
    page += _LIMITS + _hold(limits.OFFENCES, only, failures)
    page += _RATES + _hold(rates.OFFENCES, only, failures)
    page += _CROWDS + _COLUMNS
    for name, offence in MEMORY.items():
        if only in name:
            with _scene(failures) as scene:
                page += _commit(scene, name, offence, math.inf, failures)
    return page, failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="make hostile", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="a part of the name of the offences to commit")
    only = parser.parse_args().only
    allow_descriptors(20_000)
    tables, failures = run(only)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if not only and not failures:
        head = _HEAD.format(
            version=__version__, python=platform.python_version(), machine=f"{platform.system()} {platform.machine()}",
            cpus=os.cpu_count(), date=dt.datetime.now(tz=dt.UTC).date(),
        )  # fmt: skip
        PAGE.write_text(head + tables, encoding="utf-8")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
