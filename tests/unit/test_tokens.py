"""`fastsig token` and `fastsig keys`, as they are typed: what they print, what they write, how they refuse."""

import http.server
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jwt
import pytest

from fastsig import cli
from fastsig.auth import CHECKS, TokenError, Verifier
from fastsig.config import OPTIONS, Auth

from .issuing import SECRET, jwk, jwk_set, private_key, private_pem, public_pem

Run: TypeAlias = Callable[..., tuple[int, str, str]]
KEY = f"secret:{SECRET}"


@pytest.fixture(autouse=True)
def _no_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*(option.env for option in OPTIONS), "FASTSIG_CONFIG", "FASTSIG_CONFIG_BODY", "WEB_CONCURRENCY"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `fastsig` with these arguments and this input; exit code, stdout, stderr."""

    def one(*args: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.main(args)
        out, err = capsys.readouterr()
        return code, out, err

    return one


@pytest.fixture
def made(run: Run) -> Callable[..., str]:
    """Run `fastsig token create` with these arguments; the token, which is all that it prints."""

    def one(*args: str) -> str:
        code, out, err = run("token", "create", *args)
        assert (code, err) == (0, "") and out.count("\n") == 1
        return out.strip()

    return one


def claims_in(token: str, key: Any = SECRET) -> dict[str, Any]:
    """As PyJWT reads it, which shares no code of ours."""
    algorithms = ["HS256", "RS256", "ES256", "EdDSA"]
    return dict(jwt.decode(token, key, algorithms=algorithms, options={"verify_aud": False}))


def test_token_has_what_was_asked_for(made: Callable[..., str]) -> None:
    wishes = ("--room", "lobby", "team/*", "--room", "x", "--admin", "--multi", "--meta", '{"name": "Ä"}')
    token = made("--key", KEY, "--kid", "k1", "--sub", "alice", "--aud", "a", "--iss", "i", "--ttl", "90s", *wishes)
    claims = claims_in(token)
    assert claims.pop("exp") - claims["iat"] == 90 and abs(claims.pop("iat") - time.time()) < 5
    assert claims == {
        "iss": "i",
        "sub": "alice",
        "aud": "a",
        "fastsig": {
            "rooms": ["lobby", "team/*", "x"],
            "can": ["join", "relay", "broadcast", "create", "admin"],
            "meta": {"name": "Ä"},
            "multi": True,
        },
    }
    assert jwt.get_unverified_header(token) == {"alg": "HS256", "typ": "JWT", "kid": "k1"}
    assert claims_in(made("--key", KEY, "--sub", "a", "--can", "join", "relay"))["fastsig"] == {
        "can": ["join", "relay"]
    }
    assert claims_in(made("--key", KEY, "--sub", "a")).keys() == {"sub", "iat", "exp"}


def test_what_is_not_given_is_taken_from_the_configuration(made: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "pub.pem").write_bytes(public_pem(private_key("EC")))
    config = f'[auth]\nkeys = ["pub.pem", "kid=k2,{KEY}"]\nissuer = "us"\naudience = "signal"\nalgorithms = ["HS384"]'
    (tmp_path / "f.toml").write_text(config, encoding="utf-8")
    token = made("-c", "f.toml", "--sub", "alice")
    assert jwt.get_unverified_header(token) == {"alg": "HS384", "typ": "JWT", "kid": "k2"}
    claims = jwt.decode(token, SECRET, algorithms=["HS384"], audience="signal", issuer="us")
    assert claims["sub"] == "alice"


@pytest.mark.parametrize(("kind", "algorithm"), [("RSA", "RS256"), ("EC", "ES256"), ("OKP", "EdDSA")])
def test_private_key_signs_what_its_public_key_checks(
    made: Callable[..., str], run: Run, tmp_path: Path, kind: str, algorithm: str
) -> None:
    key = private_key(kind)
    kinds: dict[str, Any] = {
        "RSA": jwt.algorithms.RSAAlgorithm,
        "EC": jwt.algorithms.ECAlgorithm,
        "OKP": jwt.algorithms.OKPAlgorithm,
    }
    own = {**kinds[kind].to_jwk(key, as_dict=True), "kid": "k", "alg": algorithm}
    (tmp_path / "key.pem").write_bytes(private_pem(key))
    (tmp_path / "key.json").write_text(json.dumps({"keys": [own]}), encoding="utf-8")
    (tmp_path / "pub.json").write_text(json.dumps(jwk(key, kid="k")), encoding="utf-8")
    for name, kid in (("key.pem", None), ("key.json", "k")):
        token = made("--key", name, "--sub", "a")
        header = jwt.get_unverified_header(token)
        assert (header["alg"], header.get("kid")) == (algorithm, kid)
        assert run("token", "check", token, "--auth.keys", "pub.json")[0] == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--key", KEY, "--sub", "\udcff"], "such a token would be refused"),
        (["--key", KEY, "--sub", ""], "such a token would be refused: sub has no 1 to 128 bytes"),
        (["--key", KEY, "--sub", "a", "--room", "a*b"], "such a token would be refused: fastsig.rooms has what is no"),
        (["--key", KEY, "--sub", "a", "--can", "fly"], 'Invalid value "fly" for --can. Choose from: "join", "relay"'),
        (["--key", KEY, "--sub", "a", "--ttl", "soon"], "--ttl: expected a time such as 90s, 15m, 1h or 30d"),
        (["--key", KEY, "--sub", "a", "--ttl", "0"], "--ttl: expected a time"),
        (["--key", KEY, "--sub", "a", "--meta", "{"], '--meta: expected JSON, such as \'{"name":"Alice"}\''),
        (["--key", KEY, "--sub", "a", "--meta", "1e999"], "--meta: expected JSON"),
        (["--key", KEY, "--sub", "a", "--meta", '"\\ud800"'], "--meta: expected JSON"),
        (["--key", KEY, "--sub", "a", "--meta", f'"{"x" * 1023}"'], "--meta: expected no more than limits.meta_bytes"),
        (["--key", KEY, "--sub", "a", "--room", *(f"{n:0100}" for n in range(80))], "the token would have"),
        (["--key", "secret:hunter2", "--sub", "a"], "--key: the secret has 7 bytes, HS256 needs 32"),
        (["--key", "hunter2", "--sub", "a"], "--key: the file cannot be read: No such file or directory; a secret is"),
        (["--key", "pub.pem", "--sub", "a"], "--key: it is no PEM of a private key, which signing needs"),
        (["--key", "pub.json", "--sub", "a"], "--key: it is no private key for RSA, P-256 or Ed25519"),
        (["--key", "two.json", "--sub", "a"], "--key: it is no JWK, and no JWK set with one key"),
        (["--key", KEY, "--sub", "a", "--auth.algorithms", "ES256"], "auth.algorithms has none of HS256, HS384, HS512"),
        (["--auth.keys", "pub.pem", "--sub", "a"], "--key: give the private key or the secret; auth.keys has none"),
        (["--sub", "a"], "--key: give the private key or the secret; auth.keys has none that can sign"),
        (["--key", KEY], 'Command "token create" parameter --sub requires an argument'),
    ],
)
def test_token_that_cannot_be_made_is_refused_in_one_line(run: Run, tmp_path: Path, args: list[str], says: str) -> None:
    (tmp_path / "pub.pem").write_bytes(public_pem(private_key("EC")))
    (tmp_path / "pub.json").write_text(json.dumps(jwk(private_key("EC"))), encoding="utf-8")
    (tmp_path / "two.json").write_bytes(jwk_set(jwk(private_key("EC")), jwk(private_key("EC", 1))))
    code, out, err = run("token", "create", *args)
    assert (code, out) == (2, "") and err.startswith(f"fastsig: {says}"), err
    assert err.count("\n") == 1 and "hunter2" not in err and SECRET not in err


def test_check_says_each_check_and_what_is_granted(made: Callable[..., str], run: Run) -> None:
    token = made("--key", KEY, "--sub", "alice", "--room", "lobby", "--multi", "--meta", '{"a":1}')
    for args, stdin in (((token,), ""), (("-",), f"{token}\n"), ((), f" {token}")):
        code, out, err = run("token", "check", *args, "--auth.keys", KEY, stdin=stdin)
        assert (code, err) == (0, "")
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert lines[: len(CHECKS)] == [[name, "ok"] for name, _ in CHECKS]
    said = dict(lines[len(CHECKS) :])
    assert said["peer"] == '"alice", with a suffix for each connection'
    assert (said["rooms"], said["may"]) == ('"lobby"', "broadcast, create, join, relay")
    assert said["meta"] == '{"a": 1}' and said["issuer"] == "none" and "in 3" in said["expires"]
    assert json.loads(said["claims"])["sub"] == "alice" and json.loads(said["header"])["alg"] == "HS256"
    assert token.rpartition(".")[2] not in out and SECRET not in out


def test_check_stops_at_what_is_wrong(made: Callable[..., str], run: Run) -> None:
    token = made("--key", KEY, "--sub", "alice", "--iss", "them")
    code, out, err = run("token", "check", token, "--auth.keys", KEY, "--auth.issuer", "us")
    checks = [line.split(maxsplit=1) for line in out.splitlines()][:-2]
    assert checks[:-1] == [[name, "ok"] for name, _ in CHECKS[:6]]
    assert checks[-1] == ["issuer", "wrong_issuer: its key is one of us, and its iss is not"]
    assert json.loads(out.splitlines()[-1].split(maxsplit=1)[1])["iss"] == "them"
    assert (code, err) == (1, "fastsig: the token is refused: its key is one of us, and its iss is not\n")


def test_check_of_what_is_no_token_prints_nothing_of_it(run: Run) -> None:
    for text in ("hunter2", "hunter2.hunter2.hunter2", "é.b.c", "x" * 9000, ""):
        code, out, err = run("token", "check", "--auth.keys", KEY, stdin=text)
        assert code == 1 and "hunter2" not in out + err and "xxx" not in out + err


def test_check_of_hostile_claims_moves_no_cursor(run: Run) -> None:
    token = jwt.encode({"sub": "\x1b[2J\x9b2J\u202e", "exp": 1}, SECRET, "HS256")
    code, out, _ = run("token", "check", token, "--auth.keys", KEY)
    assert code == 1 and all(char.isprintable() or char == "\n" for char in out)


def test_check_without_keys_says_what_is_missing(run: Run) -> None:
    assert run("token", "check", "x") == (
        2, "", "fastsig: there are no keys to check it by: set auth.keys or auth.jwks_url\n",
    )  # fmt: skip


class Issuer(http.server.BaseHTTPRequestHandler):
    """Publishes one key on /jwks."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/jwks" else 404)
        self.end_headers()
        if self.path == "/jwks":
            self.wfile.write(jwk_set(jwk(private_key("EC"), kid="k")))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def issuer() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Issuer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_check_fetches_what_the_issuer_publishes(
    made: Callable[..., str], run: Run, issuer: str, tmp_path: Path
) -> None:
    (tmp_path / "key.pem").write_bytes(private_pem(private_key("EC")))
    token = made("--key", "kid=k,key.pem", "--sub", "a")
    code, out, _ = run("token", "check", token, "--auth.jwks-url", f"{issuer}/jwks")
    assert code == 0 and out.startswith(f"keys        {issuer}/jwks: fetched\nsize        ok\n")
    code, out, _ = run("token", "check", token, "--auth.jwks-url", f"{issuer}/none")
    assert code == 1 and out.startswith(f"keys        {issuer}/none: failed: it answered 404\n")
    assert "key         keys_unavailable: " in out
    code, out, _ = run("token", "check", token, "--auth.jwks-url", "http://127.0.0.1:1/")
    assert code == 1 and "http://127.0.0.1:1/: failed: " in out


def test_generated_secret_is_ready_to_use(run: Run, made: Callable[..., str], tmp_path: Path) -> None:
    code, out, _ = run("keys", "generate")
    assert code == 0 and tomllib.loads(out)["auth"]["required"] is True
    (tmp_path / "f.toml").write_text(out, encoding="utf-8")
    token = made("-c", "f.toml", "--sub", "alice")
    assert run("token", "check", token, "-c", "f.toml")[0] == run("config", "check", "-c", "f.toml")[0] == 0
    assert run("keys", "generate")[1] != out


@pytest.mark.parametrize("kind", ["hs256", "ed25519", "es256", "rs256"])
def test_generated_files_are_private_and_ready_to_use(
    run: Run, made: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    code, out, _ = run("keys", "generate", "--type", kind, "--out", "my key")
    assert code == 0
    (tmp_path / "f.toml").write_text(out, encoding="utf-8")
    assert stat.S_IMODE((tmp_path / "my key").stat().st_mode) == 0o600
    assert (tmp_path / "my key.pub").exists() is (kind != "hs256")
    (named,) = tomllib.loads(out)["auth"]["keys"]
    assert named == str(tmp_path / ("my key" if kind == "hs256" else "my key.pub"))
    token = made("-c", "f.toml", "--sub", "alice", "--key", "my key")
    assert Verifier(Auth(keys=(named,))).check(token, time.time()).subject == "alice"
    with pytest.raises(TokenError):
        Verifier(Auth(keys=(KEY,))).check(token, time.time())


def test_generated_key_overwrites_nothing(run: Run, tmp_path: Path) -> None:
    for there, kind in (("k", "hs256"), ("k", "es256"), ("k.pub", "es256")):
        (tmp_path / there).write_text("mine", encoding="utf-8")
        code, out, err = run("keys", "generate", "--type", kind, "--out", "k")
        assert (code, out, err) == (2, "", f"fastsig: --out: {there} is there already, and is not overwritten\n")
        assert [path.name for path in tmp_path.iterdir()] == [there]
        assert (tmp_path / there).read_text(encoding="utf-8") == "mine"
        (tmp_path / there).unlink()
    assert run("keys", "generate", "--out", "no/such/k")[2].startswith("fastsig: --out: no/such/k cannot be written: ")
    assert run("keys", "generate", "--type", "rs256")[2] == (
        "fastsig: --out FILE: the private key goes there, the public one to FILE.pub\n"
    )


@pytest.mark.parametrize("command", [["serve"], ["config", "check"]])
def test_unusable_keys_are_refused_before_anything_starts(run: Run, command: list[str]) -> None:
    code, out, err = run(*command, "--auth.keys", "hunter2")
    assert (code, out) == (2, "") and err.startswith("fastsig: auth.keys, item 1: there is no file; a secret is")
    assert "hunter2" not in err
    code, _, err = run(*command, "--auth.required")
    assert code == 2 and "set auth.keys or auth.jwks_url too" in err
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "whoever called it hears no signals any more"


def test_other_commands_pay_for_no_cryptography() -> None:
    code = "import sys; from fastsig import cli; cli.main(['token', '--help']); cli.main(['config', 'check'])"
    code += "\nprint(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTSIG_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert not {"jwt", "cryptography", "aiohttp"} & set(done.stderr.split())
