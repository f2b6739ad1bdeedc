"""How bytes travel, against a real HTTP server on loopback."""

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from scripted_server import ScriptedServer

from fedclient import transport
from fedclient.transport import HttpTransport, MemoryTransport, Server
from fedcore.errors import ConfigError
from fedcore.pki.authority import Issued, KeyKind, certify, lasting, make_key


def echo(path, headers, body):
    return 200, {}, path.encode() + b" " + body


@pytest.fixture
def server():
    with ScriptedServer(echo) as running:
        yield running


@pytest.fixture
def connect():
    """Make transports that are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(*args, **options):
            return stack.enter_context(contextlib.closing(HttpTransport(*args, **options)))

        yield make


@pytest.fixture
def dead_port():
    """A port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_request_and_its_reply(connect, server):
    seen = []

    def answer(path, headers, body):
        seen.append((path, dict(headers), body))
        return 299, {}, b"reply"

    with ScriptedServer(answer) as other:
        assert connect(other.url).post("startFLJob", b"body") == (299, b"reply")
    ((path, headers, body),) = seen
    assert (path, body) == ("/startFLJob", b"body")
    assert headers["Content-Length"] == "4"
    assert headers["Content-Type"] == "application/octet-stream"
    assert "Transfer-Encoding" not in headers


def test_the_connection_is_kept(connect, server):
    transport = connect(server.url)
    for _ in range(3):
        transport.post("getModel", b"x")
    assert server.connections == 1


def test_a_kept_connection_that_was_closed_is_opened_again(connect, server):
    transport = connect(server.url)
    transport.post("getModel", b"x")
    server.drop_connections()
    assert transport.post("getModel", b"y") == (200, b"/getModel y")
    assert server.connections == 2


def test_a_large_body_arrives_whole(connect, server):
    body = bytes(range(256)) * 20_000
    assert connect(server.url).post("updateModel", body) == (200, b"/updateModel " + body)


@pytest.mark.parametrize(
    ("url", "prefix"),
    [("", ""), ("/", ""), ("/fl", "/fl"), ("/fl/", "/fl"), ("/a/b/", "/a/b")],
)
def test_the_prefix_stands_before_the_round(connect, server, url, prefix):
    transport = connect(server.url + url)
    assert transport.post("getModel", b"x") == (200, f"{prefix}/getModel x".encode())


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("http://host", Server(False, "host", 80, "")),
        ("https://host", Server(True, "host", 443, "")),
        ("http://10.0.0.1:6666/x/", Server(False, "10.0.0.1", 6666, "/x")),
        ("https://[::1]:7", Server(True, "::1", 7, "")),
    ],
)
def test_urls(url, server):
    assert Server.at(url) == server
    assert Server.at(str(server)) == server


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:80",
        "ftp://host",
        "http://",
        "http://host:x",
        "http://h:99999",
        "http://u:p@h",
        "http://h/?q",
        "http://[",
    ],
)
def test_urls_that_cannot_be_used(url):
    with pytest.raises(ConfigError):
        HttpTransport(url)


def test_without_a_server_there_is_no_transport():
    with pytest.raises(ConfigError):
        HttpTransport([])


def test_an_io_error_changes_the_server(connect, server, dead_port):
    transport = connect([f"http://127.0.0.1:{dead_port}", server.url])
    with pytest.raises(OSError, match=f"127.0.0.1:{dead_port}"):
        transport.post("getModel", b"x")
    assert transport.post("getModel", b"x")[0] == 200
    assert transport.post("getModel", b"x")[0] == 200, "it stays with the one that answers"


def test_the_server_may_change_at_every_request(connect):
    with ScriptedServer(lambda *_: (200, {}, b"1")) as one, ScriptedServer(lambda *_: (200, {}, b"2")) as two:
        transport = connect([one.url, two.url], rotate=True, first=3)
        assert [transport.post("getModel", b"x")[1] for _ in range(4)] == [b"2", b"1", b"2", b"1"]
        assert (one.connections, two.connections) == (1, 1)


@pytest.mark.parametrize(
    "reply",
    [
        None,
        (200, {"Content-Length": "100"}, b"short"),
        (200, {"Content-Length": "11"}, b"12345678901"),
        (200, {"Content-Length": None, "Connection": "close"}, b"12345678901"),
        (200, {"Content-Length": None, "Transfer-Encoding": "chunked"}, b"b\r\n12345678901\r\n0\r\n\r\n"),
        (200, {"Content-Length": None, "Transfer-Encoding": "chunked"}, b"5\r\n12"),
        (200, {"Content-Length": None, "Transfer-Encoding": "chunked"}, b"junk\r\n"),
    ],
)
def test_replies_that_are_not_whole_or_too_long_are_io_errors(connect, reply):
    with ScriptedServer(
        lambda *_: reply and (reply[0], reply[1] | {"Connection": "close"}, reply[2])
    ) as server:
        transport = connect(server.url, max_reply=10)
        with pytest.raises(OSError):
            transport.post("getModel", b"x")


@pytest.mark.parametrize(
    "reply",
    [
        (200, {"Content-Length": None, "Connection": "close"}, b"1234567890"),
        (200, {"Content-Length": None, "Transfer-Encoding": "chunked"}, b"a\r\n1234567890\r\n0\r\n\r\n"),
        (500, {}, b"{}"),
        (200, {}, b""),
    ],
)
def test_whole_replies_up_to_the_limit(connect, reply):
    with ScriptedServer(lambda *_: reply) as server:
        status, body = connect(server.url, max_reply=10).post("getModel", b"x")
        assert status == reply[0]
        assert body in (b"1234567890", b"{}", b"")


def test_a_server_that_is_not_http_is_an_io_error(connect):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport = connect(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def answer():
            with listener.accept()[0] as connection:
                connection.sendall(b"220 ready\r\n")
                connection.recv(1 << 16)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError):
            transport.post("getModel", b"x")
        thread.join()


def test_an_answer_before_the_end_of_the_upload_is_read(connect):
    """A server may refuse by the head of a request and listen no more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport = connect(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def refuse():
            connection = listener.accept()[0]
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
            connection.close()

        thread = threading.Thread(target=refuse)
        thread.start()
        assert transport.post("updateModel", bytes(1 << 25)) == (413, b"no")
        transport.close()
        thread.join()


def test_a_silent_server_is_an_io_error(connect):
    with ScriptedServer(lambda *_: (ScriptedServer.hang, {}, b"")) as server:
        transport = connect(server.url, timeout=0.01)
        with pytest.raises(OSError, match="timed out"):
            transport.post("getModel", b"x")


def closed_while_waiting(server, transport):
    """Close a transport from another thread while it waits for a reply; return what post raised."""
    raised = []

    def post():
        try:
            transport.post("getModel", b"x")
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=post)
    thread.start()
    assert server.asked.wait(10)
    transport.close()
    thread.join(10)
    assert not thread.is_alive()
    return raised


def test_close_wakes_a_waiting_request_for_good(connect):
    with ScriptedServer(lambda *_: (ScriptedServer.hang, {}, b"")) as server:
        transport = connect([server.url])
        assert len(closed_while_waiting(server, transport)) == 1
        with pytest.raises(OSError, match="closed"):
            transport.post("getModel", b"x")
        assert server.connections == 1


def test_close_wakes_a_connection_attempt(connect):
    """A full backlog leaves the next connection attempt without an answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        transport = connect(f"http://{address[0]}:{address[1]}")
        connection = transport._connections[0]
        watching = threading.Event()
        watch = connection._watch
        connection._watch = lambda sock: (watch(sock), watching.set())
        raised = []

        def post():
            try:
                transport.post("getModel", b"x")
            except OSError as error:
                raised.append(error)

        thread = threading.Thread(target=post)
        thread.start()
        assert watching.wait(10)
        transport.close()
        thread.join(10)
        assert not thread.is_alive()
        assert raised
        for filler in fillers:
            filler.close()


# ---- HTTPS


def certificate(directory, address):
    """Make a self-signed certificate of an IP address; return the file of certificate and key."""
    now = datetime.datetime.now(datetime.UTC)
    key = make_key(KeyKind.EC_P256)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    extensions = [(names, False), (x509.BasicConstraints(ca=True, path_length=None), True)]
    made = Issued(key, certify(name, key, None, lasting(now, 2), extensions))
    file = directory / f"{address}.pem"
    file.write_bytes(made.certificate_pem() + made.key_pem())
    return file


def secure(file):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    return context


@pytest.fixture(scope="module")
def good_file(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("tls"), "127.0.0.1")


def test_https_with_the_right_authority(connect, good_file):
    with ScriptedServer(echo, secure(good_file)) as server:
        transport = connect(server.url, ca_file=str(good_file))
        assert transport.post("getModel", b"x") == (200, b"/getModel x")
        assert transport.post("getModel", b"y") == (200, b"/getModel y")
        assert server.connections == 1
        server.drop_connections()
        assert transport.post("getModel", b"z") == (200, b"/getModel z")


def test_an_unknown_authority_is_refused(connect, good_file):
    with (
        ScriptedServer(echo, secure(good_file)) as server,
        pytest.raises(OSError, match="CERTIFICATE_VERIFY"),
    ):
        connect(server.url).post("getModel", b"x")


def test_a_certificate_of_another_host_is_refused(connect, tmp_path):
    other = certificate(tmp_path, "127.0.0.2")
    with ScriptedServer(echo, secure(other)) as server, pytest.raises(OSError, match="CERTIFICATE_VERIFY"):
        connect(server.url, ca_file=str(other)).post("getModel", b"x")


def test_close_wakes_a_waiting_https_request(connect, good_file):
    with ScriptedServer(lambda *_: (ScriptedServer.hang, {}, b""), secure(good_file)) as server:
        assert closed_while_waiting(server, connect(server.url, ca_file=str(good_file)))


def test_plain_http_towards_an_https_server_is_an_io_error(connect, good_file):
    with ScriptedServer(echo, secure(good_file)) as server, pytest.raises(OSError):
        connect(server.url.replace("https", "http")).post("getModel", b"x")


@pytest.mark.parametrize("name", ["missing.pem", "empty.pem"])
def test_a_ca_file_must_be_one(tmp_path, name):
    (tmp_path / "empty.pem").write_text("")
    with pytest.raises(ConfigError, match=name):
        HttpTransport("https://host", ca_file=str(tmp_path / name))


def test_a_ca_file_without_https_is_a_mistake(good_file):
    with pytest.raises(ConfigError, match="https"):
        HttpTransport("http://host", ca_file=str(good_file))


def test_a_memory_transport_calls():
    transport = MemoryTransport(lambda round_, body: (201, round_.encode() + body))
    assert transport.post("getModel", b"!") == (201, b"getModel!")
    transport.close()


@pytest.mark.parametrize("error", [ConnectionResetError, BrokenPipeError])
def test_a_connection_that_is_reset_before_it_stands_is_a_failure_like_any_other(monkeypatch, error):
    def reset(*_):
        raise error("the server was killed")

    monkeypatch.setattr(transport._Connection, "_reach", reset)
    client = HttpTransport("http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match="the server was killed"):
        client.post("getModel", b"?")
    client.close()
