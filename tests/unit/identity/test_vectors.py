"""The fixed values of the protocol: signed bytes, forms of certificates, ids. No signature is among them."""

from __future__ import annotations

import base64
import hashlib
import subprocess
from pathlib import Path

import pytest
from device_pki import Maker

from fedcore.identity import freshness, messages
from fedcore.identity.pem import Untrusted, bare_form, fl_id_of, pem_form, read_bare, read_pem

# Made with the original's client: layouts only, as it signs with a key store of its own.
C_PK, S_PK, TIMESTAMP, ITERATION = bytes.fromhex("aabb"), bytes.fromhex("ccdd"), "1665300000123", 17
KEYS = "aabbccdd313636353330303030303132333137"
ROUND = "313636353330303030303132333137"
LIST = "ef288ec0967e64b139740d7f93bf1391669f099dc98a69b561150576e909e1d5"


def test_signed_bytes() -> None:
    assert messages.of_keys(C_PK, S_PK, TIMESTAMP, ITERATION).hex() == KEYS
    assert messages.of_round(TIMESTAMP, ITERATION).hex() == ROUND
    assert messages.of_list(["alice", "bob", "carol"]).hex() == LIST
    assert messages.of_start("ab12", TIMESTAMP) == b"ab12 1665300000123"


@pytest.fixture(scope="module")
def certificate() -> object:
    return Maker().ca.certificate


def test_pem_form_is_what_openssl_writes(certificate: object, tmp_path: Path) -> None:
    (tmp_path / "c.der").write_bytes(base64.b64decode(bare_form(certificate)))
    command = ["openssl", "x509", "-inform", "DER", "-in", str(tmp_path / "c.der")]
    written = subprocess.run(command, capture_output=True, check=True).stdout
    assert pem_form(certificate).encode() == written
    assert fl_id_of(written.decode()) == hashlib.sha256(written).hexdigest()
    lines = written.decode().splitlines()
    assert all(len(line) == 64 for line in lines[1:-2])


def test_forms_are_read_again(certificate: object) -> None:
    assert read_pem(pem_form(certificate)) == read_bare(bare_form(certificate)) == certificate
    assert "\n" not in bare_form(certificate)


@pytest.mark.parametrize(
    "change",
    [
        lambda pem: pem + "\n",
        lambda pem: "\n" + pem,
        lambda pem: pem.replace("\n", "\r\n"),
        lambda pem: pem[:-1],
        lambda pem: pem * 2,
        lambda pem: pem[:100],
        lambda pem: "",
        lambda pem: "x" * 100_000,
        lambda pem: pem.replace("A", "\u00e4", 1),
    ],
)
def test_a_certificate_is_written_in_one_way_only(certificate: object, change: object) -> None:
    with pytest.raises(Untrusted):
        read_pem(change(pem_form(certificate)))
    if change("\n") != "\r\n":  # the bare form has no line that could end otherwise
        with pytest.raises(Untrusted):
            read_bare(change(bare_form(certificate)))


@pytest.mark.parametrize(
    ("text", "stamp"),
    [
        ("1665300000123", 1665300000123),
        ("166530000012", None),
        ("16653000001233", None),
        ("166530000012x", None),
        ("+166530000012", None),
        (" 166530000012", None),
        ("١٦٦٥٣٠٠٠٠٠١٢٣", None),  # digits to Python, not to the protocol
        ("", None),
    ],
)
def test_time_stamps_have_13_digits(text: str, stamp: int | None) -> None:
    assert freshness.read_stamp(text) == stamp


def test_the_window_is_open_to_both_sides() -> None:
    assert freshness.is_fresh(1000, 1600, 600) and freshness.is_fresh(1600, 1000, 600)
    assert not freshness.is_fresh(999, 1600, 600) and not freshness.is_fresh(1601, 1000, 600)


def test_requests_are_told_apart() -> None:
    digest = freshness.digest_of(b"body")
    assert len(freshness.mark_of_request("i_1", "updateModel", digest)) == freshness.MARK_BYTES
    marks = {
        freshness.mark_of_request("i_1", "updateModel", digest),
        freshness.mark_of_request("i_2", "updateModel", digest),
        freshness.mark_of_request("i_1", "getKeys", digest),
        freshness.mark_of_request("i_1", "updateModel", freshness.digest_of(b"other")),
        freshness.mark_of_request("i_1u", "pdateModel", digest),
    }
    assert len(marks) == 5
