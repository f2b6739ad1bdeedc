"""The admin listener of every daemon: /livez, /readyz, /metrics."""

from __future__ import annotations

import json

from twisted.web import resource, server

from fedcore.net.web import QuietSite, site_of
from fedcore.observe.health import Readiness
from fedcore.observe.metrics import CONTENT_TYPE, CommonMetrics


def admin_site(readiness: Readiness, metrics: CommonMetrics) -> QuietSite:
    """Build the admin listener."""
    return site_of({b"livez": _Livez(), b"readyz": _Readyz(readiness), b"metrics": _Metrics(metrics)})


class _Livez(resource.Resource):
    """200 as long as the reactor turns."""

    isLeaf = True

    def render_GET(self, request: server.Request) -> bytes:
        request.setHeader("Content-Type", "application/json")
        return b'{"live":true}\n'


class _Readyz(resource.Resource):
    """200 if every check passes, else 503 with the reasons."""

    isLeaf = True

    def __init__(self, readiness: Readiness) -> None:
        super().__init__()
        self._readiness = readiness

    def render_GET(self, request: server.Request) -> bytes:
        reasons = self._readiness.reasons()
        request.setHeader("Content-Type", "application/json")
        request.setResponseCode(503 if reasons else 200)
        return json.dumps({"ready": not reasons, "reasons": reasons}).encode() + b"\n"


class _Metrics(resource.Resource):
    """All metrics in the text format of Prometheus."""

    isLeaf = True

    def __init__(self, metrics: CommonMetrics) -> None:
        super().__init__()
        self._metrics = metrics

    def render_GET(self, request: server.Request) -> bytes:
        request.setHeader("Content-Type", CONTENT_TYPE)
        return self._metrics.render()
