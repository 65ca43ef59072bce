"""What docs/tokens.md tells operators to do works."""

import base64
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastsig.auth import Verifier
from fastsig.config import OPTIONS, Auth
from fastsig.metrics import TOKENS

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
