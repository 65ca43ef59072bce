"""What is shown of a server, and where its socket is. The socket itself is in tests/e2e."""

import os
import re
from pathlib import Path

import msgspec
import pytest

from fastsig import metrics, status
from fastsig.status import Process, Status, UnusableError, WorkerStatus

STAT = "4712 (py) (3.11) x) S 1 4712 4712 0 -1 4194560 900 0 0 0 1250 250 0 0 20 0 1 0 36000 60000000 9000 1 2 3"
NOTHING = metrics.summary([0] * metrics.WORDS)


def _worker(slot: int, pid: int | None, cpu_seconds: float = 0.0, **counters: int) -> WorkerStatus:
    process = None if pid is None else Process(1e9, cpu_seconds, 64 << 20)
    return WorkerStatus(slot, 2, pid, process, NOTHING | counters)


def _server(*workers: WorkerStatus) -> Status:
    return Status("1.2.3", 4711, ["ws://a/ws", "ws://b/ws"], 1e9, list(workers))


def test_process_is_read_from_what_the_kernel_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_TICKS_PER_S", 100)
    monkeypatch.setattr(status, "_PAGE_BYTES", 4096)
    found = status.parse_process(STAT, "15000 9000 3000 1 0 5000 0\n", booted_at=1000.0)
    assert found == Process(started_at=1360.0, cpu_seconds=15.0, memory_bytes=9000 * 4096)


def test_this_process_is_found_and_one_that_has_gone_is_not(tmp_path: Path) -> None:
    found = status.read_process(os.getpid())
    assert found is not None and found.memory_bytes > 1 << 20 and found.started_at > 1e9
    assert status.read_process(1, proc=tmp_path) is None


def test_folder_is_the_first_that_is_named() -> None:
    environ = {"XDG_RUNTIME_DIR": "/run/user/7"}
    assert status.folder("/x", environ) == Path("/x")
    assert status.folder("", environ) == Path("/run/user/7/fastsig")
    for value in ({}, {"XDG_RUNTIME_DIR": ""}, {"XDG_RUNTIME_DIR": "relative"}):
        assert status.folder("", value).name == f"fastsig-{os.geteuid()}"


def test_folder_of_another_user_or_open_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir(0o700)
    status.check_folder(own)
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "file").touch(0o600)
    for name in ("link", "file"):
        with pytest.raises(UnusableError, match="is not a folder"):
            status.check_folder(tmp_path / name)
    own.chmod(0o750)
    with pytest.raises(UnusableError, match=r"mode 0750\): chmod 700"):
        status.check_folder(own)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UnusableError, match="another user"):
        status.check_folder(own)


def test_cpu_is_that_of_the_same_process_between_two_looks() -> None:
    before = _server(_worker(0, 10, 5.0), _worker(1, 11, 5.0), _worker(2, None))
    after = _server(_worker(0, 10, 5.25), _worker(1, 12, 0.3), _worker(2, None))
    assert [worker.cpu_percent for worker in status.with_cpu(before, after, 0.5).workers] == [50.0, None, None]


def test_table_has_a_row_for_each_slot_also_without_a_worker() -> None:
    full = _worker(
        0, 4712, connections=3, rooms=2, members=5, remote_members=4, sent_messages_total=1 << 40,
        errors_total=6, received_messages_total=9, worker_restarts_total=1,
        **{'relays_total{route="to_owner"}': 8}, received_bytes_total=1 << 20, sent_bytes_total=3 << 19,
    )  # fmt: skip
    text = status.table(_server(msgspec.structs.replace(full, cpu_percent=31.94), _worker(1, None)), now=1e9 + 11520)
    first, head, *rows = text.splitlines()
    assert first == "fastsig 1.2.3, pid 4711, up 3 h 12 min: ws://a/ws ws://b/ws"
    columns = (
        "slot  pid  generation  up since  connections  rooms  members  remote  received  sent  away  passed  errors"
        "  restarts  MiB in  MiB out  CPU %  RSS MiB"
    )
    assert re.split(r"\s{2,}", head.strip()) == columns.split("  ")
    assert re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", rows[0]).split() == [
        "0", "4712", "2", "DATE",
        "3", "2", "5", "4", "9", "1099511627776", "8", "0", "6", "1", "1.0", "1.5", "31.9", "64.0",
    ]  # fmt: skip
    assert rows[1].split() == ["1", "-", "2", "-", *["0"] * 10, "0.0", "0.0", "-", "-"]
    assert rows[2].split() == ["all", "3", "2", "5", "4", "9", "1099511627776", "8", "0", "6", "1", "1.0", "1.5"]
    assert len({len(line) for line in (head, *rows)}) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (7260, "2 h 1 min"),
        (90000, "1 d 1 h"),
        (34560000, "400 d 0 h"),
    ],
)
def test_duration_is_told_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert status.duration(seconds) == text


def test_status_of_a_server_with_very_many_slots_fits_into_an_answer() -> None:
    most = metrics.summary([(1 << 53) - 1] * metrics.WORDS)
    process = Process(1795434122.47, 123456.78, 1 << 40)
    workers = [WorkerStatus(slot, 1 << 20, 4194304, process, most) for slot in range(1024)]
    assert len(msgspec.json.encode(_server(*workers))) < status.ANSWER_BYTES
