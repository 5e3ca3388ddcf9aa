"""TLS: the context of a server from its certificate and key, judged before anybody connects. TLS 1.2 or newer.

Whether a certificate can be used is asked of OpenSSL itself: the server shakes hands with a client in memory that trusts just this one. So
an expired one, one for another purpose, and a key that does not fit are found at the start, and in words. Owns no state.
"""

import contextlib
import os
import re
import ssl
import stat
import time
from pathlib import Path

from moa_serve.errors import InvalidRequest

WARN_DAYS = 14  # before a certificate ends
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


class Tls:
    """
    Args:
        cert: PEM, the server's own certificate first, then those between it and its root.
        key: PEM; None is in `cert` too.
        password: of an encrypted key.
    Raises:
        InvalidRequest: what is wrong with them, in one line; `param` is the setting.
    """

    def __init__(self, cert: Path, key: Path | None, password: str | None) -> None:
        self._cert, self._key, self._password = cert, key, password
        self.context = _new_context()
        self.warnings: list[str] = []
        self.load()

    def load(self) -> None:
        """Read the files again; connections that begin after it have the new certificate.

        Raises:
            InvalidRequest: nothing has changed then.
        """
        text = _readable(self._cert, "tls_cert")
        if self._key is not None:
            _readable(self._key, "tls_key")
        tried = _new_context()
        _load_pair(tried, self._cert, self._key, self._password)
        leaf = _CERTIFICATE.search(text)
        assert leaf is not None, "OpenSSL has just read it"
        until = _shake_hands(tried, leaf[0], self._cert)
        _load_pair(self.context, self._cert, self._key, self._password)
        self.warnings = [*_mode_warning(self._key or self._cert), *_end_warning(self._cert, until)]


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _readable(path: Path, setting: str) -> str:
    try:
        return path.read_text("latin-1")
    except OSError as error:
        raise InvalidRequest(f"{setting}: {path} cannot be read ({error.strerror})", param=setting) from None


def _mode_warning(key: Path) -> list[str]:
    mode = stat.S_IMODE(os.stat(key).st_mode)
    return [f"tls_key: {key} has mode {mode:04o}, so others than its owner may use it; chmod 600 it"] if mode & 0o177 else []


def _end_warning(cert: Path, until: str) -> list[str]:
    days = (ssl.cert_time_to_seconds(until) - time.time()) / 86400
    return [f"tls_cert: {cert} ends in {days:.0f} days, on {until}"] if days < WARN_DAYS else []


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path | None, password: str | None) -> None:
    is_asked = False

    def answer() -> str:  # without it OpenSSL would ask on the terminal, and wait
        nonlocal is_asked
        is_asked = True
        return password or ""

    try:
        context.load_cert_chain(cert, key, answer)
    except ssl.SSLError as error:
        reason = (error.reason or "").replace("_", " ").lower()
        if is_asked:
            what = "does not open it" if password else "is needed, as it is encrypted; set MOA_TLS_KEY_PASSWORD"
            raise InvalidRequest(f"tls_key: the password of {key or cert} {what}", param="tls_key_password") from None
        if "mismatch" in reason:
            raise InvalidRequest(f"tls_key: {key or cert} is the key of another certificate than {cert}", param="tls_key") from None
        files = f"{cert} and {key}" if key else f"{cert}"
        why = reason or "they are not PEM, or one of the two is missing"
        raise InvalidRequest(f"tls_cert: {files} cannot be used as certificate and key ({why})", param="tls_cert") from None
    except OSError as error:
        raise InvalidRequest(f"tls_cert: {cert} cannot be read ({error.strerror})", param="tls_cert") from None


def _shake_hands(server: ssl.SSLContext, leaf: str, cert: Path) -> str:
    """When the certificate ends. Raises InvalidRequest where a client that trusts `leaf` would refuse it all the same."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # which names clients will use is not known here
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        client.load_verify_locations(cadata=leaf)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
        for _ in range(4):  # flights of messages; there are three at most
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        return str((ends[0].getpeercert() or {})["notAfter"])
    except ssl.SSLCertVerificationError as error:
        raise InvalidRequest(f"tls_cert: {cert} cannot be used: {error.verify_message}", param="tls_cert") from None
    except ssl.SSLError as error:
        raise InvalidRequest(f"tls_cert: {cert} cannot be used ({error.reason or error})", param="tls_cert") from None
