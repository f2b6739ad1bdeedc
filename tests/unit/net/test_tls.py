"""All contexts of a daemon of its files: order and words of the faults, what is in use, what is renewed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, pkcs12
from OpenSSL import SSL

from fedcore.errors import ConfigError
from fedcore.net import tls
from fedcore.net.tls.links import explain
from fedcore.net.tls.policy import SUITES_13, allowed_suites
from fedcore.pki.authority import KeyKind, Role, Validity, issue, make_authority, revocation_list
from fedcore.pki.clients import ClientCertificates

NOW = datetime.now(UTC)
CA = make_authority("fl CA", NOW)
SERVER, CLIENT = (issue(CA, role, "node", NOW, hosts=["10.0.0.5"]) for role in (Role.SERVER, Role.CLIENT))
# The list in the guide that was published with the original: most of it is refused by the original itself.
GUIDE = (
    "ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES256-GCM-SHA384:"
    "ECDHE-ECDSA-AES256-GCM-SHA384:DHE-RSA-AES128-GCM-SHA256:DHE-DSS-AES128-GCM-SHA256:DHE-RSA-AES256-GCM-SHA384:"
    "DHE-DSS-AES256-GCM-SHA384:DHE-PSK-AES128-GCM-SHA256:DHE-PSK-AES256-GCM-SHA384:DHE-PSK-CHACHA20-POLY1305:"
    "ECDHE-RSA-CHACHA20-POLY1305:ECDHE-PSK-CHACHA20-POLY1305:DHE-RSA-AES128-CCM:DHE-RSA-AES256-CCM:"
    "DHE-RSA-CHACHA20-POLY1305:DHE-PSK-AES128-CCM:DHE-PSK-AES256-CCM:ECDHE-ECDSA-AES128-CCM:ECDHE-ECDSA-AES256-CCM:"
    "ECDHE-ECDSA-CHACHA20-POLY1305"
)


class Files:
    """The files of a node, good ones, and what is made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        (folder / "server.p12").write_bytes(SERVER.p12(b"one"))
        (folder / "client.p12").write_bytes(CLIENT.p12(b"two"))
        (folder / "ca.crt").write_bytes(CA.certificate_pem())
        (folder / "ca.crl").write_bytes(revocation_list(CA, [], NOW, number=1))
        self.sources = tls.Sources(
            folder / "server.p12",
            folder / "client.p12",
            folder / "ca.crt",
            folder / "ca.crl",
            GUIDE,
            lambda: b"one",
            lambda: b"two",
            tls.NodeLinks(listens=True),
            tls.HttpListener(),
        )

    def make(self) -> tls.Material:
        return tls.make(self.sources, lambda: datetime.now(UTC), self.warnings.append)

    def fault(self) -> str:
        with pytest.raises(ConfigError) as fault:
            self.make()
        return str(fault.value)

    def put(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)

    def change(self, **fields: object) -> None:
        self.sources = replace(self.sources, **fields)  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_the_list_of_the_guide_will_do_and_what_is_dropped_is_named(files: Files) -> None:
    material = files.make()
    assert material.node_listening and material.node_connecting and material.http
    (warning,) = files.warnings
    assert warning.startswith("these suites of ssl.cipher_list are not used: DHE-")
    for context in (material.node_listening, material.node_connecting, material.http):
        offered = SSL.Connection(context, None).get_cipher_list()
        assert set(offered) <= {*tls.SUITES, *SUITES_13} and set(SUITES_13) <= set(offered)


def test_what_is_in_use(files: Files) -> None:
    assert [Path(one.file).name for one in files.make().in_use] == ["ca.crt", "server.p12", "client.p12"]
    files.change(node=None)
    assert [Path(one.file).name for one in files.make().in_use] == ["server.p12"]


Change = Callable[[Files], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "no server.p12": (
        lambda f: (f.folder / "server.p12").unlink(),
        "The file path of server_cert_path FOLDER/server.p12 is not exist.",
    ),
    "no password": (
        lambda f: f.change(server_password=lambda: b""),
        "The client password's value is empty.",
    ),
    "wrong password": (lambda f: f.change(server_password=lambda: b"x"), "PKCS12_parse failed."),
    "no list": (lambda f: (f.folder / "ca.crl").unlink(), "Verify crl failed."),
    "no CA": (
        lambda f: (f.folder / "ca.crt").unlink(),
        "The file path of ca_cert_path FOLDER/ca.crt is not exist.",
    ),
    "CA of nonsense": (lambda f: f.put("ca.crt", b"x"), "Read CA cert file failed."),
    "another CA": (
        lambda f: f.put("ca.crt", make_authority("x", NOW).certificate_pem()),
        "root CA cert subject cn is not equal with equip CA cert issuer cn.",
    ),
    "no suite": (lambda f: f.change(cipher_list="DHE-RSA-AES128-GCM-SHA256"), "The cipher is wrong."),
    "no list of suites": (lambda f: f.change(cipher_list="x"), "SSL use set cipher list failed!"),
}


@pytest.mark.parametrize(("change", "text"), CHANGES.values(), ids=CHANGES)
def test_faults(files: Files, change: Change, text: str) -> None:
    change(files)
    assert files.fault().startswith(text.replace("FOLDER", str(files.folder)))


def test_the_first_fault_in_the_originals_order_is_told(files: Files) -> None:
    """All at once, from the last to the first: each one more hides those behind it."""
    for change, text in reversed([*CHANGES.values()][:5]):
        change(files)
        assert files.fault().startswith(text.replace("FOLDER", str(files.folder)))


def test_the_client_comes_after_the_listener(files: Files) -> None:
    (files.folder / "client.p12").unlink()
    assert files.fault().startswith(f"The file path of client_cert_path {files.folder}/client.p12 is not")
    (files.folder / "server.p12").unlink()
    assert files.fault().startswith(f"The file path of server_cert_path {files.folder}/server.p12 is not")


def test_a_p12_without_certificate_or_key(files: Files) -> None:
    bare = pkcs12.serialize_key_and_certificates(
        b"x", SERVER.key, None, None, BestAvailableEncryption(b"one")
    )
    files.put("server.p12", bare)
    assert files.fault().startswith("the cert is nullptr")


def test_a_short_key_is_refused_with_the_remedy(files: Files) -> None:
    weak = issue(CA, Role.SERVER, "weak", NOW, kind=KeyKind.RSA_2048)
    files.put("server.p12", weak.p12(b"one"))
    assert files.fault().startswith("SSL use certificate chain file failed! (") and "3072" in files.fault()
    files.change(node=None)
    assert files.fault().startswith("SSL use certificate chain file failed! (")


def test_the_listener_for_http_alone_needs_no_authority(files: Files) -> None:
    files.change(node=None)
    for name in ("ca.crt", "ca.crl", "client.p12"):
        (files.folder / name).unlink()
    assert files.make().revoked is None
    files.change(http=tls.HttpListener(ClientCertificates.ASKED))
    assert files.fault().startswith("The file path of ca_cert_path")


@pytest.mark.parametrize("begin", [-9, 1])
def test_the_listener_for_http_looks_at_its_own_dates(files: Files, begin: int) -> None:
    dates = Validity(NOW + timedelta(days=begin), NOW + timedelta(days=begin + 8))
    files.change(node=None)
    files.put("server.p12", issue(CA, Role.SERVER, "old", NOW, validity=dates).p12(b"one"))
    assert files.fault().startswith("Verify Cert Time failed. (")
    files.put("server.p12", SERVER.p12(b"one"))
    files.put("ca.crt", make_authority("old", NOW, validity=dates).certificate_pem())
    files.make()  # whoever asks for no certificates needs no authority
    files.change(http=tls.HttpListener(ClientCertificates.REQUIRED))
    assert files.fault().startswith("Verify Cert Time failed. (")


def test_devices_may_have_an_authority_of_their_own(files: Files) -> None:
    theirs = make_authority("device CA", NOW)
    path = files.folder / "devices.crt"
    path.write_bytes(theirs.certificate_pem())
    files.change(http=tls.HttpListener(ClientCertificates.REQUIRED, path))
    lists = (files.folder / "ca.crl").read_bytes() + revocation_list(theirs, [], NOW, number=1)
    files.put("ca.crl", lists)
    material = files.make()
    assert material.revoked is not None and len(material.revoked.current().lists) == 2


def test_explanations() -> None:
    assert explain(None) == "" and explain(OSError("x")) == ""
    assert explain(OSError("x"), "it is revoked") == "its certificate is refused: it is revoked"
    assert explain(SSL.Error([("SSL routines", "", "bad thing")])) == "TLS failed: bad thing"
    assert explain(SSL.SysCallError(-1, "Unexpected EOF")) == "TLS failed: the connection was closed"
    alert = explain(SSL.Error([("SSL routines", "", "tlsv1 alert internal error")]))
    assert alert.endswith("; the log of the other side may say why")


def test_suites() -> None:
    assert allowed_suites(GUIDE, lambda sentence: None).count(":") >= 6


def test_a_renewal_is_followed_by_new_connections_and_told(files: Files) -> None:
    links, told = tls.Links(files.make(), lambda: 0.0), []
    links.on_renewal.append(lambda: told.append(links.in_use))
    assert not links.names_fit(frozenset({"fl.example"}), "10.0.0.5")
    files.change(node=tls.NodeLinks(True, frozenset({"fl.example"})))
    links.renew(files.make())
    assert links.names_fit(frozenset({"fl.example"}), "10.0.0.5") and len(told) == 1
