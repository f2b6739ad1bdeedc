"""Whether clients of a listener show certificates."""

from __future__ import annotations

from enum import StrEnum


class ClientCertificates(StrEnum):
    """Whether a listener for HTTP wants its clients to show certificates."""

    NONE = "none"
    ASKED = "asked"
    REQUIRED = "required"
