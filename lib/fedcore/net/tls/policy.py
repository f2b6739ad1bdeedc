"""What holds for every context of ours: versions, suites, security level.

Rules kept here:

* TLS 1.2 and 1.3 only; forward secrecy and authenticated encryption only.
* Security level 3 of OpenSSL, as in the original: keys of at least 3072 bits (RSA) or 256 bits (elliptic curves), on
  both sides, and no signature by SHA-1.
* No session is resumed: no tickets, no cache. Each connection proves anew who its peer is, also after a revocation.
* No renegotiation, no compression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from OpenSSL import SSL, crypto

from fedcore.errors import ConfigError
from fedcore.net.tls.files import Identity

# The suites of TLS 1.2 that MindSpore Federated 0.1 allows.
SUITES = (
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-PSK-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-CCM",
    "ECDHE-ECDSA-AES256-CCM",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
)
# Those of TLS 1.3, which no cipher list governs.
SUITES_13 = ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256")

_LEVEL = "@SECLEVEL=3"
_OPTIONS = (
    SSL.OP_NO_COMPRESSION
    | SSL.OP_NO_TICKET
    | SSL.OP_NO_RENEGOTIATION
    | SSL.OP_CIPHER_SERVER_PREFERENCE
    | SSL.OP_SINGLE_DH_USE
    | SSL.OP_SINGLE_ECDH_USE
)


def allowed_suites(cipher_list: str, warn: Callable[[str], None]) -> str:
    """Keep the suites of an OpenSSL cipher string that are in SUITES.

    Args:
        cipher_list: any OpenSSL cipher string.
        warn: takes a sentence that names the others.

    Raises:
        ConfigError: OpenSSL cannot read it, or nothing is left.
    """
    context = SSL.Context(SSL.TLS_METHOD)
    try:
        context.set_cipher_list(cipher_list.encode())
    except SSL.Error as error:
        raise ConfigError(
            "SSL use set cipher list failed!", hint=f"ssl.cipher_list is {cipher_list!r}"
        ) from error
    offered = [suite for suite in SSL.Connection(context).get_cipher_list() if not suite.startswith("TLS_")]
    allowed = [suite for suite in offered if suite in SUITES]
    if not allowed:
        raise ConfigError("The cipher is wrong.", hint="ssl.cipher_list names none of " + ", ".join(SUITES))
    if len(allowed) < len(offered):
        dropped = ", ".join(sorted(set(offered) - set(allowed)))
        warn(f"these suites of ssl.cipher_list are not used: {dropped}")
    return ":".join(allowed)


def context_of(identity: Identity, suites: str, protocols: Sequence[bytes] = ()) -> SSL.Context:
    """Make a context that shows a certificate and asks for none.

    Args:
        identity: certificate, key and chain to show.
        suites: of TLS 1.2, as ``allowed_suites`` gives them.
        protocols: what a listener chooses from when its peer offers protocols by ALPN; none: it ignores them.

    Raises:
        ConfigError: OpenSSL refuses suites, certificate or key.
    """
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_options(_OPTIONS)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_session_id(
        b"fedcore"
    )  # or whoever tries to resume a session is cut off instead of served anew
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    try:
        context.set_cipher_list(f"{suites}:{_LEVEL}".encode())
        context.set_tls13_ciphersuites(":".join(SUITES_13).encode())
    except SSL.Error as error:
        raise ConfigError("SSL use set cipher list failed!", hint=f"the suites are {suites}") from error
    _show(context, identity)
    if protocols:
        context.set_alpn_select_callback(partial(_choose, tuple(protocols)))
    return context


def _show(context: SSL.Context, identity: Identity) -> None:
    steps: tuple[tuple[str, Callable[[], object]], ...] = (
        (
            "SSL use certificate chain file failed!",
            lambda: context.use_certificate(identity.certificate),
        ),
        (
            "SSL use certificate chain file failed!",
            lambda: [context.add_extra_chain_cert(extra) for extra in identity.chain],
        ),
        (
            "SSL use private key file failed!",
            lambda: context.use_privatekey(identity.key),
        ),
        ("SSL check private key file failed!", context.check_privatekey),
    )
    for text, step in steps:
        try:
            step()
        except (SSL.Error, crypto.Error) as error:
            why = "; ".join(str(entry[-1]) for entry in error.args[0]) if error.args else "no reason given"
            raise ConfigError(
                text,
                hint=f"{identity.file}: {why}; keys need 3072 bits (RSA) or 256 (elliptic curves), signatures SHA-256",
            ) from error


def _choose(ours: tuple[bytes, ...], connection: SSL.Connection, offered: list[bytes]) -> Any:
    return next((protocol for protocol in ours if protocol in offered), SSL.NO_OVERLAPPING_PROTOCOLS)
