"""A device's identity: files, ids, and that what it signs is what the protocol says."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import scripted_server as server
from click.testing import CliRunner
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    pkcs12,
)
from device_pki import Maker, pems
from scripted_server import Script, ScriptedServer

from fedclient import Client, DeviceIdentity, load_identity
from fedclient.__main__ import main
from fedcore.errors import ConfigError
from fedcore.pki.authority import KeyKind, make_key, pem
from fedcore.wire.codec import decode
from fedcore.wire.messages import RequestFLJob, RequestGetModel, RequestUpdateModel

TRAINER = """
from fedclient import FitResult

class Adder:
    def load(self):
        return 4, 0

    def fit(self, weights, config):
        return FitResult({name: values + 1 for name, values in weights.items()}, 0.5)

    def evaluate(self, weights):
        return 0.25

    def step(self, weights, step):
        return self.fit(weights, None)
"""


@pytest.fixture(scope="module")
def device() -> Any:
    return Maker().device()


def verify(device: Any, signature: bytes | None, message: str) -> None:
    """Verify with a salt of 32 bytes, which the original's devices take."""
    scheme = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    device.attestation.certificate.public_key().verify(signature, message.encode(), scheme, hashes.SHA256())


class TestFiles:
    def test_pem(self, device: Any, tmp_path: Path) -> None:
        (tmp_path / "all.pem").write_bytes(device.attestation.key_pem() + device.chain_pem())
        (tmp_path / "chain.pem").write_bytes(device.chain_pem())
        (tmp_path / "key.pem").write_bytes(device.attestation.key_pem())
        (tmp_path / "locked.pem").write_bytes(device.attestation.key_pem(b"secret"))
        for found in (
            load_identity(tmp_path / "all.pem"),
            load_identity(tmp_path / "chain.pem", tmp_path / "key.pem"),
            load_identity(tmp_path / "chain.pem", tmp_path / "locked.pem", b"secret"),
        ):
            assert (found.fl_id, found.chain) == (device.fl_id, device.chain)

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_p12_in_any_order(self, device: Any, tmp_path: Path, order: tuple[int, ...]) -> None:
        others = [device.chain[1 + n] for n in order]
        (tmp_path / "d.p12").write_bytes(device.attestation.p12(b"secret", others))
        assert load_identity(tmp_path / "d.p12", password=b"secret").chain == device.chain

    def test_what_is_no_identity(self, device: Any, tmp_path: Path) -> None:
        (tmp_path / "d.p12").write_bytes(device.attestation.p12(b"secret", device.chain[1:]))
        (tmp_path / "short.p12").write_bytes(device.attestation.p12(b"secret", device.chain[1:3]))
        (tmp_path / "chain.pem").write_bytes(device.chain_pem())
        (tmp_path / "other.pem").write_bytes(device.equipment.key_pem())
        (tmp_path / "curve.pem").write_bytes(_curve_pem())
        for path, key, password, words in (
            ("d.p12", None, b"wrong", "holds no identity"),
            ("d.p12", None, b"", "holds no identity"),
            ("short.p12", None, b"secret", "a device has 4 certificates, here are 3"),
            ("chain.pem", None, b"", "holds no identity"),
            ("chain.pem", "other.pem", b"", "not that of its first certificate"),
            ("chain.pem", "curve.pem", b"", "no RSA key"),
            ("missing.pem", None, b"", "cannot read"),
            ("chain.pem", "missing.pem", b"", "cannot read"),
        ):
            with pytest.raises(ConfigError, match=words):
                load_identity(tmp_path / path, None if key is None else tmp_path / key, password)

    def test_a_p12_without_certificates(self, device: Any, tmp_path: Path) -> None:
        content = pkcs12.serialize_key_and_certificates(
            None, device.attestation.key, None, None, BestAvailableEncryption(b"secret")
        )
        (tmp_path / "key.p12").write_bytes(content)
        with pytest.raises(ConfigError, match="here are 0"):
            load_identity(tmp_path / "key.p12", password=b"secret")


def _curve_pem() -> bytes:
    key = make_key(KeyKind.EC_P256)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def test_the_id_is_that_of_the_certificate(device: Any) -> None:
    identity = DeviceIdentity(device.attestation.key, device.chain)
    trainer: Any = object()
    assert Client(trainer, "http://127.0.0.1:1", identity=identity).client_id == device.fl_id
    same = Client(trainer, "http://127.0.0.1:1", identity=identity, client_id=device.fl_id)
    assert same.client_id == device.fl_id
    with pytest.raises(ConfigError, match="not that of the device's certificate"):
        Client(trainer, "http://127.0.0.1:1", identity=identity, client_id="me")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "signing_trainer.py").write_text(TRAINER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda *arguments: CliRunner().invoke(
        main, ["--trainer", "signing_trainer:Adder", *arguments], prog_name="fl-client"
    )
    sys.modules.pop("signing_trainer", None)


def test_a_signed_job(run: Any, device: Any, tmp_path: Path) -> None:
    (tmp_path / "d.p12").write_bytes(device.attestation.p12(b"secret", device.chain[1:]))
    (tmp_path / "password").write_text("secret\n")
    script = Script(*(a for k in (1, 2, 3) for a in (server.started(k), server.updated(), server.model())))

    def answer(path: str, headers: Any, body: bytes) -> Any:
        status, reply = script(path, body)
        return status, {}, reply

    with ScriptedServer(answer) as job:
        options = ("--identity", "d.p12", "--identity-password-file", "password")
        result = run("--server", job.url, *options)
    assert result.exit_code == 0, result.output
    signatures = set()
    for k, ((_, first), (_, second), (_, third)) in enumerate(_threes(script.asked), 1):
        start, update = decode(RequestFLJob, first), decode(RequestUpdateModel, second)
        decode(RequestGetModel, third)
        assert start.fl_id == update.fl_id == device.fl_id
        verify(device, start.sign_data, f"{device.fl_id} {start.timestamp}")
        verify(device, update.signature, f"{update.timestamp}{k}")
        shown = [start.key_attestation, start.equip_cert, start.equip_ca_cert, start.root_cert]
        assert shown == pems(device) == [pem(one).decode() for one in device.chain]
        signatures |= {start.sign_data, update.signature}
    assert len(signatures) == 6


def _threes(items: list[Any]) -> list[Any]:
    return [items[n : n + 3] for n in range(0, len(items), 3)]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--identity-key", "x"), "belong to --identity"),
        (("--identity-password-file", "x"), "belong to --identity"),
        (("--identity", "missing.p12"), "cannot read missing.p12"),
        (("--identity", "x.p12", "--identity-password-file", "missing"), "cannot read missing"),
        (
            ("--identity", "x", "--rule", "FedAvg", "--sync-frequency", "1"),
            "for devices, not for cloud workers",
        ),
    ],
)
def test_options_that_cannot_be_used(run: Any, options: tuple[str, ...], word: str) -> None:
    result = run("--server", "http://127.0.0.1:1", *options)
    assert (result.exit_code, word in result.output) == (2, True), result.output
