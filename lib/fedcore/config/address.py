"""Network addresses as operators write them: `host:port`, `[IPv6]:port`, `unix:/path`.

MindSpore Federated 0.1 takes only dotted IPv4 whose outer octets are 1..254; host names, IPv6 and wildcard
addresses such as 0.0.0.0 are good here as well. Nothing is resolved: a host is checked for its form alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from fedcore.errors import ConfigError

# The protocol's texts; the braces receive what the operator wrote.
HTTP_ADDRESS_FAULT = "The format of http server address '{}' is invalid"
TCP_IP_FAULT = "The tcp server ip:{} is illegal!"
SCHEDULER_ADDRESS_FAULT = "Failed to start scheduler http server, invalid server address: {}"
REDIS_ADDRESS_FAULT = "The format of distributed cache address '{}' is invalid"  # ours

_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_PORT = re.compile(r"[0-9]{1,5}")
_UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP endpoint.

    Attributes:
        host: IPv4, IPv6 (without brackets) or host name.
        port: 1..65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the file system.

    Attributes:
        path: absolute path of the socket.
    """

    path: str

    def __str__(self) -> str:
        return _UNIX + self.path


def parse_host(text: str, fault: str = TCP_IP_FAULT) -> str:
    """Check the form of an IPv4 or IPv6 address (with or without brackets) or of a host name.

    Args:
        text: what the operator wrote, without a port.
        fault: message of the error; its braces receive text.

    Returns:
        The host, without brackets.

    Raises:
        ConfigError: text is none of the three.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    good = _is_ipv6(bare) or (bare is text and (_is_ipv4(bare) or _is_name(bare)))
    if not good:
        raise ConfigError(fault.format(text))
    return bare


def parse_address(text: str, fault: str = HTTP_ADDRESS_FAULT) -> Address:
    """Read `host:port`; an IPv6 host stands in brackets.

    Args:
        text: what the operator wrote.
        fault: message of the error; its braces receive text. Each caller brings the text that its peers
            know: HTTP_ADDRESS_FAULT, SCHEDULER_ADDRESS_FAULT or its own.

    Raises:
        ConfigError: text has another form, or its port is outside 1..65535.
    """
    host, colon, port = text.rpartition(":")
    bare_ipv6 = ":" in host and not host.startswith("[")
    if not colon or bare_ipv6 or not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise ConfigError(fault.format(text))
    try:
        return Address(parse_host(host), int(port))
    except ConfigError:
        raise ConfigError(fault.format(text)) from None


def parse_redis_address(text: str, fault: str = REDIS_ADDRESS_FAULT) -> Address | UnixAddress:
    """Read `host:port` or `unix:/path`.

    Raises:
        ConfigError: text is neither.
    """
    if not text.startswith(_UNIX):
        return parse_address(text, fault)
    path = text.removeprefix(_UNIX)
    if not path.startswith("/"):
        raise ConfigError(fault.format(text))
    return UnixAddress(path)


def parse_addresses(text: str, fault: str = REDIS_ADDRESS_FAULT) -> tuple[Address, ...]:
    """Read `host:port,host:port`, at least one; blanks around the commas do not matter.

    Raises:
        ConfigError: a part is no address; the message names that part.
    """
    return tuple(parse_address(part.strip(), fault) for part in text.split(","))


def port_of_instance(base: int, n: int) -> int:
    """Port of instance n of a daemon: base + n.

    Raises:
        ConfigError: n is negative or the port is above 65535.
    """
    port = base + n
    if n < 0 or not 1 <= port <= 65535:
        raise ConfigError(f"Instance {n} cannot listen on port {base} + {n}: ports are 1..65535")
    return port


def address_of_instance(address: Address, n: int) -> Address:
    """Address of instance n of a daemon: the base address with its port raised by n.

    Raises:
        ConfigError: n is negative or the port is above 65535.
    """
    return Address(address.host, port_of_instance(address.port, n))


def _is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except AddressValueError:
        return False
    return True


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except AddressValueError:
        return False
    return True


def _is_name(text: str) -> bool:
    labels = text.split(".")
    # A last label of digits only is a mistyped IPv4 address, never a name.
    return len(text) <= 253 and not labels[-1].isdigit() and all(_LABEL.fullmatch(label) for label in labels)
