"""Every exception that fedcore raises: one root, six families.

Expected protocol answers (late, duplicate, not selected, quorum full) are return values, never exceptions;
an exception means a broken promise. Each family says whose fault it is and how to answer it:

    ConfigError   the operator's file or command line; the daemon exits with 78 and is not restarted
    PeerError     the peer's bytes; answered with a 4xx
    LocalError    our bug; answered with 500
    StoreError    Redis is away or somebody else won the race
    CryptoError   keys, shares, certificates
    ArrayError    weights with wrong names, shapes or values
"""

from __future__ import annotations

from typing import ClassVar


class FedcoreError(Exception):
    """Root of all exceptions raised by fedcore.

    Attributes:
        wire_code: ``retcode`` of the protocol table that reports this error (200, 201, 300, 400 or 500).
        http_status: status for listeners that answer in HTTP terms.
        retry_after: seconds after which a repeat may succeed, or None if a repeat is useless.
        hint: the remedy, in plain words for the reader of a log.
    """

    wire_code: ClassVar[int] = 500
    http_status: ClassVar[int] = 500
    retry_after: ClassVar[float | None] = None

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message


class ConfigError(FedcoreError):
    """The configuration or the command line cannot be used; the text names path, value and remedy."""


class PeerError(FedcoreError):
    """A peer sent bytes that break the protocol."""

    wire_code = 400
    http_status = 400


class MalformedRequest(PeerError):
    """A buffer is not the table it should be: a bad offset, a missing part, a wrong type."""


class BodyTooLarge(PeerError):
    """A body is longer than its route allows; raised before the body is read."""

    http_status = 413


class LocalError(FedcoreError):
    """A promise inside fedcore was broken; always a bug."""


class StoreError(FedcoreError):
    """The shared store did not do what was asked."""

    wire_code = 300
    http_status = 503
    retry_after = 1.0


class StoreUnavailable(StoreError):
    """Redis cannot be reached, does not answer in time or answers with an error."""


class LostRace(StoreError):
    """The shared state is no longer the one that this step was decided on."""


class CryptoError(FedcoreError):
    """A key, certificate or share cannot be used."""

    wire_code = 400
    http_status = 400


class ArrayError(FedcoreError):
    """Weights do not fit the model."""

    wire_code = 400
    http_status = 400


class ShapeMismatch(ArrayError):
    """A weight is unknown, missing or of another size than the model's."""


class NonFinite(ArrayError):
    """A weight holds NaN or infinity."""
