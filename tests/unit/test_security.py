"""SECURITY.md: each threat has a test that there is, or a sentence; and the tests that stand nowhere else."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastsig._relay import scan

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
_NAMED = re.compile(r"`(test_\w+)\.py::(test_\w+)(?:\[([^\]]*)\])?`")


def _rows() -> list[list[str]]:
    """The cells of all rows of the tables of threats."""
    tables = PAGE.partition("## Threats")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] != "threat" and set(row[0]) != {"-"}]


def _functions(module: str) -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "tests").glob(f"*/{module}.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return found


@pytest.mark.parametrize(("module", "name"), sorted({(found[1], found[2]) for found in _NAMED.finditer(PAGE)}))
def test_every_test_that_the_page_names_exists(module: str, name: str) -> None:
    assert name in _functions(module)


def test_every_offence_that_the_page_names_exists() -> None:
    from loadtest.hostile.offences import MEMORY, OFFENCES  # noqa: PLC0415 # client code that no other test here needs

    named = {found[3] for found in _NAMED.finditer(PAGE) if found[1] == "test_offences" and found[3]}
    assert len(named) > 10
    assert named <= {name.replace("`", "") for name in {**OFFENCES, **MEMORY}}


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0][:40])
def test_every_threat_has_a_test_or_a_sentence(row: list[str]) -> None:
    threat, answer = row
    assert threat
    assert _NAMED.search(answer) or re.search(r"[A-Z].{20,}\.$", answer), answer


def test_no_threat_is_left_out() -> None:
    """13 rows about picows, 38 about others; the list in order of weight has 10."""
    assert len(_rows()) == 13 + 38 + 10


def test_picows_of_another_layout_is_refused() -> None:
    """Before 2.3.1 one frame of 14 bytes ended the process."""
    for version in ("1.20.0", "2.3.0", "2.4.0"):
        code = f"import picows; picows.__version__ = {version!r}; import fastsig._relay"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "ImportError: fastsig needs another picows" in done.stderr


def _best_s(message: bytes) -> float:
    times = []
    for _ in range(50):
        began = time.perf_counter()
        scan(message)
        times.append(time.perf_counter() - began)
    return min(times)


@pytest.mark.parametrize(
    "piece", [b"[", b'{"a":', b'"\\\\', b'"\\u0061",', b'"type":"a",', b'"recipient":["a"],', b"9", b'"a":1,', b" "]
)
def test_time_for_a_message_grows_with_its_length_and_no_faster(piece: bytes) -> None:
    # 16 times as long: 64 times as slow is a busy machine, 256 times would be quadratic
    short, long = (b'{"type":"x-a",' + piece * (size // len(piece)) for size in (4096, 65536))
    assert _best_s(long) < 16 * 4 * _best_s(short) + 0.00005
