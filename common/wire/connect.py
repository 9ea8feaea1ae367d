"""A client of Redis: password, TLS, timeout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from common.config import ConfigError
from common.wire.packing import CommandPacker

_ANSWER_S = 5.0  # how long a connection waits for a reply


def connect(
    url: str,
    *,
    username: str | None = None,
    password_file: str | None = None,
    ca_file: str | None = None,
    cert_file: str | None = None,
    key_file: str | None = None,
) -> redis.Redis:
    """A client that never repeats a command by itself: the caller decides what is safe to repeat.

    Raises ConfigError for a password or certificate file that cannot be read.
    """
    return redis.Redis.from_url(
        url,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=_ANSWER_S,
        socket_connect_timeout=5.0,
        health_check_interval=0,
        command_packer=CommandPacker(),
        username=username,
        password=read_password(password_file),
        **tls_options(url, ca_file=ca_file, cert_file=cert_file, key_file=key_file),
    )


def read_password(path: str | None) -> str | None:
    """The first line of a password file. Raises ConfigError."""
    if path is None:
        return None
    password = _read_file(path, "password_file").partition("\n")[0].strip()
    if not password:
        raise ConfigError(f"redis.password_file {path!r}: its first line is empty")
    return password


def tls_options(url: str, *, ca_file: str | None, cert_file: str | None, key_file: str | None) -> dict[str, Any]:
    """TLS options of redis-py's connections, Celery's included. The server's certificate and host name are always
    checked. Raises ConfigError."""
    if not url.startswith("rediss://"):
        return {}
    named = {"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
    for name, path in named.items():
        if path is not None:
            _read_file(path, name)
    return {
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": True,
        "ssl_ca_certs": ca_file,
        "ssl_certfile": cert_file,
        "ssl_keyfile": key_file,
    }


def _read_file(path: str, name: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except (OSError, ValueError) as error:
        raise ConfigError(f"redis.{name} {path!r}: cannot be read ({getattr(error, 'strerror', error)})") from error
