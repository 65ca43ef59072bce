"""`make loadtest`: a server of its own with two workers, Locust without its web page, and a report as one HTML file.

With `--url` the load goes to a deployment instead. What is not known here goes to Locust as it is: `--callers 100`,
`--processes 2`. The exit code is Locust's: 1 above the share of errors that `--max-error-ratio` allows.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loadtest.faults import FREE
from tests.e2e.conftest import Server

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


@contextlib.contextmanager
def serving(workers: int, *args: str) -> Iterator[Server]:
    """A server without rate limits, on a free port of loopback."""
    with tempfile.TemporaryDirectory(prefix="fastsig-loadtest-") as folder:
        env = FREE | {"FASTSIG_SERVER_DRAIN_SECONDS": "0"}
        server = Server("--workers", str(workers), "--log.level", "info", *args, env=env, cwd=Path(folder))
        try:
            server.wait_for("serving")
            yield server
        finally:
            server.stop()


def locust(url: str, *, users: int, seconds: float, html: Path, options: list[str]) -> int:
    """Run it headless until it ends; its exit code."""
    html.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.call([
        sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless", "--only-summary",
        "--host", url, "--users", str(users), "--spawn-rate", str(max(1, users // 10)),
        "--run-time", f"{seconds:g}s", "--html", str(html), *options,
    ])  # fmt: skip


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make loadtest", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, s (default %(default)s)")
    parser.add_argument("--users", type=int, default=1000, help="connections (default %(default)s)")
    parser.add_argument("--url", default="", help="a deployment's WebSocket, instead of a server of its own")
    parser.add_argument("--workers", type=int, default=2, help="of the server (default %(default)s)")
    parser.add_argument("--html", type=Path, default=Path("build/loadtest.html"), help="(default %(default)s)")
    known, options = parser.parse_known_args()
    with contextlib.ExitStack() as stack:
        url = known.url or stack.enter_context(serving(known.workers)).url
        code = locust(url, users=known.users, seconds=known.seconds, html=known.html, options=options)
    print(f"fastsig: the report is {known.html}")
    return code


if __name__ == "__main__":
    sys.exit(main())
