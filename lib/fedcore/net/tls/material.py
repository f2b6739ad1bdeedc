"""All contexts of a daemon, made together of its files: either all of them are good, or nothing changes.

The order of the checks, and their words, are those of MindSpore Federated 0.1: node listener, then node client, then
the listener for HTTP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from OpenSSL import SSL

from fedcore.errors import ConfigError
from fedcore.net.tls import files, policy
from fedcore.net.tls.peers import trust
from fedcore.pki import chain
from fedcore.pki.clients import ClientCertificates
from fedcore.pki.expiry import InUse, Use
from fedcore.pki.revocation import RevocationFile, check_form

_HTTP = (b"http/1.1",)
_SHA256 = hashes.SHA256()


@dataclass(frozen=True, slots=True)
class NodeLinks:
    """The node channel of a daemon.

    Attributes:
        listens: whether other nodes connect here.
        names: a certificate with one of these names, lower case, is one of any node.
    """

    listens: bool
    names: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class HttpListener:
    """The listener of devices or operators.

    Attributes:
        clients: whether they show certificates.
        ca_cert_path: PEM of the authorities of theirs; None: those of the nodes.
    """

    clients: ClientCertificates = ClientCertificates.NONE
    ca_cert_path: Path | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    """What a daemon's TLS is made of.

    Attributes:
        server_cert_path: PKCS#12 file of listeners.
        client_cert_path: PKCS#12 file of who connects.
        ca_cert_path: PEM of the authorities.
        crl_path: PEM of their revocation lists, None for none.
        cipher_list: OpenSSL cipher string for TLS 1.2.
        server_password: gives the password of the first file.
        client_password: gives that of the second.
        node: the node channel, None if it has no TLS or is not used.
        http: the listener for HTTP, None if there is none.
        others: PEM files of certificates that others use; their ends are told as well.
    """

    server_cert_path: Path
    client_cert_path: Path
    ca_cert_path: Path
    crl_path: Path | None
    cipher_list: str
    server_password: Callable[[], bytes]
    client_password: Callable[[], bytes]
    node: NodeLinks | None = None
    http: HttpListener | None = None
    others: tuple[tuple[Path, Use], ...] = ()


@dataclass(frozen=True, slots=True)
class Material:
    """The contexts of a daemon; None for a link that it does not have.

    Attributes:
        node_listening: requires certificates.
        node_connecting: shows one and verifies the peer's.
        names: see NodeLinks.
        http: for devices or operators.
        clients: whether those show certificates.
        revoked: the revocation lists, None if there are none.
        in_use: all certificates whose end would matter.
    """

    node_listening: SSL.Context | None
    node_connecting: SSL.Context | None
    names: frozenset[str]
    http: SSL.Context | None
    clients: ClientCertificates
    revoked: RevocationFile | None
    in_use: tuple[InUse, ...]


def make(sources: Sources, now: Callable[[], datetime], warn: Callable[[str], None]) -> Material:
    """Read all files and make the contexts.

    Args:
        sources: the files.
        now: gives the time, with a time zone.
        warn: takes sentences about what is doubtful.

    Raises:
        ConfigError: a file cannot be used.
    """
    return _Making(sources, now, warn).material()


class _Making:
    """One reading of the files; each is read once."""

    def __init__(self, sources: Sources, now: Callable[[], datetime], warn: Callable[[str], None]) -> None:
        self._sources = sources
        self._now = now
        self._warn = warn
        self._suites = ""
        self._authorities: tuple[x509.Certificate, ...] = ()
        self._in_use: dict[tuple[str, bytes], InUse] = {}

    def material(self) -> Material:
        node, http = self._sources.node, self._sources.http
        listening = self._node("server", Use.SERVER) if node is not None and node.listens else None
        connecting = self._node("client", Use.CLIENT) if node is not None else None
        serving, clients = None, ClientCertificates.NONE
        strangers: tuple[x509.Certificate, ...] = ()
        if http is not None:
            serving, clients = self._http(), http.clients
            if clients is not ClientCertificates.NONE:
                strangers = self._authorities_of_clients(http)
                trust(serving, strangers)
        revoked = self._revoked(strangers) if node is not None or strangers else None
        for path, use in self._sources.others:
            with contextlib.suppress(ConfigError):  # whoever uses it says so
                self._use(path, files.read_authorities(path), use)
        return Material(
            listening,
            connecting,
            frozenset() if node is None else node.names,
            serving,
            clients,
            revoked,
            tuple(self._in_use.values()),
        )

    def _revoked(self, strangers: tuple[x509.Certificate, ...]) -> RevocationFile | None:
        """Read the revocation lists; those of devices' or operators' authorities may be among them."""
        path = self._sources.crl_path
        if path is None:
            return None
        ours = self._authorities or files.read_authorities(self._sources.ca_cert_path)
        return RevocationFile(path, tuple(dict.fromkeys([*ours, *strangers])), self._now, self._warn)

    def _node(self, kind: str, use: Use) -> SSL.Context:
        identity = self._identity(kind)
        sources = self._sources
        if sources.crl_path is not None:
            check_form(sources.crl_path, self._now())
        if not self._authorities:
            self._authorities = files.read_authorities(sources.ca_cert_path)
        fault = chain.own_chain_fault(identity.certificate, self._authorities, self._now())
        if fault is not None:
            raise ConfigError(fault.text, hint=f"{identity.file}, {sources.ca_cert_path}: {fault.remedy}")
        leaf_only = files.Identity(identity.file, identity.key, identity.certificate)
        context = policy.context_of(leaf_only, self._allowed())
        trust(context, self._authorities)
        self._use(sources.ca_cert_path, self._authorities, Use.CA)
        self._use(identity.file, (identity.certificate,), use)
        return context

    def _http(self) -> SSL.Context:
        # It is not held against our authority: devices may know another one.
        identity = self._identity("server")
        certificate = identity.certificate
        if not chain.in_force(certificate, self._now()):
            raise ConfigError(
                chain.NOT_IN_FORCE,
                hint=f"{identity.file} is valid {chain.dates(certificate)}: renew it, or set the clock",
            )
        self._use(identity.file, (certificate,), Use.SERVER)
        # Without a choice of our own Twisted refuses whoever offers protocols by ALPN, as old devices' OkHttp does.
        return policy.context_of(identity, self._allowed(), _HTTP)

    def _authorities_of_clients(self, http: HttpListener) -> tuple[x509.Certificate, ...]:
        path = http.ca_cert_path or self._sources.ca_cert_path
        found = files.read_authorities(
            path, "ca_cert_path" if http.ca_cert_path is None else "client_ca_path"
        )
        if not any(chain.in_force(one, self._now()) for one in found):
            raise ConfigError(
                chain.NOT_IN_FORCE,
                hint=f"{path} is valid {chain.dates(found[0])}: renew it, or set the clock",
            )
        self._use(path, found, Use.CA)
        return found

    def _identity(self, kind: str) -> files.Identity:
        sources = self._sources
        if kind == "server":
            return files.read_identity(sources.server_cert_path, sources.server_password(), kind)
        return files.read_identity(sources.client_cert_path, sources.client_password(), kind)

    def _allowed(self) -> str:
        if not self._suites:
            self._suites = policy.allowed_suites(self._sources.cipher_list, self._warn)
        return self._suites

    def _use(self, path: Path, certificates: tuple[x509.Certificate, ...], use: Use) -> None:
        for one in certificates:
            entry = InUse(str(path), one, use)
            self._in_use.setdefault((entry.file, one.fingerprint(_SHA256)), entry)
