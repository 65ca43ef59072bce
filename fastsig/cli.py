"""The command line: gathers the options, checks them, and hands them to what they are for.

cyclopts reads flags and writes `--help`; `_Sources` adds what flags left open, from the environment and the TOML file.
Flag > environment > file > default. Whatever goes wrong is one line on stderr and an exit code of `errors.ExitCode`.

Must not import at its top: the supervisor, logging or anything compiled; `--help` and `health` start in a moment.
The options themselves are in `config`; read `supervisor` next for what `serve` does.
"""

import os
import signal
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from cyclopts import (
    UNSET,
    App,
    Argument,
    ArgumentCollection,
    CycloptsError,
    Group,
    Parameter,
    Token,
    UnusedCliTokensError,
)
from cyclopts.config import Env

from . import __version__
from .config import (
    BY_KEY,
    ENV_BODY,
    ENV_FILE,
    ENV_PREFIX,
    OPTIONS,
    SECTIONS,
    Config,
    Option,
    build,
    check,
    document,
    read_toml,
    unknown_variables,
)
from .errors import ConfigError, ExitCode, StartError

HEALTH_TIMEOUT_S: Final = 3.0
_HEARD: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
)  # as in `supervisor`, which is imported late

_SHORT: Final = {"server.host": "--host", "server.port": "--port", "server.workers": "--workers"}
_DEV: Final[dict[str, Any]] = {"server.host": "localhost", "log.level": "debug", "demo.enabled": True}
_HERE: Final = {"__module__": __name__}  # classes of the module `types`, the default, count as built-in for cyclopts
_HELP: Final = """\
fastsig, a WebRTC signaling server. Without a command: serve.

An option is taken from the first place that names it: flag, environment, TOML file (--config), default.
`--limits.meta-bytes 512` is `FASTSIG_LIMITS_META_BYTES=512`, and `meta_bytes = 512` under `[limits]` in the file.
"""


class _Sources(Env):
    """Fills what the flags left open, and remembers where each value came from, and the command line for `_reread`.

    An `Env` so that `--help` names the variables; but its own reading knows no empty variable and no JSON list.
    """

    def __init__(self) -> None:
        super().__init__(ENV_PREFIX, command=False)
        self.by_key: dict[str, str] = {}
        self.argv: list[str] = []
        self.is_reload = False

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Called by cyclopts between reading the flags and converting the values."""
        found = {argument.name: argument for argument in arguments}
        if "--dev" not in found:
            return  # a command without options
        if _given(found["--dev"]):
            _add(found, _DEV, "flag", "--dev")
        for option in OPTIONS:
            self._add_variable(found, option, option.env)
        values, name = _read_file(_given(found["--config"]), is_reload=self.is_reload)
        _add(found, values, "file", name)
        self._add_variable(found, BY_KEY["server.workers"], "WEB_CONCURRENCY")
        self.by_key = {option.key: _origin(found[option.flag]) for option in OPTIONS}

    @staticmethod
    def _add_variable(found: Mapping[str, Argument], option: Option, name: str) -> None:
        if text := os.environ.get(name):
            _add(found, {option.key: _parse(option, text, name)}, "env", name)


def _given(argument: Argument) -> str:
    """What was typed for a flag that is no option; empty when it was not given, or switched off."""
    token = next(iter(argument.tokens), None)
    if token is None or token.implicit_value is False:
        return ""
    return token.value or argument.name


def _add(found: Mapping[str, Argument], values: Mapping[str, Any], source: str, name: str) -> None:
    for key, value in values.items():
        argument = found[BY_KEY[key].flag]
        if not argument.tokens:
            argument.append(Token(keyword=name, source=source, implicit_value=value))


def _origin(argument: Argument) -> str:
    token = next(iter(argument.tokens), None)
    if token is None:
        return "default"
    return f"{'flag' if token.source == 'cli' else token.source} {token.keyword}"


def _parse(option: Option, text: str, name: str) -> Any:
    try:
        return option.parse(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}, not {option.show_text(text)}") from None


def _read_file(flag: str, *, is_reload: bool) -> tuple[dict[str, Any], str]:
    """Values by key from the TOML file or text, and what to call it."""
    import tomllib  # noqa: PLC0415 # 6 ms that most starts do not need

    path, body = flag or os.environ.get(ENV_FILE), os.environ.get(ENV_BODY)
    if not path and not body:
        return {}, ""
    if not flag and path and body:
        raise ConfigError(f"{ENV_FILE} and {ENV_BODY} are both set: unset one")
    name = path or ENV_BODY
    try:
        if path and is_reload and not stat.S_ISREG(Path(path).stat().st_mode):
            raise ConfigError(f"{name}: cannot be read again: it is no regular file")  # a pipe is empty now, or blocks
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8") if path else body or "")
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or lists in lists in lists
        raise ConfigError(f"{name}: not a TOML file: {error}") from None
    return read_toml(tree, name), name


def _converter(option: Option) -> Callable[[Any, Sequence[Token]], Any]:
    """Values of flags; those of other sources come converted (cyclopts takes them as they are but for Literals)."""

    def convert(_: Any, tokens: Sequence[Token]) -> Any:
        if tokens[0].implicit_value is not UNSET:
            return tokens[0].implicit_value
        parsed = [_parse(option, token.value, token.keyword or option.flag) for token in tokens]
        return tuple(item for items in parsed for item in items) if option.is_list else parsed[0]

    return convert


def _parameter(option: Option, group: Group) -> Parameter:
    default = option.show(option.default) if option.default or option.default == 0 else ""
    return Parameter(
        alias=_SHORT.get(option.key),
        converter=_converter(option),
        group=group,
        help=option.help,
        consume_multiple=(1, None) if option.is_list else None,
        metavar=option.meta.unit.upper() or ("INT|auto" if option.key == "server.workers" else None),
        negative_iterable=(),
        show_default=(lambda _: default) if default else False,
        show_choices=bool(option.choices),
    )


def _flag(
    name: str | None = None, *, show_default: bool = False, consume_multiple: tuple[int, None] | bool = False
) -> Parameter:
    """A flag of one command, which is no option of the server; with a name: an argument, which may be `-`."""
    return Parameter(
        name=name,
        negative=(),
        negative_iterable=(),
        show_env_var=False,
        show_default=show_default,
        consume_multiple=consume_multiple,
        allow_leading_hyphen=name is not None,
    )


def _command_line() -> Any:
    """The class of what a command line says: `Config` once more, with what cyclopts must know about each option."""
    sections = []
    for place, (name, section) in enumerate(SECTIONS.items(), 1):
        group = Group(name, help=section.__doc__, sort_key=place)
        fields = [
            (option.name, Annotated[option.kind, _parameter(option, group)], field(default=option.default))
            for option in OPTIONS
            if option.section == name
        ]
        made = make_dataclass(section.__name__, fields, frozen=True, namespace=_HERE)
        sections.append((name, made, field(default_factory=made)))
    general = Group("General", sort_key=0)
    config = Parameter(alias="-c", help="TOML file with options.", metavar="FILE", show_default=False, group=general)
    dev = Parameter(
        help="Loopback only, debug log, demo page.", negative=(), show_default=False, show_env_var=False, group=general
    )
    extra = [
        ("config", Annotated[str, config], field(default="")),
        ("dev", Annotated[bool, dev], field(default=False)),
    ]
    return make_dataclass("CommandLine", [*extra, *sections], frozen=True, namespace=_HERE)


if TYPE_CHECKING:
    CommandLine = Config
else:
    CommandLine = _command_line()

Given = Annotated[CommandLine, Parameter(name="*")]
Hidden = Annotated[CommandLine, Parameter(name="*", show=False)]
_NOTHING: Final = CommandLine()

# As in `auth` and `tokens`, which are imported late.
Can = Literal["join", "relay", "broadcast", "create", "admin"]
KeyType = Literal["hs256", "ed25519", "es256", "rs256"]

_sources = _Sources()
app = App(
    name="fastsig",
    help=_HELP,
    version=__version__,
    config=_sources,
    print_error=False,
    exit_on_error=False,
    result_action="return_value",
)
config_app = App(name="config", help="Check, show and document the configuration.")
app.command(config_app)
token_app = App(name="token", help="Make and check the tokens that peers show; see docs/tokens.md.")
app.command(token_app)
keys_app = App(name="keys", help="Make the keys that tokens are signed with.")
app.command(keys_app)


@app.default
@app.command
def serve(*, given: Given = _NOTHING) -> ExitCode | int:
    """Serve until told to stop (also what fastsig does without a command)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)  # until the supervisor handles them: orderly ends, too
    try:
        config = _settle(given)
        _check_keys(config)
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    from .supervisor import run  # noqa: PLC0415 # what the other commands never need

    return run(config, reload=_reread)


@config_app.command(name="check")
def check_config(
    *, strict: Annotated[bool, Parameter(negative=(), show_env_var=False)] = False, given: Hidden = _NOTHING
) -> ExitCode:
    """Check the configuration and list FASTSIG_* variables that mean nothing. Takes the options of serve.

    Parameters
    ----------
    strict
        Fail, with exit code 1, when there are such variables.
    """
    from .tls import check as check_tls  # noqa: PLC0415 # what most commands never need

    config = _settle(given)
    _check_keys(config)
    check_tls(config.server)
    strangers = unknown_variables(os.environ)
    for name, near in strangers.items():
        _complain(f"unknown variable {name}" + (f", did you mean {near}?" if near else ""))
    if strangers and strict:
        return ExitCode.FAILED
    _say("the configuration is usable")
    return ExitCode.OK


@config_app.command(name="print")
def print_config(*, given: Hidden = _NOTHING) -> ExitCode:
    """Print what is in effect, as TOML, with where it came from; secrets are masked. Takes the options of serve."""
    config = _settle(given)
    for section in SECTIONS:
        _say(f"[{section}]")
        for option in OPTIONS:
            if option.section == section:
                shown = option.show(option.value_in(config))
                _say(f"{option.name} = {shown}  # {_sources.by_key[option.key]}")
        _say("")
    return ExitCode.OK


@config_app.command(name="docs")
def print_docs() -> ExitCode:
    """Print the page that describes every option."""
    sys.stdout.write(document())
    return ExitCode.OK


@app.command
def health(
    *,
    ready: Annotated[bool, Parameter(negative=(), show_env_var=False)] = False,
    url: Annotated[str, Parameter(show_env_var=False, show_default=False)] = "",
    given: Hidden = _NOTHING,
) -> ExitCode:
    """Ask a running server whether it is alive; exit code 0 when it is, else 1.

    Parameters
    ----------
    ready
        Ask whether it takes new connections.
    url
        The server, as http://host:port, or https:// with a certificate that this machine trusts; by default the one
        that the configuration describes, whatever its certificate.
    """
    import http.client  # noqa: PLC0415 # only here, as the next
    import ssl  # noqa: PLC0415

    base = url or _url_of(_settle(given))
    is_tls, host, port, prefix = _split(base)
    path = f"{prefix}/health/{'ready' if ready else 'live'}"
    connection: http.client.HTTPConnection
    if is_tls:
        # No secret is sent, and nothing believed but "alive"; the certificate is seldom for the name localhost.
        context = ssl.create_default_context() if url else ssl._create_unverified_context()  # noqa: S323, SLF001
        connection = http.client.HTTPSConnection(host, port, timeout=HEALTH_TIMEOUT_S, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=HEALTH_TIMEOUT_S)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        _complain(f"{base}: {reason}")
        return ExitCode.FAILED
    finally:
        connection.close()
    if status != http.client.OK:
        _complain(f"{base}: {'not ready' if ready else 'not alive'}, it answered {status}")
        return ExitCode.FAILED
    _say("ready" if ready else "alive")
    return ExitCode.OK


@app.command
def status(
    *,
    json: Annotated[bool, Parameter(negative=(), show_env_var=False)] = False,
    given: Hidden = _NOTHING,
) -> ExitCode:
    """Show the workers of a running server on this machine; exit code 1 when there is none.

    The server is the one that the options of serve describe: --port, and --server.runtime-dir where it is set.

    Parameters
    ----------
    json
        One line of JSON with every counter, instead of a table.
    """
    import time  # noqa: PLC0415 # only here, as the next two

    import msgspec  # noqa: PLC0415

    from .status import UnusableError, ask_twice, folder, table  # noqa: PLC0415

    server = _settle(given).server
    if not server.port:
        raise ConfigError("server.port is 0, so the port is not known here: give --port")
    try:
        found = ask_twice(folder(server.runtime_dir), server.port)
    except UnusableError as error:
        return _complain(str(error))
    sys.stdout.write(f"{msgspec.json.encode(found).decode()}\n" if json else table(found, time.time()))
    return ExitCode.OK


@token_app.command(name="create")
def create_token(  # noqa: PLR0913 # as many as a token has parts
    *,
    sub: Annotated[str, _flag()],
    room: Annotated[tuple[str, ...], _flag(consume_multiple=(1, None))] = (),
    can: Annotated[tuple[Can, ...], _flag(consume_multiple=(1, None))] = (),
    admin: Annotated[bool, _flag()] = False,
    multi: Annotated[bool, _flag()] = False,
    ttl: Annotated[str, _flag(show_default=True)] = "1h",
    meta: Annotated[str, _flag()] = "null",
    aud: Annotated[str, _flag()] = "",
    iss: Annotated[str, _flag()] = "",
    key: Annotated[str, _flag()] = "",
    kid: Annotated[str, _flag()] = "",
    given: Hidden = _NOTHING,
) -> ExitCode:
    """Print a token for a peer, signed by --key, else by the first of auth.keys that can. Takes the options of serve.

    fastsig token create --sub alice --room lobby --room 'team/*' --ttl 15m

    fastsig token create --sub root --admin --key issuer.pem | fastsig token check -

    Parameters
    ----------
    sub
        Who the token is for: the peer id.
    room
        A room that it is good for, or the beginning of names with a * behind; may be repeated. Default: every room.
    can
        What it allows there: join, relay, broadcast, create, admin. Default: all but admin.
    admin
        Allow admin too.
    multi
        Let the peer connect several times, as SUB/SUFFIX.
    ttl
        How long it is good: 90s, 15m, 1h, 30d.
    meta
        JSON that the others see of the peer, whatever it says itself.
    aud
        The audience; by default auth.audience.
    iss
        The issuer; by default auth.issuer.
    key
        What signs: a file with a private key, PEM or JWK, or secret:TEXT, as in auth.keys. In an argument, others on
        this machine can read a secret.
    kid
        The name of the key.
    """
    import time  # noqa: PLC0415 # only here, as the next

    from . import tokens  # noqa: PLC0415

    config = _settle(given)
    claims = tokens.claims_of(
        sub=sub,
        rooms=room,
        can=can,
        is_admin=admin,
        is_multi=multi,
        meta=tokens.parse_meta(meta, config.limits.meta_bytes),
        issuer=iss or config.auth.issuer,
        audience=aud or config.auth.audience,
        now=time.time(),
        ttl_s=tokens.parse_ttl(ttl),
    )
    _say(tokens.create(config.auth, claims, key=key, kid=kid))
    return ExitCode.OK


@token_app.command(name="check")
def check_token(text: Annotated[str, _flag(name="TOKEN")] = "-", /, *, given: Hidden = _NOTHING) -> ExitCode:
    """Say check by check whether a token is good, and what it grants; exit code 1 when it is refused.

    It is checked as the server would, by auth.keys or auth.jwks_url. Takes the options of serve.

    fastsig token create --sub alice | fastsig token check -c fastsig.toml

    Parameters
    ----------
    text
        The token; - or nothing: from standard input, where nobody else on this machine can read it.
    """
    import time  # noqa: PLC0415 # only here, as the next two

    from .auth import TOKEN_BYTES, TokenError  # noqa: PLC0415
    from .tokens import explain  # noqa: PLC0415

    config = _settle(given)
    token = sys.stdin.read(8 * TOKEN_BYTES).strip() if text == "-" else text
    try:
        for line in explain(config.auth, token, time.time()):
            _say(line)
    except TokenError as error:
        return _complain(f"the token is refused: {error}")
    return ExitCode.OK


@keys_app.command(name="generate")
def generate_keys(
    *, type: Annotated[KeyType, _flag(show_default=True)] = "hs256", out: Annotated[str, _flag()] = ""
) -> ExitCode:
    """Make a key for tokens, and print the lines that the configuration needs.

    fastsig keys generate >> fastsig.toml

    fastsig keys generate --type ed25519 --out issuer.pem

    Parameters
    ----------
    type
        hs256 is one secret, for the server and for who makes tokens. The others are pairs: who makes tokens has the
        private key, the server only the public one.
    out
        File for the key, readable by you alone; the public one is put beside it, as FILE.pub. Never overwritten.
    """
    from .tokens import generate  # noqa: PLC0415 # only here

    sys.stdout.write(generate(type, out))
    return ExitCode.OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    _sources.argv, _sources.is_reload = sys.argv[1:] if argv is None else list(argv), False
    try:
        return int(app(_sources.argv) or 0)
    except UnusedCliTokensError as error:
        unknown = next(iter(error.unused_tokens or ()), "")
        return _complain(f"unexpected argument {unknown!r}, see fastsig --help", ExitCode.USAGE)
    except CycloptsError as error:
        return _complain(str(error), ExitCode.USAGE)
    except StartError as error:
        return _complain(str(error), ExitCode.START)
    except ConfigError as error:
        return _complain(str(error), ExitCode.USAGE)


def _reread() -> Config:
    """The Config of the same command line and environment as at the start, with the file as it is now."""
    _sources.is_reload = True
    try:
        _, bound, _ = app.parse_args(_sources.argv)
    except CycloptsError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    config = _settle(bound.arguments.get("given", _NOTHING))
    _check_keys(config)
    return config


def _check_keys(config: Config) -> None:
    """Raises ConfigError for keys of tokens that cannot be used: here, in one line, not in each worker."""
    if config.auth.keys or config.auth.required or config.auth.jwks_url:
        from .auth import Verifier  # noqa: PLC0415 # 60 ms, where there are keys

        Verifier(config.auth)


def _settle(given: Config) -> Config:
    """The checked Config of a parsed command line."""
    values = {option.key: option.value_in(given) for option in OPTIONS}
    config = build(values)
    check(config, _sources.by_key)
    return config


def _url_of(config: Config) -> str:
    """Where a server with this configuration is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.server.host, config.server.host)  # noqa: S104 # is replaced
    if not config.server.port:
        raise ConfigError("server.port is 0, so the port is not known here: give --url")
    scheme = "https" if config.server.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.server.port}"


def _split(url: str) -> tuple[bool, str, int, str]:
    """Is it TLS; host, port and path prefix."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in {"http", "https"}:
        raise ConfigError(f"--url: expected http://host:port or https://host:port, not {url}")
    is_tls = parts.scheme == "https"
    return is_tls, host, port or (443 if is_tls else 80), parts.path.rstrip("/")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _complain(message: str, code: ExitCode = ExitCode.FAILED) -> ExitCode:
    """One line on stderr."""
    sys.stderr.write(f"fastsig: {' '.join(message.split())}\n")
    return code
