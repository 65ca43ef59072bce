"""The webhook is asked, and keys are fetched, over real HTTP on loopback."""

import asyncio
import base64
import contextlib
import gzip
import io
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme
from msgspec import Raw

from fastsig import config, fetch, logs, metrics
from fastsig.asker import WAITING_PER_PLACE, Asker, Asking
from fastsig.fetch import Fetcher, FetchError, FetchTimeoutError
from fastsig.webhook import Decision, Question

from .conftest import START_S, Server
from .issuer import SECRET, Issuer, Webhook, documented, is_from_fastsig

META_BYTES = 1024
REFUSED = Decision(is_allowed=False, code="backend_unavailable")
ALLOWED = Decision(is_allowed=True)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


def question(peer: str = "alice", *, id: str = "q1", room: str = "lobby", address: str = "203.0.113.7") -> Question:
    return Question(
        id=id, room=room, peer=peer, subject=None, issuer=None, address=address, meta=Raw(b'{"name":"\xc3\x84"}')
    )


class Home:
    """What a worker is to an `Asker`: it counts, and hears."""

    def __init__(self) -> None:
        self.fetcher = Fetcher()
        self.counts: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.asker = Asker(self.fetcher.post, self._count, lambda histogram, value: self.seconds.append(value))

    def _count(self, index: int) -> None:
        self.counts[index] += 1

    def configure(self, url: str, secret: str = SECRET, **auth: Any) -> None:
        values = {"auth.webhook_url": url, "auth.webhook_secret": secret}
        made = config.build(values | {f"auth.{name}": value for name, value in auth.items()})
        config.check(made)
        self.asker.configure(made.auth, meta_bytes=META_BYTES)

    async def ask(self, asked: Question | None = None) -> Decision:
        decided = asyncio.get_running_loop().create_future()
        self.asker.ask(asked or question(), decided.set_result)
        async with asyncio.timeout(START_S):
            decision: Decision = await decided
        return decision

    def start(self, asked: Question) -> tuple[Asking, list[Decision]]:
        told: list[Decision] = []
        return self.asker.ask(asked, told.append), told

    @property
    def results(self) -> dict[str, int]:
        return {
            name: self.counts[at] for name, at in metrics.indexes("webhook_requests_total").items() if self.counts[at]
        }

    async def close(self) -> None:
        await self.asker.close()
        await self.fetcher.close()


@pytest_asyncio.fixture
async def home(webhook: Webhook) -> AsyncIterator[Home]:
    one = Home()
    one.configure(f"{webhook.url}/join?key=s3cr3t")
    yield one
    await one.close()


@pytest.fixture
def log() -> io.StringIO:
    stream = io.StringIO()
    logs.configure("info", "json", stream=stream)
    return stream


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(START_S):
        while not is_so():  # noqa: ASYNC110 # another thread makes it so
            await asyncio.sleep(0.005)


def failures(log: io.StringIO) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in log.getvalue().splitlines()]
    return [event for event in events if event["event"] == "webhook_failed"]


# ---- asked and answered


async def test_webhook_is_asked_as_documented(home: Home, webhook: Webhook) -> None:
    assert await home.ask() == ALLOWED
    assert webhook.questions == [
        {
            "type": "join", "id": "q1", "room": "lobby", "peer": "alice", "subject": None, "issuer": None,
            "address": "203.0.113.7", "meta": {"name": "Ä"},
        }
    ]  # fmt: skip
    assert webhook.headers_seen[0]["Content-Type"] == "application/json"
    assert home.results == {"allowed": 1}
    assert len(home.seconds) == 1


async def test_what_is_answered_is_decided(home: Home, webhook: Webhook) -> None:
    webhook.says = {"result": "allow", "meta": {"role": "host"}, "limits": {"joins_per_s": 1}}
    assert await home.ask() == Decision(is_allowed=True, meta=b'{"role": "host"}', limits={"joins_per_s": 1})
    webhook.says = {"result": "deny", "code": "room_full", "after_ms": 500}
    assert await home.ask() == Decision(is_allowed=False, code="room_full", after_ms=500)
    assert home.results == {"allowed": 1, "denied": 1}


async def test_wrong_secret_is_found_by_the_documented_code(home: Home, webhook: Webhook) -> None:
    home.configure(webhook.url, secret="another secret, which is long enough too")
    assert await home.ask() == REFUSED
    assert webhook.requests == 1
    assert webhook.questions == []


async def test_documented_python_refuses_what_is_altered_or_old(home: Home, webhook: Webhook) -> None:
    await home.ask()
    headers, body = webhook.headers_seen[0], webhook.bodies[0]
    assert is_from_fastsig(SECRET, headers, body)
    for altered in alterations(headers, body):
        assert not is_from_fastsig(SECRET, *altered)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node: apt-get install nodejs")
async def test_documented_node_agrees(home: Home, webhook: Webhook) -> None:
    await home.ask()
    headers, body = webhook.headers_seen[0], webhook.bodies[0]
    cases = [(headers, body), *alterations(headers, body)]
    shown = [
        [{name.lower(): value for name, value in headers.items()}, base64.b64encode(body).decode()]
        for headers, body in cases
    ]
    program = f"""{documented("javascript")}
        const cases = JSON.parse(require("node:fs").readFileSync(0));
        for (const [headers, body] of cases)
          console.log(isFromFastsig({json.dumps(SECRET)}, headers, Buffer.from(body, "base64")));
    """
    found = await asyncio.to_thread(
        lambda: subprocess.run(
            ["node", "-e", program], input=json.dumps(shown), capture_output=True, text=True, check=True
        )
    )
    assert found.stdout.split() == ["true"] + ["false"] * (len(cases) - 1)


def alterations(headers: dict[str, str], body: bytes) -> list[tuple[dict[str, str], bytes]]:
    timestamp, signature = headers["X-Fastsig-Timestamp"], headers["X-Fastsig-Signature"]
    others = [
        {"X-Fastsig-Timestamp": str(int(timestamp) - 301)}, {"X-Fastsig-Timestamp": str(int(timestamp) + 1)},
        {"X-Fastsig-Timestamp": ""}, {"X-Fastsig-Timestamp": "9" * 5000}, {"X-Fastsig-Timestamp": "-1"},
        {"X-Fastsig-Signature": ""}, {"X-Fastsig-Signature": signature.removeprefix("v1=")},
        {"X-Fastsig-Signature": signature[:-1] + "ä"}, {"X-Fastsig-Signature": signature[:-1] + "g"},
    ]  # fmt: skip
    return [(headers, body + b" "), *((headers | other, body) for other in others)]


async def test_password_in_the_url_is_sent_as_one(home: Home, webhook: Webhook) -> None:
    home.configure(webhook.url.replace("://", "://user:pass@"))
    assert await home.ask() == ALLOWED
    assert webhook.headers_seen[0]["Authorization"] == f"Basic {base64.b64encode(b'user:pass').decode()}"


# ---- what is no answer


async def test_slow_webhook_is_given_up_and_its_request_broken_off(home: Home, webhook: Webhook) -> None:
    webhook.delay_s = 60.0
    home.configure(webhook.url, webhook_seconds=0.2)
    began = time.monotonic()
    assert await home.ask() == REFUSED
    assert 0.15 < time.monotonic() - began < START_S / 2
    await until(lambda: webhook.requests == 1 and webhook.under_way == 0)
    assert home.results == {"timeout": 1}
    assert home.asker.stats() == {"webhook_asked": 0, "webhook_waiting": 0, "webhook_cached": 0}


async def test_webhook_that_is_down_and_comes_back(home: Home, webhook: Webhook, log: io.StringIO) -> None:
    webhook.stop()
    assert await home.ask() == REFUSED
    webhook.start()
    assert await home.ask() == ALLOWED
    assert home.results == {"failed": 1, "allowed": 1}
    (event,) = failures(log)
    assert (event["host"], event["joins"]) == ("127.0.0.1", 1)
    assert "cannot be connected to" in event["reason"]


@pytest.mark.parametrize(
    ("raw", "status", "result", "reason"),
    [
        (b'{"result":"allow"} s3cr3t', 200, "unusable", "the answer is not JSON in UTF-8"),
        (b'{"result":"s3cr3t"}', 200, "unusable", 'neither "allow" nor "deny"'),
        (b'{"result":"allow"}', 500, "failed", "it answered 500"),
        (b'{"result":"allow"}', 204, "failed", "it answered 204"),
        (b'{"result":"allow"}'.ljust(16385), 200, "failed", "longer than 16384 bytes"),
        (b"s3cr3t" * 1_000_000, 200, "failed", "longer than 16384 bytes"),
        (b"", 307, "failed", "it answered 307, and redirects are not followed"),
    ],
)
async def test_what_is_no_answer_lets_nobody_in(
    home: Home, webhook: Webhook, log: io.StringIO, raw: bytes, status: int, result: str, reason: str
) -> None:
    webhook.raw, webhook.status = raw, status
    webhook.headers = {"Location": f"{webhook.url}/elsewhere?s3cr3t"}
    assert await home.ask() == REFUSED
    assert webhook.requests == 1
    assert home.results == {result: 1}
    assert reason in failures(log)[0]["reason"]
    assert "s3cr3t" not in log.getvalue()


async def test_compressed_answer_is_none(home: Home, webhook: Webhook, log: io.StringIO) -> None:
    webhook.raw, webhook.headers = gzip.compress(b'{"result":"allow"}'), {"Content-Encoding": "gzip"}
    assert await home.ask() == REFUSED
    assert "compressed" in failures(log)[0]["reason"]


async def test_meta_that_is_too_long_is_said(home: Home, webhook: Webhook, log: io.StringIO) -> None:
    webhook.says = {"result": "allow", "meta": "x" * META_BYTES}
    assert await home.ask() == REFUSED
    assert "limits.meta_bytes is 1024" in failures(log)[0]["reason"]


async def test_who_fails_open_lets_in_as_if_nobody_had_been_asked(home: Home, webhook: Webhook) -> None:
    home.configure(webhook.url, webhook_fails_open=True, webhook_seconds=0.2)
    webhook.raw = b"?"
    assert await home.ask() == ALLOWED
    webhook.raw, webhook.delay_s = None, 60.0
    assert await home.ask() == ALLOWED
    webhook.stop()
    assert await home.ask() == ALLOWED
    assert home.results == {"unusable": 1, "timeout": 1, "failed": 1}
    webhook.start()
    webhook.delay_s, webhook.says = 0.0, {"result": "deny"}
    assert (await home.ask()).code == "forbidden"


async def test_failures_are_said_once_a_second(home: Home, webhook: Webhook, log: io.StringIO) -> None:
    webhook.status = 500
    for peer in range(20):
        await home.ask(question(str(peer)))
    assert [event["joins"] for event in failures(log)] == [1]
    await until(lambda: len(failures(log)) == 2)
    assert [event["joins"] for event in failures(log)] == [1, 19]


async def test_failures_that_were_not_said_yet_are_at_the_end(home: Home, webhook: Webhook, log: io.StringIO) -> None:
    webhook.status = 500
    for peer in range(3):
        await home.ask(question(str(peer)))
    await home.asker.close()
    assert [event["joins"] for event in failures(log)] == [1, 2]


# ---- connections


@contextlib.asynccontextmanager
async def serving(handler: Handler, **options: Any) -> AsyncIterator[int]:
    """A server of this loop: its port. Its connections end with it."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            tasks.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await handler(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Scripted:
    """A server that is no good one: the nth request of a connection is met as `script` says, over all connections.

    A word is what is answered before it closes; an answer that ends in a body is kept open for the next.
    """

    def __init__(self, script: list[bytes]) -> None:
        self.script = script
        self.heads: list[tuple[int, bytes]] = []  # by the number of the connection
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number, is_kept = self.connections, True
        while is_kept and (head := await self._read(reader)):
            self.heads.append((number, head))
            answer = self.script.pop(0)
            writer.write(answer)
            is_kept = answer.endswith(b"}")

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return b""
        length = next(
            (int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")), 0
        )
        return head + await reader.readexactly(length)


GOOD = b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"result":"allow"}'


async def scripted(home: Home, script: list[bytes], asks: int) -> tuple[Scripted, list[Decision]]:
    site = Scripted(script)
    async with serving(site.serve) as port:
        home.configure(f"http://127.0.0.1:{port}/")
        return site, [await home.ask(question(str(number))) for number in range(asks)]


async def test_question_on_a_connection_that_had_ended_is_sent_again(home: Home) -> None:
    site, decided = await scripted(home, [GOOD, b"", GOOD], 2)
    assert decided == [ALLOWED, ALLOWED]
    (_, first), (_, second), (_, third) = site.heads
    assert [number for number, _ in site.heads] == [1, 1, 2]
    assert first != second == third, "the same question, its time and signature too"


async def test_question_is_sent_no_third_time(home: Home) -> None:
    site, decided = await scripted(home, [GOOD, b"", b"", GOOD], 2)
    assert decided == [ALLOWED, REFUSED]
    assert len(site.heads) == 3


async def test_question_on_a_new_connection_is_not_sent_again(home: Home) -> None:
    site, decided = await scripted(home, [b"", GOOD], 1)
    assert decided == [REFUSED]
    assert len(site.heads) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n12\r\n{", "broke off"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 10_000 + b"\r\n", "not HTTP"),
    ],
)
async def test_answer_that_is_not_whole_is_none(home: Home, log: io.StringIO, answer: bytes, reason: str) -> None:
    site, decided = await scripted(home, [GOOD, answer, GOOD], 2)
    assert decided == [ALLOWED, REFUSED]
    assert reason in failures(log)[0]["reason"]
    assert len(site.heads) == 2


async def test_a_thousand_at_once_take_their_turns_over_connections_that_are_kept(home: Home, webhook: Webhook) -> None:
    home.configure(webhook.url, webhook_seconds=4.5)
    webhook.delay_s = 0.005
    webhook.decide = lambda asked: {"result": "allow", "meta": asked["peer"]}
    decided = await asyncio.gather(*(home.ask(question(str(number))) for number in range(1000)))
    assert [json.loads(one.meta or b"") for one in decided] == [str(number) for number in range(1000)]
    assert webhook.most_under_way <= 64
    assert len(webhook.clients) <= 64
    assert home.results == {"allowed": 1000}
    assert home.asker.stats() == {"webhook_asked": 0, "webhook_waiting": 0, "webhook_cached": 0}


# ---- cache and single flight


async def test_answer_holds_as_long_as_it_says(home: Home, webhook: Webhook) -> None:
    webhook.says = {"result": "deny", "code": "forbidden", "cache_seconds": 60}
    await home.ask()
    _, told = home.start(question(id="q2"))
    assert told == [Decision(is_allowed=False, code="forbidden", cache_seconds=60)], "during the call"
    await home.ask(question("bob"))
    assert webhook.requests == 2
    assert home.results == {"denied": 2, "cached": 1}


async def test_configuration_forgets_what_was_said(home: Home, webhook: Webhook) -> None:
    webhook.says = {"result": "allow", "cache_seconds": 60}
    await home.ask()
    home.configure(webhook.url)
    await home.ask()
    assert webhook.requests == 2


async def test_answer_to_a_question_of_before_is_not_kept_after(home: Home, webhook: Webhook) -> None:
    webhook.says, webhook.delay_s = {"result": "allow", "cache_seconds": 60}, 0.1
    asking = asyncio.ensure_future(home.ask())
    await until(lambda: webhook.requests == 1)
    home.configure(webhook.url)
    assert (await asking).is_allowed
    assert home.asker.stats()["webhook_cached"] == 0


async def test_failure_is_not_kept(home: Home, webhook: Webhook) -> None:
    webhook.raw = b'{"result":"perhaps","cache_seconds":60}'
    assert await home.ask() == REFUSED
    webhook.raw = None
    assert await home.ask() == ALLOWED


async def test_question_that_several_ask_at_once_is_sent_once(home: Home, webhook: Webhook) -> None:
    webhook.delay_s = 0.05
    decided = await asyncio.gather(*(home.ask(question(id=str(number))) for number in range(50)))
    assert decided == [ALLOWED] * 50
    assert webhook.requests == 1
    assert home.results == {"allowed": 50}
    assert await home.ask() == ALLOWED
    assert webhook.requests == 2, "which was not to be kept"


# ---- going away


async def test_who_cancels_hears_nothing_and_the_others_do(home: Home, webhook: Webhook) -> None:
    webhook.delay_s = 0.1
    one, told = home.start(question())
    other = asyncio.ensure_future(home.ask())
    await until(lambda: webhook.requests == 1)
    one.cancel()
    one.cancel()
    assert await other == ALLOWED
    assert told == []
    assert home.results == {"allowed": 1}


async def test_question_that_nobody_asks_any_more_is_broken_off(home: Home, webhook: Webhook) -> None:
    webhook.delay_s = 60.0
    first, told = home.start(question())
    second, _ = home.start(question())
    await until(lambda: webhook.under_way == 1)
    first.cancel()
    second.cancel()
    await until(lambda: webhook.under_way == 0)
    assert home.asker.stats() == {"webhook_asked": 0, "webhook_waiting": 0, "webhook_cached": 0}
    assert told == []
    assert home.results == {}


async def test_question_that_is_cancelled_before_its_turn_is_never_sent(home: Home, webhook: Webhook) -> None:
    home.configure(webhook.url, webhook_concurrency=1)
    webhook.delay_s = 0.05
    first = asyncio.ensure_future(home.ask(question("a")))
    await until(lambda: webhook.requests == 1)
    second, _ = home.start(question("b"))
    second.cancel()
    third, _ = home.start(question("c"))  # starts when the first has ended, and is cancelled before that
    assert home.asker.stats()["webhook_waiting"] == 1
    assert await first == ALLOWED
    await until(lambda: len(webhook.questions) == 2)
    third.cancel()
    assert [asked["peer"] for asked in webhook.questions] == ["a", "c"]


async def test_cancel_between_decision_and_word_is_heeded(home: Home, webhook: Webhook) -> None:
    """The first who is told cancels the second, in the same turn of the loop."""
    told: list[Decision] = []
    askings: list[Asking] = []
    home.asker.ask(question(), lambda _: askings[0].cancel())
    askings.append(home.asker.ask(question(), told.append))
    await until(lambda: home.results == {"allowed": 2})
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert told == []


async def test_one_who_fails_on_the_word_harms_no_other(home: Home, webhook: Webhook) -> None:
    caught: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: caught.append(context))

    def fail(decision: Decision) -> None:
        raise ZeroDivisionError

    home.asker.ask(question(), fail)
    assert await home.ask() == ALLOWED
    assert [type(context["exception"]) for context in caught] == [ZeroDivisionError]


async def test_end_with_questions_open_tells_nobody_and_leaves_nothing(webhook: Webhook) -> None:
    home = Home()
    home.configure(webhook.url, webhook_concurrency=2)
    webhook.delay_s = 60.0
    askings = [home.start(question(str(number))) for number in range(6)]
    await until(lambda: webhook.under_way == 2)
    began = time.monotonic()
    await home.close()
    assert time.monotonic() - began < 1.0
    assert [told for _, told in askings] == [[]] * 6
    for asking, _ in askings:
        asking.cancel()
    assert home.start(question())[1] == [REFUSED], "also to who asks later"
    await until(lambda: webhook.under_way == 0)
    assert home.asker.stats() == {"webhook_asked": 0, "webhook_waiting": 0, "webhook_cached": 0}
    await home.close()
    assert len(asyncio.all_tasks()) == 1


# ---- a crowd


async def test_time_in_the_queue_counts(home: Home, webhook: Webhook, log: io.StringIO) -> None:
    home.configure(webhook.url, webhook_concurrency=1, webhook_seconds=0.3)
    webhook.delay_s = 60.0
    began = time.monotonic()
    assert await asyncio.gather(*(home.ask(question(peer)) for peer in "ab")) == [REFUSED, REFUSED]
    assert time.monotonic() - began < 2.0
    assert home.results == {"timeout": 2}


async def test_more_places_are_used_at_once(home: Home, webhook: Webhook) -> None:
    home.configure(webhook.url, webhook_concurrency=1)
    webhook.delay_s = 60.0
    for peer in range(4):
        home.start(question(str(peer)))
    await until(lambda: webhook.under_way == 1)
    home.configure(webhook.url, webhook_concurrency=3)
    await until(lambda: webhook.under_way == 3)


@pytest.mark.parametrize("fails_open", [False, True])
async def test_what_finds_the_queue_full_is_refused_at_once(home: Home, webhook: Webhook, *, fails_open: bool) -> None:
    home.configure(webhook.url, webhook_concurrency=1, webhook_fails_open=fails_open)
    webhook.delay_s = 60.0
    accepted = [home.start(question(str(number)))[1] for number in range(1 + WAITING_PER_PLACE)]
    assert home.start(question("late"))[1] == [REFUSED]
    assert accepted == [[]] * (1 + WAITING_PER_PLACE)
    assert home.results == {"failed": 1}


async def test_crowd_at_one_address_waits_for_itself(home: Home, webhook: Webhook) -> None:
    home.configure(webhook.url, webhook_concurrency=1, webhook_seconds=4.5)
    webhook.delay_s = 0.02
    crowd = [home.start(question(str(number)))[1] for number in range(1 + WAITING_PER_PLACE)]
    stranger = question("bob", address="198.51.100.1")
    assert await home.ask(stranger) == ALLOWED
    assert crowd[-1] == [REFUSED], "the last of the longest line made room"
    assert len(webhook.questions) <= 4, "one of the crowd may have been under way, and one was next"
    await until(lambda: all(crowd))
    assert crowd[:-1] == [[ALLOWED]] * WAITING_PER_PLACE


async def test_addresses_of_one_client_are_one_line(webhook: Webhook) -> None:
    home = Home()
    home.asker = Asker(home.fetcher.post, home._count, lambda histogram, value: None, group=lambda address: address[:4])
    home.configure(webhook.url, webhook_concurrency=1)
    webhook.delay_s = 60.0
    for number in range(1 + WAITING_PER_PLACE):
        home.start(question(str(number), address=f"2001:db8::{number}"))
    assert home.start(question("late", address="2001:db8::ffff"))[1] == [REFUSED]
    assert home.start(question("other", address="2002:db8::1"))[1] == []
    await home.close()


# ---- keys


@pytest_asyncio.fixture
async def fetcher() -> AsyncIterator[Fetcher]:
    one = Fetcher()
    yield one
    await one.close()


async def test_keys_are_fetched(fetcher: Fetcher, issuer: Issuer) -> None:
    kid = issuer.rotate("EdDSA", keeps_old=True)
    keys = json.loads(await fetcher.get(issuer.jwks_url))["keys"]
    assert len(keys) == 2
    assert keys[1]["kid"] == kid


async def test_slow_issuer_is_given_up(fetcher: Fetcher, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.2)
    issuer.delay_s = 60.0
    with pytest.raises(FetchTimeoutError, match=r"within 0\.2 s"):
        await fetcher.get(issuer.jwks_url)
    await until(lambda: issuer.under_way == 0)


async def test_issuer_that_gives_a_byte_at_a_time_is_given_up(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.3)

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.02)

    async with serving(drip) as port:
        with pytest.raises(TimeoutError):
            await fetcher.get(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    ("size", "is_taken"), [(fetch.KEYS_BYTES, True), (fetch.KEYS_BYTES + 1, False), (50_000_000, False)]
)
async def test_key_set_is_at_most_a_mebibyte(fetcher: Fetcher, issuer: Issuer, size: int, *, is_taken: bool) -> None:
    issuer.raw = bytes(size)
    if is_taken:
        assert len(await fetcher.get(issuer.jwks_url)) == size
        return
    with pytest.raises(FetchError, match="longer than 1048576"):
        await fetcher.get(issuer.jwks_url)


async def test_endless_answer_is_cut(fetcher: Fetcher) -> None:
    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(bytes(65536))
            await writer.drain()

    async with serving(pour) as port:
        with pytest.raises(FetchError, match="longer than"):
            await fetcher.get(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize("status", [204, 301, 304, 404, 500])
async def test_only_200_brings_keys(fetcher: Fetcher, issuer: Issuer, status: int) -> None:
    issuer.status, issuer.headers = status, {"Location": "/elsewhere"}
    with pytest.raises(FetchError, match=f"it answered {status}"):
        await fetcher.get(issuer.jwks_url)
    assert issuer.requests == 1


async def test_issuer_that_is_down(fetcher: Fetcher, issuer: Issuer) -> None:
    issuer.stop()
    with pytest.raises(FetchError, match="cannot be connected to: Connect"):
        await fetcher.get(f"{issuer.jwks_url}?key=s3cr3t")


@pytest.mark.parametrize("url", ["http://issuer.invalid/?s3cr3t", "http://s3cr3t..example/"])
async def test_name_that_has_no_address(fetcher: Fetcher, url: str) -> None:
    with pytest.raises(FetchError) as caught:
        await fetcher.get(url)
    assert str(caught.value) in {"its name has no address", "its URL cannot be used"}


async def test_environment_names_no_proxy(
    fetcher: Fetcher, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    netrc = tmp_path / "netrc"
    netrc.write_text("default login a password b\n", encoding="ascii")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert await fetcher.get(issuer.jwks_url)


async def test_closed_fetcher_fetches_nothing(fetcher: Fetcher, issuer: Issuer) -> None:
    await fetcher.get(issuer.jwks_url)
    await fetcher.close()
    await fetcher.close()
    with pytest.raises(FetchError, match="ending"):
        await fetcher.get(issuer.jwks_url)


async def test_end_breaks_off_what_is_fetched(fetcher: Fetcher, issuer: Issuer) -> None:
    issuer.delay_s = 60.0
    fetching = asyncio.ensure_future(fetcher.get(issuer.jwks_url))
    await until(lambda: issuer.under_way == 1)
    await fetcher.close()
    with pytest.raises(FetchError):
        await fetching


# ---- TLS


FETCH = """
import asyncio, sys
from fastsig.fetch import Fetcher, FetchError
async def main():
    fetcher = Fetcher()
    try:
        print((await fetcher.get(sys.argv[1])).decode())
    except FetchError as error:
        print(error)
    finally:
        await fetcher.close()
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("names", "is_trusted", "said"),
    [
        (("localhost",), True, "keys"),
        (("localhost",), False, "its certificate is refused: unable to get local issuer certificate"),
        (("other.example",), True, "its certificate is refused: Hostname mismatch"),
    ],
)
async def test_certificate_is_checked_with_the_systems_store(
    tmp_path: Path, names: tuple[str, ...], said: str, *, is_trusted: bool
) -> None:
    """OpenSSL reads the store's place, and SSL_CERT_FILE, when the process begins to: so in one of its own."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names).configure_cert(context)
    site = Scripted([b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nkeys"])
    async with serving(site.serve, ssl=context) as port:
        url = f"https://localhost:{port}/"
        environment = os.environ | ({"SSL_CERT_FILE": str(tmp_path / "ca.pem")} if is_trusted else {})
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FETCH, url, env=environment, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), START_S)
    assert output.decode().startswith(said)


async def test_https_to_what_speaks_plain_http_is_said(fetcher: Fetcher, issuer: Issuer) -> None:
    with pytest.raises(FetchError, match="TLS cannot be agreed on"):
        await fetcher.get(issuer.jwks_url.replace("http:", "https:"))


def test_worker_that_fetches_nothing_imports_nothing() -> None:
    program = "import sys, fastsig.fetch, fastsig.asker; print('aiohttp' in sys.modules, 'ssl' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert output.split()[0] == "False"


# ---- the server


def test_plain_http_to_another_machine_is_warned_of(serve: Callable[..., Server], tmp_path: Path) -> None:
    file = tmp_path / "fastsig.toml"
    table = f'[auth]\nwebhook_secret = "{SECRET}"\nwebhook_url = '
    file.write_text(f'{table}"http://auth.example.com/join?s3cr3t"\n', encoding="ascii")
    server = serve("--config", str(file))
    assert server.wait_for("plain_http")["options"] == ["auth.webhook_url"]
    file.write_text(f'{table}"https://auth.example.com/join?s3cr3t"\n', encoding="ascii")
    server.process.send_signal(signal.SIGHUP)
    assert server.wait_for("reloaded")["options"] == ["auth.webhook_url"]
    server.stop()
    assert len(server.events("plain_http")) == 1
    assert "s3cr3t" not in "".join(server.stderr_lines())
    assert SECRET not in "".join(server.stderr_lines())
