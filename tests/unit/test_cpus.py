"""Control groups as files in a folder of our own, in the forms that machines and containers have them."""

import os
from pathlib import Path

import pytest

from fastsig import cpus

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = (
    "31 25 0:27 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw\n"
    "32 25 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:6 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 25 0:29 / /sys/fs/cgroup/cpuset rw shared:7 - cgroup cgroup rw,cpuset\n"
)


def _machine(root: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def _has_cpus(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(numbers))


def test_cpus_are_those_of_the_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _has_cpus(monkeypatch, 7, 2, 5)
    assert cpus.usable() == [2, 5, 7]
    assert cpus.count(tmp_path) == 3, "and there are no control groups to be read"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("9900000 100000\n", 8),
        ("", 8),
        ("0 0", 8),
        ("what else", 8),
    ],
)
def test_quota_of_the_group_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, count: int) -> None:
    _has_cpus(monkeypatch, *range(8))
    root = _machine(tmp_path, V2, "0::/a.slice/b.service\n", {"sys/fs/cgroup/a.slice/b.service/cpu.max": text})
    assert cpus.count(root) == count


def test_least_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a/b/c/cpu.max": "800000 100000",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000",
        "sys/fs/cgroup/a/cpu.max": "150000 50000",
    }
    assert cpus.quota(_machine(tmp_path, V2, "0::/a/b/c\n", files)) == 3.0


def test_group_of_a_container_is_at_the_top_of_its_mount(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "400000 100000"}
    assert cpus.quota(_machine(tmp_path, V2, "0::/\n", files)) == 4.0


def test_group_that_is_out_of_sight_limits_by_what_is_mounted(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "400000 100000", "sys/fs/other/cpu.max": "100000 100000"}
    assert cpus.quota(_machine(tmp_path, V2, "0::/../other\n", files)) == 4.0


def test_first_version_has_its_quota_in_two_files(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpuset/b/cpu.cfs_quota_us": "100000\n",
        "sys/fs/cgroup/cpuset/b/cpu.cfs_period_us": "100000\n",
    }
    root = _machine(tmp_path, HYBRID, "4:cpuset:/b\n3:cpu,cpuacct:/a\n0::/\n", files)
    assert cpus.quota(root) == 3.0


def test_container_of_the_first_version_sees_its_own_part_of_the_tree(tmp_path: Path) -> None:
    mounts = r"40 25 0:28 /docker/7f\040 /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu" + "\n"
    files = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    assert cpus.quota(_machine(tmp_path, mounts, "3:cpu:/docker/7f \n", files)) == 2.0


@pytest.mark.parametrize("mounts", ["", "\n", "x\n", "30 23 0:26 / - cgroup2\n", " - cgroup2 cgroup2 rw\n"])
def test_mounts_that_nobody_understands_limit_nothing(tmp_path: Path, mounts: str) -> None:
    assert cpus.quota(_machine(tmp_path, mounts, "0::/\nnonsense\n", {})) == float("inf")


def test_this_machine_has_a_cpu() -> None:
    assert 1 <= cpus.count() <= len(cpus.usable())
