"""Tokens, kicks and the webhook with real servers, most of two workers: joins from everywhere, keys that come and go.

A member of a room is at the worker where it was before it joined: some are at the owner of their room and some are not.
What is to hold for both is done in `ROOMS` rooms.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import signal
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jwt
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

import fastsig
from fastsig import status, tokens
from fastsig.config import Auth
from tests.e2e.conftest import START_S, Server, until
from tests.e2e.issuer import Issuer, Webhook

ROOMS = 8  # that two members of each are everywhere at the same of two workers is as likely as 2^-8
ROUNDS = 8  # of so many rooms, at most
FILES: tuple[tokens.KeyType, ...] = ("hs256", "rs256", "es256", "ed25519")
SECRET = "0123456789abcdef0123456789abcdef"
PASSED = 'handshakes_total{result="passed"}'
TO_OWNER = 'relays_total{route="to_owner"}'
# So that nobody waits half a minute: the least time between two fetches of keys, and what follows the end of a token.
HASTE = """
from fastsig import admission, auth
auth.INTERVAL_S = auth.RETRY_S = 0.5
admission.GRACE_S = 0.5
"""

Serve = Callable[..., Server]


def hurried(folder: Path) -> dict[str, str]:
    """The environment of a server that is in haste. Python executes this at the start of each process."""
    (folder / "sitecustomize.py").write_text(HASTE, encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def counted(server: Server, name: str) -> int:
    return sum(worker.counters.get(name, 0) for worker in status.ask(server.runtime_dir, server.port).workers)


def checked(server: Server, result: str) -> int:
    """How many tokens were found to be that."""
    return counted(server, f'tokens_total{{result="{result}"}}')


def mint(subject: str, *, ttl_s: float = 600.0, **granted: Any) -> str:
    """A token of the shared server's secret."""
    now = time.time()
    claims = {"sub": subject, "iat": int(now), "exp": now + ttl_s, "fastsig": granted}
    return jwt.encode(claims, SECRET, algorithm="HS256")


class Peer:
    """One WebSocket."""

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, server: Server, query: str = "", **options: Any) -> AsyncIterator[Self]:
        async with connect(server.url + query, proxy=None, open_timeout=START_S, **options) as websocket:
            yield cls(websocket)

    async def say(self, **message: Any) -> None:
        await self._websocket.send(json.dumps(message))

    async def hear(self, *types: str) -> dict[str, Any]:
        """The next message, of one of these types where any are named."""
        async with asyncio.timeout(START_S):
            while True:
                message: dict[str, Any] = json.loads(await self._websocket.recv())
                if not types or message["type"] in types:
                    return message

    async def ask(self, *answers: str, **message: Any) -> dict[str, Any]:
        """Say it, and wait for one of these answers."""
        await self.say(**message)
        return await self.hear(*answers, "error")

    async def join(self, room: str, token: str | None = None, **payload: Any) -> dict[str, Any]:
        """`joined`, or the error."""
        brought = payload | ({} if token is None else {"token": token})
        return await self.ask("joined", type="join", room=room, payload=brought)

    async def closed(self) -> int | None:
        """With which code the server closes."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self.hear()
        return self._websocket.close_code


def outcome(answer: dict[str, Any]) -> str:
    return str(answer.get("code") or answer["type"])


async def outcome_of(server: Server, token: str | None, room: str = "r") -> str:
    """What one is answered who joins with this token, and goes."""
    async with Peer.of(server) as peer:
        return outcome(await peer.join(room, token))


async def eventually(wanted: str, ask: Callable[[], Awaitable[dict[str, Any]]], every_s: float = 0.05) -> None:
    """Ask again and again until that is answered."""
    deadline = time.monotonic() + START_S
    while (found := outcome(await ask())) != wanted:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(every_s)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a key of each kind: a JWK of a secret, PEM of the others."""
    folder = tmp_path_factory.mktemp("guarded")
    for kind in FILES:
        tokens.generate(kind, str(folder / kind))
    return folder


@pytest.fixture(scope="module")
def guarded(folder: Path, publisher: Issuer) -> Iterator[Server]:
    """Requires tokens: with keys in files and a secret of its own, and the keys of an issuer."""
    public = [folder / f"{kind}.pub" for kind in FILES if kind != "hs256"]
    keys = [f"secret:{SECRET}", str(folder / "hs256"), *map(str, public)]
    server = Server(
        "--workers", "2", "--auth.required", cwd=folder,
        env=hurried(folder) | {
            "FASTSIG_AUTH_KEYS": json.dumps(keys), "FASTSIG_AUTH_JWKS_URL": f"{publisher.url}={publisher.jwks_url}",
        },
    )  # fmt: skip
    try:
        server.wait_for("serving")
        yield server
        assert not [line for line in server.stderr_lines() if "eyJ" in line], "a token is in the log"
    finally:
        assert server.stop() == 0


@pytest.fixture(scope="module")
def publisher() -> Iterator[Issuer]:
    """An issuer with a key of each kind."""
    with Issuer() as one:
        for algorithm in ("RS256", "PS256", "EdDSA", "Ed25519"):
            one.rotate(algorithm, keeps_old=True)
        yield one


# ---- which tokens are good


async def test_token_of_every_kind_of_key_is_good(guarded: Server, folder: Path, publisher: Issuer) -> None:
    claims = {"sub": "alice", "exp": time.time() + 60}
    by_file = [tokens.create(Auth(), claims, key=str(folder / kind), kid="") for kind in FILES]
    published = [publisher.mint("alice", kid=key["kid"]) for key in publisher.published]
    assert len(published) == 5
    found = await asyncio.gather(
        *(outcome_of(guarded, token, f"r{at}") for at, token in enumerate([*by_file, *published, mint("alice")]))
    )
    assert found == ["joined"] * 10


async def test_token_that_is_no_good_is_unauthorized_and_none_is_needed_only_where_it_is_said(
    guarded: Server, publisher: Issuer
) -> None:
    kept = publisher.published
    never_published = publisher.rotate("ES256")
    publisher.published = kept
    elsewhere = jwt.encode({"sub": "a", "exp": time.time() + 60}, SECRET, headers={"kid": "../../etc/passwd"})
    cases = {
        publisher.mint("a", kid=never_published): "unauthorized",
        publisher.mint("a", kid="key-1", iss="https://other.example"): "unauthorized",
        publisher.mint("a", kid="key-1", exp=None): "unauthorized",
        publisher.mint("a", kid="key-1", ttl_s=-1): "token_expired",
        mint("a")[:-6] + "AAAAAA": "unauthorized",
        elsewhere: "joined",  # by a key that has no name
        mint("a", rooms=["elsewhere", "r/*"]): "forbidden",
        mint("a", can=["relay"]): "forbidden",
        "x" * 9000: "unauthorized",
        None: "unauthorized",
    }
    found = await asyncio.gather(*(outcome_of(guarded, token) for token in cases))
    assert found == list(cases.values())


def brought(place: str, token: str) -> tuple[str, dict[str, Any]]:
    """The query and the options of a connection that brings its token there."""
    if place == "subprotocol":
        return "", {"subprotocols": [Subprotocol("fastsig.v1.json"), Subprotocol(f"bearer.{token}")]}
    if place == "authorization":
        return "", {"additional_headers": {"Authorization": f"Bearer {token}"}}
    return (f"&token={token}", {}) if place == "query" else ("", {})


async def test_token_is_taken_from_every_place_and_checked_once_where_the_connection_is_served(guarded: Server) -> None:
    async def visit(place: str, room: str) -> dict[str, Any]:
        token = mint(room)
        query, options = brought(place, token)
        async with Peer.of(guarded, f"?room={room}{query}", **options) as peer:
            if place == "hello":
                assert (await peer.ask("welcome", type="hello", payload={"token": token}))["sender"] == room
            return await peer.join(room, token if place == "join" else None)

    places = ("hello", "join", "subprotocol", "authorization", "query")
    before = (checked(guarded, "accepted"), counted(guarded, PASSED))
    visits = [(place, uuid.uuid4().hex) for place in places for _ in range(4)]
    found = await asyncio.gather(*itertools.starmap(visit, visits))
    assert [(answer["type"], answer.get("sender")) for answer in found] == [("joined", room) for _, room in visits]
    assert checked(guarded, "accepted") - before[0] == len(visits)
    assert counted(guarded, PASSED) > before[1]


@pytest.mark.parametrize("place", ["subprotocol", "authorization", "query"])
async def test_request_with_a_bad_token_is_answered_by_401_wherever_its_room_is(guarded: Server, place: str) -> None:
    query, options = brought(place, "x.y.z")
    for room in range(4):
        with pytest.raises(InvalidStatus) as refused:
            async with Peer.of(guarded, f"?room={room}{query}", **options):
                pass
        assert refused.value.response.status_code == 401
        assert json.loads(refused.value.response.body or b"")["code"] == "unauthorized"


# ---- how they end


async def test_refreshed_token_goes_on_and_one_that_is_not_ends_with_4004(guarded: Server) -> None:
    room, life_s = uuid.uuid4().hex, 1.5
    async with contextlib.AsyncExitStack() as stack:
        early, late, never = [await stack.enter_async_context(Peer.of(guarded)) for _ in range(3)]
        ends = time.time() + life_s
        for peer, name in ((early, "early"), (late, "late"), (never, "never")):
            assert outcome(await peer.join(room, mint(name, ttl_s=ends - time.time()))) == "joined"
            assert 0 < (await peer.hear("token-expiring"))["payload"]["in"] <= 2
        refreshed = await early.ask("refreshed", type="refresh", id="1", payload={"token": mint("early")})
        assert (refreshed["id"], refreshed["payload"]) == ("1", {"expires_in": 600})
        assert outcome(await early.ask(type="refresh", payload={"token": mint("other")})) == "identity_mismatch"
        await eventually("token_expired", lambda: late.ask(type="message", room=room, recipient="nobody"))
        assert time.time() >= ends
        assert outcome(await late.ask("pong", type="ping")) == "pong"
        assert outcome(await late.ask("refreshed", type="refresh", payload={"token": mint("late")})) == "refreshed"
        await late.say(type="message", room=room, recipient="early", payload="still here")
        assert (await early.hear("message"))["payload"] == "still here"
        assert await never.closed() == 4004
        assert time.time() >= ends + 0.5
        assert (await early.hear("peer-left"))["sender"] == "never"


async def test_room_that_a_refreshed_token_does_not_grant_is_left(guarded: Server) -> None:
    async with Peer.of(guarded) as peer, Peer.of(guarded) as other:
        for room in ("stays", "goes"):
            await peer.join(room, mint("alice"))
        await other.join("goes", mint("bob"))
        await peer.say(type="refresh", payload={"token": mint("alice", rooms=["stays"])})
        assert (await peer.hear("left"))["room"] == "goes"
        await peer.hear("refreshed")
        assert (await other.hear("peer-left"))["payload"]["reason"] == "kicked"
        assert outcome(await peer.join("goes")) == "forbidden"


async def test_client_with_a_token_function_stays_in_the_room_over_the_ends_of_its_tokens(guarded: Server) -> None:
    made = []

    async def token() -> str:
        made.append(mint("alice", ttl_s=1.0))
        return made[-1]

    room, ends = uuid.uuid4().hex, time.monotonic() + 1.7  # by then 4004 would have come
    async with (
        fastsig.connect(guarded.url, room, token=token) as alice,
        fastsig.connect(guarded.url, room, token=mint("bob"), ack=True) as bob,
    ):
        n = bob.peers["alice"].n
        while time.monotonic() < ends:
            assert await bob.send("alice", "message") == 1
            assert isinstance(await anext(alice), fastsig.Message | fastsig.PeerJoined)
            await asyncio.sleep(0.1)
        assert (bob.peers["alice"].n, alice.n) == (n, n), "one membership"
        assert 2 <= len(made) <= 6


# ---- who may throw whom out


async def in_rooms(server: Server, play: Callable[[str], Any]) -> None:
    """In many rooms at once; in some of them somebody is elsewhere.

    Those are who was passed on for another room: the others move to their room when they join it. One in four is such
    a one, so with the usual 8 rooms nobody is, one time in ten.
    """
    relayed = counted(server, TO_OWNER)
    for _ in range(ROUNDS):
        await asyncio.gather(*(play(uuid.uuid4().hex) for _ in range(ROOMS)))
        if counted(server, TO_OWNER) > relayed:
            return
    pytest.fail("nobody was ever elsewhere")


def anywhere(server: Server) -> contextlib.AbstractAsyncContextManager[Peer]:
    """A connection at a worker that chance picks."""
    return Peer.of(server, f"?room={uuid.uuid4().hex}")


async def test_kick_ends_a_peer_wherever_it_is_and_keeps_it_out_for_its_time(guarded: Server) -> None:
    async def play(room: str) -> None:
        async with anywhere(guarded) as admin, anywhere(guarded) as victim, anywhere(guarded) as other:
            await admin.join(room, mint("admin", can=["join", "relay", "create", "admin"]))
            await victim.join(room, mint("victim"))
            await other.join(room, mint("other"))
            await victim.say(type="message", room=room, recipient="other")
            await other.hear("message")
            for kicker, about, answer in ((other, "victim", "forbidden"), (admin, "nobody", "peer_unavailable")):
                assert outcome(await kicker.ask("kicked", type="kick", room=room, recipient=about)) == answer
            kicked = await admin.ask(
                "kicked", type="kick", room=room, recipient="victim", id="k", payload={"seconds": 1}
            )
            assert kicked == {"type": "kicked", "room": room, "recipient": "victim", "id": "k"}
            began = time.monotonic()
            assert (await victim.hear("left"))["payload"] == {"reason": "kicked"}
            assert await victim.closed() == 4503
            assert (await other.hear("peer-left"))["payload"]["reason"] == "kicked"
            async with anywhere(guarded) as again:
                assert outcome(await again.join(room, mint("victim"))) == "forbidden"
                await eventually("joined", lambda: again.join(room, mint("victim")), 0.25)
                assert time.monotonic() - began > 0.9

    await in_rooms(guarded, play)


async def test_peer_with_the_same_proof_takes_the_place_of_the_older_one_wherever_both_are(
    guarded: Server, publisher: Issuer
) -> None:
    async def play(room: str) -> None:
        async with anywhere(guarded) as older, anywhere(guarded) as newer, anywhere(guarded) as other:
            n = (await older.join(room, mint("alice")))["payload"]["n"]
            await other.join(room, mint("bob"))
            async with anywhere(guarded) as impostor:
                answer = await impostor.join(room, publisher.mint("alice", kid="key-1"))
                assert (outcome(answer), answer["retry"], answer["after_ms"]) == ("id_taken", True, 6000)
            joined = (await newer.join(room, mint("alice")))["payload"]
            assert [peer["sender"] for peer in joined["peers"]] == ["bob"]
            assert await older.closed() == 4507
            left = await other.hear("peer-left")
            assert (left["sender"], left["payload"]) == ("alice", {"n": n, "reason": "replaced"})
            assert (await other.hear("peer-joined"))["payload"]["n"] == joined["n"] > n
            await newer.say(type="message", room=room, recipient="bob", payload=1)
            assert (await other.hear("message"))["sender"] == "alice"

    await in_rooms(guarded, play)


async def test_client_that_is_kicked_replaced_or_refused_stops_and_says_why(guarded: Server) -> None:
    room, asked = uuid.uuid4().hex, []

    async def bad() -> str:
        asked.append("x.y.z")
        return asked[-1]

    with pytest.raises(fastsig.RefusedError) as refused:
        async with fastsig.connect(guarded.url, room, token=bad):
            pass
    assert (refused.value.code, len(asked)) == ("unauthorized", 1)
    async with (
        fastsig.connect(guarded.url, room, token=mint("admin", can=["join", "admin", "create"])) as admin,
        fastsig.connect(guarded.url, room, token=mint("victim")) as victim,
        fastsig.connect(guarded.url, room, token=mint("twice")) as first,
        fastsig.connect(guarded.url, room, token=mint("twice")) as second,
    ):
        await admin.kick("victim")
        for one, code, number in ((victim, "kicked", 4503), (first, "replaced", 4507)):
            with pytest.raises(fastsig.ClosedError) as ended:
                async for _ in one:
                    pass
            assert (ended.value.code, ended.value.close_code) == (code, number)
        assert set(second.peers) == {"admin"}


# ---- keys of an issuer that come, and go


@pytest.fixture
def hurry(serve: Serve, tmp_path: Path) -> Serve:
    """`serve`, of servers that are in haste and require tokens."""

    def start(*args: str, **env: str) -> Server:
        return serve("--auth.required", *args, env=hurried(tmp_path) | env)

    return start


async def test_issuer_that_is_down_at_the_start_is_asked_again_and_may_go_again(hurry: Serve, issuer: Issuer) -> None:
    issuer.stop()
    server = hurry(**issuer.options)
    async with Peer.of(server) as peer:
        answer = await peer.join("r", issuer.mint("a"))
        assert (answer["code"], answer["retry"]) == ("backend_unavailable", True)
    with pytest.raises(InvalidStatus) as refused:
        async with Peer.of(server, f"?token={issuer.mint('a')}"):
            pass
    assert refused.value.response.status_code == 503

    def start_later() -> None:
        until(lambda: checked(server, "keys_unavailable") > 2, "nobody tries")
        issuer.start()

    asyncio.get_running_loop().run_in_executor(None, start_later)
    async with fastsig.connect(server.url, "r", token=issuer.mint("client"), backoff=(0.1, 0.2)) as room:
        assert room.id == "client", "it has tried until the keys were there"
    issuer.stop()
    await asyncio.sleep(0.6)  # so long that it may be asked again
    assert await outcome_of(server, issuer.mint("a")) == "joined", "the keys that are known stay good"
    assert await outcome_of(server, issuer.mint("a", kid=issuer.rotate())) == "unauthorized"
    assert server.events("keys_not_fetched")


async def test_keys_that_are_rotated_under_load_refuse_nobody(hurry: Serve, issuer: Issuer) -> None:
    """A new key appears among joins; those who show it wait for one fetch of each worker, the others for nothing."""
    server = hurry("--workers", "2", **issuer.options)
    assert set(await asyncio.gather(*(outcome_of(server, issuer.mint(f"a{at}")) for at in range(8)))) == {"joined"}
    old = issuer.newest
    await asyncio.sleep(0.6)  # the least time between two fetches
    asked, issuer.delay_s = issuer.requests, 1.0
    took: dict[str, list[float]] = {old: []}

    async def come(at: int) -> str:
        await asyncio.sleep(at / 100)
        if at == 15:
            took[issuer.rotate(keeps_old=True)] = []
        kid = old if at % 3 else issuer.newest
        began = time.monotonic()
        found = await outcome_of(server, issuer.mint(f"peer-{at}", kid=kid))
        took[kid].append(time.monotonic() - began)
        return found

    assert Counter(await asyncio.gather(*map(come, range(50)))) == {"joined": 50}
    assert 1 <= issuer.requests - asked <= 2, "one for each worker"
    (new,) = set(took) - {old}
    assert max(took[new]) > 0.5, "somebody waited"
    assert sorted(took[old])[len(took[old]) // 2] < 0.5, "and nobody else"


# ---- what reloads


async def test_token_that_is_revoked_ends_its_connections_at_every_worker(serve: Serve, tmp_path: Path) -> None:
    file, revoked = tmp_path / "fastsig.toml", "[]"

    def configure(revoked: str) -> None:
        file.write_text(f'[auth]\nrequired = true\nkeys = ["secret:{SECRET}"]\nrevoked = {revoked}\n', encoding="utf-8")

    configure(revoked)
    server = serve("--workers", "2", "--config", str(file))
    async with contextlib.AsyncExitStack() as stack:
        pairs = [[await stack.enter_async_context(anywhere(server)) for _ in range(2)] for _ in range(ROOMS)]
        for room, (alice, bob) in enumerate(pairs):
            await alice.join(f"r{room}", mint("alice"))
            await bob.join(f"r{room}", mint("bob"))
        configure('["alice"]')
        server.process.send_signal(signal.SIGHUP)
        assert await asyncio.gather(*(alice.closed() for alice, _ in pairs)) == [4500] * ROOMS
        for _, bob in pairs:
            assert (await bob.hear("peer-left"))["payload"]["reason"] == "kicked"
            assert outcome(await bob.ask("pong", type="ping")) == "pong"
        assert await outcome_of(server, mint("alice")) == "unauthorized"
        assert checked(server, "revoked") == ROOMS + 1
        configure(f'["alice@{int(time.time()) - 1}"]')
        server.process.send_signal(signal.SIGHUP)
        async with Peer.of(server) as again:
            await eventually("joined", lambda: again.join("r", mint("alice")), 0.25)


# ---- the webhook


DECISIONS: dict[str, dict[str, Any]] = {
    "guest": {"result": "allow", "meta": {"role": "guest"}, "limits": {"rooms_per_connection": 1}},
    "banned": {"result": "deny", "code": "forbidden"},
    "early": {"result": "deny", "code": "room_locked", "after_ms": 1500},
    "first": {"result": "allow", "max_peers": 1},
    "broken": {"result": "perhaps"},
}


async def test_webhook_decides_who_joins_with_what(serve: Serve, webhook: Webhook) -> None:
    webhook.decide = lambda question: DECISIONS.get(question["peer"], {"result": "allow"})
    server = serve("--workers", "2", env=webhook.options)

    async def play(room: str) -> None:
        async with contextlib.AsyncExitStack() as stack:
            host, guest, *others = [await stack.enter_async_context(anywhere(server)) for _ in range(5)]
            assert outcome(await host.ask("joined", type="join", room=room, sender="host")) == "joined"
            await guest.say(type="join", room=room, sender="guest", payload={"meta": "mine"})
            await guest.say(type="message", room=room, payload="said while it waits")
            assert (await host.hear())["payload"]["meta"] == {"role": "guest"}
            assert (await host.hear())["payload"] == "said while it waits"
            assert outcome(await guest.hear()) == "joined"
            assert outcome(await guest.ask(type="update", room=room, payload={"meta": 1})) == "forbidden"
            assert outcome(await guest.ask(type="join", room="another")) == "too_many_rooms"
            answers = [
                await other.ask("joined", type="join", room=room, sender=name)
                for other, name in zip(others, ("banned", "early", "broken"), strict=True)
            ]
            assert [outcome(answer) for answer in answers] == ["forbidden", "room_locked", "backend_unavailable"]
            assert answers[1]["after_ms"] == 1500
            assert outcome(await others[0].ask("joined", type="join", room=f"{room}2", sender="first")) == "joined"
            assert outcome(await others[1].ask("joined", type="join", room=f"{room}2", sender="second")) == "room_full"

    await in_rooms(server, play)


async def test_webhook_that_is_slow_or_down_delays_nobody_else_and_fails_as_configured(
    serve: Serve, webhook: Webhook, tmp_path: Path
) -> None:
    file = tmp_path / "fastsig.toml"
    file.write_text("[auth]\nwebhook_seconds = 1.0\n", encoding="utf-8")
    server = serve("--config", str(file), env=webhook.options)
    async with contextlib.AsyncExitStack() as stack:
        a, b, slow = [await stack.enter_async_context(Peer.of(server)) for _ in range(3)]
        for peer, name in ((a, "a"), (b, "b")):
            assert outcome(await peer.ask("joined", type="join", room="r", sender=name)) == "joined"
        webhook.delay_s = 60.0
        await slow.say(type="join", room="r", sender="slow")
        waiting = asyncio.ensure_future(slow.hear())
        await asyncio.to_thread(until, lambda: webhook.under_way == 1, "it is not asked")
        for number in range(50):
            await a.say(type="message", room="r", recipient="b", payload=number)
            assert (await b.hear("message"))["payload"] == number
        assert not waiting.done()
        answer = await waiting
        assert (answer["code"], answer["retry"]) == ("backend_unavailable", True)
        webhook.stop()
        assert outcome(await slow.ask("joined", type="join", room="r", sender="slow")) == "backend_unavailable"
        file.write_text("[auth]\nwebhook_fails_open = true\n", encoding="utf-8")
        server.process.send_signal(signal.SIGHUP)
        await asyncio.to_thread(server.wait_for, "reloaded")
        ask = functools.partial(slow.ask, "joined", type="join", room="r", sender="slow")
        await eventually("joined", ask, 0.25)
