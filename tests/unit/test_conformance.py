"""What `make conformance` makes of the suite's verdicts; the suite itself is not run here."""

from pathlib import Path

import pytest

from loadtest import conformance

OK = {"behavior": "OK", "behaviorClose": "OK"}


@pytest.mark.parametrize("word", ["FAILED", "WRONG CODE", "UNCLEAN", "FAILED BY CLIENT", "UNIMPLEMENTED"])
@pytest.mark.parametrize("part", ["behavior", "behaviorClose"])
def test_one_case_that_is_not_passed_fails_the_run(part: str, word: str) -> None:
    assert len(conformance.judge({"1.1.1": OK, "7.1.2": OK | {part: word}})) == 1


def test_few_cases_may_be_non_strict() -> None:
    loose = {f"6.4.{number}": OK | {"behavior": "NON-STRICT"} for number in range(11)}
    assert conformance.judge({"1.1.1": OK, "7.1.6": dict.fromkeys(OK, "INFORMATIONAL")}) == []
    assert conformance.judge(dict(list(loose.items())[:10])) == []
    assert len(conformance.judge(loose)) == 1


def test_no_case_at_all_is_a_failure() -> None:
    assert conformance.judge({}) == ["no case was run"]


def test_without_python_2_the_cure_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHON2", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["conformance"])
    assert conformance.main() == 3
    assert "pyenv install 2.7.18" in capsys.readouterr().err
