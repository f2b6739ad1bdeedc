"""Servers, scheduler and worker under mutual TLS: they go on while certificates are exchanged and revoked."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from integration.cluster import Cluster, wait_until
from integration.faults import Fleet, Run, fleet_of
from integration.schedule import node_links_of
from integration.test_worker import Works
from integration.tls_files import Pki, now

from fedcore.pki.authority import make_authority

TWO_HOSTS = {0: 0, 1: 1}
PLACES = 6


@contextmanager
def encrypted(directory: Path, *, start: bool = True, **settings: object) -> Iterator[tuple[Fleet, Pki]]:
    """Prepare two servers on two hosts with mutual TLS."""
    pki = Pki(directory / "pki")
    with fleet_of(directory, TWO_HOSTS, places=PLACES, start=False, node_links=True, **settings) as fleet:
        for n, host in fleet.hosts.items():
            pki.node(fleet.cluster.name(n), host.address)
        pki.node("all", "127.0.0.1")
        pki.encrypt(fleet.cluster, fleet.hosts)
        if start:
            fleet.start_all(env=pki.environment)
        yield fleet, pki


def start_scheduler(cluster: Cluster, pki: Pki) -> None:
    cluster.spawn(
        "scheduler",
        *cluster.command("schedulerd"),
        "--yaml-config",
        str(cluster.yaml),
        env=pki.environment,
    )
    cluster.wait_listening(cluster.scheduler_admin, "scheduler")


def reload(cluster: Cluster, *names: str) -> None:
    """Have daemons read their files again, and wait until they have."""
    before = {name: cluster.log(name).count("reloaded") for name in names}
    for name in names:
        cluster.processes[name].send_signal(signal.SIGHUP)
    for name in names:
        wait_until(lambda name=name: cluster.log(name).count("reloaded") > before[name], f"{name} reloads")


def ends(cluster: Cluster, admin: int) -> dict[str, float]:
    """Return the ends of the certificates in use that a daemon tells, by file."""
    answer = cluster.get_http(admin, "/metrics")
    assert answer is not None
    rows = [row for row in answer[1].decode().splitlines() if row.startswith("fl_certificate_expiry")]
    return {row.split('file="')[1].split('"')[0]: float(row.rpartition(" ")[2]) for row in rows}


def in_mid_iteration(run: Run) -> None:
    """Wait until every client of an iteration has its place and none has uploaded."""
    run.turnstile.hold(after=0)
    wait_until(lambda: run.faults or run.turnstile.waiting >= PLACES, "an iteration has begun")


def test_they_train_and_rotate_even_the_authority_without_a_failed_request(tmp_path: Path) -> None:
    """As operators are told to: trust the new authority as well, renew all certificates, drop the old authority."""
    with encrypted(tmp_path) as (fleet, pki):
        cluster, unanswered = fleet.cluster, []
        fleet.told = lambda n, answered: None if answered else unanswered.append(n)
        start_scheduler(cluster, pki)
        daemons = (*map(cluster.name, fleet.hosts), "scheduler")
        old = pki.authority, pki.crl.read_bytes()
        new = make_authority("second CA", now())
        cluster.tls.load_verify_locations(cadata=new.certificate_pem().decode())

        def trust_both() -> None:
            pki.ca.write_bytes(old[0].certificate_pem() + new.certificate_pem())
            pki.authority = new
            pki.revoke([])
            pki.crl.write_bytes(old[1] + pki.crl.read_bytes())

        def renew_all() -> None:
            for n, host in fleet.hosts.items():
                pki.node(cluster.name(n), host.address)
            pki.node("all", "127.0.0.1")

        def drop_the_old() -> None:
            pki.ca.write_bytes(new.certificate_pem())
            pki.revoke([])

        shown = [ends(cluster, cluster.admin)]
        with Run(fleet, clients=PLACES + 2) as run:
            run.wait_for_iterations(2, 20)
            for change in (trust_both, renew_all, drop_the_old):
                in_mid_iteration(run)
                change()
                reload(cluster, *daemons)
                node_links_of(fleet).cut(1)  # so that the servers connect anew
                node_links_of(fleet).restore(1)
                run.turnstile.open()
                run.wait_for_iterations(2, 20)
                assert cluster.operate("state")[1]["cluster_state"] == "CLUSTER_READY"
                shown.append(ends(cluster, cluster.admin))
        assert run.judge(quorum=PLACES).members
        assert not unanswered
        assert {Path(file).name for file in shown[0]} == {"server.p12", "client.p12", "ca.crt"}
        assert shown[0] != shown[2]
        for n in fleet.hosts:  # both dial each other; nothing went plain, nothing was refused
            assert "is refused" not in fleet.log(n) and "without a good handshake" not in fleet.log(n)


def test_a_revoked_server_is_cut_off_at_once(tmp_path: Path) -> None:
    """Its standing connections end with the SIGHUP, it gets no new ones; a list that is new needs no SIGHUP."""
    with encrypted(tmp_path) as (fleet, pki), Run(fleet) as run:
        cluster, revoked = fleet.cluster, pki.issued[fleet.cluster.name(1)]
        run.start_all(range(PLACES))
        run.upload(range(PLACES))
        run.see_everywhere(1)  # they have talked
        pki.revoke(revoked)
        reload(cluster, cluster.name(0))
        assert '"its certificate is revoked"' in fleet.log(0)
        run.start_all(range(PLACES))
        run.upload(
            range(PLACES), server=1
        )  # server 0 is to learn the model, or to add up the sums, of server 1
        text = "the certificate of a node is refused: it is revoked"
        wait_until(lambda: text in fleet.log(0) or "it is revoked" in fleet.log(0), text)


def test_bad_new_files_change_nothing_and_are_told(tmp_path: Path) -> None:
    with encrypted(tmp_path) as (fleet, pki), Run(fleet) as run:
        cluster = fleet.cluster
        run.start_all(range(PLACES))
        good = pki.ca.read_bytes()
        pki.ca.write_bytes(make_authority("nobody's CA", now()).certificate_pem())
        for n in fleet.hosts:
            cluster.processes[cluster.name(n)].send_signal(signal.SIGHUP)
        for n in fleet.hosts:
            wait_until(lambda n=n: "not reloaded" in fleet.log(n), "the bad file is told")
            assert "root CA cert subject cn is not equal with equip CA cert issuer cn." in fleet.log(n)
        pki.crl.write_bytes(b"no list")
        run.upload(range(PLACES))
        run.see_everywhere(1)
        assert any("stay as they were" in fleet.log(n) for n in fleet.hosts)
        pki.ca.write_bytes(good)


def test_a_worker_pulls_and_pushes(tmp_path: Path) -> None:
    with encrypted(tmp_path, start=False) as (fleet, pki):
        fleet.cluster.settings["server_mode"] = "HYBRID_TRAINING"
        fleet.start_all(env=pki.environment)
        fleet.cluster.own[100] = {"ssl": pki.section("all")}
        with ExitStack() as stack, Run(fleet) as run:
            works = Works(fleet, run, stack)
            client = str(tmp_path / "pki" / "credentials" / "client-password")
            works.start(0, "--client-password-file", client)
            run.start_all(range(PLACES))
            run.upload(range(PLACES))
            wait_until(lambda: works.count("done") == 1, "the worker's push counts")
            assert ends(fleet.cluster, works.admin[0]).keys() == {
                str(tmp_path / "pki" / "all" / "client.p12"),
                str(pki.ca),
            }
