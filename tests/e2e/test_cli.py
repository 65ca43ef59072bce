"""What a command line, the environment and a file come to, and how complaints look. No server is started."""

import http.client
import json
import os
import signal
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsig
from fastsig import cli
from fastsig.config import OPTIONS, Config, build
from fastsig.errors import ConfigError, StartError


class Supervisor:
    """Stands in for `fastsig.supervisor`: keeps what it is to run, answers as told."""

    def __init__(self) -> None:
        self.served: list[Config] = []
        self.answer: int | Exception = 0

    def run(self, config: Config, *, reload: Callable[[], Config]) -> int:
        self.served.append(config)
        self.reload = reload
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture(autouse=True)
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """Also: an environment without options; and signals that `serve` holds back reach this process afterwards."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for name in [*(option.env for option in OPTIONS), "FASTSIG_CONFIG", "FASTSIG_CONFIG_BODY", "WEB_CONCURRENCY"]:
        monkeypatch.delenv(name, raising=False)
    double = Supervisor()
    module = types.ModuleType("fastsig.supervisor")
    module.run = double.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastsig.supervisor", module)
    yield double
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.fixture
def served(supervisor: Supervisor) -> Any:
    """Run `fastsig` with these arguments; the Config that would be served."""

    def run(*args: str) -> Config:
        supervisor.served.clear()
        assert cli.main(args) == 0
        return supervisor.served.pop()

    return run


@pytest.fixture
def refused(supervisor: Supervisor, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `fastsig` with these arguments; the one line of its complaint, which comes with exit code 2."""

    def run(*args: str) -> str:
        assert cli.main(args) == 2
        assert not supervisor.served
        out, err = capsys.readouterr()
        assert not out and err.startswith("fastsig: ") and err.count("\n") == 1
        return err.removeprefix("fastsig: ").rstrip("\n")

    return run


def test_bare_command_serves_with_the_defaults(served: Any) -> None:
    assert served() == Config()


def test_options_stand_with_and_without_the_command(served: Any) -> None:
    line = ("--host", "127.0.0.1", "--port", "9001", "--workers", "1", "--ops.port", "0")
    config = served("serve", *line)
    assert (config.server.host, config.server.port, config.server.workers, config.ops.port) == ("127.0.0.1", 9001, 1, 0)
    assert served(*line) == config


def test_every_option_parses_from_flag_variable_and_file(
    served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts, lines = {}, []
    for option in OPTIONS:
        value = 2 if option.key == "server.workers" else option.default
        texts[option] = json.dumps(value) if not isinstance(value, str) else value
        lines.append(f"{option.section}.{option.name} = {json.dumps(value)}")
        monkeypatch.setenv(option.env, texts[option])
    file = tmp_path / "all.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    from_variables = served()
    for option in OPTIONS:
        monkeypatch.delenv(option.env)
    assert from_variables == served("--config", str(file))
    assert from_variables == served(*(f"{option.flag}={text}" for option, text in texts.items()))


def test_first_source_wins(served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[limits]\nrooms = 1\npeers_per_room = 1\nconnections = 1", encoding="utf-8")
    monkeypatch.setenv("FASTSIG_LIMITS_ROOMS", "2")
    monkeypatch.setenv("FASTSIG_LIMITS_PEERS_PER_ROOM", "2")
    limits = served("-c", str(file), "--limits.rooms", "3").limits
    assert (limits.rooms, limits.peers_per_room, limits.connections, limits.meta_bytes) == (3, 2, 1, 1024)


def test_variables_and_empty_ones(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTSIG_SERVER_PORT", "FASTSIG_SERVER_PATH", "FASTSIG_CONFIG", "FASTSIG_CONFIG_BODY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("FASTSIG_LIMITS_MESSAGES_PER_S", "1000000000000")
    monkeypatch.setenv("FASTSIG_SERVER_ORIGINS", "https://a https://b")
    monkeypatch.setenv("FASTSIG_TURN_URLS", '["turn:a", "turn:b"]')
    expected = {
        "limits.messages_per_s": 10**12,
        "server.origins": ("https://a", "https://b"),
        "turn.urls": ("turn:a", "turn:b"),
    }
    assert served() == build(expected)


def test_lists_in_flags_are_given_in_any_way(served: Any) -> None:
    words = ("--auth.revoked", "::1", "::2", "--server.trusted-proxies", "::1 ::2")
    others = ("--turn.urls", "::1", "--turn.urls", "::2", "--server.origins", '["https://a", "https://b"]')
    made = dict.fromkeys(("auth.revoked", "server.trusted_proxies", "turn.urls"), ("::1", "::2"))
    assert served(*words, *others) == build({**made, "server.origins": ("https://a", "https://b")})


def test_flag_switches_off_what_a_variable_switched_on(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LIMITS_DRY_RUN", "TRACING_ENABLED", "AUTH_WEBHOOK_FAILS_OPEN"):
        monkeypatch.setenv(f"FASTSIG_{name}", "yes")
    assert served("--limits.no-dry-run", "--tracing.enabled=false") == build({"auth.webhook_fails_open": True})


def test_file_is_named_by_flag_or_variable(served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.toml").write_text(f"[server]\nport = {number}", encoding="utf-8")
    monkeypatch.setenv("FASTSIG_CONFIG", str(tmp_path / "1.toml"))
    assert served().server.port == 1
    assert served("--config", str(tmp_path / "2.toml")).server.port == 2


def test_variable_may_hold_the_whole_file(served: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSIG_CONFIG_BODY", "[server]\nport = 5")
    assert served().server.port == 5
    monkeypatch.setenv("FASTSIG_CONFIG", "x.toml")
    assert refused() == "FASTSIG_CONFIG and FASTSIG_CONFIG_BODY are both set: unset one"


def test_web_concurrency_is_the_default_of_workers(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "3")
    assert served().server.workers == 3
    monkeypatch.setenv("FASTSIG_SERVER_WORKERS", "auto")
    assert served().server.workers == "auto"


def test_dev_stays_on_loopback_and_leaves_flags_alone(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSIG_SERVER_HOST", "0.0.0.0")
    monkeypatch.setenv("FASTSIG_LOG_LEVEL", "error")
    assert served("--dev", "--demo.no-enabled") == build({"log.level": "debug"})


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--port", "x"], '--port: expected a whole number, not "x"'),
        (["--port", "70000"], "server.port = 70000 (flag --port): expected 0 to 65535"),
        (["--sever.port", "1"], "Unknown option: --sever.port. Did you mean --server.port?"),
        (["serve", "more"], "unexpected argument 'more', see fastsig --help"),
        (["config", "chek"], 'Unknown command "chek". Did you mean "check"? Available commands: check, print, docs.'),
        (["--config", "/no/such.toml"], "/no/such.toml: cannot be read: No such file or directory"),
    ],
)
def test_unusable_command_line_is_refused_in_one_line(refused: Any, args: list[str], says: str) -> None:
    assert refused(*args) == says


def test_unusable_variable_is_refused_by_its_name(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSIG_SERVER_PORT", "x")
    assert refused() == 'FASTSIG_SERVER_PORT: expected a whole number, not "x"'


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"[server]\nprot = 1", "unknown key prot in [server], did you mean port?"), (b"\xff", "not a TOML")],
)
def test_unusable_file_is_refused_by_its_name(refused: Any, tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(content)
    assert refused("-c", str(file)).startswith(f"{file}: {says}")


@pytest.mark.parametrize(
    ("answer", "code"), [(1, 1), (ConfigError("no such thing"), 2), (StartError("port 80 is in use"), 3)]
)
def test_outcome_of_the_supervisor_is_the_exit_code(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str], answer: int | Exception, code: int
) -> None:
    supervisor.answer = answer
    assert cli.main(["serve"]) == code
    assert capsys.readouterr().err == (f"fastsig: {answer}\n" if isinstance(answer, Exception) else "")


def test_bug_is_not_dressed_up_as_a_complaint(supervisor: Supervisor) -> None:
    supervisor.answer = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_check_lists_unknown_variables_and_fails_when_strict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", {"FASTSIG_SEVER_PORT": "1", "PATH": "/bin"})
    assert cli.main(["config", "check"]) == 0
    out, err = capsys.readouterr()
    assert (
        err == "fastsig: unknown variable FASTSIG_SEVER_PORT, did you mean FASTSIG_SERVER_PORT?\n" and "usable" in out
    )
    assert cli.main(["config", "check", "--strict"]) == 1


def test_check_reads_the_files_of_tls(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = ["--server.tls-cert", str(tmp_path / "chain.pem"), "--server.tls-key", str(tmp_path / "key.pem")]
    assert cli.main(["config", "check", *files]) == 2
    complaint = f"server.tls_cert = {tmp_path / 'chain.pem'}: it cannot be read: No such file or directory"
    assert capsys.readouterr().err == f"fastsig: {complaint}\n"


def test_print_shows_values_as_toml_with_their_sources(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "x.toml"
    file.write_text('[limits]\nrooms = 7\n[ops]\ntoken = "t-secret"', encoding="utf-8")
    monkeypatch.setenv("FASTSIG_SERVER_PATH", "/signal")
    assert cli.main(["config", "print", "-c", str(file), "--port", "9"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "port = 9  # flag --port" in lines
    assert 'path = "/signal"  # env FASTSIG_SERVER_PATH' in lines
    assert f"rooms = 7  # file {file}" in lines
    assert "rooms_per_connection = 16  # default" in lines
    assert f'token = "********"  # file {file}' in lines and "t-secret" not in out
    assert len([1 for table in tomllib.loads(out).values() for _ in table]) == len(OPTIONS)


class Server:
    """Stands in for http.client.HTTPConnection: one answer, or one failure; remembers what it was asked."""

    answer: int | Exception = 200
    asked: list[Any]

    def __init__(self, host: str, port: int, timeout: float) -> None:
        assert timeout == 3.0
        Server.asked = [host, port]

    def request(self, method: str, path: str) -> None:
        Server.asked += [method, path]
        if isinstance(Server.answer, Exception):
            raise Server.answer

    def getresponse(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(status=Server.answer)

    def close(self) -> None:
        pass


def test_health_asks_the_configured_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.client, "HTTPConnection", Server)
    monkeypatch.setattr(Server, "answer", 200)
    assert cli.main(["health", "--ready", "--host", "0.0.0.0", "--port", "9"]) == 0
    assert Server.asked == ["127.0.0.1", 9, "GET", "/health/ready"]


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://a.example", ["a.example", 80, "GET", "/health/live"]),
        ("http://[::1]:7/prefix/", ["::1", 7, "GET", "/prefix/health/live"]),
        ("", ["localhost", 8080, "GET", "/health/live"]),
    ],
)
def test_health_asks_the_server_that_is_named(monkeypatch: pytest.MonkeyPatch, url: str, asked: list[Any]) -> None:
    monkeypatch.setattr(http.client, "HTTPConnection", Server)
    monkeypatch.setattr(Server, "answer", 200)
    assert cli.health(url=url) == 0
    assert Server.asked == asked


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (503, "http://localhost:8080: not ready, it answered 503"),
        (ConnectionRefusedError(111, "Connection refused"), "http://localhost:8080: Connection refused"),
        (TimeoutError("timed out"), "http://localhost:8080: timed out"),
        (http.client.BadStatusLine("x"), "http://localhost:8080: x"),
    ],
)
def test_health_fails_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: int | Exception, says: str
) -> None:
    monkeypatch.setattr(http.client, "HTTPConnection", Server)
    monkeypatch.setattr(Server, "answer", answer)
    assert cli.health(ready=True) == 1
    assert capsys.readouterr().err == f"fastsig: {says}\n"


@pytest.mark.parametrize("url", ["ftp://a", "localhost:8080", "http://[::1", "http://a:x"])
def test_health_refuses_what_it_cannot_ask(url: str) -> None:
    with pytest.raises(ConfigError, match="--url: expected http://host:port"):
        cli.health(url=url)


def test_health_needs_the_address_when_the_port_is_free_to_choose(refused: Any) -> None:
    assert refused("health", "--port", "0") == "server.port is 0, so the port is not known here: give --url"


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{fastsig.__version__}\n"


def test_help_is_quick_names_all_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time, json; started = time.perf_counter(); from fastsig import cli;"
        "took = time.perf_counter() - started; code = cli.main(['--help']);"
        "print(json.dumps([code, took, sorted({name.split('.')[0] for name in sys.modules}),"
        "[name for name in sys.modules if name.startswith('fastsig.')]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"COLUMNS": "200"}, timeout=30
    )
    *page, last = done.stdout.splitlines()
    code_seen, took_s, packages, ours = json.loads(last)
    text = "\n".join(page)
    assert code_seen == 0
    assert took_s < 1.0, "0.09 s where it was measured; the rest is for slow machines"
    assert not {"picows", "structlog", "aiohttp", "uvloop"} & set(packages)
    assert set(ours) <= {"fastsig.cli", "fastsig.config", "fastsig.errors"}
    assert "flag, environment, TOML file (--config), default" in text
    for option in OPTIONS:
        assert option.flag in text and option.env in text
    assert text.count("(no effect yet)") == sum(not option.meta.has_effect for option in OPTIONS)
