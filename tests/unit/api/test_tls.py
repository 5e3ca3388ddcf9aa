"""Certificates and keys: which are taken, and what is said of the others."""

import shutil
import ssl
from pathlib import Path

import pytest
from certificates import write_certificate

from moa_serve.api.tls import Tls
from moa_serve.errors import InvalidRequest
from moa_serve.settings import load_settings

pytestmark = [pytest.mark.case(91), pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_certificate(tmp_path_factory.mktemp("tls"), "good")


def refused(cert: Path, key: Path | None, password: str | None = None) -> tuple[str | None, str]:
    with pytest.raises(InvalidRequest) as error:
        Tls(cert, key, password)
    assert "\n" not in str(error.value)
    return error.value.param, str(error.value)


def test_a_good_pair_is_served_by_tls_1_2_or_newer(pair: tuple[Path, Path]) -> None:
    tls = Tls(*pair, None)
    assert tls.context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert tls.warnings == []


def test_what_cannot_be_used_does_not_replace_what_can(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A renewal that writes half a file must not stop the server."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for to, source in ((cert, pair[0]), (key, pair[1])):
        shutil.copy(source, to)
    tls = Tls(cert, key, None)
    context = tls.context
    cert.write_text("half")
    with pytest.raises(InvalidRequest):
        tls.load()
    shutil.copy(write_certificate(tmp_path, "short", days=3)[0], cert)
    shutil.copy(tmp_path / "short.key", key)
    tls.load()
    assert tls.context is context
    assert len(tls.warnings) == 1


def test_one_file_can_hold_both(pair: tuple[Path, Path], tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(pair[1].read_bytes() + pair[0].read_bytes())
    Tls(both, None, None)
    param, message = refused(pair[0], None)
    assert param == "tls_cert"
    assert "missing" in message


def test_what_is_not_there_or_cannot_be_read_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert refused(tmp_path / "none.pem", pair[1])[0] == "tls_cert"
    assert refused(pair[0], tmp_path / "none.key")[0] == "tls_key"
    assert refused(tmp_path, pair[1])[0] == "tls_cert"
    junk = tmp_path / "junk"
    junk.write_bytes(b"\xff\x00 nothing")
    assert refused(junk, pair[1])[0] == "tls_cert"
    assert refused(pair[0], junk)[0] == "tls_cert"


def test_the_key_of_another_certificate_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    param, message = refused(pair[0], write_certificate(tmp_path, "other")[1])
    assert param == "tls_key"
    assert "another certificate" in message


def test_a_certificate_that_has_ended_is_refused(tmp_path: Path) -> None:
    """Clients would find out one by one."""
    param, message = refused(*write_certificate(tmp_path, "ended", days=-1))
    assert param == "tls_cert"
    assert "expired" in message


def test_one_that_will_end_soon_is_told(tmp_path: Path) -> None:
    (warning,) = Tls(*write_certificate(tmp_path, "short", days=3), None).warnings
    assert "ends in 3 days" in warning


def test_an_encrypted_key_needs_its_password_and_asks_no_terminal(tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path, "locked", password="open sesame")
    assert "MOA_TLS_KEY_PASSWORD" in refused(cert, key)[1]
    assert "does not open it" in refused(cert, key, "wrong")[1]
    Tls(cert, key, "open sesame")


@pytest.mark.parametrize("mode", [0o640, 0o644, 0o660, 0o700])
def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path, pair: tuple[Path, Path], mode: int) -> None:
    key = tmp_path / "open.key"
    key.write_bytes(pair[1].read_bytes())
    key.chmod(mode)
    (warning,) = Tls(pair[0], key, None).warnings
    assert f"{mode:04o}" in warning


def test_a_key_without_a_certificate_is_refused() -> None:
    with pytest.raises(InvalidRequest) as error:
        load_settings({"tls_key": "x"})
    assert error.value.param == "tls_key"
