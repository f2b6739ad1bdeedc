# ruff: noqa: E501 - one list of bad addresses
import pytest

from fedcore.config import (
    SCHEDULER_ADDRESS_FAULT,
    TCP_IP_FAULT,
    Address,
    UnixAddress,
    address_of_instance,
    parse_address,
    parse_host,
    parse_redis_address,
    port_of_instance,
)
from fedcore.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:6666", "127.0.0.1", 6666),
        ("0.0.0.0:1", "0.0.0.0", 1),
        ("255.1.1.0:65535", "255.1.1.0", 65535),
        ("localhost:80", "localhost", 80),
        ("node-1.fl.example:80", "node-1.fl.example", 80),
        ("redis_1:6379", "redis_1", 6379),
        ("3com.example:80", "3com.example", 80),
        ("[::1]:6666", "::1", 6666),
        ("[::]:6666", "::", 6666),
        ("[fe80::1%eth0]:6666", "fe80::1%eth0", 6666),
    ],
)
def test_good_addresses(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == Address(host, port)
    assert str(address) == text
    assert parse_redis_address(text) == address


BAD_ADDRESSES = [
    "", ":", "127.0.0.1", "127.0.0.1:", ":6666", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:+1",
    "127.0.0.1:1a", "127.0.0.1: 1", " 127.0.0.1:1", "127.0.0.1:1\n", "127.0.0.1:١", "127.0.0.1:000001",
    "256.0.0.1:1", "1.2.3:1", "1.2.3.4.5:1", "01.2.3.4:1", "::1:6666", "[::1]", "[::1:6666", "::1]:6666",
    "[127.0.0.1]:1", "[host]:1", "[]:1", "a..b:1", ".a:1", "-a:1", "a-:1", "a b:1", "a/b:1", "http://a:1", "a" * 64 + ":1",
    "é:1", "{}:1", "1" * 5000 + ":1", "1:" + "1" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_ADDRESSES)
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    assert str(caught.value) == f"The format of http server address '{text}' is invalid"
    with pytest.raises(ConfigError) as caught:
        parse_address(text, SCHEDULER_ADDRESS_FAULT)
    assert str(caught.value) == f"Failed to start scheduler http server, invalid server address: {text}"


@pytest.mark.parametrize("text", ["10.0.0.1", "0.0.0.0", "::1", "localhost", "node-1.example"])
def test_good_hosts(text: str) -> None:
    assert parse_host(text) == text


def test_a_host_in_brackets_loses_them() -> None:
    assert parse_host("[::1]") == "::1"


@pytest.mark.parametrize(
    "text", ["", "10.0.0", "10.0.0.256", "10.0.0.1:80", "[10.0.0.1]", "a b", "[::1", "::g"]
)
def test_bad_hosts(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_host(text, TCP_IP_FAULT)
    assert str(caught.value) == f"The tcp server ip:{text} is illegal!"


def test_redis_by_path() -> None:
    address = parse_redis_address("unix:/run/redis/redis.sock")
    assert address == UnixAddress("/run/redis/redis.sock")
    assert str(address) == "unix:/run/redis/redis.sock"


@pytest.mark.parametrize("text", ["unix:", "unix:redis.sock", "/run/redis.sock", "redis"])
def test_bad_redis_addresses(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_redis_address(text)
    assert str(caught.value) == f"The format of distributed cache address '{text}' is invalid"


def test_instances_take_consecutive_ports() -> None:
    base = Address("::1", 6666)
    assert address_of_instance(base, 0) == base
    assert address_of_instance(base, 3) == Address("::1", 6669)
    assert port_of_instance(65000, 535) == 65535


@pytest.mark.parametrize(("base", "n"), [(65000, 536), (6666, -1)])
def test_instances_without_a_port(base: int, n: int) -> None:
    with pytest.raises(ConfigError, match=rf"Instance {n} cannot listen on port {base} \+ {n}"):
        address_of_instance(Address("h", base), n)
