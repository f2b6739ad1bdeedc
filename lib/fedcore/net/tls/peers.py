"""What a peer's certificate must be: signed by an authority of ours, for its use, in force, not revoked, with its name.

OpenSSL follows the signature, looks at dates, keys and use (extended key usage, where there is one: clientAuth of who
connects, serverAuth of who listens). The rest is looked at here, within the same handshake, so that nothing is ever
sent to, or read from, a peer that fails.

Rules kept here:

* Only the given authorities are trusted, never those of the system, and they must have signed the certificate directly:
  their revocation lists then tell of every certificate that can be shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cryptography import x509
from OpenSSL import SSL, crypto

from fedcore.pki.chain import names_of
from fedcore.pki.revocation import RevocationLists

_REASONS = {
    2: "no authority of ours has signed it",
    7: "its signature is wrong",
    9: "it is not valid yet, or the clock is wrong",
    10: "it has expired, or the clock is wrong",
    18: "no authority of ours has signed it",
    19: "no authority of ours has signed it",
    20: "no authority of ours has signed it",
    21: "no authority of ours has signed it",
    22: "no authority of ours has signed it directly",
    26: "it is for another use",
    66: "its key is too short",
    67: "the key of its authority is too short",
    68: "it is signed by a weak hash",
}
REVOKED = "it is revoked"

Judge = Callable[[x509.Certificate], str]


def trust(context: SSL.Context, authorities: Sequence[x509.Certificate]) -> None:
    """Let a context trust certificates that one of the authorities has signed itself."""
    store = context.get_cert_store()
    assert store is not None
    store.set_flags(
        crypto.X509StoreFlags.PARTIAL_CHAIN
    )  # an authority of ours ends the chain, whoever signed it
    for authority in authorities:
        store.add_cert(crypto.X509.from_cryptography(authority))
        context.add_client_ca(authority)
    context.set_verify_depth(0)


def verify_with(judge: Judge, refused: Callable[[str], None]) -> Callable[..., bool]:
    """Return what OpenSSL calls for each step of a verification.

    Args:
        judge: given a certificate that OpenSSL finds good, why it is not; "" if it is.
        refused: told why a certificate is not good.
    """

    def verify(connection: Any, shown: crypto.X509, error: int, depth: int, good: int) -> bool:
        if not good:
            reason = _REASONS.get(error, f"OpenSSL's verification error {error}")
            refused(reason if depth == 0 else f"{reason} (of its authority)" if error in (9, 10) else reason)
            return False
        if depth > 0:
            return True
        reason = judge(shown.to_cryptography())
        if reason:
            refused(reason)
        return not reason

    return verify


def not_revoked(lists: Callable[[], RevocationLists]) -> Judge:
    """Return a judge who looks a certificate up in the lists of the moment."""
    return lambda certificate: REVOKED if lists().revokes(certificate) else ""


def named(host: str, good: Callable[[frozenset[str]], bool]) -> Judge:
    """Return a judge who asks whether a certificate is one of a host.

    Args:
        host: for the message.
        good: whether the names of a certificate will do.
    """

    def judge(certificate: x509.Certificate) -> str:
        names = names_of(certificate)
        listed = ", ".join(sorted(names)) or "no name at all"
        return "" if good(names) else f"it is for {listed}, not for {host}"

    return judge
