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

from .load import load
from .pipeline import pipeline

PARTS: Final[dict[str, Callable[..., Coroutine[Any, Any, Report]]]] = {part.__name__: part for part in (load, pipeline)}


async def run(arguments: argparse.Namespace) -> int:
    """The number of parts that failed."""
    failed = 0
    for name in arguments.parts or PARTS:
        known = inspect.signature(PARTS[name]).parameters
        given = {"workers": arguments.workers, "clients": arguments.clients}
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
    parser.add_argument("--json", action="store_true", help="one object a line instead of tables")
    allow_descriptors(16384)
    return min(1, uvloop.run(run(parser.parse_args())))


if __name__ == "__main__":
    sys.exit(main())
