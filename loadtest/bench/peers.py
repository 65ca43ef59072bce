"""The servers of the benchmark: what each is, how it is built, how it is started.

All peers do the same: `joined` to who joins, `peer-joined` and `peer-left` to the others, relay by recipient, broadcast
without one, bytes passed on as they came. None of them authenticates, limits rates or sheds slow readers.

What is built goes to build/bench, and only what is missing there is built. A peer that cannot be had is left out, and
the reason goes into the report.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import fastsig

HERE: Final = Path(__file__).parent
SERVERS: Final = HERE / "servers"
BUILD: Final = HERE.parent.parent / "build" / "bench"
SETUP_S: Final = 300.0  # for npm and pip to download
PLENTY: Final = "1000000000000"
LIMITS: Final = (
    "messages_per_s message_burst bytes_per_s fanout_bytes_per_s joins_per_s connections_per_address "
    "connects_per_s_per_address connects_per_s"
)  # on, so that they cost what they cost, but out of reach of a load generator


class MissingError(Exception):
    """Why a peer cannot be had here."""


@dataclass(frozen=True)
class Peer:
    """A server that can be started.

    `command` holds {port}; `processes`: that relay; `load`: options for sigload; `says`: what is in its log once it
    serves, unless an answer on its port is enough.
    """

    name: str
    about: str  # versions included
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    load: Sequence[str] = ()
    says: str = ""


def cc() -> list[str]:
    """The C compiler, which the environment may name in CC."""
    return [*os.environ.get("CC", "cc").split(), "-O2", f"-I{HERE}"]


def _run(*command: str | Path) -> str:
    """What it writes.

    Raises:
        MissingError: it is not there, fails or takes too long
    """
    try:
        words = [str(word) for word in command]
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=SETUP_S)
    except FileNotFoundError as error:
        raise MissingError(f"{command[0]} is not installed") from error
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise MissingError(f"{Path(command[0]).name} failed: {said[-1] if said else error}") from error
    return done.stdout.strip()


def compiled(source: Path, folder: Path = BUILD) -> Path:
    """The program that is compiled of it, anew if the source is newer.

    Raises:
        MissingError: there is no compiler, or it refuses
    """
    program = folder / source.stem
    newest = max(path.stat().st_mtime for path in (source, HERE / "wsutil.h"))
    if not program.exists() or program.stat().st_mtime < newest:
        folder.mkdir(parents=True, exist_ok=True)
        _run(*cc(), "-o", program, source)
    return program


def sigload() -> Path:
    """The load generator."""
    return compiled(HERE / "sigload.c")


def _limit(*, may_download: bool) -> list[Peer]:
    return [Peer("limit", "C and epoll, only what the protocol needs", [str(compiled(SERVERS / "limit.c")), "{port}"])]


def _fastsig(*, may_download: bool) -> list[Peer]:
    env = {f"FASTSIG_LIMITS_{name.upper()}": PLENTY for name in LIMITS.split()} | {"FASTSIG_SERVER_DRAIN_SECONDS": "0"}

    def peer(name: str, what: str, workers: int, *load: str) -> Peer:
        command = [sys.executable, "-m", "fastsig", "serve", "--host", "127.0.0.1", "--port", "{port}"]
        command += ["--workers", str(workers), "--ops.port", "0"]
        return Peer(name, f"fastsig {fastsig.__version__}, {what}", command, env, workers, load, '"serving"')

    return [
        peer("fastsig", "1 worker", 1),
        peer("fastsig-2", "2 workers, `join` names the room", 2),
        peer("fastsig-2-room", "2 workers, the URL names the room", 2, "--room-query"),
    ]


def _npm(*, may_download: bool) -> Path:
    """The folder with node_modules as package-lock.json says."""
    folder = BUILD / "npm"
    lock = SERVERS / "package-lock.json"
    done = folder / "node_modules" / ".done"
    if not done.exists() or done.read_text(encoding="utf-8") != lock.read_text(encoding="utf-8"):
        if not may_download:
            raise MissingError("not in build/bench yet: `make bench-full` installs it")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SERVERS / name, folder)
        _run("npm", "ci", "--no-audit", "--no-fund", "--silent", "--prefix", folder)
        done.write_text(lock.read_text(encoding="utf-8"), encoding="utf-8")
    return folder / "node_modules"


def _bun(*, may_download: bool) -> list[Peer]:
    modules = _npm(may_download=may_download)
    bun = modules / ".bin" / "bun"
    version = _run(bun, "--version")
    return [Peer("bun", f"Bun {version} (uWebSockets, C++)", [str(bun), str(SERVERS / "bun.js"), "{port}"])]


def _node(*, may_download: bool) -> list[Peer]:
    modules = _npm(may_download=may_download)
    about = f"Node.js {_run('node', '--version').removeprefix('v')}, ws {_npm_version(modules / 'ws')}"
    return [Peer("node", about, ["node", str(SERVERS / "node.js"), "{port}"], {"NODE_PATH": str(modules)})]


def _npm_version(module: Path) -> str:
    found = re.search(r'"version": "([^"]+)"', (module / "package.json").read_text(encoding="utf-8"))
    return found[1] if found else "?"


def _venv(*, may_download: bool) -> Path:
    """The interpreter of the Python peers' own environment, as requirements.txt says."""
    folder = BUILD / "venv"
    wanted = SERVERS / "requirements.txt"
    done = folder / ".done"
    if not done.exists() or done.read_text(encoding="utf-8") != wanted.read_text(encoding="utf-8"):
        if not may_download:
            raise MissingError("not in build/bench yet: `make bench-full` installs it")
        _run(sys.executable, "-m", "venv", "--clear", folder)
        _run(folder / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", wanted)
        shutil.copy(wanted, done)
    return folder / "bin" / "python"


def _python(package: str, *, may_download: bool) -> list[Peer]:
    python = _venv(may_download=may_download)
    code = "import importlib.metadata as m, platform as p, sys; print(m.version(sys.argv[1]), p.python_version())"
    version, python_version = _run(python, "-c", code, package).split()
    about = f"{package} {version} and uvloop on CPython {python_version}"
    return [Peer(package, about, [str(python), str(SERVERS / f"with_{package}.py"), "{port}"])]


def _aiohttp(*, may_download: bool) -> list[Peer]:
    return _python("aiohttp", may_download=may_download)


def _websockets(*, may_download: bool) -> list[Peer]:
    return _python("websockets", may_download=may_download)


KINDS: Final = {
    "limit": _limit, "fastsig": _fastsig, "bun": _bun, "node": _node, "aiohttp": _aiohttp, "websockets": _websockets,
}  # fmt: skip


def gather(*, may_download: bool) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be had, and why the others cannot, by name.

    `may_download`: what npm and pip are needed for is fetched; otherwise only what is in build/bench is used.
    """
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    for name, make in KINDS.items():
        try:
            peers += make(may_download=may_download)
        except MissingError as error:
            missing[name] = str(error)
    return peers, missing
