"""Chromium, from Debian, at a server that requires tokens: a page reads why it is refused, and does not ask for ever.

A page cannot see the answer to a handshake that fails, and it names the subprotocol that carries its token. Pages
connect with the code that docs/client.md gives to whoever writes one.
"""

import contextlib
import functools
import re
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from fastsig import status
from tests.e2e.conftest import Server

SECRET = "0123456789abcdef0123456789abcdef"
CLIENT = Path(__file__).parents[2] / "docs" / "client.md"
FLAGS = (  # as root there is no sandbox; the others keep it from asking hosts elsewhere
    "--no-sandbox", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-gpu",
)  # fmt: skip
PLAY = """async ([program, url, tokens, room]) => {
  const connect = new Function(program + "; return connect")();
  const story = { opened: 0, protocol: null, heard: [], asked: 0, code: null };
  await new Promise((done) => connect(url, async () => tokens[Math.min(story.asked++, tokens.length - 1)], {
    open: (socket) => {
      story.opened++;
      story.protocol = socket.protocol;
      socket.send(JSON.stringify({ type: "join", room }));
    },
    message: (message) => { story.heard.push(message); if (message.type === "joined") done(); },
    end: (code) => { story.code = code; done(); },
  }));
  return story;
}"""


class _Empty(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<!doctype html>")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no Chromium: apt-get install --no-install-recommends chromium")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=list(FLAGS)) as one:
        yield one


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port of a server with one empty page."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Empty) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, site: int) -> Iterator[Server]:
    """Requires tokens, and lets pages of `localhost` connect: those of 127.0.0.1 are of another origin."""
    options = ("--auth.required", "--auth.keys", f"secret:{SECRET}", "--server.origins", f"http://localhost:{site}")
    server = Server(*options, cwd=tmp_path_factory.mktemp("guarded"))
    try:
        server.wait_for("serving")
        yield server
    finally:
        assert server.stop() == 0


@functools.cache
def documented() -> str:
    (program,) = re.findall(r"```js run\n(.*?)```", CLIENT.read_text(encoding="utf-8"), re.DOTALL)
    return str(program)


def mint(subject: str, *, ttl_s: float = 600.0) -> str:
    return jwt.encode({"sub": subject, "exp": time.time() + ttl_s}, SECRET, algorithm="HS256")


@contextlib.contextmanager
def page_of(browser: Browser, site: int, host: str = "localhost") -> Iterator[Page]:
    page = browser.new_page()
    try:
        page.add_init_script("Math.random = () => 0")  # who comes back does it at once
        page.goto(f"http://{host}:{site}/")
        yield page
    finally:
        page.close()


def play(page: Page, server: Server, *tokens: str) -> dict[str, Any]:
    """What the page hears until it has joined or given up; it shows one token after the other."""
    story: dict[str, Any] = page.evaluate(PLAY, [documented(), server.url, tokens, "lobby"])
    return story


def refused(server: Server, code: str) -> int:
    """Handshakes, so far."""
    (worker,) = status.ask(server.runtime_dir, server.port).workers
    return worker.counters.get(f'handshakes_total{{result="{code}"}}', 0)


def test_page_with_a_good_token_as_a_subprotocol_joins(browser: Browser, guarded: Server, site: int) -> None:
    with page_of(browser, site) as page:
        story = play(page, guarded, mint("alice"))
    assert (story["opened"], story["protocol"], story["asked"]) == (1, "fastsig.v1.json", 1)
    assert [(message["type"], message.get("sender")) for message in story["heard"]] == [("joined", "alice")]


def test_page_with_a_bad_token_is_told_and_closed_with_4500_and_asks_no_more(
    browser: Browser, guarded: Server, site: int
) -> None:
    before = refused(guarded, "unauthorized")
    with page_of(browser, site) as page:
        story = play(page, guarded, mint("alice")[:-6] + "AAAAAA")
        page.wait_for_timeout(200)  # it would have come back, had it not given up
    assert (story["code"], story["asked"]) == (4500, 1)
    assert [(message["type"], message["code"]) for message in story["heard"]] == [("error", "unauthorized")]
    assert refused(guarded, "unauthorized") - before == 1


def test_page_whose_token_has_expired_gets_another_and_joins(browser: Browser, guarded: Server, site: int) -> None:
    with page_of(browser, site) as page:
        story = play(page, guarded, mint("alice", ttl_s=-1), mint("alice"))
    assert [message.get("code") or message["type"] for message in story["heard"]] == ["token_expired", "joined"]
    assert (story["asked"], story["opened"], story["code"]) == (2, 2, None)


def test_page_of_another_origin_is_told_and_closed_with_4508_also_with_a_good_token(
    browser: Browser, guarded: Server, site: int
) -> None:
    with page_of(browser, site, "127.0.0.1") as page:
        story = play(page, guarded, mint("alice"))
    assert story["code"] == 4508
    assert [(message["type"], message["code"]) for message in story["heard"]] == [("error", "forbidden")]
    assert refused(guarded, "forbidden") == 1
