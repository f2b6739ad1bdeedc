"""Certificates for tests with real daemons: an authority, PKCS#12 files, revocation lists, passwords as credentials.

pki = Pki(tmp_path / "pki")
pki.node("server-0", "127.0.0.2")        # server.p12 and client.p12 in a folder of that name
pki.encrypt(cluster)                     # enable_ssl, mutual TLS between nodes; Redis stays as it is
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from integration.cluster import Cluster

from fedcore.pki.authority import (
    Issued,
    Revoked,
    Role,
    Validity,
    issue,
    make_authority,
    revocation_list,
)

LOCAL = "127.0.0.1"  # where devices and operators connect
PASSWORDS = {"server-password": b"for the server's file", "client-password": b"for the client's file"}
SUITES = "ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-CHACHA20-POLY1305"


def now() -> datetime:
    """Return the time, with a time zone."""
    return datetime.now(UTC)


EXPIRED = Validity(now() - timedelta(days=9), now() - timedelta(days=1))
NOT_YET = Validity(now() + timedelta(days=1), now() + timedelta(days=9))


class Pki:
    """Files of one authority.

    Attributes:
        folder: where they are.
        authority: who signs.
        ca: PEM file of the authority.
        crl: PEM file of its revocation list.
        environment: where daemons find the passwords.
        issued: the server's and the client's certificate of each node.
    """

    def __init__(self, folder: Path, name: str = "test CA") -> None:
        self.folder = folder
        self.ca, self.crl = folder / "ca.crt", folder / "ca.crl"
        credentials = folder / "credentials"
        credentials.mkdir(parents=True)
        for file, password in PASSWORDS.items():
            (credentials / file).write_bytes(password + b"\n")
        self.environment = {"CREDENTIALS_DIRECTORY": str(credentials)}
        self.issued: dict[str, tuple[Issued, Issued]] = {}
        self._number = 0
        self.authority = make_authority(name, now())
        self.ca.write_bytes(self.authority.certificate_pem())
        self.revoke([])

    def issue(self, name: str, *hosts: str, role: Role = Role.CLIENT, **details: Any) -> Issued:
        """Make a certificate."""
        return issue(self.authority, role, name, now(), hosts=hosts, **details)

    def revoke(self, revoked: Iterable[Issued], **details: Any) -> None:
        """Write a revocation list."""
        self._number += 1
        serials = [Revoked(one.certificate.serial_number, now()) for one in revoked]
        content = revocation_list(self.authority, serials, now(), number=self._number, **details)
        self.crl.write_bytes(content)

    def node(self, name: str, *hosts: str) -> tuple[Issued, Issued]:
        """Make the two files of a node that devices reach at 127.0.0.1, other nodes at ``hosts``."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        server = self.issue(name, LOCAL, *hosts, role=Role.SERVER)
        client = self.issue(name, *hosts)
        self.issued[name] = server, client
        (folder / "server.p12").write_bytes(server.p12(PASSWORDS["server-password"]))
        (folder / "client.p12").write_bytes(client.p12(PASSWORDS["client-password"]))
        return server, client

    def section(self, name: str) -> dict[str, str]:
        """Return section ``ssl`` of a node's file."""
        return {
            "server_cert_path": str(self.folder / name / "server.p12"),
            "client_cert_path": str(self.folder / name / "client.p12"),
            "ca_cert_path": str(self.ca),
            "crl_path": str(self.crl),
            "cipher_list": SUITES,
        }

    def encrypt(self, cluster: Cluster, servers: Iterable[int] = ()) -> None:
        """Have a cluster speak TLS; each of these numbered servers has files of its own, ``server-N``."""
        cluster.settings["enable_ssl"] = True
        cluster.settings["ssl"] = self.section("all")
        cluster.settings["fedcore"].setdefault("redis", {})["tls"] = "off"
        for n in servers:
            cluster.own[n] = {"ssl": self.section(cluster.name(n))}
        cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
        cluster.tls = ssl.create_default_context(cafile=str(self.ca))
