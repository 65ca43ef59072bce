"""Who is asked when, without HTTP; with it: tests/e2e/test_webhook.py."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
import pytest_asyncio
from hypothesis import given, strategies as st
from msgspec import Raw

from fastsig import config, metrics, webhook
from fastsig.asker import Asker, Flight, Queue
from fastsig.metrics import Histogram
from fastsig.webhook import Decision, Question

REFUSED = Decision(is_allowed=False, code="backend_unavailable")


def question(peer: str, address: str = "203.0.113.7") -> Question:
    return Question(id="q", room="lobby", peer=peer, subject=None, issuer=None, address=address, meta=Raw(b"null"))


def flight(number: int, lane: str) -> Flight:
    return Flight(str(number).encode(), lane, question(str(number)), webhook.Cache(), lambda flight: None)


# ---- the queue


def test_lines_give_their_first_in_turn() -> None:
    queue = Queue()
    for number, lane in enumerate("aaabcb"):
        queue.put(flight(number, lane))
    assert [queue.take().lane for _ in range(6)] == list("abcaba")
    assert len(queue) == 0


def test_line_that_is_cut_is_the_longest_and_longer_than_ones_own() -> None:
    queue = Queue()
    for number, lane in enumerate("aaab"):
        queue.put(flight(number, lane))
    last = queue.last_of_longest(but="c")
    assert last is not None and last.key == b"2"
    assert queue.last_of_longest(but="a") is None
    assert queue.last_of_longest(but="b") is not None
    queue.remove(last)
    assert queue.last_of_longest(but="b") is None, "which would be as long as that one then"
    assert len(queue) == 3


@given(st.lists(st.tuples(st.sampled_from(["put", "take", "remove"]), st.sampled_from("abc"), st.integers(0, 9))))
def test_queue_gives_each_that_was_put_and_not_removed_once_and_in_the_order_of_its_line(
    steps: list[tuple[str, str, int]],
) -> None:
    queue = Queue()
    lines: dict[str, list[Flight]] = {"a": [], "b": [], "c": []}
    for number, (step, lane, place) in enumerate(steps):
        if step == "put":
            lines[lane].append(flight(number, lane))
            queue.put(lines[lane][-1])
        elif step == "take" and len(queue):
            taken = queue.take()
            assert taken is lines[taken.lane].pop(0)
        elif step == "remove" and lines[lane]:
            queue.remove(lines[lane].pop(place % len(lines[lane])))
        assert len(queue) == sum(map(len, lines.values()))


# ---- asking


class Home:
    """Its webhook answers what `answers` holds for a peer, when that is there."""

    def __init__(self) -> None:
        self.answers: dict[str, asyncio.Future[tuple[int, bytes]]] = {}
        self.asked: list[str] = []
        self.counts: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.now = 1000.0
        self.asker = Asker(self._post, self._count, self._observe, clock=lambda: self.now, unix_clock=lambda: 1.8e9)

    async def _post(self, url: str, body: bytes, headers: Mapping[str, str], most_bytes: int) -> tuple[int, bytes]:
        assert headers["X-Fastsig-Timestamp"] == "1800000000"
        peer = msgspec.json.decode(body)["peer"]
        self.asked.append(peer)
        return await self.answers.setdefault(peer, asyncio.get_running_loop().create_future())

    def _count(self, index: int) -> None:
        self.counts[index] += 1

    def _observe(self, histogram: Histogram, value: float) -> None:
        assert histogram == metrics.histogram("webhook_seconds")
        self.seconds.append(value)

    def configure(self, **auth: Any) -> None:
        made = config.build({f"auth.{name}": value for name, value in auth.items()})
        self.asker.configure(made.auth, meta_bytes=1024)

    def ask(self, asked: Question) -> list[Decision]:
        told: list[Decision] = []
        self.asker.ask(asked, told.append)
        return told


@pytest_asyncio.fixture
async def home() -> AsyncIterator[Home]:
    one = Home()
    one.configure(webhook_url="https://auth.example.com", webhook_secret="s" * 32, webhook_seconds=4.5)
    yield one
    await one.asker.close()


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_nothing_is_to_be_asked_without_a_url(home: Home) -> None:
    assert home.asker.is_wanted
    home.configure()
    assert not home.asker.is_wanted


async def test_decision_is_told_in_a_later_turn(home: Home) -> None:
    told = home.ask(question("a"))
    await turns()
    home.now += 0.25
    home.answers["a"].set_result((200, b'{"result":"allow","cache_seconds":10}'))
    assert told == []
    await turns()
    assert [decision.is_allowed for decision in told] == [True]
    assert home.seconds == [0.25]


async def test_cached_answer_ends_in_time(home: Home) -> None:
    told = home.ask(question("a"))
    await turns()
    home.answers["a"].set_result((200, b'{"result":"deny","cache_seconds":10}'))
    await turns()
    assert home.ask(question("a")) == told
    home.now += math.nextafter(10, 11)
    assert home.ask(question("a")) == []
    await turns()
    assert home.asked == ["a", "a"]


async def test_time_of_a_request_that_is_given_up_is_seen(home: Home) -> None:
    home.configure(webhook_url="https://auth.example.com", webhook_secret="s" * 32, webhook_seconds=0.1)
    told = home.ask(question("a"))
    await turns()
    home.now += 0.5
    await asyncio.sleep(0.15)
    assert told == [REFUSED]
    assert home.seconds == [0.5]


OPEN = {
    "webhook_url": "https://auth.example.com", "webhook_secret": "s" * 32, "webhook_fails_open": True,
    "webhook_concurrency": 1,
}  # fmt: skip


async def test_who_is_late_by_the_length_of_a_line_is_not_let_in(home: Home) -> None:
    """Whoever asks a lot could make the time that is left for his last question as short as he likes."""
    home.configure(**OPEN, webhook_seconds=0.2)
    told = [home.ask(question(peer)) for peer in "abc"]
    await turns()
    home.now += 0.1
    home.answers["a"].set_result((200, b'{"result":"deny"}'))
    await turns()
    assert home.asked == ["a", "b"]
    await asyncio.sleep(0.25)
    assert told[0][0].code == "forbidden"
    assert told[1:] == [[REFUSED], [REFUSED]]


async def test_who_was_never_asked_about_is_not_let_in(home: Home) -> None:
    home.configure(**OPEN, webhook_seconds=4.5)
    home.ask(question("a"))
    home.configure(**OPEN, webhook_seconds=0.1)
    told = home.ask(question("b"))
    await asyncio.sleep(0.15)
    assert home.asked == ["a"] and told == [REFUSED]


async def test_where_nothing_is_answered_who_waited_and_was_asked_about_is_let_in(home: Home) -> None:
    """Else nobody would be while more ask than there are places."""
    home.configure(**OPEN, webhook_seconds=0.2)
    told = [home.ask(question("a"))]
    await asyncio.sleep(0.1)
    told.append(home.ask(question("b")))
    await asyncio.sleep(0.25)
    assert home.asked == ["a", "b"]
    assert [[decision.is_allowed for decision in one] for one in told] == [[True], [True]]


async def test_bug_of_ours_is_said_by_the_loop_and_leaves_nobody_waiting(home: Home) -> None:
    home.configure(webhook_url="https://auth.example.com", webhook_secret="s" * 32, webhook_seconds=0.1)
    caught: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: caught.append(context))
    told = home.ask(question("a"))
    await turns()
    home.answers["a"].set_exception(ZeroDivisionError())
    await turns()
    assert [type(context["exception"]) for context in caught] == [ZeroDivisionError]
    await asyncio.sleep(0.15)
    assert told == [REFUSED]
    assert home.asker.stats() == {"webhook_asked": 0, "webhook_waiting": 0, "webhook_cached": 0}


async def test_who_is_told_may_ask_again_at_once(home: Home) -> None:
    told: list[Decision] = []
    home.asker.ask(question("a"), lambda _: void(home.asker.ask(question("a"), told.append)))
    await turns()
    home.answers.pop("a").set_result((200, b'{"result":"deny"}'))
    await turns()
    assert home.asked == ["a", "a"]
    home.answers["a"].set_result((200, b'{"result":"allow"}'))
    await turns()
    assert [decision.is_allowed for decision in told] == [True]


def void(value: object) -> None:
    """For a lambda that is to return nothing."""
