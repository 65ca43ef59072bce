"""Every option once: its name, type, default, unit, meaning, and whether it reloads.

The dataclasses are what the rest of the program reads; `OPTIONS` is the same as a flat list, for whoever shows, fills
or documents them. An option has one name in three spellings, which follow from section and field: the flag
`--limits.meta-bytes`, the variable `FASTSIG_LIMITS_META_BYTES`, and `meta_bytes` under `[limits]` in a TOML file.
In `limits`, 0 switches a limit off.

Must not know: where values come from (`cli` gathers them), cyclopts (48 ms and 16 MiB in each worker), any I/O.
Invariant: a `Config` that passed `check` survives `msgspec.json` unchanged; so it goes to the workers.
Every complaint is a ConfigError of one line that names the option, the value (never a secret) and the cure.
"""

import ipaddress
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Final, Literal, NamedTuple, TypeVar, cast, get_args, get_origin

from .errors import ConfigError

ENV_PREFIX: Final = "FASTSIG_"
ENV_FILE: Final = "FASTSIG_CONFIG"
ENV_BODY: Final = "FASTSIG_CONFIG_BODY"
HEALTH_PATHS: Final = ("/health/live", "/health/ready", "/livez", "/readyz")
MASK: Final = "********"

Algorithm = Literal["HS256", "HS384", "HS512", "RS256", "PS256", "ES256", "EdDSA", "Ed25519"]
_T = TypeVar("_T")
_SHOWN_CHARS: Final = 80
_ISSUER: Final = re.compile(r"([^?#]+)=(?=https?://)", re.IGNORECASE)
SECRET_LEAST: Final = 32
_MAKE_SECRET: Final = "openssl rand -hex 32 makes one"  # noqa: S105 # a command
_INT_MOST: Final = 2**53  # what every JSON reader keeps exact
_REVOKED_LEAST: Final = 10**9  # unix seconds, in 2001
_REVOKED_EVER: Final = 10**10 - 1  # in 2286


@dataclass(frozen=True, slots=True)
class _Meta:
    """What a declaration says beyond type and default."""

    help: str
    unit: str
    is_reloadable: bool
    has_effect: bool
    is_secret: bool
    least: float
    most: float


def _option(  # noqa: PLR0913 # a declaration reads best as one call
    default: _T,
    help: str,
    *,
    unit: str = "",
    reloads: bool = False,
    has_effect: bool = False,
    secret: bool = False,
    least: float = 0,
    most: float = _INT_MOST,
) -> _T:
    meta = _Meta(help, unit, reloads, has_effect, secret, least, most)
    made: _T = field(default=default, repr=not secret, metadata={"option": meta})
    return made


@dataclass(frozen=True, slots=True)
class Server:
    """Where and how the server listens."""

    host: str = _option(
        "localhost",
        "Address to listen on; localhost is the loopback of IPv4 and IPv6, :: or 0.0.0.0 is everywhere.",
        has_effect=True,
    )
    port: int = _option(8080, "Port to listen on; 0 takes a free one.", most=65535, has_effect=True)
    path: str = _option("/ws", "Path of the WebSocket.", has_effect=True)
    workers: int | Literal["auto"] = _option(
        "auto",
        "Worker processes; auto is one per usable core. WEB_CONCURRENCY sets the default.",
        least=1,
        most=1024,
        has_effect=True,
    )
    pin_workers: bool = _option(False, "Keep each worker on one CPU, one after the other.", has_effect=True)
    backlog: int = _option(
        4096, "Connections that may wait to be accepted, per listening socket.", least=1, most=65535, has_effect=True
    )
    drain_seconds: float = _option(
        20.0,
        "Time over which connections are closed at shutdown; 0: at once, with 1001.",
        unit="s",
        most=86400,
        reloads=True,
        has_effect=True,
    )
    tls_cert: str = _option(
        "",
        "File with the certificate chain, PEM; empty: no TLS. Read anew when it changes; on or off needs a restart.",
        reloads=True,
        has_effect=True,
    )
    tls_key: str = _option("", "File with the private key, PEM, without a passphrase.", reloads=True, has_effect=True)
    tls_min_version: Literal["1.2", "1.3"] = _option(
        "1.2", "Oldest version of TLS that is spoken.", reloads=True, has_effect=True
    )
    origins: tuple[str, ...] = _option(
        (),
        "Origins whose pages may connect, such as https://app.example.org or https://*.example.org; empty or *: all.",
        reloads=True,
        has_effect=True,
    )
    tell_browsers: bool = _option(
        True, "Upgrade browsers whose token or origin is refused: they read the error, and why they are closed.",
        reloads=True, has_effect=True,
    )  # fmt: skip
    trusted_proxies: tuple[str, ...] = _option(
        (),
        "Addresses or networks of proxies that are believed: who the client is (X-Forwarded-For, PROXY protocol), and"
        " that a traceparent is to be recorded.",
        reloads=True,
        has_effect=True,
    )
    proxy_protocol: bool = _option(
        False, "Trusted proxies begin each connection with a PROXY protocol header, version 1 or 2.", has_effect=True
    )
    moves: bool = _option(
        True,
        "Move connections that join a room in-band to the worker that owns it.",
        reloads=True,
        has_effect=True,
    )
    runtime_dir: str = _option(
        "",
        "Folder of the socket that fastsig status asks; empty: $XDG_RUNTIME_DIR/fastsig, else a temporary one.",
        has_effect=True,
    )
    echo_path: str = _option(
        "",
        "Path of a WebSocket that echoes, for conformance tests: only to loopback, through no proxy; empty: none.",
        has_effect=True,
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer, one address and the server may use; 0 switches a limit off."""

    message_bytes: int = _option(
        65536, "Longest message; a longer one closes with 1009.", unit="bytes", least=1024, most=1 << 24,
        reloads=True, has_effect=True,
    )  # fmt: skip
    messages_per_s: int = _option(
        50, "Messages per connection, sustained.", unit="messages/s", reloads=True, has_effect=True
    )
    message_burst: int = _option(
        200, "Messages per connection at once; 0: four seconds' worth.", unit="messages", reloads=True, has_effect=True
    )
    bytes_per_s: int = _option(
        262144,
        "Bytes received per connection; the burst is four times that.",
        unit="bytes/s",
        reloads=True,
        has_effect=True,
    )
    fanout_bytes_per_s: int = _option(
        8388608,
        "Bytes that one connection causes to be sent to others; the burst is four times that.",
        unit="bytes/s",
        reloads=True,
        has_effect=True,
    )
    joins_per_s: int = _option(
        5,
        "Joins, and refreshes of tokens, per connection; the burst is four times that.",
        unit="joins/s",
        reloads=True,
        has_effect=True,
    )
    rooms_per_connection: int = _option(16, "Rooms of one connection.", most=1024, reloads=True, has_effect=True)
    peers_per_room: int = _option(512, "Peers in one room.", most=65535, reloads=True, has_effect=True)
    rooms: int = _option(0, "Rooms per worker.", reloads=True, has_effect=True)
    connections: int = _option(0, "Connections of one worker.", reloads=True, has_effect=True)
    connections_per_address: int = _option(
        1000, "Connections from one address (IPv6: /64), per worker.", reloads=True, has_effect=True
    )
    connects_per_s_per_address: int = _option(
        20, "New connections from one address, per worker; the burst is five times that.", unit="connections/s",
        reloads=True, has_effect=True,
    )  # fmt: skip
    connects_per_s: int = _option(
        0, "New connections of one worker; the burst is five times that.", unit="connections/s", reloads=True,
        has_effect=True,
    )  # fmt: skip
    handshake_seconds: float = _option(
        10.0, "Time for the HTTP request to be complete.", unit="s", reloads=True, has_effect=True
    )
    first_message_seconds: float = _option(
        60.0, "Time from the handshake to the first hello or join.", unit="s", reloads=True, has_effect=True
    )
    output_bytes: int = _option(
        1048576, "Output that a slow reader may leave behind; more for over a second closes with 4003.", unit="bytes",
        reloads=True, has_effect=True,
    )  # fmt: skip
    meta_bytes: int = _option(
        1024,
        "Longest metadata of a peer, below message_bytes.",
        unit="bytes",
        least=1,
        reloads=True,
        has_effect=True,
    )
    errors_per_5s: int = _option(
        20, "Bad messages within five seconds; one more closes with 4509.", most=10000, reloads=True, has_effect=True
    )
    dry_run: bool = _option(
        False, "Count and log what limits of rate and of connections would refuse, and refuse nothing.", reloads=True,
        has_effect=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Auth:
    """Who may connect and join."""

    required: bool = _option(False, "Refuse peers without a token.", reloads=True, has_effect=True)
    keys: tuple[str, ...] = _option(
        (),
        "Keys that check tokens: secret:TEXT, secret-b64:BASE64 or a file (PEM, JWK, JWK set); one that has a name"
        " has kid=NAME, before it. See docs/tokens.md.",
        reloads=True,
        has_effect=True,
        secret=True,
    )
    jwks_url: str = _option(
        "",
        "Where the issuer publishes its keys, a JWK set; several: ISSUER=URL with spaces between.",
        reloads=True,
        has_effect=True,
    )
    issuer: str = _option("", "The iss that a token must have; empty: any.", reloads=True, has_effect=True)
    audience: str = _option("", "The aud that a token must have; empty: any.", reloads=True, has_effect=True)
    algorithms: tuple[Algorithm, ...] = _option(
        ("HS256", "HS384", "HS512", "RS256", "PS256", "ES256", "EdDSA", "Ed25519"),
        "Signature algorithms that are accepted; a key takes those of its own kind.",
        reloads=True,
        has_effect=True,
    )
    revoked: tuple[str, ...] = _option(
        (),
        "Subjects whose tokens are refused; SUBJECT@SECONDS: those issued until then, in unix time.",
        reloads=True,
        has_effect=True,
    )
    webhook_url: str = _option(
        "", "Asked by POST whether a peer may join; empty: not asked.", reloads=True, has_effect=True
    )
    webhook_secret: str = _option(
        "", "Signs the requests to the webhook: 32 characters or more.", reloads=True, secret=True, has_effect=True
    )
    webhook_seconds: float = _option(
        2.0, "Time in which the webhook is asked, and answers.", unit="s", least=0.1, most=4.5, reloads=True,
        has_effect=True,
    )  # fmt: skip
    webhook_concurrency: int = _option(
        64, "Requests to the webhook at once, per worker; what is above waits its turn.", least=1, most=4096,
        reloads=True, has_effect=True,
    )  # fmt: skip
    webhook_fails_open: bool = _option(
        False, "Let peers join when the webhook gives no usable answer; else they are told to try again.",
        reloads=True, has_effect=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Session:
    """What survives a dropped connection."""

    ttl_seconds: float = _option(30.0, "Time that a session waits for its peer to come back.", unit="s", reloads=True)
    ring_frames: int = _option(256, "Messages kept for a session.", reloads=True)
    ring_bytes: int = _option(262144, "Bytes kept for a session.", unit="bytes", reloads=True)
    ring_seconds: float = _option(60.0, "Age of the oldest message kept for a session.", unit="s", reloads=True)


@dataclass(frozen=True, slots=True)
class Store:
    """Where sessions are kept."""

    url: str = _option("memory:", "Store of the sessions.")


@dataclass(frozen=True, slots=True)
class Bus:
    """What joins several hosts."""

    url: str = _option("", "Bus between hosts; empty: this host alone.")


@dataclass(frozen=True, slots=True)
class Ops:
    """The port for operators."""

    host: str = _option("127.0.0.1", "Address of the operations port.", has_effect=True)
    port: int = _option(9600, "Operations port: metrics, health and more; 0: none.", most=65535, has_effect=True)
    token: str = _option(
        "", "Token that its clients must show; needed beyond loopback.", reloads=True, secret=True, has_effect=True
    )
    watched_rooms: int = _option(
        64,
        "Rooms per worker whose offers, answers and candidates are looked at for the metrics of calls; 0: none.",
        most=4096,
        reloads=True,
        has_effect=True,
    )


@dataclass(frozen=True, slots=True)
class Log:
    """What is logged, on stderr."""

    level: Literal["trace", "debug", "info", "warning", "error"] = _option(
        "info", "Least level logged.", reloads=True, has_effect=True
    )
    format: Literal["auto", "text", "json"] = _option(
        "auto", "Text or JSON lines; auto is text on a terminal, JSON elsewhere.", has_effect=True
    )
    addresses: bool = _option(
        True, "Name the addresses of clients where they matter: refusals by limits.", reloads=True, has_effect=True
    )


@dataclass(frozen=True, slots=True)
class Turn:
    """Credentials for TURN servers."""

    urls: tuple[str, ...] = _option((), "TURN and STUN servers given to peers.", reloads=True)
    secret: str = _option("", "Secret shared with the TURN server.", reloads=True, secret=True)
    ttl_seconds: float = _option(3600.0, "Life of a TURN credential.", unit="s", reloads=True)


@dataclass(frozen=True, slots=True)
class Tracing:
    """OpenTelemetry; see docs/tracing.md."""

    enabled: bool = _option(
        False, "Export traces by OTLP/HTTP, as OTEL_* variables say; needs the extra otel.", has_effect=True
    )
    relay_sample: int = _option(
        0, "Trace one in this many relayed messages; 0: none.", most=1 << 31, reloads=True, has_effect=True
    )


@dataclass(frozen=True, slots=True)
class Demo:
    """The demo page."""

    enabled: bool = _option(False, "Serve the demo page at /demo; --dev does.")


@dataclass(frozen=True, slots=True)
class Config:
    """All options, typed. A section of a TOML file is a field here."""

    server: Server = field(default_factory=Server)
    limits: Limits = field(default_factory=Limits)
    auth: Auth = field(default_factory=Auth)
    session: Session = field(default_factory=Session)
    store: Store = field(default_factory=Store)
    bus: Bus = field(default_factory=Bus)
    ops: Ops = field(default_factory=Ops)
    log: Log = field(default_factory=Log)
    turn: Turn = field(default_factory=Turn)
    tracing: Tracing = field(default_factory=Tracing)
    demo: Demo = field(default_factory=Demo)


@dataclass(frozen=True, slots=True)
class Reload:
    """What a running server makes of a configuration that was read anew."""

    config: Config
    changed: list[str]  # keys whose new value holds from now on
    needs_restart: list[str]  # keys whose new value is not taken


@dataclass(frozen=True, slots=True)
class Option:
    """One option, seen from outside. `kind` is its type, `key` its name in messages: `limits.meta_bytes`."""

    section: str
    name: str
    kind: Any
    default: Any
    meta: _Meta

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        return f"--{self.section}.{self.name.replace('_', '-')}"

    @property
    def env(self) -> str:
        return f"{ENV_PREFIX}{self.section}_{self.name}".upper()

    @property
    def help(self) -> str:
        return self.meta.help if self.meta.has_effect else f"{self.meta.help.removesuffix('.')} (no effect yet)"

    @property
    def is_list(self) -> bool:
        return get_origin(self.kind) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that this option, or a member of this list, may be; () where any text may stand."""
        kind = get_args(self.kind)[0] if self.is_list else self.kind
        return get_args(kind) if get_origin(kind) is Literal else ()

    def value_in(self, config: Config) -> Any:
        return getattr(getattr(config, self.section), self.name)

    def show(self, value: Any) -> str:
        """As TOML, one line, fit for logs and terminals: secrets, and passwords and queries of URLs, are masked."""
        if self.meta.is_secret and value:
            return json.dumps([MASK] * len(value) if self.is_list else MASK)
        if isinstance(value, str):
            value = _masked(value)
        elif self.is_list:
            value = [_masked(item) for item in value]
        return json.dumps(value, ensure_ascii=False)

    def show_text(self, text: str) -> str:
        """What somebody typed where a value was expected: short, on one line, masked where it may be a secret."""
        return json.dumps(MASK if self.meta.is_secret else _masked(text)[:_SHOWN_CHARS], ensure_ascii=False)

    def parse(self, text: str) -> Any:
        """The value that a flag or variable spells. Raises ValueError that says what is expected."""
        if self.is_list:
            return self.accept(_parse_list(text))
        if self.kind is str or self.choices:
            return self.accept(next((word for word in self.choices if word == text.lower()), text))
        if self.kind is bool:
            return self._parse_bool(text)
        if "auto" in _words(self.kind) and text == "auto":
            return text
        try:
            return float(text) if self.kind is float else int(text)
        except ValueError:
            raise ValueError(self.expected) from None

    def accept(self, value: object) -> Any:
        """The value that a TOML file gives, type unchanged but for int → float, list → tuple. Raises ValueError."""
        if not self._fits(value):
            raise ValueError(self.expected)
        if self.kind is float and isinstance(value, int):
            return _to_float(value)
        return tuple(value) if isinstance(value, list) else value

    def _fits(self, value: object) -> bool:
        if self.is_list:
            words = self.choices
            return isinstance(value, list) and all(
                isinstance(item, str) and (not words or item in words) for item in value
            )
        if self.kind is float:
            return type(value) in {int, float}
        if self.kind in {str, bool, int}:
            return type(value) is self.kind
        return value in _words(self.kind) or (not self.choices and type(value) is int)

    @property
    def expected(self) -> str:
        if self.choices:
            return f"expected {'some' if self.is_list else 'one'} of {', '.join(self.choices)}"
        return f"expected {_EXPECTED.get(self.kind, 'a whole number or auto')}"

    def complaint(self, value: Any) -> str:
        """What is wrong with a value of the right type; empty when nothing is."""
        least, most = self.meta.least, self.meta.most
        if isinstance(value, bool) or not isinstance(value, int | float):
            return ""
        if not math.isfinite(value):
            return "expected a finite number"
        if least <= value <= most:
            return ""
        if most < _INT_MOST:
            return f"expected {_number(least)} to {_number(most)}"
        return f"expected {_number(least)} or more, up to 2^53"

    def _parse_bool(self, text: str) -> bool:
        word = text.lower()
        if word not in _BOOLS:
            raise ValueError(self.expected)
        return _BOOLS[word]


_EXPECTED: Final[dict[Any, str]] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple[str, ...]: "a list of texts",
}
_BOOLS: Final = {
    "true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip


def _flatten() -> tuple[Option, ...]:
    def one(section: str, item: Field[Any]) -> Option:
        return Option(section, item.name, item.type, item.default, item.metadata["option"])

    return tuple(one(name, item) for name, section in SECTIONS.items() for item in fields(section))


SECTIONS: Final[dict[str, Any]] = {section.name: section.type for section in fields(Config)}
OPTIONS: Final = _flatten()
BY_KEY: Final = {option.key: option for option in OPTIONS}


def build(values: Mapping[str, Any]) -> Config:
    """The Config with these values by key, defaults for the rest. Not checked."""
    sections = {
        name: section(**{item.name: values.get(f"{name}.{item.name}", item.default) for item in fields(section)})
        for name, section in SECTIONS.items()
    }
    return Config(**sections)


def check(config: Config, sources: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError for the first value that cannot be used; `sources` says by key where values came from."""
    for option in OPTIONS:
        if complaint := option.complaint(option.value_in(config)):
            _refuse(config, option.key, complaint, sources)
    for key, complaint in _contradictions(config):
        _refuse(config, key, complaint, sources)


def reload(running: Config, read: Config) -> Reload:
    """`running`, with the values of `read` where an option reloads. Raises ConfigError when the mixture is unusable."""
    values, changed, needs_restart = {}, [], []
    for option in OPTIONS:
        values[option.key], wanted = option.value_in(running), option.value_in(read)
        if values[option.key] == wanted:
            continue
        switches_tls = option.key in {"server.tls_cert", "server.tls_key"} and not (wanted and values[option.key])
        if option.meta.is_reloadable and not switches_tls:
            values[option.key] = wanted
            changed.append(option.key)
        else:
            needs_restart.append(option.key)
    config = build(values)
    check(config)
    return Reload(config, changed, needs_restart)


def read_toml(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Values by key from a parsed TOML document called `name`. Raises ConfigError for unknown keys and wrong types."""
    values = {}
    for section, table in tree.items():
        if section not in SECTIONS or not isinstance(table, dict):
            raise ConfigError(f"{name}: {_unknown_section(section, table)}")
        for item, value in table.items():
            option = BY_KEY.get(f"{section}.{item}")
            if option is None:
                raise ConfigError(f"{name}: unknown key {item} in [{section}]{_hint(section, item)}")
            try:
                values[option.key] = option.accept(value)
            except ValueError as error:
                given = (
                    json.dumps(value)[:_SHOWN_CHARS] if option.choices and isinstance(value, str) else _kind_of(value)
                )
                raise ConfigError(f"{name}: {option.key}: {error}, not {given}") from None
    return values


def unknown_variables(names: Iterable[str]) -> dict[str, str]:
    """FASTSIG_* names of an environment that mean nothing, each with the nearest that does, or an empty string."""
    known = {name.removeprefix(ENV_PREFIX) for name in (ENV_FILE, ENV_BODY, *(option.env for option in OPTIONS))}
    ours = sorted(name.removeprefix(ENV_PREFIX) for name in names if name.startswith(ENV_PREFIX))
    near = {name: _nearest(name, known) for name in ours if name not in known}
    return {f"{ENV_PREFIX}{name}": f"{ENV_PREFIX}{other}" if other else "" for name, other in near.items()}


def document() -> str:
    """The text of `docs/configuration.md`."""
    parts = [_PREAMBLE]
    for name, section in SECTIONS.items():
        parts.append(f"\n## {name}\n\n{section.__doc__}\n\n{_TABLE_HEAD}")
        parts += [_row(option) for option in OPTIONS if option.section == name]
    return "".join(parts)


def _refuse(config: Config, key: str, complaint: str, sources: Mapping[str, str] | None) -> None:
    option = BY_KEY[key]
    source = (sources or {}).get(key, "")
    where = f" ({source})" if source else ""
    raise ConfigError(f"{key} = {option.show(option.value_in(config))}{where}: {complaint}")


def _contradictions(config: Config) -> Iterable[tuple[str, str]]:
    server, limits = config.server, config.limits
    if not server.host or any(char.isspace() for char in server.host):
        yield "server.host", "expected an address or a name, such as localhost"
    if not server.path.startswith("/"):
        yield "server.path", "expected a path that starts with /"
    if not _is_plain_path(server.path):
        yield "server.path", "expected visible ASCII without ?, # and %"
    if server.path in HEALTH_PATHS:
        yield "server.path", "this path answers health checks, choose another"
    if server.echo_path and (not server.echo_path.startswith("/") or not _is_plain_path(server.echo_path)):
        yield "server.echo_path", "expected a path that starts with /, visible ASCII without ?, # and %"
    if server.echo_path in {server.path, *HEALTH_PATHS}:
        yield "server.echo_path", "this path is taken, choose another"
    if server.echo_path and (server.trusted_proxies or server.proxy_protocol):
        yield "server.echo_path", "leave it empty, or server.trusted_proxies and server.proxy_protocol unset"
    yield from _strangers(server.trusted_proxies)
    yield from _odd_origins(server.origins)
    if server.proxy_protocol and not server.trusted_proxies:
        yield "server.proxy_protocol", "set server.trusted_proxies to the addresses of the proxies too"
    if server.tls_cert and not server.tls_key:
        yield "server.tls_cert", "set server.tls_key too"
    if server.tls_key and not server.tls_cert:
        yield "server.tls_key", "set server.tls_cert too"
    if limits.meta_bytes >= limits.message_bytes:
        yield "limits.meta_bytes", f"expected less than limits.message_bytes, {limits.message_bytes}"
    yield from _contradictions_of_auth(config.auth)
    yield from _contradictions_of_ops(config.ops, server)


def _contradictions_of_auth(auth: Auth) -> Iterable[tuple[str, str]]:
    sources = key_sources(auth)
    urls = [("auth.jwks_url", source.url) for source in sources]
    for key, url in (*urls, ("auth.webhook_url", auth.webhook_url)):
        if url and (complaint := _complaint_of_url(url)):
            yield key, complaint
    issuers = {source.issuer for source in sources}
    if len(sources) > 1 and (len(issuers) < len(sources) or "" in issuers):
        yield "auth.jwks_url", "of several URLs each needs an issuer of its own: ISSUER=https://…"
    yield from _early_revocations(auth.revoked)
    if auth.webhook_url and not auth.webhook_secret:
        yield "auth.webhook_url", f"set auth.webhook_secret too, which signs the requests: {_MAKE_SECRET}"
    if auth.webhook_url and len(auth.webhook_secret) < SECRET_LEAST:
        yield "auth.webhook_secret", f"expected {SECRET_LEAST} characters or more: {_MAKE_SECRET}"


def split_revocation(item: str) -> tuple[str, float]:
    """Of `auth.revoked`: subject, and until when its tokens were issued, in unix seconds. There may be an @ in it."""
    subject, _, until = item.rpartition("@")
    is_dated = bool(subject) and until.isdecimal() and until.isascii()
    return (subject, float(until)) if is_dated else (item, math.inf)


def _early_revocations(revoked: Iterable[str]) -> Iterable[tuple[str, str]]:
    """A date of long ago would take nothing back: it is mistyped, or the end of a subject."""
    for item in revoked:
        if split_revocation(item)[1] < _REVOKED_LEAST:
            shown, ever = json.dumps(item), json.dumps(f"{item}@{_REVOKED_EVER}")
            cure = f"expected unix time (date +%s), or {ever} for the subject {shown}"
            yield "auth.revoked", f"{shown} is SUBJECT@SECONDS before 2001: {cure}"


class KeySource(NamedTuple):
    """An issuer that publishes its keys. `issuer`: the iss that its tokens have; "": any."""

    issuer: str
    url: str

    @property
    def name(self) -> str:
        """What tells it from other issuers, and from keys of our own while `auth.issuer` is empty."""
        return self.issuer or self.url


def key_sources(auth: Auth) -> list[KeySource]:
    """Of `auth.jwks_url`: a URL, for the issuer of `auth.issuer`, or several ISSUER=URL with spaces between."""
    found = [(_ISSUER.match(word), word) for word in auth.jwks_url.split()]
    return [
        KeySource(match[1], word[match.end() :]) if match else KeySource(auth.issuer, word) for match, word in found
    ]


def plain_urls(auth: Auth) -> list[str]:
    """Those of its options that name another machine by plain HTTP: whoever is on the way can answer for it."""
    urls = {"auth.jwks_url": [source.url for source in key_sources(auth)], "auth.webhook_url": [auth.webhook_url]}
    return [key for key, found in urls.items() if any(map(_is_plain_beyond_loopback, found))]


def _is_plain_beyond_loopback(url: str) -> bool:
    from urllib.parse import urlsplit  # noqa: PLC0415 # most servers have none

    parts = urlsplit(url)
    return parts.scheme == "http" and not _is_loopback(parts.hostname or "")


def _complaint_of_url(url: str) -> str:
    from urllib.parse import urlsplit  # noqa: PLC0415 # most servers have none

    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, a port that is none
        is_whole = False
    if not is_whole or not all("!" <= char <= "~" for char in url):
        return "expected a URL such as https://auth.example.com/path, in visible ASCII"
    return ""


def _contradictions_of_ops(ops: Ops, server: Server) -> Iterable[tuple[str, str]]:
    if not ops.host or any(char.isspace() for char in ops.host):
        yield "ops.host", "expected an address or a name, such as localhost"
    if not all("!" <= char <= "~" for char in ops.token):
        yield "ops.token", "expected visible ASCII, as it stands in a header"
    if ops.port and ops.port == server.port:
        yield "ops.port", "this is server.port too, choose another, or 0 for none"
    if ops.port and not ops.token and not _is_loopback(ops.host):
        yield "ops.host", "set ops.token too, which is needed beyond loopback, or ops.port to 0"


def _is_loopback(host: str) -> bool:
    """Whatever a name but localhost stands for is found out too late."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def _strangers(proxies: Iterable[str]) -> Iterable[tuple[str, str]]:
    for proxy in proxies:
        from ipaddress import ip_network  # noqa: PLC0415 # most servers have none

        try:
            network = ip_network(proxy)
        except ValueError:
            yield "server.trusted_proxies", f"{json.dumps(proxy)} is no address or network, such as 10.0.0.0/8"
            continue
        mapped = getattr(network.network_address, "ipv4_mapped", None)
        if mapped is not None:  # addresses are compared in their plain form, so this would be none's
            cure = f"{mapped}/{network.prefixlen - 96}"
            yield "server.trusted_proxies", f"{json.dumps(proxy)} is IPv4 in the form of IPv6, write {cure}"


def split_origin(text: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an origin (RFC 6454 §6.2), in lower case, or of a pattern whose host begins with `*.`.

    A port that is not there is the scheme's own, 0 where that has none. None: it is no such thing.
    """
    parts = _ORIGIN.fullmatch(text.lower())
    if parts is None or not text.isascii():
        return None
    scheme, host, port = parts.groups()
    if port is None:
        return scheme, host, _PORTS.get(scheme, 0)
    return (scheme, host, int(port)) if int(port) < 65536 else None


_NAME: Final = r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*"
_ORIGIN: Final = re.compile(rf"([a-z][a-z0-9+.-]*)://({_NAME}|\[[0-9a-f:.]+\])(?::([0-9]{{1,5}}))?")
_PORTS: Final = {"http": 80, "https": 443}
_AN_ORIGIN: Final = "https://app.example.org (no path; a :port if it is an odd one), https://*.example.org, null, *"


def _odd_origins(origins: Iterable[str]) -> Iterable[tuple[str, str]]:
    for origin in origins:
        if origin not in {"*", "null"} and split_origin(origin) is None:
            yield "server.origins", f"{json.dumps(origin[:_SHOWN_CHARS])} is none: expected {_AN_ORIGIN}"


def _is_plain_path(path: str) -> bool:
    return all("!" <= char <= "~" and char not in "?#%" for char in path)


def _parse_list(text: str) -> list[Any]:
    """A JSON list, or words with white space between. Raises ValueError."""
    if not text.lstrip().startswith("["):
        return text.split()
    try:
        return cast(list[Any], json.loads(text))
    except ValueError:
        raise ValueError('expected words, or a JSON list such as ["a", "b"]') from None


def _number(value: float) -> str:
    """Whole where it is whole: 65535, 0.1."""
    return f"{value:.0f}" if value == int(value) else f"{value:g}"


def _to_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf  # which `check` refuses


def _words(kind: Any) -> tuple[Any, ...]:
    """The members of the Literals in a type."""
    parts = (kind,) if get_origin(kind) is Literal else get_args(kind)
    return tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))


def _kind_of(value: object) -> str:
    names = {
        str: "text",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        list: "a list",
        dict: "a table",
    }
    return names.get(type(value), type(value).__name__)


_PASSWORD: Final = re.compile(r"(://[^/:@\s]*:)[^/\s]*@")
_QUERY: Final = re.compile(r"(://[^?\s]*\?)[^#\s]+")


def _masked(text: str) -> str:
    """`redis://user:secret@host`, `https://host/path?key=secret` with the secrets masked; anything else as it is."""
    return _QUERY.sub(rf"\g<1>{MASK}", _PASSWORD.sub(rf"\g<1>{MASK}@", text))


def _nearest(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches  # noqa: PLC0415 # only for complaints

    return next(iter(get_close_matches(name, sorted(known), n=1, cutoff=0.6)), "")


def _hint(section: str, name: str) -> str:
    """The cure for a misspelt key: the nearest spelling in its section, or the same name in another one."""
    if near := _nearest(name, (option.name for option in OPTIONS if option.section == section)):
        return f", did you mean {near}?"
    home = next((option.section for option in OPTIONS if option.name == name), "")
    return f", did you mean {name} in [{home}]?" if home else ""


def _unknown_section(section: str, table: object) -> str:
    if section in SECTIONS:
        return f"[{section}]: expected a table, not {_kind_of(table)}"
    if not isinstance(table, dict):
        return f"unknown key {section}{_hint('', section)}"
    near = _nearest(section, SECTIONS)
    return f"unknown section [{section}]" + (f", did you mean [{near}]?" if near else "")


_TABLE_HEAD: Final = "| option | flag | environment | default | unit | reloads | meaning |\n" + "|---" * 7 + "|\n"
_PREAMBLE: Final = """\
# Configuration

This page is made from `fastsig/config.py`: `python -m fastsig config docs > docs/configuration.md`.

An option is given as a flag, in the environment, or in a TOML file. **The first of these that names it wins: flag,
environment, file, default.** The file is given by `--config` (`-c`) or by `FASTSIG_CONFIG`; or `FASTSIG_CONFIG_BODY`
holds all of its text. `--host`, `--port` and `--workers` are short for the options of `[server]`.

```toml
[server]
port = 9000

[limits]
messages_per_s = 100
```

- An empty variable counts as unset. Lists in flags and variables are words with spaces between, or a JSON list.
- `WEB_CONCURRENCY` is the default of `server.workers`. `auto` counts the CPUs that the process may run on (its
  affinity) and takes no more than the CPU quota of its control groups allows, rounded down; at least one.
- `--dev` stands for `--server.host localhost --log.level debug --demo.enabled`; a flag beside it wins over it.
- An unknown key in the file is refused, with exit code 2. An unknown `FASTSIG_…` variable is listed by
  `fastsig config check`, which fails with `--strict`. `fastsig config print` shows what is in effect, and where from.
- In `[limits]`, 0 switches a limit off, where 0 is allowed. What each does to whom is above it: [limits.md](limits.md).
- "Reloads" means that a running server takes a new value when it gets SIGHUP. Flags and environment are those of its
  start, the file is read anew; one that cannot be used changes nothing, and the log says why. Options that do not
  reload keep their value, and the log names them. `message_bytes`, `handshake_seconds` and `first_message_seconds`
  hold for connections that are made afterwards (an older one may get the new `message_bytes` too), the others for all.
"""


def _row(option: Option) -> str:
    default = option.show(option.default)
    bounds = ""
    if option.kind in {int, int | Literal["auto"]} and (option.meta.least, option.meta.most) != (0, _INT_MOST):
        bounds = f" {option.meta.least:.0f} to {option.meta.most:.0f}."
    choices = f" One of {', '.join(option.choices)}." if option.choices and not option.is_list else ""
    effect = "" if option.meta.has_effect else " *(no effect yet)*"
    cells = (
        f"`{option.name}`", f"`{option.flag}`", f"`{option.env}`", f"`{default}`", option.meta.unit,
        "yes" if option.meta.is_reloadable else "no", f"{option.meta.help}{choices}{bounds}{effect}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |\n"
