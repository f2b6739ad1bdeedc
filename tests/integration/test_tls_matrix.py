"""Who gets in: every listener, and every client of ours, against good certificates and bad ones of every kind.

The clients of listeners are ``openssl s_client`` and curl, the listeners for our clients Python's own TLS: none of them
shares code with ours.
"""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.x509.oid import ExtendedKeyUsageOID
from integration.cluster import Cluster, wait_until
from integration.redis_fixture import ReactorThread
from integration.tls_files import EXPIRED, LOCAL, NOT_YET, Pki, now

from fedclient.transport import HttpTransport
from fedcore.errors import PeerError
from fedcore.net import tls
from fedcore.net.node_client import NodeClient
from fedcore.net.node_listener import FOREIGN_CERTIFICATE
from fedcore.pki.authority import Issued, KeyKind, Role, issue, make_authority
from fedcore.wire.node import Command, Frame, Meta, PayloadKind, encode

SENDER = f"{LOCAL}:7::2026-01-01-00:00:00.000.000::12345"
DEADLINE_S = 20.0
VERSIONS = pytest.mark.parametrize("version", ["1.2", "1.3"])
KINDS = (
    "good",
    "expired",
    "not yet valid",
    "wrong authority",
    "forged authority",
    "wrong name",
    "revoked",
    "weak key",
    "wrong use",
)
SERVED, REFUSED, FOREIGN = "served", "refused", "served, but not as who it says it is"
# What becomes of a client. Names of devices and operators are not looked at; operators are asked for a certificate and
# may have none.
OUTCOMES: dict[str, dict[str, str]] = {
    "node": dict.fromkeys(KINDS, REFUSED) | {"good": SERVED, "wrong name": FOREIGN, "none": REFUSED},
    "device": dict.fromkeys(KINDS, REFUSED) | {"good": SERVED, "wrong name": SERVED, "none": REFUSED},
    "operator": dict.fromkeys(KINDS, REFUSED) | {"good": SERVED, "wrong name": SERVED, "none": SERVED},
}
CASES = [(listener, kind) for listener, outcomes in OUTCOMES.items() for kind in outcomes]
NAMES = [f"{listener}, {kind}" for listener, kind in CASES]


@dataclass(frozen=True)
class Pair:
    """PEM files of a certificate and its key."""

    certificate: Path
    key: Path


class Shown:
    """One certificate of each kind, for one use."""

    def __init__(self, pki: Pki, folder: Path, wrong_use: Any) -> None:
        self._folder = folder
        folder.mkdir()
        stranger = make_authority("somebody's CA", now())
        forged = make_authority("test CA", now())
        made = {
            "good": pki.issue("peer", LOCAL),
            "expired": pki.issue("peer", LOCAL, validity=EXPIRED),
            "not yet valid": pki.issue("peer", LOCAL, validity=NOT_YET),
            "wrong authority": issue(stranger, Role.CLIENT, "peer", now(), hosts=[LOCAL]),
            "forged authority": issue(forged, Role.CLIENT, "peer", now(), hosts=[LOCAL]),
            "wrong name": pki.issue("peer", "10.9.9.9", "elsewhere.example"),
            "revoked": pki.issue("peer", LOCAL),
            "weak key": pki.issue("peer", LOCAL, kind=KeyKind.RSA_2048),
            "wrong use": pki.issue("peer", LOCAL, usages=[wrong_use]),
        }
        assert made.keys() == set(KINDS)
        self.revoked = made["revoked"]
        self.pairs = {kind: self.write(kind, one) for kind, one in made.items()}

    def write(self, kind: str, one: Issued) -> Pair:
        pair = Pair(self._folder / f"{kind}.crt", self._folder / f"{kind}.key")
        pair.certificate.write_bytes(one.certificate_pem())
        pair.key.write_bytes(one.key_pem())
        return pair


@dataclass(frozen=True)
class Site:
    """Daemons with all three listeners.

    Attributes:
        ports: listener -> its port at 127.0.0.1.
    """

    cluster: Cluster
    pki: Pki
    ports: dict[str, int]


@contextmanager
def daemons(folder: Path, pki: Pki) -> Iterator[Site]:
    """Start a server that requires certificates and a scheduler that asks for them."""
    sections = {
        "device": {"client_certificates": "required"},
        "scheduler": {"client_certificates": "asked"},
    }
    with Cluster(folder, fedcore=sections) as cluster:
        pki.node("all", LOCAL)
        pki.encrypt(cluster)
        cluster.start_redis()
        cluster.start_server(env=pki.environment)
        command = (*cluster.command("schedulerd"), "--yaml-config", str(cluster.yaml))
        cluster.spawn("scheduler", *command, env=pki.environment)
        cluster.wait_listening(cluster.scheduler_admin, "scheduler")
        ports = {"node": cluster.tcp, "device": cluster.http, "operator": cluster.manage}
        yield Site(cluster, pki, ports)


@dataclass(frozen=True)
class Matrix(Site):
    """Daemons, and what is shown to them and by others."""

    clients: Shown
    servers: Shown


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    folder = tmp_path_factory.mktemp("matrix")
    pki = Pki(folder / "pki")
    clients = Shown(pki, folder / "clients", ExtendedKeyUsageOID.SERVER_AUTH)
    servers = Shown(pki, folder / "servers", ExtendedKeyUsageOID.CLIENT_AUTH)
    pki.revoke([clients.revoked, servers.revoked])
    with daemons(folder, pki) as site:
        yield Matrix(site.cluster, site.pki, site.ports, clients, servers)


# ---- clients of listeners


def words_for(listener: str) -> bytes:
    """Return a request that any client of a listener may send."""
    if listener != "node":
        return b"GET /nowhere HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    meta = Meta(Command.SERVER_PING, 1, send_node=SENDER)
    return b"".join(bytes(part) for part in encode(Frame(PayloadKind.RAW, meta, b"")))


def outcome_of(listener: str, answer: bytes) -> str:
    """Return what a client has met with."""
    if not answer:
        return REFUSED
    if listener != "node":
        assert answer.startswith(b"HTTP/1.1 ")
        return SERVED
    if FOREIGN_CERTIFICATE.encode() in answer:
        return FOREIGN
    assert b"is not registered as a server of this job" in answer
    return SERVED


def talk(site: Site, listener: str, *options: str) -> bytes:
    """Send the listener's request with openssl s_client; return the first bytes of the answer, b"" without one."""
    process = subprocess.Popen(
        [
            *("openssl", "s_client", "-quiet", "-verify_return_error", "-CAfile", str(site.pki.ca)),
            *("-connect", f"{LOCAL}:{site.ports[listener]}", *options),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None and process.stdout is not None
    watch = threading.Timer(DEADLINE_S, process.kill)
    watch.start()
    try:
        process.stdin.write(words_for(listener))
        process.stdin.flush()
        return process.stdout.read1(1 << 16)
    except BrokenPipeError:
        return b""
    finally:
        watch.cancel()
        process.kill()
        process.communicate()


@VERSIONS
@pytest.mark.parametrize(("listener", "kind"), CASES, ids=NAMES)
def test_s_client(site: Matrix, listener: str, kind: str, version: str) -> None:
    pair = site.clients.pairs.get(kind)
    shown = () if pair is None else ("-cert", str(pair.certificate), "-key", str(pair.key))
    answer = talk(site, listener, f"-tls{version.replace('.', '_')}", *shown)
    assert outcome_of(listener, answer) == OUTCOMES[listener][kind]


@VERSIONS
@pytest.mark.parametrize(
    ("listener", "kind"),
    [case for case in CASES if case[0] != "node"],
    ids=[name for name in NAMES if not name.startswith("node")],
)
def test_curl(site: Matrix, listener: str, kind: str, version: str) -> None:
    pair = site.clients.pairs.get(kind)
    shown = () if pair is None else ("--cert", str(pair.certificate), "--key", str(pair.key))
    done = subprocess.run(
        [
            *("curl", "-s", "-i", "--max-time", str(DEADLINE_S), "--cacert", str(site.pki.ca), *shown),
            *(f"--tlsv{version}", "--tls-max", version, f"https://{LOCAL}:{site.ports[listener]}/nowhere"),
        ],
        check=False,
        capture_output=True,
        timeout=2 * DEADLINE_S,
    )
    assert (SERVED if done.returncode == 0 else REFUSED) == OUTCOMES[listener][kind], done
    assert (done.returncode == 0) == done.stdout.startswith(b"HTTP/1.1 ")


def test_the_reason_is_in_the_log(tmp_path: Path) -> None:
    """Anybody can show a bad certificate: one warning in ten seconds, the first at once."""
    pki = Pki(tmp_path / "pki")
    shown = Shown(pki, tmp_path / "clients", ExtendedKeyUsageOID.SERVER_AUTH)
    with daemons(tmp_path, pki) as site:
        for kind in ("expired", "weak key"):
            pair = shown.pairs[kind]
            talk(site, "node", "-cert", str(pair.certificate), "-key", str(pair.key))
        text = "the certificate of a node is refused: it has expired, or the clock is wrong"
        wait_until(lambda: text in site.cluster.log(), text)
        assert site.cluster.log().count("the certificate of a node is refused") == 1
        assert "closed the connection of a node without a good handshake: TLS failed: " in site.cluster.log()


@pytest.mark.parametrize("listener", ["node", "device", "operator"])
@pytest.mark.parametrize(
    "offer",
    [
        ("-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"),
        ("-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA:AES128-SHA:DHE-RSA-AES128-GCM-SHA256@SECLEVEL=0"),
        ("-tls1_3", "-ciphersuites", "TLS_AES_128_CCM_8_SHA256", "-cipher", "DEFAULT@SECLEVEL=0"),
    ],
    ids=["TLS 1.1", "no forward secrecy or no AEAD", "short tags"],
)
def test_weak_protocols_and_suites_are_refused(site: Matrix, listener: str, offer: tuple[str, ...]) -> None:
    good = site.clients.pairs["good"]
    assert talk(site, listener, *offer, "-cert", str(good.certificate), "-key", str(good.key)) == b""


@pytest.mark.parametrize("listener", ["node", "device", "operator"])
def test_no_session_is_resumed_and_none_renegotiated(site: Matrix, listener: str) -> None:
    good = site.clients.pairs["good"]
    command = ["openssl", "s_client", "-connect", f"{LOCAL}:{site.ports[listener]}", "-tls1_2"]
    command += ["-cert", str(good.certificate), "-key", str(good.key), "-CAfile", str(site.pki.ca)]
    again = subprocess.run(
        [*command, "-reconnect"], input=b"Q\n", check=False, capture_output=True, timeout=DEADLINE_S
    ).stdout
    assert again.count(b"New, TLSv1.2") >= 6 and b"Reused" not in again and b"session ticket" not in again
    asked = subprocess.run(command, input=b"R\nQ\n", check=False, capture_output=True, timeout=DEADLINE_S)
    assert b"RENEGOTIATING" in asked.stderr + asked.stdout
    assert b"no renegotiation" in asked.stderr + asked.stdout or asked.returncode != 0


# ---- our clients


@contextmanager
def listening(pair: Pair | None, ca: Path, version: str) -> Iterator[tuple[int, list[bytes]]]:
    """Listen with Python's TLS, plainly without a pair; give back whatever comes on the first connection."""
    context = None
    if pair is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        context.load_verify_locations(ca)
        wanted = ssl.TLSVersion.TLSv1_2 if version == "1.2" else ssl.TLSVersion.TLSv1_3
        context.minimum_version = context.maximum_version = wanted
        context.verify_mode = ssl.CERT_OPTIONAL
    received: list[bytes] = []
    with socket.create_server((LOCAL, 0)) as server:
        server.settimeout(DEADLINE_S)

        def serve() -> None:
            try:
                connection, _ = server.accept()
            except OSError:
                return  # nobody came
            connection.settimeout(DEADLINE_S)
            with connection:
                try:
                    peer: Any = connection
                    if context is not None:
                        peer = context.wrap_socket(connection, server_side=True)
                    data = peer.recv(1 << 16)
                    received.append(data)
                    http = data.startswith(b"POST ")
                    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" if http else data)
                    peer.recv(1)
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], received
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


REASONS = {
    "expired": "it has expired, or the clock is wrong",
    "not yet valid": "it is not valid yet, or the clock is wrong",
    "wrong authority": "no authority of ours has signed it",
    "forged authority": "",  # OpenSSL finds the name and then another key
    "wrong name": f"it is for 10.9.9.9, elsewhere.example, not for {LOCAL}",
    "revoked": "it is revoked",
    "weak key": "its key is too short",
    "wrong use": "it is for another use",
}


@pytest.fixture(scope="module")
def links(site: Matrix) -> tls.Links:
    section = {name: Path(path) for name, path in site.pki.section("all").items() if name != "cipher_list"}
    passwords = {
        "server_password": lambda: b"",
        "client_password": lambda: b"for the client's file",
    }
    sources = tls.Sources(
        **section,  # type: ignore[arg-type]
        cipher_list=site.pki.section("all")["cipher_list"],
        **passwords,  # type: ignore[arg-type]
        node=tls.NodeLinks(listens=False),
    )
    return tls.Links(tls.make(sources, now, lambda sentence: None), lambda: 0.0)


@VERSIONS
@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_our_node_client(
    site: Matrix, links: tls.Links, loop: ReactorThread, kind: str, version: str
) -> None:
    client = NodeClient(
        SENDER,
        jitter=lambda: 0.0,
        reactor=loop.reactor,
        encrypt=links.node_connecting,
    )
    loop.call(client.startService)
    try:
        with listening(site.servers.pairs.get(kind), site.pki.ca, version) as (port, received):
            work = client.request(f"{LOCAL}:{port}", "", Command.SERVER_PING, timeout=DEADLINE_S)
            if kind == "good":
                loop.run(work)
                assert SENDER.encode() in received[0]
            else:
                with pytest.raises(PeerError) as refusal:
                    loop.run(work)
                if kind == "none":
                    assert SENDER.encode() not in b"".join(received)
                    assert "TLS failed: " in str(refusal.value) or "There was no TLS" in str(refusal.value)
                else:
                    assert f"its certificate is refused: {REASONS[kind]}" in str(refusal.value)
                    assert received in ([], [b""])  # nothing was sent to it
            loop.call(client.stopService)
    finally:
        loop.call(client.stopService)


# The library for devices knows no revocation lists, and takes any key that Python's TLS takes.
OF_DEVICES = dict.fromkeys((*KINDS, "none"), REFUSED) | {
    "good": SERVED,
    "revoked": SERVED,
    "weak key": SERVED,
}


@VERSIONS
@pytest.mark.parametrize("kind", OF_DEVICES)
def test_the_library_for_devices(site: Matrix, kind: str, version: str) -> None:
    with listening(site.servers.pairs.get(kind), site.pki.ca, version) as (port, received):
        transport = HttpTransport([f"https://{LOCAL}:{port}"], timeout=5.0, ca_file=str(site.pki.ca))
        try:
            transport.post("startFLJob", b"")
            outcome = SERVED
        except OSError:
            outcome = REFUSED
        finally:
            transport.close()
    assert outcome == OF_DEVICES[kind]
    assert (outcome == SERVED) == any(data.startswith(b"POST ") for data in received)


# ---- certificates of our own


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("expired", "Verify Cert Time failed."),
        ("not yet valid", "Verify Cert Time failed."),
        ("wrong authority", "root CA cert subject cn is not equal with equip CA cert issuer cn."),
        ("forged authority", "Verify Singature failed."),
        ("weak key", "SSL use certificate chain file failed!"),
    ],
)
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_server_does_not_start_with_it(site: Matrix, side: str, kind: str, text: str) -> None:
    pki, folder = site.pki, site.pki.folder / f"{side} {kind}"
    pki.node(folder.name, LOCAL)
    pair = site.servers.pairs[kind]
    password = (pki.folder / "credentials" / f"{side}-password").read_text().strip()
    subprocess.run(
        [
            *("openssl", "pkcs12", "-export", "-in", str(pair.certificate), "-inkey", str(pair.key)),
            *("-out", str(folder / f"{side}.p12"), "-passout", "stdin"),
        ],
        input=password.encode(),
        check=True,
        timeout=DEADLINE_S,
    )
    path = folder / "fl.yaml"
    path.write_text(yaml.safe_dump(site.cluster.settings | {"ssl": pki.section(folder.name)}))
    done = subprocess.run(
        [*site.cluster.command("serverd"), "--yaml-config", str(path), "--check-config"],
        env=os.environ | pki.environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        cwd=site.cluster.directory,
    )
    assert (done.returncode, text in done.stderr) == (78, True), done.stderr


def test_a_revocation_needs_no_signal(site: Matrix) -> None:
    """The list is looked at before each handshake; a bad one leaves the list of before in force."""
    victim = site.pki.issue("victim", LOCAL)
    pair = site.clients.write("victim", victim)
    shown = ("-cert", str(pair.certificate), "-key", str(pair.key))
    assert outcome_of("node", talk(site, "node", *shown)) == SERVED
    before = site.pki.crl.read_bytes()
    try:
        site.pki.revoke([victim, site.clients.revoked, site.servers.revoked])
        for listener in ("node", "device", "operator"):
            assert talk(site, listener, *shown) == b""
        site.pki.crl.write_bytes(b"nonsense")
        assert talk(site, "node", *shown) == b""
        assert "stay as they were: Verify crl failed." in site.cluster.log()
    finally:
        site.pki.crl.write_bytes(before)
    wait_until(lambda: talk(site, "node", *shown), "the list of before is back")
