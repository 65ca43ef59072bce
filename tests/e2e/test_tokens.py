"""What docs/tokens.md tells operators to do works."""

import base64
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from websockets.sync.client import connect

from fastsig import tokens
from fastsig.auth import Verifier
from fastsig.config import OPTIONS, Auth
from fastsig.metrics import TOKENS
from tests.e2e.conftest import Server, until

PAGE = (Path(__file__).parents[2] / "docs" / "tokens.md").read_text(encoding="utf-8")
SECRET = base64.b64encode(b"\xfb\xff" * 16).decode()


@pytest.mark.parametrize(("language", "command"), [("python", [sys.executable, "-c"]), ("js", ["node", "-e"])])
def test_program_of_the_page_makes_a_good_token(language: str, command: list[str]) -> None:
    (program,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    made = subprocess.run(
        [*command, program], env={"SIGNAL_SECRET": SECRET, "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grant = Verifier(Auth(keys=(f"secret-b64:{SECRET}",))).check(made.stdout.strip(), time.time())
    assert (grant.subject, grant.rooms) == ("alice", ("lobby",))
    assert grant.issued_at is not None and grant.expires_at == grant.issued_at + 3600


def test_page_names_every_result_and_no_option_that_is_none() -> None:
    for result in TOKENS:
        assert f"`{result}`" in PAGE
    for name in re.findall(r"`auth\.(\w+)`", PAGE):
        assert f"auth.{name}" in {option.key for option in OPTIONS}


def _token(key: Path, sub: str) -> str:
    claims = {"sub": sub, "exp": time.time() + 60}
    return tokens.create(Auth(), claims, key=str(key), kid="")


def _join(server: Server, token: str) -> str:
    """What a join with this token is answered: `joined`, or the code of the error."""
    with connect(server.url, proxy=None) as websocket:
        websocket.send(json.dumps({"type": "join", "room": "r", "payload": {"token": token}}))
        answer = json.loads(websocket.recv(5))
        return str(answer.get("code") or answer["type"])


def test_key_file_is_read_anew_at_sighup_and_one_that_is_unusable_changes_nothing(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    used, old, new = tmp_path / "used.pem", tmp_path / "old.pem", tmp_path / "new.pem"
    for key in (old, new):
        tokens.generate("ed25519", str(key))
    used.write_bytes(Path(f"{old}.pub").read_bytes())
    server = serve("--auth.required", "--auth.keys", str(used))
    assert (_join(server, _token(old, "a")), _join(server, _token(new, "b"))) == ("joined", "unauthorized")
    used.write_bytes(Path(f"{new}.pub").read_bytes())
    server.process.send_signal(signal.SIGHUP)
    until(lambda: _join(server, _token(new, "b")) == "joined", "the new key is not used")
    assert _join(server, _token(old, "a")) == "unauthorized"
    used.write_text("no key", encoding="utf-8")
    server.process.send_signal(signal.SIGHUP)
    assert f"auth.keys, item 1 ({used}): it is neither PEM nor JWK" in server.wait_for("reload_refused")["reason"]
    assert _join(server, _token(new, "b")) == "joined"
    assert not [line for line in server.stderr_lines() if "eyJ" in line], "no token in the log"
