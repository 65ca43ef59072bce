"""Tokens in rooms: who gets which id, what is granted, how it ends, who takes whose place, who is thrown out."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import jwt
import pytest

from fastsig.auth import KeySets, Verifier
from fastsig.config import Auth, Limits
from fastsig.webhook import Decision, Question

from .issuing import jwk, jwk_set, private_key
from .memory import CLOSE, PONG, TEXT, UNIX, Client, Cluster, Host, frame, frame_of

SECRET = "0123456789abcdef0123456789abcdef"
OPTIONAL = Auth(keys=(f"secret:{SECRET}",))
REQUIRED = Auth(required=True, keys=OPTIONAL.keys)


def mint(sub: str = "alice", *, life_s: float = 3600, now: float = 1000.0, secret: str = SECRET, **claims: Any) -> str:
    """A token; `claims` are members of the claim `fastsig`, or, in capitals, of the token."""
    own = {name.lower(): value for name, value in claims.items() if name.isupper()}
    granted = {name: value for name, value in claims.items() if not name.isupper()}
    body = {"sub": sub, "exp": UNIX + now + life_s, "iat": UNIX + now} | own
    return jwt.encode(body | ({"fastsig": granted} if granted else {}), secret, algorithm="HS256")


def join(host: Host, token: str | None = None, room: str = "r", **message: Any) -> Client:
    """One who asks to join; nothing is taken yet."""
    client = host.connect()
    payload = message.pop("payload", {}) | ({"token": token} if token else {})
    client.say(type="join", room=room, payload=payload, **message)
    return client


def heard(client: Client) -> list[dict[str, Any]]:
    """The messages, and a close as one of them."""
    return [
        {"type": "close", "code": int.from_bytes(payload[:2], "big")} if opcode == CLOSE else json.loads(payload)
        for opcode, payload in client.take_frames() if opcode in {TEXT, CLOSE}
    ]  # fmt: skip


def live(host: Host, seconds: float, *clients: Client) -> None:
    """Time passes, and these show that they are alive."""
    while seconds > 0:
        host.advance(min(seconds, 20))
        seconds -= 20
        for client in clients:
            client.feed(frame(PONG))


def kinds(messages: list[dict[str, Any]]) -> list[str | int]:
    return [message.get("code") or message["type"] for message in messages]


@pytest.fixture
async def host() -> Host:
    return Host(auth=OPTIONAL)


@pytest.fixture
async def strict() -> Host:
    return Host(auth=REQUIRED, joins_per_s=0)


# ---- identity


async def test_token_in_a_join_gives_the_id_and_it_is_verified(host: Host) -> None:
    bob = host.join("bob")
    alice = join(host, mint())
    (joined,) = alice.take()
    assert joined["sender"] == "alice"
    assert joined["payload"]["peers"][0].get("verified") is None
    (arrived,) = bob.take()
    assert (arrived["sender"], arrived["payload"]["verified"]) == ("alice", True)
    carol = join(host, sender="carol")
    assert [peer.get("verified", False) for peer in carol.take()[0]["payload"]["peers"]] == [False, True]


async def test_where_tokens_are_required_nobody_is_called_verified(strict: Host) -> None:
    a = join(strict, mint("a"))
    b = join(strict, mint("b"))
    a.take()
    assert "verified" not in b.take()[0]["payload"]["peers"][0]


async def test_where_tokens_are_required_a_join_brings_one_and_a_hello_may_do_without(strict: Host) -> None:
    a = strict.connect()
    a.say(type="hello", sender="a", payload={"caps": ["ack"]})
    (welcome,) = a.take()
    assert welcome["type"] == "welcome"
    assert "sender" not in welcome
    a.say(type="hello")
    assert a.take_error() == "bad_message"
    a.say(type="join", room="r")
    assert a.take_error() == "unauthorized"
    a.say(type="join", room="r", payload={"token": mint("a")})
    assert a.take()[0]["sender"] == "a"


async def test_hello_without_a_token_does_not_stay_where_tokens_are_required() -> None:
    host = Host(auth=REQUIRED, first_message_s=10)
    a = host.connect()
    a.say(type="hello")
    a.take()
    host.advance(11)
    assert kinds(heard(a)) == [4007]


async def test_token_in_a_hello_is_the_one_for_all_joins(strict: Host) -> None:
    a = strict.connect()
    a.say(type="hello", payload={"token": mint("a", rooms=["r*", "exactly"])})
    assert a.take()[0]["sender"] == "a"
    for room, answer in (("r1", "joined"), ("exactly", "joined"), ("exactly-not", "forbidden"), ("s", "forbidden")):
        a.say(type="join", room=room)
        assert kinds(a.take()) == [answer], room


@pytest.mark.parametrize(
    ("sender", "answer"),
    [(None, "alice"), ("alice", "alice"), ("bob", "identity_mismatch"), ("alice/x", "identity_mismatch")],
)
async def test_sender_beside_a_token_is_its_subject(host: Host, sender: str | None, answer: str) -> None:
    client = join(host, mint(), **({"sender": sender} if sender else {}))
    (message,) = client.take()
    assert message.get("code", message["sender"] if message["type"] == "joined" else None) == answer


@pytest.mark.parametrize(
    ("sender", "answer"),
    [(None, "alice/made-1"), ("alice", "alice/made-1"), ("alice/tab", "alice/tab"), ("alicex", "identity_mismatch"),
     ("alice/" + "x" * 123, "too_large"), ("bob/tab", "identity_mismatch")],
)  # fmt: skip
async def test_multi_token_names_each_connection(host: Host, sender: str | None, answer: str) -> None:
    client = join(host, mint(multi=True), **({"sender": sender} if sender else {}))
    (message,) = client.take()
    assert message.get("code", message.get("sender")) == answer


async def test_token_for_another_subject_goes_nowhere(host: Host) -> None:
    a = join(host, mint("a"))
    a.take()
    for message in (
        {"type": "join", "room": "s", "payload": {"token": mint("b")}},
        {"type": "refresh", "payload": {"token": mint("b")}},
    ):
        a.say(**message)
        assert a.take_error() == "identity_mismatch"
    nobody = host.join("somebody")
    nobody.say(type="join", room="s", payload={"token": mint("b")})
    assert nobody.take_error() == "identity_mismatch"


@pytest.mark.parametrize("auth", [Auth(), OPTIONAL, REQUIRED])
async def test_bad_token_is_unauthorized_in_open_mode_too(auth: Auth) -> None:
    host = Host(auth=auth)
    client = join(host, mint(secret="x" * 32))
    assert client.take_error() == "unauthorized"
    client.say(type="hello", payload={"token": "nonsense"})
    assert client.take_error() == "unauthorized"


async def test_metadata_of_a_token_replaces_what_the_peer_says(host: Host) -> None:
    bob = host.join("bob")
    alice = join(host, mint(meta={"role": "teacher"}), payload={"meta": {"role": "king"}})
    alice.take()
    assert bob.take()[0]["payload"]["meta"] == {"role": "teacher"}
    alice.say(type="update", room="r", payload={"meta": {"role": "king"}})
    assert alice.take_error() == "forbidden"


# ---- grants


@pytest.mark.parametrize(
    ("can", "recipient", "answer"),
    [(["join", "create"], "b", "forbidden"), (["join", "create", "relay"], "b", None),
     (["join", "create", "relay"], None, "forbidden"), (["join", "create", "broadcast"], None, None),
     (["join", "create", "broadcast"], "b", "forbidden")],
)  # fmt: skip
async def test_relay_and_broadcast_are_granted_each(host: Host, can: list[str], recipient: str | None,
                                                    answer: str | None) -> None:  # fmt: skip
    a = join(host, mint("a", can=can))
    b = host.join("b")
    a.take()
    a.say(type="message", room="r", id="1", **({"recipient": recipient} if recipient else {}))
    if answer is None:
        assert (a.take(), len(b.take())) == ([], 1)
    else:
        assert (a.take_error(), b.take()) == (answer, [])


async def test_room_that_is_not_there_may_be_made_only_by_whom_it_is_granted(host: Host) -> None:
    a = join(host, mint("a", can=["join"]))
    assert a.take_error() == "forbidden"
    host.join("b")
    a.say(type="join", room="r")
    assert a.take()[0]["type"] == "joined"


async def test_limits_of_a_token_are_its_connections() -> None:
    host = Host(auth=OPTIONAL, messages_per_s=10, message_burst=20, rooms_per_connection=2)
    a = host.connect()
    token = mint("a", limits={"messages_per_s": 100, "message_burst": 300, "rooms_per_connection": 3})
    a.say(type="hello", payload={"token": token})
    assert a.take()[0]["payload"]["limits"] == {"message_bytes": 65536, "messages_per_s": 100, "rooms": 3}
    for room in "rstu":
        a.say(type="join", room=room)
    assert kinds(a.take()) == ["joined"] * 3 + ["too_many_rooms"]
    for _ in range(295):
        a.say(type="ping")
    assert kinds(a.take()) == ["pong"] * 295
    for _ in range(3):  # a refresh fills nothing up
        a.say(type="refresh", payload={"token": token})
    assert kinds(a.take())[-1] == "rate_limited"


# ---- the end of a token


async def test_end_of_a_token_is_announced_enforced_and_final(host: Host) -> None:
    bob = host.join("bob")
    alice = join(host, mint(life_s=100))
    alice.take()
    bob.take()
    live(host, 39, alice, bob)
    assert heard(alice) == []
    host.advance(1.5)
    assert [(m["type"], m["payload"]) for m in heard(alice)] == [("token-expiring", {"in": 60})]
    live(host, 60, alice, bob)
    for message in ({"type": "message", "room": "r"}, {"type": "join", "room": "s"}, {"type": "update", "room": "r"}):
        alice.say(**message)
    alice.say(type="ping")
    assert kinds(heard(alice)) == ["token_expired"] * 3 + ["pong"]
    live(host, 28, alice, bob)
    alice.take_frames()
    host.advance(2)
    assert kinds(heard(alice)) == [4004]
    assert [message["payload"]["reason"] for message in heard(bob)] == ["lost"]


async def test_refresh_goes_on_and_leaves_what_is_not_granted_any_more(host: Host) -> None:
    bob = host.join("bob")
    alice = join(host, mint(life_s=100))
    alice.say(type="join", room="s")
    live(host, 110, alice, bob)
    alice.take_frames()
    alice.say(type="refresh", id="1", payload={"token": mint(life_s=500, now=host.now, rooms=["s"])})
    left, refreshed = heard(alice)
    assert (left["type"], left["room"], left["payload"]) == ("left", "r", {"reason": "kicked"})
    assert refreshed == {"type": "refreshed", "payload": {"expires_in": 500}, "id": "1"}
    assert heard(bob)[-1]["payload"]["reason"] == "kicked"
    alice.say(type="message", room="s")
    assert heard(alice) == []
    live(host, 441, alice, bob)
    assert kinds(heard(alice)) == ["token-expiring"]


async def test_token_that_is_over_when_it_is_shown_ends_the_connection(strict: Host) -> None:
    for what in ("hello", "join"):
        client = strict.connect()
        client.say(type=what, room="r", payload={"token": mint(life_s=-1)})
        assert kinds(heard(client)) == ["token_expired", 4004]


async def test_refreshes_are_as_rare_as_joins() -> None:
    """A signature may cost 0.1 ms: at the rate of messages a few peers would keep a core busy with them."""
    host = Host(auth=OPTIONAL, joins_per_s=1)
    alice = join(host, mint())
    for _ in range(5):
        alice.say(type="refresh", payload={"token": mint()})
    assert kinds(heard(alice)) == ["joined"] + ["refreshed"] * 3 + ["rate_limited"] * 2


async def test_refresh_without_a_token_before_is_out_of_place(host: Host) -> None:
    client = host.join("alice")
    client.say(type="refresh", payload={"token": mint()})
    assert client.take_error() == "bad_message"
    client.say(type="refresh")
    assert client.take_error() == "bad_message"


async def test_token_that_is_revoked_ends_its_connections_at_once(host: Host) -> None:
    bob = host.join("bob")
    alice, carol = join(host, mint("alice")), join(host, mint("carol"))
    for client in (alice, bob, carol):
        client.take()
    host.configure_auth(Auth(keys=OPTIONAL.keys, revoked=("alice",)))
    host.run()
    assert kinds(heard(alice)) == [4500]
    assert [(m["sender"], m["payload"]["reason"]) for m in bob.take()] == [("alice", "kicked")]
    assert join(host, mint("alice")).take_error() == "unauthorized"
    assert join(host, mint("carol"), room="s").take()[0]["type"] == "joined"


# ---- the same id twice


@pytest.mark.parametrize("where", ["here", "holder elsewhere", "newcomer elsewhere", "both elsewhere"])
async def test_newcomer_with_the_same_proof_replaces_the_holder(where: str) -> None:
    cluster = Cluster(3, auth=OPTIONAL)
    room = cluster.room(owner=0)
    homes = {"here": (0, 0), "holder elsewhere": (1, 0), "newcomer elsewhere": (0, 1), "both elsewhere": (1, 2)}
    old, new, other = (cluster[slot].connect() for slot in (*homes[where], 1))

    def say(client: Client, **message: Any) -> None:
        client.feed_only(frame_of(**message))
        cluster.run()

    say(other, type="join", room=room, sender="other")
    say(old, type="join", room=room, payload={"token": mint()})
    cluster.advance(0.25)
    n = heard(old)[0]["payload"]["n"]
    other.take_frames()
    say(new, type="join", room=room, payload={"token": mint()})
    assert kinds(heard(old)) == [4507]
    (joined,) = heard(new)
    assert joined["payload"]["n"] > n
    assert [peer["sender"] for peer in joined["payload"]["peers"]] == ["other"]
    left, came = heard(other)
    assert (left["type"], left["payload"]) == ("peer-left", {"n": n, "reason": "replaced"})
    assert (came["type"], came["payload"]["n"]) == ("peer-joined", joined["payload"]["n"])
    say(other, type="message", room=room, recipient="alice")
    assert kinds(heard(new)) == ["message"]


@pytest.mark.parametrize(("holder", "newcomer"), [(None, None), (mint, None)], ids=["neither", "holder"])
async def test_who_does_not_prove_it_throws_nobody_out(
    host: Host, holder: Callable[[], str] | None, newcomer: Callable[[], str] | None
) -> None:
    old = join(host, holder and holder(), **({} if holder else {"sender": "alice"}))
    old.take()
    new = join(host, newcomer and newcomer(), **({} if newcomer else {"sender": "alice"}))
    (error,) = new.take()
    assert (error["code"], error["retry"], error["after_ms"]) == ("id_taken", True, 6000)
    assert [opcode for opcode, _ in old.take_frames()] == [9], "it is asked whether it lives"


async def test_who_proves_an_id_need_not_wait_for_one_that_only_says_so(host: Host) -> None:
    squatter = join(host, sender="alice")
    squatter.take()
    assert join(host, mint()).take()[0]["type"] == "joined"
    assert kinds(heard(squatter)) == [4507]


async def test_id_that_another_subject_proves_is_taken(host: Host) -> None:
    bob = join(host, mint("alice/bob"))
    bob.take()
    tab = join(host, mint("alice", multi=True), sender="alice/bob")
    assert tab.take_error() == "id_taken"
    assert all(opcode != CLOSE for opcode, _ in bob.take_frames())


async def test_join_that_was_read_before_the_holders_never_replaces_it(host: Host) -> None:
    asked = host.ask_webhook()
    slow = join(host, mint(), payload={"meta": "slow"})
    host.advance(1)
    fast = join(host, mint(), payload={"meta": "fast"})
    asked[1][1](Decision(is_allowed=True))
    host.run()
    assert kinds(fast.take()) == ["joined"]
    asked[0][1](Decision(is_allowed=True))
    host.run()
    assert kinds(slow.take()) == ["id_taken"]
    assert all(opcode != CLOSE for opcode, _ in fast.take_frames())


# ---- kick


@pytest.mark.parametrize("home", [0, 1])
@pytest.mark.parametrize("kicker_at", [0, 1])
async def test_admin_kicks_a_peer_which_does_not_come_back_before_its_time(home: int, kicker_at: int) -> None:
    cluster = Cluster(2, auth=OPTIONAL)
    room, second = cluster.room(owner=0), cluster.room(owner=0, number=1)
    admin, victim, other = cluster[kicker_at].connect(), cluster[home].connect(), cluster[0].connect()

    def say(client: Client, **message: Any) -> list[dict[str, Any]]:
        client.feed_only(frame_of(**message))
        cluster.run()
        return heard(client)

    say(other, type="join", room=room, sender="other")
    say(victim, type="join", room=room, sender="victim")
    say(victim, type="join", room=second)
    say(admin, type="hello", payload={"token": mint("admin", can=["admin"], rooms=[room])})
    other.take_frames()
    assert say(admin, type="kick", room=room, recipient="victim", id="k", payload={"seconds": 20}) == [
        {"type": "kicked", "room": room, "recipient": "victim", "id": "k"}
    ]
    assert [m["payload"]["reason"] for m in heard(other)] == ["kicked"]
    (left,) = heard(victim)
    assert (left["type"], left["room"], left["payload"]["reason"]) == ("left", room, "kicked")
    assert kinds(say(victim, type="join", room=room)) == ["forbidden"]
    assert kinds(say(admin, type="kick", room=room, recipient="victim")) == ["peer_unavailable"]
    assert kinds(say(admin, type="kick", room=second, recipient="victim")) == ["forbidden"]
    cluster.advance(21)
    assert kinds(say(victim, type="join", room=room)) == ["joined"]


async def test_kicked_from_its_last_room_is_closed(host: Host) -> None:
    victim = host.join("victim")
    admin = join(host, mint("admin", can=["join", "admin"]))
    admin.say(type="kick", room="r", recipient="victim")
    assert kinds(heard(victim)) == ["peer-joined", "left", 4503]


@pytest.mark.parametrize(
    ("message", "answer"),
    [({}, "bad_message"), ({"recipient": ["a", "b"]}, "bad_message"), ({"recipient": "x"}, "peer_unavailable"),
     ({"recipient": "x", "payload": {"seconds": -1}}, "bad_message"),
     ({"recipient": "x", "payload": {"seconds": 86401}}, "bad_message")],
)  # fmt: skip
async def test_kick_that_means_nothing_is_refused(host: Host, message: dict[str, Any], answer: str) -> None:
    admin = join(host, mint("admin", can=["join", "create", "admin"]))
    admin.take()
    admin.say(type="kick", room="r", **message)
    assert admin.take_error() == answer


async def test_kick_is_answered_when_the_owner_is_lost_or_silent() -> None:
    cluster = Cluster(2, auth=OPTIONAL)
    room = cluster.room(owner=1)
    admin = cluster[0].connect()
    admin.feed_only(frame_of(type="hello", payload={"token": mint("admin", can=["admin"])}))
    cluster.run()
    admin.take()
    admin.feed_only(frame_of(type="kick", room=room, recipient="x", id="lost"))
    cluster.kill(1)
    cluster.run()
    (error,) = admin.take()
    assert (error["code"], error["id"]) == ("backend_unavailable", "lost")
    admin.feed_only(frame_of(type="kick", room=room, recipient="x", id="gone"))
    cluster.run()
    assert admin.take_error() == "backend_unavailable"


# ---- the webhook


async def test_webhook_decides_and_what_is_said_meanwhile_waits(host: Host) -> None:
    asked = host.ask_webhook()
    alice = join(host, mint("alice"), payload={"meta": "mine"}, id="j")
    alice.say(type="message", room="r", id="m")
    alice.say(type="ping", id="p")
    assert alice.take() == []
    question: Question = asked[0][0]
    assert (question.room, question.peer, question.subject, bytes(question.meta)) == ("r", "alice", "alice", b'"mine"')
    asked[0][1](Decision(is_allowed=True, meta=b'"theirs"', limits={"rooms_per_connection": 1}, max_peers=1))
    host.run()
    assert kinds(alice.take()) == ["joined", "pong"]
    room = host.relay.find_room("r")
    assert room is not None
    assert (room.max_peers, room.members[0].meta) == (1, b'"theirs"')
    alice.say(type="update", room="r", payload={"meta": 1})
    alice.say(type="join", room="s")
    assert kinds(alice.take()) == ["forbidden", "too_many_rooms"]


async def test_limits_of_the_webhook_hold_whatever_token_is_shown_later(host: Host) -> None:
    asked = host.ask_webhook()
    alice = join(host, mint("alice", limits={"rooms_per_connection": 5}))
    asked[0][1](Decision(is_allowed=True, limits={"rooms_per_connection": 1}))
    host.run()
    alice.take()
    for token in (mint("alice"), mint("alice", limits={"rooms_per_connection": 9, "joins_per_s": 1})):
        alice.say(type="refresh", payload={"token": token})
        alice.say(type="join", room="s")
        assert kinds(alice.take()) == ["refreshed", "too_many_rooms"]


async def test_reload_reaches_connections_that_have_joined_already(host: Host) -> None:
    asked = host.ask_webhook()
    alice, bob = join(host, sender="alice"), join(host, sender="bob")
    asked[0][1](Decision(is_allowed=True, limits={"rooms_per_connection": 20}))
    asked[1][1](Decision(is_allowed=True))
    host.run()
    host.hub.asker = None
    host.hub.configure(Limits(joins_per_s=1, messages_per_s=0, rooms_per_connection=9), OPTIONAL, Verifier(OPTIONAL))
    for client in (alice, bob):
        client.take()
        for number in range(6):
            client.say(type="join", room=f"r{number}")
        assert kinds(client.take()) == ["joined"] * 4 + ["rate_limited"] * 2


async def test_webhook_that_denies_says_why(host: Host) -> None:
    asked = host.ask_webhook()
    alice = join(host, sender="alice", id="j")
    asked[0][1](Decision(is_allowed=False, code="room_locked", after_ms=500))
    host.run()
    (error,) = alice.take()
    assert (error["code"], error["after_ms"], error["id"], error["room"]) == ("room_locked", 500, "j", "r")


async def test_decision_that_is_known_needs_no_waiting(host: Host) -> None:
    host.ask_webhook(known=Decision(is_allowed=False, code="forbidden"))
    alice = join(host, sender="alice")
    assert kinds(alice.take()) == ["forbidden"]
    alice.say(type="ping")
    assert kinds(alice.take()) == ["pong"]


@pytest.mark.parametrize(
    ("known", "answer"),
    [(Decision(is_allowed=True), "joined"), (Decision(is_allowed=False, code="forbidden"), "forbidden")],
)
async def test_decision_that_is_known_counts_once_where_keys_were_waited_for(known: Decision, answer: str) -> None:
    """The second time it found the peer in the room, with the same proof, and replaced it."""
    url, key = "https://issuer.example/keys", private_key("EC")

    async def fetch(source: str) -> bytes:
        return jwk_set(jwk(key, kid="1", alg="ES256"))

    auth = Auth(required=True, jwks_url=url)
    host, key_sets = Host(auth=auth), KeySets(fetch)
    host.hub.configure(host.limits, auth, Verifier(auth, key_sets), key_sets)
    host.ask_webhook(known=known)
    body = {"sub": "alice", "exp": UNIX + host.now + 3600}
    alice = join(host, jwt.encode(body, key, algorithm="ES256", headers={"kid": "1"}))
    assert alice.take() == []
    async with asyncio.timeout(10):
        while not (answers := heard(alice)):
            await asyncio.sleep(0)
            host.run()
    assert kinds(answers) == [answer]
    alice.say(type="ping")
    assert kinds(heard(alice)) == ["pong"]


async def test_join_that_is_withdrawn_cancels_its_question(host: Host) -> None:
    asked = host.ask_webhook()
    join(host, sender="alice").vanish()
    assert asked[0][2].is_cancelled
    asked[0][1](Decision(is_allowed=True))
    host.run()
    assert host.relay.find_room("r") is None


async def test_webhook_that_never_answers_is_given_up(host: Host) -> None:
    asked = host.ask_webhook()
    alice = join(host, sender="alice")
    host.advance(5.25)
    assert kinds(heard(alice)) == ["backend_unavailable"]
    assert asked[0][2].is_cancelled


# ---- with the handshake


def request(*headers: str, query: str = "") -> bytes:
    lines = [
        f"GET /ws{query} HTTP/1.1", "Host: localhost", "Upgrade: websocket", "Connection: Upgrade",
        "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *headers,
    ]  # fmt: skip
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def knock(host: Host, *headers: str, query: str = "") -> tuple[Client, bytes, list[dict[str, Any]]]:
    """The head of the answer, and the messages behind it or the error in its body."""
    client = host.accept()
    client.feed(request(*headers, query=query))
    head, _, rest = client.take_bytes().partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101"):
        return client, head, [json.loads(rest)]
    client.transport.sent += rest
    return client, head, heard(client)


PLACES: dict[str, Callable[[str], tuple[list[str], str]]] = {
    "subprotocol": lambda token: ([f"Sec-WebSocket-Protocol: fastsig.v1.json, bearer.{token}"], ""),
    "authorization": lambda token: ([f"Authorization: Bearer {token}"], ""),
    "query": lambda token: ([], f"?token={token}"),
}


@pytest.mark.parametrize("place", PLACES)
async def test_token_may_come_with_the_handshake(strict: Host, place: str) -> None:
    headers, query = PLACES[place](mint())
    client, head, _ = knock(strict, *headers, query=query)
    assert b"bearer" not in head
    client.say(type="join", room="r")
    assert client.take()[0]["sender"] == "alice"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("life_s", "code", "close"), [(60, "unauthorized", 4500), (-1, "token_expired", 4004)])
async def test_bad_token_of_a_handshake_is_refused_and_browsers_are_told(
    strict: Host, place: str, life_s: float, code: str, close: int
) -> None:
    token = mint(life_s=life_s, secret="x" * 32 if life_s > 0 else SECRET)
    headers, query = PLACES[place](token)
    client, head, (error,) = knock(strict, *headers, query=query)
    assert head.startswith(b"HTTP/1.1 401 ")
    assert b'WWW-Authenticate: Bearer error="invalid_token"' in head
    assert error["code"] == code
    client, head, messages = knock(strict, *headers, "Origin: https://app.example.org", query=query)
    assert head.startswith(b"HTTP/1.1 101 ")
    assert kinds(messages) == [code, close]
    assert client.is_shut()
    counted = strict.counted()
    assert counted[f'handshakes_total{{result="{code}"}}'] == 2
    assert "connections" not in counted


async def test_of_several_tokens_the_one_to_be_preferred_counts(strict: Host) -> None:
    alice, bob, carol, dave = (mint(name) for name in ("alice", "bob", "carol", "dave"))
    offered = f"Sec-WebSocket-Protocol: fastsig.v1.json, bearer.{bob}"
    client, _, _ = knock(strict, offered, f"Authorization: Bearer {carol}", query=f"?token={dave}")
    client.say(type="hello", payload={"token": bob})
    assert client.take()[0]["sender"] == "bob"
    client, _, _ = knock(strict, f"Authorization: Bearer {carol}", query=f"?token={dave}")
    client.say(type="join", room="r", payload={"token": alice})
    assert client.take_error() == "identity_mismatch"
    client.say(type="join", room="r")
    assert client.take()[0]["sender"] == "carol"


@pytest.mark.parametrize("headers", [["Authorization: Basic YTpi"], ["Authorization: bearer"], []])
async def test_request_without_a_token_defers_to_the_join(strict: Host, headers: list[str]) -> None:
    client, head, _ = knock(strict, *headers)
    if headers == ["Authorization: bearer"]:
        assert head.startswith(b"HTTP/1.1 401 "), "an empty token is present, and bad"
        return
    client.say(type="join", room="r")
    assert client.take_error() == "unauthorized"


async def test_end_of_a_handshakes_token_is_kept_too(strict: Host) -> None:
    client, _, _ = knock(strict, f"Authorization: Bearer {mint(life_s=30)}")
    client.say(type="hello")
    strict.advance(0.5)
    assert kinds(heard(client)) == ["welcome", "token-expiring"]
