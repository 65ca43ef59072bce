"""Builds the one extension, `fastsig._relay`; everything else about the package stands in pyproject.toml.

Switches, from the environment (`make` builds anew when one changes; by hand use `build_ext --force`):
FASTSIG_DEBUG=1     asserts and invariants on, no optimisation
FASTSIG_COVERAGE=1  lines can be traced, for `make coverage`
FASTSIG_ANNOTATE=1  an HTML page beside the C file shows what each line costs, for `make annotate`
FASTSIG_SANITIZE    what `-fsanitize=` takes, for `make asan` and `make fuzz`; invariants are on. Never in place: only a
                    process that has the sanitizer's runtime can import it
"""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

import picows
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG, COVERAGE, ANNOTATE = (os.environ.get(f"FASTSIG_{name}") == "1" for name in ("DEBUG", "COVERAGE", "ANNOTATE"))
SANITIZE = os.environ.get("FASTSIG_SANITIZE", "")


class BuildExt(build_ext):
    """Says in one line what is missing, before the compiler says it in fifty."""

    def run(self) -> None:
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
        if not shutil.which(compiler):
            sys.exit(f"fastsig: no C compiler ({compiler}): apt-get install gcc")
        if not any(Path(sysconfig.get_path(kind), "Python.h").exists() for kind in ("include", "platinclude")):
            sys.exit("fastsig: no Python.h: apt-get install python3-dev")
        super().run()


def compile_args() -> list[str]:
    if SANITIZE:
        return ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
    return ["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3"]


macros: list[tuple[str, str | None]] = []
if DEBUG or SANITIZE:
    macros.append(("FASTSIG_DEBUG", "1"))
if COVERAGE:
    macros += [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]

relay = Extension(
    "fastsig._relay",
    ["fastsig/_relay.pyx"],
    depends=["fastsig/_scan.h", "setup.py"],
    include_dirs=["fastsig"],
    define_macros=macros,
    extra_compile_args=compile_args(),
    extra_link_args=[f"-fsanitize={SANITIZE}"] if SANITIZE else [],
)
modules = cythonize(
    [relay],
    include_path=[str(Path(picows.__file__).parent.parent)],  # where `cimport picows.picows` finds its .pxd
    build_dir=None if COVERAGE else "build/cython",  # the coverage plugin looks for the C file beside the .pyx
    annotate=ANNOTATE,
    compiler_directives={"linetrace": COVERAGE, "auto_pickle": False, "autotestdict": False},  # nothing unused
    force=DEBUG or COVERAGE or ANNOTATE,
)
setup(ext_modules=modules, cmdclass={"build_ext": BuildExt})
