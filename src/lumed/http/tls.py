"""TLS of the TCP ports: a certificate and its key, as PEM files."""

from __future__ import annotations

import ssl
from pathlib import Path

from lumed.errors import InvalidField

_MISMATCH = "KEY_VALUES_MISMATCH"


class _Encrypted(Exception):
    """OpenSSL asked for a password."""


def read_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """The server's side of TLS. certificate may hold a chain, the server's own first.

    Raises InvalidField if a file cannot be read or is none, if the key is encrypted, or if the
    two do not belong together.
    """
    for option, path in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise _unusable(option, path, error.strerror or str(error)) from error
    try:
        # OpenSSL says which of the two it dislikes only by when it does.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certificate)
    except ssl.SSLError as error:
        raise _unusable("--tls-cert", certificate, "it holds no certificate in PEM") from error
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=_refuse_password)
    except _Encrypted:
        raise _unusable(
            "--tls-key",
            key,
            "it is encrypted, and nobody is there to type its password",
            hint=f"openssl pkey -in {key} -out decrypted.pem",
        ) from None
    except ssl.SSLError as error:
        if error.reason == _MISMATCH:
            reason = f"it is not the key of {certificate}"
        else:
            reason = f"it holds no usable key in PEM ({error.reason or error})"
        raise _unusable("--tls-key", key, reason) from error
    return context


def _refuse_password() -> str:
    raise _Encrypted


def _unusable(option: str, path: Path, reason: str, *, hint: str | None = None) -> InvalidField:
    return InvalidField(
        f"{option} {path} cannot be used: {reason}", hint=hint, fields={option[2:]: reason}
    )
