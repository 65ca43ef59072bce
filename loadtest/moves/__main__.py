"""`make moves`: all parts, or those that ARGS names; exit code 1 when one of them failed."""

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final

import uvloop

from loadtest.faults import Report, _print
from loadtest.hostile.connections import allow_descriptors

from .churn import churn
from .kill import kill
from .load import load
from .pipeline import pipeline

PARTS: Final[dict[str, Callable[..., Coroutine[Any, Any, Report]]]] = {
    part.__name__: part for part in (load, pipeline, kill, churn)
}


async def run(arguments: argparse.Namespace) -> int:
    """The number of parts that failed."""
    failed = 0
    for name in arguments.parts or PARTS:
        known = inspect.signature(PARTS[name]).parameters
        given = {name: getattr(arguments, name) for name in ("workers", "clients", "deaths", "moves")}
        report = await PARTS[name](**{key: value for key, value in given.items() if value and key in known})
        failed += bool(report.failures)
        if arguments.json:
            print(json.dumps(vars(report)), flush=True)
        else:
            _print(report)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="make moves", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them, unless some are named")
    parser.add_argument("--workers", type=int, help="4")
    parser.add_argument("--clients", type=int, help="connections; each part has a number of its own")
    parser.add_argument("--deaths", type=int, help="of workers, in kill: 200")
    parser.add_argument("--moves", type=int, help="in churn: 20,000")
    parser.add_argument("--json", action="store_true", help="one object a line instead of tables")
    allow_descriptors(16384)
    return min(1, uvloop.run(run(parser.parse_args())))


if __name__ == "__main__":
    sys.exit(main())
