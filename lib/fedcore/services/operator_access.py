"""Who may change a job through the operator API.

Rules kept here:

* Reading is open to everybody who reaches the listener. What changes the job needs an operator: a bearer token, or a
  certificate that the handshake has verified. Either will do.
* Without both, a listener on a loopback address is open to the users of its host, as the original's is, but not to
  their browsers: a page from elsewhere could ask them to send a request. Any other listener refuses.
* ``fedcore.scheduler.unauthenticated`` switches all of this off.
* The token's file is read for each request that changes something: there are few, and a new token needs no restart.
* A certificate of a node is none of an operator, or whoever has broken into a server could end the job: where operators
  have no authority of their own, the certificate must say that it is one's (OU=operator).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address

from cryptography import x509
from cryptography.x509.oid import NameOID
from twisted.logger import Logger

from fedcore.errors import ConfigError

SHORTEST_TOKEN = 16  # characters; `openssl rand -base64 32` makes 44
OPERATOR_UNIT = "operator"  # organizational unit of an operator's certificate
NEEDS_OPERATOR = (
    "This changes the job and needs an operator: send the token (Authorization: Bearer ..., or fl job with "
    "--token-file), or show an operator's certificate."
)
WRONG_TOKEN = "The operator token is wrong."
NO_ACCESS_SET = (
    "This scheduler can be reached from other hosts and has no operator token, so it changes nothing: put one into "
    "fedcore.scheduler.token_file (or systemd's credential operator-token), or set fedcore.scheduler.unauthenticated "
    "to true to let everybody change the job."
)
UNREADABLE_TOKEN = "The operator token cannot be read: see the scheduler's log."
FROM_A_BROWSER = "A browser cannot change the job without the operator token."


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a request is not served.

    Attributes:
        status: 401 if a token or certificate would help, 403 if it would not, 500 if the fault is ours.
        text: for the operator, with the remedy.
        reason: for the metrics.
    """

    status: int
    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class Caller:
    """What a request says about who sent it.

    Attributes:
        authorization: value of the header Authorization, None if there is none.
        certificate: that the handshake has verified, None if there is none.
        browser: whether headers are there that only browsers send.
    """

    authorization: bytes | None = None
    certificate: x509.Certificate | None = None
    browser: bool = False


class Access:
    """Decides for one listener."""

    log = Logger()

    def __init__(
        self,
        *,
        loopback: bool,
        token: Callable[[], bytes] | None = None,
        certificates: bool = False,
        own_authority: bool = False,
        unauthenticated: bool = False,
    ) -> None:
        """Decide by what is configured.

        Args:
            loopback: whether the listener can be reached from its own host only.
            token: reads the token; raises ConfigError; None if there is none.
            certificates: whether the listener asks clients for certificates.
            own_authority: whether operators' certificates have an authority that signs for nobody else.
            unauthenticated: let everybody in.
        """
        self._loopback = loopback
        self._token = token
        self._certificates = certificates
        self._own_authority = own_authority
        self._unauthenticated = unauthenticated

    def denial(self, caller: Caller) -> Denial | None:
        """Return why a request that changes the job is refused, None if it is not."""
        if self._unauthenticated or self._is_operators(caller.certificate):
            return None
        if self._token is not None and caller.authorization is not None:
            return self._judge(self._token, caller.authorization)
        if self._token is not None or self._certificates:
            return Denial(401, NEEDS_OPERATOR, "no_token")
        if not self._loopback:
            return Denial(403, NO_ACCESS_SET, "not_configured")
        return Denial(403, FROM_A_BROWSER, "browser") if caller.browser else None

    def _judge(self, read: Callable[[], bytes], authorization: bytes) -> Denial | None:
        try:
            token = read()
        except ConfigError as fault:
            self.log.error(
                "a change was refused, as the operator token cannot be read: {reason}", reason=str(fault)
            )
            return Denial(500, UNREADABLE_TOKEN, "unreadable_token")
        scheme, _, given = authorization.strip().partition(b" ")
        if scheme.lower() == b"bearer" and equal(given.strip(), token):
            return None
        return Denial(401, WRONG_TOKEN, "wrong_token")

    def _is_operators(self, certificate: x509.Certificate | None) -> bool:
        if certificate is None or not self._certificates:
            return False
        units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        return self._own_authority or [unit.value for unit in units] == [OPERATOR_UNIT]


def equal(given: bytes, token: bytes) -> bool:
    """Compare in a time that tells neither where two tokens differ nor how long the right one is."""
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(token).digest())


def check_token(token: bytes, where: str) -> bytes:
    """Return a token that may be used.

    Raises:
        ConfigError: it is too short to be a secret, or holds what does not fit into a header.
    """
    if len(token) < SHORTEST_TOKEN or not all(0x21 <= byte <= 0x7E for byte in token):
        raise ConfigError(
            f"the operator token in {where} is not at least {SHORTEST_TOKEN} visible ASCII characters in one word",
            hint=f"make one: openssl rand -base64 32 > {where}",
        )
    return token


def is_loopback(host: str) -> bool:
    """Tell whether a listener at an address can be reached from its own host only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
