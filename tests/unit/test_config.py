"""Each option is declared once, and everything else follows: names, checks, the page, the way to the workers."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastsig import config
from fastsig.config import BY_KEY, OPTIONS, Config, Option, build
from fastsig.errors import ConfigError

# ARCHITECTURE §7
NAMES = {
    "server": "host port path workers pin_workers backlog drain_seconds tls_cert tls_key tls_min_version"
    " origins tell_browsers trusted_proxies"
    " proxy_protocol moves runtime_dir echo_path",
    "limits": "message_bytes messages_per_s message_burst bytes_per_s fanout_bytes_per_s joins_per_s"
    " rooms_per_connection peers_per_room rooms connections connections_per_address"
    " connects_per_s_per_address connects_per_s handshake_seconds first_message_seconds output_bytes meta_bytes"
    " errors_per_5s dry_run",
    "auth": "required keys jwks_url issuer audience algorithms revoked webhook_url webhook_secret webhook_seconds"
    " webhook_concurrency webhook_fails_open",
    "session": "ttl_seconds ring_frames ring_bytes ring_seconds",
    "store": "url",
    "bus": "url",
    "ops": "host port token watched_rooms",
    "log": "level format addresses",
    "turn": "urls secret ttl_seconds",
    "tracing": "enabled relay_sample",
    "demo": "enabled",
}


def checked(**values: Any) -> Config:
    """The Config with these values, `server_port=1` for server.port, after `check`."""
    keys = {name.replace("_", ".", 1): value for name, value in values.items()}
    assert keys.keys() <= BY_KEY.keys()
    made = config.build(keys)
    config.check(made)
    return made


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(**values)
    return str(caught.value)


def test_options_are_those_of_the_architecture_page() -> None:
    assert [option.key for option in OPTIONS] == [f"{s}.{name}" for s, names in NAMES.items() for name in names.split()]


def test_every_default_is_of_its_type_and_passes_the_check() -> None:
    config.check(Config())
    assert config.build({}) == Config()
    for option in OPTIONS:
        value = list(option.default) if option.is_list else option.default
        assert option.accept(value) == option.default


def test_defaults_are_those_of_the_protocol_page() -> None:
    limits = Config().limits
    assert (limits.message_bytes, limits.messages_per_s, limits.message_burst) == (64 * 1024, 50, 200)
    assert (limits.bytes_per_s, limits.fanout_bytes_per_s, limits.joins_per_s) == (256 * 1024, 8 * 1024**2, 5)
    assert (limits.rooms_per_connection, limits.peers_per_room, limits.meta_bytes) == (16, 512, 1024)
    assert (limits.connections_per_address, limits.connects_per_s_per_address) == (1000, 20)
    assert (limits.handshake_seconds, limits.first_message_seconds, limits.output_bytes) == (10, 60, 1024**2)
    assert (limits.errors_per_5s, Config().session.ttl_seconds) == (20, 30)


def test_one_name_has_three_spellings() -> None:
    option = BY_KEY["limits.messages_per_s"]
    assert (option.flag, option.env) == ("--limits.messages-per-s", "FASTSIG_LIMITS_MESSAGES_PER_S")
    assert len({option.env for option in OPTIONS}) == len(OPTIONS), "sections and names joined by _ must stay apart"


def test_option_without_effect_says_so_at_the_end_of_its_help() -> None:
    assert BY_KEY["session.ttl_seconds"].help.endswith("(no effect yet)")
    assert "no effect" not in BY_KEY["server.port"].help


def test_config_reaches_a_worker_unchanged() -> None:
    sent = checked(
        server_workers=3, server_origins=("https://a.example",), limits_handshake_seconds=2.5, log_level="error"
    )
    assert msgspec.json.decode(msgspec.json.encode(sent), type=Config) == sent
    assert msgspec.json.decode(msgspec.json.encode(Config()), type=Config) == Config()


def test_largest_values_reach_a_worker_unchanged() -> None:
    sent = checked(limits_messages_per_s=2**53, limits_handshake_seconds=2.0**53)
    assert msgspec.json.decode(msgspec.json.encode(sent), type=Config) == sent


@pytest.mark.parametrize("key", ["auth_webhook_url", "auth_jwks_url"])
@pytest.mark.parametrize(
    "url",
    ["auth.example.com", "ftp://auth.example.com", "https://", "https://[::1", "https://a:99999", "https://a:0",
     "https://a b/", "https://ä.example", "file:///etc/passwd", "https://a/\nX: y"],
)  # fmt: skip
def test_url_that_cannot_be_asked_is_refused(key: str, url: str) -> None:
    assert "https://auth.example.com/path" in refusal(**{key: url, "auth_webhook_secret": "s" * 32})


def test_of_several_issuers_each_has_its_name() -> None:
    a, b = "https://a.example/jwks", "HTTPS://b.example/jwks?x=https://c.example"
    for urls in (f"{a} {b}", f"us={a} {b}", f"us={a} us={b}"):
        assert "ISSUER=https://" in refusal(auth_jwks_url=urls)
    made = checked(auth_jwks_url=f"https://a.example/={a} {b}", auth_issuer="us").auth
    assert config.key_sources(made) == [("https://a.example/", a), ("us", b)]
    assert [source.name for source in config.key_sources(checked(auth_jwks_url=a).auth)] == [a]
    assert "https://auth.example.com/path" in refusal(auth_jwks_url=f"us={a} them=ftp://x")
    assert config.plain_urls(checked(auth_jwks_url=f"us={a} them=http://10.0.0.1/").auth) == ["auth.jwks_url"]


@pytest.mark.parametrize("secret", ["", "s" * 31])
def test_webhook_needs_a_secret_that_cannot_be_guessed(secret: str) -> None:
    said = refusal(auth_webhook_url="https://auth.example.com", auth_webhook_secret=secret)
    assert "auth.webhook_secret" in said and "openssl rand -hex 32" in said and "sss" not in said
    checked(auth_webhook_url="https://auth.example.com", auth_webhook_secret="s" * 32)


def test_bounds_that_are_no_whole_numbers_are_said_exactly() -> None:
    assert "expected 0.1 to 4.5" in refusal(auth_webhook_seconds=0.0)
    assert "expected 1 to 4096" in refusal(auth_webhook_concurrency=0)


@pytest.mark.parametrize(
    ("url", "is_plain"),
    [
        ("http://auth.example.com/", True), ("http://10.0.0.1:80/", True), ("https://auth.example.com/", False),
        ("http://localhost:3000/", False), ("http://127.0.0.9/", False), ("http://[::1]:80/", False), ("", False),
        ("http://127.0.0.1.example.com/", True), ("HTTP://auth.example.com/", True), ("http://localhost@x.org/", True),
    ],
)  # fmt: skip
def test_plain_http_to_another_machine_is_told(url: str, *, is_plain: bool) -> None:
    assert config.plain_urls(build({"auth.webhook_url": url}).auth) == (["auth.webhook_url"] if is_plain else [])


def test_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().server.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("server.port", "9001", 9001),
        ("limits.messages_per_s", "1000000000000", 10**12),
        ("limits.handshake_seconds", "2.5", 2.5),
        ("limits.handshake_seconds", "3", 3.0),
        ("server.moves", "False", False),
        ("server.moves", "1", True),
        ("server.workers", "auto", "auto"),
        ("server.workers", "4", 4),
        ("log.level", "WARNING", "warning"),
        ("server.origins", "https://a https://b", ("https://a", "https://b")),
        ("server.origins", '["a b", "c"]', ("a b", "c")),
        ("server.origins", "[]", ()),
        ("auth.algorithms", "EdDSA ES256", ("EdDSA", "ES256")),
    ],
)
def test_text_is_parsed_by_the_type_of_the_option(key: str, text: str, value: object) -> None:
    parsed = BY_KEY[key].parse(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("server.port", "80.5", "a whole number"),
        ("server.port", "", "a whole number"),
        ("server.port", "9" * 5000, "a whole number"),
        ("limits.handshake_seconds", "soon", "a number"),
        ("server.moves", "maybe", "true or false"),
        ("server.workers", "many", "a whole number or auto"),
        ("log.level", "loud", "one of trace, debug, info, warning, error"),
        ("server.origins", '["a", 1]', "a list of texts"),
        ("server.origins", '["a"', "a JSON list"),
        ("auth.algorithms", "none", "some of HS256"),
    ],
)
def test_text_of_the_wrong_type_is_answered_with_what_is_expected(key: str, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BY_KEY[key].parse(text)


def test_toml_values_keep_their_types() -> None:
    tree = {
        "server": {"port": 9001, "origins": ["a"], "workers": "auto"},
        "limits": {"handshake_seconds": 3, "dry_run": True},
    }
    values = config.read_toml(tree, "x.toml")
    assert values == {
        "server.port": 9001, "server.origins": ("a",), "server.workers": "auto",
        "limits.handshake_seconds": 3.0, "limits.dry_run": True,
    }  # fmt: skip
    assert isinstance(values["limits.handshake_seconds"], float)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"limits": {"mesages_per_s": 1}}, "unknown key mesages_per_s in [limits], did you mean messages_per_s?"),
        ({"limits": {"port": 1}}, "unknown key port in [limits], did you mean port in [server]?"),
        ({"limits": {"zzz": 1}}, "unknown key zzz in [limits]"),
        ({"sever": {"port": 1}}, "unknown section [sever], did you mean [server]?"),
        ({"port": 1}, "unknown key port, did you mean port in [server]?"),
        ({"server": 1}, "[server]: expected a table, not a whole number"),
        ({"server": {"port": "80"}}, "server.port: expected a whole number, not text"),
        ({"server": {"port": True}}, "server.port: expected a whole number, not true or false"),
        ({"server": {"path": 1}}, "server.path: expected text, not a whole number"),
        ({"server": {"moves": 1}}, "server.moves: expected true or false, not a whole number"),
        ({"server": {"workers": 1.5}}, "server.workers: expected a whole number or auto, not a number"),
        ({"server": {"origins": "a"}}, "server.origins: expected a list of texts, not text"),
        ({"server": {"origins": ["a", 1]}}, "server.origins: expected a list of texts, not a list"),
        ({"log": {"level": "loud"}}, 'log.level: expected one of trace, debug, info, warning, error, not "loud"'),
        ({"auth": {"webhook_secret": {"a": 1}}}, "auth.webhook_secret: expected text, not a table"),
    ],
)
def test_toml_that_is_not_understood_is_refused_by_name(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.read_toml(tree, "x.toml")
    assert str(caught.value) == f"x.toml: {says}"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"server_port": 65536}, "server.port = 65536: expected 0 to 65535"),
        ({"server_port": -1}, "server.port = -1: expected 0 to 65535"),
        ({"server_workers": 0}, "server.workers = 0: expected 1 to 1024"),
        ({"server_backlog": 0}, "server.backlog = 0: expected 1 to 65535"),
        ({"server_host": ""}, 'server.host = "": expected an address or a name'),
        ({"server_path": "ws"}, 'server.path = "ws": expected a path that starts with /'),
        ({"server_path": "/a b"}, 'server.path = "/a b": expected visible ASCII'),
        ({"server_path": "/readyz"}, 'server.path = "/readyz": this path answers health checks'),
        ({"limits_message_bytes": 1023}, "limits.message_bytes = 1023: expected 1024 to 16777216"),
        ({"limits_message_bytes": 2**24 + 1}, "limits.message_bytes = 16777217: expected 1024 to 16777216"),
        ({"limits_peers_per_room": 65536}, "limits.peers_per_room = 65536: expected 0 to 65535"),
        ({"limits_rooms_per_connection": 1025}, "limits.rooms_per_connection = 1025: expected 0 to 1024"),
        ({"limits_meta_bytes": 65536}, "limits.meta_bytes = 65536: expected less than limits.message_bytes, 65536"),
        ({"limits_meta_bytes": 0}, "limits.meta_bytes = 0: expected 1 or more"),
        ({"limits_messages_per_s": -1}, "limits.messages_per_s = -1: expected 0 or more"),
        ({"limits_handshake_seconds": math.nan}, "limits.handshake_seconds = NaN: expected a finite number"),
        ({"limits_handshake_seconds": math.inf}, "limits.handshake_seconds = Infinity: expected a finite number"),
        ({"limits_handshake_seconds": -0.5}, "limits.handshake_seconds = -0.5: expected 0 or more"),
        ({"server_tls_cert": "a"}, 'server.tls_cert = "a": set server.tls_key too'),
        ({"server_tls_key": "a"}, 'server.tls_key = "a": set server.tls_cert too'),
        ({"server_echo_path": "/ws"}, 'server.echo_path = "/ws": this path is taken'),
        ({"server_echo_path": "echo"}, 'server.echo_path = "echo": expected a path that starts with /'),
        ({"server_echo_path": "/e", "server_proxy_protocol": True}, 'server.echo_path = "/e": leave it empty'),
        ({"ops_host": ""}, 'ops.host = "": expected an address or a name'),
        ({"ops_host": "0.0.0.0"}, 'ops.host = "0.0.0.0": set ops.token too'),
        ({"ops_host": "ops.example"}, 'ops.host = "ops.example": set ops.token too'),
        ({"ops_host": "::"}, 'ops.host = "::": set ops.token too'),
        ({"ops_port": 8080}, "ops.port = 8080: this is server.port too"),
        ({"ops_token": "a b"}, 'ops.token = "********": expected visible ASCII'),
        ({"ops_token": "secret-ü"}, 'ops.token = "********": expected visible ASCII'),
        (
            {"server_trusted_proxies": ("::1", "proxy")},
            'server.trusted_proxies = ["::1", "proxy"]: "proxy" is no address or network',
        ),
        (
            {"server_trusted_proxies": ("10.0.0.1/8",)},
            'server.trusted_proxies = ["10.0.0.1/8"]: "10.0.0.1/8" is no address or network',
        ),
        ({"server_proxy_protocol": True}, "server.proxy_protocol = true: set server.trusted_proxies"),
        (
            {"server_origins": ("null", "app.example.org")},
            'server.origins = ["null", "app.example.org"]: "app.example.org" is none: expected https://',
        ),
    ],
)
def test_value_out_of_place_is_refused_by_name_value_and_cure(values: dict[str, Any], says: str) -> None:
    assert refusal(**values).startswith(says)


@pytest.mark.parametrize(
    "origin",
    [
        "https://a.example", "HTTPS://A.Example:8443", "https://*.example.org", "http://localhost:3000", "http://[::1]:80",
        "capacitor://localhost", "chrome-extension://abcdef", "app://x", "null", "*", "https://192.0.2.1",
        "https://xn--bcher-kva.example", "https://a_b.example",
    ],
)  # fmt: skip
def test_origin_may_be_listed(origin: str) -> None:
    checked(server_origins=(origin,))


@pytest.mark.parametrize(
    "origin",
    [
        "", "a.example", "https://", "https:// a", "https://a.example/", "https://a.example/x", "https://a.example?",
        "https://a.example#", "//a.example", "https:a.example", "https://u@a.example", "https://a.example:",
        "https://a.example:65536", "https://a.example:http", "https://*", "https://*example.org", "https://a.*.org",
        "https://*.*.org", "*.example.org", "https://a..example", "https://bücher.example", "https://a.example,https://b",
        "https://[::1", "https://::1", "https://a.example\n", "NULL", "**",
    ],
)  # fmt: skip
def test_origin_that_is_none_may_not_be_listed(origin: str) -> None:
    assert "is none: expected https://app.example.org" in refusal(server_origins=(origin,))


def test_operations_port_without_a_token_is_for_loopback() -> None:
    for host in ("localhost", "127.0.0.1", "127.8.9.10", "::1", "[::1]"):
        checked(ops_host=host)
    checked(ops_host="0.0.0.0", ops_token="t")
    checked(ops_host="0.0.0.0", ops_port=0)
    checked(ops_port=0, server_port=0)


def test_number_too_large_for_a_float_is_refused() -> None:
    values = config.read_toml({"limits": {"handshake_seconds": 10**400}}, "x.toml")
    with pytest.raises(ConfigError, match="finite"):
        config.check(config.build(values))


def test_bounds_themselves_are_allowed() -> None:
    checked(
        limits_message_bytes=1 << 24, limits_peers_per_room=65535, limits_rooms_per_connection=1024, server_port=65535
    )
    checked(limits_message_bytes=1024, limits_meta_bytes=1023, limits_peers_per_room=0, server_port=0)


@pytest.mark.parametrize(
    ("written", "cure"), [("::ffff:10.0.0.0/104", "10.0.0.0/8"), ("::ffff:10.0.0.5", "10.0.0.5/32")]
)
def test_proxy_is_listed_in_the_form_in_which_it_is_seen(written: str, cure: str) -> None:
    said = refusal(server_trusted_proxies=("::1", written))
    assert said.endswith(f': "{written}" is IPv4 in the form of IPv6, write {cure}')


@pytest.mark.parametrize("item", ["alice@180000000", "a@b@7", "a@0"])
def test_date_that_would_take_nothing_back_is_refused(item: str) -> None:
    said = refusal(auth_revoked=("bob", item))
    assert said.startswith(f'auth.revoked = ["bob", "{item}"]: "{item}" is SUBJECT@SECONDS before 2001: expected')
    assert said.endswith(f'or "{item}@9999999999" for the subject "{item}"')


@pytest.mark.parametrize("item", ["alice", "alice@1800000000", "@7", "a@b@9999999999", "a@-7", "a@٧"])
def test_subject_may_be_revoked_by_name_or_until_a_date(item: str) -> None:
    checked(auth_revoked=(item,))


def test_refusal_says_where_the_value_came_from() -> None:
    with pytest.raises(ConfigError, match=r"server\.port = 70000 \(env FASTSIG_SERVER_PORT\): "):
        config.check(config.build({"server.port": 70000}), {"server.port": "env FASTSIG_SERVER_PORT"})


def test_secrets_are_masked_wherever_they_could_show() -> None:
    made = checked(auth_keys=("k-one", "k-two"), ops_token="t-secret", store_url="redis://u:p-secret@host:1/0")
    shown = {option.key: option.show(option.value_in(made)) for option in OPTIONS}
    assert shown["auth.keys"] == '["********", "********"]'
    assert shown["ops.token"] == '"********"'
    assert shown["store.url"] == '"redis://u:********@host:1/0"'
    assert BY_KEY["auth.keys"].show_text("k-one") == '"********"'
    url = BY_KEY["auth.jwks_url"]
    assert url.show(
        "a=https://u:p-secret@a.example/?key=k-secret https://i/=http://:p-secret@b.example:80/x?k-secret#f"
    ) == ('"a=https://u:********@a.example/?******** https://i/=http://:********@b.example:80/x?********#f"')
    assert url.show_text("https://user:" + "p-secret" * 20 + "@a.example") == '"https://user:********@a.example"'
    assert url.show("https://a.example:80/@x/y?") == '"https://a.example:80/@x/y?"'
    assert BY_KEY["turn.urls"].show(["turn:t.example?transport=udp"]) == '["turn:t.example?transport=udp"]'
    assert "k-one" not in repr(made) and "t-secret" not in repr(made)


def test_what_somebody_typed_is_shown_short_and_on_one_line() -> None:
    assert BY_KEY["server.port"].show_text("8\n0") == r'"8\n0"'
    assert len(BY_KEY["server.port"].show_text("8" * 1000)) < 100


def test_unknown_variables_are_listed_with_the_nearest_name() -> None:
    names = [
        "PATH",
        "FASTSIG_CONFIG",
        "FASTSIG_CONFIG_BODY",
        "FASTSIG_SERVER_PORT",
        "FASTSIG_SEVER_PORT",
        "FASTSIG_QQQQ",
    ]
    assert config.unknown_variables(names) == {"FASTSIG_QQQQ": "", "FASTSIG_SEVER_PORT": "FASTSIG_SERVER_PORT"}


def test_page_in_docs_is_the_one_that_the_declarations_make() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == config.document(), (
        "python -m fastsig config docs > docs/configuration.md"
    )


def test_page_has_a_row_for_every_option() -> None:
    rows = config.document().splitlines()
    for option in OPTIONS:
        row = next(row for row in rows if f"`{option.env}`" in row)
        assert f"`{option.flag}`" in row and ("no effect yet" in row) is not option.meta.has_effect
        assert row.count("|") == 8, "a bar in a text would break the table"


def test_configuration_imports_nothing_that_a_worker_would_pay_for() -> None:
    code = (
        "import sys; old = set(sys.modules); import fastsig.config, json; print(json.dumps([*set(sys.modules) - old]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"cyclopts", "attrs", "rich", "structlog", "picows", "aiohttp", "msgspec"}


# ---- while a server runs


def test_reload_takes_what_reloads_and_names_the_rest() -> None:
    running = build({"limits.rooms": 5, "server.port": 1})
    read = build({"limits.rooms": 6, "log.level": "debug", "server.port": 2, "server.workers": 3})
    found = config.reload(running, read)
    assert found.config == build({"limits.rooms": 6, "log.level": "debug", "server.port": 1})
    assert found.changed == ["limits.rooms", "log.level"]
    assert found.needs_restart == ["server.port", "server.workers"]


def test_reload_of_the_same_changes_nothing() -> None:
    running = build({"auth.keys": ("a",)})
    found = config.reload(running, build({"auth.keys": ("a",)}))
    assert (found.config, found.changed, found.needs_restart) == (running, [], [])


def test_every_option_either_reloads_or_needs_a_restart() -> None:
    pairs = {"server.tls_cert": "/c", "server.tls_key": "/k", "auth.webhook_secret": "s" * 32}  # none stands alone
    running = build(pairs)
    values = {option.key: option.value_in(running) for option in OPTIONS}
    for option in OPTIONS:
        found = config.reload(running, build(values | {option.key: _other(option)}))
        keys = ([option.key], []) if option.meta.is_reloadable else ([], [option.key])
        assert (found.changed, found.needs_restart) == keys


@pytest.mark.parametrize("is_on", [False, True])
def test_tls_is_switched_on_and_off_by_a_restart_alone(is_on: bool) -> None:  # noqa: FBT001 # a parameter of the test
    on = build({"server.tls_cert": "/c", "server.tls_key": "/k"})
    found = config.reload(*(on, build({})) if is_on else (build({}), on))
    assert (found.changed, found.needs_restart) == ([], ["server.tls_cert", "server.tls_key"])


def _other(option: Option) -> Any:
    """A usable value that is not the default."""
    if option.key in {"auth.jwks_url", "auth.webhook_url"}:
        return "https://auth.example.com"
    if option.key == "server.origins":
        return ("https://a.example",)
    if option.choices:
        return option.choices[:1] if option.is_list else next(word for word in option.choices if word != option.default)
    known: dict[Any, Any] = {bool: not option.default, str: "/x", tuple[str, ...]: ("::1",)}
    return known[option.kind] if option.kind in known else 3 if option.default == "auto" else option.default + 1


def test_reload_whose_mixture_is_unusable_is_refused() -> None:
    """Each of the two is usable; the old echo path with the new proxies is not."""
    running, read = build({"server.echo_path": "/echo"}), build({"server.trusted_proxies": ("10.0.0.0/8",)})
    with pytest.raises(ConfigError, match=r"server\.echo_path"):
        config.reload(running, read)
