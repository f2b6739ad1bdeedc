"""What makes the TLS of connections, and goes on with other contexts once they have been renewed.

Connections that stand keep what they began with. New ones get the contexts, names and revocation lists of the moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cryptography import x509
from OpenSSL import SSL
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator, IOpenSSLServerConnectionCreator
from twisted.logger import Logger
from zope.interface import implementer

from fedcore.net.tls.material import Material
from fedcore.net.tls.peers import REVOKED, named, not_revoked, verify_with
from fedcore.pki.chain import fits
from fedcore.pki.clients import ClientCertificates
from fedcore.pki.expiry import InUse
from fedcore.pki.revocation import RevocationLists

WARNING_INTERVAL_S = 10.0  # between two warnings about clients of one listener

_MODES = {
    ClientCertificates.ASKED: SSL.VERIFY_PEER,
    ClientCertificates.REQUIRED: SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT,
}


class Links:
    """The TLS of a daemon's links.

    Attributes:
        material: the contexts of new connections.
        on_renewal: called after they have been exchanged.
        node_listening: makes the TLS of other nodes' connections, None if there is none.
        http: makes the TLS of devices' or operators' connections, None if there is none.
        encrypts_nodes: whether ``node_connecting`` can be used.
    """

    def __init__(self, material: Material, seconds: Callable[[], float]) -> None:
        """Begin with these contexts; ``seconds`` gives the time."""
        self.material = material
        self.on_renewal: list[Callable[[], None]] = []
        self.encrypts_nodes = material.node_connecting is not None
        self.node_listening: Any = None
        self.http: Any = None
        if material.node_listening is not None:
            self.node_listening = _Listening(self, _node_context, "a node", seconds)
        if material.http is not None:
            self.http = _Listening(self, _http_context, "a client", seconds)

    @property
    def in_use(self) -> Sequence[InUse]:
        """All certificates whose end would matter."""
        return self.material.in_use

    def node_connecting(self, host: str) -> NodeConnecting:
        """Return what makes the TLS of connections to a node; ``host`` as it is dialled."""
        return NodeConnecting(self, host)

    def names_fit(self, names: frozenset[str], host: str) -> bool:
        """Tell whether a node's certificate with these names may be used at a host."""
        return fits(names, host) or not names.isdisjoint(self.material.names)

    def revoked(self) -> RevocationLists:
        """Return the revocation lists of the moment."""
        return RevocationLists() if self.material.revoked is None else self.material.revoked.current()

    def is_revoked(self, certificate: x509.Certificate) -> bool:
        """Tell whether a certificate is revoked by now."""
        return self.revoked().revokes(certificate)

    def renew(self, material: Material) -> None:
        """Use other contexts for new connections."""
        self.material = material
        for follow in self.on_renewal:
            follow()


_Chosen = tuple[SSL.Context, int]


def _node_context(material: Material) -> _Chosen:
    assert material.node_listening is not None
    return material.node_listening, _MODES[ClientCertificates.REQUIRED]


def _http_context(material: Material) -> _Chosen:
    assert material.http is not None
    return material.http, _MODES.get(material.clients, SSL.VERIFY_NONE)


@implementer(IOpenSSLServerConnectionCreator)
class _Listening:
    """Makes the TLS of connections that others open."""

    log = Logger()

    def __init__(
        self, links: Links, choose: Callable[[Material], _Chosen], who: str, seconds: Callable[[], float]
    ) -> None:
        self._links = links
        self._choose = choose
        self._who = who
        self._seconds = seconds
        self._quiet_until = float("-inf")
        self._unsaid = 0

    def serverConnectionForTLS(self, protocol: Any) -> SSL.Connection:
        """Make what encrypts a new connection."""
        context, mode = self._choose(self._links.material)
        connection = SSL.Connection(context, None)
        if mode != SSL.VERIFY_NONE:
            judge = not_revoked(self._links.revoked)
            connection.set_verify(mode, verify_with(judge, lambda reason: self._refused(protocol, reason)))
        return connection

    def _refused(self, protocol: Any, reason: str) -> None:
        """Log why a certificate was refused, not too often: anybody can show one."""
        now = self._seconds()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        self._quiet_until = now + WARNING_INTERVAL_S
        self.log.warn(
            "the certificate of {who} is refused: {reason}",
            who=self._who,
            peer=getattr(protocol.transport.getPeer(), "host", ""),
            reason=reason,
            more_before=self._unsaid,
        )
        self._unsaid = 0


@implementer(IOpenSSLClientConnectionCreator)
class NodeConnecting:
    """Makes the TLS of connections to one node.

    Attributes:
        refusal: why the certificate of the last connection was refused, "" if it was not.
    """

    def __init__(self, links: Links, host: str) -> None:
        """Use ``Links.node_connecting``."""
        self.refusal = ""
        self._links = links
        self._host = host.removeprefix("[").removesuffix("]")

    def clientConnectionForTLS(self, protocol: Any) -> SSL.Connection:
        """Make what encrypts a new connection."""
        self.refusal = ""
        material = self._links.material
        assert material.node_connecting is not None
        connection = SSL.Connection(material.node_connecting, None)
        if not (isIPAddress(self._host) or isIPv6Address(self._host)):
            connection.set_tlsext_host_name(self._host.encode("idna"))
        connection.set_verify(SSL.VERIFY_PEER, verify_with(self._judge, self._refused))
        return connection

    def _judge(self, certificate: x509.Certificate) -> str:
        if self._links.is_revoked(certificate):
            return REVOKED
        host = self._host
        return named(host, lambda names: self._links.names_fit(names, host))(certificate)

    def _refused(self, reason: str) -> None:
        self.refusal = reason


def explain(error: BaseException | None, refusal: str = "") -> str:
    """Say in a line why a connection with TLS has ended, "" if TLS has nothing to do with it.

    Args:
        error: what ended it.
        refusal: why the peer's certificate was refused.
    """
    if refusal:
        return f"its certificate is refused: {refusal}"
    if not isinstance(error, SSL.Error):
        return ""
    entries = error.args[0] if error.args and isinstance(error.args[0], list | tuple) else ()
    reasons = "; ".join(str(entry[-1]) for entry in entries)
    told = "; the log of the other side may say why" if " alert " in reasons else ""
    return f"TLS failed: {reasons or 'the connection was closed'}{told}"
