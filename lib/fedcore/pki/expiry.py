"""What is to be said about the dates of certificates that are in use; nothing ends because of them.

Source: MindSpore Federated 0.1, expiry monitor: at the start and every 168 hours.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from cryptography import x509

from fedcore.errors import ConfigError

PERIOD_S = 168 * 3600.0  # between two looks
LEAST_DAYS, MOST_DAYS = 7, 180


class Use(StrEnum):
    """What a certificate is for; the values are the original's words for one that has expired."""

    SERVER = "Verify server cert time failed."
    CA = "Verify ca cert time failed."
    CLIENT = "Verify cert time failed."


@dataclass(frozen=True, slots=True)
class InUse:
    """A certificate in use.

    Attributes:
        file: where it was read.
        certificate: itself.
        use: what for.
    """

    file: str
    certificate: x509.Certificate
    use: Use

    @property
    def subject(self) -> str:
        """Its subject, for people."""
        return self.certificate.subject.rfc4514_string()


def sentence(certificate: x509.Certificate, use: Use, now: datetime, days: int) -> str:
    """Return what is to be said about a certificate's dates, "" if nothing is.

    Args:
        certificate: in use.
        use: what for.
        now: with a time zone.
        days: how long before its end to begin, 7 to 180.

    Raises:
        ConfigError: ``days`` is outside its range.
    """
    if not LEAST_DAYS <= days <= MOST_DAYS:
        raise ConfigError(
            f"The Certificate expiration warning time should be [{LEAST_DAYS}, {MOST_DAYS}]",
            hint="set ssl.cert_expire_warning_time_in_day",
        )
    if now < certificate.not_valid_before_utc:
        return f"The certificate is not valid before {certificate.not_valid_before_utc}."
    left = certificate.not_valid_after_utc - now
    if left < timedelta():
        return f"The certificate has expired. {use.value}"
    if left.days < days:
        return f"The certificate will expire in {left.days} days and {left.seconds} seconds."
    return ""
