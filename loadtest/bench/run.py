"""The benchmark: every peer through every test, `make bench` (minutes) or `make bench-full` (half an hour).

One cell is one peer in one test: a fresh server on its core, the load generator on the last core, both on loopback.
Peers take turns within a test, so that what else runs on the machine hits all of them. After each cell everything so
far is in build/bench.json; a run that is interrupted says so there and in the page, and loses only the cell it was in.

`sigload.c` checks every delivery for sender, recipient, order, duplication and content (`tests/e2e/test_bench.py`
proves that it does); a cell that lost anything is a failure of the run. `page.py` makes the page of what is recorded.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

from loadtest.bench import page
from loadtest.bench.peers import BUILD, Peer, gather, sigload

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parent.parent
START_S: Final = 20.0
STOP_S: Final = 3.0
CONNECT_S: Final = 60.0  # for sigload to have all its connections
SETTLE_S: Final = 0.3  # of silence after the joins, before traffic begins
HERTZ: Final = os.sysconf("SC_CLK_TCK")
PIN: Final = (  # and then the server is this very process
    "import os, sys; os.sched_setaffinity(0, map(int, sys.argv[1].split(','))); os.execvp(sys.argv[2], sys.argv[2:])"
)
FAULTS: Final = (
    "lost", "dup", "reordered", "misrouted", "corrupt", "conn_fail", "hs_fail", "unexpected_close", "bad_frame",
    "churn_timeout",
)  # fmt: skip


@dataclass(frozen=True)
class Test:
    """What sigload is told to do."""

    name: str
    title: str
    load: str
    rate: int = 0  # messages/s offered, of the open loop


PAIRS: Final = "--rooms 100 --peers 2"
TESTS: Final = (
    Test("relay1-200", "ping-pong in 100 pairs, 200 B", f"--mode relay1 {PAIRS} --payload 200"),
    Test("relayN-200", "8 on the way per peer, 100 pairs, 200 B", f"--mode relayN {PAIRS} --window 8 --payload 200"),
    Test("relayN-2500", "8 on the way per peer, 100 pairs, 2.5 KB", f"--mode relayN {PAIRS} --window 8 --payload 2500"),
    Test("fanout-20x10", "broadcast in 20 rooms of 10, 200 B", "--mode fanout --rooms 20 --peers 10 --window 4"),
    Test("fanout-1x500", "broadcast in a room of 500, 200 B", "--mode fanout --rooms 1 --peers 500 --window 4"),
    Test(
        "churn-50", "connect, join, leave, close; 50 at a time", "--mode churn --rooms 25 --concurrency 50 --await-join"
    ),
    Test("idle", "idle connections in rooms of 2", "--mode idle"),
)
QUICK_RATES: Final = (1_000, 10_000, 50_000, 100_000, 200_000)
FULL_RATES: Final = (
    1_000, 2_000, 5_000, 10_000, 20_000, 35_000, 50_000, 75_000, 100_000, 125_000, 150_000, 200_000, 250_000, 300_000,
    400_000,
)  # fmt: skip
NOT_QUICK: Final = ("aiohttp", "websockets")  # the slowest: only in the full run, or when they are named


def open_loop(rate: int) -> Test:
    """Messages leave at their times, whether the server keeps up or not; latency counts from those times."""
    load = f"--mode openloop {PAIRS} --payload 200 --spin --rate {rate}"
    return Test("open", "messages at fixed times in 100 pairs, 200 B", load, rate)


class CellError(Exception):
    """Why a cell has no figures."""


# ---- the machine


@dataclass(frozen=True)
class Cores:
    """Those that this process may use: the load generator has the last, a server the first ones."""

    usable: Sequence[int]

    @property
    def load(self) -> int:
        return self.usable[-1]

    def of(self, peer: Peer) -> Sequence[int]:
        return self.usable[: peer.processes]

    def are_shared(self, peer: Peer) -> bool:
        """Does the server run on the generator's core too? Then only its CPU time and memory mean something."""
        return peer.processes >= len(self.usable)


def _busy_s(cores: Sequence[int]) -> tuple[float, float]:
    """Seconds that these cores were busy and, in a virtual machine, were not given to us."""
    busy = stolen = 0
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields[:8])
            busy += user + nice + system + irq + softirq
            stolen += steal
    return busy / HERTZ, stolen / HERTZ


def _tree(pid: int) -> list[int]:
    """A process, its children, and theirs."""
    found, waiting = [], [pid]
    while waiting:
        process = waiting.pop()
        found.append(process)
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            waiting += map(int, children.read_text(encoding="ascii").split())
    return found


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores to use, {gib:.0f} GiB, Linux {platform.release()}"


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


# ---- one cell


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """An interruption waits for the end of this: a server that was just started is known before anything is raised."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


class Server:
    """A peer's process, in a session of its own, on its cores, within the context. Leaving it ends all it started.

    Raises:
        CellError: it does not serve
    """

    def __init__(self, peer: Peer, cores: Sequence[int], logs: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._peer = peer
        self._cores = cores
        self._log = logs / f"{peer.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            with _undisturbed():
                self._process = self._start()
            deadline = time.monotonic() + START_S
            while not self._answers():
                if self._process.poll() is not None:
                    raise CellError(f"ended with {self._process.returncode} before it served: see {self._log}")
                if time.monotonic() > deadline:
                    raise CellError(f"did not serve within {START_S:.0f} s: see {self._log}")
                time.sleep(0.02)
        except BaseException:
            self._end()
            raise
        return self

    def _start(self) -> subprocess.Popen[bytes]:
        command = [word.replace("{port}", str(self.port)) for word in self._peer.command]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", PIN, ",".join(map(str, self._cores)), *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | self._peer.env,
                start_new_session=True,
            )  # fmt: skip

    def __exit__(self, *_: object) -> None:
        self._end()

    def _answers(self) -> bool:
        if self._peer.says and self._peer.says not in self._log.read_text(encoding="utf-8", errors="replace"):
            return False
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                return self._peer.name == "limit" or bool(connection.recv(1))  # limit just closes
        except OSError:
            return False

    def processes(self) -> list[int]:
        return _tree(self._process.pid) if self._process else []

    def _end(self) -> None:
        if self._process is None:
            return
        with _undisturbed():
            for number in (signal.SIGTERM, signal.SIGKILL):
                if self._process.poll() is None:
                    os.killpg(self._process.pid, number)  # its own session: nobody else is in that group
                try:
                    self._process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    continue
                return


def _figures(said: dict[str, Any], spent: tuple[float, float]) -> dict[str, Any]:
    """What is kept of sigload's report. `spent`: seconds that all cores were busy and stolen meanwhile."""
    server, load, latency = said["server"], said["gen"], said["lat_us"]
    return {
        "per_s": said["cycles_per_s" if said["mode"] == "churn" else "deliveries_per_s"],
        "sent_per_s": said["msgs_per_s"],
        "us_per_unit": server["us_per_unit"],
        "server_cpu_pct": server["cpu_pct"],
        "load_cpu_pct": load["cpu_pct"],
        "kib_per_connection": server["kib_per_conn"],
        "mib_before": round(server["rss_start_kib"] / 1024, 1),
        "connections": said["conns"],
        "connect_s": said["connect_s"],
        "busy_s": round(spent[0], 2),
        "stolen_s": round(spent[1], 2),
        "latency_us": {name: latency[name] for name in ("p50", "p90", "p99", "p999", "max")},
        "faults": {name: said[name] for name in FAULTS if said[name]},
    }


@dataclass(frozen=True)
class Setting:
    """For how long, and with how much."""

    rounds: int
    seconds: float
    warmup_s: float
    idle_connections: int


def measure(peer: Peer, test: Test, setting: Setting, cores: Cores) -> dict[str, Any]:
    """The figures of one cell.

    Raises:
        CellError: there are none
    """
    warmup_s = 0.0 if test.name == "idle" else setting.warmup_s
    with Server(peer, cores.of(peer), BUILD / "logs") as server:
        command = [
            str(sigload()), "--port", str(server.port), "--pin", str(cores.load),
            "--server-pid", ",".join(map(str, server.processes())),
            "--duration", str(setting.seconds), "--warmup", str(warmup_s), "--settle", str(SETTLE_S),
            "--max-connect", str(CONNECT_S), *shlex.split(test.load), *peer.load,
        ]  # fmt: skip
        if test.name == "idle":
            command += ["--conns", str(setting.idle_connections)]
        before = _busy_s(cores.usable)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False,
                timeout=2 * CONNECT_S + warmup_s + setting.seconds + 60,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise CellError("sigload did not end in time") from error
        after = _busy_s(cores.usable)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"mode"')]
    if not reports:
        raise CellError(f"sigload ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    return _figures(reports[0], (after[0] - before[0], after[1] - before[1]))


# ---- the run


class Run:
    """All cells, recorded as they come. `record`: the JSON that `page.py` reads."""

    def __init__(self, out: Path, setting: Setting, meta: dict[str, Any]) -> None:
        self._path = out / "bench.json"
        self._setting = setting
        self._cores = Cores(sorted(os.sched_getaffinity(0)))
        self.has_failed = False
        self.record: dict[str, Any] = {
            "meta": meta | {"state": "running", "setting": asdict(setting), "machine": machine(), "commit": _commit()},
            "cells": [],
        }
        out.mkdir(parents=True, exist_ok=True)

    def save(self, state: str) -> None:
        """Whole or not at all."""
        self.record["meta"]["state"] = state
        self.record["meta"]["ended"] = time.strftime("%Y-%m-%d %H:%M")
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._path)

    def run(self, peers: Sequence[Peer], tests: Sequence[Test], rates: Sequence[int]) -> None:
        """Interrupted by KeyboardInterrupt, it has saved every cell that was done."""
        for number in range(self._setting.rounds):
            turn = number * 3 % len(peers)  # not always the same one first
            order = [*peers[turn:], *peers[:turn]]
            for test in tests:
                if test.name == "idle" and number:
                    continue  # memory needs no repetition
                for peer in order:
                    self._cell(peer, test, number)
            self._open_loop([peer for peer in order if not self._cores.are_shared(peer)], rates, number)

    def _open_loop(self, peers: Sequence[Peer], rates: Sequence[int], number: int) -> None:
        """Rising rates, each peer until it does not keep up."""
        for rate in sorted(rates):
            rising = []
            for peer in peers:
                cell = self._cell(peer, open_loop(rate), number)
                if "failed" not in cell and not page.is_saturated(cell):
                    rising.append(peer)
            peers = rising

    def _cell(self, peer: Peer, test: Test, number: int) -> dict[str, Any]:
        cell: dict[str, Any] = {"test": test.name, "peer": peer.name, "round": number, "rate": test.rate}
        cell["is_shared"] = self._cores.are_shared(peer)
        try:
            cell |= measure(peer, test, self._setting, self._cores)
        except CellError as error:
            cell["failed"] = str(error)
        self.record["cells"].append(cell)
        # above what it can do a server may lose what is still on its way when the run ends
        if "failed" in cell or (cell["faults"] and not (test.rate and page.is_saturated(cell))):
            self.has_failed = True
        self.save("running")
        print(_line(cell), flush=True)
        return cell


def _line(cell: dict[str, Any]) -> str:
    name = f"{cell['test']}@{cell['rate']}" if cell["rate"] else cell["test"]
    head = f"[{cell['round'] + 1}] {name:13} {cell['peer']:15}"
    if "failed" in cell:
        return f"{head} FAILED: {cell['failed']}"
    faults = "".join(f"  {name} {count}" for name, count in cell["faults"].items())
    if cell["test"] == "idle":
        return f"{head} {cell['kib_per_connection']:10.2f} KiB/connection{faults}"
    return (
        f"{head} {cell['per_s']:10,.0f}/s {cell['us_per_unit']:8.2f} us CPU"
        f"  p50 {cell['latency_us']['p50']:8,.0f} us  p99 {cell['latency_us']['p99']:8,.0f} us{faults}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.run", description="Benchmark of signaling servers.")
    parser.add_argument("--full", action="store_true", help="everything; writes docs/benchmarks.md")
    parser.add_argument("--peers", default="", help="only these; see --list", metavar="A,B")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="one more; {port} in it")
    parser.add_argument("--tests", default="", help="only these; `open` is the open loop", metavar="A,B")
    parser.add_argument("--rates", default="", help="of the open loop, messages/s", metavar="A,B")
    parser.add_argument("--rounds", type=int, help="default 1, --full 3")
    parser.add_argument("--seconds", type=float, help="of each measurement; default 1, --full 3")
    parser.add_argument("--connections", type=int, default=5000, help="idle ones; default 5000")
    parser.add_argument("--note", default="", help="a sentence for the page: what else ran, say")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of bench.json; default build")
    parser.add_argument("--list", action="store_true", help="say which peers and tests there are")
    return parser.parse_args()


def _chosen(names: str, among: Sequence[str], what: str) -> list[str]:
    """Those named, or all.

    Raises:
        SystemExit: one is unknown
    """
    wanted = [name for name in names.split(",") if name] or list(among)
    if unknown := sorted(set(wanted) - set(among)):
        sys.exit(f"no such {what}: {', '.join(unknown)}; there are {', '.join(among)}")
    return [name for name in among if name in wanted]


def _arguments(given: Sequence[str]) -> str:
    """What changes the figures, as it is given to make: not where they are written."""
    kept = []
    words = iter(given)
    for word in words:
        if word == "--out":
            next(words, None)
        elif word != "--full" and not word.startswith("--out="):
            kept.append(word)
    return shlex.join(kept)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Exit codes: 0 all measured, 1 a cell failed or messages were lost, 130 interrupted."""
    options = _options()
    signal.signal(signal.SIGTERM, _terminate)
    print("fastsig: setting up the peers in build/bench", flush=True)
    found, missing = gather(may_download=options.full)
    for name, _, command in (text.partition("=") for text in options.peer):
        found.append(Peer(name, f"`{command}`", shlex.split(command)))
    for name, reason in missing.items():
        print(f"fastsig: without {name}: {reason}", flush=True)
    names = [peer.name for peer in found]
    if options.list:
        print("peers:", *names, "\ntests:", *(test.name for test in TESTS), "open")
        return 0
    chosen = _chosen(options.peers, [*names, *missing], "peer")
    is_brief = not (options.full or options.peers)
    peers = [peer for peer in found if peer.name in chosen and not (is_brief and peer.name in NOT_QUICK)]
    wanted = _chosen(options.tests, [*(test.name for test in TESTS), "open"], "test")
    rates = [int(rate) for rate in options.rates.split(",") if rate] or (FULL_RATES if options.full else QUICK_RATES)
    setting = Setting(
        options.rounds or (3 if options.full else 1),
        options.seconds or (3.0 if options.full else 1.0),
        1.0 if options.full else 0.3,
        options.connections,
    )
    meta = {
        "kind": "full" if options.full else "quick", "command": "make bench-full" if options.full else "make bench",
        "arguments": _arguments(sys.argv[1:]), "note": options.note, "missing": missing,
        "peers": {peer.name: peer.about for peer in peers},
        "tests": {test.name: {"title": test.title, "load": test.load} for test in (*TESTS, open_loop(0))},
    }  # fmt: skip
    run = Run(options.out, setting, meta)
    tests = [test for test in TESTS if test.name in wanted]
    try:
        run.run(peers, tests, rates if "open" in wanted else ())
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what there is gets written
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        run.save("interrupted")
        print(f"fastsig: interrupted after {len(run.record['cells'])} cells, which are kept", flush=True)
    else:
        run.save("complete")
    is_complete = run.record["meta"]["state"] == "complete"
    pages = [options.out, *([ROOT / "docs"] if options.full and is_complete else [])]
    for folder in pages:
        print(f"fastsig: see {page.write(run.record, folder)}", flush=True)
    if not is_complete:
        return 130
    return 1 if run.has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
