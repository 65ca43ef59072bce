"""Fuzzing with libFuzzer, AddressSanitizer and UBSan: `make fuzz SECONDS=60`, for an hour `make fuzz SECONDS=3600`.

| target | what it gets | what must hold |
|---|---|---|
| scan | any bytes as a message | both variants of `_scan.h` find what `scan_oracle.c` finds |
| frames | scripts of three strangers at one worker | see `frames` |
| mesh | scripts of another worker that went mad | see `mesh` |

All targets run at once, one process each. Everything is made in build/fuzz. What was worth keeping of earlier runs is
in build/fuzz/corpus, the part of it that everybody gets in tests/fuzz/corpus (`--merge` writes that anew). A finding
fails the run and is kept in build/fuzz/findings:

    python -m tests.fuzz --targets frames --input build/fuzz/findings/frames-crash-…

tests/unit/test_fuzz_corpus.py runs the kept inputs without a fuzzer, so what was found once stays mended.
Needs clang with its runtime (Debian 12: clang libclang-rt-14-dev).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
HERE: Final = Path(__file__).parent
BUILD: Final = ROOT / "build" / "fuzz"
FINDINGS: Final = BUILD / "findings"
TARGETS: Final = ("scan", "frames", "mesh")
SANITIZERS: Final = "address,undefined"
FLAGS: Final = ("-g", "-O2", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror", "-Ifastsig")
MOST_BYTES: Final = {"scan": 1024, "frames": 160, "mesh": 250}  # of an input
MOST_MIB: Final = 1500  # of a process: what grows for ever is a finding
GRACE_S: Final = 120  # for start, and the end of the last input


@dataclass
class Run:
    """One process of a fuzzer."""

    target: str
    process: subprocess.Popen[bytes]
    log: Path

    def figure(self, name: str) -> int:
        """The last that the log says of it; 0 for nothing."""
        found = re.findall(rf"\b{name}:\s*(\d+)", self.log.read_text(errors="replace"))
        return int(found[-1]) if found else 0

    def report(self) -> str:
        """A line of figures; `edges`: how much of the code was reached."""
        executions, each_s = self.figure("number_of_executed_units"), self.figure("average_exec_per_sec")
        messages = f" ({count:,} messages)" if (count := self.figure("fastsig: messages")) else ""
        verdict = "no finding" if self.process.returncode == 0 else f"FAILED, see {self.log.relative_to(ROOT)}"
        figures = f"{executions:>11,} executions {each_s:>8,}/s {self.figure('cov'):>6} edges"
        return f"{self.target:7} {figures}  {verdict}{messages}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=int, default=60, help="how long each target runs")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--jobs", type=int, default=1, help="processes per target")
    parser.add_argument("--input", type=Path, help="run this one only")
    parser.add_argument("--merge", action="store_true", help="write tests/fuzz/corpus anew from build/fuzz/corpus")
    options = parser.parse_args(arguments)
    build()
    if options.merge:
        for target in options.targets:
            merge(target)
        return 0
    if options.input:
        return subprocess.call([*command(options.targets[0]), options.input], env=environment(options.targets[0]))
    return fuzz(options.targets, options.seconds, options.jobs)


def build() -> None:
    """The two programs, and the extension for the second."""
    if not shutil.which("clang"):
        sys.exit("fastsig: no clang: apt-get install clang libclang-rt-14-dev")
    FINDINGS.mkdir(parents=True, exist_ok=True)
    # Only the scanner guides the fuzzer, not what judges it.
    compile_c("fuzzer-no-link,", "-c", HERE / "scan_variant.c", "-DVARIANT=scan_sse2", "-o", BUILD / "scan_sse2.o")
    portable = ("-DVARIANT=scan_portable", "-DFASTSIG_PORTABLE", "-o", BUILD / "scan_portable.o")
    compile_c("fuzzer-no-link,", "-c", HERE / "scan_variant.c", *portable)
    compile_c("", "-c", HERE / "scan_oracle.c", "-o", BUILD / "scan_oracle.o")
    compile_c("", "-c", HERE / "scan.c", "-o", BUILD / "scan.o")
    objects = (BUILD / f"scan{part}.o" for part in ("", "_oracle", "_sse2", "_portable"))
    compile_c("fuzzer,", *objects, "-o", BUILD / "scan")
    libraries = sysconfig.get_config_var("LIBDIR")
    compile_c(
        "fuzzer,", f"-I{sysconfig.get_path('include')}", HERE / "embed.c", "-rdynamic",
        f"-L{libraries}", f"-Wl,-rpath,{libraries}", f"-lpython{sysconfig.get_config_var('LDVERSION')}",
        "-o", BUILD / "embed",
    )  # fmt: skip
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-base", BUILD, "--build-lib", BUILD / "lib"],
        cwd=ROOT, check=True,
        env=os.environ | {
            "CC": "clang", "LDSHARED": "clang -shared", "FASTSIG_SANITIZE": f"fuzzer-no-link,{SANITIZERS}",
            "PYTHONDONTWRITEBYTECODE": "",
        },
    )  # fmt: skip


def compile_c(instrumentation: str, *arguments: str | Path) -> None:
    """With clang and the sanitizers."""
    subprocess.run(["clang", *FLAGS, f"-fsanitize={instrumentation}{SANITIZERS}", *arguments], cwd=ROOT, check=True)


def environment(target: str) -> dict[str, str]:
    """For a target's process. Python's own allocator would hide an object that is used after its end from ASan."""
    paths = (BUILD / "lib", ROOT, sysconfig.get_path("purelib"))
    return os.environ | {
        "FASTSIG_FUZZ_TARGET": f"tests.fuzz.{target}",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONMALLOC": "malloc",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Python frees little of what it has at its end; the rest is for speed: allocations are what takes the time.
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=8:malloc_context_size=3:max_malloc_fill_size=64",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def command(target: str) -> list[str]:
    """A target's program with what is common to all runs."""
    return [
        str(BUILD / ("scan" if target == "scan" else "embed")),
        f"-artifact_prefix={FINDINGS}/{target}-",
        f"-dict={HERE / 'json.dict'}",
        f"-max_len={MOST_BYTES[target]}",
        f"-rss_limit_mb={MOST_MIB}",
        "-timeout=20",
        "-print_funcs=0",  # their names cost seconds
        "-detect_leaks=0",
    ]


def corpora(target: str) -> tuple[Path, Path]:
    """What runs find, and what the repository has."""
    found = BUILD / "corpus" / target
    found.mkdir(parents=True, exist_ok=True)
    return found, HERE / "corpus" / target


def fuzz(targets: Sequence[str], seconds: int, jobs: int) -> int:
    """Run all at once; a line of figures each; 1 if there was a finding."""
    began = time.monotonic()
    runs = [begin(target, seconds, job) for target in targets for job in range(jobs)]
    deadline = began + seconds + GRACE_S
    for run in runs:
        try:
            run.process.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.process.wait()
    for run in runs:
        print(run.report())
    failed = [run for run in runs if run.process.returncode != 0]
    for run in failed:
        print("\n".join(run.log.read_text(errors="replace").splitlines()[-80:]))
    return 1 if failed else 0


def begin(target: str, seconds: int, job: int) -> Run:
    """Start a process that fuzzes one target."""
    log = BUILD / f"{target}-{job}.log"
    process = subprocess.Popen(
        [*command(target), f"-max_total_time={seconds}", "-print_final_stats=1", *map(str, corpora(target))],
        env=environment(target), stdout=subprocess.DEVNULL, stderr=log.open("wb"),
    )  # fmt: skip
    return Run(target, process, log)


def merge(target: str) -> None:
    """A few files that reach all that the whole corpus reaches (edges; how often is not asked), and all `seed-*`, which
    were written by hand."""
    _, kept = corpora(target)
    chosen = BUILD / "corpus" / f"{target}-merged"
    shutil.rmtree(chosen, ignore_errors=True)
    chosen.mkdir()
    with (BUILD / f"{target}-merge.log").open("wb") as log:
        subprocess.run(
            [*command(target), "-set_cover_merge=1", "-use_counters=0", str(chosen), *map(str, corpora(target))],
            env=environment(target), stdout=subprocess.DEVNULL, stderr=log, check=True,
        )  # fmt: skip
    for path in kept.iterdir():
        if not path.name.startswith("seed-"):
            path.unlink()
    seeds = {path.read_bytes() for path in kept.iterdir()}
    for path in chosen.iterdir():
        if path.read_bytes() not in seeds:
            path.rename(kept / path.name)
    print(f"{target:7} {len(list(kept.iterdir()))} inputs")


if __name__ == "__main__":
    sys.exit(main())
