"""How many CPUs this process may use: those of its affinity, and no more than its control groups let it have.

Only reads: the scheduler's mask, and files below `root` (the tests have others). What cannot be read limits nothing.
Must not know: what the CPUs are for.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

_ROOT: Final = Path("/")


def usable() -> list[int]:
    """The numbers of the CPUs that the scheduler may put this process on, ascending."""
    return sorted(os.sched_getaffinity(0))


def count(root: Path = _ROOT) -> int:
    """How many processes can run at once, 1 or more. Part of a CPU is none: it would be throttled over and over."""
    return max(1, int(min(len(usable()), quota(root))))


def quota(root: Path = _ROOT) -> float:
    """CPU seconds per second that the control groups of this process, and those above, allow; infinite without any."""
    return min((_quota_of(folder) for folder in _folders(root)), default=float("inf"))


def _folders(root: Path) -> Iterator[Path]:
    """Where the groups of this process that may limit its CPU time are seen, from each up to what is mounted."""
    paths = _paths(_read(root / "proc/self/cgroup"))
    for line in _read(root / "proc/self/mountinfo").splitlines():
        head, _, tail = line.partition(" - ")
        mounted, kind = head.split()[3:5], tail.split()
        if len(mounted) < 2 or len(kind) < 3 or kind[0] not in {"cgroup", "cgroup2"}:
            continue
        path = paths.get("" if kind[0] == "cgroup2" else "cpu" if "cpu" in kind[2].split(",") else "none")
        if path is not None:
            top, at = (_unescape(word) for word in mounted)
            yield from _up(root / at.lstrip("/"), _below(path, top))


def _paths(text: str) -> dict[str, str]:
    """By controller; that of version 2, which has all of them, is called "" (see cgroups(7))."""
    lines = [line.split(":", 2) for line in text.splitlines() if line.count(":") >= 2]
    return {name: path for _, names, path in lines for name in names.split(",")}


def _below(path: str, top: str) -> PurePosixPath:
    """`path` as seen in a mount that shows the tree from `top` on; in a container it may lie outside: then its top."""
    inner = PurePosixPath(path)
    if ".." in inner.parts or not inner.is_relative_to(top):
        return PurePosixPath()
    return inner.relative_to(top)


def _up(mount: Path, path: PurePosixPath) -> Iterator[Path]:
    yield mount / path
    for above in path.parents:
        yield mount / above


def _quota_of(folder: Path) -> float:
    """In version 2 `cpu.max` has quota and period, in version 1 each has its file; both in microseconds."""
    words = _read(folder / "cpu.max").split() or [
        *_read(folder / "cpu.cfs_quota_us").split(),
        *_read(folder / "cpu.cfs_period_us").split(),
    ]
    if len(words) != 2 or not all(word.isascii() and word.isdecimal() for word in words):
        return float("inf")  # "max", or -1
    quota_us, period_us = int(words[0]), int(words[1])
    return quota_us / period_us if period_us else float("inf")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _unescape(word: str) -> str:
    r"""A space in a path of mountinfo is \040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)
