"""Watches the dates of the certificates in use: a gauge for each, and a warning when its end comes near.

Nothing is ever stopped because of them; peers refuse what has expired by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from twisted.application.service import Service
from twisted.internet import task
from twisted.logger import Logger

from fedcore.net.tls import Links
from fedcore.observe.metrics import CommonMetrics
from fedcore.pki.expiry import PERIOD_S, sentence


class CertificateWatch(Service):
    """Looks at the start, after a renewal, and every 168 hours."""

    log = Logger()

    def __init__(self, links: Links, days: Callable[[], int], metrics: CommonMetrics, reactor: Any) -> None:
        """Watch the certificates of these links; ``days`` gives how long before an end to warn."""
        self._links = links
        self._days = days
        self._metrics = metrics
        self._loop = task.LoopingCall(self.look)
        self._loop.clock = reactor
        links.on_renewal.append(self.look)

    def startService(self) -> None:
        super().startService()
        self._loop.start(PERIOD_S)

    def stopService(self) -> None:
        super().stopService()
        if self._loop.running:
            self._loop.stop()

    def look(self) -> None:
        """Show all ends, and say which come near."""
        now, material = datetime.now(UTC), self._links.material
        for one in material.in_use:
            text = sentence(one.certificate, one.use, now, self._days())
            if text:
                self.log.warn("{text}", text=text, file=one.file, subject=one.subject)
        ends = [
            (one.file, one.subject, one.certificate.not_valid_after_utc.timestamp())
            for one in material.in_use
        ]
        lists = [] if material.revoked is None else [(material.revoked.path, self._links.revoked())]
        for path, revoked in lists:
            for text in revoked.overdue(now):
                self.log.warn("{text}", text=text, file=path)
        self._metrics.show_certificates(
            ends,
            [(path, found.next_update.timestamp()) for path, found in lists if found.next_update is not None],
        )
