"""``fl certs``: a whole life of an authority in a folder, with openssl as the independent reader."""

from __future__ import annotations

import json
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedclient.identity import load_identity
from fedcore.errors import ConfigError
from fedcore.pki.authority import KeyKind, Role, Validity, issue, issue_device, make_authority
from fedctl.__main__ import main
from fedctl.certs import files
from fedctl.certs.folder import AuthorityFolder

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def fl(*words: str | Path, code: int = 0, answer: str | None = None) -> Result:
    result = CliRunner().invoke(main, ["certs", *map(str, words)], input=answer, prog_name="fl")
    assert result.exit_code == code, result.output
    return result


def openssl(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *words], capture_output=True, text=True, check=False, timeout=30)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def serial_of(crt: Path) -> str:
    return openssl("x509", "-in", crt, "-noout", "-serial").stdout.strip().removeprefix("serial=")


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    folder = tmp_path / "pki"
    fl("ca", folder, "--name", "test CA")
    return folder


@pytest.fixture
def node(pki: Path) -> Path:
    fl("issue", "server", "node1", "--ca", pki, "--host", "10.0.0.5", "--host", "fl.example.org")
    return pki / "hosts" / "node1"


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki") / "maker"
    fl("ca", folder, "--devices", "--name", "Example")
    return folder


@pytest.fixture(scope="module")
def phone(maker: Path) -> Path:
    fl("device", "phone", "--ca", maker)
    return maker / "devices/phone"


class TestAuthority:
    @pytest.mark.parametrize("kind", ["ec-p256", "rsa-3072"])
    def test_openssl_takes_it(self, tmp_path: Path, kind: str) -> None:
        folder = tmp_path / "pki"
        fl("ca", folder, "--key", kind, "--days", "100")
        crt = folder / "ca.crt"
        assert openssl("verify", "-x509_strict", "-CAfile", crt, crt).stdout.endswith("OK\n")
        assert openssl("crl", "-in", folder / "ca.crl", "-CAfile", crt, "-noout").stderr == "verify OK\n"
        assert "will expire" in openssl("x509", "-in", crt, "-checkend", str(99 * 86400)).stdout
        assert "will not expire" in openssl("x509", "-in", crt, "-checkend", str(98 * 86400)).stdout

    def test_only_the_owner_reads_key_and_folder(self, pki: Path) -> None:
        assert mode(pki) == 0o700
        assert mode(pki / "ca.key") == mode(pki / "index.json") == 0o600
        assert mode(pki / "ca.crt") == mode(pki / "ca.crl") == 0o644

    def test_it_is_not_made_twice(self, pki: Path) -> None:
        before = (pki / "ca.key").read_bytes()
        assert "is there already" in fl("ca", pki, code=1).stderr
        assert (pki / "ca.key").read_bytes() == before
        (pki / "ca.key").unlink()  # it may be on its way back from a copy
        assert "ca.crt is there already" in fl("ca", pki, code=1).stderr
        assert not (pki / "ca.key").exists()

    def test_a_folder_without_one_is_told(self, tmp_path: Path) -> None:
        words = ("issue", "server", "n", "--host", "a", "--ca", tmp_path)
        assert f"fl certs ca {tmp_path}" in fl(*words, code=1).stderr

    def test_a_key_of_another_is_told(self, pki: Path, maker: Path) -> None:
        (pki / "ca.key").write_bytes((maker / "ca.key").read_bytes())
        assert "not that of the certificate" in fl("crl", "--ca", pki, code=1).stderr


class TestIssue:
    @pytest.mark.parametrize("role", ["server", "client", "scheduler"])
    def test_openssl_takes_nodes_as_both_ends(self, pki: Path, role: str) -> None:
        fl("issue", role, "n", "--ca", pki, "--host", "127.0.0.1")
        for purpose in ("sslserver", "sslclient"):
            words = (
                "-auth_level",
                "3",
                "-purpose",
                purpose,
                "-CAfile",
                pki / "ca.crt",
                "-verify_ip",
                "127.0.0.1",
            )
            assert openssl("verify", *words, pki / f"hosts/n/{role}.crt").stdout.endswith("OK\n")

    def test_a_password_is_generated_and_opens_the_p12(self, node: Path) -> None:
        password = node / "server-password"
        done = openssl("pkcs12", "-in", node / "server.p12", "-passin", f"file:{password}", "-nokeys")
        assert "CN = node1" in done.stdout, done.stderr
        assert len(password.read_text().strip()) == 32
        assert mode(password) == mode(node / "server.p12") == 0o600

    def test_the_password_comes_from_a_file_or_is_asked_for(self, pki: Path, tmp_path: Path) -> None:
        file = tmp_path / "password"
        file.write_text("from-file\nmore\n")
        fl("issue", "client", "a", "--ca", pki, "--host", "a", "--password-file", file)
        fl("issue", "client", "b", "--ca", pki, "--host", "b", "--ask-password", answer="typed\ntyped\n")
        for name, password in (("a", "from-file"), ("b", "typed")):
            words = ("-in", pki / f"hosts/{name}/client.p12", "-passin", f"pass:{password}", "-noout")
            assert openssl("pkcs12", *words).returncode == 0
            assert not (pki / f"hosts/{name}/client-password").exists()
        file.write_text("\n")
        words = ("--ca", pki, "--host", "c", "--password-file", file)
        assert "is empty" in fl("issue", "client", "c", *words, code=1).stderr

    def test_files_stay_unless_told_otherwise(self, pki: Path, node: Path) -> None:
        before, password = (node / "server.p12").read_bytes(), (node / "server-password").read_bytes()
        words = ("issue", "server", "node1", "--ca", pki, "--host", "10.0.0.5")
        assert "is there already" in fl(*words, code=1).stderr
        assert (node / "server.p12").read_bytes() == before
        old = serial_of(node / "server.crt")
        fl(*words, "--replace")
        assert (node / "server-password").read_bytes() == password
        words_for_openssl = (
            "-in",
            node / "server.p12",
            "-passin",
            f"pass:{password.decode().strip()}",
            "-noout",
        )
        assert openssl("pkcs12", *words_for_openssl).returncode == 0
        assert serial_of(node / "server.crt") != old

    def test_an_operators_key_for_curl(self, pki: Path) -> None:
        fl("issue", "operator", "alice", "--ca", pki, "--pem")
        folder = pki / "hosts/alice"
        public = openssl("pkey", "-in", folder / "operator.key", "-pubout").stdout
        assert openssl("x509", "-in", folder / "operator.crt", "-noout", "-pubkey").stdout == public
        assert mode(folder / "operator.key") == 0o600
        fl("issue", "operator", "alice", "--ca", pki, "--replace")  # the key is renewed with the rest
        public = openssl("pkey", "-in", folder / "operator.key", "-pubout").stdout
        assert openssl("x509", "-in", folder / "operator.crt", "-noout", "-pubkey").stdout == public

    def test_a_node_needs_a_host(self, pki: Path) -> None:
        assert "needs --host" in fl("issue", "server", "n", "--ca", pki, code=2).stderr

    def test_all_are_in_the_index(self, pki: Path, node: Path) -> None:
        index = json.loads((pki / "index.json").read_text())
        assert index["crl_number"] == 1
        (entry,) = index["certificates"]
        assert entry["serial"] == serial_of(node / "server.crt")
        assert entry["hosts"] == ["10.0.0.5", "fl.example.org"]
        assert (entry["role"], entry["name"], entry["revoked"]) == ("server", "node1", None)
        line = fl("list", "--ca", pki).stdout
        assert line.startswith(f"{entry['serial']}  server     node1")
        assert json.loads(fl("list", "--ca", pki, "--json").stdout) == [entry]

    def test_commands_at_the_same_time_lose_nothing(self, pki: Path) -> None:
        authority = AuthorityFolder(pki)
        issuer = authority.authority()
        made = [issue(issuer, Role.CLIENT, f"n{i}", NOW).certificate for i in range(12)]
        threads = [threading.Thread(target=authority.remember, args=([each],)) for each in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert {int(entry.serial, 16) for entry in authority.index().certificates} == {
            each.serial_number for each in made
        }

    def test_a_damaged_index_is_told(self, pki: Path) -> None:
        (pki / "index.json").write_text("{}")
        assert "bring it back" in fl("list", "--ca", pki, code=1).stderr


class TestRevoke:
    def check(self, pki: Path, crt: Path) -> str:
        words = ("-crl_check", "-CRLfile", pki / "ca.crl", "-CAfile", pki / "ca.crt")
        done = openssl("verify", *words, crt)
        return done.stdout + done.stderr

    @pytest.mark.parametrize("form", ["file", "serial", "colons"])
    def test_openssl_refuses_it_from_then_on(self, pki: Path, node: Path, form: str) -> None:
        fl("issue", "client", "node2", "--ca", pki, "--host", "10.0.0.6")
        crt = node / "server.crt"
        serial = serial_of(crt)
        colons = ":".join(serial[i : i + 2] for i in range(0, len(serial), 2))
        what = {"file": crt, "serial": serial.lower(), "colons": colons}[form]
        assert self.check(pki, crt).endswith("OK\n")
        assert "node1 is revoked since" in fl("revoke", what, "--ca", pki).stdout
        assert "certificate revoked" in self.check(pki, crt)
        assert self.check(pki, pki / "hosts/node2/client.crt").endswith("OK\n")
        assert "REVOKED" in fl("list", "--ca", pki).stdout
        assert "node1 is revoked since" in fl("revoke", what, "--ca", pki).stdout  # once more is no error

    def test_the_date_of_a_revocation_stays(self, pki: Path, node: Path) -> None:
        folder, serial = AuthorityFolder(pki), int(serial_of(node / "server.crt"), 16)
        first = folder.revoke(serial, NOW)
        assert folder.revoke(serial, NOW + DAY) == first
        assert folder.index().find(serial) == first

    def test_the_number_of_the_list_rises(self, pki: Path, node: Path) -> None:
        fl("revoke", node / "server.crt", "--ca", pki)
        fl("crl", "--ca", pki, "--days", "10")
        shown = openssl("crl", "-in", pki / "ca.crl", "-noout", "-crlnumber").stdout
        assert shown == "crlNumber=0x03\n"
        assert "certificate revoked" in self.check(pki, node / "server.crt")

    def test_strangers_are_not_revoked(self, pki: Path, node: Path, maker: Path) -> None:
        assert "was not issued by" in fl("revoke", maker / "ca.crt", "--ca", pki, code=1).stderr
        assert "knows no certificate 0123" in fl("revoke", "123", "--ca", pki, code=1).stderr
        assert "neither a file nor" in fl("revoke", "xyz", "--ca", pki, code=2).stderr
        assert "no certificate" in fl("revoke", pki / "ca.crl", "--ca", pki, code=1).stderr
        fl("revoke", "123", "--ca", pki, "--unknown")
        assert "Serial Number: 0123" in openssl("crl", "-in", pki / "ca.crl", "-noout", "-text").stdout

    def test_an_authority_made_elsewhere(self, tmp_path: Path) -> None:
        """As Ansible's: two files, and no index."""
        other = make_authority("other", NOW, kind=KeyKind.RSA_3072)
        (tmp_path / "ca.key").write_bytes(other.key_pem())
        (tmp_path / "ca.crt").write_bytes(other.certificate_pem())
        made = issue(other, Role.SERVER, "node1", NOW, hosts=["a"])
        crt = tmp_path / "server.crt"
        crt.write_bytes(made.certificate_pem())
        assert "server node1 is revoked" in fl("revoke", crt, "--ca", tmp_path).stdout
        assert "certificate revoked" in self.check(tmp_path, crt)


class TestDevices:
    def test_openssl_takes_the_chain(self, maker: Path, phone: Path) -> None:
        chain = phone / "chain.pem"
        done = openssl("verify", "-CAfile", maker / "root.crt", "-untrusted", chain, chain)
        assert done.stdout.endswith("OK\n"), done.stderr
        assert chain.read_text().count("BEGIN CERTIFICATE") == 4

    def test_the_key_signs_as_the_protocol_wants_it(self, phone: Path, tmp_path: Path) -> None:
        assert "2048 bit" in openssl("pkey", "-in", phone / "key.pem", "-noout", "-text").stdout
        assert mode(phone / "key.pem") == 0o600
        message, signature, key = tmp_path / "message", tmp_path / "signature", tmp_path / "public"
        message.write_bytes(b"id 1665300000123")
        pss = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32")
        openssl("dgst", "-sha256", *pss, "-sign", phone / "key.pem", "-out", signature, message)
        key.write_text(openssl("x509", "-in", phone / "chain.pem", "-noout", "-pubkey").stdout)
        done = openssl("dgst", "-sha256", *pss, "-verify", key, "-signature", signature, message)
        assert done.stdout == "Verified OK\n"

    def test_a_client_can_sign_with_it(self, phone: Path) -> None:
        identity = load_identity(phone / "chain.pem", phone / "key.pem")
        assert json.loads(fl("show", phone / "chain.pem", "--json").stdout)[1]["fl_id"] == identity.fl_id

    def test_its_id_is_printed(self, maker: Path) -> None:
        said = fl("device", "tablet", "--ca", maker).stdout
        shown = json.loads(fl("show", maker / "devices/tablet/chain.pem", "--json").stdout)
        assert len(shown) == 4
        assert shown[1]["fl_id"] in said
        assert [each["subject"] for each in shown if "fl_id" in each] == ["CN=tablet"]

    def test_a_device_is_made_once(self, maker: Path, phone: Path) -> None:
        before = (phone / "key.pem").read_bytes()
        assert "is there already" in fl("device", "phone", "--ca", maker, code=1).stderr
        assert (phone / "key.pem").read_bytes() == before
        folder = AuthorityFolder(maker)
        known = folder.index()
        other = issue_device(folder.device_root(), folder.authority(), "phone", NOW)
        with pytest.raises(ConfigError, match="is there already"):
            folder.write_device(other, phone)
        assert folder.index() == known

    def test_revoked_by_its_chain(self, maker: Path) -> None:
        fl("device", "lost", "--ca", maker)
        chain = maker / "devices/lost/chain.pem"
        assert fl("verify", chain, "--ca", maker).stdout.count("ok ") == 8
        fl("revoke", chain, "--ca", maker)
        assert "CN=lost, serial" in fl("verify", chain, "--ca", maker, code=1).stdout

    def test_an_authority_of_nodes_makes_none(self, pki: Path) -> None:
        assert "--devices" in fl("device", "phone", "--ca", pki, code=1).stderr

    def test_the_root_key_may_be_away(self, tmp_path: Path) -> None:
        folder = tmp_path / "maker"
        fl("ca", folder, "--devices")
        (folder / "root.key").unlink()
        fl("device", "phone", "--ca", folder)


def test_a_file_is_not_written_over_by_who_comes_second(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write(path, b"one", files.PRIVATE)
    with pytest.raises(ConfigError, match="is there already"):
        files.write(path, b"two", files.PRIVATE)
    assert path.read_bytes() == b"one"
    files.write(path, b"three", files.PUBLIC, replace=True)
    assert path.read_bytes() == b"three"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


class TestShow:
    def test_pem_der_and_p12_are_the_same(self, node: Path, tmp_path: Path) -> None:
        der = tmp_path / "server.der"
        openssl("x509", "-in", node / "server.crt", "-outform", "DER", "-out", der)
        shown = [
            {name: value for name, value in each.items() if name != "file"}
            for path in (node / "server.crt", der, node / "server.p12")
            for each in json.loads(fl("show", path, "--json").stdout)
        ]
        assert shown[0] == shown[1] == shown[2]
        assert shown[0]["names"] == "10.0.0.5, fl.example.org"
        assert shown[0]["usage"] == "digitalSignature, serverAuth, clientAuth"
        assert shown[0]["remark"] == "823 days left"

    def test_a_list_in_both_forms(self, pki: Path, tmp_path: Path) -> None:
        der = tmp_path / "ca.crl.der"
        openssl("crl", "-in", pki / "ca.crl", "-outform", "DER", "-out", der)
        for path in (pki / "ca.crl", der):
            text = fl("show", path).stdout
            assert "revocation list of  CN=test CA" in text
            assert "nothing" in text

    def test_a_wrong_password_is_told(self, node: Path, tmp_path: Path) -> None:
        (node / "server-password").rename(tmp_path / "away")
        assert "wrong password" in fl("show", node / "server.p12", answer="no\n", code=1).stderr
        fl("show", node / "server.p12", "--password-file", tmp_path / "away")

    def test_other_files_are_told(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("hello")
        assert "neither certificates" in fl("show", file, code=1).stderr
        file.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        assert "damaged" in fl("show", file, code=1).stderr
        assert "No such file" in fl("show", tmp_path / "none", code=1).stderr


class TestVerify:
    """Each check fails once, and names its remedy; openssl agrees where it knows the question."""

    def failing(self, *words: str | Path) -> dict[str, str]:
        found = json.loads(fl("verify", *words, "--json", code=1).stdout)
        return {each["check"]: each["text"] + " -> " + each["remedy"] for each in found if not each["ok"]}

    def made(self, pki: Path, **how: object) -> Path:
        issuer = AuthorityFolder(pki).authority()
        certificate = issue(issuer, Role.SERVER, "n", NOW, **how).certificate  # type: ignore[arg-type]
        path = pki / "n.crt"
        path.write_bytes(certificate.public_bytes(Encoding.PEM))
        return path

    def test_a_good_one(self, pki: Path, node: Path) -> None:
        result = fl("verify", node / "server.p12", "--ca", pki, "--host", "10.0.0.5")
        assert [line.split()[1] for line in result.stdout.splitlines()] == [
            "dates:",
            "chain:",
            "key:",
            "usage:",
            "host:",
            "revocation:",
        ]

    def test_an_operator(self, pki: Path) -> None:
        fl("issue", "operator", "alice", "--ca", pki)
        crt = pki / "hosts/alice/operator.crt"
        fl("verify", crt, "--ca", pki)
        assert "serverAuth" in self.failing(crt, "--ca", pki, "--for", "node")["usage"]

    def test_expired_and_early(self, pki: Path) -> None:
        for dates, word in (
            (Validity(NOW - 9 * DAY, NOW - 2 * DAY), "expired"),
            (Validity(NOW + DAY, NOW + 2 * DAY), "not valid yet"),
        ):
            found = self.failing(self.made(pki, validity=dates), "--ca", pki)
            assert set(found) == {"dates", "chain"}
            assert word in found["dates"]
            assert "Verify Cert Time failed." in found["chain"]

    def test_another_authority(self, pki: Path, node: Path, maker: Path) -> None:
        found = self.failing(node / "server.crt", "--ca", maker / "root.crt")
        assert set(found) == {"chain"}
        assert "subject cn is not equal" in found["chain"]

    def test_a_weak_key(self, pki: Path) -> None:
        found = self.failing(self.made(pki, kind=KeyKind.RSA_2048), "--ca", pki)
        assert set(found) == {"key"}
        assert "RSA of 3072 bits" in found["key"]

    def test_a_wrong_usage(self, pki: Path) -> None:
        found = self.failing(self.made(pki, usages=[ExtendedKeyUsageOID.CLIENT_AUTH]), "--ca", pki)
        assert set(found) == {"usage"}
        assert "serverAuth" in found["usage"]

    def test_a_wrong_name(self, pki: Path, node: Path) -> None:
        found = self.failing(node / "server.crt", "--ca", pki, "--host", "10.0.0.9")
        assert set(found) == {"host"}
        assert "--host 10.0.0.9" in found["host"]

    def test_revoked(self, pki: Path, node: Path) -> None:
        fl("revoke", node / "server.crt", "--ca", pki)
        assert set(self.failing(node / "server.crt", "--ca", pki)) == {"revocation"}
        fl("verify", node / "server.crt", "--ca", pki / "ca.crt")  # nobody said where the list is

    def test_a_list_of_another_authority(self, pki: Path, node: Path, maker: Path) -> None:
        found = self.failing(node / "server.crt", "--ca", pki / "ca.crt", "--crl", maker / "ca.crl")
        assert set(found) == {"revocation"}

    def test_a_list_that_is_too_old(self, pki: Path, node: Path) -> None:
        folder = AuthorityFolder(pki)
        folder.renew_list(NOW - 30 * DAY, 2)
        assert "fl certs crl" in self.failing(node / "server.crt", "--ca", pki)["revocation"]
        fl("crl", "--ca", pki)
        fl("verify", node / "server.crt", "--ca", pki)


def test_no_password_is_an_argument() -> None:
    for name in ("ca", "issue", "device", "show", "verify", "list", "revoke", "crl"):
        text = fl(name, "--help").stdout
        assert "--password " not in text
        assert "Usage: fl certs" in text
