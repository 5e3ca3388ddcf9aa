"""Certificates for tests, made by the openssl command."""

import subprocess
from pathlib import Path

CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


def write_certificate(folder: Path, name: str, *, days: int = 90, password: str | None = None) -> tuple[Path, Path]:
    """`name.pem` for localhost and 127.0.0.1, signed by itself, and its key; -1 days makes one that has ended."""
    protect = ("-passout", f"pass:{password}") if password else ("-nodes",)
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    if days >= 0:
        openssl(folder, "req", "-x509", *CURVE, *protect, *names, "-keyout", key.name, "-out", cert.name, "-days", str(days))
    else:
        openssl(folder, "req", "-new", *CURVE, *protect, *names, "-keyout", key.name, "-out", "request.csr")
        openssl(folder, "x509", "-req", "-in", "request.csr", "-signkey", key.name, "-days", str(days), "-out", cert.name)
    key.chmod(0o600)
    return cert, key
