"""TLS: the context of a server from its certificate and key, judged before anybody connects. TLS 1.2 or newer.

Whether a certificate can be used is asked of OpenSSL itself: the server shakes hands with a client in memory that trusts just this one. So
an expired one, one for another purpose, and a key that does not fit are found at the start, and in words. Owns no state.
"""

import contextlib
import logging
import os
import re
import ssl
import stat
import time
from pathlib import Path

from moa_serve.errors import InvalidRequest

logger = logging.getLogger(__name__)

WARN_DAYS = 14  # before a certificate ends
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def server_context(cert: Path, key: Path | None, password: str | None) -> ssl.SSLContext:
    """
    Args:
        cert: PEM, the server's own certificate first, then those between it and its root.
        key: PEM; None is in `cert` too.
        password: of an encrypted key.
    Raises:
        InvalidRequest: what is wrong with them, in one line; `param` is the setting.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load(context, cert, key, password)
    return context


def load(context: ssl.SSLContext, cert: Path, key: Path | None, password: str | None) -> None:
    """Put certificate and key into a context; one that is in use has them for its next connection.

    Raises: InvalidRequest: nothing has changed then.
    """
    text = _readable(cert, "tls_cert")
    if key is not None:
        _readable(key, "tls_key")
    _warn_of_open_key(key or cert)
    tried = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_pair(tried, cert, key, password)
    leaf = _CERTIFICATE.search(text)
    if leaf is not None:  # else it is no PEM, which loading has said
        _shake_hands(tried, leaf[0], cert)
    _load_pair(context, cert, key, password)


def _readable(path: Path, setting: str) -> str:
    try:
        return path.read_text("latin-1")
    except OSError as error:
        raise InvalidRequest(f"{setting}: {path} cannot be read ({error.strerror})", param=setting) from None


def _warn_of_open_key(path: Path) -> None:
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o177:
        logger.warning("tls_key: %s has mode %04o, so others than its owner may use it; chmod 600 it", path, mode)


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


def _shake_hands(server: ssl.SSLContext, leaf: str, cert: Path) -> None:
    """Raises InvalidRequest where a client that trusts `leaf` would refuse it all the same."""
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
        _warn_of_its_end(ends[0], cert)
    except ssl.SSLCertVerificationError as error:
        raise InvalidRequest(f"tls_cert: {cert} cannot be used: {error.verify_message}", param="tls_cert") from None
    except ssl.SSLError as error:
        raise InvalidRequest(f"tls_cert: {cert} cannot be used ({error.reason or error})", param="tls_cert") from None


def _warn_of_its_end(client: ssl.SSLObject, cert: Path) -> None:
    until = (client.getpeercert() or {}).get("notAfter")
    if isinstance(until, str) and (days := (ssl.cert_time_to_seconds(until) - time.time()) / 86400) < WARN_DAYS:
        logger.warning("tls_cert: %s ends in %.0f days, on %s", cert, days, until)
