"""A real server behind a load balancer: PROXY headers by hand, and HAProxy itself, on plain TCP and with TLS.

Loopback has many addresses: the proxy is 127.0.0.1, devices and workers come from others.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from integration.cluster import Cluster, wait_until
from integration.test_daemons import make_p12

from fedcore.wire import codec
from fedcore.wire.messages import RequestFLJob, RequestPushMetrics, ResponseFLJob
from fedctl.processes import reserved_ports

PROXY, INSIDER, OUTSIDER = "127.0.0.1", "127.0.0.5", "127.0.0.6"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
JOB = codec.encode(RequestFLJob(fl_name="job", fl_id="one", data_size=10, timestamp="1"))
METRICS = b"".join(codec.encode_parts(RequestPushMetrics(0.5, 0.5)))


def v1(source: str) -> bytes:
    return f"PROXY TCP4 {source} 127.0.0.1 40000 6600\r\n".encode()


def v2(source: str) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton("127.0.0.1") + bytes.fromhex("9c4019c8")
    return SIGNATURE + b"\x21\x11\x00\x0c" + addresses


class Device:
    """Who asks a port, from one of loopback's addresses."""

    def __init__(
        self, port: int, source: str, header: bytes = b"", context: ssl.SSLContext | None = None
    ) -> None:
        raw = socket.create_connection(("127.0.0.1", port), 20.0, (source, 0))
        raw.sendall(header)
        self._http = http.client.HTTPConnection("localhost", port)
        self._http.sock = raw if context is None else context.wrap_socket(raw, server_hostname="localhost")

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        self._http.request("POST", path, body)
        answer = self._http.getresponse()
        return answer.status, answer.read()


@pytest.fixture(params=["tcp", "tls"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Cluster, ssl.SSLContext | None]]:
    """A server that serves workers over HTTP to one address, and has a proxy."""
    sections = {
        "node": {"worker_http": True, "allow": INSIDER},
        "device": {"proxies": PROXY, "header_timeout": 2.0},
    }
    with Cluster(tmp_path, fedcore=sections) as cluster:
        cluster.settings["server_mode"] = "HYBRID_TRAINING"
        context, options = None, ()
        if request.param == "tls":
            certificate = make_p12(tmp_path / "server.p12", b"secret")
            (tmp_path / "ca.crt").write_bytes(certificate.certificate_pem())
            (tmp_path / "password").write_text("secret\n")
            files = dict.fromkeys(("server_cert_path", "client_cert_path"), "server.p12")
            cluster.settings["enable_ssl"] = True
            cluster.settings["ssl"] = {
                **files,
                "ca_cert_path": "ca.crt",
                "cipher_list": "ECDHE-ECDSA-AES256-GCM-SHA384",
            }
            cluster.settings["fedcore"]["redis"] = {"tls": "off"}
            cluster.settings["fedcore"]["node"]["tls"] = False
            context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
            options = ("--server-password-file", "password")
        cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
        cluster.start_redis()
        cluster.start_server(*options)
        yield cluster, context


@pytest.mark.parametrize("header", [v1, v2])
def test_a_device_is_who_the_proxy_says(job: tuple[Cluster, ssl.SSLContext | None], header: object) -> None:
    cluster, context = job
    assert callable(header)
    with Device(cluster.http, PROXY, header(INSIDER), context) as device:
        status, body = device.ask("/startFLJob", JOB)
        assert (status, codec.decode(ResponseFLJob, body).retcode) == (200, 200)
        assert device.ask("/pushMetrics", METRICS)[0] == 200
    with Device(cluster.http, PROXY, header(OUTSIDER), context) as device:
        assert device.ask("/pushMetrics", METRICS)[0] == 404


@pytest.mark.parametrize("header", [v1, v2])
def test_nobody_else_can_say_who_he_is(job: tuple[Cluster, ssl.SSLContext | None], header: object) -> None:
    cluster, context = job
    assert callable(header)
    with Device(cluster.http, OUTSIDER, b"", context) as device:  # served, as himself
        assert device.ask("/startFLJob", JOB)[0] == 200
        assert device.ask("/pushMetrics", METRICS)[0] == 404
    with Device(cluster.http, INSIDER, b"", context) as device:
        assert device.ask("/pushMetrics", METRICS)[0] == 200
    with contextlib.suppress(OSError, http.client.HTTPException):
        with Device(cluster.http, OUTSIDER, header(INSIDER), context) as device:
            status, _ = device.ask("/pushMetrics", METRICS)
        assert status == 400
    assert cluster.metric('fl_requests_total{outcome="accepted",route="startFLJob"}') == 1


def test_a_proxy_that_sends_no_header_is_told_of(job: tuple[Cluster, ssl.SSLContext | None]) -> None:
    cluster, context = job
    with (
        pytest.raises((OSError, http.client.HTTPException)),
        Device(cluster.http, PROXY, b"", context) as device,
    ):
        device.ask("/startFLJob", JOB)
    text = "it does not begin with a PROXY header; HAProxy needs send-proxy"
    wait_until(lambda: text in cluster.log(), "a warning")
    with (
        socket.create_connection(("127.0.0.1", cluster.http), 20.0) as silent,
        pytest.raises(ConnectionResetError),
    ):
        silent.recv(1)  # cut after header_timeout
    assert cluster.ready()


# ---- HAProxy


@contextmanager
def haproxy(cluster: Cluster, send: str) -> Iterator[int]:
    """Run HAProxy before the server; give its port."""
    program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("there is no haproxy: apt-get install haproxy")
    with reserved_ports(2) as (port, stats):
        file = cluster.directory / "haproxy.cfg"
        file.write_text(
            "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
            f"frontend stats\n  mode http\n  bind 127.0.0.1:{stats}\n  stats enable\n  stats uri /\n"
            f"listen devices\n  bind 127.0.0.1:{port}\n"
            f"  server one 127.0.0.1:{cluster.http} {send} check inter 200ms fall 1 rise 2\n"
        )
        cluster.spawn("haproxy", program, "-db", "-f", str(file))
        wait_until(lambda: cluster.get_http(stats, "/"), "haproxy listens")
        yield port
        # It has looked several times whether the server lives, and found that it does.
        page = cluster.get_http(stats, "/;csv")
        assert page is not None
        line = next(line for line in page[1].decode().splitlines() if line.startswith("devices,one,"))
        assert ",UP," in line and ",L4OK," in line
        cluster.kill("haproxy")


@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2", "send-proxy-v2 check-send-proxy"])
def test_haproxy_passes_on_who_asks(job: tuple[Cluster, ssl.SSLContext | None], send: str) -> None:
    cluster, context = job
    with haproxy(cluster, send) as port:
        for source, expected in ((INSIDER, 200), (OUTSIDER, 404), (INSIDER, 200)):
            with Device(port, source, b"", context) as device:
                status, body = device.ask("/startFLJob", JOB)
                assert (status, codec.decode(ResponseFLJob, body).retcode) == (200, 200)
                assert device.ask("/pushMetrics", METRICS)[0] == expected
    assert "closed a connection of the proxy" not in cluster.log()
