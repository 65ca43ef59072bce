"""The files of TLS: what is made of them, what is said of those that cannot be used, and how their changes are seen."""

import datetime as dt
import json
import ssl
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from fastsig import logs, tls
from fastsig.config import Server
from fastsig.errors import ConfigError
from fastsig.tls import Credentials, load


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def _write(authority: trustme.CA, folder: Path, *, expires: dt.datetime | None = None) -> Server:
    """A new certificate and its key, in the files of this folder."""
    certificate = authority.issue_cert("example.org", not_after=expires)
    (folder / "chain.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    (folder / "key.pem").write_bytes(certificate.private_key_pem.bytes())
    return Server(tls_cert=str(folder / "chain.pem"), tls_key=str(folder / "key.pem"))


@pytest.fixture
def server(authority: trustme.CA, tmp_path: Path) -> Server:
    return _write(authority, tmp_path)


class Log:
    """What was logged, a line of JSON each."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        logs.configure("info", "json")

    def take(self) -> list[tuple[str, str]]:
        """Of each event since the last call its name, and the serial number that it is about."""
        lines = [json.loads(line) for line in self._capsys.readouterr().err.splitlines()]
        return [(line["event"], line["serial"]) for line in lines]


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Log:
    return Log(capsys)


# ---- what is in them


def test_certificate_is_known_by_serial_and_end(authority: trustme.CA, tmp_path: Path) -> None:
    expires = dt.datetime(2031, 5, 6, 7, 8, 9, tzinfo=dt.UTC)
    certificate = load(_write(authority, tmp_path, expires=expires))
    assert certificate.expires_at == int(expires.timestamp())
    assert int(certificate.serial, 16) > 0


def test_context_is_modern(server: Server) -> None:
    context = load(server).context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    for option in (ssl.OP_NO_RENEGOTIATION, ssl.OP_NO_COMPRESSION):
        assert context.options & option
    assert all("DHE" in cipher["name"] or cipher["name"].startswith("TLS_") for cipher in context.get_ciphers())


def test_key_may_stand_in_the_file_of_the_certificate(server: Server) -> None:
    both = Path(server.tls_cert)
    both.write_bytes(Path(server.tls_key).read_bytes() + both.read_bytes())
    assert load(Server(tls_cert=str(both), tls_key=str(both))).serial == load(server).serial


def _encrypted(path: Path) -> None:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


def _other_key(path: Path) -> None:
    path.write_bytes(trustme.CA(key_type=trustme.KeyType.ECDSA).issue_cert("x").private_key_pem.bytes())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("name", "spoil", "complaint"),
    [
        ("chain.pem", Path.unlink, "it cannot be read: No such file or directory"),
        ("chain.pem", lambda path: path.write_text("hello"), "there is no certificate in PEM in it"),
        ("chain.pem", _cut, "there is no certificate in PEM in it"),
        ("key.pem", Path.unlink, "it cannot be read: No such file or directory"),
        ("key.pem", lambda path: path.write_text("hello"), "there is no private key in PEM in it"),
        ("key.pem", _other_key, "it is not the key of .*chain.pem: give both of one certificate"),
        ("key.pem", _encrypted, "give the key without a passphrase"),
        ("key.pem", _cut, "give the key without a passphrase, .*in its file"),
    ],
)
def test_files_that_cannot_be_used_are_named_with_the_cure(
    server: Server, tmp_path: Path, name: str, spoil: object, complaint: str
) -> None:
    assert callable(spoil)
    spoil(tmp_path / name)
    option = "server.tls_cert" if name == "chain.pem" else "server.tls_key"
    with pytest.raises(ConfigError, match=rf"^{option} = {tmp_path / name}: {complaint}") as refusal:
        load(server)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError):
        tls.check(server)


def test_without_tls_there_is_nothing_to_check() -> None:
    tls.check(Server())


# ---- when they change


def test_files_that_did_not_change_are_not_read_again(server: Server, log: Log) -> None:
    credentials = Credentials(server)
    before = credentials.certificate
    credentials.poll()
    assert credentials.certificate is before
    assert log.take() == [("certificate_loaded", before.serial)]


def test_new_files_are_taken_in_a_new_context(authority: trustme.CA, server: Server, tmp_path: Path, log: Log) -> None:
    credentials = Credentials(server)
    before = credentials.certificate
    _write(authority, tmp_path)
    credentials.poll()
    assert credentials.certificate.context is not before.context
    assert log.take() == [("certificate_loaded", before.serial), ("certificate_loaded", credentials.certificate.serial)]


def test_link_on_the_way_to_the_files_is_followed(authority: trustme.CA, tmp_path: Path) -> None:
    """Kubernetes: `chain.pem` -> `..data/chain.pem`, and `..data` is replaced."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _write(authority, tmp_path / name)
    (tmp_path / "..data").symlink_to("one")
    for name in ("chain.pem", "key.pem"):
        (tmp_path / name).symlink_to(Path("..data", name))
    server = Server(tls_cert=str(tmp_path / "chain.pem"), tls_key=str(tmp_path / "key.pem"))
    credentials = Credentials(server)
    before = credentials.certificate.serial
    (tmp_path / "..new").symlink_to("two")
    (tmp_path / "..new").rename(tmp_path / "..data")
    credentials.poll()
    assert credentials.certificate.serial == load(server).serial != before


def test_files_that_do_not_fit_change_nothing_and_are_tried_until_they_do(
    authority: trustme.CA, server: Server, tmp_path: Path, log: Log
) -> None:
    credentials = Credentials(server)
    before = credentials.certificate
    old_key = Path(server.tls_key).read_bytes()
    _write(authority, tmp_path)
    new_key = Path(server.tls_key).read_bytes()
    Path(server.tls_key).write_bytes(old_key)
    log.take()
    for _ in range(3):
        credentials.poll()
        assert credentials.certificate is before
    assert log.take() == [("certificate_unusable", before.serial)]
    Path(server.tls_cert).rename(tmp_path / "away")
    credentials.poll()
    assert log.take() == [("certificate_unusable", before.serial)], "for another reason"
    (tmp_path / "away").rename(server.tls_cert)
    Path(server.tls_key).write_bytes(new_key)
    credentials.poll()
    assert log.take() == [("certificate_loaded", credentials.certificate.serial)]
    assert credentials.certificate.serial != before.serial


def test_configuration_that_is_read_anew_may_name_others(authority: trustme.CA, server: Server, tmp_path: Path) -> None:
    credentials = Credentials(server)
    (tmp_path / "other").mkdir()
    other = _write(authority, tmp_path / "other")
    credentials.configure(other)
    assert credentials.certificate.serial == load(other).serial
    credentials.configure(Server(tls_cert=other.tls_cert, tls_key=other.tls_key, tls_min_version="1.3"))
    assert credentials.certificate.context.minimum_version == ssl.TLSVersion.TLSv1_3


def test_start_without_usable_files_is_refused(server: Server) -> None:
    Path(server.tls_key).unlink()
    with pytest.raises(ConfigError):
        Credentials(server)
