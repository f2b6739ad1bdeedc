"""The watch over certificates: what it says and shows, and when."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher

from fedcore.net import tls
from fedcore.observe.metrics import CommonMetrics
from fedcore.pki.authority import Issued, Role, Validity, issue, make_authority, revocation_list
from fedcore.pki.expiry import PERIOD_S, Use
from fedcore.services.certificate_watch import CertificateWatch

NOW = datetime.now(UTC)
CA = make_authority("fl CA", NOW)
DAY = timedelta(days=1)


class Node:
    """A node's files, its links, and its watch on a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.metrics = CommonMetrics("x")
        self.logged: list[dict[str, Any]] = []
        (folder / "ca.crt").write_bytes(CA.certificate_pem())
        (folder / "ca.crl").write_bytes(revocation_list(CA, [], NOW, number=1))
        self.write(issue(CA, Role.CLIENT, "node", NOW))
        self.links = tls.Links(self.make(), self.clock.seconds)
        self.days = 90
        self.watch = CertificateWatch(self.links, lambda: self.days, self.metrics, self.clock)

    def write(self, certificate: Issued) -> None:
        (self.folder / "client.p12").write_bytes(certificate.p12(b"x"))

    def make(self) -> tls.Material:
        sources = tls.Sources(
            self.folder / "server.p12",
            self.folder / "client.p12",
            self.folder / "ca.crt",
            self.folder / "ca.crl",
            "ECDHE-ECDSA-AES128-GCM-SHA256",
            lambda: b"",
            lambda: b"x",
            node=tls.NodeLinks(listens=False),
            others=((self.folder / "ca.crt", Use.CA), (self.folder / "missing", Use.CA)),
        )
        return tls.make(sources, lambda: datetime.now(UTC), lambda sentence: None)

    def said(self) -> list[tuple[str, str]]:
        """Return what was said since the last look: file and sentence."""
        events, self.logged[:] = list(self.logged), []
        return [(Path(event["file"]).name, event["text"]) for event in events if "text" in event]

    def shown(self) -> dict[str, float]:
        rows = [row for row in self.metrics.render().decode().splitlines() if row.startswith("fl_")]
        return {
            Path(row.split('file="')[1].split('"')[0]).name: float(row.rpartition(" ")[2])
            for row in rows
            if 'file="' in row
        }


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    globalLogPublisher.addObserver(node.logged.append)
    yield node
    globalLogPublisher.removeObserver(node.logged.append)


def test_the_ends_are_shown_and_nothing_is_said_while_they_are_far(node: Node) -> None:
    node.watch.startService()
    assert node.said() == []
    shown = node.shown()
    assert shown.keys() == {"client.p12", "ca.crt", "ca.crl"}
    assert shown["ca.crt"] == CA.certificate.not_valid_after_utc.timestamp()
    assert 'subject="CN=fl CA"' in node.metrics.render().decode()


def test_it_says_so_at_the_start_every_168_hours_and_after_a_renewal(node: Node) -> None:
    node.write(issue(CA, Role.CLIENT, "node", NOW, validity=Validity(NOW - DAY, NOW + 10 * DAY)))
    node.links.renew(node.make())
    assert len(node.said()) == 1
    node.watch.startService()
    ((file, text),) = node.said()
    assert file == "client.p12"
    assert text.startswith("The certificate will expire in 9 days and ")
    node.clock.advance(PERIOD_S - 1)
    assert node.said() == []
    node.clock.advance(1)
    assert len(node.said()) == 1
    node.days = 7
    node.clock.advance(PERIOD_S)
    assert node.said() == []
    node.write(issue(CA, Role.CLIENT, "node", NOW))
    before = node.shown()["client.p12"]
    node.links.renew(node.make())
    assert node.said() == [] and node.shown()["client.p12"] > before
    node.watch.stopService()
    assert not node.clock.getDelayedCalls()


def test_a_list_past_its_time_is_told(node: Node) -> None:
    late = revocation_list(CA, [], NOW, number=2, validity=Validity(NOW - 9 * DAY, NOW - DAY))
    (node.folder / "ca.crl").write_bytes(late)
    node.links.renew(node.make())
    ((file, text),) = node.said()
    assert file == "ca.crl" and "goes on being used" in text
    assert node.shown()["ca.crl"] == (NOW - DAY).replace(microsecond=0).timestamp()
