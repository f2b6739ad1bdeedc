"""twisted.web as the operators' and admin listeners use it: no access log, no tracebacks to the peer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.web import resource, server


class QuietSite(server.Site):
    """A site that logs no request; metrics count them where they matter."""

    noisy = False
    displayTracebacks = False

    def log(self, request: Any) -> None:
        """Log nothing."""


def site_of(children: Mapping[bytes, Any]) -> QuietSite:
    """Build a site of resources by their paths, without the leading slash."""
    root = resource.Resource()
    for path, child in children.items():
        root.putChild(path, child)
    return QuietSite(root)
