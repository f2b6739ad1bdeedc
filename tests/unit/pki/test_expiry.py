"""What is said about dates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from fedcore.errors import ConfigError
from fedcore.pki.authority import Validity, make_authority
from fedcore.pki.expiry import Use, sentence

END = datetime(2026, 9, 1, tzinfo=UTC)
CERTIFICATE = make_authority("fl CA", END, validity=Validity(END - timedelta(days=365), END)).certificate


@pytest.mark.parametrize(
    ("left", "days", "text"),
    [
        (timedelta(days=400), 90, "The certificate is not valid before 2025-09-01 00:00:00+00:00."),
        (timedelta(days=90), 90, ""),
        (
            timedelta(days=90) - timedelta(seconds=1),
            90,
            "The certificate will expire in 89 days and 86399 seconds.",
        ),
        (timedelta(days=7), 7, ""),
        (timedelta(days=6, seconds=1), 7, "The certificate will expire in 6 days and 1 seconds."),
        (timedelta(), 7, "The certificate will expire in 0 days and 0 seconds."),
        (timedelta(seconds=-1), 7, "The certificate has expired. Verify server cert time failed."),
    ],
)
def test_sentences(left: timedelta, days: int, text: str) -> None:
    assert sentence(CERTIFICATE, Use.SERVER, END - left, days) == text


def test_each_use_has_its_word_for_expired() -> None:
    late = END + timedelta(days=1)
    assert sentence(CERTIFICATE, Use.CA, late, 90).endswith("Verify ca cert time failed.")
    assert sentence(CERTIFICATE, Use.CLIENT, late, 90).endswith("Verify cert time failed.")


@pytest.mark.parametrize("days", [6, 181])
def test_the_range_of_days(days: int) -> None:
    with pytest.raises(ConfigError, match=r"expiration warning time should be \[7, 180\]"):
        sentence(CERTIFICATE, Use.SERVER, END, days)
