"""The cables between the hosts, and what can be done to them.

    controller (this process's namespace)  lab0 ---- p-controller \\
    host NAME (its own namespace)          host0 --- p-NAME -------- bridge br0, in a namespace of its own

No end of any cable is ever in the machine's own namespace. Faults belong to the network, not to the hosts: they
stay over a host's power cut until they are healed. Their list is in a file, so that every process of the lab
(the tests, a prompt beside them) sees the same.

TCP packets are no larger than on a wire (``gso_max_segs``), so that losing one in a hundred means just that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Address
from itertools import product
from pathlib import Path

from lab.commands import call, wait_until
from lab.errors import LabError
from lab.inventory import CONTROLLER, NETWORK_BITS

NAMESPACES = Path("/run/netns")
BRIDGE = "bridge"  # the namespace
CONTROLLER_LINK = "lab0"
HOST_LINK = "host0"


@dataclass(frozen=True)
class Slowness:
    """What one host's slow cable does to each frame, in each direction.

    Attributes:
        delay_ms: milliseconds that every frame takes.
        jitter_ms: up to so many more, evenly spread; frames stay in order.
        loss_percent: how many of a hundred frames vanish.
    """

    delay_ms: float
    jitter_ms: float = 0.0
    loss_percent: float = 0.0


@dataclass
class Faults:
    """What is wrong with the network now."""

    parted: list[tuple[str, str]] = field(default_factory=list)
    lossy: dict[str, float] = field(default_factory=dict)
    slow: dict[str, Slowness] = field(default_factory=dict)


class Network:
    """The bridge, the cables and their faults.

    Args:
        folder: where the list of faults is, and what slow cables print.
        addresses: of all hosts and the controller, by name.
    """

    def __init__(self, folder: Path, addresses: Mapping[str, IPv4Address]) -> None:
        self._folder = folder
        self._addresses = addresses

    def lay(self) -> None:
        """Make the bridge and the controller's cable."""
        self._folder.mkdir(parents=True, exist_ok=True)
        call("ip", "link", "set", "lo", "up")
        self._add_namespace(BRIDGE)
        _ip(BRIDGE, "link", "add", "br0", "type", "bridge")
        _ip(BRIDGE, "link", "set", "br0", "up")
        self._connect(CONTROLLER)

    def connect(self, host: str) -> None:
        """Give a host that has no power a namespace and a cable; does nothing if it has them."""
        if not (NAMESPACES / host).exists():
            self._add_namespace(host)
            self._connect(host)
            if slowness := self._faults().slow.get(host):
                self._insert_slow_cable(host, slowness)

    def disconnect(self, host: str) -> None:
        """Remove a host's cable and namespace.

        Connections of its dead processes may live on in the old namespace for a while; without the cable nobody
        hears of them, and the host's next start is in a new namespace, which does not know them.
        """
        self._remove_slow_cable(host)
        if _is_there(BRIDGE, _port(host)):
            _ip(BRIDGE, "link", "delete", "dev", _port(host))
        if (NAMESPACES / host).exists():
            call("ip", "netns", "delete", host)

    def unplug(self, host: str) -> None:
        """Pull the host's cable; the host notices that its link is down."""
        _ip(BRIDGE, "link", "set", _port(host), "down")

    def plug(self, host: str) -> None:
        """Put the cable back."""
        _ip(BRIDGE, "link", "set", _port(host), "up")

    def part(self, some: str | Iterable[str], others: str | Iterable[str]) -> None:
        """Let nothing through between the hosts of two groups, while each reaches everyone else.

        Args:
            some: a host, several, or "controller", which stands for all devices and operators.
            others: likewise.
        """
        faults = self._faults()
        faults.parted += product(self._known(some), self._known(others))
        self._set(faults)

    def lose(self, host: str, percent: float) -> None:
        """Lose so many of a hundred frames from and to a host, at random; 0 ends it."""
        faults = self._faults()
        for name in self._known(host):
            faults.lossy[name] = percent
        self._set(faults)

    def slow(self, host: str, delay_ms: float, jitter_ms: float = 0, loss_percent: float = 0) -> None:
        """Make a host's cable slow. Connections stay; the answer to a ping takes twice the delay.

        Args:
            host: whose cable.
            delay_ms: see Slowness.
            jitter_ms: see Slowness.
            loss_percent: see Slowness.
        """
        faults = self._faults()
        (name,) = self._known(host)
        faults.slow[name] = Slowness(delay_ms, jitter_ms, loss_percent)
        self._set(faults)
        if (NAMESPACES / name).exists() or name == CONTROLLER:
            self._insert_slow_cable(name, faults.slow[name])

    def limit(self, host: str, rate: str | None) -> None:
        """Let no more than this through to a host, such as "20mbit"; None ends it."""
        if rate is None:
            _ip_tool("tc", BRIDGE, "qdisc", "del", "dev", _port(host), "root")
        else:
            shape = ("tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")
            _ip_tool("tc", BRIDGE, "qdisc", "replace", "dev", _port(host), "root", *shape)

    def heal(self) -> None:
        """End all partitions, losses and slowness, and plug all cables of running hosts."""
        for host in self._faults().slow:
            self._remove_slow_cable(host)
        self._set(Faults())
        for host in self._addresses:
            if _is_there(BRIDGE, _port(host)):
                self.plug(host)

    def describe(self) -> str:
        """What is wrong with the network, a line each."""
        faults = self._faults()
        return "\n".join(
            [
                *(f"{one} | {other}: nothing through" for one, other in faults.parted),
                *(f"{host}: loses {percent:g} %" for host, percent in faults.lossy.items() if percent),
                *(f"{host}: {slowness}" for host, slowness in faults.slow.items()),
            ]
        )

    # --- cables

    def _add_namespace(self, name: str) -> None:
        call("ip", "netns", "add", name)
        _ip(name, "link", "set", "lo", "up")

    def _connect(self, name: str) -> None:
        """Lay a cable from the bridge to a host's namespace, or to this process's for the controller."""
        address = self._addresses[name]
        is_controller = name == CONTROLLER
        link, namespace = (CONTROLLER_LINK, "1") if is_controller else (HOST_LINK, name)
        ends = ("type", "veth", "peer", "name", link, "address", _mac(address), "netns", namespace)
        _ip(BRIDGE, "link", "add", _port(name), *ends)
        _ip(BRIDGE, "link", "set", _port(name), "gso_max_segs", "1", "master", "br0", "up")
        inside = ["ip"] if is_controller else ["ip", "-n", name]
        call(*inside, "link", "set", link, "gso_max_segs", "1")
        call(*inside, "address", "replace", f"{address}/{NETWORK_BITS}", "dev", link)
        call(*inside, "link", "set", link, "up")

    def _insert_slow_cable(self, host: str, slowness: Slowness) -> None:
        """Put the program slow_cable.py between a host's cable and the bridge, or change what it does."""
        settings = self._folder / f"{host}.slow"
        settings.write_text(json.dumps(asdict(slowness)))
        if pid := self._slow_cable(host):
            os.kill(pid, signal.SIGHUP)
            return
        log = self._log(host)
        log.unlink(missing_ok=True)
        call(
            *("setsid", "--fork", "sh", "-c", 'exec "$@" >"$0" 2>&1', log),
            *("nsenter", f"--net={NAMESPACES / BRIDGE}", sys.executable, "-m", "lab.slow_cable"),
            *(_port(host), _slow_port(host), settings),
        )
        wait_until(
            lambda: log.exists() and log.read_text(), 15, f"the slow cable of {host} works or tells why not"
        )
        if not self._slow_cable(host):
            raise LabError(f"the slow cable of {host} ended: {log.read_text()}")
        _ip(BRIDGE, "link", "set", _port(host), "nomaster")
        _ip(BRIDGE, "link", "set", _slow_port(host), "master", "br0", "up")

    def _remove_slow_cable(self, host: str) -> None:
        if pid := self._slow_cable(host):
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not _is_there(BRIDGE, _slow_port(host)), 10, f"{host}'s slow cable is gone")
        self._log(host).unlink(missing_ok=True)
        if _is_there(BRIDGE, _port(host)):
            _ip(BRIDGE, "link", "set", _port(host), "master", "br0")

    def _log(self, host: str) -> Path:
        return self._folder / f"{host}.slow.log"

    def _slow_cable(self, host: str) -> int | None:
        """The process that is this host's slow cable, if it lives."""
        with contextlib.suppress(FileNotFoundError):
            if started := re.match(r"ready (\d+)\n", self._log(host).read_text()):
                pid = int(started[1])
                if b"lab.slow_cable" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    # --- the list of faults

    def _known(self, hosts: str | Iterable[str]) -> Sequence[str]:
        names = [hosts] if isinstance(hosts, str) else list(hosts)
        if strangers := [name for name in names if name not in self._addresses]:
            raise LabError(f"no such host: {', '.join(strangers)}; there are {', '.join(self._addresses)}")
        return names

    def _faults(self) -> Faults:
        try:
            stored = json.loads((self._folder / "faults.json").read_text())
        except FileNotFoundError:
            return Faults()
        slow = {host: Slowness(**slowness) for host, slowness in stored["slow"].items()}
        return Faults([(one, other) for one, other in stored["parted"]], stored["lossy"], slow)

    def _set(self, faults: Faults) -> None:
        (self._folder / "faults.json").write_text(json.dumps(asdict(faults)))
        _ip_tool("nft", BRIDGE, "-f", "-", text=render_rules(faults))


def render_rules(faults: Faults) -> str:
    """What nft shall do with frames on their way over the bridge; replaces what it did before, in one step."""
    drops = []
    for one, other in faults.parted:
        for a, b in ((one, other), (other, one)):
            drops.append(f"iifname {_ports(a)} oifname {_ports(b)} counter drop")
    for host, percent in faults.lossy.items():
        if percent:
            for side in ("iifname", "oifname"):
                drops.append(
                    f"{side} {_ports(host)} numgen random mod 10000 < {round(percent * 100)} counter drop"
                )
    lines = "\n".join(f"        {drop}" for drop in drops)
    return f"""\
table bridge faults
delete table bridge faults
table bridge faults {{
    chain forward {{
        type filter hook forward priority 0
{lines}
    }}
}}
"""


def _port(host: str) -> str:
    return f"p-{host}"


def _slow_port(host: str) -> str:
    return f"s-{host}"


def _ports(host: str) -> str:
    return f'{{ "{_port(host)}", "{_slow_port(host)}" }}'


def _mac(address: IPv4Address) -> str:
    """An address of one's own choosing (02), the same at every start, so that no neighbour's table grows stale."""
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x00, *address.packed))


def _ip(namespace: str, *words: str) -> None:
    call("ip", "-n", namespace, *words)


def _ip_tool(tool: str, namespace: str, *words: str, text: str | None = None) -> None:
    call("nsenter", f"--net={NAMESPACES / namespace}", tool, *words, text=text)


def _is_there(namespace: str, link: str) -> bool:
    return call("ip", "-n", namespace, "link", "show", "dev", link, check=False).returncode == 0
