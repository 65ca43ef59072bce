"""ARCHITECTURE §4: a module imports only modules on earlier lines of this list (of its own line: only earlier ones)."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastsig

PACKAGE = Path(__file__).parent.parent / "fastsig"

LAYERS = (
    ("words", "errors config metrics"),  # metrics: the relay counts in words that it lays out
    ("core", "_relay faults"),
    ("pure", "protocol routing calls health limits sessions keys auth webhook proxies turn"),
    ("seen", "logs tracing"),
    ("ports", "store bus bus_messages"),
    ("domain", "admission rooms hub"),
    ("adapters", "store_redis store_postgres bus_mesh bus_redis bus_nats fetch asker"),
    ("edge", "tls entrance adoption connection passing exposition ops"),
    # status: what the supervisor answers with and the command line asks with; of the workers it knows only numbers
    ("process", "control systemd status worker cpus fleet listeners handover processes overview supervisor"),
    ("outside", "client tokens cli"),
)
ORDER = [name for _, names in LAYERS for name in names.split()]
OUTSIDE = {"__init__", "__main__"}  # the version, which all may read; the door, which none may use

_IN_CYTHON = re.compile(
    r"^\s*(?:from\s+(?:\.|fastsig\.)(?P<module>\w+)\s+c?import"
    r"|from\s+(?:\.|fastsig)\s+c?import\s+(?P<several>.+)$"
    r"|c?import\s+fastsig\.(?P<other>\w+))",
    re.MULTILINE,
)


def _modules() -> dict[str, Path]:
    files = [path for pattern in ("*.py", "*.pyx") for path in PACKAGE.glob(pattern)]
    return {path.stem: path for path in sorted(files)}


def _imports(path: Path) -> set[str]:
    """The modules of the package that this one imports, at its top or anywhere inside."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".pyx":
        found = {
            word for match in _IN_CYTHON.finditer(text) for group in match.groups("") for word in group.split(", ")
        }
        return found & set(_modules())
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("fastsig.") for alias in node.names if alias.name.startswith("fastsig.")}
        elif isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").split(".")[0] == "fastsig"):
            module = (node.module or "").removeprefix("fastsig").removeprefix(".")
            found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
    return found - {"__version__"}


def test_every_module_of_the_package_is_in_the_list() -> None:
    assert set(_modules()) - OUTSIDE <= set(ORDER)


def test_package_is_flat() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__", "static"}
    assert not folders


@pytest.mark.parametrize("module", sorted(set(_modules()) - OUTSIDE))
def test_module_imports_only_from_earlier_layers(module: str) -> None:
    allowed = set(ORDER[: ORDER.index(module)])
    assert _imports(_modules()[module]) <= allowed


def test_package_itself_imports_nothing_of_its_own() -> None:
    """Executed, not parsed: for type checkers it names the client, which it imports when somebody asks for it."""
    program = "import sys, fastsig; print(*(name for name in sys.modules if name.startswith('fastsig.')))"
    assert _output(program) == ""
    program = (
        "import sys, fastsig; fastsig.connect; print(*(name for name in sys.modules if name.startswith('fastsig.')))"
    )
    assert set(_output(program).split()) == {"fastsig.client", "fastsig.errors", "fastsig.protocol"}


def test_package_names_all_that_its_client_is_for() -> None:
    program = "import fastsig; print(*(getattr(fastsig, name).__name__ for name in fastsig._OF_CLIENT - {'Event'}))"
    assert "Room" in _output(program).split()
    assert all(hasattr(fastsig, name) and name in dir(fastsig) for name in fastsig._OF_CLIENT)
    assert not hasattr(fastsig, "nothing")


def _output(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def test_supervisor_executes_the_worker_and_never_imports_it() -> None:
    modules = _modules()
    reached, waiting = set(), ["supervisor"]
    while waiting:
        name = waiting.pop()
        if name in modules and name not in reached:
            reached.add(name)
            waiting += _imports(modules[name])
    assert "supervisor" in reached
    assert "worker" not in reached
    assert "_relay" not in reached, "the supervisor has no use for the compiled core"
