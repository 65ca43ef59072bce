"""What a command line, the environment and a file come to, and how complaints look. No server is started."""

import http.client
import json
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

import fastsig
from fastsig import cli
from fastsig.config import OPTIONS, Config
from fastsig.errors import ConfigError, StartError


class Supervisor:
    """Stands in for `fastsig.supervisor`: keeps what it is to run, answers as told."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.answer: int | Exception = 0

    def run(self, config: Config) -> int:
        self.config = config
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture(autouse=True)
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """Also: an environment without options."""
    for name in [*(option.env for option in OPTIONS), "FASTSIG_CONFIG", "FASTSIG_CONFIG_BODY", "WEB_CONCURRENCY"]:
        monkeypatch.delenv(name, raising=False)
    double = Supervisor()
    module = types.ModuleType("fastsig.supervisor")
    module.run = double.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastsig.supervisor", module)
    return double


@pytest.fixture
def served(supervisor: Supervisor) -> Any:
    """Run `fastsig` with these arguments; the Config that would be served."""

    def run(*args: str) -> Config:
        supervisor.config = None
        assert cli.main(args) == 0
        assert supervisor.config is not None
        return supervisor.config

    return run


@pytest.fixture
def refused(supervisor: Supervisor, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `fastsig` with these arguments; the one line of its complaint, which comes with exit code 2."""

    def run(*args: str) -> str:
        assert cli.main(args) == 2
        assert supervisor.config is None
        out, err = capsys.readouterr()
        assert not out and err.startswith("fastsig: ") and err.count("\n") == 1
        return err.removeprefix("fastsig: ").rstrip("\n")

    return run


def test_bare_command_serves_with_the_defaults(served: Any) -> None:
    assert served() == Config() == served("serve")


def test_options_stand_with_and_without_the_command(served: Any) -> None:
    line = ("--host", "127.0.0.1", "--port", "9001", "--workers", "1", "--ops.port", "0")
    assert served(*line) == served("serve", *line)
    config = served("serve", *line)
    assert (config.server.host, config.server.port, config.server.workers, config.ops.port) == ("127.0.0.1", 9001, 1, 0)


def test_every_option_parses_from_flag_variable_and_file(
    served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags, lines = [], []
    for option in OPTIONS:
        text = " ".join(option.default) if option.is_list else str(option.default).lower()
        value = option.show(option.default).replace("auto", "2")
        if option.kind is not str and not option.choices and not option.is_list:
            text, value = text.replace("auto", "2"), value.replace('"', "")
        else:
            text = " ".join(option.default) if option.is_list else option.default
        flags.append(f"{option.flag}={text or '[]'}" if option.is_list else f"{option.flag}={text}")
        lines.append(f"{option.section}.{option.name} = {value}")
        monkeypatch.setenv(option.env, text)
    file = tmp_path / "all.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    from_variables = served()
    for option in OPTIONS:
        monkeypatch.delenv(option.env)
    from_flags, from_file = served(*flags), served("--config", str(file))
    assert from_flags == from_variables == from_file


def test_first_source_wins(served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[limits]\nrooms = 1\npeers_per_room = 1\nconnections = 1", encoding="utf-8")
    monkeypatch.setenv("FASTSIG_LIMITS_ROOMS", "2")
    monkeypatch.setenv("FASTSIG_LIMITS_PEERS_PER_ROOM", "2")
    limits = served("-c", str(file), "--limits.rooms", "3").limits
    assert (limits.rooms, limits.peers_per_room, limits.connections, limits.meta_bytes) == (3, 2, 1, 1024)


def test_rate_of_a_million_million_is_a_number_like_others(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSIG_LIMITS_MESSAGES_PER_S", "1000000000000")
    assert served().limits.messages_per_s == 10**12


def test_empty_variable_counts_as_unset(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "FASTSIG_SERVER_PORT",
        "FASTSIG_SERVER_PATH",
        "FASTSIG_CONFIG",
        "FASTSIG_CONFIG_BODY",
        "WEB_CONCURRENCY",
    ):
        monkeypatch.setenv(name, "")
    assert served() == Config()


@pytest.mark.parametrize("text", ["https://a https://b", '["https://a", "https://b"]'])
def test_list_in_a_variable_is_words_or_json(served: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FASTSIG_SERVER_ORIGINS", text)
    assert served().server.origins == ("https://a", "https://b")


@pytest.mark.parametrize(
    "args",
    [
        ("--server.origins", "a", "b"),
        ("--server.origins", "a b"),
        ("--server.origins", "a", "--server.origins", "b"),
        ("--server.origins", '["a", "b"]'),
    ],
)
def test_list_in_flags_is_given_in_any_way(served: Any, args: tuple[str, ...]) -> None:
    assert served(*args).server.origins == ("a", "b")


def test_flag_switches_off_what_a_variable_switched_on(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSIG_LIMITS_DRY_RUN", "yes")
    assert served().limits.dry_run
    assert not served("--limits.no-dry-run").limits.dry_run
    assert not served("--limits.dry-run=false").limits.dry_run


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
    assert served("--workers", "auto").server.workers == "auto"
    monkeypatch.setenv("FASTSIG_SERVER_WORKERS", "2")
    assert served().server.workers == 2


def test_dev_stays_on_loopback_and_says_more(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSIG_SERVER_HOST", "0.0.0.0")
    config = served("--dev")
    assert (config.server.host, config.log.level, config.demo.enabled) == ("localhost", "debug", True)
    assert served("--dev", "--log.level", "error").log.level == "error"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--port", "x"], '--port: expected a whole number, not "x"'),
        (["--port", "80.5"], '--port: expected a whole number, not "80.5"'),
        (["--port", "70000"], "server.port = 70000 (flag --port): expected 0 to 65535"),
        (["--port", "-1"], "server.port = -1 (flag --port): expected 0 to 65535"),
        (["--log.level", "loud"], '--log.level: expected one of trace, debug, info, warning, error, not "loud"'),
        (["--sever.port", "1"], "Unknown option: --sever.port. Did you mean --server.port?"),
        (["serv"], "unexpected argument 'serv', see fastsig --help"),
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


def test_unusable_file_is_refused_by_its_name(refused: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    for content, says in (
        (b"[server]\nprot = 1", "unknown key prot in [server], did you mean port?"),
        (b'[server]\nport = "1"', "server.port: expected a whole number, not text"),
        (b"[server", "not a TOML file: "),
        (b"\xff", "not a TOML file: "),
    ):
        file.write_bytes(content)
        assert refused("-c", str(file)).startswith(f"{file}: {says}")


@pytest.mark.parametrize(
    ("answer", "code"), [(0, 0), (1, 1), (ConfigError("no such thing"), 2), (StartError("port 80 is in use"), 3)]
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
    monkeypatch.setattr(cli.os, "environ", {"FASTSIG_SEVER_PORT": "1", "PATH": "/bin"})
    assert cli.main(["config", "check"]) == 0
    out, err = capsys.readouterr()
    assert (
        err == "fastsig: unknown variable FASTSIG_SEVER_PORT, did you mean FASTSIG_SERVER_PORT?\n" and "usable" in out
    )
    assert cli.main(["config", "check", "--strict"]) == 1
    monkeypatch.setattr(cli.os, "environ", {"FASTSIG_SERVER_PORT": "1"})
    assert cli.main(["config", "check", "--strict"]) == 0


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


@pytest.mark.parametrize(
    ("args", "asked"),
    [
        ([], ["localhost", 8080, "GET", "/health/live"]),
        (["--ready"], ["localhost", 8080, "GET", "/health/ready"]),
        (["--host", "0.0.0.0", "--port", "9"], ["127.0.0.1", 9, "GET", "/health/live"]),
        (["--host", "::"], ["::1", 8080, "GET", "/health/live"]),
        (["--url", "http://a.example"], ["a.example", 80, "GET", "/health/live"]),
        (["--url", "http://[::1]:7/prefix/"], ["::1", 7, "GET", "/prefix/health/live"]),
    ],
)
def test_health_asks_the_configured_server_or_the_one_given(
    monkeypatch: pytest.MonkeyPatch, args: list[str], asked: list[Any]
) -> None:
    monkeypatch.setattr(http.client, "HTTPConnection", Server)
    monkeypatch.setattr(Server, "answer", 200)
    assert cli.main(["health", *args]) == 0
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
    assert cli.main(["health", "--ready"]) == 1
    assert capsys.readouterr().err == f"fastsig: {says}\n"


@pytest.mark.parametrize(
    "args", [["--url", "https://a"], ["--url", "localhost:8080"], ["--url", "http://[::1"], ["--port", "0"]]
)
def test_health_refuses_what_it_cannot_ask(refused: Any, args: list[str]) -> None:
    assert "--url" in refused("health", *args)


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
