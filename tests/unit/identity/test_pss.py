"""Signatures of devices."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from device_pki import sign

from fedcore.identity import pss
from fedcore.identity.pem import Untrusted

MESSAGE = b"166530000012317"


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.mark.parametrize("salt", [0, 20, 32, 222])
def test_any_salt_length_is_taken(key: rsa.RSAPrivateKey, salt: int) -> None:
    signature = sign(key, MESSAGE, salt)
    assert pss.verify(key.public_key(), signature, MESSAGE)
    assert not pss.verify(key.public_key(), signature, MESSAGE + b"1")


@pytest.mark.parametrize("bits", [2048, 2056, 3072])
def test_longer_keys_are_taken(bits: int) -> None:
    key = rsa.generate_private_key(65537, bits)
    assert pss.verify(pss.check_key(key.public_key()), pss.sign(key, MESSAGE), MESSAGE)


def test_the_length_is_looked_at_first(key: rsa.RSAPrivateKey) -> None:
    signature = pss.sign(key, MESSAGE)
    for other in (b"", signature[:-1], signature + b"\0", b"\0" + signature, bytes(100_000)):
        assert not pss.verify(key.public_key(), other, MESSAGE)
    assert not pss.verify(key.public_key(), b"\xff" * 256, MESSAGE)  # more than the modulus


def test_other_schemes_are_refused(key: rsa.RSAPrivateKey) -> None:
    other = key.sign(MESSAGE, padding.PKCS1v15(), hashes.SHA256())
    assert not pss.verify(key.public_key(), other, MESSAGE)
    weak = key.sign(MESSAGE, padding.PSS(padding.MGF1(hashes.SHA1()), 32), hashes.SHA256())
    assert not pss.verify(key.public_key(), weak, MESSAGE)
    assert not pss.verify(rsa.generate_private_key(65537, 2048).public_key(), pss.sign(key, MESSAGE), MESSAGE)


def test_openssl_agrees(key: rsa.RSAPrivateKey, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(MESSAGE)
    (tmp_path / "s").write_bytes(pss.sign(key, MESSAGE))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "p.pem").write_bytes(public)
    (tmp_path / "k.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    options = ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_mgf1_md:sha256"]
    salt = ["-sigopt", "rsa_pss_saltlen:32"]
    verified = subprocess.run(
        ["openssl", "dgst", "-sha256", *options, *salt, "-verify", "p.pem", "-signature", "s", "m"],
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    assert verified.returncode == 0, verified
    made = subprocess.run(
        ["openssl", "dgst", "-sha256", *options, *salt, "-sign", "k.pem", "m"],
        cwd=tmp_path, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert pss.verify(key.public_key(), made, MESSAGE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: rsa.generate_private_key(65537, 1024).public_key(),
        lambda: rsa.RSAPublicNumbers(65537, (1 << 9000) + 1).public_key(),
        lambda: rsa.RSAPublicNumbers((1 << 40) + 1, (1 << 2047) + 1).public_key(),
        lambda: ec.generate_private_key(ec.SECP256R1()).public_key(),
    ],
    ids=["short", "long", "exponent", "curve"],
)
def test_keys_that_may_not_sign(make: object) -> None:
    with pytest.raises(Untrusted):
        pss.check_key(make())


def test_keys_are_kept_packed(key: rsa.RSAPrivateKey) -> None:
    packed = pss.pack_key(key.public_key())
    assert len(packed) == 294 and pss.unpack_key(packed) == key.public_key()
    with pytest.raises(Untrusted):
        pss.unpack_key(packed[:-1])
