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


@pytest.mark.parametrize(("kind", "id", "is_understood"), [(64, 64, True), (64, 65, False), (65, 64, False)])
async def test_message_of_another_worker_keeps_the_limits_of_a_message(kind: int, id: int, is_understood: bool) -> None:  # noqa: FBT001
    """Found by `mesh`: what is written of a longer `id` went beyond a buffer on the stack."""
    worker = mesh.Worker()
    worker._link()
    head = bytes(8) + bytes([kind, id, 0, 0]) + b"\xff" * 4 + bytes(4)
    worker._hear(mesh.packed(1, head + b"x-".ljust(kind, b"x") + b"\1" * id))
    assert worker._way.is_closed is not is_understood


def test_messages_of_the_corpus_are_judged_as_the_oracle_does() -> None:
    verdicts = {assert_judged_alike(data) for data in inputs("scan")}
    assert verdicts == {"ok", "bad_utf8", "bad_json", "bad_message", "too_large"}


def test_corpus_is_small() -> None:
    """It is cloned and run by everybody: `python -m tests.fuzz --merge` writes it anew."""
    assert len(list(CORPUS.glob("*/*"))) < 300
    assert scan(b"")[0] == "bad_json"
