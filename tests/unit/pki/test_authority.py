"""fedcore.pki.authority: what it makes, as openssl and the original's checks see it."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedcore.errors import ConfigError
from fedcore.pki.authority import (
    Issued,
    KeyKind,
    Revoked,
    Role,
    Validity,
    issue,
    issue_device,
    lasting,
    load_issued,
    make_authority,
    make_device_authority,
    pem,
    revocation_list,
)
from fedcore.pki.chain import NOT_IN_FORCE, WRONG_SIGNATURE, names_of, own_chain_fault

NOW = datetime.now(UTC)
HOSTS = ["10.0.0.5", "fd00::1", "node1", "fl.example.org"]
DAY = timedelta(days=1)


def openssl(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *words], capture_output=True, text=True, check=False, timeout=30)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def verdict(tmp_path: Path, authority: Issued, leaf: x509.Certificate, *words: str | Path) -> str:
    """What openssl verify says."""
    ca = write(tmp_path / "ca.crt", authority.certificate_pem())
    file = write(tmp_path / "leaf.crt", pem(leaf))
    done = openssl("verify", "-x509_strict", "-auth_level", "3", "-CAfile", ca, *words, file)
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=[KeyKind.EC_P256, KeyKind.RSA_3072])
def kind(request: pytest.FixtureRequest) -> KeyKind:
    return KeyKind(request.param)


@pytest.fixture(scope="module")
def authority(kind: KeyKind) -> Issued:
    return make_authority("test CA", NOW, kind=kind)


@pytest.fixture(scope="module")
def server(authority: Issued, kind: KeyKind) -> Issued:
    return issue(authority, Role.SERVER, "node1", NOW, hosts=HOSTS, kind=kind)


class TestNodes:
    @pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
    def test_openssl_takes_it_as_both_ends_at_level_3(
        self, tmp_path: Path, authority: Issued, server: Issued, purpose: str
    ) -> None:
        assert verdict(tmp_path, authority, server.certificate, "-purpose", purpose).endswith("OK\n")

    @pytest.mark.parametrize("flag", ["-verify_hostname fl.example.org", "-verify_ip 10.0.0.5"])
    def test_openssl_finds_its_names(
        self, tmp_path: Path, authority: Issued, server: Issued, flag: str
    ) -> None:
        assert verdict(tmp_path, authority, server.certificate, *flag.split()).endswith("OK\n")
        other = flag[:-1] + "9"
        assert "mismatch" in verdict(tmp_path, authority, server.certificate, *other.split())

    def test_it_passes_the_checks_of_the_original(self, authority: Issued, server: Issued) -> None:
        assert own_chain_fault(server.certificate, [authority.certificate], NOW) is None
        assert names_of(server.certificate) == set(HOSTS)

    def test_an_operator_is_no_server(self, tmp_path: Path, authority: Issued) -> None:
        alice = issue(authority, Role.OPERATOR, "alice", NOW)
        assert verdict(tmp_path, authority, alice.certificate, "-purpose", "sslclient").endswith("OK\n")
        assert "unsuitable certificate purpose" in verdict(
            tmp_path, authority, alice.certificate, "-purpose", "sslserver"
        )
        assert alice.certificate.subject.rfc4514_string() == "CN=alice,OU=operator"

    def test_it_ends_no_later_than_its_authority(self) -> None:
        short = make_authority("short", NOW, validity=lasting(NOW, 100))
        made = issue(short, Role.SERVER, "node1", NOW)
        assert made.certificate.not_valid_after_utc == short.certificate.not_valid_after_utc
        assert made.certificate.not_valid_before_utc < NOW

    def test_it_lasts_as_long_as_devices_of_apple_allow(self, server: Issued) -> None:
        made = server.certificate
        assert made.not_valid_after_utc - made.not_valid_before_utc == timedelta(days=825)

    def test_serial_numbers_are_long_and_different(self, authority: Issued) -> None:
        serials = {issue(authority, Role.CLIENT, "n", NOW).certificate.serial_number for _ in range(20)}
        assert len(serials) == 20
        assert all(serial > 0 for serial in serials)
        assert max(serial.bit_length() for serial in serials) in range(140, 160)

    @pytest.mark.parametrize("name", ["", "n" * 65])
    def test_a_bad_common_name_is_refused(self, authority: Issued, name: str) -> None:
        with pytest.raises(ConfigError, match="1 to 64 characters"):
            issue(authority, Role.SERVER, name, NOW)

    @pytest.mark.parametrize("host", ["", "a b", "münchen.example", "10.0.0.5:6666", "http://a"])
    def test_a_bad_host_is_refused(self, authority: Issued, host: str) -> None:
        with pytest.raises(ConfigError, match="neither an IP address nor a host name"):
            issue(authority, Role.SERVER, "node1", NOW, hosts=[host])


class TestNoGood:
    """Certificates for tests of those who refuse them."""

    def test_expired(self, tmp_path: Path, authority: Issued) -> None:
        old = issue(authority, Role.SERVER, "n", NOW, validity=Validity(NOW - 3 * DAY, NOW - DAY))
        assert "certificate has expired" in verdict(tmp_path, authority, old.certificate)
        fault = own_chain_fault(old.certificate, [authority.certificate], NOW)
        assert fault is not None
        assert fault.text == NOT_IN_FORCE

    def test_not_yet_valid(self, tmp_path: Path, authority: Issued) -> None:
        early = issue(authority, Role.SERVER, "n", NOW, validity=Validity(NOW + DAY, NOW + 2 * DAY))
        assert "certificate is not yet valid" in verdict(tmp_path, authority, early.certificate)

    def test_weak_key(self, tmp_path: Path, authority: Issued) -> None:
        weak = issue(authority, Role.SERVER, "n", NOW, kind=KeyKind.RSA_2048)
        assert "key too weak" in verdict(tmp_path, authority, weak.certificate)

    def test_wrong_usage(self, tmp_path: Path, authority: Issued) -> None:
        wrong = issue(authority, Role.SERVER, "n", NOW, usages=[ExtendedKeyUsageOID.CODE_SIGNING])
        assert "unsuitable certificate purpose" in verdict(
            tmp_path, authority, wrong.certificate, "-purpose", "sslserver"
        )

    def test_another_authority_of_the_same_name(self, server: Issued, authority: Issued) -> None:
        other = make_authority("test CA", NOW)
        fault = own_chain_fault(server.certificate, [other.certificate], NOW)
        assert fault is not None
        assert fault.text == WRONG_SIGNATURE
        same_key = make_authority("test CA", NOW, key=authority.key)
        assert own_chain_fault(server.certificate, [same_key.certificate], NOW) is None

    def test_dates_the_wrong_way_round(self, authority: Issued) -> None:
        with pytest.raises(ConfigError, match="cannot be valid from"):
            issue(authority, Role.SERVER, "n", NOW, validity=Validity(NOW, NOW - DAY))


class TestFiles:
    def test_openssl_opens_the_p12_without_its_legacy_provider(self, tmp_path: Path, server: Issued) -> None:
        p12 = write(tmp_path / "server.p12", server.p12(b"secret"))
        done = openssl("pkcs12", "-in", p12, "-passin", "pass:secret", "-nodes")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("BEGIN CERTIFICATE") == 1
        assert done.stdout.count("BEGIN PRIVATE KEY") == 1
        assert "invalid password" in openssl("pkcs12", "-in", p12, "-passin", "pass:other", "-nodes").stderr
        info = openssl("pkcs12", "-in", p12, "-passin", "pass:secret", "-noout", "-info").stderr
        assert "MAC: sha256" in info
        assert info.count("PBES2, PBKDF2, AES-256-CBC") == 2

    def test_the_p12_opens_as_the_daemons_do_it(self, server: Issued) -> None:
        key, certificate, others = pkcs12.load_key_and_certificates(server.p12(b"secret"), b"secret")
        assert certificate == server.certificate
        assert key is not None
        assert key.public_key() == server.key.public_key()
        assert others == []

    def test_a_p12_has_a_password(self, server: Issued) -> None:
        with pytest.raises(ConfigError, match="needs a password"):
            server.p12(b"")

    def test_key_and_certificate_come_back(self, server: Issued, authority: Issued) -> None:
        for password in (b"", b"secret"):
            found = load_issued(server.key_pem(password), server.certificate_pem(), password)
            assert found.certificate == server.certificate
        with pytest.raises(ConfigError, match="cannot be read"):
            load_issued(server.key_pem(b"secret"), server.certificate_pem())
        with pytest.raises(ConfigError, match="not that of the certificate"):
            load_issued(server.key_pem(), authority.certificate_pem())


class TestRevocation:
    def test_openssl_refuses_what_is_revoked_and_nothing_else(
        self, tmp_path: Path, authority: Issued, server: Issued
    ) -> None:
        other = issue(authority, Role.CLIENT, "node2", NOW)
        revoked = [Revoked(server.certificate.serial_number, NOW)]
        crl = write(tmp_path / "ca.crl", revocation_list(authority, revoked, NOW, number=7))
        words: list[str | Path] = ["-crl_check", "-CRLfile", crl]
        assert "certificate revoked" in verdict(tmp_path, authority, server.certificate, *words)
        assert verdict(tmp_path, authority, other.certificate, *words).endswith("OK\n")
        shown = openssl("crl", "-in", crl, "-noout", "-crlnumber", "-text").stdout
        assert "crlNumber=0x07" in shown
        assert f"{server.certificate.serial_number:X}" in shown

    def test_a_list_has_its_dates(self, authority: Issued) -> None:
        dates = Validity(NOW.replace(microsecond=0) - 3 * DAY, NOW.replace(microsecond=0) - DAY)
        found = x509.load_pem_x509_crl(revocation_list(authority, [], NOW, number=1, validity=dates))
        assert found.last_update_utc == dates.begin
        assert found.next_update_utc == dates.end


class TestDevices:
    def test_openssl_takes_the_chain(self, tmp_path: Path) -> None:
        root, maker = make_device_authority("test", NOW, kind=KeyKind.RSA_2048)
        device = issue_device(root.certificate, maker, "phone", NOW)
        attestation, equipment, equipment_ca, top = device.chain
        between = write(tmp_path / "between.pem", pem(equipment) + pem(equipment_ca))
        ca = write(tmp_path / "root.crt", pem(top))
        leaf = write(tmp_path / "leaf.crt", pem(attestation))
        done = openssl("verify", "-x509_strict", "-CAfile", ca, "-untrusted", between, leaf)
        assert done.stdout.endswith("OK\n"), done.stderr

    def test_its_id_is_the_hash_of_the_pem_that_openssl_writes(self, tmp_path: Path) -> None:
        root, maker = make_device_authority("test", NOW, kind=KeyKind.RSA_2048)
        device = issue_device(root.certificate, maker, "phone", NOW, equipment_signs=False)
        chain = write(tmp_path / "chain.pem", pem(device.equipment.certificate))
        again = tmp_path / "again.pem"
        openssl("x509", "-in", chain, "-out", again)
        assert openssl("dgst", "-sha256", "-r", again).stdout.startswith(device.fl_id)
        assert device.attestation.key.key_size == 2048
