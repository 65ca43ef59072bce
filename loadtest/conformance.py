"""`make conformance`: the Autobahn test suite against the echo path of a server of its own; it fails on any violation.

Cases 1 to 7 and 10 of RFC 6455; 9 is about speed, 12 and 13 are about compression, which is never negotiated. The suite
is Python 2 code: it is installed into build/autobahn, for Python 2.7 (`PYTHON2`, or one of pyenv's, or python2.7).
The reports, one page per case, are build/conformance/index.html.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final

import trustme

from tests.e2e.conftest import Server, certified

SUITE: Final = "autobahntestsuite==25.10.1"
VIRTUALENV: Final = "virtualenv<20.22"  # the last that makes environments for Python 2.7
FOLDER: Final = Path("build/autobahn")
REPORTS: Final = Path("build/conformance")
CASES: Final = [f"{group}.*" for group in (1, 2, 3, 4, 5, 6, 7, 10)]
PASSED: Final = frozenset({"OK", "NON-STRICT", "INFORMATIONAL"})
NON_STRICT: Final = 11  # so many are too many: what the library `websockets` has
NO_PYTHON2: Final = 3  # the exit code
RUN_S: Final = 300


def python2() -> str | None:
    """Where a Python 2.7 is, which can be run."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [os.environ.get("PYTHON2"), *map(str, sorted(root.glob("versions/2.7.*/bin/python2.7"))), "python2.7"]
    for place in places:
        if place and shutil.which(place):
            code = "import sys; sys.exit(sys.version_info[:2] != (2, 7))"
            if subprocess.run([place, "-c", code], check=False, capture_output=True).returncode == 0:
                return place
    return None


def suite(python: str) -> Path:
    """The suite's program, installed if it is not there yet (some 15 s)."""
    program = FOLDER / "v27/bin/wstest"
    if not program.exists():
        print(f"fastsig: installing {SUITE} into {FOLDER}")
        shutil.rmtree(FOLDER, ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", str(FOLDER / "v3")],
            [str(FOLDER / "v3/bin/pip"), "-qq", "--disable-pip-version-check", "install", VIRTUALENV],
            [str(FOLDER / "v3/bin/virtualenv"), "-q", "-p", python, str(FOLDER / "v27")],
            [str(FOLDER / "v27/bin/pip"), "-qq", "--disable-pip-version-check", "install", SUITE],
        ):
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)  # where pip mourns Python 2
    return program


def run(program: Path, url: str, cases: list[str]) -> dict[str, Any]:
    """The suite's verdict on each case."""
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir(parents=True)
    spec = REPORTS / "spec.json"
    server = {"agent": "fastsig", "url": url}
    spec.write_text(
        json.dumps({
            "outdir": str(REPORTS), "servers": [server], "cases": cases, "exclude-cases": [], "exclude-agent-cases": {},
        }),
        encoding="utf-8",
    )  # fmt: skip
    subprocess.run(
        [str(program.absolute()), "-m", "fuzzingclient", "-s", str(spec)],
        check=True, stdout=subprocess.DEVNULL, timeout=RUN_S,
    )  # fmt: skip
    verdicts: dict[str, Any] = json.loads((REPORTS / "index.json").read_text(encoding="utf-8"))["fastsig"]
    return verdicts


def judge(verdicts: dict[str, Any]) -> list[str]:
    """What is wrong, a line each; none: all is well."""
    wrong = [
        f"case {case}: {verdict['behavior']}, its close: {verdict['behaviorClose']}"
        for case, verdict in verdicts.items()
        if not {verdict["behavior"], verdict["behaviorClose"]} <= PASSED
    ]
    loose = [case for case, verdict in verdicts.items() if verdict["behavior"] == "NON-STRICT"]
    if len(loose) >= NON_STRICT:
        wrong.append(f"{len(loose)} cases are non-strict: {', '.join(loose)}")
    return wrong if verdicts else ["no case was run"]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make conformance", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--cases", nargs="*", default=CASES, help="such as 6.4.* (default: all of 1 to 7 and 10)")
    parser.add_argument("--tls", action="store_true", help="by wss://, to a server that ends TLS itself")
    given = parser.parse_args()
    python = python2()
    if python is None:
        print("fastsig: the suite needs Python 2.7: pyenv install 2.7.18, or PYTHON2=where it is", file=sys.stderr)
        return NO_PYTHON2
    program = suite(python)
    with tempfile.TemporaryDirectory(prefix="fastsig-conformance-") as name:
        folder = Path(name)
        tls = certified(trustme.CA(), folder) if given.tls else ()  # RSA: the suite's OpenSSL is as old as it is
        server = Server("--server.echo-path", "/echo", *tls, cwd=folder)
        try:
            url = f"{'wss' if given.tls else 'ws'}://127.0.0.1:{server.port}/echo"
            verdicts = run(program, url, given.cases)
        finally:
            code = server.stop()
    wrong = judge(verdicts)
    if code or server.events("internal_error"):
        wrong.append(f"the server ended with {code}, or had an internal error")
    counts = Counter(verdict["behavior"] for verdict in verdicts.values())
    print(f"fastsig: {len(verdicts)} cases: {', '.join(f'{n} {name}' for name, n in counts.most_common())}")
    print(f"fastsig: the report is {REPORTS}/index.html")
    for line in wrong:
        print(f"fastsig: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
