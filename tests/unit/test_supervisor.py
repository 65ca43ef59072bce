"""What can be asked of the supervisor without a process; all else is in tests/e2e."""

import pytest

from fastsig import cpus, supervisor
from fastsig.config import Config, build


def test_workers_are_as_many_as_asked_for_or_one_per_usable_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "count", lambda: 7)
    assert supervisor.slot_count(Config()) == 7
    assert supervisor.slot_count(build({"server.workers": 3})) == 3
