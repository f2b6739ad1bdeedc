"""The certificates of a demo with TLS: those of ``fl certs``, for one host that runs everything."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from fedcore.pki.authority import Role, issue, make_authority
from fedctl.certs.files import generated_password
from fedctl.certs.folder import AuthorityFolder
from fedctl.processes import HOST

FOLDER = Path("pki")  # as `fl certs ca pki` and `fl certs issue …` make it
NODE = FOLDER / "hosts" / "node"
CA_FILE = FOLDER / "ca.crt"
CIPHERS = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305"


def write_certificates(directory: Path, now: datetime) -> None:
    """Write an authority, and a server's and a client's certificate for this host, below a demo's directory.

    Args:
        directory: of the demo; exists.
        now: with a time zone.
    """
    folder = AuthorityFolder(directory / FOLDER)
    authority = make_authority("fl demo CA", now)
    folder.create(authority, now)
    for role in (Role.SERVER, Role.CLIENT):
        made = issue(authority, role, "node", now, hosts=[HOST, "localhost"])
        (directory / NODE).mkdir(mode=0o700, parents=True, exist_ok=True)
        password = generated_password(directory / NODE / f"{role}-password")
        folder.write_node(made, directory / NODE, role, password)


def configuration() -> dict[str, Any]:
    """Return section ssl of the configuration."""
    return {
        "server_cert_path": str(NODE / "server.p12"),
        "client_cert_path": str(NODE / "client.p12"),
        "ca_cert_path": str(CA_FILE),
        "crl_path": str(FOLDER / "ca.crl"),
        "cipher_list": CIPHERS,
    }


def daemon_arguments() -> list[str]:
    """Return the arguments of a daemon."""
    return [
        *("--server-password-file", str(NODE / "server-password")),
        *("--client-password-file", str(NODE / "client-password")),
    ]
