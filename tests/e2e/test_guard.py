"""The guard of the hot path: what it reads from callgrind, what it calls worse, and that it counts the same twice."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from loadtest.guard import OPERATIONS, __main__ as guard
from loadtest.guard.__main__ import Cost, Count

RECEIVE, FAN_OUT, EVAL = "fastsig/_relay:5Relay_receive", "fastsig/_relay:5Relay__fan_out", "python3:eval"
BEFORE = {
    "broadcast": Count(
        100_000, 200_000, {RECEIVE: Cost(60_000, 100_000), FAN_OUT: Cost(40_000, 40_000), EVAL: Cost(100_000, 200_000)}
    )
}
DUMP = """\
# callgrind format
desc: Trigger: Client Request: relay_200
positions: line
events: Ir

ob=(1) /somewhere/fastsig/_relay.cpython-311-x86_64-linux-gnu.so
fl=(1) ???
fn=(1) __pyx_f_7fastsig_6_relay_5Relay_receive
0 100
cob=(2) /lib/libc.so.6
cfi=(1)
cfn=(2) memcpy
calls=3 0
0 30
+4 5
cfn=(1)
calls=1 0
* 7

ob=(2)
fl=(1)
fn=(2)
0 30

ob=(3) /usr/bin/python3.11
fn=(3) eval'2
0 40
cob=(1)
cfn=(1)
calls=1 0
-2 135

totals: 175
"""


def with_more(function: str, more: int) -> dict[str, Count]:
    """As BEFORE, but for one function that executes so much more."""
    was = BEFORE["broadcast"]
    cost = was.functions.get(function, Cost(0, 0))
    functions = was.functions | {function: Cost(cost.exclusive + more, cost.inclusive + more)}
    of_relay = more if function.startswith(guard.RELAY) else 0
    return {"broadcast": Count(was.relay + of_relay, was.all + more, functions)}


def made_with(python: str) -> dict[str, str]:
    return {"compiler": "GCC 12.2", "path": "x86_64, SSE2", "python": python, "picows": "2.3.1"}


def test_four_percent_more_in_the_relay_fail_and_the_function_is_named() -> None:
    (failure,) = guard.compare(BEFORE, with_more(FAN_OUT, 4_000))
    assert failure.startswith("broadcast: +4.0 % instructions in the relay (100,000 → 104,000): ")
    assert f"{FAN_OUT} +4,000 itself (+10.0 %)" in failure
    assert RECEIVE not in failure and EVAL not in failure


def test_two_percent_more_are_no_failure_nor_is_anything_less() -> None:
    assert guard.compare(BEFORE, BEFORE) == []
    assert guard.compare(BEFORE, with_more(FAN_OUT, 2_000)) == []
    assert guard.compare(BEFORE, with_more(RECEIVE, -30_000)) == []


def test_four_percent_more_outside_the_relay_fail_too() -> None:
    (failure,) = guard.compare(BEFORE, with_more(EVAL, 8_000))
    assert "+4.0 % instructions in all" in failure and EVAL in failure


def test_function_that_is_new_is_named_as_such() -> None:
    (failure,) = guard.compare(BEFORE, with_more("fastsig/_relay:check", 5_000))
    assert "fastsig/_relay:check +5,000 itself (new)" in failure


def test_small_function_that_the_baseline_leaves_out_is_not_called_new() -> None:
    now = with_more(FAN_OUT, 4_000)["broadcast"]
    now = Count(now.relay, now.all + 100, now.functions | {"libc:small": Cost(100, 100)})
    assert "libc:small" not in guard.growth(BEFORE["broadcast"], now, of_relay=False)


def test_scenario_without_a_baseline_fails_and_one_that_is_gone_too() -> None:
    assert guard.compare({}, BEFORE) == ["broadcast: not in the baseline: make guard-baseline"]
    assert guard.compare(BEFORE, {}) == ["broadcast: in the baseline, but not measured"]


def test_costs_are_read_by_function_and_object() -> None:
    name, count = guard.parse(DUMP)
    assert name == "relay_200"
    assert count.functions == {
        RECEIVE: Cost(105, 135),  # what it calls in itself is counted once
        "libc:memcpy": Cost(30, 30),
        "python3:eval": Cost(40, 175),
    }
    assert (count.relay, count.all) == (105, 175)


def test_end_of_the_program_is_no_scenario() -> None:
    name, _ = guard.parse(DUMP.replace("Client Request: relay_200", "Program termination"))
    assert not name


def test_baseline_is_read_as_it_was_written_and_replaces_only_its_own(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    guard.save(BEFORE, made_with("3.11"), path)
    guard.save(BEFORE, made_with("3.13"), path)
    guard.save(with_more(FAN_OUT, 1), made_with("3.11"), path)
    entries = {entry["made_with"]["python"]: guard.from_json(entry["scenarios"]) for entry in guard.load(path)}
    assert entries.keys() == {"3.11", "3.13"}
    assert (entries["3.11"]["broadcast"].relay, entries["3.13"]["broadcast"].relay) == (100_001, 100_000)
    assert entries["3.13"]["broadcast"].functions[FAN_OUT] == Cost(40_000, 40_000)


def test_small_functions_are_kept_together_and_nothing_is_lost() -> None:
    tiny = {f"libc:f{number}": Cost(10, 10) for number in range(50)}
    was = BEFORE["broadcast"]
    kept = guard.from_json(guard.to_json({"x": Count(was.relay, was.all + 500, was.functions | tiny)}))["x"]
    assert kept.functions.keys() == {RECEIVE, FAN_OUT, EVAL, guard.OTHERS}
    assert kept.functions[guard.OTHERS].exclusive == 500


def test_nearest_baseline_is_taken_and_says_in_what_it_differs() -> None:
    entries: list[dict[str, Any]] = [
        {"made_with": made_with("3.11") | {"compiler": "clang 17", "picows": "2.3.2"}, "scenarios": {}},
        {"made_with": made_with("3.13"), "scenarios": {}},
    ]
    entry, differences = guard.nearest(entries, made_with("3.11"))
    assert entry is entries[1]
    assert differences == ["python 3.13 → 3.11"]
    assert guard.nearest([*entries, {"made_with": made_with("3.11")}], made_with("3.11"))[1] == []


def test_slower_is_a_failure_only_where_the_baseline_was_made_with_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "baseline.json"
    guard.save(BEFORE, made_with("3.11"), path)
    monkeypatch.setattr(guard, "count", lambda folder: with_more(FAN_OUT, 4_000))
    monkeypatch.setattr(guard, "made_with", lambda: made_with("3.11"))
    assert guard.main([], path) == 1
    said = capsys.readouterr().out
    assert "SLOWER: broadcast: +4.0 %" in said and FAN_OUT in said
    monkeypatch.setattr(guard, "made_with", lambda: made_with("3.13"))
    assert guard.main([], path) == 0
    said = capsys.readouterr().out
    assert "not judged: broadcast: +4.0 %" in said and "python 3.11 → 3.13" in said


@pytest.mark.timeout(guard.TIME_S)
def test_counts_are_the_same_twice(tmp_path: Path) -> None:
    """In the relay to the instruction; in all, the allocator may differ by a little."""
    if not shutil.which("valgrind"):
        pytest.skip("no valgrind: apt-get install valgrind")
    first, second = guard.count(tmp_path), guard.count(tmp_path)
    assert first.keys() == {"relay_200", "relay_2500", "broadcast_10", "remote_relay", "join_leave"}
    for name, count in first.items():
        assert count.relay > 1000 * OPERATIONS, "it was another code that ran"
        assert count.relay == second[name].relay
        assert abs(count.all - second[name].all) < 0.005 * count.all
        of_relay = sum(cost.exclusive for function, cost in count.functions.items() if function.startswith(guard.RELAY))
        assert of_relay == count.relay
    assert first["relay_2500"].relay > 2 * first["relay_200"].relay
    assert any("fs_read" in function for function in first["relay_2500"].functions)
