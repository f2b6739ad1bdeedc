"""Who may change a job: real schedulers on loopback and on all addresses, with tokens, certificates and neither."""

from __future__ import annotations

import http.client
import json
import ssl
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from integration.cluster import Cluster

from fedcore.net.tls import SUITES
from fedcore.pki.authority import Role, issue, make_authority
from fedcore.services import operator_access
from fedctl.__main__ import main

TOKEN = "0123456789abcdefABCDEF=="
CHANGES = ("newInstance", "enableFLS", "disableFLS")
NO_CLUSTER = (
    "Cannot find cluster info for job"  # the answer of whoever was let in: nobody has started the job
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as made:
        made.start_redis()
        yield made


def start(cluster: Cluster, address: str = "0.0.0.0", **scheduler: Any) -> None:
    cluster.settings["fedcore"]["scheduler"].update(scheduler, manage_address=f"{address}:{cluster.manage}")
    cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
    cluster.start_scheduler()


def ask(
    cluster: Cluster, path: str, context: ssl.SSLContext | None = None, **headers: str
) -> tuple[int, str, http.client.HTTPMessage]:
    """Return status, text and headers of an answer."""
    if context is None:
        connection = http.client.HTTPConnection("127.0.0.1", cluster.manage, timeout=15)
    else:
        connection = http.client.HTTPSConnection("127.0.0.1", cluster.manage, timeout=15, context=context)
    try:
        connection.request("POST", f"/{path}", b"{}", headers)
        answer = connection.getresponse()
        body = json.loads(answer.read())
        assert (answer.reason, body["code"]) == ("Client", "0" if answer.status == 200 else "1")
        return answer.status, body.get("error_message", ""), answer.headers
    finally:
        connection.close()


def token_file(tmp_path: Path, token: str = TOKEN) -> Path:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(token + "\n")
    return path


def denials(cluster: Cluster, reason: str) -> float:
    """Return how many requests the scheduler has denied."""
    _, page = cluster.get_http(cluster.scheduler_admin, "/metrics")
    for row in page.decode().splitlines():
        if row.startswith(f'fl_operator_denials_total{{reason="{reason}"}}'):
            return float(row.rpartition(" ")[2])
    return 0.0


def test_a_scheduler_on_all_addresses_changes_nothing_for_strangers(cluster: Cluster) -> None:
    start(cluster)
    for path in CHANGES:
        assert ask(cluster, path)[:2] == (403, operator_access.NO_ACCESS_SET)
        assert ask(cluster, path, Authorization=f"Bearer {TOKEN}")[0] == 403
    for path in ("state", "queryInstance"):
        assert ask(cluster, path)[:2] == (400, NO_CLUSTER)
    assert denials(cluster, "not_configured") == 6
    assert "no operator can change the job" in cluster.log("scheduler")


def test_the_switch_opens_it_as_the_original_is(cluster: Cluster) -> None:
    start(cluster, unauthenticated=True)
    for path in CHANGES:
        assert ask(cluster, path)[:2] in ((400, NO_CLUSTER), (400, f"New instance failed: {NO_CLUSTER}"))
    assert "can change the job" in cluster.log("scheduler")


def test_a_scheduler_on_a_loopback_address_is_open_to_its_host_but_to_no_browser(cluster: Cluster) -> None:
    start(cluster, "127.0.0.1")
    assert ask(cluster, "disableFLS")[:2] == (400, NO_CLUSTER)
    for header in ({"Origin": "https://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert ask(cluster, "disableFLS", **header)[:2] == (403, operator_access.FROM_A_BROWSER)


def test_a_token_opens_it_and_can_be_exchanged_while_it_runs(cluster: Cluster, tmp_path: Path) -> None:
    path = token_file(tmp_path)
    start(cluster, token_file=str(path))
    status, text, headers = ask(cluster, "disableFLS")
    assert (status, text) == (401, operator_access.NEEDS_OPERATOR)
    assert headers["WWW-Authenticate"] == 'Bearer realm="fl-schedulerd"'
    assert ask(cluster, "disableFLS", Authorization="Bearer wrong")[:2] == (401, operator_access.WRONG_TOKEN)
    assert ask(cluster, "disableFLS", Authorization=f"Bearer {TOKEN}")[:2] == (400, NO_CLUSTER)
    path.write_text(TOKEN[::-1] + "\n")
    assert ask(cluster, "disableFLS", Authorization=f"Bearer {TOKEN}")[0] == 401
    assert ask(cluster, "disableFLS", Authorization=f"Bearer {TOKEN[::-1]}")[0] == 400
    path.chmod(0o644)
    assert ask(cluster, "disableFLS", Authorization=f"Bearer {TOKEN}")[:2] == (
        500,
        operator_access.UNREADABLE_TOKEN,
    )
    assert "others can read the operator token" in cluster.log("scheduler")
    assert TOKEN not in cluster.log("scheduler")


@pytest.mark.parametrize(
    ("token", "mode", "reason"),
    [
        (TOKEN, 0o640, "others can read the operator token"),
        ("short", 0o600, "is not at least 16 visible ASCII characters"),
        ("", 0o600, "is empty"),
    ],
)
def test_a_token_that_is_no_secret_stops_the_start(
    cluster: Cluster, tmp_path: Path, token: str, mode: int, reason: str
) -> None:
    path = token_file(tmp_path, token)
    path.chmod(mode)
    cluster.settings["fedcore"]["scheduler"]["token_file"] = str(path)
    cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
    process = cluster.spawn(
        "scheduler", *cluster.command("schedulerd"), "--yaml-config", str(cluster.yaml), "--check-config"
    )
    assert process.wait(20) == 78
    assert reason in cluster.log("scheduler")


def test_the_credential_of_systemd_is_a_token(cluster: Cluster, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "operator-token").write_text(TOKEN)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    start(cluster)
    assert ask(cluster, "disableFLS")[0] == 401
    assert ask(cluster, "disableFLS", Authorization=f"Bearer {TOKEN}")[0] == 400


def test_fl_job_shows_the_token(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_server()
    path = token_file(tmp_path)
    start(cluster, "127.0.0.1", token_file=str(path))
    told = ("--scheduler", f"http://127.0.0.1:{cluster.manage}")
    run = CliRunner().invoke
    refused = run(main, ["job", "disable", *told, "--token-file", str(token_file(tmp_path / "..", "x" * 20))])
    assert refused.exit_code == 1
    assert operator_access.WRONG_TOKEN in refused.output
    done = run(main, ["job", "disable", *told, "--token-file", str(path)])
    assert (done.exit_code, done.output) == (0, "start disabling FL-Server successful.\n")
    done = run(main, ["job", "enable", "--yaml-config", str(cluster.yaml)])
    assert (done.exit_code, done.output) == (0, "start enabling FL-Server successful.\n")
    done = run(main, ["job", "new", '{"start_fl_job_threshold": 3}', *told, "--token-file", str(path)])
    assert (done.exit_code, done.output) == (0, "Start new instance successful.\n")
    path.chmod(0o604)
    careless = run(main, ["job", "enable", *told, "--token-file", str(path)])
    assert careless.exit_code == 1
    assert "chmod 600" in careless.output
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_an_operators_certificate_opens_it_and_a_nodes_does_not(cluster: Cluster, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = make_authority("CA", now)
    (tmp_path / "ca.crt").write_bytes(authority.certificate_pem())
    server = issue(authority, Role.SCHEDULER, "scheduler", now, hosts=["127.0.0.1"])
    (tmp_path / "server.p12").write_bytes(server.p12(b"secret"))
    (tmp_path / "password").write_text("secret")
    (tmp_path / "password").chmod(0o600)
    contexts: list[ssl.SSLContext] = []
    for role in (None, Role.OPERATOR, Role.CLIENT):
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
        if role is not None:
            one = issue(authority, role, role.value, now, hosts=["127.0.0.1"])
            (tmp_path / f"{role}.pem").write_bytes(one.certificate_pem() + one.key_pem())
            context.load_cert_chain(tmp_path / f"{role}.pem")
        contexts.append(context)
    cluster.settings["enable_ssl"] = True
    cluster.settings["ssl"] = {
        "server_cert_path": str(tmp_path / "server.p12"),
        "client_cert_path": str(tmp_path / "server.p12"),
        "ca_cert_path": str(tmp_path / "ca.crt"),
        "cipher_list": ":".join(SUITES),
    }
    cluster.settings["fedcore"]["redis"] = {"tls": "off"}
    cluster.settings["fedcore"]["scheduler"].update(
        manage_address=f"0.0.0.0:{cluster.manage}", client_certificates="asked"
    )
    cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
    cluster.start_scheduler("--server-password-file", str(tmp_path / "password"))
    stranger, operator, node = contexts
    assert ask(cluster, "state", stranger)[:2] == (400, NO_CLUSTER)
    assert ask(cluster, "disableFLS", stranger)[0] == 401
    assert ask(cluster, "disableFLS", node)[0] == 401
    assert ask(cluster, "disableFLS", operator)[:2] == (400, NO_CLUSTER)
    told = ["--scheduler", f"https://127.0.0.1:{cluster.manage}", "--ca-file", str(tmp_path / "ca.crt")]
    done = CliRunner().invoke(
        main, ["job", "disable", *told, "--certificate", str(tmp_path / "operator.pem")]
    )
    assert (done.exit_code, NO_CLUSTER in done.output) == (1, True)
