"""What the fuzzers have found worth keeping, run without a fuzzer: what they found once stays mended (tests/fuzz)."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fastsig._relay import scan
from tests.fuzz import frames, mesh

from .test_scan import assert_judged_alike

CORPUS = Path(frames.__file__).parent / "corpus"


def inputs(target: str) -> list[bytes]:
    found = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    assert found
    return found


@pytest.mark.parametrize("target", [frames.Target, mesh.Target])
async def test_scripts_of_the_corpus_harm_nobody(target: type[frames.Target | mesh.Target]) -> None:
    run: Callable[[bytes], None] = target().run
    for data in inputs(target.__module__.rpartition(".")[2]):
        run(data)


def test_messages_of_the_corpus_are_judged_as_the_oracle_does() -> None:
    verdicts = {assert_judged_alike(data) for data in inputs("scan")}
    assert verdicts == {"ok", "bad_utf8", "bad_json", "bad_message", "too_large"}


def test_corpus_is_small() -> None:
    """It is cloned and run by everybody: `python -m tests.fuzz --merge` writes it anew."""
    assert len(list(CORPUS.glob("*/*"))) < 300
    assert scan(b"")[0] == "bad_json"
