"""Has the hot path become slower? Instructions under callgrind, against a baseline that is part of the repository.

`make guard` counts and compares, `make guard-baseline` writes the baseline anew. Instructions are no nanoseconds: they
leave out caches, branches and the kernel; but they are the same every time, so that a change of a few percent is seen
at once, on a busy machine too. `make bench` has the time.

Of each scenario (`scenarios`) two numbers are held to the baseline: the instructions in our compiled relay, and those
in all, with the interpreter that runs `hub` and with picows. More than TOLERANCE more of one is a failure, which names
the functions that grew. The first depends on the compiler only and is the same to the instruction; the second also on
where the allocator puts things, so that a change anywhere may move it by a percent. A baseline says what it
was made with; where none was made with the same, the nearest one is shown and nothing fails.

Exit codes: 0 as fast as before, or not comparable; 1 slower; 3 it cannot be measured here.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from . import OPERATIONS

FOLDER: Final = Path(__file__).parent
ROOT: Final = FOLDER.parent.parent
BASELINE: Final = FOLDER / "baseline.json"
TOLERANCE: Final = 0.03
NAMED: Final = 3  # functions in a failure
LEAST_SHARE: Final = 0.002  # of a scenario's instructions: functions below are kept together, as OTHERS
OTHERS: Final = "(all smaller ones)"
RELAY: Final = "fastsig/_relay"
TIME_S: Final = 300


class UnmeasurableError(Exception):
    """Something is missing here; the text says what."""


@dataclass(frozen=True)
class Cost:
    """Instructions of one function. `inclusive`: with those of what it calls; recursion is counted once."""

    exclusive: int
    inclusive: int


@dataclass(frozen=True)
class Count:
    """Instructions of one scenario: in the relay, in all, and by function, as `object:function`."""

    relay: int
    all: int
    functions: dict[str, Cost]


# ---- counting


def count(folder: Path, python: str = sys.executable) -> dict[str, Count]:
    """Run all scenarios under callgrind; by name. `folder`: for its files, of which older ones go.

    The same folder each time: its name is in the arguments, and what is in memory there moves all else.
    Raises UnmeasurableError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("out*"):
        old.unlink()
    library = _marks(folder)
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise UnmeasurableError("no valgrind: apt-get install valgrind")
    command = [
        valgrind, "-q", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder}/out",
        python, "-m", "loadtest.guard.scenarios", str(library),
    ]  # fmt: skip
    # Nothing of the caller's environment: it moves the stack, and libc takes its functions by what the CPU can do.
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}
    scenarios = [python, "-m", "loadtest.guard.scenarios"]
    for arguments in (scenarios, command):  # first without: it checks itself, and writes the bytecode
        run = subprocess.run(
            arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIME_S, check=False
        )
        if run.returncode != 0:
            raise UnmeasurableError(f"{shlex.join(arguments)} ended with {run.returncode}:\n{run.stderr[-2000:]}")
    dumps = [parse(path.read_text(encoding="utf-8", errors="replace")) for path in folder.glob("out.*")]
    found: dict[str, Count] = {}
    for name, this in sorted(dumps, key=lambda dump: (dump[0], dump[1].all, dump[1].relay)):
        if name:
            found.setdefault(name, this)  # the fewest of several: see `scenarios.REPEATS`
    if not found:
        raise UnmeasurableError("callgrind wrote nothing")
    return found


def _marks(folder: Path) -> Path:
    """The library with the marks that callgrind heeds; a few lines, so it is compiled each time."""
    library = folder / "marks.so"
    run = subprocess.run(
        [*_compiler(), "-O2", "-shared", "-fPIC", "-o", str(library), str(FOLDER / "marks.c")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode != 0:
        raise UnmeasurableError(f"the marks do not compile (apt-get install valgrind has the header):\n{run.stderr}")
    return library


def parse(text: str) -> tuple[str, Count]:
    """One file of callgrind: the mark that wrote it (empty: the end of the program), and what it counts.

    The format: https://valgrind.org/docs/manual/cl-format.html. Names are given a number where they occur first; a
    line below `calls=` is what that call cost, with all that it called.
    """
    trigger = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
    names: dict[tuple[str, str], str] = {}
    exclusive: dict[str, int] = {}
    called: dict[str, int] = {}
    objects: dict[str, str] = {"ob": "", "cob": ""}
    function = callee = ""
    is_call = False
    for line in text.splitlines():
        if match := re.match(r"(ob|cob|fn|cfn)=(?:\((\d+)\))?\s*(.*)$", line):
            key, number, name = match.groups()
            kind = key[-2:]
            if number and name:
                names[kind, number] = name
            name = name or names[kind, number]
            if kind == "ob":
                objects[key] = name
            elif key == "fn":
                function = _label(objects["ob"], name)
            else:
                callee = _label(objects["cob"] or objects["ob"], name)
                objects["cob"] = ""  # holds for one call
        elif line.startswith("calls="):
            is_call = True
        elif re.match(r"[+*\-\d]\S* \d+$", line):
            cost = int(line.split()[1])
            if not is_call:
                exclusive[function] = exclusive.get(function, 0) + cost
            elif callee != function:
                called[function] = called.get(function, 0) + cost
            is_call = False
    total = sum(exclusive.values())
    functions = {
        name: Cost(cost, min(total, cost + called.get(name, 0)))
        for name, cost in sorted(exclusive.items(), key=lambda item: -item[1])
    }
    relay = sum(cost for name, cost in exclusive.items() if name.startswith(RELAY))
    return trigger[1].strip() if trigger else "", Count(relay, total, functions)


def _label(path: str, function: str) -> str:
    """`object:function`, without folders and depth of recursion ('2); ours without what Cython puts before it."""
    function = re.sub(r"'\d+$", "", function)
    if "/fastsig/_relay" in path:
        return f"{RELAY}:{re.sub(r'^__pyx_[a-z]+_7fastsig_6_relay_', '', function)}"
    return f"{Path(path).name.partition('.')[0]}:{function}"


# ---- what it was measured with


def made_with() -> dict[str, str]:
    """All that the numbers depend on besides our code."""
    flags = shlex.split(os.environ.get("CFLAGS", ""))
    asked = subprocess.run(
        [*_compiler(), *flags, "-dM", "-E", "-"], input="", capture_output=True, text=True, check=True
    )
    is_sse2 = "#define __SSE2__ " in asked.stdout and "#define FASTSIG_PORTABLE" not in asked.stdout
    if os.environ.get("FASTSIG_DEBUG") == "1":
        flags.append("FASTSIG_DEBUG")
    version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "compiler": _built_by() + "".join(f" {flag}" for flag in flags),
        "path": f"{platform.machine()}, {'SSE2' if is_sse2 else 'portable'}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "python_built": f"{platform.python_compiler()} {' '.join(_code_flags())}",
        "picows": metadata.version("picows"),
        "Cython": metadata.version("Cython"),
        "libc": " ".join(platform.libc_ver()),
        "cpu": _cpu(),
        "valgrind": version,
    }


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]


def _code_flags() -> list[str]:
    """Of those that Python was compiled with, and passes on to extensions: what changes the code; no folders."""
    flags = shlex.split(sysconfig.get_config_var("CFLAGS") or "")
    return sorted({flag for flag in flags if re.match(r"-(O|f|m|D)", flag) and "/" not in flag})


def _cpu() -> str:
    """What libc and picows choose their functions by."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return " ".join(flag for flag in ("avx", "avx2", "erms") if flags and flag in flags[1].split()) or "plain"


def _built_by() -> str:
    """What the compiler of the extension wrote into it (section .comment), not what is installed now."""
    (extension,) = (ROOT / "fastsig").glob("_relay.*.so")
    found = re.findall(rb"(?:GCC: |clang version )[ -~]+", extension.read_bytes())
    return found[-1].decode() if found else "unknown"


# ---- comparing


def compare(before: Mapping[str, Count], now: Mapping[str, Count], tolerance: float = TOLERANCE) -> list[str]:
    """What became worse, in sentences with the functions that grew; empty: nothing did."""
    failures = [f"{name}: in the baseline, but not measured" for name in before.keys() - now.keys()]
    failures += [f"{name}: not in the baseline: make guard-baseline" for name in now.keys() - before.keys()]
    for name in sorted(before.keys() & now.keys()):
        was, is_now = before[name], now[name]
        for part, old, new in (("in the relay", was.relay, is_now.relay), ("in all", was.all, is_now.all)):
            if new > old * (1 + tolerance):
                grown = growth(was, is_now, of_relay=part == "in the relay")
                failures.append(f"{name}: {_percent(old, new)} instructions {part} ({old:,} → {new:,}): {grown}")
    return failures


def growth(was: Count, now: Count, *, of_relay: bool) -> str:
    """The functions that account for most of what was added, the worst first, by what they execute themselves."""
    now = from_json(to_json({"": now}))[""]  # as in the baseline: small ones would all be new
    names = was.functions.keys() | now.functions.keys()
    none = Cost(0, 0)
    grown = []
    for name in names:
        old, new = was.functions.get(name, none), now.functions.get(name, none)
        if new.exclusive > old.exclusive and name != OTHERS and (name.startswith(RELAY) or not of_relay):
            grown.append((new.exclusive - old.exclusive, name, old, new))
    grown.sort(key=lambda item: (-item[0], item[1]))
    return "; ".join(
        f"{name} +{more:,} itself" + (f" ({_percent(old.exclusive, new.exclusive)})" if old.exclusive else " (new)")
        + f", {new.inclusive - old.inclusive:+,} with what it calls"
        for more, name, old, new in grown[:NAMED]
    )  # fmt: skip


def _percent(old: int, new: int) -> str:
    return f"{100 * (new / old - 1):+.1f} %".replace("-0.0", "+0.0") if old else "new"


# ---- the baseline


def load(path: Path) -> list[dict[str, Any]]:
    """One entry for each machine that one was made on."""
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return entries


def nearest(entries: Sequence[Mapping[str, Any]], made: Mapping[str, str]) -> tuple[Mapping[str, Any], list[str]]:
    """The entry with the fewest differences, and those in words; none is what makes it comparable."""

    def differences(entry: Mapping[str, Any]) -> list[str]:
        was = entry["made_with"]
        return [f"{key} {was.get(key)} → {made.get(key)}" for key in sorted(was.keys() | made.keys())
                if was.get(key) != made.get(key)]  # fmt: skip

    best = min(entries, key=lambda entry: len(differences(entry)))
    return best, differences(best)


def to_json(counts: Mapping[str, Count]) -> dict[str, Any]:
    """As it stands in the baseline; small functions are put together."""
    scenarios = {}
    for name, this in counts.items():
        kept = {key: [cost.exclusive, cost.inclusive] for key, cost in this.functions.items()
                if cost.exclusive >= LEAST_SHARE * this.all or key.startswith(RELAY)}  # fmt: skip
        rest = this.all - sum(cost[0] for cost in kept.values())
        scenarios[name] = {"relay": this.relay, "all": this.all, "functions": kept | {OTHERS: [rest, rest]}}
    return scenarios


def from_json(scenarios: Mapping[str, Any]) -> dict[str, Count]:
    """The other way round."""
    return {
        name: Count(this["relay"], this["all"], {key: Cost(*cost) for key, cost in this["functions"].items()})
        for name, this in scenarios.items()
    }


def save(counts: Mapping[str, Count], made: Mapping[str, str], path: Path) -> None:
    """In place of the one that was made with the same, or beside the others; a function a line."""
    entries = [entry for entry in load(path) if entry["made_with"] != made]
    entries.append({"made_with": dict(made), "scenarios": to_json(counts)})
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    path.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n", encoding="utf-8")


# ---- for people


def table(before: Mapping[str, Count], now: Mapping[str, Count], operations: int) -> str:
    """Instructions of one operation, and how many that is more than in the baseline."""
    rows = [["per operation", "relay", "", "all", ""]]
    for name, this in now.items():
        was = before.get(name)
        rows.append([
            name, f"{this.relay / operations:,.0f}", _percent(was.relay, this.relay) if was else "new",
            f"{this.all / operations:,.0f}", _percent(was.all, this.all) if was else "new",
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _show(counts: Mapping[str, Count], most: int) -> None:
    for name, this in counts.items():
        print(f"\n{name}: {this.all:,} instructions")
        for function, cost in list(this.functions.items())[:most]:
            print(f"  {cost.exclusive:12,} itself {cost.inclusive:12,} with what it calls  {function}")


def main(words: Sequence[str], baseline: Path = BASELINE) -> int:
    """Measure, then compare or save, as the command line says; the exit code."""
    parser = argparse.ArgumentParser(description="Count the instructions of the hot path, and compare.")
    parser.add_argument("--save", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument("--functions", type=int, default=0, metavar="N", help="show the N most costly of each scenario")
    arguments = parser.parse_args(words)
    try:
        counts = count(ROOT / "build" / "guard")
    except UnmeasurableError as error:
        print(f"fastsig: {error}", file=sys.stderr)
        return 3
    made = made_with()
    if arguments.functions:
        _show(counts, arguments.functions)
    if arguments.save:
        save(counts, made, baseline)
        print(f"fastsig: {os.path.relpath(baseline)} is as it is now: {'; '.join(made.values())}")
        return 0
    entries = load(baseline)
    if not entries:
        print("fastsig: there is no baseline: make guard-baseline", file=sys.stderr)
        return 3
    entry, differences = nearest(entries, made)
    before = from_json(entry["scenarios"])
    print(table(before, counts, OPERATIONS))
    failures = compare(before, counts)
    for failure in failures:
        print(f"{'not judged' if differences else 'SLOWER'}: {failure}")
    if differences:
        print(f"no baseline was made with the same, nothing fails; the nearest: {'; '.join(differences)}")
    return 1 if failures and not differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
