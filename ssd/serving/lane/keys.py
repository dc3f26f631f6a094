"""CURVE keys of a client lane over TCP: one pair for the server, and one for each client it admits.

::

    KEYS/server.key_secret     stays on the server
    KEYS/server.key            public; clients need it
    KEYS/clients/NAME.key      public; the clients the server admits
    KEYS/NAME.key_secret       for that client only, together with server.key
"""

from __future__ import annotations

from pathlib import Path

import zmq
import zmq.auth

from ...errors import ConfigError, UsageError


def make_keys(folder: Path, client: str) -> Path:
    """Makes a client's keys, and the server's if there are none. Returns the path of the client's secret key.

    Raises: UsageError: The client has keys already, or its name cannot be a file name.
    """
    if not client or Path(client).name != client or client == "server":
        raise UsageError(f"{client!r} cannot be a client's name; use a plain word")
    clients = folder / "clients"
    clients.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if not (folder / "server.key_secret").exists():
        zmq.auth.create_certificates(folder, "server")
    secret = folder / f"{client}.key_secret"
    if secret.exists() or (clients / f"{client}.key").exists():
        raise UsageError(f"{client!r} has keys in {folder} already; choose another name or remove them")
    zmq.auth.create_certificates(folder, client)
    (folder / f"{client}.key").rename(clients / f"{client}.key")
    for path in folder.glob("*.key_secret"):
        path.chmod(0o600)
    return secret


def server_keys(folder: Path) -> tuple[bytes, bytes]:
    """Returns the server's public and secret key. Raises: ConfigError: There are none."""
    return _load(folder / "server.key_secret", secret=True)


def client_keys(folder: Path, client: str) -> tuple[bytes, bytes, bytes]:
    """Returns a client's public and secret key, and the server's public key. Raises: ConfigError: One is missing."""
    public, secret = _load(folder / f"{client}.key_secret", secret=True)
    return public, secret, _load(folder / "server.key", secret=False)[0]


def _load(path: Path, *, secret: bool) -> tuple[bytes, bytes]:
    try:
        public, private = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no usable key {path} ({error}); make keys with: ssd lane-keys FOLDER NAME") from None
    if secret and private is None:
        raise ConfigError(f"{path} holds no secret key; make keys with: ssd lane-keys FOLDER NAME")
    return public, private or b""
